"""The compiled inner loops of ``statistics.compare`` and of ``distance``.

``Accumulator`` takes sums, maxima and a log histogram of |difference| in one pass; a block with NaN or Inf stops it:
its caller cleans the block. Two specializations, float32 and float64, are compiled once a machine (1.3 s on one core)
and cached beside this file, or in the user's cache folder where the package is read-only. ``statistics_small`` does
the same for arrays that are not worth loading the compiler.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
from numba import float32, float64, njit, types, uint32, uint64

from cp_debug.probes.statistics_totals import BIN_SHIFT, BINS, FLOAT64_OFFSET, FLOAT64_SHIFT, INFINITE_BIN, PairPiece

BLOCK = 1024
"""Elements a turn: both inputs, the differences and their histogram stay in the first-level cache."""

WORD = np.uint64((1 << 32) - 1)
LANES = 2
"""Counts side by side in a bin, so that equal neighbours do not wait for each other's store; more take longer."""


def _signature(real: Any, bits: Any) -> Any:
    def readonly(item: Any) -> Any:
        return types.Array(item, 1, "C", readonly=True)

    scratch = real[::1], bits[::1], uint64[::1], uint32[::1]
    return readonly(real), readonly(real), readonly(bits), *scratch, bits, bits, bits, bits


def compiled(*signatures: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Compile a function for these signatures now, or from the cache."""
    # Sums may be reordered so that they vectorize; NaN and Inf keep their meaning.
    options = {"nogil": True, "fastmath": {"reassoc", "nsz", "contract"}, "error_model": "numpy"}

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        try:
            return njit(list(signatures), cache=True, **options)(function)
        except (RuntimeError, OSError):  # no folder that may be written, neither here nor in the user's home
            return njit(list(signatures), **options)(function)

    return decorate


@compiled(_signature(float32, uint32), _signature(float64, uint64))
def _accumulate(ref, test, ref_bits, diff, diff_bits, pairs, histogram, mask, infinity, shift, lowest):  # type: ignore[no-untyped-def]
    zero = ref_bits.dtype.type(0)
    largest, largest_ref = zero, zero
    where = used = 0
    sums = (0.0, 0.0, 0.0, 0.0, 0.0)
    while used < ref.size:
        size = min(BLOCK, ref.size - used)
        block_ref, block_test, block_bits = ref[used:], test[used:], ref_bits[used:]
        top, top_ref = zero, zero
        sum_abs = sum_dd = sum_rr = sum_tt = sum_rt = 0.0
        for i in range(size):
            diff[i] = abs(block_test[i] - block_ref[i])
            # numba widens 32 bits & 32 bits to 64, which would take the whole loop with it
            top_ref = max(top_ref, ref_bits.dtype.type(block_bits[i] & mask))
            r, t, d = np.float64(block_ref[i]), np.float64(block_test[i]), np.float64(diff[i])
            sum_abs += d
            sum_dd += d * d
            sum_rr += r * r
            sum_tt += t * t
            sum_rt += r * t
        for i in range(size):
            top = max(top, diff_bits[i])
        if top >= infinity:
            break
        sums = (sums[0] + sum_abs, sums[1] + sum_dd, sums[2] + sum_rr, sums[3] + sum_tt, sums[4] + sum_rt)
        largest_ref = max(largest_ref, top_ref)
        if top > largest:
            largest = top
            where = used
            while diff_bits[where - used] != top:
                where += 1
        if lowest:  # float64: squeeze its exponent into float32's
            highest = lowest + (np.uint64(INFINITE_BIN) << shift)
            for i in range(size):
                diff_bits[i] = min(max(diff_bits[i], lowest), highest) - lowest
            for i in range(size):
                histogram[(diff_bits[i] >> shift) * np.uint64(LANES) + np.uint64(i & 1)] += np.uint32(1)
        else:  # two differences of 32 bits are loaded at once
            for i in range(size // 2):
                pair = pairs[i]
                histogram[((pair & WORD) >> np.uint64(shift)) * np.uint64(LANES)] += np.uint32(1)
                histogram[(pair >> (np.uint64(32) + np.uint64(shift))) * np.uint64(LANES) + np.uint64(1)] += np.uint32(
                    1
                )
            if size % 2:
                histogram[np.uint64(diff_bits[size - 1] >> shift) * np.uint64(LANES)] += np.uint32(1)
        used += size
    diff_bits[0], diff_bits[1] = largest, largest_ref
    return used, np.float64(diff[0]), where, np.float64(diff[1]), *sums


_REALS = [types.Array(kind, 1, "C", readonly=True) for kind in (float32, float64)]


@compiled(*itertools.product(_REALS, _REALS))
def squares(ours, theirs):  # type: ignore[no-untyped-def]
    """Sums of (ours − theirs)² and theirs² over two flat arrays, in float64."""
    differing = whole = 0.0
    for i in range(theirs.size):
        y = np.float64(theirs[i])
        difference = np.float64(ours[i]) - y
        differing += difference * difference
        whole += y * y
    return differing, whole


class Accumulator:
    """Scratch memory for one thread and one float type, with the histogram of everything that it was given."""

    def __init__(self, dtype: np.dtype) -> None:
        single = dtype == np.float32
        self._bits = np.dtype(np.uint32 if single else np.uint64)
        shift = BIN_SHIFT if single else FLOAT64_SHIFT
        infinity = int(np.array(np.inf, dtype).view(self._bits))
        constants = (
            (1 << (8 * self._bits.itemsize - 1)) - 1,
            infinity,
            shift,
            0 if single else FLOAT64_OFFSET << shift,
        )
        self._constants = [self._bits.type(value) for value in constants]
        self._diff = np.empty(BLOCK, dtype)
        self._lanes = np.zeros(BINS * LANES, np.uint32)

    @property
    def histogram(self) -> np.ndarray:
        """(BINS,) int64: how many |differences| fell into each bin."""
        return self._lanes.reshape(BINS, LANES).sum(axis=1, dtype=np.int64)

    def add(self, ref: np.ndarray, test: np.ndarray) -> PairPiece:
        """Reduce two contiguous, aligned arrays (n,) of this dtype, up to the first block that is not finite."""
        bits, diff = ref.view(self._bits), self._diff
        scratch = diff, diff.view(self._bits), diff.view(np.uint64), self._lanes
        return PairPiece(*_accumulate(ref, test, bits, *scratch, *self._constants))
