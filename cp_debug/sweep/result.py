"""Result of a sweep: a group for each model and backend, the tasks that failed, and the whole as plain data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, get_type_hints

from cp_debug.serialize import BadField, JsonForm, part
from cp_debug.sweep.log import SCHEMA, Record
from cp_debug.sweep.run import Finished
from cp_debug.sweep.spread import SampleGroup
from cp_debug.sweep.tasks import KINDS, module_of


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

    def derived(self) -> dict[str, Any]:
        """The schema and the outcome."""
        return {"schema": SCHEMA, "passed": self.passed}

    @classmethod
    def fields_from(cls, document: dict[str, Any]) -> dict[str, Any]:
        """The document with its groups read as those of its kind. Raises BadField."""
        kind = part(str, document, "kind")
        if kind not in KINDS:
            raise BadField("kind", f"{kind!r}; expected {', '.join(KINDS)}")
        return document | {"groups": part(get_type_hints(module_of(kind).merge)["return"], document, "groups")}
