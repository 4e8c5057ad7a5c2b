"""What a user meets first: files under other names, the stage of the guilty layer, figures that read well, silence."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from nets import second_like
from onnx import numpy_helper
from test_cli import run

from cp_debug.reports.numbers import share_in_words


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``net.onnx``, the same as ``other.onnx``, and ``worse.onnx`` with a weight that is 20 % too large."""
    made = tmp_path_factory.mktemp("files")
    second_like(made / "net.onnx", depth=1, size=16)
    shutil.copyfile(made / "net.onnx", made / "other.onnx")
    model = onnx.load(made / "net.onnx")
    weight = max(model.graph.initializer, key=lambda tensor: len(tensor.raw_data))
    weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight) * np.float32(1.2), weight.name))
    onnx.save(model, made / "worse.onnx")
    return made


def test_captures_of_files_with_other_names_are_compared(folder: Path) -> None:
    for name in ("net", "other"):
        assert run("capture", folder / f"{name}.onnx", "-b", "ort", "-o", folder / f"of-{name}")[0] == 0
    code, text = run("compare", folder / "of-net", folder / "of-other")
    assert code == 0, text
    assert "2 of 2 outputs" in text


def test_a_capture_in_int8_is_calibrated_as_a_bisect_is(folder: Path, tmp_path: Path) -> None:
    net, calibration = folder / "net.onnx", ("--calib-samples", 2, "--calib-method", "max")
    assert run("bisect", net, "-b", "ort,emu-int8", *calibration, "--no-replay", "--json", tmp_path / "b.json")[0] == 0
    code, text = run("capture", net, "-b", "emu-int8", "-o", tmp_path / "int8", *calibration)
    assert code == 0, text
    assert "note: quantized on the fly: max on 2 samples" in text
    assert run("capture", net, "-b", "ort", "-o", tmp_path / "fp32")[0] == 0
    assert run("compare", tmp_path / "fp32", tmp_path / "int8", "--json", tmp_path / "c.json")[0] == 0
    ours, theirs = (json.loads((tmp_path / f"{name}.json").read_text())["outputs"] for name in "bc")
    assert [row["rel_l2"] for row in ours] == [row["rel_l2"] for row in theirs]
    assert ours[0]["rel_l2"] > 0
    code, text = run("capture", net, "-b", "ort", "-o", tmp_path / "other", "--calib-samples", 2)
    assert (code, "none of ort runs in INT8" in text) == (2, True)


def test_the_stage_that_holds_the_guilty_layer_is_guilty(folder: Path) -> None:
    code, text = run(
        *("bisect", folder / "net.onnx", "-b", "ort,ort", "--test-model", folder / "worse.onnx", "--json", "-")
    )
    assert code == 1
    test = json.loads(text[text.index("{") :])["tests"][0]
    assert test["guilty"]
    holding = [stage for stage in test["stages"] if set(stage["guilty"]) & set(test["guilty"])]
    assert holding
    assert all(stage["verdict"] == "guilty" for stage in holding)


@pytest.mark.parametrize(
    ("share", "says"),
    [
        (-59.78, "without it the final divergence would be 59.8 times larger"),
        (-0.5, "without it the final divergence would be 50% larger"),
        (0.62, "62% of the final divergence"),
        (1.07, "107% of the final divergence: other errors cancel the rest"),
        (12.0, "12 times the final divergence: other errors cancel the rest"),
    ],
)
def test_effects_that_cancel_are_told_in_words(share: float, says: str) -> None:
    assert share_in_words(share).startswith(says)


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_onnx_runtime_is_silent_where_it_refuses_a_file(folder: Path) -> None:
    """What it refuses is told by the command, once; nothing of the runtime's own log, nor of its colours."""
    model = onnx.load(folder / "net.onnx")
    node = next(node for node in model.graph.node if node.op_type == "Conv")
    del node.attribute[:]
    node.attribute.append(onnx.helper.make_attribute("strides", [0, 0]))
    onnx.save(model, folder / "refused.onnx")
    done = subprocess.run(
        [sys.executable, "-m", "cp_debug", "bisect", "refused.onnx", "-b", "ort,ort-all"],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "\x1b" not in done.stdout + done.stderr
    assert "[E:onnxruntime" not in done.stderr
    assert "[W:onnxruntime" not in done.stderr


def test_two_models_are_verified_on_one_backend(tmp_path: Path) -> None:
    one, other = second_like(tmp_path / "one.onnx", depth=1, size=16), tmp_path / "other.onnx"
    model = onnx.load(str(one))
    weight = next(t for t in model.graph.initializer if len(t.dims) == 4)
    weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight) * np.float32(1.05), weight.name))
    onnx.save(model, str(other))
    command = ("verify", one, "-s", "ort", "--samples", "1", "--test-model")
    assert run(*command, one)[0] == 0
    code, text = run(*command, other)
    assert code == 1
    assert f"ort ({other.name})" in text
    assert "guilty" in text
    code, text = run("verify", one, "-s", "ort,ort", "--samples", "1")
    assert (code, "names a backend twice" in text) == (2, True)


