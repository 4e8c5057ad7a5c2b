"""A quantized model in a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from rich.console import RenderableType
from rich.text import Text

from cp_debug.deploy.quantize_output import PtqResult
from cp_debug.quantization.checkpoint import FILE
from cp_debug.quantization.toggles import QuantizerRow
from cp_debug.reports.numbers import number
from cp_debug.reports.sheet import Cell, Column, Sheet
from cp_debug.reports.sheet_terminal import Terminal

_OUTPUT = ".output_quantizer"
_LOW = 10.0
"""SQNR of an output, in dB, below which the next step is shown."""


def quantizers(rows: Iterable[QuantizerRow]) -> Iterator[RenderableType]:
    """A row for each quantizer; quantizers of outputs, which are never on, are counted below."""
    columns = (
        Column("quantizer", "name"),
        Column("bits", "number", leave_out=2, show=str),
        Column("axis", "number", leave_out=3, show=str),
        Column("amax", "number", leave_out=1),
        Column(""),
    )
    shown = []
    on = off = outputs = 0
    for row in rows:
        if row.name.endswith(_OUTPUT) and not row.enabled:
            outputs += 1
            continue
        on, off = on + row.enabled, off + (not row.enabled)
        state = Cell("on", "good") if row.enabled else Cell(row.why, "quiet")
        shown.append((row.name, row.bits, row.axis, _amax(row), state))
    yield Terminal(Sheet(columns, shown, ruled=True))
    yield Text(f"{on} quantizers on, {off} off; outputs ({outputs}) are quantized by what reads them", style="dim")


def render(result: PtqResult) -> Iterator[RenderableType]:
    """Quantizers, their cost at the outputs, and the files written."""
    for name, component in result.components.items():
        yield Text(name, style="bold")
        if component.module is not None:
            yield from quantizers(result.quantizers(name))
            for note in result.notes(name):
                yield Text(note, style="yellow")
        else:
            yield Text(
                f"{len(component.scales.layers)} layers, {len(component.scales.residual_adds)} residual additions"
            )
        yield Text()
    columns = (Column("output", "name"), Column("SQNR", "number", unit="dB", show=lambda value: f"{value:.1f}"))
    yield Terminal(Sheet(columns, list(result.sqnr.items()), ruled=True))
    yield Text(
        f"{result.method}, calibrated on {result.calibrated_on}; SQNR: INT8 against FP32 on {result.measured_on}"
    )
    for file in result.files:
        yield Text(str(file), style="bold")
    checkpoint = next((file for file in result.files if file.name == FILE), None)
    if checkpoint and min(result.sqnr.values()) < _LOW:
        command = f"cpdebug quantize sensitivity MODEL --from {checkpoint}"
        yield Text(f"outputs below {_LOW:g} dB; which layers cost most: {command}", style="yellow")


def _amax(row: QuantizerRow) -> str:
    if isinstance(row.amax, tuple):
        return f"{number(row.amax[0])} … {number(row.amax[1])}"
    return number(row.amax)
