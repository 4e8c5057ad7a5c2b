"""Integers in a verdict: indices, ids, counts and masks are right or wrong; levels of a quantizer are rounded."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from nets import NetBuilder, graph_of
from onnx import TensorProto, helper, numpy_helper, parser
from test_cli import run

import cp_debug
from cp_debug.bisect.recording import compare_captures
from cp_debug.bisect.verdict import is_within
from cp_debug.deploy.verify import Tolerances, what_is_wrong
from cp_debug.graph import integer_values
from cp_debug.graph.graph import Graph, Node
from cp_debug.graph.integer_values import level_values, unscaled_levels
from cp_debug.probes.capture import Capture
from cp_debug.probes.statistics import compare
from cp_debug.reports.verdict_line import verdict_line

RNG = np.random.default_rng(0)
WEIGHT = RNG.standard_normal((8, 4)).astype(np.float32)


def save(path: Path, text: str, **weights: np.ndarray) -> Path:
    model = parser.parse_model(f'<ir_version: 8, opset_import: ["" : 17]>\n{text}')
    model.graph.initializer.extend(numpy_helper.from_array(w, n) for n, w in weights.items())
    onnx.save(model, path)
    return path


def chosen(folder: Path, name: str, table: list[int]) -> Path:
    """A network that chooses of a table of integers by the largest of four logits."""
    text = """
    net (float[6,8] x) => (int64[6] o)
    {
        y = MatMul (x, w)
        i = ArgMax <axis = 1, keepdims = 0> (y)
        o = Gather (t, i)
    }"""
    return save(folder / name, text, w=WEIGHT, t=np.array(table))


def near_ties(folder: Path) -> Path:
    """ArgMax over pairs of logits that differ by 1e-5: in TF32 most of 64 indices are the neighbour's."""
    weight = np.random.default_rng(1).standard_normal((8, 4000)).astype(np.float32)
    weight[:, 1::2] = weight[:, ::2] * np.float32(1.00001)
    text = """
    net (float[64,8] x) => (int64[64] o)
    {
        y = MatMul (x, w)
        o = ArgMax <axis = 1, keepdims = 0> (y)
    }"""
    return save(folder / "near.onnx", text, w=weight)


def line(result: Any) -> str:
    return verdict_line(result.tests[0]).plain


@pytest.mark.parametrize("gap", [1, 100])
def test_a_table_of_large_integers_is_compared_to_the_last_bit(tmp_path: Path, gap: int) -> None:
    start = 1_700_000_000_000_000_000
    ours = chosen(tmp_path, "ours.onnx", [start + i * 10**9 for i in range(4)])
    theirs = chosen(tmp_path, "theirs.onnx", [start + i * 10**9 + gap for i in range(4)])
    result = cp_debug.diagnose(ours, "ort,ort", test_model=theirs)
    assert not result.agrees
    assert [row.onnx for row in result.tests[0].guilty] == ["o"]
    assert "4 of 4 elements differ" in result.weights["ours"]["says"] or f"+{gap}" in result.weights["ours"]["says"]
    assert "final outputs differ in 6 of 6 elements (o)" in line(result)
    assert result.tests[0].guilty[0].share == pytest.approx(1.0)
    assert "explains nothing" not in str(result)
    verified = cp_debug.verify(ours, "ort,ort", test_model=theirs)
    assert [check.why for check in verified.scenarios[0].failures] == ["6 of 6 elements differ"]
    tables = cp_debug.compare_tensors({"o": np.full(6, start)}, {"o": np.full(6, start + gap)})
    assert str(tables).startswith(f"o  max |Δ| {gap}, rel. L2 ")
    assert str(tables).endswith(", 6 of 6 elements differ")


def test_captures_of_other_ids_do_not_agree(tmp_path: Path) -> None:
    ours = chosen(tmp_path, "ours.onnx", [29871, 15043, 3186, 29991])
    theirs = chosen(tmp_path, "theirs.onnx", [29871, 15044, 3186, 29991])
    for model in (ours, theirs):
        assert run("capture", model, "-b", "ort", "-o", tmp_path / model.stem)[0] == 0
    code, text = run("compare", tmp_path / "ours", tmp_path / "theirs", "--force")
    assert (code, "elements (o)" in " ".join(text.split())) == (1, True)
    code, _ = run("compare", tmp_path / "ours", tmp_path / "theirs", "--force", "--atol", "1")
    assert code == 0


