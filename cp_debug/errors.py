"""Every error that a user can cause, with its exit code."""

from __future__ import annotations

import re

from cp_debug.safe_text import visible


def system_reason(error: OSError) -> str:
    """The reason why the operating system refused something, in its words: ``no space left on device``."""
    words = error.strerror or str(error) or type(error).__name__
    return words[:1].lower() + words[1:] if error.strerror else words


class CpdebugError(Exception):
    """An error that is told to the user in words, without a traceback."""

    exit_code = 2

    def __str__(self) -> str:
        """The message; what others wrote into it, such as names, has escapes for what is unseen: people print it."""
        return visible(super().__str__(), keep="\n\t")


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


class DeviceUnavailable(CpdebugError):
    """A device that a job asks for is not there."""

    exit_code = 3


class MissingPackage(CpdebugError):
    """A Python package that this job needs is not installed."""

    exit_code = 3


class ModuleFailed(InputError):
    """A torch module raised in forward; the message names the module's path."""


class Damage(ValueError):
    """Damage that one of this project's readers found in a file: the text is for the user as it stands."""


TOGETHER = 1.0
"""Seconds within which two signals that ask for the end are one wish."""


class Terminated(KeyboardInterrupt):
    """A request to end, by SIGTERM or SIGHUP: passes wherever Ctrl-C does, and keeps nothing of what was under way."""

    def __init__(self, code: int) -> None:
        """``code``: the exit code, 128 and the signal's number."""
        super().__init__(code)
        self.code = code


def raise_if_interrupted(error: BaseException) -> None:
    """Raise KeyboardInterrupt, or Terminated, if ``error`` was raised in consequence of one.

    Libraries that catch every exception, Ctrl-C among them, raise one of their own in its place.
    """
    seen: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in seen:
        if isinstance(cause, KeyboardInterrupt):
            raise type(cause)(*cause.args) from error
        seen.append(cause)
        cause = cause.__cause__ or cause.__context__


_PYTHON = re.compile(
    r"<class |<object|object at 0x|'\w+' object|\w\(\)|argument|unpack|not iterable|subscriptable|NoneType|"
    r"operand type|__\w+__|dtype\('|Issues with types|truth value|std::|codec|invalid literal|could not convert|"
    r"is not in list|\w+(?:Error|Exception)\b|expected scalar type|INTERNAL ASSERT|ambiguous|torch\.|np\.|numpy"
)
"""Parts of messages that speak of Python's objects, of which who gave a file knows nothing."""


_PYTHONS_OWN = (
    ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, NameError, RecursionError, SyntaxError,
    SystemError, TypeError, UnicodeError,
)  # fmt: skip
"""Errors that Python raises itself, or whose text tells nothing: that of a KeyError is the key."""
DAMAGED = "its contents are damaged, or of another kind"
"""Reason where a library's error gives none in words."""


def library_reason(error: BaseException) -> str:
    """First line of a library's error, without the error's type; empty where it speaks of Python's
    objects alone."""
    if isinstance(error, CpdebugError | Damage):
        return next(iter(str(error).splitlines()), "")
    if isinstance(error, MemoryError | RecursionError):
        return "out of memory" if isinstance(error, MemoryError) else "nested too deep"
    if isinstance(error, OSError) and error.errno is not None:
        return system_reason(error)
    if isinstance(error, _PYTHONS_OWN):
        return ""
    line = visible(next((line.strip() for line in text_of(error).splitlines() if line.strip()), ""))
    return "" if _PYTHON.search(line) else line[:300]


def in_one_line(error: Exception) -> str:
    """An error's message without line breaks; with the error's type before it, unless it is one of cpdebug's."""
    message = " ".join(text_of(error).split())
    return message if isinstance(error, CpdebugError) else f"{type(error).__name__}: {message}"


def module_of(kind: type) -> str:
    """Name of the module that a class says it is from; empty where it has something else there, as Python lets it."""
    name = kind.__module__
    return name if isinstance(name, str) else ""


def text_of(error: BaseException) -> str:
    """An error's message; empty where a class of the user's makes none, but raises itself."""
    try:
        return str(error)
    except Exception:
        return ""
