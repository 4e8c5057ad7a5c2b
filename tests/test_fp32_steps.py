"""Steps inside a layer that leave FP32's range, and algebra that takes NaN for a number, are named."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from nets import NetBuilder
from torch import Tensor

from cp_debug.backends.arithmetic import FP64
from cp_debug.backends.base import Program
from cp_debug.backends.executor import Executor
from cp_debug.bisect.causes.search import Explanation, explain
from cp_debug.bisect.causes.segment import Segment, SegmentContext
from cp_debug.graph.graph import Graph


def explained(net: NetBuilder, folder: Path, x: Tensor, test: Tensor) -> Explanation:
    graph = Graph(net.save(folder / "net.onnx", {"x": (1, list(x.shape))}, ["y"]))
    context = SegmentContext(Program("net", graph), Executor(graph, FP64), "fp32")
    failed: list[Exception] = []
    found, _ = explain(Segment(context, graph.nodes, "y", {"x": x}, test), on_failure=failed.append)
    assert not failed
    return found


@pytest.mark.parametrize(("size", "result", "cause"), [(1e25, np.inf, "fp32-overflow"), (1e-25, 0.0, "fp32-underflow")])
def test_squares_beyond_fp32_within_a_layer_are_the_cause(
    tmp_path: Path, size: float, result: float, cause: str
) -> None:
    net, x = NetBuilder(), torch.randn(6, 8, generator=torch.Generator().manual_seed(0)) * size
    net.op("Mul", "x", "x", name="square")
    net.op("ReduceMean", "square", name="mean", axes=[1])
    net.op("Sqrt", "mean", name="y")
    found = explained(net, tmp_path, x, torch.full((6, 1), result))
    assert found.cause is not None
    assert (found.cause.cause, found.equals) == (cause, ())
    assert "within the layer: Mul reaches" in found.cause.says


@pytest.mark.parametrize("op", ["Mul", "Sub", "Div"])
def test_algebra_that_takes_nan_for_a_number_is_the_cause(tmp_path: Path, op: str) -> None:
    net, x = NetBuilder(), torch.tensor([[1.0, torch.nan, torch.inf, 2.0]])
    net.op(op, "x", net.weight(np.float32(0)) if op == "Mul" else "x", name="y")
    found = explained(net, tmp_path, x, torch.full((1, 4), float(op == "Div")))
    assert found.cause is not None
    assert found.cause.cause == "folded"


def test_levels_where_zeros_are_right_are_no_quantizer(tmp_path: Path) -> None:
    net, x = NetBuilder(), torch.randn(1, 8)
    net.op("Mul", "x", net.weight(np.float32(0)), name="y")
    found = explained(net, tmp_path, x, torch.arange(8.0)[None])
    assert found.cause is None or not found.cause.cause.startswith("int8")
