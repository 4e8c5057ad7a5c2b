"""The line that shows a job's progress in a terminal: what is being done, how far it is, how long it takes."""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, SpinnerColumn, Task
from rich.table import Column
from rich.text import Text

BARS = {100: 20, 70: 10}
"""Least width of a terminal → width of the bar; below there is none, so that what is being done has room."""


def progress_bar(console: Console) -> Progress:
    """The line on ``console``, which goes when the job is done; nothing at all where no terminal shows it.

    What is being done is shortened where there is no room; numbers are not.
    """
    width = next((width for least, width in BARS.items() if console.width >= least), 0)
    whole = Column(no_wrap=True)
    bar = (BarColumn(width, table_column=whole),) if width else ()
    columns = (SpinnerColumn(table_column=whole), _Doing(), *bar, _Count(whole), _Times(whole))
    return Progress(*columns, console=console, transient=True, disable=not (console.is_terminal or console.is_jupyter))


class _Doing(ProgressColumn):
    """Description of the step in one line."""

    def render(self, task: Task) -> Text:
        return Text(task.description, no_wrap=True, overflow="ellipsis")


class _Count(ProgressColumn):
    """Steps that are done, of all, where there are several."""

    def render(self, task: Task) -> Text:
        several = task.total is not None and task.total > 1
        return Text(f"{task.completed:.0f}/{task.total:.0f}" if several else "", style="progress.download")


class _Times(ProgressColumn):
    """The time that has gone by, and what is left at this pace."""

    def render(self, task: Task) -> Text:
        gone, left = task.elapsed, task.time_remaining
        more = f", {_clock(left)} left" if left and not task.finished else ""
        return Text(f"{_clock(gone or 0)}{more}", style="progress.elapsed")


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
