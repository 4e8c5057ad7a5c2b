"""Constants of a graph: where they stand, and by what they are told apart."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from nets import NetBuilder, graph_of
from onnx import helper

from cp_debug.graph.constants import Constants
from cp_debug.graph.graph import Graph


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


def test_constants_are_found_in_initializers_and_in_nodes(tmp_path: Path) -> None:
    net = NetBuilder()
    net.weight(np.float32([1, 2, 3]), "w")
    net.nodes.append(
        helper.make_node("Constant", [], ["c"], name="c", value=onnx.numpy_helper.from_array(np.float32([[4, 5, 6]])))
    )
    net.op("Add", net.op("Add", "x", "w", name="s"), "c", name="y")
    constants = Constants(Graph(net.save(tmp_path / "n.onnx", {"x": (1, [1, 3])}, ["y"])))
    assert ["w" in constants, "c" in constants, "x" in constants, "s" in constants] == [True, True, False, False]
    assert (constants["w"].tolist(), constants["c"].tolist()) == ([1, 2, 3], [[4, 5, 6]])
    assert (constants.size("w"), constants.size("c"), constants.names) == (3, 3, ["w", "c"])
    assert constants.digest("w") == constants.digest("w")
    assert constants.digest("w") != constants.digest("c")
