"""Networks whose channels were rescaled between layers, as tools that quantize do: nobody is guilty of that."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from nets import node_of
from onnx import numpy_helper
from test_pairing import renamed

from cp_debug.bisect.engine import Options, bisect
from cp_debug.bisect.file_weights import _standardized, twin_of
from cp_debug.bisect.result import TestResult

Weights = dict[str, np.ndarray]

CONVOLUTIONS = """<ir_version: 8, opset_import: ["": 17]>
net (float[1,3,8,8] x) => (float[1,4] y) {
  a = Conv <pads = [1,1,1,1]> (x, a_w, a_b)
  ar = LeakyRelu (a)
  d = Conv <group = 8, pads = [1,1,1,1]> (ar, d_w, d_b)
  dp = MaxPool <kernel_shape = [2,2], strides = [2,2]> (d)
  g = Conv <group = 2> (dp, g_w, g_b)
  gr = PRelu (g, slope)
  u = ConvTranspose <strides = [2,2], kernel_shape = [2,2]> (gr, u_w, u_b)
  ur = Relu (u)
  f = Flatten (ur)
  y = Gemm <transB = 1> (f, y_w, y_b)
}"""
ATTENTION = """<ir_version: 8, opset_import: ["": 17]>
net (float[1,5,8] x) => (float[1,5,8] y) {
  n = LayerNormalization (x, n_w, n_b)
  q = MatMul (n, q_w)
  k = MatMul (n, k_w)
  v0 = MatMul (n, v_w)
  v = Add (v0, v_b)
  qh = Reshape (q, heads)
  qt = Transpose <perm = [0,2,1,3]> (qh)
  kh = Reshape (k, heads)
  kt = Transpose <perm = [0,2,3,1]> (kh)
  vh = Reshape (v, heads)
  vt = Transpose <perm = [0,2,1,3]> (vh)
  s = MatMul (qt, kt)
  p = Softmax (s)
  m = MatMul (p, vt)
  mt = Transpose <perm = [0,2,1,3]> (m)
  mf = Reshape (mt, flat)
  o = MatMul (mf, o_w)
  r = Mul (o, r_w)
  h = MatMul (r, h_w)
  hs = Sigmoid (h)
  up = MatMul (r, up_w)
  ug = Mul (hs, up)
  y = MatMul (ug, y_w)
}"""


def network(path: Path, text: str, weights: Mapping[str, np.ndarray]) -> Path:
    model = onnx.parser.parse_model(text)
    for node in model.graph.node:
        node.name = node.output[0]
    model.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in weights.items())
    onnx.save(model, str(path))
    return path


def drawn(**shapes: tuple[int, ...]) -> Weights:
    rng = np.random.default_rng(0)
    return {name: rng.standard_normal(shape).astype(np.float32) * 0.5 for name, shape in shapes.items()}


def convolutions() -> Weights:
    weights = drawn(
        a_w=(8, 3, 3, 3), a_b=(8,), d_w=(8, 1, 3, 3), d_b=(8,), g_w=(8, 4, 1, 1), g_b=(8,), slope=(8, 1, 1),
        u_w=(8, 2, 2, 2), u_b=(2,), y_w=(4, 128), y_b=(4,),
    )  # fmt: skip
    return weights


def attention() -> Weights:
    weights = drawn(
        n_w=(8,), n_b=(8,), q_w=(8, 8), k_w=(8, 8), v_w=(8, 8), v_b=(8,), o_w=(8, 8), r_w=(8,), h_w=(8, 8),
        up_w=(8, 8), y_w=(8, 8),
    )  # fmt: skip
    return weights | {"heads": np.array([1, 5, 2, 4]), "flat": np.array([1, 5, 8])}


def factors(seed: int, count: int = 8) -> np.ndarray:
    return np.exp(np.random.default_rng(seed).standard_normal(count)).astype(np.float32)


def equalised(weights: Weights) -> Weights:
    """``convolutions`` with each layer's channels multiplied, and divided where they are read."""
    w = dict(weights)
    a, d, g, u = (factors(seed) for seed in range(4))
    w["a_w"], w["a_b"] = w["a_w"] * a[:, None, None, None], w["a_b"] * a
    w["d_w"], w["d_b"] = w["d_w"] * (d / a)[:, None, None, None], w["d_b"] * d
    taken = np.repeat(d.reshape(2, 4), 4, axis=0)
    w["g_w"], w["g_b"] = w["g_w"] * g[:, None, None, None] / taken[:, :, None, None], w["g_b"] * g
    w["u_w"], w["u_b"] = w["u_w"] / g[:, None, None, None] * u[:2, None, None], w["u_b"] * u[:2]
    w["y_w"] = w["y_w"] / np.repeat(u[:2], 64)
    return w


