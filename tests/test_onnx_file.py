"""Any ONNX file as a model: its inputs, samples and stages."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from nets import NetBuilder, residual, second_like
from onnx import TensorProto

from cp_debug.errors import InputError
from cp_debug.graph.check_inputs import check_inputs
from cp_debug.graph.graph import Graph, ValueInfo
from cp_debug.graph.onnx_tensors import array_of, byte_count, described
from cp_debug.recipes.onnx_file import MOST_STAGES, OnnxFileModel, stages_of
from cp_debug.recipes.registry import load_model


@pytest.fixture
def net(tmp_path):
    return residual(tmp_path / "net.onnx")


def test_an_onnx_path_is_one_component(net):
    model = load_model(str(net))
    assert model.name == str(net)
    (component,) = model.components
    assert (component.name, list(component.input_names), list(component.output_names)) == (
        "net",
        ["x"],
        ["y", "logits"],
    )
    assert component.onnx_path == net
    assert component.module is None


def test_random_samples_are_seeded_and_differ(net):
    model = OnnxFileModel(net)
    first, second = (s.arrays["x"] for s in model.samples(2, 7, None))
    again = next(iter(model.samples(1, 7, None)))
    other = next(iter(model.samples(1, 8, None)))
    assert first.shape == (1, 16, 16, 16)
    assert first.dtype == np.float32
    assert np.array_equal(first, again.arrays["x"])
    assert not np.array_equal(first, second)
    assert not np.array_equal(first, other.arrays["x"])
    assert again.source == "random, seed 7, sample 0"
    assert model.feed(model.components[0], again, {}) is again.arrays
    assert model.decode(again, {}) is None


def test_a_symbol_has_one_size():
    expected = [ValueInfo(n, np.dtype("float32"), ("V", 3)) for n in "ab"]
    check_inputs(expected, {n: np.zeros((5, 3), np.float32) for n in "ab"}, "here")
    with pytest.raises(InputError, match=r"here: input 'b' has shape \[6, 3\]; expected a: float32\[V, 3\], b: "):
        check_inputs(expected, {n: np.zeros((5 + (n == "b"), 3), np.float32) for n in "ab"}, "here")


def test_samples_come_from_a_file_or_a_folder(net, tmp_path):
    model = OnnxFileModel(net)
    folder = tmp_path / "inputs"
    folder.mkdir()
    for i in range(3):
        np.savez(folder / f"{i}.npz", x=np.full((1, 16, 16, 16), i, np.float32))
    assert [s.arrays["x"].max() for s in model.samples(2, 0, folder)] == [0, 1]
    (sample,) = model.samples(5, 0, folder / "2.npz")
    assert sample.arrays["x"].max() == 2
    assert sample.source == str(folder / "2.npz")


def test_unusable_input_files_are_refused(net, tmp_path):
    def refuse(name: str, message: str) -> None:
        with pytest.raises(InputError, match=message):
            list(OnnxFileModel(net).samples(1, 0, tmp_path / name))

    np.savez(tmp_path / "name.npz", y=np.zeros(1, np.float32))
    refuse("name.npz", r"name\.npz: unknown input 'y'; expected x: float32\[batch, 16, 16, 16\]")
    np.savez(tmp_path / "dtype.npz", x=np.zeros((1, 16, 16, 16)))
    refuse("dtype.npz", r"dtype\.npz: input 'x' is float64")
    np.savez(tmp_path / "shape.npz", x=np.zeros((16, 16), np.float32))
    refuse("shape.npz", r"shape\.npz: input 'x' has shape \[16, 16\]")
    np.savez(tmp_path / "pickled.npz", x=np.array([{}]))
    refuse("pickled.npz", "not a readable .npz file of plain arrays")
    (tmp_path / "broken.npz").write_bytes((tmp_path / "shape.npz").read_bytes()[:100])
    refuse("broken.npz", "not a readable .npz file")
    (tmp_path / "empty.npz").touch()
    refuse("empty.npz", "not a readable .npz file")
    refuse("absent.npz", r"no such file .*absent\.npz")
    refuse("cloud.pcd.bin", "point clouds are for recipes such as centerpoint:tiny")
    (tmp_path / "folder").mkdir()
    refuse("folder", "holds no .npz file")


def named(tmp_path, scopes, metadata=False):
    """A chain of Relus whose nodes carry these scopes as torch's exporters write them."""
    net = NetBuilder()
    x = "x"
    for i, scope in enumerate(scopes):
        x = net.op("Relu", x, name=f"v{i}")
        if metadata:
            net.nodes[-1].metadata_props.add(key="pkg.torch.onnx.name_scopes", value=str(["", *scope, f"relu_{i}"]))
        else:
            net.nodes[-1].name = "/" + "/".join([*scope, "Relu"])
    return Graph(net.save(tmp_path / "named.onnx", {"x": (1, [4])}, [x]))


@pytest.mark.parametrize("metadata", [False, True])
def test_stages_are_module_scopes_as_deep_as_fits(tmp_path, metadata):
    parent = "backbone." if metadata else ""  # dynamo writes whole module paths, the older exporter the last part
    inner = [("backbone", f"{parent}blocks.{i // 5}", f"{parent}blocks.{i // 5}.{i % 5}") for i in range(15)]
    stages = stages_of(named(tmp_path, [*inner, ("neck",), ("head",)], metadata))
    expected = [(f"backbone/blocks.{i}", f"v{5 * i + 4}") for i in range(3)] + [("neck", "v15"), ("head", "v16")]
    assert [(s.name, s.path) for s in stages] == expected


