"""Masks of attention that the two sides write by other numbers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from nets import NetBuilder

from cp_debug.bisect.engine import Options, bisect
from cp_debug.bisect.result import TestResult

LATER = np.triu(np.ones((6, 6), bool), 1)
LOWEST = float(np.finfo(np.float32).min)


def attention(
    path: Path,
    mask: float,
    way: str,
    left_out: np.ndarray = LATER,
    layers: int = 1,
    factor: float | None = 1,
    shown: bool = False,
    distance: np.ndarray | None = None,
) -> Path:
    """Layers of one head that share a mask, put on in a ``way``; ``shown``: the masked scores are an output, too.
    ``distance`` is added to the scores first."""
    made = NetBuilder(6)
    number = made.weight(np.float32(mask))
    if way == "bias":
        bias = made.op("Where", made.weight(left_out), number, made.weight(np.float32(0)), name="bias")
    if way == "product":
        bias = made.op("Mul", made.weight(left_out.astype(np.float32)), made.op("Neg", "one"), name="ones")
        bias = made.op("Mul", bias, made.weight(np.float32(-mask)), name="bias")
    if way == "constant":
        bias = made.weight(np.where(left_out, np.float32(mask), np.float32(0)))
    x = "x"
    for layer in range(layers):
        queries, keys = (
            made.op("MatMul", x, made.weight(made.rng.standard_normal((8, 8)).astype(np.float32))) for _ in "qk"
        )
        scores = made.op("MatMul", queries, made.op("Transpose", keys, perm=[0, 2, 1]))
        if factor is not None:
            scores = made.op("Mul", scores, made.weight(np.float32(factor)))
        if distance is not None:
            scores = made.op("Add", scores, made.weight(distance.astype(np.float32)), name="distance")
        if way == "where":
            masked = made.op("Where", made.weight(left_out), number, scores, name=f"masked_{layer}")
        else:
            masked = made.op("Add", scores, bias, name=f"masked_{layer}")
        x = made.op("MatMul", made.op("Softmax", masked, axis=-1), keys, name=f"y_{layer}")
    inputs = {"x": (1, [1, 6, 8])} | ({"one": (1, [])} if way == "product" else {})
    return Path(made.save(path, inputs, [x, *["masked_0"] * shown]))


def compared(reference: Path, test: Path) -> TestResult:
    (result,) = bisect(str(reference), "ort,ort", test_model=test).tests
    return result


@pytest.mark.parametrize("way", ["constant", "where", "bias", "product"])
@pytest.mark.parametrize(("ours", "theirs"), [(-1e9, -np.inf), (-np.inf, -1e9), (-65504.0, LOWEST), (LOWEST, -1e4)])
def test_another_number_that_softmax_makes_zero_is_no_fault(
    way: str, ours: float, theirs: float, tmp_path: Path
) -> None:
    if way == "product" and not np.isfinite([ours, theirs]).all():
        ours, theirs = -1e9, LOWEST  # 0 · ∞ is NaN
    result = compared(attention(tmp_path / "a.onnx", ours, way), attention(tmp_path / "b.onnx", theirs, way))
    assert result.guilty == []
    assert result.agrees


@pytest.mark.parametrize("way", ["constant", "where"])
@pytest.mark.parametrize("right", [True, False])
def test_what_is_masked_at_once_is_no_fault(way: str, right: bool, tmp_path: Path) -> None:
    """Distances behind the diagonal have another sign, and nobody sees them; those in front of it are seen."""
    signed = np.arange(6)[None] - np.arange(6)[:, None]
    other = -abs(signed) if right else signed * np.where(signed == -2, 2, 1)
    result = compared(
        attention(tmp_path / "a.onnx", -np.inf, way, distance=signed),
        attention(tmp_path / "b.onnx", -np.inf, way, distance=other),
    )
    assert [row.name for row in result.guilty] == ([] if right else ["node_distance"])
    assert result.agrees == right


def test_a_mask_that_many_layers_share_is_no_fault(tmp_path: Path) -> None:
    """As in a Transformer, where one mask has more readers than a change is followed through elsewhere."""
    result = compared(
        attention(tmp_path / "a.onnx", -1e9, "bias", layers=20),
        attention(tmp_path / "b.onnx", -np.inf, "bias", layers=20),
    )
    assert result.guilty == []
    (note,) = (note for note in result.notes if "differs only in what is masked" in note)
    assert note.endswith(": node_bias")


def test_a_mask_that_an_output_shows_is_a_fault(tmp_path: Path) -> None:
    files = [attention(tmp_path / f"{n}.onnx", n, "where", shown=True) for n in (-1e9, -np.inf)]
    assert [row.name for row in compared(*files).guilty] == ["node_masked_0"]


def test_a_row_of_which_everything_is_masked_is_a_fault(tmp_path: Path) -> None:
    """Softmax makes NaN of a row of −Inf, and equal shares of a row of −1e9."""
    left_out = LATER.copy()
    left_out[0] = True
    files = [attention(tmp_path / f"{n}.onnx", n, "where", left_out) for n in (-1e9, -np.inf)]
    assert [row.name for row in compared(*files).guilty] == ["node_masked_0"]


@pytest.mark.parametrize("way", ["constant", "bias"])
@pytest.mark.parametrize("mask", [-1e9, LOWEST])
def test_a_padded_row_whose_scores_fp16_rounds_away_is_no_fault(way: str, mask: float, tmp_path: Path) -> None:
    """Beside −65504 FP16 has no room for scores, as FP32 has none beside −1e9: both give equal shares."""
    left_out = LATER.copy()
    left_out[0] = True
    file = attention(tmp_path / "a.onnx", mask, way, left_out, factor=0.01)
    (result,) = bisect(str(file), "ort,emu-fp16").tests
    assert result.agrees
    assert (result.guilty, result.findings) == ([], [])
    assert any("differs only in what is masked" in note for note in result.notes)


def test_a_padded_row_whose_scores_come_back_is_a_fault(tmp_path: Path) -> None:
    left_out = LATER.copy()
    left_out[0] = True
    files = [attention(tmp_path / f"{n}.onnx", n, "constant", left_out) for n in (-1e9, -1e4)]
    assert compared(*files).guilty


def test_a_mask_that_lets_something_through_is_a_fault(tmp_path: Path) -> None:
    files = [attention(tmp_path / f"{n}.onnx", n, "where", factor=20) for n in (-1e9, -120)]
    assert [row.name for row in compared(*files).guilty] == ["node_masked_0"]


def test_a_fault_beside_another_mask_is_found(tmp_path: Path) -> None:
    files = [tmp_path / "a.onnx", tmp_path / "b.onnx"]
    for file, mask, at_left in zip(files, (-1e9, -np.inf), (0.0, 0.5), strict=True):
        made = NetBuilder(6)
        bias = np.where(LATER, np.float32(mask), np.float32(0))
        bias[3, 0] = at_left
        masked = made.op("Add", "x", made.weight(bias), name="masked")
        made.op("Softmax", masked, axis=-1, name="y")
        made.save(file, {"x": (1, [1, 6, 6])}, ["y"])
    assert [row.name for row in compared(*files).guilty] == ["node_masked"]


@pytest.mark.parametrize("way", ["constant", "where"])
@pytest.mark.parametrize("mask", [-1e9, LOWEST])
def test_a_fault_that_the_size_of_its_mask_hides_is_found(way: str, mask: float, tmp_path: Path) -> None:
    """A scale is left out between the product and the mask: beside −1e9, its error is less than a rounding."""
    files = [attention(tmp_path / f"{factor}.onnx", mask, way, factor=factor) for factor in (0.25, None)]
    (row,) = compared(*files).guilty
    assert row.name == "node_masked_0"
    assert row.replay
    assert 1 < row.replay.introduced < 10
    assert row.share == pytest.approx(1, abs=0.3)


def test_a_mask_that_masks_nothing_has_the_whole_divergence(tmp_path: Path) -> None:
    """At −1e9, a softmax has no derivative that could say so."""
    files = [attention(tmp_path / f"{n}.onnx", n, "where", factor=0.25) for n in (-1e9, -1)]
    (row,) = compared(*files).guilty
    assert row.share == pytest.approx(1, abs=0.01)


def test_a_mask_that_is_left_out_beside_another_is_a_fault(tmp_path: Path) -> None:
    """What it masks with −Inf is a number then; where the other mask lies, −Inf is −1e4, which alone is no fault."""
    files = []
    for whole in (True, False):
        made = NetBuilder(3)
        padded = np.zeros((1, 6), np.float32)
        padded[0, 4:] = 1
        later = made.weight(np.where(LATER, np.float32(-1e4), np.float32(0)))
        scores = made.op("Mul", "x", made.weight(np.float32(0.5)))
        if whole:
            hidden = made.op("Cast", made.op("Mul", "m", made.weight(padded)), to=9)
            scores = made.op("Where", hidden, made.weight(np.float32(-np.inf)), scores)
        made.op("Softmax", made.op("Add", scores, later, name="masked"), axis=-1, name="y")
        files.append(Path(made.save(tmp_path / f"{whole}.onnx", {"x": (1, [2, 6, 6]), "m": (1, [1])}, ["y"])))
    np.savez(tmp_path / "x.npz", x=made.rng.standard_normal((2, 6, 6)).astype(np.float32), m=np.ones(1, np.float32))
    options = Options(inputs=tmp_path / "x.npz")
    (result,) = bisect(str(files[0]), "ort,ort", test_model=files[1], options=options).tests
    assert [row.name for row in result.guilty] == ["node_masked"]
    (finding,) = result.findings
    assert finding.says == "Mul, Cast, Where are left out"
    assert finding.fix == "undo the difference at node_masked: Mul, Cast, Where are left out"
