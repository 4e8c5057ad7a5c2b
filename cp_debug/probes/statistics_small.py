"""The inner loop of ``statistics.compare`` and of ``distance`` for small arrays, in NumPy.

Loading a compiler takes longer than all comparisons of a small network. Counts, maxima, positions and histograms are
those of ``statistics_kernel`` to the bit; its sums, also in float64, are added up in another order.
"""

from __future__ import annotations

import numpy as np

from cp_debug.probes.statistics_totals import BIN_SHIFT, BINS, FLOAT64_OFFSET, FLOAT64_SHIFT, INFINITE_BIN, PairPiece

SMALL = 1 << 16
"""Elements up to which an array is small: NumPy takes 0.3 ms for them, the compiled loop 0.05 ms, to load it 0.7 s."""


class SmallAccumulator:
    """``statistics_kernel.Accumulator`` without a compiler, for one float type."""

    def __init__(self, dtype: np.dtype) -> None:
        self._is_single = dtype == np.float32
        self.histogram = np.zeros(BINS, np.int64)
        """(BINS,) int64: how many |differences| fell into each bin."""

    def add(self, ref: np.ndarray, test: np.ndarray) -> PairPiece:
        """Reduce two arrays (n,) of this dtype; none of their elements where a difference is not finite."""
        with np.errstate(all="ignore"):
            diff = np.abs(test - ref)
            if not ref.size or not np.isfinite(largest := diff.max()):
                return PairPiece(0, 0.0, 0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0)
            self.histogram += np.bincount(self._bins(diff), minlength=BINS)
            r, t, d = (side.astype(np.float64) for side in (ref, test, diff))
            sum_dd, sum_rr, sum_tt, sum_rt = (float(np.dot(a, b)) for a, b in ((d, d), (r, r), (t, t), (r, t)))
            max_ref, sum_abs = float(np.abs(ref).max()), float(d.sum())
        where = int(diff.argmax())
        return PairPiece(ref.size, float(largest), where, max_ref, sum_abs, sum_dd, sum_rr, sum_tt, sum_rt)

    def _bins(self, diff: np.ndarray) -> np.ndarray:
        if self._is_single:
            return (diff.view(np.uint32) >> BIN_SHIFT).astype(np.int64)
        bins = (diff.view(np.uint64) >> FLOAT64_SHIFT).astype(np.int64) - FLOAT64_OFFSET
        return bins.clip(0, INFINITE_BIN)


def squares(ours: np.ndarray, theirs: np.ndarray) -> tuple[float, float]:
    """Sums of (ours − theirs)² and theirs² over two flat arrays of real numbers, in float64."""
    with np.errstate(all="ignore"):
        whole = theirs.astype(np.float64)
        difference = ours.astype(np.float64) - whole
        return float(np.dot(difference, difference)), float(np.dot(whole, whole))
