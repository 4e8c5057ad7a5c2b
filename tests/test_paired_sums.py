"""INT8 sums that saturate in pairs of products: the emulation against ONNX Runtime, and the cause.

On a processor with VNNI ONNX Runtime adds exactly, without it in pairs. Either is what the tests expect of it here.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from draws import RNG
from nets import NetBuilder
from onnx import helper, numpy_helper
from onnxruntime.quantization import QuantFormat, QuantType, quantize_dynamic, quantize_static
from test_file_quantization import Reader, parent

from cp_debug.backends.arithmetic import INT8
from cp_debug.backends.base import Program, Session, Sink
from cp_debug.backends.emulated import EmulatedBackend, ExecutorSession
from cp_debug.backends.executor import Executor
from cp_debug.backends.kernels.paired_sums import PAIRED, lost, with_paired_sums
from cp_debug.backends.registry import create
from cp_debug.backends.spec import BackendSpec
from cp_debug.bisect.causes import quantized as quantized_causes
from cp_debug.bisect.engine import Options, bisect
from cp_debug.bisect.result import BisectResult
from cp_debug.graph.graph import Graph, Node
from cp_debug.reports.environment import int8_sums_saturate

MS = "com.microsoft"


def levels(dtype: type, *shape: int) -> np.ndarray:
    low, high = (0, 256) if dtype is np.uint8 else (-128, 128)
    return RNG.integers(low, high, shape).astype(dtype)


def by_definition(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Sums in pairs of 16 bits, term by term."""
    total = np.zeros((len(a), b.shape[1]), np.int64)
    for k in range(0, a.shape[1], 2):
        pair = sum(np.multiply.outer(a[:, j].astype(np.int64), b[j].astype(np.int64)) for j in (k, k + 1) if j < len(b))
        total += np.clip(pair, -32768, 32767)
    return total


