"""Scales are those that the definitions give, from whatever batches come."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nets import NetBuilder
from torch import Tensor, nn

from cp_debug.errors import InputError
from cp_debug.graph.graph import Graph
from cp_debug.graph.scales import QMAX, Scales
from cp_debug.quantization.calibration import BATCHES, CalibrationManager, OutputErrors, _frozen
from cp_debug.quantization.histogram import (
    METHODS,
    Histogram,
    _least_squares,
    _without_spikes,
    check_method,
    weight_amax,
)
from cp_debug.quantization.onnx_ptq import DataRanges
from cp_debug.quantization.ptq import apply_scales


def rounded(x: Tensor, amax: float) -> Tensor:
    scale = amax / QMAX
    return (x / scale).round().clamp(-QMAX - 1, QMAX) * scale


def histogram(*tensors: Tensor) -> Histogram:
    made = Histogram()
    for tensor in tensors:
        made.add(tensor)
    return made


@settings(max_examples=30, deadline=None)
@given(
    scales=st.lists(st.sampled_from([0.0, 1e-6, 0.3, 1.0, 40.0, 1e4]), min_size=1, max_size=5), seed=st.integers(0, 99)
)
def test_the_range_grows_and_nothing_is_lost(scales, seed) -> None:
    generator = torch.Generator().manual_seed(seed)
    batches = [torch.randn(2000, generator=generator) * scale for scale in scales]
    made, everything = histogram(*batches), torch.cat(batches).abs()
    assert made.counts.sum() == everything.numel()
    if not everything.any():
        assert {made.amax(method) for method in METHODS} == {1.0}
        return
    assert made.amax("max") == everything.max()
    width = made.limit / len(made.counts)
    found = made.amax("percentile", 90.0)
    assert (everything <= found).float().mean() >= 0.9 - 1e-3
    assert (everything < found - 2 * width).float().mean() <= 0.9 + 1e-3
    assert all(0 < made.amax(method) <= everything.max() for method in METHODS)


def test_mse_of_a_tensor_is_the_least() -> None:
    x = torch.randn(50_000, generator=torch.Generator().manual_seed(0)) ** 3

    def error(amax: float) -> float:
        return float((rounded(x, amax) - x).square().sum())

    least = min(error(float(x.abs().max()) * share) for share in np.linspace(0.02, 1, 300))
    assert error(histogram(x).amax("mse")) <= 1.02 * least


def test_entropy_clips_a_long_tail_but_not_a_box() -> None:
    box = torch.rand(100_000, generator=torch.Generator().manual_seed(0))  # even spacing hides coarse steps
    assert histogram(box).amax("entropy") > 0.95
    # Not of a box: coarse levels are as even as fine ones there, and 11 of 40 seeds are not clipped.
    for seed in range(3):
        bell = torch.randn(100_000, generator=torch.Generator().manual_seed(seed))
        assert 3 < histogram(torch.cat((bell, torch.tensor([50.0])))).amax("entropy") < 10  # 3.9 to 5.3 of 40 seeds


@pytest.mark.filterwarnings("error")
def test_entropy_where_nothing_is_small() -> None:
    assert histogram(torch.linspace(2, 3, 5000)).amax("entropy") > 2


@pytest.mark.parametrize("constants", [[], [0.0], [0.31, 0.9, 1.7]])
@pytest.mark.parametrize("count", [300, 100_000])
def test_entropy_clips_little_whatever_is_constant_and_however_few_there_are(constants, count) -> None:
    values = torch.randn(count, generator=torch.Generator().manual_seed(0))
    x = torch.cat([values, *(torch.full((count,), constant) for constant in constants)])
    assert float((values.abs() > histogram(x).amax("entropy")).float().mean()) < 0.005


def test_counts_do_not_saturate() -> None:
    zeros = torch.zeros(2**24 + 100)
    assert histogram(zeros, torch.ones(1)).counts[0] == 2**24 + 100


@pytest.mark.parametrize(("value", "word"), [(float("nan"), "NaN"), (float("inf"), "Inf")])
def test_histograms_refuse_what_is_no_number(value: float, word: str) -> None:
    with pytest.raises(ValueError, match=word):
        histogram(torch.tensor([1.0, value]))


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("method", METHODS)
def test_weights_have_a_scale_for_each_output_channel(axis: int, method: str) -> None:
    weight = torch.randn(3, 5, 3, 3, generator=torch.Generator().manual_seed(0))
    weight.select(axis, 1).zero_()
    found = weight_amax(weight, axis, method)
    rows = weight.movedim(axis, 0).flatten(1)
    largest = rows.abs().amax(dim=1)
    assert found.shape == (weight.shape[axis],)
    assert found[1] == largest.max()  # zeros are exact at any scale
    if method != "mse":
        assert torch.equal(found[[0, 2]], largest[[0, 2]])
    else:
        for row, amax, top in zip(rows, found.tolist(), largest.tolist(), strict=True):
            assert (rounded(row, amax) - row).norm() <= (rounded(row, top or 1.0) - row).norm()


class Spread(nn.Module):
    """A linear layer whose first input is large and hardly counts."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 4)
        with torch.no_grad():
            self.layer.weight[:, 0] = 1e-4

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def test_mse_is_the_least_at_the_outputs() -> None:
    torch.manual_seed(0)
    module = Spread().eval()
    batches = [torch.randn(256, 8) * torch.tensor([100.0, *[1.0] * 7]) for _ in range(8)]
    everything = torch.cat(batches)

    def error(amax: float) -> float:
        with torch.no_grad():
            return float((module(rounded(everything, amax)) - module(everything)).square().sum())

    scales = {m: CalibrationManager(module, method=m).calibrate(batches).layers["layer"].input for m in METHODS}
    least = min(error(float(everything.abs().max()) * share) for share in np.geomspace(0.005, 1, 300))
    assert error(scales["mse"]) <= 2 * least  # 32 random vectors over the outputs tell it no better
    assert all(error(scales["mse"]) < 0.5 * error(scales[m]) for m in ("max", "percentile"))


