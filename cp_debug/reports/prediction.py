"""A prediction in a terminal: the layers that suffer most, the outputs, the detections, and what to keep."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import RenderableType
from rich.text import Text

from cp_debug.mixed_precision.result import arguments
from cp_debug.prediction.result import Interval, PredictedLayer, Prediction
from cp_debug.reports.mixed_precision import commands
from cp_debug.reports.numbers import number
from cp_debug.reports.sheet import Column, Sheet
from cp_debug.reports.sheet_terminal import Terminal

MOST = 20
"""Layers shown unless all are asked for."""


def render(result: Prediction, *, show_all: bool = False) -> Iterator[RenderableType]:
    """The parts of a prediction, in the order in which they are read."""
    yield Text.assemble((result.model, "bold"), f" · {result.precision} on {result.target}, predicted by emulation")
    for i, (name, says) in enumerate(result.kernels.items()):
        yield Text(f"  {name}: {says}{' (assumed most likely)' if not i else ''}", "dim")
    layers = [layer for layer in result.layers if layer.introduced is not None]
    worst = sorted(layers, key=_severity, reverse=True)[:MOST]
    yield Terminal(layer_table([layer for layer in layers if show_all or layer.keep or layer in worst]))
    if not show_all and len(layers) > MOST:
        yield Text(f"{len(layers)} layers; those that introduce most are shown, --all shows the rest", "dim")
    if result.outputs:
        yield Terminal(output_table(result))
    for kernel, change in result.detections.items():
        yield Text(f"detections, {kernel}: {change}")
    if result.largest_changes:
        units = {"center": "m in centre", "size": "m in size", "yaw": "rad in yaw", "score": "in score"}
        parts = [f"{i.low:.2g} to {i.high:.2g} {units[field]}" for field, i in result.largest_changes.items()]
        yield Text(f"largest change of a box, other kernels included: {', '.join(parts)}")
    if result.weak:
        yield Text(f"{result.target} may leave any layer in FP32: then it introduces less than shown here", "dim")
    for note in result.notes:
        yield Text(f"note: {note}", style="yellow")
    keeps_any = any(layer.keep for layer in result.layers)
    yield Text(result.verdict, style="yellow" if keeps_any else "green")
    if result.goal:
        says = f"{result.goal} holds on the emulator" if result.reached else f"{result.goal} was not reached"
        figures = ", ".join(f"{name} {number(value)}" for name, value in result.measured.items())
        says += f": {figures} over all outputs ({result.measured_by})" if figures else ""
        yield Text(says, style="green" if result.reached else "red")
    if keeps_any and result.precision != "int8":
        told = arguments(result.keep, result.precision, result.named, weak=result.weak)
        yield from commands(told, result.named.command(result.model))


def layer_table(layers: list[PredictedLayer]) -> Sheet:
    """A row for each layer."""

    def keep(layer: PredictedLayer) -> str:
        return layer.keep or (layer.range and f"({layer.range} in FP16's range)")

    columns = [
        Column("layer", "name", of=lambda layer: layer.name),
        Column("operators", "mark", 5, of=lambda layer: "+".join(layer.ops[:4]) + ("…" if len(layer.ops) > 4 else "")),
        Column("introduces", "number", of=lambda layer: layer.introduced.expected),
        Column("introduces from … to", "number", leave_out=3, of=lambda layer: _ends(layer.introduced)),
        Column("error", "number", of=lambda layer: layer.error.expected),
        Column("from … to", "number", leave_out=2, of=lambda layer: _ends(layer.error)),
        Column("largest", "number", leave_out=4, of=lambda layer: layer.largest),
        *([Column("keep in FP32", leave_out=1, of=keep)] if any(map(keep, layers)) else []),
    ]
    return Sheet.of(columns, layers, tone=lambda layer: "worst" if layer.keep else "")


def output_table(result: Prediction) -> Sheet:
    """A row for each output."""
    columns = (
        Column("output", "name", of=lambda output: f"{output.component}/{output.name}"),
        Column("error", "number", of=lambda output: output.error.expected),
        Column("from … to", "number", of=lambda output: _ends(output.error)),
    )
    return Sheet.of(columns, result.outputs)


def _ends(interval: Interval) -> str:
    return f"{number(interval.low)} … {number(interval.high)}"


def _severity(layer: PredictedLayer) -> float:
    return layer.introduced.high if layer.introduced is not None else 0.0
