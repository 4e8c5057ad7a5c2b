"""Sums of a comparison: pieces of a tensor pair, and their total with its log histogram of |difference|."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

MANTISSA_BITS = 5
"""A histogram bin is the leading bits of a float32: 8 of exponent and these, so 32 bins an octave."""
BIN_SHIFT = 23 - MANTISSA_BITS
INFINITE_BIN = 255 << MANTISSA_BITS
BINS = INFINITE_BIN + 1


class PairPiece(NamedTuple):
    """Consecutive elements of a pair, reduced. Differences and sums are over the pairs with both sides finite."""

    finite: int
    """Number of pairs with both sides finite."""
    max_abs: float
    argmax: int
    """First flat index, counted from the start of the piece, that has ``max_abs``."""
    max_ref: float
    sum_abs: float
    sum_dd: float
    sum_rr: float
    sum_tt: float
    sum_rt: float
    nan_ref: int = 0
    nan_test: int = 0
    inf_ref: int = 0
    inf_test: int = 0
    mismatched: int = 0
    first_mismatch: int = 0
    """Flat index of the first mismatched pair; means nothing when there is none."""


@dataclass
class Totals:
    """A whole tensor pair, reduced."""

    whole: PairPiece
    histogram: np.ndarray
    """(BINS,) int64: |difference| of the finite pairs; mismatched pairs in the last bin."""
    unequal: int | None = None
    """Number of elements that differ, where a side holds integers or bool."""

    @classmethod
    def of(cls, pieces: Iterable[tuple[int, PairPiece]], histogram: np.ndarray, unequal: int | None = None) -> Totals:
        """Add up pieces, each with the flat index where it starts, in any order.

        ``histogram``, [bins] int64, holds all pairs, those that are not finite as zeros; it is corrected here.
        """
        ordered = sorted(pieces, key=lambda item: item[0])
        if not ordered:
            return cls(PairPiece(0, 0.0, 0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0), histogram, unequal)
        columns = dict(zip(PairPiece._fields, zip(*(piece for _, piece in ordered), strict=True), strict=True))
        sums: dict[str, Any] = {name: sum(column) for name, column in columns.items()}
        start, worst = max(ordered, key=lambda item: item[1].max_abs)
        mismatch = next((start + piece.first_mismatch for start, piece in ordered if piece.mismatched), 0)
        extremes = {"max_abs": worst.max_abs, "argmax": start + worst.argmax, "max_ref": max(columns["max_ref"])}
        histogram[0] -= histogram.sum() - sums["finite"]
        histogram[-1] += sums["mismatched"]
        return cls(PairPiece(**(sums | extremes | {"first_mismatch": mismatch})), histogram, unequal)

    @property
    def max_abs(self) -> float:
        """Largest |difference|, inf when a pair is mismatched."""
        return math.inf if self.whole.mismatched else self.whole.max_abs

    @property
    def argmax(self) -> int:
        """Flat index of ``max_abs``, the first one."""
        return self.whole.first_mismatch if self.whole.mismatched else self.whole.argmax

    @cached_property
    def _cumulative(self) -> np.ndarray:
        return np.asarray(self.histogram.cumsum())

    def quantile(self, q: float) -> float:
        """The smallest |difference| that at least the fraction ``q`` of the compared pairs does not exceed."""
        cumulative = self._cumulative
        rank = max(math.ceil(q * cumulative[-1]), 1)
        return min(_bin_value(int(cumulative.searchsorted(rank))), self.max_abs)


def _bin_value(index: int) -> float:
    """The middle of a bin; 0 for bin 0, which holds zero and all below 3.7e-40; inf from the last on."""
    if index == 0 or index >= INFINITE_BIN:
        return 0.0 if index == 0 else math.inf
    return float(np.array((2 * index + 1) << (BIN_SHIFT - 1), np.uint32).view(np.float32))
