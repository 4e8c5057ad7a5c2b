"""``--probes bisect``: one probe a build, for engines that change when all their values are marked at once."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from cp_debug.backends.arithmetic import BF16, FP16, FP32, FP64, INT8, TF32, Arithmetic
from cp_debug.backends.emulated import ExecutorSession
from cp_debug.graph.graph import Graph
from cp_debug.probes.arrays import Tensor, as_numpy
from cp_debug.probes.distance import relative_l2
from cp_debug.serialize import JsonForm, encode

FACTOR = 4.0
"""Factor by which a value may be further from the exact one than its emulation is."""
NOISE = 1e-6
"""Distance that another order of summation in FP32 explains, where the emulation rounds nothing."""
_PAIRS: Mapping[str, tuple[Arithmetic, Arithmetic]] = {
    "fp32": (FP64, FP32),
    "tf32": (FP32, TF32),
    "bf16": (FP32, BF16),
    "fp16": (FP32, FP16),
    "best": (FP32, FP16),
    "int8": (INT8, TF32),  # rounding flips some ticks of the graph's own quantizers
}
"""Variant → exact arithmetic, and the arithmetic expected of the engine."""


@dataclass(frozen=True)
class Visited(JsonForm):
    """A value that an engine of its own was built for. Distances are relative L2."""

    value: str
    distance: float
    """Distance from the exact value."""
    limit: float
    """Distance that rounding explains."""
    gap: float
    """Distance of this engine's outputs from the plain one's."""

    def derived(self) -> dict[str, Any]:
        """Whether it is beyond the limit."""
        return {"departs": self.beyond_limit}

    @property
    def beyond_limit(self) -> bool:
        """Whether it is further away than its precision explains; NaN is."""
        return not self.distance <= self.limit


@dataclass
class ProbeSearch:
    """Values that were looked at, in that order, and the first one beyond its limit."""

    first: str | None = None
    """The first value that is beyond its limit."""
    visited: list[Visited] = field(default_factory=list)

    def describe(self) -> dict[str, Any]:
        """JSON-safe, for ``settings``."""
        visited = encode(self.visited, json=False)
        return {"first": self.first, "builds": len(visited), "visited": visited}


class Expected:
    """Distances up to which each of ``values`` may be from the exact one when the whole graph is rounded."""

    def __init__(self, graph: Graph, variant: str, inputs: Mapping[str, np.ndarray], values: Collection[str]) -> None:
        exact, rounded = _PAIRS[variant]
        self._exact: dict[str, np.ndarray] = {}
        self._limits: dict[str, float] = {}
        self._run(graph, exact, inputs, values, lambda name, tensor: self._exact.update({name: tensor}))
        self._run(graph, rounded, inputs, values, self._limit)

    def distance(self, value: str, array: np.ndarray) -> float:
        """Relative L2 distance from the exact value; infinite for NaN and Inf that are not in the exact one.

        ``array`` has the shape of the value, and any real dtype.
        """
        return relative_l2(array, self._exact[value])

    def limit(self, value: str) -> float:
        """The largest distance that rounding explains."""
        return self._limits[value]

    def _limit(self, value: str, array: np.ndarray) -> None:
        self._limits[value] = FACTOR * self.distance(value, array) + NOISE

    @staticmethod
    def _run(
        graph: Graph,
        arithmetic: Arithmetic,
        inputs: Mapping[str, np.ndarray],
        values: Collection[str],
        keep: Callable[[str, np.ndarray], None],
    ) -> None:
        def sink(name: str, tensor: Tensor) -> None:
            keep(name, np.array(as_numpy(tensor)))

        ExecutorSession(graph, arithmetic, "cpu").run(inputs, sink, values)


def search(values: Sequence[str], expected: Expected, look: Callable[[str], tuple[np.ndarray, float]]) -> ProbeSearch:
    """Find the first of ``values`` that is beyond its limit, in ⌈log₂(n + 1)⌉ looks.

    ``values`` are in execution order. ``look`` builds an engine that shows one value and runs it; it returns the value
    and the distance of the outputs from the plain engine's. All values behind such a one are taken to be beyond theirs:
    where that fails, the value found is beyond its limit all the same, and the one before it is not. Values have the
    shapes of the graph's, and any real dtype.
    """
    result = ProbeSearch()

    def beyond_limit(value: str) -> bool:
        array, gap = look(value)
        looked_at = Visited(value, expected.distance(value, array), expected.limit(value), gap)
        result.visited.append(looked_at)
        return looked_at.beyond_limit

    place = bisect_left(values, True, key=beyond_limit)
    result.first = values[place] if place < len(values) else None
    return result
