"""Tensors that another program dumped, judged layer by layer."""

from __future__ import annotations

import base64
import io
import json
import re
from pathlib import Path

import numpy as np
import onnx
import pytest
from nets import NetBuilder, second_like
from onnx import TensorProto, numpy_helper
from safetensors.numpy import save_file
from typer.testing import CliRunner

import cp_debug
from cp_debug.backends.executor import Executor
from cp_debug.cli.main import app
from cp_debug.errors import InputError
from cp_debug.graph.graph import Graph
from cp_debug.graph.made_up import MadeUp
from cp_debug.probes.arrays import as_numpy
from cp_debug.probes.dumps import read_dump, read_iterations

Arrays = dict[str, np.ndarray]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return second_like(tmp_path_factory.mktemp("net") / "net.onnx", depth=1, size=8)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three layers, each of which may be searched for all causes."""
    net = NetBuilder()
    net.conv(net.op("Relu", net.conv("x", 4, 8)), 8, 4, name="y")
    return net.save(tmp_path_factory.mktemp("small") / "net.onnx", {"x": (1, [1, 4, 8, 8])}, ["y"])


def computed(path: Path, wrong: str | None = None) -> tuple[Arrays, str]:
    """Every value of the network as "elsewhere" computed it: the first convolution's result ``wrong`` by 3 %."""
    graph = Graph(path)
    values: Arrays = dict(MadeUp(graph).sample([0]))
    convolution = next(node for node in graph.nodes if node.op == "Conv")
    name = convolution.outputs[0]

    def keep(value: str, tensor: object) -> None:
        values[value] = as_numpy(tensor).copy()

    Executor(graph).run(values, keep)
    if wrong is not None:
        behind = onnx.utils.Extractor(graph.proto)
        cut = behind.extract_model([name], [o.name for o in graph.outputs])
        cut_path = path.with_name("cut.onnx")
        onnx.save(cut, cut_path)
        values[name] = values[name] * np.float32(1.03)
        Executor(Graph(cut_path)).run({name: values[name]}, keep)
    return values, name


def as_npy(values: Arrays, folder: Path) -> Path:
    folder.mkdir()
    for name, array in values.items():
        np.save(folder / f"{name.replace('/', '_').replace('.', '_')}.npy", array)
    return folder


def as_pb(values: Arrays, folder: Path) -> Path:
    folder.mkdir()
    for index, (name, array) in enumerate(values.items()):
        (folder / f"output_{index}.pb").write_bytes(numpy_helper.from_array(array, name).SerializeToString())
    return folder


def as_npz(values: Arrays, folder: Path) -> Path:
    np.savez(folder.with_suffix(".npz"), **values)
    return folder.with_suffix(".npz")


def as_safetensors(values: Arrays, folder: Path) -> Path:
    save_file({name: np.ascontiguousarray(array) for name, array in values.items()}, folder.with_suffix(".safetensors"))
    return folder.with_suffix(".safetensors")


def as_polygraphy(values: Arrays, folder: Path) -> Path:
    comparator = pytest.importorskip("polygraphy.comparator")
    results = comparator.RunResults()
    results.append(("cpp", [comparator.IterationResult(values, runtime=0.0, runner_name="cpp")]))
    results.save(str(folder.with_suffix(".json")))
    return folder.with_suffix(".json")


def test_an_array_that_is_no_text_is_told_in_words(tmp_path: Path) -> None:
    file = tmp_path / "out.json"
    file.write_text(as_polygraphy({"x": np.ones(2, np.float32)}, tmp_path / "made").read_text())
    document = json.loads(file.read_text())
    [runner] = document["lst"][:1]
    iteration = runner[1][0]
    tensor = iteration["outputs"]["x"] if "outputs" in iteration else iteration["x"]
    tensor.get("values", tensor)["array"] = 7
    file.write_text(json.dumps(document))
    with pytest.raises(InputError, match="array: expected its bytes in base64, not int"):
        read_dump(file)


WRITERS = [as_npy, as_npz, as_pb, as_safetensors, as_polygraphy]


@pytest.mark.parametrize("write", WRITERS, ids=lambda write: write.__name__)
def test_every_format_gives_the_tensors_back(write, tmp_path: Path) -> None:
    values = {"x": np.arange(6, dtype=np.float32).reshape(2, 3), "count": np.array([2], np.int64)}
    read = read_dump(write(values, tmp_path / "dump"))
    assert read.keys() == values.keys()
    for name, array in values.items():
        assert read[name].dtype == array.dtype
        np.testing.assert_array_equal(read[name], array)


