"""Predictions: the layers that are expected, intervals that hold what kernels do, range, goals, files and refusals."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from faults.edits import Editor, rescale
from nets import NetBuilder
from onnx import TensorProto, helper
from typer.testing import CliRunner

import cp_debug
from cp_debug.backends.emulated import EmulatedBackend
from cp_debug.backends.registry import create
from cp_debug.backends.spec import parse_backends
from cp_debug.bisect.engine import Options, bisect
from cp_debug.cli.main import app
from cp_debug.errors import InputError
from cp_debug.graph.graph import Graph
from cp_debug.graph.made_up import MadeUp
from cp_debug.graph.qdq import insert_qdq, quantizable
from cp_debug.graph.scales import LayerScales
from cp_debug.prediction.kernels import groups_of
from cp_debug.prediction.predict import PredictOptions, predict
from cp_debug.prediction.result import OVERFLOWS, Interval, Prediction
from cp_debug.programs.batchnorm_folding import fold_in_file
from cp_debug.recipes.registry import load_model
from cp_debug.reports.mixed_precision import render_prediction as render

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
from predict_score import Score, summary


def residual(path: Path, *, channels: int = 16, norm: bool = True) -> Path:
    """Two convolutions, one with BatchNormalization, a residual addition, SiLU and a head: ``x`` to ``y``."""
    net = NetBuilder()
    a = net.conv("x", 8, channels, name="c0")
    a = net.op("Relu", net.batch_norm(a, channels) if norm else a, name="r0")
    b = net.op("Add", net.conv(a, channels, channels, name="c1"), a, name="sum")
    c = net.op("Mul", b, net.op("Sigmoid", b, name="gate"), name="silu")
    net.conv(c, channels, 4, k=1, name="y")
    return net.save(path, {"x": (1, [1, 8, 12, 12])}, ["y"])


def made(prediction: Prediction) -> dict[str, list[str]]:
    return {layer.value: layer.ops for layer in prediction.layers}


def test_layers_are_those_an_engine_fuses(tmp_path: Path) -> None:
    prediction = predict(str(residual(tmp_path / "net.onnx")))
    assert made(prediction) == {
        "r0": ["Conv", "Relu"],
        "silu": ["Conv", "Add", "Sigmoid", "Mul"],
        "y": ["Conv"],
    }


def test_a_normalization_in_parts_is_one_layer(tmp_path: Path) -> None:
    net = NetBuilder()
    mean = net.op("ReduceMean", "x", name="mean", axes=[-1], keepdims=1)
    centred = net.op("Sub", "x", mean, name="centred")
    two, eps = net.weight(np.array(2, np.float32)), net.weight(np.array(1e-5, np.float32))
    variance = net.op("ReduceMean", net.op("Pow", centred, two), name="variance", axes=[-1], keepdims=1)
    normal = net.op("Div", centred, net.op("Sqrt", net.op("Add", variance, eps)), name="normal")
    net.op("Add", net.op("Mul", normal, net.weight(np.ones(8, np.float32))), "x", name="y")
    graph = Graph(net.save(tmp_path / "norm.onnx", {"x": (1, [2, 8])}, ["y"]))
    (group,) = groups_of(graph)
    assert len(group.nodes) == 9


def test_groups_hold_every_node_once_and_come_in_an_order_that_runs(tmp_path: Path) -> None:
    net = NetBuilder()
    short = net.conv("x", 8, 16, k=1, name="short")  # behind the main branch in the addition, before it in the file
    main = net.conv(net.op("Relu", net.conv("x", 8, 16)), 16, 16)
    both = net.op("Add", main, short, name="both")
    left, right = net.op("Relu", both, name="left"), net.op("Tanh", both, name="right")
    net.op("Concat", left, right, axis=1, name="y")
    graph = Graph(net.save(tmp_path / "net.onnx", {"x": (1, [1, 8, 6, 6])}, ["y"]))
    groups = groups_of(graph)
    assert sorted(n.index for g in groups for n in g.nodes) == list(range(len(graph.nodes)))
    known = {"x", *graph.initializers}
    for group in groups:
        own = {o for n in group.nodes for o in n.outputs}
        assert all(name in known | own for node in group.nodes for name in node.inputs)
        known |= own


def test_intervals_hold_what_each_kernel_introduces(tmp_path: Path) -> None:
    path = residual(tmp_path / "net.onnx", channels=32, norm=False)
    prediction = predict(str(path))
    for spec in ("emu-fp16", "emu-fp16acc"):
        result = bisect(
            load_model(str(path)),
            [create(s) for s in parse_backends(f"ort-none,{spec}")],
            options=Options(explain=False),
        )
        rows = json.loads(json.dumps(result.to_dict()))["tests"][0]["layers"]
        told = summary(Score(prediction, rows).rows())
        assert told["error"]["missing"] == 0
        assert told["error"]["coverage"] == 1.0, told


def test_a_wrong_engine_is_outside(tmp_path: Path) -> None:
    """The scorer's own check: an engine that is 3 times as far off as any kernel is above every interval."""
    path = residual(tmp_path / "net.onnx")
    prediction = predict(str(path))
    rows = [
        {"component": layer.component, "onnx": layer.value, "op": layer.ops[-1], "rel_l2": 3 * layer.error.high,
         "introduced": 3 * layer.introduced.high, "tactic": ""}
        for layer in prediction.layers if layer.introduced is not None
    ]  # fmt: skip
    told = summary(Score(prediction, rows).rows())
    assert told["error"]["above"] == told["introduced"]["above"] == len(rows)
    unknown = [{"component": "net", "onnx": "other", "op": "Conv", "rel_l2": 1e-4, "introduced": 1e-4, "tactic": ""}]
    assert summary(Score(prediction, unknown).rows())["error"]["missing"] == 1


