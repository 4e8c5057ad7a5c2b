"""``python -m cp_debug`` is the command ``cpdebug``."""

from __future__ import annotations

import signal
import sys
from contextlib import suppress
from pathlib import Path
from typing import NoReturn


def main() -> None:
    """Run the command line, and end with its exit code, also where a library ends the process."""
    try:
        from cp_debug.cli.guard import guarded
    except KeyboardInterrupt:
        _interrupted()
    guarded(run)


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
    """Do the last things once everything is said: Ctrl-C cannot change it, and torch's empty folder goes."""
    with suppress(ValueError):  # not the main thread
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    folders = sys.modules.get("torch._inductor.runtime.cache_dir_utils")
    if folders is not None:
        with suppress(Exception):  # its exporter makes it among temporary files, when it is imported
            Path(folders.default_cache_dir()).rmdir()


if __name__ == "__main__":
    main()
