"""Networks exported again in another basis: permuted, scaled and rotated weights, which the next weights undo."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from nets import NetBuilder
from torch import nn

from cp_debug import diagnose
from cp_debug.bisect.engine import bisect
from cp_debug.bisect.options import Options
from cp_debug.bisect.result import TestResult

ORDER = np.random.default_rng(1).permutation(12)
SCALES = np.geomspace(0.25, 4, 12).astype(np.float32)
ROTATION = np.linalg.qr(np.random.default_rng(2).standard_normal((8, 8)))[0].astype(np.float32)


def convolutions(path: Path, change: str = "", undone: str = "") -> Path:
    """Conv, Relu, MaxPool, Conv, and a Conv behind that; ``change`` is made of the first, ``undone`` by the second."""
    made = NetBuilder(5)
    first, second = (made.rng.standard_normal(s).astype(np.float32) for s in ((12, 3, 3, 3), (10, 12, 3, 3)))
    bias, last = (made.rng.standard_normal(s).astype(np.float32) for s in ((12,), (4, 10, 1, 1)))
    if change == "permuted":
        first, bias = first[ORDER], bias[ORDER]
    if change == "scaled":
        first, bias = first * SCALES[:, None, None, None], bias * SCALES
    if undone == "permuted":
        second = second[:, ORDER]
    if undone == "scaled":
        second = second / SCALES[:, None, None]
    if undone == "last":
        last = last[::-1].copy()
    pads = [1, 1, 1, 1]
    x = made.op("Conv", "x", made.weight(first), made.weight(bias), pads=pads, name="first")
    x = made.op("MaxPool", made.op("Relu", x), kernel_shape=[2, 2], strides=[2, 2])
    x = made.op("Conv", x, made.weight(second), pads=pads, name="second")
    made.op("Conv", made.op("Tanh", x), made.weight(last), name="y")
    return Path(made.save(path, {"x": (1, [1, 3, 12, 12])}, ["y"]))


def attention(path: Path, rotated: str = "", depth: int = 0, factor: float = 1) -> Path:
    """One head; queries and keys, or values and the projection behind them, in a rotated basis.

    ``depth`` layers stand in front of it; the last projection is ``factor`` times as large.
    """
    made = NetBuilder(6)
    q, k, v, o = (made.rng.standard_normal((8, 8)).astype(np.float32) / 2 for _ in range(4))
    x = "x"
    for _ in range(depth):
        turn = np.linalg.qr(made.rng.standard_normal((8, 8)))[0].astype(np.float32)
        x = made.op("MatMul", x, made.weight(turn))
    o = o * np.float32(factor)
    if "keys" in rotated:
        q, k = q @ ROTATION, k @ ROTATION
    if "queries alone" in rotated:
        q = q @ ROTATION
    if "values" in rotated:
        v, o = v @ ROTATION, ROTATION.T @ o
    queries, keys, values = (made.op("MatMul", x, made.weight(w), name=n) for w, n in ((q, "q"), (k, "k"), (v, "v")))
    scores = made.op("MatMul", queries, made.op("Transpose", keys, perm=[0, 2, 1]), name="scores")
    mixed = made.op("MatMul", made.op("Softmax", scores, axis=-1), values, name="mixed")
    made.op("MatMul", mixed, made.weight(o), name="y")
    return Path(made.save(path, {"x": (1, [1, 6, 8])}, ["y"]))


def compared(reference: Path, test: Path, backends: str = "ort,ort-none") -> TestResult:
    (result,) = bisect(str(reference), backends, test_model=test).tests
    return result


def test_channels_that_the_next_weights_put_right_are_no_fault(tmp_path: Path) -> None:
    """A note tells which layer holds them otherwise, and which one undoes that; nobody doubts the oracle for it."""
    result = compared(convolutions(tmp_path / "a.onnx"), convolutions(tmp_path / "b.onnx", "permuted", "permuted"))
    assert result.guilty == result.findings == []
    assert result.agrees
    (row,) = (row for row in result.rows if row.onnx == "first")
    assert row.stats.rel_l2 > 0.1
    (note,) = (note for note in result.notes if "another basis" in note)
    assert "node_first; undone by node_second" in note
    assert not [note for note in result.notes if "may itself be wrong" in note]


def test_another_basis_is_no_rounding_of_the_declared_precision(tmp_path: Path) -> None:
    pair = convolutions(tmp_path / "a.onnx"), convolutions(tmp_path / "b.onnx", "permuted", "permuted")
    (result,) = bisect(str(pair[0]), "ort,emu-fp16", test_model=pair[1], options=Options(rtol=1e-5)).tests
    (finding,) = result.findings
    assert finding.cause == "fp16"
    assert {"node_first", "node_second"}.isdisjoint(finding.layers)


@pytest.mark.parametrize("rotated", ["keys", "values", "keys and values"])
def test_rotated_heads_are_no_fault(tmp_path: Path, rotated: str) -> None:
    result = compared(attention(tmp_path / "a.onnx"), attention(tmp_path / "b.onnx", rotated))
    assert result.guilty == result.findings == []
    assert result.agrees
    assert [note for note in result.notes if "another basis" in note]


@pytest.mark.few(2)
@pytest.mark.parametrize("rotated", ["values", "keys and values"])
@pytest.mark.parametrize("backend", ["emu-fp16", "emu-tf32"])
def test_what_layers_in_front_inherited_is_no_fault_of_who_undoes(tmp_path: Path, rotated: str, backend: str) -> None:
    """Behind 60 layers the results agree only as closely as what was read, not as one layer's own rounding."""
    reference = attention(tmp_path / "a.onnx", depth=60)
    result = compared(reference, attention(tmp_path / "b.onnx", rotated, depth=60), f"ort,{backend}")
    rows = {row.onnx: row for row in result.rows}
    assert rows["y"].stats.rel_l2 > 4 * rows["y"].replay.expected
    assert result.guilty == []
    assert [note for note in result.notes if "another basis" in note]
    result = compared(reference, attention(tmp_path / "c.onnx", rotated, depth=60, factor=1.05), f"ort,{backend}")
    assert "y" in [row.onnx for row in result.guilty]


