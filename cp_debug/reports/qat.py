"""Results of fine-tuning, in a terminal."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from rich.console import RenderableType
from rich.text import Text

from cp_debug.quantization.qat import QatResult
from cp_debug.reports.numbers import fixed
from cp_debug.reports.sheet import Column, Row, Sheet
from cp_debug.reports.sheet_terminal import Terminal

ENDED = {
    "steps": "all steps done",
    "patience": "stopped early: nothing better any more",
    "interrupted": "interrupted; --resume goes on",
}


def render(result: QatResult, criterion: str, output: Path) -> Iterator[RenderableType]:
    """Every validation, the best one marked, and the file written."""
    best, value = result.best
    columns = (
        Column("step", "number", show=str),
        Column("training loss", "number", show=lambda loss: fixed(loss)),
        Column(f"held-out {criterion}", "number", show=lambda value: fixed(_shown(value, criterion))),
    )
    rows = [Row(values, "strong" if values[0] == best else "") for values in result.history]
    yield Terminal(Sheet(columns, rows, ruled=True))
    start = _shown(result.history[0][2], criterion)
    yield Text(
        f"{ENDED[result.ended]}; held-out {criterion} {fixed(start)} → {fixed(_shown(value, criterion))} at step {best}"
    )
    yield Text(str(output), style="bold")


def _shown(value: float, criterion: str) -> float:
    """mAP is minimized as its negative."""
    return -value if criterion == "map" else value
