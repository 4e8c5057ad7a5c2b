"""Runs jobs of ``runner.py``: in this interpreter when it has TensorRT, in another one when told so.

``python`` (``--trt-python``), then the environment's ``CPDEBUG_TRT_PYTHON``, then this interpreter.
"""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cp_debug.backends.tensorrt import runner
from cp_debug.backends.tensorrt.answers import Facts, Failure
from cp_debug.errors import BackendUnavailable, CpdebugError, InputError
from cp_debug.interpreter import BUILD_STOPPED, Interpreter, InterpreterFailed, OnEvent, how_far
from cp_debug.optional import install
from cp_debug.reading import typed

ENVIRONMENT = "CPDEBUG_TRT_PYTHON"
_PROBED: dict[tuple[str | None, int], dict[str, Any]] = {}


class BuildFailed(InputError):
    """TensorRT has no engine for a graph that it could parse."""


class BuildTimedOut(InputError):
    """A build took longer than ``--build-timeout`` allows."""


class ParseFailed(InputError):
    """TensorRT's parser cannot read an operator, or one of its forms; ``nodes`` are the ONNX nodes concerned."""

    def __init__(self, message: str, nodes: Sequence[str]) -> None:
        super().__init__(message)
        self.nodes = nodes


class RunnerClient:
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
        self._progress: Mapping[str, Any] = {}
        """Last progress event of the build: phase, steps done, steps in all."""
        self.python = python or os.environ.get(ENVIRONMENT) or None
        self._interpreter: Interpreter | None = None
        if self.python is not None:
            try:
                self._interpreter = Interpreter(
                    self.python,
                    runner.__file__,
                    time_limit=time_limit,
                    on_event=self._tell,
                    environment={"CUDA_MODULE_LOADING": "LAZY"},  # before CUDA 12.2 all kernels are loaded, for seconds
                )
            except InterpreterFailed as error:
                raise self._unavailable(error) from None
        else:
            check_named(None, spec)

    def probe(self, device: int = 0) -> dict[str, Any]:
        """Versions, device and abilities, as ``runner.probe`` tells them; another interpreter is asked once."""
        key = (self.python, device)
        if self.python is None or key not in _PROBED:
            _PROBED[key] = self.checked(Facts, self.execute([{"command": "probe", "device": device}]))[0]
        return _PROBED[key]

    def versions(self, device: int = 0) -> dict[str, str]:
        """TensorRT, its Python and numpy, the GPU and its driver's CUDA version."""
        facts = self.probe(device)
        return {
            "tensorrt": facts["tensorrt"],
            "tensorrt_python": facts["python"],
            "gpu": facts["device"]["name"],
            "compute_capability": facts["device"]["compute_capability"],
            "cuda_driver": str(facts["device"]["cuda_driver"]),
        }

    def execute(self, steps: Sequence[Mapping[str, Any]], build_timeout: float | None = None) -> list[dict[str, Any]]:
        """Run the steps in order, in one process; one result each.

        ``build_timeout``: seconds for a step that builds; then BuildTimedOut says how far it was.

        Raises InputError for what the user can mend (model, shapes, memory), BackendUnavailable for what TensorRT or
        its interpreter lacks, and for a process that dies, hangs or does not speak the protocol.
        """
        limit = self.time_limit if build_timeout is None else min(build_timeout, self.time_limit)
        job, self._progress = {"steps": list(steps), "time_limit": limit}, {}
        try:
            if self._interpreter is not None:
                self._interpreter.time_limit = limit
                result = self._interpreter.work(job)
            else:
                result = runner.execute(job, self._tell)
        except InterpreterFailed as problem:
            if problem.timed_out and build_timeout is not None:
                raise self._timed_out(steps[0], limit) from None
            raise self._unavailable(problem) from None
        try:
            failure, results = _read(result, steps)
        except InputError as problem:
            self.close()
            reason = f"its runner's answer cannot be read: {problem}"
            raise BackendUnavailable(self.spec, reason, nearest=_nearest(self.spec)) from None
        if failure is not None:
            self.close()
            if failure["kind"] == "time" and build_timeout is not None:
                raise self._timed_out(steps[0], limit)
            raise _to_exception(self.spec, failure, steps[len(results)])
        return results

    def checked(self, kind: Any, results: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Results as a type of ``answers``. Raises BackendUnavailable for results of another type."""
        try:
            return typed(list[kind], list(results), "")
        except InputError as problem:
            self.close()
            reason = f"its runner's answer cannot be read{problem}"
            raise BackendUnavailable(self.spec, reason, nearest=_nearest(self.spec)) from None

    def close(self) -> None:
        """End the process, if there is one."""
        if self._interpreter is not None:
            self._interpreter.close()

    def _tell(self, event: Mapping[str, Any]) -> None:
        if event["event"] == "progress":
            self._progress = event
        self.on_event(event)

    def _timed_out(self, step: Mapping[str, Any], limit: float) -> BuildTimedOut:
        far = f"; it was at {how_far(self._progress)}" if self._progress else ""
        message = f"{step.get('onnx', self.spec)}: the build was stopped after {limit:g} s (--build-timeout){far}"
        return BuildTimedOut(message + BUILD_STOPPED)

    def _unavailable(self, error: InterpreterFailed) -> BackendUnavailable:
        how = _install() if error.unusable else None
        return BackendUnavailable(self.spec, str(error), install=how, nearest=_nearest(self.spec))


def check_named(python: str | None, spec: str) -> None:
    """Raise BackendUnavailable when this Python has no TensorRT and nothing names one that has."""
    if not python and not os.environ.get(ENVIRONMENT) and importlib.util.find_spec("tensorrt") is None:
        raise BackendUnavailable(
            spec,
            "there is no TensorRT in this Python and no other one is named",
            install=_install(),
            nearest=_nearest(spec),
        )


def _read(result: Mapping[str, Any], steps: Sequence[Mapping[str, Any]]) -> tuple[Failure | None, list[dict[str, Any]]]:
    """The failure, if there is one, and the results up to it.

    Raises InputError for answers that do not fit the steps.
    """
    commands = [step["command"] for step in steps]
    failure: Failure | None = None
    if result.get("error") is not None:
        failure = typed(Failure, result["error"], "its error")
        del commands[min(len(result["results"]), len(steps) - 1) :]
    if len(result["results"]) != len(commands):
        raise InputError(f"{len(result['results'])} results for {len(commands)} steps")
    answers = zip(commands, result["results"], strict=True)
    return failure, [typed(dict[str, Any], answer, f"result of {c}") for c, answer in answers]


def _install() -> str:
    return f"{install('gpu')}, or set {ENVIRONMENT} (--trt-python) to a Python >= 3.8 that has TensorRT and numpy"


def _nearest(spec: str) -> str:
    return {"trt-tf32": "emu-tf32", "trt-bf16": "emu-bf16", "trt-fp16": "emu-fp16acc"}.get(
        spec.partition("@")[0], "ort"
    )


def _to_exception(spec: str, error: Failure, step: Mapping[str, Any]) -> CpdebugError:
    """The runner's error for the user, with what can be done about it."""
    kind, message, nodes = error["kind"], error["message"], ", ".join(error["nodes"])
    subject = step.get("onnx") or step.get("engine") or spec
    if kind == "import":
        return BackendUnavailable(spec, message, install=_install(), nearest=_nearest(spec))
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
    if kind == "script":
        return InputError(message)
    if kind == "time":
        return InputError(f"{subject}: {message}")
    if kind == "build":
        return BuildFailed(f"{subject}: TensorRT cannot build it\n{message}{_without_libraries(message)}")
    if kind == "internal":
        return BackendUnavailable(
            spec, f"the runner failed in {step['command']}: {message}\n{_innermost(error.get('traceback', ''))}"
        )
    return InputError(f"{subject}: {message}")


def _without_libraries(message: str) -> str:
    """Advice where cuBLAS or cuDNN, which TensorRT 8.6 hands to plug-ins, cannot be loaded; else empty."""
    if not re.search(r"SymbolAddress for (cublas|cudnn)\w+ could not be loaded", message):
        return ""
    return "\n--tactic-sources=-CUBLAS,-CUBLAS_LT,-CUDNN builds without these libraries; plug-ins then get none"


def _innermost(traceback: str) -> str:
    """Place where an error was raised, as ``in main of runner.py, line 12``: the last frame of a Python traceback."""
    frames = re.findall(r'^  File "(.+)", line (\d+), in (.+)$', traceback, re.M)
    if not frames:
        return ""
    file, line, function = frames[-1]
    return f"in {function} of {Path(file).name}, line {line}"
