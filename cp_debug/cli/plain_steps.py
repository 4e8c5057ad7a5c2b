"""Steps of a long job as lines, for logs and pipes: what has gone on for a while is said, ever more rarely."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

FIRST = 10.0
"""Seconds after which a job is worth a line."""
RAREST = 300.0
"""Longest time without a line, in seconds."""


class PlainSteps:
    """Says now and then, through ``say``, what a job is at: after ``first`` seconds, then each time twice as rarely.

    A job of more than ``most`` steps it leaves to others.
    """

    def __init__(self, say: Callable[[str], None], first: float = FIRST, most: int = 1 << 31) -> None:
        self._say, self._first, self._most = say, first, most
        self._text = ""
        self._since = time.monotonic()
        self._over = threading.Event()

    def __call__(self, text: str, done: int, total: int) -> None:
        step = f"{text} ({done + 1} of {total})" if total > 1 and done < total else text
        self._text = step if total <= self._most else ""

    def on_event(self, event: Mapping[str, Any]) -> None:
        """Note the phase of TensorRT's build, where its version tells."""
        if event["event"] == "progress":
            self._text = f"{event['phase']} ({event['done']} of {event['steps']})"

    @contextmanager
    def running(self) -> Iterator[PlainSteps]:
        """Speak while the block runs."""
        thread = threading.Thread(target=self._speak, name="progress", daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self._over.set()
            thread.join()

    def _speak(self) -> None:
        pause = self._first
        while not self._over.wait(pause):
            if self._text:
                self._say(f"{time.monotonic() - self._since:.0f} s: {self._text}")
            pause = min(2 * pause, RAREST)
