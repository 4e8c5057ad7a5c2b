"""The live view of a sweep, on stderr: done, failed and running tasks, and what each worker does."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Group
from rich.live import Live
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from cp_debug.cli.console import errors, say
from cp_debug.cli.plain_steps import PlainSteps

if TYPE_CHECKING:
    from cp_debug.sweep.run import Progress as Queued

MOST = 8
"""Workers that are shown one by one."""


class QueueView:
    """Draws what a queue tells."""

    def __init__(self, live: Live, kind: str, slow: PlainSteps | None = None) -> None:
        columns = (SpinnerColumn(), TextColumn(kind), BarColumn(), MofNCompleteColumn())
        self._live = live
        self._bar = Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(elapsed_when_finished=True))
        self._task = self._bar.add_task("", total=None)
        self._kind = kind
        self._slow = slow
        self._refused = self._store = ""
        self._told = False

    def __call__(self, progress: Queued) -> None:
        """Show how far it is."""
        finished = progress.done + progress.failed
        self._bar.update(self._task, completed=finished, total=progress.total)
        if self._slow is not None:
            self._slow(self._kind, finished, progress.total)
        rates = progress.rates
        line = Text(f"{progress.done} done · {progress.failed} failed · {progress.running} running", style="dim")
        line.append(f" · {60 * sum(rates.values()):.3g} a minute on {progress.present} workers")
        waiting = ""
        if progress.waiting_for_gpu:
            waiting = "waiting for a worker with GPU=1: dask worker … --resources GPU=1"
        elif not progress.present and finished < progress.total:
            waiting = "waiting for workers"
        if waiting:
            line.append(f"\n{waiting}", style="yellow")
        if self._slow is not None and progress.waiting_for_gpu and not self._told:
            self._told = True  # lines that stay tell of it once
            say(f"{waiting}; its tasks start when there is one")
        if progress.refused != self._refused:  # told for good: the view vanishes
            self._refused = progress.refused
            say(f"warning: gets no tasks: {progress.refused}")
        if progress.store != self._store:
            self._store = progress.store
            say(f"warning: {progress.store}")
        busiest = sorted(rates.items(), key=lambda item: -item[1])[:MOST]
        workers = [Text(f"  {name}  {progress.workers[name]} done, {60 * rate:.3g} a minute") for name, rate in busiest]
        self._live.update(Group(self._bar, line, *workers))


@contextmanager
def view(kind: str) -> Iterator[QueueView]:
    """A view while the block runs; where stderr is no terminal, lines now and then."""
    with Live(console=errors, transient=True, refresh_per_second=4) as live:
        if live.console.is_terminal:
            yield QueueView(live, kind)
            return
        with PlainSteps(say).running() as slow:
            yield QueueView(live, kind, slow)
