"""The command line as a user meets it: exit codes, clean pipes, errors that name the file and the field."""

from __future__ import annotations

import csv
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from nets import NetBuilder, second_like
from rich.text import Text
from typer.main import get_command
from typer.testing import CliRunner

from cp_debug.cli import console
from cp_debug.cli.main import app, main
from cp_debug.errors import CpdebugError


@pytest.fixture(scope="module")
def net(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return second_like(tmp_path_factory.mktemp("net") / "net.onnx")


def run(*args: object) -> tuple[int, str]:
    """Exit code and everything printed; expected errors become their exit code and message, as in ``main``."""
    done = CliRunner().invoke(app, [str(a) for a in args])
    if isinstance(done.exception, CpdebugError):
        return done.exception.exit_code, str(done.exception)
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done.exit_code, done.output


def without_steps(text: str) -> list[str]:
    """The lines of an output but for those that a slow machine gets, of steps that took 10 s."""
    return [line for line in text.splitlines() if not re.match(r"\d+ s: ", line)]


def test_text_to_be_copied_is_not_broken_into_lines(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(console.console, "width", 20)
    command, sentence = Text("trtexec --onnx=net.onnx --fp16", no_wrap=True), Text("more than twenty letters")
    console.show_document([command, sentence], {}, None)
    lines = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    assert lines == [command.plain, "more than twenty", "letters"]


def test_a_value_that_is_no_choice_is_told_beside_the_choices(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(Exception, match="foo") as refused:
        get_command(app).main(["bisect", "x.onnx", "--oracle", "foo"], standalone_mode=False)
    console.show_usage(refused.value)
    says = " ".join(capsys.readouterr().err.split())
    assert says.startswith("error: Invalid value for '--oracle': 'foo' is not one of 'auto', 'fp32', 'fp64'.")


def test_agreement_is_exit_0_and_tables_go_to_stdout(net: Path) -> None:
    code, text = run("bisect", net, "--backends", "ort,ort-all")
    assert code == 0
    assert "✓ ort-all: agrees" in text
    assert "observer" not in text


def test_the_verdict_stands_above_the_tables_and_alone_where_quiet(net: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console.console, "width", 300)
    code, text = run("bisect", net, "--backends", "ort,emu-bf16,emu-fp16", "--all")
    heads = text.splitlines()[1:3]
    assert [line.split("; final outputs differ by ")[0] for line in heads] == [
        "✓ emu-bf16: agrees",
        "✓ emu-fp16: agrees",
    ]
    quiet = run("bisect", net, "--backends", "ort,emu-bf16,emu-fp16", "-q")
    assert quiet[0] == code == 0
    assert run("-q", "bisect", net, "--backends", "ort,emu-bf16,emu-fp16") == quiet
    assert run("-q", "models")[0] == 2
    lines = quiet[1].splitlines()
    assert [line.partition(" within")[0] for line in lines] == ["✓ emu-bf16: agrees", "✓ emu-fp16: agrees"]


@pytest.mark.slow
def test_quiet_still_says_that_a_module_in_train_mode_ran_in_eval_mode(tmp_path: Path) -> None:
    lines = ("from torch import nn, ones", "net, x = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)), ones(2, 4)")
    (tmp_path / "own.py").write_text("\n".join(lines) + "\ndef make(): return net, (x,)\n")
    code, text = run("bisect", f"{tmp_path / 'own.py'}:make", "-b", "torch,ort,ort-all", "-q")
    assert code == 0
    assert text.count("note: the module was passed in train mode and runs in eval mode") == 1
    assert [line[:5] for line in without_steps(text)] == ["note:", "✓ ort", "✓ ort"]


def test_quiet_writes_one_line_for_each_test_into_a_pipe_however_long(net: Path, tmp_path: Path) -> None:
    from test_bisect import convolutions, scale_weight

    scale_weight(net, tmp_path / "t.onnx", convolutions(net)[2], 1.05)
    model = onnx.load(tmp_path / "t.onnx")
    for node in model.graph.node:
        node.name = f"{'a long name ' * 20}{node.name}"
    onnx.save(model, tmp_path / "t.onnx")
    code, text = run("bisect", tmp_path / "t.onnx", "-b", "ort,ort-none@cpu", "--test-model", net, "-q")
    assert code == 1
    (line,) = without_steps(text)
    assert len(line) > 240


def test_divergence_is_exit_1_and_the_layer_is_named(net: Path, tmp_path: Path) -> None:
    from test_bisect import convolutions, scale_weight

    scale_weight(net, tmp_path / "t.onnx", convolutions(net)[2], 1.05)
    code, text = run("bisect", net, "-b", "ort,ort-none@cpu", "--test-model", tmp_path / "t.onnx")
    assert code == 1
    name = next(n.name for n in onnx.load(net).graph.node if convolutions(net)[2] in n.output)
    assert f"guilty: {name}" in text


def test_json_on_stdout_is_nothing_but_json(net: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "cp_debug", "bisect", str(net), "-b", "ort,ort-basic", "--json", "-"]
    command += ["--csv", str(tmp_path / "layers.csv")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    rows = list(csv.DictReader((tmp_path / "layers.csv").open()))
    assert [r["name"] for r in rows] == [layer["name"] for layer in found["layers"]]
    assert {r["backend"] for r in rows} == {"ort-basic"}


def test_saved_captures_compare_like_the_run_itself(net: Path, tmp_path: Path) -> None:
    code, _ = run("bisect", net, "-b", "ort,emu-fp16", "--save", tmp_path / "kept", "--json", tmp_path / "r.json")
    assert code == 0
    sample = tmp_path / "kept" / "sample-0"
    code, _ = run("compare", sample / "ort", sample / "emu-fp16", "--json", tmp_path / "c.json")
    assert code == 0
    ours, theirs = (json.loads((tmp_path / f).read_text())["layers"] for f in ("r.json", "c.json"))
    assert {r["onnx"]: r["max_abs"] for r in ours} == {r["onnx"]: r["max_abs"] for r in theirs}


def test_captures_of_other_inputs_are_refused_unless_forced(net: Path, tmp_path: Path) -> None:
    for seed in (0, 1):
        assert run("capture", net, "-b", "ort", "-o", tmp_path / f"c{seed}", "--seed", seed)[0] == 0
    code, text = run("compare", tmp_path / "c0", tmp_path / "c1")
    assert code == 2
    assert "input x differs" in text
    assert "--force" in text
    assert run("compare", tmp_path / "c0", tmp_path / "c1", "--force")[0] == 1
    assert run("compare", tmp_path / "c0", tmp_path / "c0")[0] == 0


def test_a_capture_that_lacks_a_field_of_its_control_flow_is_refused(net: Path, tmp_path: Path) -> None:
    assert run("capture", net, "-b", "ort", "-o", tmp_path / "c")[0] == 0
    manifest = json.loads((tmp_path / "c" / "manifest.json").read_text())
    manifest["control_flow"] = {"net": [{"op": "If"}]}
    (tmp_path / "c" / "manifest.json").write_text(json.dumps(manifest))
    code, text = run("compare", tmp_path / "c", tmp_path / "c")
    assert code == 2
    assert "the manifest's control_flow: net.0.path is missing" in text


def test_a_capture_folder_in_use_is_refused(net: Path, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "file").write_text("x")
    code, text = run("capture", net, "-b", "ort", "-o", tmp_path / "there")
    assert code == 2
    assert str(tmp_path / "there") in text


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda f: f / "none.onnx", ["none.onnx", "no such"]),
        (lambda f: _write(f / "cut.onnx", b"\x08\x07\x12\x04onnx"), ["cut.onnx", "complete"]),
        (lambda f: _external(f), ["ext.onnx", "ext.data", "missing"]),
    ],
)
def test_unusable_onnx_files(tmp_path: Path, make, words: list[str]) -> None:  # type: ignore[no-untyped-def]
    code, text = run("bisect", make(tmp_path), "-b", "ort,ort-all")
    assert code == 2
    assert all(word in text for word in words), text


def _write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def _external(folder: Path) -> Path:
    path = second_like(folder / "ext.onnx")
    onnx.save(
        onnx.load(path), path, save_as_external_data=True, all_tensors_to_one_file=True, location="ext.data",
        size_threshold=0,
    )  # fmt: skip
    (folder / "ext.data").unlink()
    return path


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"z": np.zeros((1, 16, 32, 32), np.float32)}, ["'z'", "x: float32"]),
        ({"x": np.zeros((1, 16, 32, 31), np.float32)}, ["'x'", "[1, 16, 32, 31]"]),
        ({"x": np.zeros((1, 16, 32, 32), np.float64)}, ["'x'", "float64"]),
    ],
)
def test_inputs_that_do_not_fit(net: Path, tmp_path: Path, arrays: dict[str, np.ndarray], words: list[str]) -> None:
    np.savez(tmp_path / "in.npz", **arrays)
    code, text = run("bisect", net, "-b", "ort,ort-all", "--inputs", tmp_path / "in.npz")
    assert code == 2
    assert all(word in text for word in ["in.npz", *words]), text


