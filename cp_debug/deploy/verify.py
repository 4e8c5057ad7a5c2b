"""Verification: scenarios of a reference and a test backend, several samples, a limit for every tensor."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from cp_debug.backends.base import Backend, Program, RunRecord
from cp_debug.backends.capabilities import builder_of
from cp_debug.backends.registry import create
from cp_debug.backends.spec import BackendSpec
from cp_debug.bisect.engine import Options, bisect
from cp_debug.bisect.result import BisectResult
from cp_debug.deploy.interface_checks import VoxelChange, checked, compare_voxels, read_voxels, voxelize_on
from cp_debug.detection.changes import DetectionChange, compare_detections
from cp_debug.detection.evaluate import Clock
from cp_debug.display import OnStep, Shown
from cp_debug.errors import InputError
from cp_debug.graph.half_precision import narrow_values
from cp_debug.graph.pairing import places
from cp_debug.graph.tensor_ends import part_of
from cp_debug.probes.caveats import caveats, compare_any, difference_in_words, is_text
from cp_debug.probes.statistics import TensorStats, compare
from cp_debug.programs.paired import check_outputs
from cp_debug.programs.pipeline import Key, Pipeline, levels_of_both
from cp_debug.programs.precision import PRECISIONS, coarsest
from cp_debug.programs.scene import decode
from cp_debug.recipes.abilities import DetectsBoxes, Remarks, with_samples
from cp_debug.recipes.base import Arrays, Model, Sample
from cp_debug.recipes.centerpoint.model import Voxels
from cp_debug.recipes.centerpoint.recipe import CenterPointModel
from cp_debug.serialize import JsonForm

MARGIN = 8.0
"""Largest multiple of the predicted noise that is let through."""
_FP32 = PRECISIONS["fp32"].roundoff


def noise_floors(
    model: Model, programs: Sequence[Program], sample: Sample, single: Mapping[str, Arrays] | None = None
) -> dict[Key, float]:
    """Relative L2 distance of FP32 from FP64 at every output of every component.

    Modules and files in FP16 or BF16 compute in that where FP32 is asked for: their noise is scaled to FP32.

    ``single``: the results of an FP32 run on this sample, where there are some already.
    """
    exact = _run(model, programs, sample, "torch-fp64")
    fp32_results = single or _run(model, programs, sample, "torch")
    scales = {p.name: _FP32 / coarsest("fp32", *narrow_values(p.graph).values()).roundoff for p in programs}
    return {
        Key(component, name): max(scales[component] * _noise(array, fp32_results[component].get(name)), _FP32)
        for component, outputs in exact.items()
        for name, array in outputs.items()
    }


def _noise(exact: np.ndarray, single: np.ndarray | None) -> float:
    """Distance of an output in FP32; 0 for strings, and for an element that a sequence has in one of the runs alone."""
    if single is None or is_text(exact) or exact.shape != single.shape:
        return 0.0
    return compare(exact, single).finite_rel_l2


def _run(model: Model, programs: Sequence[Program], sample: Sample, spec: str) -> dict[str, Arrays]:
    with Pipeline(model, programs, create(BackendSpec(spec))) as pipeline:
        return pipeline.run(sample)


class Tolerances:
    """Relative L2 limits: the user's, else ``MARGIN`` times the noise predicted from the floor.

    ``given``: by tensor (``heatmap``), by precision (``fp16``) or both (``heatmap@fp16``). Raises InputError for a name
    that is neither a tensor of ``names`` nor a precision.
    """

    def __init__(self, given: Mapping[str, float], names: Sequence[str]) -> None:
        for key in given:
            tensor, sign, precision = key.partition("@")
            fits = tensor in names and (not sign or precision in PRECISIONS)
            if not (fits or (key in PRECISIONS)):
                raise InputError(
                    f"tolerance {key!r}: expected a tensor ({', '.join(names)}), a precision ({', '.join(PRECISIONS)}) "
                    "or TENSOR@PRECISION"
                )
        self._given = given

    def limit(self, name: str, floor: float, *precisions: str, whole: bool = False) -> float:
        """The largest relative L2 distance of a tensor between two sides, by the precisions of backends and files.

        ``whole``: it holds indices, ids or masks, which are equal unless the user said something of this tensor.
        """
        precision = coarsest(*precisions)
        for key in (f"{name}@{precision.name}", name):
            if key in self._given:
                return self._given[key]
        if whole:
            return 0.0
        if precision.name in self._given:
            return self._given[precision.name]
        return MARGIN * floor * max(precision.roundoff / _FP32, 1.0)


Sides = tuple[Pipeline, Pipeline]
"""Pipelines of a reference and a test."""


@dataclass(frozen=True)
class VerifyOptions:
    """Options of a verification.

    ``tolerances``: see ``Tolerances``. ``max_abs``: limit of max |Δ| besides. ``voxels``: pillars of the first sample
    by the test's own pre-processing (``read_voxels``). ``explain``: bisect what fails.
    """

    tolerances: Mapping[str, float] = field(default_factory=dict)
    max_abs: float | None = None
    voxels: Path | None = None
    explain: bool = True


@dataclass
class TensorCheck:
    """One output of a component, for the sample on which it is worst."""

    component: str
    name: str
    stats: TensorStats = field(metadata={"inline": True})
    floor: float
    """Noise of this output in FP32, relative L2."""
    limit: float
    """Largest relative L2 distance allowed."""
    source: str
    why: str
    """Reason why it is beyond the limit; empty when it is not."""

    @property
    def severity(self) -> tuple[float, ...]:
        """Sort key, larger is worse."""
        return bool(self.why), not self.stats.nothing_compared, *self.stats.severity, self.stats.max_ref


@dataclass
class ScenarioResult(JsonForm):
    """A reference against a test."""

    reference: RunRecord = field(metadata={"key": "backends.reference"})
    test: RunRecord = field(metadata={"key": "backends.test"})
    checks: list[TensorCheck] = field(metadata={"key": "tensors"})
    preprocessing: dict[str, VoxelChange]
    """Sample → change of its pillars; empty for models without any."""
    detections: DetectionChange | None
    seconds: dict[str, float]
    bisect: BisectResult | None = None
    """Bisection of the worst sample, where the scenario failed."""
    judged_as: str = "fp32"
    """The coarsest precision of the backends and of what the files declare, by which the limits are set."""
    missing: list[str] = field(default_factory=list)
    """Outputs of the reference that the test lacks."""
    moved: dict[str, str] = field(default_factory=dict)
    """Outputs of the reference in whose place the test gives another one: its name there."""

    @property
    def passed(self) -> bool:
        """Whether the test has every tensor in its place, each is within its limit, and both sides voxelize alike."""
        within = not self.failures and not self.missing and not self.moved
        return within and all(change.agrees for change in self.preprocessing.values())

    @property
    def failures(self) -> list[TensorCheck]:
        """The tensors beyond their limits."""
        return [check for check in self.checks if check.why]

    @property
    def empty(self) -> list[str]:
        """Tensors without an element on both sides, in every sample: nothing of them could be compared."""
        return [check.name for check in self.checks if check.stats.count == 0 and not check.stats.shape_mismatch]

    @property
    def caveats(self) -> list[str]:
        """Phrases about outputs that say little though they pass: without an element, or 0 everywhere."""
        return caveats({check.name: [check.stats] for check in self.checks})

    @property
    def name(self) -> str:
        """``torch@cpu → ort@cpu``."""
        return f"{self.reference.spec} → {self.test.spec}"

    def derived(self) -> dict[str, Any]:
        """The specs of both sides, and the outcome."""
        sides = {"reference": self.reference.spec, "test": self.test.spec}
        return {**sides, "passed": self.passed, "caveats": self.caveats}


@dataclass(repr=False)
class VerifyResult(JsonForm, Shown):
    """Result of a verification: every scenario, a reference against a test."""

    derives = ("passed",)
    model: str
    samples: list[str]
    scenarios: list[ScenarioResult]
    notes: list[str] = field(default_factory=list)
    """Remarks on the samples."""

    @property
    def passed(self) -> bool:
        """Whether every scenario passed."""
        return all(scenario.passed for scenario in self.scenarios)


def verify(
    model: Model,
    programs: Sequence[Program],
    scenarios: Sequence[tuple[Backend, Backend]],
    samples: Sequence[Sample],
    options: VerifyOptions = VerifyOptions(),
    *,
    test_programs: Sequence[Program] | None = None,
    on_step: OnStep = lambda text, done, total: None,
) -> VerifyResult:
    """Run ``programs`` on both backends of every scenario and compare all outputs of all components.

    A backend runs a sample once, in however many scenarios it is. ``programs`` are the deployed files with the modules
    they came from (``load_exported``); ``test_programs`` are other files for the tests, paired with them. What fails is
    bisected against a fresh export of the modules. Outputs that the test programs lack fail. Raises BackendUnavailable
    and InputError, also for test programs of which no output can be compared, and where no output has an element; never
    for a divergence.
    """
    tests = programs if test_programs is None else test_programs
    left_out, missing = _uncompared(programs, tests)
    names = [name for component in model.components for name in component.output_names]
    limits = Tolerances(options.tolerances, names)
    handed = checked(model)
    floors: dict[Key, float] = {}
    skipped = {*left_out, *missing}
    with ExitStack() as stack:
        opened: dict[tuple[Backend, bool], Pipeline] = {}

        def pipeline_of(backend: Backend, *, test: bool) -> Pipeline:
            key = backend, test and tests is not programs
            if key not in opened:
                opened[key] = stack.enter_context(Pipeline(handed, tests if key[1] else programs, backend))
            return opened[key]

        running = [
            _RunningScenario(pipeline_of(reference, test=False), pipeline_of(test, test=True), limits, options.max_abs)
            for reference, test in scenarios
        ]
        remarks = Remarks(model)
        for place, sample in enumerate(samples):
            remarks.see(sample)
            passes = _Passes(model, sample, options.voxels if place == 0 else None)
            for number, scenario in enumerate(running):
                on_step(f"verifying {scenario.name}", place * len(running) + number, len(samples) * len(running))
                with scenario.clock("forward"):
                    expected, _ = (passes.outputs(pipeline) for pipeline in scenario.sides)
                with scenario.clock("verify"):
                    if not floors:
                        single = expected if scenario.sides[0].backend.precision == "fp32" else None
                        floors = noise_floors(handed, programs, sample, single)
                    scenario.add(passes, {key: floor for key, floor in floors.items() if key not in skipped})
        results = [scenario.result() for scenario in running]
    _check_not_empty(results)
    for result in results:
        result.missing = [key.value for key in missing]
        for test in tests:
            result.moved |= test.pairing.moved if test.pairing is not None else {}
    for result, pair in zip(results, scenarios, strict=True):
        if result.failures and options.explain:
            result.bisect = _explain(model, tests, samples, result, pair)
    return VerifyResult(model.name, [sample.source for sample in samples], results, remarks.sentences)


def _uncompared(programs: Sequence[Program], tests: Sequence[Program]) -> tuple[set[Key], list[Key]]:
    """The outputs that the user left out, and those that the test lacks.

    Raises InputError where nothing is left to compare, and for a value inside the test, which has no probes here.
    """
    left_out: set[Key] = set()
    missing: list[Key] = []
    for program, test in zip(programs, tests, strict=True):
        if (pairing := test.pairing) is None:
            continue
        for name, inner in pairing.inside.items():
            given = ", ".join(value.name for value in test.graph.outputs)
            raise InputError(f"--map: {name}={inner}: only outputs are verified; those of {test.graph} are {given}")
        left_out.update(Key(program.name, name) for name in pairing.left_out)
        if not pairing.outputs:
            check_outputs(program.graph, test)
        missing += [Key(program.name, value.name) for value in program.graph.outputs if pairing.lacks(value.name)]
    return left_out, missing


def _check_not_empty(results: Sequence[ScenarioResult]) -> None:
    for result in results:
        if len(result.empty) == len(result.checks):
            names = ", ".join(result.empty)
            raise InputError(f"{result.name}: no output was compared: {names} without an element on both sides")


class _Passes:
    """One sample, once through every backend and every device's voxelization. ``voxels``: see ``VerifyOptions``."""

    def __init__(self, model: Model, sample: Sample, voxels: Path | None) -> None:
        self.sample = sample
        self._model, self._voxels = model, voxels
        self.outputs = outputs = cache(lambda pipeline: pipeline.run(sample))
        self._decoded = cache(lambda pipeline: decode(model, sample, outputs(pipeline)))
        self._pillars: dict[str, Voxels] = {}

    def detections(self, sides: Sides) -> DetectionChange | None:
        """Change from the reference's detections to the test's; None for models that detect nothing."""
        reference, test = (self._decoded(pipeline) for pipeline in sides)
        if isinstance(reference, DetectsBoxes) and isinstance(test, DetectsBoxes):
            return compare_detections(reference, test)
        return None

    def preprocessing(self, sides: Sides) -> dict[str, VoxelChange]:
        """Sample → change of its pillars; the test voxelizes where it runs, or elsewhere altogether."""
        if not isinstance(self._model, CenterPointModel):
            return {}
        config, points = self._model.config, self.sample.arrays["points"]
        reference, test = (pipeline.backend.device for pipeline in sides)
        for device in {reference, test} - self._pillars.keys():
            self._pillars[device] = voxelize_on(points, config, device)
        theirs = read_voxels(self._voxels, config) if self._voxels else self._pillars[test]
        return {self.sample.source: compare_voxels(self._pillars[reference], theirs, points, config)}


