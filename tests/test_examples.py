"""The examples run as they stand, in a folder of their own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def run(folder: Path, *arguments: str) -> str:
    done = subprocess.run([sys.executable, *arguments], cwd=folder, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_a_torch_module(tmp_path: Path) -> None:
    printed = run(tmp_path, str(EXAMPLES / "torch_module.py"))
    assert printed.count("✓") == 3
    assert (tmp_path / "classifier.html").stat().st_size > 10_000


@pytest.mark.slow
def test_two_files(tmp_path: Path) -> None:
    printed = run(tmp_path, str(EXAMPLES / "two_files.py"))
    assert "guilty" in printed
    assert "1.05" in printed


@pytest.mark.slow
def test_a_dump_from_elsewhere(tmp_path: Path) -> None:
    printed = run(tmp_path, str(EXAMPLES / "dump_from_elsewhere.py"))
    assert "guilty" in printed
    assert printed.count("guilty") == 1


@pytest.mark.slow
def test_the_tests_of_an_export(tmp_path: Path) -> None:
    run(tmp_path, "-m", "pytest", "-p", "no:cacheprovider", f"--rootdir={tmp_path}", str(EXAMPLES / "test_export.py"))


def test_the_workflow_is_one(tmp_path: Path) -> None:
    workflow = yaml.safe_load((EXAMPLES / "github-actions.yaml").read_text(encoding="utf-8"))
    steps = workflow["jobs"]["check"]["steps"]
    assert any("--cpdebug-report" in step.get("run", "") for step in steps)
    commands = [words for step in steps if (words := step.get("run", "").split())[:1] == ["cpdebug"]]
    for words in commands:  # every flag of it is one of the command's
        told = run(tmp_path, "-m", "cp_debug", words[1], "--help")
        assert all(word in told for word in words if word.startswith("--"))
    assert [words[1] for words in commands] == ["bisect", "report"]
