"""Shares of guilty layers in the final divergence, on networks so small that each share is known."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from faults import edits
from faults.edits import Editor
from nets import NetBuilder

from cp_debug.bisect.engine import Options, bisect
from cp_debug.bisect.result import TestResult

X = np.linspace(1, 2, 32, dtype=np.float32).reshape(1, 32)


def compared(path: Path, spoil: dict[str, float]) -> TestResult:
    """The test has the constant of each layer of ``spoil`` multiplied by 1 + its size."""
    editor = Editor(path)
    for value, size in spoil.items():
        edits.scale_weights(editor, value, size)
    other = editor.save(path.with_suffix(".spoilt.onnx"))
    np.savez(path.with_suffix(".npz"), x=X)
    options = Options(inputs=path.with_suffix(".npz"), explain=False)
    return bisect(str(path), "ort,ort-none", test_model=other, options=options).tests[0]


def shares(result: TestResult) -> dict[str, float | None]:
    return {row.onnx: row.share for row in result.guilty}


def times(net: NetBuilder, value: str, factor: float, name: str) -> str:
    return net.op("Mul", value, net.weight(np.array(factor, np.float32)), name=name)


def branches(folder: Path) -> Path:
    """Two outputs of one input, one a thousand times as large; a tail behind the first."""
    net = NetBuilder()
    net.op("Neg", times(net, "x", 1000, "large"), name="tail")
    times(net, "x", 0.5, "small")
    return net.save(folder / "net.onnx", {"x": (1, [1, 32])}, ["tail", "small"])


def test_outputs_count_alike_whatever_their_units(tmp_path: Path) -> None:
    """One per cent in each of two outputs is half of the divergence each."""
    found = shares(compared(branches(tmp_path), {"large": 0.01, "small": 0.01}))
    assert found == {"large": pytest.approx(0.5, rel=1e-3), "small": pytest.approx(0.5, rel=1e-3)}


def test_the_larger_error_has_the_larger_share(tmp_path: Path) -> None:
    found = shares(compared(branches(tmp_path), {"large": 0.03, "small": 0.01}))
    assert found == {"large": pytest.approx(0.9, rel=1e-3), "small": pytest.approx(0.1, rel=1e-3)}


def chain(folder: Path) -> Path:
    net = NetBuilder()
    net.op("Neg", times(net, times(net, "x", 3, "first"), 7, "second"), name="y")
    return net.save(folder / "chain.onnx", {"x": (1, [1, 32])}, ["y"])


def test_an_error_that_another_undoes_has_a_share_of_its_own_sign(tmp_path: Path) -> None:
    """2 % more, then 1 % less of 1.02: 1.02 · 0.99 − 1 = 0.98 % remain."""
    found = shares(compared(chain(tmp_path), {"first": 0.02, "second": -0.01}))
    assert found == {
        "first": pytest.approx(0.02 / 0.0098, rel=1e-3),
        "second": pytest.approx(-0.0102 / 0.0098, rel=1e-3),
    }


def test_behind_a_bend_the_error_is_carried_from_the_reference(tmp_path: Path) -> None:
    """y = (w·x)²·v: an error of w reaches the end as the network would have taken it, not linearly."""
    net = NetBuilder()
    r = net.op("Relu", times(net, "x", 3, "w"), name="r")
    times(net, net.op("Mul", r, r, name="square"), 5, "v")
    path = net.save(tmp_path / "bend.onnx", {"x": (1, [1, 32])}, ["v"])
    found = shares(compared(path, {"w": 0.5, "v": 0.5}))
    whole = 1.5 * 2.25 - 1
    assert found == {"w": pytest.approx(1.25 / whole, rel=1e-3), "v": pytest.approx(0.5 * 2.25 / whole, rel=1e-3)}


def test_an_end_in_infinity_has_no_shares(tmp_path: Path) -> None:
    net = NetBuilder()
    net.op("Exp", times(net, "x", 40, "m"), name="y")
    path = net.save(tmp_path / "exp.onnx", {"x": (1, [1, 32])}, ["y"])
    assert shares(compared(path, {"m": 0.5})) == {"m": None, "y": None}


def test_the_most_excessive_of_many_have_shares(tmp_path: Path) -> None:
    net, value = NetBuilder(), "x"
    for i in range(10):
        value = times(net, value, 1 + i / 8, f"n{i}")
    path = net.save(tmp_path / "long.onnx", {"x": (1, [1, 32])}, [value])
    result = compared(path, {f"n{i}": 1e-3 * (i + 1) for i in range(10)})
    assert len(result.guilty) == 10
    assert [row.onnx for row in result.guilty if row.share is None] == ["n0", "n1"]
    assert sum(row.share or 0 for row in result.guilty) == pytest.approx(52 / 55, rel=0.05)
