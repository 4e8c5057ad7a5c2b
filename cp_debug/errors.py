"""Every error that a user can cause, each with the exit code of the command line."""

from __future__ import annotations


class CpdebugError(Exception):
    """An error that is told to the user in words, without a traceback."""

    exit_code = 2


class InputError(CpdebugError):
    """Bad usage or input. The message names the file and the field, and what was expected."""


class BackendUnavailable(CpdebugError):
    """A backend cannot run here: what is missing, how to get it, the nearest one that would work."""

    exit_code = 3

    def __init__(self, spec: str, reason: str, *, install: str | None = None, nearest: str | None = None) -> None:
        self.spec, self.reason, self.install, self.nearest = spec, reason, install, nearest
        parts = [f"backend {spec!r} is unavailable: {reason}"]
        if install:
            parts.append(f"install it with: {install}")
        if nearest:
            parts.append(f"nearest backend that works here: {nearest}")
        super().__init__("\n".join(parts))


class MissingPackage(CpdebugError):
    """A Python package that this job needs is not installed."""

    exit_code = 3


class ModuleFailed(InputError):
    """A torch module raised in forward; the message names the module's path."""


def in_one_line(error: Exception) -> str:
    """What an error says, without line breaks; the kind of one that is not ours before it."""
    said = " ".join(str(error).split())
    return said if isinstance(error, CpdebugError) else f"{type(error).__name__}: {said}"
