"""Inputs that are made up: sizes of free axes, values that fit the operators, found by constraints and by trying."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from nets import NetBuilder
from onnx import TensorProto, helper, numpy_helper

from cp_debug.bisect.engine import Options, bisect
from cp_debug.errors import InputError
from cp_debug.graph.check_inputs import check_inputs
from cp_debug.graph.graph import Graph
from cp_debug.graph.input_values import ways
from cp_debug.graph.made_up import MadeUp
from cp_debug.recipes.registry import load_model

FLOAT, INT64 = TensorProto.FLOAT, TensorProto.INT64
node = helper.make_node


def weight(name, *shape):
    return numpy_helper.from_array(np.random.default_rng(0).standard_normal(shape).astype(np.float32), name)


def constant(name, value, dtype=np.int64):
    return numpy_helper.from_array(np.asarray(value, dtype), name)


def save(path, nodes, inputs, weights=(), opset=17):
    """``inputs``: name → shape, or (type, shape); the output is ``y``."""
    declared = [
        helper.make_tensor_value_info(name, *(kind if isinstance(kind, tuple) else (FLOAT, kind)))
        for name, kind in inputs.items()
    ]
    graph = helper.make_graph(nodes, "g", declared, [onnx.ValueInfoProto(name="y")], list(weights))
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=9)
    onnx.save(onnx.shape_inference.infer_shapes(model), str(path))
    return path


def made(path):
    """The inputs of seed 0, after ONNX Runtime ran them to finite numbers."""
    graph = Graph(path)
    arrays = MadeUp(graph).sample(0)
    check_inputs(graph.inputs, arrays, "made up")
    (y,) = onnxruntime.InferenceSession(str(path)).run(["y"], arrays)
    assert np.isfinite(y).all()
    return arrays


@pytest.mark.parametrize("free", [-1, "?", None, "None"])
def test_axes_without_a_name_are_free(tmp_path, free):
    path = save(tmp_path / "m.onnx", [node("Conv", ["x", "w"], ["y"])], {"x": [free] * 4}, [weight("w", 4, 3, 3, 3)])
    assert made(path)["x"].shape == (1, 3, 64, 64)
    check_inputs(Graph(path).inputs, {"x": np.zeros((2, 3, 8, 9), np.float32)}, "given")


@pytest.mark.parametrize("name", ["unk__1", "p2o.DynamicDimension.0", "samples", "batch-size", "a + b", "N"])
def test_a_free_first_axis_of_any_name_is_one_sample(tmp_path, name):
    path = save(tmp_path / "m.onnx", [node("Relu", ["x"], ["y"])], {"x": [name, 3, 8, 8]})
    assert made(path)["x"].shape == (1, 3, 8, 8)


def test_recurrent_layers_get_whole_sequences(tmp_path):
    nodes = [node("LSTM", ["x", "w", "r", "", "lengths"], ["y"], hidden_size=8)]
    inputs = {"x": ["T", "N", 16], "lengths": (TensorProto.INT32, ["N"])}
    arrays = made(save(tmp_path / "m.onnx", nodes, inputs, [weight("w", 1, 32, 16), weight("r", 1, 32, 8)]))
    assert arrays["x"].shape == (64, 1, 16)
    assert arrays["lengths"].tolist() == [64]


def test_a_size_that_only_one_layer_wants_is_found_by_trying(tmp_path):
    nodes = [
        node("Conv", ["x", "w"], ["c"], strides=[32, 32]),
        node("Reshape", ["c", "shape"], ["f"]),
        node("Gemm", ["f", "g"], ["y"]),
    ]
    weights = [weight("w", 4, 3, 32, 32), constant("shape", [-1, 196]), weight("g", 196, 10)]
    assert made(save(tmp_path / "m.onnx", nodes, {"x": ["n", 3, "h", "w_"]}, weights))["x"].shape == (1, 3, 224, 224)


@pytest.mark.parametrize(
    ("nodes", "inputs", "weights", "shapes"),
    [
        (
            [node("Transpose", ["x"], ["t"], perm=[0, 3, 1, 2]), node("Conv", ["t", "w"], ["y"])],
            {"x": [-1, -1, -1, -1]},
            [weight("w", 4, 5, 3, 3)],
            {"x": (1, 64, 64, 5)},
        ),
        ([node("Add", ["x", "p"], ["y"])], {"x": [None, "s", 8]}, [weight("p", 1, 197, 8)], {"x": (1, 197, 8)}),
        ([node("MatMul", ["a", "b"], ["y"])], {"a": ["n", "k"], "b": [7, "m"]}, [], {"a": (1, 7), "b": (7, 7)}),
        ([node("Add", ["a", "b"], ["y"])], {"a": ["n", "s"], "b": ["n", "s"]}, [], {"a": (1, 64), "b": (1, 64)}),
        ([node("Relu", ["x"], ["y"])], {"x": ["batch", 3, "N"]}, [], {"x": (1, 3, 64)}),
        ([node("Conv", ["x", "w"], ["y"])], {"x": None}, [weight("w", 4, 2, 3)], {"x": (1, 2, 64)}),
    ],
    ids=["channels last", "positions", "two symbols", "one symbol", "points", "no shape"],
)
def test_sizes_fit_the_operators(tmp_path, nodes, inputs, weights, shapes):
    arrays = made(save(tmp_path / "m.onnx", nodes, inputs, weights))
    assert {name: array.shape for name, array in arrays.items()} == shapes


@pytest.mark.parametrize("total", ["past + s", "total"])
def test_what_was_kept_and_what_is_new_make_the_whole(tmp_path, total):
    nodes = [
        node("Concat", ["past", "x"], ["k"], axis=1),
        node("Transpose", ["k"], ["t"], perm=[0, 2, 1]),
        node("MatMul", ["x", "t"], ["scores"]),
        node("Add", ["scores", "mask"], ["y"]),
    ]
    inputs = {"x": ["batch", "s", 16], "past": ["batch", "past", 16], "mask": ["batch", 1, total]}
    arrays = made(save(tmp_path / "m.onnx", nodes, inputs))
    assert arrays["mask"].shape == (1, 1, arrays["x"].shape[1] + arrays["past"].shape[1])
    assert not arrays["mask"].any()


def test_token_models_run(tmp_path):
    nodes = [
        node("Gather", ["words", "input_ids"], ["e"]),
        node("Gather", ["kinds", "token_type_ids"], ["t"]),
        node("Gather", ["places", "position_ids"], ["p"]),
        node("Sum", ["e", "t", "p"], ["a"]),
        node("Cast", ["attention_mask"], ["m"], to=FLOAT),
        node("Sub", ["one", "m"], ["inverse"]),
        node("Mul", ["inverse", "far"], ["bias"]),
        node("ReduceSum", ["a", "last"], ["s"], keepdims=0),
        node("Add", ["s", "bias"], ["l"]),
        node("Softmax", ["l"], ["y"]),
    ]
    names = ("input_ids", "token_type_ids", "position_ids", "attention_mask")
    weights = [weight("words", 1000, 4), weight("kinds", 2, 4), weight("places", 80, 4), constant("last", [-1])]
    weights += [constant("one", 1, np.float32), constant("far", -np.inf, np.float32)]
    path = save(tmp_path / "m.onnx", nodes, {n: (INT64, ["b", "s"]) for n in names}, weights)
    arrays = MadeUp(Graph(path)).sample(0)
    assert arrays["input_ids"].max() > 500
    assert arrays["token_type_ids"].max() < 2
    assert arrays["position_ids"].tolist() == [list(range(64))]
    assert (arrays["attention_mask"] == 1).all()
    assert MadeUp(Graph(path)).reasons() == [
        "input_ids: random integers 0 to 999, which Gather can pick",
        "token_type_ids: random integers 0 to 1, which Gather can pick",
        "position_ids: 0, 1, 2 … below 80: positions, by its name",
        "attention_mask: 1 everywhere: a mask, by its name",
    ]
    onnxruntime.InferenceSession(str(path)).run(None, arrays)


def test_values_fit_the_functions_that_read_them(tmp_path):
    nodes = [
        *(node(op, [op], [f"{op}_"]) for op in ("Log", "Sqrt", "Acosh", "Asin")),
        node("Div", ["one", "denominator"], ["d"]),
        node("Sum", ["Log_", "Sqrt_", "Acosh_", "Asin_", "d"], ["y"]),
    ]
    inputs = {name: ["n", 500] for name in ("Log", "Sqrt", "Acosh", "Asin", "denominator")}
    arrays = made(save(tmp_path / "m.onnx", nodes, inputs, [constant("one", 1, np.float32)]))
    assert arrays["denominator"].min() > 0.05


def test_a_hidden_domain_is_found_by_trying(tmp_path):
    """Negative numbers give NaN, behind an operator that nothing is known of."""
    nodes = [node("CumSum", ["x", "axis"], ["c"]), node("Log", ["c"], ["y"])]
    made(save(tmp_path / "m.onnx", nodes, {"x": [1, 50]}, [constant("axis", 1)]))


def test_pixels_are_made_where_the_graph_scales_them(tmp_path):
    nodes = [node("Sub", ["x", "mean"], ["s"]), node("Div", ["s", "spread"], ["y"])]
    weights = [constant(n, np.full((1, 3, 1, 1), v), np.float32) for n, v in (("mean", 120), ("spread", 58))]
    x = made(save(tmp_path / "m.onnx", nodes, {"x": ["n", 3, "h", "w"]}, weights))["x"]
    assert x.min() >= 0
    assert 200 < x.max() <= 255


def test_arguments_that_say_how_are_made(tmp_path):
    nodes = [
        node("TopK", ["x", "k"], ["v", "i"]),
        node("Reshape", ["v", "shape"], ["r"]),
        node("Equal", ["rate", "known"], ["e"]),
        node("Where", ["e", "r", "none"], ["y"]),
    ]
    inputs = {"x": ["n", 50], "k": (INT64, [1]), "shape": (INT64, [3]), "rate": (INT64, [])}
    path = save(tmp_path / "m.onnx", nodes, inputs, [constant("known", 16000), constant("none", np.nan, np.float32)])
    assert made(path)["rate"] == 16000


@pytest.mark.parametrize("kind", [TensorProto.UINT16, TensorProto.INT16, TensorProto.UINT8])
def test_narrow_integers_are_over_their_range(tmp_path, kind):
    path = save(tmp_path / "m.onnx", [node("Cast", ["x"], ["y"], to=FLOAT)], {"x": (kind, ["n", 3, 40, 40])})
    x = made(path)["x"]
    limits = np.iinfo(x.dtype)
    assert x.max() > 0.95 * limits.max
    assert x.min() < limits.min + 0.05 * limits.max


def test_rows_that_indices_choose_are_no_batch(tmp_path):
    """A graph network: nodes and edges; a table of one row would make every index zero."""
    nodes = [
        node("Gather", ["edges", "first"], ["source"]),
        node("Gather", ["x", "source"], ["y"]),
    ]
    path = save(tmp_path / "m.onnx", nodes, {"x": ["nodes", 8], "edges": (INT64, [2, "links"])}, [constant("first", 0)])
    arrays = made(path)
    assert len(arrays["x"]) > 8
    assert 8 < arrays["edges"].max() < len(arrays["x"])


def test_the_size_of_an_image_is_its_size(tmp_path):
    """Paddle's detectors are told the image's size and how it was scaled; so are DETR's."""
    nodes = [
        node("Div", ["im_shape", "scale_factor"], ["a"]),
        node("Cast", ["orig_target_sizes"], ["b"], to=FLOAT),
        node("Add", ["a", "b"], ["c"]),
        node("ReduceMean", ["image"], ["m"], axes=[2, 3], keepdims=0),
        node("Gemm", ["m", "w"], ["d"]),
        node("Add", ["c", "d"], ["y"]),
    ]
    sizes = {"im_shape": ["n", 2], "scale_factor": ["n", 2], "orig_target_sizes": (INT64, ["n", 2])}
    path = save(
        tmp_path / "m.onnx", nodes, {"image": ["n", 3, 48, 80], **sizes}, [constant("w", np.ones((3, 2)), np.float32)]
    )
    arrays = made(path)
    assert arrays["im_shape"].tolist() == arrays["orig_target_sizes"].tolist() == [[48, 80]]
    assert arrays["scale_factor"].tolist() == [[1, 1]]


