"""Mixed-precision search: layers to keep in higher precision, none of them needless, so that a goal holds.

Nothing kept is tried first, and shows what an engine fuses. Then everything is predicted and minimized on the emulator,
where a trial is a part of a forward pass; what comes out is confirmed, and minimized again, on the backend itself.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cp_debug.backends.base import Backend, Program
from cp_debug.backends.narrow_options import NarrowOptions, is_narrow
from cp_debug.backends.tensorrt.config import STRONG_ONLY, release_of
from cp_debug.detection.evaluate import as_detector
from cp_debug.display import OnStep
from cp_debug.errors import InputError
from cp_debug.files import key_of
from cp_debug.graph.graph import Graph
from cp_debug.graph.qdq import quantized_inputs, remove_qdq
from cp_debug.graph.randomness import refuse_random
from cp_debug.minimize import smallest
from cp_debug.mixed_precision.goal import Goal
from cp_debug.mixed_precision.layers import (
    FusionGroup,
    Kept,
    TrialPrecision,
    fused,
    fusion_groups_of,
    nodes_of,
    precision_of,
)
from cp_debug.mixed_precision.result import KeptLayer, MixedPrecisionResult, Named, write_onnx
from cp_debug.mixed_precision.runners import BackendRunner, EmulatedRunner
from cp_debug.mixed_precision.trials import Judge, Measured, Trial, TrialLog, nodes_in
from cp_debug.probes.capture import array_hash
from cp_debug.programs.pipeline import (
    Pipeline,
    choose_export,
    is_exported,
    load_test_programs,
    prepare,
    preparing,
    wants_int8,
)
from cp_debug.programs.tensor_inputs import has_other_inputs, numbers_where_needed
from cp_debug.programs.unroll import Unroller
from cp_debug.quantization.models import QuantizedComponent
from cp_debug.quantization.narrow_layers import check_exportable
from cp_debug.quantization.quantized_programs import Calibration, already_quantized, quantize_programs
from cp_debug.recipes.abilities import Remarks
from cp_debug.recipes.base import Model, Sample
from cp_debug.recipes.data.base import DataOptions, iterate
from cp_debug.safe_text import amount

REMAINS = 0.3
"""Part of an error that may remain, for goals that say nothing of its size: boxes, mAP."""

NOT_LINEAR = 0.5
"""What the shares may leave of the divergence for their signs to say anything."""
LEADS = 0.1
"""Where they do not, layers with less than this part of the largest share wait until that is kept."""


class Predictor:
    """Extends sets of kept layers that do not reach the goal by those with the largest shares in the divergence.

    A share is ⟨D, J eᵢ⟩ ÷ ‖D‖² (``bisect/shares.py``), of all layers by one walk backward. Errors of different layers
    are taken as independent: their squares add up, and what is left is the root of the other shares.
    """

    def __init__(
        self,
        groups: Sequence[FusionGroup],
        goal: Goal,
        local_error: Callable[[FusionGroup], float],
        shares: Callable[[Kept], Mapping[tuple[str, str], float]],
    ) -> None:
        """``local_error`` is what a layer introduces by itself, ``shares`` the share of each (component, node) in what
        a run with these layers kept is off."""
        self._goal, self._shares = goal, shares
        self.groups = groups
        self.local = {group: local_error(group) for group in groups}
        self.shares: dict[FusionGroup, float] = {}
        """Layer → its share where nothing that is finite by itself was kept."""

    def extend(self, grown: Sequence[FusionGroup], measured: Measured) -> list[FusionGroup]:
        """Layers to keep besides ``grown``, whose figures are ``measured``.

        As many as should reach the goal, as far as shares tell, at least one; none when all are kept. Those that are
        not finite by themselves come first.
        """
        unkept = [group for group in self.groups if group not in grown]
        if not unkept:
            return []
        if broken := [group for group in unkept if math.isinf(self.local[group])]:
            return broken
        of_nodes = self._shares(frozenset(grown))
        shares = {group: group.share(of_nodes) for group in unkept}
        self.shares = self.shares or shares
        floor = -min(shares.values())
        if abs(1 - sum(shares.values())) > NOT_LINEAR:
            shares = {group: abs(share) for group, share in shares.items()}
            floor = LEADS * max(shares.values())
        ranked = sorted(unkept, key=lambda group: (shares[group], self.local[group]), reverse=True)
        left = [max(shares[group], 0.0) for group in ranked]
        if not sum(left):
            return ranked[: max(1, len(grown))]  # nothing is known of them: double it
        # Errors that have nothing to do with D have shares of either sign: up to the most negative one it is chance.
        seen = max(1, sum(share > floor for share in left))
        enough = (n for n in range(1, seen) if self._suffices(measured, math.sqrt(sum(left[n:]) / sum(left))))
        return ranked[: next(enough, seen)]

    def _suffices(self, measured: Measured, ratio: float) -> bool:
        """Whether the goal should hold once ``ratio`` of the error is left."""
        if {"rel_l2", "max_abs"}.issuperset(self._goal.figures):
            figures = {name: measured.figures.get(name, math.inf) for name in self._goal.figures}
            return self._goal.holds({name: value * ratio for name, value in figures.items()})
        return ratio <= REMAINS


@dataclass(frozen=True)
class MixedPrecisionOptions:
    """Options of a mixed-precision search. The defaults are those of the command line."""

    max_builds: int | None = None
    """Largest number of engines and sessions made; of trials for an emulated backend."""
    budget: float | None = None
    """Time in seconds after which no further trial begins."""
    log: Path | None = None
    exporter: str | None = None
    folded: bool = True
    test_model: Path | None = None
    """Another file for the test: a Q/DQ graph of the same model (a folder, for several components)."""
    inputs: Path | None = None
    """Data to calibrate on, for an INT8 backend and a model that is not quantized; None: the model's own samples."""
    quantized: Mapping[str, QuantizedComponent] = field(default_factory=dict)
    """The components in INT8 where a checkpoint gives them: see ``load_quantized``."""
    onnx: Path | None = None
    """File for the mixed-precision graph when the goal is reached; a folder, for several components."""


