"""Growth of the error along the network: introduced and inherited by each layer, and expected of its precision."""

from __future__ import annotations

import math
from itertools import groupby

from cp_debug.bisect.result import GUILTY, SHAPE, LayerRow, TestResult
from cp_debug.reports.numbers import number
from cp_debug.reports.svg import Canvas, Scale, decades

WIDTH, HEIGHT = 1040, 440
LEFT, RIGHT, TOP, BOTTOM = 62, 12, 104, 46
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
    names = SERIES if test.oracle else ("divergence",)
    series = {name: [_value(row, name) for row in rows] for name in names}
    low, high = decades(2 * v for values in series.values() for v in values)  # room for the marks at the top
    x = Scale(-0.5, len(rows) - 0.5, LEFT, WIDTH - RIGHT)
    y = Scale(low, high, HEIGHT - BOTTOM, TOP, log=True)
    label = f"Relative error of {len(rows)} layers of {test.backend.spec}, log scale: {', '.join(names)}"
    canvas = Canvas(WIDTH, HEIGHT, label, "growth")
    _stages(canvas, test, x, y)
    canvas.axes(x, y, "layer, in execution order", "relative L2 error", x_ticks=False)
    for tick in x.ticks(10):
        if float(tick).is_integer() and 0 <= tick < len(rows):
            canvas.text(x(tick), y.start + 16, rows[int(tick)].index, "tick middle")
    for name, values in series.items():
        _draw(canvas, name, values, x, y)
    for i, row in enumerate(rows):
        canvas.rect(x(i - 0.5), TOP, x(i + 0.5) - x(i - 0.5), y.start - TOP, "hit", _title(row))
    for i, row in enumerate(rows):
        if row.verdict in (GUILTY, SHAPE):
            place = x(i), y(max(v for v in (values[i] for values in series.values())))
            mark = (
                '<a href="#{}{}" aria-label="{}"><circle cx="{}" cy="{}" r="7" class="guilty"><title>{}</title>'
                "</circle></a>"
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
        for i, place in places:
            canvas.add('<circle cx="{}" cy="{}" r="2.5" class="dot"/>', x(i), place)
    else:
        for _, run in groupby(enumerate(places), key=lambda item: item[1][0] - item[0]):  # neighbours of one stretch
            canvas.path([(x(i), place) for _, (i, place) in run], f"line {name}")


def _value(row: LayerRow, name: str) -> float:
    """0 for what is not known: a log axis leaves it out."""
    value = row.stats.rel_l2 if name == "divergence" else getattr(row.replay, name, None)
    return 0.0 if value is None or math.isnan(value) else value


def _stages(canvas: Canvas, test: TestResult, x: Scale, y: Scale) -> None:
    """A band for each stage, ending where the stage ends; every other one is shaded."""
    position = {(row.component, row.onnx): i for i, row in enumerate(test.rows)}
    start = -0.5
    for number_, stage in enumerate(test.stages):
        end = position[stage.layer.component, stage.layer.onnx] + 0.5
        left, right = x(start), x(end)
        canvas.rect(left, TOP, right - left, y.start - TOP, f"band{number_ % 2}", stage.name)
        if right - left > 6.5 * len(stage.name):
            canvas.text((left + right) / 2, TOP - 7, stage.name, "stage middle")
        elif right - left >= NAME_HEIGHT:
            name = stage.name if len(stage.name) <= NAME_LENGTH else "…" + stage.name[1 - NAME_LENGTH :]
            canvas.text((left + right) / 2 + 4, TOP - 6, name, "stage", turn=-90)
        start = end


def _title(row: LayerRow) -> str:
    replay = row.replay
    figures = [f"divergence {number(row.stats.rel_l2)}"]
    if replay and replay.introduced is not None:
        figures += [f"{name} {number(getattr(replay, name))}" for name in reversed(SERIES)]
        figures.append(f"excess {number(replay.excess)}")
    return f"{row.index} · {row.name} ({row.op}) · {row.verdict}\n" + "\n".join(figures)
