"""Small parts that look at constants: sizes that weights want, grids of levels, changes of tensors, added nodes."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from cp_debug.graph import free_axes, integer_values, narrow_types
from cp_debug.graph.constants import Constants
from cp_debug.graph.graph import Graph, Node
from cp_debug.graph.narrow_qdq import DataCodes, NarrowLayer, StoredWeight, needed_opset
from cp_debug.graph.opset import _same
from cp_debug.programs import added_nodes, tensor_change


def graph_of(
    folder: Path,
    nodes: list[onnx.NodeProto],
    inputs: dict[str, list[int | str] | None],
    weights: dict[str, np.ndarray] | None = None,
) -> Graph:
    """A graph of FP32 inputs; its output is what the last node makes."""
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in inputs.items()]
    stored = [numpy_helper.from_array(array, name) for name, array in (weights or {}).items()]
    outputs = [helper.make_empty_tensor_value_info(nodes[-1].output[0])]
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    graph = helper.make_graph(nodes, "g", ends, outputs, stored)
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=8), folder / "g.onnx")
    return Graph(folder / "g.onnx")


def floats(*shape: int) -> np.ndarray:
    return np.zeros(shape, np.float32)


@pytest.mark.parametrize(
    ("op", "weight", "attributes", "wanted"),
    [
        ("Conv", (6, 4, 3, 3), {}, (4, {1: 4})),
        ("Conv", (6, 4, 3, 3), {"group": 2}, (4, {1: 8})),
        ("ConvTranspose", (6, 4, 3), {}, (3, {1: 6})),
        ("Gemm", (6, 4), {}, (2, {1: 6})),
        ("Gemm", (6, 4), {"transB": 1}, (2, {1: 4})),
        ("Gemm", (6, 4), {"transA": 1}, (2, {0: 6})),
        ("MatMul", (6, 4), {}, (2, {-1: 6})),
        ("MatMul", (5, 6, 4), {}, (3, {-1: 6})),
        ("MatMul", (6,), {}, None),
        ("LSTM", (1, 16, 5), {}, (3, {2: 5})),
        ("BatchNormalization", (7,), {}, (4, {1: 7})),
        ("LayerNormalization", (7,), {}, (3, {-1: 7})),
        ("LayerNormalization", (7,), {"axis": 1}, None),
        ("Add", (7,), {}, None),
    ],
)
def test_sizes_that_a_weight_wants(
    tmp_path: Path, op: str, weight: tuple[int, ...], attributes: dict[str, Any], wanted: Any
) -> None:
    more = {"LSTM": ["w"], "BatchNormalization": ["w", "w", "w"]}.get(op, [])
    node = helper.make_node(op, ["x", "w", *more], ["y"], **attributes)
    graph = graph_of(tmp_path, [node], {"x": None}, {"w": floats(*weight)})
    assert free_axes._by_weight(graph, graph.nodes[0], "x", None) == wanted


def test_a_weight_on_the_left_wants_the_rows(tmp_path: Path) -> None:
    graph = graph_of(tmp_path, [helper.make_node("MatMul", ["w", "x"], ["y"])], {"x": None}, {"w": floats(6, 4)})
    assert free_axes._by_weight(graph, graph.nodes[0], "x", None) == (2, {-2: 4})
    assert free_axes._by_weight(graph, graph.nodes[0], "x", (0, 1, 2)) == (3, {-2: 4})


def test_what_is_wanted_is_seen_through_a_transposition(tmp_path: Path) -> None:
    nodes = [helper.make_node("Relu", ["x"], ["a"]), helper.make_node("Transpose", ["a"], ["b"], perm=[0, 2, 1])]
    nodes.append(helper.make_node("MatMul", ["b", "w"], ["y"]))
    graph = graph_of(tmp_path, nodes, {"x": [1, "c", "n"]}, {"w": floats(6, 4)})
    assert list(free_axes._wanted(graph, graph.inputs[0])) == [(3, {1: 6})]


@pytest.mark.parametrize(("indices", "axis", "tables"), [("i", 1, {("x", 1)}), ("i", -1, {("x", 2)}), ("c", 0, set())])
def test_tables_are_what_another_input_chooses_from(
    tmp_path: Path, indices: str, axis: int, tables: set[tuple[str, int]]
) -> None:
    nodes = [helper.make_node("Gather", ["x", indices], ["y"], axis=axis)]
    graph = graph_of(tmp_path, nodes, {"x": [2, "n", "m"], "i": [1]}, {"c": np.zeros(1, np.int64)})
    assert free_axes._tables(graph) == tables


def test_known_sizes(tmp_path: Path) -> None:
    held = helper.make_node("Constant", [], ["k"], value=numpy_helper.from_array(floats(2, 3)))
    one = helper.make_node("Constant", [], ["f"], value_float=1.0)
    nodes = [held, one, helper.make_node("Sum", ["x", "w", "k", "f", "z"], ["y"])]
    graph = graph_of(tmp_path, nodes, {"x": [4, "n"], "z": [4, 3]}, {"w": floats(5)})
    assert [free_axes.constant_dims(graph, name) for name in ("w", "k", "f", "x")] == [(5,), (2, 3), None, None]
    assert [free_axes.known_dims(graph, name) for name in ("w", "k", "x", "z", "gone")] == [
        (5,),
        (2, 3),
        None,
        (4, 3),
        None,
    ]
    assert free_axes._key(graph.inputs[0], 1, "n") == "n"
    assert free_axes._key(graph.inputs[0], 1, None) == "x[1]"


@pytest.mark.parametrize(
    ("op", "count", "grid"),
    [
        ("QuantizeLinear", 3, ("i1", "i2")),
        ("com.microsoft.QLinearConcat", 5, ("i0", "i1")),
        ("QLinearConv", 8, ("i6", "i7")),
        ("QLinearMatMul", 8, ("i6", "i7")),
        ("com.microsoft.QLinearAdd", 8, ("i6", "i7")),
        ("com.microsoft.QLinearSigmoid", 5, ("i3", "i4")),
        ("com.microsoft.QGemm", 9, ("i7", "i8")),
        ("com.microsoft.QGemm", 7, None),
        ("Relu", 1, None),
    ],
)
def test_grids_of_levels_are_where_the_operator_has_them(op: str, count: int, grid: tuple[str, str] | None) -> None:
    domain, _, name = op.rpartition(".")
    proto = helper.make_node(name, [f"i{i}" for i in range(count)], ["y"], "n", domain=domain)
    graph: Any = SimpleNamespace(nodes=[0], producer={"y": Node.of(0, proto)})
    found = integer_values.produced_grid(graph, "y")
    assert (found and tuple(found)[:2] if isinstance(found, tuple) else found and (found.scale, found.zero)) == grid


def test_what_is_rounded_to_levels(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["d"]),
        helper.make_node("Reshape", ["d", "shape"], ["r"]),
        helper.make_node("MatMul", ["d", "w"], ["m"]),
        helper.make_node("Add", ["m", "x"], ["y"]),
    ]
    weights = {"s": np.float32(0.1), "z": np.int8(0), "w": floats(2, 2), "shape": np.array([2, 2])}
    assert integer_values.rounded_values(graph_of(tmp_path, nodes, {"x": [2, 2]}, weights)) == {"q", "m"}  # type: ignore[arg-type]


def noted(**notes: str) -> Any:
    node = helper.make_node("DequantizeLinear", ["q", "s"], ["d"])
    for key, text in notes.items():
        node.metadata_props.add(key=narrow_types.BITS if key == "bits" else key, value=text)
    return SimpleNamespace(proto=node)


def test_bits_are_those_that_a_node_states() -> None:
    stated = [narrow_types.stated_bits(noted(bits=text)) for text in ("3", "16", "0", "17", "-3", "x")]
    assert stated == [3, 16, None, None, None, None]
    assert narrow_types.stated_bits(noted(other="3")) is None


def test_the_oldest_opset_is_that_of_the_newest_type() -> None:
    fp8, int4, fp4 = TensorProto.FLOAT8E4M3FN, TensorProto.INT4, TensorProto.FLOAT4E2M1

    def weight(kind: int, block: int = 0) -> StoredWeight:
        return StoredWeight(kind, floats(1), floats(1), block=block)

    assert needed_opset({}) == 19
    assert needed_opset({"a": NarrowLayer(weight(fp8), None)}) == 19
    assert needed_opset({"a": NarrowLayer(weight(fp8, 32), None)}) == 21
    assert needed_opset({"a": NarrowLayer(weight(int4), None)}) == 21
    assert needed_opset({"a": NarrowLayer(weight(fp8), DataCodes(fp4)), "b": NarrowLayer(weight(fp8), None)}) == 23
    assert (StoredWeight(fp8, floats(1), floats(1)).axis, DataCodes(fp8).axis, DataCodes(fp8).rule) == (0, -1, "amax")


def test_constants_are_told_by_dtype_shape_and_contents(tmp_path: Path) -> None:
    weights = {"a": np.arange(16.0, dtype=np.float32), "b": np.arange(16.0, dtype=np.float32).reshape(4, 4)}
    weights |= {"c": np.arange(16, dtype=np.int32), "d": np.arange(15.0, dtype=np.float32), "e": weights["b"].T.copy()}
    graph = graph_of(tmp_path, [helper.make_node("Sum", ["x", *weights], ["y"])], {"x": None}, weights)
    constants = Constants(graph)
    assert len({constants.digest(name) for name in weights}) == 5
    assert constants.digest_transposed("b") == constants.digest("e")
    assert constants.names == [*weights]
    assert [constants.size(name) for name in weights] == [16, 16, 16, 15, 16]
    assert constants.of(graph.nodes[0]) == tuple(constants.digest(name) for name in ("a", "b", "c", "e"))


def test_operators_that_onnx_defined_once() -> None:
    assert _same("Relu", 14, 17)
    assert not _same("Relu", 13, 14)
    assert not _same("If", 17, 17)
    assert not _same("Unknown", 17, 17)


def test_a_step_along_an_axis() -> None:
    steps = {says: value.tolist() for _, says, value, _ in tensor_change._rolled(np.arange(3.0))}
    assert steps == {"off by +1 along axis 0": [2, 0, 1], "off by -1 along axis 0": [1, 2, 0]}
    assert list(tensor_change._rolled(np.zeros((2, 2)))) == []
    assert len(list(tensor_change._rolled(np.zeros((2, 3))))) == 2


def test_what_comes_in_at_the_end_is_of_a_larger_tensor() -> None:
    ours, theirs = np.array([1.0, 2, 3, 4]), np.array([9.0, 1, 2, 3])
    up, down = (tensor_change._shifted_in(ours, theirs, 0, step) for step in (1, -1))
    assert up is not None
    assert down is not None
    assert up.tolist() == [9, 1, 2, 3]
    assert down.tolist() == [2, 3, 4, 3]
    assert tensor_change._shifted_in(np.ones(4), theirs, 0, 1) is None
    assert tensor_change._shifted_in(np.array([1.0, 2]), np.array([5.0, 1]), 0, 1).tolist() == [2, 1]  # type: ignore[union-attr]


def test_slices_in_another_order_or_copied() -> None:
    ours = np.array([[1.0, 2], [3, 4], [5, 6]])
    found = tensor_change._permuted(ours, ours[[2, 0, 1]], 0)
    assert found is not None
    assert found[1] == [2, 0, 1]
    copied = tensor_change._permuted(ours, ours[[0, 0, 2]], 0)
    assert copied is not None
    assert copied[1] == [0, 0, 2]
    assert tensor_change._permuted(np.array([1.0, 2]), np.array([1.0, 1]), 0) is None
    assert tensor_change._permuted(ours, ours + 1, 0) is None


@pytest.mark.parametrize(
    ("ours", "theirs", "cut"),
    [
        ([1.0, 5, 7], [1.0, 4, 4], True),
        ([1.0, 5, 4], [1.0, 4, 4], False),
        ([-9.0, -8, 1], [-3.0, -3, 1], True),
        ([-9.0, 8, 1], [-3.0, 3, 1], True),
        ([1.0, 5, 7], [1.0, 4, 3], False),
        ([1.0, 5, np.inf], [1.0, 4, 4], False),
    ],
)
def test_what_lies_beyond_the_ends_is_cut_off(ours: list[float], theirs: list[float], cut: bool) -> None:
    a, b = np.array(ours), np.array(theirs)
    assert tensor_change._cut_off(a, b, a != b) is cut


def test_few_bits_by_hand() -> None:
    forms = dict(tensor_change.few_bit_forms(np.array([[1.0, 1 + 2.0**-3, 448.0, -1 - 2.0**-8]])))
    assert forms["with 3 bits of mantissa"].tolist() == [[1, 1.125, 448, -1]]
    assert forms["with 2 bits of mantissa"].tolist() == [[1, 1, 448, -1]]
    assert forms["with 7 bits of mantissa, the others cut off"].tolist() == [[1, 1.125, 448, -1]]
    assert forms["with 8 bits of mantissa"].tolist() == [[1, 1.125, 448, -1 - 2.0**-8]]
    assert forms["in FP8 E4M3, no scale"].tolist() == [[1, 1.125, 448, -1]]
    assert [name.split(",")[0] for name in forms][:1] == ["in 4 bits"]
    assert tensor_change._axis_name(0, 1) == "element"
    assert [tensor_change._axis_name(axis, 4) for axis in range(3)] == ["channel", "input channel", "slice of axis 2"]
    assert tensor_change._axis_name(1, 2) == "column"


@pytest.mark.parametrize(
    ("op", "constant", "name"),
    [
        ("Add", 2.0, "shifted"),
        ("Mul", 2.0, "scaled"),
        ("Add", [1.0, 2.0], "channels-shifted"),
        ("Mul", [1.0, 2.0], "channels-scaled"),
        ("Mul", [1.0, 1.0, 0.0, 0.0], "truncated"),
        ("Mul", [1.0, 0.0, 1.0, 0.0], "channels-zeroed"),
        ("Mul", [[1.0, 3.0], [1.0, 1.0]], "isolated"),
        ("Add", [[0.0, 3.0], [0.0, 0.0]], "isolated"),
        ("Add", [[1.0, 3.0], [1.0, 1.0]], None),
        ("Add", [1.0, float("inf")], None),
    ],
)
def test_what_an_added_node_does(op: str, constant: Any, name: str | None) -> None:
    constants: Any = {"c": np.array(constant, np.float32)}
    node = Node.of(0, helper.make_node(op, ["x", "c"], ["y"], "added"))
    found = added_nodes._arithmetic([node], constants)
    assert (found and found[0]) == name
    if name in ("truncated", "channels-zeroed"):
        assert found is not None
        assert ("all after the first 2 of 4" if name == "truncated" else "2 of 4 slices 0") in found[1]


def test_several_added_nodes_and_bounds() -> None:
    constants: Any = {"a": np.float32([2.0]), "b": np.float32([3.0]), "zero": np.float32(0), "six": np.float32(6)}
    scale = Node.of(0, helper.make_node("Mul", ["x", "a"], ["m"], "times"))
    shift = Node.of(1, helper.make_node("Add", ["m", "b"], ["y"], "plus"))
    assert added_nodes._arithmetic([scale, shift], constants) == ("affine", "Mul and Add are added: times")
    assert added_nodes._arithmetic([Node.of(0, helper.make_node("Add", ["x", "y"], ["z"], "n"))], constants) == (
        "extra-operator",
        "Add is added: n",
    )

    def bounds(op: str, *names: str, **attributes: float) -> tuple[str, str]:
        return added_nodes._bounds(Node.of(0, helper.make_node(op, ["x", *names], ["y"], "n", **attributes)), constants)

    assert bounds("Max", "zero") == ("extra-activation", "Max at 0 is added: n")
    assert bounds("Clip") == ("extra-operator", "Clip is added: n")
    assert bounds("Clip", "zero", "six") == ("saturated", "a Clip is added that stops at 0, 6: n")
    assert bounds("Clip", max=6.0)[1] == "a Clip is added that stops at 6: n"