@pytest.mark.parametrize(
    ("change", "undone", "guilty"),
    [
        ("permuted", "", ["first"]),
        ("permuted", "scaled", ["first", "second"]),
        ("", "permuted", ["second"]),
        ("permuted", "last", ["first", "y"]),
    ],
)
def test_a_basis_that_is_not_undone_is_a_fault(tmp_path: Path, change: str, undone: str, guilty: list[str]) -> None:
    result = compared(convolutions(tmp_path / "a.onnx"), convolutions(tmp_path / "b.onnx", change, undone))
    assert [row.onnx for row in result.guilty] == guilty
    assert not [note for note in result.notes if "another basis" in note]


def test_queries_that_are_rotated_without_their_keys_are_a_fault(tmp_path: Path) -> None:
    result = compared(attention(tmp_path / "a.onnx"), attention(tmp_path / "b.onnx", "queries alone"))
    assert [row.onnx for row in result.guilty] == ["q"]


def test_a_fault_beside_another_basis_is_found(tmp_path: Path) -> None:
    """The first convolution is permuted and undone; the last one is wrong."""
    reference, test = convolutions(tmp_path / "a.onnx"), tmp_path / "b.onnx"
    made = convolutions(test, "permuted", "permuted")
    import onnx

    model = onnx.load(made)
    name = model.graph.node[-1].input[1]
    (weight,) = (t for t in model.graph.initializer if t.name == name)
    weight.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(weight) * np.float32(1.05), name))
    onnx.save(model, made)
    result = compared(reference, made)
    assert [row.onnx for row in result.guilty] == ["y"]
    assert [note for note in result.notes if "another basis" in note]


class Parts(nn.Module):
    """Lengths in parts of three, rounded up, or cut off."""

    def __init__(self, mode: str) -> None:
        super().__init__()
        self.mode = mode

    def forward(self, lengths: torch.Tensor) -> torch.Tensor:
        return -torch.div(-lengths, 3, rounding_mode=self.mode)


@pytest.mark.slow
def test_whole_numbers_that_differ_undo_nothing(tmp_path: Path) -> None:
    """They are near the right ones, and rounding may flip some of those."""
    lengths = torch.tensor([3, 7, 10, 25, 44, 60, 61])
    torch.onnx.export(Parts("trunc"), (lengths,), str(tmp_path / "cut.onnx"), dynamo=True, verbose=False)
    result = diagnose(Parts("floor"), "torch,ort", inputs=(lengths,), test_model=tmp_path / "cut.onnx")
    assert result.tests[0].guilty
