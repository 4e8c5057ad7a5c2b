"""Put INT8 into an ONNX graph: QuantizeLinear and DequantizeLinear around what convolutions and products read.

Symmetric, as TensorRT and ONNX Runtime want it: zero point 0, one scale for an activation, one for each output channel
of a weight. Weights stay FP32 in front of their QuantizeLinear, which every version of TensorRT reads (8.6 takes no
INT8 constants). Nodes and values keep their names, so that a layer is called the same with and without INT8.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

import numpy as np
import onnx
from onnx import helper, numpy_helper

from cp_debug.errors import InputError
from cp_debug.graph.downstream import from_inputs
from cp_debug.graph.graph import Graph, Node, refill
from cp_debug.graph.onnx_tensors import FLOATS
from cp_debug.graph.operators import BODIES, PRODUCTS
from cp_debug.graph.opset import convert, inlined
from cp_debug.graph.surgery import save, unused_names

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
    save(_QdqSurgery(graph, layers, residual_adds, stored).model(), graph, target)
    return target


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
    kind = graph.types.get(node.outputs[0])
    return kind is None or kind.tensor_type.elem_type in (onnx.TensorProto.UNDEFINED, *FLOATS)


@dataclass
class _QdqSurgery:
    """One rewriting of ``graph`` with Q/DQ pairs; each value and scale gets one pair."""

    graph: Graph
    layers: Mapping[str, LayerScales]
    residual_adds: Mapping[str, float]
    stored: Mapping[str, float]
    pairs: dict[tuple[str, bytes, int | None], str] = field(default_factory=dict)
    """(Value, its scale, the scale's axis) → the value that went through INT8."""
    weights: list[onnx.TensorProto] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.nodes = {node.name: node for node in self.graph.nodes}
        self.fresh = unused_names(self.graph)
        self.data = _data(self.graph)

    def model(self) -> onnx.ModelProto:
        """The rewritten model. Raises InputError as ``insert_qdq`` does."""
        for name in (*self.layers, *self.residual_adds):
            self._check(name)
        model = raised(self.graph, OPSET, "INT8")
        refill(model.graph.node, (new for proto in model.graph.node for new in self._rewrite(proto)))
        model.graph.initializer.extend(self.weights)
        return model

    def _check(self, name: str) -> None:
        """Raise InputError unless the node exists, has an operator for INT8, and reads unquantized FP32."""
        node, where = self.nodes.get(name), f"{self.graph}: "
        if node is None:
            raise InputError(f"{where}no node {name!r} to quantize")
        expected = PRODUCTS if name in self.layers else ("Add",)
        if node.op not in expected:
            raise InputError(f"{where}node {name!r} is of {node.op}; expected {' or '.join(expected)}")
        for value in node.proto.input[:2]:
            if value in self.graph.producer and self.graph.producer[value].op == "DequantizeLinear":
                raise InputError(f"{where}node {name!r} is quantized already: {value!r} comes out of DequantizeLinear")
            if self._type(value)[0] not in (onnx.TensorProto.UNDEFINED, onnx.TensorProto.FLOAT):
                raise InputError(f"{where}node {name!r} reads {value!r}, which is not FP32; quantize before casting")
        if name in self.layers and node.proto.input[1] in self.data:
            raise InputError(f"{where}node {name!r} multiplies two computed values; it has no weight to quantize")

    def _rewrite(self, proto: onnx.NodeProto) -> Iterator[onnx.NodeProto]:
        """The node, behind the pairs that it is the first to need."""
        name = proto.name
        ranges: dict[int, tuple[np.ndarray, int | None]] = {
            slot: (np.asarray(self.stored[value], np.float32), None)
            for slot, value in enumerate(proto.input)
            if value in self.stored
        }
        if name in self.layers:
            layer = self.layers[name]
            weight = self._of_weight(self.nodes[name], layer.weight)
            ranges |= {0: (np.asarray(layer.input, np.float32), None), 1: weight}
        elif name in self.residual_adds:
            ranges |= dict.fromkeys((0, 1), (np.asarray(self.residual_adds[name], np.float32), None))
        for slot, (amax, axis) in sorted(ranges.items()):
            proto.input[slot], pair = self._quantized(name, proto.input[slot], amax, axis)
            yield from pair
        yield proto

    def _of_weight(self, node: Node, amax: np.ndarray) -> tuple[np.ndarray, int | None]:
        """The weight's largest magnitudes (float32 ``[C_out]``) and their axis; a scalar and None for one scale."""
        amax, (_, shape) = np.asarray(amax, np.float32).reshape(-1), self._type(node.proto.input[1])
        if len(amax) == 1:
            return amax[0], None
        axis = weight_axis(node, len(shape) if shape else 2)
        if shape is not None and shape[axis] != len(amax):
            grouped = node.op == "ConvTranspose" and node.attribute("group", 1) > 1
            why = "; ONNX has no scale for each output channel of a grouped ConvTranspose" if grouped else ""
            raise InputError(
                f"{self.graph}: node {node.name!r} has {len(amax)} weight scales; expected 1 or {shape[axis]}, "
                f"axis {axis} of its weight {list(shape)}{why}"
            )
        return amax, axis

    def _type(self, value: str) -> tuple[int, tuple[int, ...] | None]:
        """Data type (0 where unknown) and shape of a value or weight."""
        if value in self.graph.initializers:
            weight = self.graph.weight(value)
            return weight.data_type, tuple(weight.dims)
        kind = self.graph.types.get(value, onnx.TypeProto()).tensor_type
        return kind.elem_type, tuple(d.dim_value for d in kind.shape.dim) if kind.HasField("shape") else None

    def _quantized(self, node: str, value: str, amax: np.ndarray, axis: int | None) -> tuple[str, list[onnx.NodeProto]]:
        """The name of ``value`` after INT8, and the pair of nodes that makes it unless they exist."""
        if not np.isfinite(amax).all() or (amax < 0).any():
            raise InputError(f"{self.graph}: node {node!r}: the range of {value!r} is {amax}; expected ≥ 0")
        scale = np.where(amax > 0, amax / np.float32(LEVELS), np.float32(1))  # what is all zero stays zero
        key = (value, scale.tobytes(), axis)
        if key in self.pairs:
            return self.pairs[key], []
        levels, result = self.fresh(f"{value}__int8"), self.fresh(f"{value}__dequantized")
        parameters = [self.fresh(f"{value}__scale"), self.fresh(f"{value}__zero_point")]
        for name, array in zip(parameters, (scale.astype(np.float32), np.zeros(scale.shape, np.int8)), strict=True):
            self.weights.append(numpy_helper.from_array(array, name))
        self.pairs[key] = result
        along = {} if axis is None else {"axis": axis}
        return result, [
            helper.make_node(op, [source, *parameters], [name_out], name=self.fresh(f"{name_out}_{op}"), **along)
            for op, source, name_out in (("QuantizeLinear", value, levels), ("DequantizeLinear", levels, result))
        ]


def _data(graph: Graph) -> set[str]:
    """Every value that depends on an input of the graph, and the inputs."""
    return {*from_inputs(graph), *(v.name for v in graph.inputs)}


def raised(graph: Graph, opset: int, need: str) -> onnx.ModelProto:
    """A copy of the model in ``opset`` at least: as it is where that means the same, else converted by ONNX, which puts
    nodes beside it. Every node has a name of its own: one without is called after its place, which changes.

    ``need``: what needs the opset, for messages. Raises InputError where ONNX does not convert one of the operators, or
    would lose one of the values.
    """
    old = graph.opsets.get("", 1)
    onnx_nodes = [node for node in graph.nodes if node.proto.domain in ("", "ai.onnx") and old < opset]
    changed = [n for n in onnx_nodes if n.op in BODIES or _signature(n, old) != _signature(n, opset)]
    model = inlined(graph) if changed else graph.copied()
    for proto, node in zip(model.graph.node, graph.nodes, strict=True):
        proto.name = node.name
    if old < opset:
        first = f", where {changed[0].op} (node {changed[0].name!r}) is another operator" if changed else ""
        where = f"{graph}: opset {old}, but {need} needs {opset}{first}; export the model again: ONNX's converter"
        convert(model, graph, opset, where, relabel=not changed)
    return model


def _signature(node: Node, opset: int) -> object:
    """Inputs and defaults of a node's operator; None for one that is not in the schemas of ``opset``."""
    if (schema := node.schema({"": opset})) is None:
        return None
    defaults = {n: a.default_value.SerializeToString() for n, a in schema.attributes.items() if a.default_value.type}
    return [formal.name for formal in schema.inputs], defaults