def test_one_size_that_fits_is_found(tmp_path):
    nodes = [
        node("Conv", ["x", "k"], ["h"], strides=[2, 2]),
        node("Flatten", ["h"], ["f"]),
        node("Gemm", ["f", "w"], ["y"]),
    ]
    weights = [constant("k", np.ones((4, 1, 3, 3)), np.float32), constant("w", np.ones((4 * 21 * 21, 2)), np.float32)]
    assert made(save(tmp_path / "m.onnx", nodes, {"x": ["n", 1, "h", "w"]}, weights))["x"].shape[2:] == (43, 43)


def test_names_that_torch_makes_of_an_input_say_nothing_of_the_axis(tmp_path):
    inputs = {"x": ["x_dynamic_axes_1", 8, "x_dynamic_axes_2"], "lengths": (INT64, ["lengths_dynamic_axes_1"])}
    nodes = [node("Cast", ["lengths"], ["l"], to=FLOAT), node("ReduceMean", ["x"], ["m"], axes=[1, 2], keepdims=0)]
    arrays = made(save(tmp_path / "m.onnx", [*nodes, node("Add", ["l", "m"], ["y"])], inputs))
    assert arrays["lengths"].tolist() == [arrays["x"].shape[2]]
    assert len(arrays["x"]) == 1


