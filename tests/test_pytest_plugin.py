"""The plug-in in a pytest of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from nets import second_like
from test_api import scaled

pytest_plugins = ["pytester"]

CASE = """
def test_same(assert_agree):
    assert_agree("a.onnx", "ort,ort", test_model="a.onnx")

def test_other(assert_agree):
    assert_agree("a.onnx", "ort,ort", test_model="b.onnx")
"""


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
