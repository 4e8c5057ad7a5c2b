"""Small parts of graphs, with results worked out by hand: made-up values, types in words, shapes, names, loops."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from cp_debug.errors import InputError
from cp_debug.graph import bodies, input_values, other_inputs, pairing, tensor_ends
from cp_debug.graph.bodies import Endless, LoopClock
from cp_debug.graph.graph import Graph, ValueInfo, fits_shape
from cp_debug.graph.onnx_tensors import byte_count, described
from cp_debug.graph.randomness import drawing_note, refuse_random


def graph_of(
    folder: Path, nodes: list[onnx.NodeProto], inputs: list[onnx.ValueInfoProto], *weights: onnx.TensorProto
) -> Graph:
    """A graph of nodes, the last of which makes its output ``y``."""
    outputs = [helper.make_empty_tensor_value_info("y")]
    graph = helper.make_graph(nodes, "g", inputs, outputs, list(weights))
    path = folder / "g.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return Graph(path)


def tensor(name: str, shape: list[int | str | None], element: int = TensorProto.FLOAT) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, element, shape)


@pytest.mark.parametrize(
    ("maker", "low", "high"),
    [
        (input_values._positive, 0.1, np.inf),
        (input_values._above_one, 1.1, np.inf),
        (input_values._squeezed, -1, 1),
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
    assert set(input_values._booleans(rng, (64,), 5)) == {0, 1}
    assert set(input_values._below(3)(rng, (64,), 5)) == {0, 1, 2}
    assert set(input_values._below(0)(rng, (8,), 5)) == {0}
    assert set(input_values._below_longest(rng, (200,), 5)) == {0, 1, 2, 3, 4}
    assert set(input_values._below_longest(rng, (8,), 0)) == {0}
    assert input_values._longest(rng, (2,), 5).tolist() == [5, 5]
    assert input_values._one_free(rng, (2, 2), 5).tolist() == [[-1, 1], [1, 1]]
    assert input_values._filled(1)(rng, (2,), 5).tolist() == [1, 1]
    normal = input_values._normal(rng, (4000,), 5)
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
    graph = graph_of(tmp_path, nodes, [tensor("x", [1, 3, 8, 8])], *weights)
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
    graph = graph_of(tmp_path, nodes, inputs, table, depth, values)
    assert [input_values._index_limit(graph, node, 1) for node in graph.nodes[:3]] == [7, 5, 3]
    assert input_values._index_limit(graph, graph.nodes[0], 0) is None
    assert input_values._index_limit(graph, graph.nodes[3], 0) == 4
    assert input_values._index_limit(graph, graph.nodes[4], 1) == 0
    assert input_values._index_limit(graph, graph.nodes[5], 0) is None


def test_the_size_of_an_image_is_its_height_then_its_width(tmp_path: Path) -> None:
    nodes = [helper.make_node("Identity", ["x"], ["y"])]
    graph = graph_of(tmp_path, nodes, [tensor("s", [2]), tensor("x", [1, 3, 8, "w"])])
    assert input_values._image_size(graph)(np.random.default_rng(0), (2, 2), 11).tolist() == [[8, 11], [8, 11]]


def test_types_in_words() -> None:
    strings = helper.make_tensor_type_proto(TensorProto.STRING, None)
    floats = helper.make_tensor_type_proto(TensorProto.FLOAT16, None)
    assert other_inputs._in_words(strings) == "strings"
    assert other_inputs._in_words(floats) == "a tensor of float16"
    assert other_inputs._in_words(helper.make_sequence_type_proto(strings)) == "a sequence of strings"
    assert other_inputs._in_words(helper.make_sequence_type_proto(floats)) == "a sequence of float16"
    optional = helper.make_optional_type_proto(helper.make_sequence_type_proto(floats))
    assert other_inputs._in_words(optional) == "an optional sequence of float16"
    assert other_inputs._in_words(helper.make_map_type_proto(TensorProto.INT64, floats)) == "a map"


def test_strings_and_numbers_are_not_taken_for_one_another() -> None:
    words, numbers = np.array(["a"]), np.zeros(1, np.float32)
    other_inputs._check_type("x", words, TensorProto.STRING, "t")
    other_inputs._check_type("x", np.array([b"a"]), TensorProto.STRING, "t")
    other_inputs._check_type("x", numbers, TensorProto.FLOAT, "t")
    for array, element, says in (
        (numbers, TensorProto.STRING, "t; 'x' holds float32"),
        (words, TensorProto.FLOAT, "t; 'x' is strings; expected float"),
        (numbers, TensorProto.DOUBLE, "t; 'x' is float32; expected double"),
    ):
        with pytest.raises(InputError) as error:
            other_inputs._check_type("x", array, element, "t")
        assert str(error.value) == says
    with pytest.raises(InputError, match="elements of the type 99"):
        other_inputs._dtype(99)
    assert other_inputs._keys(np.array([3, 1])) == [3, 1]
    assert other_inputs._keys(np.array([[b"a\xff", b"b"]])) == ["a\udcff", "b"]


def test_strings_that_an_input_can_take_are_those_of_its_readers(tmp_path: Path) -> None:
    encoder = helper.make_node("LabelEncoder", ["f"], ["y"], domain="ai.onnx.ml", keys_strings=["b", "a"])
    encoder.attribute.append(helper.make_attribute("values_int64s", [1, 2]))
    reshape = [helper.make_node("Flatten", ["x"], ["f"]), helper.make_node("Identity", ["w"], ["v"])]
    reshape.append(helper.make_node("Cast", ["n"], ["m"], to=TensorProto.FLOAT))
    texts = [tensor(name, [1, 2], TensorProto.STRING) for name in "xwn"]
    graph = helper.make_graph([*reshape, encoder], "g", texts, [tensor("y", [1, 2], TensorProto.INT64)])
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("ai.onnx.ml", 2)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=8), tmp_path / "g.onnx")
    opened = Graph(tmp_path / "g.onnx")
    assert other_inputs._known_strings(opened, "f") == ["b", "a"]
    assert other_inputs._known_strings(opened, "x") == ["b", "a"]
    assert other_inputs._known_strings(opened, "n") == ["0", "1", "2", "10", "-3", "0.5"]
    assert "Zürich" in other_inputs._known_strings(opened, "w")


def test_a_code_of_a_string_is_exact_in_fp64_and_stays() -> None:
    assert tensor_ends._code("a") == tensor_ends._code(b"a") != tensor_ends._code("b")
    codes = [tensor_ends._code(f"label {i}") for i in range(200)]
    assert len(set(codes)) == 200
    assert 1 << 46 < max(codes) < 1 << 48
    assert all(int(float(code)) == code for code in codes)


@pytest.mark.parametrize(
    ("actual", "declared", "fits"),
    [
        ((2, 3), (2, 3), True),
        ((2, 3), ("n", None), True),
        ((2, 3), ("n", 4), False),
        ((2, 3), (3, 3), False),
        ((2,), (2, 3), False),
        ((2, 3), (2,), False),
        ((2, 3), None, True),
        ((), (), True),
    ],
)
def test_shapes_fit_where_fixed_sizes_are_equal(actual: tuple[int, ...], declared: tuple[int, ...], fits: bool) -> None:
    assert fits_shape(actual, declared) is fits


def info(shape: tuple[int | str, ...] | None, dtype: object) -> ValueInfo:
    return ValueInfo("x", None if dtype is None else np.dtype(dtype), shape)  # type: ignore[call-overload]


@pytest.mark.parametrize(
    ("ours", "theirs", "alike"),
    [
        (info((2, 3), "f4"), info((2, 3), "f2"), True),
        (info((2, 3), "f4"), info((2, 3), ml_dtypes.bfloat16), True),
        (info((2, 3), "f4"), info((2, 3), "i8"), False),
        (info((2, 3), "f4"), info((2, 3), None), True),
        (info((2, 3), "f4"), info((2, 4), "f4"), False),
        (info((2, 3), "f4"), info((2, "n"), "f4"), True),
        (info((2, 3), "f4"), info((2, 3, 1), "f4"), False),
        (info((2, 3), "f4"), info(None, "f4"), True),
    ],
)
def test_inputs_that_may_be_the_same_one(ours: ValueInfo, theirs: ValueInfo, alike: bool) -> None:
    assert pairing._alike(ours, theirs) is alike
    assert pairing._alike(theirs, ours) is alike


def test_values_that_are_told_alike_are_equal_and_may_be_kept_in_sets() -> None:
    """Their ONNX types, which nobody can hash, only say how to read them."""
    kinds = [onnx.TypeProto(sequence_type=onnx.TypeProto.Sequence()), onnx.TypeProto()]
    assert len({ValueInfo("x", None, None, "a sequence", kind) for kind in kinds}) == 1


def weight(dims: list[int], element: int = TensorProto.FLOAT) -> onnx.TensorProto:
    return onnx.TensorProto(name="w", data_type=element, dims=dims)


@pytest.mark.parametrize(
    ("given", "count"),
    [
        (weight([2, 3]), 24),
        (weight([]), 4),
        (weight([0, 5]), 0),
        (weight([3], TensorProto.INT4), 2),
        (weight([4], TensorProto.UINT4), 2),
        (weight([5], TensorProto.BOOL), 5),
        (weight([5], TensorProto.FLOAT16), 10),
    ],
)
def test_bytes_of_a_weight(given: onnx.TensorProto, count: int) -> None:
    assert byte_count(given, "m") == count


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (weight([1], TensorProto.STRING), "weight 'w' is text; expected numbers"),
        (weight([1], 0), "of the data type 0"),
        (weight([1], len(TensorProto.DataType.keys())), "of the data type"),
        (weight([2, -1]), r"has the shape \[2, -1\]$"),
        (weight([1] * 33), r"has the shape \[1, 1, 1, 1, 1, 1, 1, 1, …\]$"),
        (weight([0, 1 << 31, 1 << 31]), "which no array can have"),
        (weight([1 << 20, 1 << 20]), r"FLOAT\[1048576, 1048576\], which no memory holds"),
    ],
)
def test_weights_that_cannot_be(given: onnx.TensorProto, says: str) -> None:
    with pytest.raises(InputError, match=says):
        byte_count(given, "m")


def test_a_weight_may_have_32_axes_and_eight_are_shown() -> None:
    assert byte_count(weight([1] * 32), "m") == 4
    assert described(weight([64, 3, 7, 7])) == "FLOAT[64, 3, 7, 7]"
    assert described(weight(list(range(1, 9)))) == "FLOAT[1, 2, 3, 4, 5, 6, 7, 8]"
    assert described(weight(list(range(1, 10)))) == "FLOAT[1, 2, 3, 4, 5, 6, 7, 8, …]"


def test_a_node_that_draws_is_told_with_its_seed(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("RandomNormalLike", ["x"], ["a"], "drawn", seed=3.0),
        helper.make_node("RandomNormalLike", ["a"], ["y"], "again"),
    ]
    graph = graph_of(tmp_path, nodes, [tensor("x", [2])])
    told = [drawing_note(node) for node in graph.nodes]
    assert told[0].startswith("drawn (RandomNormalLike) ")
    assert ["(seed 3: runtimes" in text for text in told] == [True, False]
    with pytest.raises(InputError, match=r"drawn .* differs from run to run, and no goal can be judged"):
        refuse_random([graph], "no goal can be judged")
    refuse_random([], "nothing")


def test_a_loop_is_ended_after_its_time_and_not_before(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(bodies.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(bodies, "loop_seconds", lambda: 10.0)
    clock = LoopClock()
    clock.tick(endless=True)
    assert (clock.passes, clock.started) == (1, 100.0)
    now[0] = 110.0
    clock.tick(endless=True)
    now[0] = 110.5
    clock.tick(endless=False)  # it has an end, and few passes
    with pytest.raises(Endless, match="after 4 passes, 10 s"):
        clock.tick(endless=True)
    clock.passes = bodies.MOST_PASSES - 1
    clock.tick(endless=False)
    with pytest.raises(Endless):
        clock.tick(endless=False)


def test_results_of_a_loop_are_stacked_along_a_new_first_axis() -> None:
    assert bodies._stacked([]).shape == (0,)
    assert bodies._stacked([torch.tensor([1, 2]), torch.tensor([3, 4])]).tolist() == [[1, 2], [3, 4]]
    with pytest.raises(ValueError, match=r"\[\[1\], \[2\]\]"):
        bodies._stacked([torch.zeros(2), torch.zeros(1)])
