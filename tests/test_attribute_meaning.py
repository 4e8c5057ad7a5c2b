"""Attributes compared by what they mean, and how their differences are told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from nets import NetBuilder

from cp_debug.bisect.engine import bisect
from cp_debug.graph.graph import Graph
from cp_debug.programs.node_differences import Pieces
from cp_debug.safe_text import in_digits


def told(folder: Path, op: str, ours: dict[str, Any], theirs: dict[str, Any], opset: int = 12) -> list[str]:
    graphs = []
    for name, attributes in (("a", ours), ("b", theirs)):
        made = NetBuilder()
        weights = [made.weight(np.ones((4, 3, 3, 3), np.float32))] if op == "Conv" else []
        weights = [made.weight(np.ones(3, np.float32)) for _ in range(4)] if op == "BatchNormalization" else weights
        made.op(op, "x", *weights, name="y", **attributes)
        graphs.append(Graph(made.save(folder / f"{name}.onnx", {"x": (1, [2, 3, 8, 8])}, ["y"], opset=opset)))
    a, b = graphs
    return [d.says for d in Pieces(a, a.nodes, b, b.nodes, {"x": "x", "y": "y"}).differences()]


def test_axes_from_the_front_and_from_the_back_are_the_same(tmp_path: Path) -> None:
    assert told(tmp_path, "ReduceMean", {"axes": [-1, 1]}, {"axes": [3, 1]}) == []
    assert told(tmp_path, "Softmax", {"axis": 3}, {"axis": -1}, opset=17) == []
    assert told(tmp_path, "Softmax", {"axis": 3}, {"axis": 1}, opset=17) == ["Softmax: axis is 1 instead of 3"]
    assert told(tmp_path, "Unsqueeze", {"axes": [-1]}, {"axes": [4]}) == []
    assert told(tmp_path, "Unsqueeze", {"axes": [-1]}, {"axes": [3]}) != []


def test_a_difference_from_a_default_tells_both_values(tmp_path: Path) -> None:
    assert told(tmp_path, "Conv", {}, {"strides": [1, 2]}) == ["Conv: strides is [1, 2] instead of 1"]
    assert told(tmp_path, "Conv", {"pads": [1] * 4}, {}) == ["Conv: pads is 0 instead of [1, 1, 1, 1]"]


def test_training_mode_is_told_by_what_it_does(tmp_path: Path) -> None:
    (says,) = told(tmp_path, "BatchNormalization", {}, {"training_mode": 1}, opset=17)
    assert "normalizes with the statistics of the batch instead of the running statistics" in says
    assert says.endswith("training_mode is 1 instead of 0")


def test_the_fix_of_training_mode_is_one(tmp_path: Path) -> None:
    files = []
    for mode in (0, 1):
        made = NetBuilder(3)
        norm = [made.weight(made.rng.uniform(0.5, 1.5, 3).astype(np.float32)) for _ in range(4)]
        made.op("BatchNormalization", "x", *norm, outputs=1 + 2 * mode, name="y", training_mode=mode)
        made.op("Relu", "y_0" if mode else "y", name="z")
        files.append(made.save(tmp_path / f"{mode}.onnx", {"x": (1, [2, 3, 8, 8])}, ["z"]))
    for side, (reference, other) in {"test": files, "reference": files[::-1]}.items():
        (test,) = bisect(str(reference), "ort,ort", test_model=other).tests
        (finding,) = test.findings
        assert finding.cause == "batchnorm-statistics"
        assert "statistics of the batch" in finding.headline
        assert f"eval() before the export of the {side}" in finding.fix


def test_a_normalization_in_training_mode_is_no_worse_than_its_sums(tmp_path: Path) -> None:
    """Its running statistics, which are outputs of another shape, are judged as sums over each channel."""
    made = NetBuilder(3)
    norm = [made.weight(made.rng.uniform(0.5, 1.5, 3).astype(np.float32)) for _ in range(4)]
    made.op("BatchNormalization", "x", *norm, outputs=3, name="y", training_mode=1)
    path = made.save(tmp_path / "trains.onnx", {"x": (1, [2, 3, 8, 8])}, ["y_0", "y_1", "y_2"])
    (test,) = bisect(str(path), "torch,ort").tests
    assert test.agrees


def test_whole_numbers_have_all_their_digits() -> None:
    assert [in_digits(v) for v in (16777217.0, 1e6, 0.023317912, -3.4e38)] == [
        "16777217",
        "1000000",
        "0.0233179",
        "-3.4e+38",
    ]
