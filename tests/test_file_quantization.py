"""Quantized files of other people beside their float parent: judged by what their own nodes quantize."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
import torch
from nets import NetBuilder, second_like
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import (
    CalibrationDataReader,
    QuantFormat,
    QuantType,
    quantize_dynamic,
    quantize_static,
)
from onnxruntime.quantization.shape_inference import quant_pre_process
from torch import nn

from cp_debug.api.diagnose import diagnose
from cp_debug.backends.executor import Executor
from cp_debug.bisect.candidate_run import _prefer_own_names
from cp_debug.bisect.engine import Options, bisect
from cp_debug.bisect.file_quantization import FileQuantization
from cp_debug.graph.graph import Graph
from cp_debug.graph.spelled_out import spelled_out
from cp_debug.recipes.registry import load_model

node = helper.make_node


def parent(path, opset=17):
    """Conv, Relu, MaxPool, a residual Add, pooling, Gemm."""
    rng = np.random.default_rng(2)

    def weight(name, *shape, scale=1.0):
        return numpy_helper.from_array((rng.standard_normal(shape) * scale).astype(np.float32), name)

    weights = [weight("w0", 16, 3, 3, 3, scale=0.2), weight("b0", 16), weight("w1", 16, 16, 3, 3, scale=0.1)]
    weights += [weight("b1", 16), weight("gw", 10, 16), weight("gb", 10)]
    nodes = [
        node("Conv", ["x", "w0", "b0"], ["c0"], name="conv0", pads=[1] * 4),
        node("Relu", ["c0"], ["r0"], name="relu0"),
        node("MaxPool", ["r0"], ["p0"], name="pool", kernel_shape=[2, 2], strides=[2, 2]),
        node("Conv", ["p0", "w1", "b1"], ["c1"], name="conv1", pads=[1] * 4),
        node("Add", ["c1", "p0"], ["a1"], name="add"),
        node("Relu", ["a1"], ["r1"], name="relu1"),
        node("GlobalAveragePool", ["r1"], ["g"], name="gap"),
        node("Flatten", ["g"], ["f"], name="flat"),
        node("Gemm", ["f", "gw", "gb"], ["y"], name="fc", transB=1),
    ]
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, 16, 16])]
    graph = helper.make_graph(nodes, "g", inputs, [helper.make_tensor_value_info("y", 1, [1, 10])], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=9)
    onnx.save(onnx.shape_inference.infer_shapes(model), str(path))
    return path


class Reader(CalibrationDataReader):
    def __init__(self):
        rng = np.random.default_rng(0)
        self.samples = iter({"x": rng.standard_normal((1, 3, 16, 16)).astype(np.float32)} for _ in range(8))

    def get_next(self):
        return next(self.samples, None)


def quantized(folder, kind, opset=17):
    """Weights have 7 bits where their levels are signed: no sum of theirs saturates, whatever the processor."""
    source, target = str(parent(folder / "parent.onnx", opset)), str(folder / f"{kind}.onnx")
    if kind == "dynamic":
        quantize_dynamic(source, target, weight_type=QuantType.QUInt8)
    else:
        signed = kind in ("static-int8", "trt")
        options = {"ActivationSymmetric": True, "WeightSymmetric": True} if kind == "trt" else {}
        options |= {"UseQDQContribOps": True} if kind == "contrib" else {}
        quantize_static(
            source,
            target,
            Reader(),
            quant_format=QuantFormat.QOperator if kind == "qoperator" else QuantFormat.QDQ,
            activation_type=QuantType.QInt8 if signed else QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            per_channel=kind in ("static-int8", "trt"),
            reduce_range=True,
            extra_options=options,
        )
    return folder / "parent.onnx", folder / f"{kind}.onnx"


def accused(path, test, backends="ort,ort-none,ort-all"):
    result = bisect(str(path), backends, test_model=test, options=Options(explain=False))
    return [[row.name for row in run.guilty] for run in result.tests]


@pytest.mark.few(2)
@pytest.mark.parametrize("kind", ["static", "static-int8", "trt", "qoperator", "dynamic", "contrib"])
def test_a_well_quantized_file_accuses_nobody(tmp_path, kind):
    path, test = quantized(tmp_path, kind)
    assert accused(path, test, "ort,ort-none,ort-all,ort-int8") == [[], [], []]
    assert accused(test, None, "ort-none,ort-all") == [[]]


def dead(folder, kind):
    """As ``quantized``, of a network whose first Relu gives zeros alone, which have a scale of 1."""
    source = parent(folder / "alive.onnx")
    model = onnx.load(str(source))
    (bias,) = [t for t in model.graph.initializer if t.name == "b0"]
    bias.CopyFrom(numpy_helper.from_array(np.full(16, -50, np.float32), "b0"))
    onnx.save(model, str(folder / "parent.onnx"))
    target = str(folder / f"{kind.name}.onnx")
    types = {"activation_type": QuantType.QUInt8, "weight_type": QuantType.QInt8}
    quantize_static(str(folder / "parent.onnx"), target, Reader(), quant_format=kind, reduce_range=True, **types)
    return folder / "parent.onnx", folder / f"{kind.name}.onnx"


@pytest.mark.parametrize("kind", [QuantFormat.QDQ, QuantFormat.QOperator])
def test_a_bias_on_the_scale_that_integer_kernels_give_it_is_no_fault(tmp_path, kind):
    path, test = dead(tmp_path, kind)
    assert accused(path, test) == [[], []]


def test_a_bias_on_another_scale_than_that_of_data_times_weights_is_a_fault(tmp_path):
    path, test = dead(tmp_path, QuantFormat.QDQ)
    model = onnx.load(str(test))
    for tensor in model.graph.initializer:
        held = numpy_helper.to_array(tensor)
        if tensor.name == "b1_quantized":
            tensor.CopyFrom(numpy_helper.from_array(np.round(held / 8).astype(np.int32), tensor.name))
        elif tensor.name == "b1_quantized_scale":
            tensor.CopyFrom(numpy_helper.from_array(held * np.float32(8), tensor.name))
    onnx.save(model, str(test))
    assert accused(path, test, "ort,ort") == [["conv1"]]


@pytest.mark.parametrize(
    ("kind", "scale", "factor"), [("static", "p0_scale", 12), ("static", "p0_scale", 0.1), ("trt", "w1_scale", 10)]
)
def test_a_bad_scale_of_a_file_is_found(tmp_path, kind, scale, factor):
    path, test = quantized(tmp_path, kind)
    model = onnx.load(str(test))
    names = {t.name for t in model.graph.initializer}
    scale = scale if scale in names else next(n for n in sorted(names) if n.endswith("_scale") and n[0] in "rc")
    for tensor in model.graph.initializer:
        if tensor.name == scale:
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) * np.float32(factor), scale))
    onnx.save(model, str(test))
    (guilty,) = accused(path, test, "ort,ort-none")
    assert guilty


def _exchanged(model: onnx.ModelProto, op: str, places: tuple[int, int]) -> None:
    """Two inputs of the last node of an operator change places."""
    node = [n for n in model.graph.node if n.op_type == op][-1]
    node.input[places[0]], node.input[places[1]] = node.input[places[1]], node.input[places[0]]


def _other(model: onnx.ModelProto, op: str, place: int, make: Callable[[np.ndarray], object]) -> None:
    """Another constant in place of one that the last node of an operator reads, for this node alone."""
    node = [n for n in model.graph.node if n.op_type == op][-1]
    (held,) = (numpy_helper.to_array(t) for t in model.graph.initializer if t.name == node.input[place])
    node.input[place] += "_other"
    model.graph.initializer.append(numpy_helper.from_array(np.asarray(make(held), held.dtype), node.input[place]))


def _without_zero_points(model: onnx.ModelProto) -> None:
    node = [n for n in model.graph.node if n.op_type == "ConvInteger"][-1]
    del node.input[3:]


@pytest.mark.few(2)
@pytest.mark.parametrize(
    ("kind", "fault", "cause", "says"),
    [
        (
            "qoperator",
            partial(_other, op="QLinearConv", place=1, make=lambda s: 3 * s),
            "int8-scale",
            " in their scale: ",
        ),
        (
            "qoperator",
            partial(_other, op="QLinearConv", place=2, make=lambda z: z + 99),
            "int8-zero-point",
            " zero point",
        ),
        (
            "qoperator",
            partial(_other, op="QLinearConv", place=4, make=lambda s: 2 * s),
            "int8-weights",
            " 2 times those",
        ),
        ("qoperator", partial(_exchanged, op="QLinearAdd", places=(1, 4)), "int8-scale", " disagree in their scale: "),
        ("qoperator", partial(_other, op="QLinearConv", place=6, make=lambda s: s / 9), "int8-clipped", " is clipped"),
        (
            "dynamic",
            partial(_other, op="MatMulInteger", place=3, make=lambda z: z - 50),
            "int8-weights",
            "its zero points",
        ),
        ("dynamic", _without_zero_points, "int8-weights", "its zero points are "),
    ],
)
def test_what_an_operator_of_levels_is_told_wrongly_is_named(tmp_path: Path, kind, fault, cause, says) -> None:
    path, test = quantized(tmp_path, kind)
    model = onnx.load(str(test))
    fault(model)
    onnx.save(model, str(test))
    findings = bisect(str(path), "ort,ort", test_model=test).tests[0].findings
    told = [(finding.cause, finding.says) for finding in findings if not finding.evidence.get("declared")]
    assert any(c == cause and says in s for c, s in told), told


@pytest.mark.few(2)
@pytest.mark.parametrize("kind", ["qoperator", "dynamic"])
def test_operators_of_levels_spelled_out_compute_the_same(tmp_path: Path, kind: str) -> None:
    _, test = quantized(tmp_path, kind)
    graph = Graph(test)
    plain = spelled_out(graph)
    assert not [n.op for n in plain.nodes if "QLinear" in n.op or "Integer" in n.op or "QGemm" in n.op]
    x = next(Reader().samples)["x"]
    ours, theirs = (torch.as_tensor(Executor(g).run_nodes(g.nodes, {"x": x}, ["y"])["y"]) for g in (graph, plain))
    assert torch.allclose(ours, theirs, rtol=0, atol=0.02 * float(ours.abs().max())), "one level at most"


@pytest.mark.parametrize("bias", [True, False])
def test_a_product_of_levels_is_known_in_front_of_what_is_added_to_it(tmp_path: Path, bias: bool) -> None:
    """With a bias it is one layer, unless the parent has it apart."""
    made = NetBuilder(4)
    weight, added = (made.weight(made.rng.standard_normal(size).astype(np.float32)) for size in ((3, 2, 1, 1), 3))
    conv = made.op("Conv", "x", weight, name="conv")
    made.op("Add", conv, made.op("Reshape", added, made.weight(np.array([1, 3, 1, 1]))) if bias else added, name="y")
    plain = made.save(tmp_path / "plain.onnx", {"x": (1, [1, 2, 4, 3])}, ["y"])
    quantize_dynamic(plain, tmp_path / "file.onnx", weight_type=QuantType.QUInt8)
    graph = Graph(tmp_path / "file.onnx")
    assert spelled_out(graph).producer["y"].op == ("Conv" if bias else "Add")
    file = FileQuantization(Graph(plain), graph, {"x": "x", conv: conv, "y": "y"})
    assert file.touches([Graph(plain).producer[conv]])


def test_levels_that_are_asked_for_as_floats_keep_type_and_axis(tmp_path: Path) -> None:
    """A quantizer without a zero point says its type in an attribute, and the axis of its scales in another."""
    made, x = NetBuilder(4), np.random.default_rng(0).standard_normal((6, 8)).astype(np.float32)
    scale = made.weight(np.linspace(0.01, 0.1, 6, dtype=np.float32))
    levels = made.op("QuantizeLinear", "x", scale, name="levels", axis=0, output_dtype=int(TensorProto.INT8))
    made.op("DequantizeLinear", levels, scale, name="y", axis=0)
    graph = Graph(made.save(tmp_path / "file.onnx", {"x": (1, [6, 8])}, ["y"], opset=21))
    plain = spelled_out(graph, {levels})
    expected, found = (Executor(g).run_nodes(g.nodes, {"x": x}, ["y"])["y"] for g in (graph, plain))
    assert torch.equal(torch.as_tensor(found), torch.as_tensor(expected))
    assert torch.equal(torch.as_tensor(Executor(plain).run_nodes(plain.nodes, {"x": x}, [levels])[levels]), expected)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("shifted", [False, True])
def test_packed_levels_spelled_out_are_the_same_weight(tmp_path: Path, bits: int, shifted: bool) -> None:
    rng, (rows, columns, block) = np.random.default_rng(0), (6, 40, 16)
    blocks = -(-columns // block)
    constants = {
        "b": rng.integers(0, 256, (rows, blocks, block * bits // 8)).astype(np.uint8),
        "scales": rng.random((rows, blocks), np.float32),
        "zeros": rng.integers(0, 256, (rows, -(-blocks * bits // 8))).astype(np.uint8),
        "bias": rng.random(rows, np.float32),
    }
    sizes = {"K": columns, "N": rows, "bits": bits, "block_size": block}
    reads = ["x", "b", "scales", "zeros" if shifted else "", "", "bias"]
    packed = node("MatMulNBits", reads, ["y"], domain="com.microsoft", **sizes)
    graph = Graph(_saved(tmp_path / "net.onnx", [packed], ["y"], [3, columns], **constants))
    plain, x = spelled_out(graph), rng.random((3, columns), np.float32)
    assert [n.op for n in plain.nodes] == ["DequantizeLinear", "MatMul", "Add"]
    assert spelled_out(graph, unpacks=False) is graph
    ours, theirs = (torch.as_tensor(Executor(g).run_nodes(g.nodes, {"x": x}, ["y"])["y"]) for g in (graph, plain))
    assert torch.allclose(ours, theirs, rtol=1e-5)


def test_weights_that_the_optimizer_puts_on_levels_are_int8(tmp_path: Path) -> None:
    """ONNX Runtime quantizes the float weight of a layer between levels from its basic level on, and only there."""
    rng = np.random.default_rng(0)
    weights = {
        "w": rng.standard_normal((8, 6, 2, 2)).astype(np.float32),
        "scale": np.array(0.04, np.float32),
        "wide": np.array(0.1, np.float32),
        "zero": np.array(128, np.uint8),
    }

    def save(name: str, nodes: list[onnx.NodeProto]) -> Path:
        values = [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 8, 6, 6])]
        outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)]
        read = {i for n in nodes for i in n.input}
        constants = [numpy_helper.from_array(a, n) for n, a in weights.items() if n in read]
        graph = helper.make_graph(nodes, "g", values, outputs, constants)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
        onnx.save(model, tmp_path / name)
        return tmp_path / name

    plain = save("plain.onnx", [node("ConvTranspose", ["x", "w"], ["c"], name="up"), node("Relu", ["c"], ["y"])])
    file_nodes = [
        node("QuantizeLinear", ["x", "scale", "zero"], ["xq"], name="q"),
        node("DequantizeLinear", ["xq", "scale", "zero"], ["xd"], name="d"),
        node("ConvTranspose", ["xd", "w"], ["c"], name="up"),
        node("QuantizeLinear", ["c", "wide", "zero"], ["cq"], name="cq"),
        node("DequantizeLinear", ["cq", "wide", "zero"], ["cd"], name="cd"),
        node("Relu", ["cd"], ["y"]),
    ]
    file = save("file.onnx", file_nodes)
    assert accused(plain, file, "ort,ort-none,ort-basic,ort-all") == [[], [], []]


def test_values_without_axes_and_constants_that_the_quantizer_folded(tmp_path: Path) -> None:
    """A maximum over everything, and a branch of constants that the file holds as levels: both are put on a grid."""
    rng = np.random.default_rng(3)
    weights = {"w": rng.standard_normal((16, 8)).astype(np.float32), "low": np.float32(0), "high": np.float32(29)}
    weights |= {"step": np.float32(1), "sizes": np.array([1, 30, 1])}
    constants = [numpy_helper.from_array(np.asarray(a), n) for n, a in weights.items()]
    nodes = [
        node("MatMul", ["x", "w"], ["h"], name="product"),
        node("ReduceMax", ["h"], ["most"], name="most", keepdims=0),
        node("Sub", ["h", "most"], ["s"], name="less"),
        node("Range", ["low", "high", "step"], ["places"], name="places"),
        node("Sqrt", ["places"], ["roots"], name="roots"),
        node("Unsqueeze", ["roots", "last"], ["column"], name="column"),
        node("Add", ["s", "column"], ["y"], name="sum"),
    ]
    constants.append(numpy_helper.from_array(np.array([1]), "last"))
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [29, 16])
    out = helper.make_tensor_value_info("y", TensorProto.FLOAT, [29, 8])
    read = {i for n in nodes for i in n.input}
    graph = helper.make_graph(nodes, "g", [x], [out], [c for c in constants if c.name in read])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    path, prepared, file = (tmp_path / f"{n}.onnx" for n in ("plain", "prepared", "file"))
    onnx.save(model, path)

    class Samples(CalibrationDataReader):
        def __init__(self) -> None:
            self.left = iter({"x": rng.standard_normal((29, 16)).astype(np.float32)} for _ in range(4))

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(self.left, None)

    quant_pre_process(str(path), str(prepared), skip_symbolic_shape=True)
    quantize_static(str(prepared), str(file), Samples(), activation_type=QuantType.QUInt8)
    assert any(n.op_type == "DequantizeLinear" and "column" in n.output[0] for n in onnx.load(file).graph.node)
    assert accused(path, file, "ort,ort-none,ort-all,ort-int8") == [[], [], []]


def test_a_quantized_file_of_an_old_opset_is_read_again(tmp_path: Path) -> None:
    """The optimizer writes axes that DequantizeLinear of opset 11 does not have."""
    path, test = quantized(tmp_path, "static", opset=11)
    assert accused(path, test, "ort,ort-none,ort-basic,ort-all") == [[], [], []]
    assert accused(test, None, "ort-none,ort-all") == [[]]


def test_integer_operators_are_exact(tmp_path):
    """QLinearConv, ConvInteger, MatMulInteger and DynamicQuantizeLinear as ONNX Runtime computes them."""
    for kind in ("qoperator", "dynamic"):
        _, test = quantized(tmp_path, kind)
        result = bisect(str(test), "ort,emu-fp32", options=Options(replay=False))
        last = result.tests[0].outputs[0].stats
        assert last.finite_rel_l2 < 0.02


@pytest.mark.parametrize(("factor", "accused"), [(1.0, False), (2.0, False), (1 / 8, True), (16.0, True)])
def test_a_pair_on_data_alone_is_judged_by_its_own_scale(tmp_path: Path, factor: float, accused: bool) -> None:
    """Weights are in FP32: a scale for what the layer reads is sound, one that cuts off or is too coarse is not."""
    model = second_like(tmp_path / "net.onnx", depth=1, size=16)
    proto = onnx.load(model)
    place, relu = [(i, n) for i, n in enumerate(proto.graph.node) if n.op_type == "Relu"][2]
    (sample,) = load_model(str(model)).samples(1, 0, None)
    graph = Graph(model)
    (values,) = Executor(graph).run_nodes(graph.nodes, sample.arrays, relu.output).values()
    scale, zero = (
        numpy_helper.from_array(a, n)
        for a, n in ((np.array(factor * float(values.max()) / 127, np.float32), "qs"), (np.array(0, np.int8), "qz"))
    )
    proto.graph.initializer.extend([scale, zero])
    reader = next(n for n in proto.graph.node if relu.output[0] in n.input)
    for node in proto.graph.node:
        node.input[:] = ["dequantized" if name == relu.output[0] else name for name in node.input]
    pair = [
        helper.make_node("QuantizeLinear", [relu.output[0], "qs", "qz"], ["levels"], name="put_in"),
        helper.make_node("DequantizeLinear", ["levels", "qs", "qz"], ["dequantized"], name="taken_out"),
    ]
    for offset, node in enumerate(pair, 1):
        proto.graph.node.insert(place + offset, node)
    onnx.save(proto, tmp_path / "pair.onnx")
    (test,) = bisect(str(model), "ort,ort", test_model=tmp_path / "pair.onnx").tests
    assert [row.onnx for row in test.guilty] == ([reader.output[0]] if accused else [])
    (pair_row,) = (row for row in test.rows if row.onnx == reader.output[0])
    assert pair_row.replay.introduced > 1e-3  # INT8 did round here
    beside = [row.replay.expected for row in test.rows if row.replay and row.onnx != reader.output[0]]
    assert max(filter(None, beside)) < 1e-5  # all other layers are judged as FP32


def test_values_of_a_quantized_file_stand_for_their_namesakes() -> None:
    """The levels of x and of 20·x are the same numbers: paired by these, one may be taken for the other."""
    made = SimpleNamespace(producer=dict.fromkeys(["d", "m", "relu"]))
    operators = {"d": "Div", "d_quantized": "QuantizeLinear", "m": "DequantizeLinear", "relu": "Conv"}
    file = SimpleNamespace(producer={name: SimpleNamespace(op=op) for name, op in operators.items()})
    names = {"d": "d", "d_quantized": "m", "m": "m (test)", "relu_quantized": "relu", "relu": "conv"}
    _prefer_own_names(names, made, file)  # type: ignore[arg-type]
    assert names == {
        "d": "d",
        "d_quantized": "d_quantized (test)",
        "m": "m",
        "relu_quantized": "relu",
        "relu": "conv",  # its Relu was left out
    }


def test_the_whole_numbers_of_a_fused_softmax_are_no_fault(tmp_path: Path) -> None:
    """ONNX Runtime's QLinearSoftmax multiplies by 254 where the scale is 1 ÷ 255."""

    def number(name: str, value: object, kind: type) -> onnx.TensorProto:
        return numpy_helper.from_array(np.asarray(value, kind), name)

    ends = [number("s", 0.1, np.float32), number("z", 0, np.int8)]
    ends += [number("t", 1 / 255, np.float32), number("w", -128, np.int8)]
    pairs = [
        node("QuantizeLinear", ["x", "s", "z"], ["xq"]),
        node("DequantizeLinear", ["xq", "s", "z"], ["xd"]),
        node("Softmax", ["xd"], ["soft"], name="softmax", axis=-1),
        node("QuantizeLinear", ["soft", "t", "w"], ["yq"]),
        node("DequantizeLinear", ["yq", "t", "w"], ["y"]),
    ]
    plain = [node("Softmax", ["x"], ["y"], name="softmax", axis=-1)]
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 2])]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 2])]
    for name, nodes, initializers in (("plain", plain, []), ("quantized", pairs, ends)):
        graph = helper.make_graph(nodes, "g", inputs, outputs, initializers)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
        onnx.save(model, str(tmp_path / f"{name}.onnx"))
    np.savez(tmp_path / "x.npz", x=np.array([[9.0, 0.0]], np.float32))
    options = Options(inputs=tmp_path / "x.npz")
    (test,) = bisect(
        str(tmp_path / "plain.onnx"), "ort,ort-all", test_model=tmp_path / "quantized.onnx", options=options
    ).tests
    assert test.outputs[0].stats.max_abs > 0.5 / 255
    assert not test.guilty


