"""Workers of a sweep: processes on this machine, or a Dask cluster by its address."""

from __future__ import annotations

import atexit
import logging
import os
import signal
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from multiprocessing.resource_tracker import ensure_running
from tempfile import TemporaryDirectory
from types import FrameType
from typing import TYPE_CHECKING, Any

from cp_debug.backends.spec import BackendSpec
from cp_debug.errors import TOGETHER, BackendUnavailable, CpdebugError, InputError, system_reason
from cp_debug.optional import require
from cp_debug.sweep.admission import check_scheduler

if TYPE_CHECKING:
    from distributed import Client, LocalCluster, Nanny


TRIES = 3
"""Number of workers here that a task may kill."""
_QUIET = {"distributed.admin.low-level-log-length": 10}
"""Dask keeps its last messages, tasks included, for its developers: here they are what would grow."""
_ENDS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
"""Signals that ask for the end."""
_OF_GROUPS = [getattr(signal, name) for name in ("SIGHUP", "SIGQUIT", "SIGUSR1", "SIGUSR2") if hasattr(signal, name)]
"""Signals that end a process, besides those that Python's tracker of resources ignores by itself."""
_PRE_SPAWN = "distributed.nanny.pre-spawn-environ"
_KEEP_FREED = {name: str(1 << 40) for name in ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_")}
_KEEP_FREED["MALLOC_ARENA_MAX"] = "1"
"""Workers keep freed memory. Dask would have them give every freed 64 KiB back to the system, and glibc every tensor
above 32 MiB, or above 64 MiB in a thread with a heap of its own. A task of large tensors then takes up to twice as
long, for page faults."""
_LOCAL = {
    "distributed.scheduler.worker-saturation": 1.0,  # none waits behind a task, so one that kills takes no other along
    "distributed.worker.profile.enabled": False,
    "distributed.worker.memory.monitor-interval": "500ms",
    "distributed.admin.tick.interval": "500ms",
    "distributed.admin.system-monitor.interval": "5s",
}
"""Settings that let Dask watch itself more rarely: else that takes a twentieth of two cores beside two workers."""


class ClusterLost(CpdebugError):
    """The scheduler or all workers went away and did not come back; everything finished so far is in the log."""

    exit_code = 3


@contextmanager
def local_workers(count: int | None, *, gpu: bool = False, gpus: int | None = None) -> Iterator[Client]:
    """Start ``count`` worker processes here, by default as many as there are cores.

    Each takes one task at a time on one thread, so that results do not depend on how many they are. gpu: one process a
    GPU at most, each seeing its own, with the resource ``GPU=1``; gpus: so many of them, whatever ``count`` is.
    Raises BackendUnavailable where there are fewer GPUs, MissingPackage without Dask, ClusterLost when a process dies
    while it starts.
    """
    require("distributed", "dask")
    import dask
    from distributed import Client, LocalCluster

    options: dict[str, Any] = {
        "threads_per_worker": 1,
        "processes": True,
        "dashboard_address": "127.0.0.1:0",
        "silence_logs": logging.CRITICAL,
        "scheduler_kwargs": {"allowed_failures": TRIES - 1},
    }
    devices: list[str] = []
    if gpu:
        devices = _devices(gpus or 1)
        count = gpus or min(count or len(devices), len(devices))
        options["resources"] = {"GPU": 1}
    options["worker_class"] = _nanny(devices)
    with ExitStack() as stack:
        # Dask leaves the folder of a worker that dies while it starts.
        folder = stack.enter_context(TemporaryDirectory(prefix="cpdebug-workers-", ignore_cleanup_errors=True))
        environment = dask.config.get(_PRE_SPAWN) | _KEEP_FREED
        settings: dict[str, Any] = {"temporary-directory": folder, _PRE_SPAWN: environment}
        stack.enter_context(dask.config.set({**_QUIET, **_LOCAL, **settings}))
        stack.push(_quiet_after)
        _start_tracker()
        try:
            with _signals_wait():  # a cluster that is half there cannot be closed
                cluster = LocalCluster(n_workers=count, **options)
                stack.callback(_close, cluster)
        except RuntimeError as error:
            raise ClusterLost(
                f"--workers: a process died while it started ({error}); its output is above. Workers import the script "
                "that starts them, so it must start them only if __name__ == '__main__'"
            ) from None
        yield stack.enter_context(Client(cluster, set_as_default=False))


def _start_tracker() -> None:
    """Start the process of Python's that removes what others leave, deaf to signals that end a whole group.

    Begun later, it would unblock signals in what starts workers, and these would have them.
    """
    if not hasattr(signal, "pthread_sigmask"):
        ensure_running()
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _OF_GROUPS)
    try:
        ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def needs_gpu(spec: BackendSpec) -> bool:
    """Whether a backend runs on CUDA: because its spec says so, or because nothing else can run it."""
    if spec.device is not None:
        return spec.device != "cpu"
    from cp_debug.backends.ort_options import CUDA_ONLY

    return spec.family == "trt" or spec.name == "torch-tf32" or (spec.family == "ort" and spec.variant in CUDA_ONLY)


