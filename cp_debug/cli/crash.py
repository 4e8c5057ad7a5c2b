"""Message and log of an error that nobody expected."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shlex
import sys
import tempfile
import time
import traceback
from pathlib import Path

from cp_debug import version
from cp_debug.errors import text_of

EXIT_CODE = 70
"""Exit code other than those of a comparison (0 to 3): EX_SOFTWARE of sysexits.h."""
REPORT = "https://github.com/cpdebug/cpdebug/issues"
KEPT = 20
"""Number of logs that are kept; older ones are removed."""
SHOWN = 300
"""Number of characters of the error's own text that the message quotes; the log has all."""
PACKAGES = ("torch", "numpy", "onnx", "onnxruntime", "onnxscript", "tensorrt", "typer", "rich")


def log_crash(error: BaseException) -> str:
    """Write the log, and return the message for the user: what happened, where the log lies, what to send."""
    text = " ".join(text_of(error).split())
    excerpt = "".join(c if c.isprintable() else "?" for c in text[:SHOWN]) + ("…" if len(text) > SHOWN else "")
    summary = f"{type(error).__name__}: {excerpt}" if excerpt else type(error).__name__
    try:
        where = str(write_log(error))
        send = f"please send that file, and the model if you may, to {REPORT}"
    except OSError as failure:
        where = f"could not be written ({failure.strerror or failure})"
        send = f"please send the command and the versions of `cpdebug doctor` to {REPORT}"
    return f"an unexpected error, so nothing was decided: {summary}\nlog: {where}\n{send}"


def write_log(error: BaseException) -> Path:
    """Write the log of an error: time, command, versions and traceback; return its path.

    Raises OSError where none can be written.
    """
    folder = log_folder()
    folder.mkdir(parents=True, exist_ok=True)
    now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    lines = [
        f"time      {now}",
        f"command   {shlex.join(['cpdebug', *sys.argv[1:]])}",
        f"folder    {Path.cwd()}",
        f"python    {platform.python_version()} on {platform.platform()}",
        f"cpdebug   {version.full()}",
        *(f"{name:<9} {_version(name)}" for name in PACKAGES),
        "",
        *traceback.format_exception(error),
    ]
    path = folder / f"{now.replace(':', '')}-{os.getpid()}.log"
    path.write_text("\n".join(line.rstrip("\n") for line in lines) + "\n", encoding="utf-8", errors="backslashreplace")
    for old in sorted(folder.glob("*.log"))[:-KEPT]:
        old.unlink(missing_ok=True)
    return path


def log_folder() -> Path:
    """Folder of the logs: ``cpdebug`` in the user's folder for state (XDG).

    It is in the folder for temporary files where that one is read-only.
    """
    state = os.environ.get("XDG_STATE_HOME")
    try:
        folder = Path(state) if state and Path(state).is_absolute() else Path.home() / ".local" / "state"
    except RuntimeError:  # no home
        return Path(tempfile.gettempdir()) / "cpdebug"
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    return (folder if os.access(existing, os.W_OK) else Path(tempfile.gettempdir())) / "cpdebug"


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
