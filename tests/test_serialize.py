"""Results written and read back: every field of every type survives."""

from __future__ import annotations

import ast
import dataclasses
import json
import math
from pathlib import Path
from typing import Any, get_type_hints

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import cp_debug
from cp_debug.backends.base import RunRecord
from cp_debug.bisect.finding import Element, Finding, Where
from cp_debug.bisect.observe import Observation
from cp_debug.bisect.optimizer_blame import Culprit, OptimizerBlame, Rewrite
from cp_debug.bisect.regions.region import Region
from cp_debug.bisect.replayed import Replay
from cp_debug.bisect.result import Attribution, BisectResult, LayerRow, Remainder, StageRow, TestResult
from cp_debug.bisect.result_diff import ResultDiff
from cp_debug.deploy.bench import BackendBench, Latency
from cp_debug.deploy.interface_checks import VoxelChange
from cp_debug.deploy.verify import ScenarioResult, TensorCheck, VerifyResult
from cp_debug.detection.changes import DetectionChange
from cp_debug.detection.evaluation import BackendScores, ConfidenceInterval, EvaluationOptions, EvaluationResult
from cp_debug.errors import InputError
from cp_debug.graph.pairing import Pairing
from cp_debug.mixed_precision.layers import FusionGroup
from cp_debug.mixed_precision.result import KeptLayer, MixedPrecisionResult
from cp_debug.mixed_precision.sensitivity import Int8Effect, LayerSensitivity, SensitivityProfile
from cp_debug.mixed_precision.trials import Measured, Trial
from cp_debug.prediction.result import Prediction
from cp_debug.probes.statistics import TensorStats
from cp_debug.programs.tensor_change import TensorChange
from cp_debug.programs.weight_differences import Difference, WeightDifferences
from cp_debug.quantization.qat import QatResult, Validation
from cp_debug.quantization.record import QuantizerRow
from cp_debug.reports.saved import SavedResult
from cp_debug.serialize import decode, encode
from cp_debug.sweep.bisecting import BisectGroup
from cp_debug.sweep.evaluating import EvalGroup
from cp_debug.sweep.run import FailedTasks, SweepResult
from cp_debug.sweep.searching import MixedPrecisionGroup
from cp_debug.sweep.sensitivity import SensitivityGroup

PARTS = (
    RunRecord,
    Finding,
    Where,
    Element,
    Observation,
    Replay,
    Attribution,
    Remainder,
    DetectionChange,
    TensorStats,
    LayerRow,
)
NAMES = {kind.__name__: kind for kind in (*PARTS, OptimizerBlame)}
"""What some modules import for type checkers only."""
PLAIN = st.dictionaries(st.text(max_size=4), st.integers() | st.booleans() | st.text(max_size=4), max_size=2)


def _drawn(hint: Any) -> st.SearchStrategy[Any]:
    if hint == dict[str, Any]:
        return PLAIN
    return st.none() | PLAIN if hint == dict[str, Any] | None else st.from_type(hint)


def _made(kind: type, /, **fixed: Any) -> st.SearchStrategy[Any]:
    """Objects of a dataclass with every field drawn, but those that are kept out of JSON."""
    omitted = {f.name for f in dataclasses.fields(kind) if f.metadata.get("omit")}
    hints = {
        name: hint for name, hint in get_type_hints(kind, localns=NAMES).items() if name in kind.__dataclass_fields__
    }
    drawn = {name: _drawn(hint) for name, hint in hints.items() if name not in omitted}
    choices = {f.name: f.metadata["one_of"] for f in dataclasses.fields(kind) if "one_of" in f.metadata}
    drawn |= {name: st.sampled_from(values) for name, values in choices.items()}
    return st.builds(kind, **drawn | fixed)


for _kind in (RunRecord, Where, Finding):  # they hold what hypothesis cannot draw by itself
    st.register_type_strategy(_kind, _made(_kind))
