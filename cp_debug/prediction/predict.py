"""``predict``: effects of a precision on a target, from the model's own input, before there is an engine.

The network is computed in every way in which the target's kernels may compute it, as far as those are known, and once
in FP32. The spread of the ways is the interval.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cp_debug.backends.base import Program
from cp_debug.backends.determinism import deterministic
from cp_debug.backends.executor import unsupported
from cp_debug.backends.registry import create
from cp_debug.backends.spec import BackendSpec, parse_backends
from cp_debug.bisect.causes.precision import OVERFLOWS as BEYOND
from cp_debug.bisect.preflight import leaves_half
from cp_debug.bisect.replayed import EXCESS
from cp_debug.detection.changes import DetectionChange, compare_detections
from cp_debug.errors import InputError
from cp_debug.graph.fold_batchnorm import fold_batchnorm
from cp_debug.graph.operators import QUANTIZERS
from cp_debug.graph.randomness import refuse_random
from cp_debug.mixed_precision.emit import Named
from cp_debug.mixed_precision.goal import Goal
from cp_debug.mixed_precision.search import MixedPrecisionOptions, search
from cp_debug.prediction.box_changes import BoxChanges, box_changes, joined, largest_changes
from cp_debug.prediction.final_outputs import FinalOutputs
from cp_debug.prediction.result import (
    CLOSE,
    OVERFLOWS,
    VANISHES,
    Interval,
    PredictedLayer,
    Prediction,
)
from cp_debug.prediction.targets import Kernel, Target, kernels_of, target_of
from cp_debug.prediction.walk import EXACT, GraphWalk, Walked
from cp_debug.probes.distance import relative_l2
from cp_debug.programs.layers import layer_name
from cp_debug.programs.pipeline import Export, Key, is_exported, prepare, preparing, with_files
from cp_debug.programs.precision import PRECISIONS
from cp_debug.programs.scene import decode
from cp_debug.programs.tensor_inputs import numbers_where_needed
from cp_debug.programs.walk import Walk
from cp_debug.recipes.abilities import DetectsBoxes, Remarks, samples_left_out
from cp_debug.recipes.base import Arrays, Model, Sample
from cp_debug.recipes.input_files import DEFAULT_READING, Reading
from cp_debug.recipes.registry import load_model
from cp_debug.safe_text import some

SPREAD = 1.25
"""Factor by which an interval is wider than the kernels' errors: engines know more orders of summation than these."""
CLOSE_TO = 8.0
"""Factor below FP16's largest number within which another input is likely to exceed it."""
EMULATED = {"fp16": "fp16acc", "bf16": "bf16", "tf32": "tf32", "int8": "int8"}
"""Precision → the emulated backend on which a goal is searched for."""

TRIALS = 64
"""Trials for the tolerance, which nobody asked for."""

OnStep = Callable[[str, int, int], None]


@dataclass(frozen=True)
class PredictOptions:
    """Settings of a prediction; the defaults are those of the command line."""

    checkpoint: Path | None = None
    inputs: Path | None = None
    samples: int = 1
    seed: int = 0
    exporter: str | None = None
    device: str = "cpu"
    goal: str | None = None
    """Search on the emulator for the fewest layers to keep so that it holds, too."""
    reading: Reading = DEFAULT_READING
    """Settings for reading ``inputs``, and sizes of made-up ones."""
    builder_level: int | None = None
    """The builder's optimization level. At 0 TensorRT takes the first kernel that works, so that any layer may stay in
    FP32; None, and all others, time them."""


