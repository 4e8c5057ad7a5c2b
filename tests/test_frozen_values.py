"""Values that the reference computes and that are constants in the test, as an export with one input leaves them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from nets import NetBuilder

from cp_debug.bisect.engine import bisect


def gated(path: Path, *, frozen: bool) -> Path:
    net = NetBuilder()
    made = net.op("MatMul", "x", net.weight(net.rng.standard_normal((8, 8)).astype(np.float32)), name="a")
    mask = np.random.default_rng(1).uniform(0, 1, (2, 8)).astype(np.float32)
    gate = net.weight(mask, "gate") if frozen else net.op("Sigmoid", made, name="gate")
    net.op("Mul", made, gate, name="y")
    return net.save(path, {"x": (1, [2, 8])}, ["y"])


def test_a_constant_in_place_of_a_value_is_told(tmp_path: Path) -> None:
    ours, theirs = gated(tmp_path / "ours.onnx", frozen=False), gated(tmp_path / "theirs.onnx", frozen=True)
    (finding,) = bisect(str(ours), "ort,ort", test_model=theirs).tests[0].findings
    assert finding.says == "gate is a constant in the test, the reference computes it with Sigmoid"
    assert finding.evidence["constant"] == "gate"
