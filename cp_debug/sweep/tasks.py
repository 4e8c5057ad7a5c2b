"""Queued tasks: the name of a pure function, its parameters, and the files that it reads."""

from __future__ import annotations

import hashlib
import importlib
import json
import socket
import time
import traceback
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from cp_debug.errors import CpdebugError, InputError
from cp_debug.files import file_hash, resolved
from cp_debug.safe_text import prints_aside
from cp_debug.store import Store
from cp_debug.version import __version__

KINDS = {
    "bisect": "cp_debug.sweep.bisecting:task",
    "eval": "cp_debug.sweep.evaluating:task",
    "ablate": "cp_debug.sweep.ablating:task",
    "sensitivity": "cp_debug.sweep.sensitivity:task",
    "search": "cp_debug.sweep.searching:task",
}
"""Kind → ``module:function``; the function maps parameters to a JSON-safe result. Its module tells how results of the
kind are merged (``merge``, a list of groups), and how one becomes rows of a table (``rows``, ``COLUMNS``)."""

TOPIC = "cpdebug-shared-store"
"""Topic of Dask's events on which workers tell that a store failed."""
Parameters = Mapping[str, Any]


@dataclass(frozen=True)
class Task:
    """One call of a pure function.

    ``kind`` is one of ``KINDS``, or ``module:function`` of anything that workers can import.

    params: JSON-safe. ``files``, where there is one, is path → digest of every file that the task reads; ``label`` is
    what the user calls it, ``shared`` where exports are kept; neither matters to the result.

    gpu: whether it needs a worker with the resource ``GPU``.
    """

    kind: str
    params: Parameters
    gpu: bool = False

    @cached_property
    def key(self) -> str:
        """Hash of the parameters, the files' names and contents (not where they lie) and this project's version."""
        files = self.params.get("files", {})
        text = json.dumps({n: v for n, v in self.params.items() if n not in ("label", "shared")}, sort_keys=True)
        for path in sorted(files, key=len, reverse=True):
            text = text.replace(json.dumps(path)[1:-1], f"{Path(path).name} {files[path]}")
        return hashlib.sha256(f"{__version__} {self.kind} {text}".encode(errors="surrogateescape")).hexdigest()[:32]


def module_of(kind: str) -> Any:
    """The module of one of ``KINDS``."""
    return importlib.import_module(KINDS[kind].partition(":")[0])


def run_task(kind: str, params: Parameters) -> dict[str, Any]:
    """Run one task, on a worker: ``result`` or ``error``, ``seconds``, and ``worker``.

    An exception becomes text here, because not every exception survives the way back. What the task prints goes to
    stderr, since workers share stdout with the command that started them.
    """
    start = time.perf_counter()
    try:
        check_files(params.get("files", {}))
        with prints_aside():
            module, _, name = KINDS.get(kind, kind).partition(":")
            outcome: dict[str, Any] = {"result": getattr(importlib.import_module(module), name)(params)}
    except CpdebugError as error:
        outcome = {"error": str(error)}
    except Exception as error:  # a defect in one task must not end the sweep
        outcome = {"error": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()}
    return {**outcome, "seconds": time.perf_counter() - start, "worker": worker_name()}


@lru_cache(4)
def shared_store(place: str) -> Store:
    """The store of a folder or URL, opened once in this process; where it fails, Dask's client is told."""
    return Store(place, on_say=lambda text: _tell_client(f"shared store: {text}"))


def _tell_client(text: str) -> None:
    from distributed import get_worker

    with suppress(ValueError):  # no worker: tasks run in this process
        get_worker().log_event(TOPIC, text)


def worker_name() -> str:
    """Address of this worker as Dask knows it, else the machine's name."""
    try:
        from distributed import get_worker

        return str(get_worker().address)
    except (ImportError, ValueError):
        return socket.gethostname()


def digests(paths: Iterable[str | Path]) -> dict[str, str]:
    """Absolute path → digest, for the parameters of a task. Raises InputError for a file that is not there."""
    return {str(path): _digest_now(path) for path in sorted({resolved(Path(path)) for path in paths})}


def check_files(files: Mapping[str, str]) -> None:
    """Raise InputError when this machine sees a file otherwise than the one where the sweep was started."""
    for path, digest in files.items():
        if _digest_now(Path(path)) != digest:
            raise InputError(f"{path}: not the file that the sweep was started with; every worker must see the same")


def _digest_now(path: Path) -> str:
    try:
        status = path.stat()
    except OSError as error:
        raise InputError(f"{path}: cannot be read here ({error.strerror}); every worker must see it") from None
    return _digest(path, status.st_mtime_ns, status.st_size)


@lru_cache(maxsize=4096)
def _digest(path: Path, changed: int, size: int) -> str:
    """``changed`` and ``size`` make a file that was written again another one."""
    if path.suffix == ".onnx":
        from cp_debug.graph.graph import Graph

        return Graph(path).digest  # with the weights that lie beside it
    return file_hash(path)
