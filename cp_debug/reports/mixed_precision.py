"""A mixed-precision search, and a prediction, in a terminal: layers, outputs, arguments for other tools."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from rich.console import RenderableType
from rich.text import Text

from cp_debug.mixed_precision.result import arguments, deploy_fragment
from cp_debug.prediction.result import Interval, PredictedLayer, Prediction
from cp_debug.reports.numbers import number
from cp_debug.reports.numbers import share as share_of
from cp_debug.reports.sheet import Column, Row, Sheet
from cp_debug.reports.sheet_terminal import Terminal
from cp_debug.safe_text import amount

if TYPE_CHECKING:
    from cp_debug.mixed_precision.result import MixedPrecisionResult


TOOLS = {
    "polygraphy": "polygraphy (TensorRT 8 and 10)",
    "trtexec": "trtexec (TensorRT 8 and 10)",
    "autocast": "ModelOpt AutoCast",
    "modelopt": "ModelOpt quantization",
}


def render(result: MixedPrecisionResult) -> Iterator[RenderableType]:
    """The parts of a result, in the order in which they are read."""
    backend = f"{result.backend} (emulated)" if result.emulated else result.backend
    yield Text.assemble((result.model, "bold"), f" · {result.reference} → {backend} · goal {result.goal}")
    if result.kept:
        yield Terminal(kept_table(result))
    yield Text("the best trials: none has both fewer layers and a smaller error", style="italic")
    yield Terminal(pareto_table(result))
    for note in result.notes:
        yield Text(f"note: {note}", style="yellow")
    style = "bold red" if not result.reached else ("green" if result.minimal or not result.kept else "yellow")
    yield Text(result.verdict, style=style)
    emulated = sum(trial.emulated for trial in result.trials)
    trials = f"{amount(len(result.trials) - emulated, 'trial')} on {backend}"
    if not result.emulated:
        trials += f" ({amount(result.builds, 'build')} in this run), {emulated} on the emulator"
    yield Text(f"{trials}; {result.seconds:.1f} s", style="dim")
    if result.reached:
        yield from tool_arguments(result)


def kept_table(result: MixedPrecisionResult) -> Sheet:
    """A row for each layer."""
    figure = next(iter(result.best.measured.figures), "rel_l2")
    columns = [
        Column("layer", "name", of=lambda layer: layer.fusion_group.name),
        Column("ONNX nodes", "name", leave_out=2, of=lambda layer: layer.fusion_group.nodes),
        Column("operators", "mark", leave_out=3, of=lambda layer: layer.ops),
        Column("introduces", "number", of=lambda layer: layer.introduced),
        Column("share", "number", show=share_of, of=lambda layer: layer.share),
        Column(f"{figure} without it", "number", leave_out=1, of=lambda layer: layer.without.get(figure)),
    ]
    if any(layer.fusion_group.engine_layer for layer in result.kept):
        columns.append(Column("engine layer", leave_out=4, of=lambda layer: layer.fusion_group.engine_layer))
    return Sheet.of(columns, result.kept)


def pareto_table(result: MixedPrecisionResult) -> Sheet:
    """The trials that no other beats in both, layers and error."""
    figures = list(result.baseline.measured.figures or result.best.measured.figures)
    timed = any(trial.latency is not None for trial in result.pareto)
    columns = [Column("layers kept", "mark"), *(Column(name, "number") for name in figures)]
    if timed:
        columns.append(Column("latency", "number", show=lambda seconds: f"{seconds * 1e3:.2f} ms"))
    rows = []
    for trial in result.pareto:
        chosen = trial.nodes == result.best.nodes
        mark = ("← fewest layers that reach the goal" if result.reached else "← closest") if chosen else ""
        values = [f"{trial.layers} of {result.layers}", *(trial.measured.figures[name] for name in figures)]
        rows.append(Row([*values, *([trial.latency] if timed else []), mark], "strong" if chosen else ""))
    return Sheet([*columns, Column("")], rows)


def tool_arguments(result: MixedPrecisionResult) -> Iterator[RenderableType]:
    """The set of kept layers as arguments of other tools."""
    yield from commands(result.arguments, result.named.command(result.model))
    if result.named.unrolled and any(result.keep.values()):
        yield Text("other tools cannot keep these layers: they are called as If, Loop and Scan ran them")
    elif any(nodes and component not in result.named.files for component, nodes in result.keep.items()):
        yield Text("other tools cannot address nodes without a name; use the file that --onnx writes")
    if fragment := deploy_fragment(result.keep, result.precision, result.named):
        yield Text("configuration of cpdebug deploy:", style="bold")
        yield Text(fragment.rstrip(), no_wrap=True, overflow="ignore")


def commands(of_components: Mapping[str, Mapping[str, str]], export: str) -> Iterator[RenderableType]:
    """Command lines by component and tool; ``export``: the command that writes the files that they read."""
    if export and of_components:
        yield Text("the files with these names:", style="bold")
        yield Text(export, no_wrap=True, overflow="ignore")
    for component, tools in of_components.items():
        for tool, line in tools.items():
            yield Text(f"{TOOLS[tool]}, {component}:", style="bold")
            yield Text(line, no_wrap=True, overflow="ignore")


MOST_PREDICTED = 20
"""Layers shown unless all are asked for."""


def render_prediction(result: Prediction, *, show_all: bool = False) -> Iterator[RenderableType]:
    """The parts of a prediction, in the order in which they are read."""
    yield Text.assemble((result.model, "bold"), f" · {result.precision} on {result.target}, predicted by emulation")
    for i, (name, says) in enumerate(result.kernels.items()):
        yield Text(f"  {name}: {says}{' (assumed most likely)' if not i else ''}", "dim")
    layers = [layer for layer in result.layers if layer.introduced is not None]
    worst = sorted(layers, key=lambda layer: -layer.introduced.high if layer.introduced else 0.0)[:MOST_PREDICTED]
    yield Terminal(layer_table([layer for layer in layers if show_all or layer.keep or layer in worst]))
    if not show_all and len(layers) > MOST_PREDICTED:
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
