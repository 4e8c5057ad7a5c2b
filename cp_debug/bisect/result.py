"""Result of a bisect: rows for the layers, one block for each test backend, and the faces of both."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

from cp_debug.backends.base import RunRecord
from cp_debug.bisect.finding import Finding
from cp_debug.bisect.observe import Observation
from cp_debug.bisect.optimizer_blame import OptimizerBlame
from cp_debug.bisect.regions.region import Region
from cp_debug.bisect.replayed import EXCESS, Replay
from cp_debug.detection.changes import DetectionChange
from cp_debug.display import Shown, in_notebook, show_inline, write_page
from cp_debug.errors import InputError
from cp_debug.graph.randomness import DRAWS_NUMBERS
from cp_debug.probes.caveats import ALL_ZERO
from cp_debug.probes.statistics import TensorStats
from cp_debug.safe_text import one_line, percent, some
from cp_debug.serialize import BadField, JsonForm, check_entries, encode, number_keys, part

if TYPE_CHECKING:
    import pandas as pd


SCHEMA = "cpdebug.bisect/1"

OK, INHERITED, DIVERGENT, GUILTY, SHAPE = "ok", "inherited", "divergent", "guilty", "shape"
"""Verdicts of a layer. ``ok``: within tolerance. ``inherited``: beyond it, but the layer did what its precision must.
``divergent``: beyond it, and nobody replayed the layer. ``guilty``: it introduced what its precision cannot explain.
``shape``: the shapes differ."""


MOST_NAMES = 5
"""Names in one line."""

SIDES = ("reference", "test")
_WRITTEN = {"nan": "NaN", "inf": "Inf"}
KINDS = tuple(_WRITTEN)
_FIRST_COLUMNS = ("index", "name", "op", "max_abs", "rel_l2", "introduced", "expected", "excess", "verdict", "share")
"""Columns of a table of layers that stand first: what a terminal shows of a layer."""


@dataclass
class LayerRow:
    """One layer of one test backend, for its worst sample."""

    index: int
    component: str
    name: str
    onnx: str
    op: str
    stats: TensorStats = field(metadata={"inline": True})
    verdict: str = field(metadata={"one_of": (OK, INHERITED, DIVERGENT, GUILTY, SHAPE)})
    within: bool = field(metadata={"key": "within_tolerance"})
    """Whether max |Δ| is within the tolerance."""
    replay: Replay | None = field(default=None, metadata={"inline": True, "absent": Replay(skipped="not replayed")})
    why: str = ""
    """Reason why the layer is guilty, or of another shape, in words."""
    side: str = field(default="test", metadata={"one_of": ("test", "reference", "export")})
    """Whose result is at fault: ``test``; ``reference`` when that deviates from the oracle; ``export`` where the graph
    that was exported computes something else than the module."""
    share: float | None = None
    """Share of the final divergence that this layer's introduced error makes; None where it is no number."""
    noise_floor: float = 0.0
    sample: int = 0
    tactic: str = ""
    """Name of the kernel that computed the value, where it is one and the backend tells; see ``Region.kernels``."""
    region: Region | None = None
    """Region that the row stands for, where that is more than a layer; then ``name`` is its label."""
    source: str = ""
    """Line of the torch module that computes it, ``net.py:8: y = torch.relu(y)``, where the export tells."""
    nonfinite_from: list[str] = field(default_factory=list)
    """Origins of NaN or Inf that have no row of their own: ``nan reference: first appears at sq (Sqrt)``. They are
    constants, nodes that read nothing else, nodes between two probes; told in the first row that holds any."""
    kind: str = field(default="data", metadata={"one_of": ("data", "constant", "shape")})
    """``data``; ``constant`` or ``shape`` for a side value: see ``Layer``. Side values have a row where they differ."""

    def __post_init__(self) -> None:
        self.name, self.op, self.tactic = one_line(self.name), one_line(self.op), one_line(self.tactic)
        self.source = one_line(self.source)

    @property
    def severity(self) -> tuple[float, ...]:
        """Sort key over samples: guilty before divergent before ok, then the excess, then the divergence."""
        rank = (OK, INHERITED, DIVERGENT, SHAPE, GUILTY).index(self.verdict)
        excess = self.replay.excess if self.replay and self.replay.excess is not None else 0.0
        return (rank, excess, *self.stats.severity)

    def __repr__(self) -> str:
        why = f": {self.why}" if self.why else ""
        return f"<LayerRow {self.name} ({self.op}): {self.verdict}{why}>"

    def to_dict(self, *, json: bool = True) -> dict[str, Any]:
        """The row of the JSON schema; numbers that JSON lacks are the strings "NaN", "Infinity", "-Infinity".

        ``json`` False leaves them numbers.
        """
        document: dict[str, Any] = encode(self, json=json)
        return document


