"""Models in FP64, which FP32's limits judge unless a user gives narrower ones."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from nets import NetBuilder

from cp_debug.bisect.engine import bisect
from cp_debug.bisect.options import Options


def product(path: Path, kind: type, factor: float = 1.0) -> Path:
    net = NetBuilder()
    weight = net.rng.standard_normal((16, 16)).astype(kind)
    net.op("MatMul", net.op("Relu", "x"), net.weight((weight * factor).astype(kind)), name="y")
    return net.save(path, {"x": (11 if kind is np.float64 else 1, [4, 16])}, ["y"])


@pytest.mark.parametrize(("kind", "told"), [(np.float64, True), (np.float32, False)])
def test_doubles_that_are_judged_as_fp32_are_told(tmp_path: Path, kind: type, told: bool) -> None:
    ours, theirs = product(tmp_path / "ours.onnx", kind), product(tmp_path / "theirs.onnx", kind)
    (test,) = bisect(str(ours), "ort,ort", test_model=theirs).tests
    assert test.agrees
    assert any("both sides compute in FP64" in note for note in test.notes) == told


def test_narrower_limits_find_what_doubles_show(tmp_path: Path) -> None:
    """A weight that is off by 1e-9: nothing may cut captured doubles to FP32."""
    ours, theirs = (product(tmp_path / f"{f}.onnx", np.float64, f) for f in (1.0, 1 + 1e-9))
    assert bisect(str(ours), "ort,ort", test_model=theirs).agrees
    (test,) = bisect(str(ours), "ort,ort", test_model=theirs, options=Options(rtol=1e-12, atol=0)).tests
    assert not test.agrees
    assert test.first_beyond is not None
    assert test.first_beyond.onnx == "y"
    assert test.first_beyond.stats.rel_l2 == pytest.approx(1e-9, rel=1e-3)
    assert not any("both sides compute in FP64" in note for note in test.notes)


@pytest.mark.parametrize(("ours", "theirs"), [(np.float64, np.float32), (np.float32, np.float64)])
@pytest.mark.parametrize("right", [True, False])
def test_layers_are_replayed_where_one_side_is_in_doubles(
    tmp_path: Path, ours: type, theirs: type, right: bool
) -> None:
    """What one side captured in another type is read by the reference's nodes in theirs."""
    reference = product(tmp_path / "ours.onnx", ours)
    (test,) = bisect(
        str(reference), "ort,ort", test_model=product(tmp_path / "theirs.onnx", theirs, 1 if right else 2)
    ).tests
    row = next(row for row in test.rows if row.onnx == "y")
    assert row.replay is not None
    assert row.replay.skipped is None
    assert row.replay.introduced == pytest.approx(0 if right else 1, abs=1e-6)
    assert [row.onnx for row in test.guilty] == ([] if right else ["y"])
    assert not any("not replayed" in note for note in test.notes)