def predict(
    model: Model | str,
    precision: str = "fp16",
    target: str = "trt-8.6",
    *,
    options: PredictOptions = PredictOptions(),
    on_step: OnStep = lambda text, done, total: None,
) -> Prediction:
    """Predict the effects of ``precision`` on ``model`` when it runs on ``target``.

    ``precision`` is fp16, bf16, tf32, or int8 for a file with Q/DQ pairs; ``model`` is as the command line takes it, or
    loaded. Raises InputError for an unknown target, precision or goal, a graph with operators that nothing here
    executes, and ``int8`` without Q/DQ pairs.
    """
    begun = time.monotonic()
    runtime = target_of(target)
    kernels = kernels_of(runtime, precision)
    goal = Goal.parse(options.goal) if options.goal else None
    create(BackendSpec.parse(f"emu-fp32@{options.device}"))  # refuses a device that is not there
    loaded = model
    if isinstance(loaded, str):
        loaded = load_model(loaded, checkpoint=options.checkpoint, seed=options.seed, reading=options.reading)
    samples = list(loaded.samples(options.samples, options.seed, options.inputs))
    if not samples:
        raise InputError("--inputs: there is no sample to predict with")
    left_out = samples_left_out(loaded, options.inputs, options.samples, len(samples))
    with tempfile.TemporaryDirectory(prefix="cpdebug-predict-") as scratch:
        on_step(preparing(loaded), 0, len(samples))
        loaded, samples = numbers_where_needed(loaded, samples, Path(scratch))
        how = Export(options.exporter or ("torchscript" if runtime.opset else "dynamo"), runtime.opset)
        programs = prepare(loaded, samples[0], Path(scratch), how=how)
        refuse_random((program.graph for program in programs), "no error can be predicted")
        job = _ModelPrediction(loaded, programs, runtime, precision, kernels, options, Path(scratch))
        for i, sample in enumerate(samples):
            job.add(sample, partial(_tell, on_step, i, len(samples)))
        result = job.result([sample.source for sample in samples])
        result.notes += left_out
        result.named = Named.of(programs, how.exporter)
        breaks = not result.near or any(layer.keep and layer.excess <= EXCESS for layer in result.layers)
        if goal is None and precision in ("fp16", "bf16") and breaks:
            goal = Goal.parse(f"rel_l2<{PRECISIONS[precision].rtol:g}")
        if goal is not None:
            on_step(f"searching for {goal}", len(samples), len(samples))
            _reach(goal, with_files(loaded, programs), samples, result, options)
    result.seconds = time.monotonic() - begun
    return result


