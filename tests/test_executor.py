"""The executor: ONNX's own operator tests, ONNX Runtime, replay of segments, where values are rounded, errors."""

from __future__ import annotations

import inspect
import warnings
import weakref
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nets import NetBuilder
from onnx import helper, numpy_helper, parser

from cp_debug.backends.arithmetic import ARITHMETICS, BF16, FP16, FP16ACC, FP32, FP64, TF32, round_fp16, round_tf32
from cp_debug.backends.executor import Executor, NodeFailed, unsupported
from cp_debug.backends.kernels import KERNELS, products
from cp_debug.backends.kernels.registry import Call
from cp_debug.backends.kernels.windows import Window, split_padding
from cp_debug.errors import InputError
from cp_debug.graph.graph import Graph, Node
from cp_debug.graph.operators import CONTRIB_INPUTS


def graph(folder: Path, text: str, weights: dict[str, np.ndarray] | None = None, opset: int = 21) -> Graph:
    """A graph in ONNX's textual syntax, without the header."""
    model = parser.parse_model(f'<ir_version: 10, opset_import: ["" : {opset}, "own" : 1]>\n{text}')
    model.graph.initializer.extend(numpy_helper.from_array(w, n) for n, w in (weights or {}).items())
    onnx.save(model, folder / "model.onnx")
    return Graph(folder / "model.onnx")


def random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


CONV_NET = """
net (float[1,8,16,16] x) => (float[N,M] y)
{
    a = Conv <pads = [1,1,1,1], strides = [2,2]> (x, w0, b0)
    b = BatchNormalization <epsilon = 0.001> (a, scale, bias, mean, var)
    c = Relu(b)
    d = Conv <pads = [1,1,1,1], group = 4> (c, w1)
    e = Add(c, d)
    f = ConvTranspose <strides = [2,2]> (e, w2)
    g = Sigmoid(f)
    h = GlobalAveragePool(g)
    i = Flatten(h)
    y = Gemm <transB = 1> (i, w3, b3)
}"""


def conv_net(folder: Path) -> Graph:
    shapes = {"w0": (32, 8, 3, 3), "b0": (32,), "w1": (32, 8, 3, 3), "w2": (32, 16, 2, 2), "w3": (5, 16), "b3": (5,)}
    weights = {n: random(*s, seed=i) * 0.2 for i, (n, s) in enumerate(shapes.items())}
    weights |= {n: random(32, seed=9 + i) for i, n in enumerate(("scale", "bias", "mean"))}
    return graph(folder, CONV_NET, weights | {"var": random(32, seed=7) ** 2 + 0.5})


@pytest.mark.parametrize("arithmetic", [FP16, BF16])
def test_a_batch_norm_reads_its_parameters_as_the_file_has_them(tmp_path: Path, arithmetic: Any) -> None:
    """In FP16 a variance of 2e7 would be Inf, and a mean of 1.0001 be 1."""
    made = graph(
        tmp_path,
        "net (float[1,1,2] x) => (float[1,1,2] y) { y = BatchNormalization <epsilon = 0.0> (x, s, b, m, v) }",
        {n: np.array([v], np.float32) for n, v in (("s", 4096.0), ("b", 0.0), ("m", 1.0001), ("v", 2.0**24))},
    )
    result = Executor(made, arithmetic).run({"x": torch.tensor([[[1.0, 1025.0]]])})["y"]
    exact = [-0.0001, 1023.9999]
    assert result.flatten().tolist() == pytest.approx(exact, rel=2**-8)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:invalid value encountered in cast")
def test_onnx_operator_tests(tmp_path: Path) -> None:
    """Every case of ONNX's own test-suite whose operators all have a kernel."""
    from onnx.backend.test.loader import load_model_tests

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cases = load_model_tests(kind="node")
    failed, ran = [], 0
    for case in cases:
        model = case.model
        if any(n.domain or (n.op_type not in KERNELS and n.op_type != "Constant") for n in model.graph.node):
            continue
        onnx.save(model, tmp_path / "case.onnx")
        for inputs, expected in case.data_sets:
            ran += 1
            try:
                values = dict(zip([v.name for v in model.graph.input], map(_array, inputs), strict=False))
                got = Executor(Graph(tmp_path / "case.onnx"), literal=True).run(values)
                for have, want in zip(got.values(), map(_array, expected), strict=False):
                    _assert_close(have, want, case.rtol)
            except Exception as error:
                failed.append(f"{case.name}: {error}")
    assert not failed, "\n".join(failed)
    assert ran > 1200