def smoothed(weights: Weights) -> Weights:
    """``attention`` with the scale of the norm, the values, a Mul and a gated product smoothed."""
    w = dict(weights)
    n, v, r, up = (factors(seed) for seed in range(4))
    w["n_w"], w["n_b"] = w["n_w"] / n, w["n_b"] / n
    w |= {name: w[name] * n[:, None] for name in ("q_w", "k_w", "v_w")}
    w["v_w"], w["v_b"], w["o_w"] = w["v_w"] * v, w["v_b"] * v, w["o_w"] / v[:, None]
    w["r_w"] = w["r_w"] / r
    w |= {name: w[name] * r[:, None] for name in ("h_w", "up_w")}
    w["up_w"], w["y_w"] = w["up_w"] * up, w["y_w"] / up[:, None]
    return w


NETWORKS = {"convolutions": (CONVOLUTIONS, convolutions, equalised), "attention": (ATTENTION, attention, smoothed)}


def judged(tmp_path: Path, text: str, weights: Weights, other: Weights, *, rename: bool = False) -> TestResult:
    reference = network(tmp_path / "a.onnx", text, weights)
    test = network(tmp_path / "b.onnx", text, other)
    if rename:
        test = renamed(test, tmp_path / "c.onnx")
    (result,) = bisect(str(reference), "ort,ort", test_model=test, options=Options()).tests
    return result


def guilty(result: TestResult) -> list[str]:
    return [row.name for row in result.rows if row.verdict == "guilty"]


@pytest.mark.parametrize("kind", NETWORKS)
@pytest.mark.parametrize("rename", [False, True])
def test_what_is_taken_back_accuses_nobody(tmp_path: Path, kind: str, rename: bool) -> None:
    text, make, change = NETWORKS[kind]
    result = judged(tmp_path, text, make(), change(make()), rename=rename)
    assert guilty(result) == []
    if rename and kind == "attention":  # rescaled values have no equal, and are judged with what reads them
        assert (result.compared, result.total) == (21, 24)
    else:
        assert result.compared == result.total
        assert any("in another basis" in note for note in result.notes), result.notes


@pytest.mark.parametrize(("kind", "name"), [("convolutions", "g"), ("attention", "up")])
def test_a_fault_beside_it_is_among_the_guilty(tmp_path: Path, kind: str, name: str) -> None:
    text, make, change = NETWORKS[kind]
    other = change(make())
    weight = other[f"{name}_w"] = other[f"{name}_w"].copy()
    weight[3] *= 1.05
    assert name in guilty(judged(tmp_path, text, make(), other))


@pytest.mark.parametrize(("kind", "name"), [("convolutions", "a"), ("attention", "n")])
def test_channels_that_nobody_takes_back_are_a_fault(tmp_path: Path, kind: str, name: str) -> None:
    text, make, _ = NETWORKS[kind]
    other, by = make(), factors(5)
    other[f"{name}_w"] = other[f"{name}_w"] * by.reshape(-1, *[1] * (other[f"{name}_w"].ndim - 1))
    other[f"{name}_b"] = other[f"{name}_b"] * by
    result = judged(tmp_path, text, make(), other)
    assert guilty(result) == [name]
    assert not any("another basis" in note for note in result.notes)


