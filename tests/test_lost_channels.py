"""Channels that are gone from an output are no agreement, however small they are beside the others."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from nets import NetBuilder

from cp_debug.bisect.engine import Options, bisect
from cp_debug.bisect.lost_channels import lost_channels
from cp_debug.reports.verdict_line import verdict_line


def detector(folder: Path, scale: float | None) -> Path:
    """Boxes up to 640 and scores below 1 in one tensor, in INT8 by one scale."""
    net = NetBuilder()
    boxes = net.op("Mul", net.op("Sigmoid", "box"), net.weight(np.array(640, np.float32)))
    value = net.op("Concat", boxes, net.op("Sigmoid", "score", name="scores"), name="both", axis=1)
    if scale is not None:
        step, zero = net.weight(np.array(scale, np.float32)), net.weight(np.array(0, np.int8))
        value = net.op("DequantizeLinear", net.op("QuantizeLinear", value, step, zero), step, zero)
    net.op("Identity", value, name="y")
    rng = np.random.default_rng(0)
    shapes = {"box": [1, 4, 50], "score": [1, 3, 50]}
    np.savez(
        folder / "x.npz", **{name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    )
    return net.save(folder / f"{scale}.onnx", {name: (1, shape) for name, shape in shapes.items()}, ["y"])


@pytest.mark.parametrize(("scale", "agrees"), [(640 / 127, False), (1 / 127, True)])
def test_scores_that_share_the_scale_of_boxes_are_not_lost_in_silence(
    tmp_path: Path, scale: float, agrees: bool
) -> None:
    """With a step of 5 all scores are 0. A step of 1/127 clips the boxes, which is told as what it is."""
    paths = detector(tmp_path, None), detector(tmp_path, scale)
    options = Options(inputs=tmp_path / "x.npz")
    (test,) = bisect(str(paths[0]), "ort,ort", test_model=paths[1], options=options).tests
    assert not test.agrees
    assert bool(test.lost) != agrees
    if not agrees:
        line = verdict_line(test).plain
        assert "y: channels 4, 5, 6 are 0 everywhere, but reach 0.9" in line
        assert line.startswith("✗")


def test_channels_count_that_are_gone_and_large_enough_and_not_alone() -> None:
    ours = np.ones((1, 3, 20), np.float32)
    theirs = ours.copy()
    theirs[:, 1] = 0
    assert [text[:20] for text in lost_channels({"y": ours}, {"y": theirs}, 1e-3)] == ["y: channel 1 is 0 ev"]
    assert not list(lost_channels({"y": ours}, {"y": theirs}, 0.2)), "too small to count"
    assert not list(lost_channels({"y": ours}, {"y": 0 * theirs}, 1e-3)), "an output of zeros is beyond any tolerance"
    assert not list(lost_channels({"y": ours[..., :15]}, {"y": theirs[..., :15]}, 1e-3)), "too few elements to tell"
    rows = np.moveaxis(ours, 1, 2), np.moveaxis(theirs, 1, 2)
    assert [text[:12] for text in lost_channels({"y": rows[0]}, {"y": rows[1]}, 1e-3)] == ["y: channel 1"]


def test_lost_channels_are_told_beside_what_passes_the_tolerance_in_front(tmp_path: Path) -> None:
    """With a tolerance that the INT8 steps pass, the verdict begins with that."""
    paths = detector(tmp_path, None), detector(tmp_path, 640 / 127)
    options = Options(inputs=tmp_path / "x.npz", rtol=1e-3, atol=1e-3)
    (test,) = bisect(str(paths[0]), "ort,ort", test_model=paths[1], options=options).tests
    line = verdict_line(test).plain
    assert "0 everywhere" not in line.partition(";")[0]
    assert line.count("y: channels 4, 5, 6 are 0 everywhere, but reach 0.9") == 1
