"""``compare`` against plain float64 numpy, over dtypes, shapes, layouts and wherever NaN and Inf may be."""

from __future__ import annotations

import json
import math
from typing import Any

import hypothesis.extra.numpy as arrays
import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cp_debug.errors import InputError
from cp_debug.probes import statistics_reduce
from cp_debug.probes.arrays import as_numpy, to_device
from cp_debug.probes.distance import difference_norm, distance, product, relative_l2
from cp_debug.probes.statistics import RESOLUTION, TensorStats, compare
from cp_debug.probes.statistics_reduce import BINS, HOST_CHUNK, Totals, reduce_pair

INF, NAN = math.inf, math.nan
EXTENSIONS = [np.dtype(getattr(ml_dtypes, name)) for name in ("bfloat16", "float8_e4m3fn", "float8_e5m2")]
DTYPES = [np.dtype(t) for t in ("f2", "f4", "f8", ">f4", "?", "i1", "u1", "i2", "u2", "i4", "i8", "u8")] + EXTENSIONS
SPECIAL = [0.0, -0.0, 1.0, -1.0, INF, -INF, NAN, 1e-30, 3e38, -3e38, 65504.0]


def expected(ref: np.ndarray, test: np.ndarray) -> dict[str, Any]:
    """The definitions, written down without blocks."""
    r, t = ref.astype(np.float64).ravel(), test.astype(np.float64).ravel()
    finite = np.isfinite(r) & np.isfinite(t)
    agree = (r == t) | (np.isnan(r) & np.isnan(t))
    mismatched = ~finite & ~agree
    d = np.where(mismatched, INF, 0.0)
    d[finite] = np.abs(t[finite] - r[finite])
    compared = np.sort(d[finite | mismatched])
    norm_r, norm_t, norm_d = (float(np.sqrt((x[finite] ** 2).sum())) for x in (r, t, d))
    rel = norm_d / norm_r if norm_r else INF if norm_d else 0.0

    def quantile(q: float) -> float:
        return float(compared[max(math.ceil(q * compared.size), 1) - 1]) if compared.size else 0.0

    bad = bool(mismatched.any())
    return {
        "max_abs": float(d.max(initial=0.0)),
        "mean_abs": INF if bad else float(d[finite].mean()) if finite.any() else 0.0,
        "rel_l2": INF if bad else rel,
        "sqnr_db": -INF if bad or rel == INF else -20 * math.log10(rel) if rel else INF,
        "cosine": NAN
        if bad
        else float(r[finite] @ t[finite]) / norm_r / norm_t
        if norm_r and norm_t
        else float(norm_r == norm_t),
        "p50_abs": quantile(0.5),
        "p99_abs": quantile(0.99),
        "max_ref": float(np.abs(r[np.isfinite(r)]).max(initial=0.0)),
        "nan_ref": int(np.isnan(r).sum()),
        "nan_test": int(np.isnan(t).sum()),
        "inf_ref": int(np.isinf(r).sum()),
        "inf_test": int(np.isinf(t).sum()),
        "mismatched": int(mismatched.sum()),
        "argmax": tuple(int(i) for i in np.unravel_index(d.argmax(), ref.shape)) if d.size else None,
        "equal": bool(agree.all()),
        "finite_max_abs": float(d[finite].max(initial=0.0)),
        "finite_rel_l2": rel,
    }


def assert_matches(stats: TensorStats, ref: np.ndarray, test: np.ndarray) -> None:
    exact = ("max_ref", "nan_ref", "nan_test", "inf_ref", "inf_test", "mismatched", "equal")
    want = expected(ref, test)
    for name, value in want.items():
        got = getattr(stats, name)
        if name in exact:
            assert got == value, name
        elif name in ("p50_abs", "p99_abs"):
            assert got == pytest.approx(value, rel=RESOLUTION + 1e-7, abs=1.2e-38), name
        elif name == "argmax":
            assert got == value or abs(_at(ref, test, got) - want["max_abs"]) <= 1e-7 * want["max_abs"], name
        else:
            # float32 pairs are subtracted in float32: off by half a unit in the last place
            absolute = 1e-9 if name == "cosine" else 1e-5 if name == "sqnr_db" else 1e-45
            assert got == pytest.approx(value, rel=2e-7, abs=absolute, nan_ok=True), name