def test_members_of_long_lists_are_taken_together(tmp_path):
    stages = stages_of(named(tmp_path, [(f"layers.{i}",) for i in range(20)] + [("head",)]))
    assert [(s.name, s.path) for s in stages] == [("layers", "v19"), ("head", "v20")]


@pytest.mark.parametrize("net", [second_like, residual])
def test_without_scopes_stages_are_cut_points_then_outputs(tmp_path, net):
    graph = Graph(net(tmp_path / "net.onnx"))
    paths = [s.path for s in stages_of(graph)]
    outputs = [v.name for v in graph.outputs]
    assert paths[-2:] == outputs
    assert 2 < len(paths) <= MOST_STAGES
    for value in paths[:-2]:  # nothing gets from the input to an output but through a cut point
        nodes, starts = graph.segment(outputs, [value])
        assert starts == [value]
        assert "x" not in {name for node in nodes for name in node.inputs}


def test_a_graph_of_outputs_alone_has_them_as_stages(tmp_path):
    net = NetBuilder()
    for i in range(3):
        net.op("Relu", "x", name=f"out{i}")
    graph = Graph(net.save(tmp_path / "net.onnx", {"x": (1, [4])}, [f"out{i}" for i in range(3)]))
    assert [s.path for s in stages_of(graph)] == ["out0", "out1", "out2"]


def test_a_missing_or_broken_file_is_an_input_error(tmp_path):
    with pytest.raises(InputError, match="no such ONNX file"):
        load_model(str(tmp_path / "absent.onnx"))
    (tmp_path / "text.onnx").write_text("this is no protobuf")
    with pytest.raises(InputError, match="not a complete ONNX file"):
        load_model(str(tmp_path / "text.onnx"))
    with pytest.raises(InputError, match=r"no such ONNX file; did you mean text\.onnx\?"):
        load_model(str(tmp_path / "txet.onnx"))
    onnx.save(onnx.ModelProto(), str(tmp_path / "blank.onnx"))
    with pytest.raises(InputError, match="it holds no graph"):
        load_model(str(tmp_path / "blank.onnx"))


def weight(dims: list[int], element: int = TensorProto.FLOAT) -> onnx.TensorProto:
    return onnx.TensorProto(name="w", data_type=element, dims=dims)


@pytest.mark.parametrize(
    ("given", "count"),
    [
        (weight([2, 3]), 24),
        (weight([]), 4),
        (weight([0, 5]), 0),
        (weight([3], TensorProto.INT4), 2),
        (weight([4], TensorProto.UINT4), 2),
        (weight([5], TensorProto.BOOL), 5),
        (weight([5], TensorProto.FLOAT16), 10),
    ],
)
def test_bytes_of_a_weight(given: onnx.TensorProto, count: int) -> None:
    assert byte_count(given, "m") == count


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (weight([1], TensorProto.STRING), "weight 'w' is text; expected numbers"),
        (weight([1], 0), "of the data type 0"),
        (weight([1], len(TensorProto.DataType.keys())), "of the data type"),
        (weight([2, -1]), r"has the shape \[2, -1\]$"),
        (weight([1] * 33), r"has the shape \[1, 1, 1, 1, 1, 1, 1, 1, …\]$"),
        (weight([0, 1 << 31, 1 << 31]), "which no array can have"),
        (weight([1 << 20, 1 << 20]), r"FLOAT\[1048576, 1048576\], which does not fit into memory"),
    ],
)
def test_weights_that_cannot_be(given: onnx.TensorProto, says: str) -> None:
    with pytest.raises(InputError, match=says):
        byte_count(given, "m")


def test_a_weight_may_have_32_axes_and_eight_are_shown() -> None:
    assert byte_count(weight([1] * 32), "m") == 4
    assert described(weight([64, 3, 7, 7])) == "FLOAT[64, 3, 7, 7]"
    assert described(weight(list(range(1, 9)))) == "FLOAT[1, 2, 3, 4, 5, 6, 7, 8]"
    assert described(weight(list(range(1, 10)))) == "FLOAT[1, 2, 3, 4, 5, 6, 7, 8, …]"


@pytest.mark.parametrize("kind", ["FLOAT", "FLOAT16", "BFLOAT16", "FLOAT8E4M3FN", "INT64", "BOOL", "INT4", "COMPLEX64"])
def test_external_data_of_any_type_is_what_onnx_reads(kind: str, tmp_path: Path) -> None:
    number = onnx.TensorProto.DataType.Value(kind)
    values = np.arange(-6, 6).reshape(3, 4).astype(onnx.helper.tensor_dtype_to_np_dtype(number))
    inline = onnx.numpy_helper.from_array(values, "w")
    assert inline.data_type == number
    outside = onnx.TensorProto(name="w", data_type=number, dims=inline.dims, data_location=onnx.TensorProto.EXTERNAL)
    (tmp_path / "w.bin").write_bytes(b"12345678" + inline.raw_data + b"behind")
    for key, value in (("location", "w.bin"), ("offset", "8"), ("length", str(len(inline.raw_data)))):
        outside.external_data.add(key=key, value=value)
    found = array_of(outside, tmp_path / "net.onnx")
    assert found.dtype == values.dtype
    assert found.tobytes() == values.tobytes()