class Undifferentiable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            return self.layer(x).argmax(dim=1)


def test_mse_without_derivatives_is_that_of_the_tensor() -> None:
    x = torch.randn(64, 8)
    found = CalibrationManager(Undifferentiable().eval(), method="mse").calibrate([x])
    assert found.layers["layer"].input == pytest.approx(histogram(x).amax("mse"))


def test_calibration_leaves_the_module_alone() -> None:
    module = Spread().eval()
    manager = CalibrationManager(module, method="mse")
    manager.calibrate([torch.randn(3, 8)])
    assert all(p.requires_grad and p.grad is None for p in module.parameters())
    assert not module.layer._forward_pre_hooks
    assert not manager.run(torch.randn(3, 8))["output"].requires_grad


class ByName(Spread):
    def forward(self, x: Tensor) -> Tensor:
        return self.layer(input=x)


@pytest.mark.parametrize("method", ["max", "mse"])
def test_layers_that_are_called_by_name(method: str) -> None:
    x = torch.randn(16, 8)
    found = [CalibrationManager(kind().eval(), method=method).calibrate([x]).layers for kind in (Spread, ByName)]
    assert found[0].keys() == found[1].keys() == {"layer"}


def test_batches_come_as_tensors_tuples_and_by_name() -> None:
    module = Spread().eval()
    x = torch.randn(3, 8)
    managers = [CalibrationManager(module, method="max") for _ in range(3)]
    batches = (x, (x,), {"x": x})
    found = [m.calibrate([batch]).layers["layer"].input for m, batch in zip(managers, batches, strict=True)]
    assert found == [x.abs().max().item()] * 3
    with pytest.raises(InputError, match="batch 0: missing a required argument: 'x'"):
        CalibrationManager(module).calibrate([{"y": x}])