@pytest.mark.parametrize(("kind", "channels"), [(QuantFormat.QDQ, True), (QuantFormat.QOperator, False)])
def test_rows_of_a_quantized_table_stand_for_its_numbers(tmp_path: Path, kind: QuantFormat, channels: bool) -> None:
    """A Gather of levels has the scale of whoever reads them."""
    rng = np.random.default_rng(3)
    tensors = {"table": rng.standard_normal((4, 8)), "w": rng.standard_normal((8, 8)) * 0.3}
    weights = [numpy_helper.from_array(t.astype(np.float32), name) for name, t in tensors.items()]
    nodes = [
        node("Gather", ["table", "k"], ["rows"], name="embedding"),
        node("Concat", ["rows", "x"], ["both"], name="both", axis=0),
        node("MatMul", ["both", "w"], ["m"], name="product"),
        node("Relu", ["m"], ["y"], name="relu"),
    ]
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, [4, 8])]
    inputs.append(helper.make_tensor_value_info("k", TensorProto.INT64, [4]))
    graph = helper.make_graph(nodes, "g", inputs, [helper.make_tensor_value_info("y", 1, [8, 8])], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.save(onnx.shape_inference.infer_shapes(model), str(tmp_path / "plain.onnx"))
    sample = {"x": rng.standard_normal((4, 8)).astype(np.float32), "k": np.array([0, 3, 2, 1])}
    reader = SimpleNamespace(get_next=iter([sample, None]).__next__)
    target = tmp_path / "quantized.onnx"
    options = {"quant_format": kind, "per_channel": channels, "weight_type": QuantType.QInt8}
    quantize_static(str(tmp_path / "plain.onnx"), str(target), reader, **options)
    (test,) = bisect(str(tmp_path / "plain.onnx"), "ort,ort-int8", test_model=target).tests
    assert "embedding" in {row.name for row in test.rows}
    assert not test.guilty


def test_the_fixed_range_of_a_softmax_of_levels_is_no_fault(tmp_path: Path) -> None:
    """The quantizer gives QLinearSoftmax levels up to 1, whatever the attention reaches: 0.11 here."""
    rng = np.random.default_rng(0)
    net = NetBuilder()
    q, k, v = (
        net.op("Transpose", net.op("Reshape", part, net.weight(np.array([1, 24, 4, 8]))), perm=[0, 2, 1, 3])
        for part in (
            net.op("MatMul", "x", net.weight(rng.standard_normal((32, 32)).astype(np.float32) / 9)) for _ in range(3)
        )
    )
    products = net.op("MatMul", q, net.op("Transpose", k, perm=[0, 1, 3, 2]))
    logits = net.op("Mul", products, net.weight(np.float32(0.35)), name="logits")
    net.op("MatMul", net.op("Softmax", logits, name="attention", axis=-1), v, name="y")
    path = net.save(tmp_path / "plain.onnx", {"x": (1, [1, 24, 32])}, ["y"])
    x = rng.standard_normal((1, 24, 32)).astype(np.float32)
    np.savez(tmp_path / "x.npz", x=x)
    reader = SimpleNamespace(get_next=iter([{"x": x}, None]).__next__)
    options = {"quant_format": QuantFormat.QOperator, "activation_type": QuantType.QInt8}
    quantize_static(str(path), str(tmp_path / "levels.onnx"), reader, **options)
    own = Options(inputs=tmp_path / "x.npz")
    (test,) = bisect(str(path), "ort,ort", test_model=tmp_path / "levels.onnx", options=own).tests
    assert "QLinearSoftmax" in {n.op_type for n in onnx.load(str(tmp_path / "levels.onnx")).graph.node}
    assert [row.name for row in test.guilty] == []


def _saved(path: Path, nodes: list[onnx.NodeProto], outputs: list[str], shape: list[int], **constants: object) -> Path:
    values = [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)]
    results = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs]
    stored = [numpy_helper.from_array(np.asarray(a), n) for n, a in constants.items()]
    graph = helper.make_graph(nodes, "g", values, results, stored)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), str(path))
    return path


