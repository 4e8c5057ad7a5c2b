"""Operators that no CPU runtime has, and small parts of graphs and results, against their formulas."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from nets import NetBuilder
from onnx import TensorProto, helper

from cp_debug.backends.arithmetic import FP64
from cp_debug.backends.executor import Executor
from cp_debug.bisect.file_weights import is_narrow_kind
from cp_debug.bisect.preflight import _clipped, _quantized_weight
from cp_debug.bisect.quantized_segment import QuantizerGrid
from cp_debug.bisect.result import BisectResult, LayerRow
from cp_debug.errors import InputError
from cp_debug.graph.constants import Constants
from cp_debug.graph.graph import Graph
from cp_debug.graph.opset import inlined
from cp_debug.graph.source_lines import quotes_source, source_line
from cp_debug.probes.alignment import Coverage
from cp_debug.probes.dumps import read_iterations
from cp_debug.programs.weight_differences import _same_reader

RNG = np.random.default_rng(0)


def normal(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def run(folder: Path, op: str, arrays: dict[str, np.ndarray], outputs: int = 1, **attributes: Any) -> list[np.ndarray]:
    """Outputs of one ``com.microsoft`` node in FP64."""
    names = [f"y{i}" for i in range(outputs)]
    node = helper.make_node(op, list(arrays), names, name="node", domain="com.microsoft", **attributes)
    given = [
        helper.make_tensor_value_info(n, helper.np_dtype_to_tensor_dtype(a.dtype), a.shape) for n, a in arrays.items()
    ]
    graph = helper.make_graph([node], "g", given, [onnx.ValueInfoProto(name=n) for n in names])
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets), folder / "one.onnx")
    results = Executor(Graph(folder / "one.onnx"), FP64).run(arrays)
    return [results[n].numpy() for n in names]


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def test_a_gated_gelu_takes_the_second_half_as_the_gate(tmp_path: Path) -> None:
    x, bias = normal(1, 3, 8), normal(8)
    left, right = np.split(torch.from_numpy((x + bias).astype(np.float64)).numpy(), 2, -1)
    gate = torch.nn.functional.gelu(torch.from_numpy(right)).numpy()
    (found,) = run(tmp_path, "BiasSplitGelu", {"x": x, "bias": bias})
    assert np.allclose(found, left * gate, atol=1e-6)


@pytest.mark.parametrize(("shape", "inner"), [((2, 1, 1, 4), 0), ((2, 4), 1), ((1, 1, 3, 4), 0)])
def test_a_softmax_adds_its_bias_first(tmp_path: Path, shape: tuple[int, ...], inner: int) -> None:
    x, bias = normal(2, 5, 3, 4), normal(*shape)
    attributes = {"axis": 1 if inner else 3, "is_inner_broadcast": inner}
    (found,) = run(tmp_path, "BiasSoftmax", {"x": x, "bias": bias}, **attributes)
    wide = bias.reshape(2, 1, 1, 4) if inner else bias  # along the outermost axis and the innermost one
    want = softmax((x + wide).reshape(2 if inner else -1, 60 if inner else 4)).reshape(x.shape)
    assert np.allclose(found, want, atol=1e-6)


@pytest.mark.parametrize("last", [0, 1])
@pytest.mark.parametrize("activation", [0, 1])
def test_groups_are_normalized_in_either_layout(tmp_path: Path, last: int, activation: int) -> None:
    x, gamma, beta = normal(2, 6, 3, 3), normal(6), normal(6)
    groups = x.astype(np.float64).reshape(2, 3, -1)
    normed = (groups - groups.mean(-1, keepdims=True)) / np.sqrt(groups.var(-1, keepdims=True) + 1e-2)
    want = normed.reshape(x.shape) * gamma[:, None, None] + beta[:, None, None]
    want = want / (1 + np.exp(-want)) if activation else want
    given = x.transpose(0, 2, 3, 1) if last else x
    attributes = {"groups": 3, "channels_last": last, "activation": activation, "epsilon": 1e-2}
    (found,) = run(tmp_path, "GroupNorm", {"x": given, "gamma": gamma, "beta": beta}, **attributes)
    assert np.allclose(found.transpose(0, 3, 1, 2) if last else found, want, atol=1e-5)
    skip = normal(*given.shape)
    arrays = {"x": given - skip, "gamma": gamma, "beta": beta, "skip": skip}
    found, total = run(tmp_path, "SkipGroupNorm", arrays, outputs=2, **attributes)
    assert np.allclose(total, given, atol=1e-6)
    assert np.allclose(found.transpose(0, 3, 1, 2) if last else found, want, atol=1e-5)


def test_levels_are_chosen_as_the_numbers_that_they_stand_for(tmp_path: Path) -> None:
    def number(value: float) -> np.ndarray:
        return np.float32(value).reshape(())

    def zero(value: int) -> np.ndarray:
        return np.uint8(value).reshape(())

    arrays = {
        "condition": np.array([True, False]), "a": np.uint8([12, 12]), "a_scale": number(0.5), "a_zero": zero(10),
        "b": np.uint8([5, 5]), "b_scale": number(2.0), "b_zero": zero(3), "y_scale": number(0.25), "y_zero": zero(1),
    }  # fmt: skip
    (found,) = run(tmp_path, "QLinearWhere", arrays)
    assert found.tolist() == [5, 17]  # 1.0 and 4.0, in quarters above 1


# Graphs -------------------------------------------------------------------------------------------------------------


def test_a_copy_has_its_weights_inside(tmp_path: Path) -> None:
    net = NetBuilder()
    net.op("Add", "x", net.weight(np.arange(4, dtype=np.float32), "w"), name="y")
    path = net.save(tmp_path / "n.onnx", {"x": (1, [4])}, ["y"])
    onnx.save(onnx.load(path), path, save_as_external_data=True, location="w.bin", size_threshold=0)
    graph = Graph(path)
    model = inlined(graph)
    (weight,) = model.graph.initializer
    assert weight.data_location != TensorProto.EXTERNAL
    assert onnx.numpy_helper.to_array(weight).tolist() == [0, 1, 2, 3]
    assert graph.proto.graph.initializer[0].data_location == TensorProto.EXTERNAL  # a copy


@pytest.mark.parametrize(("other", "same"), [({"transB": 1}, True), ({"transB": 0}, False), ({}, False)])
def test_a_layout_matters_where_it_is_read_alike(tmp_path: Path, other: dict[str, int], same: bool) -> None:
    def made(name: str, **attributes: int) -> Constants:
        net = NetBuilder()
        net.op("Gemm", "x", net.weight(np.eye(2, dtype=np.float32), f"w{name}"), name="y", **attributes)
        return Constants(Graph(net.save(tmp_path / f"{name}.onnx", {"x": (1, [1, 2])}, ["y"])))

    assert _same_reader(made("a", transB=1), made("b", **other), "wa", "wb") == same


# Quantization and results -------------------------------------------------------------------------------------------


def test_a_symmetric_grid_holds_its_largest_magnitude() -> None:
    grid = QuantizerGrid.symmetric(1.27)
    assert float(grid.scale) == pytest.approx(0.01)
    assert grid.range == (pytest.approx(-1.28), pytest.approx(1.27))
    assert [is_narrow_kind(k) for k in (TensorProto.INT4, TensorProto.FLOAT8E4M3FN, TensorProto.INT8, None)] == [
        True, True, False, False,
    ]  # fmt: skip


def test_weights_at_the_end_of_their_range_are_told() -> None:
    scale, levels = torch.ones(1), torch.full((2, 50), 100, dtype=torch.int8)
    assert list(_quantized_weight("layer", levels, scale)) == []
    levels[0, :2] = torch.tensor([127, -127])  # the largest weight of either sign
    assert list(_quantized_weight("layer", levels, scale)) == []
    levels[0, 2] = -128
    (concern,) = _quantized_weight("layer", levels, scale)
    assert "3.0% of the quantized weights are at the end of the range" in str(concern)
    levels[1, :10] = 122  # a distribution that thins out, and is not cut off
    assert list(_quantized_weight("layer", levels, scale)) == []
    biases = torch.full((8,), 1 << 20, dtype=torch.int32)
    assert list(_quantized_weight("layer", biases, torch.ones(8))) == []
    biases[3] = torch.iinfo(torch.int32).max
    assert "12.5% of the quantized biases" in str(*_quantized_weight("layer", biases, torch.ones(8)))


def test_channels_of_very_different_range_want_a_scale_each() -> None:
    levels = torch.full((4, 50), 1, dtype=torch.int8)
    levels[0] = 120
    (concern,) = _quantized_weight("layer", levels, torch.ones(1))
    assert "one scale for channels whose ranges differ 120 times" in str(concern)
    assert list(_quantized_weight("layer", levels, torch.ones(4))) == []
    levels[1:] = 0  # channels of zeros have no range
    assert list(_quantized_weight("layer", levels, torch.ones(1))) == []


def test_activations_are_compared_with_what_their_scales_hold() -> None:
    assert list(_clipped({"a": (1.0, 0.0), "b": (1.3, 0.9), "c": (0.0, 0.0)})) == []
    over, coarse = _clipped({"a": (3.5, 20.0), "b": (1.2, 2.0), "c": (0.1, 0.0), "d": (0.2, 0.0)})
    assert "activations reach 3.50 times what their INT8 scale holds; clipping them costs 20 times" in str(over)
    assert "INT8 scales up to 10 times too coarse" in str(coarse)


def test_how_much_is_accounted_for_is_told_by_kind() -> None:
    told = str(Coverage(3, 4, 2, 5, {"named": 2, "computed": 1}))
    assert told == "3 of 4 values (2 named, 1 computed), 2 of 5 leaf module calls"


def test_a_result_stands_for_its_tests() -> None:
    row = SimpleNamespace(name="conv")
    tests: Any = [
        SimpleNamespace(agrees=True, first_divergent=None, findings=["a"], layers="first"),
        SimpleNamespace(agrees=False, first_divergent=row, findings=["b", "c"], layers="second"),
    ]
    result: Any = BisectResult.__new__(BisectResult)
    result.tests = tests
    assert list(result) == tests
    assert result.first_divergent is row
    assert result.findings == ["a", "b", "c"]
    assert result.layers == "first"
    assert not result.agrees
    result.tests = tests[:1]
    assert result.agrees
    assert result.first_divergent is None


TRACE = """File "/home/me/nets/net.py", line 8, in forward
    y = self.inner(x)
