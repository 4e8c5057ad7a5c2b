"""Whole numbers that flip are told with the rounding that did it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from nets import NetBuilder

from cp_debug.bisect.engine import Options, bisect
from cp_debug.bisect.result import TestResult


def compared(net: NetBuilder, folder: Path, output: str, x: np.ndarray, kind: int = 1) -> TestResult:
    path = net.save(folder / "net.onnx", {"x": (kind, list(x.shape))}, [output])
    np.savez(folder / "x.npz", x=x)
    (test,) = bisect(str(path), "ort,emu-fp16", options=Options(inputs=folder / "x.npz")).tests
    assert test.guilty == []
    return test


def flips(test: TestResult) -> list[str]:
    """What is told of flips: the finding, where the divergence begins with one, then the notes."""
    texts = [finding.says.removeprefix("makes whole numbers flip: ") for finding in test.findings]
    return [text for text in [*texts, *test.notes] if "flip" in text]


@pytest.mark.parametrize(
    ("op", "offset", "x", "told"),
    [("Cast", 2048, 1.0, "2048 for 2049"), ("Floor", 0.5, 0.49999, "1 for 0.99999")],
)
def test_a_number_that_fp16_does_not_hold_is_told(tmp_path: Path, op: str, offset: float, x: float, told: str) -> None:
    net = NetBuilder()
    shifted = net.op("Add", "x", net.weight(np.array(offset, np.float32)), name="shifted")
    value = net.op("Cast", shifted, name="place", to=7) if op == "Cast" else net.op("Floor", shifted, name="place")
    net.op("Identity", value, name="y")
    test = compared(net, tmp_path, "y", np.array([[0, x, 2, 4]], np.float32))
    (note,) = flips(test)
    assert note == (
        f"node_place ({op}): 1 of 4 results flip, first at [0, 1], where node_shifted (Add) is {told}; "
        "node_shifted (Add) rounded it in FP16" + "; for that reason node_y differs, too" * (op == "Cast")
    )


def test_what_flips_for_one_rounding_is_told_once_and_no_list_is_long(tmp_path: Path) -> None:
    net = NetBuilder()
    indices = []
    for i in range(11):  # each sum is rounded by itself, and cast and moved
        shifted = net.op("Add", "x", net.weight(np.array(2048 + 2 * i, np.float32)), name=f"shifted{i}")
        index = net.op("Cast", shifted, name=f"place{i}", to=7)
        indices += [index, net.op("Transpose", index, name=f"moved{i}")]
    net.op("Concat", *indices, name="y", axis=0)
    test = compared(net, tmp_path, "y", np.array([[1.0]], np.float32))
    notes = flips(test)
    assert [note.partition(" ")[0] for note in notes] == [*(f"node_place{i}" for i in range(9)), "2"]
    assert notes[1].endswith("rounded it in FP16; for that reason node_moved1 differs, too")
    assert notes[-1] == "2 more roundings make whole numbers flip"


def test_the_rounding_is_named_that_did_it_however_far_in_front(tmp_path: Path) -> None:
    """The sum is rounded; Neg passes it on; ArgMax takes another of two near values."""
    net = NetBuilder()
    shifted = net.op("Add", "x", net.weight(np.array(1024, np.float32)), name="shifted")
    net.op("ArgMax", net.op("Neg", shifted, name="turned"), name="y", axis=-1)
    test = compared(net, tmp_path, "y", np.array([[0.4, 0.1, 0.6, 0.7]], np.float32) - np.float32(0.05))
    (note,) = flips(test)
    assert note.startswith("node_y (ArgMax): 1 of 1 results flip, first at [0, 0]")
    assert note.endswith("node_shifted (Add) rounded it in FP16")


def test_of_values_side_by_side_that_one_is_named_whose_numbers_flip(tmp_path: Path) -> None:
    """Detectors pack scores beside whole numbers: the scores are off by more of their size, and flip nothing."""
    net = NetBuilder()
    scores = net.op("Mul", "x", net.weight(np.array(2e-6, np.float32)), name="scores")
    place = net.op("Add", "x", net.weight(np.array([2047, 2049, 2050, 2052], np.float32)), name="place")
    packed = net.op("Concat", scores, place, name="packed", axis=0)
    taken = net.op("Gather", packed, net.weight(np.array([1])), name="taken", axis=0)
    net.op("Cast", taken, name="y", to=7)
    (note,) = flips(compared(net, tmp_path, "y", np.array([[1, 2, 4, 0]], np.float32)))
    assert note.endswith("node_taken (Gather) is 2050 for 2051; node_place (Add) rounded it in FP16")


def test_nothing_is_told_where_nothing_flips(tmp_path: Path) -> None:
    net = NetBuilder()
    net.op("Cast", net.op("Add", "x", net.weight(np.array(16, np.float32))), name="y", to=7)
    test = compared(net, tmp_path, "y", np.array([[0.3, 1.2, 2.4, 4.6]], np.float32))
    assert flips(test) == []


def test_a_decision_that_flips_is_the_finding_with_a_fix_that_was_tried(tmp_path: Path) -> None:
    """Which of two near scores is the larger one decides which row is the output: nothing of it is carried by rounding.
    The layer in front that rounds the most is no cause."""
    net = NetBuilder()
    scores = net.op("Add", "x", net.weight(np.array(64, np.float32)), name="scores")
    best = net.op("ArgMax", scores, name="best", axis=-1, keepdims=0)
    rows = net.weight(np.array([[1, 2], [30, -40], [5, 6]], np.float32))
    net.op("Relu", net.op("Gather", rows, best, axis=0), name="y")
    test = compared(net, tmp_path, "y", np.array([[0.5, 0.51, 0.1]], np.float32))
    (finding,) = test.findings
    assert (finding.cause, finding.layers, finding.evidence["flips"]) == ("fp16", ["node_scores"], "node_best")
    assert finding.evidence["after"] == 0
    assert finding.fix.startswith("decide with a margin, or keep in FP32: --keep-fp32 node_scores")
    assert "0% of the final divergence" not in str(test)
