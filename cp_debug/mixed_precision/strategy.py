"""Strategy for a set without a needless layer: grow it by prediction until the goal holds, then take away from it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

from cp_debug.minimize import Minimizer

T = TypeVar("T")


def smallest(
    holds: Callable[[frozenset[T]], bool], extend: Callable[[list[T]], Sequence[T]], seed: Iterable[T] = ()
) -> list[T] | None:
    """A set for which ``holds``, from which no element can be left out; None where nothing that was grown holds.

    ``extend`` is given a set that does not hold, in the order in which it grew, and returns elements to add, the most
    promising first, or nothing. ``seed`` is tried first after the empty set. Every set is asked at most once.
    """
    minimizer = Minimizer(holds)
    grown: list[T] = []
    more: Sequence[T] = list(seed)
    while not minimizer.holds(grown):
        more = more or extend(grown)
        if not more:
            return None
        grown, more = [*grown, *more], ()
    return minimizer.minimize(reversed(grown))[::-1]