def _at(ref: np.ndarray, test: np.ndarray, index: tuple[int, ...]) -> float:
    return abs(float(test[index].astype(np.float64)) - float(ref[index].astype(np.float64)))


@st.composite
def pairs(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    shape = draw(arrays.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=7))
    seed = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    base = seed.standard_normal(shape) * 10.0 ** draw(st.integers(-20, 4))
    sides = [base, base * (1 + draw(st.sampled_from([0.0, 1e-6, 1e-3, 1.0])) * seed.standard_normal(shape))]
    for index, side in enumerate(sides):
        for value in draw(st.lists(st.sampled_from(SPECIAL), max_size=4)):
            if side.size:
                side.flat[draw(st.integers(0, side.size - 1))] = value
        dtype = draw(st.sampled_from(DTYPES))
        integer = dtype.kind in "iu"
        with np.errstate(all="ignore"):
            sides[index] = (np.nan_to_num(side).clip(0, 100) if integer else side).astype(dtype)
    return sides[0], sides[1]


@settings(max_examples=100, deadline=None)
@given(pairs(), st.booleans(), st.booleans())
def test_compare_is_what_plain_numpy_says(
    pair: tuple[np.ndarray, np.ndarray], transposed: bool, in_blocks: bool
) -> None:
    ref, test = (np.asarray(side).T for side in pair) if transposed else pair
    with pytest.MonkeyPatch.context() as patch:
        if in_blocks:
            patch.setattr(statistics_reduce, "HOST_CHUNK", 7)
        assert_matches(compare(ref, test), ref, test)


@settings(max_examples=60, deadline=None)
@given(pairs())
def test_the_reduction_of_a_device_says_the_same(pair: tuple[np.ndarray, np.ndarray]) -> None:
    ref, test = (torch.from_numpy(np.asarray(side, np.float64).copy()) for side in pair)
    _assert_totals_agree(reduce_pair(ref, test), reduce_pair(ref.numpy(), test.numpy()))


def _assert_totals_agree(device: Totals, host: Totals, rel: float = 1e-12) -> None:
    for name in host.whole._fields:
        if name != "first_mismatch" or host.whole.mismatched:
            tolerance = rel * math.sqrt(host.whole.sum_rr * host.whole.sum_tt) if name == "sum_rt" else 0.0
            allowed = rel if name.startswith("sum_") else 0.0
            expected = pytest.approx(getattr(host.whole, name), rel=allowed, abs=tolerance)
            assert getattr(device.whole, name) == expected, name
    assert device.histogram.sum() == host.histogram.sum()
    assert device.quantile(0.5) == pytest.approx(host.quantile(0.5), rel=2 * RESOLUTION, abs=1.2e-38)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("special", [[], [NAN], [INF, NAN]])
def test_large_tensors_are_cut_into_chunks(dtype: type, special: list[float], monkeypatch: Any) -> None:
    monkeypatch.setattr(statistics_reduce, "HOST_CHUNK", 5000)
    rng = np.random.default_rng(1)
    ref = rng.standard_normal((7, 11, 997)).astype(dtype)
    test = (ref + 1e-3 * rng.standard_normal(ref.shape)).astype(dtype)
    for side, place in ((test, 40_000), (ref, 60_001)):
        side.flat[place : place + len(special)] = special
    stats = compare(ref, test)
    assert_matches(stats, ref, test)
    assert compare(ref, test) == stats or special  # the same to the last bit
    transposed = compare(np.asfortranarray(ref), np.asfortranarray(test))
    assert transposed.to_dict() == stats.to_dict()


def test_the_largest_difference_that_comes_twice_is_the_first() -> None:
    ref = np.zeros((2, 300_000), np.float32)
    test = ref.copy()
    test[0, 299_999] = test[1, 7] = -2
    assert compare(ref, test).argmax == (0, 299_999)


