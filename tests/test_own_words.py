"""Messages that name options: of the command that runs, or with the command that has them."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from nets import NetBuilder
from test_cli import run
from typer.main import get_command

from cp_debug.cli.main import application
from cp_debug.cli.typed import all_options, in_own_words

ELSEWHERE = {"--map": "bisect", "--samples": "bisect", "--test-model": "bisect", "--test-checkpoint": "bisect",
             "--goal": "predict", "--backends": "bisect", "--inputs": "bisect", "--html": "bisect"}  # fmt: skip


@pytest.mark.parametrize(
    ("text", "own", "told"),
    [
        ("the map is wrong", [], "the map is wrong"),
        ("--map REFERENCE=TEST pairs two of them", ["--map"], "--map REFERENCE=TEST pairs two of them"),
        ("; --map REFERENCE=TEST pairs", [], "; --map REFERENCE=TEST of `cpdebug bisect` pairs"),
        ("--samples: 3", [], "3"),
        ("--backends: 'a'", ["--backend"], "--backend: 'a'"),
        ("--inputs: x", ["--calib-data"], "--calib-data: x"),
        ("--map or --samples", [], "--map of `cpdebug bisect` or --samples of `cpdebug bisect`"),
        ("--map or --samples", ["--map"], "--map or --samples of `cpdebug bisect`"),
        ("--map, --goal", [], "--map of `cpdebug bisect`, --goal of `cpdebug predict`"),
        ("`cpdebug bisect --map` pairs", [], "`cpdebug bisect --map` pairs"),
        ("run cpdebug bisect M --map x=y; --goal", [], "run cpdebug bisect M --map x=y; --goal of `cpdebug predict`"),
        ("pip install --no-deps x", [], "pip install --no-deps x"),
        ("--no-deps is pip's", [], "--no-deps is pip's"),
        ("--html-page", [], "--html-page"),
    ],
)  # fmt: skip
def test_options_are_named_with_who_has_them(text: str, own: Sequence[str], told: str) -> None:
    assert in_own_words(text, own, ELSEWHERE) == told


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("words")
    for name, out in (("net", "Relu"), ("other", "Exp")):
        b = NetBuilder()
        b.save(folder / f"{name}.onnx", {"x": (1, ["n", 4])}, [b.op(out, "x")])
    np.save(folder / "wrong.npy", np.zeros(3, np.float32))
    (folder / "nets.py").write_text("import torch\ndef build():\n    return torch.nn.ReLU(), (torch.ones(1, 4),)\n")
    return folder


BAD = """
bench net.onnx -b nothing
bench net.onnx --inputs wrong.npy
bisect net.onnx -b ort,ort
bisect net.onnx -b ort,emu-fp16:x
capture net.onnx -b ort,ort-all
capture net.onnx -b ort:x
capture nets.py:build -b ort --seed 4 -o out
capture net.onnx -b ort --inputs wrong.npy -o out
check nets.py:build --seed 4
check nets.py:build --shape x=2x4
check net.onnx --shape y=2x4
check net.onnx --inputs wrong.npy
check net.onnx --inputs none.npz
compare none other
export nets.py:build --seed 4 -o out
predict net.onnx --precision int8 --target trt-10
predict nets.py:build --precision fp16 --target trt-10 --seed 3 --samples 1
search net.onnx -b ort,ort --goal rel_l2<1
search net.onnx -b ort,ort-all --goal map_drop<1
search nets.py:build -b torch,emu-fp16 --goal rel_l2<1 --seed 3 --samples 1
verify net.onnx -b ort,ort
verify net.onnx -b ort,nothing
verify net.onnx -b ort,ort --test-model other.onnx --map a=b
verify nets.py:build -b torch,ort --seed 3 --samples 1
eval net.onnx -b ort
sweep bisect net.onnx -b ort,ort
sweep bisect net.onnx -b ort
sweep bisect nets.py:build -b torch,ort --seed 3 --samples 1
sweep search net.onnx -b ort,ort
sweep ablate net.onnx -b ort,ort
sweep eval net.onnx -b ort,ort
quantize ptq net.onnx -o out --calib-data wrong.npy
quantize ptq net.onnx -o out --skip-layers *
import wrong.npy --model net.onnx -o out
demo nothing
"""


@pytest.mark.few(9)
@pytest.mark.parametrize("line", BAD.strip().splitlines())
def test_no_refusal_names_an_option_that_the_command_lacks(
    folder: Path, line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    words = shlex.split(line)
    code, text = run(*words)
    assert code in (2, 3), text
    command = get_command(application())
    while hasattr(command, "commands"):
        command = command.commands[words.pop(0)]
    own = {option for p in command.params for option in (*p.opts, *p.secondary_opts)}
    for clause in re.split(r"; |\n", text):
        commands = " ".join(re.findall(r"`[^`]*`", clause))
        for option in re.findall(r"--[a-z][\w-]*", re.sub(r"`[^`]*`", "", clause)):
            assert option in own or f"`cpdebug {all_options(application)[option]}`" in commands, text