def test_the_layer_that_went_wrong_elsewhere_is_named(path: Path, tmp_path: Path) -> None:
    values, name = computed(path, wrong="the first convolution")
    dump = as_npy(values, tmp_path / "dump")
    result = cp_debug.diagnose(path, "ort", test_tensors=dump)
    assert [row.onnx for row in result.tests[0].guilty] == [name]
    assert result.tests[0].compared == result.tests[0].total
    assert result.samples == [str(dump)]
    run = CliRunner().invoke(app, ["bisect", str(path), "--test-tensors", str(dump)])
    assert run.exit_code == 1
    assert "guilty" in run.output


def test_a_right_dump_agrees_in_its_own_precision(path: Path, small: Path) -> None:
    values, _ = computed(path)
    assert cp_debug.diagnose(path, "ort", test_tensors=values).agrees
    half = {name: array.astype(np.float16) for name, array in computed(small)[0].items()}
    assert cp_debug.diagnose(small, "ort", test_tensors=half, tensors_precision="fp16").agrees
    assert cp_debug.diagnose(small, "ort", test_tensors=half).tests[0].guilty  # as FP32 nothing explains that


def test_outputs_alone_are_compared_on_given_inputs(small: Path) -> None:
    values, _ = computed(small)
    graph = Graph(small)
    inputs = {value.name: values[value.name] for value in graph.inputs}
    outputs = {value.name: values[value.name] for value in graph.outputs}
    assert cp_debug.diagnose(small, "ort", inputs=inputs, test_tensors=outputs).agrees
    wrong = {name: array * np.float32(1.5) for name, array in outputs.items()}
    said = str(cp_debug.diagnose(small, "ort", inputs=inputs, test_tensors=wrong))
    assert re.search(r"with the \d+ nodes before it, from \S+ on: nothing between was compared", said)
    with pytest.raises(cp_debug.InputError, match=f"lacks the input {graph.inputs[0].name!r}.*give inputs$"):
        cp_debug.diagnose(small, "ort", test_tensors=outputs)
    outputs.pop(graph.outputs[-1].name)
    with pytest.raises(cp_debug.InputError, match=f"lacks the output {graph.outputs[-1].name!r}"):
        cp_debug.diagnose(small, "ort", inputs=inputs, test_tensors=outputs)


class Unreadable:
    def __array__(self, *_: object, **__: object) -> np.ndarray:
        raise ValueError("mine")


@pytest.mark.parametrize("given", [None, object(), [None, 1.0], {1: 2}, [[1.0], [1.0, 2.0]], Unreadable()])
def test_what_is_no_tensor_is_refused_by_its_name(path: Path, given: object) -> None:
    with pytest.raises(cp_debug.InputError, match=r"^test_tensors: 'y' is ") as caught:
        cp_debug.diagnose(path, "ort", test_tensors={"y": given})
    assert "\n" not in str(caught.value)


def test_channels_last_is_recognized_and_offered_never_applied(path: Path) -> None:
    values, _ = computed(path)
    last = {key: np.moveaxis(array, 1, -1) if array.ndim == 4 else array for key, array in values.items()}
    with pytest.raises(cp_debug.InputError, match="channels last; use channels_last=True"):
        cp_debug.diagnose(path, "ort", test_tensors=last)
    result = cp_debug.diagnose(path, "ort", test_tensors=last, channels_last=True)
    assert result.agrees
    assert result.tests[0].compared == result.tests[0].total


def test_the_command_reads_channels_last_where_it_is_told(path: Path, tmp_path: Path) -> None:
    values, _ = computed(path)
    last = {key: np.moveaxis(array, 1, -1) if array.ndim == 4 else array for key, array in values.items()}
    command = ["bisect", str(path), "--test-tensors", str(as_npy(last, tmp_path / "dump"))]
    assert CliRunner().invoke(app, [*command, "--tensors-layout", "nhwc"]).exit_code == 0
    assert "--tensors-layout nhwc" in str(CliRunner().invoke(app, command).exception)


