"""Packages that are imported when used, and one sentence when they are missing."""

from __future__ import annotations

import importlib
from types import ModuleType

from cp_debug.errors import MissingPackage


def require(package: str, extra: str) -> ModuleType:
    """Import ``package``, or raise MissingPackage with the command that installs it.

    ``extra`` is the extra of this distribution that carries the package, e.g. ``cpu`` for onnxruntime.
    """
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != package.partition(".")[0]:
            raise
        raise MissingPackage(f"this needs the package {package!r}: pip install 'cpdebug[{extra}]'") from None
