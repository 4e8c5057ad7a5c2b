"""Attributes compared by what they mean, and how their differences are told."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from nets import NetBuilder, read_node
from onnx import numpy_helper

from cp_debug.bisect.engine import bisect
from cp_debug.graph.graph import Graph
from cp_debug.programs import node_differences
from cp_debug.programs.node_differences import Pieces, says_nothing
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


def test_axes_that_are_absent_are_all(tmp_path: Path) -> None:
    assert told(tmp_path, "ReduceMean", {"axes": [0, 1, -2, 3]}, {}) == []
    assert told(tmp_path, "ReduceMean", {"axes": [-1]}, {}) == ["ReduceMean: axes is all instead of [-1]"]


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


@pytest.mark.parametrize(
    ("op", "roles"),
    [
        ("Conv", ["weights", "weights", "bias"]),
        ("MatMul", ["weights", "weights"]),
        ("LSTM", ["", "weights", "weights", "bias", ""]),
        ("BatchNormalization", ["parameters", "parameters", "parameters", "statistics", "statistics"]),
        ("QuantizeLinear", ["weights", "scale", "zero", ""]),
        ("Relu", [""]),
    ],
)
def test_what_a_node_reads_has_a_role(op: str, roles: list[str]) -> None:
    node: Any = SimpleNamespace(op=op)
    assert [node_differences.role_of_constant(node, place) for place in range(len(roles))] == roles


@pytest.mark.parametrize(
    ("op", "name", "value", "nothing"),
    [
        ("Conv", "pads", [0, 0, 0, 0], True),
        ("Conv", "pads", [0, 1, 0, 0], False),
        ("Conv", "strides", [1, 1], True),
        ("Conv", "strides", [1, 2], False),
        ("Conv", "dilations", [0, 1], False),
        ("Transpose", "perm", [2, 1, 0], True),
        ("Transpose", "perm", [0, 1, 2], False),
        ("LSTM", "activations", [b"sigmoid", b"TANH", b"Tanh"], True),
        ("LSTM", "activations", [b"Sigmoid", b"Relu", b"Tanh"], False),
        ("GRU", "activations", [b"Sigmoid", b"Tanh", b"Sigmoid", b"Tanh"], True),
        ("Conv", "group", 1, False),
    ],
)
def test_an_attribute_that_says_its_default_says_nothing(op: str, name: str, value: Any, nothing: bool) -> None:
    given = node_differences._plain_value(value)
    assert says_nothing(op, name, given, None) is nothing
    assert says_nothing(op, name, None, given) is nothing
    assert not says_nothing(op, name, given, given)


def test_values_are_shown_with_six_digits() -> None:
    assert node_differences._shown(1 / 3) == "0.333333"
    assert node_differences._shown(None) == "not given"
    assert node_differences._shown([1, 2]) == "[1, 2]"
    assert node_differences._plain_value([b"a", 2, 3.5]) == ["a", 2, 3.5]
    assert node_differences._plain_value(numpy_helper.from_array(np.arange(2))).tolist() == [0, 1]


def test_inputs_that_were_attributes_have_their_names(tmp_path: Path) -> None:
    clip = read_node(tmp_path, "Clip", ["x", "a", "b"])
    assert [node_differences.argument_of(clip, place) for place in range(4)] == [None, "min", "max", None]
