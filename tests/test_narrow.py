"""FP8, MXFP8, MXFP4, NVFP4 and INT4 as arithmetics and as backends."""

from __future__ import annotations

import math
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from test_executor import graph, random

from cp_debug.backends.arithmetic import ARITHMETICS
from cp_debug.backends.executor import Executor
from cp_debug.backends.narrow_options import FAMILIES, NarrowOptions
from cp_debug.backends.running_sums import FP16_SUM, HOPPER_FP8, HOPPER_FP16, RunningSum
from cp_debug.backends.scaling import COLUMNS, DATA, E2M1, E4M3, KERNEL, ROWS, Encoded, Scaling, mx_scales
from cp_debug.backends.spec import BackendSpec, parse_backends
from cp_debug.bisect.replay import Replayer
from cp_debug.errors import InputError
from cp_debug.programs.precision import PRECISIONS, oracle_for

NET = """g (float[2,40,9,9] x) => (float[A,B] y, float[a,b,c,d] z) {
    c = Conv <pads = [1,1,1,1], strides = [2,1], group = 2> (x, w, bias)
    z = ConvTranspose <strides = [2,2], pads = [1,0,0,1], group = 2> (c, wt)
    f = Reshape(c, shape)  y = Gemm <transB = 1> (f, w2) }"""
WEIGHTS = {
    "w": random(24, 20, 3, 3, seed=1),
    "bias": random(24, seed=5),
    "wt": random(24, 6, 2, 2, seed=2),
    "w2": random(50, 216, seed=3),
    "shape": np.array([-1, 216]),
}
X = {"x": random(2, 40, 9, 9)}


def encoded(family: str, x: np.ndarray, axes: object = ROWS, place: int = 0) -> torch.Tensor:
    return Scaling(NarrowOptions.parse(family)).encode(torch.from_numpy(x), axes, place).values  # type: ignore[arg-type]


# --- specs


def test_a_spec_has_one_canonical_spelling() -> None:
    for text, canonical in [
        ("emu-fp8", "emu-fp8"),
        ("emu-fp8:e4m3:tensor:acc=fp32:out=fp32", "emu-fp8"),
        ("emu-fp8:promote=128:acc=14-bit:block@cuda:0", "emu-fp8:block:acc=fp22:promote=128@cuda:0"),
        ("emu-fp8:round=truncate:acc=fp22", "emu-fp8:acc=fp22"),
        ("emu-int4:g128", "emu-int4"),
        ("emu-int4:asym:g32", "emu-int4:g32:asym"),
        ("emu-mxfp8:up:e5m2@cpu", "emu-mxfp8:e5m2:up@cpu"),
        ("emu-fp8:acc=fp16", "emu-fp8:acc=fp16"),
    ]:
        spec = BackendSpec.parse(text)
        assert str(spec) == canonical
        assert BackendSpec.parse(str(spec)) == spec
        assert ARITHMETICS[spec.precision].name == spec.precision == PRECISIONS[spec.precision].name
    with pytest.raises(InputError, match="twice"):
        parse_backends("torch,emu-fp8,emu-fp8:tensor")
    assert len(parse_backends("torch,emu-fp8,emu-fp8:block")) == 3


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("emu-fp8:e3m4", "no option 'e3m4'"),
        ("emu-nvfp4:block", "no option 'block'"),
        ("emu-mxfp4:e5m2", "no option 'e5m2'"),
        ("emu-int4:g48", "a group of 48"),
        ("emu-fp8:promote=128", "add acc=fp22"),
        ("emu-fp8:acc=fp32:round=nearest", "add acc=fp22"),
        ("emu-fp8:acc=fp22:promote=100", "multiple"),
        ("emu-fp8:acc=fp22:acc=fp16", "repeats another"),
        ("emu-fp8:acc=fp16:round=truncate", "remove round="),
        ("emu-fp8:chanel", "did you mean channel"),
        ("emu-fp8:promote=0:acc=fp22", "no option"),
        ("emu-fp16:block", "has no options"),
        ("torch:e4m3", "has no options"),
    ],
)
def test_options_that_a_precision_does_not_have_are_one_sentence(text: str, says: str) -> None:
    with pytest.raises(InputError, match=says) as error:
        BackendSpec.parse(text)
    assert "\n" not in str(error.value)


def test_unknown_backends_name_the_near_one() -> None:
    with pytest.raises(InputError, match="emu-nvfp4"):
        BackendSpec.parse("emu-nvfp8x")


