"""Surgery and back on random graphs, bit for bit under ONNX Runtime; pairing whatever a file calls its values."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from random import Random

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from nets import NetBuilder, marked, random_dag
from onnx import TensorProto
from test_surgery import RECIPES, image, run

from cp_debug.backends.base import Program
from cp_debug.graph.graph import Graph
from cp_debug.graph.half_precision import cast_surgery
from cp_debug.graph.qdq import insert_qdq, quantizable, quantized_inputs, remove_qdq
from cp_debug.graph.scales import LayerScales
from cp_debug.programs.paired import pair_by_numbers

FEW = settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
DRAWN = {"recipe": RECIPES, "seed": st.integers(0, 999)}


def same_bits(a: Mapping[str, np.ndarray], b: Mapping[str, np.ndarray]) -> bool:
    return a.keys() == b.keys() and all(a[name].tobytes() == b[name].tobytes() for name in a)


def quantized(graph: Graph, target: Path) -> Graph:
    """Every layer with a weight in INT8, ranges by the weights' own."""
    layers = {}
    for node in quantizable(graph):
        weight = graph.initializer(node.proto.input[1])
        layers[node.name] = LayerScales(input=3.0, weight=np.array([np.abs(weight).max()], np.float32))
    return Graph(insert_qdq(graph, layers, target))


@FEW
@given(**DRAWN)
def test_int8_put_in_and_taken_out_leaves_the_network_as_it_was(
    tmp_path_factory: pytest.TempPathFactory, recipe: list[tuple[int, int, int]], seed: int
) -> None:
    folder, feed = tmp_path_factory.mktemp("dag"), image((1, 4, 5, 5), seed)
    graph = Graph(random_dag(folder / "net.onnx", recipe, seed))
    low = quantized(graph, folder / "low.onnx")
    back = Graph(remove_qdq(low, quantized_inputs(low), folder / "back.onnx"))
    assert same_bits(run(back.path, feed), run(graph.path, feed))
    assert not any(node.op.endswith("quantizeLinear") or node.op == "QuantizeLinear" for node in back.nodes)
    assert set(graph.values) == set(back.values)
    if layers := [n.name for n in graph.nodes if n.name in quantized_inputs(low)]:
        assert not same_bits(run(low.path, feed), run(graph.path, feed)) or not np.any(list(feed.values()))
        one = Graph(remove_qdq(low, layers[:1], folder / "one.onnx"))
        assert set(quantized_inputs(low)) - set(quantized_inputs(one)) == {layers[0]}


@FEW
@given(**DRAWN, dtype=st.sampled_from(["fp16", "bf16"]))
def test_casts_that_keep_every_node_change_nothing_and_others_keep_ends_and_names(
    tmp_path_factory: pytest.TempPathFactory, recipe: list[tuple[int, int, int]], seed: int, dtype: str
) -> None:
    folder, feed = tmp_path_factory.mktemp("dag"), image((1, 4, 5, 5), seed)
    graph = Graph(random_dag(folder / "net.onnx", recipe, seed))
    kept = Graph(cast_surgery(graph, dtype, [node.name for node in graph.nodes], folder / "kept.onnx"))
    assert same_bits(run(kept.path, feed), run(graph.path, feed))
    low = Graph(cast_surgery(graph, dtype, [], folder / "low.onnx"))
    assert set(graph.values) <= set(low.values)
    assert [(v.name, v.dtype, v.shape) for v in low.inputs] == [(v.name, v.dtype, v.shape) for v in graph.inputs]
    kind = TensorProto.FLOAT
    assert all(v.type.tensor_type.elem_type in (0, kind) for v in low.proto.graph.output)
    if dtype == "fp16":
        exact, near = run(graph.path, feed), run(low.path, feed)
        for name, array in exact.items():
            assert near[name].dtype == array.dtype
            assert np.linalg.norm(near[name] - array) <= 0.02 * np.linalg.norm(array) + 1e-2


def under_other_names(path: Path, target: Path, order: Random) -> tuple[Path, dict[str, str]]:
    """The file with every value and node renamed, nodes in another order: also the new name → the old."""
    model, names = onnx.load(path), dict[str, str]()

    def new(name: str) -> str:
        return names.setdefault(name, f"v{len(names):03d}") if name else ""

    def rename(graph: onnx.GraphProto) -> None:
        for each in (*graph.initializer, *graph.input, *graph.output, *graph.value_info):
            each.name = new(each.name)
        for index, node in enumerate(graph.node):
            node.input[:], node.output[:] = map(new, node.input), map(new, node.output)
            node.name = f"n{index}"
            for attribute in node.attribute:
                if attribute.HasField("g"):
                    rename(attribute.g)

    rename(model.graph)
    nodes = list(model.graph.node)
    order.shuffle(nodes)
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    onnx.save(model, target)
    return target, {other: name for name, other in names.items()}


@FEW
@given(**DRAWN, order=st.randoms(use_true_random=False))
def test_a_file_under_other_names_and_in_another_order_is_paired_by_what_it_computes(
    tmp_path_factory: pytest.TempPathFactory, recipe: list[tuple[int, int, int]], seed: int, order: Random
) -> None:
    """A pair may hold another value than the names say only where both hold the same numbers."""
    folder, feed = tmp_path_factory.mktemp("dag"), image((1, 4, 5, 5), seed)
    graph = Graph(random_dag(folder / "net.onnx", recipe, seed))
    other, old_names = under_other_names(graph.path, folder / "other.onnx", order)
    pairing, _ = pair_by_numbers(Program("net", graph), Program("net", Graph(other)), feed, {})
    values = run(marked(graph, graph.tensors), feed) | feed
    for test_value, value in pairing.names.items():
        assert values[value].tobytes() == values[old_names[test_value]].tobytes()
    for value in graph.outputs:
        assert values[old_names[pairing.outputs[value.name]]].tobytes() == values[value.name].tobytes()
    assert not pairing.missing
    assert not pairing.added


@FEW
@given(**DRAWN)
def test_a_file_written_again_is_paired_with_itself(
    tmp_path_factory: pytest.TempPathFactory, recipe: list[tuple[int, int, int]], seed: int
) -> None:
    folder, feed = tmp_path_factory.mktemp("dag"), image((1, 4, 5, 5), seed)
    graph = Graph(random_dag(folder / "net.onnx", recipe, seed))
    again = Graph(random_dag(folder / "again.onnx", recipe, seed))
    pairing, _ = pair_by_numbers(Program("net", graph), Program("net", again), feed, {})
    assert all(name == value for name, value in pairing.names.items())
    assert set(pairing.names) == {*graph.values, "x"}


def test_behind_pairs_in_a_row_stands_the_value_before_the_first(tmp_path: Path) -> None:
    net = NetBuilder()
    scale, zero = net.weight(np.float32(0.1)), net.weight(np.int8(0))
    value = "x"
    for _ in range(2):
        value = net.op("DequantizeLinear", net.op("QuantizeLinear", value, scale, zero), scale, zero)
    net.op("Relu", value, name="y")
    graph = Graph(net.save(tmp_path / "net.onnx", {"x": (1, [1, 4, 5, 5])}, ["y"]))
    assert quantized_inputs(graph)["node_y"] == {value: "x"}
    back = Graph(remove_qdq(graph, ["node_y"], tmp_path / "back.onnx"))
    feed = image((1, 4, 5, 5))
    assert run(back.path, feed)["y"].tobytes() == np.maximum(feed["x"], 0).tobytes()
