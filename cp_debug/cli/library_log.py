"""Warnings of libraries about code, which no user of the command line can change, left out."""

from __future__ import annotations

import sys
import sysconfig
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

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
