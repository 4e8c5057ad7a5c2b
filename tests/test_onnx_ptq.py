"""Scales of an ONNX graph by itself."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import pytest
import torch
from extras import needs
from nets import NetBuilder, calibrate_graph, residual
from onnx import TensorProto, helper, numpy_helper
from torch import nn

import cp_debug
from cp_debug.backends.executor import Executor
from cp_debug.deploy import quantize_output
from cp_debug.deploy.quantize_output import quantize_ptq
from cp_debug.errors import InputError
from cp_debug.graph.graph import Graph
from cp_debug.graph.qdq import insert_qdq, quantizable, weight_axis
from cp_debug.quantization.histogram import METHODS
from cp_debug.quantization.onnx_ptq import GraphCalibration
from cp_debug.recipes.registry import load_model

SHAPE = (2, 16, 16, 16)


def samples(count: int, seed: int = 0) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(seed)
    return [{"x": rng.standard_normal(SHAPE).astype(np.float32)} for _ in range(count)]


@pytest.fixture
def graph(tmp_path: Path) -> Graph:
    return Graph(residual(tmp_path / "net.onnx"))


def values(graph: Graph, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    seen = dict(inputs)
    Executor(graph).run(inputs, lambda name, tensor: seen.__setitem__(name, np.asarray(tensor).copy()))
    return seen


def test_max_is_the_largest_magnitude_over_all_samples(graph: Graph) -> None:
    scales = calibrate_graph(graph, iter(samples(3)))
    runs = [values(graph, sample) for sample in samples(3)]
    layers = {node.name: node for node in quantizable(graph)}
    assert scales.layers.keys() == layers.keys()
    for name, node in layers.items():
        assert scales.layers[name].input == max(np.abs(run[node.proto.input[0]]).max() for run in runs)
        weight = graph.initializer(node.proto.input[1])
        rest = tuple(d for d in range(weight.ndim) if d != weight_axis(node, weight.ndim))
        np.testing.assert_array_equal(scales.layers[name].weight, np.abs(weight).max(rest))
    nodes = {node.name: node for node in graph.nodes}
    assert scales.residual_adds
    for name, amax in scales.residual_adds.items():
        assert amax == max(np.abs(run[value]).max() for run in runs for value in nodes[name].inputs)


@pytest.mark.parametrize("kind", [np.int32, np.uint64])
def test_products_and_sums_of_integers_are_left_alone(tmp_path: Path, kind: type) -> None:
    rng = np.random.default_rng(0)
    net = NetBuilder()
    net.op("MatMul", "x", net.weight(rng.standard_normal((4, 4)).astype(np.float32)), name="floats")
    counts = net.op("Cast", "x", to=onnx.helper.np_dtype_to_tensor_dtype(np.dtype(kind)))
    other = net.op("MatMul", counts, net.weight(rng.integers(0, 3, (4, 4)).astype(kind)), name="integers")
    net.op("Add", counts, other, name="sum")
    graph = Graph(net.save(tmp_path / "net.onnx", {"x": (1, [2, 4])}, ["floats", "sum"]))
    scales = calibrate_graph(graph, [{"x": np.abs(rng.standard_normal((2, 4))).astype(np.float32)}])
    assert [graph.producer[v].name for v in ["floats"]] == [*scales.layers]
    assert not scales.residual_adds


@pytest.mark.parametrize("method", METHODS)
def test_every_method_quantizes_well(tmp_path: Path, graph: Graph, method: str) -> None:
    scales = calibrate_graph(graph, samples(4), method)
    made = Graph(insert_qdq(graph, scales.layers, tmp_path / "int8.onnx", scales.residual_adds))
    (other,) = samples(1, seed=9)
    exact, found = values(graph, other)["logits"], values(made, other)["logits"]
    assert 20 * np.log10(np.linalg.norm(exact) / np.linalg.norm(found - exact)) > 20


def test_values_of_types_that_only_torch_has_are_counted(graph: Graph) -> None:
    calibration = GraphCalibration(graph)
    for name in sorted(calibration.watched):
        calibration.see(name, np.full((1, 4), -3.0, ml_dtypes.bfloat16))
    assert {layer.input for layer in calibration.scales().layers.values()} == {3.0}


def test_skipped_layers_have_no_scales(graph: Graph) -> None:
    first, second, *_ = calibrate_graph(graph, samples(1)).layers
    skipped = calibrate_graph(graph, samples(1), skip=[first, f"{second[:-1]}[{second[-1]}]"])
    assert not {first, second} & skipped.layers.keys()


def test_what_cannot_be_calibrated_is_refused(tmp_path: Path, graph: Graph) -> None:
    bad = samples(1)
    bad[0]["x"][0, 0, 0, 0] = np.nan
    with pytest.raises(InputError, match="'x' holds NaN"):
        calibrate_graph(graph, bad)
    with pytest.raises(InputError, match="at least one sample"):
        calibrate_graph(graph, [])
    codes = samples(1)[0]["x"].astype(ml_dtypes.float4_e2m1fn)
    with pytest.raises(InputError, match="'x' is float4_e2m1fn, which is not calibrated"):
        GraphCalibration(graph, "max").see("x", codes)
    with pytest.raises(InputError, match="no layer matches 'node_con'"):
        calibrate_graph(graph, samples(1), skip=["node_con"])
    with pytest.raises(InputError, match="unknown"):
        calibrate_graph(graph, samples(1), "median")
    made = Graph(insert_qdq(graph, calibrate_graph(graph, samples(1)).layers, tmp_path / "int8.onnx"))
    with pytest.raises(InputError, match="quantized already"):
        calibrate_graph(made, samples(1))


def test_a_sum_of_two_shapes_is_left_alone(tmp_path: Path) -> None:
    net = NetBuilder()
    net.op("Add", net.conv("x", 3, 3), net.op("GlobalAveragePool", "x"), name="y")
    graph = Graph(net.save(tmp_path / "net.onnx", {"x": (onnx.TensorProto.FLOAT, [1, 3, 8, 8])}, ["y"]))
    assert not calibrate_graph(graph, [{"x": np.ones((1, 3, 8, 8), np.float32)}]).residual_adds


@pytest.mark.slow
def test_what_int8_costs_is_no_unexplained_remainder(tmp_path: Path) -> None:
    """A sound Q/DQ graph against its FP32 parent, judged by a tolerance of FP32: beyond it, and nobody's fault."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 4, 1)
    ).eval()
    path = tmp_path / "net.onnx"
    torch.onnx.export(net, (torch.randn(1, 3, 32, 32),), path, dynamo=False, input_names=["image"], opset_version=17)
    inputs = [{"image": torch.rand(1, 3, 32, 32).numpy()} for _ in range(8)]
    written = cp_debug.quantize(path, tmp_path / "int8", inputs=inputs, progress=False)
    int8 = next(file for file in written.files if file.suffix == ".onnx")
    options = cp_debug.Options(rtol=1e-4)
    result = cp_debug.diagnose(path, "ort,ort", test_model=int8, inputs=inputs, options=options, progress=False)
    assert not result.tests[0].guilty
    assert not result.agrees
    assert "the rounding adds up" in str(result)


def test_files_that_fail_their_own_check_are_not_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise InputError("the file does not run")

    monkeypatch.setattr(quantize_output, "output_sqnr", fail)
    residual(tmp_path / "net.onnx")
    with pytest.raises(InputError, match="does not run"):
        cp_debug.quantize(str(tmp_path / "net.onnx"), tmp_path / "new" / "out", progress=False)
    assert [entry.name for entry in tmp_path.iterdir()] == ["net.onnx"]


def product(folder: Path) -> Path:
    """An ONNX file of one product and an activation."""
    weight = numpy_helper.from_array(np.random.default_rng(0).standard_normal((4, 3)).astype(np.float32), "w")
    nodes = [helper.make_node("MatMul", ["x", "w"], ["a"], "product"), helper.make_node("Relu", ["a"], ["y"])]
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [2, size]) for n, size in (("x", 4), ("y", 3))]
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], [weight])
    path = folder / "net.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


@needs("modelopt")
def test_int8_is_measured_on_four_of_the_samples(tmp_path: Path) -> None:
    result = quantize_ptq(load_model(str(product(tmp_path))), tmp_path / "out", batches=6)
    assert result.calibrated_on == "6 samples"
    assert result.measured_on == "4 of the samples"
