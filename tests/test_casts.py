"""Cast surgery: names, types, values; on a convolutional net, on awkward graphs, on random chains."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from draws import RNG
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from cp_debug.errors import InputError
from cp_debug.graph.graph import Graph
from cp_debug.graph.half_precision import cast_surgery


def weight(name: str, *shape: int) -> onnx.TensorProto:
    return numpy_helper.from_array((RNG.standard_normal(shape) * 0.2).astype(np.float32), name)


def save(folder: Path, nodes, inputs, outputs, weights, opset: int = 17) -> Graph:
    graph = helper.make_graph(
        nodes,
        "test",
        [helper.make_tensor_value_info(n, t, s) for n, t, s in inputs],
        [helper.make_tensor_value_info(n, t, s) for n, t, s in outputs],
        weights,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    path = folder / "model.onnx"
    onnx.save(model, path)
    return Graph(path)


def node(op: str, inputs: list[str], outputs: list[str], name: str | None = None, **attributes) -> onnx.NodeProto:
    made = helper.make_node(op, inputs, outputs, name=name or f"/{outputs[0]}/{op}", **attributes)
    made.metadata_props.add(key="scope", value=outputs[0])
    return made


@pytest.fixture
def net(tmp_path: Path) -> Graph:
    nodes = [
        node("Conv", ["x", "w1", "b1"], ["c1"], pads=[1, 1, 1, 1]),
        node("Relu", ["c1"], ["r1"]),
        node("Conv", ["r1", "w2"], ["c2"], pads=[1, 1, 1, 1]),
        node("Add", ["c2", "r1"], ["sum"]),
        node("Shape", ["sum"], ["shape"]),
        node("Resize", ["sum", "", "scales"], ["up"], mode="nearest"),
        node("Reshape", ["up", "flat"], ["out"]),
        node("Conv", ["r1", "w2"], ["side"], pads=[1, 1, 1, 1]),
    ]
    weights = [weight("w1", 8, 3, 3, 3), weight("b1", 8), weight("w2", 8, 8, 3, 3)]
    weights.append(numpy_helper.from_array(np.array([1, 1, 2, 2], np.float32), "scales"))
    weights.append(numpy_helper.from_array(np.array([1, -1]), "flat"))
    outputs = [("out", TensorProto.FLOAT, [1, 8 * 144]), ("r1", TensorProto.FLOAT, [1, 8, 6, 6])]
    outputs += [("shape", TensorProto.INT64, [4]), ("side", TensorProto.FLOAT, [1, 8, 6, 6])]
    return save(tmp_path, nodes, [("x", TensorProto.FLOAT, [1, 3, 6, 6])], outputs, weights)


def run(path: Path, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"]).run(None, feeds)


def types(path: Path) -> dict[str, int]:
    model = onnx.shape_inference.infer_shapes(onnx.load(path), strict_mode=True)
    known = (*model.graph.value_info, *model.graph.input, *model.graph.output)
    return {v.name: v.type.tensor_type.elem_type for v in known} | {
        w.name: w.data_type for w in model.graph.initializer
    }


def assert_no_double_casts(path: Path) -> None:
    casts = [n for n in onnx.load(path).graph.node if n.op_type == "Cast"]
    made = {n.output[0] for n in casts}
    assert not any(n.input[0] in made for n in casts)
    pairs = [(n.input[0], n.attribute[0].i) for n in casts]
    assert len(pairs) == len(set(pairs)), "a value is cast twice to the same type"


def test_names_metadata_and_values_survive(net: Graph, tmp_path: Path) -> None:
    path = cast_surgery(net, "fp16", (), tmp_path / "fp16.onnx")
    onnx.checker.check_model(str(path), full_check=True)
    low = Graph(path)
    assert set(net.values) <= set(low.values)
    assert set(net.initializers) <= set(low.initializers)
    by_name = {n.name: n for n in low.nodes}
    assert {n.name: n.op for n in net.nodes} == {n.name: by_name[n.name].op for n in net.nodes}
    for original in net.nodes:
        assert original.proto.metadata_props == by_name[original.name].proto.metadata_props
    x = RNG.standard_normal((1, 3, 6, 6)).astype(np.float32)
    for expected, got in zip(run(net.path, {"x": x}), run(path, {"x": x}), strict=True):
        assert got.dtype == expected.dtype
        np.testing.assert_allclose(got, expected, rtol=1e-2, atol=1e-2)
    assert_no_double_casts(path)


def test_types_are_low_inside_and_fp32_at_the_rim(net: Graph, tmp_path: Path) -> None:
    known = types(cast_surgery(net, "fp16", (), tmp_path / "fp16.onnx"))
    assert {known[v] for v in ("c1", "c2", "sum", "up", "w1", "b1", "w2")} == {TensorProto.FLOAT16}
    assert {known[v] for v in ("x", "r1", "out", "side", "scales")} == {TensorProto.FLOAT}


def test_kept_nodes_stay_fp32_and_shared_weights_exist_in_both(net: Graph, tmp_path: Path) -> None:
    path = cast_surgery(net, "fp16", {"/c2/Conv", "/sum/Add"}, tmp_path / "mixed.onnx")
    known = types(path)
    assert {known[v] for v in ("c2", "sum", "w2")} == {TensorProto.FLOAT}
    assert known["w2__fp16"] == TensorProto.FLOAT16, "the side branch reads the same weight in FP16"
    assert known["c1"] == TensorProto.FLOAT16
    assert "sum__fp16" in known, "Resize goes on in FP16"
    x = RNG.standard_normal((1, 3, 6, 6)).astype(np.float32)
    for expected, got in zip(run(net.path, {"x": x}), run(path, {"x": x}), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-2, atol=1e-2)
    assert_no_double_casts(path)


def test_keeping_everything_changes_nothing(net: Graph, tmp_path: Path) -> None:
    path = cast_surgery(net, "fp16", {n.name for n in net.nodes}, tmp_path / "same.onnx")
    assert onnx.load(path) == net.proto


def test_movers_between_fp32_nodes_are_not_rounded(tmp_path: Path) -> None:
    nodes = [
        node("Relu", ["x"], ["a"]),
        node("Transpose", ["a"], ["b"], perm=[1, 0]),
        node("Neg", ["b"], ["y"]),
    ]
    graph = save(tmp_path, nodes, [("x", TensorProto.FLOAT, [2, 3])], [("y", TensorProto.FLOAT, [3, 2])], [])
    path = cast_surgery(graph, "fp16", {"/a/Relu", "/y/Neg"}, tmp_path / "kept.onnx")
    assert not [n for n in Graph(path).nodes if n.op == "Cast"]


def test_bf16(net: Graph, tmp_path: Path) -> None:
    path = cast_surgery(net, "bf16", (), tmp_path / "bf16.onnx")
    onnx.checker.check_model(str(path))
    model = onnx.load(path)
    narrow = {w.name: w for w in model.graph.initializer}["w1"]
    assert narrow.data_type == TensorProto.BFLOAT16
    np.testing.assert_allclose(
        numpy_helper.to_array(narrow).astype(np.float32), net.initializer("w1"), rtol=2**-8, atol=0
    )


def test_constants_subgraphs_and_ints(tmp_path: Path) -> None:
    """A Constant read by low nodes is converted; what a subgraph captures stays FP32; integers are not touched."""
    branch = [
        helper.make_graph(
            [helper.make_node("Mul", ["a", "a"], [f"{side}_out"])],
            side,
            [],
            [helper.make_tensor_value_info(f"{side}_out", TensorProto.FLOAT, [4])],
        )
        for side in ("then", "else")
    ]
    half = helper.make_tensor("half", TensorProto.FLOAT, [1], [0.5])
    nodes = [
        node("Constant", [], ["half"], value=half),
        node("Mul", ["x", "half"], ["a"]),
        node("If", ["yes"], ["b"], then_branch=branch[0], else_branch=branch[1]),
        node("Exp", ["b"], ["c"]),
        node("Cast", ["i"], ["f"], to=TensorProto.FLOAT),
        node("Add", ["c", "f"], ["y"]),
        node("Add", ["i", "i"], ["j"]),
    ]
    inputs = [("x", TensorProto.FLOAT, [4]), ("yes", TensorProto.BOOL, []), ("i", TensorProto.INT32, [4])]
    outputs = [("y", TensorProto.FLOAT, [4]), ("j", TensorProto.INT32, [4])]
    graph = save(tmp_path, nodes, inputs, outputs, [])
    path = cast_surgery(graph, "fp16", (), tmp_path / "fp16.onnx")
    onnx.checker.check_model(str(path), full_check=True)
    known = types(path)
    assert (known["half"], known["a"], known["c"]) == (TensorProto.FLOAT16, TensorProto.FLOAT, TensorProto.FLOAT16)
    feeds = {"x": np.ones(4, np.float32), "yes": np.array(True), "i": np.arange(4, dtype=np.int32)}
    for expected, got in zip(run(graph.path, feeds), run(path, feeds), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-2)


def test_refusals(net: Graph, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no node '/nope'"):
        cast_surgery(net, "fp16", {"/nope"}, tmp_path / "a.onnx")
    big = numpy_helper.from_array(np.full((1,), 1e6, np.float32), "k")
    nodes = [node("Mul", ["x", "k"], ["y"])]
    graph = save(tmp_path, nodes, [("x", TensorProto.FLOAT, [1])], [("y", TensorProto.FLOAT, [1])], [big])
    with pytest.raises(InputError, match=r"weight 'k' reaches 1e\+06, beyond fp16; keep node '/y/Mul'"):
        cast_surgery(graph, "fp16", (), tmp_path / "b.onnx")
    assert not (tmp_path / "b.onnx").exists()


OPS = st.sampled_from(["Relu", "Add", "Transpose", "Sigmoid", "MatMul", "Concat"])


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(ops=st.lists(OPS, min_size=1, max_size=8), data=st.data())
def test_random_chains_run_with_every_name(tmp_path: Path, ops: list[str], data: st.DataObject) -> None:
    """Square matrices through random nodes, random FP32 lists, random further outputs: valid, runs, close, no waste."""
    nodes, values = [], ["x"]
    for i, op in enumerate(ops):
        first, second = (data.draw(st.sampled_from(values)) for _ in range(2))
        if op == "Concat":  # and back to a square
            nodes.append(node("Concat", [first, second], [f"wide{i}"], axis=0))
            nodes.append(node("Slice", [f"wide{i}", "from", "to"], [f"v{i}"]))
        else:
            reads = {"Add": [first, second], "MatMul": [first, "w"]}.get(op, [first])
            nodes.append(node(op, reads, [f"v{i}"]))
        values.append(f"v{i}")
    names = [n.name for n in nodes]
    keep = data.draw(st.sets(st.sampled_from(names)))
    shown = data.draw(st.sets(st.sampled_from(values[1:]))) | {values[-1]}
    bounds = [numpy_helper.from_array(np.array([v]), n) for n, v in (("from", 1), ("to", 5))]
    graph = save(
        tmp_path,
        nodes,
        [("x", TensorProto.FLOAT, [4, 4])],
        [(v, TensorProto.FLOAT, [4, 4]) for v in sorted(shown)],
        [weight("w", 4, 4), *bounds],
    )
    path = cast_surgery(graph, "fp16", keep, tmp_path / "out.onnx")
    onnx.checker.check_model(str(path), full_check=True)
    assert set(graph.values) <= set(Graph(path).values)
    assert_no_double_casts(path)
    x = RNG.standard_normal((4, 4)).astype(np.float32)
    for expected, got in zip(run(graph.path, {"x": x}), run(path, {"x": x}), strict=True):
        np.testing.assert_allclose(got, expected, rtol=0.05, atol=0.05)
