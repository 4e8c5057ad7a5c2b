"""NaN where −Inf is right, as of a sum over a row that is wholly masked."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from cp_debug.api.diagnose import diagnose
from cp_debug.bisect.result import TestResult
from cp_debug.probes.distance import distance

NET = """<ir_version: 8, opset_import: ["": 13]>
net (float[3,6] x, float[3,6] mask) => (float[3,1] y) {
  a = Add (x, mask)
  z = ReduceLogSumExp <axes = [1]> (a)
  y = Exp (z)
}"""


def dumped(folder: Path, of_masked: float) -> TestResult:
    """A dump of the network on a mask of −Inf in the second row, with ``of_masked`` as that row's sum."""
    onnx.save(onnx.parser.parse_model(NET), folder / "net.onnx")
    x = np.random.default_rng(0).standard_normal((3, 6)).astype(np.float32)
    mask = np.zeros_like(x)
    mask[1] = -np.inf
    z = torch.logsumexp(torch.from_numpy(x + mask), 1, keepdim=True).numpy()
    z[1] = of_masked
    values = {"x": x, "mask": mask, "a": x + mask, "z": z, "y": np.exp(z)}
    (test,) = diagnose(folder / "net.onnx", "ort", test_tensors=values).tests
    return test


def test_nan_is_guilty_and_not_explained_by_what_changes_other_numbers(tmp_path: Path) -> None:
    test = dumped(tmp_path, np.nan)
    assert [row.onnx for row in test.rows if row.verdict == "guilty"] == ["z"]
    (finding,) = test.findings
    assert finding.cause == "textbook-formula"
    assert "max + log(Σ exp(x − max)) in FP32, which is wrong for the arguments of [1, 0]" in finding.headline
    assert "Inf − Inf is NaN" in finding.fix


def test_another_number_of_infinity_has_no_formula(tmp_path: Path) -> None:
    (finding,) = dumped(tmp_path, 3.0).findings
    assert finding.cause == "nonfinite"
    assert "a number appears here in 1 value where Inf is right" in finding.headline


def test_the_same_infinity_is_innocent(tmp_path: Path) -> None:
    test = dumped(tmp_path, -np.inf)
    assert test.agrees
    assert not test.guilty


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_what_counts_as_born(dtype: type) -> None:
    ours = np.array([np.nan, np.inf, -np.inf, np.nan, np.inf, 1, np.nan, np.inf], dtype)
    theirs = np.array([1, 1, np.inf, np.inf, np.inf, np.inf, np.nan, np.nan], dtype)
    assert distance(ours, theirs).new_nonfinite == 4
    assert distance(torch.from_numpy(ours), theirs).new_nonfinite == 4


@pytest.mark.parametrize(("op", "of_nan", "says"), [("Relu", 0.0, "a number"), ("Exp", np.inf, "Inf")])
def test_nan_that_is_lost_is_guilty(op: str, of_nan: float, says: str, tmp_path: Path) -> None:
    text = f'<ir_version: 8, opset_import: ["": 13]> net (float[4] x) => (float[4] y) {{ z = {op} (x) y = Abs (z) }}'
    onnx.save(onnx.parser.parse_model(text), tmp_path / "net.onnx")
    x = np.array([1, np.nan, 2, 3], np.float32)
    z = np.where(np.isnan(x), of_nan, np.exp(x) if op == "Exp" else x).astype(np.float32)
    (test,) = diagnose(tmp_path / "net.onnx", "ort", test_tensors={"x": x, "z": z, "y": z}).tests
    assert [row.onnx for row in test.guilty] == ["z"]
    assert test.guilty[0].why == "NaN or Inf is lost here in 1 value"
    (finding,) = test.findings
    assert f"{says} appears here in 1 value where NaN is right" in finding.headline


def test_a_maximum_may_leave_nan_out(tmp_path: Path) -> None:
    text = (
        '<ir_version: 8, opset_import: ["": 13]> net (float[1,4] x) => (float[1,1] y) { y = ReduceMax <axes=[1]> (x) }'
    )
    onnx.save(onnx.parser.parse_model(text), tmp_path / "net.onnx")
    values = {"x": np.array([[1, np.nan, 2, 3]], np.float32), "y": np.array([[3]], np.float32)}
    (test,) = diagnose(tmp_path / "net.onnx", "emu-fp32", test_tensors=values).tests
    assert not test.guilty
