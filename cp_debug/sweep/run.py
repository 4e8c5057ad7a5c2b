"""A whole sweep: runs the tasks that are left, then returns everything that the log has of this grid."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cp_debug.errors import InputError
from cp_debug.sweep.log import Record, SweepLog
from cp_debug.sweep.queue import Progress, Queue
from cp_debug.sweep.tasks import Task

if TYPE_CHECKING:
    from distributed import Client

Connect = Callable[[bool], AbstractContextManager["Client"]]
"""Opens the workers; its argument tells whether some task needs a GPU."""


@dataclass(frozen=True)
class Finished:
    """A sweep that is done, as far as it can be."""

    log: SweepLog
    places: dict[str, int]
    """Key → place in the grid."""
    seconds: float
    """Duration of this run."""
    ran: int
    """Tasks of this run; the others were in the log."""

    @property
    def reread(self) -> bool:
        """Whether some records are of an earlier run."""
        return self.ran < len(self.places)

    def results(self) -> Iterator[Record]:
        """The records with a result, each with its ``place``, in no order."""
        return (record for record in self._records() if "result" in record)

    def failures(self) -> list[Record]:
        """The records of tasks that failed, in the order of the grid."""
        return sorted((record for record in self._records() if "error" in record), key=lambda each: each["place"])

    def _records(self) -> Iterator[Record]:
        return (record | {"place": self.places[record["key"]]} for record in self.log.records(self.places))


def run(
    tasks: Callable[[], Iterable[Task]],
    log: SweepLog,
    connect: Connect,
    *,
    retry_failed: bool = False,
    on_progress: Callable[[Progress], None] = lambda progress: None,
) -> Finished:
    """Run the tasks that ``log`` does not have; those that failed stay failed unless ``retry_failed``.

    ``tasks`` gives them anew at every call, so that nobody holds them all. Raises InputError for a grid that has a task
    twice and for ``retry_failed`` where none failed, ClusterLost, and what the tasks' files raise; never for a task
    that fails.
    """
    started = time.monotonic()
    places: dict[str, int] = {}
    gpu = False
    for task in tasks():
        if task.key in places:
            raise InputError(f"{task.params.get('label', task.kind)}: twice in the sweep; its files are the same")
        places[task.key] = len(places)
        gpu |= task.gpu
    progress = Progress(len(places))
    finished, failed = set(), False
    for record in log.records(places):
        if "result" in record:
            progress.done += 1
        elif retry_failed:
            failed = True
            continue
        else:
            progress.failed += 1
        finished.add(record["key"])
    if retry_failed and not failed:
        raise InputError(f"--retry-failed: it would do nothing here: {log.path} has no task of this sweep that failed")
    left_count = len(places) - len(finished)
    on_progress(progress)
    if left_count:
        with connect(gpu) as client:
            progress.started = time.monotonic()
            Queue(client, log, progress, on_progress).run(lambda: (t for t in tasks() if t.key not in finished))
    return Finished(log, places, time.monotonic() - started, left_count)