@pytest.mark.parametrize(("value", "word"), [(float("nan"), "NaN"), (float("inf"), "Inf")])
def test_what_is_wrong_with_which_batch(value: float, word: str) -> None:
    good = torch.randn(2, 8)
    bad = good.clone()
    bad[1, 3] = value
    with pytest.raises(InputError, match=rf"batch 1: the input 'x' holds {word}"):
        CalibrationManager(Spread().eval()).calibrate([good, bad])


def test_overflow_inside_of_the_network_is_told_apart() -> None:
    module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)).eval()
    with torch.no_grad():
        module[0].weight.fill_(3e38)
    with pytest.raises(InputError, match=r"batch 0: what net\.1 reads holds Inf, its inputs do not"):
        CalibrationManager(module, prefix="net").calibrate([torch.full((1, 2), 100.0)])


def test_no_batches_no_method_no_layer() -> None:
    module = Spread().eval()
    with pytest.raises(InputError, match="no calibration data"):
        CalibrationManager(module).calibrate([])
    with pytest.raises(InputError, match="'least' is unknown; expected one of max, percentile, mse, entropy"):
        CalibrationManager(module, method="least")
    with pytest.raises(InputError, match=r"no layer matches 'net.lawyer'; the nearest names are net.layer"):
        CalibrationManager(module, skip_layers=["net.lawyer"], prefix="net")


def test_a_cache_belongs_to_its_model(tmp_path: Path) -> None:
    module = Spread().eval()
    manager = CalibrationManager(module, method="percentile", prefix="part")
    scales = manager.calibrate([torch.randn(3, 8)])
    scales.save(tmp_path / "cache")
    found = Scales.load(tmp_path / "cache")
    assert (found.model, found.method, found.layers.keys()) == (scales.model, "percentile", {"part.layer"})
    assert found.layers["part.layer"].input == pytest.approx(scales.layers["part.layer"].input)
    assert np.array_equal(found.layers["part.layer"].weight, scales.layers["part.layer"].weight)
    with torch.no_grad():
        module.layer.weight += 1
    with pytest.raises(InputError, match="these scales were calibrated on other weights"):
        apply_scales(module, found, "part")


@pytest.mark.slow
def test_what_was_compiled_is_calibrated_as_it_is_written() -> None:
    """A compiler would take the watchers, too, for seconds, and warn of each."""
    compiled: list[object] = []

    def backend(graph: torch.fx.GraphModule, inputs: object) -> object:
        compiled.append(graph)
        return graph.forward

    net = nn.Sequential(torch.compile(nn.Linear(4, 6), backend=backend), nn.ReLU(), nn.Linear(6, 2)).eval()
    assert "2" in CalibrationManager(net).calibrate([torch.ones(2, 4)]).layers
    assert not compiled


def test_a_percentile_ends_the_bin_that_it_falls_into() -> None:
    values = torch.arange(100) + 0.5
    made = histogram(values[:60], values[60:], values[:10])  # a smaller batch at the end takes nothing away
    width = made.limit / len(made.counts)
    for percentile, expected in ((50.0, 44.5), (9.0, 4.5), (99.99, 99.5)):  # the least 10 of 110 count twice
        assert expected <= made.amax("percentile", percentile) <= expected + width
    assert made.amax("max") == 99.5


@pytest.mark.parametrize("axis", [0, 1])
def test_a_weights_limit_is_the_best_of_those_down_to_a_third(axis: int) -> None:
    rows = torch.randn(3, 400, generator=torch.Generator().manual_seed(0))
    rows[:, 0] = torch.tensor([3.0, 6.0, 12.0])  # what is best lies at 0.35 to 1 of the largest
    found = weight_amax(rows if axis == 0 else rows.T.contiguous(), axis, "mse")
    for row, amax in zip(rows, found.tolist(), strict=True):
        limits = [float(row.abs().max()) * share for share in torch.linspace(0.3, 1, 128).tolist()]
        least = min(float((rounded(row, limit) - row).square().sum()) for limit in limits)
        assert float((rounded(row, amax) - row).square().sum()) == pytest.approx(least, rel=1e-4)


