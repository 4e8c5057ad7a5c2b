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
    code, text = run("compare", folder / "of-net", folder / "of-other", "--force")
    assert code == 0, text
    assert "2 of 2 outputs" in text


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


@pytest.mark.parametrize("share", [-59.78, -0.5, 12.0])
def test_effects_that_cancel_are_told_in_words(share: float) -> None:
    text = share_in_words(share)
    assert "%" not in text
    assert "-" not in text
    assert "−" not in text


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
    assert "ort.test" in text
    assert "guilty" in text
    code, text = run("verify", one, "-s", "ort,ort", "--samples", "1")
    assert (code, "names a backend twice" in text) == (2, True)


def test_no_weight_in_common_is_said_so() -> None:
    from cp_debug.programs.weight_differences import WeightDifferences

    assert "all 0" not in WeightDifferences(0, missing=["w"]).says
    assert (
        WeightDifferences(0, missing=["w"]).says
        == "no tensor of one was paired with one of the other; 1 only in the reference"
    )
