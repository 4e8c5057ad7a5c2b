"""States that tests of processes wait for, in place of seconds."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")


def until(state: Callable[[], T]) -> T:
    """What ``state()`` returns once that is true. A wait in vain ends by the limit of the test (pytest-timeout)."""
    while not (found := state()):
        time.sleep(0.01)
    return found


def gone(pid: int) -> bool:
    """Whether a process has ended: it is no more, or only waits for its parent to take note."""
    state = Path(f"/proc/{pid}/stat")
    try:
        return state.read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True
