"""Whole numbers that a layer computes: shapes, indices, counts. They are right or wrong, not rounded."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from cp_debug.backends.arithmetic import FP64
from cp_debug.backends.base import Tensor as AnyTensor


def instead(captured: AnyTensor, exact: Tensor, expected: AnyTensor) -> str:
    """Phrase for whole numbers that are not what the inputs make; empty where they agree with either.

    All three are integers or bool, of one shape where they agree.
    """
    if exact.is_floating_point() or tuple(captured.shape) != tuple(exact.shape):
        return ""
    ours, right, emulated = (as_tensor(FP64.hold(t, "cpu")) for t in (captured, exact, expected))
    if torch.equal(ours, right) or (tuple(emulated.shape) == tuple(ours.shape) and torch.equal(ours, emulated)):
        return ""
    if right.numel() <= 16:
        return f"is {ours.tolist()}, but should be {right.tolist()} for its inputs"
    return f"{int((ours != right).sum())} of {right.numel()} integers do not follow from its inputs"


def as_tensor(value: Any) -> Tensor:
    """A value of the executor as a tensor that holds the same numbers; uint64 to 53 bits.

    The executor leaves in numpy what torch does not compute with: wide unsigned integers, FP8, 4 bits.
    """
    if isinstance(value, Tensor):
        return value
    array = np.asarray(value)
    wide = array.dtype.kind == "u" and array.dtype.itemsize < 8
    return torch.from_numpy(array.astype(np.int64 if wide else np.float64))