def test_what_cannot_run_says_which_input_to_give(tmp_path):
    path = save(tmp_path / "m.onnx", [node("Reshape", ["x", "s"], ["y"])], {"x": ["n", 7]}, [constant("s", [5, 5])])
    with pytest.raises(
        InputError,
        match=r"m\.onnx: none of \d+ generated inputs runs \(node .* \(Reshape\): .*"
        r"\); give one with --inputs: an \.npz file with x: float32\[n, 7\]",
    ):
        MadeUp(Graph(path)).sample(0)


def test_seeds_differ_and_sizes_do_not(tmp_path):
    path = save(tmp_path / "m.onnx", [node("Relu", ["x"], ["y"])], {"x": ["n", "s"]})
    model = load_model(str(path))
    first, second = (s.arrays["x"] for s in model.samples(2, 0, None))
    assert first.shape == second.shape == (1, 64)
    assert not np.array_equal(first, second)


def test_optimized_levels_open_on_the_given_input(tmp_path, monkeypatch):
    """Nothing is made up beside --inputs: what is made up may not fit, and is of another size."""
    nodes = [node("Conv", ["x", "w"], ["c"]), node("Relu", ["c"], ["r"]), node("Conv", ["r", "v"], ["y"])]
    path = save(
        tmp_path / "m.onnx", nodes, {"x": [-1, 3, "h", "w"]}, [weight("w", 8, 3, 3, 3), weight("v", 8, 8, 3, 3)]
    )
    np.savez(tmp_path / "in.npz", x=np.ones((1, 3, 8, 8), np.float32))
    monkeypatch.setattr(MadeUp, "sample", lambda self, seed: pytest.fail("an input was made up"))
    result = bisect(str(path), "ort-none,ort-all", options=Options(inputs=tmp_path / "in.npz"))
    assert result.agrees
    assert result.tests[0].backend.settings["observer_gap"] == 0