_NAMES = st.lists(st.text(), min_size=1, max_size=3).map(tuple)
st.register_type_strategy(Region, st.builds(Region, nodes=_NAMES))
STATS = _made(TensorStats)
ROWS = _made(LayerRow, stats=STATS, replay=st.none() | _made(Replay))
KNOBS = _made(
    OptimizerBlame, responsible=st.lists(_made(Culprit, rewrites=st.lists(_made(Rewrite)).map(tuple)), max_size=2)
)


@pytest.mark.parametrize("kind", PARTS, ids=lambda kind: kind.__name__)
@settings(max_examples=6, suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(data=st.data())
def test_every_field_of_a_part_survives(kind: type, data: st.DataObject) -> None:
    value = data.draw(ROWS if kind is LayerRow else _made(kind))
    assert repr(decode(kind, json.loads(json.dumps(encode(value))), "result.json")) == repr(value)  # NaN equals NaN


@settings(max_examples=6, suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(knobs=KNOBS)
def test_the_blamed_optimizers_survive(knobs: OptimizerBlame) -> None:
    again = decode(OptimizerBlame, json.loads(json.dumps(encode(knobs))), "result.json", "knobs")
    assert repr(again) == repr(knobs)


FIGURES = st.fixed_dictionaries({"rel_l2": st.floats(allow_nan=False)})
NODES = st.frozensets(st.tuples(st.text(), st.text()), max_size=1)  # of more, equal sets may be written differently
TRIALS = _made(Trial, measured=_made(Measured, figures=FIGURES), nodes=NODES)
LAYERS = _made(KeptLayer, fusion_group=_made(FusionGroup))


@settings(max_examples=10, suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(
    result=_made(
        MixedPrecisionResult, best=TRIALS, baseline=TRIALS, trials=st.lists(TRIALS), kept=st.lists(LAYERS, max_size=2)
    )
)
def test_a_mixed_precision_search_survives(result: MixedPrecisionResult) -> None:
    document = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    again = decode(MixedPrecisionResult, document, "search.json")
    for field in dataclasses.fields(MixedPrecisionResult):
        assert repr(getattr(again, field.name)) == repr(getattr(result, field.name)), field.name


@settings(max_examples=10, suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(data=st.data())
def test_a_prediction_survives(data: st.DataObject) -> None:
    prediction = data.draw(_made(Prediction))
    again = decode(Prediction, json.loads(json.dumps(prediction.to_dict(), allow_nan=False)), "prediction.json")
    for field in dataclasses.fields(Prediction):
        assert repr(getattr(again, field.name)) == repr(getattr(prediction, field.name)), field.name


def _entries(**kinds: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    """Component → object of which these keys are read."""
    return st.dictionaries(st.text(max_size=4), st.fixed_dictionaries(kinds), max_size=2)


COUNTS, NAMED = st.integers(0, 99), st.lists(st.text(max_size=4), max_size=2)
COVERAGE = _entries(
    **dict.fromkeys(("values", "values_total", "modules", "modules_total"), COUNTS),
    absorbed=st.dictionaries(st.text(max_size=4), st.text(max_size=4), max_size=2),
    **dict.fromkeys(("unmatched_values", "unmatched_modules"), NAMED),
)

CHECKED = {"coverage": COVERAGE, "weights": _entries(says=st.text(max_size=4))}


@st.composite
def _tests(draw: st.DrawFn) -> TestResult:
    rows = [dataclasses.replace(row, index=i, onnx=f"v{i}") for i, row in enumerate(draw(st.lists(ROWS, max_size=3)))]
    made = draw(
        _made(
            TestResult,
            rows=st.just(rows),
            stages=st.just([]),
            outputs=st.just(rows[-1:]),
            optimizer_blame=st.none() | KNOBS,
            pairing=_entries(missing=NAMED, how=PLAIN),
        )
    )
    return dataclasses.replace(made, stages=[StageRow("neck", row, draw(st.lists(st.text()))) for row in rows[:1]])


@settings(max_examples=6, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large], deadline=None)
@given(data=st.data())
def test_a_whole_result_survives(data: st.DataObject) -> None:
    result = data.draw(_made(BisectResult, tests=st.lists(_tests(), min_size=1, max_size=2), **CHECKED))
    again = SavedResult.of(result).result
    for field in dataclasses.fields(BisectResult):
        assert repr(getattr(again, field.name)) == repr(getattr(result, field.name)), field.name


def _equal_again(kind: type, value: Any) -> None:
    again = decode(kind, json.loads(json.dumps(encode(value), allow_nan=False)), "result.json")
    for field in dataclasses.fields(kind):
        assert repr(getattr(again, field.name)) == repr(getattr(value, field.name)), field.name


INTERVALS = st.dictionaries(st.sampled_from(["mAP", "NDS"]), st.from_type(ConfidenceInterval))
CLASSES = st.dictionaries(
    st.text(max_size=4),
    st.dictionaries(st.sampled_from(["AP", "ATE", "objects"]), st.from_type(ConfidenceInterval) | st.floats()),
)
SCORES = _made(
    BackendScores,
    backend=_made(RunRecord),
    summary=INTERVALS,
    difference=st.none() | INTERVALS,
    classes=CLASSES,
)
EVALUATIONS = _made(
    EvaluationResult,
    options=_made(EvaluationOptions, ranges=st.dictionaries(st.text(max_size=4), st.floats())),
    backends=st.lists(SCORES.map(lambda scores: dataclasses.replace(scores, difference=None)), max_size=2),
)
EFFECTS = _made(Int8Effect, error=st.floats(0, 1), scores=INTERVALS)
PROFILES = _made(
    SensitivityProfile,
    int8=EFFECTS,
    layers=st.lists(_made(LayerSensitivity, left_out=st.none() | EFFECTS), max_size=2),
    scores=st.dictionaries(st.text(max_size=4), st.floats()),
)
PAIRS = st.dictionaries(st.text(max_size=4), st.text(max_size=4), max_size=2)
COMPLETE = {
    TensorCheck: _made(TensorCheck, stats=STATS),
    BackendBench: _made(
        BackendBench,
        backend=_made(RunRecord),
        parts=st.lists(_made(Latency, seconds=st.lists(st.floats(0, 9), min_size=1, max_size=3)), max_size=2),
    ),
    BackendScores: SCORES,
    EvaluationResult: EVALUATIONS,
    SensitivityProfile: PROFILES,
    QuantizerRow: _made(QuantizerRow),
    QatResult: _made(QatResult, history=st.lists(st.builds(Validation), min_size=1)),
    WeightDifferences: _made(
        WeightDifferences, differing=st.lists(_made(Difference, change=_made(TensorChange)), max_size=2)
    ),
    Pairing: st.builds(
        Pairing,
        names=PAIRS.map(lambda names: {a: b for a, b in names.items() if a != b}),
        inputs=PAIRS,
        outputs=PAIRS,
        how=st.dictionaries(st.text(max_size=4), st.integers()),
        missing=st.lists(st.text()),
        added=st.lists(st.text()),
        inside=PAIRS,
        left_out=st.lists(st.text()),
    ),
    ResultDiff: _made(ResultDiff),
}


@pytest.mark.few(3)
@pytest.mark.parametrize("kind", COMPLETE, ids=lambda kind: kind.__name__)
@settings(max_examples=8, suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(data=st.data())
def test_every_field_of_a_result_survives(kind: type, data: st.DataObject) -> None:
    _equal_again(kind, data.draw(COMPLETE[kind]))


@settings(max_examples=6, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large], deadline=None)
@given(data=st.data())
def test_a_verification_survives(data: st.DataObject) -> None:
    records, checks = _made(RunRecord), st.lists(COMPLETE[TensorCheck], max_size=2)
    pillars = st.dictionaries(st.text(max_size=4), _made(VoxelChange), max_size=1)
    bisected = st.none() | _made(BisectResult, tests=st.lists(_tests(), min_size=1, max_size=1), **CHECKED)
    scenarios = _made(
        ScenarioResult, reference=records, test=records, checks=checks, preprocessing=pillars, bisect=bisected
    )
    _equal_again(VerifyResult, data.draw(_made(VerifyResult, scenarios=st.lists(scenarios, max_size=2))))


GROUPS = {
    "bisect": _made(BisectGroup),
    "eval": _made(EvalGroup, result=EVALUATIONS),
    "search": _made(MixedPrecisionGroup),
    "sensitivity": _made(SensitivityGroup),
}


@pytest.mark.few(2)
@pytest.mark.parametrize("kind", GROUPS)
@settings(max_examples=8, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large], deadline=None)
@given(data=st.data())
def test_a_sweep_survives(kind: str, data: st.DataObject) -> None:
    groups = st.lists(GROUPS[kind], max_size=2)
    failures = st.lists(_made(FailedTasks), max_size=2)
    _equal_again(SweepResult, data.draw(_made(SweepResult, kind=st.just(kind), groups=groups, failures=failures)))


KEYS: dict[str, str] = json.loads((Path(__file__).parent / "data" / "result_keys.json").read_text(encoding="utf-8"))
"""Class → the keys of its document, those of a part that stands beside its owner's fields included."""
KINDS = {
    **{kind.__name__: _made(kind) for kind in PARTS},
    **{kind.__name__: made for kind, made in COMPLETE.items()},
    "LayerRow": ROWS,
    "OptimizerBlame": KNOBS,
    "Trial": TRIALS,
    "KeptLayer": LAYERS,
    "Prediction": _made(Prediction),
    "TestResult": _tests(),
    "MixedPrecisionResult": _made(
        MixedPrecisionResult, best=TRIALS, baseline=TRIALS, trials=st.just([]), kept=st.lists(LAYERS, max_size=1)
    ),
    "BisectResult": _made(BisectResult, tests=st.lists(_tests(), min_size=1, max_size=1), **CHECKED),
    "Int8Effect": EFFECTS,
    "ScenarioResult": _made(
        ScenarioResult,
        reference=_made(RunRecord),
        test=_made(RunRecord),
        checks=st.just([]),
        preprocessing=st.just({}),
        bisect=st.none(),
    ),
    "Difference": _made(Difference, change=_made(TensorChange)),
}
SOMETIMES = {"BackendScores": {"t4", "t4_difference", "t4_intervals"}, "Int8Effect": {"mAP", "NDS"}}


@pytest.mark.few(8)
@pytest.mark.parametrize("kind", KEYS)
@settings(max_examples=2, suppress_health_check=list(HealthCheck), deadline=None)
@given(data=st.data())
def test_the_keys_of_a_document_are_those_of_its_schema(kind: str, data: st.DataObject) -> None:
    found = set(encode(data.draw(KINDS[kind])))
    assert found - SOMETIMES.get(kind, set()) == set(KEYS[kind].split())


def test_a_sweep_of_no_kind_is_refused() -> None:
    with pytest.raises(InputError, match="field 'kind' is 'dance'; expected bisect, eval, ablate, sensitivity, search"):
        decode(SweepResult, {"kind": "dance", "groups": []}, "sweep.json")


def test_classes_that_hand_out_their_json_have_one_way_to_do_it() -> None:
    """The runner of TensorRT is one file for Python 3.8, and a layer's row may keep its numbers as they are."""
    owners = set()
    texts = [path.read_text() for path in Path(cp_debug.__file__).parent.rglob("*.py")]
    for text in [text for text in texts if "def to_dict" in text]:
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ClassDef) and any(getattr(part, "name", "") == "to_dict" for part in node.body):
                owners.add(node.name)
    assert owners == {"JsonForm", "LayerRow", "RunnerFailure"}


def test_numbers_that_json_lacks() -> None:
    figures = encode([math.nan, math.inf, -math.inf])
    assert figures == ["NaN", "Infinity", "-Infinity"]
    where = decode(Element, {"index": [1], "value": "NaN", "oracle": "-Infinity"}, "f")
    assert math.isnan(where.value)
    assert where.oracle == -math.inf


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"index": "three"}, "field 'layers[2].index' is \"three\"; expected int"),
        ({"share": True}, "field 'layers[2].share'"),
        ({"rel_l2": [1]}, "field 'layers[2].rel_l2'"),
        ({"nodes": 3}, "field 'layers[2].nodes'"),
        (
            {"verdict": "--help"},
            "field 'layers[2].verdict' is \"--help\"; expected ok, inherited, divergent, guilty, shape",
        ),
        ({"side": "left"}, "field 'layers[2].side' is \"left\"; expected test, reference"),
    ],
)
def test_what_does_not_fit_is_named(change: dict[str, Any], says: str) -> None:
    document = encode(_row()) | change
    with pytest.raises(InputError) as told:
        decode(LayerRow, document, "result.json", "layers[2]")
    assert says in str(told.value)
    assert str(told.value).startswith("result.json: ")


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("coverage", {"net": []}, "field 'coverage.net' is []; expected a JSON object"),
        ("coverage", {"net": {"values": 1}}, "field 'coverage.net.values_total' is missing"),
        ("weights", {"net": {"says": 3}}, "field 'weights.net.says' is 3; expected str"),
        ("pairing", {"net": []}, "field 'tests[0].pairing.net' is []; expected a JSON object"),
        ("pairing", {"net": {"missing": 5}}, "field 'tests[0].pairing.net.missing' is 5; expected list"),
    ],
)
def test_parts_of_which_only_some_keys_are_read_are_checked(key: str, value: Any, says: str) -> None:
    document = _first_schema()
    (document["tests"][0] if key == "pairing" else document)[key] = value
    with pytest.raises(InputError) as told:
        decode(BisectResult, document, "result.json")
    assert says in str(told.value)


