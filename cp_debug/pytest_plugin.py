"""pytest plug-in: the fixture ``assert_agree``, and ``--cpdebug-report DIR``, which keeps an HTML page of each failure.

pytest loads this module wherever cpdebug is installed, so it imports nothing before the fixture is used.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from cp_debug.bisect.result import BisectResult

_REPORT, _ANNOTATION = "cpdebug_report", "cpdebug_annotation"
"""Properties of a test: they travel with its report, from the processes of pytest-xdist, too."""
UNAVAILABLE = 3
"""Exit code of errors about something that is not there."""
_WRITTEN = pytest.StashKey[set[Path]]()
"""Pages of this run; those of an earlier one are replaced."""


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add ``--cpdebug-report`` and the ini option ``cpdebug_report``."""
    group = parser.getgroup("cpdebug")
    group.addoption(
        "--cpdebug-report", metavar="DIR", help="keep an HTML report of each failed assert_agree in this folder"
    )
    parser.addini("cpdebug_report", "folder of HTML reports of failed assert_agree checks")


def pytest_configure(config: pytest.Config) -> None:
    """Prepare what is collected while the tests run."""
    config.stash[_WRITTEN] = set()
    config.pluginmanager.register(Summary(), "cpdebug-summary")


class Summary:
    """Pages of failed tests, and their annotations in a workflow of GitHub, collected for the end of the run."""

    def __init__(self) -> None:
        self.told: dict[tuple[str, str], None] = {}
        """(kind, text) in the order of the tests; each once, as every phase of a test reports its properties."""

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Collect the properties of a test, of another process, too."""
        for kind, text in report.user_properties:
            if kind in (_REPORT, _ANNOTATION):
                self.told[kind, str(text)] = None

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        """List the pages that were written; in a workflow of GitHub, annotate."""
        if pages := [text for kind, text in self.told if kind == _REPORT]:
            terminalreporter.section("cpdebug reports")
            for page in pages:
                terminalreporter.line(page)
        for kind, text in self.told:
            if kind == _ANNOTATION:
                terminalreporter.write(f"\n{text}\n")  # a workflow command stands at the beginning of a line


@pytest.fixture
def assert_agree(request: pytest.FixtureRequest) -> Callable[..., BisectResult]:
    """``cp_debug.assert_agree``; where it fails and ``--cpdebug-report`` is given, the page of the result is kept.

    ``missing``: "fail", or "skip" where a backend, a device or a package is not there. Raises InputError for another.
    """
    config = request.config
    folder = config.getoption("--cpdebug-report") or config.getini("cpdebug_report")
    tell = request.node.user_properties.append

    def check(*args: Any, missing: str = "fail", **kwargs: Any) -> BisectResult:
        __tracebackhide__ = True
        import cp_debug
        from cp_debug.errors import CpdebugError

        if missing not in ("fail", "skip"):
            raise cp_debug.InputError(f"missing: {missing!r}; expected 'fail' or 'skip'")
        try:
            with _without_torchs_trace():
                return cp_debug.assert_agree(*args, **kwargs)
        except CpdebugError as error:
            if missing == "skip" and error.exit_code == UNAVAILABLE:
                pytest.skip(str(error).partition("\n")[0])
            raise error.with_traceback(None) from None  # what was given is wrong: the test's own line is what matters
        except AssertionError as error:
            result = getattr(error, "result", None)
            if result is not None and os.environ.get("GITHUB_ACTIONS") == "true":
                from cp_debug.reports.files import render_github
                from cp_debug.reports.saved import SavedResult

                tell((_ANNOTATION, render_github(SavedResult.of(result)).strip()))
            if folder and result is not None:
                report = _written(result, Path(config.rootpath, folder), request.node.nodeid, config.stash[_WRITTEN])
                if isinstance(report, Path):
                    tell((_REPORT, _visible(str(report))))
                text = f"{error}\nreport: {_visible(str(report))}"
                raise pytest.fail.Exception(text, pytrace=True) from None  # told once
            raise

    return check


@contextmanager
def _without_torchs_trace() -> Iterator[None]:
    """Keep records for torch's own trace, lines without text, out of what pytest shows of a failure."""

    def wanted(_: logging.LogRecord) -> bool:
        return "TORCH_TRACE" in os.environ

    trace = logging.getLogger("torch.__trace")
    trace.addFilter(wanted)
    try:
        yield
    finally:
        trace.removeFilter(wanted)


def _written(result: BisectResult, folder: Path, node: str, written: set[Path]) -> Path | str:
    """The page of a failed test, or why there is none: that is no reason to hide the failure."""
    from cp_debug.errors import InputError, system_reason

    try:
        page = _free(folder, node, written)
        result.write_html(page)
        written.add(page)
    except OSError as error:
        return f"{folder}: cannot be written ({system_reason(error)})"
    except InputError as error:
        return str(error)
    return page


def _visible(text: str) -> str:
    from cp_debug.safe_text import visible

    return visible(text)


def _free(folder: Path, node: str, written: set[Path]) -> Path:
    """A file name made from the test's that this run has not written: a test may check several models."""
    folder.mkdir(parents=True, exist_ok=True)
    stem = re.sub(r"[^\w.-]+", "-", node).strip("-")[-120:]
    if stem != node.replace("::", "-").replace("/", "-"):  # another test, in another process, may come to the same
        stem += f"-{hashlib.sha256(node.encode()).hexdigest()[:6]}"
    names = (f"{stem}.html", *(f"{stem}-{index}.html" for index in range(2, 1000)))
    return next(path for name in names if (path := folder / name) not in written)
