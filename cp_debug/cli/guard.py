"""The command runs in a copy of the process, so that somebody is left to say what happened where a library ends it.

Libraries of C++ code end the process on some files (SIGABRT, SIGSEGV), modules call ``os._exit``, and a machine without
memory kills. Linux alone has what this takes; elsewhere the command runs as it is.
"""

from __future__ import annotations

import getpass
import os
import re
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Collection
from contextlib import suppress
from pathlib import Path
from typing import Any

from cp_debug import doing
from cp_debug.files import MADE, PARTIAL

FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
ENDINGS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGPIPE)
"""Signals that end a process because somebody wants it, of which nothing has to be said."""
BAD_INPUT, UNEXPECTED = 2, 70
PAUSE = 0.5
"""Seconds after which the pipe is looked at."""
_DIE_WITH_PARENT = 1
"""``PR_SET_PDEATHSIG`` of ``prctl(2)``."""
_TEMPORARY, _MADE, _CODE = b"d", b"m", b"c"


def guarded(command: Callable[[], Any]) -> None:
    """Run the command and end this process with its exit code; with 2 or 70 and a sentence where it died."""
    if not _can_guard():
        command()
        return
    doing.share()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {*FORWARDED, signal.SIGCHLD})
    reading, writing = os.pipe()
    try:
        process = os.fork()
    except OSError:  # no room for another process
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        command()
        return
    if process == 0:
        os.close(reading)
        parent = os.getppid()
        _die_with(parent)
        _report_to(writing)
        _run(command, writing, before)
    os.close(writing)
    os.set_blocking(reading, False)
    status, told = _wait(process, reading)
    os._exit(_conclude(status, told))


def torch_folder() -> str:
    """Torch's folder for kernels among temporary files, as its ``default_cache_dir`` names it."""
    name = re.sub(r'[\\/:*?"<>|]', "_", getpass.getuser())
    return os.path.join(tempfile.gettempdir(), f"torchinductor_{name}")  # noqa: PTH118


def _can_guard() -> bool:
    """Whether this is Linux, and no thread and no debugger runs, which a copy of the process would lack."""
    return sys.platform == "linux" and threading.active_count() == 1 and sys.gettrace() is None


def _die_with(parent: int) -> None:
    """Have this process killed when its parent is."""
    with suppress(ImportError, OSError, AttributeError):
        import ctypes

        ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(UNEXPECTED)


def _report_to(pipe: int) -> None:
    """Write into the pipe, a line each, what is made and would be removed in the end: temporary files and folders, and
    folders for outputs, as far as they are empty."""
    os.set_blocking(pipe, False)
    process = os.getpid()
    kinds = {"tempfile.mkdtemp": _TEMPORARY, "tempfile.mkstemp": _TEMPORARY, PARTIAL: _TEMPORARY, MADE: _MADE}

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event in kinds and os.getpid() == process:
            with suppress(OSError, TypeError, ValueError):  # a full pipe, a name that is none
                if b"\n" not in (name := os.fsencode(arguments[0])):
                    os.write(pipe, kinds[event] + name + b"\n")

    sys.addaudithook(hook)


def _run(command: Callable[[], Any], pipe: int, unblocked: Collection[Any]) -> None:
    """Run the command, tell the pipe its exit code, and end as it does.

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
        with suppress(OSError):
            number = code if isinstance(code, int) else int(code is not None)
            os.write(pipe, _CODE + b"%d\n" % (number & 255))
    sys.exit(0)


def _wait(process: int, pipe: int) -> tuple[int, bytes]:
    """Wait for the copy's end; what ``waitpid`` says of it, and what it wrote. Signals that it lacks are sent on."""
    told = b""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    while True:
        caught = signal.sigtimedwait({*FORWARDED, signal.SIGCHLD}, PAUSE)
        if caught is not None and caught.si_signo != signal.SIGCHLD and caught.si_code <= 0:
            with suppress(OSError):  # a terminal sends its own (``si_code`` above 0) to both processes
                os.kill(process, caught.si_signo)
        ended, status = os.waitpid(process, os.WNOHANG)
        with suppress(BlockingIOError):
            while part := os.read(pipe, 1 << 16):
                told += part
        if ended:
            return status, told


def _conclude(status: int, told: bytes) -> int:
    """The exit code. Says what happened where the command did not come to its end, and removes what it left."""
    lines = told.split(b"\n")
    codes = [int(line[1:]) for line in lines if line[:1] == _CODE]
    if codes:  # whatever libraries do while the interpreter is taken down
        return codes[-1]
    for line in lines:
        if line[:1] == _TEMPORARY:
            path = Path(os.fsdecode(line[1:]))
            with suppress(OSError):
                shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
    made = [Path(os.fsdecode(line[1:])) for line in lines if line[:1] == _MADE]
    for folder in (*reversed(made), Path(torch_folder())):
        with suppress(OSError):  # not there, or not empty
            folder.rmdir()
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
