"""A quantized graph as processors without VNNI compute it: its INT8 sums saturate in pairs of products.

ONNX Runtime turns a product between DequantizeLinear nodes into an integer kernel, and signed data into unsigned ones
(onnxruntime/core/optimizer/qdq_transformer), so the loss of that kernel is added behind the product. The graph's own
integer operators saturate by the arithmetic alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import onnx
from onnx import TensorProto

from cp_debug.backends.arithmetic import INT8
from cp_debug.backends.kernels.paired_sums import LOSS
from cp_debug.graph.graph import Graph, Node
from cp_debug.graph.integer_values import constant_type

PAIRED = replace(INT8, paired_sums=True)
_PRODUCTS = ("Conv", "Gemm", "MatMul")
"""Products for which ONNX Runtime has integer kernels."""
_INTEGER = {
    *("QLinearConv", "QLinearMatMul", "MatMulInteger"),
    *(
        f"com.microsoft.{op}"
        for op in ("DynamicQuantizeLSTM", "DynamicQuantizeMatMul", "MatMulIntegerToFloat", "QGemm")
    ),
}
"""Operators that saturate by the arithmetic."""
_UNSIGNED_OR_SIGNED = (TensorProto.UINT8, TensorProto.INT8)


def with_paired_sums(graph: Graph, nodes: Sequence[Node], *, even: bool = False) -> list[Node] | None:
    """``nodes`` of ``graph``, to be run in ``PAIRED``, with what saturation adds behind each product between levels.

    ``even``: channels are padded, so that pairs lie within a tap. None where nothing among them is computed by kernels
    that may saturate.
    """
    changed: list[Node] = []
    found = False
    for node in nodes:
        found = found or node.op in _INTEGER
        loss = _loss(graph, node, even) if node.op in _PRODUCTS else None
        if loss is None:
            changed.append(node)
            continue
        found = True
        result = node.outputs[0]
        exact = node.changed().proto
        exact.output[0] = f"{result}\x1fexact"
        total = onnx.helper.make_node("Add", [exact.output[0], loss.output[0]], [result])
        # No node of a graph has a negative place.
        places = (-3 * node.index - offset for offset in (1, 2, 3))
        changed += [
            replace(Node.of(place, proto), name=node.name)
            for place, proto in zip(places, (exact, loss, total), strict=True)
        ]
    return changed if found else None


def _loss(graph: Graph, node: Node, even: bool) -> onnx.NodeProto | None:
    """The node that computes what saturation adds to a product; None where it is not one of levels."""
    data, weights = (graph.producer.get(name) for name in node.proto.input[:2])
    if data is None or weights is None or data.op != weights.op or data.op != "DequantizeLinear":
        return None
    (_, scale, *zeros), (levels, weight_scale, *weight_zeros) = data.proto.input, weights.proto.input
    kind = constant_type(graph, zeros[0]) if zeros and zeros[0] else TensorProto.UINT8
    stored = constant_type(graph, levels) or (constant_type(graph, weight_zeros[0]) if weight_zeros else None)
    if kind not in _UNSIGNED_OR_SIGNED or stored != TensorProto.INT8:
        return None
    domain, _, op = LOSS.partition(".")
    reads = [node.proto.input[0], scale, zeros[0] if zeros else "", levels, weight_scale]
    loss = onnx.helper.make_node(op, reads, [f"{node.outputs[0]}\x1floss"], domain=domain, product=node.op, even=even)
    loss.attribute.extend(node.proto.attribute)
    return loss
