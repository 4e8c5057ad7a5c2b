"""Lines that libraries write to stderr past Python, made safe as what Python writes is; their warnings, left out."""

from __future__ import annotations

import os
import re
import sys
import sysconfig
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from cp_debug.safe_text import SafeStream

PATIENCE = 2.0
"""Seconds that the end waits for the last lines: a process that outlives its command may hold the stream open."""
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")


_LIBRARIES = {"modelopt", "numpy", "onnx", "onnx_ir", "onnxruntime", "onnxscript", "torch", "transformers"}
"""Packages that warn of how they are called, or call each other, which no user of the command line can change."""
_PYTHON = Path(sysconfig.get_path("stdlib"))


@contextmanager
def no_library_warnings() -> Iterator[None]:
    """Context in which libraries' warnings about code are not shown; those of a user's own module are.

    All are where Python was told what to do with warnings (``PYTHONWARNINGS``).
    """
    before = warnings.showwarning

    def shown(message: Any, category: Any, filename: str, *place: Any, **more: Any) -> None:
        if not _of_library(filename):
            before(message, category, filename, *place, **more)

    if sys.warnoptions:
        yield
        return
    warnings.showwarning = shown
    try:
        yield
    finally:
        if warnings.showwarning is shown:
            warnings.showwarning = before


def _of_library(filename: str) -> bool:
    path = Path(filename)
    for packages in ("site-packages", "dist-packages"):
        if packages in path.parts:
            return path.parts[path.parts.index(packages) + 1 :][:1] in {(name,) for name in _LIBRARIES}
    return path.is_relative_to(_PYTHON)


@contextmanager
def safe_library_log() -> Iterator[None]:
    """Context in which lines of libraries on stderr lose their colours, and other control characters are shown."""
    sys.stderr.flush()
    terminal = os.dup(2)
    read, write = os.pipe()
    os.dup2(write, 2)
    os.close(write)
    before, encoding, errors = sys.stderr, sys.stderr.encoding, sys.stderr.errors
    sys.stderr = os.fdopen(terminal, "w", 1, encoding=encoding, errors=errors)
    reader = threading.Thread(target=_pass_on, args=(read, SafeStream(sys.stderr)), daemon=True)
    reader.start()
    try:
        yield
    finally:
        os.dup2(terminal, 2)  # what was written is read to its end then
        reader.join(PATIENCE)
        sys.stderr.close()
        sys.stderr = before


def _pass_on(descriptor: int, stream: SafeStream) -> None:
    with os.fdopen(descriptor, "rb") as lines, suppress(OSError, ValueError):  # stderr may be full, or closed by now
        for line in lines:
            stream.write(_COLOUR.sub("", line.decode(errors="replace")))
