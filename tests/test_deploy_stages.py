"""Which stages a configuration asks for, and what the stages tell of their files."""

from __future__ import annotations

from dataclasses import make_dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cp_debug.deploy import runner
from cp_debug.deploy.runner import Outcome
from cp_debug.deploy.stages import Deployment
from cp_debug.deploy.verify import reasons
from cp_debug.errors import InputError

PLAIN = {
    name: name for name in ("model", "data", "quantization", "export", "components", "tensorrt", "verify", "evaluate")
}


def stages(
    folder: Path, mode: str, *, quantized: bool = False, verified: bool = True, scored: bool = True,
    precision: str = "fp16", scales: bool = False,
) -> Any:  # fmt: skip
    config = SimpleNamespace(
        export=SimpleNamespace(mode=mode, rot_y_axis_reference=True), checkpoint=None, model="centerpoint:tiny",
        quantization=SimpleNamespace(checkpoint=None) if quantized else None,
        verify=SimpleNamespace(enabled=verified), scenarios=lambda: ["one"], model_dump=lambda mode: PLAIN,
        tensorrt=SimpleNamespace(precision=precision), int8=scales,
    )  # fmt: skip
    used: list[str] = []
    deployment: Any = SimpleNamespace(
        config=config,
        source="d.yaml",
        onnx_dir=folder,
        evaluates=scored,
        use_quantized=lambda: used.append("quantized"),
    )
    found = {name: (needs, run) for name, needs, run in runner._stages(deployment)}
    return found, used


@pytest.mark.parametrize(
    ("mode", "how", "names"),
    [
        ("onnx", {}, ["load", "export", "verify", "evaluate"]),
        ("both", {}, ["load", "export", "build", "verify", "evaluate"]),
        ("both", {"quantized": True}, ["load", "quantize", "export", "build", "verify", "evaluate"]),
        ("trt", {"quantized": True}, ["load", "build", "verify", "evaluate"]),
        ("none", {"quantized": True}, ["load", "verify", "evaluate"]),
        ("onnx", {"verified": False}, ["load", "export", "evaluate"]),
        ("onnx", {"scored": False}, ["load", "export", "verify"]),
    ],
)
def test_stages_follow_the_configuration(tmp_path: Path, mode: str, how: dict[str, bool], names: list[str]) -> None:
    (tmp_path / "net.onnx").write_bytes(b"a graph")
    found, used = stages(tmp_path, mode, **how)
    assert list(found) == names
    assert used == (["quantized"] if "quantize" in names else [])
    assert found["load"][0] == {"model": "model", "weights": None, "turned": True}
    last = found[names[-1]][0]
    assert ("onnx" in last) == (mode in ("trt", "none"))  # files that no stage before wrote
    assert last["data"] == "data"
    assert [run.__name__ for _, run in found.values()] == [f"_{name}" for name in names]


def test_engines_in_int8_need_scales_where_the_graph_is_exported(tmp_path: Path) -> None:
    for mode in ("onnx", "both"):
        with pytest.raises(InputError, match=r"d\.yaml: tensorrt\.precision is int8: expected a quantization section"):
            stages(tmp_path, mode, precision="int8")
        assert "export" in stages(tmp_path, mode, precision="int8", scales=True)[0]
    assert "build" in stages(tmp_path, "trt", precision="int8")[0]


def test_files_that_were_taken_say_whether_they_were_rewritten() -> None:
    def item(name: str, source: Any) -> Any:
        graph = SimpleNamespace(path=Path(f"in/{name}"), opsets={"": 17})
        return SimpleNamespace(program=SimpleNamespace(graph=graph), source=source, to_dict=lambda: {"file": name})

    for source, how in ((None, "used unchanged"), ("old", "rewritten in opset 17, compared with the original")):
        taken = [item("a.onnx", source), item("b.onnx", None)]
        deployment: Any = SimpleNamespace(takes_files=True, take=lambda taken=taken: taken, onnx_dir=Path("out"))
        told = runner._export(deployment)
        assert told.line == f"a.onnx, b.onnx: {how}"
        assert told.document == {"components": [{"file": "a.onnx"}, {"file": "b.onnx"}]}
        assert told.passed


def test_what_was_quantized_is_read_and_not_calibrated_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Path | None] = []
    monkeypatch.setattr(
        "cp_debug.deploy.stages.open_quantized", lambda model, path, *data, **how: asked.append(path) or {"net": path}
    )
    monkeypatch.setattr(Deployment, "_loaded", "model")
    monkeypatch.setattr(Deployment, "_quantized_checkpoint", None)
    for written, path in ((False, None), (True, tmp_path / "quantized" / "quantized.pt")):
        deployment: Any = object.__new__(Deployment)
        quantization = SimpleNamespace(data=None, samples=2, method="max", skip_layers=(), checkpoint=None)
        deployment.config = SimpleNamespace(
            quantization=quantization, data=SimpleNamespace(path=None), work_dir=tmp_path, model="m"
        )
        deployment.on_step = None
        deployment._written = False
        if written:
            deployment.use_quantized()
        assert deployment.quantized == {"net": path}
    assert asked == [None, tmp_path / "quantized" / "quantized.pt"]


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
        "the reference has the same 2 NaN or Inf: they come from the model or its input",
        "guilty layer conv",
        "cause: epsilon",
        "first divergent layer relu",
    ]
    stats.mismatched = 2
    assert len(list(reasons(failed))) == 4


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
