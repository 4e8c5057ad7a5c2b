"""The plug-in in a pytest of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from nets import second_like
from test_api import scaled

from cp_debug.pytest_plugin import _REPORTS, _written, pytest_configure, pytest_terminal_summary

pytest_plugins = ["pytester"]

CASE = """
def test_same(assert_agree):
    assert_agree("a.onnx", "ort,ort", test_model="a.onnx")

def test_other(assert_agree):
    assert_agree("a.onnx", "ort,ort", test_model="b.onnx")
"""


@pytest.mark.slow
def test_the_fixture_and_the_kept_report(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    second_like(pytester.path / "a.onnx", depth=1, size=8)
    scaled(second_like(pytester.path / "b.onnx", depth=1, size=8), 1.05)
    pytester.makepyfile(CASE)
    done = pytester.runpytest_subprocess("--cpdebug-report=pages", "-p", "no:cacheprovider")
    done.assert_outcomes(passed=1, failed=1)
    done.stdout.fnmatch_lines(["*guilty*", "*fix:*", "*cpdebug reports*", "::error title=cpdebug*guilty*"])
    assert "During handling" not in done.stdout.str()  # the finding is told once
    [page] = Path(pytester.path, "pages").iterdir()
    assert page.name.endswith("test_other.html")
    assert "guilty" in page.read_text(encoding="utf-8")


def test_the_plugin_costs_nothing_where_it_is_not_used() -> None:
    code = (
        "import sys, cp_debug.pytest_plugin; "
        "assert not {'torch', 'numpy', 'onnx', 'pandas', 'rich'} & set(sys.modules), sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


class Reporter:
    """What pytest hands to the summary, and a result that writes a page of nothing."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.stash = pytest.Stash()

    def section(self, title: str) -> None:
        self.lines.append(title)

    line = write = section

    def write_html(self, path: Path) -> None:
        path.write_text("")


def test_a_folder_s_name_is_shown_and_one_that_is_none_hides_no_failure(tmp_path: Path) -> None:
    reporter: Any = Reporter()
    pytest_configure(reporter)
    page = _written(reporter, tmp_path / "\x1b[31m", "test_a.py::test_b")
    assert isinstance(page, Path)
    reporter.stash[_REPORTS].append(page)
    pytest_terminal_summary(reporter, reporter)
    assert reporter.lines[-1].endswith("\\x1b[31m/test_a.py-test_b.html")
    (tmp_path / "file").write_text("")
    assert "cannot be written" in str(_written(reporter, tmp_path / "file" / "x", "test_b"))
