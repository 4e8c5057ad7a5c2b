"""Output of commands: results to stdout, progress and errors to stderr, so that pipes and ``--json -`` stay clean."""

from __future__ import annotations

import codecs
import os
import re
import shlex
import sys
import sysconfig
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.progress import Progress, TaskID
from rich.segment import Segment
from rich.text import Text

from cp_debug.cli.plain_steps import Builds, PlainSteps
from cp_debug.interpreter import how_far
from cp_debug.safe_text import message, no_command, prints_aside, visible

if TYPE_CHECKING:
    from pandas import DataFrame

    from cp_debug.bisect.result import BisectResult


_PLAIN = "cpdebug-plain"
_SIGNS = "✓ ok ✗ FAIL → -> Δ D × x ≤ <= ≥ >= … ... ⋮ : ‖ || ± +- µ u √ sqrt ² ^2"
_ASCII = dict(pair.split() for pair in re.findall(r"\S+ \S+", _SIGNS)) | dict.fromkeys("·−–—─━╸╺╶╴╌", "-")
"""Replacements for terminals that know ASCII alone."""
WIDEST = 100_000
"""Width from which on COLUMNS is no width of a terminal."""
PIPE_WIDTH = 140
"""Width in columns of a table that goes into a file or a pipe."""


def _width(stream_is_tty: bool) -> int | None:
    return None if stream_is_tty or "COLUMNS" in os.environ else PIPE_WIDTH


NO_READER = 141
"""Exit code when the reader of the output has gone, as in shells; the library's is 1, here a divergence."""


class Ended(SystemExit):
    """The command's own end, with its exit code; any other ``SystemExit`` is of the user's code or of a library."""


class SafeConsole(Console):
    """Console that prints foreign text literally: markup and control sequences in it have no effect."""

    def __init__(self, *, stderr: bool = False, width: int | None = None) -> None:
        super().__init__(stderr=stderr, width=width, markup=False, emoji=False, highlight=False)
        self.pipe = width is not None
        """Whether a pipe or a file is written to, whose lines may be as long as they need be."""

    def print(self, *objects: Any, **options: Any) -> None:
        """Print as rich does, but without cutting lines that go into a pipe."""
        super().print(*objects, **{"crop": not self.pipe} | options)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Segments that rich makes, with control characters of texts as escapes; rich's own controls stay."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(no_command(visible(segment.text)), segment.style)

    def on_broken_pipe(self) -> None:
        """End the process with the code for a reader that has gone."""
        forget_output()
        raise Ended(NO_READER)


def _usable_streams() -> None:
    """Give Python streams where the shell closed them, and no width where it says 0."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, Path(os.devnull).open("w", encoding="utf-8"))  # noqa: SIM115, for the whole process
    columns = os.environ.get("COLUMNS", "")
    if columns.isdigit() and not (columns.isdecimal() and 0 < int(columns[:9]) < WIDEST):
        del os.environ["COLUMNS"]


_usable_streams()
console = SafeConsole(width=_width(sys.stdout.isatty()))
errors = SafeConsole(stderr=True, width=_width(sys.stderr.isatty()))


@contextmanager
def results_alone() -> Iterator[None]:
    """Context in which stdout takes cpdebug's results alone; what a user's module prints goes to stderr, made safe."""
    from cp_debug import files

    def told(event: Any) -> None:
        kind, says = getattr(event.exc_type, "__name__", "an error"), "without words"
        with suppress(Exception):  # its own ``__str__`` may fail
            says = message(str(event.exc_value), lines=1)
        say(f"note: {kind} was raised in a thread or a finalizer, where nothing handles it: {says}")

    # Consoles that write elsewhere already stay as they are.
    pairs = [(c, stream) for c, stream in ((console, sys.stdout), (errors, sys.stderr)) if c.file is stream]
    for each, stream in pairs:
        each.file = stream
    files.results = sys.stdout
    hooks = threading.excepthook, sys.unraisablehook
    threading.excepthook = sys.unraisablehook = told
    try:
        with prints_aside():
            yield
    finally:
        threading.excepthook, sys.unraisablehook = hooks
        for each, _ in pairs:
            each.file = None  # type: ignore[assignment]
        files.results = None


def show_error(text: str) -> None:
    """An error message on stderr, within the limits of ``cp_debug.safe_text.message``."""
    with suppress(OSError):  # stderr can be full, too; the exit code says enough then
        errors.print(Text.assemble(("error:", "bold red"), f" {message(text)}"), soft_wrap=True)


def show_notes(notes: Iterable[str]) -> None:
    """Remarks about the user's files, on stderr, a line each."""
    for note in notes:
        say(f"note: {message(note)}")


def show_usage(error: Any) -> None:
    """Print why the command line was refused, and where the help is."""
    context = getattr(error, "ctx", None)
    if type(error).__name__ == "NoArgsIsHelpError":
        error.show()
        return
    more = f"\nsee: {context.command_path} --help" if context is not None else ""
    show_error(f"{error.format_message().replace(': Value error, ', ': ')}{more}")  # of pydantic, which typer asks


