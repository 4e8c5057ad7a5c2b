"""Norms of tensors and of their differences in float64, without a second copy of a large tensor."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from cp_debug.probes import statistics_small
from cp_debug.probes.arrays import Tensor as AnyTensor
from cp_debug.probes.arrays import as_numpy, device_of, has_torch_type, is_torch, to_device
from cp_debug.probes.distance_cuda import sums_of_pair
from cp_debug.probes.integers import are_wide, differences
from cp_debug.probes.statistics_small import SMALL

BLOCK = 1 << 20
"""Elements taken at once."""
DEVICE_BLOCK = 1 << 24
"""Elements taken at once on a GPU: 128 MiB in float64, some five times over."""


class Distance(NamedTuple):
    """L2 norms over the elements that are finite on both sides."""

    difference: float
    """‖ours − theirs‖."""
    whole: float
    """‖theirs‖."""
    new_nonfinite: int
    """Elements that are NaN or Inf in ours and something else in theirs, but for NaN there."""

    @property
    def relative(self) -> float:
        """‖ours − theirs‖ ÷ ‖theirs‖, the relative L2 distance over those elements; see ``ratio``."""
        return ratio(self.difference, self.whole)


def all_finite(tensor: Tensor) -> bool:
    """Whether a tensor of any shape and dtype has no NaN and no Inf. Where the sum of FP32 or FP64 is finite, that one
    pass tells it."""
    if tensor.dtype in (torch.float64, torch.float32) and math.isfinite(float(tensor.sum())):
        return True
    return bool(torch.isfinite(tensor).all())


def born_nonfinite(ours: Tensor, theirs: Tensor) -> Tensor:
    """Mask of the elements that are NaN or Inf in ours and something else in theirs: a finite number, Inf where ours is
    NaN or Inf of the other sign. NaN in theirs makes anything possible. Bool, in the shape of both."""
    return ~torch.isfinite(ours) & ~torch.isnan(theirs) & (ours != theirs)


def distance(ours: AnyTensor, theirs: AnyTensor) -> Distance:
    """Compare two tensors of one shape and real dtypes, numpy (memory-mapped too) or torch, in float64."""
    if any(device_of(t) != "cpu" for t in (ours, theirs)):
        return _on_device(ours, theirs)
    if fast := _finite(ours, theirs):
        return fast
    a, b = ours.reshape(-1), theirs.reshape(-1)
    differing, whole, new_nonfinite = 0.0, 0.0, 0
    wide = are_wide(a, b)
    for start in range(0, len(b), BLOCK):
        x, y = _block(a, start), _block(b, start)
        apart = _differences(a, b, start) if wide else x - y
        difference = float(torch.linalg.vector_norm(apart))
        size = float(torch.linalg.vector_norm(y))
        if not (math.isfinite(difference) and math.isfinite(size)):
            finite = torch.isfinite(x) & torch.isfinite(y)
            new_nonfinite += int(born_nonfinite(x, y).sum())
            difference = float(torch.linalg.vector_norm(torch.where(finite, apart, 0.0)))
            size = float(torch.linalg.vector_norm(torch.where(finite, y, 0.0)))
        differing, whole = math.hypot(differing, difference), math.hypot(whole, size)
    return Distance(differing, whole, new_nonfinite)


def _on_device(ours: AnyTensor, theirs: AnyTensor) -> Distance:
    """``distance`` where one of the tensors lies on a device; three numbers of each block come to the host."""
    device = next(device for t in (theirs, ours) if (device := device_of(t)) != "cpu")
    a, b = (to_device(_plain(t), device).reshape(-1) for t in (ours, theirs))
    if (reduced := sums_of_pair(a, b)) is not None:
        return Distance(math.sqrt(reduced[0]), math.sqrt(reduced[1]), int(reduced[2]))
    sums, wide = [], are_wide(a, b)
    for start in range(0, len(b), DEVICE_BLOCK):
        unrounded = [side[start : start + DEVICE_BLOCK] for side in (a, b)]
        x, y = (side.double() for side in unrounded)
        apart = differences(*unrounded) if wide else x - y
        finite = torch.isfinite(x) & torch.isfinite(y)
        difference, size = torch.where(finite, apart, 0.0), torch.where(finite, y, 0.0)
        new_nonfinite = born_nonfinite(x, y).sum().double()
        sums.append(torch.stack([difference.square().sum(), size.square().sum(), new_nonfinite]))
    if not sums:
        return Distance(0.0, 0.0, 0)
    differing, whole, new = torch.stack(sums).sum(0).tolist()
    return Distance(math.sqrt(differing), math.sqrt(whole), int(new))


def _plain(tensor: AnyTensor) -> AnyTensor:
    """A tensor of a type that torch has: what it has not becomes float64."""
    return tensor if is_torch(tensor) or has_torch_type(tensor) else np.asarray(tensor, np.float64)


def relative_l2(ours: AnyTensor, theirs: AnyTensor) -> float:
    """‖ours − theirs‖ ÷ ‖theirs‖; infinite where the shapes differ, or for ``new_nonfinite`` elements."""
    if tuple(ours.shape) != tuple(theirs.shape):
        return math.inf
    apart = distance(ours, theirs)
    return math.inf if apart.new_nonfinite else apart.relative


def ratio(a: float, b: float) -> float:
    """a ÷ b; 0 when both are 0, infinite when only b is."""
    return a / b if b else (math.inf if a else 0.0)


def _finite(ours: AnyTensor, theirs: AnyTensor) -> Distance | None:
    """The distance in one pass; None unless both are in FP32 or FP64, and finite."""
    a, b = (np.require(np.ravel(as_numpy(t)), requirements="A") for t in (ours, theirs))
    if not {a.dtype, b.dtype} <= {np.dtype(np.float32), np.dtype(np.float64)}:
        return None
    if b.size <= SMALL:
        squares = statistics_small.squares
    else:
        from cp_debug.probes.statistics_kernel import squares
    differing, whole = squares(a, b)
    finite = math.isfinite(differing) and math.isfinite(whole)
    return Distance(math.sqrt(differing), math.sqrt(whole), 0) if finite else None


def _differences(a: AnyTensor, b: AnyTensor, start: int) -> Tensor:
    """a − b of two flat tensors of integers, from one element on, in float64."""
    return torch.from_numpy(differences(*(as_numpy(side[start : start + BLOCK]) for side in (a, b))))


def _block(flat: AnyTensor, start: int) -> Tensor:
    part = flat[start : start + BLOCK]
    return part.double() if isinstance(part, Tensor) else torch.from_numpy(np.asarray(part, np.float64))
