"""Whole numbers that a layer computes: shapes, indices, counts. They are right or wrong, not rounded."""

from __future__ import annotations

import torch
from torch import Tensor

from cp_debug.backends.arithmetic import FP64
from cp_debug.backends.base import Tensor as AnyTensor
from cp_debug.graph.graph import Graph


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


def same_shape(graph: Graph, value: str, captured: AnyTensor, exact: Tensor) -> bool:
    """Whether a value that only Reshape nodes read, as their shape, differs by one size that is left open (−1) at most.

    ONNX Runtime's optimiser leaves a size open that it can do without; the Reshape's result tells whether it is right.
    """
    if exact.is_floating_point() or exact.dim() != 1 or tuple(captured.shape) != tuple(exact.shape):
        return False
    readers = graph.consumers.get(value, ())
    if not readers or any(r.op != "Reshape" or r.inputs[1:] != (value,) for r in readers):
        return False
    if any(output.name == value for output in graph.outputs):
        return False
    ours, right = (FP64.hold(t, "cpu").tolist() for t in (captured, exact))
    differing = [size for size, wanted in zip(ours, right, strict=True) if size != wanted]
    return differing == [-1] and ours.count(-1) == 1
