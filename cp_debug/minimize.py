"""Minimization of sets for which something still holds: optimizers, nodes to keep in FP32, nodes of a failing subgraph.

The shape is that of Hypothesis's shrinker: one cached predicate over frozen sets, and a pass that deletes runs of
elements whose length it adapts, repeated until it can no longer progress.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Generic, TypeVar

T = TypeVar("T", bound=Hashable)


class Minimizer(Generic[T]):
    """Minimizes sets under ``predicate``, which is never asked twice for the same set."""

    def __init__(self, predicate: Callable[[frozenset[T]], bool]) -> None:
        self._predicate = predicate
        self._known: dict[frozenset[T], bool] = {}

    @property
    def asked(self) -> int:
        """Number of times that the predicate has run."""
        return len(self._known)

    def holds(self, items: Iterable[T]) -> bool:
        """Whether the predicate holds for this set."""
        key = frozenset(items)
        if key not in self._known:
            self._known[key] = self._predicate(key)
        return self._known[key]

    def minimize(self, items: Iterable[T]) -> list[T]:
        """A subset, in the given order, for which the predicate holds, but of which no element can be left out.

        About k·log(n) questions for k of n elements; earlier elements are given up first. Raises ValueError when the
        predicate does not hold for all of ``items``.
        """
        current = list(dict.fromkeys(items))
        if not self.holds(current):
            raise ValueError("the predicate does not hold for the whole set")
        before = None
        while current != before:
            before = current
            kept_count = 0
            while kept_count < len(current):
                remaining, start = current, kept_count

                def deletes(count: int, rest: list[T] = remaining, start: int = start) -> bool:
                    return start + count <= len(rest) and self.holds(rest[:start] + rest[start + count :])

                count = find_integer(deletes)
                current = remaining[:start] + remaining[start + count :]
                kept_count += 1  # the element that now stands at ``start`` has just been refused
        return current


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


def find_integer(holds: Callable[[int], bool]) -> int:
    """An n with ``holds(n)`` and not ``holds(n + 1)``, in about 2·log(n) questions; ``holds(0)`` is taken as true.

    From Hypothesis (``hypothesis.internal.conjecture.junkdrawer.find_integer``): small answers are tried one by one,
    as they are the usual ones. ``holds`` must be false for all large numbers.
    """
    for n in range(1, 5):
        if not holds(n):
            return n - 1
    low, high = 4, 8
    while holds(high):
        low, high = high, high * 2
    while low + 1 < high:
        middle = (low + high) // 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low
