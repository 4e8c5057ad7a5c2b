"""Walk over a tensor pair in blocks and reduce it: on the host with the kernels there, on a GPU with torch."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np

from cp_debug.probes import statistics_cuda
from cp_debug.probes.integers import are_wide, differences, is_whole
from cp_debug.probes.statistics_small import SMALL, SmallAccumulator
from cp_debug.probes.statistics_totals import BIN_SHIFT, BINS, PairPiece, Totals

if TYPE_CHECKING:
    import torch

HOST_CHUNK = 1 << 17
"""Elements between two looks at the queue: large against a Python call, small against memory."""
DEVICE_CHUNK = 1 << 24
"""Elements a turn on a GPU: 128 MiB in float64, some five times over."""
MAX_THREADS = 8

_Add = Callable[[np.ndarray, np.ndarray], PairPiece]

_LARGEST = np.finfo(np.float64).max / 2
"""Limit of magnitudes, so that a difference of two such numbers is finite."""


def reduce_host(ref: np.ndarray, test: np.ndarray) -> Totals:
    """Reduce two arrays of one shape and any real dtypes, on the host.

    The result does not depend on the number of threads.
    """
    make: Callable[[np.dtype], Any] = SmallAccumulator
    threads = 1
    if ref.size > SMALL:
        import numba

        from cp_debug.probes.statistics_kernel import Accumulator

        make, threads = Accumulator, min(numba.config.NUMBA_NUM_THREADS, MAX_THREADS, ref.size // HOST_CHUNK)
    single = all(np.can_cast(array.dtype, np.float32) for array in (ref, test))
    dtype = np.dtype(np.float32 if single else np.float64)
    whole, of_64_bits = any(map(is_whole, (ref, test))), are_wide(ref, test)
    starts = iter(range(0, ref.size, HOST_CHUNK))  # shared: next() on it is atomic
    pieces: list[tuple[int, PairPiece]] = []
    unequal: list[int] = []
    """Number of elements of each block that differ."""

    def work(_: int) -> np.ndarray:
        accumulator, exact = make(dtype), make(np.dtype(np.float64))
        read_ref, read_test = _reader(ref, dtype), _reader(test, dtype)
        for start in starts:
            a, b = read_ref(start), read_test(start)
            x, y = (side.flat[start : start + a.size] for side in (ref, test)) if of_64_bits else (a, b)
            differ = int(np.count_nonzero(x != y)) if whole else 0
            unequal.append(differ)
            if of_64_bits and differ:
                pieces.append((start, _of_gaps(accumulator.add, make(dtype).add, a, b, abs(differences(x, y)))))
                continue
            piece = accumulator.add(a, b)
            pieces.append((start, piece))
            if piece.finite < a.size:
                with np.errstate(invalid="ignore"):  # of which a signalling NaN warns when it is cast
                    unreduced = [side[piece.finite :].astype(np.float64) for side in (a, b)]
                clean_ref, clean_test, special = _set_aside(np, *unreduced)
                rest = accumulator.add(clean_ref.astype(dtype), clean_test.astype(dtype))
                pieces.append((start + piece.finite, rest._replace(**special)))
                if (done := rest.finite) < clean_ref.size:  # a difference overflows the type of its operands
                    wide = exact.add(clean_ref[done:], clean_test[done:])
                    pieces.append((start + piece.finite + done, wide._replace(finite=0)))
        return accumulator.histogram + exact.histogram

    work_on = _pool().map if threads > 1 else map
    histogram = np.sum(list(work_on(work, range(max(threads, 1)))), axis=0)
    return Totals.of(pieces, histogram, sum(unequal) if whole else None)


def _of_gaps(add: _Add, add_aside: _Add, ref: np.ndarray, test: np.ndarray, gap: np.ndarray) -> PairPiece:
    """The piece of two blocks (n,) of float64, rounded from integers, whose |differences| are ``gap``, float64 (n,)."""
    sides, piece = add_aside(ref, test), add(np.zeros_like(gap), gap)
    of_sides = {name: getattr(sides, name) for name in ("max_ref", "sum_rr", "sum_tt", "sum_rt")}
    return piece._replace(**of_sides)


@lru_cache(maxsize=1)
def _pool() -> ThreadPoolExecutor:
    """Threads that are kept: starting them takes as long as comparing 4 MiB."""
    return ThreadPoolExecutor(MAX_THREADS, "compare")


if hasattr(os, "register_at_fork"):  # a child has none of its parent's threads
    os.register_at_fork(after_in_child=_pool.cache_clear)


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


def _set_aside(xp: ModuleType, ref: Any, test: Any) -> tuple[Any, Any, dict[str, Any]]:
    """Put zeros where a pair (n,) of float64 is not finite, and say what was there as fields of a PairPiece.

    ``xp`` is numpy or torch, whichever the arrays belong to.
    """
    nan_ref, nan_test, inf_ref, inf_test = xp.isnan(ref), xp.isnan(test), xp.isinf(ref), xp.isinf(test)
    finite_ref = ~(nan_ref | inf_ref)
    finite = finite_ref & ~(nan_test | inf_test)
    mismatched = ~finite & (ref != test) & ~(nan_ref & nan_test)
    fields = {
        "finite": int(finite.sum()),
        "max_ref": float(abs(xp.where(finite_ref, ref, 0.0)).max()),
        "nan_ref": int(nan_ref.sum()),
        "nan_test": int(nan_test.sum()),
        "inf_ref": int(inf_ref.sum()),
        "inf_test": int(inf_test.sum()),
        "mismatched": int(mismatched.sum()),
        "first_mismatch": int(xp.where(mismatched, 1, 0).argmax()),
    }
    clean_ref, clean_test = (xp.where(finite, side, 0.0).clip(-_LARGEST, _LARGEST) for side in (ref, test))
    return clean_ref, clean_test, fields


def reduce_device(ref: torch.Tensor, test: torch.Tensor) -> Totals:
    """Reduce two tensors of one shape where the reference lies; only numbers are copied to the host."""
    import torch

    flat_ref, flat_test = ref.detach().reshape(-1), test.detach().to(ref.device).reshape(-1)
    if statistics_cuda.can_reduce(flat_ref, flat_test) and (
        reduced := statistics_cuda.reduce_pair(flat_ref, flat_test)
    ):
        return Totals.of(*reduced)
    histogram = torch.zeros(BINS, dtype=torch.int64, device=ref.device)
    wide = are_wide(ref, test)
    pieces = []
    for start in range(0, flat_ref.numel(), DEVICE_CHUNK):
        unrounded = [side[start : start + DEVICE_CHUNK] for side in (flat_ref, flat_test)]
        r, t = (side.double() for side in unrounded)
        d = differences(*unrounded).abs_() if wide else (t - r).abs_()
        special: dict[str, Any] = {}
        if not d.max().isfinite():
            r, t, special = _set_aside(torch, r, t)
            d = (t - r).abs_()
        histogram += _count(d.float().view(torch.int32).bitwise_right_shift_(BIN_SHIFT))
        max_abs, argmax = d.max(dim=0)
        max_ref = torch.linalg.vector_norm(r, math.inf)
        numbers = (max_abs, argmax, max_ref, d.sum(), d @ d, r @ r, t @ t, r @ t)
        largest, where, *sums = torch.stack([number.double() for number in numbers]).tolist()
        pieces.append((start, PairPiece(d.numel(), largest, int(where), *sums)._replace(**special)))
    unequal = int((flat_ref != flat_test).sum()) if is_whole(ref) or is_whole(test) else None
    return Totals.of(pieces, histogram.cpu().numpy(), unequal)


def _count(keys: torch.Tensor) -> torch.Tensor:
    """Count how often each bin occurs. ``histc`` of integers exists on CUDA only, and is 20 times faster there."""
    return keys.histc(BINS, 0, BINS) if keys.is_cuda else keys.bincount(minlength=BINS)