def _array(value: Any) -> Any:
    return numpy_helper.to_array(value) if isinstance(value, onnx.TensorProto) else value


def _assert_close(have: Any, want: Any, rtol: float) -> None:
    if isinstance(want, list):
        assert len(have) == len(want)
        return
    have = have.numpy() if isinstance(have, torch.Tensor) else have
    assert have.shape == want.shape
    if want.dtype.kind in "OSU":
        assert (have == want).all()
        return
    # Narrow floats are held in FP32: they differ from a result that was rounded at every step.
    rtol = {"bfloat16": 2e-2, "float16": 2e-3}.get(want.dtype.name, rtol)
    np.testing.assert_allclose(have.astype(np.float64), want.astype(np.float64), rtol=rtol, atol=1e-5)


def test_conv_net_equals_onnx_runtime(tmp_path: Path) -> None:
    net, x = conv_net(tmp_path), {"x": random(1, 8, 16, 16)}
    (expected,) = ort.InferenceSession(net.path, providers=["CPUExecutionProvider"]).run(None, x)
    results = {
        a: Executor(net, ARITHMETICS[a]).run(x)["y"] for a in ("fp32", "fp64", "tf32", "bf16", "fp16", "fp16acc")
    }
    assert results["fp64"].dtype == torch.float64
    np.testing.assert_allclose(results["fp32"].numpy(), expected, rtol=1e-5, atol=1e-6)
    errors = {a: float((y - results["fp64"]).norm() / results["fp64"].norm()) for a, y in results.items()}
    assert 0 < errors["fp32"] < 1e-6 < errors["tf32"] < errors["bf16"] < 0.05
    assert errors["tf32"] < 5e-3
    assert 1e-5 < errors["fp16"] < errors["bf16"]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_convolution_of_a_few_rows_at_a_time_equals_torch(data: st.DataObject) -> None:
    rank, bias, groups = data.draw(st.integers(1, 3)), data.draw(st.booleans()), data.draw(st.integers(1, 2))
    kernel, stride, dilation, padding = (
        tuple(data.draw(st.integers(low, high)) for _ in range(rank)) for low, high in ((1, 4), (1, 3), (1, 2), (0, 5))
    )
    x, weight = torch.randn(2, 4, *(9,) * rank).double(), torch.randn(6, 4 // groups, *kernel).double()
    b = torch.randn(6).double() if bias else None
    conv = (torch.conv1d, torch.conv2d, torch.conv3d)[rank - 1]
    expected = conv(x, weight, b, stride, padding, dilation, groups)
    how = {"strides": stride, "dilations": dilation, "pads": (*padding, *padding), "group": groups}
    node = Node.of(0, helper.make_node("Conv", ["x", "w"], ["y"], **how))
    call = Call(node, 17, ARITHMETICS["fp64"], torch.device("cpu"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(products, "UNFOLDED", data.draw(st.integers(1, 1 << 14)))
        got = products.conv(call, x, weight, b)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def test_every_value_is_streamed_in_order_and_freed(tmp_path: Path) -> None:
    net, seen, alive = conv_net(tmp_path), [], []
    tensors: dict[str, weakref.ref[Any]] = {}

    def sink(name: str, value: Any) -> None:
        seen.append(name)
        tensors[name] = weakref.ref(value)
        alive.append({n for n, r in tensors.items() if r() is not None})

    Executor(net).run({"x": random(1, 8, 16, 16)}, sink)
    assert seen == net.values
    assert all(len(names) <= 3 for names in alive)  # the value itself, what it is made of, one residual
    some: list[str] = []
    Executor(net).run({"x": random(1, 8, 16, 16)}, lambda n, _: some.append(n), probes={"c", "y"})
    assert some == ["c", "y"]


@pytest.mark.parametrize("arithmetic", ARITHMETICS)
def test_replayed_layers_repeat_the_run(tmp_path: Path, arithmetic: str) -> None:
    net, captured = conv_net(tmp_path), {"x": random(1, 8, 16, 16)}
    executor = Executor(net, ARITHMETICS[arithmetic])
    executor.run(captured, lambda n, v: captured.update({n: v.clone().numpy()}))
    for name in net.values:
        nodes, starts = net.segment([name], captured)
        assert len(nodes) == 1
        (value,) = executor.run_nodes(nodes, {s: captured[s] for s in starts}, [name]).values()
        assert value.numpy().tobytes() == captured[name].tobytes(), name


def test_a_given_value_is_read_as_given_and_returned_as_computed(tmp_path: Path) -> None:
    net = graph(tmp_path, "g (float[2] x) => (float[2] z) { y = Neg(x)  z = Abs(y) }")
    given = {"x": np.array([1, 2], np.float32), "y": np.array([10, -20], np.float32)}
    results = Executor(net).run_nodes(net.nodes, given, ["y", "z"])
    assert results["y"].tolist() == [-1, -2]
    assert results["z"].tolist() == [10, 20]
    with pytest.raises(InputError, match="'x' is needed"):
        Executor(net).run_nodes(net.nodes, {}, ["z"])


def test_where_each_arithmetic_rounds(tmp_path: Path) -> None:
    net = graph(
        tmp_path,
        "g (float[1,32] x) => (float[1,4] c, int64[K] s) { a = Mul(x, x) b = MatMul(a, w) c = Add(b, v) s = Shape(a) }",
        {"w": random(32, 4, seed=1), "v": random(4, seed=2)},
    )
    x = random(1, 32)
    w, v = (torch.tensor(net.initializer(n)) for n in "wv")
    a = torch.from_numpy(x * x)
    assert torch.equal(Executor(net, TF32).run({"x": x})["c"], round_tf32(a) @ round_tf32(w) + v)
    half = round_fp16(round_fp16(torch.from_numpy(x)) ** 2)
    expected = round_fp16(round_fp16(half @ round_fp16(w)) + round_fp16(v))
    assert torch.equal(Executor(net, FP16).run({"x": x})["c"], expected)
    for arithmetic in (BF16, FP16ACC, FP64):
        assert Executor(net, arithmetic).run({"x": x})["s"].tolist() == [1, 32]


def test_integers_and_parameters_are_never_rounded(tmp_path: Path) -> None:
    text = """g (float[1,1,3,3] x, int64[1] i) => (int64[1] j, float[A,B,C,D] r, int8[1,1,3,3] q, float[1,1,3,3] d) {
        j = Add(i, one)
        r = Resize <mode = "nearest"> (x, , scales)
        q = QuantizeLinear(x, step)
        d = DequantizeLinear(q, step) }"""
    step = np.float32(1.0001)
    weights = {
        "one": np.array([1]),
        "scales": np.array([1, 1, 1.3333334, 1.3333334], np.float32),
        "step": np.array(step),
    }
    net = graph(tmp_path, text.replace("(x, step)", "(x, step, zero)"), weights | {"zero": np.array(0, np.int8)})
    for name, arithmetic in ARITHMETICS.items():
        x = np.array(range(9), np.float32).reshape(1, 1, 3, 3)
        out = Executor(net, arithmetic).run({"x": x, "i": np.array([2**24])})
        assert out["j"].tolist() == [2**24 + 1], name
        assert out["r"].shape == (1, 1, 4, 4), name
        np.testing.assert_array_equal(out["d"].numpy().astype(np.float32), out["q"].numpy() * step, err_msg=name)


def test_casts_in_the_graph_are_executed_by_the_oracle_too(tmp_path: Path) -> None:
    net = graph(
        tmp_path,
        """g (float[2] x) => (float[2] y, float[2] z) {
            h = Cast <to = 10> (x)  y = Cast <to = 1> (h)  z = Cast <to = 1> (x) }""",
    )
    x = np.array([1 + 2**-20, 70000], np.float32)
    out = Executor(net, FP64).run({"x": x})
    assert out["y"].tolist() == [1.0, float("inf")]
    assert out["z"].tolist() == x.tolist()


def test_captured_narrow_types_come_in(tmp_path: Path) -> None:
    net = graph(tmp_path, "g (float[2] x) => (float[2] y) { y = Mul(x, x) }")
    for dtype in (np.float16, ml_dtypes.bfloat16, np.float64):
        assert Executor(net).run({"x": np.array([1.5, -2], dtype)})["y"].tolist() == [2.25, 4]


def test_fp8_and_four_bit_values_go_through_the_reference(tmp_path: Path) -> None:
    net = graph(
        tmp_path,
        "g (float[4] x) => (float[4] y) { q = QuantizeLinear(x, s, z)  y = DequantizeLinear(q, s, z) }",
        {"s": np.array(0.5, np.float32), "z": np.array(0, ml_dtypes.float8_e4m3fn)},
    )
    x = np.array([0.26, 1.13, -3, 1000], np.float32)
    expected = (x / 0.5).clip(-448, 448).astype(ml_dtypes.float8_e4m3fn).astype(np.float32) * 0.5
    assert Executor(net).run({"x": x})["y"].tolist() == expected.tolist()


def test_functions_and_control_flow_run_in_the_arithmetic(tmp_path: Path) -> None:
    text = """g (float[1,16] x, int64 n) => (float[1,16] y, float[K,1,16] ys) {
        cond = Constant <value = bool {1}> ()
        y, ys = Loop (n, cond, x) <body =
          step (int64 i, bool c, float[1,16] a) => (bool d, float[1,16] b, float[1,16] s) {
            d = Identity(c)
            b = own.twice <bias = 1.0> (a, w)
            s = Identity(b)
        }>
    }
    <domain: "own", opset_import: ["" : 21]>
    twice <bias> (a, w) => (b) {
        m = MatMul(a, w)
        k = Constant <value_float: float = @bias> ()
        b = Add(m, k)
    }"""
    w, x = random(16, 16, seed=1) / 4, random(1, 16)
    net = graph(tmp_path, text, {"w": w})
    assert not unsupported(net)
    expected, steps = torch.from_numpy(x), []
    for _ in range(3):
        expected = round_tf32(expected) @ round_tf32(torch.from_numpy(w)) + 1
        steps.append(expected)
    out = Executor(net, TF32).run({"x": x, "n": np.array(3)})
    assert torch.equal(out["y"], expected)
    assert torch.equal(out["ys"], torch.stack(steps))


def test_unknown_operators_are_named(tmp_path: Path) -> None:
    net = graph(tmp_path, "g (float[2] x) => (float[2] z) { y = own.Mystery(x)  z = Relu(y) }")
    assert [n.op for n in unsupported(net)] == ["own.Mystery"]
    with pytest.raises(NodeFailed, match="Mystery"):
        Executor(net).run({"x": random(2)})


def test_a_failing_node_is_named_with_its_shapes(tmp_path: Path) -> None:
    net = graph(tmp_path, "g (float[A,B] x) => (float[C] y) { y = MatMul(x, w) }", {"w": random(3, 4)})
    with pytest.raises(NodeFailed, match=r"'MatMul_0' \(MatMul\) failed on \(float32\[2, 5\], float32\[3, 4\]\)"):
        Executor(net).run({"x": random(2, 5)})
    with pytest.raises(InputError, match="input 'x' is missing"):
        Executor(net).run({})


@pytest.mark.parametrize(
    ("node", "said"),
    [
        ("y = Mul(x, w)", "the shapes of its inputs do not fit together"),
        ("y = MaxPool(x)", "its attribute 'kernel_shape' is missing"),
        ("y = Einsum<equation: ints = [1]>(x, w)", "its attribute 'equation' is of the type ints; expected string"),
        ("y = Tile(x, w)", "its input 1 (repeats) is float32[3, 4]; expected integers"),
        ("b = Cast<to: int = 9>(x)  y = MatMul(b, w)", "its input 0 (A) is bool[2, 5]; expected floats or integers"),
        ("c = Cast<to: int = 7>(x)  y = MatMul(c, w)", "its inputs 0 and 1 are of different types; expected one"),
        ("y = com.microsoft.QLinearAdd(x, , w, w, w, w, w)", "its input 1 (a_scale) is absent; expected one"),
        ("y = com.microsoft.BiasGelu(x, w, w)", "it has 3 inputs; expected 2 at most"),
        ("s = Cast<to: int = 8>(x)  y = Sinh(s)", "its input 0 (input) is string[2, 5]; expected floats"),
        ("s = Cast<to: int = 8>(x)  y = com.microsoft.BiasGelu(s, w)", "its input 0 is string[2, 5]; expected numbers"),
        ("s = SequenceConstruct(x)  y = Abs(s)", "its input 0 (X) is sequence of 1; expected floats or integers"),
    ],
)
def test_a_failing_node_says_which_rule_it_breaks(tmp_path: Path, node: str, said: str) -> None:
    """Never in words about Python's objects, of which who gave a file knows nothing."""
    net = graph(tmp_path, f"g (float[A,B] x) => (y) {{ {node} }}", {"w": random(3, 4)})
    with pytest.raises(NodeFailed) as failed:
        Executor(net).run({"x": random(2, 5)})
    assert said in str(failed.value)
    assert "Error" not in str(failed.value)


@pytest.mark.parametrize(
    ("node", "known", "other"),
    [
        ('DepthToSpace<blocksize=2, mode="{}">(x)', "CRD", "nearest"),
        ('RoiAlign<mode="{}">(x, rois, batch)', "max", "nearest"),
        ('RoiAlign<coordinate_transformation_mode="{}">(x, rois, batch)', "output_half_pixel", "asymmetric"),
    ],
)
def test_a_kernel_refuses_what_its_operator_does_not_know(tmp_path: Path, node: str, known: str, other: str) -> None:
    """Else another operator's word is as good a cause as its own."""
    weights = {"rois": np.float32([[0, 0, 2, 2]]), "batch": np.int64([0])}
    for word in (known, other):
        net = graph(tmp_path, f"g (float[1,4,3,3] x) => (y) {{ y = {node.format(word)} }}", weights)
        if word == known:
            assert Executor(net).run({"x": random(1, 4, 3, 3)})["y"].numel()
        else:
            with pytest.raises(InputError):
                Executor(net).run({"x": random(1, 4, 3, 3)})


def test_operators_without_a_schema_need_the_inputs_of_their_kernels(tmp_path: Path) -> None:
    for op, least in CONTRIB_INPUTS.items():
        kernel = KERNELS.get(f"com.microsoft.{op}") or KERNELS[op]
        taken = [*inspect.signature(kernel.function).parameters.values()][1:]
        assert least == max(
            i for i, p in enumerate(taken, 1) if p.default is p.empty and p.kind is not p.VAR_POSITIONAL
        )
        with pytest.raises(InputError, match=f"has {least - 1} of {least} inputs"):
            graph(tmp_path, f"g (float[2] x) => (y) {{ y = com.microsoft.{op}({', '.join('x' * (least - 1))}) }}")


def test_weights_beyond_the_cache_are_read_again(tmp_path: Path) -> None:
    net, x = conv_net(tmp_path), {"x": random(1, 8, 16, 16)}
    assert torch.equal(Executor(net, FP32, weight_cache=0).run(x)["y"], Executor(net, FP32).run(x)["y"])


def test_the_weights_that_were_used_last_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    net = graph(tmp_path, "g (float[1,4] x) => (float[1,4] y) { y = Add(x, a) }", {n: random(4, 4) for n in "abc"})
    read: list[str] = []
    original = net.initializer
    monkeypatch.setattr(net, "initializer", lambda name: read.append(name) or original(name))
    executor = Executor(net, FP32, weight_cache=2 * 64)  # room for two
    for name in "abacab":
        np.testing.assert_array_equal(executor.run_nodes([], {}, [name])[name], original(name))
    assert read == ["a", "b", "c", "b"]
    executor.free_memory()
    executor.run_nodes([], {}, ["a"])
    executor.run_nodes([], {}, ["b"])
    executor.run_nodes([], {}, ["a"])
    assert read == ["a", "b", "c", "b", "a", "b"]


def test_empty_tensors(tmp_path: Path) -> None:
    net = graph(
        tmp_path,
        "g (float[V,4] x) => (float[V,2] y, float[2] m) { h = MatMul(x, w)  y = Relu(h)  m = ReduceMax(y, axes) }",
        {"w": random(4, 2), "axes": np.array([1])},
    )
    for arithmetic in ARITHMETICS.values():
        assert Executor(net, arithmetic).run({"x": random(0, 4)})["y"].shape == (0, 2)


@pytest.mark.few(2)
@pytest.mark.parametrize(("count", "shape"), [(0, ()), (1, (0,)), (2, (2, 3)), (3, (1, 2, 1, 3))])
def test_whatever_a_kernel_raises_names_node_and_operator(tmp_path: Path, shape: tuple[int, ...], count: int) -> None:
    """Every operator with inputs, shapes and attributes that make no sense to most of them."""
    failed = 0
    for op in sorted(KERNELS):
        for attributes in (
            {},
            {"axis": 9, "axes": [7, -9], "group": 0, "perm": [4], "strides": [0], "kernel_shape": [0]},
        ):
            inputs = [f"x{i}" for i in range(count)]
            node = onnx.helper.make_node(op, inputs, ["y"], name="the node", **attributes)
            values = [onnx.helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, shape) for n in inputs]
            proto = onnx.helper.make_graph([node], "net", values, [onnx.ValueInfoProto(name="y")])
            proto.node[0].domain = "" if onnx.defs.has(op) else "com.microsoft"
            opsets = [onnx.helper.make_opsetid("", 21), onnx.helper.make_opsetid("com.microsoft", 1)]
            onnx.save(onnx.helper.make_model(proto, opset_imports=opsets, ir_version=10), tmp_path / "model.onnx")
            said = ""
            try:
                Executor(Graph(tmp_path / "model.onnx"), FP16).run({n: np.ones(shape, np.float32) for n in inputs})
            except NodeFailed as error:
                said = str(error)
            except InputError:
                continue  # the reader refuses the file
            if said:
                assert "node 'the node' (" in said
                assert f"{op}) " in said
                failed += 1
    assert failed


def test_a_node_whose_attributes_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    net = graph(tmp_path, "net (float[2] x) => (float[2] y) { y = Relu(x) }")
    monkeypatch.setattr(Call, "__post_init__", lambda *given: [][5])
    with pytest.raises(
        NodeFailed, match=r"\(Relu\) cannot be read: its inputs, attributes and bodies do not fit together$"
    ):
        Executor(net).run({"x": np.ones(2, np.float32)})


def test_the_names_in_a_function_are_its_own(tmp_path: Path) -> None:
    """Functions that call functions, with a name that the caller, the function and the one it calls all have."""
    text = """net (float[2,3] x) => (float[2,3] y) { t = Neg (x) \n y = own.outer (t) }
    <domain: "own", opset_import: ["" : 21, "own" : 1]>
    outer (a) => (o) { t = Add (a, a) \n u = own.inner (t) \n c = Constant <value_float = 2.0> () \n o = Mul (u, c) }
    <domain: "own", opset_import: ["" : 21]>
    inner (a) => (o) { t = Relu (a) \n c = Constant <value_float = 3.0> () \n o = Mul (t, c) }"""
    x = random(2, 3)
    for weights in ({}, {"c": np.float32(7)}):  # the main graph may have the name, too
        y = Executor(graph(tmp_path, text, weights)).run({"x": x})["y"]
        np.testing.assert_allclose(y.numpy(), 6 * np.maximum(-2 * x, 0), rtol=1e-6)


def test_windows_that_are_padded_alike_at_both_ends() -> None:
    def window(*pads: int) -> Window:
        return Window((3, 3), (1, 2), (1, 1), pads[:2], pads[2:])

    assert window(1, 2, 1, 2).symmetric
    assert not window(1, 2, 2, 1).symmetric
    assert window(1, 2, 3, 4).torch_pads() == [2, 4, 1, 3]
    assert window(1, 2, 3, 4).torch_pads([10, 20]) == [2, 24, 1, 13]
    assert window(1, 0, 1, 0).output_size((8, 8)) == (8, 3)
    assert window(0, 0, 0, 0).output_size((8, 8), ceil=True) == (6, 4)
    assert window(0, 0, 0, 1).output_size((8, 6), ceil=True) == (6, 3)
    assert split_padding([3, 2], extra_at_end=True) == (1, 1, 2, 1)
    assert split_padding([3, 2], extra_at_end=False) == (2, 1, 1, 1)


def one_node(folder: Path, op: str, inputs: dict[str, np.ndarray], domain: str = "", **attributes: Any) -> Graph:
    """A graph of one node that reads ``inputs`` in their order and gives y."""
    node = helper.make_node(op, list(inputs), ["y"], name="node", domain=domain, **attributes)
    given = [
        helper.make_tensor_value_info(n, helper.np_dtype_to_tensor_dtype(a.dtype), a.shape) for n, a in inputs.items()
    ]
    graph = helper.make_graph([node], "g", given, [helper.make_tensor_value_info("y", 1, None)])
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets), folder / "one.onnx")
    return Graph(folder / "one.onnx")


