"""Imports ahead of workers: one process imports what tasks need while the command still reads; workers are its forks.

A worker that is started afresh imports torch and this project for itself, seconds of a core each; a fork has them.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import signal
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from multiprocessing import forkserver

METHOD = "forkserver"
"""Name by which multiprocessing and Dask know it."""
_MODULES, _WITH_INT8 = "cp_debug.sweep.imported", "cp_debug.sweep.imported_int8"
_ONE_THREAD = {f"{library}_NUM_THREADS": "1" for library in ("OMP", "MKL", "OPENBLAS")}
"""Variables that Dask sets for workers. Libraries read them when they are loaded."""
KEEP_FREED = {name: str(1 << 40) for name in ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_")}
KEEP_FREED["MALLOC_ARENA_MAX"] = "1"
"""Workers keep freed memory. Dask would have them give every freed 64 KiB back to the system, and glibc every tensor
above 32 MiB, or above 64 MiB in a thread with a heap of its own. A task of large tensors then takes up to twice as
long, for page faults."""

_begun = False


def begin(*, int8: bool) -> None:
    """Start the process whose forks are the workers that ``local_workers`` starts later on.

    int8: import the library of fake quantizers, too. Nothing happens where forks of a process with torch are not safe:
    outside of Linux.
    """
    global _begun
    if _begun or sys.platform != "linux":
        return
    multiprocessing.get_context(METHOD).set_forkserver_preload([_MODULES, *([_WITH_INT8] if int8 else [])])
    with _environment({**_ONE_THREAD, "PYTHONHASHSEED": "6640", **KEEP_FREED}):  # the seed that Dask's nanny sets
        forkserver.ensure_running()
    atexit.register(_end, os.getpid())
    _begun = True


def has_begun() -> bool:
    """Whether workers can be forks."""
    return _begun


def _end(owner: int) -> None:
    """End the process at once: by itself it would go on importing, for seconds after the command."""
    process = getattr(forkserver._forkserver, "_forkserver_pid", None)
    if process is None or os.getpid() != owner:  # a fork that ends has its parent's list of last things to do
        return
    with suppress(ProcessLookupError, ChildProcessError):
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)


@contextmanager
def _environment(added: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in added}
    os.environ.update(added)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
