"""A whole sweep: gives Dask the tasks that are left, has each result in the log before it is counted, and sums up.

Dask tries a task again whose worker died, as often as its scheduler allows. It holds a death against every task that
the worker had been given. So none waits behind another there; what is more than can run waits with our own scheduler.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field
from itertools import chain, islice
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any, get_type_hints

from cp_debug.errors import InputError
from cp_debug.serialize import BadField, JsonForm, part
from cp_debug.sweep.log import SCHEMA, Record, SweepLog
from cp_debug.sweep.spread import SampleGroup
from cp_debug.sweep.tasks import KINDS, TOPIC, Task, module_of, run_task
from cp_debug.sweep.workers import ClusterLost, refusals, told

if TYPE_CHECKING:
    from distributed import Client, Future


Connect = Callable[[bool], AbstractContextManager["Client"]]
"""Opens the workers; its argument tells whether some task needs a GPU."""
LEAST = 16
"""Smallest number of tasks that our own scheduler has, where they wait: results then come many at a time."""
_LOOK = 2.0
"""Seconds after which the number of workers is asked for again."""
_WAIT = 0.5
"""Seconds for which a result is waited for before the view is drawn anew."""
_MORE = 0.005
"""Seconds for more results to come along, as each question to the scheduler wants this core."""
PATIENCE = 60.0
"""Seconds after which workers of this machine that are all gone are not waited for: a nanny whose worker dies while it
starts gives up. A cluster may get others at any time."""


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
    workers: Counter[str] = field(default_factory=Counter)
    """Worker → tasks that it finished in this run."""
    present: int = 0
    """Workers that are there now."""
    refused: str = ""
    """Workers of a cluster that get no tasks, and why."""
    store: str = ""
    """Words of the first worker whose shared store failed."""
    started: float = field(default_factory=time.monotonic)

    @property
    def rate(self) -> float:
        """Tasks a second, those of this run."""
        return sum(self.workers.values()) / max(time.monotonic() - self.started, 1e-9)


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
    twice, for ``retry_failed`` where none failed and for a cluster without a worker that has this code, ClusterLost,
    and what the tasks' files raise; never for a task that fails.
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
    left = len(places) - len(finished)
    on_progress(progress)
    if left:
        with connect(gpu) as client:
            progress.started = time.monotonic()
            Queue(client, log, progress, on_progress).run(lambda: (t for t in tasks() if t.key not in finished))
    return Finished(log, places, time.monotonic() - started, left)


class Queue:
    """Runs tasks on a client's workers, a bounded number at a time, and writes what they give into a log."""

    def __init__(
        self, client: Client, log: SweepLog, progress: Progress, on_progress: Callable[[Progress], None]
    ) -> None:
        self._client, self._log, self.progress, self._on_progress = client, log, progress, on_progress
        self._address = client.scheduler.address
        self._flying: dict[Any, Task] = {}
        self._landed: SimpleQueue[Future] = SimpleQueue()
        self._submitted = 0
        self._threads: Counter[bool] = Counter()
        """Threads of all workers, and of those with a GPU."""
        self._answers: dict[str, Any] = {}
        self._admitted: list[str] | None = None
        self._looked, self._manned = float("-inf"), time.monotonic()
        client.subscribe_topic(TOPIC, self._told)

    def _told(self, event: Any) -> None:
        """Take a worker's word about its store; Dask gives the time and the text."""
        self.progress.store = self.progress.store or str(event[1])

    def run(self, tasks: Callable[[], Iterable[Task]]) -> None:
        """Run tasks until each is in the log. Raises ClusterLost when the scheduler, or all workers here, stay away."""
        left: dict[bool, Iterator[Task]] = {
            True: (task for task in tasks() if task.gpu),
            False: (task for task in tasks() if not task.gpu),
        }
        while True:
            self._look()
            for gpu, waiting in left.items():
                room = self._most(gpu) - sum(task.gpu == gpu for task in self._flying.values())
                for task in islice(waiting, max(room, 0)):
                    self._submit(task)
            if not self._flying:
                return
            for task in self._land():
                left[task.gpu] = chain((task,), left[task.gpu])
            self.progress.running = min(len(self._flying), self._threads[False])
            self._on_progress(self.progress)

    def _most(self, gpu: bool) -> int:
        """Tasks that Dask has at a time; those with resources never wait with the scheduler."""
        threads = self._threads[gpu]
        return max(threads, 1) if gpu or self._client.cluster is None else max(2 * threads, LEAST)

    def _submit(self, task: Task) -> None:
        self._connected()
        self._submitted += 1  # a key of its own for every try, as Dask remembers what became of the last
        future = self._client.submit(
            run_task,
            task.kind,
            dict(task.params),
            key=(task.kind, task.key, self._submitted),
            resources={"GPU": 1} if task.gpu else None,
            workers=self._admitted,
        )
        self._flying[future.key] = task
        future.add_done_callback(self._landed.put)

    def _land(self) -> Iterator[Task]:
        """Wait a while for what is finished, and record it; the tasks whose results are lost."""
        from distributed import CancelledError, KilledWorker

        batch: list[Future] = []
        with suppress(Empty):
            batch.append(self._landed.get(timeout=_WAIT))
            time.sleep(_MORE)
            while True:
                batch.append(self._landed.get_nowait())
        try:  # one question to the scheduler for all of them
            results = self._client.gather({each.key: each for each in batch if each.status == "finished"})
        except (OSError, CancelledError, KilledWorker):  # the scheduler went away, or the workers that held them
            results = {}
        for future in batch:
            task, error = self._flying.pop(future.key), future.exception() if future.status == "error" else None
            if future.key in results:
                self._record(task, results[future.key])
            elif error is not None:  # killed, or it never came to ``run_task``
                killed = isinstance(error, KilledWorker)
                why = f"killed {error.allowed_failures + 1} workers" if killed else f"{type(error).__name__}: {error}"
                self._record(task, {"error": why, "seconds": 0.0, "worker": ""})
            else:
                yield task
            future.release()

    def _record(self, task: Task, outcome: Mapping[str, Any]) -> None:
        self._log.append({"key": task.key, "kind": task.kind, "params": dict(task.params), **outcome})
        self.progress.failed += "error" in outcome
        self.progress.done += "error" not in outcome
        if worker := outcome["worker"]:
            self.progress.workers[worker] += 1

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
            refused = refusals(self._client, workers, self._answers) if self._client.cluster is None else {}
        except (OSError, asyncio.TimeoutError):  # the scheduler went away just now
            return
        self.progress.present = len(workers)
        if workers or self._client.cluster is None:
            self._manned = now
        elif now - self._manned > PATIENCE:
            raise self._lost("all worker processes died, and none was started again")
        self.progress.refused = told(refused)
        if workers and len(refused) == len(workers):
            raise InputError(f"--cluster: {self.progress.refused}")
        admitted = {address: worker for address, worker in workers.items() if address not in refused}
        self._admitted = list(admitted) if refused else None
        self._threads.clear()
        for worker in admitted.values():
            self._threads[False] += worker["nthreads"]
            self._threads[True] += worker["nthreads"] if worker["resources"].get("GPU") else 0
        self.progress.waiting_for_gpu = not self._threads[True] and any(task.gpu for task in self._flying.values())