def samples_for(
    model: Model, goal: Goal, *, inputs: Path | None, data: Path | None, count: int, seed: int
) -> list[Sample]:
    """The samples to measure on: with ground truth where the goal scores detections.

    Raises InputError for unusable files, and for a model that detects nothing.
    """
    if "map_drop" not in goal.figures:
        if data is not None:
            raise InputError("--data is for goals on map_drop; give other samples with --inputs")
        return list(model.samples(count, seed, inputs))
    if inputs is not None:
        raise InputError("--inputs: map_drop needs ground truth; give an info file with --data")
    return list(iterate(as_detector(model).data(data, count, seed, DataOptions())))


class OutOfBudget(Exception):
    """No further trial may begin; the message says why."""


def search(
    model: Model,
    backends: Sequence[Backend],
    goal: Goal,
    samples: Sequence[Sample],
    options: MixedPrecisionOptions = MixedPrecisionOptions(),
    on_step: OnStep = lambda text, done, total: None,
) -> MixedPrecisionResult:
    """Mixed-precision search: a set of layers to keep, none of them needless, so that the goal holds.

    ``backends`` are the reference and one test.

    Raises InputError for backends whose layers cannot be kept one by one, a goal that this model cannot be asked for,
    samples that are none, and a log of another search; never for a goal that is not reached.
    """
    if len(backends) != 2:
        names = ", ".join(str(backend.spec) for backend in backends)
        raise InputError(f"--backends: expected a reference and one test, as in torch,emu-fp16acc; got {names}")
    if not samples:
        raise InputError("--inputs: there is no sample to measure on")
    with tempfile.TemporaryDirectory(prefix="cpdebug-search-") as scratch:
        if has_other_inputs(model):
            if options.onnx is not None or options.test_model is not None:
                raise InputError(
                    f"{model.name}: with inputs of strings, sequences, optionals or maps the search "
                    "takes no --test-model and writes no --onnx"
                )
            model, samples = numbers_where_needed(model, samples, Path(scratch))
        return _MixedPrecisionSearch(model, backends, goal, samples, options, on_step, Path(scratch)).run()


