"""Q/DQ surgery: names, axes, sharing, values; on small nets and on random scales."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from nets import NetBuilder, residual, second_like

from cp_debug.backends.executor import Executor
from cp_debug.errors import InputError
from cp_debug.graph.graph import Graph
from cp_debug.graph.qdq import insert_qdq, quantizable, weight_axis
from cp_debug.graph.scales import LayerScales

FLOAT = onnx.TensorProto.FLOAT


def fake_quant(x: np.ndarray, amax: np.ndarray | float) -> np.ndarray:
    """What a Q/DQ pair does, in numpy and FP32. ``amax`` broadcasts."""
    scale = np.asarray(amax, np.float32) / np.float32(127)
    return np.clip(np.rint(x / scale), -128, 127).astype(np.float32) * scale


def run(graph: Graph, **inputs: np.ndarray) -> dict[str, np.ndarray]:
    """Every value, by the executor."""
    seen: dict[str, np.ndarray] = {}
    Executor(graph).run(inputs, lambda name, tensor: seen.__setitem__(name, np.asarray(tensor).copy()))
    return seen


def run_ort(graph: Graph, **inputs: np.ndarray) -> list[np.ndarray]:
    """The outputs, by ONNX Runtime."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    return ort.InferenceSession(str(graph.path), options, providers=["CPUExecutionProvider"]).run(None, inputs)


def scales_of(graph: Graph, amax: float = 3.0) -> dict[str, LayerScales]:
    """The weights' own largest magnitudes for every layer."""
    scales = {}
    for node in quantizable(graph):
        weight = graph.initializer(node.proto.input[1])
        axis = weight_axis(node, weight.ndim)
        rest = tuple(d for d in range(weight.ndim) if d != axis)
        scales[node.name] = LayerScales(amax, np.abs(weight).max(rest))
    return scales


def quantized(graph: Graph, **changes: object) -> Graph:
    options = {"layers": scales_of(graph), **changes}
    return Graph(insert_qdq(graph, target=graph.path.with_name("int8.onnx"), **options))


def layer(folder: Path, kind: str) -> tuple[Graph, str, np.ndarray, int]:
    """One layer from ``x`` to ``y``: the graph, the node, the weight, the axis of the output channels."""
    net = NetBuilder(3)
    shapes = {
        "Conv": ((6, 4, 3, 3), 0, [2, 4, 5, 5], {}),
        "grouped Conv": ((6, 2, 3, 3), 0, [2, 4, 5, 5], {"group": 2}),
        "ConvTranspose": ((4, 6, 2, 2), 1, [2, 4, 5, 5], {"strides": [2, 2]}),
        "Gemm": ((4, 6), 1, [3, 4], {}),
        "Gemm transB": ((6, 4), 0, [3, 4], {"transB": 1}),
        "MatMul": ((4, 6), 1, [2, 3, 4], {}),
    }
    shape, axis, given, attributes = shapes[kind]
    weight = (net.rng.standard_normal(shape) * net.rng.uniform(0.01, 1, 100)[: shape[-1]]).astype(np.float32)
    op = next(word for word in kind.split() if word[0].isupper())
    net.op(op, "x", net.weight(weight, "w"), name="y", **attributes)
    graph = Graph(net.save(folder / f"{kind.replace(' ', '-')}.onnx", {"x": (FLOAT, given)}, ["y"]))
    return graph, "node_y", weight, axis


KINDS = ("Conv", "grouped Conv", "ConvTranspose", "Gemm", "Gemm transB", "MatMul")


@settings(max_examples=5, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    amax=st.floats(1e-3, 1e3),
    share=st.floats(0.2, 2),
    seed=st.integers(0, 2**16),
    per_channel=st.booleans(),
)
@pytest.mark.parametrize("kind", KINDS)
def test_the_executed_graph_is_numpys_fake_quant(
    tmp_path: Path, kind: str, amax: float, share: float, seed: int, per_channel: bool
) -> None:
    """``amax`` from far too small to far too large, on the right axis of the weight."""
    graph, name, weight, axis = layer(tmp_path, kind)
    broad = [1] * weight.ndim
    broad[axis] = -1
    own = np.abs(weight).max(tuple(d for d in range(weight.ndim) if d != axis))
    largest = (own if per_channel else own.max(keepdims=True)) * np.float32(share)
    made = quantized(graph, layers={name: LayerScales(amax, largest)})
    x = np.random.default_rng(seed).standard_normal(graph.inputs[0].shape).astype(np.float32)
    seen = run(made, x=x)
    np.testing.assert_array_equal(seen["x__dequantized"], fake_quant(x, amax))
    expected = fake_quant(weight, largest.reshape(broad) if per_channel else largest[0])
    np.testing.assert_array_equal(seen["w__dequantized"], expected)
    exact = Executor(graph).run_nodes(graph.nodes, {"x": seen["x__dequantized"], "w": expected}, ["y"])["y"]
    np.testing.assert_array_equal(seen["y"], exact.numpy())
    np.testing.assert_allclose(run_ort(made, x=x)[0], seen["y"], rtol=1e-4, atol=1e-5 * np.abs(seen["y"]).max())


