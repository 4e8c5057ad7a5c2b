"""Narrow floating-point types of scaled products, element by element: E4M3, E5M2, E2M1 and the scales E8M0.

Definitions: OCP 8-bit Floating Point Specification (OFP8) 1.0 and OCP Microscaling Formats (MX) 1.0. Rounding is to
nearest, ties to even. Numbers beyond a type's range become its largest finite one, as quantizers do it (``satfinite``
of PTX); what a plain cast does instead is ``Codec.overflow``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Codec:
    """A type of 4 or 8 bits: what it can hold, and how FP32 is rounded to it."""

    name: str
    largest: float
    """The largest finite number."""
    tiniest: float
    """The smallest normal number."""
    exponent: int
    """Exponent of the largest power of two: ``emax`` in the MX specification."""
    mantissa: int
    """Explicit mantissa bits."""
    overflow: str
    """Result of a conversion without saturation by OFP8 and MX: ``nan`` in E4M3, which has no Inf, ``inf`` in E5M2,
    ``largest`` in E2M1. (torch's cast to E4M3 saturates on some devices and versions.)"""
    nearest: Callable[[Tensor], Tensor]
    """Rounding of float32 within the range; any shape, the dtype stays."""

    @property
    def smallest(self) -> float:
        """The smallest number above 0, a subnormal one."""
        return self.tiniest * 2.0**-self.mantissa

    def __call__(self, x: Tensor) -> Tensor:
        """``x`` rounded to the type, saturating; any shape, the dtype stays. NaN stays NaN, also in E2M1, which has
        none: so it is not lost."""
        single = x.to(torch.float32).clamp(-self.largest, self.largest)
        return self.nearest(single).to(x.dtype)


def _through(dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    return lambda x: x.to(dtype).to(x.dtype)


def _e2m1(x: Tensor) -> Tensor:
    """Float32 of any shape rounded to 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives; beyond 6 nothing is cut off."""
    step = torch.exp2((torch.frexp(x).exponent - 2).clamp(min=-1).to(x.dtype))
    return torch.round(x / step) * step


E4M3 = Codec("e4m3", 448.0, 2.0**-6, 8, 3, "nan", _through(torch.float8_e4m3fn))
E5M2 = Codec("e5m2", 57344.0, 2.0**-14, 15, 2, "inf", _through(torch.float8_e5m2))
E2M1 = Codec("e2m1", 6.0, 1.0, 2, 1, "largest", _e2m1)
CODECS = {codec.name: codec for codec in (E4M3, E5M2, E2M1)}


def e8m0(exponent: Tensor) -> Tensor:
    """Powers of two that E8M0 holds, float32: 2 to ``exponent`` (integers, any shape), kept within −127 … 127.

    NaN, E8M0's only other value, is left to the caller.
    """
    # ldexp in two steps: torch computes 2**-127 as a power first, which is subnormal.
    kept = exponent.clamp(-127, 127)
    half = torch.div(kept, 2, rounding_mode="floor")
    return torch.exp2(half.to(torch.float32)) * torch.exp2((kept - half).to(torch.float32))


def floor_log2(x: Tensor) -> Tensor:
    """Exponents of positive float32 numbers, int32 of the same shape: the largest powers of two not above them.

    0 has −150, below every subnormal.
    """
    mantissa, exponent = torch.frexp(x)
    return torch.where(mantissa == 0, torch.full_like(exponent, -150), exponent - 1)
