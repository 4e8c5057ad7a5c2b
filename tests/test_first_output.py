"""What a newcomer reads first: a healthy run is told in a few lines, and what means most stands in front."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from nets import NetBuilder, second_like
from onnx import numpy_helper
from test_api_in_terminal import in_a_terminal
from test_cli import run
from torch import nn

from cp_debug.bisect.engine import Options, bisect
from cp_debug.cli import console
from cp_debug.programs.weight_differences import WeightDifferences

TABLES = ("stage", "introduced", "rel. L2 ", "settings")
"""Heads of columns of the tables."""


@pytest.fixture(scope="module")
def net(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return second_like(tmp_path_factory.mktemp("net") / "net.onnx", depth=1, size=16)


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """A terminal of 80 columns."""
    monkeypatch.setattr(console.console, "width", 80)


@pytest.mark.process
def test_a_healthy_run_is_told_in_a_few_lines(net: Path) -> None:
    command = [sys.executable, "-m", "cp_debug", "bisect", "net.onnx", "-b", "ort,ort-all,emu-fp16"]
    code, written = in_a_terminal(command, net.parent)
    plain = re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", written)  # without colors
    text = plain[plain.rindex("net.onnx ·") :]  # behind what the progress has drawn
    assert code == 0
    assert text.count("\n") <= 14
    assert all(len(line.rstrip("\r")) <= 80 for line in text.split("\n"))
    assert not [head for head in TABLES if head in text]
    assert "ort (fp32) against ort-all (fp32), emu-fp16 (fp16, emulated)" in text
    for spec in ("ort-all", "emu-fp16"):
        assert f"✓ {spec}: agrees" in text
    assert text.count("largest excess") == 2


@pytest.mark.usefixtures("narrow")
def test_tables_are_there_where_they_are_asked_for_and_where_something_is_wrong(net: Path, tmp_path: Path) -> None:
    assert "introduced" in run("bisect", net, "-b", "ort,ort-all", "--all")[1]
    assert "stage" in run("bisect", net, "-b", "ort,ort-all", "--level", "stages")[1]
    model = onnx.load(net)
    weight = next(t for t in model.graph.initializer if len(t.dims) == 4)
    weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight) * np.float32(1.05), weight.name))
    onnx.save(model, tmp_path / "worse.onnx")
    code, text = run("bisect", net, tmp_path / "worse.onnx")
    assert code == 1
    assert all(head in text for head in TABLES)
    assert text.index("✗ ort (worse.onnx): guilty") < text.index("settings") < text.rindex("✗ ort (worse.onnx): guilty")


@pytest.mark.usefixtures("narrow")
def test_the_precision_is_that_of_the_file(tmp_path: Path) -> None:
    b = NetBuilder()
    scale, zero = b.weight(np.array(0.02, np.float32)), b.weight(np.array(0, np.int8))
    x = b.op("DequantizeLinear", b.op("QuantizeLinear", "x", scale, zero), scale, zero)
    b.save(tmp_path / "q.onnx", {"x": (1, [1, 8])}, [b.op("Relu", x)])
    code, text = run("bisect", tmp_path / "q.onnx", "-b", "ort,emu-int8")
    assert code == 0, text
    assert "ort (int8) against emu-int8 (int8, emulated)" in text


@pytest.mark.usefixtures("narrow")
def test_folded_batchnorm_is_told_instead_of_the_tensors_that_differ(tmp_path: Path) -> None:
    torch.manual_seed(0)
    layers = [layer for _ in range(3) for layer in (nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())]
    module = nn.Sequential(*layers)
    for layer in module:
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_var, layer.running_mean = torch.rand(4) + 0.5, torch.randn(4)
    for name, mode in (("apart", torch.onnx.TrainingMode.PRESERVE), ("folded", torch.onnx.TrainingMode.EVAL)):
        options = {"dynamo": False, "training": mode, "do_constant_folding": name == "folded"}
        torch.onnx.export(module.eval(), (torch.randn(1, 4, 8, 8),), tmp_path / f"{name}.onnx", **options)
    code, text = run("bisect", tmp_path / "apart.onnx", tmp_path / "folded.onnx")
    assert code == 0, text
    [line] = [line for line in text.splitlines() if line.startswith("weights:")]
    assert line.startswith("weights: BatchNorm is folded in the test only; 6 of 6 tensors differ")
    assert "×" not in line


def test_weights_that_differ_for_no_common_reason_are_described() -> None:
    said = WeightDifferences(3, note="only the test is quantized").says
    assert said == "only the test is quantized; all 3 tensors that were paired are equal"


@pytest.mark.usefixtures("narrow")
def test_a_note_of_two_tests_is_told_once(tmp_path: Path) -> None:
    b = NetBuilder()
    b.save(tmp_path / "log.onnx", {"x": (1, [1, 8])}, [b.op("Log", "x", name="log")])
    result = bisect(str(tmp_path / "log.onnx"), "ort,ort-all,ort-basic")
    assert [test.notes for test in result.tests] == 2 * [["generated inputs: x: positive, for Log 'node_log'"]]
    assert run("bisect", tmp_path / "log.onnx", "-b", "ort,ort-all,ort-basic")[1].count("generated inputs: ") == 1


def test_what_concerns_the_verdict_stands_before_what_the_inputs_are(tmp_path: Path) -> None:
    """A second result that flips (the first is the finding), then how INT8 was calibrated, then the inputs; an output
    that is left out first of all."""
    b = NetBuilder()
    log = b.op("Log", "x")
    shifted = [b.op("Add", log, b.weight(np.array(by, np.float32))) for by in (2048, 4096)]
    outputs = [b.op("Cast", each, name=name, to=7) for each, name in zip(shifted, ("first", "place"), strict=True)]
    outputs.append(b.op("Relu", "x", name="other"))
    path = b.save(tmp_path / "net.onnx", {"x": (1, [1, 64])}, outputs)
    (test,) = bisect(str(path), "ort,emu-fp16", options=Options(maps=["other="]), test_model=path).tests
    first = [note.split(" (")[0].split(":")[0] for note in test.notes]
    assert first.index("output other left out by --map") < first.index("node_place") < first.index("generated inputs")


def test_a_notebook_shows_tables_and_causes_where_something_is_wrong(net: Path, tmp_path: Path) -> None:
    model = onnx.load(net)
    weight = next(t for t in model.graph.initializer if len(t.dims) == 4)
    weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight) * np.float32(1.05), weight.name))
    onnx.save(model, tmp_path / "worse.onnx")
    healthy, wrong = bisect(str(net), "ort,ort-basic"), bisect(str(net), "ort,ort", test_model=tmp_path / "worse.onnx")
    assert "✓ ort-basic: agrees" in healthy._repr_html_()
    assert "<table>" not in healthy._repr_html_()
    shown = wrong._repr_html_()
    assert "<table>" in shown
    assert "Conv weights are scaled by 1.05</b>" in shown
    assert f"use the same {weight.name} on both sides</p>" in shown