def has_no_elements(row: LayerRow) -> bool:
    """Whether a tensor is empty on both sides: nothing of it could be compared."""
    return row.stats.count == 0 and not row.stats.shape_mismatch


def undecided(row: LayerRow) -> bool:
    """Whether nothing can be said of an output although both sides agree: it holds NaN on a side, or no number at all.

    Inf of one sign at the same places is agreement, where the rest is finite: masks and scores left out are such.
    """
    holds_nan = any(row.stats.nonfinite("nan", side) for side in SIDES)
    return holds_nan or row.stats.mismatched > 0 or (row.stats.count > 0 and bool(row.stats.nothing_compared))


def nonfinite_origins(rows: Sequence[LayerRow]) -> Iterator[str]:
    """A phrase for each kind and side, equal ones together: the first value, in execution order, that holds any, or
    the constant or node behind it from which they come."""
    for kind in KINDS:
        places: dict[str, list[str]] = {}
        for side in SIDES:
            first = first_with(rows, kind, side)
            if first is not None:
                which = f"{kind} {side}: "
                if known := [text for text in first.nonfinite_from if text.startswith(which)]:
                    places.setdefault(known[0].removeprefix(which), []).append(side)
                    continue
                verbs = {"input": "comes in with the input", "": "is first in"}  # captures tell no operators
                verb = verbs.get(first.op, "first appears at")
                op = "" if first.op in verbs else f" ({first.op})"
                # A row that stands for several nodes may know in which of them the test's are born.
                inside = first.replay.nonfinite_in if first.replay and side == "test" else ""
                places.setdefault(f"{verb} {inside or f'{first.name}{op}'}", []).append(side)
        for place, sides in places.items():
            on = "on both sides" if len(sides) == len(SIDES) else f"in the {sides[0]}"
            yield f"{_WRITTEN[kind]} {place} {on}"


def first_with(rows: Sequence[LayerRow], kind: str, side: str) -> LayerRow | None:
    """The first row, in execution order, that holds NaN (``nan``) or Inf (``inf``) on a side."""
    return next((row for row in sorted(rows, key=lambda r: r.index) if row.stats.nonfinite(kind, side)), None)


def nan_without_trace(rows: Sequence[LayerRow], outputs: Sequence[LayerRow]) -> Iterator[str]:
    """A sentence on NaN that both sides compute and no output shows: masked, or replaced by a number later on."""
    if any(row.stats.nonfinite("nan", side) for row in outputs for side in SIDES):
        return
    if any(all(row.stats.nonfinite("nan", side) for side in SIDES) for row in rows):
        born = "; ".join(phrase for phrase in nonfinite_origins(rows) if phrase.startswith(_WRITTEN["nan"]))
        yield f"{born}; it reaches no output"


def outputs_say(outputs: Sequence[LayerRow]) -> str:
    """The outputs that hold NaN or Inf, the worst first; empty where all are finite."""
    strange = [(sum(row.stats.nonfinite(k, side) for k in KINDS for side in SIDES), row) for row in outputs]
    ranked = sorted((item for item in strange if item[0]), key=lambda item: -item[0])
    if not ranked:
        return ""
    row = ranked[0][1]
    sides = [f"{side} {', '.join(_held(row, side)) or 'none'}" for side in SIDES]
    more = f", and {len(ranked) - 1} more outputs" if len(ranked) > 1 else ""
    return f"output {row.name} is not finite ({'; '.join(sides)}; of {row.stats.count} elements){more}"