@pytest.mark.parametrize(("m", "k", "n"), [(1, 1, 1), (3, 2, 4), (5, 7, 3), (4, 64, 9), (6, 33, 2)])
def test_the_loss_is_that_of_the_definition(m: int, k: int, n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = levels(np.uint8, m, k), levels(np.int8, k, n)
    want = by_definition(a, b) - a.astype(np.int64) @ b.astype(np.int64)
    got = lost(torch.from_numpy(a), torch.from_numpy(b))
    np.testing.assert_array_equal(got.numpy(), want)
    monkeypatch.setattr("cp_debug.backends.kernels.paired_sums._AT_ONCE", 1)
    np.testing.assert_array_equal(lost(torch.from_numpy(a), torch.from_numpy(b)).numpy(), want)
    batch = torch.from_numpy(np.stack([b, -b // 2]))
    together = lost(torch.from_numpy(a), batch)
    np.testing.assert_array_equal(together[0].numpy(), want)
    np.testing.assert_array_equal(together[1].numpy(), lost(torch.from_numpy(a), batch[1]).numpy())


U_ZERO, S_ZERO = np.array(113, np.uint8), np.array(0, np.int8)
FINE, COARSE = np.float32(0.02), np.float32(2)


def convolution(channels: int, outputs: int, group: int, size: int, rank: int = 2, **attributes: Any) -> Any:
    x = levels(np.uint8, 2, channels, *[11] * rank)
    w = levels(np.int8, outputs, channels // group, *[size] * rank)
    inputs = {"x": x, "xs": FINE, "xz": U_ZERO, "w": w, "ws": FINE, "wz": S_ZERO, "ys": COARSE, "yz": U_ZERO}
    return "QLinearConv", "", inputs, {"group": group, "pads": [size // 2] * 2 * rank, **attributes}


def product(op: str, domain: str, order: str, **attributes: Any) -> Any:
    a, b = levels(np.uint8, 6, 77), levels(np.int8, 77, 33)
    of = {"a": a, "b": b, "s": FINE, "t": FINE, "z": U_ZERO, "w": S_ZERO, "y": COARSE, "v": U_ZERO}
    of |= {"c": np.zeros(33, np.int32)}
    return op, domain, {f"{name}{i}": of[name] for i, name in enumerate(order)}, attributes


CASES = {
    "MatMulInteger": lambda: product("MatMulInteger", "", "abzw"),
    "QLinearMatMul": lambda: product("QLinearMatMul", "", "aszbtwyv"),
    "QGemm": lambda: product("QGemm", MS, "aszbtwcyv"),
    "MatMulIntegerToFloat": lambda: product("MatMulIntegerToFloat", MS, "abstzw"),
    "a convolution": lambda: convolution(16, 8, 1, 3),
    "of three channels": lambda: convolution(3, 8, 1, 3),
    "one by one": lambda: convolution(16, 16, 1, 1),
    "with strides and dilations": lambda: convolution(5, 7, 1, 3, strides=[2, 2], dilations=[2, 1]),
    "in groups": lambda: convolution(12, 6, 3, 3),
    "by channel": lambda: convolution(8, 8, 8, 3),
    "two by channel": lambda: convolution(8, 16, 8, 3),
    "in one dimension": lambda: convolution(5, 4, 1, 3, rank=1),
}


@pytest.mark.parametrize("case", CASES)
def test_onnx_runtimes_integer_operators_are_reproduced(case: str, tmp_path: Path) -> None:
    op, domain, inputs, attributes = CASES[case]()
    data, *_ = inputs
    node = helper.make_node(op, list(inputs), ["result"], domain=domain, **attributes)
    declared = helper.make_tensor_value_info(data, onnx.TensorProto.UINT8, inputs[data].shape)
    constants = [numpy_helper.from_array(np.asarray(array), name) for name, array in inputs.items() if name != data]
    graph = helper.make_graph([node], "g", [declared], [onnx.ValueInfoProto(name="result")], constants)
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid(MS, 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=9), tmp_path / "net.onnx")
    fed = {data: inputs[data]}
    session = ort.InferenceSession(str(tmp_path / "net.onnx"), providers=["CPUExecutionProvider"])
    want = session.run(None, fed)[0].astype(np.float64)
    exact, paired = (
        np.asarray(Executor(Graph(tmp_path / "net.onnx"), arithmetic).run(fed)["result"]).astype(np.float64)
        for arithmetic in (INT8, PAIRED)
    )
    one_level = 1.0 if "QLinear" in op or op == "QGemm" else 1e-5 * np.abs(want).max()
    ours = paired if int8_sums_saturate() else exact
    assert np.abs(ours - want).max() <= one_level
    assert np.mean(ours != want) < 0.01 or op == "MatMulIntegerToFloat"
    assert (np.abs(paired - exact).max() > one_level) == (case != "by channel")


class PairedSession(ExecutorSession):
    """Runs the graph as a processor without VNNI does."""

    def run(
        self, inputs: Mapping[str, np.ndarray], sink: Sink | None = None, probes: Collection[str] | None = None
    ) -> dict[str, np.ndarray]:
        nodes = with_paired_sums(self._graph, self._graph.nodes)
        assert nodes is not None

        def shown(name: str, value: Any) -> None:
            if sink is not None and name in self.exposed and (probes is None or name in probes):
                sink(name, value)

        outputs = [value.name for value in self._graph.outputs]
        results = Executor(self._graph, PAIRED).run_nodes(nodes, inputs, outputs, shown)
        return {name: value.numpy() for name, value in results.items()}


class WithoutVnni(EmulatedBackend):
    """An INT8 backend whose sums saturate in pairs."""

    def __init__(self) -> None:
        super().__init__(BackendSpec.parse("emu-int8"))

    def open(self, program: Program) -> Session:
        return PairedSession(program.graph, self.arithmetic, self.device)


def quantized(folder: Path, kind: str) -> tuple[Path, Path]:
    source, target = parent(folder / "parent.onnx"), folder / "file.onnx"
    if kind == "dynamic":
        quantize_dynamic(source, target, weight_type=QuantType.QInt8)
    else:
        quantize_static(
            source,
            target,
            Reader(),
            quant_format=QuantFormat.QOperator if kind == "qoperator" else QuantFormat.QDQ,
            activation_type=QuantType.QInt8 if kind == "signed" else QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            per_channel=True,
        )
    # Levels up to ±127, all of one sign within a channel, so that pairs leave 16 bits.
    model = onnx.load(target)
    for tensor in model.graph.initializer:
        if tensor.data_type == onnx.TensorProto.INT8 and len(tensor.dims) > 1:
            array = numpy_helper.to_array(tensor)
            tensor.CopyFrom(numpy_helper.from_array(np.sign(array) * np.int8(127), tensor.name))
    onnx.save(model, target)
    return source, target


def causes(result: BisectResult) -> list[str]:
    return [finding.cause for finding in result.tests[0].findings]


@pytest.mark.parametrize("kind", ["signed", "unsigned", "qoperator"])
def test_saturation_is_named(kind: str, tmp_path: Path) -> None:
    _, test = quantized(tmp_path, kind)
    result = bisect(str(test), [create(BackendSpec.parse("emu-int8")), WithoutVnni()])
    (run,) = result.tests
    assert run.guilty
    assert causes(result)[0] == "int8-pair-saturation"
    finding = run.findings[0]
    assert finding.explained > 0.99
    assert 0 < finding.evidence["results_changed"] <= 1
    assert "reduce_range=True" in finding.fix
    assert "session.x64quantprecision" in finding.fix
    healthy = bisect(str(test), [create(BackendSpec.parse("emu-int8")), create(BackendSpec.parse("emu-int8"))])
    assert causes(healthy) == []


def test_the_fix_names_the_product_in_front_of_what_was_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    exact = torch.ones(4)
    protos = [helper.make_node(op, [], [op], op.lower()) for op in ("Gemm", "DequantizeLinear")]
    segment: Any = SimpleNamespace(
        nodes=[Node.of(place, proto) for place, proto in enumerate(protos)],
        strange=False,
        test=exact - 1,
        introduced=2.0,
    )
    segment.finite, segment.context = exact > 0, SimpleNamespace(quantized=None)
    monkeypatch.setattr(quantized_causes, "_in_pairs", lambda segment, even: (exact, exact - 1))
    (found,) = quantized_causes.saturating(segment)
    assert found.fix.startswith("quantize gemm with weights of 7 bits")


def test_saturation_is_named_beside_the_float_parent(tmp_path: Path) -> None:
    source, target = parent(tmp_path / "parent.onnx"), tmp_path / "file.onnx"
    options = {"quant_format": QuantFormat.QDQ, "activation_type": QuantType.QInt8, "weight_type": QuantType.QInt8}
    quantize_static(source, target, Reader(), per_channel=True, **options)
    result = bisect(str(source), [create(BackendSpec.parse("ort")), WithoutVnni()], test_model=target)
    assert result.tests[0].guilty
    assert causes(result)[0] == "int8-pair-saturation"
    sound = bisect(str(source), "ort,emu-int8", test_model=target)
    assert sound.agrees
    assert causes(sound) == ["int8"]  # what costs most


def test_saturation_is_named_where_one_operator_quantizes_the_layer(tmp_path: Path) -> None:
    """Beside the float parent, QGemm is what the layer became, and no operator that somebody added."""
    made = NetBuilder(1)
    weight = made.weight((made.rng.random((32, 8)) + 0.5).astype(np.float32))
    made.op("Gemm", "x", weight, made.weight(np.zeros(8, np.float32)), name="y")
    source, target = made.save(tmp_path / "parent.onnx", {"x": (1, [4, 32])}, ["y"], opset=17), tmp_path / "file.onnx"
    x = np.random.default_rng(0).random((4, 32)).astype(np.float32)
    np.savez(tmp_path / "x.npz", x=x)
    reader = SimpleNamespace(get_next=iter([{"x": x}, None]).__next__)
    options = {"activation_type": QuantType.QUInt8, "weight_type": QuantType.QInt8}
    quantize_static(source, target, reader, quant_format=QuantFormat.QOperator, **options)
    backends = [create(BackendSpec.parse("ort")), WithoutVnni()]
    result = bisect(str(source), backends, test_model=target, options=Options(inputs=tmp_path / "x.npz"))
    assert causes(result)[0] == "int8-pair-saturation"


def test_a_fault_of_its_own_is_not_put_down_to_saturation(tmp_path: Path) -> None:
    """A scale that is ten times too large beside pairs that saturate a little."""
    source, target = parent(tmp_path / "parent.onnx"), tmp_path / "file.onnx"
    options = {"quant_format": QuantFormat.QDQ, "activation_type": QuantType.QUInt8, "weight_type": QuantType.QInt8}
    quantize_static(source, target, Reader(), per_channel=True, **options)
    model = onnx.load(target)
    (scale,) = (t for t in model.graph.initializer if t.name == "w0_scale")
    scale.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(scale) * np.float32(10), scale.name))
    onnx.save(model, target)
    result = bisect(str(source), [create(BackendSpec.parse("ort")), WithoutVnni()], test_model=target)
    assert "int8-pair-saturation" not in causes(result)[:1]


def test_a_difference_of_the_graphs_is_found_among_sums_that_saturate(tmp_path: Path) -> None:
    levels = np.random.default_rng(0).integers(-127, 127, (16, 8)).astype(np.int8)
    files = []
    for zero_points in (["z", "zw"], []):
        made = NetBuilder()
        for name, array in {"s": np.float32(0.01), "z": np.uint8(128), "zw": np.int8(0), "levels": levels}.items():
            made.weight(np.asarray(array), name)
        made.op("QuantizeLinear", "x", "s", "z", name="q")
        made.op("MatMulInteger", "q", "levels", *zero_points, name="i")
        made.op("Cast", "i", to=1, name="y")
        files.append(made.save(tmp_path / f"{len(files)}.onnx", {"x": (1, [4, 16])}, ["y"], opset=17))
    result = bisect(str(files[0]), [create(BackendSpec.parse("ort")), WithoutVnni()], test_model=files[1])
    (finding,) = (finding for finding in result.tests[0].findings if finding.layers == ["node_i"])
    assert finding.says == "MatMulInteger has no a_zero_point (z); MatMulInteger has no b_zero_point (zw)"


def test_nothing_else_is_paired(tmp_path: Path) -> None:
    """Weights that are unsigned, and products of floats."""
    source = parent(tmp_path / "parent.onnx")
    graph = Graph(source)
    assert with_paired_sums(graph, graph.nodes) is None
    options = {"activation_type": QuantType.QUInt8, "weight_type": QuantType.QUInt8}
    quantize_static(source, tmp_path / "file.onnx", Reader(), **options)
    graph = Graph(tmp_path / "file.onnx")
    assert with_paired_sums(graph, graph.nodes) is None
    assert replace(PAIRED, paired_sums=False) == INT8


@pytest.mark.parametrize("even", [False, True])
def test_pairs_reach_into_the_next_tap_unless_channels_are_padded(even: bool, tmp_path: Path) -> None:
    data, weights = levels(np.uint8, 1, 3, 1, 6), np.full((4, 3, 1, 2), 127, np.int8)
    text = """net (float[1,3,1,6] x) => (float[1,4,1,5] y) <float s = {1.0}, uint8 z = {0}, int8 n = {0}> {
      q = QuantizeLinear (x, s, z) d = DequantizeLinear (q, s, z) v = DequantizeLinear (w, s, n) y = Conv (d, v) }"""
    model = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["": 17]> {text}')
    model.graph.initializer.append(numpy_helper.from_array(weights, "w"))
    onnx.save(model, tmp_path / "net.onnx")
    graph = Graph(tmp_path / "net.onnx")
    nodes = with_paired_sums(graph, graph.nodes, even=even)
    assert nodes is not None
    got = Executor(graph, PAIRED).run_nodes(nodes, {"x": data.astype(np.float32)}, ["y"])["y"]
    pad = [(0, 0), (0, int(even)), (0, 0), (0, 0)]
    rows, taps = (np.pad(a, pad).transpose(0, 2, 3, 1) for a in (data, weights))
    for place in range(5):
        expected = by_definition(rows[0, :, place : place + 2].reshape(1, -1), taps.reshape(4, -1).T)
        np.testing.assert_array_equal(got[0, :, 0, place].numpy(), expected[0])
