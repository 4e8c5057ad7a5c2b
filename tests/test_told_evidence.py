"""What candidates tell of a layer whose error is known: factors, channels, orders, places, ranges, scales."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from nets import NetBuilder, node_of
from torch import Tensor

from cp_debug.backends.arithmetic import FP64
from cp_debug.backends.base import Program
from cp_debug.backends.executor import Executor
from cp_debug.bisect.causes import (
    affine,
    fitted_weights,
    layout,
    nonfinite,
    quantized,
    ranges,
    single_numbers,
    tried_weights,
)
from cp_debug.bisect.causes.base import Candidate
from cp_debug.bisect.causes.fits import nearest_slices
from cp_debug.bisect.causes.segment import Segment, SegmentContext
from cp_debug.bisect.quantized_segment import QuantizerGrid
from cp_debug.graph.graph import Graph

C, H, W = 6, 20, 24
SHAPE = (1, C, H, W)
X = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)).double()
Change = Callable[[Tensor], Tensor]


def layer(
    folder: Path, op: str, *weights: np.ndarray, x: Tensor = X, claim: str = "fp32", **attributes: Any
) -> Segment:
    """The segment of one node that reads ``x`` and constants ``w_0`` …; its captured result is the exact one."""
    net = NetBuilder()
    net.op(op, "x", *map(net.weight, weights), name="y", **attributes)
    graph = Graph(net.save(folder / "net.onnx", {"x": (1, list(x.shape))}, ["y"]))
    context = SegmentContext(Program("net", graph), Executor(graph, FP64), claim)
    exact = context.oracle.run_nodes(graph.nodes, {"x": x}, ["y"])["y"]
    return Segment(context, graph.nodes, "y", {"x": x}, exact)


def spoilt(found: Segment, test: Tensor) -> Segment:
    return Segment(found.context, found.nodes, found.target, found.given, test)


def told(family: Callable[[Segment], Iterable[Candidate]], found: Segment, cause: str) -> Candidate:
    """The candidate of this name whose value is nearest to the captured result."""
    named = [c for c in family(found) if c.cause == cause]
    assert named, cause
    return min(named, key=lambda c: float((c.value - found.test).abs().nan_to_num(1e30).sum()))


def explains(candidate: Candidate, found: Segment) -> bool:
    return torch.allclose(candidate.value, found.test, rtol=1e-6, atol=1e-9, equal_nan=True)


# Factors and summands -----------------------------------------------------------------------------------------------


def everywhere(found: Segment) -> Iterable[Candidate]:
    return affine.everywhere(found)


@pytest.mark.parametrize(
    ("change", "cause", "says", "evidence"),
    [
        (lambda y: 1.25 * y, "scaled", "the result is multiplied by 1.25", {"factor": 1.25}),
        (lambda y: 0.5 * y, "scaled", "the result is multiplied by 0.5", {"factor": 0.5}),
        (lambda y: -y, "scaled", "the sign of the result is flipped", {"factor": -1.0}),
        (lambda y: y + 0.25, "shifted", "+0.25 is added to the result", {"summand": 0.25}),
        (lambda y: y - 3, "shifted", "-3 is added to the result", {"summand": -3.0}),
        (lambda y: 0.5 * y - 0.25, "affine", "the result is × 0.5 -0.25", {"factor": 0.5}),
    ],
)
def test_a_factor_and_a_summand_are_told_as_they_are(
    tmp_path: Path, change: Change, cause: str, says: str, evidence: dict[str, float]
) -> None:
    exact = layer(tmp_path, "Neg")
    found = spoilt(exact, change(exact.exact))
    candidate = told(everywhere, found, cause)
    assert explains(candidate, found)
    assert candidate.says == says
    assert candidate.evidence == pytest.approx(evidence)


def convolution(folder: Path) -> Segment:
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((5, C, 1, 1)).astype(np.float32)
    return layer(folder, "Conv", weight, np.array([1, -2, 3, 4, -5], np.float32))


def test_the_weights_and_the_bias_have_factors_of_their_own(tmp_path: Path) -> None:
    exact = convolution(tmp_path)
    assert exact.bias is not None
    product = exact.exact - exact.bias
    for value, cause, says, factor in (
        (1.5 * product + exact.bias, "weights-scaled", "the weights are multiplied by 1.5", 1.5),
        (product + 3 * exact.bias, "bias-scaled", "the bias is multiplied by 3", 3.0),
    ):
        found = spoilt(exact, value)
        candidate = told(everywhere, found, cause)
        assert explains(candidate, found)
        assert candidate.says == says
        assert candidate.evidence == {"factor": pytest.approx(factor)}


CHANNEL_CASES: list[tuple[Change, str, str, dict[str, Any]]] = [
    (lambda y: 1.5 * y[:, 3], "channels-scaled", "channel 3 is off in scale", {"channels": [3], "factors": [1.5]}),
    (
        lambda y: y[:, 3] + 2,
        "channels-shifted",
        "channel 3 is off by a constant each",
        {"channels": [3], "summands": [2.0]},
    ),
    (lambda y: 0 * y[:, 3], "channels-zeroed", "channel 3 is zero", {"channels": [3], "factors": [0.0]}),
]


@pytest.mark.parametrize(("change", "cause", "says", "evidence"), CHANNEL_CASES)
def test_channels_that_are_off_are_told_with_their_numbers(
    tmp_path: Path, change: Change, cause: str, says: str, evidence: dict[str, Any]
) -> None:
    exact = layer(tmp_path, "Neg")
    value = exact.exact.clone()
    value[:, 3] = change(exact.exact)
    found = spoilt(exact, value)
    candidate = told(affine.channel_by_channel, found, cause)
    assert explains(candidate, found)
    assert candidate.says == says
    assert candidate.evidence["channels"] == evidence.pop("channels")
    for name, numbers in evidence.items():
        assert candidate.evidence[name] == pytest.approx(numbers, abs=1e-9)


def test_several_channels_each_have_their_factor(tmp_path: Path) -> None:
    exact = layer(tmp_path, "Neg")
    value = exact.exact * torch.tensor([1, 2, 1, 1, 0.25, 1]).reshape(1, -1, 1, 1)
    candidate = told(affine.channel_by_channel, spoilt(exact, value), "channels-scaled")
    assert candidate.says == "2 of 6 channels are off in scale"
    assert candidate.evidence["channels"] == [1, 4]
    assert candidate.evidence["factors"] == pytest.approx([2, 0.25])
    assert candidate.parameters == 2


# Places -------------------------------------------------------------------------------------------------------------

LAYOUTS: list[tuple[Callable[[Segment], Iterable[Candidate]], Change, str, str, dict[str, Any]]] = [
    (layout.turned, lambda y: y.flip(3), "flipped", "axis 3 runs backwards", {}),
    (layout.turned, lambda y: y.flip((1, 2)), "flipped", "axes [1, 2] run backwards", {"axis": [1, 2]}),
    (layout.permuted, lambda y: y[:, [1, 2, 0, 3, 4, 5]], "permuted", "axis 1 is permuted: 0←1, 1←2, 2←0",
     {"axis": 1, "moved": 3, "order": [1, 2, 0, 3, 4, 5], "bijective": True}),
    (layout.permuted, lambda y: y[:, [0, 1, 1, 3, 4, 5]], "permuted", "axis 1 is permuted: 2←1",
     {"axis": 1, "moved": 1, "order": [0, 1, 1, 3, 4, 5], "bijective": False}),
    (layout.permuted, lambda y: y.roll(1, 1), "permuted", "axis 1 is permuted: rolled by 1",
     {"axis": 1, "order": [5, 0, 1, 2, 3, 4]}),
    (layout.permuted, lambda y: y.roll(-2, 1), "permuted", "axis 1 is permuted: rolled by 4",
     {"axis": 1, "order": [2, 3, 4, 5, 0, 1]}),
    (layout.permuted, lambda y: y[:, [0, 2, 4, 1, 3, 5]], "permuted",
     "axis 1 is permuted: 3 × 2 slices are read as 2 × 3", {"moved": 4}),
    (layout.shifted, lambda y: y.roll((1, -2), (2, 3)), "spatial-shift",
     "the map is shifted by [1, -2] cells along axes [-2, -1]", {"shift": [1, -2], "axes": [-2, -1]}),
    (layout.cut_off, lambda y: torch.cat([y[:, :, :15], 0 * y[:, :, 15:]], 2), "truncated",
     "axis 2 is truncated after 15 of 20", {"axis": 2, "kept": 15}),
    (layout.cut_off, lambda y: 0 * y, "never-written", "the tensor is all zero: nothing wrote it", {}),
    (layout.turned, lambda y: y.permute(0, 2, 1, 3).reshape(y.shape), "transposed",
     "axes in the order [0, 2, 1, 3], read in the old shape", {"axes": [0, 2, 1, 3]}),
    (layout.turned, lambda y: y.reshape(1, H, W, C).permute(0, 3, 1, 2), "transposed",
     "read with its axes in the order [0, 2, 3, 1]", {"axes": [0, 2, 3, 1]}),
]  # fmt: skip


@pytest.mark.parametrize(("family", "change", "cause", "says", "evidence"), LAYOUTS)
def test_numbers_in_the_wrong_places_are_told_with_the_right_ones(
    tmp_path: Path,
    family: Callable[[Segment], Iterable[Candidate]],
    change: Change,
    cause: str,
    says: str,
    evidence: dict[str, Any],
) -> None:
    exact = layer(tmp_path, "Neg")
    found = spoilt(exact, change(exact.exact))
    candidate = told(family, found, cause)
    if cause != "spatial-shift":  # the border that is laid bare is not told
        assert explains(candidate, found)
    assert candidate.says == says
    assert candidate.evidence.items() >= evidence.items()


def test_single_wrong_elements_are_told_by_their_places(tmp_path: Path) -> None:
    exact = layer(tmp_path, "Neg")
    value = exact.exact.clone()
    value[0, 2, 3, 4] += 5
    value[0, 5, 19, 0] -= 7
    found = spoilt(exact, value)
    by_count = {len(c.evidence["elements"]): c for c in layout.isolated(found)}
    assert by_count[2].evidence["elements"] == [[0, 5, 19, 0], [0, 2, 3, 4]]
    assert by_count[2].says == "2 elements are wrong, all others are right"
    assert by_count[1].says == "1 element is wrong, all others are right"
    assert explains(by_count[2], found)
    assert not explains(by_count[1], found)


# Ranges -------------------------------------------------------------------------------------------------------------


def test_shares_of_a_tensor_that_fp16_cannot_hold_are_of_its_numbers_that_are_not_zero() -> None:
    numbers = [0.0, math.inf, 1.0, -65504.0, 65519.0, -65520.0, 2.0**-25, -(2.0**-24), 2.0**-15, 2.0**-14]
    found = ranges.half_figures(torch.tensor(numbers).double())
    assert found == {
        "largest": 65520.0,
        "overflows": pytest.approx(1 / 8),
        "vanishes": pytest.approx(1 / 8),
        "subnormal": pytest.approx(2 / 8),
    }
    assert ranges.half_figures(torch.zeros(3)) == {"largest": 0, "overflows": 0, "vanishes": 0, "subnormal": 0}


def test_a_cut_is_told_with_its_bound_and_how_much_it_cuts(tmp_path: Path) -> None:
    exact = layer(tmp_path, "Neg")
    found = spoilt(exact, exact.exact.clamp(max=1.5))
    candidate = told(ranges.saturated, found, "saturated")
    assert explains(candidate, found)
    assert candidate.evidence["high"] == 1.5
    assert candidate.evidence["low"] == -math.inf
    assert candidate.evidence["share"] == pytest.approx(float((exact.exact > 1.5).double().mean()))


def test_the_first_number_that_is_not_finite_is_told_with_its_operands(tmp_path: Path) -> None:
    weight = np.linspace(2, 5, H * W, dtype=np.float32).reshape(H, W)
    exact = layer(tmp_path, "Div", weight)
    value = exact.exact.clone()
    value[0, 4, 1, 2] = math.nan
    value[0, 5, 0, 0] = math.inf
    found = nonfinite.operands(spoilt(exact, value))
    assert found["born"] == 2
    assert found["first"] == [0, 4, 1, 2]
    assert math.isnan(found["value"])
    assert found["oracle"] == float(exact.exact[0, 4, 1, 2])
    assert found["operand x"] == float(X[0, 4, 1, 2])
    reduced = layer(tmp_path, "ReduceSum", np.array([1], np.int64))
    wrong = torch.full_like(reduced.exact, math.inf)
    assert nonfinite.operands(spoilt(reduced, wrong))["range of x"] == [float(X.min()), float(X.max())]


# INT8 ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("step", "cause", "says"),
    [
        (4 / 127, "int8", "the result is quantized to INT8 with scale 0.0315"),
        (1 / 127, "int8-clipped", "INT8 scale 0.00787 clips beyond ±1"),
        (16 / 127, "int8-coarse", "INT8 scale 0.126 is 4.0 times too coarse"),
    ],
)
def test_a_grid_is_told_by_its_step_and_what_is_wrong_with_it(
    tmp_path: Path, step: float, cause: str, says: str
) -> None:
    x = X.clamp(-4, 4)
    x[0, 0, 0, 0] = 4.0
    exact = layer(tmp_path, "Neg", x=x)
    found = spoilt(exact, (exact.exact / step).round().clamp(-128, 127) * step)
    candidate = told(quantized.on_a_grid, found, cause)
    assert explains(candidate, found)
    assert candidate.says == says
    assert candidate.evidence["scale"] == pytest.approx(step)
    assert candidate.evidence["needed_scale"] == pytest.approx(4 / 127)
    assert ("percentile" in candidate.fix) == (cause == "int8-clipped")  # a higher one makes a coarse scale coarser
    levels = (exact.exact / step).round()
    low, high = candidate.evidence["levels"]
    assert candidate.evidence["clipped"] == pytest.approx(float(((levels < low) | (levels > high)).double().mean()))


def test_weights_in_int8_have_a_scale_for_each_output_channel_of_their_operator(tmp_path: Path) -> None:
    """Of a Gemm, the columns; with transB, the rows."""
    matrix = (np.random.default_rng(0).standard_normal((8, 5)) * np.array([1, 10, 0.1, 3, 7])).astype(np.float32)
    x = torch.randn(64, 8, generator=torch.Generator().manual_seed(1)).double()
    step = np.abs(matrix).max(axis=0) / 127
    rounded = torch.from_numpy((np.round(matrix / step) * step).astype(np.float64))
    for op, weight, attributes in (
        ("MatMul", matrix, {}),
        ("Gemm", matrix, {}),
        ("Gemm", matrix.T.copy(), {"transB": 1}),
    ):
        exact = layer(tmp_path, op, weight, x=x, **attributes)
        found = spoilt(exact, x @ rounded)
        candidate = told(tried_weights.otherwise, found, "int8-weights")
        assert torch.allclose(candidate.value, found.test, rtol=1e-4, atol=1e-4), op


@pytest.mark.parametrize(
    ("worst", "step", "needed", "clipped", "name", "words"),
    [
        (
            "clipped",
            0.01,
            0.04,
            0.25,
            "int8-clipped",
            ("reaches 5.08", "scale 0.01 ends at ±1.27", "25% is clipped"),
        ),
        ("rounded", 0.09, 0.04, 0.0, "int8-coarse", ("scale 0.09 of its input is 2.2 times too coarse",)),
        ("rounded", 0.07, 0.04, 0.0, "int8", ("quantized to INT8 with scale 0.07",)),
    ],
)
def test_a_scale_is_told_beside_the_one_that_is_needed(
    worst: str, step: float, needed: float, clipped: float, name: str, words: tuple[str, ...]
) -> None:
    evidence = {"scale": step, "needed_scale": needed, "clipped": clipped, "lost": 0.1}
    data = torch.tensor([-needed * 127, 1.0])
    found, says, _ = quantized._of_data(worst, data, QuantizerGrid.symmetric(step * 127), evidence, "input")
    assert found == name
    assert all(word in says for word in words), says


def test_a_scale_that_makes_most_of_its_input_0_is_too_coarse() -> None:
    grid = QuantizerGrid.symmetric(0.07 * 127)
    evidence = {"scale": 0.07, "needed_scale": 0.04, "clipped": 0.0, "lost": 0.9}
    found, says, fix = quantized._of_data("rounded", torch.zeros(1), grid, evidence, "input")
    assert found == "int8-coarse"
    assert "scale 0.07 of its input turns 90% of it into 0" in says
    assert "leave it unquantized" in fix


# Numbers and constants ----------------------------------------------------------------------------------------------


def test_another_attribute_is_told_with_both_numbers(tmp_path: Path) -> None:
    exact = layer(tmp_path, "Celu", alpha=1.0)
    found = spoilt(exact, torch.nn.functional.celu(X, 1.5))
    candidate = told(single_numbers.searched, found, "attribute")
    assert candidate.says == "Celu: alpha is 1.5 instead of 1"
    assert candidate.evidence == {"alpha": pytest.approx(1.5, rel=1e-4), "instead_of": 1.0}


def test_another_constant_is_told_with_both_numbers(tmp_path: Path) -> None:
    exact = layer(tmp_path, "Max", np.array(0.5, np.float32))
    found = spoilt(exact, X.clamp(min=0.75))
    candidate = told(single_numbers.searched, found, "constant-differs")
    assert candidate.says == "the constant w_0 of Max is 0.75 instead of 0.5"
    assert candidate.evidence == {"constant": "w_0", "value": pytest.approx(0.75, rel=1e-4), "instead_of": 0.5}


def test_a_factor_on_a_constant_is_told(tmp_path: Path) -> None:
    slopes = np.array([0.1, 0.2, 0.3, 0.4, 0.5, 0.6], np.float32).reshape(C, 1, 1)
    exact = layer(tmp_path, "PRelu", slopes)
    found = spoilt(exact, torch.where(X > 0, X, 2.5 * torch.from_numpy(slopes).double() * X))
    candidate = told(tried_weights.times, found, "constant-differs")
    assert candidate.says == "w_0 of PRelu: × 2.5"
    assert candidate.evidence["factor"] == pytest.approx(2.5, rel=1e-5)


def test_weights_of_another_layer_are_told_by_both_names(tmp_path: Path) -> None:
    rng, net = np.random.default_rng(0), NetBuilder()
    own, other = (rng.standard_normal((24, 5)).astype(np.float32) for _ in "ab")
    net.op("MatMul", "x", net.weight(own, "own"), name="y")
    net.op("MatMul", "x", net.weight(other, "other"), name="z")
    graph = Graph(net.save(tmp_path / "net.onnx", {"x": (1, list(SHAPE))}, ["y", "z"]))
    context = SegmentContext(Program("net", graph), Executor(graph, FP64), "fp32")
    found = Segment(context, graph.nodes[:1], "y", {"x": X}, X @ torch.from_numpy(other).double())
    candidate = told(tried_weights.otherwise, found, "weights-of-another-layer")
    assert explains(candidate, found)
    assert candidate.says == "the weights of MatMul: those of another layer (other instead of own)"
    assert candidate.evidence == {"constant": "own", "change": "another", "of": "other"}


@pytest.mark.parametrize("number", [0.0, 1.0])
@pytest.mark.parametrize("family", [tried_weights.otherwise, fitted_weights.fitted])
def test_zeros_and_ones_are_not_the_weights_of_another_layer(
    tmp_path: Path, number: float, family: Callable[[Segment], Iterable[Candidate]]
) -> None:
    rng, net = np.random.default_rng(0), NetBuilder()
    own, plain = rng.standard_normal((24, 5)).astype(np.float32), np.full((24, 5), number, np.float32)
    net.op("MatMul", "x", net.weight(own, "own"), name="y")
    net.op("MatMul", "x", net.weight(plain, "plain"), name="z")
    graph = Graph(net.save(tmp_path / "net.onnx", {"x": (1, list(SHAPE))}, ["y", "z"]))
    context = SegmentContext(Program("net", graph), Executor(graph, FP64), "fp32")
    found = Segment(context, graph.nodes[:1], "y", {"x": X}, X @ torch.from_numpy(plain).double())
    assert not [c for c in family(found) if c.evidence.get("of") == "plain"]


def test_exchanged_channels_of_a_weight_are_told_in_the_direction_of_the_copy(tmp_path: Path) -> None:
    weight = np.random.default_rng(0).standard_normal((24, 5)).astype(np.float32)
    x = X.reshape(-1, 24)
    bias = torch.arange(1.0, 6.0).double()
    exact = layer(tmp_path, "Gemm", weight, bias.float().numpy(), x=x)
    for order, says in (
        ([0, 2, 3, 1, 4], "output channels of the weight are exchanged: 1←2, 2←3, 3←1"),
        ([0, 1, 2, 0, 4], "output channels of the weight hold those of others: 3←0"),
    ):
        found = spoilt(exact, x @ torch.from_numpy(weight[:, order]).double() + bias)
        candidate = told(layout.permuted, found, "weight-layout")
        assert explains(candidate, found)
        assert candidate.says == says


@pytest.mark.parametrize(
    ("order", "says"),
    [
        ([1, 2, 3, 4, 0], "rolled by 4"),
        ([4, 0, 1, 2, 3], "rolled by 1"),
        ([1, 2, 3, 0], ""),
        ([0, 2, 4, 1, 3, 5], "3 × 2 slices are read as 2 × 3"),
        ([0, 3, 1, 4, 2, 5], "2 × 3 slices are read as 3 × 2"),
        ([0, 2, 1, 3], "2 × 2 slices are read as 2 × 2"),
        ([1, 0, 2, 3, 4], ""),
    ],
)
def test_an_order_in_words(order: list[int], says: str) -> None:
    assert layout._rule(order) == says


def test_slices_go_to_the_nearest_and_stay_where_nothing_is_nearer() -> None:
    exact = torch.tensor([[1.0, 0], [0, 1], [1, 0]])
    test = torch.tensor([[0.0, 1], [0.9, 0], [1, 0]])
    assert nearest_slices(exact, test).tolist() == [1, 0, 2]


@pytest.mark.parametrize(("factor", "same"), [(1.0, True), (1.099, True), (1.11, False)])
def test_a_value_is_the_same_within_a_tenth(factor: float, same: bool) -> None:
    segment: Any = SimpleNamespace(exact=torch.tensor([3.0, 4.0]))
    assert layout._same(factor * segment.exact, segment) is same


def test_what_is_wrong_with_int8_scales_of_weights() -> None:
    conv, weight = node_of("Conv", ["x", "w"]), torch.zeros(6, 4, 3, 3)

    def told(scale: list[float], axis: int) -> str:
        grid: Any = SimpleNamespace(scale=torch.tensor(scale), axis=axis)
        return quantized._of_weight(conv, weight, grid)[0]

    assert told([1.0], 1) == "int8-per-tensor"
    assert told([1.0, 2.0], 1) == "int8-axis"
    assert told([1.0, 2.0], 0) == "int8-weights"
    assert quantized._of_weight(conv, weight, None)[0] == "int8-weights"
    assert "along axis 0" in quantized._of_weight(conv, weight, SimpleNamespace(scale=torch.ones(2), axis=1))[2]  # type: ignore[arg-type]


@pytest.mark.parametrize(("largest", "found"), [(1e-8, True), (2.0**-126, True), (2.0**-127, False), (1e-4, False)])
def test_a_result_below_all_of_fp16_vanishes(largest: float, found: bool) -> None:
    segment: Any = SimpleNamespace(exact=torch.tensor([largest, largest / 2], dtype=torch.float64), nodes=[])
    assert [c.cause for c in ranges._undeclared(segment)] == ["fp16-underflow"] * found
