"""A process that forks to run tests: a line of JSON in, a line of JSON out.

``forks.py --import PACKAGES`` has imported the heavy packages; each fork collects its tests itself. ``forks.py --ready
PACKAGES`` has imported all of cp_debug, too. ``forks.py --collect PACKAGES FILES`` has collected the quick tests of
these files; each fork gets what a changed file has in the place of what the file had and runs the tests, which takes as
long as the tests alone. Limits are seconds of processor time, so that a busy machine changes no outcome.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import pkgutil
import resource
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

from parts import Parts

QUICK = "not slow and not process and not gpu and not mmdet3d"


ROOM = 8 << 30
"""Bytes of address space that a fork may take more than it has."""


def spent() -> float:
    """Seconds of processor time of this process and of those that it started and that have ended."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


class Noted:
    """pytest plug-in that notes the first test that failed, the seconds of each, and ends when the time is over.

    A test that takes 10 times as long as ``known`` says, and 10 seconds more, hangs: the process is ended.
    """

    def __init__(self, seconds: float, known: dict[str, float] | None = None) -> None:
        self.test = ""
        self.durations: dict[str, float] = {}
        self.over = False
        self._known = known or {}
        self._begun = 0.0
        self._seconds = seconds
        self._end = 0.0

    def pytest_runtest_setup(self, item: Any) -> None:
        """End before the first test that begins too late."""
        import pytest

        self._begun = spent()
        self._end = self._end or self._begun + self._seconds  # without the collection
        if self._begun > self._end:
            self.over = True
            pytest.exit("the time is over", returncode=0)
        hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
        longest = time.process_time() + 10 * self._known.get(item.nodeid, 60.0) + 10
        resource.setrlimit(resource.RLIMIT_CPU, (int(longest), hard))

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Note a test's outcome."""
        self.durations[report.nodeid] = round(spent() - self._begun, 3)
        if report.failed and not self.test:
            self.test = report.nodeid

    def pytest_collectreport(self, report: Any) -> None:
        """Note a file that cannot be collected."""
        if report.failed and not self.test:
            self.test = f"collection of {report.nodeid}"


def collect_and_run(asked: dict[str, Any]) -> dict[str, Any]:
    """Run pytest with ``asked["arguments"]`` until it ends or the time is over."""
    import pytest

    noted = Noted(asked["seconds"], asked.get("known"))
    code = int(pytest.main(["-q", "-p", "no:cacheprovider", *asked["arguments"]], plugins=[noted]))
    # 4: a test of the list is not there, as where the mutant takes a parameter away. 5: none is.
    outcome = ("undecided" if noted.over else "survived") if code == 0 else "killed"
    return {"outcome": outcome, "by": noted.test or f"exit code {code}", "durations": noted.durations}


class Collected:
    """pytest plug-in that serves in place of running what was collected."""

    def __init__(self, out: TextIO) -> None:
        self._out = out
        self._items: dict[str, Any] = {}

    def pytest_runtestloop(self, session: Any) -> bool:
        """Serve until the input ends."""
        self._items = {item.nodeid: item for item in session.items}
        self._parts = Parts()
        warm()
        print(json.dumps([*self._items]), file=self._out, flush=True)
        gc.freeze()  # a fork does not visit, and so copy, what it will not free
        serve(self._run, self._out)
        return True

    def _run(self, asked: dict[str, Any]) -> dict[str, Any]:
        """Run ``asked["tests"]`` with the source ``asked["changed"]`` of the file ``asked["path"]``."""
        import pytest

        if asked.get("at_import"):
            self._parts.execute(asked["path"], asked["source"], asked["changed"])
        elif "changed" in asked:
            self._parts.renew(asked["path"], asked["changed"])
        items = [self._items[t] for t in asked["tests"] if t in self._items]
        if not items:
            return {"outcome": "untested", "by": "", "durations": {}}
        noted = Noted(asked["seconds"], asked.get("known"))
        items[0].config.pluginmanager.register(noted)
        with contextlib.suppress(pytest.exit.Exception):
            for item, after in zip(items, [*items[1:], None], strict=True):
                item.config.hook.pytest_runtest_protocol(item=item, nextitem=after)
                if noted.test:
                    break
        outcome = "killed" if noted.test else "undecided" if noted.over else "survived"
        return {"outcome": outcome, "by": noted.test, "durations": noted.durations}


def warm() -> None:
    """Have compiled what most tests use, so that not every fork compiles it."""
    import numpy as np

    from cp_debug.probes.distance import distance
    from cp_debug.probes.statistics import compare

    for kind in (np.float32, np.float64):
        array = np.linspace(0, 1, 1 << 17, dtype=kind)
        compare(array, array[::-1].copy())
        distance(array, array[::-1].copy())


def import_all() -> None:
    """Import every module of cp_debug that can be imported here."""
    import cp_debug
    from cp_debug.errors import MissingPackage

    for found in pkgutil.walk_packages(cp_debug.__path__, "cp_debug.", onerror=lambda name: None):
        if not found.name.endswith("__main__"):
            with contextlib.suppress(ImportError, MissingPackage):
                importlib.import_module(found.name)


def serve(run: Callable[[dict[str, Any]], dict[str, Any]], out: TextIO) -> None:
    """Answer each line of the standard input by ``run`` in a fork."""
    for line in sys.stdin:
        asked = json.loads(line)
        with tempfile.TemporaryFile() as answer:
            process = os.fork()
            if not process:
                os.setsid()
                resource.setrlimit(resource.RLIMIT_AS, (_address_space() + ROOM, resource.RLIM_INFINITY))
                with Path(os.devnull).open("w") as nowhere:
                    os.dup2(nowhere.fileno(), 1)
                    os.dup2(nowhere.fileno(), 2)
                try:
                    told = run(asked)
                except BaseException as error:  # leaving the fork otherwise would wait for threads that it lacks
                    told = {"outcome": "undecided", "by": f"{type(error).__name__}: {error}", "durations": {}}
                os.write(answer.fileno(), json.dumps(told).encode())
                os._exit(0)
            hung = _hangs(process, 20 * asked["seconds"] + 60)
            answer.seek(0)
            told = answer.read().decode()
        ended = {"outcome": "hung" if hung else "killed", "by": "" if hung else "ended", "durations": {}}
        print(told if told and not hung else json.dumps(ended), file=out, flush=True)


def _address_space() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def _hangs(process: int, seconds: float) -> bool:
    """Wait for a child: whether it used up its processor time, or waited so long that it and all that it started had to
    be ended after ``seconds``."""
    end = time.monotonic() + seconds
    while True:
        ended, status = os.waitpid(process, os.WNOHANG)
        if ended:
            return os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGXCPU
        if time.monotonic() > end:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process, signal.SIGKILL)
            os.waitpid(process, 0)
            return True
        time.sleep(0.02)


def main() -> None:
    """Import or collect, then serve."""
    import pytest

    what, packages, *files = sys.argv[1:]
    out = os.fdopen(os.dup(1), "w")
    with Path(os.devnull).open("w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
    for name in packages.split(","):
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    if what == "--ready":
        import_all()
        warm()
    if what != "--collect":
        serve(collect_and_run, out)
    else:
        arguments = ["-q", "-s", "-p", "no:cacheprovider", "-m", QUICK, *files]
        pytest.main(arguments, plugins=[Collected(out)])


if __name__ == "__main__":
    main()