def test_what_leaves_the_range_stays_in_fp32(tmp_path: Path) -> None:
    net, x = NetBuilder(), "x"
    for i in range(4):
        x = net.op("Relu", net.conv(x, 8, 8, name=f"c{i}"), name=f"r{i}")
    editor = Editor(net.save(tmp_path / "net.onnx", {"x": (1, [1, 8, 8, 8])}, [x]))
    rescale(editor, "c1", "c2", 2.0**18)
    prediction = predict(str(editor.save(tmp_path / "net.onnx")))
    beyond = {layer.value for layer in prediction.layers if layer.range == OVERFLOWS}
    assert beyond == {"r1"}
    assert next(layer for layer in prediction.layers if layer.value == "r1").error.high == np.inf
    assert "worst output r3 holds NaN or Inf, 1 beyond FP16's range" in prediction.verdict
    assert "node_c1" in prediction.keep[prediction.layers[0].component]
    again = predict(str(tmp_path / "net.onnx"), options=PredictOptions(goal="rel_l2<1e-2"))
    assert again.reached
    assert {"node_c1", "node_c2"} <= set(again.keep[again.layers[0].component])


@pytest.mark.parametrize(("precision", "target"), [("bf16", "trt-10"), ("tf32", "trt-8.6"), ("fp16", "trt-11")])
def test_every_precision(tmp_path: Path, precision: str, target: str) -> None:
    prediction = predict(str(residual(tmp_path / "net.onnx")), precision, target)
    roundoff = {"bf16": 2.0**-9, "tf32": 2.0**-11, "fp16": 2.0**-11}[precision]
    for layer in prediction.layers:
        assert layer.introduced is not None
        assert 0 < layer.introduced.low <= layer.introduced.expected <= layer.introduced.high < 8 * roundoff
    assert prediction.weak == (target != "trt-11")


def test_int8_of_a_quantized_file(tmp_path: Path) -> None:
    graph = Graph(residual(tmp_path / "plain.onnx"))
    scales = {}
    for node in quantizable(graph):
        largest = np.abs(graph.initializer(node.proto.input[1])).max((1, 2, 3))
        scales[node.name] = LayerScales(4.0, largest)
    path = insert_qdq(graph, scales, tmp_path / "net.onnx")
    prediction = predict(str(path), "int8")
    (output,) = prediction.outputs
    real = cp_debug.diagnose(
        str(tmp_path / "plain.onnx"), "ort-none,ort-int8", test_model=path, options=Options(explain=False)
    )
    measured = real.tests[0].outputs[0].stats.rel_l2
    assert output.error.low <= measured <= output.error.high
    with pytest.raises(InputError, match="has no QuantizeLinear nodes"):
        predict(str(tmp_path / "plain.onnx"), "int8")


