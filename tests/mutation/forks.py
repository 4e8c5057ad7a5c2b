"""A process that has imported the heavy packages, and forks to run tests: a line of JSON in, a line of JSON out."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import sys
import tempfile
import time
from typing import Any


class Noted:
    """pytest plug-in that notes the first test that failed, and the seconds of each."""

    def __init__(self) -> None:
        self.test = ""
        self.durations: dict[str, float] = {}

    def pytest_runtest_logreport(self, report: Any) -> None:
        self.durations[report.nodeid] = round(self.durations.get(report.nodeid, 0.0) + report.duration, 3)
        if report.failed and not self.test:
            self.test = report.nodeid

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed and not self.test:
            self.test = f"collection of {report.nodeid}"


def child(arguments: list[str], seconds: float, answer: int) -> None:
    """Run pytest with ``arguments`` until it ends or the time is over."""
    import pytest

    os.setsid()
    with open(os.devnull, "w") as nowhere:  # noqa: PTH123, for the file descriptor
        os.dup2(nowhere.fileno(), 1)
        os.dup2(nowhere.fileno(), 2)
    noted, end = Noted(), time.monotonic() + seconds

    class Limit:
        def pytest_runtest_setup(self, item: Any) -> None:
            if time.monotonic() > end:
                pytest.exit("the time is over", returncode=0)

    code = int(pytest.main(["-q", "-p", "no:cacheprovider", *arguments], plugins=[noted, Limit()]))
    # 4: a test of the list is not there, as where the mutant takes a parameter away. 5: none is.
    outcome = "survived" if code == 0 else "killed"
    told = {"outcome": outcome, "by": noted.test or f"exit code {code}", "durations": noted.durations}
    os.write(answer, json.dumps(told).encode())
    os._exit(0)


def main() -> None:
    """Import, then serve."""
    for name in sys.argv[1].split(","):
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    for line in sys.stdin:
        asked = json.loads(line)
        with tempfile.TemporaryFile() as answer:
            process = os.fork()
            if not process:
                child(asked["arguments"], asked["seconds"], answer.fileno())
            hung = _hangs(process, 2 * asked["seconds"] + 30)
            answer.seek(0)
            told = answer.read().decode()
        ended = {"outcome": "hung" if hung else "killed", "by": "" if hung else "ended", "durations": {}}
        print(told if told and not hung else json.dumps(ended), flush=True)


def _hangs(process: int, seconds: float) -> bool:
    """Wait for a child; end it and all that it started, and return True, when it takes longer than ``seconds``."""
    end = time.monotonic() + seconds
    while os.waitpid(process, os.WNOHANG)[0] == 0:
        if time.monotonic() > end:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process, signal.SIGKILL)
            os.waitpid(process, 0)
            return True
        time.sleep(0.02)
    return False


if __name__ == "__main__":
    main()
