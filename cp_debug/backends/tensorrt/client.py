"""Runs jobs of ``runner.py``: in this interpreter when it has TensorRT, in another one when told so.

``python`` (``--trt-python``), then the environment's ``CPDEBUG_TRT_PYTHON``, then this interpreter. Another interpreter
is a process of its own: it can crash, hang or flood its output without harm, and is killed with all its children when
the time is up or the user interrupts. It takes one job after the other, as starting costs seconds, until one fails.
"""

from __future__ import annotations

import importlib.util
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

from cp_debug.backends.tensorrt import runner
from cp_debug.errors import BackendUnavailable, CpdebugError, InputError

ENVIRONMENT = "CPDEBUG_TRT_PYTHON"
INSTALL = (
    f"pip install 'cpdebug[gpu]', or set {ENVIRONMENT} (--trt-python) to a Python >= 3.8 that has TensorRT and numpy"
)
TAIL = 12
"""Lines of output that an error message repeats."""
LINE = 1 << 16
"""Bytes of output taken at once, and about the longest line that is taken as one."""

_PROBED: dict[tuple[str | None, int], dict[str, Any]] = {}

OnEvent = Callable[[Mapping[str, Any]], None]
"""Takes ``{"event": "log" | "progress" | "step" | "output", …}`` as the runner sends them."""


class ParseFailed(InputError):
    """TensorRT's parser does not know an operator, or not like this; ``nodes`` are the ONNX nodes it is about."""

    def __init__(self, message: str, nodes: Sequence[str]) -> None:
        super().__init__(message)
        self.nodes = nodes


