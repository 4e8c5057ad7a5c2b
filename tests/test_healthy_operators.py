"""Nobody is guilty in healthy networks, however far correct implementations lie apart; faults in them are found."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import runtimes
from faults import edits
from faults.edits import Editor
from healthy_operators import CASES, write
from nets import NetBuilder

from cp_debug.backends.registry import create
from cp_debug.backends.spec import BackendSpec
from cp_debug.bisect.causes import CAUSES
from cp_debug.bisect.engine import Options, bisect
from cp_debug.bisect.result import TestResult
from cp_debug.graph.graph import Graph

BEYOND_FP16 = (
    "Exp",
    "Softplus of",
    "Softplus at -30",
    "Reciprocal",
    "Log of tiny",
    "Sin of a flat 3",
    "Cos of a flat 1.5",
)
"""Cases whose exact results no FP16 number comes near: there it is right to be guilty."""


def compared(name: str, folder: Path, backends: str, spoilt: float | None = None, **options: bool) -> list[TestResult]:
    """One case on some backends; ``spoilt``: the tests' last result is larger by this factor − 1."""
    path, x = write(name, folder / "case.onnx")
    np.savez(folder / "x.npz", x=x)
    test = None
    if spoilt is not None:
        editor = Editor(path)
        edits.scale(editor, editor.model.graph.output[0].name, spoilt)
        test = editor.save(folder / "spoilt.onnx")
    given = Options(inputs=folder / "x.npz", **({"explain": False} | options))  # type: ignore[arg-type]
    return bisect(str(path), backends, test_model=test, options=given).tests


def accused(tests: list[TestResult]) -> list[str]:
    return [f"{t.backend.spec}: {row.name}: {row.why}" for t in tests for row in t.guilty]


@pytest.mark.few(12)
@pytest.mark.parametrize("name", CASES)
def test_no_healthy_operator_is_guilty(tmp_path: Path, name: str) -> None:
    if name == "layer_norm_of_constant_rows" and runtimes.VERSION < (1, 30):
        pytest.skip("ONNX Runtime before 1.30 makes NaN of constant rows")
    fp16 = "" if name.startswith(BEYOND_FP16) else ",emu-fp16"
    assert accused(compared(name, tmp_path, f"emu-fp32,ort-none,ort-all,emu-bf16{fp16}")) == []


@pytest.mark.parametrize(
    "name", ["LSTM", "GRU", "RNN", "DFT of 100", "einsum_that_sums", "Sigmoid at -14", "Elu at -0.001"]
)
def test_no_healthy_reference_is_guilty(tmp_path: Path, name: str) -> None:
    assert accused(compared(name, tmp_path, "ort-none,emu-fp32,emu-tf32,emu-bf16")) == []


FAULTS = {
    1e-2: ("layer_norm_far_from_zero", "Gelu at -4", "ReduceL2 of a flat row"),
    1e-3: (
        "Softmax of large logits",
        "GlobalAveragePool of a flat map",
        "averaging_product",
        "DFT of 512",
        "LSTM",
        "Resize by 2.0, linear",
    ),
    1e-5: ("head_of_one_output", "einsum", "rms_norm", "powers", "depthwise_blur"),
    3e-6: ("Sigmoid at 12", "Log near 1", "Cos at 10000.0", "division_by_tiny", "Tanh at 9"),
}
"""Relative faults, and healthy cases in which they must be found."""


@pytest.mark.few(9)
@pytest.mark.parametrize(("size", "name"), [(size, name) for size, names in FAULTS.items() for name in names])
def test_a_fault_in_a_healthy_operator_is_found(tmp_path: Path, size: float, name: str) -> None:
    (test,) = compared(name, tmp_path, "emu-fp32,ort-none", spoilt=size)
    assert [row.name for row in test.guilty] == [test.rows[-1].name]


@pytest.mark.few(10)
@pytest.mark.parametrize("seed", range(40))
def test_a_head_of_one_output_is_innocent_whatever_its_weights(tmp_path: Path, seed: int) -> None:
    path, x = write("head_of_one_output", tmp_path / "head.onnx", seed)
    np.savez(tmp_path / "x.npz", x=x)
    options = Options(inputs=tmp_path / "x.npz", explain=False)
    assert accused(bisect(str(path), "emu-fp32,ort-none", options=options).tests) == []


