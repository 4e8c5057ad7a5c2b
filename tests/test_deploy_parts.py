"""Stages of a deployment by themselves: what is run again, what a later stage depends on, and what each one says."""

from __future__ import annotations

from dataclasses import make_dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cp_debug.deploy import runner
from cp_debug.deploy.bench import timer_of
from cp_debug.deploy.reasons import reasons
from cp_debug.deploy.runner import Outcome, deploy
from cp_debug.deploy.stages import Deployment
from cp_debug.deploy.state import StageRecord, State
from cp_debug.deploy.tolerance import MARGIN, Tolerances
from cp_debug.deploy.verify import (
    ScenarioResult,
    TensorCheck,
    VerifyOptions,
    VerifyResult,
    _check_not_empty,
    _RunningScenario,
    _uncompared,
    verify,
    what_is_wrong,
)
from cp_debug.errors import InputError
from cp_debug.files import hashes
from cp_debug.graph.pairing import Pairing
from cp_debug.probes.statistics import compare
from cp_debug.programs.paired import check_outputs
from cp_debug.programs.pipeline import Key
from cp_debug.recipes.base import Sample

# Records ------------------------------------------------------------------------------------------------------------


def record(name: str = "export", **fields: Any) -> StageRecord:
    given: dict[str, Any] = {"key": "k", "passed": True, "line": "done", "seconds": 1.5} | fields
    return StageRecord(name, **given)


def test_records_are_there_in_the_next_run(tmp_path: Path) -> None:
    first = State(tmp_path / "work")
    kept = [record("load", document={"model": "m"}), record("export", resumed=True, line="two files")]
    for each in kept:
        first.add(each)
    again = State(tmp_path / "work")
    assert list(again.records) == ["load", "export"]
    assert again.records["load"] == kept[0]
    assert not again.records["export"].resumed  # of the run that reads it
    assert again.records["export"].line == "two files"


def test_a_stage_is_finished_for_the_same_input_where_it_passed_and_its_files_are_its_own(tmp_path: Path) -> None:
    state, file = State(tmp_path), tmp_path / "a.onnx"
    file.write_bytes(b"graph")
    state.add(record("export", files=hashes([file])))
    state.add(record("verify", passed=False))
    found = state.finished("export", "k")
    assert found is not None
    assert found.resumed
    assert state.finished("export", "other") is None
    assert state.finished("verify", "k") is None
    assert state.finished("build", "k") is None
    file.write_bytes(b"another graph")
    assert state.finished("export", "k") is None


def test_records_that_cannot_be_read_count_as_none(tmp_path: Path) -> None:
    State(tmp_path).add(record())
    path = tmp_path / "deploy.json"
    path.write_text(path.read_text().replace("cpdebug.deploy/1", "cpdebug.deploy/0"))
    assert State(tmp_path).records == {}
    path.write_text("{")
    assert State(tmp_path).records == {}


# Which stages run ---------------------------------------------------------------------------------------------------