def test_indices_that_rounding_moved_do_not_agree(tmp_path: Path) -> None:
    model = near_ties(tmp_path)
    result = cp_debug.diagnose(model, "ort,emu-tf32")
    (output,) = result.tests[0].outputs
    assert (result.agrees, result.tests[0].guilty, output.verdict) == (False, [], "inherited")
    assert output.stats.unequal
    assert output.stats.unequal > 32
    assert f"differ in {output.stats.unequal} of 64 elements (o)" in line(result)
    assert not cp_debug.diagnose(model, "ort,emu-tf32", options=cp_debug.Options(rtol=1.0)).agrees
    assert cp_debug.diagnose(model, "ort,emu-tf32", options=cp_debug.Options(atol=1.0)).agrees
    assert cp_debug.diagnose(model, "ort,ort-all").agrees


def test_integers_are_within_an_absolute_tolerance_alone() -> None:
    ids, moved = np.array([15043, 7]), np.array([15044, 7])
    assert not is_within(compare(ids, moved), 0.5, 0.9)
    assert is_within(compare(ids, moved), 0.0, 1.0)
    assert is_within(compare(ids, ids), 0.0, 0.0)
    assert not is_within(compare(ids, moved.astype(np.float32)), 1e-4, 1e-6)
    assert is_within(compare(ids.astype(np.float32), moved.astype(np.float32)), 1e-4, 1e-6)
    assert is_within(compare(ids, moved), 1e-4, 1e-6, levels=True)
    mask = np.array([True, False])
    assert not is_within(compare(mask, ~mask), 0.0, 1.0)
    assert is_within(compare(mask, ~mask), 0.0, np.inf)
    assert not is_within(compare(ids, ids[:1]), 1.0, np.inf)


def test_a_verification_of_integers_takes_only_the_tolerance_of_their_own_name() -> None:
    stats = compare(np.array([15043, 7]), np.array([15044, 7]))
    for given, limit in (({}, 0.0), ({"fp32": 0.1}, 0.0), ({"o": 0.1}, 0.1), ({"o@fp32": 0.2}, 0.2)):
        assert Tolerances(given, ["o"]).limit("o", 1e-7, "fp32", "fp32", whole=True) == limit
    assert Tolerances({"fp32": 0.1}, ["o"]).limit("o", 1e-7, "fp32", "fp32") == 0.1
    assert what_is_wrong(stats, 0.0, None) == "1 of 2 elements differ"
    assert what_is_wrong(stats, 0.1, None) == ""


QUANTIZED = """
net (float[4,8] x) => (uint8[4,6] q, int64[4] best, int64[2] size)
{
    xq = QuantizeLinear (x, s, z)
    xd = DequantizeLinear (xq, s, z)
    wd = DequantizeLinear (w, s, zw)
    y = MatMul (xd, wd)
    yq = QuantizeLinear (y, s, z)
    t = Transpose (yq)
    q = Transpose (t)
    best = ArgMax <axis = 1, keepdims = 0> (q)
    size = Shape (q)
}"""


def quantized(path: Path, changed: int = 0) -> Path:
    weight = np.random.default_rng(2).integers(-100, 100, (8, 6)).astype(np.int8)
    weight[0, :changed] += 1
    zeros = {"z": np.array(128, np.uint8), "zw": np.array(0, np.int8)}
    return save(path, QUANTIZED, w=weight, s=np.array(0.05, np.float32), **zeros)


def test_levels_are_told_from_other_integers(tmp_path: Path) -> None:
    graph = Graph(quantized(tmp_path / "q.onnx"))
    assert level_values(graph) == {"xq", "yq", "t", "q"}
    text = """
    net (uint8[4,8] x) => (int32[4,6] sum, uint8[4,6] moved)
    {
        sum = MatMulInteger (x, w)
        bias = Add (sum, b)
        big = Cast <to = 7> (bias)
        real = Cast <to = 1> (bias)
        back = Cast <to = 2> (real)
        moved = Identity (back)
        none = Greater (bias, b)
    }"""
    whole = Graph(save(tmp_path / "i.onnx", text, w=np.ones((8, 6), np.uint8), b=np.ones(6, np.int32)))
    assert level_values(whole) == {"sum", "bias", "big"}


