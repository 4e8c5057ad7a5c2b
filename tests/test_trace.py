"""What a trace sees: functional operations, in-place ones, repeated modules, tuples, failures."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from stress import make_stress
from torch import Tensor, nn
from torch.nn import functional

from cp_debug.backends.determinism import deterministic
from cp_debug.errors import ModuleFailed
from cp_debug.probes.trace import Trace, _Tracer, as_written, flatten_outputs, trace


def run(module: nn.Module, *tensors: Tensor, prefix: str = "") -> tuple[Trace, dict[str, Tensor]]:
    """The trace, and a copy of every tensor at the moment when it was handed out, under its last name."""
    seen: dict[Any, Tensor] = {}
    inputs = {f"x{i}": t for i, t in enumerate(tensors)}
    record = trace(module.eval(), inputs, lambda value, tensor: seen.update({value: tensor.clone()}), prefix=prefix)
    return record, {value.name: tensor for value, tensor in seen.items()}


def test_an_in_place_relu_does_not_reach_back() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(inplace=True))
    image = torch.randn(1, 3, 5, 5)
    _, seen = run(net, image)
    with torch.no_grad():
        assert torch.equal(seen["1"], net[1](net[0](image)))
        assert (seen["1"] < 0).any()
        assert torch.equal(seen["2"], seen["1"].relu())


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Linear(4, 4)
        self.gru = nn.GRU(4, 4, batch_first=True)
        self.drop = nn.Dropout()

    def forward(self, x: Tensor) -> dict[str, Any]:
        x = self.drop(self.shared(self.shared(x)))
        out, last = self.gru(x)
        return {"sum": functional.relu(x) + out, "more": (last, torch.cat([x, x], 1), torch.cat([x, out], 1))}


def test_names_of_repeated_modules_tuples_and_functions() -> None:
    record, seen = run(Mixed(), torch.randn(2, 3, 4))
    assert {"x0", "shared", "shared@2", "gru.0", "gru.1", "/relu", "/add", "/cat", "/cat#2"} <= seen.keys()
    assert [v.name for v in record.outputs if v] == ["/add", "gru.1", "/cat", "/cat#2"]
    assert record.leaves["drop"] == record.leaves["shared@2"]
    by_name = {v.name: v for v in record.values}
    assert by_name["/add"].inputs == (by_name["/relu"], by_name["gru.0"])
    assert by_name["shared@2"].path == "shared"


def test_a_compiled_module_runs_as_it_is_written() -> None:
    net, counts = nn.Sequential(nn.Linear(3, 3), nn.ReLU()), []
    compiled, x = torch.compile(net, backend="eager"), torch.randn(2, 3)
    trace(compiled, {"x": x}, lambda value, tensor: counts.append(int((tensor.numpy().view(np.uint32) >> 9).size)))
    record, seen = run(compiled, x)
    assert counts
    assert set(counts) == {6}
    with torch.no_grad():
        assert torch.equal(seen[record.outputs[0].name], net(x))


def test_a_prefix_completes_the_paths() -> None:
    record, _ = run(nn.Sequential(nn.Linear(2, 2)), torch.randn(1, 2), prefix="net.head")
    assert list(record.leaves) == ["net.head.0"]


class Slices(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        y = x * 2
        early = y.view(-1)
        y[:, 1:] += 1
        return early + y.flatten()


def test_writing_through_a_view_makes_new_values_of_all_that_share_the_memory() -> None:
    image = torch.randn(2, 3)
    record, seen = run(Slices(), image)
    expected = image * 2
    assert torch.equal(seen["/mul"], expected)
    expected[:, 1:] += 1
    output = record.outputs[0]
    assert output is not None
    mutated = [v for v in output.inputs if v.op == "mutated"]
    assert mutated
    assert all(torch.equal(seen[v.name].flatten(), expected.flatten()) for v in mutated)
    assert torch.equal(seen[output.name], 2 * expected.flatten())


def test_the_callers_inputs_stay_as_they_are() -> None:
    image = torch.full((2, 2), -1.0)
    run(nn.ReLU(inplace=True), image)
    assert (image == -1).all()


class Fails(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        raise ValueError("no luck")


class Catches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.other = Fails(), nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        try:
            return self.inner(x)
        except ValueError:
            return self.other(x)


@pytest.mark.parametrize("sink", [None, lambda value, tensor: None])
def test_a_module_that_raises_is_named(sink: Any) -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.ReLU(), Fails()))
    with pytest.raises(ModuleFailed, match=r"'1\.1' raised in forward: ValueError: no luck"):
        trace(net, {"x": torch.ones(1, 2)}, sink)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())


def test_a_module_that_is_caught_is_no_failure() -> None:
    record, _ = run(Catches(), torch.ones(1, 2))
    assert [v.name for v in record.outputs if v] == ["other"]


def test_an_error_of_the_sink_is_not_blamed_on_the_module() -> None:
    def full(value: Any, tensor: Tensor) -> None:
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        trace(nn.Linear(2, 2), {"x": torch.ones(1, 2)}, full)


def test_without_a_sink_the_result_is_the_modules_own() -> None:
    net, x = Mixed().eval(), torch.randn(2, 3, 4)
    with torch.no_grad():
        expected = list(flatten_outputs(net(x)).values())
    for found in (trace(net, {"x": x}).tensors, run(net, x)[0].tensors):
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_names_without_a_colon_mean_the_same_on_every_device() -> None:
    module, image = make_stress()
    with deterministic():
        _, expected = run(module, image)
        _, found = run(module.cuda(), image.cuda())
    public = [name for name in expected if ":" not in name]
    assert len(public) > 30
    assert set(public) == {name for name in found if ":" not in name}
    for name in public:
        torch.testing.assert_close(found[name].cpu(), expected[name], rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("loaded", [False, True])
def test_what_is_compiled_is_only_sought_where_the_compiler_is_loaded(
    loaded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    stances, left = [], []

    @contextmanager
    def set_stance(stance: str) -> Iterator[None]:
        stances.append(stance)
        yield
        left.append(stance)

    monkeypatch.setattr(torch.compiler, "set_stance", set_stance)
    monkeypatch.delitem(sys.modules, "torch._dynamo", raising=False)
    if loaded:
        monkeypatch.setitem(sys.modules, "torch._dynamo", torch)
    with as_written():
        assert stances == ["force_eager"] * loaded
        assert not left
    assert left == stances


@pytest.mark.parametrize("loaded", [False, True])
def test_a_compiler_that_is_loaded_leaves_the_watching_alone(loaded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "torch._dynamo", raising=False)
    if loaded:
        monkeypatch.setitem(sys.modules, "torch._dynamo", torch)
    for name in ("_watch", "_watch_uncompiled"):
        monkeypatch.setattr(_Tracer, name, lambda self, *given, name=name: name)
    tracer = _Tracer(nn.ReLU(), None, "")
    assert tracer.__torch_dispatch__(torch.relu, ()) == ("_watch_uncompiled" if loaded else "_watch")


def test_torch_keeps_no_compiler_off_a_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    """To do so it imports the compiler, wherever a mode may be compiled."""
    asked: list[Any] = []
    monkeypatch.setattr(torch, "_disable_dynamo", lambda function, recursive: asked.append(function) or function)
    kind = type("Watcher", (_Tracer,), {"__torch_dispatch__": lambda self, func, *rest: func})
    assert kind is not None
    assert not asked


@pytest.mark.slow
def test_a_trace_imports_no_compiler() -> None:
    """``torch._dynamo`` takes seconds to import, and torch does so for every dispatch mode that does not refuse."""
    code = """
import sys, torch
from cp_debug.probes.trace import trace
found = trace(torch.nn.Linear(2, 2), {"x": torch.ones(1, 2)}, lambda value, tensor: None)
print(len(found.leaves), "torch._dynamo" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["1", "False"]


def test_outputs_are_named_by_where_they_stand() -> None:
    t = torch.zeros(1)
    assert list(flatten_outputs(t)) == ["output"]
    assert list(flatten_outputs((t, [t, None, 3], {"a": t, "b": (t, t)}))) == [
        "output_0", "output_1.0", "output_2.a", "output_2.b.0", "output_2.b.1"
    ]  # fmt: skip
    assert list(flatten_outputs({"b": t, "a": {"c": t}})) == ["b", "a.c"]
