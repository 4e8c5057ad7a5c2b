"""Input dimensions of one name and several sizes, which TensorRT refuses."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
from nets import NetBuilder

from cp_debug.graph.graph import Graph
from cp_debug.graph.surgery import distinct_dimensions


@pytest.fixture
def graph(tmp_path: Path) -> Graph:
    net = NetBuilder()
    net.op("Concat", net.op("Relu", "x", name="r"), "z", name="y", axis=1)
    shapes = {"x": (1, ["N", 3, "?", "?"]), "z": (1, ["N", 2, "?", "?"])}
    return Graph(net.save(tmp_path / "net.onnx", shapes, ["y"]))


def names(path: Path) -> dict[str, list[str]]:
    inputs = onnx.load(path).graph.input
    return {v.name: [d.dim_param for d in v.type.tensor_type.shape.dim] for v in inputs}


def test_a_name_of_one_size_stays(graph: Graph, tmp_path: Path) -> None:
    square = {"x": [[1, 3, 8, 8]], "z": [[1, 2, 8, 8]]}
    assert distinct_dimensions(graph, square, tmp_path / "named.onnx") == graph.path
    assert distinct_dimensions(graph, {}, tmp_path / "named.onnx") == graph.path
    assert not (tmp_path / "named.onnx").exists()


def test_a_name_of_two_sizes_becomes_one_name_a_dimension(graph: Graph, tmp_path: Path) -> None:
    wide = {"x": [[1, 3, 8, 8], [1, 3, 8, 12]], "z": [[1, 2, 8, 8], [1, 2, 8, 12]]}
    path = distinct_dimensions(graph, wide, tmp_path / "named.onnx")
    assert names(path) == {"x": ["N", "", "x.2", "x.3"], "z": ["N", "", "z.2", "z.3"]}
    assert [n.op_type for n in onnx.load(path).graph.node] == ["Relu", "Concat"]
    assert names(graph.path)["x"] == ["N", "", "?", "?"], "the caller's file is not touched"
