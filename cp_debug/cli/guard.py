"""The command runs in a copy of the process, so that somebody is left to say what happened where a library ends it.

Libraries of C++ code end the process on some files (SIGABRT, SIGSEGV), modules call ``os._exit``, and a machine without
memory kills. Linux alone has what this takes; elsewhere the command runs as it is.
"""

from __future__ import annotations

import mmap
import os
import signal
import sys
import threading
from collections.abc import Callable, Collection
from contextlib import suppress
from typing import Any

from cp_debug import doing

FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
ENDINGS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGPIPE)
"""Signals that end a process because somebody wants it, of which nothing has to be said."""
BAD_INPUT, UNEXPECTED = 2, 70
_DIE_WITH_PARENT = 1
"""``PR_SET_PDEATHSIG`` of ``prctl(2)``."""


def guarded(command: Callable[[], Any]) -> None:
    """Run the command and end this process with its exit code; with 2 or 70 and a sentence where it died."""
    # Other threads, and a debugger, would be missing in a copy of the process.
    if sys.platform != "linux" or threading.active_count() > 1 or sys.gettrace() is not None:
        command()
        return
    doing.share()
    ended = mmap.mmap(-1, 2)  # 1 and the exit code, once the command has one
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {*FORWARDED, signal.SIGCHLD})
    try:
        process = os.fork()
    except OSError:  # no room for another process
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        command()
        return
    if process == 0:
        _die_with(os.getppid())
        _run(command, ended, before)
    status = _wait(process)
    # Whatever libraries do while the interpreter is taken down.
    os._exit(ended[1] if ended[0] else _conclude(status))


def _die_with(parent: int) -> None:
    """Have this process killed when its parent is."""
    with suppress(ImportError, OSError, AttributeError):
        import ctypes

        ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(UNEXPECTED)


def _run(command: Callable[[], Any], ended: mmap.mmap, unblocked: Collection[Any]) -> None:
    """Run the command, note its exit code in ``ended``, and end as it does.

    ``unblocked``: the mask of signals from before; Ctrl-C may have come meanwhile.
    """
    code: Any = 0
    try:
        signal.pthread_sigmask(signal.SIG_SETMASK, unblocked)
        command()
    except KeyboardInterrupt as end:  # outside of what the command does about it
        code = getattr(end, "code", 128 + signal.SIGINT)
        raise
    except SystemExit as end:
        code = end.code
        raise
    except BaseException:
        code = 1
        raise
    finally:
        ended[:] = bytes([1, (code if isinstance(code, int) else int(code is not None)) & 255])
    sys.exit(0)


def _wait(process: int) -> int:
    """Wait for the copy's end; what ``waitpid`` says of it. Signals that it lacks are sent on."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    while True:
        ended, status = os.waitpid(process, os.WNOHANG)
        if ended:
            return status
        caught = signal.sigwaitinfo({*FORWARDED, signal.SIGCHLD})
        if caught.si_signo != signal.SIGCHLD and caught.si_code <= 0:
            with suppress(OSError):  # a terminal sends its own (``si_code`` above 0) to both processes
                os.kill(process, caught.si_signo)


def _conclude(status: int) -> int:
    """The exit code where the command did not come to its end. Says what happened."""
    number = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
    if number in ENDINGS:
        return 128 + number
    from cp_debug.cli.console import show_error  # takes longer than all of this

    what = doing.last()
    when = f" while {what}" if what else ""
    if number == signal.SIGKILL:
        show_error(f"the process was killed{when}, probably because the machine ran out of memory")
        return UNEXPECTED
    if number:
        show_error(f"a library ended the process ({signal.Signals(number).name}){when}: nothing was decided")
    else:
        code = os.WEXITSTATUS(status)
        show_error(f"the process was ended from within (os._exit({code})){when}: nothing was decided")
    return BAD_INPUT if what else UNEXPECTED
