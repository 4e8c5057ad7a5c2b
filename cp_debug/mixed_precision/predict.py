"""Prediction of the layers to keep: what each introduces, and what that does to the final outputs.

A layer's effect is measured, not assumed: it alone computes in the low precision, everything else in FP32, which costs
the part of a pass behind it. Effects of different layers are taken as independent, so their squares add up.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

from cp_debug.mixed_precision.fusion_groups import FusionGroup, Kept
from cp_debug.mixed_precision.goal import Goal
from cp_debug.mixed_precision.trial import Measured

T = TypeVar("T")
AT_ONCE = 8
"""Number of layers whose effect is measured at a time, those that introduce most first."""
SHARE = 0.3
"""Share of an error that may remain, for goals that say nothing of its size: boxes, mAP."""


class Predictor:
    """Extends sets of kept layers that do not reach the goal."""

    def __init__(
        self,
        groups: Sequence[FusionGroup],
        goal: Goal,
        local_error: Callable[[FusionGroup], float],
        alone: Callable[[Kept], Measured],
    ) -> None:
        """``alone`` measures a run in which these layers are kept; ``local_error`` is what a layer introduces."""
        self._goal, self._alone = goal, alone
        self._everything = frozenset(groups)
        local = {group: local_error(group) for group in groups}
        place = {group: i for i, group in enumerate(groups)}
        self.ranked = sorted(groups, key=lambda group: (-local[group], place[group]))
        """Layers, those that introduce most by themselves first."""
        self.local = local
        self.effects: dict[FusionGroup, Measured] = {}
        """Layer → figures of the final outputs when it alone is low, as far as measured."""

    def extend(self, grown: Sequence[FusionGroup], measured: Measured) -> list[FusionGroup]:
        """Layers to keep besides ``grown``, whose figures are ``measured``.

        As many as should reach the goal, at least one; none when all are kept.
        """
        unkept = [group for group in self.ranked if group not in grown]
        if broken := [group for group in unkept if math.isinf(self.local[group])]:
            return broken
        with_effect = [group for group in unkept if group in self.effects]
        while measured.outputs:
            with_effect.sort(key=self._size, reverse=True)
            for count in range(1, len(with_effect) + 1):
                if self._suffices(measured, with_effect[:count], with_effect[count:]):
                    return with_effect[:count]
            new = [group for group in unkept if group not in self.effects][:AT_ONCE]
            if not new:
                break
            for group in new:
                self.effects[group] = self._alone(self._everything - {group})
            with_effect += new
        return (with_effect or unkept)[: max(1, len(grown))]  # not as predicted: double it

    def _size(self, group: FusionGroup) -> float:
        return self.effects[group].figures["rel_l2"]

    def _suffices(self, measured: Measured, more: Sequence[FusionGroup], unkept: Sequence[FusionGroup]) -> bool:
        """Whether the goal should hold once ``more`` is kept, too, while the known layers ``unkept`` are not."""
        remaining_error = {}
        for name, error in measured.outputs.items():
            if math.isfinite(error):
                remaining_error[name] = left_of(error, self._errors(more, name))
            else:
                remaining_error[name] = math.sqrt(sum(e**2 for e in self._errors(unkept, name)))
        before, after = measured.figures["rel_l2"], max(remaining_error.values())
        ratio = after / before if math.isfinite(before) and before else float(math.isinf(after))
        if not {"rel_l2", "max_abs"}.issuperset(self._goal.figures):
            return ratio <= SHARE
        return self._goal.holds({"rel_l2": after, "max_abs": measured.figures.get("max_abs", math.inf) * ratio})

    def _errors(self, groups: Sequence[FusionGroup], output: str) -> list[float]:
        return [self.effects[group].outputs.get(output, 0.0) for group in groups]  # a log may know fewer


def left_of(error: float, alone: Iterable[float]) -> float:
    """Relative L2 error that should be left once layers are kept that bring ``alone`` by themselves."""
    return math.sqrt(max(error**2 - sum(each**2 for each in alone), 0.0))


def enough_of(
    ranked: Sequence[T], error: float, alone: Callable[[T], float], limit: float, *, squares: bool = True
) -> list[T]:
    """The first of the ``ranked`` layers, as many as should bring ``error`` down to ``limit`` when they are kept.

    ``squares``: errors are relative L2, whose squares add up; else they are losses of a score, which add up themselves.
    """
    taken: list[T] = []
    for layer in ranked:
        removed = [alone(each) for each in taken]
        if (left_of(error, removed) if squares else error - sum(removed)) <= limit:
            break
        taken.append(layer)
    return taken
