"""The small tables of the HTML report: worst elements, changed detections, settings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cp_debug.backends.base import RunRecord
from cp_debug.detection.changes import MOVED_BOX
from cp_debug.reports.birdseye import SceneView
from cp_debug.reports.evidence import Evidence
from cp_debug.reports.numbers import signed
from cp_debug.reports.sheet import Cell, Column, Row, Sheet

MOST_CHANGES = 24


def worst_table(item: Evidence, reference: str, test: str) -> Sheet:
    """The elements of one layer with the largest error: index and value on each side."""
    columns = [Column(title, "number", show=lambda value: f"{value:.7g}") for title in (reference, test, "oracle")]
    rows = [(f"[{', '.join(map(str, each.index))}]", each.reference, each.test, each.exact) for each in item.worst]
    return Sheet([Column("index", "mark"), *columns], rows, "Worst elements")


def changes_table(view: SceneView) -> Sheet:
    """Detections that changed most between two backends."""
    columns = (
        Column("object", "mark"),
        Column("change", "mark"),
        Column("score", "number", show=lambda change: signed(change, 3).replace("-", "−")),
        Column("shift", "number", unit="m", show=lambda distance: f"{distance:.2f}"),
    )
    rows = [
        (
            name,
            Cell(change.kind, badge=change.kind),
            change.score,
            change.distance if change.kind == MOVED_BOX else None,
        )
        for change, name in view.changed[:MOST_CHANGES]
    ]
    return Sheet(columns, rows)


def settings_table(records: Sequence[RunRecord], *, differing: bool = False) -> Sheet:
    """Every setting and version on each backend, those that differ first; ``differing``: no others."""
    rows = [
        Row((name, *("–" if value is None else str(value) for value in values)), "differs" if differs else "")
        for name, values, differs in setting_rows(records)
        if differs or not differing
    ]
    return Sheet([Column("setting"), *(Column(record.spec) for record in records)], rows, "Settings")


def setting_rows(records: Sequence[RunRecord]) -> list[tuple[str, list[Any], bool]]:
    """(name, value on each backend or None, whether two backends that have it differ), those that differ first."""
    rows = []
    for field in ("precision", "device"):
        rows.append((field, [getattr(record, field) for record in records]))
    for table in ("versions", "settings"):
        names = dict.fromkeys(name for record in records for name in getattr(record, table))
        rows.extend((name, [getattr(record, table).get(name) for record in records]) for name in names)
    marked = [(n, values, len({str(v) for v in values if v is not None}) > 1) for n, values in rows]
    return sorted(marked, key=lambda row: not row[2])
