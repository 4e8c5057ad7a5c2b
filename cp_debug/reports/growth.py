"""Growth of the error along the network: introduced and inherited by each layer, and expected of its precision."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from itertools import accumulate, groupby, pairwise

from cp_debug.bisect.result import GUILTY, SHAPE, LayerRow, TestResult
from cp_debug.reports.numbers import number
from cp_debug.reports.svg import Canvas, Scale, decades
from cp_debug.reports.verdict_line import not_finite

WIDTH, HEIGHT = 1040, 440
LEFT, RIGHT, TOP, BOTTOM = 62, 12, 104, 46
LOW_TOP = 26
"""Room above the plot where no stage's name stands upright."""
MOST_OF_ALL, MOST_NESTED = 0.8, 24
"""Share of the rows from which on a stage is told by what is nested in it, and the most stages told so."""
NAME_HEIGHT, NAME_LENGTH = 12, 16
"""Width that a stage needs so that its upright name does not run into the next one, and letters of it shown."""
SERIES = ("expected", "inherited", "introduced")
"""Series in drawing order; each is a field of ``Replay`` and a CSS class."""
STEMS = ("introduced", "divergence")
"""Series drawn as a stem for each layer, since they do not go on to the next one; ``expected`` marks that stem."""


def growth_chart(test: TestResult, anchor: str) -> Canvas | None:
    """The chart of one test backend, or None when there is nothing to draw. ``anchor`` begins the ids of table rows.

    Without a replay the divergence stands for what was introduced and inherited.
    """
    rows = test.rows
    if not rows:
        return None
    kinds = SERIES if test.oracle else ("divergence",)
    series = {kind: [_value(row, kind) for row in rows] for kind in kinds}
    low, high = decades(each for values in series.values() for v in values for each in (v, 2 * v))  # room for marks
    strange = {i: text for i, row in enumerate(rows) if (text := not_finite(row))}
    x = Scale(-0.5, len(rows) - 0.5, LEFT, WIDTH - RIGHT)
    names = [_named(stage, x) for stage in stage_spans(test)]
    top = TOP if any(upright for _, _, upright in names) else LOW_TOP
    height = HEIGHT - TOP + top
    y = Scale(low, high, height - BOTTOM, top, log=True)
    label = f"Relative error of {len(rows)} layers of {test.backend.spec}, log scale: {', '.join(kinds)}"
    if strange:
        label += f"; {len(strange)} layers are not finite"
    accused = [i for i, row in enumerate(rows) if row.verdict in (GUILTY, SHAPE)]
    canvas = Canvas(
        WIDTH, height, label, "growth", {"left": LEFT, "right": x.end, "count": len(rows), "accused": accused}
    )
    clip = f"{anchor}plot"
    canvas.add(
        '<clipPath id="{}"><rect x="{}" y="0" width="{}" height="{}"/></clipPath>', clip, LEFT, x.end - LEFT, height
    )
    canvas.open_group(clip)
    for band, (name, start, end) in enumerate(stage_spans(test)):  # every other one is shaded
        canvas.rect(x(start), y.end, x(end) - x(start), y.start - y.end, f"band{band % 2}", name)
    canvas.close_group()
    for text, middle, upright in names:
        if upright:
            canvas.text(middle + 4, top - 6, text, "stage", turn=-90, at=middle)
        elif text:
            canvas.text(middle, top - 7, text, "stage middle", at=middle)
    canvas.axes(x, y, "layer, in execution order", "relative L2 error", x_ticks=False)
    for tick in x.ticks(10):
        if float(tick).is_integer() and 0 <= tick < len(rows):
            canvas.text(x(tick), y.start + 16, rows[int(tick)].index, "tick middle", at=x(tick))
    canvas.open_group(clip, "plot")
    for name, values in series.items():
        _draw(canvas, name, values, x, y)
    for i, row in enumerate(rows):
        canvas.rect(x(i - 0.5), top, x(i + 0.5) - x(i - 0.5), y.start - top, "hit", _title(row))
    canvas.close_group()
    for i, text in strange.items():
        canvas.text(x(i), top + 12, text, "strange", at=x(i))
    for i, row in enumerate(rows):
        if row.verdict in (GUILTY, SHAPE):
            place = x(i), y(max(v for v in (values[i] for values in series.values()))), x(i)
            mark = (
                '<a href="#{}{}" aria-label="{}"><circle cx="{}" cy="{}" r="7" class="guilty" data-x="{}"><title>{}'
                "</title></circle></a>"
            )
            canvas.add(mark, anchor, row.index, f"guilty layer {row.name}", *place, _title(row))
    return canvas