def test_a_bias_is_added_rounded_and_then_the_skip(tmp_path: Path) -> None:
    arrays = {"x": np.float32([[2048.0]]), "bias": np.float32([1.0]), "skip": np.float32([[0.25]])}
    graph = one_node(tmp_path, "BiasAdd", arrays, "com.microsoft")
    assert Executor(graph, FP64).run(arrays)["y"].item() == 2049.25
    assert Executor(graph, FP16).run(arrays)["y"].item() == 2048.0


@pytest.mark.parametrize(("fmod", "expected"), [(1, [1.5, -1.5]), (0, [1, 2])])
def test_remainders_have_the_sign_of_the_dividend_or_of_the_divisor(
    tmp_path: Path, fmod: int, expected: list[float]
) -> None:
    a, b = ([5.5, -5.5], [4, 4]) if fmod else ([5, -2], [4, 4])
    kind = np.float32 if fmod else np.int64
    arrays = {"a": np.array(a, kind), "b": np.array(b, kind)}
    found = Executor(one_node(tmp_path, "Mod", arrays, fmod=fmod), FP32).run(arrays)["y"]
    assert found.tolist() == expected


@pytest.mark.parametrize("op", ["ReduceL2", "ReduceL1", "ReduceSumSquare", "ReduceLogSum", "ReduceLogSumExp"])
def test_reductions_of_numbers_that_are_not_one(tmp_path: Path, op: str) -> None:
    x = np.float32([[3.0, 4.0], [0.5, 2.0]])
    arrays = {"x": x}
    want = {
        "ReduceL2": np.sqrt((x * x).sum(1)), "ReduceL1": np.abs(x).sum(1), "ReduceSumSquare": (x * x).sum(1),
        "ReduceLogSum": np.log(x.sum(1)), "ReduceLogSumExp": np.log(np.exp(x).sum(1)),
    }[op]  # fmt: skip
    graph = one_node(tmp_path, op, arrays, axes=[1], keepdims=0)
    assert np.allclose(Executor(graph, FP64).run(arrays)["y"].numpy(), want, rtol=1e-6)


def test_a_value_that_nobody_gave_is_named(tmp_path: Path) -> None:
    net = NetBuilder()
    net.op("Relu", net.op("Neg", "x", name="mid"), name="y")
    executor = Executor(Graph(net.save(tmp_path / "n.onnx", {"x": (1, [2])}, ["y"])), FP32)
    assert executor.run_nodes([], {"mid": np.float32([1, 2])}, ["mid"])["mid"].tolist() == [1, 2]
    with pytest.raises(InputError, match="value 'mid' is needed, but neither given nor computed"):
        executor.run_nodes([], {}, ["mid"])
