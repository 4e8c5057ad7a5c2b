"""Options that take numbers: each is refused in a sentence that names it, or bounded, before anything slow."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from nets import NetBuilder, second_like
from test_cli import run
from typer.main import get_command

import cp_debug
from cp_debug.cli.main import app
from cp_debug.errors import InputError
from cp_debug.graph.graph import Graph

NOWHERE = "nowhere.onnx"
REFUSED = ("nan", "inf", "-inf", "1e400", "-1", "1e999", "9" * 400, "x", "")
POSITIVE = {"--batches", "--samples", "--calib-samples", "--scenes", "--val-scenes", "--steps", "--epochs", "--batch"}
POSITIVE |= {"--repeats", "--interval", "--patience", "--workers", "--workspace", "--build-timeout", "--opset"}
MANY = {"--samples", "--batches"}
"""Counts of samples that would be made up; that of --calib-samples is asked for by INT8 backends alone."""
BASES = {
    ("compare",): ["a", "b"],
    ("diff",): ["a", "b"],
    ("cache",): [],
    ("quantize", "ptq"): [NOWHERE, "-o", "out"],
    ("quantize", "qat"): ["centerpoint:tiny", "--from", NOWHERE, "-o", "out"],
    ("export",): [NOWHERE, "-o", "out"],
    ("build",): [NOWHERE, "-o", "out"],
}


def numeric_options() -> list[tuple[tuple[str, ...], str, type]]:
    """(words of a command, option, int or float), from the parser itself."""
    found: list[tuple[tuple[str, ...], str, type]] = []

    def collect(command: object, words: tuple[str, ...]) -> None:
        for name, child in getattr(command, "commands", {}).items():
            collect(child, (*words, name))
        for option in getattr(command, "params", []):
            kind = str(option.type_descriptor.annotation) if hasattr(option, "type_descriptor") else option.type.name
            if option.param_type_name == "option" and ("int" in kind or "float" in kind):
                found.append((words, max(option.opts, key=len), float if "float" in kind else int))

    collect(get_command(app), ())
    return found


OPTIONS = numeric_options()


def test_the_options_are_found() -> None:
    assert len(OPTIONS) > 70
    assert (("bisect",), "--rtol", float) in OPTIONS
    assert (("quantize", "qat"), "--lr", float) in OPTIONS
    assert (("sweep", "search"), "--workers", int) in OPTIONS


@pytest.mark.parametrize(("words", "option", "kind"), OPTIONS, ids=lambda value: str(value))
def test_numbers_that_are_none_are_refused(
    words: tuple[str, ...], option: str, kind: type, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    base = BASES.get(words, [NOWHERE])
    given = [*REFUSED, *(["0", "-0"] if option in POSITIVE else []), *(["1e30", "0.5"] if kind is int else [])]
    for value in given:
        code, text = run(*words, *base, option, value)
        assert code == 2, (value, text)
        message = text.strip()
        assert option in message, (value, message)
        assert len(message.splitlines()) <= 12, message
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "option"), [(words, option) for words, option, _ in OPTIONS if option in MANY], ids=str
)
def test_what_would_be_made_up_for_hours_is_refused(words: tuple[str, ...], option: str) -> None:
    code, text = run(*words, *BASES.get(words, [NOWHERE]), option, "100000")
    assert code == 2
    assert "--samples: 100000 generated samples; expected at most 1000" in text or (
        "--batches: 100000 generated samples; expected at most 1000" in text
    )


@pytest.mark.parametrize("text", ["y=nan", "y=inf", "=1", "y=", "y"])
def test_a_tolerance_is_a_finite_number(text: str) -> None:
    code, told = run("verify", "centerpoint:tiny", "--tolerance", text)
    assert code == 2
    assert told.startswith(f"--tolerance: {text!r}; expected NAME=NUMBER")


@pytest.fixture(scope="module")
def net(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return second_like(tmp_path_factory.mktemp("net") / "net.onnx", depth=1, size=16)


@pytest.mark.few(2)
@pytest.mark.parametrize(
    ("option", "value"),
    [("--rtol", "0"), ("--atol", "0"), ("--rtol", "1e308"), ("--atol", "1e308"), ("--rtol", "1e-320"), ("--seed", "0")],
)
def test_extreme_numbers_that_are_some_work(net: Path, option: str, value: str) -> None:
    code, text = run("bisect", net, "-b", "ort,emu-fp16", "--json", "-", option, value)
    assert code in (0, 1)
    assert json.loads(text)["schema"]


# Files that a command line names are read before torch is imported, and before anything is exported.


def bad_files(folder: Path) -> dict[str, tuple[str, str]]:
    """File → (model, what is said of it)."""
    (folder / "short.bin").write_bytes(b"123")
    (folder / "nets.py").write_text("def make(): ...")
    (folder / "text.npz").write_text("none")
    (folder / "info.pkl").write_bytes(b"\x80\x04.")
    np.savez(folder / "other.npz", nothing=np.zeros(3, np.float32))
    return {
        "short.bin": ("centerpoint:tiny", "3 bytes is not a multiple of"),
        "text.npz": ("nets.py:make", "not a readable .npz file"),
        "info.pkl": ("centerpoint:tiny", "info.pkl"),
        "other.npz": ("net", "other.npz"),
        "missing.bin": ("centerpoint:tiny", "missing.bin: no such file"),
    }


@pytest.mark.parametrize("file", ["short.bin", "text.npz", "info.pkl", "other.npz", "missing.bin"])
@pytest.mark.parametrize(
    "command",
    [
        ["bisect", "MODEL", "-b", "ort,emu-fp16", "--inputs", "FILE"],
        ["capture", "MODEL", "-b", "ort", "--inputs", "FILE"],
        ["check", "MODEL", "--inputs", "FILE"],
        ["search", "MODEL", "-b", "ort,emu-fp16", "--inputs", "FILE"],
        ["quantize", "ptq", "MODEL", "-o", "out", "--calib-data", "FILE"],
        ["bisect", "MODEL", "-b", "ort,ort-int8", "--calib-data", "FILE"],
    ],
    ids=lambda command: " ".join(command[:2]),
)
def test_bad_inputs_are_told_before_torch_is_imported(
    tmp_path: Path, net: Path, monkeypatch: pytest.MonkeyPatch, file: str, command: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    model, said = bad_files(tmp_path)[file]
    before = sorted(tmp_path.iterdir())
    for heavy in ("torch", "pandas"):
        monkeypatch.setitem(sys.modules, heavy, None)  # importing it raises
    argv = [{"MODEL": str(net) if model == "net" else model, "FILE": file}.get(part, part) for part in command]
    code, text = run(*argv)
    assert code == 2, text
    assert said in text
    assert next(part for part in command if part.startswith("--") and part.endswith(("inputs", "data"))) in text
    assert sorted(tmp_path.iterdir()) == before


def test_a_bad_test_model_is_told_before_torch_is_imported(
    tmp_path: Path, net: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bad.onnx").write_bytes(b"none")
    monkeypatch.setitem(sys.modules, "torch", None)
    for path in (tmp_path / "bad.onnx", tmp_path / "missing.onnx"):
        code, text = run("bisect", net, "-b", "ort,ort", "--test-model", path)
        assert code == 2
        assert path.name in text


def test_the_second_of_two_inputs_is_read_before_the_export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    np.zeros((50, 4), np.float32).tofile(tmp_path / "a.bin")
    (tmp_path / "b.bin").write_bytes(b"short")
    monkeypatch.setitem(sys.modules, "torch", None)
    code, text = run("bisect", "centerpoint:tiny", "--inputs", tmp_path, "--samples", "2")
    assert code == 2
    assert "b.bin: 5 bytes is not a multiple" in text


EARLY = {
    ("bisect", "missing.onnx"): (2, "missing.onnx"),
    ("bisect", "centerpoint:tini"): (2, "did you mean centerpoint:tiny?"),
    ("bisect", "missing.py:net"): (2, "no such file missing.py"),
    ("bisect", "no_such_module:net"): (2, "there is no module 'no_such_module' here"),
    ("bisect", "NET", "-b", "ort,foo"): (2, "no such backend"),
    ("bisect", "NET", "-b", "ort,trt-fp16"): (3, "there is no TensorRT in this Python"),
    ("bisect", "NET", "-b", "ort,ort-all", "--workspace", "9"): (2, "--workspace"),
    ("bisect", "NET", "-b", "ort,ort-all", "--checkpoint", "missing.pt"): (2, "missing.pt"),
    ("capture", "NET", "-b", "trt-fp16", "-o", "out"): (3, "there is no TensorRT in this Python"),
    ("eval", "centerpoint:tiny", "-b", "torch,trt-fp16"): (3, "there is no TensorRT in this Python"),
    ("search", "NET", "-b", "ort,trt-fp16"): (3, "there is no TensorRT in this Python"),
    ("build", "centerpoint:tiny", "-o", "out"): (3, "there is no TensorRT in this Python"),
    ("build", "centerpoint:tini", "-o", "out"): (2, "did you mean centerpoint:tiny?"),
    ("export", "missing.py:net", "-o", "out"): (2, "no such file missing.py"),
    ("verify", "centerpoint:tini"): (2, "did you mean centerpoint:tiny?"),
    ("bench", "centerpoint:tini"): (2, "did you mean centerpoint:tiny?"),
    ("check", "missing.onnx"): (2, "missing.onnx"),
    ("predict", "missing.onnx", "--precision", "fp16"): (2, "missing.onnx"),
    ("predict", "NET", "--target", "trt-7"): (2, "known are trt-8.6, trt-10, trt-11"),
    ("predict", "NET", "--precision", "bf16"): (2, "trt-8.6 does not compute in bf16"),
    ("search", "NET", "--budget", "soon"): (2, "--budget: 'soon'; expected a time"),
    ("quantize", "sensitivity", "NET", "--auto", "0"): (2, "--auto is 0; expected a positive budget"),
    ("compare", "missing-a", "missing-b"): (2, "missing-a: no such folder"),
    ("report", "missing.json"): (2, "missing.json: no such file"),
    ("bundle", "missing"): (2, "no such file"),
    ("deploy", "missing.yaml"): (2, "missing.yaml: no such configuration"),
    ("sweep", "bisect", "missing.onnx"): (2, "missing.onnx: no such ONNX file"),
    ("sweep", "eval", "centerpoint:tini"): (2, "did you mean centerpoint:tiny?"),
    ("sweep", "search", "missing.onnx"): (2, "missing.onnx: no such ONNX file"),
    ("sweep", "sensitivity", "centerpoint:tini"): (2, "did you mean centerpoint:tiny?"),
    ("quantize", "ptq", "missing.onnx", "-o", "out"): (2, "missing.onnx: no such ONNX file"),
    ("import", "missing.npz", "--model", "NET", "-o", "out"): (2, "missing.npz: no such file of tensors"),
}
"""Command line → exit code, and what is said. A wrong word must not cost the seconds in which torch is imported."""


@pytest.mark.parametrize("command", EARLY, ids=" ".join)
def test_a_wrong_name_is_told_before_torch_is_imported(
    tmp_path: Path, net: Path, monkeypatch: pytest.MonkeyPatch, command: tuple[str, ...]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("CPDEBUG_TRT_PYTHON", raising=False)
    for heavy in ("torch", "pandas"):
        monkeypatch.setitem(sys.modules, heavy, None)  # importing it raises
    expected, said = EARLY[command]
    code, text = run(*(str(net) if part == "NET" else part for part in command))
    assert (code, said in text) == (expected, True), text
    assert not list(tmp_path.iterdir())


def test_a_network_is_judged_without_large_libraries(net: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for heavy in ("scipy", "pandas"):
        monkeypatch.setitem(sys.modules, heavy, None)
    code, text = run("bisect", net, "-b", "ort,ort-all")
    assert code == 0, text


DOES_NOTHING = [
    ("bisect NET -b torch,ort --test-tensors D", "--backends: 'torch,ort'; with --test-tensors as the test, expecte"),
    ("check NET --no-activations --shape image=1x3x32x32", "--shape: it would do nothing here: --no-activations"),
    ("check NET --no-activations --image mean=0", "--image: it would do nothing here: --no-activations"),
    ("check FIXED --shape x=1x4", "--shape: it would do nothing here: FIXED takes x: float32[1, 4] and no other size"),
    ("bisect FIXED -b ort,ort-all --shape x=1x4", "--shape: it would do nothing here: FIXED takes x"),
    ("verify NETS -b torch,ort --seed 3 --samples 1", "--seed: it would do nothing here: the first sample is"),
    ("verify FIXED -b ort,ort-all --inputs D --seed 3", "--seed: it would do nothing here: the inputs are those of D"),
]


@pytest.mark.parametrize(("words", "says"), DOES_NOTHING, ids=lambda text: text.split(":")[0])
def test_what_would_do_nothing_is_refused(net: Path, tmp_path: Path, words: str, says: str) -> None:
    b = NetBuilder()
    b.save(tmp_path / "fixed.onnx", {"x": (1, [1, 4])}, [b.op("Relu", "x")])
    np.savez(tmp_path / "d.npz", x=np.ones((1, 4), np.float32))
    (tmp_path / "n.py").write_text("import torch\ndef make(): return torch.nn.ReLU(), (torch.ones(1, 4),)\n")
    places = {"NET": net, "FIXED": tmp_path / "fixed.onnx", "D": tmp_path / "d.npz", "NETS": f"{tmp_path}/n.py:make"}
    code, text = run(*(places.get(word, word) for word in words.split()))
    for word, place in places.items():
        says = re.sub(rf"\b{word}\b", str(place).replace("\\", "/"), says)
    assert (code, text[: len(says)]) == (2, says)


def test_a_size_of_a_free_axis_is_one_beside_a_fixed_input(tmp_path: Path) -> None:
    b = NetBuilder()
    path = b.save(tmp_path / "two.onnx", {"x": (1, [1, 4]), "y": (1, ["n", 4])}, [b.op("Add", "x", "y")])
    sizes = ("--shape", "x=1x4", "--shape", "y=3x4")
    assert run("bisect", path, "-b", "ort,ort-all", *sizes)[0] == 0


def test_a_reference_beside_tensors_is_the_one_that_was_asked_for(tmp_path: Path) -> None:
    b = NetBuilder()
    path = b.save(tmp_path / "one.onnx", {"x": (1, [1, 4])}, [b.op("Relu", "x", name="y")])
    x = np.ones((1, 4), np.float32)
    values = {"x": x, Graph(path).outputs[0].name: x}
    with pytest.raises(
        InputError, match=r"backends: 'torch,ort'; with tensors as the test, expected only the reference"
    ):
        cp_debug.diagnose(path, "torch,ort", test_tensors=values)
    result = cp_debug.diagnose(path, test_tensors=values)
    assert (result.reference.spec, result.agrees) == ("ort", True)