def test_golden_numbers() -> None:
    stats = compare(np.array([[3.0, 0.0], [4.0, 0.0]], np.float32), np.array([[3.0, 0.0], [4.0, 0.5]], np.float16))
    assert (stats.max_abs, stats.mean_abs, stats.argmax, stats.max_ref) == (0.5, 0.125, (1, 1), 4.0)
    assert stats.rel_l2 == pytest.approx(0.1)
    assert stats.sqnr_db == pytest.approx(20.0)
    assert stats.cosine == pytest.approx(5 / math.sqrt(25.25))
    assert (stats.p50_abs, stats.p99_abs) == (0.0, pytest.approx(0.5, rel=RESOLUTION))
    assert (stats.dtype_ref, stats.dtype_test, stats.count, stats.equal) == ("float32", "float16", 4, False)


@pytest.mark.parametrize(
    ("ref", "test", "mismatched"),
    [
        ([NAN, 1], [NAN, 1], 0),
        ([INF, -INF], [INF, -INF], 0),
        ([1, 2], [NAN, 2], 1),
        ([NAN, 1], [INF, 1], 1),
        ([INF, 1], [-INF, 1], 1),
    ],
)
def test_nan_and_inf_never_vanish(ref: list[float], test: list[float], mismatched: int) -> None:
    stats = compare(np.array(ref, np.float32), np.array(test, np.float32))
    assert stats.mismatched == mismatched
    assert (stats.max_abs, stats.rel_l2, stats.equal) == ((INF, INF, False) if mismatched else (0.0, 0.0, True))
    assert stats.finite_max_abs == 0
    assert stats.nan_ref + stats.nan_test + stats.inf_ref + stats.inf_test > 0


def test_a_reference_of_zeros() -> None:
    zeros, ones = np.zeros(5, np.float32), np.ones(5, np.float32)
    same, other = compare(zeros, zeros), compare(zeros, ones)
    assert (same.rel_l2, same.cosine, same.sqnr_db) == (0, 1, INF)
    assert (other.rel_l2, other.cosine, other.sqnr_db) == (INF, 0, -INF)


def test_another_shape_is_a_finding() -> None:
    stats = compare(np.ones((2, 3)), np.array([NAN, 1.0]))
    assert stats.shape_mismatch
    assert (stats.shape, stats.shape_test, stats.argmax, stats.equal) == ((2, 3), (2,), None, False)
    assert (stats.max_abs, stats.rel_l2, stats.p99_abs, stats.nan_test, stats.max_ref) == (INF, INF, INF, 1, 1.0)


def test_empty_tensors_agree() -> None:
    stats = compare(np.zeros((0, 3)), np.zeros((0, 3), np.float16))
    assert (stats.count, stats.max_abs, stats.equal, stats.argmax) == (0, 0.0, True, None)


NANOSECONDS = 1_700_000_000_000_000_000


@pytest.mark.parametrize("on", ["host", "torch", "device"])
@pytest.mark.parametrize(
    ("ref", "test", "gap"),
    [
        (np.array([5, 2**53, 7]), np.array([5, 2**53 + 1, 7]), 1),
        (np.array([5, NANOSECONDS, 7]), np.array([5, NANOSECONDS + 100, 7]), 100),
        (np.array([5, -(2**62), 7]), np.array([5, -(2**62) - 3, 7]), 3),
        (np.array([5, -(2**63), 7]), np.array([5, 2**63 - 1, 7]), 2.0**64),
        (np.array([5, 2**64 - 9, 7], np.uint64), np.array([5, 2**64 - 2, 7], np.uint64), 7),
        (np.array([5, 2**60, 7], ">i8"), np.array([5, 2**60 + 2, 7], "<u8"), 2),
        (np.array([5, 2**30, 7], np.int32), np.array([5, 2**30 + 1, 7], np.int32), 1),
    ],
)
def test_differences_of_integers_are_exact(ref: np.ndarray, test: np.ndarray, gap: float, on: str) -> None:
    pair: tuple[Any, Any] = (ref, test)
    if on != "host":
        if ref.dtype.kind == "u" or test.dtype.kind == "u":
            pytest.skip("torch does not reckon with wide unsigned integers")
        pair = torch.from_numpy(ref), torch.from_numpy(test)
    if on == "device":
        totals = reduce_pair(*pair)
        assert (totals.max_abs, totals.argmax, totals.unequal) == (gap, 1, 1)
        return
    stats = compare(*pair)
    assert (stats.max_abs, stats.argmax, stats.unequal, stats.equal) == (gap, (1,), 1, False)
    size = math.hypot(*map(float, ref))
    assert (stats.mean_abs, stats.rel_l2) == (pytest.approx(gap / 3), pytest.approx(gap / size))
    assert (stats.p50_abs, stats.p99_abs) == (0.0, pytest.approx(gap, rel=RESOLUTION))
    assert relative_l2(pair[1], pair[0]) == pytest.approx(stats.rel_l2)
    assert compare(pair[0], pair[0]).equal


