"""Faults in the constants of one layer, told from its captured inputs and result alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from nets import NetBuilder
from torch import Tensor

from cp_debug.backends.arithmetic import FP64
from cp_debug.backends.base import Program
from cp_debug.backends.executor import Executor
from cp_debug.bisect.causes import constant_changes, tried_weights
from cp_debug.bisect.causes.constant_changes import constants_of
from cp_debug.bisect.causes.linear_parts import fit
from cp_debug.bisect.causes.search import Explanation, explain
from cp_debug.bisect.causes.segment import Segment, SegmentContext
from cp_debug.graph.graph import Graph
from cp_debug.programs.tensor_change import slice_forms

Layer = tuple[str, list[int], Callable[[NetBuilder], str]]


def _convolution(net: NetBuilder) -> str:
    return net.conv("x", 4, 6, name="y")


def _weights(net: NetBuilder, *shape: int) -> str:
    return net.weight((net.rng.standard_normal(shape) * 0.4).astype(np.float32))


LAYERS: dict[str, Layer] = {
    "Conv": ("y", [1, 4, 12, 12], _convolution),
    "grouped": (
        "y",
        [1, 6, 12, 12],
        lambda net: net.op("Conv", "x", _weights(net, 6, 2, 3, 3), _weights(net, 6), name="y", group=3, pads=[1] * 4),
    ),
    "ConvTranspose": (
        "y",
        [1, 6, 8, 8],
        lambda net: net.op("ConvTranspose", "x", _weights(net, 6, 2, 3, 3), name="y", group=2, strides=[2, 2]),
    ),
    "MatMul": ("y", [40, 8], lambda net: net.op("MatMul", "x", _weights(net, 8, 5), name="y")),
    "Gemm": (
        "y",
        [40, 8],
        lambda net: net.op("Gemm", "x", _weights(net, 5, 8), _weights(net, 5), name="y", transB=1, alpha=0.5),
    ),
    "LayerNormalization": (
        "y",
        [1, 20, 12],
        lambda net: net.op("LayerNormalization", "x", _weights(net, 12), _weights(net, 12), name="y"),
    ),
    "Mul": ("y", [1, 20, 12], lambda net: net.op("Mul", "x", _weights(net, 12), name="y")),
    "one sample": ("y", [1, 8], lambda net: net.op("MatMul", "x", _weights(net, 8, 12), name="y")),
    "LSTM": (
        "y",
        [6, 2, 5],
        lambda net: net.op("LSTM", "x", _weights(net, 1, 16, 5), _weights(net, 1, 16, 4), name="y", hidden_size=4),
    ),
    "GRU": (
        "y",
        [6, 2, 5],
        lambda net: net.op("GRU", "x", _weights(net, 1, 12, 5), _weights(net, 1, 12, 4), name="y", hidden_size=4),
    ),
}


def _segment(folder: Path, layer: str) -> Segment:
    output, shape, make = LAYERS[layer]
    net = NetBuilder(5)
    make(net)
    graph = Graph(net.save(folder / "net.onnx", {"x": (1, shape)}, [output], opset=17))
    given = {"x": torch.randn(shape, generator=torch.Generator().manual_seed(1))}
    context = SegmentContext(Program("net", graph), Executor(graph, FP64), "fp32")
    return Segment(context, graph.nodes, output, given, context.oracle.run(given)[output])


def _changed(found: Segment, change: Callable[[Tensor], Tensor], place: int = 1) -> Segment:
    value = found.edited(found.nodes[-1], inputs={place: change(constants_of(found, found.nodes[-1])[place])})
    assert value is not None
    return Segment(found.context, found.nodes, found.target, found.given, value.float())


def _explained(folder: Path, layer: str, change: Callable[[Tensor], Tensor], place: int = 1) -> Explanation:
    return explain(_changed(_segment(folder, layer), change, place))[0]


def _zero(axis: int, which: int) -> Callable[[Tensor], Tensor]:
    return lambda w: w.index_fill(axis, torch.tensor([which]), 0.0)


def _exchanged(axis: int, i: int, j: int) -> Callable[[Tensor], Tensor]:
    def change(weight: Tensor) -> Tensor:
        order = torch.arange(weight.shape[axis])
        order[[i, j]] = order[[j, i]]
        return weight.index_select(axis, order)

    return change


@pytest.mark.few(5)
@pytest.mark.parametrize(
    ("layer", "change", "cause"),
    [
        ("Conv", _zero(1, 2), "channels-zeroed"),
        ("Conv", _exchanged(1, 0, 3), "weight-layout"),
        ("grouped", _exchanged(0, 1, 4), "weight-layout"),
        ("ConvTranspose", _exchanged(0, 1, 2), "weight-layout"),
        ("ConvTranspose", _zero(0, 3), "channels-zeroed"),
        ("MatMul", _exchanged(0, 2, 6), "weight-layout"),
        ("MatMul", lambda w: w.roll(1, 0), "index-shifted"),
        ("Gemm", _zero(1, 5), "channels-zeroed"),
        ("LayerNormalization", lambda w: w.roll(1), "index-shifted"),
        ("LayerNormalization", lambda w: w.flip(0), "constant-differs"),
        ("Mul", _exchanged(0, 3, 7), "constant-differs"),
        ("one sample", _exchanged(0, 2, 6), "weight-layout"),
        ("one sample", _zero(0, 4), "channels-zeroed"),
        ("LSTM", _exchanged(1, 1, 10), "weight-layout"),
        ("LSTM", _zero(1, 7), "channels-zeroed"),
        ("GRU", _exchanged(1, 0, 9), "weight-layout"),
        ("GRU", lambda w: w.roll(1, 1), "index-shifted"),
    ],
)
def test_what_happened_to_the_weights_is_told(
    tmp_path: Path, layer: str, change: Callable[[Tensor], Tensor], cause: str
) -> None:
    explanation = _explained(tmp_path, layer, change)
    assert explanation.cause is not None
    assert explanation.cause.cause == cause
    assert explanation.explained > 0.999


@pytest.mark.parametrize("layer", ["Mul", "LayerNormalization"])
def test_a_factor_on_a_constant_names_the_constant(tmp_path: Path, layer: str) -> None:
    explanation = _explained(tmp_path, layer, lambda w: w * 1.05)
    assert explanation.cause is not None
    assert explanation.cause.says.replace(":", "") == f"w_0 of {layer} × 1.05"


@pytest.mark.parametrize(("slices", "asked"), [(2, True), (12, False)])
def test_slices_are_tried_where_few_of_the_result_are_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, slices: int, asked: bool
) -> None:
    tried: list[int] = []
    monkeypatch.setattr(tried_weights, "_of_axis", lambda *given: tried.append(given[-1]) or iter(()))
    _explained(tmp_path, "Mul", lambda w: w + 0.1 * (torch.arange(12) < slices))
    assert bool(tried) == asked


@pytest.mark.few(2)
@pytest.mark.parametrize("layer", ["Conv", "grouped", "ConvTranspose", "MatMul", "Gemm"])
def test_weights_without_a_name_are_other_weights_and_predict_the_other_half(tmp_path: Path, layer: str) -> None:
    noise = torch.Generator().manual_seed(3)

    def change(weight: Tensor) -> Tensor:
        return weight + 0.1 * torch.randn(weight.shape, generator=noise, dtype=weight.dtype)

    explanation = _explained(tmp_path, layer, change)
    assert explanation.cause is not None
    assert explanation.cause.cause == "other-weights"
    assert explanation.explained > 0.999


@pytest.mark.parametrize("layer", ["Conv", "grouped", "ConvTranspose", "MatMul", "Gemm"])
def test_the_fit_finds_the_weights_that_were_used(tmp_path: Path, layer: str) -> None:
    def change(weight: Tensor) -> Tensor:
        return 1.5 * weight.flip(0) - 0.1

    found = _changed(_segment(tmp_path, layer), change)
    told = fit(found, found.nodes[-1])
    assert told is not None
    wanted = change(constants_of(found, found.nodes[-1])[1])
    assert torch.allclose(told.tensors[1], wanted, atol=1e-5)
    assert bool((told.deviations[1] < 1e-5).all())


def test_inputs_that_depend_on_each_other_tell_no_weights(tmp_path: Path) -> None:
    found = _segment(tmp_path, "MatMul")
    found.given["x"][:, 3] = found.given["x"][:, 2]  # type: ignore[index]
    again = Segment(found.context, found.nodes, "y", found.given, found.test)
    assert fit(again, again.nodes[-1]) is None


@pytest.mark.few(3)
@pytest.mark.parametrize("layer", list(LAYERS))
def test_an_error_that_no_weights_make_is_unknown(tmp_path: Path, layer: str) -> None:
    found = _segment(tmp_path, layer)
    noise = torch.randn(found.exact.shape, generator=torch.Generator().manual_seed(8), dtype=torch.float64)
    spoilt = Segment(found.context, found.nodes, "y", found.given, (found.exact + 0.1 * noise).float())
    assert explain(spoilt)[0].cause is None


def test_causes_that_explain_as_well_are_told_with_it(tmp_path: Path) -> None:
    net = NetBuilder(5)
    net.op("Gemm", "x", _weights(net, 8, 8), name="y", transB=1)
    graph = Graph(net.save(tmp_path / "net.onnx", {"x": (1, [4, 8])}, ["y"]))
    given = {"x": torch.randn(4, 8, generator=torch.Generator().manual_seed(1))}
    context = SegmentContext(Program("net", graph), Executor(graph, FP64), "fp32")
    found = Segment(context, graph.nodes, "y", given, context.oracle.run(given)["y"])
    explanation = explain(_changed(found, lambda w: w.T))[0]
    assert explanation.cause is not None
    told = {explanation.cause.cause, *(c.cause for c in explanation.equals)}
    assert {"attribute", "weight-layout"} <= told


def test_two_wrong_elements_are_not_explained_by_two_fitted_numbers(tmp_path: Path) -> None:
    found = _segment(tmp_path, "one sample")
    test = found.exact.clone()
    test[0, 3] += 0.3
    test[0, 9] -= 0.2
    explanation = explain(Segment(found.context, found.nodes, "y", found.given, test.float()))[0]
    assert explanation.cause is None


def _alone(folder: Path, x: np.ndarray, make: Callable[[NetBuilder], str]) -> Segment:
    """One layer on the given input, with the exact result as the captured one."""
    net = NetBuilder(5)
    make(net)
    graph = Graph(net.save(folder / "net.onnx", {"x": (1, list(x.shape))}, ["y"], opset=17))
    given = {"x": torch.from_numpy(x.astype(np.float32))}
    context = SegmentContext(Program("net", graph), Executor(graph, FP64), "fp32")
    return Segment(context, graph.nodes, "y", given, context.oracle.run(given)["y"])


@pytest.mark.parametrize(
    ("size", "cause"),
    [
        (1e-9, "fp16-underflow"),
        (1e-39, "fp32-flush"),
        (0.1, "integer-cast"),
        (1.5, "never-written"),
        (30.0, "integer-cast"),
    ],
)
def test_a_result_that_vanishes_is_told_by_its_size(tmp_path: Path, size: float, cause: str) -> None:
    x = np.random.default_rng(0).uniform(-1, 1, (1, 64))
    found = _alone(tmp_path, x, lambda net: net.op("Mul", "x", net.weight(np.float32(1.0)), name="y"))
    tiny = Segment(found.context, found.nodes, "y", {"x": size * found.given["x"].double()}, found.test)
    lost = tiny.exact.trunc() if cause == "integer-cast" else 0 * tiny.exact
    explanation = explain(Segment(found.context, found.nodes, "y", tiny.given, lost))[0]
    assert explanation.cause is not None
    assert explanation.cause.cause == cause
    if size == 0.1:  # nothing tells which of both made it zero
        assert "never-written" in [c.cause for c in explanation.equals]


def test_what_says_more_than_whole_numbers_goes_first(tmp_path: Path) -> None:
    x = np.random.default_rng(0).uniform(-1, 1, (1, 4, 4, 4))
    found = _alone(tmp_path, x, lambda net: net.op("Softmax", "x", axis=2, name="y"))
    ones = found.edited(found.nodes[-1], axis=0)
    assert ones is not None
    explanation = explain(Segment(found.context, found.nodes, "y", found.given, ones))[0]
    assert explanation.cause is not None
    assert explanation.cause.cause == "attribute"
    assert "integer-cast" in [c.cause for c in explanation.equals]


def test_a_constant_that_fp16_makes_zero_is_no_operator_left_out(tmp_path: Path) -> None:
    x = 1e-8 * np.random.default_rng(0).uniform(0, 1, (1, 64))
    found = _alone(tmp_path, x, lambda net: net.op("Add", "x", net.weight(np.float32(1e-8)), name="y"))
    explanation = explain(Segment(found.context, found.nodes, "y", found.given, found.input("x").float()))[0]
    assert explanation.cause is not None
    assert explanation.cause.cause == "fp16-underflow"
    assert "missing-operator" in [c.cause for c in explanation.equals]


def test_a_sign_is_one_thing_that_is_wrong_and_not_two(tmp_path: Path) -> None:
    found = _segment(tmp_path, "LayerNormalization")
    explanation = explain(Segment(found.context, found.nodes, "y", found.given, -found.exact.float()))[0]
    assert explanation.cause is not None
    assert explanation.cause.cause == "scaled"


def test_a_result_that_is_one_constant_is_not_cut_off(tmp_path: Path) -> None:
    found = _segment(tmp_path, "MatMul")
    explanation = explain(Segment(found.context, found.nodes, "y", found.given, torch.full_like(found.exact, -9.0)))[0]
    assert explanation.cause is None or explanation.cause.cause != "saturated"


def test_rows_have_changed_beyond_the_fits_own_uncertainty() -> None:
    change = torch.tensor([[10.0], [4.9], [5.1], [0.0], [0.009]])
    noise = torch.tensor([[1.0], [1.0], [1.0], [1.0], [0.001]])
    assert constant_changes._off(change, noise).tolist() == [True, False, True, False, False]
    assert constant_changes._off(change, noise / 1e6).tolist() == [True, True, True, False, False]


def test_rows_in_another_order_are_each_used_once() -> None:
    rows = torch.eye(3)
    every = torch.tensor([True, True, True])
    found = constant_changes._order(rows, rows[[1, 2, 0]], every)
    assert found is not None
    assert found.tolist() == [1, 2, 0]
    assert constant_changes._order(rows, rows, every) is None
    assert constant_changes._order(rows, rows[[1, 1, 0]], every) is None
    assert constant_changes._order(rows, rows[[1, 0, 2]], torch.tensor([True, False, False])) is None


@pytest.mark.parametrize(
    ("places", "axis", "dims", "says"),
    [
        ([2], 0, 1, "element 2"),
        ([0, 1], 0, 2, "rows 0, 1"),
        ([3], 1, 2, "column 3"),
        ([1], 0, 4, "channel 1"),
        ([1, 2, 3, 4], 1, 4, "input channels 1, 2, 3, 4"),
        ([1, 2, 3, 4, 5], 1, 4, "input channels 1, 2, 3, 4, …"),
        ([7], 2, 4, "slice of axis 2 7"),
    ],
)
def test_places_have_the_names_of_their_axis(places: list[int], axis: int, dims: int, says: str) -> None:
    ours = np.ones((8, 8, 8, 8)[:dims])
    zero = next(iter(slice_forms(ours, ours, axis, np.array(places))))
    assert zero[1] == f"{says} {'is' if len(places) == 1 else 'are'} zero"
    assert (ours != zero[2]).any(tuple(d for d in range(dims) if d != axis)).nonzero()[0].tolist() == places