def test_a_quantizer_that_the_optimizer_moved_in_front_rounds_what_it_reads(tmp_path: Path) -> None:
    """ONNX Runtime moves QuantizeLinear in front of Transpose: what that reads is then shown on the grid."""
    rng = np.random.default_rng(0)
    w = rng.standard_normal((4, 10)).astype(np.float32)
    ends = [node("Exp", ["x"], ["e"], name="exp"), node("Transpose", ["e"], ["t"], name="turn", perm=[1, 0])]
    plain = [*ends, node("MatMul", ["t", "w"], ["y"], name="product")]
    pair = [
        node("QuantizeLinear", ["t", "scale", "zero"], ["tq"], name="q"),
        node("DequantizeLinear", ["tq", "scale", "zero"], ["td"], name="d"),
        node("MatMul", ["td", "w"], ["y"], name="product"),
    ]
    x, zero = rng.uniform(-1, 0, (4, 12)).astype(np.float32), np.array(0, np.uint8)
    np.savez(tmp_path / "x.npz", x=x)
    parent_file = _saved(tmp_path / "plain.onnx", plain, ["y", "e"], [4, 12], w=w)

    def guilty(scale: float) -> list[str]:
        constants = {"w": w, "zero": zero, "scale": np.array(scale, np.float32)}
        file = _saved(tmp_path / "file.onnx", [*ends, *pair], ["y", "e"], [4, 12], **constants)
        options = Options(explain=False, inputs=tmp_path / "x.npz")
        (run,) = bisect(str(parent_file), "ort,ort-all", test_model=file, options=options).tests
        return [row.name for row in run.guilty]

    assert guilty(float(np.exp(x).max()) / 255) == []
    assert guilty(float(np.exp(x).max()) / 12) == ["exp"]  # a grid that is twenty times too coarse