@pytest.mark.parametrize("make", [second_like, residual])
def test_names_metadata_and_outputs_stay(tmp_path: Path, make) -> None:
    graph = Graph(make(tmp_path / "net.onnx"))
    before = graph.path.read_bytes()
    made = quantized(graph)
    onnx.checker.check_model(str(made.path), full_check=True)
    kept = [n for n in made.nodes if n.op not in ("QuantizeLinear", "DequantizeLinear")]
    assert [n.name for n in kept] == [n.name for n in graph.nodes]
    assert [n.outputs for n in kept] == [n.outputs for n in graph.nodes]
    assert [n.proto.metadata_props for n in kept] == [n.proto.metadata_props for n in graph.nodes]
    assert [str(o) for o in made.outputs] == [str(o) for o in graph.outputs]
    assert made.precision == "int8"
    assert graph.path.read_bytes() == before


def test_a_node_without_a_name_keeps_what_it_is_called(tmp_path: Path) -> None:
    net = NetBuilder()
    net.conv(net.conv("x", 3, 3), 3, 3, name="y")
    for node in net.nodes:
        node.name = ""
    graph = Graph(net.save(tmp_path / "net.onnx", {"x": (FLOAT, [1, 3, 8, 8])}, ["y"]))
    assert [n.name for n in quantized(graph).nodes if n.op == "Conv"] == ["Conv_0", "Conv_1"]


def fork(path: Path) -> Graph:
    """Two convolutions read ``x``; their results are added."""
    net = NetBuilder()
    a, b = net.conv("x", 3, 3, name="a"), net.conv("x", 3, 3, name="b")
    net.op("Add", a, b, name="sum")
    return Graph(net.save(path, {"x": (FLOAT, [1, 3, 8, 8])}, ["sum"]))


@pytest.mark.parametrize(("other", "pairs"), [(3.0, 1), (2.0, 2)])
def test_readers_with_one_scale_share_a_pair(tmp_path: Path, other: float, pairs: int) -> None:
    graph = fork(tmp_path / "net.onnx")
    layers = scales_of(graph)
    layers["node_b"] = LayerScales(other, layers["node_b"].weight)
    made = quantized(graph, layers=layers)
    assert sum(n.op == "QuantizeLinear" and n.inputs[0] == "x" for n in made.nodes) == pairs


def test_one_weight_read_along_two_axes_has_a_pair_for_each(tmp_path: Path) -> None:
    """Its rows and its columns have the same scales, and the channels of a product are these or those."""
    net = NetBuilder()
    w = net.weight(np.array([[1, 2, 0], [0.5, 0.25, 4], [0, 4, 1]], np.float32), "w")
    net.op("MatMul", "x", w, name="columns")
    net.op("Gemm", "x", w, name="rows", transB=1)
    graph = Graph(net.save(tmp_path / "net.onnx", {"x": (FLOAT, [2, 3])}, ["columns", "rows"]))
    scales = LayerScales(8.0, np.array([1, 4, 4], np.float32))
    inside = Graph(insert_qdq(graph, {"node_columns": scales, "node_rows": scales}, tmp_path / "int8.onnx"))
    pairs = [n for n in inside.nodes if n.op == "QuantizeLinear" and n.proto.input[0] == "w"]
    assert sorted(n.proto.attribute[0].i for n in pairs) == [0, 1]
    x = np.array([[1, 2, 3], [-3, 0.5, 8]], np.float32)
    weight, held = graph.initializer("w"), fake_quant(x, 8.0)
    for name, found in zip(("columns", "rows"), run_ort(inside, x=x), strict=True):
        amax = scales.weight if name == "columns" else scales.weight[:, None]
        rounded = fake_quant(weight, amax)
        expected = held @ (rounded if name == "columns" else rounded.T)
        np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_both_operands_of_an_add_get_one_scale(tmp_path: Path) -> None:
    made = quantized(fork(tmp_path / "net.onnx"), layers={}, residual_adds={"node_sum": 2.5})
    x = np.random.default_rng(0).standard_normal((1, 3, 8, 8)).astype(np.float32)
    seen = run(made, x=x)
    np.testing.assert_array_equal(seen["sum"], fake_quant(seen["a"], 2.5) + fake_quant(seen["b"], 2.5))


