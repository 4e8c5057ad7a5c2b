"""An evaluation in a terminal: the metrics side by side, the classes, one line of verdict."""

from __future__ import annotations

import math
from collections.abc import Iterator

from rich import box
from rich.console import RenderableType
from rich.text import Text

from cp_debug.detection.bootstrap import CONFIDENCE, Interval
from cp_debug.detection.evaluation import BackendScores, EvaluationResult
from cp_debug.detection.matching import THRESHOLDS
from cp_debug.detection.metrics import ERRORS, OVERLAPS, TP_THRESHOLD
from cp_debug.reports.safe_table import Table


def render(result: EvaluationResult) -> Iterator[RenderableType]:
    """The parts of a result, in the order in which they are read."""
    yield Text.assemble((result.model, "bold"), f" · {result.data} · {len(result.samples)} samples")
    yield summary_table(result)
    yield class_table(result)
    for note in result.notes:
        yield Text(f"note: {note}", style="yellow")
    yield from verdict(result)


def summary_table(result: EvaluationResult) -> Table:
    """A row for each metric; of each test backend its value and the difference to the reference."""
    table = _table("metric", result.backends[0].backend.spec)
    table.title = f"{CONFIDENCE:.0%} intervals from {result.options.draws} draws of the samples"
    for each in result.backends[1:]:
        table.add_column(_name(each), justify="right")
        table.add_column("Δ", justify="right")
    for metric in result.backends[0].summary:
        cells = [_interval(result.backends[0].summary[metric])]
        for each in result.backends[1:]:
            assert each.difference is not None
            cells += [_number(each.summary[metric].value), _difference(each.difference[metric])]
        table.add_row(metric, *cells, style="bold" if metric in ("mAP", "NDS") else None)
    return table


def class_table(result: EvaluationResult) -> Table:
    """A row for each class and backend."""
    distances = [f"AP@{limit}" for limit in THRESHOLDS]
    volumes = [f"{kind} AP@{limit}" for kind in ("BEV", "3D") for limit in OVERLAPS]
    headers = [*(f"{limit} m" for limit in THRESHOLDS), *ERRORS, *(name.replace(" AP@", " ") for name in volumes)]
    table = _table("class", "backend", "found", "AP", *headers)
    table.columns[1].justify = "left"
    table.title = f"found: objects with a detection within {TP_THRESHOLD:g} m"
    for name in result.backends[0].classes:
        for position, each in enumerate(result.backends):
            figures = each.classes[name]
            numbers = (_number(figures[key]) for key in (*distances, *ERRORS, *volumes))
            found = f"{figures['found']}/{figures['objects']}"
            last = position == len(result.backends) - 1
            label = "" if position else name
            table.add_row(label, each.backend.spec, found, _number(figures["AP"].value), *numbers, end_section=last)
    return table


def verdict(result: EvaluationResult) -> Iterator[Text]:
    """One line for each test backend."""
    limit = result.options.max_drop
    for each in result.backends[1:]:
        assert each.difference is not None
        change = f"mAP {_difference(each.difference['mAP'])}"
        if each.worse(limit):
            reason = f"worse by more than {limit:g}, and the choice of samples does not explain it"
            yield Text(f"{_name(each)}: {change}: {reason}", style="bold red")
        else:
            yield Text(f"{_name(each)}: {change}: as good as {result.backends[0].backend.spec}", style="green")


def _table(*headers: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, title_justify="left", title_style="italic", pad_edge=False, padding=(0, 1, 0, 0))
    for index, header in enumerate(headers):
        table.add_column(header, justify="right" if index else "left", no_wrap=True)
    return table


def _name(each: BackendScores) -> str:
    return f"{each.backend.spec} (emulated)" if each.backend.emulated else each.backend.spec


def _number(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.3f}"


def _interval(figure: Interval) -> str:
    return f"{figure.value:.4f} [{figure.low:.3f}, {figure.high:.3f}]"


def _difference(figure: Interval) -> str:
    return f"{figure.value:+.4f} [{figure.low:+.4f}, {figure.high:+.4f}]"
