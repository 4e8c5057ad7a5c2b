"""The TensorRT backends on a real GPU, with whichever version is there."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from nets import NetBuilder

from cp_debug.backends.base import Program
from cp_debug.backends.registry import create
from cp_debug.backends.spec import BackendSpec
from cp_debug.backends.tensorrt.client import ENVIRONMENT
from cp_debug.errors import BackendUnavailable, InputError
from cp_debug.graph.graph import Graph

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.tensorrt,
    pytest.mark.skipif(not (os.environ.get(ENVIRONMENT) or find_spec("tensorrt")), reason="needs TensorRT"),
]
X = np.random.default_rng(1).standard_normal((1, 64, 128, 128)).astype(np.float32)


@pytest.fixture(scope="module")
def net(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two convolutions with ReLU and one without."""
    return make_net(tmp_path_factory.mktemp("net") / "net.onnx", 1)


def make_net(path: Path, batch: int | str) -> Path:
    builder = NetBuilder()
    first = builder.op("Relu", builder.conv("x", 64, 64, name="c1"), name="r1")
    second = builder.op("Relu", builder.conv(first, 64, 64, name="c2"), name="r2")
    builder.conv(second, 64, 32, name="y")
    return builder.save(path, {"x": (1, [batch, 64, 128, 128])}, ["y"])


def run(path: Path, spec: str, x: np.ndarray = X, **options: Any) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """(values shown, settings)."""
    session = create(BackendSpec.parse(spec), **options).open(Program("net", Graph(path)))
    seen: dict[str, np.ndarray] = {}
    session.run({"x": x}, lambda name, tensor: seen.update({name: np.array(tensor)}))
    settings = dict(session.settings)
    session.close()
    return seen, settings


def distance(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.linalg.norm(a - b.astype(np.float64)) / np.linalg.norm(b))


@pytest.mark.parametrize(
    ("spec", "low", "high", "arithmetic"),
    [("trt-fp32", 0, 1e-5, "fp32"), ("trt-tf32", 1e-5, 2e-3, "tf32"), ("trt-fp16", 1e-4, 1e-2, "fp16")],
)
def test_each_precision_is_what_ran(net: Path, spec: str, low: float, high: float, arithmetic: str) -> None:
    seen, settings = run(net, spec)
    expected, _ = run(net, "ort")
    assert list(seen) == ["r1", "r2", "y"], "ReLU is fused into the convolution"
    assert low < distance(seen["y"], expected["y"]) < high
    assert seen["r1"].dtype == (np.float16 if spec == "trt-fp16" else np.float32)
    convolutions = [layer for layer in settings["layers"] if "node_c1" in layer["nodes"]]
    assert [layer["nodes"] for layer in convolutions] == [["node_c1", "node_r1"]]
    assert arithmetic in convolutions[0]["arithmetic"]
    assert (settings["probed"]["fusions_changed"], settings["probed"]["tactics_changed"]) == ([], [])
    assert settings["observer_gap"] == settings["rebuild_floor"] == 0


def test_fp32_nodes_stay_fp32(net: Path) -> None:
    _, settings = run(net, "trt-fp16", keep_fp32=frozenset({"node_c2", "node_r2"}))
    kept = next(layer for layer in settings["layers"] if "node_c2" in layer["nodes"])
    assert kept["arithmetic"] in ("fp32", None)
    assert set(kept["inputs"].values()) == {"Float"}


def test_all_probes_show_every_value(net: Path) -> None:
    seen, settings = run(net, "trt-fp32", probes="all")
    assert list(seen) == ["c1", "r1", "c2", "r2", "y"]
    assert settings["probed"]["fusions_changed"]


def test_what_does_not_fit_is_said(net: Path, tmp_path: Path) -> None:
    shapes = {"x": tuple([n, 64, 128, 128] for n in (1, 2, 2))}
    with pytest.raises(InputError, match="the engine was built for"):
        run(make_net(tmp_path / "dynamic.onnx", "N"), "trt-fp32", np.repeat(X, 3, axis=0), profiles=shapes)
    model = onnx.load(net)
    model.graph.node.append(onnx.helper.make_node("Det", ["y"], ["d"], name="/d/Det"))
    model.graph.output.append(onnx.helper.make_tensor_value_info("d", 1, None))
    onnx.save(model, tmp_path / "det.onnx")
    with pytest.raises(InputError, match=r"(?s)cannot parse it.*/d/Det"):
        run(tmp_path / "det.onnx", "trt-fp32")
    with pytest.raises(BackendUnavailable):
        create(BackendSpec.parse("trt-fp32@cuda:99"))
