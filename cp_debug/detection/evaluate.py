"""Run backends over a data set and score what they detect."""

from __future__ import annotations

import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import numpy as np

from cp_debug.backends.base import Backend, Program
from cp_debug.detection.boxes import Predictions
from cp_debug.detection.evaluation import EvaluationOptions, EvaluationResult, score_backends
from cp_debug.display import OnStep
from cp_debug.errors import InputError
from cp_debug.programs.pipeline import Export, Pipeline, choose_export, prepare, wants_int8
from cp_debug.recipes.abilities import DetectsBoxes, HasClasses, HasData, Remarks
from cp_debug.recipes.base import Arrays, Model
from cp_debug.recipes.data.base import DataSet, Truth, iterate

Quantize = Callable[[list[Program], Path], tuple[list[Program], str]]
"""Makes programs with Q/DQ pairs in a folder, and says how."""


class Detector(Model, HasClasses, HasData, Protocol):
    """A model whose ``decode`` gives boxes: ``DetectsBoxes`` with [N, 9] and z of the bottom centre."""

    @property
    def region(self) -> tuple[float, float, float, float]:
        """The region that the model sees, from above: x0, y0, x1, y1 in m."""
        ...


def as_detector(model: Model) -> Detector:
    """``model`` itself. Raises InputError for one that detects nothing, such as an ONNX file."""
    if not isinstance(model, HasClasses) or not isinstance(model, HasData):
        raise without_boxes(model.name)
    return model  # type: ignore[return-value]


def without_boxes(name: str) -> InputError:
    """The refusal to score a model that detects nothing."""
    return InputError(
        f"MODEL: {name} decodes no boxes, so it cannot be scored; expected a recipe with boxes, as centerpoint:tiny"
    )


class Clock:
    """Adds up seconds by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


def evaluate(
    model: Detector,
    backends: Sequence[Backend],
    data: DataSet,
    options: EvaluationOptions,
    *,
    exporter: str | None = None,
    folded: bool = True,
    programs: Sequence[Program] | None = None,
    quantize: Quantize = lambda programs, folder: (programs, ""),
    on_step: OnStep = lambda text, done, total: None,
) -> EvaluationResult:
    """Run every backend on every sample, each sample read once, and score the detections.

    ``options.region`` None is the model's own. ``programs`` None exports the model for this run, and has ``quantize``
    make the programs of backends in INT8. The first backend is the reference.

    Raises InputError for data without ground truth.
    """
    clock, steps = Clock(), len(data) * len(backends)
    names: list[str] = []
    truths: list[Truth] = []
    detected: list[list[DetectsBoxes]] = [[] for _ in backends]
    remarks, strange = Remarks(model), Counter[str]()
    with tempfile.TemporaryDirectory(prefix="cpdebug-") as scratch, ExitStack() as stack:
        on_step("exporting", 0, steps)
        with clock("export"):
            if programs is not None:
                programs_by_backend, how = [list(programs)] * len(backends), ""
            else:
                export, _ = choose_export(backends, exporter)
                programs_by_backend, how = _prepare(model, backends, Path(scratch), export, folded, quantize)
            pipelines = [
                stack.enter_context(Pipeline(model, *pair)) for pair in zip(programs_by_backend, backends, strict=True)
            ]
        samples = iterate(data)
        for index in range(len(data)):
            with clock("load"):
                sample = next(samples)
            if sample.truth is None:
                because = f" ({'; '.join(data.notes)})" if data.notes else ""
                raise InputError(f"{sample.source}: has no ground truth{because}; expected an info file (.pkl)")
            names.append(sample.source)
            remarks.see(sample)
            truths.append(sample.truth)
            for number, pipeline in enumerate(pipelines):
                on_step(str(pipeline.backend.spec), index * len(pipelines) + number, steps)
                with clock("forward"):
                    results = pipeline.run(sample)
                strange[str(pipeline.backend.spec)] += not finite(results[model.components[-1].name])
                with clock("decode"):
                    detected[number].append(model.decode(sample, results))  # type: ignore[arg-type]
        records = [pipeline.record() for pipeline in pipelines]
    on_step("scoring", steps, steps)
    options = options if options.region else replace(options, region=model.region)
    with clock("score"):
        predictions = [Predictions.gather(detections) for detections in detected]
        runs = {record.spec: pair for record, pair in zip(records, zip(records, predictions, strict=True), strict=True)}
        scores, notes = score_backends(runs, truths, model.class_names, options, strange, on_step)
    return EvaluationResult(
        model=model.name,
        data=data.name,
        samples=names,
        options=options,
        backends=scores,
        predictions={spec: detections for spec, (_, detections) in runs.items()},
        notes=[*data.notes, *remarks.sentences, *notes, *([how] if how else [])],
        seconds=clock.seconds,
    )


def _prepare(
    model: Detector,
    backends: Sequence[Backend],
    folder: Path,
    export: Export,
    folded: bool,
    quantize: Quantize,
) -> tuple[list[list[Program]], str]:
    """The programs of each backend, and what ``quantize`` said."""
    (example,) = model.samples(1, 0, None)
    programs = prepare(model, example, folder, how=export, folded=folded)
    int8, how = quantize(programs, folder / "int8") if any(map(wants_int8, backends)) else (programs, "")
    return [int8 if wants_int8(backend) else programs for backend in backends], how


def finite(outputs: Arrays) -> bool:
    """Whether the outputs, name → array of any shape and dtype, hold neither NaN nor Inf."""
    return all(bool(np.isfinite(array).all()) for array in outputs.values() if array.dtype.kind == "f")