def test_a_quantizer_that_reads_infinity_has_a_scale_for_the_rest(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    w, s, z = rng.standard_normal((8, 8)).astype(np.float32), np.array(0.03, np.float32), np.array(128, np.uint8)
    x = rng.standard_normal((6, 8)).astype(np.float32)
    x[2, 3] = 0
    np.savez(tmp_path / "x.npz", x=x)
    first, last = node("Div", ["one", "x"], ["r"], name="reciprocal"), node("Tanh", ["p"], ["y"], name="end")
    one = np.array(1e-2, np.float32)
    product = [node("MatMul", ["r", "w"], ["p"], name="product"), last]
    plain = _saved(tmp_path / "plain.onnx", [first, *product], ["y"], [6, 8], w=w, one=one)
    pair = [
        node("QuantizeLinear", ["r", "s", "z"], ["rq"], name="q"),
        node("DequantizeLinear", ["rq", "s", "z"], ["rd"], name="d"),
        node("MatMul", ["rd", "w"], ["p"], name="product"),
        last,
    ]
    file = _saved(tmp_path / "file.onnx", [first, *pair], ["y"], [6, 8], w=w, one=one, s=s, z=z)
    options = Options(explain=False, inputs=tmp_path / "x.npz")
    (run,) = bisect(str(plain), "ort,ort-int8", test_model=file, options=options).tests
    replay = next(row.replay for row in run.rows if row.name == "product")
    assert replay is not None
    assert replay.expected is not None
    assert replay.expected > 1e-3  # of rounding to 8 bits, whatever is infinite beside it


def test_noise_of_levels_is_measured_in_what_they_stand_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from cp_debug.bisect import observe

    path, test = quantized(tmp_path, "qoperator")
    honest = observe.gap
    monkeypatch.setattr(observe, "gap", lambda a, b: honest(a, b) or 1e-9)  # as where threads change a sum
    (run,) = bisect(str(path), "ort,ort-int8", test_model=test, options=Options(explain=False)).tests
    assert len(run.rows) > 4
    assert max(row.noise_floor for row in run.rows) < 1e-3


def test_a_file_of_our_own_quantizer_accuses_nobody_whatever_the_backend_is_called(tmp_path: Path) -> None:
    from cp_debug import quantize

    path = parent(tmp_path / "net.onnx")
    rng = np.random.default_rng(0)
    for index in range(4):
        np.savez(tmp_path / f"{index}.npz", x=rng.standard_normal((1, 3, 16, 16)).astype(np.float32))
    written = quantize(path, tmp_path / "int8", inputs=tmp_path)
    (file,) = (f for f in written.files if f.suffix == ".onnx")
    options = Options(explain=False, inputs=tmp_path)
    for run in bisect(str(path), "ort,ort,ort-all,ort-int8", test_model=file, options=options).tests:
        assert [row.name for row in run.guilty] == []
        assert run.agrees
        assert any(row.replay is not None and row.replay.step for row in run.rows)


def _embedding(tmp_path: Path) -> Path:
    """An embedding in front of a product, quantized dynamically: its levels have a scale far behind them."""
    rng = np.random.default_rng(5)
    nodes = [
        node("Gather", ["table", "k"], ["rows"], name="embedding"),
        node("Transpose", ["rows"], ["turned"], name="turn", perm=[1, 0]),
        node("MatMul", ["turned", "w"], ["y"], name="product"),
    ]
    tensors = {"table": rng.standard_normal((32, 8)) + 0.3, "w": rng.standard_normal((16, 8)) * 0.3}
    weights = [numpy_helper.from_array(t.astype(np.float32), name) for name, t in tensors.items()]
    inputs = [helper.make_tensor_value_info("k", TensorProto.INT64, [16])]
    graph = helper.make_graph(nodes, "g", inputs, [helper.make_tensor_value_info("y", 1, [8, 8])], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.save(onnx.shape_inference.infer_shapes(model), str(tmp_path / "plain.onnx"))
    np.savez(tmp_path / "k.npz", k=rng.permutation(32)[:16])
    quantize_dynamic(str(tmp_path / "plain.onnx"), str(tmp_path / "q.onnx"), weight_type=QuantType.QUInt8)
    return tmp_path / "q.onnx"


@pytest.mark.parametrize("backends", ["ort,ort-int8", "ort,ort-all"])
def test_levels_read_by_an_integer_product_stand_for_numbers(tmp_path: Path, backends: str) -> None:
    """The Mul behind MatMulInteger has the scales of both its operands; a wrong level of the table is found."""
    file = _embedding(tmp_path)
    options = Options(inputs=tmp_path / "k.npz")
    assert any(n.op_type == "MatMulInteger" for n in onnx.load(file).graph.node)
    (test,) = bisect(str(tmp_path / "plain.onnx"), backends, test_model=file, options=options).tests
    assert {"embedding", "turn"} <= {row.name for row in test.rows}
    assert not test.guilty
    (finding,) = test.findings  # scales that are computed as it runs are INT8, too
    assert finding.cause == "int8"
    assert finding.says.startswith("INT8 as declared; of ")
    assert "leave it unquantized" in finding.fix or finding.fix.startswith("leave unquantized: ")
    model = onnx.load(file)
    (table,) = (t for t in model.graph.initializer if t.name == "table_quantized")
    levels = numpy_helper.to_array(table).copy()
    levels[np.load(tmp_path / "k.npz")["k"][3]] = 7
    table.CopyFrom(numpy_helper.from_array(levels, table.name))
    onnx.save(model, file)
    (test,) = bisect(str(tmp_path / "plain.onnx"), backends, test_model=file, options=options).tests
    assert [row.name for row in test.guilty] == ["embedding"]


def test_levels_whose_scale_nobody_knows_are_no_floats(tmp_path: Path) -> None:
    """Levels of a dynamic scale that are called as the parent's floats are not compared; what follows is."""
    rng = np.random.default_rng(6)
    w = (rng.standard_normal((8, 8)) * 0.3).astype(np.float32)
    plain = [
        node("Transpose", ["x"], ["t"], name="turn", perm=[1, 0]),
        node("MatMul", ["t", "w"], ["y"], name="product"),
    ]
    scale = np.float32(np.abs(w).max() / 127)
    file = [
        node("DynamicQuantizeLinear", ["x"], ["levels", "s", "z"], name="q"),
        node("Transpose", ["levels"], ["t"], name="turn", perm=[1, 0]),
        node("MatMulInteger", ["t", "codes", "z"], ["sums"], name="product"),
        node("Cast", ["sums"], ["floats"], name="cast", to=TensorProto.FLOAT),
        node("Mul", ["s", "ws"], ["both"], name="scales"),
        node("Mul", ["floats", "both"], ["y"], name="scaled"),
    ]
    parent = _saved(tmp_path / "plain.onnx", plain, ["y"], [8, 8], w=w)
    codes = np.round(w / scale).astype(np.int8)
    quantized = _saved(tmp_path / "q.onnx", file, ["y"], [8, 8], codes=codes, ws=scale)
    (test,) = bisect(str(parent), "ort,ort-int8", test_model=quantized).tests
    assert [row.name for row in test.rows if row.onnx == "y"] == ["product"]
    assert "turn" not in {row.name for row in test.rows}
    assert not test.guilty


@pytest.mark.parametrize("backends", ["ort,ort-int8", "ort,ort-all"])
def test_a_quantized_layer_that_decides_is_no_float(tmp_path: Path, backends: str) -> None:
    """A comparison of quantized data gives booleans: there is no error in them that scales could explain."""
    rng = np.random.default_rng(8)
    w = (rng.standard_normal((8, 8)) * 0.3).astype(np.float32)
    nodes = [
        node("MatMul", ["x", "w"], ["m"], name="product"),
        node("Greater", ["m", "limit"], ["large"], name="decides"),
        node("Where", ["large", "m", "limit"], ["y"], name="chosen"),
    ]
    parent = _saved(tmp_path / "plain.onnx", nodes, ["y"], [8, 8], w=w, limit=np.float32(0.1))
    sample = {"x": rng.standard_normal((8, 8)).astype(np.float32)}
    reader = SimpleNamespace(get_next=iter([sample, None]).__next__)
    operators = ["MatMul", "Greater", "Where"]
    quantize_static(str(parent), str(tmp_path / "q.onnx"), reader, op_types_to_quantize=operators)
    np.savez(tmp_path / "x.npz", **sample)
    options = Options(inputs=tmp_path / "x.npz")
    (test,) = bisect(str(parent), backends, test_model=tmp_path / "q.onnx", options=options).tests
    assert "decides" in {row.name for row in test.rows}
    assert not test.guilty


@pytest.mark.parametrize("axis", [0, 1, 2, -1])
@pytest.mark.parametrize("backends", ["ort,ort", "ort,ort-all"])
def test_a_quantized_file_agrees_with_itself_whatever_the_axis_of_its_scales(
    tmp_path: Path, axis: int, backends: str
) -> None:
    shape = (2, 3, 4)
    scales = numpy_helper.from_array(np.linspace(0.1, 0.5, shape[axis]).astype(np.float32), "s")
    points = numpy_helper.from_array(np.zeros(shape[axis], np.int8), "z")
    nodes = [
        node("QuantizeLinear", ["x", "s", "z"], ["q"], name="quantize", axis=axis),
        node("DequantizeLinear", ["q", "s", "z"], ["d"], name="dequantize", axis=axis),
        node("Relu", ["d"], ["y"], name="relu"),
    ]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in ("x", "y")]
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], [scales, points])
    path = tmp_path / "net.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    result = diagnose(path, backends, test_model=path)
    assert result.agrees


