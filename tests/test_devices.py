"""The oracle, comparisons and held captures on a device other than the CPU; a fake one, where there is no GPU."""

from __future__ import annotations

import itertools
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from fake_device import DEVICE, FakeTensor, fake_device
from nets import second_like
from onnx import numpy_helper
from test_clipped_scales import network as quantized_network
from typer.testing import CliRunner

from cp_debug.backends.arithmetic import FP64
from cp_debug.backends.executor import Executor, unsupported
from cp_debug.bisect import engine
from cp_debug.bisect.result import BisectResult
from cp_debug.bisect.standards import oracle_device
from cp_debug.cli.flags import size_in_bytes
from cp_debug.cli.main import app
from cp_debug.errors import DeviceUnavailable, InputError
from cp_debug.graph.graph import Graph
from cp_debug.probes.arrays import has_torch_type, is_torch, to_device
from cp_debug.probes.distance import distance
from cp_debug.probes.held import CaptureHolder, HeldCapture, Room
from cp_debug.probes.statistics import compare
from cp_debug.programs.pipeline import Pipeline

sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))

INEXACT = ("mean_abs", "rel_l2", "cosine", "sqnr_db", "finite_rel_l2")


@pytest.fixture
def shown_on_device(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A bisect whose backends show values on the fake device, where it replays them."""
    run = Pipeline.run

    def shown(self: Pipeline, sample: Any, sink: Callable[..., None] | None = None) -> Any:
        if sink is None:
            return run(self, sample)
        return run(self, sample, lambda key, t: sink(key, to_device(t, DEVICE) if has_torch_type(t) else t))

    with monkeypatch.context() as patch, fake_device():
        patch.setattr(Pipeline, "run", shown)
        patch.setattr(engine, "oracle_device", lambda test, options: DEVICE)
        yield


def faulty(path: Path, of: Path) -> Path:
    """The network with one weight scaled."""
    model = onnx.load(of)
    weight = [t for t in model.graph.initializer if len(t.dims) == 4][2]
    weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight) * np.float32(1.02), weight.name))
    onnx.save(model, path)
    return path


def judged(result: BisectResult) -> dict[str, tuple[str, float | None]]:
    return {row.name: (row.verdict, row.replay and row.replay.excess) for row in result.tests[0].rows}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("backends", "is_faulty"), [("ort,ort-all", True), ("ort,emu-tf32", False), ("ort,torch-fp8", False)]
)
def test_a_bisect_on_a_device_says_what_the_cpu_says(
    tmp_path: Path, backends: str, is_faulty: bool, request: pytest.FixtureRequest
) -> None:
    net = second_like(tmp_path / "net.onnx", depth=1, size=16)
    test = faulty(tmp_path / "test.onnx", net) if is_faulty else None
    expected = engine.bisect(str(net), backends, test_model=test)
    request.getfixturevalue("shown_on_device")
    found = engine.bisect(str(net), backends, test_model=test)
    assert bool(found.tests[0].guilty) is is_faulty
    ours, theirs = judged(found), judged(expected)
    assert {n: v for n, (v, _) in ours.items()} == {n: v for n, (v, _) in theirs.items()}
    for name, (_, excess) in theirs.items():
        assert ours[name][1] == (excess and pytest.approx(excess, rel=0.01, abs=1e-3))
    assert [f.cause for f in found.tests[0].findings] == [f.cause for f in expected.tests[0].findings]


@pytest.fixture
def replayed_on_device(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A bisect whose values come from the host, as those of an engine in another process, and are replayed there."""
    with monkeypatch.context() as patch, fake_device():
        patch.setattr(engine, "oracle_device", lambda test, options: DEVICE)
        yield


@pytest.mark.few(1)
@pytest.mark.parametrize("where", ["shown_on_device", "replayed_on_device"])
@pytest.mark.parametrize(
    ("op", "clipped", "data"), [("Conv", (), False), ("Conv", (5,), False), ("MatMul", (3,), True)]
)
def test_a_quantized_file_on_a_device_is_judged_as_on_the_cpu(
    tmp_path: Path, op: str, clipped: tuple[int, ...], data: bool, where: str, request: pytest.FixtureRequest
) -> None:
    ours, theirs = (
        quantized_network(tmp_path / f"{name}.onnx", op, quantized=name == "theirs", clipped=clipped, data=data)
        for name in ("ours", "theirs")
    )
    expected = engine.bisect(str(ours), "ort,ort", test_model=theirs)
    request.getfixturevalue(where)
    found = engine.bisect(str(ours), "ort,ort", test_model=theirs)
    for name, (verdict, excess) in judged(expected).items():
        assert judged(found)[name] == (verdict, excess and pytest.approx(excess))
    assert [f.cause for f in found.tests[0].findings] == [f.cause for f in expected.tests[0].findings]


def executed(cases: list[Any], folder: Path) -> list[str]:
    """Node tests that run on the CPU and not on the fake device, or leave a result on the CPU."""
    from operators import _value

    failed = []
    for case in cases:
        onnx.save(case.model, folder / "case.onnx")
        graph = Graph(folder / "case.onnx")
        if unsupported(graph):
            continue
        for inputs, _ in case.data_sets or ():
            values = dict(zip([v.name for v in graph.proto.graph.input], map(_value, inputs), strict=False))
            try:
                Executor(graph, FP64, literal=True).run(values)
            except InputError:
                continue
            try:
                with fake_device() as device:
                    results = Executor(graph, FP64, device, literal=True).run(values)
            except InputError as error:
                failed.append(f"{case.name}: {error}")
            else:
                failed += [case.name for r in results.values() if is_torch(r) and not isinstance(r, FakeTensor)]
    return failed


def test_on_the_host_large_values_go_to_disk_before_small_ones() -> None:
    room = Room()
    assert room.take("cpu", 60 << 20)
    assert not room.take("cpu", 5 << 20)
    assert all(room.take("cpu", 1 << 19) for _ in range(800))
    assert not all(room.take("cpu", 1 << 19) for _ in range(200))
    assert Room(limit=1 << 30).take("cpu", 1 << 29)  # what the user says is for all of them


@pytest.mark.slow
def test_kernels_compute_where_their_inputs_lie(tmp_path: Path) -> None:
    from operators import node_tests

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert executed(node_tests()[::25], tmp_path) == []


@pytest.mark.slow
def test_all_kernels_compute_where_their_inputs_lie(tmp_path: Path) -> None:
    from operators import node_tests

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert executed(node_tests(), tmp_path) == []


def test_the_fake_device_refuses_tensors_of_the_cpu() -> None:
    with fake_device() as device, pytest.raises(RuntimeError, match="same device"):
        torch.zeros(3, device=device) + torch.zeros(3)


def pair(kind: str, dtypes: tuple[torch.dtype, torch.dtype], count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Two tensors a little apart: ``plain``, ``equal``, with NaN and Inf, or with a difference that overflows FP32."""
    generator = torch.Generator().manual_seed(count)
    a = torch.randn(count, generator=generator).to(dtypes[0])
    b = a.to(dtypes[1])
    if kind != "equal":
        b = (a.float() + 1e-3 * torch.randn(count, generator=generator)).to(dtypes[1])
    if kind == "strange":
        a[:: max(count // 7, 1)] = torch.nan
        b[:: max(count // 5, 1)] = torch.nan
        b[count // 2] = torch.inf
        a[count // 3], b[count // 3] = -torch.inf, -torch.inf
    if kind == "overflow":
        a[count // 2], b[count // 2] = 3e38, -3e38  # in FP16 Inf, and an infinite difference
    return a, b


def same_statistics(a: torch.Tensor, b: torch.Tensor, device: str) -> None:
    """Counts, maxima, positions and percentiles are the host's bit by bit; sums are near."""
    host, there = asdict(compare(a, b)), asdict(compare(a.to(device), b.to(device)))
    for name in INEXACT:
        assert there.pop(name) == pytest.approx(host.pop(name), rel=2e-6, nan_ok=True), name
    assert there == host


def test_statistics_of_one_tensor_on_a_device() -> None:
    a, b = pair("strange", (torch.float32, torch.float32), 1000)
    expected = asdict(compare(a.double(), b.double()))
    with fake_device() as device:
        for ours, theirs in ((a.double().to(device), b.double()), (a.double(), b.double().to(device))):
            found = asdict(compare(ours, theirs))
            assert {k: v for k, v in found.items() if k not in INEXACT} == {
                k: v for k, v in expected.items() if k not in INEXACT
            }
        assert distance(a.numpy(), b.to(device)) == pytest.approx(distance(a, b), rel=1e-12)
        wide = np.array([1, 2**40], np.uint64)
        assert distance(wide, torch.tensor([1.0, 2.0**40]).to(device)).difference == 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kind", ["plain", "equal", "strange", "overflow"])
def test_statistics_on_a_gpu_are_the_host_s(kind: str) -> None:
    types = (torch.float32, torch.float16, torch.bfloat16)
    for ref, test, count in itertools.product(types, types, (1, 7, 8, 1000, 4097, 1 << 20, 3_000_001)):
        a, b = pair(kind, (ref, test), count)
        same_statistics(a, b, device="cuda")
        if kind == "plain":  # squares that FP32 has no room for
            for factor in (1e-30, 1e-20, 1e19, 1e30):
                same_statistics((a.double() * factor).to(ref), (b.double() * factor).to(test), device="cuda")
    for ref, test, count in itertools.product(
        (*types, torch.float64), (*types, torch.float64), (1, 8, 4097, 3_000_001)
    ):
        a, b = pair(kind, (torch.float32, torch.float32), count)
        a, b = a.to(ref), b.to(test)
        given = a.double().cuda().to(ref), b.double().cuda().to(test)
        # Two numbers that FP32 holds are subtracted in FP32, and rounded once.
        rel = 1e-12 if torch.float64 in (ref, test) else 1e-7
        assert tuple(distance(*given)) == pytest.approx(tuple(distance(a.double(), b.double())), rel=rel)


def taken(room: Room, folder: Path, tensors: dict[str, Any], *, saved: bool = False) -> HeldCapture:
    with CaptureHolder(folder, {}, room, saved=saved) as holder:
        for name, tensor in tensors.items():
            holder.put(name, tensor)
    return holder.capture


def test_captures_stay_in_memory_and_spill_beyond_the_bound(tmp_path: Path) -> None:
    tensors = {name: np.full(100, i, np.float32) for i, name in enumerate("abc")}
    room = Room(limit=900)
    capture = taken(room, tmp_path / "one", tensors)
    assert [e.name for e in capture.entries] == capture.names() == ["a", "b", "c"]
    assert len(list((tmp_path / "one").glob("*.safetensors"))) == 1  # 400 bytes each: the third has no room
    tensors["a"][:] = 7  # what was captured is a copy
    assert [float(capture.load(n)[0]) for n in "abc"] == [0, 1, 2]
    assert not taken(room, tmp_path / "full", {"d": np.zeros(100, np.float32)})._held
    capture.release()
    taken(room, tmp_path / "none", {"d": np.zeros(100, np.float32)})
    assert not (tmp_path / "none").exists()
    with pytest.raises(InputError, match="has no tensor 'a'"):
        taken(room, tmp_path / "other", {}).load("a")
    with CaptureHolder(tmp_path / "twice", {}, Room()) as holder:
        holder.put("a", np.zeros(1))
        with pytest.raises(InputError, match="written twice"):
            holder.put("a", np.zeros(1))


def test_a_large_model_leaves_a_gpu_room_for_larger_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    allocated = {0: 0, 1: 0}
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: allocated[device.index])
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (80 << 30, 80 << 30))
    weights = 4 << 30
    room = Room(weights=weights)
    allocated[0] = 2 * weights
    assert room.take("cuda:0", weights // 4)
    assert not room.take("cuda:0", weights // 2)  # 2.5 times the weights
    assert room.take("cuda:1", weights // 2)
    assert Room(weights=weights // 4).take("cuda:0", weights)  # of a small model what is free decides,
    assert Room(limit=weights, weights=weights).take("cuda:0", weights)  # of any model what the user says


def test_captures_stay_on_their_device_and_are_saved_all_the_same(tmp_path: Path) -> None:
    with fake_device() as device:
        tensor = torch.arange(4.0).to(device)
        capture = taken(Room(), tmp_path / "run", {"a": tensor}, saved=True)
        tensor.zero_()
        held = capture.load("a")
        assert isinstance(held, FakeTensor)
        assert held.tolist() == [0, 1, 2, 3]
    assert (tmp_path / "run" / "manifest.json").is_file()


class _Test:
    device, precision = "cpu", "fp32"


def test_the_oracle_follows_the_test(monkeypatch: pytest.MonkeyPatch) -> None:
    from cp_debug.bisect.options import Options

    test: Any = _Test()
    assert oracle_device(test, Options()) == "cpu"
    test.device = "cuda:1"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert oracle_device(test, Options()) == "cpu"
    with pytest.raises(DeviceUnavailable, match=r"--oracle-device: cuda, but torch .* sees 0 CUDA devices; expected"):
        oracle_device(test, Options(oracle_device="cuda"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert oracle_device(test, Options()) == "cuda:1"
    assert oracle_device(test, Options(oracle_device="cuda")) == "cuda:0"
    assert oracle_device(test, Options(oracle_device="cpu")) == "cpu"
    test.precision = "int8"
    assert oracle_device(test, Options()) == "cpu"
    with pytest.raises(DeviceUnavailable, match="cuda:2"):
        oracle_device(test, Options(oracle_device="cuda:2"))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--oracle-device", "gpu"], "--oracle-device: 'gpu'; expected auto, cpu, cuda or cuda:N"),
        (["--memory", "much"], "--memory: 'much'; expected a size such as 512M or 2G"),
        (["--no-replay", "--oracle-device", "cpu"], "--oracle-device: it would do nothing here"),
    ],
)
def test_devices_and_sizes_that_are_none(arguments: list[str], says: str) -> None:
    result = CliRunner().invoke(app, ["bisect", "centerpoint:tiny", *arguments])
    assert isinstance(result.exception, InputError)
    assert says in str(result.exception)


def test_sizes_are_powers_of_1024() -> None:
    assert [size_in_bytes(text, "--memory") for text in ("7", "2k", "1.5M", "2 GiB")] == [7, 2048, 1572864, 2 << 30]


def test_what_is_held_cannot_be_changed(tmp_path: Path) -> None:
    ours = np.ones(3, np.float32)
    held = taken(Room(), tmp_path / "held", {"x": ours})
    ours[0] = 7
    kept = held.load("x")
    assert kept.tolist() == [1, 1, 1]
    with pytest.raises(ValueError, match="read-only"):
        kept[0] = 2
