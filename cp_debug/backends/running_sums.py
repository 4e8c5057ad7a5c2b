"""Sums of products as tensor cores keep them: a few products at a time, aligned to the largest, in few bits.

An instruction adds ``block`` exact products to the running sum. All of them, the running sum too, are first shifted to
the largest exponent among them and cut off ``aligned`` bits below it; the exponent of a product is the sum of its
operands' exponents. The total is then normalized and cut off after ``kept`` bits. Measured on an H100 with chosen
operands and whole products (docs/gpu/accumulators.md); the same model, without its widths for FP8 kernels of cuBLAS, is
in M. Fasi and others, "Numerical behavior of NVIDIA tensor cores", 2021, and F. Khattak and M. Mikaitis, "Accurate
models of NVIDIA tensor cores", 2025.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_AT_A_TIME = 1 << 21
"""Products worked on at a time: they stay in a core's cache."""


@dataclass(frozen=True)
class RunningSum:
    """A sum of products as a multiplier keeps it. Widths are fraction bits, behind the leading one."""

    name: str
    aligned: int | None
    """Bits below the largest exponent that are added; None: the products of a block are added exactly."""
    kept: int
    """Bits of the running sum."""
    block: int
    """Products of one instruction."""
    lowest: int = -126
    """Exponent of the smallest normal operand: smaller ones are aligned as if they had it."""
    nearest: bool = False
    """Rounds to nearest, ties to even, where tensor cores cut off."""
    promote: int | None = None
    """Products after which the running sum is added to one in FP32, rounded to nearest, and begins at 0 again."""
    largest: float = 3.4028234663852886e38
    """The largest finite sum: beyond it is Inf."""

    @property
    def settings(self) -> dict[str, Any]:
        """The sum in words and numbers, JSON-safe."""
        return {
            "running_sum": self.name,
            "aligned_bits": self.aligned,
            "kept_bits": self.kept,
            "products_per_instruction": self.block,
            "rounding": "nearest" if self.nearest else "truncation",
            "promoted_every": self.promote,
        }

    def matmul(self, a: Tensor, b: Tensor) -> Tensor:
        """a [M, K] times b [K, N], float32 [M, N], or float64 where the operands are; their values are multiplied
        exactly: they have at most 12 significant bits.
        """
        result = a.new_empty(a.shape[0], b.shape[1])
        rows = max(1, _AT_A_TIME // max(1, self.block * b.shape[1]))
        exponents = self._exponents(b)
        for first in range(0, a.shape[0], rows):
            part = a[first : first + rows]
            result[first : first + rows] = self._rows(part, self._exponents(part), b, exponents)
        return result

    def _rows(self, a: Tensor, a_exponents: Tensor, b: Tensor, b_exponents: Tensor) -> Tensor:
        wide = torch.float32 if (self.aligned or 99) <= 13 and a.dtype != torch.float64 else torch.float64
        a, b = a.to(wide), b.to(wide)
        total = a.new_zeros(a.shape[0], b.shape[1])
        promoted = torch.zeros_like(total)
        for first in range(0, a.shape[1], self.block):
            block = slice(first, min(first + self.block, a.shape[1]))
            if self.promote and first and first % self.promote == 0:
                promoted, total = (promoted + total).float().to(wide), torch.zeros_like(total)
            if self.aligned is None:
                total = self._kept(total + a[:, block] @ b[block])
                continue
            products = a[:, block, None] * b[block]
            exponents = a_exponents[:, block, None] + b_exponents[block]
            # 0 has no exponent: it never decides where the others are cut off.
            largest = torch.maximum(exponents.amax(1), torch.where(total == 0, -2048, torch.frexp(total).exponent - 1))
            shift = (self.aligned - torch.where(largest < -600, 0, largest)).to(wide)  # where all of it is 0
            factor = torch.exp2(shift)
            terms = self._integers(products.mul_(factor[:, None])).sum(1) + self._integers(total * factor)
            total = self._kept(terms * torch.exp2(-shift))
        return (promoted + total).to(torch.float32) if self.promote else total.to(torch.float32)

    def _exponents(self, x: Tensor) -> Tensor:
        """Exponents by which products are aligned, int32 of the same shape; 0 has −1024."""
        exponent = (torch.frexp(x.float()).exponent - 1).clamp(min=self.lowest)
        return torch.where(x == 0, -1024, exponent)

    def _integers(self, x: Tensor) -> Tensor:
        return x.round_() if self.nearest else x.trunc_()

    def _kept(self, x: Tensor) -> Tensor:
        """``x`` cut off, or rounded, after ``kept`` bits behind its leading one."""
        step = torch.exp2((torch.frexp(x).exponent - 1 - self.kept).to(x.dtype))
        x = torch.where(torch.isfinite(x), self._integers(x / step) * step, x)
        return torch.where(x.abs() > self.largest, torch.copysign(x.new_tensor(torch.inf), x), x)


HOPPER_FP8 = RunningSum("fp22", aligned=13, kept=13, block=32, lowest=-6)
"""FP8 of an H100 with fast accumulation: a sum of 1 sign, 8 exponent and 13 fraction bits, 14 significant ones."""
HOPPER_FP16 = RunningSum("fp32", aligned=25, kept=23, block=16, lowest=-14)
"""FP16 of an H100, accumulating in FP32."""
HOPPER_BF16 = RunningSum("fp32", aligned=25, kept=23, block=16)
"""BF16 of an H100."""
HOPPER_TF32 = RunningSum("fp32", aligned=25, kept=23, block=8)
"""TF32 of an H100."""
FP16_SUM = RunningSum("fp16", aligned=None, kept=10, block=16, nearest=True, largest=65504.0)
"""Sums in FP16, rounded after each block of products."""