def test_a_single_number_that_arrives_beyond_its_range_was_inherited(tmp_path: Path) -> None:
    """The scale fits the parent's number; what comes in is three times as large, because an earlier layer is wrong."""
    rng = np.random.default_rng(10)
    w, x = (rng.standard_normal((16, 1)) * 0.3).astype(np.float32), rng.standard_normal((1, 16)).astype(np.float32)
    w *= -np.sign(x @ w)
    bias, step = np.float32(-0.4), np.float32(float(abs(x @ w)[0, 0]) / 231.4)
    plain = [node("MatMul", ["x", "w"], ["m"], name="product"), node("Add", ["m", "b"], ["y"], name="sum")]
    file = [
        node("MatMul", ["x", "w2"], ["m"], name="product"),
        node("QuantizeLinear", ["m", "s", "z"], ["m_QuantizeLinear_Output"], name="q"),
        node("DequantizeLinear", ["m_QuantizeLinear_Output", "s", "z"], ["d"], name="dq"),
        node("Add", ["d", "b"], ["y"], name="sum"),
    ]
    parent = _saved(tmp_path / "plain.onnx", plain, ["y"], [1, 16], w=w, b=bias)
    quantized = _saved(tmp_path / "q.onnx", file, ["y"], [1, 16], w2=3 * w, b=bias, s=step, z=np.int8(127))
    np.savez(tmp_path / "x.npz", x=x)
    options = Options(inputs=tmp_path / "x.npz")
    (test,) = bisect(str(parent), "ort,ort-int8", test_model=quantized, options=options).tests
    assert [row.name for row in test.guilty] == ["product"]


