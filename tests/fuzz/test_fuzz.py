"""The fuzzer finds nothing: a few dozen cases of the cheap kinds, 2,000 of all; and it sees what is wrong."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

RUN = Path(__file__).with_name("fuzz_run.py")


def fuzz(*arguments: str) -> str:
    """What the fuzzer printed; the test fails with it when it found something."""
    done = subprocess.run([sys.executable, str(RUN), *arguments], capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr[-4000:]}"
    return done.stdout


@pytest.mark.slow
def test_a_few_dozen_cases() -> None:
    cheap = ("onnx-bytes", "onnx-structure", "inputs", "captures", "deploy", "arguments", "callables")
    told = fuzz("--seed", "quick", "--cases", "24", *(part for kind in cheap for part in ("--only", kind)))
    assert "24 cases" in told


def test_the_fuzzer_sees_what_is_wrong(tmp_path: Path) -> None:
    """Each fault that the summary counts, shown to the judge."""
    sys.path.insert(0, str(RUN.parent))
    from fuzz_base import MARK
    from fuzz_harness import judged_streams, judged_text

    def kinds(code: int, out: str = "", err: str = "") -> list[str]:
        return [kind for kind, _ in judged_streams(code, False, out.encode(), err.encode(), tmp_path)]

    assert kinds(0, "fine") == []
    assert kinds(2, err="error: net.onnx: no such file") == []
    assert kinds(2) == ["message"]
    assert kinds(2, err="line\n" * 13) == ["message"]
    assert kinds(0, "\x1b[31mred") == ["control"]
    assert kinds(0, "\u202eturned") == ["control"]
    logged = "\x1b[0;93m2026-11-26 21:53:03.7513 [W:onnxruntime:, model.cc:290 Model] an old opset{}\x1b[m\n"
    assert kinds(0, err=logged.format("")) == []
    assert kinds(0, err=logged.format(" \x1b[31mred")) == ["control"]
    assert kinds(0, f"{MARK}{MARK}") == ["control"]
    assert kinds(70, err="error: unexpected") == ["traceback"]
    assert kinds(-6) == ["traceback"]
    assert kinds(0, "::error title=a::b\n::warning::injected") == ["control"]
    assert kinds(1, "Traceback (most recent call last):\n") == ["traceback"]
    for name, text, bad in (
        ("a.csv", "name\n=1+1\n", True),
        ("b.csv", "name\n-1.5\n'=1+1\n", False),
        ("a.md", "<script>alert(1)</script>", True),
        ("b.md", "&lt;script&gt;alert(1)", False),
        ("a.html", "<b>\x1b</b>", True),
    ):
        (tmp_path / name).write_text(text)
        assert bool(list(judged_text(tmp_path / name))) == bad, name


@pytest.mark.slow
def test_the_fuzzer_sees_what_a_failed_command_leaves(tmp_path: Path) -> None:
    sys.path.insert(0, str(RUN.parent))
    from fuzz_base import Case
    from fuzz_harness import adopt, judge

    adopt()
    script = "import os, subprocess, sys\nos.mkdir('out')\nsubprocess.Popen(['sleep', '30'])\n"
    script += "print('no', file=sys.stderr)\n"
    for code, unchanged, found in ((0, True, 1), (2, False, 1), (2, True, 2)):
        place = tmp_path / f"{code}-{unchanged}"
        (place / "work").mkdir(parents=True)
        (place / "work" / "case.py").write_text(f"{script}sys.exit({code})")
        outcome = judge(Case("x", [[]], ["out"], program="case.py", unchanged=unchanged), place)
        assert [kind for kind, _ in outcome.faults] == ["outside"] * found, outcome.faults
        assert "a process is left: sleep 30" in outcome.faults[-1][1]


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_two_thousand_cases() -> None:
    told = fuzz("--seed", "whole", "--cases", "2000")
    assert "2000 cases" in told
    print(told)
