"""Result of a sweep: a group for each model and backend, the tasks that failed, and the whole as plain data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from cp_debug.sweep.log import SCHEMA, Record
from cp_debug.sweep.run import Finished


class ResultGroup(Protocol):
    """Results that belong together in the report: one model, and one test backend or all."""

    @property
    def label(self) -> str:
        """The model, as the user wrote it."""
        ...

    @property
    def passed(self) -> bool:
        """Whether nothing is wrong with it."""
        ...

    def to_dict(self) -> dict[str, Any]:
        """JSON-safe."""
        ...

    def rows(self) -> list[dict[str, Any]]:
        """Flat rows for CSV."""
        ...


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
class SweepResult:
    """Everything that ``cpdebug sweep`` shows."""

    kind: str
    tasks: int
    ran: int
    """Tasks of this run; the others were in the log."""
    seconds: float
    """Duration of this run."""
    groups: Sequence[ResultGroup]
    failures: Sequence[FailedTasks]
    log: str
    command: str = ""

    @classmethod
    def of(cls, kind: str, finished: Finished, groups: Sequence[ResultGroup], command: str = "") -> SweepResult:
        """``groups`` are what the results of ``finished`` were merged to."""
        failures = [FailedTasks.of(record) for record in finished.failures()]
        count, log = len(finished.places), str(finished.log.path)
        return cls(kind, count, finished.ran, finished.seconds, groups, failures, log, command)

    @property
    def passed(self) -> bool:
        """Whether every group passed and no task failed."""
        return not self.failures and all(group.passed for group in self.groups)

    def to_dict(self) -> dict[str, Any]:
        """The sweep as JSON-safe containers."""
        return {
            "schema": SCHEMA,
            "kind": self.kind,
            "command": self.command,
            "tasks": self.tasks,
            "ran": self.ran,
            "seconds": self.seconds,
            "log": self.log,
            "passed": self.passed,
            "groups": [group.to_dict() for group in self.groups],
            "failures": [vars(failure) for failure in self.failures],
        }