# --- scales


def test_a_tensor_its_rows_and_its_blocks_share_scales() -> None:
    x = random(4, 256)
    x[0, 3], x[2, 200] = 1e6, 0.0
    per_tensor = E4M3(torch.from_numpy(x) / np.float32(1e6 / 448)) * np.float32(1e6 / 448)
    np.testing.assert_array_equal(encoded("fp8", x).numpy(), per_tensor.numpy())
    rows = encoded("fp8:channel", x).numpy()
    blocks = encoded("fp8:block", x).numpy()
    square = encoded("fp8:block", x, ROWS, 1).numpy()
    errors = [np.abs(e - x)[1:].max() for e in (per_tensor.numpy(), rows)]
    assert errors[1] < errors[0] / 10  # rows beside the outlier do not suffer
    assert np.abs(blocks - x)[0, 128:].max() < np.abs(rows - x)[0, 128:].max() / 10
    assert np.abs(square - x)[1, :128].max() > 10 * np.abs(blocks - x)[1, :128].max()  # 128 rows share it with row 0
    np.testing.assert_array_equal(encoded("fp8:channel", x.T.copy(), COLUMNS, 1).numpy(), rows.T)


def test_scales_of_microscaling_are_those_of_the_specification() -> None:
    amax = torch.tensor([0.0, 1.0, 6.0, 7.9, 8.0, 2.0**-140, 448.0, 449.0, math.inf])
    assert mx_scales(amax[:6], E2M1).tolist() == [2.0**-127, 0.25, 1.0, 1.0, 2.0, 2.0**-127]
    assert mx_scales(amax[6:8], E4M3).tolist() == [1.0, 1.0]
    assert mx_scales(amax[6:8], E4M3, up=True).tolist() == [1.0, 2.0]
    assert math.isnan(mx_scales(amax[8:], E4M3).item())
    x = np.array([[7.9] + [0.3] * 31 + [0.3] * 10], np.float32)  # the second block is shorter
    wanted = [6.0] + [0.5] * 31 + [0.25 * 1.0] * 10
    assert encoded("mxfp4", x)[0, 0] == wanted[0]  # 7.9 lies beyond 6 times the scale 1
    np.testing.assert_allclose(encoded("mxfp4", x)[0, 32:].numpy(), 0.3, rtol=0.2)
    np.testing.assert_array_equal(encoded("mxfp4:up", x)[0, :1].numpy(), [8.0])


