"""Marking and cutting ONNX graphs: the numbers stay, the caller's files stay."""

from __future__ import annotations

import os
import resource
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nets import NetBuilder, marked, random_dag, residual, second_like
from onnx import helper

from cp_debug.errors import InputError
from cp_debug.graph import surgery
from cp_debug.graph.graph import Graph
from cp_debug.graph.surgery import tensor_bytes, unused_names

RECIPES = st.lists(st.tuples(st.integers(0, 7), st.integers(0, 99), st.integers(0, 99)), min_size=2, max_size=14)


def run(model: onnx.ModelProto | Path, feed: Mapping[str, np.ndarray], weights: Path | None = None) -> dict:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    if weights is not None:
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(weights))
    source = str(model) if isinstance(model, Path) else model.SerializeToString()
    session = ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    names = [o.name for o in session.get_outputs()]
    return dict(zip(names, session.run(names, dict(feed)), strict=True))


def image(shape: tuple[int, ...], seed: int = 0) -> dict[str, np.ndarray]:
    return {"x": np.random.default_rng(seed).standard_normal(shape).astype(np.float32)}


def with_external_data(path: Path) -> Path:
    """The file again as ``big.onnx`` with its weights in ``big.data``."""
    target = path.with_name("big.onnx")
    onnx.save(onnx.load(path), str(target), save_as_external_data=True, location="big.data", size_threshold=64)
    return target


@settings(max_examples=40, deadline=None)
@given(recipe=RECIPES, seed=st.integers(0, 1000))
def test_marking_every_value_changes_nothing(tmp_path_factory, recipe, seed):
    path = random_dag(tmp_path_factory.mktemp("dag") / "net.onnx", recipe, seed)
    graph = Graph(path)
    feed = image((1, 4, 5, 5), seed)
    plain, everything = run(path, feed), run(marked(graph, graph.tensors), feed)
    assert set(everything) == {*graph.tensors, *plain}
    for name, array in plain.items():
        assert everything[name].tobytes() == array.tobytes()


@settings(max_examples=40, deadline=None)
@given(recipe=RECIPES, seed=st.integers(0, 1000), cuts=st.sets(st.integers(1, 30), max_size=4))
def test_chained_segments_reproduce_the_whole(tmp_path_factory, recipe, seed, cuts):
    path = random_dag(tmp_path_factory.mktemp("dag") / "net.onnx", recipe, seed)
    graph = Graph(path)
    live = image((1, 4, 5, 5), seed)
    whole = run(marked(graph, graph.tensors), live)
    edges = sorted({0, len(graph.nodes), *(c for c in cuts if c < len(graph.nodes))})
    for start, stop in pairwise(edges):
        nodes = graph.nodes[start:stop]
        model = surgery.extract(graph, nodes, [o for n in nodes for o in n.outputs])
        live |= run(model, {v.name: live[v.name] for v in model.graph.input})
    for name, array in whole.items():
        assert live[name].tobytes() == array.tobytes()


@settings(max_examples=30, deadline=None)
@given(recipe=RECIPES, seed=st.integers(0, 1000), order=st.randoms(use_true_random=False))
def test_a_graph_is_read_in_topological_order_however_it_was_written(tmp_path_factory, recipe, seed, order):
    path = random_dag(tmp_path_factory.mktemp("dag") / "net.onnx", recipe, seed)
    model = onnx.load(path)
    nodes = list(model.graph.node)
    order.shuffle(nodes)
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    onnx.save(model, str(path))
    graph = Graph(path)
    made = {"x"}
    for node in graph.nodes:
        assert {name for name in node.inputs if name in graph.producer} <= made
        made.update(node.outputs)
    assert len(graph.nodes) == len(nodes)


def test_a_segment_keeps_metadata_and_only_its_own_weights(tmp_path):
    graph = Graph(second_like(tmp_path / "net.onnx"))
    nodes, starts = graph.segment(["relu_5"], ["relu_2"])
    model = surgery.extract(graph, nodes, ["relu_5"])
    assert starts == ["relu_2"]
    assert [n.op_type for n in model.graph.node] == ["Conv", "BatchNormalization", "Relu"]
    assert all(n.metadata_props[0].value == "NetBuilder" for n in model.graph.node)
    assert {t.name for t in model.graph.initializer} == {i for n in nodes for i in n.inputs} & set(graph.initializers)
    onnx.checker.check_model(model, full_check=True)


