"""Log of libraries that write to stderr past Python: made safe as what Python writes is."""

from __future__ import annotations

import os
import re
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from cp_debug.safe_text import SafeStream

PATIENCE = 2.0
"""Seconds that the end waits for the last lines: a process that outlives its command may hold the stream open."""
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")


@contextmanager
def safe_library_log() -> Iterator[None]:
    """Context in which lines of libraries on stderr lose their colours, and other control characters are shown."""
    sys.stderr.flush()
    terminal = os.dup(2)
    read, write = os.pipe()
    os.dup2(write, 2)
    os.close(write)
    before, encoding, errors = sys.stderr, sys.stderr.encoding, sys.stderr.errors
    sys.stderr = os.fdopen(terminal, "w", 1, encoding=encoding, errors=errors)
    reader = threading.Thread(target=_pass_on, args=(read, SafeStream(sys.stderr)), daemon=True)
    reader.start()
    try:
        yield
    finally:
        os.dup2(terminal, 2)  # what was written is read to its end then
        reader.join(PATIENCE)
        sys.stderr.close()
        sys.stderr = before


def _pass_on(descriptor: int, stream: SafeStream) -> None:
    with os.fdopen(descriptor, "rb") as lines, suppress(OSError, ValueError):  # stderr may be full, or closed by now
        for line in lines:
            stream.write(_COLOUR.sub("", line.decode(errors="replace")))