def test_nvfp4_has_scales_in_e4m3_and_one_for_the_tensor() -> None:
    x = random(3, 64)
    code = Scaling(NarrowOptions.parse("nvfp4")).encode(torch.from_numpy(x), ROWS, 0)
    assert code.coarse.item() == np.float32(np.abs(x).max()) / np.float32(448 * 6)
    assert code.fine is not None
    blocks = code.fine.unflatten(-1, (4, 16))
    assert torch.equal(blocks, blocks[..., :1].expand_as(blocks))
    assert torch.equal(E4M3(blocks), blocks)
    assert blocks.max() == 448.0
    assert set(code.codes.abs().flatten().tolist()) <= {0, 0.5, 1, 1.5, 2, 3, 4, 6}


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("block", [32, 128])
def test_int4_gives_the_levels_of_onnx_runtimes_quantizer(symmetric: bool, block: int) -> None:
    state = pytest.importorskip("onnxruntime.capi._pybind_state")
    weight = random(256, 24)
    weight[:block, 3] = 0
    blocks = 256 // block
    packed = np.zeros((24, blocks, block // 2), np.uint8)
    scales, zeros = np.zeros(24 * blocks, np.float32), np.zeros(24 * ((blocks + 1) // 2), np.uint8)
    state.quantize_matmul_4bits(packed, weight, scales, zeros, block, 24, 256, symmetric)
    levels = np.stack([packed & 15, packed >> 4], -1).reshape(24, 256).astype(np.float32)
    if symmetric:
        zero = np.full((24, blocks), 8, np.float32)
    else:
        zero = np.stack([zeros & 15, zeros >> 4], -1).reshape(24, -1)[:, :blocks].astype(np.float32)
    theirs = ((levels.reshape(24, blocks, block) - zero[..., None]) * scales.reshape(24, blocks, 1)).reshape(24, 256).T
    ours = encoded(f"int4:g{block}" + ("" if symmetric else ":asym"), weight, COLUMNS, 1).numpy()
    np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("family", [*FAMILIES, "fp8:channel", "fp8:block", "int4:asym"])
def test_zeros_empty_tensors_and_strange_numbers(family: str) -> None:
    assert (encoded(family, np.zeros((4, 48), np.float32), COLUMNS, 1) == 0).all()
    for axes, shape in ((ROWS, (0, 5)), (ROWS, (3, 0)), (KERNEL, (2, 1, 3, 3)), (DATA, (1, 3, 4, 4))):
        assert encoded(family, np.ones(shape, np.float32), axes).shape == shape
    tiny = np.full((2, 64), 1e-44, np.float32)
    assert torch.isfinite(encoded(family, tiny)).all()
    if not family.startswith("int4"):
        strange = random(2, 64)
        strange[0, 0] = np.nan
        assert encoded(family, strange)[0, 0].isnan()


# --- sums


def slow_sum(a: list[float], b: list[float], rule: RunningSum) -> float:
    """The definition in rational numbers, one product after the other."""

    def exponent(x: Fraction) -> int:
        return math.frexp(float(x))[1] - 1

    def cut(x: Fraction, step: Fraction) -> Fraction:
        return (round(x / step) if rule.nearest else int(x / step)) * step

    total, promoted = Fraction(0), Fraction(0)
    for start in range(0, len(a), rule.block):
        if rule.promote and start and start % rule.promote == 0:
            promoted, total = Fraction(float(np.float32(float(promoted + total)))), Fraction(0)
        pairs = [(Fraction(x), Fraction(y)) for x, y in zip(a, b, strict=True)][start : start + rule.block]
        pairs = [(x, y) for x, y in pairs if x and y]
        tops = [max(exponent(x), rule.lowest) + max(exponent(y), rule.lowest) for x, y in pairs]
        tops += [exponent(total)] if total else []
        if not tops:
            continue
        step = Fraction(2) ** (max(tops) - (rule.aligned or 0))
        total = (
            sum((cut(x * y, step) for x, y in pairs), cut(total, step))
            if rule.aligned
            else (sum((x * y for x, y in pairs), total))
        )
        total = cut(total, Fraction(2) ** (exponent(total) - rule.kept)) if total else total
    return float(np.float32(float(promoted + total)))


@pytest.mark.parametrize(
    "rule",
    [
        HOPPER_FP8,
        HOPPER_FP16,
        FP16_SUM,
        replace(HOPPER_FP8, promote=64),
        replace(HOPPER_FP8, nearest=True, kept=9, aligned=9),
    ],
)
def test_sums_are_kept_as_their_definition_says(rule: RunningSum) -> None:
    a = E4M3(torch.from_numpy(random(5, 200))) * torch.exp2(torch.arange(5.0)[:, None] - 2)
    b = E4M3(torch.from_numpy(random(200, 6, seed=4)))
    a[0] = 0
    a[1, 64:96] = 0
    result = rule.matmul(a, b)
    for i in range(5):
        assert result[i].tolist() == [slow_sum(a[i].tolist(), b[:, j].tolist(), rule) for j in range(6)], i


def test_a_sum_in_fp16_overflows_and_stays_so() -> None:
    a, b = torch.full((1, 64), 100.0), torch.full((64, 1), 100.0)
    assert FP16_SUM.matmul(a, b).item() == math.inf
    a[0, 32:] = -100.0
    assert FP16_SUM.matmul(a, b).item() in (math.inf, -math.inf) or FP16_SUM.matmul(a, b).isnan()
    assert HOPPER_FP8.matmul(a, b).item() == 512.0  # 320,000 less 32 times what is left of 10,000 in steps of 32


# --- graphs


@pytest.mark.parametrize("options", ["fp8", "fp8:channel", "fp8:block", "mxfp8", "mxfp4", "nvfp4"])
def test_a_wide_sum_of_the_other_path_gives_the_same_products(tmp_path: Path, options: str) -> None:
    net = graph(tmp_path, NET, WEIGHTS)
    plain = Executor(net, ARITHMETICS[options]).run(X)
    summed = Executor(net, ARITHMETICS[f"{options}:acc=23-bit:round=nearest"]).run(X)
    exact = Executor(net, ARITHMETICS["fp64"]).run(X)
    for name in plain:
        assert plain[name].shape == summed[name].shape == exact[name].shape
        np.testing.assert_allclose(
            summed[name].numpy(), plain[name].numpy(), atol=2e-5 * float(plain[name].abs().max())
        )
        error = float((plain[name] - exact[name]).norm() / exact[name].norm())
        assert 0.005 < error < (0.1 if "fp8" in options else 0.4)


def test_what_is_narrow_and_what_is_not(tmp_path: Path) -> None:
    text = """g (float[4,64] x, float[64,8] v) => (float[4,8] made, float[4,8] own, float[4,64] sum) {
        t = Transpose(w)  own = MatMul(x, t)  made = MatMul(x, v)  sum = Add(x, x) }"""
    net = graph(tmp_path, text, {"w": random(8, 64)})
    given = {"x": random(4, 64, seed=1), "v": random(64, 8, seed=2)}
    exact = {k: v.float() for k, v in Executor(net, ARITHMETICS["fp64"]).run(given).items()}
    int4, fp8 = Executor(net, ARITHMETICS["int4:g32"]).run(given), Executor(net, ARITHMETICS["fp8"]).run(given)
    assert torch.allclose(int4["made"], exact["made"], rtol=1e-5, atol=1e-5)  # no weights: they are left alone
    assert not torch.allclose(int4["own"], exact["own"], rtol=1e-2)
    assert not torch.allclose(fp8["made"], exact["made"], rtol=1e-3)
    assert torch.equal(fp8["sum"], exact["sum"])
    half = Executor(net, ARITHMETICS["fp8:out=bf16"]).run(given)
    assert all(torch.equal(v, v.bfloat16().float()) for v in half.values())


def test_narrow_sums_lose_what_promotion_keeps(tmp_path: Path) -> None:
    net = graph(tmp_path, "g (float[8,4096] x) => (float[8,8] y) { y = MatMul(x, w) }", {"w": abs(random(4096, 8))})
    given = {"x": abs(random(8, 4096, seed=1))}
    names = ("fp8", "fp8:acc=fp22", "fp8:acc=fp22:promote=128")
    wide, narrow, promoted = (Executor(net, ARITHMETICS[n]).run(given)["y"] for n in names)
    lost, kept = (float((v - wide).norm() / wide.norm()) for v in (narrow, promoted))
    assert kept < 1e-3 < 4 * kept < lost
    assert (narrow <= wide).all()  # all terms are positive, and what is cut off is missing


def test_only_products_may_be_as_coarse_as_their_operands(tmp_path: Path) -> None:
    """A Relu that is off by 2 % beside products in FP8 is guilty: nothing of it is in FP8."""
    text = "g (float[4,64] x) => (float[4,32] y) { m = MatMul(x, w)  a = Add(m, b)  y = Relu(a) }"
    net = graph(tmp_path, text, {"w": random(64, 32), "b": random(32, seed=3)})
    given = {"x": random(4, 64, seed=1)}
    values: dict[str, dict[str, np.ndarray]] = {}
    for name in ("fp32", "fp8:block"):
        kept = values.setdefault(name, dict(given))
        Executor(net, ARITHMETICS[name]).run(given, lambda n, v, kept=kept: kept.update({n: v.numpy().copy()}))
    test = values["fp8:block"]
    test["y"] = test["y"] * np.float32(1.02)
    replayer = Replayer(net, ("fp32", "fp8:block"), "fp32", net.tensors)
    excess = {n: r.excess for n, r in replayer.layers(values["fp32"].__getitem__, test.__getitem__)}
    assert 0.9 < (excess["m"] or 0) < 1.1
    assert (excess["a"] or 0) < 1
    assert (excess["y"] or 0) > 1e4


def test_the_oracle_of_narrow_precisions_is_fp32() -> None:
    assert {oracle_for("fp32", family) for family in FAMILIES} == {"fp32"}


def test_scales_of_rows_change_with_the_operand_and_one_scale_for_all_stays() -> None:
    codes = torch.arange(6.0).reshape(2, 3)
    rows = torch.tensor([[2.0], [3.0]])
    changed = Encoded(codes, None, rows).mapped(torch.t)
    assert torch.equal(changed.values, (codes * rows).T)
    one = Encoded(codes, rows.expand(2, 3), torch.tensor(5.0)).mapped(torch.t)
    assert one.coarse.dim() == 0
    assert torch.equal(one.values, (codes * rows).T * 5)