def test_factors_stop_where_an_operator_does_not_pass_them_on(tmp_path: Path) -> None:
    """A Sigmoid between two layers: multiplied and divided is not the same there, though the weights look so."""
    text, weights = CONVOLUTIONS.replace("LeakyRelu", "Sigmoid"), convolutions()
    other, by = dict(weights), factors(6)
    other["a_w"], other["a_b"] = weights["a_w"] * by[:, None, None, None], weights["a_b"] * by
    other["d_w"] = weights["d_w"] / by[:, None, None, None]
    assert guilty(judged(tmp_path, text, weights, other)) == ["a", "d"]


GROUPS = """<ir_version: 8, opset_import: ["": 17]>
net (float[1,3,8,8] x) => (float[1,4,8,8] y, float[1,4,8,8] z) {
  a = Conv <pads = [1,1,1,1]> (x, a_w, a_b)
  s, z = Split <axis = 1> (a)
  y = Conv <group = 4> (s, d_w)
}"""


@pytest.mark.parametrize("taken_back", [False, True])
def test_one_factor_for_all_channels_reaches_layers_of_groups(tmp_path: Path, taken_back: bool) -> None:
    """A weight that is 5 % too large, read in groups behind a Split, which leaves a single factor."""
    weights = drawn(a_w=(8, 3, 3, 3), a_b=(8,), d_w=(4, 1, 3, 3))
    other = weights | {"a_w": weights["a_w"] * np.float32(1.05), "a_b": weights["a_b"] * np.float32(1.05)}
    if taken_back:
        other["d_w"] = weights["d_w"] / np.float32(1.05)
    assert guilty(judged(tmp_path, GROUPS, weights, other))[0] == "a"


REDUCED = """<ir_version: 8, opset_import: ["": 17]>
net (float[1,3,8,8] x) => (float[1,4] y) {
  a = Conv <pads = [1,1,1,1]> (x, a_w, a_b)
  r = ReduceMean <axes = [1], keepdims = 0> (a)
  f = Flatten (r)
  y = Gemm <transB = 1> (f, y_w, y_b)
}"""


def test_factors_stop_where_their_channels_are_summed(tmp_path: Path) -> None:
    """The axis that is left has as many places, and weights that are divided there as if they were the channels."""
    weights = drawn(a_w=(8, 3, 3, 3), a_b=(8,), y_w=(4, 64), y_b=(4,))
    other, by = dict(weights), factors(7)
    other["a_w"], other["a_b"] = weights["a_w"] * by[:, None, None, None], weights["a_b"] * by
    other["y_w"] = weights["y_w"] / np.repeat(by, 8)
    assert guilty(judged(tmp_path, REDUCED, weights, other)) == ["a", "y"]


CAST = """<ir_version: 8, opset_import: ["": 17]>
net (float[1,3,8,8] x) => (float[1,4,8,8] y) {
  a = Conv <pads = [1,1,1,1]> (x, a_w, a_b)
  i = Cast <to = 6> (a)
  c = Cast <to = 1> (i)
  y = Conv (c, y_w)
}"""


def test_factors_stop_at_whole_numbers(tmp_path: Path) -> None:
    weights = drawn(a_w=(8, 3, 3, 3), a_b=(8,), y_w=(4, 8, 1, 1))
    other, by = dict(weights), factors(8)
    other["a_w"], other["a_b"] = weights["a_w"] * by[:, None, None, None], weights["a_b"] * by
    other["y_w"] = weights["y_w"] / by[:, None, None]
    assert guilty(judged(tmp_path, CAST, weights, other)) == ["a", "y"]


def test_rows_without_their_mean_have_length_one() -> None:
    rows = _standardized(torch.tensor([[1.0, 3.0], [10.0, 30.0], [5.0, 1.0]]))
    assert torch.allclose(rows[0], rows[1])
    assert torch.allclose(rows.norm(dim=1), torch.ones(3))
    assert torch.allclose(rows[2], -rows[0])
    conv, relu, gemm, matmul = (node_of(op, ["x", "w"], index=0) for op in ("Conv", "Relu", "Gemm", "MatMul"))
    assert twin_of(conv, [conv, relu]) is conv
    assert twin_of(matmul, [gemm, relu]) is gemm, "as an optimizer makes it of a MatMul and an Add"
    assert twin_of(conv, [conv, relu, conv]) is twin_of(conv, [gemm]) is twin_of(relu, [conv, relu]) is None
