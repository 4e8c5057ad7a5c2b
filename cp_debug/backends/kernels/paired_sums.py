"""Products of bytes that are added in pairs in 16 bits, which saturate: INT8 on x86 processors without VNNI.

AVX2 and AVX-512 multiply unsigned bytes by signed ones with VPMADDUBSW, which adds the products of two neighbours and
cuts the sum off at −32768 and 32767 (Intel 64 and IA-32 Architectures Software Developer's Manual, volume 2); VNNI adds
in 32 bits. ONNX Runtime's kernels for unsigned data and signed weights use whichever the processor has
(onnxruntime/core/mlas/lib/qgemm.h and its kernels by processor); their terms lie tap by tap, the channels within.

ONNX Runtime turns a product between DequantizeLinear nodes into an integer kernel, and signed data into unsigned ones
(onnxruntime/core/optimizer/qdq_transformer), so the loss of that kernel is added behind the product. The graph's own
integer operators saturate by the arithmetic alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import onnx
import torch
from onnx import TensorProto
from torch import Tensor
from torch.nn import functional

from cp_debug.backends.arithmetic import INT8
from cp_debug.backends.kernels.registry import Call, kernel
from cp_debug.backends.kernels.windows import Window
from cp_debug.graph.graph import Graph, Node
from cp_debug.graph.integer_values import constant_type

LOWEST, HIGHEST = -(1 << 15), (1 << 15) - 1
_AT_ONCE = 1 << 22
"""Products that are held at once."""
LOSS = "cpdebug.PairLoss"
"""Node that this project puts behind a product of dequantized values (``causes/paired_sums.py``)."""


def lost(data: Tensor, weights: Tensor) -> Tensor:
    """Loss of sums of products to saturation, float64 [.., M, N], whole numbers: saturated less exact.

    ``data`` [.., M, K], levels from 0 to 255, ``weights`` [.., K, N], from −128 to 127, of any dtype, batches as for a
    product. The terms are paired from the first one on.
    """
    odd = data.shape[-1] % 2
    a, b = functional.pad(data.double(), (0, odd)), functional.pad(weights.double(), (0, 0, 0, odd))
    a, b = a.unflatten(-1, (-1, 2)), b.unflatten(-2, (-1, 2))
    reach = 255 * torch.maximum(b.clamp(min=0).sum(-2), -b.clamp(max=0).sum(-2))
    able = (reach > HIGHEST).flatten(0, -3).any(0).any(-1) if reach.dim() > 2 else (reach > HIGHEST).any(-1)
    places = able.nonzero().flatten()
    batch = np.broadcast_shapes(a.shape[:-3], b.shape[:-3])
    result = torch.zeros(*batch, a.shape[-3], b.shape[-1], dtype=torch.float64, device=data.device)
    for some in places.split(max(_AT_ONCE // max(result.numel(), 1), 1)):
        first, second = (a[..., some, i, None] * b[..., None, some, i, :] for i in (0, 1))
        sums = first + second
        result += (sums.clamp(LOWEST, HIGHEST) - sums).sum(-2)
    return result


def lost_in_product(call: Call, data: Tensor, weights: Tensor) -> Tensor | float:
    """``lost`` where the arithmetic saturates and such kernels take these levels, uint8 and int8, of the same shapes; 0
    elsewhere."""
    return lost(data, weights) if _taken(call, data, weights) else 0.0


def lost_in_convolution(call: Call, data: Tensor, weights: Tensor, zero: Tensor | None) -> Tensor | float:
    """``lost_in_product`` for a convolution, float64 in the shape of its result: ``data`` [B, C, …], ``weights``
    [outputs, C ÷ groups, …]; ``zero`` is the level of 0, with which the borders are filled."""
    if not _taken(call, data, weights):
        return 0.0
    return _lost_in_windows(call, data, weights, 0.0 if zero is None else float(zero))


def _taken(call: Call, data: Tensor, weights: Tensor) -> bool:
    return call.arithmetic.paired_sums and (data.dtype, weights.dtype) == (torch.uint8, torch.int8)


def _lost_in_windows(call: Call, data: Tensor, weights: Tensor, zero: float) -> Tensor | float:
    """0 where each channel has one filter of its own, for which there are other kernels."""
    groups = call["group"] or 1
    outputs, inputs = weights.shape[0] // groups, weights.shape[1]
    if groups > 1 and outputs == inputs == 1:
        return 0.0
    window = Window.of(call, weights.shape[2:], data.shape[2:])
    patches = functional.pad(data.double() - zero, window.torch_pads()) + zero
    for axis, (size, step, spread) in enumerate(zip(window.kernel, window.stride, window.dilation, strict=True), 2):
        patches = patches.unfold(axis, (size - 1) * spread + 1, step)[..., ::spread]
    places = patches.shape[2 : data.dim()]
    patches = patches.unflatten(1, (groups, inputs)).movedim(2, -1)  # [B, groups, places…, taps…, inputs]
    odd = inputs % 2 if call["even"] else 0
    rows = functional.pad(patches, (0, odd)).reshape(len(data), groups, places.numel(), -1)
    taps = functional.pad(weights.double().unflatten(0, (groups, outputs)).movedim(2, -1), (0, odd))
    taps = taps.reshape(groups, outputs, -1)
    result = lost(rows, taps.mT)  # [B, groups, places, outputs]
    return result.movedim(-1, 2).reshape(len(data), groups * outputs, *places)


@kernel(LOSS, rounds=False, exact=True)
def pair_loss(
    call: Call, data: Tensor, scale: Tensor, zero: Tensor | None, levels: Tensor, weight_scale: Tensor
) -> Tensor:
    """Loss of a product of dequantized values to saturation, in the product's shape and the dtype of ``data``, as the
    kernels for unsigned data would have it.

    ``data`` are the numbers, ``levels`` the weights as they are stored (int8), ``scale`` and ``zero`` of the data, one
    each; signed data are shifted to unsigned ones, as ONNX Runtime's optimizer does. The node's attribute ``product``
    is the operator, ``even`` whether no pair reaches from one tap into the next, as where channels are padded (oneDNN);
    its other attributes are those of the product.
    """
    offset = 0.0 if zero is None else float(zero)
    if zero is not None and zero.dtype == torch.int8:
        offset += 128
    unsigned = (torch.round(data.double() / scale.double().reshape(())) + offset).clamp(0, 255)
    if call["product"] == "Conv":
        sums = _lost_in_windows(call, unsigned, levels, offset)
        by_channel = weight_scale.double().reshape(-1, *(1,) * (data.dim() - 2))
    else:
        left, right = unsigned.mT if call["transA"] else unsigned, levels.mT if call["transB"] else levels
        sums, by_channel = lost(left, right), weight_scale.double().reshape(-1)
        by_channel = by_channel * (1.0 if call["alpha"] is None else call["alpha"])
    return torch.as_tensor(sums * (scale.double().reshape(()) * by_channel)).to(data.dtype)


PAIRED = replace(INT8, paired_sums=True)
_PRODUCTS = ("Conv", "Gemm", "MatMul")
"""Products for which ONNX Runtime has integer kernels."""
INTEGER_PRODUCTS = {
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
        found = found or node.op in INTEGER_PRODUCTS
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
