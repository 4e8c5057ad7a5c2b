"""Types of 4 and 8 bits, over all their codes and all ties between them, against ml_dtypes and rational numbers."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch

from cp_debug.backends.scaling import CODECS, E2M1, E4M3, E5M2, Codec, e8m0, floor_log2

TYPES = {"e4m3": ml_dtypes.float8_e4m3fn, "e5m2": ml_dtypes.float8_e5m2, "e2m1": ml_dtypes.float4_e2m1fn}


def numbers(codec: Codec) -> np.ndarray:
    """Every finite number of the type, in order."""
    codes = np.arange(16 if codec is E2M1 else 256, dtype=np.uint8).view(TYPES[codec.name]).astype(np.float32)
    return np.unique(codes[np.isfinite(codes)])


@pytest.mark.parametrize("codec", CODECS.values(), ids=lambda c: c.name)
def test_every_code_stays_and_every_tie_goes_to_the_even_code(codec: Codec) -> None:
    finite = numbers(codec)
    np.testing.assert_array_equal(codec(torch.from_numpy(finite)).numpy(), finite)
    assert (finite[-1], -finite[0]) == (codec.largest, codec.largest)
    assert finite[finite > 0][0] == codec.tiniest * 2.0**-codec.mantissa
    ties = [(Fraction(float(a)) + Fraction(float(b))) / 2 for a, b in itertools.pairwise(finite)]
    exact = np.array([float(t) for t in ties], np.float32)
    assert [Fraction(float(e)) for e in exact] == ties  # each tie is a float32 number
    for x, wanted in (
        (np.nextafter(exact, np.float32(-1e9)), finite[:-1]),
        (np.nextafter(exact, np.float32(1e9)), finite[1:]),
    ):
        np.testing.assert_array_equal(codec(torch.from_numpy(x)).numpy(), wanted)
    even = {float(v) for v in finite if int(np.array(v).astype(TYPES[codec.name]).view(np.uint8)) % 2 == 0}
    rounded = codec(torch.from_numpy(exact)).tolist()
    assert all(r in even and r in pair for r, *pair in zip(rounded, finite[:-1], finite[1:], strict=True))


@pytest.mark.parametrize("codec", CODECS.values(), ids=lambda c: c.name)
def test_every_upper_half_of_float32_is_rounded_as_ml_dtypes_does(codec: Codec) -> None:
    high = np.arange(1 << 16, dtype=np.uint32) << 16
    x = np.concatenate([high | low for low in (0, 1, 0x7FFF, 0x8000, 0xFFFF)]).view(np.float32)
    rounded = codec(torch.from_numpy(x)).numpy()
    nan = np.isnan(x)
    expected = np.clip(x[~nan], -codec.largest, codec.largest).astype(TYPES[codec.name]).astype(np.float32)
    np.testing.assert_array_equal(rounded[~nan].view(np.uint32), expected.view(np.uint32))  # signs of 0, too
    assert np.isnan(rounded[nan]).all()


def test_what_a_conversion_does_beyond_the_range_is_what_the_codec_says() -> None:
    beyond = np.array([1e6], np.float32)
    with np.errstate(all="ignore"):
        cast = {name: float(beyond.astype(kind).astype(np.float32)[0]) for name, kind in TYPES.items()}
    results = {"nan": math.isnan, "inf": math.isinf, "largest": lambda x: x == 6.0}
    for name, codec in CODECS.items():
        assert results[codec.overflow](cast[name]), (name, cast)
        assert codec(torch.from_numpy(beyond)).item() == codec.largest


def test_scales_are_all_the_powers_of_two_that_e8m0_has() -> None:
    codes = np.arange(255, dtype=np.uint8).view(ml_dtypes.float8_e8m0fnu).astype(np.float32)
    np.testing.assert_array_equal(e8m0(torch.arange(-127, 128)).numpy(), codes)
    assert e8m0(torch.tensor([-200, 200])).tolist() == [2.0**-127, 2.0**127]
    x = torch.tensor([0.0, 1e-45, 2.0**-126, 1.0, 1.9999999, 2.0, 3.4e38])
    assert floor_log2(x).tolist() == [-150, -149, -126, 0, 0, 1, 127]


@pytest.mark.parametrize("codec", [E4M3, E5M2, E2M1], ids=lambda c: c.name)
def test_codes_stop_at_the_largest_number_on_both_sides(codec: Any) -> None:
    x = torch.tensor(
        [0.0, 1.0, -1.0, codec.largest, 3 * codec.largest, -3 * codec.largest, codec.tiniest * 2.0**-codec.mantissa / 8]
    )
    expected = [0.0, 1.0, -1.0, codec.largest, codec.largest, -codec.largest, 0.0]
    assert codec(x).tolist() == expected
    assert codec(torch.tensor([float("nan")])).isnan().all()