def _held(row: LayerRow, side: str) -> list[str]:
    return [f"{number} {_WRITTEN[kind]}" for kind in KINDS if (number := row.stats.nonfinite(kind, side))]


def check_not_empty(spec: str, outputs: Sequence[LayerRow]) -> None:
    """Raise InputError where no final output has an element, so that a verdict would be about nothing."""
    if outputs and all(map(has_no_elements, outputs)):
        names = ", ".join(f"{row.onnx} ({'×'.join(map(str, row.stats.shape))})" for row in outputs)
        raise InputError(f"{spec}: no output was compared: {names} without an element on both sides; try other inputs")


@dataclass
class StageRow(JsonForm):
    """A stage, seen at its last tensor."""

    name: str = field(metadata={"key": "stage"})
    layer: LayerRow = field(metadata={"written": False})
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

    def derived(self) -> dict[str, Any]:
        """The verdict, and the name, place and figures of the stage's last tensor."""
        row = self.layer
        figures = {key: getattr(row.stats, key) for key in ("shape", "max_abs", "mean_abs", "rel_l2", "cosine")}
        return {"layer": row.name, "component": row.component, "onnx": row.onnx, **figures, "verdict": self.verdict}


@dataclass
class Remainder(JsonForm):
    """Divergence of outputs that no layer is guilty of; relative L2 of the worst final output."""

    derives = ("adds_up",)
    divergence: float
    rounding: float | None = None
    """Divergence of the emulated precision on the same inputs; None where it is the test, or cannot be emulated."""
    not_replayed: dict[str, str] = field(default_factory=dict)
    """Node → reason why it was not replayed, or why nobody knows what it may introduce."""
    shared_out: bool = False
    """Whether the layers' shares add up to it: what each introduced, all within its precision, makes it."""

    @property
    def adds_up(self) -> bool:
        """Whether every node was replayed, and rounding makes about as much, by emulation or by shares."""
        alike = self.rounding is None or self.divergence <= EXCESS * self.rounding
        return not self.not_replayed and (alike or self.shared_out)

    def __str__(self) -> str:
        if drawn := [reason for reason in self.not_replayed.values() if reason.endswith(DRAWS_NUMBERS)]:
            return f"{drawn[0]}, and the outputs depend on them"
        if self.not_replayed:
            return f"not replayed or not emulated, so not explained: {some([*self.not_replayed], 3)}"
        if self.adds_up:
            return "the rounding adds up"
        return f"but rounding explains only {self.rounding:.2g} (rel. L2) of it"


@dataclass
class Attribution(JsonForm):
    """The final divergence of the worst sample, shared out: layers, reference and what is not linear add up to 1."""

    derives = ("remainder",)
    layers: float
    """Sum of the shares of all layers of the test."""
    reference: float | None = None
    """Share of the reference's own rounding; None where the layers' shares add up without it, or all is within the
    tolerance."""
    carried: list[str] = field(default_factory=list)
    """Layers whose share is their error carried to the end; all others are by derivatives midway between both sides, or
    the mean of two where these do not add up."""

    @property
    def remainder(self) -> float:
        """What no share explains: the network is not linear over errors of this size."""
        return 1 - self.layers - (self.reference or 0.0)

    def __str__(self) -> str:
        carried = f", with {', '.join(self.carried)} carried to the end" if self.carried else ""
        return f"the shares add up to {percent(1 - self.remainder)}{carried}: the rest is not linear"


