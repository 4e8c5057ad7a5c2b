"""``python -m cp_debug`` is the command ``cpdebug``."""

from __future__ import annotations

import getpass
import os
import re
import signal
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import NoReturn


def main() -> None:
    """Run the command line, and end with its exit code, also where a library ends the process."""
    try:
        from cp_debug.cli.guard import guarded

        guarded(run)
    except KeyboardInterrupt:
        _interrupted()


def run() -> None:
    """Run the command line in this process. Ctrl-C while it is still being loaded ends it as it does later."""
    try:
        from cp_debug.cli.main import main as command_line
    except KeyboardInterrupt:
        _interrupted()
    try:
        command_line()
    finally:
        _end()


def _interrupted() -> NoReturn:
    print("interrupted", file=sys.stderr)
    sys.exit(130)


def _end() -> None:
    """Do the last things once everything is said: a signal cannot change it, and torch's empty folder goes."""
    with suppress(ValueError):  # not the main thread
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, _Last())
        if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # as nohup has it
            signal.signal(signal.SIGHUP, _Last())
    folders = sys.modules.get("torch._inductor.runtime.cache_dir_utils")
    if folders is not None or "distributed" in sys.modules:
        with suppress(Exception):  # its exporter makes it among temporary files, when it is imported, in workers too
            Path(folders.default_cache_dir() if folders is not None else _torch_folder()).rmdir()


class _Last:
    """Handler of SIGTERM and SIGHUP while the process ends: what is tidied is not stopped, unless one comes again."""

    def __init__(self) -> None:
        self._first = 0.0

    def __call__(self, number: int, frame: object) -> None:
        now = time.monotonic()
        self._first = self._first or now
        if now - self._first > 1.0:  # a thread of the user's that does not end
            os._exit(128 + number)


def _torch_folder() -> str:
    """Torch's folder for kernels, as its ``default_cache_dir`` names it."""
    name = re.sub(r'[\\/:*?"<>|]', "_", getpass.getuser())
    return os.path.join(tempfile.gettempdir(), f"torchinductor_{name}")  # noqa: PTH118


if __name__ == "__main__":
    main()
