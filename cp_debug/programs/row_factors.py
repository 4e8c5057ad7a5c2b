"""Factors of the rows of one matrix that make another of it, for weights that are stored exactly or in few bits."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cp_debug.probes.distance import relative_l2

BETTER = 0.3
"""Share of the distance between two layers' weights that may be left where channels are scaled."""
EQUAL = 1e-6
"""Relative L2 distance up to which weights, or factors, are equal: the rounding of FP32."""
NOISE = 4
"""Standard errors of a factor up to which it is 1: rows of quantized weights have none of exactly 1."""


@dataclass(frozen=True)
class Fit:
    """Factors of rows, and how well they explain the other matrix."""

    factors: np.ndarray
    """Factor of each row, FP64."""
    noise: np.ndarray
    """Standard errors of the factors, relative."""
    distance: float
    """Relative L2 distance that is left."""
    scaled: bool
    """Whether rows are scaled, rather than changed otherwise or not at all."""


def fit(ours: np.ndarray, theirs: np.ndarray) -> Fit:
    """Factors of the rows of ``ours`` that bring them nearest to ``theirs``; 1 where noise may be all.

    Both are FP64 of one shape, rows along the first axis.
    """
    ours, theirs = (array.reshape(len(array), -1) for array in (ours, theirs))
    energy = (ours * ours).sum(1)
    own = np.where(energy > 0, energy, 1)
    factors = np.where(energy > 0, (ours * theirs).sum(1) / own, 1.0)
    common = _common_ratio(ours, theirs)
    factors = np.where(np.isnan(common), factors, common)
    noise = np.sqrt(((theirs - factors[:, None] * ours) ** 2).sum(1) / own / ours.shape[1])
    noise = np.where(np.isnan(common), noise, 0.0)
    factors = np.where(np.abs(factors - 1) <= NOISE * noise, 1.0, factors)
    left, plain = relative_l2(factors[:, None] * ours, theirs), relative_l2(ours, theirs)
    return Fit(factors, noise, left, bool(plain > EQUAL and left < BETTER * plain and (factors > 0).all()))


def _common_ratio(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    """The ratio that most elements of each row share up to rounding; NaN where there is none.

    Single wrong weights pull least squares, not this.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = np.where(ours != 0, theirs / ours, np.nan)
        ratios[(ours == 0).all(1)] = 1.0
        common = _lower_median(ratios) if ratios.size else np.ones(len(ours))
        agree = np.abs(ratios - common[:, None]) <= EQUAL * np.abs(common)[:, None]
    shared = (common != 0) & (2 * agree.sum(1) > (ours != 0).sum(1))  # levels of few bits are 0 in many places
    return np.where(shared, common, np.nan)


def _lower_median(rows: np.ndarray) -> np.ndarray:
    """``np.nanquantile(rows, 0.5, 1, method="lower")``, which goes through the rows one by one."""
    last = (~np.isnan(rows)).sum(1) - 1
    return np.take_along_axis(np.sort(rows, 1), np.maximum(last // 2, 0)[:, None], 1)[:, 0]
