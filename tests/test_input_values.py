"""Values made up for one input by what reads it: bounds, pixels, points, indices."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from nets import graph_of
from onnx import TensorProto, helper, numpy_helper

from cp_debug.graph import input_values
from cp_debug.graph.graph import ValueInfo


def tensor(name: str, shape: list[int | str | None], element: int = TensorProto.FLOAT) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, element, shape)


@pytest.mark.parametrize(
    ("maker", "low", "high"),
    [
        (input_values._MADE["positive"], 0.1, np.inf),
        (input_values._MADE["above one"], 1.1, np.inf),
        (input_values._MADE["squeezed"], -1, 1),
        (input_values._uniform(0, 255), 0, 255),
        (input_values._uniform(-0.99, 0.99), -0.99, 0.99),
    ],
    ids=["positive", "above-one", "squeezed", "pixels", "within-one"],
)
def test_made_up_floats_keep_to_their_bounds_and_fill_them(maker: input_values.Maker, low: float, high: float) -> None:
    values = maker(np.random.default_rng(0), (4000,), 7)
    assert values.shape == (4000,)
    assert low <= values.min()
    assert values.max() <= high
    assert values.min() < low + 0.1 * (min(high, 3) - low)
    assert values.max() > (3 if np.isinf(high) else high - 0.1 * (high - low))


def test_made_up_integers_by_hand() -> None:
    rng = np.random.default_rng(0)
    assert set(input_values._MADE["bits"](rng, (64,), 5)) == {0, 1}
    assert set(input_values._below(3)(rng, (64,), 5)) == {0, 1, 2}
    assert set(input_values._below(0)(rng, (8,), 5)) == {0}
    assert set(input_values._MADE["below longest"](rng, (200,), 5)) == {0, 1, 2, 3, 4}
    assert set(input_values._MADE["below longest"](rng, (8,), 0)) == {0}
    assert input_values._MADE["longest"](rng, (2,), 5).tolist() == [5, 5]
    assert input_values._MADE["one free"](rng, (2, 2), 5).tolist() == [[-1, 1], [1, 1]]
    assert input_values._filled(1)(rng, (2,), 5).tolist() == [1, 1]
    normal = input_values._MADE["normal"](rng, (4000,), 5)
    assert abs(normal.mean()) < 0.1
    assert normal.std() == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("axis", [-1, -2])
def test_a_made_up_point_cloud_has_x_y_z_and_others_along_its_axis(axis: int) -> None:
    shape = (500, 5) if axis == -1 else (5, 500)
    cloud = np.moveaxis(input_values._points(axis)(np.random.default_rng(0), shape, 9), axis, -1)
    assert cloud.shape == (500, 5)
    for place, (low, high) in enumerate([(-10, 10), (-10, 10), (-2, 2), (0, 1), (0, 1)]):
        assert low <= cloud[:, place].min() < low + 0.1 * (high - low)
        assert high - 0.1 * (high - low) < cloud[:, place].max() <= high


def value(name: str, *shape: int | str | None) -> ValueInfo:
    return ValueInfo(name, np.dtype(np.float32), shape)


@pytest.mark.parametrize(
    ("given", "axis"),
    [
        (value("points", "n", 3), -1),
        (value("points", "n", 6), -1),
        (value("points", "n", 7), None),
        (value("points", "n", 2), None),
        (value("points", 1, 4, "n"), -2),
        (value("points", 1, 4, 5), -1),
        (value("points", 1, 1, 4, 5), None),
        (value("points", 4), None),
        (value("image", "n", 3), None),
        (ValueInfo("points", np.dtype(np.float32), None), None),
    ],
    ids=str,
)
def test_points_lie_along_the_axis_of_three_to_six(given: ValueInfo, axis: int | None) -> None:
    assert input_values._point_axis(given) == axis


@pytest.mark.parametrize(
    ("shape", "image"),
    [((1, 3, 8, 8), True), ((1, 8, 8, 4), True), ((1, 1, 8, 8), True), ((1, 2, 8, 8), False), ((3, 8, 8), False)],
)
def test_images_have_one_three_or_four_channels(shape: tuple[int, ...], image: bool) -> None:
    assert input_values.looks_like_image(shape) is image
    assert not input_values.looks_like_image(None)


@pytest.mark.parametrize(
    ("op", "factor", "scales"),
    [
        ("Div", 255.0, True),
        ("Div", 16.0, False),
        ("Sub", 127.0, True),
        ("Sub", -127.0, True),
        ("Mul", 1 / 255, True),
        ("Mul", 1 / 16, False),
        ("Mul", 0.0, False),
        ("Mul", 255.0, False),
        ("Add", 255.0, False),
    ],
)
def test_pixels_are_told_by_what_scales_them(tmp_path: Path, op: str, factor: float, scales: bool) -> None:
    weights = [
        numpy_helper.from_array(np.full(shape, factor, np.float32), f"c{len(shape)}") for shape in ((), (3, 1, 1))
    ]
    nodes = [helper.make_node(op, ["x", "c0"], ["a"]), helper.make_node(op, ["x", "c3"], ["b"])]
    nodes += [helper.make_node(op, ["c0", "x"], ["c"]), helper.make_node("Sum", ["a", "b", "c"], ["y"])]
    graph = graph_of(tmp_path, nodes, [tensor("x", [1, 3, 8, 8])], weights)
    assert [input_values._unscaled(graph, node, 0) for node in graph.nodes[:2]] == [scales, scales]
    assert not input_values._unscaled(graph, graph.nodes[2], 1)


def test_an_index_chooses_below_the_size_of_its_axis(tmp_path: Path) -> None:
    table = numpy_helper.from_array(np.zeros((7, 5, 3), np.float32), "t")
    depth = numpy_helper.from_array(np.int64(4), "depth")
    values = numpy_helper.from_array(np.zeros(2, np.float32), "values")
    nodes = [
        helper.make_node("Gather", ["t", "i"], ["a"]),
        helper.make_node("Gather", ["t", "i"], ["b"], axis=1),
        helper.make_node("GatherND", ["t", "i"], ["c"]),
        helper.make_node("OneHot", ["i", "depth", "values"], ["d"]),
        helper.make_node("Gather", ["x", "i"], ["e"]),
        helper.make_node("Shape", ["i"], ["y"]),
    ]
    inputs = [tensor("i", [2], TensorProto.INT64), tensor("x", None)]  # type: ignore[arg-type]
    graph = graph_of(tmp_path, nodes, inputs, [table, depth, values])
    assert [input_values._index_limit(graph, node, 1) for node in graph.nodes[:3]] == [7, 5, 3]
    assert input_values._index_limit(graph, graph.nodes[0], 0) is None
    assert input_values._index_limit(graph, graph.nodes[3], 0) == 4
    assert input_values._index_limit(graph, graph.nodes[4], 1) == 0
    assert input_values._index_limit(graph, graph.nodes[5], 0) is None


def test_the_size_of_an_image_is_its_height_then_its_width(tmp_path: Path) -> None:
    nodes = [helper.make_node("Identity", ["x"], ["y"])]
    graph = graph_of(tmp_path, nodes, [tensor("s", [2]), tensor("x", [1, 3, 8, "w"])])
    assert input_values._image_size(graph)(np.random.default_rng(0), (2, 2), 11).tolist() == [[8, 11], [8, 11]]