class _RunningScenario:
    """A reference and a test, with their comparison over the samples so far."""

    def __init__(self, reference: Pipeline, test: Pipeline, limits: Tolerances, max_abs: float | None) -> None:
        self.sides = reference, test
        self.name = f"{reference.backend.spec} → {test.backend.spec}"
        self.clock = Clock()
        self._limits, self._max_abs = limits, max_abs
        graphs = (program.graph for side in self.sides for program in side.programs)
        self._declared = sorted({precision for graph in graphs for precision in narrow_values(graph).values()})
        self._levels = levels_of_both(reference.programs, test.programs)
        self._worst: dict[Key, TensorCheck] = {}
        self._preprocessing: dict[str, VoxelChange] = {}
        self._detections: DetectionChange | None = None

    def add(self, passes: _Passes, floors: Mapping[Key, float]) -> None:
        """Compare a sample."""
        for key, floor in floors.items():
            if (check := self._check(passes, key, floor)) is None:
                continue
            self._worst[key] = max(self._worst.get(key, check), check, key=lambda c: c.severity)
        self._preprocessing |= passes.preprocessing(self.sides)
        if change := passes.detections(self.sides):
            self._detections = self._detections + change if self._detections else change

    def _check(self, passes: _Passes, key: Key, floor: float) -> TensorCheck | None:
        """One output; None for an element of a sequence that a side lacks, which the sequence's length tells."""
        reference, test = self.sides
        pair = [passes.outputs(pipeline)[key.component].get(key.value) for pipeline in self.sides]
        ours, theirs = pair
        if ours is None or theirs is None:
            if part_of(key.value) != key.value:
                return None
            raise InputError(f"{self.name}: {key.component} has no output {key.value!r} on one side")
        stats = compare_any(ours, theirs)
        whole = stats.is_whole and key not in self._levels
        precisions = reference.backend.precision, test.backend.precision, *self._declared
        limit = self._limits.limit(key.value, floor, *precisions, whole=whole)
        why = what_is_wrong(stats, limit, self._max_abs)
        why = (is_text(ours) and difference_in_words(ours, theirs)) or why
        return TensorCheck(key.component, key.value, stats, floor, limit, passes.sample.source, why)

    def result(self) -> ScenarioResult:
        """Result over all samples."""
        reference, test = (pipeline.record() for pipeline in self.sides)
        checks = list(self._worst.values())
        result = ScenarioResult(reference, test, checks, self._preprocessing, self._detections, self.clock.seconds)
        backends = (pipeline.backend.precision for pipeline in self.sides)
        result.judged_as = coarsest(*backends, *self._declared).name
        return result


