"""Weights of two models compared directly: what differs, and how."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from faults.edits import Editor
from nets import NetBuilder, second_like

from cp_debug.bisect.engine import bisect
from cp_debug.graph.constants import Constants
from cp_debug.graph.graph import Graph
from cp_debug.programs import tensor_change
from cp_debug.programs.node_differences import named
from cp_debug.programs.tensor_change import describe
from cp_debug.programs.weight_differences import _same_reader, weight_differences

RNG = np.random.default_rng(0)
KERNEL = RNG.standard_normal((16, 16, 3, 3)).astype(np.float32)
GATES = RNG.standard_normal((1, 32, 8)).astype(np.float32)


def in_channel(index: int, factor: float) -> np.ndarray:
    changed = KERNEL.copy()
    changed[index] *= np.float32(factor)
    return changed


def per_channel() -> np.ndarray:
    step = np.abs(KERNEL).max((1, 2, 3), keepdims=True) / 127
    return (np.round(KERNEL / step) * step).astype(np.float32)


def per_tensor() -> np.ndarray:
    step = np.abs(KERNEL).max() / 127
    return (np.round(KERNEL / step) * step).astype(np.float32)


def swapped() -> np.ndarray:
    return KERNEL[[1, 0, *range(2, 16)]]


@pytest.mark.parametrize(
    ("theirs", "kind", "says"),
    [
        (KERNEL * np.float32(1.02), "scaled", "× 1.02"),
        (in_channel(7, 1.05), "channels-scaled", "channel 7 × 1.05"),
        (in_channel(3, 0), "channels-zero", "channel 3 is zero"),
        (-KERNEL, "negated", "sign"),
        (KERNEL.transpose(0, 1, 3, 2), "transposed", "[0, 1, 3, 2]"),
        (KERNEL[:, :, ::-1, ::-1], "flipped", "kernel"),
        (swapped(), "permuted", "channels in another order: 0←1, 1←0"),
        (np.roll(KERNEL, 1, 1), "rolled", "off by +1 along axis 1"),
        (KERNEL.astype(np.float16), "fp16", "FP16"),
        (KERNEL.astype(np.float16).astype(np.float32), "fp16", "FP16"),
        (per_channel(), "int8-per-channel", "axis 0"),
        (per_tensor(), "int8-per-tensor", "one scale"),
        (KERNEL[:, :8], "shape", "[16, 8, 3, 3]"),
        (RNG.standard_normal(KERNEL.shape), "other", "differs by 1"),
    ],
)
def test_how_a_tensor_differs(theirs: np.ndarray, kind: str, says: str) -> None:
    change = describe(KERNEL, theirs)
    assert change is not None
    assert change.kind == kind
    assert says in change.says


def test_a_step_along_an_axis_is_simpler_than_a_factor_for_every_column() -> None:
    """Slices that are constant could be anything times a factor each."""
    ours = np.tile(np.arange(1, 7, dtype=np.float32), (24, 1))
    change = describe(ours, np.roll(ours, 1, 1))
    assert change is not None
    assert (change.kind, change.says) == ("rolled", "off by +1 along axis 1")


def _causal(last: int) -> np.ndarray:
    return np.triu(np.full((1, 1, 3, 8), -np.inf, np.float32), last + 1)


WINDOW = np.pad(np.hanning(11)[:-1], 3)
ALIGNED = " (aligned top left instead of bottom right)"
SLOPES = np.exp2(-np.arange(4.0))[:, None, None] * np.arange(-9.0, 1)


@pytest.mark.parametrize(
    ("ours", "theirs", "says"),
    [
        (WINDOW, np.roll(WINDOW, -3), "off by -3 along axis 0"),
        (SLOPES, SLOPES[::-1], "axis 0 runs backwards"),
        (_causal(5), _causal(0), "its border follows diagonal 0 instead of 5" + ALIGNED),
        (_causal(5), _causal(4), "its border follows diagonal 4 instead of 5"),
    ],
)
def test_what_is_moved_is_not_told_as_factors_or_elements(ours: np.ndarray, theirs: np.ndarray, says: str) -> None:
    """A window that is not centred, slopes in reverse, causal masks of a query that has a past."""
    change = describe(ours, theirs)
    assert change is not None
    assert change.says == says


@pytest.mark.parametrize(
    ("theirs", "cause"),
    [(per_tensor(), "int8-per-tensor"), (KERNEL.astype(np.float16), "fp16-weights"), (2 * KERNEL, "constant-differs")],
)
def test_how_a_constant_that_is_no_weight_is_stored_has_a_name(theirs: np.ndarray, cause: str) -> None:
    change = describe(KERNEL, theirs)
    assert change is not None
    assert named(change, "", "Mul") == cause


@pytest.mark.parametrize("place", [0, 3])
def test_slices_that_are_all_alike_have_not_moved(place: int) -> None:
    """A norm's weight of ones whose end is another number: no neighbour came in."""
    ours = np.ones(4, np.float32)
    change = describe(ours, np.where(np.arange(4) == place, np.float32(1.05), ours))
    assert change is not None
    assert change.kind == "elements"