class _ModelPrediction:
    """The figures of one model, sample after sample."""

    def __init__(
        self,
        model: Model,
        programs: Sequence[Program],
        target: Target,
        precision: str,
        kernels: Sequence[Kernel],
        options: PredictOptions,
        scratch: Path,
    ) -> None:
        timed = options.builder_level != 0
        self._device = options.device
        self._model, self._target, self._precision, self._kernels = model, target, precision, kernels
        self._mixed = any(kernel.mixed for kernel in kernels)
        self._programs = {program.name: program for program in programs}
        self._layers: dict[Key, PredictedLayer] = {}
        self._outputs = FinalOutputs()
        self._silent: dict[str, None] = {}
        """Layers without a finite number in FP32, of which nothing is predicted."""
        self._detections: dict[str, DetectionChange] = {}
        self._largest_changes: dict[str, Interval] = {}
        self._notes: list[str] = []
        self._remarks = Remarks(model)
        self._walks: dict[str, GraphWalk] = {}
        for program in programs:
            if unknown := unsupported(program.graph):
                raise InputError(f"{program.graph}: no implementation of {unknown[0].op} (node {unknown[0].name!r})")
            graph = program.graph
            if precision != "int8":
                graph = fold_batchnorm(graph, scratch / f"{program.name}.folded.onnx")
            elif graph.precision != "int8":
                raise InputError(
                    f"--precision int8: {graph} has no QuantizeLinear nodes; `cpdebug quantize ptq` puts them in"
                )
            self._walks[program.name] = GraphWalk(graph, kernels, options.device, timed=timed)
        if is_exported(model) and target.opset:
            self._notes.append(f"exported at opset {target.opset}, the newest that {target.name} reads")
        if not target.measured:
            self._notes.append(f"kernels of {target.name} were never measured: those of TensorRT 8.6 are assumed")

    def add(self, sample: Sample, tell: Callable[[str], None]) -> None:
        """Compute one sample and take its figures in."""
        self._remarks.see(sample)
        runs = [EXACT, *(kernel.name for kernel in self._kernels)]
        ways = {run: Walk(self._model, sample) for run in runs}
        for steps in zip(*ways.values(), strict=True):
            component = steps[0].component
            walk = self._walks[component.name]
            fed = {run: step.inputs for run, step in zip(ways, steps, strict=True)}
            count = len(walk.groups)
            with deterministic(), torch.no_grad():
                for i, walked in enumerate(walk.run(fed)):
                    tell(f"{component.name}: layer {i + 1} of about {count}")
                    self._take(component.name, walked)
            for run, step in zip(ways, steps, strict=True):
                step.outputs = walk.outputs[run]
            exact, ways_out = walk.outputs[EXACT], {kernel.name: walk.outputs[kernel.name] for kernel in self._kernels}
            self._outputs.add(component.name, exact, ways_out, self._interval)
        self._take_detections(sample, {run: way.results for run, way in ways.items()})

    def _take(self, component: str, walked: Walked) -> None:
        group, key = walked.group, Key(component, walked.value)
        if all(node.op in QUANTIZERS for node in group.nodes):
            return
        assert walked.exact is not None
        name = layer_name(self._programs[component], walked.value) if self._knows(key) else walked.value
        if not bool(torch.isfinite(walked.exact).any()):
            self._silent[name] = None
            return
        layer = PredictedLayer(
            component,
            name,
            walked.value,
            [node.name for node in group.nodes],
            [node.op for node in group.nodes],
            walked.reads,
            self._interval(walked.error),
            self._interval(walked.introduced) if walked.introduced else None,
            {v: self._interval(e, partial=True) for v, e in walked.inside.items()},
        )
        if walked.introduced and self._precision == "fp16":
            rounding, high = walked.introduced["fp16"], max(walked.introduced.values())
            layer.excess = high / rounding if rounding else 0.0
        layer.may_stay = self._mixed and walked.may_stay
        if layer.may_stay and layer.introduced is not None and (stored := self._kernels[-1].stored) is not None:
            # What it reads may come in FP32, so that even a pool rounds.
            rounding = relative_l2(stored.round(walked.exact), walked.exact)
            layer.introduced = replace(layer.introduced, high=max(layer.introduced.high, SPREAD * rounding))
        self._range(layer, walked)
        self._keep(layer)
        self._layers[key] = layer if key not in self._layers else _worse(self._layers[key], layer)

    def _knows(self, key: Key) -> bool:
        return key.value in self._programs[key.component].graph.producer

    def _interval(self, errors: Mapping[str, float], *, partial: bool = False) -> Interval:
        expected = errors.get(self._kernels[0].name)
        assert partial or expected is not None
        first = next(iter(errors.values())) if expected is None else expected
        return Interval.around(first, errors.values(), SPREAD)

    def _range(self, layer: PredictedLayer, walked: Walked) -> None:
        assert walked.exact is not None
        layer.largest = max(walked.largest.values(), default=0.0)
        if self._precision != "fp16" or not walked.group.computes:
            return
        if layer.largest >= BEYOND:
            layer.range = OVERFLOWS
        elif layer.largest >= BEYOND / CLOSE_TO:
            layer.range = CLOSE
        elif leaves_half(walked.exact.cpu()):
            layer.range = VANISHES

    def _keep(self, layer: PredictedLayer) -> None:
        if layer.range == OVERFLOWS:
            layer.keep = f"results up to {layer.largest:.3g} are beyond FP16's 65504"
        elif layer.introduced is not None and not np.isfinite(layer.introduced.high):
            layer.keep = "NaN or Inf appears in it"
        elif layer.excess > EXCESS:
            layer.keep = f"sums in FP16 introduce up to {layer.excess:.1f} times what rounding its results does"

    def _take_detections(self, sample: Sample, results: Mapping[str, Mapping[str, Arrays]]) -> None:
        reference: Any = decode(self._model, sample, results[EXACT])
        if not isinstance(reference, DetectsBoxes):
            return
        families: dict[str, list[BoxChanges]] = {}
        for kernel in self._kernels:
            test: Any = decode(self._model, sample, results[kernel.name])
            if not isinstance(test, DetectsBoxes):
                self._notes.append(f"the decoder cannot read the outputs of {kernel.name}")
                continue
            change = compare_detections(reference, test)
            earlier = self._detections.get(kernel.name)
            self._detections[kernel.name] = change if earlier is None else earlier + change
            families.setdefault(kernel.arithmetic.name, []).append(box_changes(reference, test))
        if families:
            self._largest_changes = joined(self._largest_changes, largest_changes([*families.values()]))

    def result(self, sources: Sequence[str]) -> Prediction:
        """The prediction over all samples. Raises InputError where nothing is known of any output."""
        keep: dict[str, list[str]] = {}
        for layer in (layer for layer in self._layers.values() if layer.keep):
            known = keep.setdefault(layer.component, [])
            known += [node for node in layer.nodes if node not in known]
        lost = {n: op for walk in self._walks.values() for n, op in walk.not_emulated.items()}
        if lost:
            named = some([f"{n} ({op})" for n, op in lost.items()], 3)
            self._notes.append(f"{len(lost)} nodes are rounded only at their result, not inside: {named}")
        last = self._model.components[-1].name
        self._outputs.check(self._model.name, last)
        outputs = sorted(self._outputs.predicted.values(), key=lambda o: o.component != last)
        self._notes += self._outputs.notes()
        if self._silent:
            named = some(self._silent, 3)
            self._notes.append(f"{len(self._silent)} layers hold no finite number in FP32, and are left out: {named}")
        return Prediction(
            model=self._model.name,
            target=self._target.name,
            precision=self._precision,
            kernels={kernel.name: kernel.says for kernel in self._kernels},
            spread=SPREAD,
            weak=self._target.weak,
            samples=list(sources),
            layers=list(self._layers.values()),
            outputs=outputs,
            detections=self._detections,
            largest_changes=self._largest_changes,
            keep=keep,
            notes=list(dict.fromkeys([*self._notes, *self._remarks.sentences])),
        )


