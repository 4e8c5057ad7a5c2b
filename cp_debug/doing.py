"""The job that a library does at the moment, kept where it outlives a process that the library ends."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from cp_debug.errors import InputError, text_of

SIZE = 1024
"""Bytes of the text that are kept."""
_page: mmap.mmap | None = None
_their_folders: dict[Path | None, Path] = {}
"""Working folder → the one that the user's code went to from there."""


def share() -> None:
    """Keep what is being done in memory that copies of this process (``fork``) write and this one reads."""
    global _page
    _page = mmap.mmap(-1, SIZE)


@contextmanager
def doing(text: str, *, in_their_folder: bool = False) -> Iterator[None]:
    """Context in which a library does something with what the user gave: ``ONNX Runtime opened net.onnx``.

    ``text`` continues a sentence: "a library ended the process while …". Raises InputError where the user's code, or a
    library, asks Python to end, or raises what no ``except Exception`` takes.

    ``in_their_folder``: the user's code runs. The working folder that it goes to is its own: what is written afterwards
    lies where it was asked for, and the code finds its folder again when it runs next.
    """
    here = _working_folder() if in_their_folder else None
    if here in _their_folders:
        with suppress(OSError):
            os.chdir(_their_folders[here])
    before = b"" if _page is None else _page[:]
    if _page is not None:
        _page[:] = text.encode("utf-8", "replace")[:SIZE].ljust(SIZE, b"\0")
    try:
        yield
    except (Exception, KeyboardInterrupt, GeneratorExit):
        raise
    except BaseException as end:
        raise InputError(asked_to_end(end, text)) from end
    finally:
        if here is not None:
            _their_folders.pop(here, None)
            if (there := _working_folder()) != here:
                if there is not None:
                    _their_folders[here] = there
                os.chdir(here)
        if _page is not None:
            _page[:] = before


def _working_folder() -> Path | None:
    """The folder in which this process works; None where it is removed."""
    try:
        return Path.cwd()
    except OSError:
        return None


def asked_to_end(end: BaseException, what: str = "") -> str:
    """Sentence for a ``SystemExit``, or another exception beyond ``Exception``, that is not this project's own;
    ``what``: what was being done."""
    said = " ".join(text_of(end).split())[:300]
    kind = f"{type(end).__name__}: {said}" if said else type(end).__name__
    return f"the program was asked to end ({kind}){f' while {what}' if what else ''}: nothing was decided"


def last() -> str:
    """The job begun last that has not ended; empty: none."""
    return "" if _page is None else _page[:].rstrip(b"\0").decode("utf-8", "replace")
