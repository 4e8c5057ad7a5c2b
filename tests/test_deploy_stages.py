"""Which stages a configuration asks for, and what the stages tell of their files."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cp_debug.deploy import runner
from cp_debug.deploy.stages import Deployment
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
        with pytest.raises(InputError, match=r"d\.yaml: tensorrt\.precision is int8: expected quantization beside it"):
            stages(tmp_path, mode, precision="int8")
        assert "export" in stages(tmp_path, mode, precision="int8", scales=True)[0]
    assert "build" in stages(tmp_path, "trt", precision="int8")[0]


def test_files_that_were_taken_say_whether_they_were_rewritten() -> None:
    def item(name: str, source: Any) -> Any:
        graph = SimpleNamespace(path=Path(f"in/{name}"), opsets={"": 17})
        return SimpleNamespace(program=SimpleNamespace(graph=graph), source=source, to_dict=lambda: {"file": name})

    for source, how in ((None, "taken as it is"), ("old", "rewritten in opset 17, compared with the original")):
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
