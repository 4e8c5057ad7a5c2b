"""Differences of integers, exact before they are rounded to float64: beyond 2⁵³ two of them may round to one."""

from __future__ import annotations

from typing import Any

import numpy as np

from cp_debug.probes.arrays import Tensor, dtype_name, is_torch

_LARGE = 2.0**62
"""Differences from which on float64's rounding says no less than 64 bits, in which they may wrap around."""


def is_whole(tensor: Tensor) -> bool:
    """Whether a tensor of any shape, of numpy or torch, holds integers or bool."""
    return _type(tensor).startswith(("int", "uint", "bool"))


def are_wide(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of any shapes hold integers, one of them of 64 bits: ``differences`` subtracts such."""
    return is_whole(a) and is_whole(b) and any(_type(t) in ("int64", "uint64") for t in (a, b))


def differences(ours: Tensor, theirs: Tensor) -> Any:
    """ours − theirs of two tensors of integers or bool, both of numpy or both of torch, in their shape and float64."""
    if is_torch(ours):
        import torch

        rounded = ours.double() - theirs.double()  # type: ignore[union-attr]
        exact = ours.long() - theirs.long()  # type: ignore[union-attr]
        return torch.where(rounded.abs() < _LARGE, exact.double(), rounded)
    rounded = np.subtract(ours, theirs, dtype=np.float64, casting="unsafe")
    exact = np.asarray(ours).astype(np.int64) - np.asarray(theirs).astype(np.int64)
    return np.where(np.abs(rounded) < _LARGE, exact.astype(np.float64), rounded)


def _type(tensor: Tensor) -> str:
    if is_torch(tensor):
        return dtype_name(tensor)
    return np.asarray(tensor).dtype.name  # whatever the order of its bytes
