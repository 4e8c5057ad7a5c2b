"""pytest plug-in: the fixture ``assert_agree``, and ``--cpdebug-report DIR``, which keeps an HTML page of each failure.

pytest loads this module wherever cpdebug is installed, so it imports nothing before the fixture is used.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from cp_debug.bisect.result import BisectResult

_REPORTS = pytest.StashKey[list[Path]]()
_ANNOTATIONS = pytest.StashKey[list[str]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add ``--cpdebug-report`` and the ini option ``cpdebug_report``."""
    group = parser.getgroup("cpdebug")
    group.addoption(
        "--cpdebug-report", metavar="DIR", help="keep an HTML report of each failed assert_agree in this folder"
    )
    parser.addini("cpdebug_report", "folder of HTML reports of failed assert_agree checks")


def pytest_configure(config: pytest.Config) -> None:
    """Prepare the lists of reports and of annotations."""
    config.stash[_REPORTS], config.stash[_ANNOTATIONS] = [], []


@pytest.fixture
def assert_agree(request: pytest.FixtureRequest) -> Callable[..., BisectResult]:
    """``cp_debug.assert_agree``; where it fails and ``--cpdebug-report`` is given, the page of the result is kept."""
    config = request.config
    folder = config.getoption("--cpdebug-report") or config.getini("cpdebug_report")

    def check(*args: Any, **kwargs: Any) -> BisectResult:
        __tracebackhide__ = True
        import cp_debug

        try:
            return cp_debug.assert_agree(*args, **kwargs)
        except AssertionError as error:
            result = getattr(error, "result", None)
            if result is not None and os.environ.get("GITHUB_ACTIONS") == "true":
                from cp_debug.reports.gates import render_github
                from cp_debug.reports.saved import SavedResult

                config.stash[_ANNOTATIONS].append(render_github(SavedResult.of(result)))
            if folder and result is not None:
                report = _written(result, Path(config.rootpath, folder), request.node.nodeid)
                if isinstance(report, Path):
                    config.stash[_REPORTS].append(report)
                text = f"{error}\nreport: {_visible(str(report))}"
                raise pytest.fail.Exception(text, pytrace=True) from None  # told once
            raise

    return check


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """List the reports that were written; in a workflow of GitHub, annotate."""
    if pages := config.stash.get(_REPORTS, []):
        terminalreporter.section("cpdebug reports")
        for page in pages:
            terminalreporter.line(_visible(str(page)))
    for text in config.stash.get(_ANNOTATIONS, []):
        terminalreporter.write("\n" + text)  # a workflow command stands at the beginning of a line


def _written(result: BisectResult, folder: Path, node: str) -> Path | str:
    """The page of a failed test, or why there is none: that is no reason to hide the failure."""
    from cp_debug.errors import InputError, system_reason

    try:
        page = _free(folder, node)
        result.write_html(page)
    except OSError as error:
        return f"{folder}: cannot be written ({system_reason(error)})"
    except InputError as error:
        return str(error)
    return page


def _visible(text: str) -> str:
    from cp_debug.safe_text import visible

    return visible(text)


def _free(folder: Path, node: str) -> Path:
    """A file name made from the test's that is not taken: a test may check several models."""
    folder.mkdir(parents=True, exist_ok=True)
    stem = re.sub(r"[^\w.-]+", "-", node).strip("-")[-120:]
    names = (f"{stem}.html", *(f"{stem}-{index}.html" for index in range(2, 1000)))
    return next(path for name in names if not (path := folder / name).exists())
