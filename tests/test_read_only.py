"""A read-only file system, a real one in a name space of its own: what cannot be written is said in one sentence, and
what only has to be read is read."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from nets import second_like
from test_disk_full import NET

INSIDE = """
mount -t tmpfs -o size=8m tmpfs "$1" && cp -r "$2"/. "$1"/ && mount -o remount,ro "$1" || exit 99
shift 2
exec "$@"
"""
"""Arguments: the folder to be read-only, a folder with what shall stand in it, the command."""


def _allowed() -> bool:
    if shutil.which("unshare") is None:
        return False
    done = subprocess.run(["unshare", "-rm", "mount", "-t", "tmpfs", "tmpfs", "/mnt"], capture_output=True, check=False)
    return done.returncode == 0


pytestmark = [
    pytest.mark.process,
    pytest.mark.skipif(not _allowed(), reason="no name space of one's own may be mounted in"),
]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``net.onnx``, ``kept``: the result of a bisection, ``seed``: what the read-only folder ``fixed`` holds."""
    folder = tmp_path_factory.mktemp("files")
    for name in ("fixed", "seed", "cache"):
        (folder / name).mkdir()
    second_like(folder / "net.onnx", depth=1, size=16)
    (folder / "net.py").write_text(NET)
    config = {"model": "net.py:make", "work_dir": "fixed/work", "evaluate": {"enabled": False}}
    (folder / "deploy.yaml").write_text(json.dumps(config))
    for name in ("net.onnx", "net.py"):
        shutil.copy(folder / name, folder / "seed" / name)
    call(folder, "bisect", "net.onnx", "-b", "ort,emu-fp16", "--save", "kept", code=0)
    shutil.copytree(folder / "kept", folder / "seed" / "kept")
    return folder


def call(folder: Path, *argv: str, code: int, **environment: str) -> str:
    """What a command prints to standard error with ``fixed`` mounted read-only."""
    inside = ["unshare", "-rm", "sh", "-c", INSIDE, "sh", str(folder / "fixed"), str(folder / "seed")]
    command = [*inside, sys.executable, "-m", "cp_debug", *argv]
    variables = os.environ | {"OMP_NUM_THREADS": "1", "NO_COLOR": "1"} | environment
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=variables, check=False)
    assert done.returncode == code, (done.returncode, done.stdout, done.stderr)
    return done.stderr


@pytest.mark.parametrize(
    "command",
    [
        "capture net.onnx -b ort -o fixed/out",
        "bisect net.onnx -b ort,emu-fp16 --save fixed/out",
        "bisect net.onnx -b ort,emu-fp16 --json fixed/result.json",
        "report kept -o fixed/page.html",
        "report kept -f onnx -o fixed/net2.onnx",
        "sweep bisect net.onnx -b ort,emu-fp16 -n 2 --workers 1 --log fixed/log.jsonl",
        "deploy deploy.yaml",
    ],
)
def test_what_cannot_be_written_is_one_sentence(files: Path, command: str) -> None:
    told = call(files, *command.split(), code=2).strip()
    message = told[told.index("error: ") :]
    assert "fixed/" in message
    assert "read-only file system" in message
    assert len(message.splitlines()) <= 3


@pytest.mark.parametrize(
    ("command", "code"),
    [
        ("bisect fixed/net.onnx -b ort,emu-fp16", 0),
        ("bisect fixed/net.py:make -b torch,ort", 0),  # the module's export is written elsewhere
        ("report fixed/kept -f markdown", 0),
    ],
)
def test_what_is_only_read_may_lie_there(files: Path, command: str, code: int) -> None:
    assert "Traceback" not in call(files, *command.split(), code=code)


def test_without_a_cache_that_can_be_written_everything_still_works(files: Path) -> None:
    cache = str(files / "fixed" / "cache")
    assert "Traceback" not in call(files, *["bisect", "net.py:make", "-b", "torch,ort"], code=0, XDG_CACHE_HOME=cache)
