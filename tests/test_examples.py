"""The examples run as they stand, in a folder of their own."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from extras import needs
from nets import second_like

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def run(folder: Path, *arguments: str, expected: int = 0, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        env=os.environ | {"TMPDIR": str(folder)} | environment,
    )
    assert done.returncode == expected, done.stdout + done.stderr
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
def test_int8(tmp_path: Path) -> None:
    printed = run(tmp_path, str(EXAMPLES / "int8.py"))
    assert "✓ ort-int8: agrees" in printed
    assert "rel_l2<0.001 holds with" in printed
    assert "--nodes_to_exclude" in printed


@pytest.mark.slow
def test_a_cluster(tmp_path: Path) -> None:
    printed = run(tmp_path, str(EXAMPLES / "cluster.py"), expected=1)  # a divergence is found
    assert "bisect: 6 tasks" in printed
    assert "agrees on 5 of 6 samples; most often guilty: /0/Conv (1 of 6)" in " ".join(printed.split())


@pytest.mark.slow
@needs("transformers")
def test_a_folder_of_transformers(tmp_path: Path) -> None:
    printed = run(tmp_path, str(EXAMPLES / "transformers_folder.py"))
    assert printed.count("✓") == 2
    assert "pooler.dense" in printed or "encoder.layer" in printed


@pytest.mark.slow
def test_tensorrt_that_is_not_here(tmp_path: Path) -> None:
    """The sentence that says so, FP16 emulated, and the exit code of the command line."""
    printed = run(tmp_path, str(EXAMPLES / "torch_against_tensorrt.py"), expected=3, CPDEBUG_TRT_PYTHON="")
    assert printed.startswith("skipped: backend 'trt-fp16' is unavailable")
    assert "FP16 overflow" in printed


@pytest.mark.slow
def test_tensorrt_in_another_interpreter(tmp_path: Path) -> None:
    """Recorded TensorRT stands in: what runs is the protocol with another Python, not NVIDIA's library."""
    tests = Path(__file__).parent
    (tmp_path / "tensorrt.py").write_text(
        f"import sys\nsys.path.append({str(tests)!r})\nimport fake_tensorrt\n"
        "sys.modules['__main__'].Cuda = fake_tensorrt.FakeCuda\n"
        "sys.modules['tensorrt'] = fake_tensorrt.fake_tensorrt('10.3.0')\n"
    )
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH={tmp_path} exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    printed = run(
        tmp_path,
        str(EXAMPLES / "torch_against_tensorrt.py"),
        expected=1,
        CPDEBUG_TRT_PYTHON=str(python),
        XDG_CACHE_HOME=str(tmp_path / "cache"),
    )
    assert "torch against trt-fp16" in printed
    assert "fp16-overflow: " in printed


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


def steps_of_the_workflow(folder: Path, change: dict[str, str]) -> tuple[dict[str, int], str]:
    """Run the workflow's shell steps as GitHub's runner does; exit code of each that ran, by its command, and the log.

    ``bash -e`` a step; once one has failed, only steps with ``always()`` or ``failure()`` run. Installing is left out:
    the commands are those of this environment. ``change``: text in a step → text instead.
    """
    tools = folder / "bin"
    tools.mkdir()
    for name, module in (("cpdebug", "cp_debug"), ("pytest", "pytest")):
        (tools / name).write_text(f'#!/bin/sh\nexec {sys.executable} -m {module} "$@"\n')
        (tools / name).chmod(0o755)
    [job] = yaml.safe_load((EXAMPLES / "github-actions.yaml").read_text(encoding="utf-8"))["jobs"].values()
    environment = os.environ | {"PATH": f"{tools}:{os.environ['PATH']}", "GITHUB_ACTIONS": "true"}
    codes: dict[str, int] = {}
    log = ""
    for step in job["steps"]:
        command = step.get("run", "")
        if not command or "pip install" in command:
            continue
        wanted = {"": not any(codes.values()), "always()": True, "failure()": any(codes.values())}[step.get("if", "")]
        for text, other in change.items():
            command = command.replace(text, other)
        if wanted:
            shell = ["bash", "--noprofile", "--norc", "-e", "-o", "pipefail", "-c", command]
            done = subprocess.run(shell, cwd=folder, env=environment, capture_output=True, text=True)
            codes[command] = done.returncode
            log += done.stdout + done.stderr
    return codes, log


@pytest.mark.slow
@pytest.mark.parametrize("faulty", [False, True])
def test_the_workflow_runs_as_it_stands(tmp_path: Path, faulty: bool) -> None:
    second_like(tmp_path / "net.onnx", depth=1, size=8)
    (tmp_path / "tests").mkdir()
    shutil.copy(EXAMPLES / "test_export.py", tmp_path / "tests")
    change = {"ort-none,ort-all": "ort-none,emu-fp16 --rtol 1e-6 --atol 1e-9"} if faulty else {}
    if faulty:
        text = (tmp_path / "tests" / "test_export.py").read_text(encoding="utf-8")
        (tmp_path / "tests" / "test_export.py").write_text(text.replace("rtol=1e-2", "rtol=1e-6"), encoding="utf-8")
    codes, log = steps_of_the_workflow(tmp_path, change)
    assert [*codes.values()] == ([0, 1, 0, 1] if faulty else [0, 0, 0, 0]), log
    annotations = [line for line in log.splitlines() if line.startswith("::")]
    kinds = [line.split(" ", 1)[0].removeprefix("::").split("::")[0] for line in annotations]
    assert kinds == (["warning", "warning"] if faulty else ["notice"]), annotations
    assert all(re.fullmatch(r"::(error|warning|notice) title=[^,:]+::\S.*", line) for line in annotations), annotations
    assert "emu-fp16" in annotations[0] if faulty else "ort-all" in annotations[0]
    pages = {path.name for path in (tmp_path / "reports").glob("*.html")}
    assert pages >= {"net.html"}
    assert len(pages) == (2 if faulty else 1)
