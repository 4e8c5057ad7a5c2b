"""``predict``, ``search``, ``evaluate``, ``verify`` and ``quantize``: the commands of these names, for any model.

All take the model first, ``inputs`` and ``options`` as ``diagnose`` does, and show their progress as it does.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from cp_debug.api.models import ModelLike, modes_kept, samples_in, to_model
from cp_debug.api.words import in_python_words, shown_steps
from cp_debug.backends.base import Backend
from cp_debug.backends.registry import create
from cp_debug.backends.spec import parse_backends
from cp_debug.deploy.exporting import ExportOptions, export_model, own_files
from cp_debug.deploy.quantize_output import PtqResult, quantize_ptq
from cp_debug.deploy.verify import VerifyOptions, VerifyResult
from cp_debug.deploy.verify import verify as run_verify
from cp_debug.detection.evaluate import as_detector
from cp_debug.detection.evaluate import evaluate as run_evaluate
from cp_debug.detection.evaluation import EvaluationOptions, EvaluationResult
from cp_debug.display import OnStep
from cp_debug.errors import InputError
from cp_debug.mixed_precision.goal import Goal
from cp_debug.mixed_precision.result import MixedPrecisionResult
from cp_debug.mixed_precision.search import MixedPrecisionOptions, samples_for
from cp_debug.mixed_precision.search import search as run_search
from cp_debug.prediction.predict import PredictOptions
from cp_debug.prediction.predict import predict as run_predict
from cp_debug.prediction.result import Prediction
from cp_debug.programs.paired import end_notes, pair_programs
from cp_debug.programs.pipeline import load_test_programs
from cp_debug.quantization.quantized_programs import quantize_programs
from cp_debug.recipes.abilities import samples_left_out
from cp_debug.recipes.data.base import DataOptions

PREDICT, SEARCH, EVALUATE, VERIFY, EXPORT = (
    PredictOptions(),
    MixedPrecisionOptions(),
    EvaluationOptions(),
    VerifyOptions(),
    ExportOptions(),
)


@in_python_words
def predict(
    model: ModelLike,
    precision: str = "fp16",
    target: str = "trt-8.6",
    *,
    inputs: Any = None,
    options: PredictOptions = PREDICT,
    progress: bool | None = None,
    on_step: OnStep | None = None,
) -> Prediction:
    """Predict what ``precision`` (fp16, bf16, tf32, int8) will do to a model on ``target``, before there is an engine.

    ``model``, ``inputs``, ``progress`` and ``on_step`` are as in ``diagnose``. Raises InputError for an unknown target,
    precision or goal, a graph with operators that nothing here executes, and ``int8`` without Q/DQ pairs.
    """
    with modes_kept(model), shown_steps(progress, on_step) as step:
        given = inputs if inputs is not None else options.inputs
        prepared, path = to_model(
            model, given, checkpoint=options.checkpoint, seed=options.seed, reading=options.reading
        )
        options = replace(options, inputs=path, samples=samples_in(inputs, options.samples))
        return run_predict(prepared, precision, target, options=options, on_step=step)


@in_python_words
def search(
    model: ModelLike,
    backends: str | Sequence[str] | Sequence[Backend] = "torch,emu-fp16acc",
    goal: str | Goal = "rel_l2<1e-3",
    *,
    inputs: Any = None,
    test_model: str | Path | None = None,
    samples: int = 1,
    seed: int = 0,
    checkpoint: str | Path | None = None,
    options: MixedPrecisionOptions = SEARCH,
    progress: bool | None = None,
    on_step: OnStep | None = None,
) -> MixedPrecisionResult:
    """Find layers to keep in FP32 (of an INT8 graph: unquantized), none of them needless, so that a goal holds.

    ``backends``: the reference and one test. ``goal``: ``rel_l2<1e-3``, ``max_abs``, ``boxes_lost`` …, joined by
    ``and``; for ``map_drop`` the ``inputs`` are the path of an info file. ``test_model`` is a Q/DQ graph of the same
    model. Raises InputError for what cannot be searched; never for a goal that is not reached.
    """
    parsed = Goal.parse(goal) if isinstance(goal, str) else goal
    created = _backends(backends, test=test_model or options.test_model)
    with modes_kept(model), shown_steps(progress, on_step) as step:
        given = inputs if inputs is not None else options.inputs
        prepared, path = to_model(model, given, checkpoint=checkpoint, seed=seed)
        scored = "map_drop" in parsed.figures
        count = samples_in(inputs, samples)
        loaded = samples_for(
            prepared,
            parsed,
            inputs=None if scored else path,
            data=path if scored else None,
            count=count,
            seed=seed,
        )
        test = options.test_model if test_model is None else Path(test_model)
        options = replace(options, inputs=None if scored else path, test_model=test)
        result = run_search(prepared, created, parsed, loaded, options, step)
        result.notes.extend(samples_left_out(prepared, path, count, len(loaded)))
        return result


@in_python_words
def evaluate(
    model: ModelLike,
    backends: str | Sequence[str] | Sequence[Backend] = "torch,ort",
    *,
    inputs: str | Path | None = None,
    samples: int = 50,
    seed: int = 0,
    checkpoint: str | Path | None = None,
    data: DataOptions | None = None,
    options: EvaluationOptions = EVALUATE,
    progress: bool | None = None,
    on_step: OnStep | None = None,
) -> EvaluationResult:
    """Score the detections of several backends: mAP, NDS and errors, with confidence intervals.

    ``model`` is one that detects, such as ``centerpoint:tiny``; ``inputs`` is the path of an info file, None the
    held-out synthetic scenes from ``seed`` on; ``data`` says how the file's clouds are read. Raises InputError for
    models that detect nothing, and for data without ground truth.
    """
    created = _backends(backends)
    with modes_kept(model), shown_steps(progress, on_step) as step:
        prepared, path = to_model(model, inputs, checkpoint=checkpoint, seed=seed)
        detector = as_detector(prepared)
        opened = detector.data(path, samples, seed, data or DataOptions())
        return run_evaluate(
            detector,
            created,
            opened,
            options,
            quantize=lambda programs, folder: quantize_programs(detector, programs, folder),
            on_step=step,
        )


@in_python_words
def verify(
    model: ModelLike,
    backends: str | Sequence[str] | Sequence[Backend] = "torch,ort",
    *,
    inputs: Any = None,
    test_model: str | Path | None = None,
    samples: int = 3,
    seed: int = 0,
    checkpoint: str | Path | None = None,
    options: VerifyOptions = VERIFY,
    export: ExportOptions = EXPORT,
    progress: bool | None = None,
    on_step: OnStep | None = None,
) -> VerifyResult:
    """Check that deployed files compute what the model computes: every output, over several samples, within its limit.

    A module is exported with ``export`` first; an ONNX file is used unchanged. ``backends``: the reference, then each
    test. ``test_model`` is another ``.onnx`` for the tests (a folder, for several components). ``result.passed`` is the
    verdict. Raises InputError and BackendUnavailable; never for a divergence.
    """
    created = _backends(backends, test=test_model)
    if len(created) < 2:
        raise InputError(f"backends: {backends!r}; expected a reference and at least one test, as in torch,ort")
    with modes_kept(model), shown_steps(progress, on_step) as step, tempfile.TemporaryDirectory() as scratch:
        prepared, path = to_model(model, inputs, checkpoint=checkpoint, seed=seed)
        loaded = list(prepared.samples(samples_in(inputs, samples), seed, path))
        if not loaded:
            raise InputError("inputs: there is no sample to verify with")
        programs = own_files(prepared)
        if programs is None:
            exported = export_model(prepared, loaded[0], Path(scratch) / "onnx", export, on_step=step)
            programs = [each.program for each in exported]
        tests = None
        if test_model is not None:
            tests = pair_programs(prepared, loaded[0], programs, load_test_programs(programs, Path(test_model)))
        pairs = [(created[0], test) for test in created[1:]]
        result = run_verify(prepared, programs, pairs, loaded, options, test_programs=tests, on_step=step)
        result.notes += samples_left_out(prepared, path, samples_in(inputs, samples), len(loaded))
        result.notes += end_notes(programs, tests) if tests is not None else ()
        return result


@in_python_words
def quantize(
    model: ModelLike,
    output: str | Path,
    *,
    inputs: Any = None,
    batches: int = 100,
    method: str = "mse",
    skip_layers: Sequence[str] = (),
    cache: str | Path | None = None,
    checkpoint: str | Path | None = None,
    seed: int = 0,
    options: ExportOptions = EXPORT,
    overwrite: bool = False,
    progress: bool | None = None,
    on_step: OnStep | None = None,
) -> PtqResult:
    """Calibrate a model and write it in INT8 into the folder ``output``: checkpoint, scales, ONNX with Q/DQ pairs.

    ``inputs`` are calibrated on, at most ``batches`` samples; None has them made up. ``method``: max, percentile, mse
    or entropy. ``skip_layers``: globs over layers that stay in FP32. ``cache``: scales of an earlier run, instead of
    calibrating. ``overwrite`` replaces the files of an earlier run in ``output``. Raises InputError for what cannot be
    quantized or exported, and for an ``output`` that holds an earlier run's files; MissingPackage without the extra
    ``quant``.
    """
    if method not in ("max", "percentile", "mse", "entropy"):
        raise InputError(f"method: {method!r}; expected max, percentile, mse or entropy")
    with modes_kept(model), shown_steps(progress, on_step) as step:
        prepared, path = to_model(model, inputs, checkpoint=checkpoint, seed=seed)
        return quantize_ptq(
            prepared,
            Path(output),
            inputs=path,
            batches=samples_in(inputs, batches),
            method=method,
            skip_layers=skip_layers,
            cache=None if cache is None else Path(cache),
            options=options,
            overwrite=overwrite,
            on_step=step,
        )


def _backends(backends: str | Sequence[str] | Sequence[Backend], *, test: object = None) -> list[Backend]:
    if not isinstance(backends, str):
        return list(cast("Sequence[Backend]", backends))  # names in a list are one text by now
    return [create(spec) for spec in parse_backends(backends, test=getattr(test, "name", test))]
