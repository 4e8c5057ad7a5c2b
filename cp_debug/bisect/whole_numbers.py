"""Whole numbers that a layer computes: shapes, indices, counts. They are right or wrong, not rounded."""

from __future__ import annotations

import torch
from torch import Tensor

from cp_debug.backends.arithmetic import FP64
from cp_debug.backends.base import Tensor as AnyTensor


def instead(captured: AnyTensor, exact: Tensor, expected: AnyTensor) -> str:
    """What whole numbers were computed where the inputs make others; empty where they agree with either."""
    if exact.is_floating_point() or tuple(captured.shape) != tuple(exact.shape):
        return ""
    ours, right, emulated = (FP64.hold(t, "cpu") for t in (captured, exact, expected))
    if torch.equal(ours, right) or (tuple(emulated.shape) == tuple(ours.shape) and torch.equal(ours, emulated)):
        return ""
    if right.numel() <= 16:
        return f"gives {ours.tolist()} where its inputs make {right.tolist()}"
    return f"{int((ours != right).sum())} of {right.numel()} whole numbers are not what its inputs make"
