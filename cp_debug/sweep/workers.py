"""Workers of a sweep: processes on this machine, or a Dask cluster by its address."""

from __future__ import annotations

import asyncio
import atexit
import logging
import os
import signal
import socket
import threading
import time
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import lru_cache
from importlib.metadata import version
from multiprocessing.resource_tracker import ensure_running
from tempfile import TemporaryDirectory
from types import FrameType
from typing import TYPE_CHECKING, Any

from cp_debug.backends.spec import BackendSpec
from cp_debug.errors import TOGETHER, BackendUnavailable, CpdebugError, InputError, in_one_line, system_reason
from cp_debug.optional import require
from cp_debug.safe_text import some

if TYPE_CHECKING:
    from distributed import Client, LocalCluster, Nanny


ANSWER = 10.0
"""Seconds in which a scheduler accepts a connection, and in which it answers."""
NAMED = 3
"""Workers that a message names; of others it has their number."""
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
            _check_scheduler(address)
            with warnings.catch_warnings():  # other versions are refused by name, above and in ``refusals``
                warnings.simplefilter("ignore", VersionMismatchWarning)
                client = Client(address, set_as_default=False)
        except (OSError, ValueError) as error:
            reason, expected = system_reason(error) if isinstance(error, OSError) else error, "expected tcp://HOST:PORT"
            raise InputError(f"--cluster: no scheduler answers at {address} ({reason}); {expected}") from None
        with client:
            yield client


def _check_scheduler(address: str) -> None:
    """Raise InputError for a scheduler of another version of Dask than is installed here, OSError where none answers.

    It is asked before there is a client: one that meets another version may fail in ways of its own, and never end.
    """
    import dask
    from dask.utils import parse_timedelta
    from distributed.comm.addressing import parse_address, parse_host_port
    from distributed.core import rpc

    seconds = min(ANSWER, parse_timedelta(dask.config.get("distributed.comm.timeouts.connect")))
    scheme, place = parse_address(address)
    if scheme in ("tcp", "tls"):  # Dask tries a dead address again and again, for half a minute
        socket.create_connection(parse_host_port(place), seconds).close()

    async def ask() -> Any:
        async with rpc(address) as scheduler:
            return await asyncio.wait_for(scheduler.versions(packages=None), seconds)

    try:
        with ThreadPoolExecutor(1) as pool:  # a loop may run in this thread already, as in a notebook
            found = pool.submit(asyncio.run, ask()).result()
    except (asyncio.TimeoutError, MemoryError, TypeError, ValueError):  # what is no length may be read as one
        raise OSError(f"what listens there did not answer like a scheduler within {seconds:g} s") from None
    theirs, ours = (found.get("packages") or {}).get("distributed"), version("distributed")
    if theirs and theirs != ours:
        raise InputError(
            f"--cluster: the scheduler at {address} is of Dask {theirs}, here is {ours}; expected one version for "
            f"scheduler, workers and this command: pip install 'distributed=={theirs}' here, or {ours} there"
        )


def refusals(client: Client, present: Collection[str], answers: dict[str, Any]) -> dict[str, str]:
    """Address of a worker that gets no tasks → why: it does not run the code of this process.

    ``answers``: what workers said, to which those that are new are added.
    """
    if new := [address for address in present if address not in answers]:
        found = client.run(_question(), workers=new, on_error="return") or {}
        gone = (OSError, asyncio.TimeoutError)  # those that come back are asked then
        answers |= {address: answer for address, answer in found.items() if not isinstance(answer, gone)}
    return {address: why for address in present if address in answers and (why := _refusal(answers[address]))}


def told(refused: Mapping[str, str]) -> str:
    """Say which workers were refused, and why: a sentence for each reason."""
    reasons: dict[str, list[str]] = {}
    for address, why in refused.items():
        reasons.setdefault(why, []).append(address)
    return "; ".join(f"{some(of, NAMED)}: {why}" for why, of in reasons.items())


def _refusal(answer: Any) -> str:
    """The reason why a worker that gave this answer gets no tasks; empty when it gets them."""
    wanted = "expected the code that the sweep was started with"
    if isinstance(answer, Exception):
        return f"it cannot say what it runs ({in_one_line(answer)}); {wanted}"
    here = running()
    for name in ("Python", "Dask", "cpdebug"):
        if name not in answer:
            return f"cpdebug cannot be imported there ({answer['missing']}); install it on all workers"
        if answer[name] != here[name]:
            return f"{name} {answer[name]}, here {here[name]}; expected the same on all workers"
    if answer["code"] != here["code"]:
        return f"cpdebug {here['cpdebug']} with other code than here (another commit, or changed files); {wanted}"
    return ""


@lru_cache(maxsize=1)
def running() -> dict[str, str]:
    """What this process runs: Python, Dask, cpdebug, and ``code``, the SHA-256 of its source files by their paths."""
    return _question()()


def _question() -> Callable[[], dict[str, str]]:
    """A function that tells what a process runs. It goes to workers by value: they may not have this package."""

    def tell() -> dict[str, str]:
        import hashlib
        import importlib.metadata
        import importlib.util
        import pathlib
        import platform

        answer = {"Dask": importlib.metadata.version("distributed")}
        answer["Python"] = ".".join(platform.python_version_tuple()[:2])
        try:
            from cp_debug.version import __version__ as ours

            folder = pathlib.Path(importlib.util.find_spec("cp_debug").origin).parent  # type: ignore[union-attr, arg-type]
            digest = hashlib.sha256()
            for file in sorted(folder.rglob("*.py")):
                digest.update(str(file.relative_to(folder)).encode() + b"\0" + file.read_bytes() + b"\0")
        except Exception as error:
            return {**answer, "missing": f"{type(error).__name__}: {error}"}
        return {**answer, "cpdebug": ours, "code": digest.hexdigest()}

    return tell
