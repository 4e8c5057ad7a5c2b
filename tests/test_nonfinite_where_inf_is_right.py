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
    assert finding.cause == "nonfinite"
    assert "NaN or Inf appears here in 1 value where Inf is right" in finding.headline


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