class Stages:
    """Stages that write what they are given; ``ran`` are the names of those that did."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
        self.folder, self.names = folder, names
        self.texts: dict[str, str] = {}
        self.needs: dict[str, int] = {}
        self.passes: dict[str, bool] = {}
        self.ran: list[str] = []
        self.heard: list[tuple[str, bool]] = []
        monkeypatch.setattr(runner, "_stages", self.stages)

    def stages(self, deployment: Any) -> Any:
        for name in self.names:
            yield name, {"needs": self.needs.get(name, 0)}, lambda given, name=name: self.run(name)

    def run(self, name: str) -> Outcome:
        self.ran.append(name)
        place = self.folder / name
        place.mkdir(exist_ok=True)
        (place / "file").write_text(self.texts.get(name, ""))
        return Outcome(self.passes.get(name, True), f"{name} is done", {"name": name}, place)

    def deploy(self, *, fresh: bool = False) -> list[StageRecord]:
        self.ran, self.heard = [], []
        deployment: Any = SimpleNamespace(config=SimpleNamespace(work_dir=self.folder))
        return deploy(deployment, fresh=fresh, on_stage=lambda n, r: self.heard.append((n, r is not None)))


def test_finished_stages_are_not_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stages = Stages(tmp_path, monkeypatch, "load", "export", "verify")
    first = stages.deploy()
    assert stages.ran == ["load", "export", "verify"]
    assert stages.heard == [(n, told) for n in stages.ran for told in (False, True)]
    assert [(r.name, r.passed, r.line, r.document) for r in first][1] == (
        "export", True, "export is done", {"name": "export"},
    )  # fmt: skip
    assert all(0 <= r.seconds < 60 and not r.resumed for r in first)
    assert [r.resumed for r in stages.deploy()] == [True] * 3
    assert stages.ran == []
    stages.deploy(fresh=True)
    assert stages.ran == ["load", "export", "verify"]


def test_a_stage_runs_again_when_what_it_works_on_is_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stages = Stages(tmp_path, monkeypatch, "export", "build", "verify", "evaluate")
    stages.passes["verify"] = False
    stages.deploy()
    stages.deploy()
    assert stages.ran == ["verify"]  # failed before; nothing depends on it
    stages.needs["export"] = 1  # another opset, the same files
    stages.deploy()
    assert stages.ran == ["export", "build", "verify", "evaluate"]
    (tmp_path / "build" / "file").write_text("somebody else's")
    stages.texts["build"] = "another engine"
    stages.deploy()
    assert stages.ran == ["build", "verify", "evaluate"]
    stages.needs["verify"] = 1
    stages.deploy()
    assert stages.ran == ["verify"]


# What the stages say ------------------------------------------------------------------------------------------------


def test_stages_tell_what_they_did() -> None:
    engine = make_dataclass("Engine", [("file", str), ("types", str)])
    built = [engine("a.engine", "fp16"), engine("b.engine", "fp32")]
    deployment: Any = SimpleNamespace(build=lambda: built, engine_dir=Path("engines"))
    written = {"engines": [{"file": "a.engine", "types": "fp16"}, {"file": "b.engine", "types": "fp32"}]}
    said = "a.engine (fp16); b.engine (fp32)"
    assert runner._build(deployment) == Outcome(True, said, written, Path("engines"))
    deployment = SimpleNamespace(
        quantize=lambda: Path("out/scales.json"),
        quantized={n: SimpleNamespace(scales=SimpleNamespace(layers=dict.fromkeys(n), method="mse")) for n in "ab"},
    )
    assert runner._quantize(deployment) == Outcome(True, "2 layers in INT8, scales by mse", {"layers": 2}, Path("out"))


@pytest.mark.parametrize("worse", [(), ("ort-int8", "trt-fp16")])
def test_an_evaluation_passes_where_no_backend_is_worse(worse: tuple[str, ...]) -> None:
    summary = {"mAP": SimpleNamespace(value=0.5), "NDS": SimpleNamespace(value=0.61234)}
    result = SimpleNamespace(
        backends=[SimpleNamespace(backend=SimpleNamespace(spec="torch"), summary=summary)],
        worse=worse, samples=["a", "b"], to_dict=lambda: {"full": True},
    )  # fmt: skip
    deployment: Any = SimpleNamespace(evaluate=lambda: result)
    told = "; worse: ort-int8, trt-fp16" if worse else ""
    assert runner._evaluate(deployment) == Outcome(
        not worse, f"2 samples: torch mAP 0.500 NDS 0.612{told}", {"full": True}
    )


def scenario(name: str, passed: bool) -> Any:
    change = SimpleNamespace(agrees=passed, __str__=lambda self: "1 of 3")
    return SimpleNamespace(
        name=name, passed=passed, failures=[], missing=[], moved={}, checks=[], preprocessing={"s": change}, bisect=None
    )


def test_a_verification_says_which_scenario_failed_and_why() -> None:
    scenarios = [scenario("torch → ort", True), scenario("torch → trt", False)]
    result = SimpleNamespace(scenarios=scenarios, passed=False, to_dict=lambda: {"scenarios": [{}, {}]})
    deployment: Any = SimpleNamespace(verify=lambda: result)
    outcome = runner._verify(deployment)
    assert not outcome.passed
    good, bad = outcome.line.split("; ", 1)
    assert good == "torch → ort passed"
    assert bad.startswith("torch → trt FAILED: the voxels differ: ")
    assert [len(d["reasons"]) for d in outcome.document["scenarios"]] == [0, 1]


def test_a_failure_names_the_worst_output_the_layer_and_the_cause() -> None:
    stats = SimpleNamespace(nan_ref=0, inf_ref=2, mismatched=0)
    checks = [SimpleNamespace(name=n, severity=s, why=f"{n} is off", stats=stats) for n, s in (("a", 1), ("b", 3))]
    guilty = SimpleNamespace(
        first_divergent=SimpleNamespace(name="conv"), guilty=["conv"], findings=[SimpleNamespace(headline="epsilon")]
    )
    calm = SimpleNamespace(first_divergent=SimpleNamespace(name="relu"), guilty=[], findings=[])
    failed: Any = SimpleNamespace(
        failures=checks,
        missing=[],
        moved={},
        checks=[*checks, None],
        preprocessing={},
        bisect=SimpleNamespace(tests=[guilty, calm]),
    )
    assert list(reasons(failed)) == [
        "2 of 3 outputs fail, the worst is b: b is off",
        "the reference has the same 2 NaN or Inf: they are the model's or its input's, not the export's",
        "guilty layer conv",
        "cause: epsilon",
        "first divergent layer relu",
    ]
    stats.mismatched = 2
    assert len(list(reasons(failed))) == 4


# Verification -------------------------------------------------------------------------------------------------------


def test_a_limit_is_the_users_for_the_tensor_before_that_for_the_precision() -> None:
    limits = Tolerances({"heat@fp16": 0.1, "heat": 0.2, "fp16": 0.3}, ["heat", "reg"])
    assert limits.limit("heat", 1e-6, "fp32", "fp16") == 0.1
    assert limits.limit("heat", 1e-6, "fp32", "fp32") == 0.2
    assert limits.limit("reg", 1e-6, "fp32", "fp16") == 0.3
    assert limits.limit("reg", 1e-6, "fp32", "fp32") == pytest.approx(MARGIN * 1e-6)
    assert limits.limit("reg", 1e-6, "fp64", "fp32") == pytest.approx(MARGIN * 1e-6)
    plain = Tolerances({}, ["reg"])
    assert plain.limit("reg", 1e-6, "fp32", "fp16") == pytest.approx(MARGIN * 1e-6 * 2**13)  # 24 bits against 11
    for wrong in ("nose", "heat@fp99", "nose@fp16"):
        with pytest.raises(InputError, match="expected a tensor"):
            Tolerances({wrong: 1.0}, ["heat"])


@pytest.mark.parametrize(
    ("reference", "test", "max_abs", "says"),
    [
        ([1.0, 2.0], [1.0, 2.0], None, ""),
        ([1.0, 2.0], [1.0, 2.0001], None, ""),
        ([1.0, 2.0], [1.0, 2.1], None, "relative L2 0.045; expected at most 0.001"),
        ([1.0, 2.0], [1.0, 2.001], 1e-4, "max |Δ| 0.001; expected at most 0.0001"),
        ([1.0, 2.0], [1.0, 2.001], 1.0, ""),
        ([1.0, 2.0], [float("nan"), float("inf")], None, "2 NaN or Inf"),
        ([1.0, float("inf")], [1.0, 2.0], None, "the reference holds 1 NaN or Inf, the test none"),
        ([1.0, 2.0], [1.0], None, "the shape is [1]; expected [2]"),
    ],
)
def test_what_is_wrong_with_an_output(reference: Any, test: Any, max_abs: float | None, says: str) -> None:
    import numpy as np

    stats = compare(np.array(reference, np.float32), np.array(test, np.float32))
    assert what_is_wrong(stats, 1e-3, max_abs) == says


def test_the_worst_sample_of_an_output_is_kept_with_its_source(monkeypatch: pytest.MonkeyPatch) -> None:
    import numpy as np

    sides: Any = [
        SimpleNamespace(backend=SimpleNamespace(spec=s, precision="fp32"), record=lambda s=s: s, programs=[])
        for s in ("torch", "ort")
    ]
    running = _RunningScenario(*sides, Tolerances({}, ["y"]), None)
    made = lambda *parts: SimpleNamespace(parts=parts)  # noqa: E731
    monkeypatch.setattr("cp_debug.deploy.verify.ScenarioResult", made)
    for number, (source, off) in enumerate((("a", 0.1), ("b", 0.5), ("c", 0.2))):
        values = {"torch": np.ones(4, np.float32), "ort": np.full(4, 1 + off, np.float32)}
        passes: Any = SimpleNamespace(
            sample=SimpleNamespace(source=source),
            outputs=lambda side, values=values: {"net": {"y": values[side.backend.spec]}},
            preprocessing=lambda sides, source=source: {source: "same"},
            detections=lambda sides, number=number: number or None,
        )
        running.add(passes, {Key("net", "y"): 1e-7})
    reference, test, (check,), voxels, detections, _ = running.result().parts  # type: ignore[attr-defined]
    assert running.result().judged_as == "fp32"
    assert (reference, test) == ("torch", "ort")
    assert (check.component, check.name, check.source, check.floor) == ("net", "y", "b", 1e-7)
    assert check.stats.rel_l2 == pytest.approx(0.5)
    assert check.why
    assert list(voxels) == ["a", "b", "c"]
    assert detections == 3  # those of the second and the third sample, added up


def test_a_verification_passes_where_all_scenarios_do() -> None:
    for passed in ((True, True), (True, False), (False, False)):
        scenarios: Any = [SimpleNamespace(passed=p) for p in passed]
        assert VerifyResult("m", ["s"], scenarios).passed == all(passed)


def test_a_scenario_of_which_nothing_was_compared_is_refused() -> None:
    some: Any = SimpleNamespace(name="torch → ort", checks=["a", "b"], empty=["a"])
    none: Any = SimpleNamespace(name="torch → trt", checks=["a", "b"], empty=["a", "b"])
    _check_not_empty([some])
    with pytest.raises(InputError, match="torch → trt: no output was compared: a, b without an element"):
        _check_not_empty([some, none])


def test_an_output_that_a_test_file_lacks_is_told_or_refused_where_others_hang_on_it() -> None:
    def outputs(*names: str) -> Any:
        return [SimpleNamespace(name=n) for n in names]

    ours: Any = SimpleNamespace(name="head", graph=SimpleNamespace(outputs=outputs("heat", "reg")))
    theirs: Any = SimpleNamespace(graph=SimpleNamespace(outputs=outputs("h", "r")), pairing=None)
    assert _uncompared([ours], [theirs]) == (set(), [])  # the same names
    theirs.pairing = Pairing({}, {}, {"heat": "h", "reg": "r"})
    assert _uncompared([ours], [theirs]) == (set(), [])
    theirs.pairing = Pairing({}, {}, {"heat": "h"})
    assert _uncompared([ours], [theirs]) == (set(), [Key("head", "reg")])
    theirs.pairing = Pairing({}, {}, {"heat": "h"}, left_out=["reg"])
    assert _uncompared([ours], [theirs]) == ({Key("head", "reg")}, [])
    theirs.pairing = Pairing({}, {}, {"heat": "h"})
    with pytest.raises(InputError, match=r"has no output that is 'reg'; its outputs are h, r"):
        check_outputs(ours.graph, theirs)  # of a component from which the next one computes on
    theirs.pairing = Pairing({}, {}, {})
    with pytest.raises(InputError, match=r"has no output that is 'heat'"):
        _uncompared([ours], [theirs])


# Times and places ---------------------------------------------------------------------------------------------------


def test_a_part_takes_the_time_that_it_ran(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([10.0, 12.5])
    monkeypatch.setattr("cp_debug.deploy.bench.time.perf_counter", lambda: next(clock))
    session: Any = SimpleNamespace(run=lambda inputs: {"y": inputs["x"] + 1})
    assert timer_of(session, 1)({"x": 1}) == ({"y": 2}, 2.5)  # type: ignore[dict-item,comparison-overlap]


def test_files_go_where_the_configuration_says_and_else_below_the_work_folder() -> None:
    config = SimpleNamespace(
        export=SimpleNamespace(onnx_dir=None), tensorrt=SimpleNamespace(engine_dir=None), work_dir=Path("work")
    )
    deployment: Any = SimpleNamespace(config=config)
    onnx, engines = Deployment.onnx_dir.fget, Deployment.engine_dir.fget  # type: ignore[attr-defined]
    assert (onnx(deployment), engines(deployment)) == (Path("work/onnx"), Path("work/tensorrt"))
    config.export.onnx_dir, config.tensorrt.engine_dir = Path("o"), Path("e")
    assert (onnx(deployment), engines(deployment)) == (Path("o"), Path("e"))


@pytest.mark.parametrize("turned", [True, False])
def test_outputs_are_turned_where_the_configuration_says_so(monkeypatch: pytest.MonkeyPatch, turned: bool) -> None:
    log: list[Any] = []
    monkeypatch.setattr("cp_debug.deploy.stages.load_model", lambda name, **options: (name, options["checkpoint"]))
    monkeypatch.setattr("cp_debug.deploy.stages.turn_outputs", log.append)
    config = SimpleNamespace(model="m", export=SimpleNamespace(rot_y_axis_reference=turned))
    deployment: Any = SimpleNamespace(config=config, _trained="weights", _reading=None)
    loaded = Deployment.__dict__["_loaded"].func(deployment)
    assert loaded == ("m", "weights")
    assert log == [loaded] * turned


def test_pillars_of_a_file_are_those_of_the_first_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, Path | None]] = []
    monkeypatch.setattr(
        "cp_debug.deploy.verify._Passes", lambda model, sample, voxels: seen.append((sample.source, voxels))
    )
    monkeypatch.setattr("cp_debug.deploy.verify.checked", lambda model: model)
    model: Any = SimpleNamespace(name="m", components=[])
    samples = [Sample({}, name) for name in "abc"]
    found = verify(model, [], [], samples, VerifyOptions(voxels=Path("v.npz")))
    assert seen == [("a", Path("v.npz")), ("b", None), ("c", None)]
    assert found.samples == ["a", "b", "c"]


def check(off: float, why: str) -> TensorCheck:
    import numpy as np

    stats = compare(np.ones(4, np.float32), np.full(4, 1 + off, np.float32))
    return TensorCheck("net", "y", stats, 0.0, 0.1, "s", why)


def test_what_is_beyond_its_limit_is_worse_than_any_larger_difference() -> None:
    assert check(0.1, "too much").severity > check(5.0, "").severity > check(0.1, "").severity
    assert check(0.2, "too much").severity > check(0.1, "too much").severity


@pytest.mark.parametrize(("why", "agrees", "passes"), [("", True, True), ("too much", True, False), ("", False, False)])
def test_a_scenario_passes_where_tensors_are_within_limits_and_pillars_agree(
    why: str, agrees: bool, passes: bool
) -> None:
    side: Any = SimpleNamespace(spec="torch")
    pillars: Any = {"a": SimpleNamespace(agrees=True), "b": SimpleNamespace(agrees=agrees)}
    found = ScenarioResult(side, side, [check(0.1, ""), check(0.1, why)], pillars, None, {})
    assert found.passed == passes
    assert len(found.failures) == bool(why)


def test_the_largest_difference_is_limited_not_the_mean() -> None:
    import numpy as np

    stats = compare(np.ones(100, np.float32), np.r_[np.ones(99), 1.5].astype(np.float32))
    assert what_is_wrong(stats, 1.0, 0.4) == "max |Δ| 0.5; expected at most 0.4"
    assert what_is_wrong(stats, 1.0, 0.6) == ""