def test_outputs_that_a_segment_does_not_compute_are_refused(tmp_path):
    graph = Graph(second_like(tmp_path / "net.onnx"))
    with pytest.raises(InputError, match="does not compute 'relu_5'"):
        surgery.extract(graph, graph.nodes[:2], ["relu_5"])


def test_types_of_the_caller_make_a_segment_of_unknown_types_runnable(tmp_path):
    path = residual(tmp_path / "net.onnx")
    model = onnx.load(path)
    del model.graph.value_info[:]
    model.graph.node[0].op_type, model.graph.node[0].domain = "Conv", "com.microsoft.nchwc"
    model.opset_import.append(helper.make_opsetid("com.microsoft.nchwc", 1))
    onnx.save(model, str(path))
    graph = Graph(path)
    nodes, _ = graph.segment(["relu_1"], ["conv_0"])
    given = surgery.extract(graph, nodes, ["relu_1"], {"conv_0": surgery.tensor_type(np.float32)})
    assert run(given, {"conv_0": -np.ones((1, 2, 2), np.float32)})["relu_1"].max() == 0


@pytest.mark.parametrize("folder", ["beside", "elsewhere", "linked"])
def test_saved_models_run_wherever_they_are_put(tmp_path, monkeypatch, folder):
    (tmp_path / "models").mkdir()
    original = with_external_data(second_like(tmp_path / "models" / "net.onnx"))
    before = {f.name: f.stat().st_mtime_ns for f in original.parent.iterdir()}
    graph = Graph(original)
    target = (tmp_path / "out.onnx") if folder != "beside" else original.with_name("marked.onnx")
    if folder == "linked":
        monkeypatch.setattr(surgery, "INLINE_LIMIT", 0)
    surgery.save(marked(graph, ["relu_5"]), graph, target)
    feed = image((1, 16, 32, 32))
    assert run(target, feed)["heatmap"].tobytes() == run(original, feed)["heatmap"].tobytes()
    assert (tmp_path / "big.data").exists() == (folder == "linked")
    after = {f.name: f.stat().st_mtime_ns for f in original.parent.iterdir() if f != target}
    assert after == before


def test_models_from_memory_find_external_data_in_a_folder_nobody_may_write(tmp_path):
    original = with_external_data(second_like(tmp_path / "net.onnx"))
    graph = Graph(original)
    nodes, _ = graph.segment(["relu_5"], ["relu_2"])
    model = surgery.extract(graph, nodes, ["relu_5"])
    assert model.graph.initializer[0].data_location == onnx.TensorProto.EXTERNAL
    feed = image((1, 16, 32, 32))
    whole = run(marked(graph, ["relu_2", "relu_5"]), feed, tmp_path)
    part = run(model, {"relu_2": whole["relu_2"]}, surgery.weights_folder(graph))
    assert part["relu_5"].tobytes() == whole["relu_5"].tobytes()


def test_a_failed_save_leaves_nothing(tmp_path):
    graph = Graph(second_like(tmp_path / "net.onnx"))
    target = tmp_path / "taken"
    target.mkdir()
    with pytest.raises(InputError, match="taken: cannot be written"):
        surgery.save(marked(graph, []), graph, target)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["net.onnx", "taken"]


def test_types_and_tensors_of_a_graph_with_sequences(tmp_path):
    net = NetBuilder()
    parts = net.op("SplitToSequence", "x", name="parts", axis=1)
    net.op("SequenceAt", parts, net.weight(np.array(1)), name="y")
    graph = Graph(net.save(tmp_path / "seq.onnx", {"x": (1, [1, 4, 5, 5])}, ["y"]))
    assert graph.values == ["parts", "y"]
    assert graph.tensors == ["y"]