def test_equal_bits_are_innocent_and_a_note_says_that_both_are_inexact(tmp_path: Path) -> None:
    path, x = write("einsum", tmp_path / "einsum.onnx")
    np.savez(tmp_path / "x.npz", x=x)
    options = Options(inputs=tmp_path / "x.npz")
    coarse = {Graph(path).nodes[0].name: "bf16"}
    sides = [create(BackendSpec.parse(spec), overrides=coarse) for spec in ("emu-fp32", "emu-tf32")]
    (test,) = bisect(str(path), sides, options=options).tests
    assert test.agrees
    assert any("the same bits on both sides" in note and test.rows[-1].name in note for note in test.notes)
    (test,) = bisect(str(path), [create(BackendSpec.parse("ort")), sides[1]], options=options).tests
    assert [row.name for row in test.guilty] == [test.rows[-1].name]


@pytest.mark.parametrize("where", ["family", "segment", "effect"])
def test_a_failure_while_explaining_is_a_note_on_its_layer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    def fails(*_: object, **__: object) -> None:
        raise ZeroDivisionError("no such thing")

    fails.costly = fails.by_node = False  # type: ignore[attr-defined]
    if where == "family":
        monkeypatch.setattr("cp_debug.bisect.causes.findings.CAUSES", [fails, *CAUSES])
        # Where the graphs tell the cause, no family is asked.
        monkeypatch.setattr("cp_debug.bisect.causes.graphs.GraphReader._other", lambda self, component: None)
    else:
        place = {
            "segment": "cp_debug.bisect.causes.findings.Segment.of",
            "effect": "cp_debug.bisect.causes.effects.Effects.of",
        }[where]
        monkeypatch.setattr(place, fails)
    (test,) = compared("rms_norm", tmp_path, "ort,ort-none", spoilt=1e-2, explain=True)
    (layer,) = test.guilty
    assert [f.layers for f in test.findings] == [[layer.name]]
    assert test.findings[0].cause == ("unknown" if where == "segment" else "scaled")
    assert any(layer.name in note and "ZeroDivisionError: no such thing" in note for note in test.notes)


