"""Admission of a cluster's workers and scheduler: tasks go only to those that run the code of this process."""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future
from functools import lru_cache
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from cp_debug.errors import InputError, in_one_line
from cp_debug.version import __version__

if TYPE_CHECKING:
    from distributed import Client

NAMED = 3
"""Workers that a message names; of others it has their number."""
PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"


class Admission:
    """Asks each worker once what it runs."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._known: set[str] = set()
        self.refused: dict[str, str] = {}
        """Address of a worker that is given no tasks → why."""

    def look(self, workers: Iterable[str]) -> list[str] | None:
        """Ask the workers, by their addresses, that are new; addresses of those with this code, or None for all.

        Raises InputError when there are workers and all are refused.
        """
        present = list(workers)
        if new := [address for address in present if address not in self._known]:
            for address, answer in self._answers(new).items():
                if isinstance(answer, (OSError, asyncio.TimeoutError)):  # gone again: the next one there is asked
                    continue
                self._known.add(address)
                if why := refusal(answer):
                    self.refused[address] = why
        admitted = [address for address in present if address not in self.refused]
        if present and not admitted:
            raise InputError(f"--cluster: {self.told()}")
        return None if len(admitted) == len(present) else admitted

    def told(self) -> str:
        """Say which workers were refused, and why: a sentence for each reason."""
        reasons: dict[str, list[str]] = {}
        for address, why in self.refused.items():
            reasons.setdefault(why, []).append(address)
        return "; ".join(
            f"{', '.join(addresses[:NAMED])}{f' and {len(addresses) - NAMED} more' if len(addresses) > NAMED else ''}"
            f": {why}"
            for why, addresses in reasons.items()
        )

    def _answers(self, addresses: list[str]) -> Mapping[str, Any]:
        try:
            return self._client.run(_question(), workers=addresses, on_error="return") or {}
        except (OSError, asyncio.TimeoutError):  # gone again: those that come back are asked then
            return {}


def refusal(answer: Any) -> str:
    """The reason why a worker that gave this answer gets no tasks; empty when it gets them."""
    wanted = "expected the code that the sweep was started with"
    if isinstance(answer, Exception):
        return f"it cannot say what it runs ({in_one_line(answer)}); {wanted}"
    if answer["python"] != PYTHON:
        return f"Python {answer['python']}, here {PYTHON}; expected the same on all workers"
    if answer["dask"] != version("distributed"):
        return f"Dask {answer['dask']}, here {version('distributed')}; expected the same on all workers"
    if missing := answer.get("missing"):
        return f"cpdebug cannot be imported there ({missing}); install it on all workers"
    if answer["version"] != __version__:
        return f"cpdebug {answer['version']}, here {__version__}; {wanted}"
    if answer["code"] != code_hash():
        return f"cpdebug {answer['version']} with other code than here (another commit, or changed files); {wanted}"
    return ""


def check_scheduler(address: str) -> None:
    """Raise InputError for a scheduler of another version of Dask than is installed here, OSError where none answers.

    It is asked before there is a client: one that meets another version may fail in ways of its own, and never end.
    """
    answer: Future[Any] = Future()

    def ask() -> None:
        try:
            answer.set_result(asyncio.run(_versions(address)))
        except Exception as error:
            answer.set_exception(error)

    # A thread has an event loop of its own, in a notebook too, and what it waits for holds no exit up.
    threading.Thread(target=ask, daemon=True).start()
    found = answer.result()
    theirs, ours = (found.get("packages") or {}).get("distributed"), version("distributed")
    if theirs and theirs != ours:
        raise InputError(
            f"--cluster: the scheduler at {address} is of Dask {theirs}, here is {ours}; expected one version for "
            f"scheduler, workers and this command: pip install 'distributed=={theirs}' here, or {ours} there"
        )


async def _versions(address: str) -> Any:
    import dask
    from dask.utils import parse_timedelta
    from distributed.core import rpc

    seconds = parse_timedelta(dask.config.get("distributed.comm.timeouts.connect"))
    async with rpc(address) as scheduler:
        try:
            return await asyncio.wait_for(scheduler.versions(packages=None), seconds)
        except (asyncio.TimeoutError, TypeError, ValueError):
            raise OSError(f"what listens there gave no answer of a scheduler within {seconds:g} s") from None


@lru_cache(maxsize=1)
def code_hash() -> str:
    """SHA-256 of the package's source files, by their paths in it."""
    return str(_question()()["code"])


def _question() -> Callable[[], dict[str, str]]:
    """A function that tells what a process runs. It goes to workers by value: they may not have this package."""

    def tell() -> dict[str, str]:
        import hashlib
        import importlib.metadata
        import importlib.util
        import pathlib
        import sys

        answer = {"python": f"{sys.version_info.major}.{sys.version_info.minor}"}
        answer["dask"] = importlib.metadata.version("distributed")
        try:
            from cp_debug.version import __version__ as ours

            found = importlib.util.find_spec("cp_debug")
            assert found is not None
            assert found.origin is not None
            folder = pathlib.Path(found.origin).parent
            digest = hashlib.sha256()
            for file in sorted(folder.rglob("*.py")):
                digest.update(str(file.relative_to(folder)).encode() + b"\0" + file.read_bytes() + b"\0")
        except Exception as error:
            return {**answer, "missing": f"{type(error).__name__}: {error}"}
        return {**answer, "version": ours, "code": digest.hexdigest()}

    return tell