@pytest.mark.few(1)
@pytest.mark.parametrize("noise", [0.0, 2e-7])
def test_a_buffer_that_was_written_again_after_it_was_read_is_told(path: Path, noise: float) -> None:
    values, name = computed(path)
    generator = np.random.default_rng(0)
    values = {n: (a * (1 + noise * generator.normal(size=a.shape))).astype(a.dtype) for n, a in values.items()}
    (reader,) = Graph(path).consumers[name]
    values[name] = values[name] * np.float32(1.02)
    test = cp_debug.diagnose(path, "ort", test_tensors=values).tests[0]
    (said,) = [note for note in test.notes if note.startswith("the captured values contradict each other")]
    assert f"follow from {name} as captured" in said
    assert not [note for note in test.notes if "both are inexact" in note or "may itself be wrong" in note]
    guilty = {row.onnx: row for row in test.guilty}
    assert "did not read this" in guilty[name].why
    assert reader.outputs[0] not in guilty


def test_a_layer_that_makes_up_for_another_in_another_file_contradicts_nothing(tmp_path: Path) -> None:
    """Scales that one layer takes out and the next puts back are in the file, and nobody wrote a buffer again."""
    files = []
    for factor in (1.0, 2.0):
        text = f"""<ir_version: 8, opset_import: ["": 17]> net (float[2,3] x) => (float[2,3] y)
        <float a = {{{factor}}}, float b = {{{1 / factor}}}> {{ h = Mul (x, a)  r = Relu (h)  y = Mul (r, b) }}"""
        onnx.save(onnx.parser.parse_model(text), str(tmp_path / f"{factor}.onnx"))
        files.append(tmp_path / f"{factor}.onnx")
    test = cp_debug.diagnose(files[0], "ort,ort", test_model=files[1]).tests[0]
    assert not [note for note in test.notes if "contradict each other" in note]
    assert not [row for row in test.rows if row.replay and row.replay.contradicted]


CUBES = {
    1: "agraph (float[2,5,5] x) => (float[2,5,5] y) { h = Conv <pads = [1, 1]> (x, w)  y = Relu (h) }",
    2: "agraph (float[1,5,5,5] x) => (float[1,5,5,5] y) { h = Conv <pads = [1, 1, 1, 1]> (x, w)  y = Relu (h) }",
    3: "agraph (float[1,N,5,D,5] x) => (float[1,5,5,5,5] y) "
    "{ h = Conv <pads = [1, 1, 1, 1, 1, 1]> (x, w)  y = Relu (h) }",
}
"""Number of spatial axes → a network whose channels are as many as each of them."""


def cube(folder: Path, text: str) -> tuple[Path, Arrays]:
    """A network by its text, w its weight of 5 by 5 channels, and all that it computes of made-up inputs."""
    model = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["": 17]>\n{text}')
    spatial = len(model.graph.input[0].type.tensor_type.shape.dim) - 2
    weight = np.random.default_rng(0).normal(size=(5, 5, *[3] * spatial)).astype(np.float32)
    model.graph.initializer.append(numpy_helper.from_array(weight, "w"))
    onnx.save(model, str(folder / "cube.onnx"))
    graph = Graph(folder / "cube.onnx")
    shape = [2 if spatial == 1 else 1, *[5] * (spatial + 1)]
    values: Arrays = {"x": np.random.default_rng(1).normal(size=shape).astype(np.float32)}
    Executor(graph).run(values, lambda name, tensor: values.update({name: as_numpy(tensor).copy()}))
    return folder / "cube.onnx", values


def with_channels_last(values: Arrays) -> Arrays:
    return {name: np.moveaxis(array, 1, -1) if array.ndim > 2 else array for name, array in values.items()}


@pytest.mark.parametrize("spatial", CUBES)
def test_the_layout_decides_where_shapes_cannot(spatial: int, tmp_path: Path) -> None:
    net, values = cube(tmp_path, CUBES[spatial])
    last = with_channels_last(values)
    result = cp_debug.diagnose(net, "ort", test_tensors=last, channels_last=True)
    assert result.agrees
    assert not [row for row in result.tests[0].rows if row.verdict != "ok"]
    np.savez(tmp_path / "last.npz", **last)
    command = ["import", str(tmp_path / "last.npz"), "--model", str(net), "-o", str(tmp_path / "here")]
    assert CliRunner().invoke(app, [*command, "--layout", "nhwc"]).exit_code == 0
    for name, array in read_dump(tmp_path / "here").items():
        np.testing.assert_array_equal(array, values[name])


def test_a_tensor_without_its_batch_has_its_channels_last_too(tmp_path: Path) -> None:
    net, values = cube(tmp_path, CUBES[2])
    last = {name: array[0] for name, array in with_channels_last(values).items()}
    assert cp_debug.diagnose(net, "ort", test_tensors=last, channels_last=True).agrees


