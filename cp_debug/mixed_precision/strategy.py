"""Strategy for a set without a needless layer: grow it by prediction until the goal holds, then take away from it.

Predicted are the layers with the largest shares in the divergence, as many as should be enough. A share is ⟨D, J eᵢ⟩ ÷
‖D‖² (``bisect/shares.py``), of all layers by one walk backward. Errors of different layers are taken as independent:
the squares add up, and what is left of the divergence is the root of the other shares.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeVar

from cp_debug.minimize import Minimizer
from cp_debug.mixed_precision.fusion_groups import FusionGroup, Kept
from cp_debug.mixed_precision.goal import Goal
from cp_debug.mixed_precision.trial import Measured

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


REMAINS = 0.3
"""Part of an error that may remain, for goals that say nothing of its size: boxes, mAP."""

NOT_LINEAR = 0.5
"""What the shares may leave of the divergence for their signs to say anything."""
LEADS = 0.1
"""Where they do not, layers with less than this part of the largest share wait until that is kept."""


class Predictor:
    """Extends sets of kept layers that do not reach the goal."""

    def __init__(
        self,
        groups: Sequence[FusionGroup],
        goal: Goal,
        local_error: Callable[[FusionGroup], float],
        shares: Callable[[Kept], Mapping[tuple[str, str], float]],
    ) -> None:
        """``local_error`` is what a layer introduces by itself, ``shares`` the share of each (component, node) in what
        a run with these layers kept is off."""
        self._goal, self._shares = goal, shares
        self.groups = groups
        self.local = {group: local_error(group) for group in groups}
        self.shares: dict[FusionGroup, float] = {}
        """Layer → its share where nothing that is finite by itself was kept."""

    def extend(self, grown: Sequence[FusionGroup], measured: Measured) -> list[FusionGroup]:
        """Layers to keep besides ``grown``, whose figures are ``measured``.

        As many as should reach the goal, as far as shares tell, at least one; none when all are kept. Those that are
        not finite by themselves come first.
        """
        unkept = [group for group in self.groups if group not in grown]
        if not unkept:
            return []
        if broken := [group for group in unkept if math.isinf(self.local[group])]:
            return broken
        of_nodes = self._shares(frozenset(grown))
        shares = {g: sum(of_nodes.get((g.component, node), 0.0) for node in g.nodes) for g in unkept}
        self.shares = self.shares or shares
        floor = -min(shares.values())
        if abs(1 - sum(shares.values())) > NOT_LINEAR:
            shares = {group: abs(share) for group, share in shares.items()}
            floor = LEADS * max(shares.values())
        ranked = sorted(unkept, key=lambda group: (shares[group], self.local[group]), reverse=True)
        left = [max(shares[group], 0.0) for group in ranked]
        if not sum(left):
            return ranked[: max(1, len(grown))]  # nothing is known of them: double it
        # Errors that have nothing to do with D have shares of either sign: up to the most negative one it is chance.
        seen = max(1, sum(share > floor for share in left))
        enough = (n for n in range(1, seen) if self._suffices(measured, math.sqrt(sum(left[n:]) / sum(left))))
        return ranked[: next(enough, seen)]

    def _suffices(self, measured: Measured, ratio: float) -> bool:
        """Whether the goal should hold once ``ratio`` of the error is left."""
        if {"rel_l2", "max_abs"}.issuperset(self._goal.figures):
            figures = {name: measured.figures.get(name, math.inf) for name in self._goal.figures}
            return self._goal.holds({name: value * ratio for name, value in figures.items()})
        return ratio <= REMAINS