@pytest.mark.parametrize(
    ("ours", "theirs", "kind"),
    [
        (KERNEL[:1, 0, 0, 0], KERNEL[0, 0, 0], "shape"),
        (KERNEL[0, 0, 0, 0], KERNEL[0, 0], "shape"),
        (KERNEL[:, 0, 0, 0], KERNEL[[1, 0, *range(2, 16)], 0, 0, 0], "permuted"),
        (KERNEL, in_channel(4, 1 + 3e-6), "channels-scaled"),
        (KERNEL[:1, :, 0, 0], KERNEL[1:2, :, 0, 0], "other"),
    ],
)
def test_small_tensors_and_small_changes(ours: np.ndarray, theirs: np.ndarray, kind: str) -> None:
    change = describe(ours, theirs)
    assert change is not None
    assert change.kind == kind


def test_equal_tensors_and_the_order_of_gates() -> None:
    assert describe(KERNEL, KERNEL.copy()) is None
    i, o, f, c = np.split(GATES, 4, axis=1)
    change = describe(GATES, np.concatenate([i, f, o, c], axis=1), gates=4)
    assert change is not None
    assert (change.kind, change.evidence["order"]) == ("gates-permuted", [0, 2, 1, 3])


Edit = Callable[[Editor], None]


def spoilt(path: Path, edit: Edit) -> Path:
    editor = Editor(path)
    edit(editor)
    return editor.save(path.with_suffix(".spoilt.onnx"))


def test_the_differing_tensor_is_named_and_kept_in_the_result(tmp_path: Path) -> None:
    net = second_like(tmp_path / "net.onnx")

    def channel(editor: Editor) -> None:
        weight = editor.weight("conv_3")
        assert weight is not None
        weight[7] *= 1.05
        editor.set_weight("conv_3", weight)

    test = spoilt(net, channel)
    said: list[str] = []
    result = bisect(str(net), "ort,ort", test_model=test, on_say=said.append)
    assert said == ["weights: 1 of 69 tensors differs: w_6, channel 7 × 1.05"]
    (found,) = result.to_dict()["weights"].values()
    assert found["differing"][0]["kind"] == "channels-scaled"
    assert found["differing"][0]["evidence"]["channels"] == [7]


def test_the_weights_of_another_layer_are_recognized(tmp_path: Path) -> None:
    net = second_like(tmp_path / "net.onnx")

    def exchange(editor: Editor) -> None:
        other = editor.weight("conv_6")
        assert other is not None
        editor.set_weight("conv_3", other)

    found = weight_differences(Graph(net), Graph(spoilt(net, exchange)))
    assert [d.says for d in found.differing] == ["w_6, holds w_12"]


@pytest.mark.parametrize(("number", "says"), [(0, "all zero"), (1, "all 1")])
def test_zeros_and_ones_are_not_those_of_another_layer(tmp_path: Path, number: float, says: str) -> None:
    made = NetBuilder(1)
    plain = made.weight(np.full((16, 1, 1), number, np.float32), "plain")
    slope = made.weight(made.rng.uniform(0.1, 0.3, (16, 1, 1)).astype(np.float32), "slope")
    value = made.op("Mul", made.conv("x", 4, 16), plain) if number else made.op("Add", made.conv("x", 4, 16), plain)
    made.op("PRelu", value, slope, name="act")
    net = made.save(tmp_path / "net.onnx", {"x": (1, [1, 4, 8, 8])}, ["act"])
    model = onnx.load(net)
    (stored,) = [t for t in model.graph.initializer if t.name == "slope"]
    stored.CopyFrom(onnx.numpy_helper.from_array(np.full((16, 1, 1), number, np.float32), "slope"))
    onnx.save(model, tmp_path / "test.onnx")
    said: list[str] = []
    result = bisect(str(net), "ort,ort", test_model=tmp_path / "test.onnx", on_say=said.append)
    assert said[0].endswith(f"tensors differs: slope, {says}")
    (finding,) = result.tests[0].findings
    assert finding.cause == "constant-differs"
    assert finding.says == f"slope of PRelu: {says}"


