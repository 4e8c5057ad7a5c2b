"""Sensitivity: shares add up, errors are what was put in, choices keep their budget."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from extras import needs
from torch import Tensor, nn
from torch.nn import functional as F

from cp_debug.errors import InputError
from cp_debug.mixed_precision.goal import check_budget
from cp_debug.mixed_precision.sensitivity import (
    ErrorSum,
    LayerRunner,
    _loss,
    choose_layers,
    get_sensitive_layers,
    int8_runner,
    profile_of,
)
from cp_debug.mixed_precision.trials import Measured
from cp_debug.quantization.models import QuantizedComponent, quantize_model
from cp_debug.quantization.open_quantized import open_quantized
from cp_debug.recipes.base import Sample
from cp_debug.recipes.registry import load_model
from cp_debug.recipes.torch_callable import TorchModel
from cp_debug.reports.numbers import number
from cp_debug.reports.sensitivity import render, write_chart, write_page


class Net(nn.Module):
    """A residual sum in place, a concatenation, two heads, and a layer whose one huge input channel ruins INT8."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.block = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(inplace=True), nn.Conv2d(8, 8, 3, padding=1))
        self.first = nn.Conv2d(16, 4, 1)
        self.second = nn.Conv2d(16, 2, 1)
        self.fragile = nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = F.relu(self.stem(x), inplace=True)
        y = self.block(x)
        y += x
        scale = torch.ones(1, 8, 1, 1)
        scale[:, 0] = 3000.0
        z = self.fragile(y * scale)
        both = torch.cat((y, z), dim=1)
        return {"first": self.first(both), "second": self.second(both)}


def example() -> tuple[nn.Module, Tensor]:
    """As the command line takes it."""
    torch.manual_seed(0)
    net = Net().eval()
    with torch.no_grad():
        net.fragile.weight[:, 0] = net.fragile.weight[:, 0] / 3000  # as important as the others, so that they matter
    return net, torch.randn(2, 3, 12, 12)


