"""Steps of a long job as lines, for logs and pipes: what has gone on for a while is said, ever more rarely."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from cp_debug.interpreter import BUILD_STOPPED, how_far

FIRST = 10.0
"""Seconds after which a job is worth a line."""
RAREST = 300.0
"""Longest time without a line, in seconds, for steps whose end cannot be foreseen."""
ENOUGH = 5
"""Steps that must be done before the time of the others is told by theirs."""

LONG = 20.0
"""Seconds of builds after which is said what is known by then."""
FAST = 2
"""Builder level from which down builds are fast."""
FASTER = (
    "--builder-level 2 times fewer kernels; measured once, a small network with SE blocks and HardSwish on an H200: "
    "40 s in all instead of 110 s"
)


class PlainSteps:
    """Says now and then, through ``say``, what a job is at and what it will still take: after ``first`` seconds, then
    each time twice as rarely, so that a job of a day has a dozen lines."""

    def __init__(
        self, say: Callable[[str], None], first: float = FIRST, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._say, self._first, self._clock = say, first, clock
        self._text, self._building = "", False
        self._since = self._begun = clock()
        self._start, self._done, self._total = 0, 0, -1
        self._over = threading.Event()

    def __call__(self, text: str, done: int, total: int) -> None:
        """Note that ``done`` of ``total`` steps are done, and that ``text`` has begun."""
        if total != self._total or done < self._done:  # another row of steps
            self._begun, self._start, self._total = self._clock(), done, total
        self._done, self._building = done, False
        self._text = f"{text} ({done + 1} of {total})" if total > 1 and done < total else text

    def on_event(self, event: Mapping[str, Any]) -> None:
        """Note the phase of TensorRT's build, where its version tells."""
        if event["event"] == "progress":
            self._total = -1  # the pace of the steps before says nothing about a phase
            self._text = how_far(event)
            self._building = True

    @property
    def line(self) -> str:
        """The line for this moment; empty before the first step."""
        if not self._text:
            return ""
        now = self._clock()
        said = self._said(now)
        if (each := self._each(now)) is None:
            return said
        return f"{said}, {each:.2g} s each, about {span(each * (self._total - self._done))} left at this pace"

    @property
    def stopped(self) -> str:
        """The line for a job that Ctrl-C ended."""
        hint = BUILD_STOPPED if self._building else ""
        return self._said(self._clock()) + hint

    def _said(self, now: float) -> str:
        return f"{now - self._since:.0f} s: {self._text}"

    def _each(self, now: float) -> float | None:
        """Seconds that a step takes; None where too few are done to say."""
        steps = self._done - self._start
        return (now - self._begun) / steps if steps >= ENOUGH and self._done < self._total else None

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
            if line := self.line:
                self._say(line)
            pause = 2 * pause if self._each(self._clock()) is not None else min(2 * pause, RAREST)


class Builds:
    """Says, through ``say``, what a comparison knows by the time that its engines have been built for ``LONG`` seconds:
    first how far the build is, then how far off the outputs are, before what is inside is shown by further engines.

    Takes the events of ``interpreter.OnEvent``.
    """

    def __init__(self, say: Callable[[str], None], clock: Callable[[], float] = time.monotonic) -> None:
        self._say, self._clock = say, clock
        self._spent, self._built = 0.0, 0
        self._begun: float | None = None
        self._level: int | None = None
        self._known, self._told = "", False

    def on_event(self, event: Mapping[str, Any]) -> None:
        """Note what is built, and say what is worth it."""
        kind, now = event["event"], self._clock()
        spent = self._spent + (now - self._begun if self._begun is not None else 0.0)
        if kind == "building":
            self._begun, self._level = now, event["level"]
        elif kind == "built":
            self._spent, self._begun, self._built = spent, None, self._built + 1
        elif kind == "stopped":
            self._say(event["text"])
        elif kind == "compared" and not self._known:
            self._known = f"{event['text']}; one or two more engines will show where, Ctrl-C judges the outputs alone"
            if self._told or 2 * spent > LONG:  # what follows may take as long
                self._tell(spent, self._known)
        elif kind == "progress" and self._begun is not None and spent > LONG and not self._told:
            self._tell(spent, self._known or f"no output is compared yet; now {how_far(event)}")

    def _tell(self, spent: float, known: str) -> None:
        built = f"{self._built} engine{'s' * (self._built != 1)} built"
        self._say(f"{spent:.0f} s of builds, {built}: {known}")
        if not self._told and (self._level is None or self._level > FAST):
            self._say(FASTER)
        self._told = True


def span(seconds: float) -> str:
    """A duration as people say it: ``50 s``, ``12 min``, ``3.5 h``, ``12 days``."""
    for size, name in ((86400.0, "days"), (3600.0, "h"), (60.0, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.2g} {name}" if seconds < 10 * size else f"{seconds / size:,.0f} {name}"
    return f"{seconds:.0f} s"
