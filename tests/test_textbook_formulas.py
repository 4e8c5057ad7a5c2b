"""Functions by the formula of the textbook, in values that another runtime computed, and the same by a sound one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from cp_debug.api.diagnose import diagnose
from cp_debug.bisect.causes.formulas import FORMULAS
from cp_debug.bisect.result import TestResult

ARGUMENTS = {
    "Softplus": (-14, -11), "Mish": (-14, -11), "Sigmoid": (80, 95), "Tanh": (-1e-3, 1e-3), "Sinh": (-1e-3, 1e-3),
    "Asinh": (-3000, -1000), "Acosh": (1e25, 1e30), "Atanh": (-1e-3, 1e-3), "Softmax": (70, 100),
    "LogSoftmax": (-120, 120), "ReduceLogSumExp": (80, 100),
}  # fmt: skip
"""Operator → arguments for which its formulas are wrong."""
EXACT = {
    "Softplus": torch.nn.functional.softplus, "Mish": torch.nn.functional.mish, "Sigmoid": torch.sigmoid,
    "Tanh": torch.tanh, "Sinh": torch.sinh, "Asinh": torch.asinh, "Acosh": torch.acosh, "Atanh": torch.atanh,
    "Softmax": lambda x: x.softmax(-1), "LogSoftmax": lambda x: x.log_softmax(-1),
    "ReduceLogSumExp": lambda x: x.logsumexp(-1, keepdim=True),
}  # fmt: skip
CASES = [
    (op, place, opset, axes)
    for op, formulas in FORMULAS.items()
    for place in range(len(formulas))
    for opset, axes in (((17, "axes=[2]"), (13, "axes=[-1]")) if op.startswith("Reduce") else ((18, ""),))
]


def arguments(op: str, formula: int) -> torch.Tensor:
    low, high = ARGUMENTS[op]
    x = np.random.default_rng(2).uniform(low, high, (2, 6, 8)).astype(np.float32)
    if op == "ReduceLogSumExp" and formula == 1:
        x[1, 3] = -np.inf
    return torch.from_numpy(x)


def dumped(folder: Path, op: str, x: torch.Tensor, made: torch.Tensor, opset: int, axes: str) -> TestResult:
    """A dump in which an operator between two others gave ``made``."""
    attributes = f"<{axes}>" if axes else "<axis=-1>" if "Softmax" in op else ""
    text = f"m = {op}{attributes}(a)\ny = Mul(m, much)"
    head = f'<ir_version: 8, opset_import: ["": {opset}]>\ng (float[2,6,8] x, float much) => (float[2,6,N] y)'
    onnx.save(onnx.parser.parse_model(f"{head} {{\na = Neg(x)\n{text}\n}}"), folder / "net.onnx")
    much = np.float32(1e4)
    values = {"x": -x.numpy(), "much": much, "a": x.numpy(), "m": made.numpy(), "y": made.numpy() * much}
    (test,) = diagnose(folder / "net.onnx", "ort", test_tensors=values, progress=False).tests
    return test


@pytest.mark.few(3)
@pytest.mark.parametrize(("op", "place", "opset", "axes"), CASES)
def test_the_formula_is_named_and_another_one_advised(
    tmp_path: Path, op: str, place: int, opset: int, axes: str
) -> None:
    formula, x = FORMULAS[op][place], arguments(op, place)
    test = dumped(tmp_path, op, x, formula.apply(x, [2]), opset, axes)
    first = test.findings[0]
    assert (first.layers, formula.text in first.says, formula.better in first.fix) == (["m"], True, True)


@pytest.mark.few(3)
@pytest.mark.parametrize(("op", "place", "opset", "axes"), CASES)
def test_the_function_itself_is_innocent(tmp_path: Path, op: str, place: int, opset: int, axes: str) -> None:
    x = arguments(op, place)
    test = dumped(tmp_path, op, x, EXACT[op](x.double()).float(), opset, axes)
    assert not test.guilty
    assert not any("computed as" in finding.says for finding in test.findings)
