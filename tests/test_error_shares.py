"""Shares of layers in the final divergence, on networks so small that each share is known."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from faults import edits
from faults.edits import Editor
from nets import NetBuilder
from onnx import helper

from cp_debug.bisect import shares as bisect_shares
from cp_debug.bisect.engine import Options, bisect
from cp_debug.bisect.result import Attribution, TestResult
from cp_debug.quantization.quantized_programs import Calibration
from cp_debug.recipes.base import Arrays, Component, Sample
from cp_debug.recipes.onnx_file import OnnxFileModel

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


def test_behind_a_bend_shares_add_up_by_the_mean_derivative(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """y = (w·x)²·v: an error of w reaches the end as the network would have taken it, not linearly."""
    net, walk, walks = NetBuilder(), bisect_shares.walk_back, list[object]()
    monkeypatch.setattr(bisect_shares, "walk_back", lambda *of: walks.append(of) or walk(*of))
    r = net.op("Relu", times(net, "x", 3, "w"), name="r")
    times(net, net.op("Mul", r, r, name="square"), 5, "v")
    path = net.save(tmp_path / "bend.onnx", {"x": (1, [1, 32])}, ["v"])
    result = compared(path, {"w": 0.5, "v": 0.5})
    found = shares(result)
    whole = 1.5 * 2.25 - 1
    assert found == {"w": pytest.approx(1.25 / whole, rel=1e-3), "v": pytest.approx(0.5 * 2.25 / whole, rel=1e-3)}
    assert result.attribution is not None
    assert not result.attribution.carried
    assert result.attribution.layers == pytest.approx(1), "to first order w is 1.5 · 1.5 · 0.5 · 2 of 2.375"
    assert result.attribution.remainder == pytest.approx(0, abs=1e-3)
    assert len(walks) == 1, "what is off by more than its size is not asked for the derivative at one end"


def test_an_end_in_infinity_has_no_shares(tmp_path: Path) -> None:
    net = NetBuilder()
    net.op("Exp", times(net, "x", 40, "m"), name="y")
    path = net.save(tmp_path / "exp.onnx", {"x": (1, [1, 32])}, ["y"])
    assert shares(compared(path, {"m": 0.5})) == {"m": None, "y": None}


def test_where_infinity_is_born_that_ends_in_numbers_the_share_is_carried(tmp_path: Path) -> None:
    """The sum of squares is beyond FP16, and x ÷ Inf is 0 in the end: a norm of 16 rows of hundreds."""
    net = NetBuilder()
    squares = net.op("ReduceSum", net.op("Mul", "x", "x", name="square"), net.weight(np.array([1])), name="sum")
    net.op("Div", "x", net.op("Sqrt", squares, name="root"), name="y")
    path = net.save(tmp_path / "net.onnx", {"x": (1, [1, 32])}, ["y"])
    np.savez(tmp_path / "x.npz", x=100 * X)
    (test,) = bisect(str(path), "ort,emu-fp16", options=Options(inputs=tmp_path / "x.npz")).tests
    assert [row.onnx for row in test.guilty] == ["sum"]
    assert shares(test) == {"sum": pytest.approx(1.0, rel=1e-3)}
    assert test.attribution is not None
    assert test.attribution.carried == ["node_sum"]
    assert test.attribution.remainder == pytest.approx(0.0, abs=1e-2)
    assert not [note for note in test.notes if "add up" in note]


def test_what_a_root_of_zero_makes_of_an_error_is_carried(tmp_path: Path) -> None:
    """A power spectrum with one large line: the small ones are 0 in INT8, where the root has no derivative."""
    net = NetBuilder()
    power = net.op("Add", net.op("Mul", "x", "x"), net.op("Mul", "x", "x"), name="power")
    net.op("Sqrt", power, name="y")
    path = net.save(tmp_path / "net.onnx", {"x": (1, [1, 32])}, ["y"])
    np.savez(tmp_path / "x.npz", x=np.append(0.05 * X[:, 1:], [[3]], axis=1).astype(np.float32))
    options = Options(inputs=tmp_path / "x.npz", calibration=Calibration(method="max"), rtol=1e-3, atol=1e-3)
    (test,) = bisect(str(path), "ort,emu-int8", options=options).tests
    assert {row.onnx: row.share for row in test.rows}["power"] == pytest.approx(1.0, abs=0.1)
    assert test.attribution is not None
    assert test.attribution.carried[0] == "node_power"


def test_a_mask_beyond_any_number_has_no_share(tmp_path: Path) -> None:
    """−3.4e38 is another number in BF16, by 1e36, in a row that is masked as a whole: all is hidden alike there."""
    net = NetBuilder()
    mask = net.weight(np.array([[0.0], [-3.4e38]], np.float32))
    scores = net.op("Add", times(net, "x", 1.7, "scores"), mask, name="masked")
    weight = net.weight(net.rng.standard_normal((1, 32)).astype(np.float32))
    net.op("Mul", net.op("Softmax", scores, axis=-1), weight, name="y")
    path = net.save(tmp_path / "net.onnx", {"x": (1, [2, 32])}, ["y"])
    np.savez(tmp_path / "x.npz", x=np.concatenate([X, X]))
    (test,) = bisect(str(path), "ort,emu-bf16", options=Options(inputs=tmp_path / "x.npz")).tests
    assert all(abs(row.share or 0.0) < 2 for row in test.rows)


def test_shares_reach_back_through_levels_whose_scale_is_computed(tmp_path: Path) -> None:
    """Dynamic quantization, of a scale that other numbers set."""
    net = NetBuilder()
    front = net.op("Concat", times(net, "x", 0.5, "front"), times(net, "x", 2, "large"), axis=1)
    net.nodes.append(helper.make_node("DynamicQuantizeLinear", [front], ["q", "scale", "zero"], "quantize"))
    net.op(
        "Slice",
        net.op("DequantizeLinear", "q", "scale", "zero"),
        *map(net.weight, np.array([[0], [32], [1]])),
        name="y",
    )
    path = net.save(tmp_path / "net.onnx", {"x": (1, [1, 32])}, ["y"])
    assert shares(compared(path, {"front": 0.3})) == {"front": pytest.approx(1.0, abs=0.05)}


def test_every_layer_has_a_share_and_they_add_up(tmp_path: Path) -> None:
    net, value = NetBuilder(), "x"
    for i in range(10):
        value = times(net, value, 1 + i / 8, f"n{i}")
    path = net.save(tmp_path / "long.onnx", {"x": (1, [1, 32])}, [value])
    result = compared(path, {f"n{i}": 1e-3 * (i + 1) for i in range(10)})
    assert len(result.guilty) == 10
    found = shares(result)
    assert [found[f"n{i}"] for i in range(10)] == pytest.approx([(i + 1) / 55 for i in range(10)], rel=0.05)
    assert result.attribution is not None
    assert result.attribution.layers == pytest.approx(1, abs=0.05)
    assert result.attribution.reference is None, "not asked, for the layers make all of it"


def test_layers_that_do_what_they_must_have_shares_too(tmp_path: Path) -> None:
    """A mean is taken off behind + 1000, where FP16 has steps of one half: nearly all of the end comes from there."""
    net = NetBuilder()
    offset = net.op("Add", times(net, "x", 0.7, "scaled"), net.weight(np.array(1000, np.float32)), name="offset")
    mean = net.op("ReduceMean", offset, name="mean", axes=[-1])
    net.op("Mul", net.op("Sub", offset, mean, name="centred"), net.weight(np.array(3, np.float32)), name="y")
    path = net.save(tmp_path / "offset.onnx", {"x": (1, [1, 32])}, ["y"])
    np.savez(tmp_path / "x.npz", x=X)
    (test,) = bisect(str(path), "ort,emu-fp16", options=Options(inputs=tmp_path / "x.npz", explain=False)).tests
    found = {row.onnx: row.share or 0.0 for row in test.rows if row.op != "input"}
    assert test.guilty == []
    assert max(found, key=found.__getitem__) == "offset"
    assert found["offset"] > 0.8, "the mean's own rounding makes the rest"
    assert sum(found.values()) == pytest.approx(1, abs=1e-3)


def test_where_fp32_does_what_it_promises_no_share_is_asked(tmp_path: Path) -> None:
    """Shares take as long as a run. In FP16 they are asked within the tolerance, too: somebody chose its rounding."""
    net, inputs = NetBuilder(), tmp_path / "x.npz"
    weight = np.random.default_rng(0).standard_normal((32, 32)).astype(np.float32)
    net.op("Neg", net.op("MatMul", times(net, "x", 0.7, "scaled"), net.weight(weight), name="product"), name="y")
    path = net.save(tmp_path / "net.onnx", {"x": (1, [1, 32])}, ["y"])
    np.savez(inputs, x=X)
    options = Options(inputs=inputs, explain=False)
    same, coarse = (bisect(str(path), f"ort,emu-{p}", options=options).tests[0] for p in ("fp32", "fp16"))
    assert same.agrees
    assert coarse.agrees
    assert same.rows[-1].stats.max_abs > 0
    assert same.attribution is None
    assert all(row.share is None for row in same.rows)
    assert any(row.share for row in coarse.rows)


def test_the_references_own_rounding_is_told_by_itself(tmp_path: Path) -> None:
    """An exact test and a reference that is 1 % off: the layers of the test make nothing of it."""
    editor = Editor(chain(tmp_path))
    edits.scale_weights(editor, "second", 0.01)
    spoilt = editor.save(tmp_path / "spoilt.onnx")
    np.savez(tmp_path / "x.npz", x=X)
    options = Options(inputs=tmp_path / "x.npz", explain=False)
    (test,) = bisect(str(spoilt), "ort,emu-fp32", test_model=tmp_path / "chain.onnx", options=options).tests
    assert test.attribution is not None
    assert test.attribution.layers + (test.attribution.reference or 0.0) == pytest.approx(1, abs=1e-3)


class Glued:
    """Two components; what is between them moves numbers about, or computes with them."""

    name = "glued"

    def __init__(self, first: Path, second: Path, *, computes: bool, too_large: float = 0.0) -> None:
        self._too_large = too_large
        parts = OnnxFileModel(first), OnnxFileModel(second)
        self.components = [replace(p.components[0], name=n) for p, n in zip(parts, ("a", "b"), strict=True)]
        self._computes = computes

    def samples(self, count: int, seed: int, inputs: Path | None) -> Iterator[Sample]:
        yield from [Sample({"x": X}, "seed")] * count

    def feed(self, component: Component, sample: Sample, results: Mapping[str, Arrays]) -> dict[str, np.ndarray]:
        if component.name == "a":
            return dict(sample.arrays)
        value = results["a"]["y"]
        moved = np.concatenate([value[:, 16:], np.zeros((1, 1), value.dtype), value[:, :15]], axis=1)
        return {"x": (moved * 2 if self._computes else moved) * np.float32(1 + self._too_large)}

    def decode(self, sample: Sample, results: Mapping[str, Arrays]) -> None:
        return None


@pytest.mark.parametrize("computes", [False, True])
def test_shares_reach_back_through_glue_that_moves_numbers(tmp_path: Path, computes: bool) -> None:
    folders = tmp_path / "1", tmp_path / "2"
    for folder in folders:
        folder.mkdir()
    first, second = map(chain, folders)
    spoilt = []
    for path, size in ((first, 0.02), (second, 0.01)):
        editor = Editor(path)
        edits.scale_weights(editor, "first", size)
        spoilt.append(editor.save(path.with_suffix(".spoilt.onnx")))
    model, other = Glued(first, second, computes=computes), Glued(*spoilt, computes=computes)
    (test,) = bisect(model, "ort,ort-none", test_model=other, options=Options(explain=False)).tests
    found = {row.component: row.share for row in test.guilty}
    whole = 1.02 * 1.01 - 1
    assert found["b"] == pytest.approx(0.01 * 1.02 / whole, rel=1e-2)
    if computes:
        assert any("the glue before b computes its input x" in note for note in test.notes)
    else:
        assert found["a"] == pytest.approx(0.02 / whole, rel=2e-2)


def test_an_input_that_the_tests_own_glue_makes_wrong_has_the_share(tmp_path: Path) -> None:
    paths = chain(tmp_path), chain(tmp_path)
    models = [Glued(*paths, computes=False, too_large=size) for size in (0.0, 0.1)]
    (test,) = bisect(models[0], "ort,ort-none", test_model=models[1], options=Options(explain=False)).tests
    assert [(row.component, row.op) for row in test.guilty] == [("b", "input")]
    assert test.guilty[0].share == pytest.approx(1, rel=1e-3)


@pytest.mark.parametrize(("slope", "told"), [(1e3, True), (1e-3, False)])
def test_what_the_shares_leave_is_told_where_it_is_much(slope: float, told: bool, tmp_path: Path) -> None:
    """Roundings of eight sums in front of a Tanh that makes signs of them: together they do what none does alone."""
    net = NetBuilder(0)
    value = "x"
    for i in range(1, 9):
        value = net.op("Add", value, net.weight(np.array(137.3 * i, np.float32)), name=f"add_{i}")
    value = net.op("Sub", value, net.weight(np.array(137.3 * 36, np.float32)), name="sub")
    net.op("Tanh", net.op("Mul", value, net.weight(np.array(slope, np.float32)), name="mul"), name="y")
    path = net.save(tmp_path / "net.onnx", {"x": (1, [4, 16])}, ["y"])
    (test,) = bisect(str(path), "ort,emu-fp16").tests
    assert test.attribution is not None
    assert (abs(test.attribution.remainder) > 0.1) == told
    assert any(note.startswith("the shares add up to ") and "not linear" in note for note in test.notes) == told


def test_shares_that_round_to_nothing_have_no_sign() -> None:
    assert str(Attribution(layers=-0.001, reference=0.0)).startswith("the shares add up to 0%")
