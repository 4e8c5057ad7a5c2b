"""Latency and memory of backends in a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from cp_debug.deploy.bench import WHOLE, BackendBench
from cp_debug.reports.sheet import Column, Row, Sheet


def latency_table(results: Sequence[BackendBench], title: str) -> Sheet:
    """All backends in one table, a block each."""
    columns = (
        Column("backend", "name"),
        Column("part", "name"),
        Column("mean ms", "number", show=_milliseconds),
        Column("p50", "number", leave_out=3, show=_milliseconds),
        Column("p95", "number", leave_out=2, show=_milliseconds),
        Column("p99", "number", leave_out=4, show=_milliseconds),
        Column("× reference", "number", leave_out=1, show=lambda ratio: f"{ratio:.2f}"),
        Column("memory MiB", "number", leave_out=5, show=lambda size: f"{size:.0f}"),
    )
    reference = {latency.part: latency.figures()["mean"] for latency in results[0].parts}
    rows = []
    for result in results:
        name = f"{result.backend.spec} (emulated)" if result.backend.emulated else result.backend.spec
        for place, latency in enumerate(result.parts):
            figures, last = latency.figures(), latency.part == WHOLE
            base = reference.get(latency.part)
            ratio = figures["mean"] / base if base else ""
            values = ["" if place else name, latency.part, *figures.values(), ratio]
            rows.append(Row([*values, result.memory_mib if last else ""], "strong" if last else "", ends=last))
    return Sheet(columns, rows, title, ruled=True)


def _milliseconds(value: float) -> str:
    return f"{value:.2f}"