def _explain(
    model: Model,
    programs: Sequence[Program],
    samples: Sequence[Sample],
    failed: ScenarioResult,
    backends: tuple[Backend, Backend],
) -> BisectResult:
    source = max(failed.failures, key=lambda check: check.severity).source
    sample = next(sample for sample in samples if sample.source == source)
    props = {entry.key: entry.value for entry in programs[0].graph.proto.metadata_props}
    options = Options(exporter=props.get("cpdebug.exporter"), folded=props.get("cpdebug.folded") != "false")
    builders = [builder_of(backend) for backend in backends]  # engine files have no probes
    return bisect(
        with_samples(model, [sample]), builders, test_model=lambda exported, folder: list(programs), options=options
    )


def what_is_wrong(stats: TensorStats, limit: float, max_abs: float | None) -> str:
    """The reason in words why a tensor is beyond its limits; empty when it is within them.

    NaN always fails, even where both sides have the same; Inf fails where it is not of one sign at the same places, or
    where there is nothing else.
    """
    if stats.shape_mismatch:
        return f"the shape is {list(stats.shape_test)}; expected {list(stats.shape)}"
    if stats.mismatched or stats.nan_test or stats.nothing_compared:
        if strange := stats.nan_test + stats.inf_test:
            return f"{strange} NaN or Inf"
        if strange := stats.nan_ref + stats.inf_ref:
            return f"the reference holds {strange} NaN or Inf, the test none"
    if stats.rel_l2 > limit:
        if not limit and stats.unequal:
            return f"{stats.unequal} of {stats.count} elements differ"
        return f"relative L2 {stats.rel_l2:.2g}; expected at most {limit:.2g}"
    if max_abs is not None and stats.max_abs > max_abs:
        return f"max |Δ| {stats.max_abs:.2g}; expected at most {max_abs:g}"
    return ""


