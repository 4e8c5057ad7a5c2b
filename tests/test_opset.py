"""Graphs in another opset: which there are, and what a converted copy keeps."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from nets import NetBuilder
from onnx import TensorProto

from cp_debug.errors import InputError
from cp_debug.graph.graph import Graph
from cp_debug.graph.surgery import _keep_notes, _same, converted, inlined


def test_operators_that_onnx_defined_once() -> None:
    assert _same("Relu", 14, 17)
    assert not _same("Relu", 13, 14)
    assert not _same("If", 17, 17)
    assert not _same("Unknown", 17, 17)


def test_a_copy_has_its_weights_inside(tmp_path: Path) -> None:
    net = NetBuilder()
    net.op("Add", "x", net.weight(np.arange(4, dtype=np.float32), "w"), name="y")
    path = net.save(tmp_path / "n.onnx", {"x": (1, [4])}, ["y"])
    onnx.save(onnx.load(path), path, save_as_external_data=True, location="w.bin", size_threshold=0)
    graph = Graph(path)
    model = inlined(graph)
    (weight,) = model.graph.initializer
    assert weight.data_location != TensorProto.EXTERNAL
    assert onnx.numpy_helper.to_array(weight).tolist() == [0, 1, 2, 3]
    assert graph.proto.graph.initializer[0].data_location == TensorProto.EXTERNAL  # a copy


def test_an_opset_is_one_that_the_converter_describes(tmp_path: Path) -> None:
    net = NetBuilder()
    net.op("Relu", "x", name="y")
    graph = Graph(net.save(tmp_path / "net.onnx", {"x": (1, [1])}, ["y"], opset=8))
    newest = onnx.defs.onnx_opset_version()
    assert [o.version for o in converted(graph.proto, graph, 7).opset_import] == [7]
    for opset in (6, newest + 1):
        with pytest.raises(InputError, match=f"--opset: {opset}; expected 7 to {newest}"):
            converted(graph.proto, graph, opset)


def test_a_converted_graph_keeps_the_notes_of_its_nodes() -> None:
    def graph(*notes: str) -> onnx.GraphProto:
        nodes = []
        for place, note in enumerate(notes):
            node = onnx.helper.make_node("Neg", ["x"], [f"y{place}"])
            if note:
                node.metadata_props.add(key="source", value=note)
            nodes.append(node)
        return onnx.helper.make_graph(nodes, "net", [], [])

    new = graph("", "own", "")
    _keep_notes(graph("a", "b"), new)
    assert [[p.value for p in node.metadata_props] for node in new.node] == [["a"], ["own"], []]
