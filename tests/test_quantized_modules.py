"""Quantized modules by themselves: switches, operands of additions, copies of a model, noise of outputs."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from cp_debug.quantization.models import output_sqnr, with_modules
from cp_debug.quantization.quantized_programs import Calibration, calibrate, of_modules
from cp_debug.quantization.record import disable_quantization, enable_quantization
from cp_debug.quantization.residual_adds import add_quantizers, attach
from cp_debug.recipes.base import Component, Sample


class TensorQuantizer(nn.Module):
    """As the library's: on or off, with a scale or without one."""

    def __init__(self, amax: float | None = 1.0, on: bool = True) -> None:
        super().__init__()
        self.amax, self.is_enabled = amax, on

    def enable(self) -> None:
        self.is_enabled = True

    def disable(self) -> None:
        self.is_enabled = False


def test_switches_last_or_end_with_their_block() -> None:
    part = nn.Sequential(TensorQuantizer(), TensorQuantizer(on=False), TensorQuantizer(amax=None, on=False))

    def on() -> list[bool]:
        return [q.is_enabled for q in part]  # type: ignore[misc]

    with disable_quantization(part):
        assert on() == [False, False, False]
    assert on() == [True, False, False]
    with enable_quantization(part):
        assert on() == [True, True, False]  # one without a scale stays off
    assert on() == [True, False, False]
    switched = disable_quantization(part)
    assert on() == [False, False, False]
    switched.apply()
    assert on() == [False, False, False]
    switched.apply(False)
    assert on() == [True, False, False]
    enable_quantization(part).apply()
    assert on() == [True, True, False]


class Doubled(nn.Module):
    """Stands in for a quantizer: twice what it reads."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


class Sums(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        first = x + y
        second = first * 10 + y
        third = second.clone()
        third += x
        return first, second, third


def test_operands_of_named_additions_go_through_a_module_until_it_is_taken_away() -> None:
    net = nn.Sequential()
    net.add_module("sums", Sums())
    x, y = torch.ones(2), torch.full((2,), 3.0)

    def run() -> list[float]:
        return [float(part[0]) for part in net.sums(x, y)]

    plain = [4.0, 43.0, 44.0]
    assert run() == plain
    undo = attach(net, {"sums/add": Doubled(), "sums/add#3": Doubled()})
    assert list(add_quantizers(net)) == ["sums/add", "sums/add#3"]
    assert run() == [8.0, 83.0, 168.0]
    undo()
    assert run() == plain
    assert add_quantizers(net) == {}
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in net.modules())


class Scaled(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor


class Chain:
    """Two components, the second of which reads what the first gives."""

    name = "chain"

    def __init__(self) -> None:
        self.components = tuple(Component(n, ["x"], ["y"], module=Scaled(1.0)) for n in ("first", "second"))

    def feed(self, component: Component, sample: Sample, results: Mapping[str, Any]) -> Any:
        return {"x": results["first"]["y"] if component.name == "second" else sample.arrays["x"]}


def samples() -> Iterator[Sample]:
    yield Sample({"x": np.float32([[1, 1]])}, "a")
    yield Sample({"x": np.float32([[2, 0]])}, "b")


def test_the_noise_of_outputs_adds_up_over_samples_and_components() -> None:
    model: Any = Chain()
    found = output_sqnr(model, {"first": Scaled(1.1), "second": Scaled(1.0)}, samples())
    assert found == {"first/y": pytest.approx(20, abs=1e-4), "second/y": pytest.approx(20, abs=1e-4)}  # 10 % of it
    found = output_sqnr(model, {"first": Scaled(1.0), "second": Scaled(1.01)}, samples())
    assert found == {"first/y": math.inf, "second/y": pytest.approx(40, abs=1e-3)}


def test_a_copy_of_a_model_has_the_other_modules_where_there_are_some() -> None:
    model: Any = Chain()
    other = Scaled(3.0)
    changed = with_modules(model, {"second": other})
    assert changed.components[1].module is other
    assert changed.components[0] is model.components[0]
    assert model.components[1].module is not other


@pytest.mark.parametrize("own", [True, False])
def test_programs_of_other_modules_are_calibrated_as_graphs(monkeypatch: pytest.MonkeyPatch, own: bool) -> None:
    model: Any = Chain()
    programs: Any = [SimpleNamespace(module=c.module if own else Scaled(1.0)) for c in model.components]
    monkeypatch.setattr("cp_debug.quantization.quantized_programs.with_files", lambda model, programs: "graphs")
    monkeypatch.setattr(
        "cp_debug.quantization.quantized_programs.quantize_model", lambda model, samples, **options: (model, options)
    )
    calibrated, options = calibrate(model, programs, [], Calibration(method="max", skip_layers=("a",)))  # type: ignore[misc]
    assert calibrated is (model if own else "graphs")
    assert options == {"method": "max", "skip_layers": ("a",)}
    assert of_modules(model, programs) == own
    assert not of_modules(model, [programs[0], SimpleNamespace(module=None)])  # type: ignore[list-item]
