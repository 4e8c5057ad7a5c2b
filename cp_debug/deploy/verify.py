"""Verification: scenarios of a reference and a test backend, several samples, a limit for every tensor."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from cp_debug.backends.base import Backend, Program, RunRecord
from cp_debug.bisect.engine import Options, bisect
from cp_debug.bisect.pipeline import Key, Pipeline
from cp_debug.bisect.result import BisectResult, json_safe
from cp_debug.bisect.scene import decode
from cp_debug.deploy.detections import DetectionChange, compare_detections
from cp_debug.deploy.handover import checked
from cp_debug.deploy.preprocessing import VoxelChange, compare_voxels, read_voxels, voxelize_on
from cp_debug.deploy.tolerance import Tolerances, noise_floors
from cp_debug.probes.statistics import TensorStats, compare
from cp_debug.recipes.base import Arrays, Model, Sample
from cp_debug.recipes.centerpoint.recipe import CenterPointModel

OnStep = Callable[[str, int, int], None]


@dataclass(frozen=True)
class VerifyOptions:
    """``tolerances``: see ``Tolerances``. ``max_abs``: limit of max |Δ| besides. ``voxels``: pillars of the first
    sample by the test's own pre-processing (``read_voxels``). ``explain``: bisect what fails."""

    tolerances: Mapping[str, float] = field(default_factory=dict)
    max_abs: float | None = None
    voxels: Path | None = None
    explain: bool = True


@dataclass
class TensorCheck:
    """One output of a component, for the sample on which it is worst."""

    component: str
    name: str
    stats: TensorStats
    floor: float
    """Its noise in FP32, relative L2."""
    limit: float
    """Largest relative L2 distance allowed."""
    source: str
    why: str
    """What is wrong; empty when nothing is."""

    @property
    def severity(self) -> tuple[float, ...]:
        """Sort key, larger is worse."""
        return bool(self.why), *self.stats.severity

    def to_dict(self) -> dict[str, Any]:
        """JSON-safe."""
        stats = self.stats.to_dict()
        names = ("shape", "max_abs", "mean_abs", "rel_l2", "cosine", "nan_test", "inf_test")
        own = {k: v for k, v in asdict(self).items() if k != "stats"}
        return json_safe({**own, **{name: stats[name] for name in names}})


@dataclass
class ScenarioResult:
    """A reference against a test."""

    reference: RunRecord
    test: RunRecord
    checks: list[TensorCheck]
    preprocessing: dict[str, VoxelChange]
    """Sample → what became of its pillars; empty for models without."""
    detections: DetectionChange | None
    seconds: dict[str, float]
    bisect: BisectResult | None = None
    """Why it failed, on the worst sample."""

    @property
    def passed(self) -> bool:
        """Whether every tensor is within its limit and both sides voxelize alike."""
        return not self.failures and all(change.agrees for change in self.preprocessing.values())

    @property
    def failures(self) -> list[TensorCheck]:
        """The tensors beyond their limits."""
        return [check for check in self.checks if check.why]

    @property
    def name(self) -> str:
        """``torch@cpu → ort@cpu``."""
        return f"{self.reference.spec} → {self.test.spec}"

    def to_dict(self) -> dict[str, Any]:
        """JSON-safe; of the bisect what it says of the test."""
        return {
            "reference": self.reference.spec,
            "test": self.test.spec,
            "passed": self.passed,
            "tensors": [check.to_dict() for check in self.checks],
            "preprocessing": {
                source: {**asdict(change), "agrees": change.agrees} for source, change in self.preprocessing.items()
            },
            "detections": json_safe(asdict(self.detections)) if self.detections else None,
            "seconds": self.seconds,
            "bisect": self.bisect.to_dict() if self.bisect else None,
        }


@dataclass
class VerifyResult:
    """All scenarios."""

    model: str
    samples: list[str]
    scenarios: list[ScenarioResult]

    @property
    def passed(self) -> bool:
        """Whether every scenario passed."""
        return all(scenario.passed for scenario in self.scenarios)

    def to_dict(self) -> dict[str, Any]:
        """JSON-safe."""
        return {
            "model": self.model,
            "samples": self.samples,
            "passed": self.passed,
            "scenarios": [scenario.to_dict() for scenario in self.scenarios],
        }


def verify(
    model: Model,
    programs: Sequence[Program],
    scenarios: Sequence[tuple[Backend, Backend]],
    samples: Sequence[Sample],
    options: VerifyOptions = VerifyOptions(),
    *,
    on_step: OnStep = lambda text, done, total: None,
) -> VerifyResult:
    """Run ``programs`` on both backends of every scenario and compare all outputs of all components.

    ``programs`` are the deployed files with the modules they came from (``load_exported``). What fails is bisected
    against a fresh export of the modules. Raises BackendUnavailable and InputError; never for a divergence.
    """
    names = [name for component in model.components for name in component.output_names]
    verification = _Verification(
        checked(model), model, programs, samples, options, Tolerances(options.tolerances, names)
    )
    found = []
    for place, (reference, test) in enumerate(scenarios):
        on_step(f"verifying {reference.spec} → {test.spec}", place, len(scenarios))
        found.append(verification.run(reference, test))
    return VerifyResult(model.name, [sample.source for sample in samples], found)


