"""A full disk, on a real file system of a few hundred KiB: one sentence, exit code 2, nothing half-written."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
from nets import second_like
from onnx import numpy_helper

COMMAND = [sys.executable, "-m", "cp_debug"]
pytestmark = [
    pytest.mark.process,
    pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="only root may mount"),
]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``net.onnx``, ``worse.onnx`` with another weight, ``kept``: the result of a bisection of both."""
    folder = tmp_path_factory.mktemp("files")
    second_like(folder / "net.onnx", depth=1, size=16)
    model = onnx.load(folder / "net.onnx")
    weight = max(model.graph.initializer, key=lambda tensor: len(tensor.raw_data))
    weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight) * np.float32(1.2), weight.name))
    onnx.save(model, folder / "worse.onnx")
    call(folder, "bisect", "net.onnx", "-b", "ort,ort", "--test-model", "worse.onnx", "--save", "kept", code=1)
    (folder / "net.py").write_text(NET)
    config = {"model": "net.py:make", "work_dir": "full/work", "evaluate": {"enabled": False}}
    (folder / "deploy.yaml").write_text(json.dumps(config))
    return folder


NET = """
import torch

def make():
    torch.manual_seed(0)
    layers = torch.nn.Linear(64, 512), torch.nn.ReLU(), torch.nn.Linear(512, 64)
    return torch.nn.Sequential(*layers), (torch.ones(1, 64),)
"""


@pytest.fixture
def full(files: Path, request: pytest.FixtureRequest) -> Iterator[Path]:
    """``full``, a file system of as many KiB as the test says."""
    folder = files / "full"
    folder.mkdir()
    size = f"size={request.param}k"
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", size, "tmpfs", str(folder)], capture_output=True, check=False)
    if done.returncode:
        folder.rmdir()
        pytest.skip("mounting is not allowed here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)
    folder.rmdir()


def call(folder: Path, *argv: str, code: int) -> str:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "NO_COLOR": "1"}
    done = subprocess.run([*COMMAND, *argv], cwd=folder, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == code, (done.returncode, done.stderr)
    return done.stderr


@pytest.mark.parametrize(
    ("full", "command", "left"),
    [
        (32, "capture net.onnx -b ort -o full/out", set()),
        (32, "bisect net.onnx -b ort,emu-fp16 --save full/out", set()),
        (8, "bisect net.onnx -b ort,emu-fp16 --html full/page.html", set()),
        (8, "report kept -o full/page.html", set()),
        (16, "report kept -f onnx -o full/net.onnx", set()),
        (16, "bundle kept -o full/bundle", set()),
        (16, "bundle kept -o full/bundle.zip", set()),
        (4, "sweep bisect net.onnx -b ort,emu-fp16 -n 2 --workers 1 --log full/log.jsonl", {"full/log.jsonl"}),
        (64, "deploy deploy.yaml", {"full/work", "full/work/deploy.json"}),
    ],
    indirect=["full"],
)
def test_a_full_disk_is_one_sentence_and_leaves_nothing(files: Path, full: Path, command: str, left: set[str]) -> None:
    told = call(files, *command.split(), code=2).strip()
    message = told[told.index("error: ") :]
    assert "full" in message
    assert "no space left" in message
    assert len(message.splitlines()) <= 3
    found = {str(path.relative_to(files)) for path in full.rglob("*")}
    assert found <= left | {"full/work/onnx"}, found