def test_a_torch_module(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(
        "import torch\n"
        "def build():\n"
        "    torch.manual_seed(0)\n"
        "    net = torch.nn.Sequential(torch.nn.Conv2d(8, 16, 3), torch.nn.BatchNorm2d(16), torch.nn.ReLU())\n"
        "    return net.eval(), (torch.randn(1, 8, 8, 8),)\n"
    )
    prediction = predict(f"{tmp_path / 'net.py'}:build")
    assert [layer.ops for layer in prediction.layers] == [["Conv", "Relu"]]
    assert any("opset 17" in note for note in prediction.notes)


def test_two_samples_and_back_from_json(tmp_path: Path) -> None:
    path = str(residual(tmp_path / "net.onnx"))
    one, two = predict(path), predict(path, options=PredictOptions(samples=2))
    for first, both in zip(one.layers, two.layers, strict=True):
        assert both.error.low <= first.error.low
        assert both.error.high >= first.error.high
    two.save(tmp_path / "p.json")
    assert Prediction.open(tmp_path / "p.json").to_dict() == two.to_dict()
    (tmp_path / "p.json").write_text('{"schema": "cpdebug.search/1"}')
    with pytest.raises(InputError, match="schema"):
        Prediction.open(tmp_path / "p.json")


def test_batchnorm_folds_without_changing_what_is_computed(tmp_path: Path) -> None:
    graph = Graph(residual(tmp_path / "net.onnx"))
    folded = fold_in_file(graph, tmp_path / "folded.onnx")
    assert not any(node.op == "BatchNormalization" for node in folded.nodes)
    from cp_debug.backends.executor import Executor

    feed = MadeUp(graph).sample(np.random.default_rng(0))
    before, after = Executor(graph).run(feed)["y"], Executor(folded).run(feed)["y"]
    assert float((before - after).norm() / before.norm()) < 1e-6


def test_interval() -> None:
    interval = Interval.around(2.0, [1.0, 4.0], 1.25)
    assert (interval.low, interval.high) == (0.8, 5.0)
    assert Interval.around(2.0, [0.0, 4.0], 1.25).joined(interval) == Interval(0.0, 2.0, 5.0)


def test_the_command(tmp_path: Path) -> None:
    path = str(residual(tmp_path / "net.onnx"))
    found = CliRunner().invoke(app, ["predict", path, "--all", "--json", str(tmp_path / "p.json")])
    assert found.exit_code == 0, found.output
    assert "silu" in found.output
    assert Prediction.open(tmp_path / "p.json").precision == "fp16"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--target", "trt-7"], "known are trt-8.6, trt-10, trt-11"),
        (["--precision", "fp8"], "known are fp16, bf16, tf32, int8"),
        (["--precision", "bf16"], "does not compute in bf16"),
        (["--goal", "nonsense<1"], "no figure 'nonsense'"),
        (["--exporter", "dynamo"], "is exported already"),
    ],
)
def test_refusals_before_anything_runs(tmp_path: Path, arguments: list[str], said: str) -> None:
    path = str(residual(tmp_path / "net.onnx"))
    with pytest.raises(InputError, match=said):
        CliRunner().invoke(app, ["predict", path, *arguments], catch_exceptions=False, standalone_mode=False)


def norms(path: Path) -> Path:
    """Two convolutions, instance norm and ReLU, a pool, two convolutions: ``x`` to ``y``."""
    net = NetBuilder()
    a = net.conv(net.conv("x", 8, 16, name="c0"), 16, 16, name="c1")
    ones, zeros = net.weight(np.ones(16, np.float32)), net.weight(np.zeros(16, np.float32))
    b = net.op("Relu", net.op("InstanceNormalization", a, ones, zeros, name="norm"), name="r")
    c = net.conv(net.op("MaxPool", b, name="pool", kernel_shape=[2, 2], strides=[2, 2]), 16, 16, name="c2")
    net.conv(c, 16, 4, name="y")
    return net.save(path, {"x": (1, [1, 8, 12, 12])}, ["y"])


