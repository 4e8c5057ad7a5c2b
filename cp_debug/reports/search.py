"""A search in a terminal: the verdict, the layers, the curve of error against layers kept, and arguments for tools."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from rich.console import RenderableType
from rich.text import Text

from cp_debug.mixed_precision.emit import arguments, deploy_fragment
from cp_debug.reports.numbers import number
from cp_debug.reports.safe_table import Table

if TYPE_CHECKING:
    from cp_debug.mixed_precision.result import SearchResult

TOOLS = {"polygraphy": "polygraphy (weak typing)", "trtexec": "trtexec", "autocast": "ModelOpt AutoCast",
         "modelopt": "ModelOpt quantization"}  # fmt: skip


def render(result: SearchResult) -> Iterator[RenderableType]:
    """The parts of a result, in the order in which they are read."""
    backend = f"{result.backend} (emulated)" if result.emulated else result.backend
    yield Text.assemble((result.model, "bold"), f" · {result.reference} → {backend} · goal {result.goal}")
    if result.kept:
        yield kept_table(result)
    yield Text("fewer layers or a smaller error: no trial beats these in both", style="italic")
    yield pareto_table(result)
    for note in result.notes:
        yield Text(f"note: {note}", style="yellow")
    style = "bold red" if not result.reached else ("green" if result.minimal or not result.kept else "yellow")
    yield Text(result.verdict, style=style)
    emulated = sum(trial.emulated for trial in result.trials)
    trials = f"{len(result.trials) - emulated} trials on {backend}"
    if not result.emulated:
        trials += f" ({result.builds} builds in this run), {emulated} on the emulator"
    yield Text(f"{trials}; {result.seconds:.1f} s", style="dim")
    if result.reached:
        yield from tool_arguments(result)


def kept_table(result: SearchResult) -> Table:
    """A row for each layer."""
    figure = next(iter(result.best.measured.figures), "rel_l2")
    table = _table("layer", "ONNX nodes", "operators", "introduces", "effect alone", f"{figure} without it")
    grouped = any(layer.fusion_group.engine_layer for layer in result.kept)
    if grouped:
        table.add_column("engine layer", overflow="fold")
    for layer in result.kept:
        group = layer.fusion_group
        cells = [
            group.name,
            "\n".join(group.nodes),
            "\n".join(layer.ops),
            number(layer.introduced),
            number(layer.effect),
            number(layer.without.get(figure)),
        ]
        table.add_row(*cells, *([group.engine_layer] if grouped else []))
    return table


def pareto_table(result: SearchResult) -> Table:
    """The trials that no other beats in both, layers and error."""
    figures = list(result.baseline.measured.figures or result.best.measured.figures)
    timed = any(trial.latency is not None for trial in result.pareto)
    table = _table("layers kept", *figures, *(["latency"] if timed else []), "")
    for trial in result.pareto:
        values = [number(trial.measured.figures[name]) for name in figures]
        latency = ["–" if trial.latency is None else f"{trial.latency * 1e3:.2f} ms"] if timed else []
        chosen = trial.nodes == result.best.nodes
        mark = ("← smallest that was found" if result.reached else "← closest") if chosen else ""
        table.add_row(f"{trial.layers} of {result.layers}", *values, *latency, mark, style="bold" if chosen else None)
    return table


def tool_arguments(result: SearchResult) -> Iterator[RenderableType]:
    """The set of kept layers as arguments of other tools."""
    for component, tools in arguments(result.keep, result.precision).items():
        for tool, line in tools.items():
            yield Text(f"{TOOLS[tool]}, {component}:", style="bold")
            yield Text(line, no_wrap=True, overflow="ignore")
    if fragment := deploy_fragment(result.keep, result.precision):
        yield Text("configuration of cpdebug deploy:", style="bold")
        yield Text(fragment.rstrip(), no_wrap=True, overflow="ignore")


def _table(*headers: str) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False)
    for header in headers:
        numeric = header.startswith(("introduces", "effect", "rel_l2", "max_abs", "boxes", "map", "latency"))
        table.add_column(header, justify="right" if numeric else "left", overflow="fold")
    return table
