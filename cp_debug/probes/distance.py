"""Norms of tensors and of their differences in float64, without a second copy of a large tensor."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from cp_debug.probes.arrays import Tensor as AnyTensor
from cp_debug.probes.arrays import in_one_place, is_text, is_torch
from cp_debug.probes.statistics_reduce import (
    DEVICE_CHUNK,
    HOST_CHUNK,
    are_wide,
    as_double,
    blocks,
    differences,
    dot,
    host_places,
    to_host,
)

_VANISHED = 1e-30
"""Sum of products in FP32 below which some that matter may have vanished."""
MASKED = 1e4
"""Least size of a number that masks, as in an attention: −1e4, −65504, −1e9, −3.4e38."""
FAR = 0.01
"""All other numbers are smaller than this part of a mask's, and the mask's are alike to it."""


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


def product(a: Tensor, b: Tensor) -> float:
    """⟨a, b⟩ of two tensors with one number of elements, real dtypes and one device, in float64; on the host in FP32
    where neither has more digits, to about 1e-6 of Σ |a·b|. NaN and Inf count as 0, as does what they meet."""
    total, chunk = 0.0, DEVICE_CHUNK if a.is_cuda else HOST_CHUNK
    few_digits = not a.is_cuda and all(t.dtype.is_floating_point and t.dtype.itemsize <= 4 for t in (a, b))
    for x, y in zip(a.flatten().split(chunk), b.flatten().split(chunk), strict=True):
        with np.errstate(all="ignore"):
            part = float(dot(x.float(), y.float())) if few_digits else math.nan
            if not _VANISHED < abs(part) < math.inf:
                x, y = x.double(), y.double()
                part = float(dot(x, y))
        if not math.isfinite(part):
            part = float(dot(torch.nan_to_num(x, 0.0, 0.0, 0.0), torch.nan_to_num(y, 0.0, 0.0, 0.0)))
        total += part
    return total


def all_finite(tensor: Tensor) -> bool:
    """Whether a tensor of any shape and dtype has no NaN and no Inf. Where the sum of FP32 or FP64 is finite, that one
    pass tells it."""
    if tensor.dtype in (torch.float64, torch.float32) and math.isfinite(float(tensor.sum())):
        return True
    return bool(torch.isfinite(tensor).all())


def born_nonfinite(ours: Any, theirs: Any) -> Any:
    """Mask of the elements that are NaN or Inf in ours and something else in theirs: a finite number, Inf where ours is
    NaN or Inf of the other sign. NaN in theirs makes anything possible. Bool, in the shape of both, of torch or NumPy
    as they are."""
    xp: Any = torch if is_torch(ours) else np
    return ~xp.isfinite(ours) & ~xp.isnan(theirs) & (ours != theirs)


def distance(ours: AnyTensor, theirs: AnyTensor, difference: Tensor | None = None) -> Distance:
    """Compare two tensors of one shape and real dtypes, numpy (memory-mapped too) or torch, in float64.

    Where one of them lies on a device, there; three numbers of each block come to the host. ``difference``, of that
    shape and any real dtype, is filled with ours − theirs, with 0 where either is NaN or Inf.
    """
    x, y = in_one_place(ours, theirs)
    sums = _sums(x, y, difference)
    if not all(map(math.isfinite, sums)):
        sums = _sums(x, y, difference, finite_alone=True)
    return Distance(math.sqrt(sums[0]), math.sqrt(sums[1]), int(sum(sums[2:])))


def difference_norm(ours: AnyTensor, theirs: AnyTensor) -> float:
    """``difference`` of the ``distance`` of two tensors of one shape and real dtypes, alone: it takes half as long."""
    x, y = in_one_place(ours, theirs)
    (square, *_) = _sums(x, y, norm=False)
    return math.sqrt(square) if math.isfinite(square) else distance(ours, theirs).difference


def unmasked(tensor: AnyTensor, norm: float) -> Any:
    """Where a tensor in floating point holds other numbers than its mask's; None for a tensor without a mask.

    Beside −1e9, an error of everything that the mask leaves is less than one rounding of the whole. ``norm``: L2, of
    the finite elements; it tells most tensors from masked ones at no cost. Bool, in the tensor's shape, of torch or
    NumPy as it is.
    """
    if norm < MASKED * FAR * math.prod(tensor.shape) ** 0.5 or not norm:
        return None
    xp: Any = torch if is_torch(tensor) else np
    size = abs(as_double(tensor))
    size = xp.where(xp.isfinite(size), size, 0.0)
    top = float(size.max())
    shown = size < top * (1 - FAR)
    rest = float((size * shown).max())
    return shown if top >= MASKED and 0 < rest < top * FAR else None


def _sums(
    ours: AnyTensor,
    theirs: AnyTensor,
    difference: Tensor | None = None,
    *,
    norm: bool = True,
    finite_alone: bool = False,
) -> list[float]:
    """Σ(ours − theirs)² and, for the ``norm``, Σ theirs²; ``finite_alone``: over the elements that are finite on both
    sides, with how many are ``new_nonfinite``. ``difference``: as of ``distance``."""
    found, wide = [0.0] * (1 + norm + finite_alone), are_wide(ours, theirs)
    places = host_places(theirs, 2)
    with np.errstate(all="ignore"):
        for start, y_raw, x_raw, y, x in blocks(theirs, ours):
            if finite_alone:  # FP32 has no room for 3e38 less −3e38
                x, y = as_double(x), as_double(y)
            # Of two FP32 numbers, the difference in FP32 is the exact one, rounded once.
            apart = as_double(differences(x_raw, y_raw) if wide else x - y, places[0])
            y = as_double(y, places[1]) if norm else y
            new = []
            if finite_alone:
                xp: Any = torch if is_torch(x) else np
                new, finite = [born_nonfinite(x, y).sum()], xp.isfinite(x) & xp.isfinite(y)
                apart, y = (xp.where(finite, each, 0.0) for each in (apart, y))
            if difference is not None:
                difference.view(-1)[start : start + len(y)] = torch.as_tensor(apart)
            sums = [dot(side, side) for side in ((apart, y) if norm else (apart,))]
            found = [a + b for a, b in zip(found, to_host([*sums, *new]), strict=True)]
    return found


def relative_l2(ours: AnyTensor, theirs: AnyTensor) -> float:
    """‖ours − theirs‖ ÷ ‖theirs‖; infinite where shapes or strings differ, or for ``new_nonfinite`` elements."""
    if tuple(ours.shape) != tuple(theirs.shape):
        return math.inf
    if is_text(theirs):
        return 0.0 if np.array_equal(np.asarray(ours), np.asarray(theirs)) else math.inf
    apart = distance(ours, theirs)
    return math.inf if apart.new_nonfinite else apart.relative


def apart(ours: AnyTensor, theirs: AnyTensor) -> float:
    """``relative_l2`` of any shapes and dtypes; infinite, too, where only ``theirs`` is NaN or Inf."""
    one_way = relative_l2(ours, theirs)
    settled = math.isinf(one_way) or is_text(theirs)
    return one_way if settled or not distance(theirs, ours).new_nonfinite else math.inf


def outputs_apart(ours: Mapping[str, AnyTensor], theirs: Mapping[str, AnyTensor]) -> float:
    """The largest ``apart`` of two tensors of one name, of any shapes and dtypes; 0 where no name is in both."""
    return max((apart(ours[name], tensor) for name, tensor in theirs.items() if name in ours), default=0.0)


def zeros_differ(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors of one shape are 0 at different places, which no norm tells; what divides by them does."""
    return one.shape == other.shape and bool(((one == 0) != (other == 0)).any())


def ratio(a: float, b: float) -> float:
    """a ÷ b; 0 when both are 0, infinite when only b is."""
    return a / b if b else (math.inf if a else 0.0)
