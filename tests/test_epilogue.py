"""The order of what a kernel does behind the sum of a convolution, against the same computed by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import torch

from cp_debug.backends.arithmetic import FP16ACC, round_fp16
from cp_debug.backends.executor import Executor
from cp_debug.backends.kernels.fp16_accumulation import with_epilogue
from cp_debug.graph.graph import Graph


def test_the_residual_comes_before_the_bias_and_silu_is_rounded_once(tmp_path: Path) -> None:
    model = onnx.parser.parse_model("""
        <ir_version: 8, opset_import: ["" : 17]>
        net (float[1,32,6,6] x, float[1,16,6,6] r) => (float[1,16,6,6] y) {
            c = Conv <kernel_shape = [1, 1]> (x, w, b)
            a = Add (c, r)
            s = Sigmoid (a)
            y = Mul (a, s)
        }""")
    rng = np.random.default_rng(0)
    arrays = {"w": rng.standard_normal((16, 32, 1, 1)) * 0.3, "b": rng.standard_normal(16)}
    for name, array in arrays.items():
        rounded = array.astype(np.float16).astype(np.float32)
        model.graph.initializer.append(onnx.numpy_helper.from_array(rounded, name))
    onnx.save(model, tmp_path / "net.onnx")
    graph = Graph(tmp_path / "net.onnx")
    given = {
        n: rng.standard_normal((1, c, 6, 6)).astype(np.float16).astype(np.float32) for n, c in (("x", 32), ("r", 16))
    }
    nodes, values = with_epilogue(graph, graph.nodes, given)
    result = Executor(graph, FP16ACC).run_nodes(nodes, {**given, **values}, ["y"])["y"]
    x, r = (torch.from_numpy(given[n]) for n in ("x", "r"))
    weight = torch.from_numpy(graph.initializer("w"))[:, :, 0, 0]
    total = torch.zeros(1, 16, 6, 6)
    for k in (0, 16):
        total = round_fp16(total + torch.einsum("ok,nkhw->nohw", weight[:, k : k + 16], x[:, k : k + 16]))
    before = round_fp16(round_fp16(total + r) + torch.from_numpy(graph.initializer("b")).reshape(-1, 1, 1))
    torch.testing.assert_close(result, round_fp16(before * torch.sigmoid(before)), rtol=0, atol=0)
    as_written = Executor(graph, FP16ACC).run_nodes(graph.nodes, given, ["y"])["y"]
    assert not torch.equal(result, as_written)


def test_other_patterns_stay_as_they_are(tmp_path: Path) -> None:
    model = onnx.parser.parse_model("""
        <ir_version: 8, opset_import: ["" : 17]>
        net (float[1,4,6,6] x) => (float[1,4,6,6] y) {
            c = Conv <kernel_shape = [1, 1]> (x, w, b)
            y = Relu (c)
        }""")
    for name, shape in (("w", (4, 4, 1, 1)), ("b", (4,))):
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.ones(shape, np.float32), name))
    onnx.save(model, tmp_path / "net.onnx")
    graph = Graph(tmp_path / "net.onnx")
    assert with_epilogue(graph, graph.nodes, ["x"]) == (graph.nodes, {})
