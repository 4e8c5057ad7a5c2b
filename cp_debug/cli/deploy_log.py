"""The log of a deployment: its stages and steps, with times, in a file, on stderr, or both."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING

from cp_debug.errors import CpdebugError, InputError, system_reason

if TYPE_CHECKING:
    from cp_debug.deploy.state import StageRecord

OnStep = Callable[[str, int, int], None]


class LogLevel(str, Enum):
    """Least weight of a line that is logged."""

    debug = "debug"
    info = "info"
    warning = "warning"
    error = "error"


class DeployLog:
    """Lines about a deployment: steps weigh ``debug``, stages ``info``, failed stages and remarks ``warning``."""

    def __init__(self, logger: logging.Logger) -> None:
        self._logger = logger

    def note(self, text: str) -> None:
        """Log a remark that the terminal has already."""
        self._logger.warning("%s", text, extra=_SHOWN)

    def stage(self, name: str, record: StageRecord | None) -> None:
        """Log that a stage begins (no record), or what it gave."""
        if record is None:
            self._logger.info("%s: begins", name)
        else:
            weight = logging.INFO if record.passed else logging.WARNING
            outcome = "as before" if record.resumed else f"{record.seconds:.1f} s"
            self._logger.log(
                weight, "%s: %s, %s: %s", name, "passed" if record.passed else "FAILED", outcome, record.line
            )

    def steps(self, on_step: OnStep) -> OnStep:
        """``on_step`` that logs, too."""

        def logged(text: str, done: int, total: int) -> None:
            self._logger.debug("%s (%d of %d)", text, done + 1, total)
            on_step(text, done, total)

        return logged


@contextmanager
def deploy_log(file: Path | None, level: LogLevel | None) -> Iterator[DeployLog]:
    """A log into ``file``, to which it appends, and from ``level`` on to stderr; without a level, to the file alone.

    An error that ends the block is logged. Raises InputError for a file that cannot be written.
    """
    from cp_debug.cli.console import errors
    from cp_debug.files import make_folder

    logger = logging.Logger("cpdebug.deploy", getattr(logging, (level or LogLevel.info).name.upper()))
    logger.addHandler(logging.NullHandler() if level is None else _Console(errors.print))
    if file is not None:
        try:
            make_folder(file.parent)
            handler = _LogFile(file, encoding="utf-8")
        except OSError as error:
            raise InputError(f"{file}: the log cannot be written ({error.strerror})") from None
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        logger.addHandler(handler)
    try:
        yield DeployLog(logger)
    except CpdebugError as error:
        with suppress(InputError):  # a full disk is not what ended it
            logger.error("%s", error, extra=_SHOWN)
        raise
    finally:
        for opened in logger.handlers:
            opened.close()


class _LogFile(logging.FileHandler):
    """A file of the log; where it cannot be written, as on a full disk, the user is told."""

    def handleError(self, record: logging.LogRecord) -> None:
        """Raise InputError for what the system refused."""
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handleError(record)
            return
        raise InputError(f"{self.baseFilename}: the log cannot be written ({system_reason(error)})") from error

    def close(self) -> None:
        """Close the file, of which the rest may be lost."""
        with suppress(OSError):
            super().close()


_SHOWN = {"shown": True}
"""Mark of lines that the command shows itself."""


class _Console(logging.Handler):
    def __init__(self, say: Callable[[str], None]) -> None:
        super().__init__()
        self.addFilter(lambda record: not hasattr(record, "shown"))
        self._say = say

    def emit(self, record: logging.LogRecord) -> None:
        """Print the line."""
        self._say(f"{record.levelname.lower()}: {record.getMessage()}")
