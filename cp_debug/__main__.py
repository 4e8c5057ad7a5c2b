"""``python -m cp_debug`` is the command ``cpdebug``."""

from __future__ import annotations

import signal
import sys
from contextlib import suppress
from typing import NoReturn

_ARENA_MAX = -8
"""``M_ARENA_MAX`` of ``mallopt(3)``."""


def main() -> None:
    """Run the command line, and end with its exit code, also where a library ends the process."""
    try:
        from cp_debug.cli.guard import guarded

        guarded(run)
    except KeyboardInterrupt:
        _interrupted()


def run() -> None:
    """Run the command line in this process. Ctrl-C while it is still being loaded ends it as it does later."""
    _spare_addresses()
    try:
        from cp_debug.cli.main import main as command_line
    except KeyboardInterrupt:
        _interrupted()
    try:
        command_line()
    finally:
        _end()


def _spare_addresses() -> None:
    """Let threads share one heap where addresses are limited (``ulimit -v``): glibc takes 128 MiB for each one's own,
    and ONNX Runtime waits for ever where it cannot start its threads."""
    with suppress(ImportError, OSError, AttributeError):  # neither is everywhere
        import resource

        if resource.getrlimit(resource.RLIMIT_AS)[0] != resource.RLIM_INFINITY:
            import ctypes

            ctypes.CDLL(None).mallopt(_ARENA_MAX, 1)


def _interrupted() -> NoReturn:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # whoever asks again is not told in another way
    print("interrupted", file=sys.stderr)
    sys.exit(130)


def _end() -> None:
    """Make safe what is printed when Python ends; Ctrl-C changes nothing any more, other signals end at once."""
    if "cp_debug.safe_text" in sys.modules:  # the user's code may print when Python ends
        from cp_debug.safe_text import SafeStream

        sys.stdout, sys.stderr = (s and SafeStream(s) for s in (sys.stdout, sys.stderr))
    with suppress(ValueError):  # not the main thread
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # as nohup has it
            signal.signal(signal.SIGHUP, signal.SIG_DFL)


if __name__ == "__main__":
    main()
