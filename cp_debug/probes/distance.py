"""Norms of tensors and of their differences in float64, without a second copy of a large tensor."""

from __future__ import annotations

import itertools
import math
from typing import NamedTuple

import numpy as np
import torch
from numba import float32, float64, types
from torch import Tensor

from cp_debug.probes.arrays import Tensor as AnyTensor
from cp_debug.probes.arrays import as_numpy
from cp_debug.probes.statistics_kernel import compiled

BLOCK = 1 << 20
"""Elements taken at once."""


class Distance(NamedTuple):
    """L2 norms over the elements that are finite on both sides."""

    difference: float
    """‖ours − theirs‖."""
    whole: float
    """‖theirs‖."""
    new_nonfinite: int
    """Elements that are NaN or Inf in ours and finite in theirs."""

    @property
    def relative(self) -> float:
        """‖ours − theirs‖ ÷ ‖theirs‖, the relative L2 distance over those elements; see ``ratio``."""
        return ratio(self.difference, self.whole)


def distance(ours: AnyTensor, theirs: AnyTensor) -> Distance:
    """Compare two tensors of one shape and real dtypes, numpy (memory-mapped too) or torch, in float64."""
    if fast := _finite(ours, theirs):
        return fast
    a, b = ours.reshape(-1), theirs.reshape(-1)
    differing, whole, new_nonfinite = 0.0, 0.0, 0
    for start in range(0, len(b), BLOCK):
        x, y = _block(a, start), _block(b, start)
        difference = float(torch.linalg.vector_norm(x - y))
        size = float(torch.linalg.vector_norm(y))
        if not (math.isfinite(difference) and math.isfinite(size)):
            finite_y = torch.isfinite(y)
            finite = torch.isfinite(x) & finite_y
            new_nonfinite += int((finite_y & ~finite).sum())
            difference = float(torch.linalg.vector_norm(torch.where(finite, x - y, 0.0)))
            size = float(torch.linalg.vector_norm(torch.where(finite, y, 0.0)))
        differing, whole = math.hypot(differing, difference), math.hypot(whole, size)
    return Distance(differing, whole, new_nonfinite)


def relative_l2(ours: AnyTensor, theirs: AnyTensor) -> float:
    """‖ours − theirs‖ ÷ ‖theirs‖; infinite where the shapes differ, or ours is NaN or Inf and theirs finite."""
    if tuple(ours.shape) != tuple(theirs.shape):
        return math.inf
    apart = distance(ours, theirs)
    return math.inf if apart.new_nonfinite else apart.relative


def ratio(a: float, b: float) -> float:
    """a ÷ b; 0 when both are 0, infinite when only b is."""
    return a / b if b else (math.inf if a else 0.0)


_TYPES = [types.Array(kind, 1, "C", readonly=True) for kind in (float32, float64)]


@compiled(*itertools.product(_TYPES, _TYPES))
def _squares(ours, theirs):  # type: ignore[no-untyped-def]
    """Sums of (ours − theirs)² and theirs² over two flat arrays, in float64."""
    differing = whole = 0.0
    for i in range(theirs.size):
        y = np.float64(theirs[i])
        difference = np.float64(ours[i]) - y
        differing += difference * difference
        whole += y * y
    return differing, whole


def _finite(ours: AnyTensor, theirs: AnyTensor) -> Distance | None:
    """The distance in one compiled pass; None unless both lie on the host in FP32 or FP64, and are finite."""
    if any(isinstance(t, Tensor) and t.is_cuda for t in (ours, theirs)):
        return None
    a, b = (np.require(np.ravel(as_numpy(t)), requirements="A") for t in (ours, theirs))
    if not {a.dtype, b.dtype} <= {np.dtype(np.float32), np.dtype(np.float64)}:
        return None
    differing, whole = _squares(a, b)
    finite = math.isfinite(differing) and math.isfinite(whole)
    return Distance(math.sqrt(differing), math.sqrt(whole), 0) if finite else None


def _block(flat: AnyTensor, start: int) -> Tensor:
    part = flat[start : start + BLOCK]
    return part.double() if isinstance(part, Tensor) else torch.from_numpy(np.asarray(part, np.float64))
