"""A layer as a row of text: the columns that Markdown and notebooks share."""

from __future__ import annotations

from cp_debug.bisect.result import LayerRow
from cp_debug.reports.numbers import number

COLUMNS = ("#", "layer", "op", "max |Δ|", "rel. L2", "introduced", "expected", "excess", "verdict")


def cells(row: LayerRow) -> list[str]:
    """One text for each of ``COLUMNS``."""
    figures = (row.stats.max_abs, row.stats.rel_l2)
    replayed = (getattr(row.replay, name, None) for name in ("introduced", "expected", "excess"))
    return [str(row.index), row.name, row.op, *map(number, (*figures, *replayed)), row.verdict]