def test_unequal_elements_are_counted_where_a_side_holds_whole_numbers() -> None:
    ids, flags = np.arange(300_000) % 7, np.array([True, False, True])
    assert compare(ids, ids + (np.arange(300_000) % 3 == 0)).unequal == 100_000
    assert compare(flags, ~flags).unequal == 3
    assert compare(ids[:4], np.array([0.0, 1.0, NAN, 4.0])).unequal == 2
    assert compare(ids[:4].astype(np.float32), ids[:4].astype(np.float32)).unequal is None
    assert compare(ids[:4], ids[:3]).unequal is None


def test_the_overflow_of_a_difference_is_not_an_infinity() -> None:
    stats = compare(np.array([3e38], np.float32), np.array([-3e38], np.float32))
    assert (stats.max_abs, stats.mismatched, stats.inf_test) == (pytest.approx(6e38), 0, 0)


@pytest.mark.parametrize(
    "dtype",
    [torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2, torch.int8, torch.bool],
)
def test_torch_tensors_keep_every_bit(dtype: torch.dtype) -> None:
    tensor = torch.arange(-6, 6).reshape(3, 4).to(torch.float32).to(dtype)
    array = as_numpy(tensor.t())
    assert array.shape == (4, 3)
    assert (array.astype(np.float32) == tensor.t().to(torch.float32).numpy()).all()
    stats = compare(tensor.t(), np.ascontiguousarray(array))
    assert stats.equal
    assert stats.dtype_ref == stats.dtype_test == str(dtype).removeprefix("torch.")


@pytest.mark.parametrize("bad", [np.zeros(2, np.complex64), np.array(["a"]), torch.zeros(2, dtype=torch.complex64)])
def test_what_is_not_a_number_is_refused(bad: Any) -> None:
    with pytest.raises(InputError, match="test has dtype"):
        compare(np.zeros(2), bad)


