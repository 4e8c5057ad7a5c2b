"""The command line: commands that belong together in one file, errors in words.

Exit codes: 0 agree, 1 divergence found, 2 bad usage or input, 3 backend unavailable, 70 an unexpected error, 130
interrupted, 141 when the reader of the output has gone.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from functools import lru_cache
from importlib import import_module
from typing import Annotated, Any

import typer

from cp_debug import plugins, version
from cp_debug.cli import crash
from cp_debug.cli.console import NO_READER, Ended, errors, forget_output, show_anywhere, show_error, show_usage
from cp_debug.cli.typed import INTERRUPTED, Command, JsonCommand
from cp_debug.doing import asked_to_end
from cp_debug.errors import (
    TOGETHER,
    CpdebugError,
    InputError,
    MissingPackage,
    Terminated,
    raise_if_interrupted,
    system_reason,
    text_of,
)
from cp_debug.loading import kept_torch_out

RUNS_NOTHING = ("cache", "compare", "doctor", "models", "report", "ui")
"""Commands in which ONNX Runtime has nothing to log."""

_NO_MEMORY = ("can't allocate memory", "out of memory")
"""Ways in which torch says so, on the CPU and on a GPU, by errors that are no MemoryError."""

COMMANDS = {
    "bench": "deploy",
    "bisect": "bisect",
    "build": "deploy",
    "bundle": "results",
    "cache": "installation",
    "capture": "captures",
    "check": "precision",
    "compare": "captures",
    "demo": "bisect",
    "deploy": "deploy",
    "diff": "results",
    "doctor": "installation",
    "export": "deploy",
    "models": "installation",
    "predict": "precision",
    "report": "results",
    "search": "precision",
    "ui": "results",
    "verify": "deploy",
    "eval": "eval",
    "import": "captures",
    "quantize": "quantize",
    "sweep": "sweep",
}
"""Command → its module in this package, in the order of the help."""
VERDICTS = ("bisect", "compare")
"""Commands that can print their verdict alone."""
JSON_ALONE = ("cache", "check", "doctor")
"""Commands in which --json needs no value."""
_FUNCTIONS = {"eval": "evaluate", "import": "import_dump"}
"""Functions of the commands that Python's own words name."""


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"cpdebug {version.full()}")
        raise typer.Exit


def options(
    context: typer.Context,
    show_version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_show_version, help="Show the version and exit.")
    ] = False,
    verbose: Annotated[
        bool,
        typer.Option("--verbose", help="Let ONNX Runtime log its warnings; CPDEBUG_ORT_LOG=info or verbose: more."),
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Only the verdict, as in `cpdebug bisect -q`.")] = False,
) -> None:
    """Find the layer that makes PyTorch, ONNX Runtime and TensorRT disagree."""
    if quiet:
        if context.invoked_subcommand not in VERDICTS:
            raise InputError(f"--quiet: it would do nothing here; expected one of {', '.join(VERDICTS)}")
        context.default_map = {name: {"quiet": True} for name in VERDICTS}
    if verbose:
        if context.invoked_subcommand in RUNS_NOTHING:
            raise InputError(f"--verbose: it would do nothing here: {context.invoked_subcommand} runs no model")
        os.environ.setdefault("CPDEBUG_ORT_LOG", "warning")