@pytest.mark.parametrize("kind", [TensorProto.UINT4, TensorProto.INT4])
def test_data_in_four_bits_ends_in_a_verdict(tmp_path: Path, kind: int) -> None:
    """Their zero point is of a type that torch lacks."""
    rng = np.random.default_rng(10)
    w = (rng.standard_normal((4, 4)) * 0.3).astype(np.float32)
    plain = [node("MatMul", ["x", "w"], ["y"], name="product")]
    parent = _saved(tmp_path / "plain.onnx", plain, ["y"], [2, 4], w=w)
    pair = [
        node("QuantizeLinear", ["x", "s", "z"], ["x_QuantizeLinear_Output"], name="q"),
        node("DequantizeLinear", ["x_QuantizeLinear_Output", "s", "z"], ["d"], name="dq"),
        node("MatMul", ["d", "w"], ["y"], name="product"),
    ]
    file = _saved(tmp_path / "q.onnx", pair, ["y"], [2, 4], w=w, s=np.float32(0.3))
    model = onnx.load(file)
    model.graph.initializer.append(helper.make_tensor("z", kind, [], [0]))
    model.opset_import[0].version, model.ir_version = 21, 10
    onnx.save(model, file)
    (test,) = bisect(str(parent), "ort,emu-fp32", test_model=file).tests
    assert any(row.onnx == "y" and row.replay is not None for row in test.rows)


def test_a_quantizer_that_the_optimizer_moves_in_front_of_a_transpose_accuses_nobody(tmp_path):
    """One file on both sides: at level 1 ONNX Runtime moves the Transpose behind the pair, and shows it rounded."""
    made = NetBuilder(4)

    def weight(*shape):
        return made.weight(made.rng.standard_normal(shape).astype(np.float32))

    def pair(value, scale):
        own = made.weight(np.float32(scale)), made.weight(np.int8(0))
        return made.op("DequantizeLinear", made.op("QuantizeLinear", value, *own), *own)

    value = made.op("Add", made.op("MatMul", pair("x", 0.03), weight(8, 8)), weight(8))
    value = made.op("Reshape", value, made.weight(np.array([1, 6, 2, 4])))
    turned = made.op("Transpose", value, perm=[0, 2, 1, 3], name="turned")
    made.op("MatMul", pair(turned, 0.08), pair(weight(4, 5), 0.02), name="y")
    path = made.save(tmp_path / "net.onnx", {"x": (1, [1, 6, 8])}, ["y"])
    (test,) = bisect(str(path), "ort-none,ort-basic").tests
    (row,) = (row for row in test.rows if row.onnx == "turned")
    assert row.stats.rel_l2 > 0.01
    assert test.guilty == []


