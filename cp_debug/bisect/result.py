"""Result of a bisect: rows for the layers, one block for each test backend, and the faces of both."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cp_debug.backends.base import RunRecord
from cp_debug.bisect.observe import Observation
from cp_debug.bisect.regions.region import Region
from cp_debug.bisect.replayed import EXCESS, Replay
from cp_debug.bisect.strange_numbers import born, outputs_say, undecided
from cp_debug.display import notebook, plain, terminal, write_page
from cp_debug.probes.statistics import TensorStats
from cp_debug.safe_text import one_line
from cp_debug.serialize import encode, json_safe

if TYPE_CHECKING:
    import pandas as pd
    from rich.console import Console, ConsoleOptions, RenderResult

    from cp_debug.bisect.causes.finding import Finding
    from cp_debug.bisect.optimizer_blame import OptimizerBlame
    from cp_debug.detection.detection_change import DetectionChange

SCHEMA = "cpdebug.bisect/1"

OK, INHERITED, DIVERGENT, GUILTY, SHAPE = "ok", "inherited", "divergent", "guilty", "shape"
"""Verdicts of a layer. ``ok``: within tolerance. ``inherited``: beyond it, but the layer did what its precision must.
``divergent``: beyond it, and nobody replayed the layer. ``guilty``: it introduced what its precision cannot explain.
``shape``: the shapes differ."""


@dataclass
class LayerRow:
    """One layer of one test backend, for its worst sample."""

    index: int
    component: str
    name: str
    onnx: str
    op: str
    stats: TensorStats = field(metadata={"inline": True})
    verdict: str
    within: bool = field(metadata={"key": "within_tolerance"})
    """Whether max |Δ| is within the tolerance."""
    replay: Replay | None = field(default=None, metadata={"inline": True})
    why: str = ""
    """Reason why the layer is guilty, or of another shape, in words."""
    side: str = "test"
    """Whose result is at fault: ``test``, or ``reference`` when the reference deviates from the oracle."""
    share: float | None = None
    """Share of the final divergence that this layer's introduced error explains, for guilty layers."""
    noise_floor: float = 0.0
    sample: int = 0
    tactic: str = ""
    """Name of the kernel that wrote the value, where the backend tells."""
    region: Region | None = None
    """Region that the row stands for, where that is more than a layer; then ``name`` is its label."""
    kind: str = "data"
    """``data``; ``constant`` or ``shape`` for a side value: see ``Layer``. Side values have a row where they differ."""

    def __post_init__(self) -> None:
        self.name, self.op, self.tactic = one_line(self.name), one_line(self.op), one_line(self.tactic)

    @property
    def severity(self) -> tuple[float, ...]:
        """Sort key over samples: guilty before divergent before ok, then the excess, then the divergence."""
        rank = (OK, INHERITED, DIVERGENT, SHAPE, GUILTY).index(self.verdict)
        excess = self.replay.excess if self.replay and self.replay.excess is not None else 0.0
        return (rank, excess, *self.stats.severity)

    def to_dict(self, *, json: bool = True) -> dict[str, Any]:
        """The row of the JSON schema; numbers that JSON lacks are the strings "NaN", "Infinity", "-Infinity".

        ``json`` False leaves them numbers.
        """
        row = replace(self, replay=self.replay or Replay(skipped="not replayed"))
        region = {"region": self.region.to_dict()} if self.region else {}  # with its label
        return encode(row, json=json) | {"shape_mismatch": self.stats.shape_mismatch} | region


@dataclass
class StageRow:
    """A stage, seen at its last tensor."""

    name: str
    layer: LayerRow
    guilty: list[str] = field(default_factory=list)
    """The guilty layers that the stage holds, by name."""

    @property
    def verdict(self) -> str:
        """``guilty`` where the stage holds a guilty layer, else the verdict on its last tensor."""
        return GUILTY if self.guilty else self.layer.verdict

    @property
    def severity(self) -> tuple[float, ...]:
        """Sort key: a stage with guilty layers before the others, then its last tensor's."""
        return (float(bool(self.guilty)), *self.layer.severity)

    def __post_init__(self) -> None:
        self.name = one_line(self.name)

    def to_dict(self) -> dict[str, Any]:
        """Name, the figures of the stage's last tensor, and the verdict on the stage with its guilty layers."""
        row = self.layer.to_dict()
        keys = ("component", "onnx", "shape", "max_abs", "mean_abs", "rel_l2", "cosine")
        figures = {k: row[k] for k in keys}
        return {"stage": self.name, "layer": row["name"], **figures, "verdict": self.verdict, "guilty": self.guilty}