@pytest.fixture(scope="module")
def net() -> Net:
    net, _ = example()
    assert isinstance(net, Net)
    return net


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randn(4, 2, 3, 12, 12, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def model(net: Net, images: Tensor) -> TorchModel:
    return TorchModel("net", net, images[0])


@pytest.fixture(scope="module")
def parts(model: TorchModel, images: Tensor) -> dict[str, QuantizedComponent]:
    return quantize_model(model, [Sample({"x": images[0].numpy()}, "image")], method="max")


@pytest.fixture(scope="module")
def bench(model: TorchModel, parts: dict[str, QuantizedComponent], images: Tensor) -> LayerRunner:
    return int8_runner(model, parts, Sample({"x": images[0].numpy()}, "image"))


@pytest.fixture(scope="module")
def samples(images: Tensor) -> list[Sample]:
    return [Sample({"x": image.numpy()}, f"image {index}") for index, image in enumerate(images)]


LAYERS = {"stem", "block.0", "block.2", "first", "second", "fragile"}


@needs("modelopt")
def test_shares_add_up_and_are_what_leaving_a_layer_out_takes_away(bench: LayerRunner, images: Tensor) -> None:
    """⟨D, change⟩ ÷ ‖D‖² of each layer, where the change is what leaving it alone out of INT8 takes away."""
    assert bench.layers.keys() > LAYERS
    sample = Sample({"x": images[1].numpy()}, "image")
    runner = bench.emulator.on([sample])

    def run(kept: frozenset[str]) -> Any:
        return runner.run(bench._kept(kept))[0]["Net"]

    exact, low = run(bench.all), run(frozenset())
    apart = {name: (low[name] - exact[name]) / np.linalg.norm(exact[name]) for name in exact}
    whole = sum(float(np.sum(d**2)) for d in apart.values())
    without = {name: run(frozenset([name])) for name in bench.layers}
    shares = {row.layer: row for row in bench.shares([sample])}
    assert [row for row in shares.values() if row.kind == "Add"], "the residual sum is quantized, too"
    assert (shares["stem"].kind, shares["stem"].weights) == ("Conv", 8 * 3 * 9)
    assert sum(found.share for found in shares.values()) == pytest.approx(1, abs=0.1)
    for name, found in shares.items():
        changes = {o: (low[o] - without[name][o]) / np.linalg.norm(exact[o]) for o in apart}
        taken = sum(float(np.sum(apart[o] * changes[o])) for o in apart) / whole
        assert found.share == pytest.approx(taken, abs=0.05), name
    assert max(shares, key=lambda name: shares[name].share) == "fragile"
    assert shares["fragile"].introduced > 0.1 > shares["stem"].introduced > 0
    assert bench.notes == []


@needs("modelopt")
def test_errors_are_those_of_the_layers(
    bench: LayerRunner, net: Net, parts: dict[str, QuantizedComponent], samples: list[Sample]
) -> None:
    quantized = parts["Net"].module
    assert quantized is not None
    measured = bench.measure(samples, [bench.all - {"second"}, frozenset(), bench.all])
    alone, all_, none = measured.values()
    assert none.outputs == {"first": 0.0, "second": 0.0}
    assert none.error == 0
    assert alone.outputs["first"] == 0
    assert alone.error == pytest.approx(alone.outputs["second"] / 2**0.5)
    with torch.no_grad():
        pairs = [(quantized(x)["first"], net(x)["first"]) for x in (torch.from_numpy(s.arrays["x"]) for s in samples)]
    difference = sum(float((a - b).square().sum()) for a, b in pairs) / sum(float(b.square().sum()) for _, b in pairs)
    assert all_.outputs["first"] == pytest.approx(difference**0.5, rel=1e-4)


@needs("modelopt")
def test_the_fragile_layer_is_found_and_left_out(bench: LayerRunner, samples: list[Sample]) -> None:
    profile = profile_of(bench, samples, data="images", budget=0.05)
    assert profile.layers[0].layer == "fragile"
    assert profile.layers[0].left_out is not None
    assert profile.layers[0].left_out.error < profile.int8.error / 3
    assert profile.choice is not None
    assert profile.choice.skipped == ["fragile"]
    assert profile.choice.loss.value <= 0.05 < profile.int8.error
    assert get_sensitive_layers(profile, 0.05) == ["fragile"]
    assert get_sensitive_layers(profile, 10.0) == []
    assert len(get_sensitive_layers(profile, 1e-9)) > 1
    assert list(profile.to_pandas()["layer"]) == [row.layer for row in profile.layers]


@needs("modelopt")
def test_the_largest_shares_alone_are_left_out(bench: LayerRunner, samples: list[Sample]) -> None:
    profile = profile_of(bench, samples, tried=2)
    tried = {row.layer: row.share for row in profile.layers if row.left_out is not None}
    assert len(tried) == 2
    assert min(tried.values()) >= max(row.share for row in profile.layers if row.left_out is None)


@needs("modelopt")
def test_bad_input(
    model: TorchModel, bench: LayerRunner, parts: dict[str, QuantizedComponent], samples: list[Sample]
) -> None:
    nothing = replace(parts["Net"].scales, layers={}, residual_adds={})
    with pytest.raises(InputError, match="no layer of net is quantized"):
        int8_runner(model, {"Net": replace(parts["Net"], scales=nothing)}, samples[0])
    with pytest.raises(InputError, match="no quantized layer 'stemm'; did you mean stem"):
        bench.measure(samples, [frozenset({"stemm"})])
    with pytest.raises(InputError, match="no sample"):
        profile_of(bench, [])
    profile = profile_of(bench, samples[:1])
    with pytest.raises(InputError, match="expected a positive budget"):
        choose_layers(bench, samples, profile, 0.0)


@needs("modelopt")
def test_a_budget_of_map_needs_ground_truth() -> None:
    model = load_model("centerpoint:tiny")
    parts = open_quantized(model, None, count=1, method="max")
    unknown = [replace(next(model.samples(1, 0, None)), truth=None)]
    with pytest.raises(InputError, match="scene 0 has no ground truth, so mAP is unknown"):
        profile_of(int8_runner(model, parts, unknown[0]), unknown, budget=0.01)


@needs("modelopt")
def test_faces(bench: LayerRunner, samples: list[Sample], tmp_path: Path) -> None:
    profile = profile_of(bench, samples, data="images", budget=0.05)
    text = "\n".join(_plain(part) for part in render(profile))
    assert "fragile" in text
    assert "--skip-layers fragile" in text
    assert f"stay in FP32: output error {number(profile.choice.loss.value)}, " in text  # one number has no interval
    write_page(profile, "cpdebug quantize sensitivity net", tmp_path / "page.html")
    write_chart(profile, tmp_path / "chart.svg")
    page, chart = (tmp_path / "page.html").read_text(), (tmp_path / "chart.svg").read_text()
    assert page.count('<td class="name">fragile</td>') == 1
    assert chart.startswith('<svg xmlns="http://www.w3.org/2000/svg"')
    assert chart.count('class="bars"') == len(profile.layers)


def _plain(part: object) -> str:
    from rich.console import Console

    console = Console(width=200)
    with console.capture() as capture:
        console.print(part)
    return capture.get()


def test_an_error_over_several_pairs_is_that_of_all_numbers() -> None:
    total = ErrorSum()
    assert total.relative == 0
    total.add(np.array([3.0, 0.0]), np.array([0.0, 0.0]) + 4.0)
    total.add(np.array([2.0]), np.array([1.0]))
    assert total.relative == pytest.approx(math.sqrt((1 + 16 + 1) / (16 + 16 + 1)))
    total.add(np.array([np.inf]), np.array([1.0]))
    assert total.relative == math.inf


@pytest.mark.parametrize("budget", [0.0, -1.0, math.nan])
def test_a_budget_is_positive(budget: float) -> None:
    with pytest.raises(InputError, match=r"--auto is .*; expected a positive budget"):
        check_budget(budget)
    check_budget(1e-9)


def test_a_loss_is_what_the_test_has_less_than_the_reference() -> None:
    draws = [{"mAP": np.full(3, value)} for value in (0.5, 0.6)]
    assert _loss(Measured(draws=draws[0]), Measured(draws=draws[1]))[0] == pytest.approx(0.1)
    assert tuple(_loss(Measured(outputs={"y": 0.25}), Measured())) == (0.25, 0.25, 0.25)