def test_a_stored_value_is_int8_for_all_that_read_it(tmp_path: Path) -> None:
    graph = Graph(residual(tmp_path / "net.onnx"))
    (value, *_) = next(n for n in graph.nodes if n.op == "MaxPool").outputs  # a convolution and a Concat read it
    made = quantized(graph, layers={}, stored={value: 2.0})
    readers = [node for node in made.nodes if f"{value}__dequantized" in node.inputs]
    assert {node.op for node in readers} == {node.op for node in graph.consumers[value]} == {"Conv", "Concat"}
    x = np.random.default_rng(0).standard_normal((1, 16, 16, 16)).astype(np.float32)
    values = run(made, x=x)
    np.testing.assert_array_equal(values[f"{value}__dequantized"], fake_quant(values[value], 2.0))
    np.testing.assert_array_equal(values[value], run(graph, x=x)[value])


def test_what_is_always_zero_stays_zero(tmp_path: Path) -> None:
    graph, name, _, _ = layer(tmp_path, "Conv")
    made = quantized(graph, layers={name: LayerScales(0.0, np.zeros(6, np.float32))})
    assert not run(made, x=np.zeros(graph.inputs[0].shape, np.float32))["y"].any()


def test_weights_beside_the_file_are_found_from_another_folder(tmp_path: Path) -> None:
    graph = Graph(residual(tmp_path / "net.onnx"))
    (tmp_path / "there").mkdir()
    outside = tmp_path / "there" / "net.onnx"
    onnx.save(onnx.load(graph.path), outside, save_as_external_data=True, location="w.data", size_threshold=0)
    made = Graph(insert_qdq(Graph(outside), scales_of(graph), tmp_path / "int8.onnx"))
    x = np.random.default_rng(0).standard_normal((2, 16, 16, 16)).astype(np.float32)
    np.testing.assert_array_equal(run_ort(made, x=x)[0], run_ort(quantized(graph), x=x)[0])


@pytest.mark.parametrize("opset", [11, 12])
def test_an_old_opset_is_raised(tmp_path: Path, opset: int) -> None:
    net = NetBuilder()
    net.op("Relu", net.conv("x", 3, 3), name="y")
    graph = Graph(net.save(tmp_path / "net.onnx", {"x": (FLOAT, [1, 3, 8, 8])}, ["y"], opset=opset))
    made = quantized(graph)
    assert made.opsets[""] == 13
    onnx.checker.check_model(str(made.path), full_check=True)


@pytest.mark.parametrize(
    ("op", "opset", "attributes"),
    [
        ("Softmax", 12, {"axis": 1}),
        ("ReduceSum", 11, {"axes": [1]}),
        ("Clip", 10, {"min": -0.2, "max": 0.3}),
        ("Resize", 10, {"mode": "nearest"}),
    ],
)
def test_operators_that_have_changed_since_compute_the_same(
    tmp_path: Path, op: str, opset: int, attributes: dict[str, Any]
) -> None:
    def operator(net: NetBuilder, read: str) -> None:
        sizes = [net.weight(np.array([1, 1, 1.5, 2], np.float32), "sizes")] if op == "Resize" else []
        net.op(op, read, *sizes, name="y", **attributes)

    net, alone = NetBuilder(), NetBuilder()
    convolved = net.conv("x", 3, 3)
    operator(net, convolved)
    operator(alone, "x")
    shape = {"x": (FLOAT, [1, 3, 8, 8])}
    graph = Graph(net.save(tmp_path / "net.onnx", shape, [convolved, "y"], opset=opset))
    made = quantized(graph)
    assert made.opsets[""] == 13
    assert {node.name for node in made.nodes} > {node.name for node in graph.nodes}
    x = np.random.default_rng(0).standard_normal((1, 3, 8, 8)).astype(np.float32)
    read, found = run_ort(made, x=x)
    (before,) = run_ort(Graph(alone.save(tmp_path / "alone.onnx", shape, ["y"], opset=opset)), x=read)
    np.testing.assert_allclose(found, before, rtol=1e-6)
    outside = tmp_path / "outside" / "net.onnx"
    outside.parent.mkdir()
    onnx.save(onnx.load(graph.path), outside, save_as_external_data=True, location="w.data", size_threshold=0)
    np.testing.assert_array_equal(run_ort(quantized(Graph(outside)), x=x)[1], found)


