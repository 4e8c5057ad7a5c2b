"""Causes that lie in what a layer reads, or in which of a node's results it is, found without the other graph."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from nets import NetBuilder

from cp_debug.bisect.causes.graphs import GraphReader
from cp_debug.bisect.engine import bisect
from cp_debug.bisect.finding import Finding

SHAPE = (2, 6, 5)


def net(path: Path, *before: tuple[str, float | None], back: bool = False, shift: int = 0, first: float = 0.5) -> Path:
    """``x`` [2, 6, 5] times ``first`` as ``sum``, through nodes (operator, constant) into a product; a Split of a
    Softmax, whose results may stand ``back`` to front; a Gather by computed indices, ``shift`` too late."""
    made = NetBuilder(5)
    value = made.op(
        "Add", made.op("Mul", "x", made.weight(np.float32(first))), made.weight(np.float32(0.1)), name="sum"
    )
    for op, number in before:
        value = made.op(op, value, *([] if number is None else [made.weight(np.float32(number))]))
    weight = made.weight(made.rng.standard_normal((5, 8)).astype(np.float32))
    product = made.op("MatMul", value, weight, name="product")
    half = made.op("Softmax", product, axis=-1)
    parts = ["high", "low"] if back else ["low", "high"]
    made.nodes.append(onnx.helper.make_node("Split", [half], parts, name="split", axis=-1, num_outputs=2))
    places = made.op("ArgMax", "low", axis=-1, keepdims=0)
    if shift:
        places = made.op("Add", places, made.weight(np.array(shift)))
    made.op("Gather", made.weight(made.rng.standard_normal((9, 4)).astype(np.float32)), places, name="rows")
    return made.save(path, {"x": (1, list(SHAPE))}, ["rows", "high"], opset=18)


def alone(monkeypatch: pytest.MonkeyPatch, ours: Path, theirs: Path) -> Finding:
    """The only finding, without a look at the other graph."""
    monkeypatch.setattr(GraphReader, "_other", lambda self, component: None)
    x = np.random.default_rng(2).standard_normal(SHAPE).astype(np.float32)
    np.savez(ours.with_suffix(".npz"), x=x)
    from cp_debug.bisect.options import Options

    options = Options(inputs=ours.with_suffix(".npz"))
    (finding,) = bisect(str(ours), "ort,ort-none", test_model=theirs, options=options).tests[0].findings
    return finding


@pytest.mark.parametrize(
    ("before", "first", "cause", "says"),
    [
        ([("Tanh", None)], 0.5, "extra-activation", "Tanh is applied to sum"),
        ([("Mul", 3.0), ("Tanh", None)], 1.0, "extra-activation", "Tanh of 3 times"),
        ([("Abs", None)], 0.5, "extra-activation", "Abs is applied to sum"),
    ],
)
def test_a_function_of_what_a_product_reads(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    before: list[tuple[str, float | None]],
    first: float,
    cause: str,
    says: str,
) -> None:
    ours = net(tmp_path / "ours.onnx", first=first)
    finding = alone(monkeypatch, ours, net(tmp_path / "theirs.onnx", *before, first=first))
    assert (finding.cause, finding.layers) == (cause, ["node_product"])
    assert says in finding.says


def test_functions_that_give_the_same_are_all_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Far out Sigmoid, Tanh and Erf are 1: the values do not tell which of them it was."""
    ours = net(tmp_path / "ours.onnx", ("Add", 40.0))
    finding = alone(monkeypatch, ours, net(tmp_path / "theirs.onnx", ("Add", 40.0), ("Tanh", None)))
    assert finding.cause == "extra-activation"
    assert all(name in finding.says for name in ("Sigmoid", "Tanh", "would have the same result"))


def test_a_factor_on_what_a_function_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = net(tmp_path / "ours.onnx", ("Tanh", None))
    finding = alone(monkeypatch, ours, net(tmp_path / "theirs.onnx", ("Mul", 1.7), ("Tanh", None)))
    assert finding.cause == "scaled"
    assert "sum is multiplied by 1.7" in finding.says


def test_a_bound_on_both_sides_of_what_a_product_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = net(tmp_path / "ours.onnx")
    finding = alone(monkeypatch, ours, net(tmp_path / "theirs.onnx", ("Min", 0.4), ("Max", -0.4)))
    assert (finding.cause, finding.layers) == ("saturated", ["node_product"])
    assert "sum stops at ±0.4 before MatMul reads it" in finding.says


@pytest.mark.parametrize("known", [True, False])
def test_results_of_a_split_that_changed_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, known: bool) -> None:
    ours, theirs = net(tmp_path / "ours.onnx"), net(tmp_path / "theirs.onnx", back=True)
    if known:
        finding = bisect(str(ours), "ort,ort-none", test_model=theirs).tests[0].findings[0]
        assert "are exchanged" in finding.says
    else:
        finding = alone(monkeypatch, ours, theirs)
    assert (finding.cause, set(finding.layers)) == ("another-tensor", {"low", "high"})


def test_indices_that_are_computed_are_off_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    finding = alone(monkeypatch, net(tmp_path / "ours.onnx"), net(tmp_path / "theirs.onnx", shift=1))
    assert (finding.cause, finding.layers) == ("index-shifted", ["node_rows"])