def test_layers_that_may_stay_in_fp32_begin_at_no_error(tmp_path: Path) -> None:
    prediction = predict(str(norms(tmp_path / "net.onnx")))
    layers = {layer.value: layer for layer in prediction.layers}
    assert [value for value, layer in layers.items() if layer.may_stay] == ["c1", "r", "pool", "c2"]
    for value in ("c1", "r", "c2"):
        introduced = layers[value].introduced
        assert introduced is not None
        assert introduced.low == 0 < introduced.expected, "only its own error can be missing"
        assert layers[value].error.low > 0, "what the convolutions above introduce is there in any case"
    for value in ("c0", "y"):
        introduced = layers[value].introduced
        assert introduced is not None
        assert introduced.low > 0
    assert "mixed" in prediction.kernels
    fixed = predict(str(tmp_path / "net.onnx"), target="trt-11")
    assert "mixed" not in fixed.kernels
    assert not any(layer.may_stay for layer in fixed.layers), "types come from the graph there"


def test_an_engine_that_leaves_them_in_fp32_lies_inside(tmp_path: Path) -> None:
    path = norms(tmp_path / "net.onnx")
    prediction = predict(str(path))
    kept = ["norm", "r", "c1", "c2"]
    nodes = {output: node.name for node in Graph(path).nodes for output in node.outputs}
    reference, test = (create(s) for s in parse_backends("ort-none,emu-fp16"))
    assert isinstance(test, EmulatedBackend)
    engine = test.keeping([nodes[value] for value in kept])
    result = bisect(load_model(str(path)), [reference, engine], options=Options(explain=False))
    rows = json.loads(json.dumps(result.to_dict()))["tests"][0]["layers"]
    score = summary(Score(prediction, rows).rows())
    assert (score["error"]["inside"], score["error"]["from_zero"]) == (score["layers"], 0)
    assert score["introduced"]["inside"] == score["introduced"]["of"]


def unknown(path: Path) -> Path:
    """Instance norms between convolutions, so that every layer may stay in FP32: ``x`` to ``y``."""
    net, value = NetBuilder(), "x"
    for i, (a, b) in enumerate(((8, 16), (16, 16), (16, 4))):
        value = net.conv(value, a, b, name=f"c{i}")
        ones, zeros = net.weight(np.ones(b, np.float32)), net.weight(np.zeros(b, np.float32))
        normal = net.op("InstanceNormalization", value, ones, zeros, name=f"norm{i}")
        value = net.op("Relu", normal, name="y" if i == 2 else f"r{i}")
    return net.save(path, {"x": (1, [1, 8, 12, 12])}, ["y"])


def test_an_engine_that_takes_fp16_for_a_part_lies_inside(tmp_path: Path) -> None:
    path = unknown(tmp_path / "net.onnx")
    prediction = predict(str(path))
    assert all(layer.error.low == 0 < layer.error.expected for layer in prediction.layers)
    reference, test = (create(s) for s in parse_backends("ort-none,emu-fp16"))
    assert isinstance(test, EmulatedBackend)
    names = [node.name for node in Graph(path).nodes]
    for kept in (names, names[:3], names[3:]):  # none, the end, the beginning in FP16
        engine = test.keeping(kept)
        result = bisect(load_model(str(path)), [reference, engine], options=Options(explain=False))
        rows = Score(prediction, json.loads(json.dumps(result.to_dict()))["tests"][0]["layers"]).rows()
        told = summary(rows)["error"]
        outside = [(row.value, row.error, row.error_interval) for row in rows if row.error_is != "inside"]
        assert (told["of"], told["from_zero"], outside) == (9, 9, [])


