"""Rounding, against definitions that share nothing with it."""

from __future__ import annotations

import math
from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cp_debug.backends.arithmetic import round_bf16, round_fp16, round_tf32, truncate_tf32

floats = st.one_of(
    st.floats(width=32), st.integers(0, 2**32 - 1).map(lambda b: float(np.uint32(b).view(np.float32)))
)  # the second: every exponent equally likely


def tf32(value: float) -> float:
    """The definition in rational numbers."""
    if not math.isfinite(value) or value == 0:
        return value
    exponent = max(math.frexp(abs(value))[1] - 1, -126)
    step = Fraction(2) ** (exponent - 10)
    steps = math.floor(abs(Fraction(value)) / step + Fraction(1, 2))
    rounded = steps * step
    return math.copysign(float(rounded) if rounded < 2**128 else math.inf, value)


@given(st.lists(floats, min_size=1, max_size=8))
def test_tf32_is_nearest_with_ties_away(values: list[float]) -> None:
    x = torch.tensor(values, dtype=torch.float32)
    expected = np.array([tf32(v) for v in x.tolist()], np.float32)
    np.testing.assert_array_equal(round_tf32(x).numpy(), expected)


@given(st.lists(floats, min_size=1))
def test_truncated_tf32_is_nearest_towards_zero(values: list[float]) -> None:
    x = torch.tensor(values, dtype=torch.float32)
    cut = truncate_tf32(x)
    finite = x.isfinite()
    assert (cut.view(torch.int32) & 0x1FFF == 0).all()
    assert (cut[finite].abs() <= x[finite].abs()).all()
    assert torch.equal(cut[finite].signbit(), x[finite].signbit())
    step = torch.from_numpy(np.ldexp(1.0, np.maximum(np.frexp(x[finite].double().abs().numpy())[1] - 1, -126) - 10))
    assert ((x[finite].double() - cut[finite].double()).abs() < step).all()


def test_tf32_ties_overflow_and_nan_payloads() -> None:
    tie = 1 + 2**-11
    x = torch.tensor([tie, -tie, tie - 2**-23, 3.4028235e38, 1e-45])
    assert round_tf32(x).tolist() == [1 + 2**-10, -(1 + 2**-10), 1.0, math.inf, 0.0]
    payloads = torch.tensor([0x7FFFFFFF, 0x7F800001, -1], dtype=torch.int32).view(torch.float32)
    assert round_tf32(payloads).isnan().all()
    assert round_tf32(torch.tensor([math.inf, -math.inf])).tolist() == [math.inf, -math.inf]


@given(st.lists(floats, min_size=1, max_size=8))
@pytest.mark.parametrize(("function", "dtype"), [(round_fp16, np.float16), (round_bf16, ml_dtypes.bfloat16)])
def test_half_types_match_numpy(function: object, dtype: type, values: list[float]) -> None:
    x = np.array(values, np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        expected = x.astype(dtype).astype(np.float32)
    assert callable(function)
    np.testing.assert_array_equal(function(torch.from_numpy(x)).numpy(), expected)


@pytest.mark.parametrize("function", [round_tf32, round_fp16, round_bf16])
def test_integers_pass_and_dtype_and_shape_stay(function: object) -> None:
    assert callable(function)
    assert function(torch.tensor([2**30 + 1])).tolist() == [2**30 + 1]
    for shape in [(), (0, 3), (2, 3)]:
        assert function(torch.ones(shape, dtype=torch.float64)).shape == shape
        assert function(torch.ones(shape, dtype=torch.float64)).dtype == torch.float64


def test_only_floats_are_rounded() -> None:
    whole = torch.tensor([70001, -3])
    assert torch.equal(round_fp16(whole), whole)
    assert round_fp16(torch.tensor([1 + 2**-12, 70000.0], dtype=torch.float64)).tolist() == [1.0, float("inf")]
