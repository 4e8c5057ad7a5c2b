"""Scales inside files of FP8 and 4 bits, judged by their own codes: sound files accuse nobody, wrong ones are named."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from nets import NetBuilder
from onnx import numpy_helper

import cp_debug
from cp_debug.backends.executor import Executor
from cp_debug.backends.narrow_options import NarrowOptions
from cp_debug.bisect.result import TestResult
from cp_debug.graph.graph import Graph
from cp_debug.graph.made_up import MadeUp
from cp_debug.graph.narrow_qdq import insert_narrow_qdq
from cp_debug.quantization.narrow_layers import narrow_layers, weighted_layers
from cp_debug.quantization.onnx_ptq import DataRanges

pytest.importorskip("onnxruntime")
pytestmark = pytest.mark.slow


def parent(folder: Path) -> Path:
    """Four products with biases and activations between them."""
    net = NetBuilder(5)
    x = "x"
    for i, size in enumerate((96, 160, 96, 32)):
        before = (64, 96, 160, 96)[i]
        w = (net.rng.standard_normal((before, size)) / before**0.5).astype(np.float32)
        x = net.op("MatMul", x, net.weight(w * np.exp(net.rng.normal(0, 0.3, (1, size))).astype(np.float32)))
        x = net.op("Add", x, net.weight((net.rng.standard_normal(size) * 0.1).astype(np.float32)))
        x = net.op("Relu", x) if i < 3 else x
    return net.save(folder / "net.onnx", {"x": (1, [6, 64])}, [x])


def quantized(file: Path, precision: str) -> tuple[Path, list[str]]:
    """The file in a precision, calibrated on three samples, one of them the one that is bisected; its layers."""
    graph, options = Graph(file), NarrowOptions.parse(precision)
    ranges = DataRanges(graph, list(weighted_layers(graph, options)))
    for seed in range(3):
        sample = MadeUp(graph).sample([seed, 0])
        for name, array in sample.items():
            ranges.see(name, array)
        Executor(graph).run(sample, ranges.see, ranges.watched)
    layers = narrow_layers(graph, options, ranges.amax("max"))
    return insert_narrow_qdq(graph, layers.layers, file.with_name("narrow.onnx"), precision), list(layers.layers)


def with_scale(file: Path, layer: str, slot: int, change: Callable[[np.ndarray], np.ndarray]) -> tuple[Path, str]:
    """The file with another scale of one layer's data (slot 0) or weight (slot 1), and the layer's value."""
    model = onnx.load(file)
    node = next(n for n in model.graph.node if n.name == layer)
    producer = {name: n for n in model.graph.node for name in n.output}
    scale = producer[node.input[slot]].input[1]
    tensor = next(t for t in model.graph.initializer if t.name == scale)
    tensor.CopyFrom(numpy_helper.from_array(change(numpy_helper.to_array(tensor)).astype(np.float32), scale))
    target = file.with_name("wrong.onnx")
    onnx.save(model, target)
    return target, node.output[0]


def compared(file: Path, test: Path) -> TestResult:
    return cp_debug.diagnose(str(file), "ort,ort", test_model=str(test), progress=False).tests[0]


@pytest.mark.parametrize("precision", ["fp8", "fp8:e5m2", "fp8:channel", "mxfp8", "int4:g32", "int4:g32:sym"])
def test_sound_files_accuse_nobody(tmp_path: Path, precision: str) -> None:
    file = parent(tmp_path)
    test = compared(file, quantized(file, precision)[0])
    assert not test.findings
    assert not any(row.verdict == "guilty" for row in test.rows)


@pytest.mark.parametrize(
    ("precision", "slot", "change", "cause"),
    [
        ("fp8", 0, lambda s: s / 16, "scale-stale"),
        ("fp8", 0, np.ones_like, None),
        ("fp8", 1, lambda s: s * 3, "fp8-weights"),
        ("fp8:channel", 1, lambda s: s * 1.04, "fp8-weights"),
        ("fp8:e5m2", 0, lambda s: s / 30, "scale-stale"),
        ("fp8:channel", 1, lambda s: np.roll(s, 1), "fp8-weights"),
        ("mxfp8", 1, lambda s: s / 2, "fp8-weights"),
        ("int4:g32", 1, lambda s: np.roll(s, 1, 1), "int4-weights"),
        ("int4:g32:sym", 1, lambda s: np.roll(s, 1, 0), "int4-weights"),
    ],
)
def test_a_wrong_scale_is_named(
    tmp_path: Path, precision: str, slot: int, change: Callable[[np.ndarray], np.ndarray], cause: str | None
) -> None:
    file = parent(tmp_path)
    narrow, layers = quantized(file, precision)
    wrong, value = with_scale(narrow, layers[2], slot, change)
    test = compared(file, wrong)
    rows = {row.name: row.onnx for row in test.rows}
    said = [(finding.cause, rows[name]) for finding in test.findings for name in finding.layers]
    # A scale of 1 for numbers near 1 costs E4M3 nothing: its steps are relative.
    assert said == ([] if cause is None else [(cause, value)])
