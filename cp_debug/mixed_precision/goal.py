"""Goal of a mixed-precision search, such as ``rel_l2<1e-3 and boxes_lost==0``."""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Mapping
from dataclasses import dataclass

from cp_debug.errors import InputError
from cp_debug.safe_text import did_you_mean

FIGURES = {
    "rel_l2": "largest relative L2 distance of a final output",
    "max_abs": "largest |Δ| of a final output",
    "boxes_lost": "boxes of the reference that the test does not find",
    "boxes_gained": "boxes of the test that the reference does not find",
    "boxes_moved": "boxes whose place or score changed visibly",
    "map_drop": "mAP lost, in points of 100: 0.2 is from 0.600 to 0.598",
}
"""Figures that a goal can limit; the worst sample counts, for boxes the sum over samples."""
DETECTIONS = ("boxes_lost", "boxes_gained", "boxes_moved")
"""Figures that count detections."""

_OPERATORS = {"<": operator.lt, "<=": operator.le, "==": operator.eq}
_CONDITION = re.compile(r"\s*(?P<figure>\w+)\s*(?P<sign><=|==|<|[=!>]+)\s*(?P<limit>\S+)\s*")


@dataclass(frozen=True)
class Condition:
    """One figure and its limit."""

    figure: str
    sign: str
    limit: float

    def __str__(self) -> str:
        return f"{self.figure}{self.sign}{self.limit:g}"

    def holds(self, figures: Mapping[str, float]) -> bool:
        """Whether the figure keeps the limit; NaN never does."""
        return bool(_OPERATORS[self.sign](figures[self.figure], self.limit))


@dataclass(frozen=True)
class Goal:
    """Conditions that must all hold."""

    conditions: tuple[Condition, ...]

    @classmethod
    def parse(cls, text: str) -> Goal:
        """Conditions joined by ``and`` or commas. Raises InputError, saying what was expected."""
        parts = re.split(r",|\band\b", text)
        return cls(tuple(_condition(part, text) for part in parts))

    def __str__(self) -> str:
        return " and ".join(map(str, self.conditions))

    @property
    def figures(self) -> set[str]:
        """The figures that must be measured."""
        return {condition.figure for condition in self.conditions}

    def holds(self, figures: Mapping[str, float]) -> bool:
        """Whether all conditions hold."""
        return all(condition.holds(figures) for condition in self.conditions)

    def excess(self, figures: Mapping[str, float]) -> float:
        """Ratio of the worst figure to its limit, infinite for a limit of 0 that is not kept."""
        return max((_excess(figures[c.figure], c.limit) for c in self.conditions), default=0.0)


def without_counts(name: str) -> InputError:
    """The refusal of a goal that counts boxes for a model that detects nothing."""
    return InputError(f"--goal: {name} decodes no boxes; limit rel_l2 or max_abs")


def check_budget(budget: float) -> None:
    """Raise InputError for a budget that nothing can keep."""
    if not budget > 0:
        raise InputError(f"--auto is {budget:g}; expected a positive budget")


def _excess(value: float, limit: float) -> float:
    if math.isnan(value):
        return math.inf
    return value / limit if limit > 0 else (math.inf if value > limit else 0.0)


def _condition(part: str, text: str) -> Condition:
    expected = "expected FIGURE<LIMIT, as in 'rel_l2<1e-3 and boxes_lost==0'"
    match = _CONDITION.fullmatch(part)
    if match is None:
        raise InputError(f"--goal: {part.strip()!r} in {text!r} is not a condition; {expected}")
    figure, sign = match["figure"], match["sign"]
    if figure not in FIGURES:
        raise InputError(f"--goal: no figure {figure!r}; known are {', '.join(FIGURES)}{did_you_mean(figure, FIGURES)}")
    if sign not in _OPERATORS:
        raise InputError(f"--goal: {part.strip()!r}: a figure is limited with <, <= or ==, not with {sign}")
    try:
        limit = float(match["limit"])
    except ValueError:
        limit = math.nan
    if not math.isfinite(limit) or limit < 0 or (limit == 0 and sign == "<"):
        raise InputError(f"--goal: {part.strip()!r}: {match['limit']!r} is no limit that can be kept; {expected}")
    if sign == "==" and figure not in DETECTIONS:
        raise InputError(f"--goal: {part.strip()!r}: == is for counts of boxes; limit {figure} with < or <=")
    return Condition(figure, sign, limit)
