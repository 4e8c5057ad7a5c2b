"""Optimizer bisection: which optimizers make the difference, and which nodes they rewrite."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from nets import NetBuilder, residual, second_like

from cp_debug.backends.base import Program
from cp_debug.backends.ort_backend import OrtBackend
from cp_debug.backends.ort_optimizers import RULE_BASED, active_optimizers
from cp_debug.backends.spec import BackendSpec
from cp_debug.bisect.engine import Options, bisect
from cp_debug.bisect.optimizer_blame import REST, OptimizerBlame, blame_optimizers
from cp_debug.errors import InputError
from cp_debug.graph.graph import Graph
from cp_debug.recipes.onnx_file import OnnxFileModel


def knobs_of(path: Path, spec: str, *, floor: float = 0.0) -> OptimizerBlame:
    model = OnnxFileModel(path)
    program = Program(model.components[0].name, Graph(path))
    backend = OrtBackend(BackendSpec.parse(spec), threads=1)
    return blame_optimizers(model, [program], backend, next(model.samples(1, 0, None)), floor)


def names(knobs: OptimizerBlame) -> set[str]:
    return {culprit.optimizer for culprit in knobs.responsible}


def quantized(
    path: Path,
    *,
    largest: int = 127,
    weight: float = 0.003,
    data: float = 3 / 127,
    bias: float = 0.1,
    y: float = 8 / 127,
) -> Path:
    """Two convolutions with INT8 activations and weights and a float bias, as PTQ tools leave it: ``x`` to ``y``.

    ``largest`` is the largest level of a weight; ``weight``, ``data``, ``y`` are scales; ``bias`` is the biases' size.
    """
    net = NetBuilder(0)
    zero = net.weight(np.array(0, np.int8))

    def pair(x: str, scale: float) -> str:
        s = net.weight(np.array(scale, np.float32))
        return net.op("DequantizeLinear", net.op("QuantizeLinear", x, s, zero), s, zero)

    def conv(x: str, name: str) -> str:
        w = net.weight(net.rng.integers(-largest, largest + 1, (8, 8, 3, 3), dtype=np.int8))
        weights = net.op("DequantizeLinear", w, net.weight(np.array(weight, np.float32)), zero)
        biases = net.weight((net.rng.standard_normal(8) * bias).astype(np.float32))
        return net.op("Conv", pair(x, data), weights, biases, kernel_shape=[3, 3], pads=[1] * 4, name=name)

    net.op("Identity", pair(conv(net.op("Relu", conv("x", "first")), "second"), y), name="y")
    return net.save(path, {"x": (1, [1, 8, 16, 16])}, ["y"])


def test_folding_batch_norm_into_convolutions(tmp_path):
    knobs = knobs_of(second_like(tmp_path / "net.onnx"), "ort-basic")
    assert names(knobs) == {"ConvBNFusion"}
    assert knobs.level == "basic"
    assert knobs.difference_with > 0 == knobs.difference_without
    graph = Graph(tmp_path / "net.onnx")
    folded = {n.name for n in graph.nodes if n.op == "BatchNormalization"}
    assert folded < set(knobs.nodes)
    assert not {n.name for n in graph.nodes if n.op == "Concat"} & set(knobs.nodes)
    assert {r.operators for r in knobs.responsible[0].rewrites} == {("Conv",), ("ConvTranspose",)}


def test_blocked_layout_and_folding_together(tmp_path):
    knobs = knobs_of(second_like(tmp_path / "net.onnx"), "ort-all")
    if "NchwcTransformer" not in knobs.active:
        pytest.skip("this processor has no blocked layout")
    assert names(knobs) == {"ConvBNFusion", "NchwcTransformer"}
    assert knobs.difference_without == 0
    assert all(culprit.difference > 0 for culprit in knobs.responsible)
    blocked = next(c for c in knobs.responsible if c.optimizer == "NchwcTransformer")
    assert all(any("nchwc" in op for op in rewrite.operators) for rewrite in blocked.rewrites)


def test_disabling_the_responsible_ones_helps_and_disabling_fewer_does_not(tmp_path):
    """Checked from outside, with sessions of their own."""
    path = residual(tmp_path / "net.onnx")
    knobs, x = knobs_of(path, "ort-all"), next(OnnxFileModel(path).samples(1, 0, None)).arrays

    def outputs(spec: str, disabled: set[str]) -> bytes:
        backend = OrtBackend(BackendSpec.parse(spec), disabled_optimizers=sorted(disabled), threads=1)
        results = backend.open(Program("net", Graph(path))).run(x)
        return b"".join(array.tobytes() for array in results.values())

    exact = outputs("ort-none", set())
    assert outputs("ort-all", names(knobs)) == exact
    assert knobs.responsible
    for name in names(knobs):
        assert outputs("ort-all", names(knobs) - {name}) != exact


def test_quantized_bias(tmp_path):
    knobs = knobs_of(quantized(tmp_path / "net.onnx"), "ort-basic")
    assert names(knobs) == {"WeightBiasQuantization"}
    assert knobs.level == "basic"
    assert {"node_first", "node_second"} <= set(knobs.nodes)
    assert knobs.difference_without <= REST * knobs.difference_with


def test_no_difference(tmp_path):
    knobs = knobs_of(residual(tmp_path / "net.onnx"), "ort-basic")
    assert (knobs.level, knobs.responsible, knobs.difference_with) == (None, [], 0)
    assert knobs.runs == 2


def test_a_difference_below_the_noise_floor_is_none(tmp_path):
    knobs = knobs_of(second_like(tmp_path / "net.onnx"), "ort-basic", floor=1e-3)
    assert 0 < knobs.difference_with < 1e-3
    assert knobs.level is None
    assert not knobs.responsible


def test_the_log_names_the_optimizers_that_changed_something(tmp_path, capfd):
    graph = Graph(second_like(tmp_path / "net.onnx"))
    runtime = OrtBackend(BackendSpec.parse("ort-all"), threads=1).runtime
    assert active_optimizers(runtime, graph, "basic") == [RULE_BASED]
    assert active_optimizers(runtime, graph, "basic", ["ConvBNFusion"]) == []
    assert "ConvActivationFusion" in active_optimizers(runtime, graph, "extended")
    assert capfd.readouterr() == ("", "")


def test_bisect_reports_knobs(tmp_path):
    path = second_like(tmp_path / "net.onnx", depth=1, size=16)
    result = bisect(str(path), "ort-none,ort-basic", options=Options(optimizer_blame=True))
    found = result.to_dict()["knobs"]
    assert found["responsible"] == ["ConvBNFusion"]
    assert found["difference"]["with"] > found["difference"]["without"] == 0
    assert found["nodes"]
    assert found["runs"] > 0
    json.dumps(found, allow_nan=False)


def test_knobs_need_an_optimized_backend(tmp_path):
    path = residual(tmp_path / "net.onnx")
    with pytest.raises(InputError, match="--knobs: expected ort-basic or ort-all"):
        bisect(str(path), "ort-all,ort-none", options=Options(optimizer_blame=True))
