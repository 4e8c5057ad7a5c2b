"""Matrix products."""

from __future__ import annotations

import torch
from torch import Tensor

from cp_debug.backends.kernels import fp16_accumulation
from cp_debug.backends.kernels.registry import Call, kernel


@kernel("MatMul", multiplies=True)
def matmul(call: Call, a: Tensor, b: Tensor) -> Tensor:
    if not a.is_floating_point():
        return torch.matmul(a, b)
    a, b = call.arithmetic.operands(a, b)
    tile, slices = call.arithmetic.tile, call.arithmetic.slices
    return fp16_accumulation.matmul(a, b, tile, slices) if tile else torch.matmul(a, b)


@kernel("Gemm", multiplies=True)
def gemm(call: Call, a: Tensor, b: Tensor, c: Tensor | None = None) -> Tensor:
    product = matmul(call, a.mT if call["transA"] else a, b.mT if call["transB"] else b)
    assert isinstance(product, Tensor)
    if call["alpha"] != 1:
        product = product * call["alpha"]
    return product if c is None else product + (c if call["beta"] == 1 else c * call["beta"])


@kernel("Einsum", multiplies=True)
def einsum(call: Call, *operands: Tensor) -> Tensor:
    # Its products accumulate in the held dtype in every arithmetic: no FP16 order is known for it.
    return torch.einsum(call["equation"].replace(" ", ""), *call.arithmetic.operands(*operands))
