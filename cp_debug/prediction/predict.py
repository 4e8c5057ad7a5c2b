"""``predict``: effects of a precision on a target, from the model's own input, before there is an engine.

The network is computed in every way in which the target's kernels may compute it, as far as those are known, and once
in FP32. The spread of the ways is the interval.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cp_debug.backends.base import Program
from cp_debug.backends.determinism import deterministic
from cp_debug.backends.executor import unsupported
from cp_debug.backends.registry import create
from cp_debug.backends.spec import BackendSpec, parse_backends
from cp_debug.bisect.replayed import EXCESS
from cp_debug.detection.changes import BoxChanges, box_changes, changes, compare_detections
from cp_debug.display import OnStep
from cp_debug.errors import InputError
from cp_debug.graph.graph import Graph
from cp_debug.graph.randomness import refuse_random
from cp_debug.mixed_precision.goal import Goal
from cp_debug.mixed_precision.result import Named
from cp_debug.mixed_precision.search import MixedPrecisionOptions, search
from cp_debug.prediction.box_changes import joined, largest_changes
from cp_debug.prediction.kernels import Kernel, kernels_of
from cp_debug.prediction.result import CLOSE, OVERFLOWS, VANISHES, Interval, PredictedLayer, PredictedOutput, Prediction
from cp_debug.prediction.targets import target_of
from cp_debug.prediction.walk import EXACT, SPREAD, GraphWalk, interval
from cp_debug.probes.caveats import ALL_ZERO, is_text
from cp_debug.probes.statistics import TensorStats, compare
from cp_debug.programs.batchnorm_folding import fold_in_file
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

EMULATED = {"fp16": "fp16acc", "bf16": "bf16", "tf32": "tf32", "int8": "int8"}
"""Precision → the emulated backend on which a goal is searched for."""

TRIALS = 64
"""Trials for the tolerance, which nobody asked for."""


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
    runtime = target_of(target, precision)
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
        timed = options.builder_level != 0
        walks = {
            p.name: GraphWalk(
                p, _computed(p, precision, Path(scratch)), kernels, precision, options.device, timed=timed
            )
            for p in programs
        }
        result = Prediction(
            model=loaded.name,
            target=runtime.name,
            precision=precision,
            kernels={kernel.name: kernel.says for kernel in kernels},
            spread=SPREAD,
            weak=runtime.weak,
            samples=[sample.source for sample in samples],
            layers=[],
            outputs=[],
            named=Named.of(programs, how.exporter),
        )
        if is_exported(loaded) and runtime.opset:
            result.notes.append(f"exported at opset {runtime.opset}, the newest that {runtime.name} reads")
        if not runtime.measured:
            result.notes.append(f"kernels of {runtime.name} were never measured: those of TensorRT 8.6 are assumed")
        outputs, layers, remarks = FinalOutputs(), dict[Key, PredictedLayer](), Remarks(loaded)
        for i, sample in enumerate(samples):
            remarks.see(sample)
            ways = {run: Walk(loaded, sample) for run in (EXACT, *result.kernels)}
            for steps in zip(*ways.values(), strict=True):
                name, walk = steps[0].name, walks[steps[0].name]
                with deterministic(), torch.no_grad():
                    fed = {run: step.inputs for run, step in zip(ways, steps, strict=True)}
                    for place, layer in enumerate(walk.run(fed), 1):
                        on_step(f"{name}: layer {place} of about {len(walk.groups)}", i, len(samples))
                        key = Key(name, layer.value)
                        layers[key] = _worse(layers[key], layer) if key in layers else layer
                for run, step in zip(ways, steps, strict=True):
                    step.outputs = walk.outputs[run]
                outputs.add(name, walk.outputs)
            _add_detections(result, loaded, sample, {run: way.results for run, way in ways.items()}, kernels)
        result.layers = list(layers.values())
        for layer in (layer for layer in result.layers if layer.keep):
            known = result.keep.setdefault(layer.component, [])
            known += [node for node in layer.nodes if node not in known]
        if lost := {n: op for walk in walks.values() for n, op in walk.not_emulated.items()}:
            named = some([f"{n} ({op})" for n, op in lost.items()], 3)
            result.notes.append(f"{len(lost)} nodes are rounded only at their result, not inside: {named}")
        last = loaded.components[-1].name
        outputs.check(loaded.name, last)
        result.outputs = [PredictedOutput(*key, error) for key, error in outputs.errors.items()]
        result.outputs.sort(key=lambda output: output.component != last)
        result.notes += outputs.notes()
        if silent := {name: None for walk in walks.values() for name in walk.silent}:
            told = some(silent, 3)
            result.notes.append(f"{len(silent)} layers hold no finite number in FP32, and are left out: {told}")
        result.notes = list(dict.fromkeys([*result.notes, *remarks.sentences, *left_out]))
        breaks = not result.near or any(layer.keep and layer.excess <= EXCESS for layer in result.layers)
        if goal is None and precision in ("fp16", "bf16") and breaks:
            goal = Goal.parse(f"rel_l2<{PRECISIONS[precision].rtol:g}")
        if goal is not None:
            on_step(f"searching for {goal}", len(samples), len(samples))
            _reach(goal, with_files(loaded, programs), samples, result, options)
    result.seconds = time.monotonic() - begun
    return result


def _computed(program: Program, precision: str, folder: Path) -> Graph:
    """The program's graph as a target computes it. Raises InputError where nothing here can."""
    graph = program.graph
    if unknown := unsupported(graph):
        raise InputError(f"{graph}: no implementation of {unknown[0].op} (node {unknown[0].name!r})")
    if precision != "int8":
        return fold_in_file(graph, folder / f"{program.name}.folded.onnx")
    if graph.precision != "int8":
        raise InputError(f"--precision int8: {graph} has no QuantizeLinear nodes; `cpdebug quantize ptq` puts them in")
    return graph