def test_a_failure_of_the_shares_is_a_note(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise ZeroDivisionError("no such thing")

    monkeypatch.setattr("cp_debug.bisect.shares.Backward.walk", fails)
    (test,) = compared("rms_norm", tmp_path, "ort,ort-none", spoilt=1e-2)
    assert [row.share for row in test.guilty] == [None]
    assert "the layers' shares of the final divergence are unknown: ZeroDivisionError: no such thing" in test.notes


def test_a_product_behind_other_nodes_of_its_segment_is_explained(tmp_path: Path) -> None:
    """ONNX Runtime fuses Sigmoid and Mul, which nothing shows then: the segment of the Conv starts with them."""
    net = NetBuilder()
    first = net.conv("x", 8, 8)
    gated = net.op("Mul", first, net.op("Sigmoid", first))
    path = net.save(tmp_path / "gated.onnx", {"x": (1, [1, 8, 8, 8])}, [net.op("Relu", net.conv(gated, 8, 8, k=1))])
    editor = Editor(path)
    noise = np.random.default_rng(0).standard_normal((1, 8, 8, 8))  # no cause explains it, so that all are tried
    edits.add(editor, next(n.output[0] for n in editor.model.graph.node if n.input[0] == gated), 0.05 * noise)
    wrong = editor.save(tmp_path / "wrong.onnx")
    result = bisect(str(path), "ort-none,ort-all", test_model=wrong).tests[0]
    assert result.guilty
    assert not [note for note in result.notes if "not every cause" in note]


@pytest.mark.parametrize("wanted", [True, False])
def test_infinity_counts_by_what_becomes_of_it(tmp_path: Path, wanted: bool) -> None:
    net, low = NetBuilder(), np.finfo(np.float32).min
    mask = np.where(np.tri(6, dtype=bool), 0, low).astype(np.float32)
    added = net.op("Add", "x", net.weight(mask), name="added")
    end = net.op("Softmax", added, axis=-1) if wanted else net.op("Mul", added, net.weight(np.float32(1e-38)))
    path = net.save(tmp_path / "mask.onnx", {"x": (1, [2, 6, 6])}, [end])
    (test,) = bisect(str(path), "ort,emu-fp16", options=Options(explain=False)).tests
    assert [row.onnx for row in test.guilty] == ([] if wanted else ["added", end])


def test_what_nothing_reads_is_nobodys_fault(tmp_path: Path) -> None:
    """ONNX Runtime leaves the mask of an inactive Dropout at 0 in old opsets, where ONNX says 1."""
    net = NetBuilder()
    kept = net.op("Dropout", net.op("Relu", "x"), outputs=2)
    path = net.save(tmp_path / "dropout.onnx", {"x": (1, [2, 8])}, [net.op("Neg", kept)], opset=9)
    assert accused(bisect(str(path), "ort-none,emu-fp32,emu-tf32", options=Options(explain=False)).tests) == []
    read = net.save(tmp_path / "read.onnx", {"x": (1, [2, 8])}, [net.nodes[-1].output[0], "dropout_1_1"], opset=9)
    assert accused(bisect(str(read), "ort-none,emu-tf32", options=Options(explain=False)).tests)


@pytest.mark.parametrize(("given", "innocent"), [([0, -1], True), ([-1, 8], True), ([4, 4], False)])
def test_a_shape_counts_by_what_it_makes(tmp_path: Path, given: list[int], innocent: bool) -> None:
    """ONNX Runtime's optimizer writes [0, -1] where the sizes multiply out to [2, 8]."""

    def write_shape(file: str, sizes: list[int]) -> Path:
        net = NetBuilder()
        shape = net.op("Concat", *(net.op("Identity", net.weight(np.array([n]))) for n in sizes), axis=0, name="shape")
        return net.save(tmp_path / file, {"x": (1, [2, 2, 4])}, [net.op("Reshape", "x", shape)])

    reference, test = write_shape("reference.onnx", [2, 8]), write_shape("test.onnx", given)
    result = bisect(str(reference), "ort-none,emu-fp32", test_model=test, options=Options(explain=False)).tests[0]
    assert bool(result.guilty) != innocent


@pytest.mark.parametrize(("epsilon", "function", "expected"), [(1e-10, "Log", ["add"]), (1e-6, "Sqrt", [])])
def test_a_constant_out_of_range_counts_by_its_effect(
    tmp_path: Path, epsilon: float, function: str, expected: list[str]
) -> None:
    net = NetBuilder()
    added = net.op("Add", net.op("Mul", "x", "x"), net.weight(np.float32(epsilon)), name="add")
    path = net.save(tmp_path / "epsilon.onnx", {"x": (1, [1, 64])}, [net.op(function, added)])
    x = np.random.default_rng(0).standard_normal((1, 64)).astype(np.float32)
    x[0, :8] = 0 if expected else x[0, :8]
    np.savez(tmp_path / "x.npz", x=x)
    (test,) = bisect(str(path), "ort,emu-fp16", options=Options(inputs=tmp_path / "x.npz", explain=False)).tests
    assert [row.onnx for row in test.guilty] == expected


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_casting_there_and_back_is_a_fault_and_declares_nothing(tmp_path: Path, precision: str) -> None:
    path, x = write("einsum", tmp_path / "einsum.onnx")
    np.savez(tmp_path / "x.npz", x=x)
    editor = Editor(path)
    edits.store_as(editor, value := editor.model.graph.output[0].name, precision)
    wrong = editor.save(tmp_path / "wrong.onnx")
    options = Options(inputs=tmp_path / "x.npz", explain=False)
    (test,) = bisect(str(path), "ort,ort-none", test_model=wrong, options=options).tests
    assert [row.onnx for row in test.guilty] == [value]


@pytest.mark.parametrize(
    ("change", "guilty"),
    [
        ({"nearest_mode": "ceil"}, True),
        ({"nearest_mode": "round_prefer_floor"}, True),
        ({"mode": "linear"}, True),
        ({"coordinate_transformation_mode": "half_pixel"}, False),  # it differs where x ÷ 1.5 is whole, and by 1
    ],
)
def test_only_neighbours_as_near_are_no_fault_of_a_resize(change: dict[str, str], guilty: bool, tmp_path: Path) -> None:
    """At 1.5, every third coordinate is whole: there, floor may take the element before by a rounding."""
    files, plain = [], {"mode": "nearest", "nearest_mode": "floor", "coordinate_transformation_mode": "asymmetric"}
    for attributes in (plain, plain | change):
        net = NetBuilder(1)
        x = net.conv("x", 3, 4)
        scales = net.weight(np.float32([1, 1, 1.5, 1.5]))
        net.op("Relu", net.op("Resize", x, "", scales, name="resized", **attributes), name="y")
        files.append(net.save(tmp_path / f"{len(files)}.onnx", {"x": (1, [1, 3, 14, 14])}, ["y"]))
    (test,) = bisect(str(files[0]), "ort,ort", test_model=files[1]).tests
    assert [row.onnx for row in test.guilty] == ["resized"] * guilty
    assert test.findings[0].layers == ["node_resized"]