def _tell(on_step: OnStep, done: int, total: int, text: str) -> None:
    on_step(text, done, total)


def _worse(known: PredictedLayer, other: PredictedLayer) -> PredictedLayer:
    """One layer's figures over two samples, the worse of each."""
    worst = other if other.error.expected > known.error.expected else known
    worst.error = known.error.joined(other.error)
    if known.introduced is not None and other.introduced is not None:
        worst.introduced = known.introduced.joined(other.introduced)
    worst.inside = {v: i.joined(other.inside[v]) if v in other.inside else i for v, i in known.inside.items()}
    worst.largest, worst.excess = max(known.largest, other.largest), max(known.excess, other.excess)
    order = ("", VANISHES, CLOSE, OVERFLOWS)
    worst.range = max(known.range, other.range, key=order.index)
    worst.keep = known.keep or other.keep
    return worst


def _reach(goal: Goal, model: Model, samples: Sequence[Sample], result: Prediction, options: PredictOptions) -> None:
    """Put the fewest layers that reach the goal on the emulator into ``result``, in place of those beyond the range."""
    where = "" if options.device == "cpu" else f"@{options.device}"
    names = f"emu-fp32{where},emu-{EMULATED[result.precision]}{where}"
    most = None if options.goal else TRIALS
    backends = [create(s) for s in parse_backends(names)]
    search_result = search(model, backends, goal, samples, MixedPrecisionOptions(max_builds=most))
    result.goal, result.reached = str(goal), search_result.reached
    result.measured, result.measured_by = dict(search_result.best.measured.figures), search_result.backend
    result.notes += [note for note in search_result.notes if note not in result.notes]
    result.keep = {component: nodes for component, nodes in search_result.keep.items() if nodes}
    for layer in result.layers:
        is_kept = not set(result.keep.get(layer.component, ())).isdisjoint(layer.nodes)
        if not is_kept:
            layer.keep = ""
        elif not layer.keep:
            layer.keep = f"for {goal}"