def test_json_has_no_infinity() -> None:
    stats = compare(np.array([NAN, 1.0]), np.array([1.0, INF]))
    read = json.loads(json.dumps(stats.to_dict(), allow_nan=False))
    assert (read["max_abs"], read["cosine"], read["sqnr_db"]) == ("Infinity", "NaN", "-Infinity")
    assert float(read["max_abs"]) == INF


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.int64])
def test_cuda_tensors_are_reduced_where_they_lie(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    ref = (torch.randn(3, 1001, 7001, generator=generator) * 50).to(dtype)
    test = (ref.float() * 1.01).to(dtype)
    if dtype.is_floating_point:
        test.view(torch.uint8)[0, 3, : 4 * dtype.itemsize] = 0x7F  # NaN in every one of these types
    _assert_totals_agree(reduce_pair(ref.cuda(), test.cuda()), reduce_pair(as_numpy(ref), as_numpy(test)))
    stats, host = compare(ref.cuda().mT, test.cuda().mT), compare(ref.mT, test.mT)
    assert (stats.max_abs, stats.argmax, stats.equal, stats.nan_test) == (
        host.max_abs,
        host.argmax,
        host.equal,
        host.nan_test,
    )


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, np.int32])
@pytest.mark.parametrize("gap", [None, np.nan, np.inf])
@pytest.mark.parametrize("size", [99, 3 * HOST_CHUNK // 2])
def test_a_distance_is_that_of_all_blocks(dtype: type, gap: float | None, size: int) -> None:
    """A small tensor, and one of a block and a half: what the first block adds must not be lost behind the second."""
    theirs = np.full(size, 2, dtype)
    ours = theirs.copy()
    ours[7] = 5  # in the first block
    ours[-7] = 6  # in the second
    strange = gap is not None and np.dtype(dtype).kind == "f"
    if strange:
        ours[11] = ours[-11] = gap
    found = distance(ours, theirs)
    assert found.difference == difference_norm(ours, theirs) == pytest.approx(5.0)
    assert found.whole == pytest.approx(2 * np.sqrt(len(theirs) - 2 * strange))
    assert found.new_nonfinite == 2 * strange
    assert found.relative == pytest.approx(found.difference / found.whole)
    assert relative_l2(ours, theirs) == (np.inf if strange else pytest.approx(found.relative))
    other_way = distance(theirs, ours)
    assert other_way.new_nonfinite == 0
    assert other_way.difference == pytest.approx(5.0)
    assert other_way.whole == pytest.approx(np.sqrt(4 * (len(theirs) - 2 - 2 * strange) + 25 + 36))


def test_of_equal_differences_in_several_chunks_the_first_is_told() -> None:
    reference, test = np.zeros(3 * HOST_CHUNK, np.float32), np.zeros(3 * HOST_CHUNK)
    test[[5, HOST_CHUNK + 3, 2 * HOST_CHUNK + 1]] = 2.0
    assert compare(reference, test).argmax == (5,)
    test[5] = 1.0
    assert compare(reference, test).argmax == (HOST_CHUNK + 3,)


def test_what_is_no_array_is_refused() -> None:
    with pytest.raises(InputError, match="cannot compare: no array"):
        compare([[1, 2], [3]], np.zeros(2))  # type: ignore[arg-type]


def test_a_signalling_nan_is_counted_without_a_warning(recwarn: pytest.WarningsRecorder) -> None:
    a = np.ones(500_000, np.float32)
    a.view(np.uint32)[7] = 0x7FA00000
    assert compare(a, np.ones_like(a)).nan_ref == 1
    assert not recwarn.list


def test_a_percentile_is_as_near_as_half_a_bin_and_at_its_ends_no_nearer() -> None:
    """Between 1 and 2 a bin is 1/32 wide."""
    errors = []
    for value in np.linspace(1, 1.0625, 200, dtype=np.float32):
        stats = compare(np.zeros(8, np.float32), np.full(8, value))
        errors.append(abs(stats.p99_abs / float(value) - 1))
    assert 0.9 * RESOLUTION < max(errors) <= RESOLUTION


def test_every_tenth_of_the_distance_is_20_decibels_more() -> None:
    reference = np.full(4, 2.0)
    levels = [compare(reference, reference * (1 + 10.0**-n)).sqnr_db for n in (1, 2, 3)]
    assert levels == pytest.approx([20, 40, 60])


def test_of_two_shapes_no_elements_are_paired() -> None:
    stats = compare(np.zeros(3), np.zeros(4))
    assert (stats.mismatched, stats.argmax, stats.equal) == (0, None, False)


def test_the_first_pair_that_does_not_match_is_told() -> None:
    """After a NaN on both sides and a number, which do match."""
    reference, test = np.array([np.nan, 1, np.inf, np.nan]), np.array([np.nan, 1, 3, 2])
    for pair in ((reference, test), tuple(map(torch.from_numpy, (reference, test)))):
        stats = compare(*pair)
        assert (stats.mismatched, stats.argmax) == (2, (2,))
    assert reduce_pair(*map(torch.from_numpy, (reference, test))).argmax == 2


def test_a_difference_for_which_fp32_has_no_room_is_a_number() -> None:
    large = np.array([3e38, 1.0], np.float32)
    assert distance(large, -large).difference == pytest.approx(6e38, rel=1e-6)
    assert difference_norm(-large, large) == pytest.approx(6e38, rel=1e-6)


def test_distances_leave_out_what_neither_side_has_as_a_number() -> None:
    import ml_dtypes

    ours, theirs = np.array([1.0, 2.0, np.nan]), np.array([1.0, 4.0, np.nan])
    apart = distance(ours, theirs)
    assert (apart.difference, apart.new_nonfinite) == (2.0, 0)
    assert apart.whole == pytest.approx(17**0.5)
    assert distance(np.array([np.inf, 1.0]), np.ones(2)).new_nonfinite == 1
    for kind in (ml_dtypes.float8_e4m3fn, ml_dtypes.float4_e2m1fn, np.uint16, np.float16):
        assert relative_l2(np.array([1, 2], kind), np.array([1, 4], kind)) == pytest.approx(2 / 17**0.5)
    assert relative_l2(np.ones(2), np.ones(3)) == float("inf")


def test_blocks_of_a_long_tensor_add_up() -> None:
    count = (1 << 20) + 5
    ours, theirs = np.ones(count, np.float16), np.full(count, 0.5, np.float16)
    assert relative_l2(ours, theirs) == pytest.approx(1.0)


def test_read_only_arrays_become_tensors_without_a_warning(recwarn: pytest.WarningsRecorder) -> None:
    """Torch warns once in a process unless it is told to do it always."""
    always = torch.is_warn_always_enabled()
    torch.set_warn_always(True)
    try:
        for kind in (np.float32, ml_dtypes.bfloat16):
            array = np.ones((2, 3), kind)
            array.flags.writeable = False
            assert to_device(array, "cpu").tolist() == [[1.0] * 3] * 2
    finally:
        torch.set_warn_always(always)
    assert not recwarn.list


@pytest.mark.parametrize("scales", [(1.0, 1.0), (1e-25, 1e-20), (1e25, 1e20), (1e30, 1e-25)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_product_has_the_digits_of_float64_or_nearly(scales: tuple[float, float], dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.rand(3, 50_001, generator=generator, dtype=torch.float64) * scale for scale in scales)
    a, b = a.float(), b.to(dtype)
    a[0, 7], b[1, 9] = math.nan, math.inf

    x, y = (np.where(np.isfinite(t), t, 0) for t in (a.double().numpy(), b.double().numpy()))
    assert product(a, b) == pytest.approx(float((x * y).sum()), rel=1e-6, abs=0)


def test_a_gpu_counts_bins_as_the_host_does() -> None:
    """There ``histc`` counts, here a stand-in of it."""

    class Keys:
        is_cuda = True

        def __init__(self, keys: torch.Tensor) -> None:
            self.keys = keys

        def histc(self, bins: int, low: int, high: int) -> torch.Tensor:
            return self.keys.double().histc(bins, low, high).long()

    Keys.__module__ = "torch"
    keys = torch.tensor([0, 0, 1, 5, BINS - 1, BINS - 1, BINS - 2], dtype=torch.int32)
    given: Any = Keys(keys)
    assert (statistics_reduce._count(given) == statistics_reduce._count(keys)).all()


@pytest.mark.parametrize("strange", [0, 70_000])
def test_quantiles_of_a_large_tensor_are_those_of_all_elements(strange: int) -> None:
    """Beyond 2²⁰ elements some are counted; columns that differ in size, and NaN, must not tilt what they say."""
    rng = np.random.default_rng(3)
    ref = np.zeros((700, 2800), np.float32)
    test = (rng.standard_normal(ref.shape) * np.geomspace(1e-4, 1, 2800)).astype(np.float32)
    for side in (ref, test):
        side.flat[:strange] = NAN
    apart = np.abs(test - ref).ravel()[strange:]
    stats = compare(ref, test)
    assert stats.p50_abs == pytest.approx(np.quantile(apart, 0.5), rel=2 * RESOLUTION)
    assert stats.p99_abs == pytest.approx(np.quantile(apart, 0.99), rel=2 * RESOLUTION)
    assert stats.mean_abs == pytest.approx(apart.mean(dtype=np.float64), rel=1e-6)
    on_device = reduce_pair(torch.from_numpy(ref), torch.from_numpy(test))
    assert [on_device.quantile(q) for q in (0.5, 0.99)] == [stats.p50_abs, stats.p99_abs]