@dataclass
class Remainder:
    """Divergence of outputs that no layer is guilty of; relative L2 of the worst final output."""

    divergence: float
    rounding: float | None = None
    """Divergence of the emulated precision on the same inputs; None where it is the test, or cannot be emulated."""
    not_replayed: dict[str, str] = field(default_factory=dict)
    """Node → reason why it was not replayed, or why nobody knows what it may introduce."""

    @property
    def adds_up(self) -> bool:
        """Whether every node was replayed, and rounding alone makes about as much."""
        return not self.not_replayed and (self.rounding is None or self.divergence <= EXCESS * self.rounding)

    def __str__(self) -> str:
        if self.not_replayed:
            names = ", ".join([*self.not_replayed][:3])
            more = f" and {len(self.not_replayed) - 3} more" if len(self.not_replayed) > 3 else ""
            return f"not replayed or not emulated, so not explained: {names}{more}"
        if self.adds_up:
            return "the rounding adds up"
        return f"but rounding alone makes {self.rounding:.2g} of it: the rest is not explained"


@dataclass
class TestResult:
    """One test backend against the reference."""

    __test__ = False  # not a test, whatever its name tells pytest

    backend: RunRecord
    rows: list[LayerRow]
    stages: list[StageRow]
    outputs: list[LayerRow]
    compared: int
    """Number of values compared, of ``total`` that the reference's deployed graph computes."""
    total: int
    rtol: float
    atol: float
    oracle: str | None
    observation: Observation | None = None
    notes: list[str] = field(default_factory=list)
    """Remarks that a reader must know: settings that do not match, layers nobody could replay, probes that lie."""
    findings: list[Finding] = field(default_factory=list)
    """Causes with their evidence, on the worst sample: the largest effect first."""
    programs: dict[str, str] = field(default_factory=dict)
    """Component → the graph that this backend ran, as ``BisectResult.programs``."""
    detections: DetectionChange | None = None
    """Change of the detections, over all samples; None where the model has none."""
    optimizer_blame: OptimizerBlame | None = field(default=None, metadata={"key": "knobs"})
    """Differences that ONNX Runtime's optimizer is responsible for, where it was asked."""
    expected_outputs: list[str] = field(default_factory=list)
    """The final outputs of the reference; ``outputs`` are those that were compared."""
    pairing: dict[str, Any] = field(default_factory=dict)
    """Component → how its values were paired with the reference's, where the test runs another graph."""
    remainder: Remainder | None = None
    """Whether rounding adds up to the divergence, after a replay in which no layer is guilty and outputs differ."""

    @property
    def missing_outputs(self) -> list[str]:
        """Final outputs of the reference that were not compared."""
        return [name for name in self.expected_outputs if name not in {row.onnx for row in self.outputs}]

    @property
    def coverage(self) -> str:
        """Coverage in words, such as ``3 of 3 outputs, 27 of 27 values``."""
        expected = max(len(self.expected_outputs), len(self.outputs))
        return f"{len(self.outputs)} of {expected} outputs, {self.compared} of {self.total} values"

    @property
    def guilty(self) -> list[LayerRow]:
        """The guilty layers, in execution order."""
        return [row for row in self.rows if row.verdict == GUILTY]

    @property
    def first_divergent(self) -> LayerRow | None:
        """The first guilty layer; without one, the first beyond tolerance."""
        return next(iter(self.guilty), self.first_beyond)

    @property
    def first_beyond(self) -> LayerRow | None:
        """The first layer, in execution order, whose divergence is beyond the tolerance."""
        return next((row for row in self.rows if not row.within), None)

    @property
    def agrees(self) -> bool:
        """No guilty layer, and every final output that was compared within the tolerance; never without one, nor where
        an output is NaN: two of them are equal, and nothing is known."""
        decided = bool(self.outputs) and not any(map(undecided, self.outputs))
        return decided and not self.guilty and all(row.within for row in self.outputs)

    @property
    def not_finite(self) -> str:
        """The final outputs that hold NaN or Inf on a side, and where these are born; empty where all are finite."""
        sentence = outputs_say(self.outputs)
        return "; ".join([sentence, *born(self.rows)]) if sentence else ""

    @property
    def layers(self) -> pd.DataFrame:
        """One row a layer, with the columns of the JSON schema."""
        import pandas as pd

        return pd.DataFrame([row.to_dict(json=False) for row in self.rows])

    def to_dict(self) -> dict[str, Any]:
        """The block of the JSON schema."""
        first, observed = self.first_divergent, self.observation
        return {
            "backend": self.backend.spec,
            "alignment": {"aligned": self.compared, "total": self.total},
            "compared": {
                "says": self.coverage,
                "outputs": len(self.outputs),
                "outputs_expected": self.expected_outputs,
                "values": self.compared,
                "values_expected": self.total,
            },
            "pairing": self.pairing,
            "tolerance": json_safe({"rtol": self.rtol, "atol": self.atol}),
            "stages": [stage.to_dict() for stage in self.stages],
            "layers": [row.to_dict() for row in self.rows],
            "outputs": [row.to_dict() for row in self.outputs],
            "first_divergent": first.name if first else None,
            "first_beyond_tolerance": self.first_beyond.name if self.first_beyond else None,
            "guilty": [row.name for row in self.guilty],
            "oracle": self.oracle,
            "noise_floor": observed.noise_floor if observed else None,
            "observer_gap": observed.observer_gap if observed else None,
            "first_unsteady": observed.first_unsteady if observed else None,
            "repeats": observed.repeats if observed else None,
            "runs": observed.runs if observed else None,
            "agrees": self.agrees,
            "not_finite": self.not_finite,
            "notes": self.notes,
            "test_programs": self.programs,
            "findings": encode(self.findings),
            "detections": encode(self.detections),
            "knobs": json_safe(self.optimizer_blame.to_dict()) if self.optimizer_blame else None,
            "remainder": encode(self.remainder) | {"adds_up": self.remainder.adds_up} if self.remainder else None,
        }