@pytest.mark.parametrize(("how", "says"), [("channels_last", "with channels last"), ("flat", "without its axes")])
def test_a_layout_in_which_nothing_was_dumped_is_refused(path: Path, how: str, says: str) -> None:
    values, _ = computed(path)
    with pytest.raises(cp_debug.InputError, match=f"no tensor's shape shows .* dumped {says}.*; leave {how}=True out"):
        cp_debug.diagnose(path, "ort", test_tensors=values, **{how: True})


def test_a_layout_that_one_shape_contradicts_is_refused_where_no_shape_shows_it(tmp_path: Path) -> None:
    text = "agraph (float[1,3,5,5] i) => (float[1,5,5,5] y) { x = Conv <pads = [1, 1, 1, 1]> (i, v)  "
    net, _ = cube(tmp_path, CUBES[2])
    model = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["": 17]>\n{text} y = Relu (x) }}')
    model.graph.initializer.append(numpy_helper.from_array(np.ones((5, 3, 3, 3), np.float32), "v"))
    onnx.save(model, str(net))
    values: Arrays = {"i": np.random.default_rng(1).normal(size=(1, 3, 5, 5)).astype(np.float32)}
    Executor(Graph(net)).run(values, lambda name, tensor: values.update({name: as_numpy(tensor).copy()}))
    with pytest.raises(cp_debug.InputError, match="and 'i' has the graph's, "):
        cp_debug.diagnose(net, "ort", test_tensors=values, channels_last=True)


def test_tensors_that_fit_only_as_they_are_are_told(path: Path) -> None:
    values, name = computed(path)
    mixed = {n: a if n == name or a.ndim != 4 else np.moveaxis(a, 1, -1) for n, a in values.items()}
    test = cp_debug.diagnose(path, "ort", test_tensors=mixed, channels_last=True).tests[0]
    assert test.agrees
    assert test.compared == test.total
    assert [note for note in test.notes if note.startswith("read as dumped") and f"channels last: {name} [" in note]


def test_rows_of_features_are_no_channels(tmp_path: Path) -> None:
    """x is as wide as it is long; that h is not tells that rank 3 holds rows here."""
    text = """agraph (float[1,5,4,3] i, float[1,5,5] x) => (float[1,5,5] y, float[1,5,4,3] j)
    { j = Conv <pads = [1, 1, 1, 1]> (i, w)  h = Concat <axis = 2> (x, x)
      z = Slice (h, from, to, axis)  y = Relu (z) }"""
    model = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["": 17]>\n{text}')
    constants = {"w": np.ones((5, 5, 3, 3), np.float32)} | {
        n: np.array([k]) for n, k in (("from", 5), ("to", 10), ("axis", 2))
    }
    model.graph.initializer.extend(numpy_helper.from_array(a, n) for n, a in constants.items())
    onnx.save(model, str(tmp_path / "rows.onnx"))
    generator = np.random.default_rng(0)
    values: Arrays = {
        name: generator.normal(size=shape).astype(np.float32) for name, shape in (("i", (1, 5, 4, 3)), ("x", (1, 5, 5)))
    }
    Executor(Graph(tmp_path / "rows.onnx")).run(values, lambda n, t: values.update({n: as_numpy(t).copy()}))
    dump = {name: np.moveaxis(array, 1, -1) if array.ndim == 4 else array for name, array in values.items()}
    result = cp_debug.diagnose(tmp_path / "rows.onnx", "ort", test_tensors=dump, channels_last=True)
    assert result.agrees
    assert result.tests[0].compared == result.tests[0].total


@pytest.mark.parametrize("drop", ["axes", "batch"])
def test_numbers_without_their_axes_are_offered_never_taken_silently(path: Path, drop: str) -> None:
    values, _ = computed(path)
    flat = {key: array.ravel() if drop == "axes" else array[0] for key, array in values.items()}
    with pytest.raises(cp_debug.InputError, match="without its axes, row by row; use flat=True"):
        cp_debug.diagnose(path, "ort", test_tensors=flat)
    result = cp_debug.diagnose(path, "ort", test_tensors=flat, flat=True)
    assert result.agrees
    assert result.tests[0].compared == result.tests[0].total


