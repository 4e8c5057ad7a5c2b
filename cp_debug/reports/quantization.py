"""A quantized model in a terminal: INT8, and FP8, a block-scaled type or INT4; and how fine-tuning went."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from rich.console import RenderableType
from rich.text import Text

from cp_debug.deploy.quantize_narrow import NarrowResult
from cp_debug.deploy.quantize_output import PtqResult
from cp_debug.quantization.checkpoint import FILE
from cp_debug.quantization.qat import QatResult
from cp_debug.quantization.record import QuantizerRow
from cp_debug.reports.numbers import fixed, number
from cp_debug.reports.sheet import Cell, Column, Row, Sheet
from cp_debug.reports.sheet_terminal import Terminal
from cp_debug.safe_text import amount

_INPUT, _WEIGHT = "input_quantizer", "weight_quantizer"
_OUTPUT = ".output_quantizer"
_LOW = 10.0
"""SQNR of an output, in dB, below which the next step is shown."""


def quantizers(rows: Iterable[QuantizerRow]) -> Iterator[RenderableType]:
    """A row for each quantizer; quantizers of outputs, which are never on, are counted below."""
    columns = (
        Column("quantizer", "name", of=lambda row: row.name),
        Column("bits", "number", leave_out=2, show=str, of=lambda row: row.bits),
        Column("axis", "number", leave_out=3, show=str, of=lambda row: row.axis),
        Column("amax", "number", leave_out=1, of=_amax),
        Column("", of=lambda row: Cell("on", "good") if row.enabled else Cell(row.why, "quiet")),
    )
    every = list(rows)
    shown = [row for row in every if row.enabled or not row.name.endswith(_OUTPUT)]
    yield Terminal(Sheet.of(columns, shown, ruled=True))
    on, outputs = sum(row.enabled for row in shown), len(every) - len(shown)
    says = f"{on} quantizers on, {len(shown) - on} off; outputs ({outputs}) are quantized by their readers"
    yield Text(says, style="dim")


def layers(rows: Iterable[QuantizerRow]) -> Iterator[RenderableType]:
    """A row for each layer: the ranges of what it reads and of its weights, or why it stays in FP32."""
    columns = (
        Column("layer", "name"),
        Column("input amax", "number"),
        Column("weights' amax", "number"),
        Column("axis", "number", leave_out=3, show=str),
        Column("bits", "number", leave_out=2, show=str),
        Column(""),
    )
    by_layer: dict[str, dict[str, QuantizerRow]] = {}
    for row in rows:
        layer, _, kind = row.name.rpartition(".")
        by_layer.setdefault(layer, {})[kind] = row
    shown: list[Row] = []
    for layer, parts in by_layer.items():
        inputs, weight = parts.get(_INPUT), parts.get(_WEIGHT)
        both = [part for part in (inputs, weight) if part is not None]
        if both:
            amax = [None if part is None else _amax(part) for part in (inputs, weight)]
            axis = next((part.axis for part in reversed(both)), None)
            shown.append(Row((layer, *amax, axis, both[0].bits, _state(both))))
    yield Terminal(Sheet(columns, shown, ruled=True))
    on = sum(row.enabled for parts in by_layer.values() for row in parts.values())
    yield Text(f"{on} quantizers on in {len(shown)} layers; outputs are quantized by their readers", style="dim")


def _state(parts: Sequence[QuantizerRow]) -> Cell:
    """On, or why not; of one alone where the input and the weights are not alike."""
    states = ["on" if part.enabled else part.why for part in parts]
    if len(set(states)) == 1:
        return Cell(states[0], "good" if parts[0].enabled else "quiet")
    named = (
        f"{'weights' if part.name.endswith(_WEIGHT) else 'input'} {s}" for part, s in zip(parts, states, strict=True)
    )
    return Cell(", ".join(named), "note")


def render(result: PtqResult) -> Iterator[RenderableType]:
    """Quantizers, their cost at the outputs, and the files written."""
    for name, component in result.components.items():
        yield Text(name, style="bold")
        if component.module is not None:
            yield from layers(result.quantizers(name))
            for note in result.notes(name):
                yield Text(note, style="yellow")
        else:
            yield Text(
                f"{len(component.scales.layers)} layers, {len(component.scales.residual_adds)} residual additions"
            )
        yield Text()
    yield from _sqnr_table(result.sqnr)
    yield Text(
        f"{result.method}, calibrated on {result.calibrated_on}; SQNR: INT8 against FP32 on {result.measured_on}"
    )
    for file in result.files:
        yield Text(str(file), style="bold")
    checkpoint = next((file for file in result.files if file.name == FILE), None)
    if checkpoint and any(value < _LOW for value in result.sqnr.values()):
        command = f"cpdebug quantize sensitivity MODEL --from {checkpoint}"
        yield Text(f"outputs below {_LOW:g} dB; which layers cost most: {command}", style="yellow")


def render_narrow(result: NarrowResult) -> Iterator[RenderableType]:
    """Layers, their cost at the outputs, the check against the emulation, and the files written."""
    for name, component in result.components.items():
        yield Text(name, style="bold")
        text = f"{amount(len(component.layers), 'layer')} in {result.precision}, {len(component.left_out)} left in FP32"
        if component.error is not None:
            text += f"; the file on {component.checked_by} is {number(component.error)} (rel. L2) from the emulation"
        yield Text(text)
        for layer, why in component.left_out.items():
            yield Text(f"  {layer}: {why}", style="dim")
    yield from _sqnr_table(result.sqnr)
    how = f"{result.method}, calibrated on {result.calibrated_on}" if result.method else "no scale is calibrated"
    yield Text(f"{how}; SQNR: {result.precision} against FP32 on {result.measured_on}")
    for note in result.notes:
        yield Text(note, style="yellow")
    for file in result.files:
        yield Text(str(file), style="bold")


def _sqnr_table(sqnr: Mapping[str, float]) -> Iterator[RenderableType]:
    """A row for each output, with its SQNR where there is one."""
    columns = (Column("output", "name"), Column("SQNR", "number", unit="dB", show=lambda value: fixed(value, 1)))
    measured = {name: None if math.isnan(value) else value for name, value in sqnr.items()}
    yield Terminal(Sheet(columns, list(measured.items()), ruled=True))
    if nothing := [name for name, value in measured.items() if value is None]:
        says = "nothing to measure: the outputs have no finite number except 0 on either side; try other inputs"
        yield Text(f"{', '.join(nothing)}: {says}", style="yellow")


def _amax(row: QuantizerRow) -> str:
    if isinstance(row.amax, tuple):
        return f"{number(row.amax[0])} … {number(row.amax[1])}"
    return number(row.amax)


ENDED = {
    "steps": "all steps done",
    "patience": "stopped early: nothing better any more",
    "interrupted": "interrupted; --resume goes on",
}


def render_qat(result: QatResult, criterion: str, output: Path) -> Iterator[RenderableType]:
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
