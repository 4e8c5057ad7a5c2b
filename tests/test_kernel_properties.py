"""Kernels against ONNX's reference implementation, over opsets, types, axes, and shapes with zeros and ones."""

from __future__ import annotations

import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from cp_debug.backends.arithmetic import FP64
from cp_debug.backends.executor import Executor
from cp_debug.graph.graph import Graph

BOUNDED = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
SIZES = st.sampled_from([0, 1, 1, 2, 3, 5])
UNARY = ["Abs", "Neg", "Exp", "Sigmoid", "Tanh", "Relu", "Softplus", "Softsign", "Floor", "Ceil", "Sign", "Erf", "Atan"]
BINARY = ["Add", "Sub", "Mul", "Max", "Min", "Greater", "Less", "Equal", "Div"]
REDUCTIONS = [
    "ReduceSum",
    "ReduceMean",
    "ReduceMax",
    "ReduceMin",
    "ReduceL1",
    "ReduceL2",
    "ReduceSumSquare",
    "ReduceProd",
]


def agree(
    op: str,
    arrays: list[np.ndarray],
    opset: int,
    weights: dict[str, np.ndarray] | None = None,
    outputs: int = 1,
    **attributes: Any,
) -> None:
    """The kernel, executed in FP64 on FP32 values, gives what the reference gives in its type."""
    names = [f"i{k}" for k in range(len(arrays))]
    weights = weights or {}
    node = helper.make_node(op, [*names, *weights], [f"o{k}" for k in range(outputs)], **attributes)
    inputs = [
        helper.make_tensor_value_info(n, helper.np_dtype_to_tensor_dtype(a.dtype), a.shape)
        for n, a in zip(names, arrays, strict=True)
    ]
    made = [onnx.ValueInfoProto(name=o) for o in node.output]
    constants = [numpy_helper.from_array(w, n) for n, w in weights.items()]
    graph = helper.make_graph([node], "net", inputs, made, constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    given_values = dict(zip(names, arrays, strict=True))
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        expected = ReferenceEvaluator(model).run(None, given_values)
        onnx.save(model, Path(folder) / "net.onnx")
        got = Executor(Graph(Path(folder) / "net.onnx"), FP64).run(given_values)
    for have, want in zip(got.values(), expected, strict=True):
        value = np.asarray(have)
        assert value.shape == np.asarray(want).shape
        np.testing.assert_allclose(value.astype(np.float64), np.asarray(want, np.float64), rtol=2e-5, atol=2e-6)


@st.composite
def tensors(draw: Any, low: int = 1, high: int = 4, kind: str = "float32") -> np.ndarray:
    shape = draw(st.lists(SIZES, min_size=low, max_size=high))
    rng = np.random.default_rng(draw(st.integers(0, 2**16)))
    values = 2 * rng.standard_normal(shape)
    return values.astype(kind) if kind == "float32" else np.round(4 * values).astype(kind)


@BOUNDED
@given(st.sampled_from(UNARY), tensors(0), st.sampled_from([13, 17, 21]))
def test_unary(op: str, x: np.ndarray, opset: int) -> None:
    agree(op, [x], opset)


@BOUNDED
@given(
    st.sampled_from(BINARY), st.data(), st.sampled_from(["float32", "int32", "int64"]), st.sampled_from([13, 17, 21])
)
def test_binary_with_broadcasting(op: str, data: st.DataObject, kind: str, opset: int) -> None:
    a = data.draw(tensors(kind=kind))
    shape = [data.draw(st.sampled_from([1, n])) for n in a.shape[data.draw(st.integers(0, a.ndim)) :]]
    b = np.round(3 * np.random.default_rng(0).standard_normal(shape)).astype(kind)
    if op == "Div":
        b = np.where(b == 0, 1, b).astype(kind)
        if kind != "float32":
            a, b = np.abs(a), np.abs(b)  # the reference divides whole numbers towards minus infinity
    agree(op, [a, b], opset)


@BOUNDED
@given(st.sampled_from(REDUCTIONS), tensors(), st.data(), st.booleans(), st.sampled_from([13, 18]))
def test_reductions(op: str, x: np.ndarray, data: st.DataObject, keep: bool, opset: int) -> None:
    axes = data.draw(st.lists(st.integers(-x.ndim, x.ndim - 1), max_size=2, unique_by=lambda a: a % x.ndim))
    if 0 in x.shape and op in ("ReduceMean", "ReduceMax", "ReduceMin"):
        return  # of nothing there is no mean, and opsets differ in the extreme
    if opset >= 18 or op == "ReduceSum":
        agree(op, [x], opset, {"axes": np.array(axes, np.int64)} if axes else None, keepdims=int(keep))
    else:
        agree(op, [x], opset, keepdims=int(keep), **({"axes": axes} if axes else {}))


@BOUNDED
@given(st.sampled_from(["Softmax", "LogSoftmax"]), tensors(), st.data(), st.sampled_from([13, 17]))
def test_softmax(op: str, x: np.ndarray, data: st.DataObject, opset: int) -> None:
    axis = data.draw(st.integers(-x.ndim, x.ndim - 1))
    if x.shape[axis]:
        agree(op, [x], opset, axis=axis)


@BOUNDED
@given(tensors(), st.data(), st.sampled_from([13, 21]))
def test_slices(x: np.ndarray, data: st.DataObject, opset: int) -> None:
    axes = data.draw(st.lists(st.integers(0, x.ndim - 1), min_size=1, max_size=2, unique=True))
    bounds = [
        data.draw(st.tuples(st.integers(-7, 7), st.integers(-7, 7), st.sampled_from([-2, -1, 1, 2]))) for _ in axes
    ]
    parts = zip(("starts", "ends"), zip(*[b[:2] for b in bounds], strict=True), strict=True)
    weights = {name: np.array(values, np.int64) for name, values in parts}
    weights |= {"axes": np.array(axes, np.int64), "steps": np.array([b[2] for b in bounds], np.int64)}
    agree("Slice", [x], opset, weights)


@BOUNDED
@given(tensors(1, 3), st.data(), st.sampled_from(["constant", "edge", "reflect"]))
def test_padding(x: np.ndarray, data: st.DataObject, mode: str) -> None:
    if mode != "constant" and 0 in x.shape:
        return
    limit = [3 if mode != "reflect" else n - 1 for n in x.shape]
    pads = [data.draw(st.integers(0, min(n, 3))) for n in (*limit, *limit)]
    agree("Pad", [x], 13, {"pads": np.array(pads, np.int64)}, mode=mode)


@BOUNDED
@given(tensors(1, 3), st.data())
def test_moving(x: np.ndarray, data: st.DataObject) -> None:
    agree("Transpose", [x], 13, perm=data.draw(st.permutations(range(x.ndim))))
    agree("Concat", [x, x], 13, axis=data.draw(st.integers(-x.ndim, x.ndim - 1)))
    if x.size:  # the reference cannot flatten nothing
        agree("Flatten", [x], 13, axis=data.draw(st.integers(0, x.ndim)))
    axis = data.draw(st.integers(-x.ndim, x.ndim - 1))
    if x.shape[axis]:
        places = data.draw(st.lists(st.integers(-x.shape[axis], x.shape[axis] - 1), min_size=1, max_size=3))
        agree("Gather", [x], 13, {"indices": np.array(places, np.int64)}, axis=axis)
        agree("ArgMax", [x], 13, axis=axis, keepdims=data.draw(st.integers(0, 1)))
        agree("CumSum", [x], 14, {"axis": np.array(axis)}, exclusive=data.draw(st.integers(0, 1)))


@BOUNDED
@given(st.data(), st.sampled_from([1, 2]), st.sampled_from([11, 22]))
def test_convolutions(data: st.DataObject, rank: int, opset: int) -> None:
    group = data.draw(st.sampled_from([1, 2]))
    kernel = [data.draw(st.integers(1, 3)) for _ in range(rank)]
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    x = rng.standard_normal((data.draw(st.integers(1, 2)), 4, *(data.draw(st.integers(3, 6)) for _ in kernel)))
    w = rng.standard_normal((6, 4 // group, *kernel))
    attributes = {
        "group": group,
        "kernel_shape": kernel,
        "pads": [data.draw(st.integers(0, 1)) for _ in range(2 * rank)],
        "strides": [data.draw(st.integers(1, 2)) for _ in kernel],
    }
    agree("Conv", [a.astype(np.float32) for a in (x, w)], opset, **attributes)


@BOUNDED
@given(st.data())
def test_matrix_products(data: st.DataObject) -> None:
    n, k, m = (data.draw(st.sampled_from([1, 2, 3])) for _ in range(3))
    batch = data.draw(st.sampled_from([(), (2,), (3, 1)]))
    rng = np.random.default_rng(0)
    agree("MatMul", [rng.standard_normal((*batch, *s)).astype(np.float32) for s in ((n, k), (k, m))], 13)
    turn_a, turn_b = data.draw(st.booleans()), data.draw(st.booleans())
    a, b = (
        rng.standard_normal(s).astype(np.float32) for s in ((k, n) if turn_a else (n, k), (m, k) if turn_b else (k, m))
    )
    c = rng.standard_normal(data.draw(st.sampled_from([(m,), (n, 1), (1,), (n, m)]))).astype(np.float32)
    agree("Gemm", [a, b, c], 13, transA=int(turn_a), transB=int(turn_b), alpha=0.5, beta=2.0)


@pytest.mark.parametrize(
    ("op", "attributes"),
    [
        ("LRN", {"size": 3, "alpha": 0.05, "beta": 0.7, "bias": 1.2}),
        ("LRN", {"size": 1}),
        ("LRN", {"size": 9, "alpha": 0.3}),
        ("GlobalLpPool", {"p": 3}),
        ("GlobalLpPool", {}),
        ("LpPool", {"kernel_shape": [3, 2], "strides": [2, 1], "p": 3}),
        ("AveragePool", {"kernel_shape": [2, 2], "pads": [1, 0, 0, 1], "count_include_pad": 1}),
        ("MeanVarianceNormalization", {}),
    ],
)
def test_operators_that_the_reference_lacks_or_gets_wrong_agree_with_onnx_runtime(
    tmp_path: Path, op: str, attributes: dict[str, Any]
) -> None:
    x = np.random.default_rng(0).standard_normal((2, 7, 5, 6)).astype(np.float32)
    ends = [helper.make_tensor_value_info(name, 1, None) for name in ("x", "y")]
    graph = helper.make_graph([helper.make_node(op, ["x"], ["y"], **attributes)], "net", ends[:1], ends[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, str(tmp_path / "net.onnx"))
    (expected,) = onnxruntime.InferenceSession(model.SerializeToString()).run(None, {"x": x})
    made = Executor(Graph(tmp_path / "net.onnx"), FP64).run({"x": x})["y"].numpy()
    np.testing.assert_allclose(made, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("transform", ["align_corners", "half_pixel", "asymmetric", "pytorch_half_pixel"])
@pytest.mark.parametrize(("mode", "scale"), [("linear", 1.7), ("cubic", 0.6), ("nearest", 1.1)])
def test_resize_by_a_fraction_agrees_with_onnx_runtime(tmp_path: Path, transform: str, mode: str, scale: float) -> None:
    x = np.random.default_rng(0).standard_normal((1, 2, 10, 30)).astype(np.float32)
    ends = [helper.make_tensor_value_info(name, 1, None) for name in ("x", "y")]
    node = helper.make_node(
        "Resize", ["x", "", "s"], ["y"], mode=mode, coordinate_transformation_mode=transform, nearest_mode="floor"
    )
    scales = numpy_helper.from_array(np.array([1, 1, scale, 1.1], np.float32), "s")
    graph = helper.make_graph([node], "net", ends[:1], ends[1:], [scales])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=8)
    onnx.save(model, str(tmp_path / "net.onnx"))
    (expected,) = onnxruntime.InferenceSession(model.SerializeToString()).run(None, {"x": x})
    made = Executor(Graph(tmp_path / "net.onnx"), FP64).run({"x": x})["y"].numpy()
    np.testing.assert_allclose(made, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("opset", [18, 20, 21])
def test_group_normalization_has_a_scale_for_each_group_and_since_opset_21_for_each_channel(
    tmp_path: Path, opset: int
) -> None:
    x = np.random.default_rng(0).standard_normal((2, 6, 3, 4)).astype(np.float32)
    count = 6 if opset >= 21 else 2
    scale, bias = (np.arange(1, count + 1, dtype=np.float32) * by for by in (1, -10))
    node = helper.make_node("GroupNormalization", ["x", "s", "b"], ["y"], num_groups=2, epsilon=1e-3)
    ends = [helper.make_tensor_value_info(name, 1, None) for name in ("x", "y")]
    constants = [numpy_helper.from_array(scale, "s"), numpy_helper.from_array(bias, "b")]
    graph = helper.make_graph([node], "net", ends[:1], ends[1:], constants)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)]), str(tmp_path / "net.onnx"))
    groups = x.reshape(2, 2, 3, 3, 4).astype(np.float64)
    mean, variance = (f(groups, axis=(2, 3, 4), keepdims=True) for f in (np.mean, np.var))
    normal = ((groups - mean) / np.sqrt(variance + 1e-3)).reshape(x.shape)
    per_channel = [np.repeat(p, 6 // count)[None, :, None, None] for p in (scale, bias)]
    made = Executor(Graph(tmp_path / "net.onnx"), FP64).run({"x": x})["y"].numpy()
    np.testing.assert_allclose(made, normal * per_channel[0] + per_channel[1], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 6])
def test_local_response_is_normalized_over_one_channel_more_behind_than_before_where_the_number_is_even(
    tmp_path: Path, size: int
) -> None:
    """As ONNX defines it; ONNX Runtime takes odd sizes only."""
    x = np.random.default_rng(0).standard_normal((2, 7, 3)).astype(np.float32)
    ends = [helper.make_tensor_value_info(name, 1, None) for name in ("x", "y")]
    node = helper.make_node("LRN", ["x"], ["y"], size=size, alpha=0.3, beta=0.75, bias=2.0)
    graph = helper.make_graph([node], "net", ends[:1], ends[1:])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)]), str(tmp_path / "net.onnx"))
    expected = np.empty_like(x, np.float64)
    for c in range(7):
        channels = slice(max(0, c - (size - 1) // 2), min(6, c + -(-(size - 1) // 2)) + 1)
        total = np.square(x[:, channels], dtype=np.float64).sum(1)
        expected[:, c] = x[:, c] / (2.0 + 0.3 / size * total) ** 0.75
    made = Executor(Graph(tmp_path / "net.onnx"), FP64).run({"x": x})["y"].numpy()
    np.testing.assert_allclose(made, expected, rtol=1e-6)
