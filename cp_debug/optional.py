"""Optional packages: imported when used, with one sentence when they are missing."""

from __future__ import annotations

import importlib
import importlib.metadata
import json
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from urllib.parse import urlsplit
from urllib.request import url2pathname

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
        raise MissingPackage(f"this needs the package {package!r}: {install(extra)}") from None


def check_there(package: str, extra: str) -> None:
    """Raise MissingPackage where a package is missing, without importing it: at once, before work that needs it."""
    if find_spec(package) is None:
        raise MissingPackage(f"this needs the package {package!r}: {install(extra)}")


def install(extra: str) -> str:
    """The command that installs an extra of this distribution, and where it works: cpdebug is in no index."""
    folder = source_folder()
    return f"pip install '.[{extra}]' in {folder or 'a checkout of cpdebug'}"


def source_folder() -> Path | None:
    """The folder that this distribution was installed from, as pip recorded it; None where that is gone or unknown."""
    try:
        recorded = importlib.metadata.distribution("cpdebug").read_text("direct_url.json")
        url = urlsplit(json.loads(recorded or "{}").get("url", ""))
    except (importlib.metadata.PackageNotFoundError, ValueError):
        return None
    folder = Path(url2pathname(url.path))
    return folder if url.scheme == "file" and (folder / "pyproject.toml").is_file() else None