File "/home/me/nets/inner.py", line 3, in forward
    return torch.relu(x)
File "/usr/lib/python3/site-packages/torch/nn/functional.py", line 99, in relu
    result = torch.relu(input)
"""


@pytest.mark.parametrize(
    ("trace", "doc", "line"),
    [
        (TRACE, "", "nets/inner.py:3: return torch.relu(x)"),
        ("", "/home/me/nets/net.py(8): forward\n/usr/lib/site-packages/torch/nn/module.py(5): call\n", "nets/net.py:8"),
        ("", "/usr/lib/site-packages/torch/nn/module.py(5): call\n/a/b/net.py(7): f\n", "b/net.py:7"),
        ("", "nothing of the kind", ""),
    ],
)
def test_the_innermost_line_of_the_network_itself(trace: str, doc: str, line: str) -> None:
    node = helper.make_node("Relu", ["x"], ["y"], doc_string=doc)
    if trace:
        node.metadata_props.add(key="pkg.torch.onnx.stack_trace", value=trace)
    assert source_line(node) == line
    assert quotes_source(node) == bool(line)


def test_a_row_in_a_word_says_why_where_it_knows() -> None:
    row: Any = SimpleNamespace(name="conv", op="Conv", verdict="guilty", why="")
    assert LayerRow.__repr__(row) == "<LayerRow conv (Conv): guilty>"
    row.why = "excess 70"
    assert LayerRow.__repr__(row) == "<LayerRow conv (Conv): guilty: excess 70>"


def test_text_that_is_no_base64_is_refused_with_the_tensor(tmp_path: Path) -> None:
    stream = io.BytesIO()
    np.save(stream, np.float32([1, 2]))
    text = base64.b64encode(stream.getvalue()).decode()
    path = tmp_path / "inputs.json"
    path.write_text(json.dumps([{"x": {"array": text}}]))
    assert read_iterations(path)[0]["x"].tolist() == [1, 2]
    path.write_text(json.dumps([{"x": {"array": f"{text[:40]}!{text[40:]}"}}]))
    with pytest.raises(InputError, match="'x'"):
        read_iterations(path)
