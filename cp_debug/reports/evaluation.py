"""An evaluation in a terminal: the metrics side by side, the classes, one line of verdict."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from rich.console import RenderableType
from rich.text import Text

from cp_debug.detection.evaluation import CONFIDENCE, BackendScores, ConfidenceInterval, EvaluationResult
from cp_debug.detection.metrics import ERRORS, OVERLAPS, THRESHOLDS, TP_THRESHOLD
from cp_debug.reports.numbers import fixed, signed
from cp_debug.reports.sheet import Column, Row, Sheet, Tone
from cp_debug.reports.sheet_terminal import Terminal
from cp_debug.safe_text import amount


def render(result: EvaluationResult) -> Iterator[RenderableType]:
    """The parts of a result, in the order in which they are read."""
    yield Text.assemble((result.model, "bold"), f" · {result.data} · {amount(len(result.samples), 'sample')}")
    yield Text()
    yield Terminal(summary_table(result))
    yield Text()
    yield Terminal(class_table(result))
    yield Text()
    if result.options.t4:
        yield Terminal(t4_table(result))
        yield Text()
    for note in result.notes:
        yield Text(f"note: {note}", style="yellow")
    yield from verdict(result)


def summary_table(result: EvaluationResult) -> Sheet:
    """A row for each metric: for each test backend its value and the difference from the reference."""
    title = f"{CONFIDENCE:.0%} intervals from {result.options.draws} draws of the samples"
    if emulated := [each.backend.spec for each in result.backends if each.backend.emulated]:
        title += f"; emulated: {', '.join(emulated)}"  # in the heading it would be too wide for 80 columns
    differences = [each.difference or {} for each in result.backends]
    figures = {
        metric: [
            (each.summary[metric], of[metric] if of else "")
            for each, of in zip(result.backends, differences, strict=True)
        ]
        for metric in result.backends[0].summary
    }
    strong = {name for name in figures if name in ("mAP", "NDS")}
    return _figures("metric", figures, [each.backend.spec for each in result.backends], strong, title)


def t4_table(result: EvaluationResult) -> Sheet:
    """A row for each of T4's figures: each backend's value, and for a test its difference from the reference."""
    reference = result.backends[0]
    figures = {
        name: [
            (reference.t4_intervals.get(name, value), ""),
            *((each.t4[name], each.t4_difference.get(name, each.t4[name] - value)) for each in result.backends[1:]),
        ]
        for name, value in reference.t4.items()
    }
    names = [reference.backend.spec, *map(_name, result.backends[1:])]
    return _figures("T4's metric", figures, names, {name for name in figures if name.startswith("mAP_")})


def _figures(
    first: str,
    figures: Mapping[str, Sequence[tuple[Any, Any]]],
    names: Sequence[str],
    strong: Collection[str],
    title: str = "",
) -> Sheet:
    """A row for each metric: (value, difference from the reference) of each backend; narrow, one for each of these."""
    columns = [Column(first, "mark"), Column(names[0], "number", show=_figure)]
    for name in names[1:]:
        columns += [Column(name, "number", show=_plain), Column("Δ", "number", show=_change)]
    rows, one_each = [], []
    for metric, pairs in figures.items():
        tone: Tone = "strong" if metric in strong else ""
        rows.append(Row([metric, pairs[0][0], *(part for pair in pairs[1:] for part in pair)], tone))
        one_each += [Row(("" if i else metric, names[i], *pair), tone) for i, pair in enumerate(pairs)]
        one_each[-1] = replace(one_each[-1], ends=True)
    narrow = [Column(first, "mark"), Column("backend", "name"), Column("value", "number", show=_plain)]
    narrow.append(Column("Δ", "number", show=_change))
    return Sheet(columns, rows, title, ruled=True, narrow=Sheet(narrow, one_each, title, ruled=True))


def class_table(result: EvaluationResult) -> Sheet:
    """A row for each class and backend."""
    distances = {f"AP@{limit}": Column(f"{limit} m", "number", 3, show=_number) for limit in THRESHOLDS}
    errors = {name: Column(name, "number", 2, show=_number) for name in ERRORS}
    volumes = {
        f"{kind} AP@{limit}": Column(f"{kind} {limit}", "number", 4, show=_number)
        for kind in ("BEV", "3D")
        for limit in OVERLAPS
    }
    figures = {**distances, **errors, **volumes}
    about = (Column("class", "name"), Column("backend", "name"), Column("found", "number"))
    rows = [
        Row(
            (
                "" if position else name,
                each.backend.spec,
                f"{each.classes[name]['found']}/{each.classes[name]['objects']}",
                each.classes[name]["AP"].value,
                *(each.classes[name][key] for key in figures),
            ),
            ends=position == len(result.backends) - 1,
        )
        for name in result.backends[0].classes
        for position, each in enumerate(result.backends)
    ]
    columns = (*about, Column("AP", "number", show=_number), *figures.values())
    title = f"found: objects with a detection within {TP_THRESHOLD:g} m"
    return Sheet(columns, rows, title, ruled=True, details="--json and --csv have all")


def verdict(result: EvaluationResult) -> Iterator[Text]:
    """One line for each test backend."""
    limit = result.options.max_drop
    for each in result.backends[1:]:
        assert each.difference is not None
        change = f"mAP {difference(each.difference['mAP'])}"
        reference = result.backends[0]
        count, text, style = len(result.samples), f"as good as {reference.backend.spec}", "green"
        if each.not_finite:
            text += f"; but its outputs hold NaN or Inf on {each.not_finite} of {count} samples"
            text += f", those of {reference.backend.spec} on {reference.not_finite}"
            style = "bold red" if each.not_finite > reference.not_finite else "yellow"
        if dropped := each.dropped(limit):
            text, style = f"worse by more than {limit:g}, and the choice of samples does not explain it", "bold red"
            t4 = [f"{name} {difference(each.t4_difference[name])}" for name in dropped if name != "mAP"]
            change = "; ".join([change, *(f"T4's {name}" for name in t4)])
        yield Text(f"{_name(each)}: {change}: {text}", style=style)


def _name(each: BackendScores) -> str:
    return f"{each.backend.spec} (emulated)" if each.backend.emulated else each.backend.spec


def _number(value: float) -> str:
    return fixed(value, 3)


def _plain(value: float | ConfidenceInterval) -> str:
    return _number(value.value if isinstance(value, ConfidenceInterval) else value)


def _figure(value: float | ConfidenceInterval) -> str:
    if not isinstance(value, ConfidenceInterval):
        return _number(value)
    interval = f"{fixed(value.value)} [{_number(value.low)}, {_number(value.high)}]"
    return "–" if math.isnan(value.value) else interval


def _change(value: float | ConfidenceInterval) -> str:
    if not isinstance(value, ConfidenceInterval):
        return signed(value)
    return "–" if math.isnan(value.value) else difference(value)


def difference(figure: ConfidenceInterval) -> str:
    """A change with its interval: ``-0.0023 [-0.0041, +0.0002]``."""
    return f"{signed(figure.value)} [{signed(figure.low)}, {signed(figure.high)}]"
