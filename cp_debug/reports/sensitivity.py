"""Sensitivity of layers to INT8: in a terminal, as a chart, as one HTML page."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import RenderableType
from rich.text import Text

from cp_debug.detection.evaluation import ConfidenceInterval
from cp_debug.files import write_text
from cp_debug.mixed_precision.sensitivity import METRIC, Int8Effect, LayerSensitivity, SensitivityProfile
from cp_debug.reports.numbers import fixed, number, share, signed
from cp_debug.reports.page import rendered, script
from cp_debug.reports.sheet import Cell, Column, Sheet
from cp_debug.reports.sheet_terminal import Terminal
from cp_debug.reports.svg import Canvas, Scale, standalone
from cp_debug.safe_text import amount, flags
from cp_debug.safe_text import page as page_text

SHOWN = 20
"""Layers that a terminal shows unless all are asked for."""
ORDER = "Most sensitive first: mAP that leaving it out gains for certain, then its share; “without”: all but this layer"
WIDTH, ROW, TOP, BOTTOM, NAMES, GAP = 1040, 17, 12, 46, 330, 34
"""Sizes of the chart, in its own units: one row for each layer, the names to the left."""


def render(profile: SensitivityProfile, *, show_all: bool = False) -> Iterator[RenderableType]:
    """The parts of a profile, in the order in which they are read."""
    yield Text.assemble((profile.model, "bold"), f" · {profile.data} · {amount(profile.samples, 'sample')}")
    shown = profile.layers if show_all else profile.layers[:SHOWN]
    yield Terminal(layer_table(profile, len(shown)))
    if count_left := len(profile.layers) - len(shown):
        yield Text(f"{count_left} less sensitive layers are not shown; --all shows them", style="dim")
    yield Text(whole_line(profile))
    yield from (Text(f"note: {note}", style="yellow") for note in profile.notes)
    yield from choice_lines(profile)


def layer_table(profile: SensitivityProfile, count: int, *, sizes: bool = False) -> Sheet:
    """A row for each of the first ``count`` layers; ``sizes``: with their kind and number of weights."""

    def without(name: str) -> Callable[[LayerSensitivity], Any]:
        return lambda row: _change(row.left_out.scores[name]) if row.left_out else None

    columns = [
        Column("layer", "name", of=lambda row: row.layer),
        Column("kind", "mark", of=lambda row: row.kind),
        Column("weights", "number", show=str, of=lambda row: row.weights),
        Column("introduced", "number", leave_out=2, of=lambda row: row.introduced),
        Column("share", "number", show=share, of=lambda row: row.share),
        Column("error without", "number", leave_out=3, of=lambda row: row.left_out and row.left_out.error),
        Column("dB", "number", leave_out=4, of=lambda row: row.left_out and fixed(row.left_out.sqnr, 1)),
        *(Column(f"Δ {name} without", "number", leave_out=1, of=without(name)) for name in profile.scores),
    ]
    if not sizes:
        del columns[1:3]
    title = "share: part of the outputs' divergence; introduced: relative L2 error of the layer's own result"
    return Sheet.of(columns, profile.layers[:count], title, ruled=True)


def whole_line(profile: SensitivityProfile) -> str:
    """A sentence about all layers in INT8."""
    effect: Int8Effect = profile.int8
    scores = [
        f"{n} {fixed(profile.scores[n])} → {fixed(profile.scores[n] + c.value)}" for n, c in effect.scores.items()
    ]
    parts = [f"error {number(effect.error)} ({fixed(effect.sqnr, 1)} dB)", *scores]
    low = f"all {len(profile.layers)} layers in {profile.precision.upper()}"
    return f"{low}: {', '.join(parts)}; measured in {profile.seconds:.0f} s"


def choice_lines(profile: SensitivityProfile) -> Iterator[Text]:
    """Lines about the choice of ``--auto``, and the options that apply it."""
    choice = profile.choice
    if choice is None:
        return
    loss = f"{METRIC} loss {fixed(choice.loss.value)} [{signed(choice.loss.low)}, {signed(choice.loss.high)}]"
    loss = loss if profile.scores else f"output error {number(choice.loss.value)}"
    kept_layers = f"{len(choice.skipped)} of {len(profile.layers)} layers stay in FP32"
    yield Text(f"budget {choice.budget:g}: {kept_layers}: {loss}, {choice.tried} sets run", style="green")
    if choice.skipped:
        yield Text(f"  {flags('--skip-layers', choice.skipped, len(choice.skipped))}")


def _change(change: ConfidenceInterval) -> Cell:
    sure = change.low > 0 or change.high < 0
    return Cell(signed(change.value), "" if not sure else "bad" if change.value < 0 else "good")


def chart(profile: SensitivityProfile) -> Canvas:
    """A row for each layer: its share and, where known, the mAP that leaving it out gives."""
    height, low = TOP + ROW * len(profile.layers) + BOTTOM, profile.precision.upper()
    description = f"{profile.model}: shares of {len(profile.layers)} layers, all in {low}"
    canvas = Canvas(WIDTH, height, description, "sensitivity")
    middle = (NAMES + WIDTH - GAP) / 2 if profile.scores else WIDTH - GAP
    bottom = height - BOTTOM
    shares = [row.share for row in profile.layers]
    part = Scale(min(0.0, *shares), max(0.01, *shares), NAMES, middle - GAP / 2)
    _axis(canvas, part, bottom, f"part of the outputs' divergence, all in {low}")
    changes = [row.left_out.scores[METRIC] for row in profile.layers if row.left_out] if profile.scores else []
    least, most = min([-0.01, *(c.low for c in changes)]), max([0.01, *(c.high for c in changes)])
    gain = Scale(least, most, middle + GAP / 2, WIDTH - GAP)
    if changes:
        _axis(canvas, gain, bottom, f"change of {METRIC} without it, with its interval")
    for index, row in enumerate(profile.layers):
        y = TOP + ROW * index
        title = f"{row.layer}: share {share(row.share)}, introduced {number(row.introduced)}"
        canvas.text(NAMES - 6, y + ROW - 5, row.layer if len(row.layer) <= 46 else "…" + row.layer[-45:], "tick end")
        start, end = sorted((part(0.0), part(row.share)))
        canvas.rect(start, y + 2, end - start, ROW - 4, "bars", title)
        if changes and row.left_out:
            change = row.left_out.scores[METRIC]
            start, end = sorted((gain(0.0), gain(change.value)))
            kind = "bars loss" if change.low > 0 else "bars"
            canvas.rect(start, y + 2, end - start, ROW - 4, kind, f"{row.layer}: {signed(change.value)}")
            canvas.line(gain(change.low), y + ROW / 2, gain(change.high), y + ROW / 2, "axis")
    return canvas


def _axis(canvas: Canvas, x: Scale, bottom: float, name: str) -> None:
    for value in x.ticks():
        canvas.line(x(value), TOP, x(value), bottom, "grid")
    canvas.x_axis(x, bottom, name)


def write_chart(profile: SensitivityProfile, target: Path) -> None:
    """Write the chart as an SVG file of its own."""
    write_text(page_text(standalone(chart(profile), script("report.css"))), target)


def write_page(profile: SensitivityProfile, command: str, target: Path) -> None:
    """Write chart, table and choice as one HTML page."""
    page = rendered(
        "sensitivity",
        profile=profile,
        chart=chart(profile),
        layers=replace(layer_table(profile, len(profile.layers), sizes=True), title=ORDER),
        whole=whole_line(profile),
        choice=[line.plain for line in choice_lines(profile)],
        command=command,
    )
    write_text(page, target)
