"""The heat map of a sweep's page: a strip a layer, a column a sample or a few."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from cp_debug.reports.numbers import number
from cp_debug.reports.png import opacity_png
from cp_debug.sweep.bisecting import HeatMap

RED = (207, 34, 46)
FAINTEST, FULL = 1.0, 100.0
"""Excess from which a column is seen, where rounding ends, and from which it is red all over; by its logarithm."""


@dataclass(frozen=True)
class Strip:
    """One layer."""

    layer: str
    picture: str
    """Data URI of a PNG, one pixel a column."""
    says: str
    """The picture in words: the highest excess, and on which samples."""


def strips(heat_map: HeatMap, samples: Sequence[str]) -> Iterator[Strip]:
    """A strip for each layer of the map over ``samples``, all of the group, in order."""
    low, high = np.log10(FAINTEST), np.log10(FULL)
    for layer, values in zip(heat_map.layers, heat_map.excess, strict=True):
        row = np.array([FAINTEST if v is None else min(max(v, FAINTEST), FULL) for v in values])
        known = [(v, -i) for i, v in enumerate(values) if v is not None]
        says = "not replayed"
        if known:
            worst, place = max(known)
            says = f"excess at most {number(worst)}, on {_of(samples, -place, heat_map.width)}"
        yield Strip(layer, opacity_png(((np.log10(row) - low) / (high - low))[None], RED), says)


def _of(samples: Sequence[str], column: int, width: int) -> str:
    first, last = column * width, min((column + 1) * width, len(samples)) - 1
    return samples[first] if first == last else f"one of {samples[first]} to {samples[last]}"
