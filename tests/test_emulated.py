"""The emulated backends as backends."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from nets import NetBuilder
from test_executor import conv_net, graph, random

from cp_debug.backends.arithmetic import FP64, TF32
from cp_debug.backends.base import Program
from cp_debug.backends.determinism import deterministic
from cp_debug.backends.emulated import EmulatedBackend
from cp_debug.backends.executor import Executor
from cp_debug.backends.spec import BackendSpec
from cp_debug.bisect.engine import Options, bisect
from cp_debug.errors import BackendUnavailable, InputError

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
SPECS = ["emu-tf32", "emu-bf16", "emu-fp16", "emu-fp16acc"]


@pytest.mark.parametrize("spec", SPECS)
def test_runs_are_repeatable_and_describe_themselves(tmp_path: Path, spec: str) -> None:
    backend = EmulatedBackend(BackendSpec.parse(spec))
    session = backend.open(Program("net", conv_net(tmp_path)))
    inputs, values = {"x": random(1, 8, 16, 16)}, dict[str, Any]()
    first = session.run(inputs, lambda n, v: values.update({n: v.clone()}))
    second = session.run(inputs)
    assert first["y"].tobytes() == second["y"].tobytes()
    assert list(values) == list(session.exposed)
    assert backend.emulated
    assert backend.precision == session.settings["arithmetic"] == spec.removeprefix("emu-")
    assert session.settings["tile"] == (64 if spec == "emu-fp16acc" else None)
    assert backend.versions()["torch"] == torch.__version__


def test_the_tile_is_a_parameter(tmp_path: Path) -> None:
    net = graph(tmp_path, "g (float[1,96,4,4] x) => (float[A,B,C,D] y) { y = Conv(x, w) }", {"w": random(4, 96, 3, 3)})
    x = {"x": random(1, 96, 4, 4, seed=1)}
    results = []
    for tile in (32, None):
        session = EmulatedBackend(BackendSpec.parse("emu-fp16acc"), tile=tile).open(Program("net", net))
        assert session.settings["tile"] == (tile or 64)
        results.append(session.run(x)["y"])
    assert not np.array_equal(*results)


def test_bad_inputs_and_missing_devices(tmp_path: Path) -> None:
    session = EmulatedBackend(BackendSpec.parse("emu-fp16")).open(Program("net", conv_net(tmp_path)))
    with pytest.raises(InputError, match="missing input 'x'"):
        session.run({})
    with pytest.raises(BackendUnavailable, match="emu-fp16@cpu"):
        EmulatedBackend(BackendSpec.parse("emu-fp16@cuda:99"))
    unknown = graph(tmp_path, "g (float[2] x) => (float[2] y) { y = own.Mystery(x) }")
    with pytest.raises(InputError, match=r"own\.Mystery"):
        EmulatedBackend(BackendSpec.parse("emu-fp16")).open(Program("net", unknown))


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("spec", SPECS)
def test_cuda_emulates_what_the_cpu_emulates(tmp_path: Path, spec: str) -> None:
    net, captured = conv_net(tmp_path), {"x": random(1, 8, 16, 16)}
    on_cpu, on_cuda = (
        EmulatedBackend(BackendSpec.parse(f"{spec}@{d}")).open(Program("net", net)) for d in ("cpu", "cuda")
    )
    on_cpu.run(captured, lambda n, v: captured.update({n: v.clone().numpy()}))
    values: dict[str, np.ndarray] = {}
    on_cuda.run({"x": captured["x"]}, lambda n, v: values.update({n: v.cpu().numpy()}))
    for name, value in values.items():
        # An FP32 sum in another order may fall on the other side of a rounding: by one step, seldom, then inherited.
        assert np.linalg.norm(value - captured[name]) <= 2e-3 * np.linalg.norm(captured[name]), name


@pytest.mark.gpu
@needs_cuda
def test_tensor_cores_round_operands_to_tf32_as_emulated(tmp_path: Path) -> None:
    net = graph(
        tmp_path, "g (float[1,64,64,64] x) => (float[A,B,C,D] y) { y = Conv(x, w) }", {"w": random(64, 64, 3, 3)}
    )
    x = random(1, 64, 64, 64, seed=1)
    with deterministic(tf32=True):
        real = torch.nn.functional.conv2d(*(torch.from_numpy(a).cuda() for a in (x, net.initializer("w").copy())))
    exact = Executor(net, FP64).run({"x": x})["y"]
    emulated = Executor(net, TF32).run({"x": x})["y"]
    introduced = real.cpu() - exact
    assert float((real.cpu() - emulated).norm() / introduced.norm()) < 0.02


@pytest.mark.parametrize("backend", ["emu-fp16", "emu-bf16"])
def test_constants_beyond_the_range_stay_finite(tmp_path: Path, backend: str) -> None:
    """(1 − mask) · −3.4e38 is 0 where the mask is 1: builders and converters take the closest finite number, no Inf."""
    net = NetBuilder()
    lowest, one = (net.weight(np.float32(n)) for n in (np.finfo(np.float32).min, 1))
    masked = net.op("Mul", net.op("Sub", one, "mask"), lowest, name="masked")
    net.op("Softmax", net.op("Add", "x", masked, name="sum"), name="y", axis=-1)
    path = net.save(tmp_path / "net.onnx", {"x": (1, [4, 6]), "mask": (1, [1, 6])}, ["y"])
    x = np.random.default_rng(0).standard_normal((4, 6)).astype(np.float32)
    np.savez(tmp_path / "in.npz", x=x, mask=np.array([[0, 0, 1, 1, 1, 1]], np.float32))
    test = bisect(str(path), f"ort,{backend}", options=Options(inputs=tmp_path / "in.npz")).tests[0]
    assert test.agrees
    assert not test.not_finite