@dataclass
class _Verification:
    model: Model
    unchecked: Model
    programs: Sequence[Program]
    samples: Sequence[Sample]
    options: VerifyOptions
    tolerances: Tolerances
    floors: dict[Key, float] = field(default_factory=dict)

    def run(self, reference: Backend, test: Backend) -> ScenarioResult:
        worst: dict[Key, TensorCheck] = {}
        detections: DetectionChange | None = None
        preprocessing: dict[str, VoxelChange] = {}
        started, forward = time.perf_counter(), 0.0
        with (
            Pipeline(self.model, self.programs, reference) as ours,
            Pipeline(self.model, self.programs, test) as theirs,
        ):
            for place, sample in enumerate(self.samples):
                preprocessing |= self._preprocessing(place, sample, reference, test)
                before = time.perf_counter()
                expected, found = ours.run(sample), theirs.run(sample)
                forward += time.perf_counter() - before
                if not self.floors:
                    single = expected if reference.precision == "fp32" else None
                    self.floors = noise_floors(self.model, self.programs, sample, single)
                for check in self._checks(sample, expected, found, reference, test):
                    key = Key(check.component, check.name)
                    worst[key] = max(worst.get(key, check), check, key=lambda c: c.severity)
                detections = self._detections(detections, sample, expected, found)
            result = ScenarioResult(
                ours.record(), theirs.record(), list(worst.values()), preprocessing, detections, {"forward": forward}
            )
        result.seconds["verify"] = time.perf_counter() - started - forward
        if result.failures and self.options.explain:
            result.bisect = self._bisect(result, reference, test)
        return result

    def _checks(
        self,
        sample: Sample,
        expected: Mapping[str, Arrays],
        found: Mapping[str, Arrays],
        reference: Backend,
        test: Backend,
    ) -> Iterator[TensorCheck]:
        for key, floor in self.floors.items():
            stats = compare(expected[key.component][key.value], found[key.component][key.value])
            limit = self.tolerances.limit(key.value, floor, reference.precision, test.precision)
            why = what_is_wrong(stats, limit, self.options.max_abs)
            yield TensorCheck(key.component, key.value, stats, floor, limit, sample.source, why)

    def _preprocessing(self, place: int, sample: Sample, reference: Backend, test: Backend) -> dict[str, VoxelChange]:
        """The test voxelizes where it runs, or elsewhere altogether."""
        if not isinstance(self.unchecked, CenterPointModel):
            return {}
        config, points = self.unchecked.config, sample.arrays["points"]
        ours = voxelize_on(points, config, reference.device)
        if place == 0 and self.options.voxels:
            theirs = read_voxels(self.options.voxels, config)
        else:
            theirs = ours if test.device == reference.device else voxelize_on(points, config, test.device)
        return {sample.source: compare_voxels(ours, theirs, points, config)}

    def _detections(
        self,
        before: DetectionChange | None,
        sample: Sample,
        expected: Mapping[str, Arrays],
        found: Mapping[str, Arrays],
    ) -> DetectionChange | None:
        pair = [decode(self.unchecked, sample, results) for results in (expected, found)]
        if not all(hasattr(each, "boxes") for each in pair):
            return before
        change = compare_detections(*pair)  # type: ignore[arg-type]
        return change if before is None else before + change

    def _bisect(self, result: ScenarioResult, reference: Backend, test: Backend) -> BisectResult:
        source = max(result.failures, key=lambda check: check.severity).source
        sample = next(sample for sample in self.samples if sample.source == source)
        one = copy.copy(self.unchecked)
        one.samples = lambda count, seed, inputs: iter([sample])  # type: ignore[method-assign]
        deployed = list(self.programs)
        props = {entry.key: entry.value for entry in deployed[0].graph.proto.metadata_props}
        options = Options(exporter=props.get("cpdebug.exporter"), folded=props.get("cpdebug.folded") != "false")
        backends = [
            getattr(backend, "builder", backend) for backend in (reference, test)
        ]  # engine files have no probes
        return bisect(one, backends, test_model=lambda programs, folder: deployed, options=options)


def what_is_wrong(stats: TensorStats, limit: float, max_abs: float | None) -> str:
    """In words; empty when the tensor is within its limits. NaN and Inf of the test always fail, even where the
    reference has them too."""
    if stats.shape_mismatch:
        return f"the shape is {list(stats.shape_test)}; expected {list(stats.shape)}"
    if strange := stats.nan_test + stats.inf_test:
        return f"{strange} NaN or Inf"
    if stats.rel_l2 > limit:
        return f"relative L2 {stats.rel_l2:.2g}; expected at most {limit:.2g}"
    if max_abs is not None and stats.max_abs > max_abs:
        return f"max |Δ| {stats.max_abs:.2g}; expected at most {max_abs:g}"
    return ""
