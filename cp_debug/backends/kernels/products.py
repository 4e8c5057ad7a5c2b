"""Sums of products: MatMul, Gemm, Einsum, Conv and ConvTranspose."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor
from torch.nn import functional

from cp_debug.backends.kernels import fp16_accumulation, scaled_products
from cp_debug.backends.kernels.fp16_accumulation import Order
from cp_debug.backends.kernels.registry import Call, kernel
from cp_debug.backends.kernels.scaled_products import Narrow
from cp_debug.backends.kernels.windows import Window, split_padding
from cp_debug.backends.scaling import KERNEL, TRANSPOSED_KERNEL, Axes

_CONV = {1: functional.conv1d, 2: functional.conv2d, 3: functional.conv3d}
_TRANSPOSED = {1: functional.conv_transpose1d, 2: functional.conv_transpose2d, 3: functional.conv_transpose3d}
UNFOLDED = 1 << 24
"""Bytes of the matrix into which torch unfolds the data of an FP64 convolution on the CPU, as many times larger as the
kernel has elements: of large data a few rows at a time."""


@kernel("Conv", multiplies=True)
def conv(call: Call, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    window = Window.of(call, weight.shape[2:], x.shape[2:])
    scaling, running_sum = call.scaling, call.arithmetic.running_sum
    if scaling and running_sum:
        return scaled_products.conv(x, weight, bias, window, call["group"], Narrow(scaling, running_sum))
    if scaling:
        x, weight = scaled_products.decoded(x, weight, KERNEL, call["group"], scaling)
    else:
        x, weight = call.operands(x, weight)
    if call.arithmetic.tile:
        how = call.arithmetic
        order = Order(call.arithmetic.tile, how.slices, how.split, how.split_kernels)
        return fp16_accumulation.conv(x, weight, bias, window, call["group"], order, how.vector)
    padding, size = window.begin, window.output_size(x.shape[2:])
    row = len(x) * math.prod((*weight.shape[1:], *size[1:])) * x.element_size()
    unfolds = x.dtype == torch.float64 and not x.is_cuda and max(window.kernel) > 1
    rows = max(UNFOLDED // max(row, 1), 1) if unfolds else size[0]
    if not window.symmetric or rows < size[0]:
        x, padding = functional.pad(x, window.torch_pads()), (0,) * len(window.kernel)

    def convolved(part: Tensor) -> Tensor:
        return _CONV[x.dim() - 2](part, weight, bias, window.stride, padding, window.dilation, call["group"])

    if rows >= size[0]:
        return convolved(x)
    step, span = window.stride[0], (window.kernel[0] - 1) * window.dilation[0] + 1
    starts = ((first, min(rows, size[0] - first)) for first in range(0, size[0], rows))
    return torch.cat([convolved(x.narrow(2, first * step, (n - 1) * step + span)) for first, n in starts], 2)


@kernel("ConvTranspose", multiplies=True)
def conv_transpose(call: Call, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    window = Window.of(call, weight.shape[2:], x.shape[2:])
    rank = len(window.kernel)
    extra = tuple(call["output_padding"] or (0,) * rank)
    full = [
        (n - 1) * s + (k - 1) * d + 1
        for n, k, s, d in zip(x.shape[2:], window.kernel, window.stride, window.dilation, strict=True)
    ]
    size = call["output_shape"]
    if size is None and call["auto_pad"].startswith("SAME"):
        size = [n * s for n, s in zip(x.shape[2:], window.stride, strict=True)]
    if size is not None:
        totals = [f + e - n for f, e, n in zip(full, extra, size, strict=True)]
        pads = split_padding(totals, extra_at_end=call["auto_pad"] == "SAME_UPPER")
        window = dataclasses.replace(window, begin=pads[:rank], end=pads[rank:])
    else:
        size = [f + e - b - p for f, e, b, p in zip(full, extra, window.begin, window.end, strict=True)]

    scaling, running_sum = call.scaling, call.arithmetic.running_sum
    if scaling and running_sum:
        narrow = Narrow(scaling, running_sum)
        return scaled_products.conv_transpose(x, weight, bias, window, tuple(size), call["group"], narrow)
    if scaling:
        x, weight = scaled_products.decoded(x, weight, TRANSPOSED_KERNEL, call["group"], scaling)
    else:
        x, weight = call.operands(x, weight)
    if call.arithmetic.tile:
        order = Order(call.arithmetic.tile, call.arithmetic.slices)
        return fp16_accumulation.conv_transpose(x, weight, bias, window, size, call["group"], order)
    transposed = _TRANSPOSED[rank]
    if window.symmetric and min(window.begin) >= 0:
        return transposed(x, weight, bias, window.stride, window.begin, extra, call["group"], window.dilation)
    uncropped = transposed(x, weight, None, window.stride, 0, 0, call["group"], window.dilation)
    crop = [p for b, n, f in zip(window.begin, size, full, strict=True) for p in (n + b - f, -b)][::-1]
    uncropped = functional.pad(uncropped, crop)
    return uncropped if bias is None else uncropped + bias.reshape(-1, *(1,) * rank)


@kernel("MatMul", multiplies=True)
def matmul(call: Call, a: Tensor, b: Tensor) -> Tensor:
    if not a.is_floating_point():
        return torch.matmul(a, b)
    scaling, running_sum = call.scaling, call.arithmetic.running_sum
    if scaling and running_sum:
        return scaled_products.matmul(a, b, Narrow(scaling, running_sum))
    a, b = call.operands(a, b)
    order = call.arithmetic
    if not order.tile:
        return torch.matmul(a, b)
    return fp16_accumulation.matmul(a, b, Order(order.tile, order.slices, order.split, order.split_kernels))


@kernel("Gemm", multiplies=True)
def gemm(call: Call, a: Tensor, b: Tensor, c: Tensor | None = None) -> Tensor:
    product = matmul(call, a.mT if call["transA"] else a, b.mT if call["transB"] else b)
    if call["alpha"] != 1:
        product = product * call["alpha"]
    return product if c is None else product + (c if call["beta"] == 1 else c * call["beta"])


@kernel("Einsum", multiplies=True)
def einsum(call: Call, *operands: Tensor) -> Tensor:
    # Its products accumulate in the held dtype in every arithmetic: no other order is known for it.
    equation = call["equation"].replace(" ", "")
    return torch.einsum(equation, *call.operands(*operands, axes=_axes(equation, len(operands))))


def _axes(equation: str, count: int) -> list[Axes]:
    """Axes of an Einsum's operands: the last label that is summed with another operand, and the last that is not."""
    terms, arrow, result = equation.partition("->")
    labels = terms.split(",")
    axes = []
    for i, own in enumerate(labels):
        others = "".join(labels[:i] + labels[i + 1 :])
        kept = [label for label in own if label.isalpha() and (label in result if arrow else label not in others)]
        summed = [label for label in own if label.isalpha() and label in others and label not in kept]
        reduced = own.index(summed[-1]) - len(own) if summed else -1
        axes.append(Axes(reduced, own.index(kept[-1]) - len(own) if kept else None))
    return axes or [Axes(-1, None)] * count