def test_a_single_number_is_taken_whatever_its_axes(tmp_path: Path) -> None:
    text = """<ir_version: 8, opset_import: ["": 17]>
    net (float[2,3] x) => (float[2,3] y) { m = ReduceMax <keepdims = 0> (x)  y = Div (x, m) }"""
    onnx.save(onnx.parser.parse_model(text), str(tmp_path / "net.onnx"))
    x = np.arange(1, 7, dtype=np.float32).reshape(2, 3)
    dump = {"x": x, "m": np.array([6], np.float32), "y": x / 6}  # the graph's has no axes
    result = cp_debug.diagnose(tmp_path / "net.onnx", "ort", test_tensors=dump)
    assert result.agrees
    assert result.tests[0].compared == result.tests[0].total


def test_one_channel_last_is_read_as_either_layout(tmp_path: Path) -> None:
    image = onnx.helper.make_tensor_value_info("image", TensorProto.FLOAT, [1, 1, 4, 5])
    made = onnx.helper.make_tensor_value_info("made", TensorProto.FLOAT, [1, 1, 4, 5])
    graph = onnx.helper.make_graph([onnx.helper.make_node("Relu", ["image"], ["made"])], "net", [image], [made])
    opset = [onnx.helper.make_opsetid("", 18)]
    onnx.save(onnx.helper.make_model(graph, opset_imports=opset, ir_version=10), tmp_path / "net.onnx")
    value = np.linspace(-1, 1, 20, dtype=np.float32).reshape(1, 4, 5, 1)
    dump = {"image": value, "made": np.maximum(value, 0)}
    for how in ({"channels_last": True}, {"flat": True}):
        assert cp_debug.diagnose(tmp_path / "net.onnx", "ort", test_tensors=dump, **how).agrees
    with pytest.raises(cp_debug.InputError, match="channels_last=True"):
        cp_debug.diagnose(tmp_path / "net.onnx", "ort", test_tensors=dump)


def test_a_value_of_another_shape_is_left_out_and_told(path: Path) -> None:
    values, name = computed(path)
    values[name] = values[name][:, :, :-1]
    test = cp_debug.diagnose(path, "ort", test_tensors=values).tests[0]
    assert name not in {row.onnx for row in test.rows}
    assert test.compared == test.total - 1
    assert [note for note in test.notes if note.startswith(f"{name} is ") and note.endswith("left out")]
    assert not [note for note in test.notes if "oracle" in note], "what follows is not computed from it"


def test_what_is_no_dump_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "x.json").write_text('{"lst": 3}')
    (tmp_path / "x.pb").write_bytes(b"\xff" * 40)
    (tmp_path / "x.safetensors").write_bytes(b"\0" * 40)
    np.save(tmp_path / "objects.npy", np.array([{}]), allow_pickle=True)
    (tmp_path / "bad.json").write_text('[{"x": {"array": "AAAA"}}]')
    (tmp_path / "twice").mkdir()
    for name in ("a.npz", "b.npz"):
        np.savez(tmp_path / "twice" / name, x=np.zeros(2))
    for name, says in (
        ("empty", "holds no tensors"),
        ("gone", "no such"),
        ("x.json", "expected what Polygraphy's"),
        ("x.pb", "not an onnx.TensorProto"),
        ("x.safetensors", "not a readable safetensors file"),
        ("objects.npy", "Python objects"),
        ("bad.json", "'x': "),
        ("twice", "so does another file of"),
    ):
        with pytest.raises(cp_debug.InputError, match=says):
            read_dump(tmp_path / name)


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--tensors-precision", "fp16"], "--tensors-precision"),
        (["--tensors-layout", "nhwc"], "--tensors-layout"),
        (["--test-tensors", "x.npz", "--knobs"], "--knobs"),
        (["--test-tensors", "x.npz", "-b", "ort,torch"], "--backends"),
        (["--test-tensors", "gone"], "gone"),
    ],
)
def test_options_that_would_do_nothing_are_refused(path: Path, more: list[str], says: str) -> None:
    run = CliRunner().invoke(app, ["bisect", str(path), *more])
    assert run.exit_code == 2 or isinstance(run.exception, cp_debug.InputError)
    assert says in run.output + str(run.exception)


@pytest.mark.parametrize(("more", "says"), [(0, "has 0 bytes; by x.bin.json"), (1, "2147483649 bytes; a raw file has")])
def test_a_tensor_has_at_most_two_gibibytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: int, says: str
) -> None:
    path = tmp_path / "x.bin"
    with path.open("wb") as file:
        file.truncate((1 << 31) + more)
    (tmp_path / "x.bin.json").write_text('{"dtype": "uint8", "shape": [1], "name": "x"}', encoding="utf-8")
    read = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda self: b"" if self == path else read(self))
    with pytest.raises(InputError, match=says):
        read_dump(path)


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