def _nanny(devices: list[str]) -> type[Nanny]:
    from distributed import Nanny

    class QuietNanny(Nanny):
        """Starts a worker that Ctrl-C in the terminal does not reach; of ``devices`` worker n sees the n-th alone."""

        def __init__(self, scheduler: str, *, name: int, **options: Any) -> None:
            if hasattr(signal, "pthread_sigmask"):  # this is Dask's own thread, of which the worker has the mask
                signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
            env = {"CUDA_VISIBLE_DEVICES": devices[name % len(devices)]} if devices else None
            super().__init__(scheduler, name=name, env=env, **options)

    return QuietNanny


def _close(cluster: LocalCluster) -> None:
    with _signals_wait():
        cluster.close()


@contextmanager
def _signals_wait() -> Iterator[None]:
    """Context at whose end the first signal that asked for the end meanwhile is answered; a second one at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    held: list[tuple[int, float]] = []
    handlers = {number: handler for number in _ENDS if callable(handler := signal.getsignal(number))}

    def hold(number: int, frame: FrameType | None) -> None:
        if not held:
            held.append((number, time.monotonic()))
        elif time.monotonic() - held[0][1] > TOGETHER:
            handlers[signal.Signals(number)](number, frame)

    for number in handlers:
        signal.signal(number, hold)
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        if held:
            handlers[signal.Signals(held[0][0])](held[0][0], None)


def _quiet_after(kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
    """Keep Dask from telling, once its work was interrupted, what became of each part of it."""
    if kind is not None and not issubclass(kind, Exception):
        from distributed.deploy.spec import close_clusters

        atexit.unregister(close_clusters)
        logging.getLogger("asyncio").setLevel(logging.CRITICAL + 1)


def _devices(least: int) -> list[str]:
    """Names of the GPUs that this process sees, as CUDA_VISIBLE_DEVICES has them."""
    import torch

    count = torch.cuda.device_count()
    if count < least:
        seen = f"torch sees {count or 'no'} CUDA device{'s' if count > 1 else ''} here"
        if count:
            raise BackendUnavailable("cuda", f"{seen}, --gpus asks for {least}", nearest=f"--gpus {count}")
        raise BackendUnavailable("cuda", f"{seen}; --cluster ADDRESS takes workers elsewhere that have GPU=1")
    named = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    return (named or [str(index) for index in range(count)])[:count]


@contextmanager
def remote_workers(address: str) -> Iterator[Client]:
    """The workers of a scheduler, ``tcp://host:8786``.

    Raises InputError when nothing answers there, or a scheduler of another version of Dask; MissingPackage without it.
    """
    require("distributed", "dask")
    import dask
    from distributed import Client
    from distributed.versions import VersionMismatchWarning

    with dask.config.set(_QUIET):
        try:
            check_scheduler(address)
            with warnings.catch_warnings():  # other versions are refused by name, above and in ``admission``
                warnings.simplefilter("ignore", VersionMismatchWarning)
                client = Client(address, set_as_default=False)
        except (OSError, ValueError) as error:
            reason, expected = system_reason(error) if isinstance(error, OSError) else error, "expected tcp://HOST:PORT"
            raise InputError(f"--cluster: no scheduler answers at {address} ({reason}); {expected}") from None
        with client:
            yield client
