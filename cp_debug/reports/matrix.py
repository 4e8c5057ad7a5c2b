"""Several backends side by side: a matrix of layers and backends, and findings told once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cp_debug.bisect.finding import Finding
from cp_debug.bisect.result import DIVERGENT, GUILTY, SHAPE, LayerRow, TestResult
from cp_debug.reports.numbers import number
from cp_debug.reports.verdict_line import side_by_side

MOST_LAYERS = 400
"""Layers that the matrix shows: accused ones first, then those of the highest excess."""


@dataclass(frozen=True)
class MatrixLine:
    """One layer on every backend."""

    name: str
    op: str
    rows: tuple[LayerRow | None, ...]
    """Row of each test; None where the test did not compare it."""

    @property
    def accused(self) -> bool:
        """Whether the layer is more than inherited error on some backend."""
        return any(row is not None and row.verdict in (GUILTY, SHAPE, DIVERGENT) for row in self.rows)

    @property
    def excess(self) -> float:
        """The highest excess on any backend; 0 where none is known."""
        known = [row.replay.excess for row in self.rows if row and row.replay and row.replay.excess is not None]
        return max(known, default=0.0)


def matrix(tests: Sequence[TestResult]) -> list[MatrixLine]:
    """The layers in execution order, at most ``MOST_LAYERS``; empty for a single test."""
    if len(tests) < 2:
        return []
    places: dict[tuple[str, str], list[LayerRow | None]] = {}
    for i, test in enumerate(tests):
        for row in test.rows:
            places.setdefault((row.component, row.onnx), [None] * len(tests))[i] = row
    lines = []
    for rows in places.values():
        first = next(row for row in rows if row is not None)
        lines.append((first.index, MatrixLine(first.name, first.op, tuple(rows))))
    chosen = sorted(lines, key=lambda line: (not line[1].accused, -line[1].excess))[:MOST_LAYERS]
    return [line for _, line in sorted(chosen, key=lambda line: line[0])]


def tone(row: LayerRow | None) -> str:
    """Class of a cell: what the layer did on that backend, from the excess where it is known."""
    if row is None:
        return "muted"
    if row.verdict in (GUILTY, SHAPE, DIVERGENT):
        return row.verdict
    if side_by_side(row):
        return "gained"
    excess = row.replay.excess if row.replay else None
    return "" if excess is None else "ok" if excess <= 1 else "inherited"


def shown(row: LayerRow | None) -> str:
    """Text of a cell: what is not finite, else the excess, with a mark where the layer is accused."""
    if row is None:
        return "–"
    mark = "✗ " if row.verdict in (GUILTY, SHAPE, DIVERGENT) else ""
    if row.verdict in (SHAPE, DIVERGENT):
        return mark + row.verdict
    return mark + (side_by_side(row) or number(row.replay.excess if row.replay else None))


def told_before(tests: Sequence[TestResult], finding: Finding) -> int | None:
    """The place of an earlier test with the same finding: cause and layers are equal. None for a new one."""
    for i, test in enumerate(tests):
        for other in test.findings:
            if other is finding:
                return None
            if (other.cause, other.layers) == (finding.cause, finding.layers):
                return i
    return None
