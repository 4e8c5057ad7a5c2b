"""Freed memory given back to the system: glibc keeps freed blocks of up to 32 MiB in its heap, where they fragment."""

from __future__ import annotations

import ctypes
import sys


class Trimmer:
    """Trims the heap whenever ``after`` bytes were freed: twice the memory in SECOND at 512 without it."""

    def __init__(self, after: int) -> None:
        self._after, self._freed = after, 0

    def freed(self, count: int) -> None:
        """Note that ``count`` bytes were freed."""
        self._freed += count
        if self._freed > self._after:
            self._freed = 0
            if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
                libc.malloc_trim(0)