def test_one_model_has_no_differences(tmp_path: Path) -> None:
    net = NetBuilder()
    net.conv("x", 4, 4, name="y")
    path = net.save(tmp_path / "net.onnx", {"x": (1, [1, 4, 8, 8])}, ["y"])
    assert not weight_differences(Graph(path), Graph(path)).differing
    assert bisect(str(path), "ort,emu-fp32").weights == {}


def test_a_constant_that_only_the_test_reads_is_none_of_the_references(tmp_path: Path) -> None:
    """Where an exporter left a bias out and its tensor in the file, the other program reads it."""
    files = []
    for name, reads in (("ours", False), ("theirs", True)):
        made = NetBuilder(1)
        value = made.conv("x", 4, 4)
        kept = made.weight(made.rng.standard_normal((4, 12, 12)).astype(np.float32), "kept")
        value = made.op("Add", value, kept) if reads else value
        made.op("Relu", value, name="y")
        files.append(Graph(made.save(tmp_path / f"{name}.onnx", {"x": (1, [1, 4, 12, 12])}, ["y"])))
    found = weight_differences(*files)
    assert (found.differing, found.added) == ([], ["kept"])


def test_a_scale_is_no_weight(tmp_path: Path) -> None:
    """A bias in codes has as many scales as the float bias has elements, and a scale may be near to it."""
    net, quantized = NetBuilder(), NetBuilder()
    net.op("Add", "x", net.weight(np.linspace(0.5, 1, 16, dtype=np.float32), "bias"), name="y")
    codes = quantized.weight(np.arange(16, dtype=np.int32), "codes")
    scale = quantized.weight(np.full(16, 0.6, np.float32), "scale")
    quantized.op("Add", "x", quantized.op("DequantizeLinear", codes, scale, axis=0, name="bias"), name="y")
    nets = [(net, "net"), (quantized, "quantized")]
    files = [Graph(n.save(tmp_path / f"{name}.onnx", {"x": (1, [1, 16])}, ["y"])) for n, name in nets]
    assert weight_differences(*files).compared == 0


def test_constants_that_an_exporter_numbered_anew_are_paired_by_what_they_hold(tmp_path: Path) -> None:
    """Of the products after the first, each reads other data than that whose weight has its name; weights that are
    exchanged while the products stay differ."""
    matrices = [*np.random.default_rng(0).standard_normal((7, 8, 8)).astype(np.float32)]
    named = dict(zip("cdef", matrices[3:], strict=True))  # most names hold what they say

    def net(weights: dict[str, np.ndarray], *, extra: bool = True) -> Graph:
        made, value = NetBuilder(), "x"
        for i, (name, matrix) in enumerate({**named, **weights}.items()):
            product = made.op("MatMul", value, made.weight(matrix, name), name=f"product_{name}")  # numbered alike
            value = made.op("Sigmoid", product, name=f"gate{i}")
        kept = value if extra else made.op("Relu", value)
        made.op("Tanh", made.op("Add", kept, made.weight(np.ones(8, np.float32), "b"), name="sum"), name="y")
        return Graph(made.save(tmp_path / "net.onnx", {"x": (1, [2, 8])}, ["y"]))

    ours = net(dict(zip(("w4", "w6", "w8"), matrices[:3], strict=True)))
    assert not weight_differences(
        ours, net(dict(zip(("w2", "w4", "w6"), matrices[:3], strict=True)), extra=False)
    ).differing
    exchanged = weight_differences(ours, net(dict(zip(("w4", "w6", "w8"), matrices[2::-1], strict=True))))
    assert [d.says for d in exchanged.differing] == ["w4, holds w8", "w8, holds w4"]