@dataclass
class TestResult(JsonForm):
    """One test backend against the reference."""

    __test__ = False  # not a test, whatever its name tells pytest

    backend: RunRecord = field(metadata={"written": False})
    """The file has it among the ``backends`` of the whole result."""
    rows: list[LayerRow] = field(metadata={"key": "layers"})
    stages: list[StageRow]
    outputs: list[LayerRow]
    compared: int = field(metadata={"key": "alignment.aligned"})
    """Number of values compared, of ``total`` that the reference's deployed graph computes."""
    total: int = field(metadata={"key": "alignment.total"})
    rtol: float = field(metadata={"key": "tolerance.rtol"})
    atol: float = field(metadata={"key": "tolerance.atol"})
    oracle: str | None
    observation: Observation | None = field(default=None, metadata={"inline": True})
    notes: list[str] = field(default_factory=list)
    """Remarks that a reader must know: settings that do not match, layers nobody could replay, probes that lie."""
    findings: list[Finding] = field(default_factory=list)
    """Causes with their evidence, on the worst sample: the largest effect first."""
    programs: dict[str, str] = field(default_factory=dict, metadata={"key": "test_programs"})
    """Component → the graph that this backend ran, as ``BisectResult.programs``."""
    detections: DetectionChange | None = None
    """Change of the detections, over all samples; None where the model has none."""
    optimizer_blame: OptimizerBlame | None = field(default=None, metadata={"key": "knobs"})
    """Differences that ONNX Runtime's optimizer is responsible for, where it was asked."""
    expected_outputs: list[str] = field(default_factory=list, metadata={"key": "compared.outputs_expected"})
    """The final outputs of the reference, those apart that the user left out; ``outputs`` are those that were
    compared."""
    unseen: list[str] = field(default_factory=list, metadata={"key": "compared.unseen"})
    """Values of the reference that were not compared, by the names of their layers: the test does not show them."""
    moved_outputs: dict[str, str] = field(default_factory=dict, metadata={"key": "compared.moved"})
    """Final outputs of the reference in whose place the test gives another one: its name there."""
    pairing: dict[str, Any] = field(default_factory=dict)
    """Component → how its values were paired with the reference's, where the test runs another graph."""
    remainder: Remainder | None = None
    """Whether rounding adds up to the divergence, after a replay in which no layer is guilty and outputs differ."""
    lost: list[str] = field(default_factory=list)
    """Outputs with channels that are 0 everywhere in the test alone, in words: no agreement, however small."""
    attribution: Attribution | None = None
    """How the layers' shares add up; None where the outputs have no finite difference, or nothing was replayed."""
    model_sha256: str = ""
    """SHA-256 of the graphs, with weights, that it ran, as ``BisectResult.model_sha256``."""
    not_run: list[str] = field(default_factory=list)
    """Branches of If and bodies of loops that no sample ran, in words: nothing in them was compared."""

    @property
    def missing_outputs(self) -> list[str]:
        """Final outputs of the reference that were not compared."""
        return [name for name in self.expected_outputs if name not in {row.onnx for row in self.outputs}]

    @property
    def empty_outputs(self) -> list[str]:
        """Final outputs without an element on both sides: nothing of them could be compared."""
        return [row.onnx for row in self.outputs if has_no_elements(row)]

    @property
    def all_zeros(self) -> bool:
        """Whether every final output with elements is 0 everywhere on both sides: any fault could hide behind it."""
        return all(row.stats.both_zero for row in self.outputs if not has_no_elements(row))

    @property
    def caveats(self) -> list[str]:
        """Phrases about what says little though it agrees: final outputs without an element, or 0 everywhere, and
        control flow that did not run."""
        empty = self.empty_outputs
        phrases = [f"{some(empty, MOST_NAMES)}: without an element on both sides"] if empty else []
        if self.not_run:
            idle = some(self.not_run, MOST_NAMES)
            phrases.append(f"{idle} did not run with these inputs; try others with --inputs")
        return [*phrases, ALL_ZERO] if self.all_zeros and self.agrees else phrases

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
        """No guilty layer, and every final output of the reference compared, in its place and within the tolerance;
        never without one, nor where an output holds NaN, or Inf alone: two of them are equal, and nothing is known."""
        decided = any(not has_no_elements(row) for row in self.outputs) and not any(map(undecided, self.outputs))
        return decided and self._is_within and not self.missing_outputs and not self.moved_outputs

    @property
    def moves_outputs_alone(self) -> bool:
        """Whether final outputs in another order are all that keeps the test from agreeing."""
        decided = not self.missing_outputs and not any(map(undecided, self.outputs))
        return bool(self.moved_outputs) and self._is_within and decided

    @property
    def lacks_outputs_alone(self) -> bool:
        """Whether final outputs that the test lacks are all that keeps it from agreeing."""
        return bool(self.missing_outputs) and self._is_within and not any(map(undecided, self.outputs))

    @property
    def _is_within(self) -> bool:
        return not self.guilty and not self.lost and all(row.within for row in self.outputs)

    @property
    def undecided(self) -> bool:
        """Whether NaN, or an output of Inf alone, is all that keeps the test from agreeing."""
        return self._is_within and any(map(undecided, self.outputs)) and not self.missing_outputs

    @property
    def not_finite(self) -> str:
        """The final outputs that hold NaN or Inf on a side, and where these are born; empty where all are finite."""
        sentence = outputs_say(self.outputs)
        return "; ".join([sentence, *nonfinite_origins(self.rows)]) if sentence else ""

    @property
    def layers(self) -> pd.DataFrame:
        """One row a layer, with the columns of the JSON schema, a table's first; what a layer has not is NaN."""
        import pandas as pd

        frame = pd.DataFrame([row.to_dict(json=False) for row in self.rows])
        first = [name for name in _FIRST_COLUMNS if name in frame]
        frame = frame[[*first, *(name for name in frame if name not in first)]]
        none = [key for key in number_keys(LayerRow) if key in frame and frame[key].dtype == object]
        return frame.astype(dict.fromkeys(none, float))

    def derived(self) -> dict[str, Any]:
        """The backend's spec, verdicts, and the rows that they are about, by name."""
        first, beyond = self.first_divergent, self.first_beyond
        return {
            "backend": self.backend.spec,
            "compared.says": self.coverage,
            "compared.outputs": len(self.outputs),
            "compared.missing": self.missing_outputs,
            "compared.values": self.compared,
            "compared.values_expected": self.total,
            "first_divergent": first.name if first else None,
            "first_beyond_tolerance": beyond.name if beyond else None,
            "guilty": [row.name for row in self.guilty],
            "agrees": self.agrees,
            "not_finite": self.not_finite,
        }

    @classmethod
    def fields_from(cls, document: dict[str, Any]) -> dict[str, Any]:
        """The block with its stages and outputs as rows of the layers, where these stand in full.

        Raises BadField for a row that is none of the layers.
        """
        check_entries(document, "pairing", {"missing": list[str]})
        rows = part(list[LayerRow], document, "layers")
        by_place = {(row.component, row.onnx): row for row in rows}

        def listed(key: str) -> Iterator[tuple[dict[str, Any], LayerRow]]:
            for i, item in enumerate(part(list[dict[str, Any]], document, key)):
                row = by_place.get((str(item.get("component")), str(item.get("onnx"))))
                if row is None:
                    raise BadField(f"{key}[{i}].onnx", f"{item.get('onnx')!r}, which is none of the layers")
                yield item, row

        stages = [item | {"layer": row} for item, row in listed("stages")]
        return document | {"layers": rows, "stages": stages, "outputs": [row for _, row in listed("outputs")]}