def test_a_level_more_or_less_is_rounding(tmp_path: Path) -> None:
    ours, theirs = quantized(tmp_path / "ours.onnx"), quantized(tmp_path / "theirs.onnx", 1)
    result = cp_debug.diagnose(ours, "ort,ort", test_model=theirs)
    levels, best, size = result.tests[0].outputs
    assert (levels.within, bool(levels.stats.unequal), levels.stats.max_abs) == (True, True, 1.0)
    assert (size.within, best.within) == (True, not best.stats.unequal)
    captures = []
    for model in (ours, theirs):
        assert run("capture", model, "-b", "ort", "-o", tmp_path / model.stem)[0] == 0
        captures.append(Capture.open(tmp_path / model.stem))
    result = compare_captures(captures[0], captures[1], force=True, rtol=0.2)
    levels = next(row for row in result.tests[0].rows if row.onnx == "q")
    assert (levels.within, bool(levels.stats.unequal)) == (True, True)


def floats(*shape: int) -> np.ndarray:
    return np.zeros(shape, np.float32)


@pytest.mark.parametrize(
    ("op", "count", "grid"),
    [
        ("QuantizeLinear", 3, ("i1", "i2")),
        ("com.microsoft.QLinearConcat", 5, ("i0", "i1")),
        ("QLinearConv", 8, ("i6", "i7")),
        ("QLinearMatMul", 8, ("i6", "i7")),
        ("com.microsoft.QLinearAdd", 8, ("i6", "i7")),
        ("com.microsoft.QLinearSigmoid", 5, ("i3", "i4")),
        ("com.microsoft.QGemm", 9, ("i7", "i8")),
        ("com.microsoft.QGemm", 7, None),
        ("Relu", 1, None),
    ],
)
def test_grids_of_levels_are_where_the_operator_has_them(op: str, count: int, grid: tuple[str, str] | None) -> None:
    domain, _, name = op.rpartition(".")
    proto = helper.make_node(name, [f"i{i}" for i in range(count)], ["y"], "n", domain=domain)
    graph: Any = SimpleNamespace(nodes=[0], producer={"y": Node.of(0, proto)})
    assert integer_values.produced_grid(graph, "y") == [*(grid or ())]


def test_what_is_rounded_to_levels(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["d"]),
        helper.make_node("Reshape", ["d", "shape"], ["r"]),
        helper.make_node("MatMul", ["d", "w"], ["m"]),
        helper.make_node("Add", ["m", "x"], ["y"]),
    ]
    weights = {"s": np.float32(0.1), "z": np.int8(0), "w": floats(2, 2), "shape": np.array([2, 2])}
    assert integer_values.rounded_values(graph_of(tmp_path, nodes, {"x": [2, 2]}, weights)) == {"q", "m"}  # type: ignore[arg-type]


def test_levels_whose_scale_no_constant_tells_are_no_numbers(tmp_path: Path) -> None:
    net = NetBuilder()
    net.op("Relu", net.op("Neg", "x", name="mid"), name="y")
    plain = Graph(net.save(tmp_path / "plain.onnx", {"x": (1, [2])}, ["y"]))
    net = NetBuilder()
    net.op("Cast", "x", name="levels", to=TensorProto.INT8)
    net.op("Cast", "levels", name="y", to=TensorProto.FLOAT)
    graph = Graph(net.save(tmp_path / "int8.onnx", {"x": (1, [2])}, ["y"]))
    assert unscaled_levels(plain, graph, {"levels": "mid", "y": "y", "lost": "mid"}) == {"levels"}


@pytest.mark.parametrize(
    ("quotient", "level", "guilty"), [(9.499997, 10, False), (9.4999, 10, True), (9.499997, 8, True)]
)
def test_a_level_between_two_is_either_of_them(quotient: float, level: int, guilty: bool, tmp_path: Path) -> None:
    """x ÷ scale and x × (1 ÷ scale) round differently in FP32."""
    text = "net (float[1,20] x) => (float[1,20] y) <float s = {0.015}, int8 z = {0}> { q = QuantizeLinear (w, s, z) "
    weights = np.full((1, 20), 0.015 * quotient, np.float32)
    model = save(tmp_path / "net.onnx", text + "d = DequantizeLinear (q, s, z) y = Add (x, d) }", w=weights)
    q = np.full((1, 20), 9, np.int8)
    q[0, 3] = level
    x, d = np.zeros((1, 20), np.float32), np.float32(0.015) * q
    (test,) = cp_debug.diagnose(model, "ort", test_tensors={"x": x, "q": q, "d": d, "y": d}, progress=False).tests
    assert [row.onnx for row in test.guilty] == ["q"] * guilty