def test_a_name_counted_on_to_a_constant_of_another_operator_pairs_nothing(tmp_path: Path) -> None:
    """A product by a number is left out on one side; the name of the number is that of the next weights then."""
    files, weights = [], np.random.default_rng(0).standard_normal((2, 8, 8)).astype(np.float32)
    for names in (("val_0", "val_1"), ("", "val_0")):
        made, value = NetBuilder(), "x"
        value = made.op("Relu", made.op("MatMul", value, made.weight(weights[0], "w")))
        value = made.op("Mul", value, made.weight(np.float32(6.28), names[0])) if names[0] else value
        made.op("Abs", made.op("MatMul", value, made.weight(weights[1], names[1])), name="y")
        files.append(Graph(made.save(tmp_path / "net.onnx", {"x": (1, [2, 8])}, ["y"])))
    found = weight_differences(*files)
    assert (found.compared, found.differing, found.missing, found.added) == (2, [], [], [])


@pytest.mark.parametrize(
    ("changed", "kind", "says"),
    [
        (KERNEL[[0, 0, *range(2, 16)]], "copied", "channels that hold those of others: 1←0"),
        (KERNEL.clip(-2.5, 2.5), "clipped", "clipped at -2.5 and 2.5"),
        (GATES.swapaxes(1, 2).reshape(GATES.shape), "transposed", "read in the old shape"),
    ],
)
def test_further_changes_are_described(changed: np.ndarray, kind: str, says: str) -> None:
    change = describe(GATES if changed.shape == GATES.shape else KERNEL, changed)
    assert change is not None
    assert (change.kind, says in change.says) == (kind, True)


@pytest.mark.parametrize(
    ("ours", "theirs", "kind", "says"),
    [
        ([2**60, 1, 1, 1], [2**60 + 100, 1, 1, 1], "elements", "1 of 4 elements: [0]: 1152921504606846976 → "),
        ([2**60, 1, 1, 1], [2**60 + 10_000, 1, 1, 1], "elements", "→ 1152921504606856976"),
        ([1234567] * 4, [1234567, 1234568, 1234567, 1234567], "elements", "[1]: 1234567 → 1234568"),
        (range(10**15, 10**15 + 64), range(10**15 + 3, 10**15 + 67), "shifted", "+3"),
        (range(2**60, 2**60 + 64), range(2**60 + 1, 2**60 + 65), "other", "64 of 64 elements differ, by up to 1"),
        (range(1, 9), range(3, 27, 3), "scaled", "× 3"),
        ([[2**60, 7]], [[2**60], [8]], "shape", "the shape is [2, 1] instead of [1, 2]"),
    ],
)
def test_integers_are_compared_to_the_last_bit(ours: Any, theirs: Any, kind: str, says: str) -> None:
    change = describe(np.array(ours), np.array(theirs))
    assert change is not None
    assert (change.kind, says in change.says) == (kind, True), change.says
    assert change.size > 0
    assert describe(np.array(ours), np.array(ours)) is None


def test_how_far_numbers_differ_is_told_in_six_digits() -> None:
    change = describe(KERNEL, KERNEL + np.random.default_rng(0).standard_normal(KERNEL.shape).astype(np.float32))
    assert change is not None
    digits = change.says.rpartition("by up to ")[2]
    assert len(digits.replace(".", "").lstrip("0")) <= 6, change.says


def test_two_elements_at_one_bound_are_clipped() -> None:
    array = KERNEL.ravel()[:64].reshape(8, 8)
    bound = np.sort(array.ravel())[-3]
    change = describe(array, array.clip(None, bound))
    assert change is not None
    assert change.kind == "clipped"


def test_a_step_along_an_axis() -> None:
    steps = {says: value.tolist() for _, says, value, _ in tensor_change.rolled_forms(np.arange(3.0))}
    assert steps == {"off by +1 along axis 0": [2, 0, 1], "off by -1 along axis 0": [1, 2, 0]}
    assert list(tensor_change.rolled_forms(np.arange(4.0).reshape(2, 2))) == []
    assert len(list(tensor_change.rolled_forms(np.arange(6.0).reshape(2, 3)))) == 2


