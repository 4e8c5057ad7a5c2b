"""The difference of two results, in a terminal and as a page."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

from rich.console import RenderableType
from rich.text import Text

from cp_debug.bisect.result_diff import BETTER, GONE, NEW, UNKNOWN, WORSE, LayerChange, LayerState, ResultDiff, TestDiff
from cp_debug.files import write_text
from cp_debug.reports.numbers import number
from cp_debug.reports.page import rendered
from cp_debug.reports.sheet import Cell, Column, Sheet, Tone
from cp_debug.reports.sheet_terminal import Terminal

MOST = 20
"""Layers that a terminal shows; the page has all."""
_TONES: dict[str, Tone] = {WORSE: "bad", BETTER: "good", NEW: "note", GONE: "quiet", UNKNOWN: "note"}


def render(result: ResultDiff) -> Iterator[RenderableType]:
    """The parts of a difference, in the order in which they are read."""
    names = result.model if result.before == result.after else f"{result.before} → {result.after}"
    yield Text(names, style="bold")
    for test in result.tests:
        yield Text()
        yield Text(_title(test), style="bold")
        for sheet in sheets(test, MOST):
            yield Terminal(sheet)
        for text in test.new_causes:
            yield Text(f"new cause: {text}", style="red")
        for text in test.gone_causes:
            yield Text(f"gone: {text}", style="green")
        yield verdict(test)
    for note in result.notes:
        yield Text(f"note: {note}", style="yellow")


def sheets(test: TestDiff, most: int = 0) -> Iterator[Sheet]:
    """The tables of a test: changed layers, changed outputs; none where nothing changed."""
    if test.layers:
        yield change_table(test.layers, "layers", most)
    if test.outputs:
        yield change_table(test.outputs, "final outputs", most)


def change_table(changes: Sequence[LayerChange], title: str, most: int = 0) -> Sheet:
    """A row for each change: what it is, and verdict, introduced error and divergence before and after."""
    columns = (
        Column("", "mark", of=lambda change: Cell(change.change, _TONES[change.change])),
        Column("layer", "name", of=lambda change: change.name),
        Column("operator", "mark", leave_out=2, of=lambda change: change.op),
        Column("verdict", "mark", of=lambda change: _two(change, partial(_verdict, change))),
        Column("introduced", "mark", of=lambda change: _two(change, lambda state: number(state.introduced))),
        Column("rel. L2", "mark", leave_out=1, of=lambda change: _two(change, lambda state: number(state.rel_l2))),
    )
    return Sheet.of(columns, changes, title, most=most, ruled=True, details="--html has every row")


def _two(change: LayerChange, show: Callable[[LayerState], str]) -> str:
    texts = ["–" if state is None else show(state) for state in (change.before, change.after)]
    return texts[1] if texts[0] == texts[1] else " → ".join(texts)


def _verdict(change: LayerChange, state: LayerState) -> str:
    return f"{state.verdict}, not replayed" if change.change == UNKNOWN and not state.replayed else state.verdict


def verdict(test: TestDiff) -> Text:
    """One line: what became of the test."""
    agrees = ("✓", "green") if test.agrees[1] else ("–", "yellow")  # no worse, and still not right
    mark, style = ("✗", "bold red") if test.worse else agrees
    return Text(f"{mark} {_title(test)}: {test.says}", style=style)


def _title(test: TestDiff) -> str:
    return test.after if test.before == test.after else f"{test.before} → {test.after}"


def write_page(result: ResultDiff, target: Path, command: str = "") -> None:
    """Write the page. Raises InputError when it cannot be written."""
    write_text(render_diff(result, command), target)


def render_diff(result: ResultDiff, command: str = "", *, served: bool = False) -> str:
    """The page: a verdict and the tables for each test. ``served``: by a server whose first page lists all results."""
    parts = [(_title(test), test, list(sheets(test))) for test in result.tests]
    return rendered("diff", result=result, parts=parts, command=command, served=served)
