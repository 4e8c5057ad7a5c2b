"""Smallest errors of an engine that takes a low precision for a part of what it may leave in FP32.

Where an engine may leave a layer and everything above it in FP32, an error begins at 0: it is either that of FP32 sums,
or at least that of the mildest engine that rounds anything. Such engines are imitated by stretches: the layers that may
be in FP32, in execution order, in up to ``MOST`` stretches of the same length; in one run only one stretch rounds its
results, and all others are computed in FP32.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from cp_debug.prediction.groups import Group
from cp_debug.prediction.result import NONE
from cp_debug.probes.distance import relative_l2

MOST = 6
"""Stretches of one component. More of them are shorter, so that the smallest error is smaller. Chosen on a U-Net that
TensorRT 8.6 left in FP32 in parts: with 2, 9 of its 20 errors are below; with 3 to 12, none or one."""

Values = dict[str, Any]
Compute = Callable[[Group, Values, Sequence[str]], tuple[Values, Values]]


class Stretches:
    """The runs of one component on one sample.

    ``computing``: how many of its layers may be in FP32. ``exact`` runs a group in FP32, ``low`` in the mildest way of
    the precision; both return the asked results, and everything inside.
    """

    def __init__(
        self,
        inputs: Iterable[str],
        computing: int,
        exact: Compute,
        low: Compute,
    ) -> None:
        self._length = max(1, math.ceil(computing / MOST))
        self._compute, self._low = exact, low
        self._open = set(inputs)
        """Values that come from FP32 throughout in some engine."""
        self._runs: list[Values] = []
        """Each run's values that differ from FP32's."""
        self._taken = 0

    def feed(self, exact: Mapping[str, Any], other: Mapping[str, Any]) -> None:
        """A further run, in which only components before this one round: they hand it ``other``."""
        if differing := {n: x for n, x in other.items() if not _same(x, exact[n])}:
            self._runs.append(differing)

    def reaches(self, reads: Collection[str]) -> bool:
        """Whether all of these values may come from FP32 throughout."""
        return self._open.issuperset(reads)

    def add(
        self, group: Group, reads: Collection[str], given: Values, exact: Values, exact_inside: Values
    ) -> dict[str, float]:
        """Take in a group that may be in FP32, as all above it.

        ``given`` are FP32's values so far, ``exact`` and ``exact_inside`` what it makes of them. Returns value →
        smallest error, over the runs that reach it.
        """
        self._open.update(exact)
        if group.computes:
            if self._taken % self._length == 0:
                self._runs.append({})
            self._taken += 1
        errors: dict[str, list[float]] = {}
        for run in self._runs:
            results, inside = exact, exact_inside
            if group.computes and run is self._runs[-1]:
                results, inside = self._low(group, {**given, **run}, list(exact))
            elif any(name in run for name in reads):
                results, inside = self._compute(group, {**given, **run}, list(exact))
            for name, right in {**exact_inside, **exact}.items():
                value = results[name] if name in exact else inside.get(name, right)
                if value is right:
                    continue
                if name in exact:
                    run[name] = value
                if isinstance(value, Tensor) and value.is_floating_point():
                    errors.setdefault(name, []).append(relative_l2(value, right))
        return {name: min(seen) for name, found in errors.items() if (seen := [e for e in found if e > NONE])}

    def forget(self, name: str) -> None:
        """Free a value that nothing reads any more."""
        for run in self._runs:
            run.pop(name, None)


def _same(a: Any, b: Any) -> bool:
    return a is b or bool(np.array_equal(np.asarray(a), np.asarray(b)))
