"""``bisect``: run the backends side by side, compare, replay, rank."""

from __future__ import annotations

import math
import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from cp_debug.backends.base import Backend, Program
from cp_debug.backends.registry import create
from cp_debug.backends.spec import parse_backends
from cp_debug.bisect.branches import judge_ways, other_ways
from cp_debug.bisect.candidate_run import CandidateRun
from cp_debug.bisect.causes.effects import Effects
from cp_debug.bisect.causes.findings import Explainer
from cp_debug.bisect.int8_notes import both_int8, int8_notes
from cp_debug.bisect.observe import Observation, observe
from cp_debug.bisect.regions.descent import BUILDS
from cp_debug.bisect.regions.guilty import can_build, look_inside
from cp_debug.bisect.remainder import remainder
from cp_debug.bisect.replay import Replay
from cp_debug.bisect.result import GUILTY, BisectResult, StageRow, TestResult
from cp_debug.bisect.shares import Propagation, set_shares
from cp_debug.bisect.worst_samples import Collected, observation_notes
from cp_debug.errors import InputError, in_one_line
from cp_debug.graph.declared import narrow_values
from cp_debug.graph.graph import Graph
from cp_debug.graph.integer_values import is_quantized
from cp_debug.graph.qdq import has_own_pairs
from cp_debug.graph.randomness import drawing
from cp_debug.graph.weight_differences import WeightDifferences
from cp_debug.probes.capture import Capture, CaptureWriter, check_free
from cp_debug.programs.layers import Layer, all_layers, stage_layers
from cp_debug.programs.paired import differing_weights, pair_programs
from cp_debug.programs.pipeline import (
    Key,
    Pipeline,
    changed_state,
    choose_export,
    header,
    is_exported,
    load_test_programs,
    prepare,
    wants_int8,
)
from cp_debug.programs.precision import coarsest, oracle_for
from cp_debug.programs.scene import decode, keep_scene
from cp_debug.programs.unroll import Unroller
from cp_debug.quantization.models import QuantizedComponent
from cp_debug.quantization.open_quantized import calibration_samples
from cp_debug.quantization.quantized_programs import (
    DEFAULT_CALIBRATION,
    Calibration,
    already_quantized,
    load_quantized,
    quantize_programs,
    with_modules_beside,
)
from cp_debug.recipes.abilities import HasNotes
from cp_debug.recipes.base import Arrays, Model, Sample
from cp_debug.serialize import json_safe

Rewrite = Callable[[list[Program], Path], list[Program]]
"""Makes the programs of the tests from the reference's and a folder for new files; value names should stay."""
OnStep = Callable[[str, int, int], None]
"""Told (what is being done, steps done, steps in all)."""


@dataclass(frozen=True)
class Options:
    """What a bisect may be told besides its model and backends. The defaults are those of the command line."""

    checkpoint: Path | None = None
    test_checkpoint: Path | None = None
    """Other weights for the test backends."""
    test_train_mode: bool = False
    test_out_of_place: bool = False
    inputs: Path | None = None
    samples: int = 1
    seed: int = 0
    rtol: float | None = None
    atol: float | None = None
    oracle: str | None = None
    """``fp32`` or ``fp64``; None leaves it to the precisions under test."""
    replay: bool = True
    explain: bool = True
    """Try to say why a layer is guilty; needs the replay."""
    exporter: str | None = None
    """``dynamo`` or ``torchscript``; None takes one that every backend can read."""
    folded: bool = True
    calibration: Calibration = DEFAULT_CALIBRATION
    """How to quantise, where a backend is in INT8 and the model is not."""
    max_builds: int = BUILDS
    """Further engines for the search inside guilty regions of one run; 0 leaves it at emulated hypotheses."""
    optimizer_blame: bool = False
    """Find the graph optimisers that are responsible for the difference of optimised ONNX Runtime tests."""
    maps: Sequence[str] = ()
    """``REFERENCE=TEST`` each: values of two models that are to be compared."""
    save: Path | None = None
    """Folder for the captures: ``sample-0/torch``, ``sample-0/ort`` …"""

    @property
    def differs(self) -> bool:
        """Whether the tests run something else than the reference, a test model apart."""
        return self.test_checkpoint is not None or self.test_train_mode or self.test_out_of_place


