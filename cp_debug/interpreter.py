"""Another Python that runs jobs, for libraries that this one lacks.

It is a process of its own: it can crash, hang or flood its output without harm, and is killed with all its children
when the time is up or the user interrupts. It takes one job after the other, as starting costs seconds, until one
fails.

A job is a folder. ``script JOB_FOLDER --stay`` reads ``job.json`` there, leaves ``result.json`` (``{"results": [...]}``
and, if a step failed, ``"error"``), prints events as JSON objects, one a line, the last one ``{"event": "done"}``, and
takes the next folder from stdin.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import tempfile
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from cp_debug.errors import InputError, system_reason
from cp_debug.reading import read_json
from cp_debug.safe_text import without_traceback

TAIL = 12
"""Number of lines of output that an error message repeats."""
LINE = 1 << 16
"""Number of bytes of output taken at once, and about the longest line that is taken as one."""
OLDEST = (3, 8)
ANSWER = 20.0
"""Seconds within which an interpreter says its version."""

_LARGEST = 1 << 53
"""Largest number that a progress event may hold."""


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and abs(value) <= _LARGEST  # nor is NaN


_EVENTS: dict[str, dict[str, Callable[[Any], bool]]] = {
    "log": {"text": _is_text},
    "progress": {"phase": _is_text, "done": _is_number, "steps": _is_number},
    "step": {"command": _is_text},
    "done": {},
}
"""Event → fields that it must have; a line that lacks one is output."""
_LAYERS = ("layer", "layers")
"""Fields that a progress event may have besides: whole numbers."""

OnEvent = Callable[[Mapping[str, Any]], None]
"""Takes ``{"event": "log" | "progress" | "step" | "output", …}`` as the script sends them. Sessions of TensorRT add
``building`` (``level``) and ``built`` around each engine, ``compared`` (``text``: what the outputs are like) and
``stopped`` (``text``)."""


UNASKED = 300_000
"""Lines that a process may print before its first step: what writes more does not run the script. A long line counts as
one for each ``WIDTH`` characters."""
WIDTH = 200
CLOSING = 1.0
"""Seconds that the output of a process that has ended is waited for: a child of its may hold the pipe."""
BUILD_STOPPED = "; --builder-level 0 to 2 builds faster; without --no-cache the next run continues from about here"
"""Advice after a build of TensorRT's was stopped."""


def how_far(event: Mapping[str, Any]) -> str:
    """One line for a ``progress`` event. A builder that reports none of its own is followed by its log: kernels timed,
    and the layer that it is at, of those that fusing left."""
    phase, done, steps = event["phase"], event["done"], event["steps"]
    if not event.get("layer"):
        return f"{phase} ({done} of {steps})" if steps else f"{phase} ({done})"
    of = f" of {event['layers']}" if event.get("layers") else ""
    return f"{phase} (layer {event['layer']}{of}, {done} kernels so far)"


class InterpreterFailed(Exception):
    """Another Python gave no result; the message says why.

    ``unusable``: it is no interpreter that can run the script. ``timed_out``: it was killed at its time limit.
    """

    def __init__(self, reason: str, *, unusable: bool = False, timed_out: bool = False) -> None:
        super().__init__(reason)
        self.unusable, self.timed_out = unusable, timed_out