class Client:
    """A place where TensorRT runs.

    Raises BackendUnavailable when there is none; ``spec`` is the backend's name in that message. ``time_limit`` is in
    seconds, for one job; in this process it ends builds on TensorRT 10 and newer, and is checked by nothing before.
    """

    def __init__(
        self,
        python: str | None = None,
        *,
        spec: str = "trt",
        time_limit: float = 3600.0,
        on_event: OnEvent | None = None,
    ) -> None:
        self.spec, self.time_limit = spec, time_limit
        self.on_event: OnEvent = on_event or (lambda event: None)
        self.python = python or os.environ.get(ENVIRONMENT) or None
        self._process: subprocess.Popen[bytes] | None = None
        if self.python is not None:
            self._check_python(self.python)
        elif importlib.util.find_spec("tensorrt") is None:
            raise BackendUnavailable(
                spec,
                "there is no TensorRT in this Python and no other one is named",
                install=INSTALL,
                nearest=_nearest(spec),
            )

    def probe(self, device: int = 0) -> dict[str, Any]:
        """Versions, device and abilities, as ``runner.probe`` tells them; another interpreter is asked once."""
        key = (self.python, device)
        if self.python is None or key not in _PROBED:
            _PROBED[key] = self.execute([{"command": "probe", "device": device}])[0]
        return _PROBED[key]

    def execute(self, steps: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Run the steps in order, in one process; one result each.

        Raises InputError for what the user can mend (model, shapes, memory), BackendUnavailable for what TensorRT or
        its interpreter lacks, and for a process that dies, hangs or does not speak the protocol.
        """
        job = {"steps": list(steps), "time_limit": self.time_limit}
        result = runner.execute(job, self.on_event) if self.python is None else self._run_elsewhere(self.python, job)
        if error := result.get("error"):
            self.close()
            raise _to_exception(self.spec, error, steps[len(result["results"])])
        return result["results"]

    def close(self) -> None:
        """End the process, if there is one."""
        if self._process is not None:
            _end(self._process)
            self._process = None

    def _check_python(self, python: str) -> None:
        hello = "import sys; print('cpdebug', *sys.version_info[:2])"
        try:
            done = subprocess.run([python, "-c", hello], capture_output=True, text=True, errors="replace", timeout=60)
        except OSError as error:
            raise self._unusable(f"{python} cannot be run ({error.strerror})") from None
        except subprocess.TimeoutExpired:
            raise self._unusable(f"{python} does not answer like a Python interpreter") from None
        words = done.stdout.split()
        if words[:1] != ["cpdebug"] or len(words) != 3:
            raise self._unusable(f"{python} is not a Python interpreter")
        if (int(words[1]), int(words[2])) < (3, 8):
            raise self._unusable(f"{python} is Python {words[1]}.{words[2]}; 3.8 or newer is needed")

    def _unusable(self, reason: str) -> BackendUnavailable:
        return BackendUnavailable(self.spec, reason, install=INSTALL, nearest=_nearest(self.spec))

    def _run_elsewhere(self, python: str, job: Mapping[str, Any]) -> dict[str, Any]:
        with tempfile.TemporaryDirectory(prefix="cpdebug-trt-") as name:
            folder = Path(name)
            (folder / "job.json").write_text(json.dumps(job), encoding="utf-8")
            try:
                process = self._give(python, name)
                tail, doing = self._follow(process)
                if process.poll() is not None:
                    self.close()
                return self._read_result(folder / "result.json", process.returncode or 0, tail, doing)
            except BaseException:  # Ctrl-C too
                self.close()
                raise

    def _give(self, python: str, folder: str) -> subprocess.Popen[bytes]:
        """The process that works on ``folder``: the one that waits for more, or a new one."""
        if self._process is not None:
            assert self._process.stdin is not None
            try:
                self._process.stdin.write(f"{folder}\n".encode())
                self._process.stdin.flush()
                return self._process
            except OSError:
                self.close()
        self._process = _start([python, runner.__file__, folder, "--stay"])
        weakref.finalize(self, _end, self._process)
        return self._process

    def _follow(self, process: subprocess.Popen[bytes]) -> tuple[Sequence[str], str]:
        """Pass the output on until the job is done; returns its last lines and the command that ran last."""
        end = time.monotonic() + self.time_limit
        tail: deque[str] = deque(maxlen=TAIL)
        doing = "starting"
        try:
            for line in _lines(process, end):
                event = _event(line)
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
            raise BackendUnavailable(self.spec, reason + _quote(tail), nearest=_nearest(self.spec)) from None
        return tail, doing

    def _read_result(self, path: Path, status: int, tail: Sequence[str], doing: str) -> dict[str, Any]:
        if status < 0 or status > 128:  # a shell in between reports signals as 128 + number
            reason = f"its process died: {signal.strsignal(-status if status < 0 else status - 128)} (in {doing})"
            raise BackendUnavailable(self.spec, reason + _quote(tail), nearest=_nearest(self.spec))
        try:
            result = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(result["results"], list):
                raise TypeError
        except (OSError, ValueError, TypeError, KeyError):
            reason = f"{self.python} left no result (exit status {status}, last command: {doing})"
            raise self._unusable(reason + _quote(tail)) from None
        return result


def _start(command: Sequence[str]) -> subprocess.Popen[bytes]:
    """A process in a group of its own."""
    return subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        env={"CUDA_MODULE_LOADING": "LAZY", **os.environ},  # before CUDA 12.2 all kernels are loaded, for seconds
    )


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill the process and its children, if it still runs, and close its pipes."""
    if process.poll() is None:
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
    rest = b""
    while True:
        left = end - time.monotonic()
        if left <= 0 or not select.select([file], [], [], left)[0]:
            raise TimeoutError
        chunk = os.read(file, LINE)
        *lines, rest = (rest + chunk).split(b"\n")
        if rest and (not chunk or len(rest) > LINE):
            lines, rest = [*lines, rest], b""
        yield from (line.decode(errors="replace") for line in lines)
        if not chunk:
            return


def _event(line: str) -> dict[str, Any]:
    """A line of the protocol, or what a library printed."""
    try:
        event = json.loads(line)
        if event["event"] in ("log", "progress", "step", "done"):
            return event
    except (ValueError, TypeError, KeyError):
        pass
    return {"event": "output", "text": line.rstrip()}


def _quote(tail: Sequence[str]) -> str:
    return "".join(f"\n  | {line}" for line in tail)


def _nearest(spec: str) -> str:
    return {"trt-tf32": "emu-tf32", "trt-bf16": "emu-bf16", "trt-fp16": "emu-fp16acc"}.get(
        spec.partition("@")[0], "ort"
    )


def _to_exception(spec: str, error: Mapping[str, Any], step: Mapping[str, Any]) -> CpdebugError:
    """The runner's error for the user, with what can be done about it."""
    kind, message, nodes = error["kind"], error["message"], ", ".join(error["nodes"])
    subject = step.get("onnx") or step.get("engine") or spec
    if kind == "import":
        return BackendUnavailable(spec, message, install=INSTALL, nearest=_nearest(spec))
    if kind in ("unsupported", "device"):
        return BackendUnavailable(spec, message, nearest=_nearest(spec))
    if kind == "parse":
        return ParseFailed(f"{subject}: TensorRT cannot parse it\n{message}", error["nodes"])
    if kind == "kernel":
        return InputError(
            f"{subject}: TensorRT has no kernel for {nodes} in this precision; --keep-fp32 leaves nodes out\n{message}"
        )
    if kind == "memory":
        return InputError(f"{subject}: out of memory; lower the workspace limit or the shapes\n{message}")
    if kind == "engine":
        return InputError(f"{message}\nengines run on the TensorRT version and GPU that built them: build it again")
    if kind == "time":
        return InputError(f"{subject}: {message}")
    if kind == "build":
        return InputError(f"{subject}: TensorRT cannot build it\n{message}")
    if kind == "internal":
        return BackendUnavailable(
            spec, f"the runner failed in {step['command']}: {message}\n{error.get('traceback', '')}"
        )
    return InputError(f"{subject}: {message}")
