"""One queue: tasks go to Dask's workers a bounded number at a time, and each result is in the log before it is counted.

A task that kills its worker is tried three times. Dask holds a death against every task that waited on that worker,
so the third try is made at the end, alone: who dies then has done it.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple

from cp_debug.sweep.admission import Admission
from cp_debug.sweep.log import SweepLog
from cp_debug.sweep.shared import TOPIC
from cp_debug.sweep.tasks import Task, run_task
from cp_debug.sweep.workers import ClusterLost

if TYPE_CHECKING:
    from distributed import Client, Future, as_completed

TRIES = 3
"""Number of workers that a task may kill."""
LEAST = 16
"""Smallest number of tasks in flight, so that new workers find work."""
_LOOK = 2.0
"""Seconds after which the number of workers is asked for again."""
PATIENCE = 60.0
"""Seconds after which workers of this machine that are all gone are not waited for: a nanny whose worker dies while it
starts gives up. A cluster may get others at any time."""
_POLL, _LONGEST_POLL = 0.005, 0.1
"""Seconds between two looks for results: ever longer while there are none, as workers here want this core."""


@dataclass
class Progress:
    """State of a running sweep."""

    total: int
    done: int = 0
    """Tasks with a result, those of an earlier run included."""
    failed: int = 0
    running: int = 0
    waiting_for_gpu: bool = False
    """Some task needs a GPU, and no worker has one."""
    workers: dict[str, int] = field(default_factory=dict)
    """Worker → tasks that it finished in this run."""
    present: int = 0
    """Workers that are there now."""
    refused: str = ""
    """Workers of a cluster that get no tasks, and why."""
    store: str = ""
    """Words of the first worker whose shared store failed."""
    started: float = field(default_factory=time.monotonic)

    @property
    def rates(self) -> dict[str, float]:
        """Worker → tasks a second."""
        seconds = max(time.monotonic() - self.started, 1e-9)
        return {worker: count / seconds for worker, count in self.workers.items()}


class _Flight(NamedTuple):
    """A task that Dask has. ``alone``: no other is in flight."""

    task: Task
    alone: bool


class Queue:
    """Runs tasks on a client's workers and writes what they give into a log."""

    def __init__(
        self, client: Client, log: SweepLog, progress: Progress, on_progress: Callable[[Progress], None]
    ) -> None:
        self._client, self._log, self.progress, self._on_progress = client, log, progress, on_progress
        self._address = client.scheduler.address
        self._flying: dict[Any, _Flight] = {}
        self._again: deque[Task] = deque()
        self._suspects: deque[Task] = deque()
        self._deaths: Counter[str] = Counter()
        self._submitted = 0
        self._threads, self._looked = 0, float("-inf")
        self._admission = Admission(client) if client.cluster is None else None
        self._admitted: list[str] | None = None
        self._manned = time.monotonic()
        client.subscribe_topic(TOPIC, self._told)

    def _told(self, event: Any) -> None:
        """Take a worker's word about its store; Dask gives the time and the text."""
        self.progress.store = self.progress.store or str(event[1])

    def run(self, tasks: Iterator[Task]) -> None:
        """Run tasks until each is in the log. Raises ClusterLost when the scheduler, or all workers here, stay away."""
        from distributed import as_completed

        landed, pause = as_completed(loop=self._client.loop), _POLL
        while self._fill(tasks, landed):
            batch = landed.next_batch(block=False)
            self._land(batch)
            self.progress.running = min(len(self._flying), self._threads)
            self._on_progress(self.progress)
            pause = _POLL if batch else min(2 * pause, _LONGEST_POLL)
            if not landed.has_ready():
                time.sleep(pause)

    def _fill(self, tasks: Iterator[Task], landed: as_completed) -> bool:
        """Submit what fits; whether anything is in flight."""
        self._look()
        if any(flight.alone for flight in islice(self._flying.values(), 1)):
            return True
        while len(self._flying) < max(2 * self._threads, LEAST):
            if (task := self._again.popleft() if self._again else next(tasks, None)) is None:
                break
            self._submit(task, landed, alone=False)
        if not self._flying and self._suspects:
            self._submit(self._suspects.popleft(), landed, alone=True)
        return bool(self._flying)

    def _submit(self, task: Task, landed: as_completed, *, alone: bool) -> None:
        self._connected()
        self._submitted += 1  # a key of its own for every try, as Dask remembers what became of the last
        # Keys that begin alike make a group, of which Dask sends a worker no more than it can run at once.
        future = self._client.submit(
            run_task,
            task.kind,
            dict(task.params),
            key=(task.kind, task.key, self._submitted),
            resources={"GPU": 1} if task.gpu else None,
            workers=self._admitted,
        )
        self._flying[future.key] = _Flight(task, alone)
        landed.add(future)

    def _land(self, futures: Sequence[Future]) -> None:
        """Take what is finished, in one question to the scheduler."""
        from distributed import CancelledError, KilledWorker

        finished = {future.key: future for future in futures if future.status == "finished"}
        try:
            results = self._client.gather(finished)
        except (OSError, CancelledError, KilledWorker):  # the scheduler went away, or the workers that held them
            results = {}
        for future in futures:
            flight = self._flying.pop(future.key)
            error = future.exception() if future.status == "error" else None
            if future.key in results:
                self._record(flight.task, results[future.key])
            elif isinstance(error, KilledWorker):
                self._killed(flight, error.allowed_failures + 1)
            elif error is not None:  # it never came to ``run_task``: a worker without this package
                self._fail(flight.task, f"{type(error).__name__}: {error}")
            else:
                self._again.append(flight.task)
            future.release()

    def _killed(self, flight: _Flight, deaths: int) -> None:
        task = flight.task
        self._deaths[task.key] += deaths
        if flight.alone:
            self._fail(task, f"killed {self._deaths[task.key]} workers, the last with nothing else running")
        elif self._deaths[task.key] >= TRIES - 1:
            self._suspects.append(task)
        else:
            self._again.append(task)

    def _fail(self, task: Task, why: str) -> None:
        self._record(task, {"error": why, "seconds": 0.0, "worker": ""})

    def _record(self, task: Task, outcome: dict[str, Any]) -> None:
        self._log.append({"key": task.key, "kind": task.kind, "params": dict(task.params), **outcome})
        if "error" in outcome:
            self.progress.failed += 1
        else:
            self.progress.done += 1
        if worker := outcome["worker"]:
            self.progress.workers[worker] = self.progress.workers.get(worker, 0) + 1

    def _connected(self) -> None:
        """Wait while Dask connects again. Raises ClusterLost when it gave up."""
        while self._client.status == "connecting":
            time.sleep(0.05)
        if self._client.status != "running":
            raise self._lost(f"the scheduler at {self._address} went away and did not come back")

    def _lost(self, why: str) -> ClusterLost:
        finished = f"{self.progress.done} of {self.progress.total} tasks are in {self._log.path}"
        return ClusterLost(f"{why}; {finished}: the same command goes on from there")

    def _look(self) -> None:
        """Ask now and then how many tasks can run at once: clusters grow and shrink.

        Raises InputError when none of a cluster's workers has this code.
        """
        if time.monotonic() - self._looked < _LOOK:
            return
        self._connected()
        self._looked = now = time.monotonic()
        try:
            workers = self._client.scheduler_info(n_workers=-1)["workers"]  # some versions tell of 5 unless asked
        except (OSError, asyncio.TimeoutError):  # the scheduler went away just now
            return
        self.progress.present = len(workers)
        if workers or self._client.cluster is None:
            self._manned = now
        elif now - self._manned > PATIENCE:
            raise self._lost("all worker processes died, and none was started again")
        if self._admission is not None:
            self._admitted = self._admission.look(workers)
            self.progress.refused = self._admission.told()
            workers = {address: worker for address, worker in workers.items() if address not in self._admission.refused}
        self._threads = sum(worker["nthreads"] for worker in workers.values())
        gpus = any(worker["resources"].get("GPU") for worker in workers.values())
        self.progress.waiting_for_gpu = not gpus and any(flight.task.gpu for flight in self._flying.values())
