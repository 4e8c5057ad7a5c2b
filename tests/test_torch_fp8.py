"""``torch-fp8``: products by ``torch._scaled_mm``, their scales, and where it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_executor import graph, random

from cp_debug.backends.arithmetic import ARITHMETICS
from cp_debug.backends.base import Program
from cp_debug.backends.executor import Executor
from cp_debug.backends.registry import create
from cp_debug.backends.spec import BackendSpec
from cp_debug.backends.torch_fp8 import TensorCores, unavailable
from cp_debug.errors import BackendUnavailable, InputError

if unavailable("cpu"):
    pytest.skip(unavailable("cpu"), allow_module_level=True)
NET = """g (float[3,20] x) => (float[3,7] y, float[3,3] own) {
    h = MatMul(x, w)  r = Relu(h)  y = Gemm <transB = 1> (r, w2, b)  t = Transpose(r)  own = MatMul(r, t) }"""
WEIGHTS = {"w": random(20, 33, seed=1), "w2": random(7, 33, seed=2), "b": random(7, seed=3)}


def session(net: Any, spec: str) -> Any:
    return create(BackendSpec.parse(spec)).open(Program("net", net))


@pytest.mark.parametrize(
    ("spec", "emulated"),
    [(f"torch-{own}", own.removesuffix(":dynamic")) for own in ("fp8", "fp8:dynamic", "fp8:channel", "fp8:block")],
)
def test_products_are_those_of_the_emulation(tmp_path: Path, spec: str, emulated: str) -> None:
    """Lengths of 20 and 33 are no multiples of 16. The first product reads the same in FP32, where it is calibrated."""
    net, inputs = graph(tmp_path, NET, WEIGHTS), {"x": random(3, 20)}
    shown: dict[str, np.ndarray] = {}
    ours = session(net, spec)
    ours.run(inputs, lambda n, v: shown.update({n: np.asarray(v)}))
    wanted = Executor(net, ARITHMETICS[emulated]).run_nodes(net.nodes[:1], {"x": torch.from_numpy(inputs["x"])}, ["h"])
    np.testing.assert_allclose(shown["h"], wanted["h"].numpy(), rtol=1e-5, atol=1e-5)
    exact = Executor(net, ARITHMETICS["fp64"]).run(inputs)
    for name, limit in (("y", 0.1), ("own", 0.1)):
        error = np.linalg.norm(shown[name] - exact[name].numpy()) / np.linalg.norm(exact[name].numpy())
        assert 1e-3 < error < limit
    assert ours.settings["filled_up_to_multiples_of"] == 16


def test_scales_are_calibrated_on_the_first_inputs_and_stay(tmp_path: Path) -> None:
    net = graph(tmp_path, NET, WEIGHTS)
    calibrated, found = session(net, "torch-fp8"), session(net, "torch-fp8:dynamic")
    first = {"x": random(3, 20)}
    calibrated.run(first)
    scale = calibrated.settings["scales"][net.nodes[0].name][0]
    assert scale == pytest.approx(float(np.abs(first["x"]).max()) / 448)
    larger = {"x": first["x"] * 10}
    exact = Executor(net, ARITHMETICS["fp64"]).run(larger)["y"].numpy()
    errors = [np.linalg.norm(s.run(larger)["y"] - exact) / np.linalg.norm(exact) for s in (calibrated, found)]
    assert errors[0] > 0.5 > 0.1 > errors[1]


def test_data_without_a_scale(tmp_path: Path) -> None:
    net = graph(tmp_path, NET, WEIGHTS)
    zero = session(net, "torch-fp8").run({"x": np.zeros((3, 20), np.float32)})
    np.testing.assert_array_equal(zero["y"], np.tile(WEIGHTS["b"], (3, 1)))
    strange = random(3, 20)
    strange[1, 2] = np.inf
    with pytest.raises(InputError, match="'x' holds NaN or Inf"):
        session(net, "torch-fp8").run({"x": strange})


def test_empty_products() -> None:
    cores = TensorCores("x", None, 23, 32)
    for shape in ((0, 5, 4), (3, 0, 4), (3, 5, 0)):
        product = cores.matmul(torch.ones(shape[0], shape[1]), torch.ones(shape[1], shape[2]))
        assert product.shape == (shape[0], shape[2])
        assert not product.any()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("torch-fp8:e5m2", "no option 'e5m2'"),
        ("torch-fp8:fats", "did you mean fast"),
        ("torch-fp8:fast:fast", "repeats another"),
        ("torch-fp8:channel:dynamic", "remove dynamic"),
        ("torch-fp8:acc=fp22", "no option 'acc=fp22'"),
    ],
)
def test_options_that_it_does_not_have(text: str, says: str) -> None:
    with pytest.raises(InputError, match=says) as error:
        BackendSpec.parse(text)
    assert "\n" not in str(error.value)


def test_a_spec_has_one_spelling() -> None:
    spec = BackendSpec.parse("torch-fp8:fast:channel@cuda:0")
    assert str(spec) == "torch-fp8:channel:fast@cuda:0"
    assert BackendSpec.parse(str(spec)) == spec


def test_cards_without_fp8_are_unavailable(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "device_count", lambda: 1)
        patch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
        patch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100")
        with pytest.raises(BackendUnavailable, match=r"NVIDIA A100 has no FP8.*8\.0"):
            create(BackendSpec.parse("torch-fp8@cuda"))
    if not torch.cuda.is_available():
        with pytest.raises(BackendUnavailable, match="sees 0 CUDA devices"):
            create(BackendSpec.parse("torch-fp8@cuda"))