def test_what_comes_in_at_the_end_is_of_a_larger_tensor() -> None:
    ours, theirs = np.array([1.0, 2, 3, 4]), np.array([9.0, 1, 2, 3])
    up, down = (tensor_change.shifted_in(ours, theirs, {0: step}) for step in (1, -1))
    assert up.tolist() == [9, 1, 2, 3]
    assert down.tolist() == [2, 3, 4, 3]
    both = tensor_change.shifted_in(np.arange(9.0).reshape(3, 3), np.full((3, 3), -1.0), {0: 1, 1: -2})
    assert both.tolist() == [[-1, -1, -1], [2, -1, -1], [5, -1, -1]]

    moved = [value.tolist() for _, _, value, _ in tensor_change.rolled_forms(ours, theirs)]
    assert moved == [[9, 1, 2, 3], [2, 3, 4, 3]]
    assert list(tensor_change.rolled_forms(np.ones(4), theirs)) == []


def test_slices_in_another_order_or_copied() -> None:
    ours = np.array([[1.0, 2], [3, 4], [5, 6]])
    assert tensor_change.same_slices(ours, ours[[2, 0, 1]]) == [2, 0, 1]
    assert tensor_change.same_slices(ours, ours[[0, 0, 2]]) == [0, 0, 2]
    assert tensor_change.same_slices(np.array([1.0, 2]), np.array([1.0, 1])) is None  # single numbers are no copies
    assert tensor_change.same_slices(ours, ours + 1) is None
    alike = np.array([[1.0, 2], [3, 4], [1, 2], [5, 6]])
    assert tensor_change.same_slices(alike, alike[[3, 0, 1, 2]]) == [3, 0, 1, 2]  # equal ones in their order


@pytest.mark.parametrize(
    ("ours", "theirs", "cut"),
    [
        ([1.0, 5, 7], [1.0, 4, 4], True),
        ([1.0, 5, 4], [1.0, 4, 4], False),
        ([-9.0, -8, 1], [-3.0, -3, 1], True),
        ([-9.0, 8, 1], [-3.0, 3, 1], True),
        ([1.0, 5, 7], [1.0, 4, 3], False),
        ([1.0, 5, np.inf], [1.0, 4, 4], False),
    ],
)
def test_what_lies_beyond_the_ends_is_cut_off(ours: list[float], theirs: list[float], cut: bool) -> None:
    a, b = np.array(ours), np.array(theirs)
    assert tensor_change._cut_off(a, b, a != b) is cut


def test_few_bits_by_hand() -> None:
    forms = dict(tensor_change.few_bit_forms(np.array([[1.0, 1 + 2.0**-3, 448.0, -1 - 2.0**-8]])))
    assert forms["with 3 bits of mantissa"].tolist() == [[1, 1.125, 448, -1]]
    assert forms["with 2 bits of mantissa"].tolist() == [[1, 1, 448, -1]]
    assert forms["with 7 bits of mantissa, the others truncated"].tolist() == [[1, 1.125, 448, -1]]
    assert forms["with 8 bits of mantissa"].tolist() == [[1, 1.125, 448, -1 - 2.0**-8]]
    assert forms["in FP8 E4M3, no scale"].tolist() == [[1, 1.125, 448, -1]]
    assert [name.split(",")[0] for name in forms][:1] == ["in 4 bits"]
    assert tensor_change.axis_name(0, 1) == "element"
    assert [tensor_change.axis_name(axis, 4) for axis in range(3)] == ["channel", "input channel", "slice of axis 2"]
    assert tensor_change.axis_name(1, 2) == "column"


@pytest.mark.parametrize(("other", "same"), [({"transB": 1}, True), ({"transB": 0}, False), ({}, False)])
def test_a_layout_matters_where_it_is_read_alike(tmp_path: Path, other: dict[str, int], same: bool) -> None:
    def made(name: str, **attributes: int) -> Constants:
        net = NetBuilder()
        net.op("Gemm", "x", net.weight(np.eye(2, dtype=np.float32), f"w{name}"), name="y", **attributes)
        return Constants(Graph(net.save(tmp_path / f"{name}.onnx", {"x": (1, [1, 2])}, ["y"])))

    assert _same_reader(made("a", transB=1), made("b", **other), "wa", "wb") == same


def test_numbers_whose_squares_are_beyond_fp64_are_told() -> None:
    change = describe(np.zeros(3), np.array([0.0, -1.7e308, 0.0]))
    assert change is not None


@pytest.mark.filterwarnings("error")
def test_a_mask_with_infinity_is_stored_in_floats_alone() -> None:
    mask = np.triu(np.full((6, 6), -np.inf), 1) + 0.1
    assert [kind for kind, *_ in tensor_change.stored_forms(mask)] == ["fp16", "bf16"]