def test_a_point_file_of_odd_size_is_refused(tmp_path: Path) -> None:
    (tmp_path / "cloud.pcd.bin").write_bytes(b"\0" * 42)
    code, text = run("bisect", "-b", "torch,ort", "--inputs", tmp_path / "cloud.pcd.bin")
    assert code == 2
    assert "cloud.pcd.bin" in text


def test_a_checkpoint_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    import torch

    torch.save({"nothing.weight": torch.zeros(1)}, tmp_path / "c.pt")
    code, text = run("bisect", "-b", "torch,ort", "--checkpoint", tmp_path / "c.pt")
    assert code == 2
    assert "c.pt" in text
    assert "missing keys" in text
    assert "more" in text


MODULE = """
import torch
class Broken(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.Linear(4, 5))
    def forward(self, x):
        return self.inner(x)
def build():
    return Broken(), (torch.zeros(2, 4),)
def fine():
    return torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Sigmoid()), {"input": torch.ones(2, 4)}
def wrong():
    return 3
"""


def test_torch_callables_in_a_file(tmp_path: Path) -> None:
    file = tmp_path / "nets_of_mine.py"
    file.write_text(MODULE)
    code, text = run("bisect", f"{file}:fine", "-b", "torch,ort")
    assert code == 0, text
    code, text = run("bisect", f"{file}:build", "-b", "torch,ort")
    assert code == 2
    assert "inner.1" in text
    code, text = run("bisect", f"{file}:wrong", "-b", "torch,ort")
    assert code == 2
    assert "(module, example_inputs)" in text
    code, text = run("bisect", f"{file}:absent", "-b", "torch,ort")
    assert code == 2
    assert "absent" in text


