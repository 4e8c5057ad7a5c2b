"""INT8 in an ONNX graph: Q/DQ pairs put around what convolutions and products read, and taken out again by layer.

Symmetric, as TensorRT and ONNX Runtime want it: zero point 0, one scale for an activation, one for each output channel
of a weight. Weights stay FP32 in front of their QuantizeLinear, which every version of TensorRT reads (8.6 takes no
INT8 constants). Nodes and values keep their names, so that a layer is called the same with and without INT8.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx

from cp_debug.errors import InputError
from cp_debug.graph.free_axes import known_dims
from cp_debug.graph.graph import Graph, Node, from_inputs, refill
from cp_debug.graph.narrow_qdq import DataCodes, insert_pairs
from cp_debug.graph.onnx_tensors import FLOATS
from cp_debug.graph.operators import PRODUCTS, QUANTIZERS
from cp_debug.graph.surgery import save

if TYPE_CHECKING:
    from cp_debug.graph.scales import LayerScales


LEVELS = 127
"""A scale is the largest magnitude divided by this; QuantizeLinear itself clips at −128 and 127."""
OPSET = 13
"""Oldest opset in which a scale may be one for each channel."""


def insert_qdq(
    graph: Graph,
    layers: Mapping[str, LayerScales],
    target: Path,
    residual_adds: Mapping[str, float] = MappingProxyType({}),
    stored: Mapping[str, float] = MappingProxyType({}),
) -> Path:
    """Write ``graph`` with Q/DQ pairs as ``target`` and return it.

    ``layers`` are nodes by name, one of ``PRODUCTS`` each; consumers of a value that quantize it alike share one pair.
    ``residual_adds`` are additions by name, both operands of which get one scale. ``stored`` are values by name and
    their largest magnitude: all else that reads them has them in INT8, too. A graph below opset 13 is raised to it
    where ONNX can convert it. Raises InputError for a name that is no node, an operator that is
    not quantized, a node that is quantized already, a weight that is computed from the inputs, scales that do not fit
    the weight or are no numbers, and an opset that is too old.
    """
    nodes, data = {node.name: node for node in graph.nodes}, _data(graph)
    for name in (*layers, *residual_adds):
        _check(graph, name, nodes.get(name), PRODUCTS if name in layers else {"Add"}, data)

    def wanted(proto: onnx.NodeProto) -> Mapping[int, DataCodes]:
        found: dict[int, tuple[Any, int | None]] = {
            slot: (stored[value], None) for slot, value in enumerate(proto.input) if value in stored
        }
        if proto.name in layers:
            layer = layers[proto.name]
            found |= {0: (layer.input, None), 1: _of_weight(graph, nodes[proto.name], layer.weight)}
        elif proto.name in residual_adds:
            found |= dict.fromkeys((0, 1), (residual_adds[proto.name], None))
        return {slot: _int8(graph, proto, slot, *found[slot]) for slot in sorted(found)}

    return insert_pairs(graph, wanted, target, "INT8", OPSET)


def has_own_pairs(graph: Graph) -> bool:
    """Whether the Q/DQ pairs of a graph are those that ``insert_qdq`` writes: in front of layers, and no others."""
    dequantized = [name for node in graph.nodes if node.op == "DequantizeLinear" for name in node.outputs]
    return bool(dequantized) and all(name.rstrip("_").endswith("__dequantized") for name in dequantized)


def weight_axis(node: Node, rank: int) -> int:
    """The axis of the output channels in the weight of a node of ``PRODUCTS``; ``rank`` is the weight's."""
    if node.op == "Gemm":
        return 1 - node.attribute("transB", 0)
    return {"Conv": 0, "ConvTranspose": 1, "MatMul": rank - 1}[node.op]


def quantizable(graph: Graph) -> list[Node]:
    """The nodes of ``PRODUCTS`` that multiply data by a weight, in execution order; those of integers are none."""
    data = _data(graph)
    return [n for n in graph.nodes if n.op in PRODUCTS and n.proto.input[1] not in data and gives_floats(graph, n)]


def gives_floats(graph: Graph, node: Node) -> bool:
    """Whether a node's result may be floating-point numbers, by its declared type."""
    return graph.element_type(node.outputs[0]) in (onnx.TensorProto.UNDEFINED, *FLOATS)


def _check(graph: Graph, name: str, node: Node | None, expected: Collection[str], data: Collection[str]) -> None:
    """Raise InputError unless the node exists, has an operator for INT8, and reads unquantized FP32."""
    if node is None:
        raise InputError(f"{graph}: no node {name!r} to quantize")
    where = f"{graph}: node {name!r}"
    if node.op not in expected:
        raise InputError(f"{where} is of {node.op}; expected {' or '.join(expected)}")
    for value in node.proto.input[:2]:
        if value in graph.producer and graph.producer[value].op == "DequantizeLinear":
            raise InputError(f"{where} is quantized already: {value!r} comes out of DequantizeLinear")
        if graph.element_type(value) not in (onnx.TensorProto.UNDEFINED, onnx.TensorProto.FLOAT):
            raise InputError(f"{where} reads {value!r}, which is not FP32; quantize before casting")
    if node.op in PRODUCTS and node.proto.input[1] in data:
        raise InputError(f"{where} multiplies two computed values; it has no weight to quantize")


def _of_weight(graph: Graph, node: Node, amax: np.ndarray) -> tuple[np.ndarray, int | None]:
    """The weight's largest magnitudes (float32 ``[C_out]``) and their axis; a scalar and None for one scale."""
    amax, shape = np.asarray(amax, np.float32).reshape(-1), known_dims(graph, node.proto.input[1])
    if len(amax) == 1:
        return amax[0], None
    axis = weight_axis(node, len(shape) if shape else 2)
    if shape is not None and shape[axis] != len(amax):
        grouped = node.op == "ConvTranspose" and node.attribute("group", 1) > 1
        why = "; ONNX has no scale for each output channel of a grouped ConvTranspose" if grouped else ""
        raise InputError(
            f"{graph}: node {node.name!r} has {len(amax)} weight scales; expected 1 or {shape[axis]}, "
            f"axis {axis} of its weight {list(shape)}{why}"
        )
    return amax, axis


def _int8(graph: Graph, proto: onnx.NodeProto, slot: int, amax: Any, axis: int | None) -> DataCodes:
    """The encoding for a largest magnitude, or one for each index of an axis."""
    amax = np.asarray(amax, np.float32)
    if not np.isfinite(amax).all() or (amax < 0).any():
        raise InputError(f"{graph}: node {proto.name!r}: the range of {proto.input[slot]!r} is {amax}; expected ≥ 0")
    scale = np.where(amax > 0, amax / np.float32(LEVELS), np.float32(1))  # what is all zero stays zero
    return DataCodes(onnx.TensorProto.INT8, scale=scale, axis=-1 if axis is None else axis)


def _data(graph: Graph) -> set[str]:
    """Every value that depends on an input of the graph, and the inputs."""
    return {*from_inputs(graph), *(v.name for v in graph.inputs)}


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
    around = quantized_inputs(graph)
    nodes = ((node, around[node.name]) for node in graph.nodes if node.name in around)
    return {node.name: node.changed([pairs.get(name, name) for name in node.proto.input]) for node, pairs in nodes}


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