def test_a_result_that_leaves_the_file_as_numbers_is_read_inside_as_levels(tmp_path):
    """``k`` is an output, dequantized for it; the product reads the levels in front of that. Given ``k`` alone, it is
    known what the file's own nodes make of it."""
    made = NetBuilder(4)
    weight = made.weight(made.rng.standard_normal((8, 4)).astype(np.float32))
    k = made.op("Add", "x", made.weight(made.rng.standard_normal(8).astype(np.float32)), name="k")
    made.op("MatMul", k, weight, name="y")
    plain = made.save(tmp_path / "plain.onnx", {"x": (1, [6, 8])}, ["k", "y"])

    samples = iter({"x": np.random.default_rng(i).standard_normal((6, 8)).astype(np.float32)} for i in range(4))

    class Samples(CalibrationDataReader):
        def get_next(self):
            return next(samples, None)

    quantize_static(plain, tmp_path / "file.onnx", Samples(), quant_format=QuantFormat.QOperator)
    graphs = Graph(plain), Graph(tmp_path / "file.onnx")
    (levels,) = graphs[1].producer["k"].proto.input[:1]
    assert levels in {name for node in graphs[1].nodes if "MatMul" in node.op for name in node.inputs}
    file = FileQuantization(*graphs, {"x": "x", "k": "k", "y": "y"})
    declared = file.declared("y", {"x", "k", "y"}, {"k": np.zeros((6, 8), np.float32)})
    assert declared is not None
    assert float(declared.abs().max()) < 0.1


def test_levels_of_a_weight_without_a_zero_point_have_the_sign_of_their_type(tmp_path):
    made = NetBuilder(4)
    made.op("MatMul", "x", made.weight(made.rng.standard_normal((8, 4)).astype(np.float32)), name="y")
    plain = Graph(made.save(tmp_path / "plain.onnx", {"x": (1, [6, 8])}, ["y"]))
    held = NetBuilder(4)
    levels, scale = held.weight(held.rng.integers(-127, 128, (8, 4)).astype(np.int8)), held.weight(np.float32(0.5))
    held.op("MatMul", "x", held.op("DequantizeLinear", levels, scale), name="y")
    file = Graph(held.save(tmp_path / "file.onnx", {"x": (1, [6, 8])}, ["y"]))
    (product,) = plain.nodes
    grid = FileQuantization(plain, file, {"x": "x", "y": "y"}).grid(product, 1)
    assert grid is not None
    assert grid.range == (-64.0, 63.5)


def test_a_relu_that_a_quantizer_drops_behind_a_reshape_is_named(tmp_path):
    """Of a batched product ONNX Runtime makes Gemm, Reshape and Relu; its quantizer leaves out the Relu, but the Gemm's
    scale has negative levels. What passes then is clipped where the next scale, calibrated behind the Relu, ends."""
    made = NetBuilder(4)

    def layer(value, *shape):
        weight = made.weight(made.rng.standard_normal(shape).astype(np.float32) / 4)
        return made.op("Add", made.op("MatMul", value, weight), made.weight(np.full(shape[1], -0.5, np.float32)))

    made.op("Sin", layer(made.op("Relu", layer("x", 12, 16)), 16, 8), name="y")
    plain = made.save(tmp_path / "plain.onnx", {"x": (1, [2, 16, 12])}, ["y"])
    samples = iter({"x": np.random.default_rng(i).standard_normal((2, 16, 12)).astype(np.float32)} for i in range(4))

    class Samples(CalibrationDataReader):
        def get_next(self):
            return next(samples, None)

    quant_pre_process(plain, str(tmp_path / "pre.onnx"), skip_symbolic_shape=True)
    options = {"quant_format": QuantFormat.QOperator, "activation_type": QuantType.QUInt8}
    quantize_static(str(tmp_path / "pre.onnx"), tmp_path / "file.onnx", Samples(), reduce_range=True, **options)
    assert "Relu" not in {node.op for node in Graph(tmp_path / "file.onnx").nodes}
    (test,) = bisect(str(plain), "ort,ort-all", test_model=tmp_path / "file.onnx").tests
    assert [row.op for row in test.guilty] == ["Add"]
    assert test.findings[0].cause == "missing-activation"


def test_a_quantized_file_that_overflows_in_fp16_is_no_set_of_the_references_nodes(tmp_path: Path) -> None:
    """The nodes of the two files have other names: none of the reference's can be kept in FP32 in the other."""
    files = []
    for prefix in ("", "other_"):
        made = NetBuilder(0)
        x = "x"
        if prefix:
            grid = made.weight(np.float32([4 / 127])[0]), made.weight(np.array(0, np.int8))
            x = made.op("DequantizeLinear", made.op("QuantizeLinear", x, *grid), *grid)
        weights = [made.weight((made.rng.standard_normal((16, 16)) / 4).astype(np.float32)) for _ in range(2)]
        m = made.op("MatMul", x, weights[0], name=f"{prefix}m")
        up = made.op("Mul", m, made.weight(np.float32([40000])), name=f"{prefix}up")
        down = made.op("Mul", up, made.weight(np.float32([1 / 40000])), name=f"{prefix}down")
        made.op("MatMul", down, weights[1], name="y")
        files.append(made.save(tmp_path / f"{prefix}net.onnx", {"x": (1, [8, 16])}, ["y"], opset=17))
    (test,) = bisect(str(files[0]), "ort,emu-fp16", test_model=files[1]).tests
    (finding,) = test.findings
    assert finding.cause == "fp16-overflow"
    assert finding.fix == "scale the layer down and its reader up, or keep these nodes in FP32: node_up"