def test_unavailable_backends_are_exit_3(net: Path) -> None:
    code, text = run("bisect", net, "-b", "ort,torch@cuda")
    assert code == 3
    assert "torch@cpu" in text


def test_a_backend_that_nobody_knows_is_bad_usage(net: Path, tmp_path: Path) -> None:
    for command in (("bisect", net, "-b", "ort,emu-fp61"), ("capture", net, "-b", "emu-fp61", "-o", tmp_path / "c")):
        code, text = run(*command)
        flag = "--backend" if command[0] == "capture" else "--backends"
        assert (code, f"{flag}: no such backend 'emu-fp61'; did you mean emu-fp16?" in text) == (2, True)


def test_an_output_that_cannot_be_written_leaves_nothing(net: Path, tmp_path: Path) -> None:
    code, text = run("bisect", net, "-b", "ort,ort-all", "--json", tmp_path / "no" / "r.json")
    assert code == 2
    assert "r.json" in text
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a folder in which nobody makes another")
def test_a_folder_that_cannot_be_made_is_told_by_its_flag_and_name(net: Path) -> None:
    code, text = run("bisect", net, "-b", "ort,ort-all", "--save", "/proc/kept")
    assert (code, text) == (2, "--save: /proc/kept: cannot be written (no such file or directory)")


@pytest.mark.parametrize("flag", ["--html", "--save"])
def test_a_dash_is_no_name_of_a_file(net: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flag: str) -> None:
    monkeypatch.chdir(tmp_path)
    code, text = run("bisect", net, "-b", "ort,ort-all", flag, "-")
    assert code == 2
    assert "expected the name of a" in text
    assert not list(tmp_path.iterdir())


def test_interrupting_leaves_no_half_capture(net: Path, tmp_path: Path) -> None:
    code = (
        "import os, signal, sys; from cp_debug.probes import capture; put = capture.CaptureWriter.put\n"
        "def stop(*a, **k):\n"
        "    put(*a, **k); os.kill(os.getpid(), signal.SIGINT)\n"
        "capture.CaptureWriter.put = stop\n"
        f"sys.argv = ['cpdebug', 'capture', {str(net)!r}, '-b', 'ort', '-o', {str(tmp_path / 'c')!r}]\n"
        "from cp_debug.cli.main import main; main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 130, done.stderr
    assert not (tmp_path / "c").exists()
    assert not any(tmp_path.iterdir())


def test_models_and_doctor() -> None:
    code, text = run("models")
    assert code == 0
    assert "centerpoint:nus-pillar02" in text
    code, text = run("doctor", "--json")
    assert code == 0
    found = json.loads(text)
    names = {s["name"]: s for s in found["settings"]}
    assert names["torch backends.cudnn.conv.fp32_precision"]["in_a_run"] == "ieee"
    assert any(p["name"] == "onnxruntime" and p["version"] for p in found["packages"])


def test_unoptimizable_ops_are_named(tmp_path: Path) -> None:
    builder = NetBuilder()
    builder.op("Relu", "x", name="y")
    path = builder.save(tmp_path / "n.onnx", {"x": (1, [2, 2])}, ["y"])
    model = onnx.load(path)
    model.graph.node[0].domain = "acme"
    model.opset_import.append(onnx.helper.make_opsetid("acme", 1))
    onnx.save(model, path)
    code, text = run("bisect", path, "-b", "torch,emu-fp16")
    assert code == 2
    assert "acme.Relu" in text


@pytest.mark.parametrize(("own", "expected"), [(None, "PASSIVE"), ("ACTIVE", "ACTIVE")])
def test_waiting_threads_sleep_unless_told_otherwise(monkeypatch: pytest.MonkeyPatch, own, expected) -> None:
    monkeypatch.setattr(sys, "argv", ["cpdebug", "--help"])
    monkeypatch.setenv("OMP_WAIT_POLICY", own or "")
    if own is None:
        monkeypatch.delenv("OMP_WAIT_POLICY")
    with pytest.raises(SystemExit):
        main()
    assert os.environ["OMP_WAIT_POLICY"] == expected
