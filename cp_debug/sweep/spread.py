"""A figure over samples: median, 95th percentile, the worst sample, and the samples that stand out."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

FEWEST = 5
"""Number of samples below which none is called an outlier."""
OUTLYING = 3.5
"""Robust z from which a sample is an outlier (Iglewicz and Hoaglin, How to Detect and Handle Outliers, 1993)."""
TWICE = 2.0
"""An outlier is also this many times the median: in a tight bunch every last digit stands out."""
TINY = 1e-12
"""Figures below this count as equal: a relative error of nothing."""


@dataclass(frozen=True)
class Spread:
    """One figure over ``count`` samples that have it. NaN counts as infinite. Percentiles are values of a sample."""

    count: int
    median: float
    p95: float
    worst: float
    sample: int
    """Place of the worst value in the sequence."""

    @classmethod
    def of(cls, values: ArrayLike) -> Spread | None:
        """The spread of ``values``, in which NaN marks a sample without the figure; None when no sample has it."""
        array = np.asarray(values, dtype=float)
        present = np.flatnonzero(~np.isnan(array))
        if not len(present):
            return None
        values_present = array[present]
        with np.errstate(invalid="ignore"):
            p95 = np.quantile(values_present, 0.95, method="inverted_cdf")
            median = np.median(values_present)
        worst = present[values_present.argmax()]
        return cls(len(values_present), float(median), float(p95), float(array[worst]), int(worst))


@dataclass(frozen=True)
class Outlier:
    """A sample that stands out, by its own figure or in some layers."""

    sample: str
    value: float
    score: float | None
    """Robust z of the figure; None where the sample stands out in layers alone."""
    layers: list[str]


def robust_scores(values: ArrayLike) -> NDArray[np.float64]:
    """Robust standard deviations by which each value lies above the median, on a logarithmic scale: [N] → [N].

    0.6745 (x − median) ÷ median absolute deviation, x = log10 of the value; where more than half are equal, the mean
    absolute deviation serves (÷ 1.2533), and infinity lies infinitely far. NaN stays NaN.
    """
    logs = np.log10(np.maximum(np.asarray(values, dtype=float), TINY))
    finite = logs[np.isfinite(logs)]
    if not len(finite):
        return np.full_like(logs, np.nan)
    middle = np.median(finite)
    distances = np.abs(finite - middle)
    scale = np.median(distances) / 0.6745 or distances.mean() * 1.2533 or np.inf
    with np.errstate(invalid="ignore"):  # infinity ÷ infinity, which is not taken
        return np.where(np.isposinf(logs), np.inf, (logs - middle) / scale)


def outlying(values: Sequence[float]) -> dict[int, float]:
    """Place → robust z of the values that stand out upwards; none of fewer than ``FEWEST``."""
    array = np.asarray(values, dtype=float)
    present = array[~np.isnan(array)]
    if len(present) < FEWEST:
        return {}
    scores = robust_scores(array)
    standing_out = np.flatnonzero((scores > OUTLYING) & (array >= TWICE * np.median(present)))
    return {int(place): float(scores[place]) for place in standing_out}


def outliers(names: Sequence[str], whole: Sequence[float], layers: Mapping[str, Sequence[float]]) -> list[Outlier]:
    """The samples that stand out in their own figure or in a layer's, the farthest first."""
    scores = outlying(whole)
    where: dict[int, list[str]] = {place: [] for place in scores}
    for layer, values in layers.items():
        for place in outlying(values):
            where.setdefault(place, []).append(layer)
    listed = [Outlier(names[place], whole[place], scores.get(place), layers) for place, layers in where.items()]
    return sorted(listed, key=lambda each: (-(each.score or 0.0), -len(each.layers), each.sample))


def columns(name: str, spread: Spread | None, samples: Sequence[str]) -> dict[str, Any]:
    """A spread as columns of a flat row."""
    parts = {f"{name}_{part}": getattr(spread, part, math.nan) for part in ("median", "p95", "worst")}
    return {**parts, f"{name}_worst_sample": samples[spread.sample] if spread else ""}


def numeric(value: Any) -> float:
    """A figure of a record: what JSON lacks is text there, none is NaN, and NaN is as bad as infinity."""
    number = math.nan if value is None else float(value)
    return math.inf if math.isnan(number) and value is not None else number