class _MixedPrecisionSearch:
    _unrolled = False
    """Whether the layers are those that If, Loop and Scan ran, which no file has."""

    def __init__(
        self,
        model: Model,
        backends: Sequence[Backend],
        goal: Goal,
        samples: Sequence[Sample],
        options: MixedPrecisionOptions,
        on_step: OnStep,
        scratch: Path,
    ) -> None:
        self._started, self._tried = time.monotonic(), 0
        self._model, self._goal, self._samples, self._options, self._on_step = model, goal, samples, options, on_step
        reference, self._backend = backends
        self._reference = str(reference.spec)
        how, note = choose_export(backends, options.exporter)
        self._notes = [note] if note and is_exported(model) else []
        self._exporter = how.exporter
        self._step(preparing(model))
        programs = prepare(model, samples[0], scratch, how=how, folded=options.folded)
        refuse_random((program.graph for program in programs), "no goal can be judged")
        self._tests = load_test_programs(programs, options.test_model) if options.test_model else programs
        if wants_int8(self._backend):
            self._tests = already_quantized(self._tests) or self._quantized(scratch)
        files = self._tests
        if self._backend.emulated:  # which runs a body in FP32, as a whole
            unroller = Unroller(scratch)
            self._tests = unroller.unrolled(files, model, lambda: samples, self._backend.precision)
            self._notes += unroller.notes
        self._unrolled = any(p.graph is not own.graph for p, own in zip(files, self._tests, strict=True))
        if self._unrolled and options.onnx is not None:
            raise InputError("--onnx: what If, Loop and Scan ran was tried in a graph without them, not in the file")
        self.precision, self.groups = layers_of_test(model, self._tests, self._backend)
        if options.onnx is not None and self.precision.name == "tf32":
            raise InputError("--onnx: TF32 is not in an ONNX graph; it is a setting of the runtime")
        if options.onnx is not None and is_narrow(self.precision.name):
            check_exportable(NarrowOptions.parse(self.precision.name))
        self._step(str(reference.spec))
        if self.precision.name == "int8":
            programs = [plain_program(program, scratch) for program in programs]
        with Pipeline(model, programs, reference) as pipeline:
            self._judge = Judge(model, samples, [pipeline.run(sample) for sample in samples], goal)
        remarks = Remarks(model)
        for sample in samples:
            remarks.see(sample)
        self._notes += [*remarks.sentences, *self._judge.notes]
        self.log = TrialLog(options.log, self._about())
        self.emulator = EmulatedRunner(model, self._tests, samples, self.precision, emulation_device(self._backend))
        self.runner: EmulatedRunner | BackendRunner = self.emulator
        if not self._backend.emulated:
            self.runner = BackendRunner(model, self._tests, samples, self.precision, self._backend, scratch)

    def _quantized(self, folder: Path) -> list[Program]:
        self._step("quantizing")
        parts, calibration = self._options.quantized, Calibration(self._options.inputs)
        in_int8, how = quantize_programs(self._model, self._tests, folder, parts=parts, calibration=calibration)
        self._notes += [how] if how else []
        return in_int8

    def run(self) -> MixedPrecisionResult:
        smallest_set: list[FusionGroup] | None = None
        predictor: Predictor | None = None
        stopped = ""
        try:
            if not self._holds(frozenset()):
                if isinstance(self.runner, BackendRunner) and self.runner.layers and not self.log.engine:
                    self.log.add_engine(self.runner.layers)
                self.groups = fused(self.groups, self._tests, self.log.engine)
                self._step("predicting")
                self.emulator.prepare()
                predictor = Predictor(self.groups, self._goal, self.emulator.local_error, self._shares)
                smallest_set = self._find(predictor)
            else:
                smallest_set = []
            if smallest_set is None:
                stopped = "keeping every layer does not reach it"
        except OutOfBudget as reason:
            stopped = str(reason)
        result = self._result(smallest_set, predictor, stopped)
        if self._options.onnx is not None and result.reached:
            what = self._tests, result.keep, self.precision.name, self._options.onnx
            result.notes.extend(write_onnx(self._model, self._samples, *what))
        return result

    def _find(self, predictor: Predictor) -> list[FusionGroup] | None:
        def extend(emulated: bool) -> Callable[[list[FusionGroup]], list[FusionGroup]]:
            return lambda grown: predictor.extend(grown, self._trial(frozenset(grown), emulated).measured)

        if self._backend.emulated:
            return smallest(self._holds, extend(False))
        seed = smallest(lambda kept_groups: self._holds(kept_groups, emulated=True), extend(True)) or []
        return smallest(self._holds, extend(False), seed)

    def _holds(self, kept_groups: Kept, emulated: bool = False) -> bool:
        trial = self._trial(kept_groups, emulated)
        return not trial.error and self._goal.holds(trial.measured.figures)

    def _trial(self, kept_groups: Kept, emulated: bool) -> Trial:
        """The trial of a set, from the log where it is there. Raises OutOfBudget before one that may not begin."""
        nodes = nodes_in(kept_groups)
        if (logged := self.log.trials.get((emulated, nodes))) is not None:
            return logged
        runner = self.emulator if emulated else self.runner
        if kept_groups:  # nothing kept is always tried: it is what the rest is compared with
            self._check_time()
        if not emulated:
            self._check_builds()
            self._tried += 1
        self._step(
            f"{'emulated' if emulated else self._backend.spec}: {len(kept_groups)} of {len(self.groups)} layers kept"
        )
        begun = time.monotonic()
        measured, error = Measured(), ""
        try:
            measured = self._judge.measure(runner.run(kept_groups))
        except InputError as refused:
            earlier = [t for t in self.log.trials.values() if not t.emulated]
            if emulated or self._backend.emulated or (earlier and all(t.error for t in earlier)):
                raise  # it has nothing to do with what is kept
            error = str(refused)
        latency = None if error else runner.latency()
        trial = Trial(nodes, len(kept_groups), emulated, measured, time.monotonic() - begun, latency, error)
        self.log.add(trial)
        return trial

    def _shares(self, kept_groups: Kept) -> dict[tuple[str, str], float]:
        self._check_time()
        self._step("predicting")
        return self.emulator.shares(kept_groups)

    def _check_time(self) -> None:
        budget = self._options.budget
        if budget is not None and time.monotonic() - self._started >= budget:
            raise OutOfBudget(f"stopped after {budget:g} s")

    def _check_builds(self) -> None:
        limit, count = self._options.max_builds, self._tried if self._backend.emulated else self.runner.builds
        if limit is not None and count >= limit:
            raise OutOfBudget(f"stopped after {amount(count, 'trial' if self._backend.emulated else 'build')}")

    def _result(
        self, smallest_set: list[FusionGroup] | None, predictor: Predictor | None, stopped: str
    ) -> MixedPrecisionResult:
        trials = list(self.log.trials.values())
        on_backend = [trial for trial in trials if not trial.emulated]
        excess = {t.nodes: math.inf if t.error else self._goal.excess(t.measured.figures) for t in on_backend}
        holding = [t for t in on_backend if not t.error and self._goal.holds(t.measured.figures)]
        if smallest_set is not None:
            best = self.log.trials[False, nodes_in(frozenset(smallest_set))]
        elif holding:
            best = min(holding, key=lambda trial: trial.layers)
        else:
            best = min(on_backend, key=lambda trial: (excess[trial.nodes], trial.layers))
        kept_groups = [group for group in self.groups if nodes_in(frozenset([group])) <= best.nodes]
        keep = {}
        for p in self._tests:
            told = self.precision.keep(p.graph, nodes_of(kept_groups, p.name))
            keep[p.name] = [node.name for node in p.graph.nodes if node.name in told]
        return MixedPrecisionResult(
            model=self._model.name,
            reference=self._reference,
            backend=str(self._backend.spec),
            emulated=self._backend.emulated,
            precision=self.precision.name,
            goal=str(self._goal),
            layers=len(self.groups),
            reached=bool(holding),
            kept=[self._kept_layer(group, kept_groups, predictor) for group in kept_groups],
            minimal=smallest_set is not None,
            best=best,
            baseline=self.log.trials[False, frozenset()],
            trials=trials,
            keep=keep,
            named=Named(unrolled=True) if self._unrolled else Named.of(self._tests, self._exporter),
            weak=self._backend.spec.family != "trt" or release_of(self._backend.versions()["tensorrt"]) < STRONG_ONLY,
            stopped=stopped,
            builds=self.runner.builds,
            passes=self.emulator.passes,
            seconds=time.monotonic() - self._started,
            notes=self._notes,
        )

    def _kept_layer(
        self, group: FusionGroup, kept_groups: Sequence[FusionGroup], predictor: Predictor | None
    ) -> KeptLayer:
        graph = next(program.graph for program in self._tests if program.name == group.component)
        without = self.log.trials.get((False, nodes_in(frozenset(kept_groups) - {group})))
        return KeptLayer(
            group,
            tuple(node.op for node in graph.nodes if node.name in group.nodes),
            introduced=predictor.local[group] if predictor else None,
            share=predictor.shares.get(group) if predictor else None,
            without=without.measured.figures if without else {},
        )

    def _about(self) -> dict[str, Any]:
        """Facts that the trials depend on, for the log."""
        inputs = [{name: array_hash(array) for name, array in sample.arrays.items()} for sample in self._samples]
        return {
            "model": {program.name: program.graph.digest for program in self._tests},
            "reference": self._reference,
            "backend": str(self._backend.spec),
            "versions": self._backend.versions(),
            "goal": str(self._goal),
            "inputs": key_of({"samples": inputs}),
        }

    def _step(self, text: str) -> None:
        self._on_step(text, self._tried, max(self._options.max_builds or 0, self._tried))