@dataclass
class BisectResult:
    """The reference against every test backend. Shows itself in a rich console."""

    model: str
    reference: RunRecord
    tests: list[TestResult]
    samples: list[str]
    """Source of each sample."""
    coverage: dict[str, Any]
    """Alignment of torch and ONNX: values and leaf modules accounted for, modules that folding absorbed."""
    programs: dict[str, str] = field(default_factory=dict)
    """Component → its deployed graph: an ONNX file, relative to the saved folder where it lies there."""
    reference_observation: Observation | None = None
    """The reference against itself, on the first sample."""
    command: str = ""
    weights: dict[str, Any] = field(default_factory=dict)
    """Component → how the weights of two models differ (``WeightDifferences.to_dict``); empty where both run one."""

    @property
    def layers(self) -> pd.DataFrame:
        """The layers of the first test backend."""
        return self.tests[0].layers

    @property
    def first_divergent(self) -> LayerRow | None:
        """The first divergent layer of the first test backend that has one."""
        return next((t.first_divergent for t in self.tests if t.first_divergent), None)

    @property
    def agrees(self) -> bool:
        """Whether every test backend agrees with the reference."""
        return all(test.agrees for test in self.tests)

    def to_dict(self) -> dict[str, Any]:
        """The whole result, JSON-safe. The first test backend's block also lies at the top level."""
        blocks = [test.to_dict() for test in self.tests]
        return {
            "schema": SCHEMA,
            "model": self.model,
            "command": self.command,
            "backends": [encode(r) for r in (self.reference, *(t.backend for t in self.tests))],
            "samples": self.samples,
            "coverage": self.coverage,
            "reference_observation": encode(self.reference_observation) if self.reference_observation else {},
            "programs": self.programs,
            "weights": json_safe(self.weights),
            **blocks[0],
            "tests": blocks,
        }

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield from terminal(self, BisectResult)

    def _repr_html_(self) -> str:
        return notebook(self, BisectResult)

    def __str__(self) -> str:
        return plain(self, BisectResult)

    def __repr__(self) -> str:
        tests = ", ".join(f"{t.backend.spec}: {len(t.guilty)} guilty of {len(t.rows)} layers" for t in self.tests)
        return f"<BisectResult of {self.model}: {tests}>"

    def write_html(self, path: str | Path) -> None:
        """Write the HTML report: one file that works offline. Raises InputError when it cannot be written."""
        write_page(self, Path(path), BisectResult)

    def show(self, path: str | Path | None = None) -> Path:
        """Write the HTML report and open it in a browser, where there is one. Returns the file.

        ``path`` None takes a file in the temporary folder, which stays. Raises InputError when it cannot be written.
        """
        import tempfile
        import webbrowser

        target = Path(path) if path is not None else Path(tempfile.mkdtemp(prefix="cpdebug-")) / "report.html"
        self.write_html(target)
        webbrowser.open(target.resolve().as_uri())
        return target

    def __iter__(self) -> Iterator[TestResult]:
        return iter(self.tests)
