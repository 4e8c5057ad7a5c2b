"""The job that a library does at the moment, kept where it outlives a process that the library ends."""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from contextlib import contextmanager

SIZE = 1024
"""Bytes of the text that are kept."""
_page: mmap.mmap | None = None


def share() -> None:
    """Keep what is being done in memory that copies of this process (``fork``) write and this one reads."""
    global _page
    _page = mmap.mmap(-1, SIZE)


@contextmanager
def doing(text: str) -> Iterator[None]:
    """Context in which a library does something with what the user gave: ``ONNX Runtime opened net.onnx``.

    ``text`` continues a sentence: "a library ended the process while …".
    """
    if _page is None:
        yield
        return
    before = _page[:]
    _page[:] = text.encode("utf-8", "replace")[:SIZE].ljust(SIZE, b"\0")
    try:
        yield
    finally:
        _page[:] = before


def last() -> str:
    """The job begun last that has not ended; empty: none."""
    return "" if _page is None else _page[:].rstrip(b"\0").decode("utf-8", "replace")