def test_no_weight_in_common_is_said_so() -> None:
    from cp_debug.programs.weight_differences import WeightDifferences

    assert "all 0" not in WeightDifferences(0, missing=["w"]).says
    assert WeightDifferences(0, missing=["w"]).says == "no tensors of the two were paired; 1 only in the reference"


@pytest.fixture(scope="module")
def net(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return second_like(tmp_path_factory.mktemp("door") / "net.onnx", depth=1, size=16)


def test_what_a_repeatable_option_names_twice_is_refused(net: Path) -> None:
    verify = ("verify", net, "-s", "ort,emu-fp16", "--samples", "1")
    for command in (
        (*verify, "--tolerance", "fp16=1", "--tolerance", "fp16=2"),
        ("check", net, "--shape", "x=1x3x16x16", "--shape", "x=1x3x8x8"),
        ("bisect", net, "-b", "ort,ort-all", "--shape", "x=1x3x16x16", "--shape", "x=1x3x16x16"),
    ):
        code, text = run(*command)
        assert (code, "is given twice" in text) == (2, True), text


def test_a_tolerance_of_a_precision_that_nothing_has_is_refused(net: Path) -> None:
    for name in ("bf16", "fp32"):
        code, text = run("verify", net, "-s", "ort,emu-fp16", "--samples", "1", "--tolerance", f"{name}=1")
        assert code == 2
        assert f"--tolerance: {name} would do nothing here: the scenarios are judged as fp16" in text
    assert run("verify", net, "-s", "ort,emu-fp16", "--samples", "1", "--tolerance", "fp16=1")[0] == 0


def test_a_model_without_a_layer_in_int8_is_none_in_int8(net: Path, tmp_path: Path) -> None:
    code, text = run("quantize", "ptq", net, "-o", tmp_path / "out", "--batches", "1", "--skip-layers", "*")
    assert (code, "--skip-layers: *: that leaves no layer to quantize" in text) == (2, True)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_file_is_named_like_a_command_of_a_workflow(
    net: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lines of a log that begin so are run by GitHub."""
    monkeypatch.chdir(tmp_path)
    shutil.copyfile(net, "::error::x.onnx")
    done = subprocess.run(
        [sys.executable, "-m", "cp_debug", "bisect", "./::error::x.onnx", "-b", "ort,ort-all"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0
    assert not [line for line in (done.stdout + done.stderr).splitlines() if line.lstrip().startswith("::")]
    assert "\\x3a:error::x.onnx" in done.stdout


@pytest.mark.process
def test_a_file_that_ends_torch_is_told(tmp_path: Path) -> None:
    torch.jit.save(torch.jit.script(torch.nn.ReLU()), str(tmp_path / "x.pt"))
    program = """if True:
        import os, signal, torch
        from cp_debug.cli.guard import guarded
        from cp_debug.recipes.torch_programs import load_program
        from pathlib import Path
        torch.jit.load = lambda *_, **__: os.kill(os.getpid(), signal.SIGSEGV)
        guarded(lambda: load_program(Path("x.pt")))
    """
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2
    said = "error: a library ended the process (SIGSEGV) while torch read x.pt: nothing was decided"
    assert said in " ".join(done.stderr.split())
