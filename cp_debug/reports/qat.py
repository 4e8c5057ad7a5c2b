"""Results of fine-tuning, in a terminal."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

from rich import box
from rich.console import RenderableType
from rich.text import Text

from cp_debug.quantization.qat import QatResult
from cp_debug.reports.safe_table import Table

ENDED = {
    "steps": "all steps done",
    "patience": "stopped early: nothing better any more",
    "interrupted": "interrupted; --resume goes on",
}


def render(result: QatResult, criterion: str, output: Path) -> Iterator[RenderableType]:
    """Every validation, the best one marked, and the file written."""
    best, value = result.best
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for header in ("step", "training loss", f"held-out {criterion}"):
        table.add_column(header, justify="right")
    for step, loss, validation in result.history:
        loss_text = "–" if math.isnan(loss) else f"{loss:.4f}"
        table.add_row(
            str(step), loss_text, f"{_shown(validation, criterion):.4f}", style="bold" if step == best else None
        )
    yield table
    start = _shown(result.history[0][2], criterion)
    yield Text(
        f"{ENDED[result.ended]}; held-out {criterion} {start:.4f} → {_shown(value, criterion):.4f} at step {best}"
    )
    yield Text(str(output), style="bold")


def _shown(value: float, criterion: str) -> float:
    """mAP is minimized as its negative."""
    return -value if criterion == "map" else value
