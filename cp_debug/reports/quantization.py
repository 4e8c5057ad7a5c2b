"""A quantized model in a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from rich import box
from rich.console import RenderableType
from rich.text import Text

from cp_debug.deploy.quantize_output import PtqResult
from cp_debug.quantization.checkpoint import FILE
from cp_debug.quantization.toggles import QuantizerRow
from cp_debug.reports.numbers import number
from cp_debug.reports.safe_table import Table

_OUTPUT = ".output_quantizer"
_LOW = 10.0
"""SQNR of an output, in dB, below which the next step is shown."""


def quantizers(rows: Iterable[QuantizerRow]) -> Iterator[RenderableType]:
    """A row for each quantizer; quantizers of outputs, which are never on, are counted below."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("quantizer", no_wrap=True)
    for header in ("bits", "axis", "amax"):
        table.add_column(header, justify="right")
    table.add_column("")
    on = off = outputs = 0
    for row in rows:
        if row.name.endswith(_OUTPUT) and not row.enabled:
            outputs += 1
            continue
        on, off = on + row.enabled, off + (not row.enabled)
        axis = "–" if row.axis is None else str(row.axis)
        state = Text("on", "green") if row.enabled else Text(row.why, "dim")
        table.add_row(row.name, str(row.bits), axis, _amax(row), state)
    yield table
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
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("output", no_wrap=True)
    table.add_column("SQNR, dB", justify="right")
    for output, value in result.sqnr.items():
        table.add_row(output, f"{value:.1f}")
    yield table
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
