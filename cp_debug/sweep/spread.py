"""A figure over samples: median, 95th percentile, the worst sample, and the samples that stand out."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cp_debug.detection.evaluation import ConfidenceInterval
from cp_debug.serialize import JsonForm

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


def flat(row: Any, samples: Sequence[str]) -> dict[str, Any]:
    """The fields of a dataclass as columns of a flat row.

    Spreads and intervals become their parts, those in a mapping under its keys, which ``metadata={"column": …}`` puts
    into words. What is None is left out.
    """
    found: dict[str, Any] = {}
    for field in fields(row):
        value, words = getattr(row, field.name), field.metadata.get("column", "{}")
        for key, figure in value.items() if isinstance(value, Mapping) else [(field.name, value)]:
            name = words.format(key)
            if isinstance(figure, ConfidenceInterval):
                found |= figure.columns(name)
            elif isinstance(figure, Spread):
                found |= {f"{name}_{part}": getattr(figure, part) for part in ("median", "p95", "worst")}
                found[f"{name}_worst_sample"] = samples[figure.sample]
            elif figure is not None:
                found[name] = " ".join(figure) if isinstance(figure, list) else figure
    return found


@dataclass(frozen=True)
class SampleGroup(JsonForm):
    """Results that belong together in the report: one model, and one test backend or all, over samples."""

    derives = ("passed",)
    label: str
    """The model, as the user wrote it."""

    @property
    def passed(self) -> bool:
        """Whether nothing is wrong with it; True where nothing is judged."""
        return True

    @property
    def title(self) -> str:
        """What the results are of."""
        return self.label

    def table(self) -> Sequence[Any]:
        """Dataclasses that ``rows`` makes flat, by default the layers."""
        return self.layers  # type: ignore[attr-defined]

    def rows(self) -> list[dict[str, Any]]:
        """Flat rows for CSV."""
        samples: Sequence[str] = self.samples  # type: ignore[attr-defined]
        about = {name: getattr(self, name) for name in ("reference", "backend") if hasattr(self, name)}
        return [{"model": self.label, **about, "samples": len(samples), **flat(row, samples)} for row in self.table()]


@dataclass(frozen=True)
class PairGroup(SampleGroup):
    """Results of one model on the reference and one test backend, over samples."""

    reference: str
    backend: str
    emulated: bool
    samples: list[str]
    """Sources of the samples, to which ``sample`` of a spread is an index."""

    @property
    def title(self) -> str:
        """The model and its backends."""
        return f"{self.label}: {self.reference} → {self.backend}{' (emulated)' if self.emulated else ''}"

    @staticmethod
    def about(label: str, results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """The fields above, from the results of tasks."""
        shared = {name: results[0][name] for name in ("reference", "backend", "emulated")}
        return {"label": label, **shared, "samples": [result["sample"] for result in results]}


def numeric(value: Any) -> float:
    """A figure of a record: what JSON lacks is text there, none is NaN, and NaN is as bad as infinity."""
    number = math.nan if value is None else float(value)
    return math.inf if math.isnan(number) and value is not None else number