def test_bfloat16_comes_as_bits_or_rounded(tmp_path):
    path = save(tmp_path / "m.onnx", [node("Relu", ["x"], ["y"])], {"x": (TensorProto.BFLOAT16, ["n", 3])})
    x = MadeUp(Graph(path)).sample(0)["x"]
    model = load_model(str(path))
    for given in (x, x.astype(np.float32)):
        np.savez(tmp_path / "in.npz", x=given)
        (sample,) = model.samples(1, 0, tmp_path / "in.npz")
        assert sample.arrays["x"].dtype == x.dtype
        assert sample.arrays["x"].tobytes() == x.tobytes()


REASONS = {
    "image": ({"x": ["n", 3, "h", "w"]}, node("Relu", ["x"], ["y"]), "x: N(0, 1), like a normalized image"),
    "pixels": ({"x": [1, 3, 8, 8]}, node("Div", ["x", "c"], ["y"]), "x: 0 to 255: pixels, which Div scales"),
    "bytes": (
        {"x": (TensorProto.UINT8, [1, 8, 8, 3])},
        node("Cast", ["x"], ["y"], to=FLOAT),
        "x: over the range of uint8, like an image",
    ),
    "points": (
        {"points": [100, 4]},
        node("Relu", ["points"], ["y"]),
        "points: x, y within ±10, z within ±2, others 0 to 1: a point cloud, by its name and shape",
    ),
    "domain": ({"x": [1, 8]}, node("Log", ["x"], ["y"], "l"), "x: positive, for Log 'l'"),
    "nothing to say": ({"x": [1, 8]}, node("Relu", ["x"], ["y"]), None),
}


