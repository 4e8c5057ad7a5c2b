"""Files in FP16 or BF16, and mixed ones: every node is judged by what the file declares for it."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper

from cp_debug.bisect.engine import Options, bisect
from cp_debug.bisect.recording import compare_captures, record
from cp_debug.graph.graph import Graph
from cp_debug.graph.half_precision import narrow_values
from cp_debug.probes.capture import Capture
from cp_debug.recipes.registry import load_model
from cp_debug.recipes.torch_callable import TorchModel

TYPES = {np.float16: TensorProto.FLOAT16, np.float32: TensorProto.FLOAT, ml_dtypes.bfloat16: TensorProto.BFLOAT16}
node = helper.make_node


def network(path, dtype, *, keep_io=False, fault=1.0):
    """Three convolutions, pooling and a Gemm; ``keep_io``: FP32 outside, Cast nodes at both ends."""
    rng, kind = np.random.default_rng(1), TYPES[dtype]

    def weight(name, *shape, scale=1.0):
        array = (rng.standard_normal(shape) * scale).astype(np.float32).astype(dtype)
        return onnx.TensorProto(name=name, data_type=kind, dims=shape, raw_data=array.tobytes())

    x, outer = ("h" if keep_io else "x"), (TensorProto.FLOAT if keep_io else kind)
    nodes = [node("Cast", ["x"], ["h"], to=kind)] if keep_io else []
    weights = []
    for i in range(3):
        weights += [weight(f"w{i}", 8, 8, 3, 3, scale=0.12 * (fault if i == 1 else 1)), weight(f"b{i}", 8)]
        nodes += [node("Conv", [x, f"w{i}", f"b{i}"], [f"c{i}"], name=f"conv{i}", pads=[1] * 4)]
        nodes += [node("Relu", [f"c{i}"], [f"r{i}"], name=f"relu{i}")]
        x = f"r{i}"
    weights += [weight("gw", 5, 8), weight("gb", 5)]
    nodes += [node("GlobalAveragePool", [x], ["g"]), node("Flatten", ["g"], ["f"])]
    nodes += [node("Gemm", ["f", "gw", "gb"], ["yh" if keep_io else "y"], name="fc", transB=1)]
    nodes += [node("Cast", ["yh"], ["y"], to=TensorProto.FLOAT)] if keep_io else []
    inputs = [helper.make_tensor_value_info("x", outer, [1, 8, 16, 16])]
    outputs = [helper.make_tensor_value_info("y", outer, [1, 5])]
    graph = helper.make_graph(nodes, "g", inputs, outputs, weights)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), str(path))
    return path


def accused(result):
    return [[(row.name, row.op) for row in test.guilty] for test in result.tests]


def test_the_declared_precision_is_read_off_the_types(tmp_path):
    assert narrow_values(Graph(network(tmp_path / "a.onnx", np.float32))) == {}
    mixed = narrow_values(Graph(network(tmp_path / "b.onnx", np.float16, keep_io=True)))
    assert {"h", "c0", "r2", "yh"} <= mixed.keys()
    assert not {"x", "y"} & mixed.keys()
    assert set(mixed.values()) == {"fp16"}


@pytest.mark.parametrize("keep_io", [False, True])
def test_headers_and_captures_say_what_a_file_computes_in(tmp_path, keep_io):
    path = network(tmp_path / "a.onnx", np.float16, keep_io=keep_io)
    result = bisect(str(path), "ort,ort-all")
    assert [record.computes_in for record in (result.reference, result.tests[0].backend)] == ["fp16", "fp16"]
    assert bisect(str(network(tmp_path / "b.onnx", np.float32)), "ort,ort-all").reference.computes_in == "fp32"
    folders = {backend: tmp_path / backend for backend in ("ort", "torch")}
    for backend, folder in folders.items():
        about = {"inputs": None, "samples": 1, "seed": 0, "exporter": None, "folded": True}
        record(load_model(str(path)), backend, folder, **about, on_step=lambda what, done, total: None)
    test = compare_captures(*map(Capture.open, folders.values())).tests[0]
    assert test.agrees, "judged as FP16, which the file declares"
    assert test.backend.computes_in == "fp16"


def test_values_of_unknown_type_have_that_of_what_is_read(tmp_path):
    nodes = [node("Gelu", ["x"], ["y"], domain="com.microsoft"), node("Shape", ["y"], ["s"])]
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT16, [2])]
    graph = helper.make_graph(nodes, "g", inputs, [onnx.ValueInfoProto(name="s")])
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=9), str(tmp_path / "m.onnx"))
    assert narrow_values(Graph(tmp_path / "m.onnx")) == {"x": "fp16", "y": "fp16"}


@pytest.mark.parametrize("keep_io", [False, True])
def test_a_healthy_fp16_file_accuses_nobody(tmp_path, keep_io):
    """On the CPU ONNX Runtime keeps activations in FP32 and rounds some of them, by its level."""
    path = network(tmp_path / "m.onnx", np.float16, keep_io=keep_io)
    result = bisect(str(path), "ort-none,ort-basic,ort-all,emu-fp32,emu-fp16,emu-bf16,torch,torch-fp64")
    assert accused(result) == [[]] * 7
    assert result.agrees
    claims = {row.replay.precision for row in result.tests[1].rows if row.replay and row.op in ("Conv", "Relu")}
    assert claims == {"fp16"}


@pytest.mark.parametrize("keep_io", [False, True])
def test_a_fault_in_an_fp16_file_is_found(tmp_path, keep_io):
    good = network(tmp_path / "good.onnx", np.float16, keep_io=keep_io)
    bad = network(tmp_path / "bad.onnx", np.float16, keep_io=keep_io, fault=1.02)
    result = bisect(str(good), "ort,ort-none", test_model=bad)
    assert accused(result) == [[("conv1", "Conv")]]
    assert result.tests[0].findings[0].cause == "weights-scaled"
    assert "1.02" in result.tests[0].findings[0].says
    assert "FP16 explains" in result.tests[0].guilty[0].why


@pytest.mark.few(2)
@pytest.mark.parametrize("keep_io", [False, True])
@pytest.mark.parametrize("fault", [1.0, 1.02])
def test_an_fp16_file_beside_its_fp32_parent_is_judged_as_fp16(tmp_path, keep_io, fault):
    """Its inputs may be FP16, and its output a Cast where the parent's is the layer itself."""
    parent = network(tmp_path / "parent.onnx", np.float32)
    file = network(tmp_path / "half.onnx", np.float16, keep_io=keep_io, fault=fault)
    result = bisect(str(parent), "ort,ort-none,emu-fp32", test_model=file)
    assert accused(result) == [[("conv1", "Conv")] if fault > 1 else []] * 2