def test_scales_for_data_50_times_too_large_are_named_where_a_quantizer_replaces_the_relu(tmp_path: Path) -> None:
    """``quantize_static`` drops a Relu whose levels end at 0, and gives its name to what the convolution makes."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 1)]
    path, target, rng = tmp_path / "net.onnx", tmp_path / "int8.onnx", np.random.default_rng(0)
    model, shape = nn.Sequential(*layers).eval(), (1, 3, 16, 16)
    torch.onnx.export(model, torch.zeros(shape), str(path), dynamo=False, input_names=["x"], opset_version=17)
    samples = [{"x": 50 * rng.standard_normal(shape).astype(np.float32)} for _ in range(4)]
    quantize_static(str(path), str(target), SimpleNamespace(get_next=iter([*samples, None]).__next__))
    np.savez(tmp_path / "x.npz", x=rng.standard_normal(shape).astype(np.float32))
    (test,) = bisect(str(path), "ort,ort", test_model=target, options=Options(inputs=tmp_path / "x.npz")).tests
    assert [row.op for row in test.guilty] == ["Relu", "Relu", "Conv"]
    (finding,) = test.findings
    assert finding.cause == "int8-coarse"
    assert "of its input is 57" in finding.says


def test_a_coarse_scale_of_a_result_is_not_told_by_the_one_element_that_it_clips(tmp_path: Path) -> None:
    """Levels of 0.2 that end at 0.2: what is lost is lost between them, but for one element of 0.4."""
    net = NetBuilder(0)
    x = -net.rng.random((64, 16)).astype(np.float32)
    net.op("MatMul", "x", net.weight(np.eye(16, dtype=np.float32)), name="h")
    net.op("Neg", "h", name="y")
    path, target = net.save(tmp_path / "a.onnx", {"x": (1, [64, 16])}, ["y"]), tmp_path / "b.onnx"
    x[0] = np.eye(16, dtype=np.float32)[0] * np.float32(0.4)
    model = onnx.load(path)
    grid = [numpy_helper.from_array(np.float32(0.2), "s"), numpy_helper.from_array(np.int8(126), "z")]
    model.graph.initializer.extend(grid)
    model.graph.node[0].output[0] = "before"
    pair = [helper.make_node("QuantizeLinear", ["before", "s", "z"], ["q"])]
    pair.append(helper.make_node("DequantizeLinear", ["q", "s", "z"], ["h"]))
    for place, node in enumerate(pair, 1):
        model.graph.node.insert(place, node)
    onnx.save(model, target)
    np.savez(tmp_path / "x.npz", x=x)
    (test,) = bisect(str(path), "ort,ort", test_model=target, options=Options(inputs=tmp_path / "x.npz")).tests
    (finding,) = test.findings
    assert (finding.cause, finding.layers) == ("int8-coarse", ["node_h"])


def test_a_file_that_quantizes_weights_alone_has_every_cause_tried(tmp_path: Path) -> None:
    net = NetBuilder(0)
    weight = net.rng.standard_normal((32, 32)).astype(np.float32)
    net.op("Relu", net.op("MatMul", "x", net.weight(weight), name="h"), name="y")
    path, target, inputs = (
        net.save(tmp_path / "a.onnx", {"x": (1, [4, 32])}, ["y"]),
        tmp_path / "b.onnx",
        tmp_path / "x",
    )
    model = onnx.load(path)
    step = np.abs(weight).max() / 127
    levels = np.round(weight / step).astype(np.int8)
    levels[:, 3] = levels[:, 4]
    name = model.graph.initializer.pop().name
    model.graph.initializer.extend([numpy_helper.from_array(levels, "q"), numpy_helper.from_array(step, "s")])
    model.graph.node.insert(0, helper.make_node("DequantizeLinear", ["q", "s"], [name]))
    onnx.save(model, target)
    np.savez(inputs, x=net.rng.standard_normal((4, 32)).astype(np.float32))
    options = Options(inputs=inputs.with_suffix(".npz"))
    (test,) = bisect(str(path), "ort,ort", test_model=target, options=options).tests
    assert test.guilty
    assert not [note for note in test.notes if "not every cause could be tried" in note]


def test_layers_of_a_well_quantized_file_have_shares(tmp_path: Path) -> None:
    """INT8 costs something everywhere, and within its tolerance, too, somebody asks where."""
    net = NetBuilder(0)
    value = "x"
    for i in range(2):
        weight = net.weight(net.rng.standard_normal((32, 32)).astype(np.float32) / 6)
        value = net.op("MatMul", value, weight, name=f"product{i}")
    path, target = net.save(tmp_path / "a.onnx", {"x": (1, [64, 32])}, [value]), tmp_path / "b.onnx"
    sample = {"x": net.rng.standard_normal((64, 32)).astype(np.float32)}
    quantize_static(str(path), str(target), SimpleNamespace(get_next=iter([sample, None]).__next__))
    np.savez(tmp_path / "x.npz", **sample)
    (test,) = bisect(str(path), "ort,ort", test_model=target, options=Options(inputs=tmp_path / "x.npz")).tests
    assert test.agrees
    assert test.attribution is not None
    assert sum(row.share or 0.0 for row in test.rows) == pytest.approx(1, abs=0.1)


def test_a_chain_that_an_optimizer_fused_is_left_unquantized_by_all_of_its_nodes(tmp_path: Path) -> None:
    """Nothing between the input and the result is shown: what was tried is the whole chain, not its last node."""
    torch.manual_seed(3)
    layers = [nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 12, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    path, target, rng = tmp_path / "net.onnx", tmp_path / "int8.onnx", np.random.default_rng(0)
    model, shape = nn.Sequential(*layers, nn.Linear(12, 5)).eval(), (1, 3, 16, 16)
    torch.onnx.export(model, torch.zeros(shape), str(path), dynamo=False, input_names=["x"], opset_version=17)
    samples = [{"x": rng.standard_normal(shape).astype(np.float32)} for _ in range(4)]
    reader = SimpleNamespace(get_next=iter([*samples, None]).__next__)
    quantize_static(str(path), str(target), reader, reduce_range=True)  # sums without VNNI saturate otherwise
    np.savez(tmp_path / "x.npz", **samples[0])
    (test,) = bisect(str(path), "ort,ort-all", test_model=target, options=Options(inputs=tmp_path / "x.npz")).tests
    (finding,) = test.findings
    chain = "/0/Conv, /1/Relu, /2/Conv, /3/GlobalAveragePool, /5/Gemm"
    assert finding.fix.startswith(f"leave unquantized: {chain} (data, weights and result in FP32): ")


@pytest.mark.few(2)
@pytest.mark.parametrize("of", ["input", "weights", "result"])
def test_one_channel_that_takes_the_levels_of_all_is_told(tmp_path: Path, of: str) -> None:
    files, rng = [], np.random.default_rng(0)
    large = np.where(np.arange(32) == 5, np.float32(16), np.float32(1))
    weight = rng.standard_normal((32, 32), np.float32) / 6 * (large if of == "weights" else 1)
    x = rng.standard_normal((64, 32), np.float32) * (large if of == "input" else 1)
    for quantized in (False, True):
        net = NetBuilder()

        def pair(value: str, most: float, wanted: bool, net: NetBuilder = net, quantized: bool = quantized) -> str:
            grid = net.weight(np.float32(most / 127)), net.weight(np.int8(0))
            made = net.op("QuantizeLinear", value, *grid) if wanted and quantized else ""
            return net.op("DequantizeLinear", made, *grid) if made else value

        data = pair("x", np.abs(x).max(), of == "input")
        made = net.op("MatMul", data, pair(net.weight(weight), np.abs(weight).max(), of == "weights"), name="made")
        if of == "result":
            made = net.op("Mul", made, net.weight(large), name="large")
        net.op("Abs", pair(made, 60.0, of == "result"), name="y")
        files.append(net.save(tmp_path / f"{quantized}.onnx", {"x": (1, [64, 32])}, ["y"], opset=17))
    np.savez(tmp_path / "x.npz", x=x)
    (test,) = bisect(str(files[0]), "ort,ort", test_model=files[1], options=Options(inputs=tmp_path / "x.npz")).tests
    told = [f for f in test.findings if f"; channel 5 of its {of.replace('result', 'input')} reaches " in f.says]
    assert told, [finding.says for finding in test.findings]
    assert ("per channel" in told[0].fix) == (of == "weights")
