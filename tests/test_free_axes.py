"""Sizes of free axes as weights and other inputs want them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from nets import graph_of
from onnx import helper, numpy_helper

from cp_debug.graph import free_axes


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