@pytest.mark.parametrize("keep_io", [False, True])
def test_bfloat16_files(tmp_path, keep_io):
    path = network(tmp_path / "m.onnx", ml_dtypes.bfloat16, keep_io=keep_io)
    assert accused(bisect(str(path), "emu-fp32,emu-bf16,torch,torch-fp64")) == [[]] * 3
    parent = network(tmp_path / "parent.onnx", np.float32)
    assert accused(bisect(str(parent), "emu-fp32,torch", test_model=path)) == [[]]


@pytest.mark.parametrize("kind", [TensorProto.UINT8, TensorProto.UINT16, TensorProto.UINT32, TensorProto.UINT64])
def test_unsigned_integers_pass(tmp_path, kind):
    nodes = [node("Concat", ["u", "u"], ["v"], axis=1), node("Cast", ["v"], ["f"], to=1), node("Sqrt", ["f"], ["y"])]
    inputs = [helper.make_tensor_value_info("u", kind, [1, 4])]
    outputs = [onnx.ValueInfoProto(name="v"), onnx.ValueInfoProto(name="y")]
    opsets = [helper.make_opsetid("", 17)]
    graph = helper.make_graph(nodes, "g", inputs, outputs)
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=9), str(tmp_path / "m.onnx"))
    array = np.array([[0, 3, 200, 255]], helper.tensor_dtype_to_np_dtype(kind))
    np.savez(tmp_path / "in.npz", u=array)
    options = Options(inputs=tmp_path / "in.npz")
    assert accused(bisect(str(tmp_path / "m.onnx"), "ort,ort-all,emu-fp16,torch", options=options)) == [[]] * 3


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.linear = torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.Linear(8, 4)

    def forward(self, x):
        return self.linear(torch.relu(self.norm(self.conv(x))).mean((2, 3)))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "backends"),
    [(torch.float16, "torch,ort,ort-all,emu-fp32,torch-fp64"), (torch.bfloat16, "torch,emu-fp32,emu-bf16,torch-fp64")],
)
def test_modules_in_half_precision(dtype, backends):
    torch.manual_seed(0)
    model = TorchModel("net", Net().eval().to(dtype), torch.randn(1, 3, 12, 12, dtype=dtype))
    result = bisect(model, backends)
    assert accused(result) == [[]] * backends.count(",")
    assert result.agrees


def test_batchnorm_keeps_its_parameters_in_fp32(tmp_path):
    """A variance beyond FP16, as PP-OCR's detectors have it, is no Inf."""
    rng = np.random.default_rng(0)
    values = {"s": 1.0, "b": 0.0, "m": 0.0, "v": 2e7}
    weights = [onnx.numpy_helper.from_array(np.full(8, v, np.float32), n) for n, v in values.items()]
    inputs = [helper.make_tensor_value_info("x", 1, [1, 8, 16, 16])]
    nodes = [node("BatchNormalization", ["x", "s", "b", "m", "v"], ["y"])]
    constants = [node("Constant", [], [w.name], value=w) for w in weights]
    for made, given in (([*constants, *nodes], ()), (nodes, weights)):
        graph = helper.make_graph(made, "g", inputs, [onnx.ValueInfoProto(name="y")], list(given))
        onnx.save(
            helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9),
            str(tmp_path / "m.onnx"),
        )
        np.savez(tmp_path / "in.npz", x=(rng.standard_normal((1, 8, 16, 16)) * 5000).clip(-6e4, 6e4).astype(np.float32))
        result = bisect(str(tmp_path / "m.onnx"), "ort,emu-fp16", options=Options(inputs=tmp_path / "in.npz"))
        assert accused(result) == [[]]
        assert result.tests[0].outputs[0].stats.finite_rel_l2 < 1e-3


def test_constant_nodes_in_fp16_are_no_layers(tmp_path):
    """ONNX Runtime makes weights of them, under their names, and casts those."""
    half = onnx.numpy_helper.from_array(np.full(4, 0.3, np.float16), "k")
    nodes = [node("Constant", [], ["k"], value=half), node("Mul", ["x", "k"], ["m"]), node("Sqrt", ["m"], ["y"])]
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT16, [1, 4])]
    graph = helper.make_graph(nodes, "g", inputs, [helper.make_tensor_value_info("y", TensorProto.FLOAT16, [1, 4])])
    path = tmp_path / "m.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), str(path))
    assert accused(bisect(str(path), "ort-none,ort-all,emu-fp16")) == [[]] * 2