class Interpreter:
    """``python`` running ``script``. Raises InterpreterFailed when it is no Python of at least ``OLDEST``.

    ``time_limit`` is in seconds, for one job; ``environment`` gives defaults to the process's environment.
    """

    def __init__(
        self,
        python: str,
        script: str,
        *,
        time_limit: float,
        on_event: OnEvent,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.python, self.time_limit, self.on_event = python, time_limit, on_event
        self.process: subprocess.Popen[bytes] | None = None
        self._script, self._environment = script, environment or {}
        _check(python)

    def work(self, job: Mapping[str, Any]) -> dict[str, Any]:
        """Do a job; return the content of ``result.json``.

        Raises InterpreterFailed when the process dies, hangs or leaves none.
        """
        with tempfile.TemporaryDirectory(prefix="cpdebug-job-") as name:
            folder = Path(name)
            (folder / "job.json").write_text(json.dumps(job), encoding="utf-8")
            try:
                process = self._give(name)
                tail, doing = self._follow(process)
                if process.poll() is not None:
                    self.close()
                return self._read_result(folder / "result.json", process.returncode or 0, tail, doing)
            except BaseException:  # Ctrl-C too
                self.close()
                raise

    def close(self) -> None:
        """End the process, if there is one."""
        if self.process is not None:
            _end(self.process)
            self.process = None

    def _give(self, folder: str) -> subprocess.Popen[bytes]:
        """The process that works on ``folder``: the one that waits for more, or a new one."""
        if self.process is not None:
            assert self.process.stdin is not None
            try:
                self.process.stdin.write(f"{folder}\n".encode())
                self.process.stdin.flush()
                return self.process
            except OSError:
                self.close()
        self.process = subprocess.Popen(
            [self.python, self._script, folder, "--stay"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={**self._environment, **os.environ},
        )
        weakref.finalize(self, _end, self.process)
        return self.process

    def _follow(self, process: subprocess.Popen[bytes]) -> tuple[Sequence[str], str]:
        """Pass the output on until the job is done; returns its last lines and the command that ran last."""
        end = time.monotonic() + self.time_limit
        tail: deque[str] = deque(maxlen=TAIL)
        doing, before = "starting", 0
        try:
            for line in filter(str.strip, _lines(process, end)):
                event = _event(line)
                before += (1 + len(line) // WIDTH) * (doing == "starting")
                if before > UNASKED:
                    reason = f"{self.python} writes without end and does not run {Path(self._script).name}"
                    raise InterpreterFailed(reason + _quote(tail), unusable=True)
                if event["event"] == "done":
                    return tail, doing
                if event["event"] == "step":
                    doing = str(event["command"])
                elif event["event"] in ("log", "output"):
                    tail.append(str(event["text"]))
                self.on_event(event)
            process.wait(timeout=max(end - time.monotonic(), 0.001))
        except (TimeoutError, subprocess.TimeoutExpired):
            reason = f"its process did not end within {self.time_limit:g} s (last command: {doing})"
            raise InterpreterFailed(reason + _quote(tail), timed_out=True) from None
        return tail, doing

    def _read_result(self, path: Path, status: int, tail: Sequence[str], doing: str) -> dict[str, Any]:
        if status < 0 or status > 128:  # a shell in between reports signals as 128 + number
            reason = f"its process died: {signal.strsignal(-status if status < 0 else status - 128)} (in {doing})"
            raise InterpreterFailed(reason + _quote(tail))
        try:
            result = read_json(path)
            if not isinstance(result, dict) or not isinstance(result.get("results"), list):
                raise InputError(f"{path}: no results")
        except InputError:
            reason = f"{self.python} left no result (exit status {status}, last command: {doing})"
            raise InterpreterFailed(reason + _quote(tail), unusable=True) from None
        return result


def _check(python: str) -> None:
    hello = "import sys; print('cpdebug', *sys.version_info[:2])"
    streams: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    try:
        process = subprocess.Popen([python, "-c", hello], **streams, start_new_session=True)
    except OSError as error:
        raise InterpreterFailed(f"{python} cannot be run ({system_reason(error)})", unusable=True) from None
    except ValueError:
        raise InterpreterFailed(f"{python!r} cannot be run (a null byte in its name)", unusable=True) from None
    try:
        # One line is enough: what is no interpreter may write without end.
        words = next(_lines(process, time.monotonic() + ANSWER), "").split()
    except TimeoutError:
        raise InterpreterFailed(f"{python} does not answer like a Python interpreter", unusable=True) from None
    finally:
        _end(process)
    if words[:1] != ["cpdebug"] or len(words) != 3:
        raise InterpreterFailed(f"{python} is not a Python interpreter", unusable=True)
    if not (words[1].isdigit() and words[2].isdigit() and len(words[1] + words[2]) < 9):
        raise InterpreterFailed(f"{python} is not a Python interpreter", unusable=True)
    if (int(words[1]), int(words[2])) < OLDEST:
        needed = ".".join(map(str, OLDEST))
        raise InterpreterFailed(f"{python} is Python {words[1]}.{words[2]}; {needed} or newer is needed", unusable=True)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill the process and its children, as far as they still run, and close its pipes."""
    with suppress(ProcessLookupError, PermissionError):  # all have ended
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with suppress(OSError):  # what was written last may not have been read
                pipe.close()


def _lines(process: subprocess.Popen[bytes], end: float) -> Iterator[str]:
    """The process's output line by line; raises TimeoutError at ``end`` (monotonic seconds)."""
    assert process.stdout is not None
    file = process.stdout.fileno()
    unfinished = b""
    while True:
        while not select.select([file], [], [], max(0.0, min(end - time.monotonic(), CLOSING)))[0]:
            if process.poll() is not None:
                if unfinished:
                    yield unfinished.decode(errors="replace")
                return
            if time.monotonic() >= end:
                raise TimeoutError
        chunk = os.read(file, LINE)
        *lines, unfinished = (unfinished + chunk).split(b"\n")
        if unfinished and (not chunk or len(unfinished) > LINE):
            lines, unfinished = [*lines, unfinished], b""
        yield from (line.decode(errors="replace") for line in lines)
        if not chunk:
            return


def _event(line: str) -> dict[str, Any]:
    """A line of the protocol, or what a library printed."""
    try:
        event = json.loads(line)
        fits = all(check(event[field]) for field, check in _EVENTS[event["event"]].items())
        if fits and all(event.get(field) is None or _is_number(event[field]) for field in _LAYERS):
            return event
    except (ValueError, TypeError, KeyError, RecursionError):
        pass
    return {"event": "output", "text": line.rstrip()}


def _quote(tail: Sequence[str]) -> str:
    return "".join(f"\n  | {line}" for line in without_traceback("\n".join(tail)).split("\n") if line)
