"""Tensors that another program dumped, judged layer by layer."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import onnx
import pytest
from nets import second_like
from onnx import TensorProto, numpy_helper
from safetensors.numpy import save_file
from typer.testing import CliRunner

import cp_debug
from cp_debug.backends.executor import Executor
from cp_debug.cli.main import app
from cp_debug.graph.graph import Graph
from cp_debug.graph.made_up import MadeUp
from cp_debug.probes.arrays import as_numpy
from cp_debug.probes.dumps import read_dump

Arrays = dict[str, np.ndarray]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return second_like(tmp_path_factory.mktemp("net") / "net.onnx", depth=1, size=8)


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


def test_a_right_dump_agrees_in_its_own_precision(path: Path) -> None:
    values, _ = computed(path)
    assert cp_debug.diagnose(path, "ort", test_tensors=values).agrees
    half = {name: array.astype(np.float16) for name, array in values.items()}
    assert cp_debug.diagnose(path, "ort", test_tensors=half, tensors_precision="fp16").agrees
    assert cp_debug.diagnose(path, "ort", test_tensors=half).tests[0].guilty  # as FP32 nothing explains that


def test_outputs_alone_are_compared_on_given_inputs(path: Path) -> None:
    values, _ = computed(path)
    graph = Graph(path)
    inputs = {value.name: values[value.name] for value in graph.inputs}
    outputs = {value.name: values[value.name] for value in graph.outputs}
    assert cp_debug.diagnose(path, "ort", inputs=inputs, test_tensors=outputs).agrees
    wrong = {name: array * np.float32(1.5) for name, array in outputs.items()}
    said = str(cp_debug.diagnose(path, "ort", inputs=inputs, test_tensors=wrong))
    assert re.search(r"with the \d+ nodes before it, from \S+ on: nothing between was compared", said)
    with pytest.raises(cp_debug.InputError, match=f"lacks the input {graph.inputs[0].name!r}.*give inputs$"):
        cp_debug.diagnose(path, "ort", test_tensors=outputs)
    outputs.pop(graph.outputs[-1].name)
    with pytest.raises(cp_debug.InputError, match=f"lacks the output {graph.outputs[-1].name!r}"):
        cp_debug.diagnose(path, "ort", inputs=inputs, test_tensors=outputs)


def test_channels_last_is_recognized_and_offered_never_applied(path: Path) -> None:
    values, _ = computed(path)
    last = {key: np.moveaxis(array, 1, -1) if array.ndim == 4 else array for key, array in values.items()}
    with pytest.raises(cp_debug.InputError, match="channels last; read it so with channels_last=True"):
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


@pytest.mark.parametrize("drop", ["axes", "batch"])
def test_numbers_without_their_axes_are_offered_never_taken_silently(path: Path, drop: str) -> None:
    values, _ = computed(path)
    flat = {key: array.ravel() if drop == "axes" else array[0] for key, array in values.items()}
    with pytest.raises(cp_debug.InputError, match="without its axes, row by row; read it so with flat=True"):
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
        ("twice", "as another file of"),
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