def test_an_opset_that_cannot_be_raised_is_refused(tmp_path: Path) -> None:
    net = NetBuilder()
    net.op(
        "BatchNormalization",
        net.conv("x", 3, 3),
        *(net.weight(np.ones(3, np.float32)) for _ in range(4)),
        name="y",
        spatial=0,
    )
    graph = Graph(net.save(tmp_path / "net.onnx", {"x": (FLOAT, [1, 3, 8, 8])}, ["y"], opset=8))
    with pytest.raises(InputError, match=r"opset 8.*needs 13.*BatchNormalization.*node_y.*cannot convert it to 13"):
        quantized(graph)


def test_what_cannot_be_quantized_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    graph, name, _, _ = layer(tmp_path, "Conv")
    good = scales_of(graph)[name]
    bad: list[tuple[dict[str, object], str]] = [
        ({"layers": {"node_z": good}}, "no node 'node_z'"),
        ({"layers": {}, "residual_adds": {name: 1.0}}, "is of Conv; expected Add"),
        ({"layers": {name: LayerScales(1.0, np.ones(4, np.float32))}}, "4 weight scales; expected 1 or 6"),
        ({"layers": {name: LayerScales(float("nan"), good.weight)}}, "nan"),
        ({"layers": {name: LayerScales(-1.0, good.weight)}}, "expected ≥ 0"),
    ]
    for changes, message in bad:
        with pytest.raises(InputError, match=message):
            quantized(graph, **changes)
    assert not graph.path.with_name("int8.onnx").exists()


def test_a_graph_is_quantized_once(tmp_path: Path) -> None:
    graph, name, _, _ = layer(tmp_path, "Gemm")
    scales = scales_of(graph)
    made = quantized(graph)
    with pytest.raises(InputError, match=f"{name!r} is quantized already"):
        insert_qdq(made, scales, tmp_path / "twice.onnx")


def test_a_product_of_two_activations_has_no_weight(tmp_path: Path) -> None:
    net = NetBuilder()
    net.op("MatMul", "x", net.op("Relu", "x"), name="y")
    graph = Graph(net.save(tmp_path / "net.onnx", {"x": (FLOAT, [4, 4])}, ["y"]))
    assert not quantizable(graph)
    with pytest.raises(InputError, match="no weight"):
        quantized(graph, layers={"node_y": LayerScales(1.0, np.ones(4, np.float32))})


def test_a_grouped_transposed_convolution_takes_one_scale(tmp_path: Path) -> None:
    net = NetBuilder()
    weight = net.weight(net.rng.standard_normal((4, 3, 2, 2)).astype(np.float32), "w")
    net.op("ConvTranspose", "x", weight, name="y", group=2, strides=[2, 2])
    graph = Graph(net.save(tmp_path / "net.onnx", {"x": (FLOAT, [1, 4, 5, 5])}, ["y"]))
    with pytest.raises(InputError, match="grouped ConvTranspose"):
        quantized(graph, layers={"node_y": LayerScales(1.0, np.ones(6, np.float32))})
    made = quantized(graph, layers={"node_y": LayerScales(1.0, np.ones(1, np.float32))})
    run_ort(made, x=np.ones((1, 4, 5, 5), np.float32))


def test_half_precision_comes_after_int8(tmp_path: Path) -> None:
    net = NetBuilder()
    net.op("Conv", "x", net.weight(np.ones((2, 2, 1, 1), np.float16)), name="y")
    graph = Graph(net.save(tmp_path / "net.onnx", {"x": (onnx.TensorProto.FLOAT16, [1, 2, 4, 4])}, ["y"]))
    with pytest.raises(InputError, match="not FP32"):
        quantized(graph, layers={"node_y": LayerScales(1.0, np.ones(2, np.float32))})
