"""The same operations in another order, in two files: one cause for all layers that it shows in."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from cp_debug.bisect.engine import Options, bisect
from cp_debug.bisect.result import TestResult

CONSTANTS = {
    "w": np.random.default_rng(0).standard_normal((6, 6)).astype(np.float32),
    "v": np.random.default_rng(1).standard_normal((6, 6)).astype(np.float32),
    "mask": np.where(np.arange(6) > 3, -np.inf, 0).astype(np.float32),
    "cap": np.float32(0.8),
    "bias": np.linspace(-1, 1, 6, dtype=np.float32),
    "scale": np.linspace(0.5, 2, 6, dtype=np.float32),
}
ORDERS = {
    "a soft cap in front of the mask": (
        "d = Div(a, cap)\ne = Tanh(d)\nc = Mul(e, cap)\nm = Add(c, mask)\np = Softmax(m)",
        "n = Add(a, mask)\nd = Div(n, cap)\ne = Tanh(d)\nm = Mul(e, cap)\np = Softmax(m)",
        "Add of mask follows MatMul (a) instead of Mul (c)",
    ),
    "the activation in front of the bias": (
        "b = Add(a, bias)\np = Relu(b)",
        "r = Relu(a)\np = Add(r, bias)",
        "Relu follows MatMul (a) instead of Add (b)",
    ),
    "the bias in front of the scale": (
        "t = Tanh(a)\ns = Mul(t, scale)\nu = Sin(s)\np = Add(u, bias)",
        "t = Tanh(a)\nb = Add(t, bias)\ns = Mul(b, scale)\np = Sin(s)",
        "Add of bias follows Tanh (t) instead of Sin",
    ),
    "a computed mask": (
        "g = Clip(x, zero)\nt = Tanh(a)\ns = Exp(t)\np = Mul(s, g)",
        "g = Clip(x, zero)\nn = Mul(a, g)\nt = Tanh(n)\np = Exp(t)",
        "Mul of g follows MatMul (a) instead of Exp (s)",
    ),
}
GONE = {
    "left out": ("t = Tanh(a)\nr = Relu(t)\np = Sin(r)", "t = Tanh(a)\np = Sin(t)"),
    "one more": ("t = Tanh(a)\np = Sin(t)", "t = Tanh(a)\nr = Relu(t)\np = Sin(r)"),
}


def compared(folder: Path, ours: str, theirs: str, opset: int = 17) -> TestResult:
    paths = folder / "ours.onnx", folder / "theirs.onnx"
    for path, inner in zip(paths, (ours, theirs), strict=True):
        text = f"a = MatMul(x, w)\n{inner}\no = MatMul(p, v)\ny = Relu(o)"
        head = f'<ir_version: 8, opset_import: ["": {opset}]>\ng (float[4,6] x) => (float[4,6] y)'
        model = onnx.parser.parse_model(f"{head} {{\n{text}\n}}")
        for node in model.graph.node:
            node.name = node.output[0]
        read = {name for node in model.graph.node for name in node.input}
        held = {**CONSTANTS, "zero": np.float32(0)}
        model.graph.initializer.extend(numpy_helper.from_array(v, n) for n, v in held.items() if n in read)
        onnx.save(model, path)
    np.savez(folder / "x.npz", x=np.random.default_rng(2).standard_normal((4, 6)).astype(np.float32))
    (test,) = bisect(str(paths[0]), "ort,ort", test_model=paths[1], options=Options(inputs=folder / "x.npz")).tests
    return test


@pytest.mark.few(2)
@pytest.mark.parametrize("opset", [13, 17])
@pytest.mark.parametrize("name", ORDERS)
def test_another_order_is_one_cause_for_every_layer_it_shows_in(tmp_path: Path, name: str, opset: int) -> None:
    ours, theirs, says = ORDERS[name]
    test = compared(tmp_path, ours, theirs, opset)
    assert test.findings[0].cause == "operator-order"
    assert f"the order is another: {says}" in test.findings[0].says
    assert set(test.findings[0].layers) <= {row.name for row in test.guilty}
    assert "behind" in test.findings[0].fix


@pytest.mark.parametrize("name", GONE)
def test_a_node_that_is_gone_or_one_more_is_no_other_order(tmp_path: Path, name: str) -> None:
    test = compared(tmp_path, *GONE[name])
    assert test.guilty
    assert "operator-order" not in [finding.cause for finding in test.findings]


@pytest.mark.parametrize("name", ORDERS)
def test_the_same_order_is_no_fault(tmp_path: Path, name: str) -> None:
    assert not compared(tmp_path, ORDERS[name][0], ORDERS[name][0]).guilty