def layers_of_test(
    model: Model, programs: Sequence[Program], backend: Backend
) -> tuple[TrialPrecision, list[FusionGroup]]:
    """The precision of a test's layers, and these in execution order: an operator and what is fused into it.

    ``programs`` are those that the test runs. Raises InputError for a backend whose layers cannot be told apart, and
    for a model none of whose layers computes in its precision.
    """
    precision = precision_of(backend, any(program.graph.precision == "int8" for program in programs))
    groups = [g for p in programs for g in fusion_groups_of(p, precision.candidates(p.graph))]
    if not groups:
        raise InputError(f"--backends: no layer of {model.name} computes in {precision.name} on {backend.spec}")
    return precision, groups


def plain_program(program: Program, folder: Path) -> Program:
    """The program without Q/DQ pairs, which is what its INT8 is measured against."""
    quantized = quantized_inputs(program.graph)
    if not quantized:
        return program
    graph = Graph(remove_qdq(program.graph, quantized, folder / f"{program.name}-plain.onnx"), source=program.graph)
    return Program(program.name, graph, example=program.example)


def emulation_device(backend: Backend) -> str:
    """Device to emulate on: the emulation's own, else the GPU that the backend has, if torch has it."""
    import torch

    on_cuda = backend.device.startswith("cuda") and torch.cuda.is_available()
    return backend.device if backend.emulated or on_cuda else "cpu"
