"""The client of ``runner.py``: in this Python when mmdet3d imports here, else in that of ``CPDEBUG_MMDET3D_PYTHON``."""

from __future__ import annotations

import importlib
import importlib.util
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch import nn

from cp_debug.errors import InputError, MissingPackage
from cp_debug.interpreter import Interpreter, InterpreterFailed
from cp_debug.optional import install
from cp_debug.reading import read_npz
from cp_debug.recipes.base import Arrays
from cp_debug.recipes.mmdet3d import runner

ENVIRONMENT = "CPDEBUG_MMDET3D_PYTHON"
TIME_LIMIT = 3600.0
"""Seconds for one job: a forward of a large detector on a CPU is the longest."""


class Answer(NamedTuple):
    """A command's result and arrays."""

    result: Mapping[str, Any]
    arrays: Arrays


class ProgramFailed(InputError):
    """torch cannot export a part of the detector as a program."""


class DetectorClient:
    """Runs commands of ``runner.py``.

    Raises MissingPackage when there is no mmdet3d, with both ways to get it.
    """

    def __init__(self) -> None:
        self._detectors: list[runner.BuiltDetector] = []
        self._interpreter: Interpreter | None = None
        python = os.environ.get(ENVIRONMENT)
        if (missing := _missing()) is None:
            return
        if not python:
            raise MissingPackage(f"{missing}; {_install()}")
        try:
            self._interpreter = Interpreter(python, runner.__file__, time_limit=TIME_LIMIT, on_event=lambda event: None)
        except InterpreterFailed as failure:
            raise MissingPackage(f"{ENVIRONMENT}: {failure}; {_install()}") from None

    @property
    def where(self) -> str:
        """The interpreter in which mmdet3d runs, for people."""
        return "this Python" if self._interpreter is None else self._interpreter.python

    def module(self, branch: str) -> nn.Module | None:
        """A branch of the open detector itself; None where it lives in another process."""
        return self._detectors[0].branches[branch] if self._interpreter is None else None

    @property
    def encoder(self) -> nn.Module | None:
        """The pillar encoder behind the decoration; None where it lives in another process."""
        return runner.Encoder(self._detectors[0].model.pts_voxel_encoder).eval() if self._detectors else None

    def call(self, command: str, arrays: Arrays | None = None, **arguments: Any) -> Answer:
        """Run one command. Raises MissingPackage for what its interpreter lacks, InputError for every other failure."""
        with tempfile.TemporaryDirectory(prefix="cpdebug-mmdet3d-") as folder:
            sent, received = Path(folder) / "given.npz", Path(folder) / "made.npz"
            np.savez(sent, **(arrays or {}))  # type: ignore[arg-type]
            step = {"command": command, **arguments, "arrays": str(sent), "made": str(received)}
            result = self._execute({"steps": [step]})
            if error := result.get("error"):
                raise self._to_exception(command, error)
            return Answer(result["results"][0], read_npz(received))

    def _execute(self, job: dict[str, Any]) -> dict[str, Any]:
        if self._interpreter is None:
            return runner.execute(job, lambda event: None, self._detectors)
        try:
            return self._interpreter.work(job)
        except InterpreterFailed as failure:
            raise MissingPackage(f"{ENVIRONMENT}: {failure}; {_install()}") from None

    def _to_exception(self, command: str, error: Mapping[str, str]) -> Exception:
        kind, message = error["kind"], error["message"]
        if kind == "import":
            return MissingPackage(f"{message}; {_install()}")
        if kind == "config":
            return InputError(message)
        if kind == "program":
            return ProgramFailed(message)
        return InputError(f"mmdet3d in {self.where} failed in {command}: {message}\n{error.get('traceback', '')}")


def _install() -> str:
    return (
        f"either set {ENVIRONMENT} to a Python >= 3.8 that has mmdet3d (`make mmdet3d-env` in a checkout of cpdebug "
        f"builds one for CPUs), or install mmdet3d into this one: {install('mmdet3d')}, then pip install --no-deps "
        "mmdet==3.3.0 mmdet3d==1.4.0"
    )


def _missing() -> str | None:
    """The reason why mmdet3d cannot be used in this Python; None where it can."""
    spec = importlib.util.find_spec("mmdet3d")
    if spec is None or spec.origin is None:  # a folder of that name is no package
        return "this Python has no mmdet3d"
    try:
        importlib.import_module("mmdet3d")
    except Exception as error:  # it checks its dependencies' versions with assert
        return f"this Python cannot import mmdet3d: {error}"
    return None
