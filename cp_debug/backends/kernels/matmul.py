"""Matrix products."""

from __future__ import annotations

import torch
from torch import Tensor

from cp_debug.backends.kernels import fp16_accumulation, scaled_products
from cp_debug.backends.kernels.fp16_accumulation import Order
from cp_debug.backends.kernels.registry import Call, kernel
from cp_debug.backends.kernels.scaled_products import Narrow
from cp_debug.backends.scaling import Axes


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