def reasons(scenario: ScenarioResult) -> Iterator[str]:
    """Phrases for missing and moved outputs, the worst tensor, the voxels, the guilty layer and its cause."""
    if missing := scenario.missing:
        yield f"the test lacks output{'s' * (len(missing) > 1)} {', '.join(missing)} of the reference"
    if scenario.moved:
        yield f"the outputs are in another order: {places(scenario.moved)}"
    if failures := scenario.failures:
        worst = max(failures, key=lambda check: check.severity)
        yield f"{len(failures)} of {len(scenario.checks)} outputs fail, the worst is {worst.name}: {worst.why}"
        ours = worst.stats.nan_ref + worst.stats.inf_ref
        if ours and not worst.stats.mismatched:
            yield f"the reference has the same {ours} NaN or Inf: they come from the model or its input"
    wrong = [change for change in scenario.preprocessing.values() if not change.agrees]
    if wrong:
        yield f"the voxels differ: {wrong[0]}"
    yield from culprits(scenario)


def culprits(scenario: ScenarioResult) -> Iterator[str]:
    """Phrases for the guilty layer and the cause that explains most, where the failure was bisected."""
    for test in scenario.bisect.tests if scenario.bisect else ():
        if test.first_divergent is not None:
            verdict = "guilty" if test.guilty else "first divergent"
            yield f"{verdict} layer {test.first_divergent.name}"
        if test.findings:
            yield f"cause: {test.findings[0].headline}"