@pytest.mark.parametrize("kind", REASONS)
def test_what_is_made_up_has_its_reason(tmp_path, kind):
    inputs, reader, says = REASONS[kind]
    path = save(tmp_path / "m.onnx", [reader], inputs, [constant("c", 255, np.float32)] * (kind == "pixels"))
    model = load_model(str(path))
    (sample,) = model.samples(1, 0, None)
    assert model.remarks(sample) == ([f"generated inputs: {says}"] if says else [])
    if kind == "points":
        assert (np.abs(sample.arrays["points"]).max(0) <= (10, 10, 2, 1)).all()
        assert np.abs(sample.arrays["points"][:, 0]).max() > 5
    if kind == "image":
        assert bisect(model, "ort-none,ort-all").tests[0].notes == [f"generated inputs: {says}"]
        np.savez(tmp_path / "x.npz", **sample.arrays)
        given = bisect(model, "ort-none,ort-all", options=Options(inputs=tmp_path / "x.npz"))
        assert given.tests[0].notes == []


@pytest.mark.parametrize("perm", [[0, 9], [0, 0], [-1, 0]])
def test_a_transposition_that_is_none_says_nothing_about_sizes(tmp_path: Path, perm: list[int]) -> None:
    net = NetBuilder()
    turned = net.op("Transpose", "x", perm=perm)
    path = net.save(
        tmp_path / "net.onnx",
        {"x": (1, ["n", "m"])},
        [net.op("MatMul", turned, net.weight(np.ones((3, 4), np.float32)))],
    )
    assert MadeUp(Graph(path)).sample([0, 0])["x"].ndim == 2


@pytest.mark.parametrize("kind", [FLOAT, INT64, TensorProto.BOOL, TensorProto.UINT8])
@pytest.mark.parametrize("shape", [[1 << 62, 2], [1 << 62, 0, 0, 1], [0, 1 << 31, 1 << 31]])
def test_sizes_that_no_array_has_are_told_with_the_input(tmp_path: Path, kind: int, shape: list[int]) -> None:
    path = save(tmp_path / "net.onnx", [node("Identity", ["x"], ["y"])], {"x": (kind, shape)})
    with pytest.raises(InputError, match=r"input x: .*(GiB|no array has)"):
        MadeUp(Graph(path)).sample(0)


def test_trials_of_made_up_inputs_have_the_first_seed(tmp_path: Path) -> None:
    net = NetBuilder()
    net.op("Neg", "x", name="y")
    made = MadeUp(Graph(net.save(tmp_path / "n.onnx", {"x": (1, [2, 3])}, ["y"])))
    trial = made.make(made._chosen)["x"]
    assert np.array_equal(trial, made.make(made._chosen, 0)["x"])
    assert not np.array_equal(trial, made.make(made._chosen, 1)["x"])


def first_made(folder: Path, op: str, kind: int = TensorProto.FLOAT, **attributes: Any) -> np.ndarray:
    """What is first_made up first for an input of 64 elements that ``op`` reads."""
    net = NetBuilder()
    net.op(op, "x", name="y", **attributes)
    graph = Graph(net.save(folder / "n.onnx", {"x": (kind, [4, 16])}, ["y"]))
    way = ways(graph, graph.inputs[0]).ways[0]
    return np.asarray(way.make(np.random.default_rng(0), (4, 16), 99))


@pytest.mark.parametrize(
    ("op", "low", "high"),
    [("Log", 0, np.inf), ("Sqrt", 0, np.inf), ("Acosh", 1, np.inf), ("Atanh", -1, 1), ("Asin", -1, 1), ("Acos", -1, 1)],
)
def test_made_up_numbers_lie_where_the_function_has_a_value(tmp_path: Path, op: str, low: float, high: float) -> None:
    values = first_made(tmp_path, op)
    assert ((low < values) & (values < high)).all()
    assert len(np.unique(values)) == 64  # they differ


def test_made_up_integers_fill_the_range_of_their_type(tmp_path: Path) -> None:
    for kind, low, high in (
        (TensorProto.INT8, -128, 127),
        (TensorProto.UINT8, 0, 255),
        (TensorProto.INT16, -32768, 32767),
    ):
        values = first_made(tmp_path, "Identity", kind)
        assert (values >= low).all()
        assert (values <= high).all()
        assert values.max() - values.min() > 0.7 * (high - low)
    assert set(np.unique(first_made(tmp_path, "Not", TensorProto.BOOL))) == {0, 1}
