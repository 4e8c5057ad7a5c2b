"""The plug-in in a pytest of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from nets import second_like
from test_api import scaled

from cp_debug.pytest_plugin import Summary, _written

pytest_plugins = ["pytester"]

CASE = """
def test_same(assert_agree):
    assert_agree("a.onnx", "ort,ort", test_model="a.onnx")

def test_other(assert_agree):
    assert_agree("a.onnx", "ort,ort", test_model="b.onnx")
"""


@pytest.mark.slow
@pytest.mark.parametrize("processes", [(), ("-n", "2")])
def test_the_fixture_and_the_kept_report(
    processes: tuple[str, ...], pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    second_like(pytester.path / "a.onnx", depth=1, size=8)
    scaled(second_like(pytester.path / "b.onnx", depth=1, size=8), 1.05)
    pytester.makepyfile(CASE)
    done = pytester.runpytest_subprocess("--cpdebug-report=pages", "-p", "no:cacheprovider", *processes)
    done.assert_outcomes(passed=1, failed=1)
    shown = [
        "*guilty*",
        "*fix:*",
        "*cpdebug reports*",
        "*test_other.html",
        "::error title=cpdebug*guilty*",
        "FAILED*guilty*",
    ]
    done.stdout.fnmatch_lines(shown)
    assert "During handling" not in done.stdout.str()  # the finding is told once
    [page] = Path(pytester.path, "pages").iterdir()
    assert page.name.endswith("test_other.html")
    assert "guilty" in page.read_text(encoding="utf-8")


def test_a_missing_backend_skips_where_that_is_asked(pytester: pytest.Pytester) -> None:
    second_like(pytester.path / "a.onnx", depth=1, size=8)
    call = 'assert_agree("a.onnx", "ort,ort@cuda:31"'
    bodies = {"asked": f'{call}, missing="skip")', "silent": f"{call})", "misspelt": f'{call}, missing="skipped")'}
    pytester.makepyfile("".join(f"def test_{name}(assert_agree):\n    {body}\n" for name, body in bodies.items()))
    done = pytester.runpytest_inprocess("-p", "no:cacheprovider", "-rs")
    done.assert_outcomes(failed=2, skipped=1)
    done.stdout.fnmatch_lines(["*missing: 'skipped'; expected 'fail' or 'skip'*", "SKIPPED*ort@cuda:31*"])


@pytest.mark.slow
def test_what_was_given_wrong_is_told_at_the_test_s_own_line(pytester: pytest.Pytester) -> None:
    pytester.makepyfile('def test_it(assert_agree):\n    assert_agree("nowhere.onnx", "ort,ort-all")')
    done = pytester.runpytest_subprocess("-p", "no:cacheprovider")
    done.stdout.fnmatch_lines(["E * nowhere.onnx: no such ONNX file", "*.py:2: InputError"])
    assert "cp_debug/" not in done.stdout.str()


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

    def section(self, title: str) -> None:
        self.lines.append(title)

    line = write = section

    def write_html(self, path: Path) -> None:
        path.write_text("")


def test_a_folder_s_name_is_shown_and_one_that_is_none_hides_no_failure(tmp_path: Path) -> None:
    reporter: Any = Reporter()
    written: set[Path] = set()
    names = [_written(reporter, tmp_path / "pages", "test_a.py::test_b", written) for _ in range(2)]
    assert [Path(name).name for name in names] == ["test_a.py-test_b.html", "test_a.py-test_b-2.html"]
    assert _written(reporter, tmp_path / "pages", "test_a.py::test_b", set()) == names[0]  # a later run replaces it
    alike = [_written(reporter, tmp_path / "pages", f"test_a.py::test_b[{sign}]", set()) for sign in "/-?"]
    assert len(set(alike)) == 3  # processes do not know of each other's
    (tmp_path / "file").write_text("")
    assert "cannot be written" in str(_written(reporter, tmp_path / "file" / "x", "test_b", written))


def test_the_end_tells_every_page_and_annotation_once() -> None:
    reporter: Any = Reporter()
    summary = Summary()
    for when in ("setup", "call", "teardown"):
        told = [("other", "x"), ("cpdebug_report", "a.html"), ("cpdebug_annotation", "::error::b")]
        summary.pytest_runtest_logreport(
            pytest.TestReport("a", ("a", 1, "a"), {}, "failed", None, when, user_properties=told)  # type: ignore[arg-type]
        )
    summary.pytest_terminal_summary(reporter)
    assert reporter.lines == ["cpdebug reports", "a.html", "\n::error::b\n"]
