"""Responsibility of the graph optimizer, in a terminal."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from rich.console import RenderableType
from rich.text import Text

from cp_debug.reports.numbers import number
from cp_debug.reports.sheet import Column, Sheet
from cp_debug.reports.sheet_terminal import Terminal

if TYPE_CHECKING:
    from cp_debug.bisect.optimizer_blame import OptimizerBlame, Rewrite

SHOWN = 4
"""Rewritten places shown for each optimizer; the JSON has all."""


def render_optimizer_blame(blame: OptimizerBlame) -> Iterator[RenderableType]:
    """One line of verdict; with responsible optimizers, a table of their effects."""
    runs = f"{blame.runs} runs"
    if blame.level is None:
        yield Text(f"optimizer: its final outputs are those of the unoptimized program ({runs})", "green")
        return
    size = number(blame.difference_with)
    if not blame.responsible:
        yield Text(
            f"optimizer: final outputs differ by {size} (rel. L2), whatever is disabled of "
            f"{', '.join(blame.active)} ({runs})",
            "yellow",
        )
        return
    names = ", ".join(culprit.optimizer for culprit in blame.responsible)
    remaining = number(blame.difference_without)
    begins = " " if blame.level == "all" and blame.fix else f"; the difference begins at level {blame.level} "
    yield Text.assemble(
        (f"optimizer: {names}", "bold yellow"),
        f": final outputs differ by {size} (rel. L2) from the unoptimized program's, by {remaining} when disabled"
        f"{begins}({runs})",
    )
    rows = []
    for culprit in blame.responsible:
        places = [_place(rewrite) for rewrite in culprit.rewrites[:SHOWN]]
        if len(culprit.rewrites) > SHOWN:
            places.append(f"… and {len(culprit.rewrites) - SHOWN} more")
        rows.append((culprit.optimizer, culprit.difference, tuple(places)))
    columns = (Column("optimizer", "name"), Column("rel. L2 alone", "number"), Column("rewrites"))
    if any(culprit.rewrites for culprit in blame.responsible):
        yield Terminal(Sheet(columns, rows))
    names_told = [culprit.optimizer for culprit in blame.responsible]
    yield Text(f"fix: {blame.fix or f'InferenceSession(…, disabled_optimizers={names_told})'}")


def _place(rewrite: Rewrite) -> str:
    return f"{' + '.join(rewrite.original)} → {' + '.join(rewrite.operators)}"
