"""A process that has imported the heavy packages, and forks to run tests: a line of JSON in, a line of JSON out."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import sys
import time
from typing import Any


class Failed:
    """pytest plug-in that notes the first test that failed."""

    def __init__(self) -> None:
        self.test = ""

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed and not self.test:
            self.test = report.nodeid

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed and not self.test:
            self.test = f"collection of {report.nodeid}"


def child(tests: list[str], seconds: float, answer: int) -> None:
    """Run the tests, in this order, until one fails or the time is over."""
    import pytest

    os.setsid()
    with open(os.devnull, "w") as nowhere:  # noqa: PTH123, for the file descriptor
        os.dup2(nowhere.fileno(), 1)
        os.dup2(nowhere.fileno(), 2)
    failed, end = Failed(), time.monotonic() + seconds

    class Limit:
        def pytest_runtest_setup(self, item: Any) -> None:
            if time.monotonic() > end:
                pytest.exit("the time is over", returncode=0)

    code = int(pytest.main(["-x", "-q", "-p", "no:cacheprovider", "-m", "", *tests], plugins=[failed, Limit()]))
    # 4: a test of the list is not there, as where the mutant takes a parameter away. 5: none is.
    outcome = "survived" if code == 0 else "killed"
    os.write(answer, json.dumps({"outcome": outcome, "by": failed.test or f"exit code {code}"}).encode())
    os._exit(0)


def main() -> None:
    """Import, then serve."""
    for name in sys.argv[1].split(","):
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    for line in sys.stdin:
        asked = json.loads(line)
        read, write = os.pipe()
        process = os.fork()
        if not process:
            os.close(read)
            child(asked["tests"], asked["seconds"], write)
        os.close(write)
        end = time.monotonic() + 3 * asked["seconds"] + 60
        hung = False
        while os.waitpid(process, os.WNOHANG)[0] == 0:
            if time.monotonic() > end:
                hung = True
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process, signal.SIGKILL)
                os.waitpid(process, 0)
                break
            time.sleep(0.02)
        told = os.read(read, 1 << 16)
        os.close(read)
        if hung or not told:
            print(json.dumps({"outcome": "hung" if hung else "killed", "by": "" if hung else "ended"}), flush=True)
        else:
            print(told.decode(), flush=True)


if __name__ == "__main__":
    main()