def test_a_missing_field_is_named() -> None:
    document = encode(_row())
    del document["verdict"]
    with pytest.raises(InputError, match=r"f: field 'layers\[0\].verdict' is missing"):
        decode(LayerRow, document, "f", "layers[0]")


def test_keys_of_later_versions_are_left_alone() -> None:
    assert decode(LayerRow, encode(_row()) | {"new": 1}, "f") == _row()


def _row() -> LayerRow:
    names = {f.name: 0.0 for f in dataclasses.fields(TensorStats) if f.type == "float"}
    names |= {f.name: 0 for f in dataclasses.fields(TensorStats) if f.type == "int"}
    stats = TensorStats(**names, shape=(1,), shape_test=(1,), dtype_ref="f", dtype_test="f", argmax=(0,), equal=True)
    return LayerRow(0, "c", "n", "v", "Conv", stats, "ok", True, Replay(nodes=("a",)))


def _first_schema() -> dict[str, Any]:
    """A document of the first schema's first version."""
    row = encode(_row())
    late = ("kind", "not_emulated", "precision", "instead", "range_loss", "reference_excess", "unequal")
    for key in late:  # written since
        row.pop(key)
    record = {"spec": "ort", "precision": "fp32", "device": "cpu", "emulated": False}
    block = {
        "backend": "ort",
        "alignment": {"aligned": 1, "total": 1},
        "tolerance": {"rtol": 1, "atol": 1},
        "oracle": None,
    }
    block |= {"layers": [row], "stages": [], "outputs": []}
    return {
        "schema": "cpdebug.bisect/1",
        "model": "m",
        "backends": [record, record],
        "samples": ["s"],
        "tests": [block],
    }


def test_files_of_the_first_schema_still_open(tmp_path: Path) -> None:
    document = _first_schema()
    (tmp_path / "result.json").write_text(json.dumps(document))
    assert SavedResult.open(tmp_path).result.tests[0].rows == [_row()]
