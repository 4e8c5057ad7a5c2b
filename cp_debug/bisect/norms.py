"""Norms of tensors and of their differences, block by block in float64: no second copy of a large tensor."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from cp_debug.backends.base import Tensor as AnyTensor

BLOCK = 1 << 20
"""Elements taken at once."""


class Distance(NamedTuple):
    """L2 norms over the elements that are finite on both sides."""

    difference: float
    """‖ours − theirs‖."""
    whole: float
    """‖theirs‖."""
    born: int
    """Elements that are NaN or Inf in ours and finite in theirs."""


def distance(ours: AnyTensor, theirs: AnyTensor) -> Distance:
    """Compare two tensors of one shape, numpy (memory-mapped too) or torch."""
    a, b = ours.reshape(-1), theirs.reshape(-1)
    differing, whole, born = 0.0, 0.0, 0
    for start in range(0, len(b), BLOCK):
        x, y = _block(a, start), _block(b, start)
        difference = float(torch.linalg.vector_norm(x - y))
        size = float(torch.linalg.vector_norm(y))
        if not (math.isfinite(difference) and math.isfinite(size)):
            finite_y = torch.isfinite(y)
            finite = torch.isfinite(x) & finite_y
            born += int((finite_y & ~finite).sum())
            difference = float(torch.linalg.vector_norm(torch.where(finite, x - y, 0.0)))
            size = float(torch.linalg.vector_norm(torch.where(finite, y, 0.0)))
        differing, whole = math.hypot(differing, difference), math.hypot(whole, size)
    return Distance(differing, whole, born)


def ratio(a: float, b: float) -> float:
    """a ÷ b; 0 when both are 0, infinite when only b is."""
    return a / b if b else (math.inf if a else 0.0)


def _block(flat: AnyTensor, start: int) -> Tensor:
    part = flat[start : start + BLOCK]
    return part.double() if isinstance(part, Tensor) else torch.from_numpy(np.asarray(part, np.float64))
