"""A sweep in a terminal, as a page with a heat map, and as a table: its findings as sections of tables."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import singledispatch
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import RenderableType
from rich.text import Text

from cp_debug.detection.evaluation import CONFIDENCE, ConfidenceInterval, PartScores
from cp_debug.files import write_text
from cp_debug.reports.evaluation import difference, summary_table
from cp_debug.reports.numbers import fixed, number
from cp_debug.reports.page import rendered
from cp_debug.reports.sheet import Column, Sheet
from cp_debug.reports.sheet_terminal import Terminal
from cp_debug.reports.svg import opacity_png
from cp_debug.safe_text import some
from cp_debug.sweep.ablating import AblationGroup, AblationRow, PartCounts
from cp_debug.sweep.bisecting import BisectGroup, HeatMap, LayerSpread
from cp_debug.sweep.evaluating import EvalGroup
from cp_debug.sweep.run import FailedTasks, SweepResult
from cp_debug.sweep.searching import MixedPrecisionGroup
from cp_debug.sweep.sensitivity import SensitivityGroup
from cp_debug.sweep.spread import Outlier, SampleGroup, Spread

if TYPE_CHECKING:
    import pandas as pd

MOST_LAYERS = 12
"""Layers that a terminal shows; the page has all."""
MOST_FAILURES = 10
BEST = 3
"""Layers of which the tables by class and distance tell what they bring back."""


@dataclass(frozen=True)
class GroupSection:
    """One group, in words and tables."""

    title: str
    passed: bool
    sentence: str
    sheets: Sequence[Sheet]
    notes: Sequence[str] = field(default=())
    strips: Sequence[Strip] = field(default=())
    """Heat map of layers over samples, for pages."""
    strip_width: int = 1


@singledispatch
def section(group: SampleGroup) -> GroupSection:
    """The section about a group, dispatched by the kind of the group."""
    raise TypeError(type(group).__name__)


@section.register
def _(group: BisectGroup) -> GroupSection:
    samples, guilty = len(group.samples), group.guilty
    sentence = f"agrees on {group.agreeing} of {samples} samples"
    if guilty:
        first = guilty[0]
        rest = f", and {len(guilty) - 1} more layers" if len(guilty) > 1 else ""
        sentence += f"; most often guilty: {first.name} ({first.guilty} of {first.samples}){rest}"
    if group.final:
        worst = f"at most {number(group.final.worst)} on {group.samples[group.final.sample]}"
        sentence += f"; final outputs differ by {number(group.final.median)} (median, rel. L2), {worst}"
    ranked = sorted(group.layers, key=lambda row: (-row.guilty, -_excess(row)))
    headers = ("layer", ">guilty", ">excess: median", ">p95", ">worst", ">introduced", ">rel. L2", "worst on")
    rows = [
        (
            row.name,
            f"{row.guilty}/{row.samples}",
            *_percentiles(row.figures["excess"]),
            *(_percentiles(row.figures[name])[0] for name in ("introduced", "rel_l2")),
            group.samples[row.figures["excess"].sample] if row.figures["excess"] else "",
        )
        for row in ranked
    ]
    notes = [f"{text} ({count} samples)" for text, count in group.notes.items()]
    if group.causes:
        notes.insert(0, "causes: " + ", ".join(f"{cause} on {count}" for cause, count in group.causes.items()))
    if group.detections:
        notes.insert(0, f"detections: {group.detections}")
    sheets = [
        _sheet("Layers over the samples; introduced and rel. L2 are medians", headers, rows, MOST_LAYERS),
        *_outliers(group.outliers, "final rel. L2"),
    ]
    shown = list(strips(group.map, group.samples)) if group.map else []
    return GroupSection(group.title, group.passed, sentence, sheets, notes, shown, group.map.width if group.map else 1)


@section.register
def _(group: EvalGroup) -> GroupSection:
    result = group.result
    tests = result.backends[1:]
    sentence = f"{len(result.samples)} samples; " + "; ".join(
        f"{each.backend.spec}: mAP {difference(each.difference['mAP'])}" for each in tests if each.difference
    )
    if result.worse:
        sentence += f"; worse by more than {result.options.max_drop:g}: {', '.join(result.worse)}"
    notes = [f"{spec}: {change}" for spec, change in group.changes.items()] + list(result.notes)
    outliers = [
        sheet
        for spec, samples in group.outliers.items()
        for sheet in _outliers(samples, f"{spec}: boxes lost or gained")
    ]
    parts = [*_parts("Class by class", "class", group.classes), *_parts("By distance", "distance", group.distances)]
    return GroupSection(group.label, group.passed, sentence, [summary_table(result), *parts, *outliers], notes)


def _parts(title: str, name: str, parts: Sequence[PartScores]) -> list[Sheet]:
    """A table of classes or rings, with what each test gains or loses there; none of an older result."""
    if not parts:
        return []
    reference, *tests = parts[0].figures
    headers, rows = [name, ">objects"], []
    for figure in parts[0].figures[reference]:
        headers += [f">{figure}: {reference}", *(f">{figure}: {test}, Δ" for test in tests)]
    for part in parts:
        cells: list[Any] = [part.part, part.objects]
        for figure, value in part.figures[reference].items():
            cells += [fixed(value.value), *(difference(part.differences[test][figure]) for test in tests)]
        rows.append(cells)
    return [_sheet(title, headers, rows)]


@section.register
def _(group: AblationGroup) -> GroupSection:
    sentence = (
        f"{len(group.samples)} samples; of {group.boxes} boxes {_count(group.lost)} are lost, "
        f"{_count(group.gained)} gained, {_count(group.moved)} moved"
    )
    if group.scores:
        sentence += "; " + ", ".join(f"{name} {difference(figure)}" for name, figure in group.scores.items())
    best = group.single[0] if group.single else None
    if best is not None and best.back.value:
        sentence += f"; {best.layers[0]} alone brings {_count(best.back)} back"
    every = group.together[-1]
    sentence += f"; all {group.layers} layers exact bring {_count(every.back)} back"
    scores = [f">Δ {name}" for name in group.scores]
    headers = (">back", ">lost", ">gained", ">moved", *scores, ">error: median", ">worst")

    def cells(row: AblationRow) -> tuple[Any, ...]:
        counts = (_count(figure) for figure in (row.back, row.lost, row.gained, row.moved))
        return (*counts, *(difference(row.scores[name]) for name in group.scores), *_percentiles(row.error)[::2])

    single = [(row.layers[0], *cells(row), row.share) for row in group.single]
    together = [
        (f"all {group.layers}" if row.kind == "all" else f"first {len(row.layers)}", *cells(row))
        for row in group.together
    ]
    drawn = f"{CONFIDENCE:.0%} intervals over the samples"
    sheets = [
        _sheet(f"Single layers with exact values; {drawn}", ("layer", *headers, ">share"), single, MOST_LAYERS),
        _sheet("Layers together, those of the largest shares first", ("layers", *headers), together),
        *_lost("Boxes by class", "class", group.classes, group.single, "classes"),
        *_lost("Boxes by distance", "distance", group.distances, group.single, "distances"),
        *_outliers(group.outliers, "boxes lost or gained"),
    ]
    return GroupSection(group.title, group.passed, sentence, sheets, group.notes)


def _lost(title: str, name: str, parts: Sequence[PartCounts], rows: Sequence[AblationRow], field: str) -> list[Sheet]:
    """Boxes lost in each part, and those that the most effective single layers bring back there."""
    best = [row for row in rows if row.back.value][:BEST]
    headers = (name, ">boxes", ">lost", *(f">back: {row.layers[0].partition('/')[2]}" for row in best))
    cells = [
        (part.part, part.boxes, _count(part.lost), *(_count(getattr(row, field)[part.part]) for row in best))
        for part in parts
    ]
    return [_sheet(title, headers, cells)] if cells else []


def _count(figure: ConfidenceInterval) -> str:
    return f"{figure.value:.0f} [{figure.low:.0f}, {figure.high:.0f}]" if figure.high else "0"


@section.register
def _(group: SensitivityGroup) -> GroupSection:
    headers = ("layer", ">share: median", ">p95", ">worst", ">introduced", "worst on")
    rows = [
        (
            row.layer,
            *_percentiles(row.share),
            _percentiles(row.introduced)[0],
            group.samples[row.share.sample] if row.share else "",
        )
        for row in group.layers
    ]
    median, _, worst = _percentiles(group.int8)
    sentence = (
        f"all {len(group.layers)} layers in INT8: error {number(median)} (median of {len(group.samples)} samples)"
    )
    if group.int8:
        sentence += f", at most {number(worst)} on {group.samples[group.int8.sample]}"
    title = "Layers over the samples: share of the divergence; introduced: relative L2 of its results (median)"
    sheets = [_sheet(title, headers, rows, MOST_LAYERS), *_outliers(group.outliers, "error in INT8")]
    return GroupSection(group.label, group.passed, sentence, sheets)


@section.register
def _(group: MixedPrecisionGroup) -> GroupSection:
    samples, most = len(group.samples), max(group.kept)
    sentence = (
        f"{group.goal} reached on {sum(group.reached)} of {samples} samples, at most {most} of {group.total} layers "
        f"kept; {len(group.layers)} are needed by some sample"
    )
    headers = ("layer", ">needed", ">share: median", ">worst", "worst on")
    rows = [
        (
            row.layer,
            f"{row.needed}/{samples}",
            *_percentiles(row.share)[::2],
            group.samples[row.share.sample] if row.share else "",
        )
        for row in group.layers
    ]
    sheets = [_sheet("Layers that keep their precision", headers, rows, MOST_LAYERS)] if rows else []
    missed = [each for each in zip(group.samples, map(str, group.kept), group.reached, strict=True) if not each[-1]]
    if missed:
        cells = [each[:-1] for each in missed]
        sheets.append(_sheet("Goal not reached", ("sample", ">layers kept"), cells, MOST_LAYERS))
    return GroupSection(group.title, group.passed, sentence, sheets)


def render(result: SweepResult) -> Iterator[RenderableType]:
    """The parts of a result, in the order in which they are read."""
    yield Text(summary(result), style="dim")
    for group in result.groups:
        part = section(group)
        yield Text()
        yield Text(part.title, style="bold")
        for sheet in part.sheets:
            yield Text()
            yield Terminal(sheet)
            yield Text()
        for note in part.notes:
            yield Text(f"note: {note}", style="yellow")
        mark, style = ("✓", "green") if part.passed else ("✗", "bold red")
        yield Text(f"{mark} {part.title}: {part.sentence}", style=style)
    if result.failures:
        yield Text()
        reasons = by_reason(result.failures)
        for error, failures in reasons[:MOST_FAILURES]:  # lines, as paths and errors leave no room for columns
            yield Text(f"{_where(failures)}: {error}")
        if len(reasons) > MOST_FAILURES:
            yield Text(f"and {len(reasons) - MOST_FAILURES} other reasons, all in {result.log}")
        yield Text(f"✗ {len(result.failures)} tasks failed; --retry-failed tries them again", style="bold red")


def summary(result: SweepResult) -> str:
    """One line about the number of tasks and the time."""
    earlier = result.tasks - result.ran
    in_log = f", {earlier} of them in {result.log} already" if earlier else ""
    return f"{result.kind}: {result.tasks} tasks{in_log}; {result.seconds:.1f} s"


def render_page(result: SweepResult) -> str:
    """The page: one HTML file that asks for nothing from a network."""
    sections = [section(group) for group in result.groups]
    if result.failures:
        failed = f"{len(result.failures)} of {result.tasks} tasks failed"
        sections.append(GroupSection("Failed tasks", False, failed, [_failures(result)]))
    return rendered("sweep", result=result, summary=summary(result), sections=sections)


def write_page(result: SweepResult, target: Path) -> None:
    """Write the page. Raises InputError when it cannot be written."""
    write_text(render_page(result), target)


def frame(result: SweepResult) -> pd.DataFrame:
    """The rows of every group as one table."""
    import pandas as pd

    return pd.DataFrame([row for group in result.groups for row in group.rows()])


def by_reason(failures: Sequence[FailedTasks]) -> list[tuple[str, list[FailedTasks]]]:
    """Errors with the tasks that ended in them, the most frequent first: one cause is told once, whatever it took."""
    found: dict[str, list[FailedTasks]] = {}
    for each in failures:
        file = each.sample.rpartition(", sample ")[0]  # which ``_where`` names; each has its own
        reason = each.error.removeprefix(f"{file}: ").replace(file, "its file") if file else each.error
        found.setdefault(reason, []).append(each)
    return sorted(found.items(), key=lambda item: -len(item[1]))


def _where(failures: Sequence[FailedTasks]) -> str:
    first = failures[0]
    place = f"{first.label}, {', '.join(first.backends)}, {first.sample}"
    return place if len(failures) == 1 else f"{len(failures)} tasks, the first {place}"


def _failures(result: SweepResult) -> Sheet:
    rows = [
        (len(failures), error, _where(failures[:1]), _where(failures[-1:]) if len(failures) > 1 else "")
        for error, failures in by_reason(result.failures)
    ]
    return _sheet("Failed tasks by reason", (">tasks", "why", "first", "last"), rows, 0)


def _outliers(outliers: Sequence[Outlier], figure: str) -> list[Sheet]:
    if not outliers:
        return []
    rows = [(each.sample, each.value, each.score, some(each.layers, 3)) for each in outliers]
    return [_sheet("Samples that stand out", ("sample", f">{figure}", ">robust z", "in layers"), rows, MOST_LAYERS)]


def _excess(row: LayerSpread) -> float:
    spread = row.figures["excess"]
    return spread.worst if spread else 0.0


def _percentiles(spread: Spread | None) -> tuple[float | None, ...]:
    return (spread.median, spread.p95, spread.worst) if spread else (None, None, None)


def _columns(headers: Sequence[str]) -> list[Column]:
    """The first is a name, those that begin with ``>`` are numbers, which are left out from the right."""
    return [
        Column(header[1:], "number", leave_out=place if place > 2 else 0)
        if header.startswith(">")
        else Column(header, "text" if place else "name", leave_out=place)
        for place, header in enumerate(headers)
    ]


def _sheet(title: str, headers: Sequence[str], rows: Sequence[Sequence[Any]], most: int = 0) -> Sheet:
    return Sheet(_columns(headers), rows, title, most, ruled=True, details="--html, --json and --csv have all")


RED = (207, 34, 46)
FAINTEST, FULL = 1.0, 100.0
"""Excess from which a column is seen, where rounding ends, and from which it is red all over; by its logarithm."""


@dataclass(frozen=True)
class Strip:
    """One layer."""

    layer: str
    picture: str
    """Data URI of a PNG, one pixel a column."""
    says: str
    """The picture in words: the highest excess, and on which samples."""


def strips(heat_map: HeatMap, samples: Sequence[str]) -> Iterator[Strip]:
    """A strip for each layer of the map over ``samples``, all of the group, in order."""
    low, high = np.log10(FAINTEST), np.log10(FULL)
    for layer, values in zip(heat_map.layers, heat_map.excess, strict=True):
        row = np.array([FAINTEST if v is None else min(max(v, FAINTEST), FULL) for v in values])
        known = [(v, -i) for i, v in enumerate(values) if v is not None]
        says = "not replayed"
        if known:
            worst, place = max(known)
            says = f"excess at most {number(worst)}, on {_of(samples, -place, heat_map.width)}"
        yield Strip(layer, opacity_png(((np.log10(row) - low) / (high - low))[None], RED), says)


def _of(samples: Sequence[str], column: int, width: int) -> str:
    first, last = column * width, min((column + 1) * width, len(samples)) - 1
    return samples[first] if first == last else f"one of {samples[first]} to {samples[last]}"