def limit_for(weights: list[list[float]], x: list[float]) -> float:
    """The limit with the least error at outputs that are ``x`` times each of ``weights``."""
    errors = OutputErrors()
    watched = errors.watch("layer", torch.tensor(x))
    assert errors.differentiate([watched * torch.tensor(weight) for weight in weights])
    found = errors.amax("layer", max(map(abs, x)))
    assert found is not None
    return found


def test_every_output_counts_alike_and_zeros_cost_nothing() -> None:
    x, small = [0.9, -0.37, 0.61, 100.0], [1.0, 1.0, 1.0, 0.0]
    limits = [limit_for([small, [0.0, 0.0, 0.0, factor]], x) for factor in (1e-3, 1.0, 1e3)]
    assert limits == pytest.approx([limits[1]] * 3)
    assert limit_for([[0.0, 1.0, 1.0, 1.0]], [0.0, 0.9, -0.37, 0.61]) == pytest.approx(
        limit_for([[1e6, 1.0, 1.0, 1.0]], [0.0, 0.9, -0.37, 0.61])
    )


class Watching(Spread):
    """Notes whether its outputs could be differentiated."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[bool] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(torch.is_grad_enabled())
        return super().forward(x)


def test_gradients_are_taken_of_the_first_batches() -> None:
    module = Watching().eval()
    manager = CalibrationManager(module, method="mse")
    manager.calibrate([torch.randn(1, 8)] * (BATCHES + 2))
    # The first call, which looks for additions, leaves no trace.
    assert module.seen == [True] * BATCHES + [False] * 2
    assert manager.batches == BATCHES + 2


def test_least_squares_take_the_limit_that_costs_least() -> None:
    rng = np.random.default_rng(0)
    values = np.abs(rng.standard_normal(20_000))
    values[0] = 40
    counts, edges = np.histogram(values, bins=4096, range=(0, 40))
    limit = _least_squares(counts, (edges[1:] + edges[:-1]) / 2, 40.0)

    def error(limit: float) -> float:
        scale = limit / 127
        return float(((np.clip(np.round(values / scale), 0, 127) * scale - values) ** 2).sum())

    tried = 40 * np.arange(1, 129) / 128
    assert error(limit) <= 1.02 * min(map(error, tried))
    assert limit == pytest.approx(tried[np.abs(tried - limit).argmin()])


def test_single_high_bins_are_cut_to_what_stands_beside_them() -> None:
    bins = np.full(40, 5.0)
    bins[20] = 900
    bins[30:38] = 50
    cut = _without_spikes(bins)
    assert cut[20] == 5
    assert cut[30:37].tolist() == [50] * 7
    assert _without_spikes(np.zeros(20)).tolist() == [0] * 20
    lonely = np.zeros(20)
    lonely[9] = 7
    assert _without_spikes(lonely)[9] == 1


def test_parameters_are_frozen_for_a_while_and_only_those_that_were_not() -> None:
    net = nn.Linear(2, 2)
    net.bias.requires_grad_(False)
    with _frozen(net):
        assert not net.weight.requires_grad
    assert net.weight.requires_grad
    assert not net.bias.requires_grad


def test_a_layers_range_is_that_of_what_it_reads_first(tmp_path: Path) -> None:
    net = NetBuilder()
    net.op("MatMul", net.op("MatMul", "x", net.weight(np.eye(2, dtype=np.float32)), name="mid"), "w_0", name="y")
    graph = Graph(net.save(tmp_path / "n.onnx", {"x": (1, [1, 2])}, ["y"]))
    ranges = DataRanges(graph, graph.nodes)
    assert ranges.watched == {"x", "mid"}
    with pytest.raises(InputError, match="there is no calibration data"):
        ranges.amax("max")
    for x, mid in (([1.0, -3.0], [0.5, 0.25]), ([2.0, 2.5], [-0.75, 0.0])):
        ranges.see("x", np.float32([x]))
        ranges.see("mid", torch.tensor([mid]))
        ranges.see("y", np.float32([[np.nan, 1]]))  # nobody reads it
    assert ranges.amax("max") == {"node_mid": 3.0, "node_y": 0.75}
    with pytest.raises(InputError, match="'x' holds NaN during calibration"):
        ranges.see("x", np.float32([[np.nan, 1]]))
    assert DataRanges(graph, []).amax("max") == {}


def test_every_method_gives_a_limit_within_the_range() -> None:
    histogram = Histogram()
    assert [histogram.amax(method) for method in METHODS] == [1.0] * len(METHODS)  # zeros, or nothing at all
    histogram.add(torch.cat((torch.linspace(-1, 1, 20001), torch.tensor([8.0]))))
    limits = {method: histogram.amax(method) for method in METHODS}
    assert limits["max"] == 8.0
    assert 0.99 <= limits["percentile"] <= 1.01
    assert 0.5 < limits["mse"] < 8.0
    assert all(0 < limit <= 8.0 for limit in limits.values())
    check_method("mse")
    with pytest.raises(InputError, match="recipe: 'best' is unknown; expected one of max, percentile, mse, entropy"):
        check_method("best", "recipe")


@pytest.mark.parametrize("axis", [0, 1])
def test_a_channel_of_zeros_has_the_largest_scale(axis: int) -> None:
    weight = torch.tensor([[1.0, -4.0, 2.0], [0.0, 0.0, 0.0]])
    found = weight_amax(weight if axis == 0 else weight.T, axis, "max")
    assert found.tolist() == [4.0, 4.0]
    assert weight_amax(torch.zeros(2, 3), 0, "mse").tolist() == [1.0, 1.0]


def test_the_entropy_of_a_pooled_vector_clips_nothing() -> None:
    """200 numbers in 4096 bins stand alone: no distribution, by which a limit could be chosen."""
    histogram = Histogram()
    histogram.add(torch.rand(1, 200, 1, 1, generator=torch.Generator().manual_seed(0)) + 0.3)
    assert histogram.amax("entropy") == histogram.amax("max") == histogram.largest


@pytest.mark.parametrize("size", [1.0, 1e-6])
def test_a_weights_limit_has_no_larger_squared_error_than_clipping_nothing(size: float) -> None:
    """A trained network has channels of nearly 0 beside others: these are not clipped more than those."""
    rows = size * torch.randn(3, 999, generator=torch.Generator().manual_seed(0))

    def error(limit: Tensor) -> Tensor:
        scale = limit[:, None] / 127
        return ((rows / scale).round().clamp(-128, 127) * scale - rows).square().sum(1)

    assert bool((error(weight_amax(rows, 0, "mse")) < error(rows.abs().amax(1))).all())


def test_the_limit_is_chosen_by_what_reaches_the_outputs() -> None:
    # The large element is multiplied by 0 further on: clipping it costs nothing, so that the others get finer steps.
    x, weight = torch.tensor([0.9, -0.37, 0.61, 100.0]), torch.tensor([1.0, 1.0, 1.0, 0.0])
    for weights, low, high in ((weight, 0.0, 10.0), (torch.ones(4), 90.0, 100.0)):
        errors = OutputErrors()
        output = (errors.watch("layer", x) * weights).square()
        assert errors.differentiate([output])
        found = errors.amax("layer", 100.0)
        assert found is not None
        assert low < found <= high
    assert errors.amax("another", 1.0) is None
    assert not OutputErrors().differentiate([torch.ones(2)])
