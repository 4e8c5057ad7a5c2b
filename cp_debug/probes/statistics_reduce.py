"""Walk over a tensor pair in blocks and reduce it: on the host with the compiled kernel, on a GPU with torch."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np

from cp_debug.probes.statistics_totals import BIN_SHIFT, BINS, Piece, Totals

if TYPE_CHECKING:
    import torch

    from cp_debug.probes.statistics_kernel import Accumulator

HOST_CHUNK = 1 << 17
"""Elements between two looks at the queue: large against a Python call, small against memory."""
DEVICE_CHUNK = 1 << 24
"""Elements a turn on a GPU: 128 MiB in float64, a few times over."""
MAX_THREADS = 8

_LARGEST = np.finfo(np.float64).max / 2
"""So that a difference of two such numbers is finite."""


def reduce_host(ref: np.ndarray, test: np.ndarray) -> Totals:
    """Reduce two arrays of one shape and any real dtypes. The result does not depend on the number of threads."""
    import numba

    from cp_debug.probes.statistics_kernel import Accumulator

    single = all(np.can_cast(array.dtype, np.float32) for array in (ref, test))
    dtype = np.dtype(np.float32 if single else np.float64)
    integers = all(array.dtype.kind in "iu" for array in (ref, test)) and not single
    starts = iter(range(0, ref.size, HOST_CHUNK))  # shared: next() on it is atomic
    pieces: list[tuple[int, Piece]] = []
    unequal: list[int] = []

    def work(_: int) -> np.ndarray:
        accumulator, exact = Accumulator(dtype), Accumulator(np.dtype(np.float64))
        read_ref, read_test = _reader(ref, dtype), _reader(test, dtype)
        for start in starts:
            a, b = read_ref(start), read_test(start)
            piece = accumulator.add(a, b)
            pieces.append((start, piece))
            if piece.finite < a.size:
                rest = start + piece.finite
                pieces.append((rest, _add_special(exact, a[piece.finite :], b[piece.finite :])))
            if integers and not np.array_equal(ref.flat[start : start + a.size], test.flat[start : start + a.size]):
                unequal.append(start)
        return accumulator.histogram + exact.histogram

    threads = min(numba.config.NUMBA_NUM_THREADS, MAX_THREADS, ref.size // HOST_CHUNK)
    if threads > 1:
        with ThreadPoolExecutor(threads) as pool:
            histogram = np.sum(list(pool.map(work, range(threads))), axis=0)
    else:
        histogram = work(0)
    return Totals.of(pieces, histogram, not unequal)


def _reader(array: np.ndarray, dtype: np.dtype) -> Callable[[int], np.ndarray]:
    """A function that gives HOST_CHUNK elements from a flat index on as ``dtype``; valid until the next call."""
    flat = array.reshape(-1) if array.flags.c_contiguous else array.flat
    if array.dtype == dtype and array.flags.c_contiguous and array.flags.aligned:
        return lambda start: flat[start : start + HOST_CHUNK]
    buffer = np.empty(min(HOST_CHUNK, array.size), dtype)

    def read(start: int) -> np.ndarray:
        chunk = flat[start : start + HOST_CHUNK]
        np.copyto(buffer[: chunk.size], chunk, casting="unsafe")
        return buffer[: chunk.size]

    return read


def _add_special(accumulator: Accumulator, ref: np.ndarray, test: np.ndarray) -> Piece:
    """Reduce arrays (n,) that hold NaN or Inf, or whose difference overflows their type."""
    ref, test = ref.astype(np.float64), test.astype(np.float64)
    nan_ref, nan_test, inf_ref, inf_test = np.isnan(ref), np.isnan(test), np.isinf(ref), np.isinf(test)
    finite_ref = ~(nan_ref | inf_ref)
    finite = finite_ref & ~(nan_test | inf_test)
    mismatched = ~finite & (ref != test) & ~(nan_ref & nan_test)
    clean = [np.where(finite, side, 0.0).clip(-_LARGEST, _LARGEST) for side in (ref, test)]
    piece = accumulator.add(*clean)
    return piece._replace(
        finite=int(finite.sum()),
        max_ref=float(np.abs(ref[finite_ref]).max(initial=0.0)),
        nan_ref=int(nan_ref.sum()),
        nan_test=int(nan_test.sum()),
        inf_ref=int(inf_ref.sum()),
        inf_test=int(inf_test.sum()),
        mismatched=int(mismatched.sum()),
        first_mismatch=int(mismatched.argmax()),
    )


def reduce_device(ref: torch.Tensor, test: torch.Tensor) -> Totals:
    """Reduce two tensors of one shape where they lie; one small copy to the host at the end."""
    import torch

    flat_ref, flat_test = ref.detach().reshape(-1), test.detach().reshape(-1)
    starts = range(0, flat_ref.numel(), DEVICE_CHUNK)
    histogram = torch.zeros(BINS, dtype=torch.int64, device=ref.device)
    rows = []
    for start in starts:
        r, t = (side[start : start + DEVICE_CHUNK].double() for side in (flat_ref, flat_test))
        nan_ref, nan_test, inf_ref, inf_test = r.isnan(), t.isnan(), r.isinf(), t.isinf()
        finite_ref = ~(nan_ref | inf_ref)
        finite = finite_ref & ~(nan_test | inf_test)
        mismatched = ~finite & (r != t) & ~(nan_ref & nan_test)
        max_ref = torch.where(finite_ref, r.abs(), 0.0).max()
        r, t = (torch.where(finite, side, 0.0).clamp(-_LARGEST, _LARGEST) for side in (r, t))
        d = (t - r).abs()
        max_abs, argmax = d.max(dim=0)
        histogram += torch.bincount(d.float().view(torch.int32).bitwise_right_shift(BIN_SHIFT), minlength=BINS)
        numbers = (finite.sum(), max_abs, argmax, max_ref, d.sum(), d @ d, r @ r, t @ t, r @ t)
        counts = (nan_ref.sum(), nan_test.sum(), inf_ref.sum(), inf_test.sum(), mismatched.sum())
        first = mismatched.byte().argmax()
        rows.append(torch.stack([value.double() for value in (*numbers, *counts, first)]))
    table = torch.stack(rows).tolist() if rows else []
    kinds: list[Any] = [float if field.startswith(("max", "sum")) else int for field in Piece._fields]
    pieces = [Piece(*(kind(value) for kind, value in zip(kinds, row, strict=True))) for row in table]
    integers = not (ref.is_floating_point() or test.is_floating_point())
    same = not integers or bool((flat_ref == flat_test).all())
    return Totals.of(zip(starts, pieces, strict=True), histogram.cpu().numpy(), same)
