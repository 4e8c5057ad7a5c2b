"""NaN and Inf in the values that a run compared: where they are born on each side, and whether an output holds them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol, TypeVar

from cp_debug.probes.statistics import TensorStats


class ComparedRow(Protocol):
    """Part of a result's row that is read here."""

    index: int
    name: str
    op: str
    stats: TensorStats


_Row = TypeVar("_Row", bound=ComparedRow)
SIDES = ("reference", "test")
KINDS = ("nan", "inf")
_WRITTEN = {"nan": "NaN", "inf": "Inf"}


def count(row: ComparedRow, kind: str, side: str) -> int:
    """Number of elements that are NaN (``nan``) or Inf (``inf``) on the ``reference`` or the ``test`` side."""
    stats = row.stats
    counts = {
        ("nan", "reference"): stats.nan_ref,
        ("nan", "test"): stats.nan_test,
        ("inf", "reference"): stats.inf_ref,
        ("inf", "test"): stats.inf_test,
    }
    return counts[kind, side]


def undecided(row: ComparedRow) -> bool:
    """Whether nothing can be said of an output although both sides agree: it holds NaN on a side, or no number at all.

    Inf of one sign at the same places is agreement, where the rest is finite: masks and scores left out are such.
    """
    holds_nan = any(count(row, "nan", side) for side in SIDES)
    return holds_nan or row.stats.mismatched > 0 or (row.stats.count > 0 and bool(row.stats.nothing_compared))


def nonfinite_origins(rows: Sequence[ComparedRow]) -> Iterator[str]:
    """A phrase for each kind and side, equal ones together: the first value, in execution order, that holds any, or
    the constant or node behind it from which they come."""
    for kind in KINDS:
        places: dict[str, list[str]] = {}
        for side in SIDES:
            first = first_with(rows, kind, side)
            if first is not None:
                told, which = getattr(first, "nonfinite_from", ()), f"{kind} {side}: "
                if known := [text.removeprefix(which) for text in told if text.startswith(which)]:
                    places.setdefault(known[0], []).append(side)
                    continue
                verbs = {"input": "comes in with the input", "": "is first in"}  # captures tell no operators
                verb = verbs.get(first.op, "first appears at")
                op = "" if first.op in verbs else f" ({first.op})"
                # A row that stands for several nodes may know in which of them the test's are born.
                inside = getattr(getattr(first, "replay", None), "nonfinite_in", "") if side == "test" else ""
                places.setdefault(f"{verb} {inside or f'{first.name}{op}'}", []).append(side)
        for place, sides in places.items():
            on = "on both sides" if len(sides) == len(SIDES) else f"in the {sides[0]}"
            yield f"{_WRITTEN[kind]} {place} {on}"


def first_with(rows: Sequence[_Row], kind: str, side: str) -> _Row | None:
    """The first row, in execution order, that holds NaN (``nan``) or Inf (``inf``) on a side."""
    return next((row for row in sorted(rows, key=lambda r: r.index) if count(row, kind, side)), None)


def nan_without_trace(rows: Sequence[ComparedRow], outputs: Sequence[ComparedRow]) -> Iterator[str]:
    """A sentence on NaN that both sides compute and no output shows: masked, or replaced by a number later on."""
    if any(count(row, "nan", side) for row in outputs for side in SIDES):
        return
    if any(all(count(row, "nan", side) for side in SIDES) for row in rows):
        born = "; ".join(phrase for phrase in nonfinite_origins(rows) if phrase.startswith(_WRITTEN["nan"]))
        yield f"{born}; it reaches no output"


def outputs_say(outputs: Sequence[ComparedRow]) -> str:
    """The outputs that hold NaN or Inf, the worst first; empty where all are finite."""
    strange = [(sum(count(row, k, side) for k in KINDS for side in SIDES), row) for row in outputs]
    ranked = sorted((item for item in strange if item[0]), key=lambda item: -item[0])
    if not ranked:
        return ""
    row = ranked[0][1]
    sides = [f"{side} {', '.join(_held(row, side)) or 'none'}" for side in SIDES]
    more = f", and {len(ranked) - 1} more outputs" if len(ranked) > 1 else ""
    return f"output {row.name} is not finite ({'; '.join(sides)}; of {row.stats.count} elements){more}"


def _held(row: ComparedRow, side: str) -> list[str]:
    return [f"{number} {_WRITTEN[kind]}" for kind in KINDS if (number := count(row, kind, side))]
