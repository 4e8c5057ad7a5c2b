"""Largest change of a box under a kernel that was not emulated, from the changes under those that were.

Kernels that sum in another order give other rounding errors of the same size: the change of a box is another draw from
one distribution. It is taken as normal around 0, its scale as the root mean square over the K emulated kernels of one
arithmetic, so that change ÷ scale follows Student's t with K degrees of freedom, for each box by itself; more than 3
count as 3, which makes the interval wider. The largest one of all boxes then lies below x with the product of their
probabilities.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from cp_debug.detection.changes import BoxChanges
from cp_debug.prediction.result import Interval

COVERS = 0.95
"""Probability with which an interval is to hold the largest change."""
FIELDS = ("center", "size", "yaw", "score")
"""Names of the changes in ``BoxChanges``."""


def largest_changes(families: Sequence[Sequence[BoxChanges]]) -> dict[str, Interval]:
    """Field → interval of the largest change of a box.

    ``families``: the emulated kernels' changes, by arithmetic, the most likely one first. The interval reaches from the
    mildest arithmetic to the coarsest one; ``expected`` is the largest change under the most likely kernel. It begins
    at 0 where some way changes no box, as all of it may be in FP32; that way says nothing about the others. Empty where
    no box is matched under all kernels.
    """
    changing = [[found for found in family if any(map(any, found.values()))] for family in families]
    unchanged = any(len(some) < len(family) for some, family in zip(changing, families, strict=True))
    everywhere = set.intersection(*(set(found) for family in families for found in family))
    if not everywhere:
        return {}
    told = {}
    for i, field in enumerate(FIELDS):
        drawn = [
            np.array([[found[box][i] for box in sorted(everywhere)] for found in some]) for some in changing if some
        ]
        ends = [(quantile(each, (1 - COVERS) / 2), quantile(each, (1 + COVERS) / 2)) for each in drawn] or [(0.0, 0.0)]
        expected = max(abs(families[0][0][box][i]) for box in everywhere)
        low = 0.0 if unchanged else min(low for low, _ in ends)
        told[field] = Interval(low, expected, max(high for _, high in ends))
    return told


def quantile(drawn: np.ndarray, probability: float) -> float:
    """The value below which the largest change of a further draw lies with ``probability``; ``drawn`` [K, boxes]."""
    scales = np.sqrt((drawn**2).mean(0))
    low, high = 0.0, float(scales.max())
    if not high:
        return 0.0
    while _all_below(high, scales, len(drawn)) < probability:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if _all_below(middle, scales, len(drawn)) >= probability else (middle, high)
    return high


def _all_below(value: float, scales: np.ndarray, draws: int) -> float:
    """Probability that no box changes by more than ``value``."""
    t = value / scales[scales > 0]
    return float(np.prod(within(t, min(draws, 3))))


def within(t: np.ndarray, freedom: int) -> np.ndarray:
    """Probability that Student's t with 1, 2 or 3 degrees of freedom lies between −t and t."""
    if freedom == 1:
        return 2 / math.pi * np.arctan(t)
    if freedom == 2:
        return t / np.sqrt(2 + t**2)
    u = t / math.sqrt(3)
    return 2 / math.pi * (np.arctan(u) + u / (1 + u**2))


def joined(known: Mapping[str, Interval], other: Mapping[str, Interval]) -> dict[str, Interval]:
    """The intervals of two samples' largest changes together: the larger ends, as the largest of both is asked for."""
    if not known or not other:
        return dict(known or other)
    return {
        field: Interval(*(max(getattr(a, end), getattr(other[field], end)) for end in ("low", "expected", "high")))
        for field, a in known.items()
    }