_COVERAGE: dict[str, Any] = {
    **dict.fromkeys(("values", "values_total", "modules", "modules_total"), int),
    "absorbed": dict[str, str],
    **dict.fromkeys(("unmatched_values", "unmatched_modules"), list[str]),
}
"""Key that is read of a component's alignment → its type."""


@dataclass
class BisectResult(JsonForm, Shown):
    """The reference against every test backend. Shows itself in a rich console."""

    model: str
    reference: RunRecord = field(metadata={"written": False})
    tests: list[TestResult]
    samples: list[str]
    """Source of each sample."""
    coverage: dict[str, Any] = field(default_factory=dict)
    """Alignment of torch and ONNX: values and leaf modules accounted for, modules that folding absorbed."""
    programs: dict[str, str] = field(default_factory=dict)
    """Component → its deployed graph: an ONNX file, relative to the saved folder where it lies there."""
    reference_observation: Observation | None = field(default=None, metadata={"absent": {}})
    """The reference against itself, on the first sample."""
    command: str = ""
    weights: dict[str, Any] = field(default_factory=dict)
    """Component → how the weights of two models differ (``WeightDifferences.to_dict``); empty where both run one."""
    test_model: str = ""
    """Name of the tests' file, model or checkpoint, where it has another than the reference's; else empty."""
    model_sha256: str = ""
    """SHA-256 of the reference's graphs, with weights, before INT8; empty where it is not known."""
    inputs: list[dict[str, str]] = field(default_factory=list)
    """Samples' inputs: name → SHA-256 of its dtype, shape and values."""

    @property
    def subject(self) -> str:
        """Name of the model, and of the tests' where that is another."""
        return f"{self.model} against {self.test_model}" if self.test_model else self.model

    @property
    def findings(self) -> list[Finding]:
        """The findings of all test backends, one after the other."""
        return [finding for test in self.tests for finding in test.findings]

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

    def derived(self) -> dict[str, Any]:
        """The schema, and the run records of all backends, the reference first."""
        return {"schema": SCHEMA, "backends": [self.reference, *(test.backend for test in self.tests)]}

    @classmethod
    def fields_from(cls, document: dict[str, Any]) -> dict[str, Any]:
        """The document with every record at its test, and with the programs of files that do not name each test's.

        Raises BadField for another schema, and for records that do not match the tests.
        """
        if (schema := part(str, document, "schema")) != SCHEMA:
            raise BadField("schema", f"{schema!r}; this version reads {SCHEMA!r}")
        check_entries(document, "coverage", _COVERAGE, needed=True)
        check_entries(document, "weights", {"says": str})
        records = part(list[RunRecord], document, "backends")
        blocks = part(list[dict[str, Any]], document, "tests")
        if not blocks or len(records) != len(blocks) + 1:
            raise BadField("tests", f"{len(blocks)} entries; expected one for each backend after the reference")
        shared = {"test_programs": document.get("test_programs", {})}
        tests = [shared | block | {"backend": record} for block, record in zip(blocks, records[1:], strict=True)]
        return document | {"reference": records[0], "tests": tests}

    def completed(self, document: dict[str, Any]) -> dict[str, Any]:
        """The document with the first test backend's block at the top level, too."""
        return document["tests"][0] | document

    def __repr__(self) -> str:
        tests = ", ".join(f"{t.backend.spec}: {len(t.guilty)} guilty of {len(t.rows)} layers" for t in self.tests)
        return f"<BisectResult of {self.model}: {tests}>"

    def write_html(self, path: str | Path) -> None:
        """Write the HTML report: one file that works offline. Raises InputError when it cannot be written."""
        if not isinstance(path, str | PurePath):
            raise InputError(f"path: {type(path).__name__}; expected the path of a file")
        write_page(self, Path(path))

    def show(self, path: str | Path | None = None) -> Path:
        """Write the HTML report and show it: below a notebook's cell, else in a browser. Returns the file.

        ``path`` None takes a file in the temporary folder, which stays. Raises InputError when it cannot be written.
        """
        import tempfile
        import webbrowser

        target = path if path is not None else Path(tempfile.mkdtemp(prefix="cpdebug-")) / "report.html"
        self.write_html(target)
        target = Path(target)
        if in_notebook():
            show_inline(target.read_text(encoding="utf-8"))
        else:
            webbrowser.open(target.resolve().as_uri())
        return target

    def __iter__(self) -> Iterator[TestResult]:
        return iter(self.tests)
