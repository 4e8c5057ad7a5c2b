"""A model in FP8, a block-scaled type or INT4, in a terminal."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import RenderableType
from rich.text import Text

from cp_debug.deploy.quantize_narrow import NarrowResult
from cp_debug.reports.numbers import number
from cp_debug.reports.quantization import sqnr_table
from cp_debug.safe_text import amount


def render(result: NarrowResult) -> Iterator[RenderableType]:
    """Layers, their cost at the outputs, the check against the emulation, and the files written."""
    for name, component in result.components.items():
        yield Text(name, style="bold")
        text = f"{amount(len(component.layers), 'layer')} in {result.precision}, {len(component.left_out)} left in FP32"
        if component.error is not None:
            text += f"; the file on {component.checked_by} is {number(component.error)} (rel. L2) from the emulation"
        yield Text(text)
        for layer, why in component.left_out.items():
            yield Text(f"  {layer}: {why}", style="dim")
    yield from sqnr_table(result.sqnr)
    how = f"{result.method}, calibrated on {result.calibrated_on}" if result.method else "no scale is calibrated"
    yield Text(f"{how}; SQNR: {result.precision} against FP32 on {result.measured_on}")
    for note in result.notes:
        yield Text(note, style="yellow")
    for file in result.files:
        yield Text(str(file), style="bold")