class TestBadFiles:
    def test_missing(self, tmp_path):
        with pytest.raises(InputError, match=r"absent\.onnx: no such ONNX file"):
            Graph(tmp_path / "absent.onnx")

    @pytest.mark.parametrize("kept", [0, 0.2, 0.5, 0.99])
    def test_truncated(self, tmp_path, kept):
        path = second_like(tmp_path / "net.onnx")
        content = path.read_bytes()
        path.write_bytes(content[: int(len(content) * kept)])
        with pytest.raises(InputError, match="not a complete ONNX file"):
            Graph(path)

    def test_missing_external_data(self, tmp_path):
        path = with_external_data(second_like(tmp_path / "net.onnx"))
        (tmp_path / "big.data").unlink()
        with pytest.raises(InputError, match=r"external data file big\.data is missing"):
            Graph(path)

    def test_truncated_external_data(self, tmp_path):
        path = with_external_data(second_like(tmp_path / "net.onnx"))
        os.truncate(tmp_path / "big.data", 1000)
        with pytest.raises(InputError, match=r"big\.data: 1000 bytes, but .* it is cut short"):
            Graph(path)


@pytest.mark.process
def test_three_gigabytes_are_marked_and_cut_without_reading_them(tmp_path):
    """A sparse file stands for the weights: 24 matrices of 128 MiB."""
    side, layers = 8192, 12
    weights = []
    for i in range(layers):
        tensor = onnx.TensorProto(name=f"w{i}", data_type=1, dims=[side, side], data_location=onnx.TensorProto.EXTERNAL)
        for key, value in (("location", "w.data"), ("offset", i * side * side * 4), ("length", side * side * 4)):
            tensor.external_data.add(key=key, value=str(value))
        weights.append(tensor)
    names = ["x", *(f"y{i}" for i in range(layers))]
    nodes = [helper.make_node("MatMul", [names[i], f"w{i}"], [names[i + 1]]) for i in range(layers)]
    info = [helper.make_tensor_value_info(n, 1, [1, side]) for n in ("x", names[-1])]
    graph = helper.make_graph(nodes, "big", info[:1], info[1:], weights)
    (tmp_path / "w.data").touch()
    os.truncate(tmp_path / "w.data", layers * side * side * 4)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.save(model, str(tmp_path / "big.onnx"))

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    big = Graph(tmp_path / "big.onnx")
    surgery.save(marked(big, big.tensors), big, tmp_path / "marked.onnx")
    segment = surgery.extract(big, big.nodes[3:4], ["y3"])
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000, "kilobytes"
    assert (tmp_path / "marked.onnx").stat().st_size < 1 << 20
    assert len(Graph(tmp_path / "marked.onnx").outputs) == layers
    assert run(segment, {"y2": np.ones((1, side), np.float32)}, tmp_path)["y3"].shape == (1, side)


def test_a_file_that_is_in_the_way_of_external_data_stays(tmp_path, monkeypatch):
    (tmp_path / "models").mkdir()
    graph = Graph(with_external_data(second_like(tmp_path / "models" / "net.onnx")))
    monkeypatch.setattr(surgery, "INLINE_LIMIT", 0)
    foreign = tmp_path / "big.data"
    foreign.write_bytes(b"mine")
    with pytest.raises(InputError, match=r"big\.data: in the way of the external data of .*models"):
        surgery.save(marked(graph, []), graph, tmp_path / "out.onnx")
    assert foreign.read_bytes() == b"mine"
    assert not (tmp_path / "out.onnx").exists()


def test_a_weight_takes_its_elements_times_their_size() -> None:
    for dtype, size in ((np.float32, 4), (np.float16, 2), (np.int64, 8), (np.uint8, 1)):
        assert tensor_bytes(onnx.numpy_helper.from_array(np.zeros((3, 5), dtype))) == 15 * size


def test_new_names_are_those_that_nobody_has(tmp_path: Path) -> None:
    net = NetBuilder()
    net.op("Add", "x", net.weight(np.ones(1, np.float32), "w"), name="y")
    fresh = unused_names(Graph(net.save(tmp_path / "net.onnx", {"x": (1, [1])}, ["y"])))
    assert [fresh(n) for n in ("x", "w", "y", "node_y", "z", "z")] == ["x_", "w_", "y_", "node_y_", "z", "z_"]
