"""Confidence intervals by drawing samples with replacement."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from cp_debug.detection.boxes import Floats

CONFIDENCE = 0.95


class ConfidenceInterval(NamedTuple):
    """A figure and the range in which it falls for ``CONFIDENCE`` of the draws."""

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, draws: Floats) -> ConfidenceInterval:
        """The interval of a figure from its value in each draw [1 + B]; the first is that of the samples themselves.

        Draws in which it is undefined (NaN) are left out.
        """
        drawn, tail = draws[1:][~np.isnan(draws[1:])], 50 * (1 - CONFIDENCE)
        low, high = np.percentile(drawn, (tail, 100 - tail)) if len(drawn) else (draws[0], draws[0])
        return cls(float(draws[0]), float(low), float(high))

    def columns(self, name: str) -> dict[str, float]:
        """The figure as columns of a table: ``name``, and the range's ends."""
        return {name: self.value, f"{name} low": self.low, f"{name} high": self.high}


def intervals(draws: Mapping[str, Floats], less: Mapping[str, Floats] | None = None) -> dict[str, ConfidenceInterval]:
    """The interval of each figure from its values [1 + draws], with those of ``less``, of a reference, taken off."""
    return {name: ConfidenceInterval.of(each if less is None else each - less[name]) for name, each in draws.items()}


def draw_samples(samples: int, draws: int, seed: int) -> Floats:
    """Weights [1 + draws, samples]: a row of ones, then how often each sample was drawn (multinomial).

    Equal for equal arguments, so that the difference of two backends is taken draw by draw. Efron's bootstrap.
    """
    times_drawn = np.random.default_rng(seed).multinomial(samples, np.full(samples, 1 / samples), size=draws)
    return np.concatenate((np.ones((1, samples)), times_drawn))