@dataclass(frozen=True)
class FailedTasks:
    """A task that failed, and why."""

    label: str
    backends: list[str]
    sample: str
    error: str

    @classmethod
    def of(cls, record: Record) -> FailedTasks:
        """The failure in a record with an error."""
        params = record["params"]
        file = params.get("inputs")
        sample = f"{file}, sample {params['index']}" if file else f"sample {params.get('index', 0)}"
        return cls(params["label"], list(params.get("backends", ())), sample, record["error"])


@dataclass(frozen=True)
class SweepResult(JsonForm):
    """Everything that ``cpdebug sweep`` shows."""

    schema = SCHEMA
    derives = ("schema", "passed")
    kind: str
    tasks: int
    ran: int
    """Tasks of this run; the others were in the log."""
    seconds: float
    """Duration of this run."""
    groups: Sequence[SampleGroup]
    failures: Sequence[FailedTasks]
    log: str
    command: str = ""

    @classmethod
    def of(cls, kind: str, finished: Finished, groups: Sequence[SampleGroup], command: str = "") -> SweepResult:
        """``groups`` are what the results of ``finished`` were merged to."""
        failures = [FailedTasks.of(record) for record in finished.failures()]
        count, log = len(finished.places), str(finished.log.path)
        return cls(kind, count, finished.ran, finished.seconds, groups, failures, log, command)

    @property
    def passed(self) -> bool:
        """Whether every group passed and no task failed."""
        return not self.failures and all(group.passed for group in self.groups)

    @classmethod
    def fields_from(cls, document: dict[str, Any]) -> dict[str, Any]:
        """The document with its groups read as those of its kind. Raises BadField."""
        kind = part(str, document, "kind")
        if kind not in KINDS:
            raise BadField("kind", f"{kind!r}; expected {', '.join(KINDS)}")
        return document | {"groups": part(get_type_hints(module_of(kind).merge)["return"], document, "groups")}