@lru_cache(2)
def application(first: str = "") -> typer.Typer:
    """The command line; where ``first``, its first word, is a command, with that one alone, which loads sooner."""
    made = typer.Typer(
        name="cpdebug",
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    made.callback()(options)
    for name in (first,) if first in COMMANDS else COMMANDS:
        module = import_module(f"cp_debug.cli.{COMMANDS[name]}")
        if hasattr(module, "app"):
            made.add_typer(module.app)
        else:
            kind = JsonCommand if name in JSON_ALONE else Command
            made.command(name, cls=kind)(getattr(module, _FUNCTIONS.get(name, name)))
    return made


Command.whole = staticmethod(application)


def __getattr__(name: str) -> Any:
    """``app``: the whole command line."""
    if name == "app":
        return application()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


class _Ending:
    """Handler of signals that ask for the end: it raises, but once for all that come within ``TOGETHER`` seconds.

    A signal for a whole process group comes to this process twice, and the second one would end the tidying.
    """

    asked: KeyboardInterrupt | None = None
    """Exception of the last signal, raised in whatever library: one that swallows it fails in some other way."""

    def __init__(self) -> None:
        self._last = -TOGETHER

    def __call__(self, number: int, frame: object) -> None:
        now = time.monotonic()
        if now - self._last < TOGETHER:
            return
        self._last = now
        _Ending.asked = KeyboardInterrupt() if number == signal.SIGINT else Terminated(128 + number)
        raise _Ending.asked


def main() -> None:
    """Run the command line; every expected failure is one message on stderr and an exit code."""
    # Threads that wait in vain spin, and so take the cores from those they wait for when other programs run, too.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # it leaves a file in the folder for temporary ones
    show_anywhere()
    signal.signal(signal.SIGTERM, _Ending())  # so that what is half-written is removed
    signal.signal(signal.SIGINT, _Ending())
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # as nohup has it
        signal.signal(signal.SIGHUP, _Ending())
    try:
        code = application(sys.argv[1] if len(sys.argv) > 1 else "")(standalone_mode=False)
        sys.stdout.flush()
        # Typer takes every request to end that reaches it for Ctrl-C.
        raise Ended(_Ending.asked.code if code == INTERRUPTED and isinstance(_Ending.asked, Terminated) else code)
    except Ended:
        raise
    except KeyboardInterrupt as end:  # before or after a command; see ``Command`` for the time between
        sys.exit(_interrupted(end))
    except BaseException as error:
        try:
            raise_if_interrupted(error)
        except KeyboardInterrupt as end:
            sys.exit(_interrupted(end))
        # What swallowed the request to end has failed in another way, which nobody wants to read.
        sys.exit(_told(error) if _Ending.asked is None else _interrupted(_Ending.asked))


def _interrupted(end: KeyboardInterrupt) -> int:
    """The exit code for a request to end; of Ctrl-C is told."""
    if isinstance(end, Terminated):
        return end.code
    errors.print("interrupted")
    return INTERRUPTED


def _told(error: BaseException) -> int:
    """Tell the user about an error; returns the exit code."""
    if isinstance(error, CpdebugError):
        show_error(str(error))
        return error.exit_code
    if isinstance(error, MemoryError):
        show_error("out of memory: this needs more than the process may use")
        return InputError.exit_code
    if isinstance(error, BrokenPipeError):  # before or after a command
        forget_output()
        return NO_READER
    if isinstance(error, OSError):
        place = error.filename if error.filename is not None else "the output"
        show_error(f"{place}: {system_reason(error)}")
        forget_output()
        return InputError.exit_code
    if isinstance(error, SystemExit) and isinstance(error.__context__, BrokenPipeError):  # of a help page
        forget_output()
        return NO_READER
    if not isinstance(error, Exception):
        show_error(asked_to_end(error))
        return InputError.exit_code
    if hasattr(error, "format_message"):  # what the parser raises
        show_usage(error)
        return InputError.exit_code
    if isinstance(error, RuntimeError) and any(text in text_of(error) for text in _NO_MEMORY):
        show_error("out of memory: this needs more than the machine has")
        return InputError.exit_code
    if isinstance(error, RuntimeError) and "can't start new thread" in text_of(error):
        show_error("no thread can be started: the system allows this user or process no more, or has no memory for it")
        return InputError.exit_code
    if said := kept_torch_out(error):
        show_error(said)
        return MissingPackage.exit_code
    damaged = plugins.told_by(error)
    if damaged is not None:
        show_error(damaged)
        return MissingPackage.exit_code
    try:
        show_error(crash.log_crash(error))
        return crash.EXIT_CODE
    except MemoryError:  # too little even for the log
        show_error("out of memory: this needs more than the process may use")
        return InputError.exit_code
