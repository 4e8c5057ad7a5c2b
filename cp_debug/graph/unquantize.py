"""Take INT8 out of a Q/DQ graph again, layer by layer: a node reads what went into the pair in front of it."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import onnx

from cp_debug.errors import InputError
from cp_debug.graph.graph import Graph, Node, refill
from cp_debug.graph.operators import QUANTIZERS
from cp_debug.graph.surgery import save


def quantized_inputs(graph: Graph) -> dict[str, dict[str, str]]:
    """Node → (output of a Q/DQ pair → value that goes into the pair), for every node that reads such outputs.

    A weight that is stored in INT8 went through no pair, and stays what it is.
    """
    around: dict[str, str] = {}
    for node in graph.nodes:
        quantizer = graph.producer.get(node.inputs[0]) if node.op == "DequantizeLinear" else None
        if quantizer is not None and quantizer.op == "QuantizeLinear":
            source = quantizer.inputs[0]
            around[node.outputs[0]] = around.get(source, source)
    by_node = {n.name: {i: around[i] for i in n.inputs if i in around} for n in graph.nodes if n.op != "QuantizeLinear"}
    return {name: pairs for name, pairs in by_node.items() if pairs}


def plain_nodes(graph: Graph) -> dict[str, Node]:
    """Node → the same node reading what is in front of Q/DQ pairs, for every node that reads from such pairs."""
    found: dict[str, Node] = {}
    around = quantized_inputs(graph)
    for node in graph.nodes:
        if pairs := around.get(node.name):
            found[node.name] = node.changed([pairs.get(name, name) for name in node.proto.input])
    return found


def remove_qdq(graph: Graph, nodes: Collection[str], target: Path) -> Path:
    """Write ``graph`` as ``target``, without the pairs in front of ``nodes``, and return it.

    What no node reads any more is left out; all names stay. Raises InputError for a node that reads nothing quantized.
    """
    pairs = quantized_inputs(graph)
    if unknown := sorted(set(nodes) - pairs.keys()):
        raise InputError(f"{graph}: no node {unknown[0]!r} that reads from DequantizeLinear")
    model = graph.copied()
    needed = {v.name for v in graph.outputs}
    remaining: list[onnx.NodeProto] = []
    for node in reversed(graph.nodes):
        if node.op in QUANTIZERS and needed.isdisjoint(node.outputs):
            continue
        bypass = pairs[node.name] if node.name in nodes else {}
        proto = node.changed([bypass.get(name, name) for name in node.proto.input]).proto
        proto.name = node.name  # one without a name is called after its place, which changes
        remaining.append(proto)
        needed.update(bypass.get(name, name) for name in node.inputs)
    refill(model.graph.node, reversed(remaining))
    refill(model.graph.initializer, (t for t in model.graph.initializer if t.name in needed))
    save(model, graph, target)
    return target