def show_anywhere() -> None:
    """Let stdout and stderr take every character: those that their encoding lacks are written in ASCII."""
    _usable_streams()
    codecs.register_error(_PLAIN, _plainly)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors=_PLAIN)


def forget_output() -> None:
    """Send what is left to be flushed to stdout nowhere."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), console.file.fileno())


def _plainly(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text = error.object[error.start : error.end]
    return "".join(_ASCII.get(c) or c.encode("ascii", "backslashreplace").decode() for c in text), error.end


def command_line() -> str:
    """The command as the user typed it, to be pasted into a shell again."""
    return shlex.join(["cpdebug", *sys.argv[1:]])


def show(
    result: BisectResult,
    *,
    json: str | None,
    csv: Path | None,
    layers: bool = True,
    show_all: bool = False,
    quiet: bool = False,
    rest: str = "--all shows the rest",
) -> None:
    """Print the tables, and write the files that were asked for. What goes to stdout, is there alone.

    ``quiet``: one line for each test, the verdict alone; stderr says if a module in train mode ran in eval mode.
    ``rest``: how to see the layers that are left out.
    """
    from cp_debug.probes.caveats import IN_EVAL_MODE
    from cp_debug.reports.files import layer_frame
    from cp_debug.reports.tables import render
    from cp_debug.reports.verdict_line import verdict_line

    for note in dict.fromkeys(note for test in result.tests for note in test.notes if quiet and IN_EVAL_MODE in note):
        say(f"note: {note}")
    parts: Iterable[RenderableType] = render(result, layers=layers, show_all=show_all, rest=rest)
    if quiet:
        parts = verdicts = [verdict_line(test) for test in result.tests]
        for line in verdicts:
            line.no_wrap = not console.is_terminal  # who reads a pipe reads lines
    show_document(parts, result.to_dict(), json, csv, lambda: layer_frame(result))


def show_document(
    parts: Iterable[RenderableType],
    document: Mapping[str, Any] | Sequence[Any],
    json: str | None,
    csv: Path | None = None,
    table: Callable[[], DataFrame] | None = None,
) -> None:
    """Print the parts, and write the document as JSON and the table as CSV to the files that are named.

    With ``-`` they go to stdout, and nothing else does.

    Text that says ``no_wrap`` is not broken into lines: it is to be copied.
    """
    from cp_debug.files import write_text
    from cp_debug.reading import json_text

    if "-" not in (json, str(csv)):
        for part in parts:
            console.print(part, soft_wrap=bool(getattr(part, "no_wrap", False)))
    if json:
        text = json_text(document, indent=1).replace("##[", "\\u0023#[")  # a command, in a log of GitHub's
        write_text(f"{text}\n", None if json == "-" else Path(json))
    if csv and table:
        from cp_debug.reports.files import csv_text

        write_text(csv_text(table()), None if str(csv) == "-" else csv)


class Steps:
    """Reports the steps of a long job: to a progress bar, or where none is drawn in lines now and then."""

    def __init__(self, progress: Progress, slow: PlainSteps | None = None, known: Builds | None = None) -> None:
        self._progress = progress
        self._slow, self._known = slow, known
        self._task = progress.add_task("", total=None)
        self._builds: dict[str, TaskID] = {}

    def __call__(self, text: str, done: int, total: int) -> None:
        self._progress.update(self._task, description=text, completed=done, total=total)
        if self._slow is not None:
            self._slow(text, done, total)
        while self._builds:
            self._progress.remove_task(self._builds.popitem()[1])

    def on_event(self, event: Mapping[str, Any]) -> None:
        """Show the progress of TensorRT's build, where its version tells: a bar a phase."""
        if self._known is not None:
            self._known.on_event(event)
        if event["event"] != "progress":
            return
        if self._slow is not None:
            self._slow.on_event(event)
        phase, done, total = event["phase"], event["done"], event["steps"]
        key, text = phase, phase
        if not total:  # a builder whose log is followed: one bar of layers, whose end is known after fusing
            key, text, done, total = "", how_far(event), event.get("layer", done), event.get("layers") or None
        if key not in self._builds:
            self._builds[key] = self._progress.add_task("", total=total)
        seen = total is None or done < total or not key
        self._progress.update(self._builds[key], description=text, completed=done, total=total, visible=seen)


@contextmanager
def steps(*, compares: bool = False) -> Iterator[Steps]:
    """A progress bar on stderr while the block runs, with the time that is left; without a terminal lines now and
    then. ``compares``: long builds say what is known of the outputs. On Ctrl-C it is said what the job was at."""
    from cp_debug.reports.progress_bar import progress_bar

    slow, known = PlainSteps(say), Builds(partial(say, wrapped=True)) if compares else None
    try:
        with progress_bar(errors) as progress, nullcontext() if progress.console.is_terminal else slow.running():
            yield Steps(progress, slow, known)
    except KeyboardInterrupt:
        if slow.line:
            say(f"stopped after {slow.stopped}")
        raise


def say(text: str, *, wrapped: bool = False) -> None:
    """Print one line of plain text on stderr; ``wrapped`` at words where a terminal is too narrow for it."""
    with suppress(OSError, ValueError):  # stderr can be full, or closed
        errors.print(Text(text), soft_wrap=not (wrapped and errors.is_terminal))


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