def _add_detections(
    result: Prediction,
    model: Model,
    sample: Sample,
    results: Mapping[str, Mapping[str, Arrays]],
    kernels: Sequence[Kernel],
) -> None:
    """Add what each kernel changes of the boxes of one sample. ``results``: run → component → output → array."""
    reference: Any = decode(model, sample, results[EXACT])
    if not isinstance(reference, DetectsBoxes):
        return
    families: dict[str, list[BoxChanges]] = {}
    for kernel in kernels:
        test: Any = decode(model, sample, results[kernel.name])
        if not isinstance(test, DetectsBoxes):
            result.notes.append(f"the decoder cannot read the outputs of {kernel.name}")
            continue
        change = compare_detections(reference, test)
        earlier = result.detections.get(kernel.name)
        result.detections[kernel.name] = change if earlier is None else earlier + change
        each = box_changes(changes(reference, test), reference, test)
        families.setdefault(kernel.arithmetic.name, []).append(each)
    if families:
        result.largest_changes = joined(result.largest_changes, largest_changes([*families.values()]))


class FinalOutputs:
    """Knowledge of every output of every component so far, over all ways and samples."""

    def __init__(self) -> None:
        self.errors: dict[Key, Interval] = {}
        """Of outputs of floats with a finite number."""
        self._own: dict[Key, list[TensorStats]] = {}
        """Output of floats → what it holds in FP32, by sample."""
        self._differ: dict[Key, tuple[int, int]] = {}
        """Output of whole numbers or strings → elements of which a way gives another, and all, on the worst sample."""

    def add(self, component: str, outputs: Mapping[str, Arrays]) -> None:
        """Take in one sample. ``outputs``: run → output → array in any dtype."""
        for name, exact in outputs[EXACT].items():
            key, ways = Key(component, name), {run: of.get(name) for run, of in outputs.items() if run != EXACT}
            if is_text(exact) or not np.issubdtype(exact.dtype, np.floating):
                counts = (
                    exact.size if way is None or way.shape != exact.shape else int((way != exact).sum())
                    for way in ways.values()
                )
                self._differ[key] = max(self._differ.get(key, (0, 0)), (max(counts), exact.size))
                continue
            own = compare(exact, exact)
            self._own.setdefault(key, []).append(own)
            if not own.nothing_compared:
                error = interval({run: _error(exact, way) for run, way in ways.items()})
                self.errors[key] = error.joined(self.errors[key]) if key in self.errors else error

    def _silent(self) -> dict[Key, str]:
        """Output without a finite number on any sample → why."""
        why = {
            key: "is NaN or Inf everywhere in FP32" if own[-1].count else "has no element"
            for key, own in self._own.items()
        }
        return {key: reason for key, reason in why.items() if key not in self.errors}

    def check(self, model: str, component: str) -> None:
        """Raise InputError where nothing is known of any output of the last component."""
        known = {*self.errors, *(key for key, (_, size) in self._differ.items() if size)}
        if not any(key.component == component for key in known):
            why = ", ".join(f"{k.value} {reason}" for k, reason in self._silent().items() if k.component == component)
            raise InputError(
                f"{model}: no error of an output can be predicted: {why or 'there is none'}; give other inputs"
            )

    def notes(self) -> Iterator[str]:
        """Remarks on outputs that have no interval, and on what an interval does not tell."""
        for key, why in self._silent().items():
            yield f"nothing is predicted of {key.value}, which {why}"
        compared = {key: [s for s in self._own[key] if not s.nothing_compared] for key in self.errors}
        for key, own in compared.items():
            count, size = max((stats.nan_ref + stats.inf_ref, stats.count) for stats in own)
            others = "its error is that of the others"
            yield from [f"{key.value} holds {count} NaN or Inf of {size} elements in FP32: {others}"] if count else []
        for key, (count, size) in self._differ.items():
            if not size:
                yield f"nothing is predicted of {key.value}, which has no element"
            elif count or not key.value.endswith((".length", ".given")):
                how = "no variant changes it" if not count else f"up to {count} of {size} elements differ"
                yield f"{key.value} holds no floats, so it has no relative error: {how}"
        if compared and all(stats.both_zero for own in compared.values() for stats in own):
            yield ALL_ZERO


def _error(exact: np.ndarray, way: np.ndarray | None) -> float:
    """Relative L2 error of one way; infinite where it is not finite, or the way has no such output."""
    error = np.inf if way is None or is_text(way) else compare(exact, way).rel_l2
    return error if np.isfinite(error) else np.inf


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