def _draw(canvas: Canvas, name: str, values: list[float], x: Scale, y: Scale) -> None:
    """One series in its own form; an error of exactly 0 is a gap in a log chart, not a cliff."""
    places = [(i, y(value)) for i, value in enumerate(values) if value > 0]
    if name == "expected":
        route = "".join(f"M{x(i - 0.45):g} {place:g}H{x(i + 0.45):g}" for i, place in places)
        canvas.add('<path d="{}" class="line expected"/>', route)
    elif name in STEMS:
        route = "".join(f"M{x(i):g} {y.start:g}V{place:g}" for i, place in places)
        canvas.add('<path d="{}" class="stem"/>', route)
        dots = "".join(f"M{x(i):g} {place:g}h0" for i, place in places)  # round ends, whatever the chart is scaled by
        canvas.add('<path d="{}" class="dot"/>', dots)
    else:
        for _, run in groupby(enumerate(places), key=lambda item: item[1][0] - item[0]):  # neighbours of one stretch
            canvas.path([(x(i), place) for _, (i, place) in run], f"line {name}")


def _value(row: LayerRow, name: str) -> float:
    """0 for what is not known or not finite: a log axis leaves it out."""
    value = row.stats.rel_l2 if name == "divergence" else getattr(row.replay, name, None)
    return 0.0 if value is None or not math.isfinite(value) else value


def overview(test: TestResult) -> Canvas:
    """A strip of all layers, high where the error is, on which a part of the growth chart is chosen."""
    rows = test.rows
    values = [_value(row, "introduced" if test.oracle else "divergence") for row in rows]
    y = Scale(*decades(values), 100, 4, log=True)
    canvas = Canvas(len(rows), 100, f"Errors of all {len(rows)} layers", stretched=True)
    stems = "".join(f"M{i + 0.5:g} 100V{y(v):g}" for i, v in enumerate(values) if v > 0)
    canvas.add('<path d="{}" class="stem"/>', stems)
    accused = "".join(f"M{i + 0.5:g} 100V0" for i, row in enumerate(rows) if row.verdict in (GUILTY, SHAPE))
    canvas.add('<path d="{}" class="accused"/>', accused)
    canvas.rect(0, 0, len(rows), 100, "chosen")
    return canvas


def _named(stage: tuple[str, float, float], x: Scale) -> tuple[str, float, bool]:
    """The name of a stage as there is room for it above its band, its place, and whether it stands upright."""
    name, left, right = stage[0], x(stage[1]), x(stage[2])
    middle = (left + right) / 2
    if right - left > 6.5 * len(name):
        return name, middle, False
    if right - left >= NAME_HEIGHT:
        return name if len(name) <= NAME_LENGTH else "…" + name[1 - NAME_LENGTH :], middle, True
    return "", middle, False


def stage_spans(test: TestResult) -> list[tuple[str, float, float]]:
    """(Name, start, end) of each stage in rows, an end lying between two rows.

    A stage that holds nearly all rows is told by what is nested in it: the modules one level further down.
    """
    position = {(row.component, row.onnx): i for i, row in enumerate(test.rows)}
    spans, start = [], -0.5
    for stage in test.stages:
        end = position[stage.layer.component, stage.layer.onnx] + 0.5
        if end - start > MOST_OF_ALL * len(test.rows):
            spans += _nested(stage.name, test.rows[math.ceil(start) : math.floor(end) + 1], start)
        else:
            spans.append((stage.name, start, end))
        start = end
    return spans


def _nested(name: str, rows: Sequence[LayerRow], start: float) -> list[tuple[str, float, float]]:
    """Spans of the modules inside a stage, as deep as gives at least two and at most ``MOST_NESTED``; else its own."""
    spans = [(name, start, start + len(rows))]
    for depth in range(1, 8):
        keys = [".".join(re.split(r"[./]", row.name.strip("/"))[:depth]) for row in rows]
        runs = [(key, len(list(run))) for key, run in groupby(keys)]
        if len(runs) > MOST_NESTED:
            break
        if len(runs) > 1:
            ends = [start, *accumulate((count for _, count in runs), initial=start)][1:]
            spans = [(key, a, b) for (key, _), (a, b) in zip(runs, pairwise(ends), strict=True)]
    return spans


def _title(row: LayerRow) -> str:
    replay = row.replay
    figures = [f"divergence {number(row.stats.rel_l2)}"]
    if replay and replay.introduced is not None:
        figures += [f"{name} {number(getattr(replay, name))}" for name in reversed(SERIES)]
        figures.append(f"excess {number(replay.excess)}")
    return f"{row.index} · {row.name} ({row.op}) · {row.verdict}\n" + "\n".join(figures)
