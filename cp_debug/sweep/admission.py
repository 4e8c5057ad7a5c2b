"""Admission of a cluster's workers and scheduler: tasks go only to those that run the code of this process."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from functools import lru_cache
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from cp_debug.errors import InputError, in_one_line
from cp_debug.safe_text import some

if TYPE_CHECKING:
    from distributed import Client

ANSWER = 10.0
"""Seconds in which a scheduler accepts a connection, and in which it answers."""
NAMED = 3
"""Workers that a message names; of others it has their number."""


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
            try:
                answers = self._client.run(_question(), workers=new, on_error="return") or {}
            except (OSError, asyncio.TimeoutError):  # gone again: those that come back are asked then
                answers = {}
            for address, answer in answers.items():
                if not isinstance(answer, (OSError, asyncio.TimeoutError)):
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
        return "; ".join(f"{some(of, NAMED)}: {why}" for why, of in reasons.items())


def refusal(answer: Any) -> str:
    """The reason why a worker that gave this answer gets no tasks; empty when it gets them."""
    wanted = "expected the code that the sweep was started with"
    if isinstance(answer, Exception):
        return f"it cannot say what it runs ({in_one_line(answer)}); {wanted}"
    here = _here()
    for name in ("Python", "Dask", "cpdebug"):
        if name not in answer:
            return f"cpdebug cannot be imported there ({answer['missing']}); install it on all workers"
        if answer[name] != here[name]:
            return f"{name} {answer[name]}, here {here[name]}; expected the same on all workers"
    if answer["code"] != here["code"]:
        return f"cpdebug {here['cpdebug']} with other code than here (another commit, or changed files); {wanted}"
    return ""


def check_scheduler(address: str) -> None:
    """Raise InputError for a scheduler of another version of Dask than is installed here, OSError where none answers.

    It is asked before there is a client: one that meets another version may fail in ways of its own, and never end.
    """
    from distributed.utils import LoopRunner

    loop = LoopRunner()  # in a thread of its own where one runs already, as in a notebook
    loop.start()
    try:
        found = loop.run_sync(_versions, address)
    finally:
        loop.stop()
    theirs, ours = (found.get("packages") or {}).get("distributed"), version("distributed")
    if theirs and theirs != ours:
        raise InputError(
            f"--cluster: the scheduler at {address} is of Dask {theirs}, here is {ours}; expected one version for "
            f"scheduler, workers and this command: pip install 'distributed=={theirs}' here, or {ours} there"
        )


async def _versions(address: str) -> Any:
    import dask
    from dask.utils import parse_timedelta
    from distributed.comm.addressing import parse_address, parse_host_port
    from distributed.core import rpc

    seconds = min(ANSWER, parse_timedelta(dask.config.get("distributed.comm.timeouts.connect")))
    scheme, place = parse_address(address)
    if scheme in ("tcp", "tls"):
        # Dask tries a dead address again and again, for half a minute.
        try:
            connecting = asyncio.open_connection(*parse_host_port(place))
            (await asyncio.wait_for(connecting, seconds))[1].close()
        except asyncio.TimeoutError:
            raise OSError(f"nothing answers there within {seconds:g} s") from None
    async with rpc(address) as scheduler:
        try:
            return await asyncio.wait_for(scheduler.versions(packages=None), seconds)
        except (asyncio.TimeoutError, TypeError, ValueError):
            raise OSError(f"what listens there did not answer like a scheduler within {seconds:g} s") from None


def code_hash() -> str:
    """SHA-256 of the package's source files, by their paths in it."""
    return _here()["code"]


@lru_cache(maxsize=1)
def _here() -> dict[str, str]:
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