def bisect(
    model: str | Model,
    backends: str | Sequence[Backend] = "torch,ort",
    *,
    test_model: Path | Model | Rewrite | None = None,
    programs: Sequence[Program] | None = None,
    options: Options = Options(),
    on_step: OnStep | None = None,
    on_say: Callable[[str], None] = lambda text: None,
) -> BisectResult:
    """Compare every test backend with the reference, layer by layer, and name the guilty layers.

    ``backends`` is the reference and the tests, as on the command line or already made. ``test_model`` gives the tests
    another program: an ONNX file (a folder of them, for several components), another model, or a function that makes
    their programs out of the reference's. ``programs`` None exports the model for this run. ``on_say`` is told what is
    known before anything runs: how the weights of two models differ.
    Raises BackendUnavailable, InputError and MissingPackage; never for a divergence.
    """
    bisection = Bisection(model, backends, test_model, options, on_step or (lambda text, done, total: None), on_say)
    return bisection.run(programs)


diagnose = bisect
"""What ``import cp_debug`` calls it, where ``bisect`` is a folder."""


class Bisection:
    """The state of one bisect, so that each step is a short method."""

    def __init__(
        self,
        model: str | Model,
        backends: str | Sequence[Backend],
        test_model: Path | Model | Rewrite | None,
        options: Options,
        on_step: OnStep,
        on_say: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.options = options
        self._on_step, self._say = on_step, on_say
        self._weights: dict[str, WeightDifferences] = {}
        self._done, self._steps = 0, 0
        self._steady: Observation | None = None
        self._unfold = False
        """Whether side values that a backend folded away are computed: test and reference are different graphs."""
        self._reference_floors: dict[Key, float] = {}
        self._quantized: dict[int, list[Program]] = {}
        """By identity of the list that was quantised."""
        self._parts: dict[int, tuple[Mapping[str, QuantizedComponent], str]] = {}
        """By identity of the model: its components in INT8, and how they became so."""
        self._how: dict[int, str] = {}
        """By identity of a list of quantised programs."""
        if isinstance(backends, str):
            differs = test_model is not None or options.differs
            backends = [create(spec) for spec in parse_backends(backends, repeats=differs)]
        self._reference, *self._tests = backends
        self._export, note = choose_export(backends, options.exporter)
        if options.optimizer_blame and not any(map(is_optimised, self._tests)):
            names = ", ".join(str(test.spec) for test in self._tests)
            raise InputError(f"--knobs: expected ort-basic or ort-all among the test backends, which are {names}")
        self.model = model if not isinstance(model, str) else self._load(model, options.checkpoint)
        exported = is_exported(self.model)
        self._notes = [note] if note and exported else []
        if self._export.fused and exported and not options.folded:
            self._notes.append("BatchNorm is folded all the same: INT8 scales belong to folded weights")
        self._notes += self.model.notes if isinstance(self.model, HasNotes) else ()
        self._test_model = test_model
        given = test_model is not None and not isinstance(test_model, Path) and not callable(test_model)
        self.test_model: Model = test_model if given else self.model  # type: ignore[assignment]
        if options.test_checkpoint is not None:
            self.test_model = self._load(self.model.name, options.test_checkpoint)

    def _load(self, name: str, checkpoint: Path | None) -> Model:
        model, parts = load_quantized(name, checkpoint, self.options.seed)
        if parts:
            self._parts[id(model)] = parts, f"quantized as in {checkpoint}"
        return model

    def _tell(self, text: str) -> None:
        self._on_step(text, self._done, self._steps)

    def _step(self, text: str) -> None:
        self._on_step(text, self._done, self._steps)
        self._done += 1

    def run(self, exported: Sequence[Program] | None = None) -> BisectResult:
        """All samples, all tests."""
        options = self.options
        if options.save is not None:
            for backend in (self._reference, *self._tests):
                check_free(options.save / "sample-0" / str(backend.spec))  # before anything long
        self._steps = 2 + options.replay + options.samples * (1 + len(self._tests) * (3 if options.replay else 1))
        self._steps += sum(map(is_optimised, self._tests)) if options.optimizer_blame else 0
        with tempfile.TemporaryDirectory(prefix="cpdebug-") as scratch, ExitStack() as stack:
            samples = iter(self._samples())
            first = next(samples)
            self._step("exporting and aligning")
            originals, tests = self._programs(first, Path(scratch), exported)
            self._weights = differing_weights(originals, tests)
            for component, found in self._weights.items():
                self._say(f"weights of {component}: {found.says}")
            unroller = Unroller(options.save or Path(scratch))
            programs = unroller.unrolled(originals, self.model, self._samples, self._reference.precision)
            layers = all_layers(programs)
            ours = self._for(self._reference, self.model, programs, Path(scratch))
            theirs = [
                unroller.unrolled(tests, self.test_model, self._samples, backend.precision) for backend in self._tests
            ]
            self._notes += unroller.notes
            self._notes += [
                f"{node.name} ({node.op}) draws random numbers: what hangs on it differs from run to run"
                for program in programs
                for node in drawing(program.graph)
            ]
            paired = {
                id(own): pair_programs(self.model, first, programs, own, options.maps, self._step) for own in theirs
            }
            theirs = [paired[id(own)] for own in theirs]
            self._unfold = any(t.graph is not p.graph for own in theirs for t, p in zip(own, programs, strict=True))
            theirs = [
                self._for(backend, self.test_model, own, Path(scratch))
                for backend, own in zip(self._tests, theirs, strict=True)
            ]
            self._step("opening the backends")
            reference = stack.enter_context(Pipeline(self.model, ours, self._reference, unfold=self._unfold))
            runs = [
                self._test_run(stack, backend, own, reference, programs, layers, options.save or Path(scratch))
                for backend, own in zip(self._tests, theirs, strict=True)
            ]
            collected = [Collected() for _ in runs]
            sources = []
            for index, sample in enumerate((first, *samples)):
                sources.append(sample.source)
                self._sample(index, sample, reference, runs, collected, Path(scratch))
            if options.optimizer_blame:
                self._blame_optimizers(first, runs, collected)
            return BisectResult(
                model=self.model.name,
                reference=reference.record(),
                tests=[self._result(run, found, layers) for run, found in zip(runs, collected, strict=True)],
                samples=sources,
                coverage=coverage_of(programs),
                programs={p.name: self._saved_name(p.graph) for p in programs},
                reference_observation=self._steady,
                weights={component: found.to_dict() for component, found in self._weights.items()},
            )

    def _samples(self) -> Iterable[Sample]:
        """The samples, from the first one again."""
        return self.model.samples(self.options.samples, self.options.seed, self.options.inputs)

    def _programs(
        self, sample: Sample, scratch: Path, exported: Sequence[Program] | None
    ) -> tuple[list[Program], list[Program]]:
        """The reference's programs and those of the tests."""
        options = self.options
        programs, tests = self._exported(sample, scratch, exported)
        if options.test_train_mode or options.test_out_of_place:
            tests = [
                changed_state(p, train=options.test_train_mode, out_of_place=options.test_out_of_place) for p in tests
            ]
        return programs, tests

    def _exported(
        self, sample: Sample, scratch: Path, exported: Sequence[Program] | None
    ) -> tuple[list[Program], list[Program]]:
        options, folder = self.options, self.options.save or scratch
        folder.mkdir(parents=True, exist_ok=True)
        programs = list(exported or prepare(self.model, sample, folder, how=self._export, folded=options.folded))
        if isinstance(self._test_model, Path):
            return programs, with_modules_beside(
                load_test_programs(programs, self._test_model), self.model, self._test_model
            )
        if callable(self._test_model):
            return programs, self._test_model(programs, folder)
        if self.test_model.components is not self.model.components:
            folder = folder / "test"
            folder.mkdir(exist_ok=True)
            return programs, prepare(self.test_model, sample, folder, how=self._export, folded=options.folded)
        return programs, programs

    def _for(self, backend: Backend, model: Model, programs: list[Program], scratch: Path) -> list[Program]:
        """The programs as this backend runs them: with Q/DQ pairs for one in INT8."""
        if not wants_int8(backend):
            return programs
        if (made := self._quantized.get(id(programs))) is None:
            made = already_quantized(programs) or self._quantize(model, programs, scratch)
            self._quantized[id(programs)] = made
        return made

    def _quantize(self, model: Model, programs: list[Program], scratch: Path) -> list[Program]:
        options, folder = self.options, (self.options.save or scratch) / ("test" if self._quantized else "")
        calibration = options.calibration
        samples = calibration_samples(model, calibration.data or options.inputs, calibration.samples)
        self._steps += 1
        self._step("quantizing")
        parts, given = self._parts.get(id(model), (None, ""))
        made, how = quantize_programs(model, programs, folder, samples, parts=parts, calibration=calibration)
        self._how[id(made)] = how or given
        return made

    def _saved_name(self, graph: Graph) -> str:
        path, folder = graph.path.resolve(), self.options.save
        inside = folder is not None and path.is_relative_to(folder.resolve())
        return path.relative_to(folder.resolve()).as_posix() if folder and inside else str(path)

    def _test_run(
        self,
        stack: ExitStack,
        backend: Backend,
        tests: list[Program],
        reference: Pipeline,
        programs: list[Program],
        layers: list[Layer],
        folder: Path,
    ) -> CandidateRun:
        options = self.options
        declared = {kind for p in (*programs, *tests) for kind in narrow_values(p.graph).values()}
        if any(is_quantized(p.graph) and not has_own_pairs(p.graph) for p in (*programs, *tests)):
            declared.add("int8")
        precision = coarsest(self._reference.precision, backend.precision, *declared)
        rtol = precision.rtol if options.rtol is None else options.rtol
        unjudged = math.inf if both_int8(self._reference, backend) else precision.atol
        atol = unjudged if options.atol is None else options.atol
        oracle = (
            (options.oracle or oracle_for(self._reference.precision, backend.precision)) if options.replay else None
        )
        pipeline = stack.enter_context(Pipeline(self.test_model, tests, backend, unfold=self._unfold))
        return CandidateRun(pipeline, reference, programs, layers, (rtol, atol), oracle, folder)

    def _sample(
        self,
        index: int,
        sample: Sample,
        reference: Pipeline,
        runs: list[CandidateRun],
        collected: list[Collected],
        scratch: Path,
    ) -> None:
        folder = (self.options.save or scratch) / f"sample-{index}"
        self._step(f"{reference.backend.spec}, sample {index}")
        with self._writer(folder, reference, sample) as writer:
            given = reference.run(sample, lambda key, tensor: writer.put(key.value, tensor, component=key.component))
        decoded = {str(reference.backend.spec): decode(self.model, sample, given)}
        captured = Capture.open(writer.folder)
        if index == 0 and self.options.replay:
            self._step(f"{reference.backend.spec}: noise floor")
            self._steady, self._reference_floors = observe(reference, sample, given, captured)
        for run, found in zip(runs, collected, strict=True):
            self._step(f"{run.pipeline.backend.spec}, sample {index}")
            with self._writer(folder, run.pipeline, sample) as writer:
                stats, results = run.run(sample, captured, writer)
                settings = run.pipeline.record().settings  # engines know more once they ran
                writer.update({"settings": json_safe(settings)})
            decoded[str(run.pipeline.backend.spec)] = decode(self.test_model, sample, results)
            test = Capture.open(writer.folder)
            replays: dict[Key, Replay] = {}
            floors: dict[Key, float] = {}
            if run.oracle is not None:
                self._step(f"{run.pipeline.backend.spec}, sample {index}: replay")
                replays = run.replay(captured, test, stats)
                if self.test_model is not self.model:
                    replays |= run.replay_inputs(self.model, sample, results, captured, test)
                self._step(f"{run.pipeline.backend.spec}, sample {index}: noise floor")
                seen, floors = run.observe(sample, results, test)
                found.observe(seen)
                floors = {key: max(floors.get(key, 0.0), self._reference_floors.get(key, 0.0)) for key in stats}
            rows = run.rows(stats, replays, floors, index)
            ways = list(other_ways(run, (captured, test)))
            found.ways |= dict.fromkeys(map(str, ways))
            settled = judge_ways(ways, run.programs, rows)
            failures = set_shares(run, rows, sample, captured, test)
            found.detect(decoded[str(reference.backend.spec)], decoded[str(run.pipeline.backend.spec)])
            if run.oracle is not None and found.is_worst(rows):
                unexplained = not any(row.verdict == GUILTY for row in rows.values())
                differs = unexplained and not all(row.within for row in rows.values())
                try:
                    found.remainder = remainder(run, sample, results, given, replays) if differs else None
                except Exception as error:
                    failures.append(f"whether rounding adds up to the divergence is not known: {in_one_line(error)}")
            if run.oracle is not None and self.options.explain and found.is_worst(rows):
                feed = partial(self._exact_input, sample, results)
                effects = Effects(self.model, sample, Propagation(run, sample, captured, test), given)
                explainer = Explainer(run, self._reference.precision, captured, test, feed, effects)
                explainer.settled = settled
                explainer.goes_inside = partial(can_build, run)
                explainer.adds_up = found.remainder is None or found.remainder.adds_up
                found.findings = explainer.findings(rows, seen)
                found.findings = look_inside(explainer, rows, found.findings, self.options.max_builds, self._tell)
                failures += explainer.notes
            found.explained(failures)
            found.add(rows)
        if self.options.save is None:
            shutil.rmtree(folder)
        else:
            keep_scene(folder, sample, decoded)

    def _exact_input(self, sample: Sample, results: Mapping[str, Arrays], key: Key) -> np.ndarray:
        """What the reference's glue makes of the test's upstream results."""
        component = next(c for c in self.model.components if c.name == key.component)
        return self.model.feed(component, sample, results)[key.value]

    def _blame_optimizers(self, sample: Sample, runs: list[CandidateRun], collected: list[Collected]) -> None:
        from cp_debug.backends.ort_backend import OrtBackend
        from cp_debug.bisect.optimizer_blame import blame_optimizers

        for run, found in zip(runs, collected, strict=True):
            pipeline, seen = run.pipeline, found.observation
            if isinstance(pipeline.backend, OrtBackend) and is_optimised(pipeline.backend):
                self._step(f"{pipeline.backend.spec}: knobs")
                floor = seen.noise_floor if seen else 0.0
                found.optimizer_blame = blame_optimizers(
                    pipeline.model, pipeline.programs, pipeline.backend, sample, floor
                )

    def _writer(self, folder: Path, pipeline: Pipeline, sample: Sample) -> CaptureWriter:
        kept = self.options.save is not None
        target = folder / str(pipeline.backend.spec)
        return CaptureWriter(target, header(pipeline, [sample]) if kept else {}, checksums=kept)

    def _result(self, run: CandidateRun, found: Collected, layers: list[Layer]) -> TestResult:
        rows = [found.rows[key] for key in sorted(found.rows, key=lambda k: found.rows[k].index)]
        by_key = {(row.component, row.onnx): row for row in rows}
        stages = [
            StageRow(
                stage.name,
                by_key[stage.last.component, stage.last.onnx],
                [r.name for r in rows if r.verdict == GUILTY and (r.component, r.onnx) in held],
            )
            for stage in stage_layers(self.model.components, layers)
            if (held := {(layer.component, layer.onnx) for layer in stage.layers})
            and (stage.last.component, stage.last.onnx) in by_key
        ]
        last = self.model.components[-1]
        (program,) = (p for p in run.pipeline.programs if p.name == last.name)
        given = last.output_names if program.pairing is None else program.pairing.outputs
        outputs = [by_key[last.name, n] for n in last.output_names if n in given and (last.name, n) in by_key]
        if not outputs:
            raise InputError(nothing_compared(run, last.name, last.output_names))
        rtol, atol = run.tolerance
        return TestResult(
            backend=run.pipeline.record(),
            rows=rows,
            stages=stages,
            outputs=outputs,
            expected_outputs=list(last.output_names),
            pairing={p.name: p.pairing.to_dict() for p in run.pipeline.programs if p.pairing is not None},
            compared=sum(row.kind == "data" for row in rows),
            total=sum(layer.kind == "data" for layer in layers),
            rtol=rtol,
            atol=atol,
            oracle=run.oracle,
            observation=found.observation,
            notes=[
                *self._notes,
                *int8_notes(run.reference, run.pipeline, rows, self._how),
                *observation_notes(str(self._reference.spec), self._steady),
                *found.notes(str(run.pipeline.backend.spec)),
            ],
            programs={name: self._saved_name(graph) for name, graph in run.graphs.items()},
            optimizer_blame=found.optimizer_blame,
            remainder=found.remainder,
            findings=found.findings,
            detections=found.detections,
        )


def nothing_compared(run: CandidateRun, component: str, expected: Sequence[str]) -> str:
    """Why there is no verdict: the outputs of both sides."""
    (program,) = (p for p in run.pipeline.programs if p.name == component)
    theirs = ", ".join(map(str, program.graph.outputs))
    return (
        f"{run.pipeline.backend.spec}: no output was compared: the reference gives {', '.join(expected)}, "
        f"{program.graph.path} gives {theirs}; --map REFERENCE=TEST pairs two of them"
    )


def is_optimised(backend: Backend) -> bool:
    """Whether ONNX Runtime's graph optimiser works on what this backend runs."""
    return backend.spec.name in ("ort-basic", "ort-all")


def coverage_of(programs: Sequence[Program]) -> dict[str, Any]:
    """How much of the torch modules and of the deployed graphs is accounted for, by component."""
    return {
        p.name: asdict(p.alignment.coverage())
        | {
            "absorbed": dict(p.alignment.absorbed),
            "unmatched_values": list(p.alignment.unmatched_values),
            "unmatched_modules": list(p.alignment.unmatched_modules),
        }
        for p in programs
        if p.alignment is not None
    }