def test_a_large_product_beside_a_normalization_is_in_fp16(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = unknown(tmp_path / "net.onnx")
    monkeypatch.setattr("cp_debug.prediction.walk.LARGE", 2.0 * 16 * 16 * 9 * 144)  # c1: 16 × 16 channels, 3×3, 12²
    layers = {layer.value: layer for layer in predict(str(path)).layers}
    assert [value for value, layer in layers.items() if not layer.may_stay] == ["c1"]
    assert layers["r0"].error.low == 0
    assert layers["c1"].introduced is not None
    assert layers["c1"].introduced.low > 0
    assert layers["r1"].error.low > 0
    assert layers["y"].error.low > 0
    untimed = predict(str(path), options=PredictOptions(builder_level=0))
    assert all(layer.may_stay for layer in untimed.layers), "the first kernel that works is taken, whatever its type"


def test_without_timings_every_layer_may_stay(tmp_path: Path) -> None:
    path = str(residual(tmp_path / "net.onnx"))
    assert not any(layer.may_stay for layer in predict(path, options=PredictOptions(builder_level=1)).layers)
    found = CliRunner().invoke(app, ["predict", path, "--builder-level", "0", "--json", str(tmp_path / "p.json")])
    assert found.exit_code == 0, found.output
    prediction = Prediction.open(tmp_path / "p.json")
    assert all(layer.may_stay for layer in prediction.layers)
    assert all(layer.error.low == 0 < layer.error.expected for layer in prediction.layers)


def test_a_first_convolution_of_few_channels_is_computed_as_its_kernels_do(tmp_path: Path) -> None:
    net = NetBuilder()
    net.conv(net.conv("x", 3, 16, k=7, name="c0"), 16, 8, name="y")
    prediction = predict(str(net.save(tmp_path / "net.onnx", {"x": (1, [1, 3, 24, 24])}, ["y"])))
    first = prediction.layers[0]
    assert first.introduced is not None
    assert first.may_stay
    assert first.introduced.expected < 0.8 * first.introduced.high / prediction.spread, "fewer sums than tap by tap"


def test_a_sequence_is_predicted_element_by_element(tmp_path: Path) -> None:
    net = NetBuilder()
    value = net.op("Relu", net.conv("x", 3, 4))
    path = net.save(tmp_path / "net.onnx", {"x": (1, [1, 3, 8, 8])}, [value])
    model = onnx.load(path)
    model.graph.node.append(helper.make_node("SplitToSequence", [value], ["parts"], axis=1))
    model.graph.output.append(helper.make_tensor_sequence_value_info("parts", TensorProto.FLOAT, None))
    onnx.save(model, path)
    outputs = predict(str(path), "fp16").outputs
    assert [output.name for output in outputs] == [value, *(f"parts[{i}]" for i in range(4))]
    assert all(0 < output.error.expected < 0.1 for output in outputs)


def test_a_node_with_two_float_results_that_computes_nothing_is_predicted(tmp_path: Path) -> None:
    net = NetBuilder()
    model = onnx.load(net.save(tmp_path / "net.onnx", {"x": (1, [1, 3, 8, 8])}, [net.conv("x", 3, 4)]))
    parts = ["left", "right"]
    model.graph.node.append(helper.make_node("Split", [model.graph.output[0].name], parts, axis=1, num_outputs=2))
    model.graph.output.extend(helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in parts)
    onnx.save(model, tmp_path / "net.onnx")
    result = predict(str(tmp_path / "net.onnx"), "fp16")
    assert [(layer.value, layer.introduced is None) for layer in result.layers][1:] == [("left", True), ("right", True)]


def test_outputs_of_whole_numbers_are_counted_and_a_goal_shows_its_figures(tmp_path: Path) -> None:
    """Columns that are nearly ties change places in FP16; those that are not stay."""
    rng = np.random.default_rng(0)
    for apart, says in ((1.0, "no variant changes it"), (1e-4, "elements differ")):
        net = NetBuilder()
        columns = rng.standard_normal((8, 500)).astype(np.float32)
        columns[:, 1::2] = columns[:, ::2] * np.float32(1 + 0.5 * apart)
        product = net.op("MatMul", "x", net.weight(columns))
        path = net.save(tmp_path / "net.onnx", {"x": (1, [16, 8])}, [net.op("ArgMax", product, axis=1, keepdims=0)])
        result = predict(str(path), "fp16", options=PredictOptions(goal="rel_l2<1e-30"))
        assert not result.outputs
        assert "no output has a relative error" in result.verdict
        assert any(says in note for note in result.notes), result.notes
        assert result.measured["rel_l2"] == 0
        shown = "\n".join(str(part) for part in render(result))
        assert "rel_l2<1e-30 holds on the emulator: rel_l2 0, max_abs 0 over all outputs (emu-fp16acc)" in shown


@pytest.mark.parametrize(
    ("op", "says"),
    [("Sqrt", "is NaN or Inf everywhere in FP32"), ("Slice", "has no element"), ("Div", "is NaN or Inf")],
)
def test_an_output_without_a_number_is_not_predicted(tmp_path: Path, op: str, says: str) -> None:
    """Alone it is refused; beside another output it is told."""
    for alone in (True, False):
        net = NetBuilder()
        product = net.op("MatMul", "x", net.weight(np.eye(8, dtype=np.float32)), name="p")
        square = net.op("Mul", product, product)
        zero = net.weight(np.zeros(1, np.int64 if op == "Slice" else np.float32))
        made = {
            "Sqrt": lambda: net.op("Sqrt", net.op("Sub", zero, net.op("Exp", product))),  # noqa: B023
            "Slice": lambda: net.op("Slice", square, zero, zero, zero),  # noqa: B023
            "Div": lambda: net.op("Div", net.op("Exp", product), zero),  # noqa: B023
        }[op]()
        ends = [made] if alone else [made, square]
        path = str(net.save(tmp_path / "net.onnx", {"x": (1, [2, 8])}, ends))
        if alone:
            with pytest.raises(InputError, match=f"no error of an output can be predicted: {made} {says}"):
                predict(path, "fp16")
            continue
        result = predict(path, "fp16")
        assert [output.name for output in result.outputs] == [square]
        assert any(f"nothing is predicted of {made}, which {says}" in note for note in result.notes)
        assert all(layer.value != made for layer in result.layers)


def test_an_output_that_is_partly_finite_is_predicted_by_the_rest(tmp_path: Path) -> None:
    net = NetBuilder()
    product = net.op("MatMul", "x", net.weight(net.rng.standard_normal((8, 8)).astype(np.float32)))
    made = net.op(
        "Where", net.op("Greater", product, net.weight(np.float32([0.5]))), net.weight(np.float32([-np.inf])), product
    )
    result = predict(str(net.save(tmp_path / "net.onnx", {"x": (1, [4, 8])}, [made])), "fp16")
    assert 0 < result.outputs[0].error.expected < 0.1
    assert any("NaN or Inf of 32 elements in FP32: its error is that of the others" in note for note in result.notes)


def layer_norm(folder: Path, rng: np.random.Generator) -> tuple[Path, np.ndarray]:
    """A LayerNorm taken apart, of values of 400: their squares, which nobody sees, are beyond FP16."""
    net = NetBuilder()
    mean = net.op("ReduceMean", "x", name="mean", axes=[-1])
    centred = net.op("Sub", "x", mean, name="sub")
    square = net.op("Pow", centred, net.weight(np.array(2, np.float32)), name="pow")
    variance = net.op("ReduceMean", square, name="var", axes=[-1])
    y = net.op("Div", centred, net.op("Sqrt", variance, name="sqrt"), name="div")
    net.op("MatMul", y, net.weight(net.rng.standard_normal((8, 2)).astype(np.float32)), name="y")
    x = rng.standard_normal((4, 8)).astype(np.float32)
    x[0, 3] = 400
    return net.save(folder / "net.onnx", {"x": (1, [4, 8])}, ["y"]), x


def offset(folder: Path, rng: np.random.Generator) -> tuple[Path, np.ndarray]:
    """A mean taken off behind + 1000: nothing overflows, and the output is off by a fifth."""
    net = NetBuilder()
    shifted = net.op("Add", "x", net.weight(np.array(1000, np.float32)), name="shift")
    centred = net.op("Sub", shifted, net.op("ReduceMean", shifted, name="mean", axes=[-1]), name="sub")
    net.op("MatMul", centred, net.weight(net.rng.standard_normal((8, 2)).astype(np.float32)), name="y")
    x = rng.standard_normal((4, 8)).astype(np.float32)
    return net.save(folder / "net.onnx", {"x": (1, [4, 8])}, ["y"]), x


@pytest.mark.parametrize(("made", "wanted"), [(layer_norm, {"node_pow", "node_var"}), (offset, {"node_shift"})])
def test_what_is_told_to_keep_was_tried_and_reaches_what_is_said_when_followed(
    made: Callable[[Path, np.random.Generator], tuple[Path, np.ndarray]], wanted: set[str], tmp_path: Path
) -> None:
    path, x = made(tmp_path, np.random.default_rng(0))
    np.savez(tmp_path / "x.npz", x=x)
    given = ["--inputs", f"{tmp_path}/x.npz", "--json"]
    told = CliRunner().invoke(app, ["predict", str(path), *given, f"{tmp_path}/p.json"])
    assert told.exit_code == 1, told.output
    result = Prediction.open(tmp_path / "p.json")
    assert wanted <= set(result.keep["net"])
    assert (result.goal, result.reached) == ("rel_l2<0.02", True)
    assert result.measured["rel_l2"] < 2e-2
    (tmp_path / "names.txt").write_text("\n".join(result.keep["net"]))
    followed = ["bisect", str(path), "-b", "ort,emu-fp16acc", *given, f"{tmp_path}/b.json"]
    assert CliRunner().invoke(app, followed).exit_code == 1
    assert CliRunner().invoke(app, [*followed, "--keep-fp32", f"@{tmp_path}/names.txt"]).exit_code == 0
    (test,) = json.loads((tmp_path / "b.json").read_text())["tests"]
    # Behind + 1000 the two FP32 references are apart by hundredths of what is left, too.
    assert test["outputs"][0]["rel_l2"] == pytest.approx(result.measured["rel_l2"], rel=0.1)


def test_an_overflow_that_changes_nothing_is_not_told_to_be_kept(tmp_path: Path) -> None:
    net = NetBuilder()
    product = net.op("MatMul", "x", net.weight(np.eye(8, dtype=np.float32)), name="p")
    big = net.op("Mul", product, net.weight(np.array(1e6, np.float32)), name="big")
    capped = net.op("Min", big, net.weight(np.array(1, np.float32)), name="cap")
    net.op("Add", product, net.op("Max", capped, net.weight(np.array(0, np.float32))), name="y")
    result = predict(str(net.save(tmp_path / "net.onnx", {"x": (1, [4, 8])}, ["y"])))
    assert OVERFLOWS in {layer.range for layer in result.layers}
    assert result.keep == {}
    assert result.passes


@pytest.mark.parametrize("shown", [False, True])
def test_a_mask_is_no_overflow_where_a_softmax_makes_zeros_of_it(tmp_path: Path, shown: bool) -> None:
    """−3.4e38 in front of a Softmax is −65504 or −Inf in FP16, and both mask; as an output it is beyond FP16."""
    net = NetBuilder()
    mask = net.weight(np.where(np.arange(8) > 4, np.finfo(np.float32).min, 0).astype(np.float32))
    masked = net.op("Add", net.op("MatMul", "x", net.weight(np.eye(8, dtype=np.float32)), name="p"), mask, name="m")
    net.op("MatMul", net.op("Softmax", masked), net.weight(np.eye(8, dtype=np.float32)), name="y")
    path = net.save(tmp_path / "net.onnx", {"x": (1, [4, 8])}, ["y", "m"] if shown else ["y"])
    result = predict(str(path))
    assert (OVERFLOWS in {layer.range for layer in result.layers}) == shown
    assert result.passes == (not shown)
    assert all(layer.introduced is None or np.isfinite(layer.introduced.high) for layer in result.layers) == (not shown)
    done = CliRunner().invoke(app, ["check", str(path), "--json"])
    assert ("overflow FP16" in done.output) == shown
