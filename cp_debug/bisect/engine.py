"""``bisect``: run the backends side by side, compare, replay, rank."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from cp_debug.backends.base import Backend, Program
from cp_debug.backends.capabilities import HasRemarks
from cp_debug.backends.registry import create
from cp_debug.backends.spec import parse_backends
from cp_debug.bisect.assemble import coverage_of, observation_notes, result_of, saved_name
from cp_debug.bisect.both_sides import BothSides, Preparation, Side
from cp_debug.bisect.candidate_run import CandidateRun
from cp_debug.bisect.one_sample import SampleRuns
from cp_debug.bisect.options import DEFAULT_OPTIONS, Options, Rewrite, StepCounter, has_knobs
from cp_debug.bisect.result import BisectResult, TestResult
from cp_debug.bisect.standards import doubles_note, int8_notes, oracle, oracle_device, tolerance
from cp_debug.display import OnStep
from cp_debug.errors import InputError
from cp_debug.graph.graph import Graph, digest_of
from cp_debug.graph.randomness import drawing
from cp_debug.probes.capture import array_hash, check_free
from cp_debug.programs.layers import Layer, all_layers
from cp_debug.programs.pipeline import Pipeline, choose_export, digest_before_int8, is_exported, preparing
from cp_debug.programs.tensor_inputs import as_numbers, file_as_numbers, has_other_inputs
from cp_debug.recipes.abilities import HasNotes, Remarks, samples_left_out, with_components_of
from cp_debug.recipes.base import Model, Sample, check_samples


def bisect(
    model: str | Model,
    backends: str | Sequence[Backend] = "torch,ort",
    *,
    test_model: Path | Model | Rewrite | None = None,
    programs: Sequence[Program] | None = None,
    options: Options = DEFAULT_OPTIONS,
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
    bisection = Bisection(model, backends, test_model, options, on_step or (lambda text, done, total: None))
    return bisection.run(programs, on_say)


class Bisection:
    """The order of one bisect: which parts it opens, and which of them does what."""

    def __init__(
        self,
        model: str | Model,
        backends: str | Sequence[Backend],
        test_model: Path | Model | Rewrite | None,
        options: Options,
        on_step: OnStep,
    ) -> None:
        self.options, self._test_model, self._named_test = options, test_model, test_model
        self._progress = StepCounter(on_step)
        if isinstance(backends, str):
            other = getattr(test_model, "name", "test") if test_model is not None else options.differs
            backends = [create(spec) for spec in parse_backends(backends, test=other)]
        self._reference, *self._tests = backends
        self._oracle_devices = {str(test.spec): oracle_device(test, options) for test in self._tests}
        self._export, note = choose_export(backends, options.exporter)
        if options.optimizer_blame and not any(map(has_knobs, self._tests)):
            names = ", ".join(str(test.spec) for test in self._tests)
            having = "ort-basic, ort-all, torch-compile or openvino"
            raise InputError(f"--knobs: expected {having} among the test backends, which are {names}")
        side = Side(model) if not isinstance(model, str) else Side.load(model, options.checkpoint, options)
        self.model = side.model
        exported = is_exported(self.model)
        self._notes = [note] if note and exported else []
        if self._export.fused and exported and not options.folded:
            self._notes.append("BatchNorm is folded anyway: INT8 scales apply to folded weights")
        self._notes += self.model.notes if isinstance(self.model, HasNotes) else ()
        is_model = test_model is not None and not isinstance(test_model, Path) and not callable(test_model)
        other = Side(with_components_of(self.model, cast("Model", test_model))) if is_model else side
        if options.test_checkpoint is not None:
            other = Side.load(self.model.name, options.test_checkpoint, options)
        self.test_model = other.model
        self._sides = side, other
        self._read = "", ""

    def run(self, exported: Sequence[Program] | None, on_say: Callable[[str], None]) -> BisectResult:
        """Run and judge all samples on all tests. Raises InputError for fewer than one sample."""
        options, progress = self.options, self._progress
        if options.save is not None:
            for backend in (self._reference, *self._tests):
                check_free(options.save / "sample-0" / str(backend.spec))  # before anything long
        progress.steps = 2 + options.replay + options.samples * (1 + len(self._tests) * (3 if options.replay else 1))
        progress.steps += sum(map(has_knobs, self._tests)) if options.optimizer_blame else 0
        with tempfile.TemporaryDirectory(prefix="cpdebug-") as scratch, ExitStack() as stack:
            check_samples(self.model, options.samples, options.inputs)
            given = self.model
            self._take_numbers(options.save or Path(scratch))
            samples = iter(self._samples())
            first = next(samples)
            progress.step(preparing(self.model, self.test_model))
            preparation = Preparation(self._sides, self._test_model, self._export, options, self._samples, progress)
            backends = [self._reference, *self._tests]
            sides = preparation.make(first, backends, Path(scratch), exported, on_say)
            layers = all_layers(sides.programs)
            progress.step("opening the backends")
            reference = stack.enter_context(Pipeline(self.model, sides.reference, self._reference, unfold=sides.unfold))
            folder = options.save or Path(scratch)
            runs = []
            for backend, own in zip(self._tests, sides.tests, strict=True):
                limits = tolerance(self._reference, backend, (*sides.programs, *own), options)
                judge, device = oracle(self._reference, backend, options), self._oracle_devices[str(backend.spec)]
                test = stack.enter_context(Pipeline(self.test_model, own, backend, unfold=sides.unfold, lenient=True))
                runs.append(CandidateRun(test, reference, sides.programs, layers, limits, judge, folder, device))
            taken = SampleRuns(self.model, reference, runs, options, Path(scratch), progress)
            sources, inputs, remarks = [], [], Remarks(self.model)
            for index, sample in enumerate((first, *samples)):
                sources.append(sample.source)
                inputs.append({name: array_hash(array) for name, array in sample.arrays.items()})
                remarks.see(sample)
                taken.take(index, sample)
            self._notes += remarks.sentences
            self._notes += samples_left_out(given, options.inputs, options.samples, len(sources))
            if options.inputs is not None and len(sources) < options.samples:
                self._notes.append(f"{options.samples} samples were requested; {options.inputs} has {len(sources)}")
            if options.optimizer_blame:
                self._blame_optimizers(first, taken)
            return BisectResult(
                model=self.model.name,
                test_model=self._other_name(),
                reference=reference.record(),
                tests=self._results(taken, sides, layers),
                samples=sources,
                coverage=coverage_of(sides.programs),
                programs={p.name: saved_name(p.graph, options.save) for p in sides.programs},
                reference_observation=taken.observation,
                model_sha256=self._read[0] or digest_before_int8(sides.programs),
                inputs=inputs,
                weights={component: differences.to_dict() for component, differences in sides.weights.items()},
            )

    def _other_name(self) -> str:
        """Name of the tests' file or model, where it has another than the reference's; else empty."""
        if self.options.test_checkpoint is not None:
            return f"{self.test_model.name} with {self.options.test_checkpoint}"
        if isinstance(self._test_model, Path):
            return str(self._named_test)  # not the file of numbers that was made of it
        name = self.test_model.name
        return name if name != self.model.name else ""

    def _take_numbers(self, folder: Path) -> None:
        """Let both sides take tensors of numbers where their files take strings, sequences, optionals or maps."""
        if not has_other_inputs(self.model):
            return
        samples, model = list(self._samples()), self.model
        file = self._test_model if isinstance(self._test_model, Path) else self.test_model.components[0].onnx_path
        self._read = _digest(model.components[0].onnx_path), _digest(file)
        self.model = as_numbers(model, samples, folder)
        if isinstance(self._test_model, Path) and self._test_model.is_file():
            self._test_model = file_as_numbers(self._test_model, samples, folder, model)
        same = self.test_model is model
        self.test_model = self.model if same else as_numbers(self.test_model, samples, folder / "test", model)
        reference, test = self._sides
        self._sides = replace(reference, model=self.model), replace(test, model=self.test_model)
        self._notes.append(
            "inputs that are not numeric tensors are built from numeric ones before the network: strings from their "
            "numbers in a table, sequences from their elements"
        )

    def _samples(self) -> Iterable[Sample]:
        """The samples, from the first one again."""
        return self.model.samples(self.options.samples, self.options.seed, self.options.inputs)

    def _results(self, taken: SampleRuns, sides: BothSides, layers: list[Layer]) -> list[TestResult]:
        results = []
        draws = any(drawing(program.graph) for program in sides.programs)
        for run, collected_run in zip(taken.runs, taken.collected, strict=True):
            rows = sorted(collected_run.rows.values(), key=lambda row: row.index)
            notes = [  # first what concerns the verdict, last what the inputs were made of
                *(n for s in run.pipeline.sessions.values() if isinstance(s, HasRemarks) for n in s.notes),
                *collected_run.notes(str(run.pipeline.backend.spec), draws=draws),
                *observation_notes(str(self._reference.spec), taken.observation, taken.observation, draws=draws),
                *int8_notes(run.reference, run.pipeline, rows, sides.quantized_how),
                *doubles_note(sides.programs, run.pipeline.programs, self.options),
                *sides.notes,
                *self._notes,
            ]
            sha256 = self._read[1] or digest_before_int8(run.pipeline.programs)
            results.append(result_of(self.model, run, collected_run, layers, notes, self.options, sha256))
        return results

    def _blame_optimizers(self, sample: Sample, taken: SampleRuns) -> None:
        from cp_debug.bisect.optimizer_blame import blame_compiler, blame_optimizers, blame_properties

        blames: dict[str, Any] = {"ort": blame_optimizers, "openvino": blame_properties, "torch": blame_compiler}

        for run, collected in zip(taken.runs, taken.collected, strict=True):
            model, programs, backend = run.pipeline.model, run.pipeline.programs, run.pipeline.backend
            if not has_knobs(backend):
                continue
            self._progress.step(f"{backend.spec}: knobs")
            seen = collected.first_observation
            floor = seen.noise_floor if seen else 0.0
            blame = blames[backend.spec.family]
            collected.optimizer_blame = blame(model, programs, backend, sample, floor)


def _digest(file: Path | None) -> str:
    return digest_of([Graph.shared(file)]) if file is not None and file.is_file() else ""
