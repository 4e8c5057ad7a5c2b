"""Inputs from every kind of file: the values that arrive, the sizes of free axes, and what is refused."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from nets import NetBuilder
from onnx import TensorProto, numpy_helper
from test_cli import run

from cp_debug.errors import InputError
from cp_debug.graph.check_inputs import as_declared
from cp_debug.graph.graph import Graph
from cp_debug.recipes.input_files import DEFAULT_READING, ImageFormat, Reading
from cp_debug.recipes.onnx_file import OnnxFileModel

X = np.random.default_rng(0).normal(size=(1, 3, 4, 5)).astype(np.float32)
Y = np.arange(2, dtype=np.int64)


@pytest.fixture
def one(tmp_path: Path) -> Path:
    b = NetBuilder()
    return b.save(tmp_path / "one.onnx", {"image": (1, ["batch", 3, "h", "w"])}, [b.op("Relu", "image")])


@pytest.fixture
def two(tmp_path: Path) -> Path:
    b = NetBuilder()
    out = b.op("Add", b.op("Relu", "image"), b.op("Cast", b.op("ReduceSum", "ids", keepdims=0), to=1))
    return b.save(tmp_path / "two.onnx", {"image": (1, ["batch", 3, "h", "w"]), "ids": (7, [2])}, [out])


def polygraphy(path: Path, *iterations: dict[str, np.ndarray]) -> Path:
    def encoded(array: np.ndarray) -> dict[str, str]:
        stream = io.BytesIO()
        np.save(stream, array)
        return {"array": base64.b64encode(stream.getvalue()).decode(), "polygraphy_class": "ndarray"}

    path.write_text(json.dumps([{name: encoded(array) for name, array in each.items()} for each in iterations]))
    return path


def proto_set(folder: Path, *arrays: np.ndarray, names: tuple[str, ...] = ()) -> Path:
    folder.mkdir(parents=True)
    for index, array in enumerate(arrays):
        tensor = numpy_helper.from_array(array, names[index] if names else None)
        (folder / f"input_{index}.pb").write_bytes(tensor.SerializeToString())
    (folder / "output_0.pb").write_bytes(numpy_helper.from_array(arrays[0], "out").SerializeToString())
    return folder


def samples(model: Path, inputs: Path | None, count: int = 9, reading: Reading = DEFAULT_READING) -> list[dict]:
    return [sample.arrays for sample in OnnxFileModel(model, reading).samples(count, 0, inputs)]


def test_polygraphy_gives_a_sample_an_iteration(two: Path, tmp_path: Path) -> None:
    file = polygraphy(tmp_path / "inputs.json", {"image": X, "ids": Y}, {"image": 2 * X, "ids": Y})
    first, second = samples(two, file)
    np.testing.assert_array_equal(first["image"], X)
    np.testing.assert_array_equal(second["image"], 2 * X)
    assert len(samples(two, file, 1)) == 1


@pytest.mark.parametrize("names", [(), ("image", "ids"), ("input_0", "input_1")])
def test_sets_of_protos_in_order_and_by_name(two: Path, tmp_path: Path, names: tuple[str, ...]) -> None:
    for index in (10, 2):
        proto_set(tmp_path / "data" / f"test_data_set_{index}", index * X, Y, names=names)
    first, second = samples(two, tmp_path / "data")
    np.testing.assert_array_equal(first["image"], 2 * X)  # 2 before 10
    np.testing.assert_array_equal(second["image"], 10 * X)
    [alone] = samples(two, tmp_path / "data" / "test_data_set_2")
    np.testing.assert_array_equal(alone["ids"], Y)


def test_one_array_for_one_input(one: Path, two: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", X)
    np.testing.assert_array_equal(samples(one, tmp_path / "a.npy")[0]["image"], X)
    np.savez(tmp_path / "b.npz", X)
    np.testing.assert_array_equal(samples(one, tmp_path / "b.npz")[0]["image"], X)
    with pytest.raises(InputError, match=r"a.npy: is one array, and the model takes image.*ids.*expected an .npz"):
        samples(two, tmp_path / "a.npy")


def test_folders_of_arrays(one: Path, two: Path, tmp_path: Path) -> None:
    (tmp_path / "many").mkdir()
    for index in range(3):
        np.save(tmp_path / "many" / f"{index}.npy", index * X)
    assert [float(each["image"].max()) for each in samples(one, tmp_path / "many")] == [0, X.max(), (2 * X).max()]
    (tmp_path / "named").mkdir()
    np.save(tmp_path / "named" / "image.npy", X)
    np.save(tmp_path / "named" / "ids.npy", Y)
    [sample] = samples(two, tmp_path / "named")
    assert sorted(sample) == ["ids", "image"]


@pytest.mark.parametrize("make", [np.save, np.savez, lambda file, array: np.savez(file, image=array)])
@pytest.mark.parametrize("other", ["labels", "zebra"])
def test_a_file_that_is_called_like_the_input_is_it_and_others_are_told(
    one: Path, tmp_path: Path, make: Callable[[Path, np.ndarray], None], other: str
) -> None:
    make(tmp_path / ("image.npy" if make is np.save else "image.npz"), X)
    np.save(tmp_path / f"{other}.npy", 0 * X)
    (tmp_path / "notes.txt").write_text("no input")
    for count in (1, 3):
        [sample] = OnnxFileModel(one).samples(count, 0, tmp_path)
        np.testing.assert_array_equal(sample.arrays["image"], X)
        [told] = sample.remarks
        assert "one sample, by the names of the inputs: image.np" in told
        assert told.endswith(f"left out: {other}.npy")


def test_several_inputs_by_the_names_of_files_of_several_kinds(two: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "image.npz", X)
    np.save(tmp_path / "ids.npy", Y)
    np.save(tmp_path / "a_labels.npy", Y)
    [sample] = OnnxFileModel(two).samples(2, 0, tmp_path)
    np.testing.assert_array_equal(sample.arrays["image"], X)
    np.testing.assert_array_equal(sample.arrays["ids"], Y)
    assert sample.remarks[0].endswith("left out: a_labels.npy")
    np.save(tmp_path / "image.npy", X)
    with pytest.raises(InputError, match=r"image.npy and image.npz are called like the input 'image'; expected one"):
        samples(two, tmp_path)
    (tmp_path / "image.npz").unlink()
    (tmp_path / "ids.npy").unlink()
    with pytest.raises(InputError, match=r"holds image.npy, and no file for the input 'ids'; expected ids.npy"):
        samples(two, tmp_path)


def test_an_image_that_is_called_like_the_input_is_it(one: Path, tmp_path: Path) -> None:
    picture(tmp_path / "image.png")
    picture(tmp_path / "depth.png", 8, 10)
    [sample] = OnnxFileModel(one).samples(2, 0, tmp_path)
    assert sample.arrays["image"].shape[-2:] == (4, 5)
    assert sample.remarks[0].endswith("left out: depth.png")


def test_files_of_other_kinds_than_the_one_that_is_read_are_told(one: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "0.npz", image=X)
    np.save(tmp_path / "labels.npy", 0 * X)
    [sample] = OnnxFileModel(one).samples(1, 0, tmp_path)
    np.testing.assert_array_equal(sample.arrays["image"], X)
    assert sample.remarks == (f"{tmp_path}: a sample is a .npz; left out: labels.npy",)
    (tmp_path / "labels.npy").unlink()
    [sample] = OnnxFileModel(one).samples(1, 0, tmp_path)
    assert not sample.remarks


def test_files_that_are_left_out_are_told_by_the_commands(one: Path, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    np.save(folder / "image.npy", X)
    np.save(folder / "labels.npy", 0 * X)
    for command in (("bisect", one, "-b", "ort,ort-all"), ("capture", one, "-b", "ort", "-o", tmp_path / "c")):
        code, text = run(*command, "--inputs", folder)
        assert code == 0, text
        assert "left out: labels.npy" in " ".join(text.split())


def picture(path: Path, height: int = 4, width: int = 5) -> np.ndarray:
    pixels = np.random.default_rng(1).integers(0, 256, (height, width, 3), np.uint8)
    pytest.importorskip("PIL.Image").fromarray(pixels).save(path)
    return pixels


def test_an_image_scaled_and_normalized(one: Path, tmp_path: Path) -> None:
    pixels = picture(tmp_path / "a.png")
    [sample] = samples(one, tmp_path / "a.png")
    np.testing.assert_allclose(sample["image"], pixels.transpose(2, 0, 1)[None] / 255, rtol=1e-6)
    wanted = ImageFormat(mean=(0.5, 0.4, 0.3), std=(2.0,), bgr=True)
    [sample] = samples(one, tmp_path / "a.png", reading=Reading(images=wanted))
    expected = (pixels[:, :, ::-1] / 255 - [0.5, 0.4, 0.3]) / 2
    np.testing.assert_allclose(sample["image"][0].transpose(1, 2, 0), expected, rtol=1e-5, atol=1e-7)


def test_an_image_in_the_size_layout_and_type_that_the_graph_wants(one: Path, tmp_path: Path) -> None:
    pixels = picture(tmp_path / "a.png", 8, 10)
    model = OnnxFileModel(one, Reading({"image": (1, 3, 6, 7)}))
    [sample] = model.samples(1, 0, tmp_path / "a.png")
    assert sample.arrays["image"].shape == (1, 3, 6, 7)
    assert "10×8 resized to 7×6" in sample.source
    b = NetBuilder()
    nhwc = b.save(tmp_path / "n.onnx", {"x": (2, [1, 8, 10, 3])}, [b.op("Cast", "x", to=1)])
    np.testing.assert_array_equal(samples(nhwc, tmp_path / "a.png")[0]["x"], pixels[None])


def test_no_image_for_an_input_that_is_none(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    b = NetBuilder()
    net = b.save(tmp_path / "n.onnx", {"x": (1, [1, 16])}, [b.op("Relu", "x")])
    with pytest.raises(InputError, match=r"is an image, and the input x: float32\[1, 16\] does not look like one"):
        samples(net, tmp_path / "a.png")


def test_shapes_of_free_axes_reach_every_made_up_value(two: Path) -> None:
    [sample] = samples(two, None, 1, Reading({"image": (2, 3, 6, 7)}))
    assert sample["image"].shape == (2, 3, 6, 7)


def test_a_symbol_has_one_size_in_all_inputs(tmp_path: Path) -> None:
    b = NetBuilder()
    net = b.save(tmp_path / "n.onnx", {"a": (1, ["n", 4]), "b": (1, ["n", "m"])}, [b.op("Concat", "a", "b", axis=1)])
    [sample] = samples(net, None, 1, Reading({"a": (7, 4)}))
    assert sample["b"].shape[0] == 7


@pytest.mark.parametrize(
    ("shape", "says"),
    [
        ("image=1x3x8", "--shape: image=1x3x8: does not fit image: float32[batch, 3, h, w]"),
        ("image=1x4x8x8", "--shape: image=1x4x8x8: does not fit"),
        ("picture=1x3x8x8", "--shape: picture=1x3x8x8: no such input"),
        ("image", "--shape: 'image'; expected INPUT=SIZES, such as image=1x3x320x320"),
        ("image=1x-3x8x8", "--shape: 'image=1x-3x8x8'; expected"),
    ],
)
def test_shapes_that_do_not_fit(one: Path, shape: str, says: str) -> None:
    code, text = run("bisect", one, "-b", "ort,ort-all", "--shape", shape)
    assert code == 2
    assert text.startswith(says)


@pytest.mark.parametrize("command", ["bisect", "verify", "predict", "search", "check", "capture", "quantize ptq"])
def test_every_command_takes_sizes_and_files(command: str, one: Path, tmp_path: Path) -> None:
    asked = [*command.split(), one, "--shape", "image=1x3x6x7x8"]
    code, text = run(*asked, *(["-o", tmp_path / "out"] if command in ("capture", "quantize ptq") else []))
    assert code == 2
    assert "does not fit image" in text
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.json", b"{}", "expected what Polygraphy's --save-inputs"),
        ("a.png", b"no image", "not a readable image"),
        ("a.npy", b"no array", "not a readable .npy file"),
        ("a.txt", b"", "takes an .npz file of its named inputs"),
    ],
)
def test_what_cannot_be_read_is_named(one: Path, tmp_path: Path, name: str, content: bytes, says: str) -> None:
    (tmp_path / name).write_bytes(content)
    code, text = run("bisect", one, "-b", "ort,ort-all", "--inputs", tmp_path / name)
    assert code == 2
    assert text.startswith(f"--inputs: {tmp_path / name}")
    assert says in text


@pytest.mark.parametrize(
    "flag", ["mean=a", "std=0", "scale=0", "mean=1,2", "scale=1,2", "layout=hwc", "order=x", "gamma=2", "mean"]
)
def test_image_flags_that_do_not_fit(one: Path, tmp_path: Path, flag: str) -> None:
    picture(tmp_path / "a.png")
    code, text = run("bisect", one, "-b", "ort,ort-all", "--inputs", tmp_path / "a.png", "--image", flag)
    assert code == 2
    assert "--image" in text
    assert flag.partition("=")[0] in text


def test_sizes_and_images_are_refused_where_nothing_takes_them() -> None:
    code, text = run("bisect", "centerpoint:tiny", "--shape", "points=1x4")
    assert (code, "has its own inputs" in text) == (2, True)
    code, text = run("bisect", "centerpoint:tiny", "--image", "order=bgr")
    assert (code, "takes no images" in text) == (2, True)


def test_the_whole_way_on_the_command_line(one: Path, tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    code, text = run("bisect", one, "-b", "ort,ort-all", "--inputs", tmp_path / "a.png", "--image", "mean=0.5")
    assert code == 0, text
    assert onnx.load(one).graph.input[0].name == "image"


@pytest.mark.parametrize(
    "command",
    [
        "verify NET -s ort,ort-all --samples 1",
        "bench NET -b ort -n 1 --warmup 0",
        "check NET",
        "capture NET -b ort -o out",
    ],
)
def test_every_command_reads_images_as_it_is_told(
    command: str, one: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    picture(tmp_path / "a.png")
    words = [str(one) if word == "NET" else word for word in command.split()]
    code, text = run(*words, "--inputs", "a.png", "--image", "mean=0.5")
    assert code == 0, text


def test_sizes_are_refused_where_files_have_theirs(one: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", image=np.ones((1, 3, 6, 6), np.float32))
    for command in (("bisect", one, "-b", "ort,ort-all"), ("check", one), ("verify", one, "-s", "ort,ort-all")):
        code, text = run(*command, "--inputs", tmp_path / "a.npz", "--shape", "image=1x3x8x8")
        assert code == 2
        assert "--shape: it would do nothing here: the inputs have the sizes that" in text


@pytest.mark.parametrize(
    "header",
    ["{'descr': '<f4'}", "{'descr': f(), 'fortran_order': False, 'shape': (2**3,), }", "[", "{'descr': '<f9'}", "\n"],
)
def test_a_header_that_says_nothing_is_told_without_pythons_words(one: Path, tmp_path: Path, header: str) -> None:
    text = f"{header}\n".encode()
    (tmp_path / "x.npy").write_bytes(b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text)
    with pytest.raises(InputError, match="has a header without type, order and shape"):
        next(iter(OnnxFileModel(one).samples(1, 0, tmp_path / "x.npy")))


def test_inputs_of_another_file_have_the_float_type_that_it_declares(tmp_path: Path) -> None:
    net = NetBuilder()
    net.op("Add", net.op("Cast", "half", to=TensorProto.FLOAT), net.op("Cast", "whole", to=TensorProto.FLOAT), name="y")
    inputs = {"half": (TensorProto.FLOAT16, [2]), "whole": (TensorProto.INT64, [2])}
    graph = Graph(net.save(tmp_path / "n.onnx", inputs, ["y"]))
    given = {"half": np.float32([1, 2]), "whole": np.array([3, 4]), "other": np.float32([5])}
    found = as_declared(graph, given)
    assert {n: a.dtype for n, a in found.items()} == {"half": np.float16, "whole": np.int64, "other": np.float32}
    assert all(np.array_equal(found[n], given[n]) for n in given)
    levels = as_declared(graph, {"half": np.array([1, 2])})["half"]
    assert levels.dtype == np.int64  # whoever gives integers is told, not served
