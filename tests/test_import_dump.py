"""Dumps from elsewhere: every format arrives as it was, what does not fit is told, and the capture is judged."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnxruntime as ort
import pytest
from nets import NetBuilder
from onnx import numpy_helper
from test_cli import run

from cp_debug.bisect.import_dump import _other_dtypes, _other_shapes
from cp_debug.graph.graph import ValueInfo
from cp_debug.probes.capture import Capture
from cp_debug.probes.dumps import read_dump


@pytest.fixture
def net(tmp_path: Path) -> Path:
    b = NetBuilder()
    x = b.op("Relu", b.conv("image", 3, 4, name="/block/Conv"))
    return b.save(tmp_path / "net.onnx", {"image": (1, [1, 3, 8, 8])}, [b.conv(x, 4, 2, name="scores")])


@pytest.fixture
def values(net: Path) -> dict[str, np.ndarray]:
    """Every value of the net, as ONNX Runtime computes it from one image."""
    model = onnx.shape_inference.infer_shapes(onnx.load(net))
    outputs = {o for node in model.graph.node for o in node.output}
    model.graph.output.extend(v for v in model.graph.value_info if v.name in outputs)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    image = np.random.default_rng(0).normal(size=(1, 3, 8, 8)).astype(np.float32)
    names = [o.name for o in session.get_outputs()]
    return {"image": image, **dict(zip(names, session.run(None, {"image": image}), strict=True))}


def file_name(name: str) -> str:
    return "".join(c if c.isalnum() else "_" for c in name)


def node_dump(folder: Path, values: dict[str, np.ndarray]) -> Path:
    """Files as ONNX Runtime's node dumps are: a TensorProto each, called as the value with ``_`` for signs."""
    folder.mkdir()
    for name, array in values.items():
        tensor = numpy_helper.from_array(array, name)
        (folder / f"{file_name(name)}.tensorproto").write_bytes(tensor.SerializeToString())
    return folder


def raw_dump(folder: Path, values: dict[str, np.ndarray]) -> Path:
    folder.mkdir()
    for index, (name, array) in enumerate(values.items()):
        (folder / f"{index}.bin").write_bytes(array.tobytes())
        about = {"name": name, "dtype": array.dtype.name, "shape": list(array.shape)}
        (folder / f"{index}.bin.json").write_text(json.dumps(about))
    return folder


@pytest.mark.parametrize("dump", [node_dump, raw_dump])
def test_a_dump_becomes_a_capture_that_is_judged(dump: object, net: Path, values: dict, tmp_path: Path) -> None:
    folder = dump(tmp_path / "dump", values)  # type: ignore[operator]
    code, text = run("import", folder, "--model", net, "-o", tmp_path / "here")
    assert code == 0, text
    capture = Capture.open(tmp_path / "here")
    assert {entry.name for entry in capture.entries} == set(values)
    for name, array in read_dump(tmp_path / "here").items():
        np.testing.assert_array_equal(array, values[name])
    code, text = run("bisect", net, "-b", "ort", "--test-tensors", tmp_path / "here")
    assert code == 0, text
    np.savez(tmp_path / "in.npz", image=values["image"])
    assert run("capture", net, "-b", "ort", "--inputs", tmp_path / "in.npz", "-o", tmp_path / "ours")[0] == 0
    code, text = run("compare", tmp_path / "ours", tmp_path / "here")
    assert code == 0, text


def test_missing_extra_and_renamed_tensors_are_told(net: Path, values: dict, tmp_path: Path) -> None:
    first = next(name for name in values if "Conv" in name)
    dump = {"image": values["image"], file_name(first): values[first], "result": values["scores"], "noise": np.ones(7)}
    np.savez(tmp_path / "dump.npz", **dump)
    code, text = run("import", tmp_path / "dump.npz", "--model", net, "-o", tmp_path / "a", "--json", "-")
    assert code == 1
    document = json.loads(text)
    assert document["missing_outputs"] == ["scores"]
    assert document["renamed"] == {file_name(first): first}
    assert sorted(document["extra"]) == ["noise", "result"]
    assert document["suggestions"] == {"result": "scores"}
    code, text = run("import", tmp_path / "dump.npz", "--model", net, "-o", tmp_path / "b", "--map", "scores=result")
    assert code == 0, text
    assert "renamed: result is scores" in text
    assert "extra, not a value of the graph: noise" in text
    assert re.search(r"missing: \w+.*; nodes between two dumped values are judged as one segment", text)
    assert f"written: {tmp_path / 'b'}" in text


def test_other_dtypes_shapes_and_layouts(net: Path, values: dict, tmp_path: Path) -> None:
    half = {name: array.astype(np.float16) for name, array in values.items()}
    np.savez(tmp_path / "half.npz", **{file_name(n): a for n, a in half.items()})
    code, text = run("import", tmp_path / "half.npz", "--model", net, "-o", tmp_path / "h", "--precision", "fp16")
    assert code == 0
    assert "other dtype: scores is float16, declared float32" in text
    nhwc = {file_name(n): np.moveaxis(a, 1, -1) for n, a in values.items()}
    np.savez(tmp_path / "nhwc.npz", **nhwc)
    code, text = run("import", tmp_path / "nhwc.npz", "--model", net, "-o", tmp_path / "n")
    assert code == 2
    assert "channels last; use --layout nhwc" in text
    code, text = run("import", tmp_path / "nhwc.npz", "--model", net, "-o", tmp_path / "n", "--layout", "nhwc")
    assert code == 0, text
    np.testing.assert_array_equal(read_dump(tmp_path / "n")["scores"], values["scores"])
    np.savez(tmp_path / "cut.npz", image=values["image"], scores=values["scores"][:, :, :3])
    code, text = run("import", tmp_path / "cut.npz", "--model", net, "-o", tmp_path / "c")
    assert code == 1
    assert "other shape: scores is [1, 2, 3, 8], the graph's is [1, 2, 8, 8]" in text


@pytest.mark.parametrize("what", ["image", "scores"])
def test_sizes_of_free_axes_follow_from_the_dumped_inputs(what: str, net: Path, values: dict, tmp_path: Path) -> None:
    """Where the image's height and width are free, what is dumped channels last is still known by its content."""
    model = onnx.load(net)
    for axis, name in ((2, "h"), (3, "w")):
        model.graph.input[0].type.tensor_type.shape.dim[axis].dim_param = name
    del model.graph.value_info[:]
    for value in model.graph.output:
        value.type.tensor_type.ClearField("shape")
    free = tmp_path / "free.onnx"
    onnx.save(model, free)
    last = {name: array.transpose(0, 2, 3, 1) if name == what else array for name, array in values.items()}
    np.savez(tmp_path / "last.npz", **last)
    for command in (
        ("import", tmp_path / "last.npz", "--model", free, "-o", tmp_path / "here"),
        ("bisect", free, "-b", "ort", "--test-tensors", tmp_path / "last.npz"),
    ):
        code, text = run(*command)
        assert (code, f"'{what}' has shape" in text, "layout nhwc" in text) == (2, True, True), text
    cut = {name: array[:, :1] if name == "scores" else array for name, array in values.items()}
    np.savez(tmp_path / "cut.npz", **cut)
    code, text = run("import", tmp_path / "cut.npz", "--model", free, "-o", tmp_path / "there")
    assert (code, "other shape: scores is" in text) == (1, True), text
    np.savez(tmp_path / "right.npz", **values)
    assert run("import", tmp_path / "right.npz", "--model", free, "-o", tmp_path / "right")[0] == 0


def test_a_dump_in_half_precision_says_how_to_judge_it(net: Path, values: dict, tmp_path: Path) -> None:
    halves = {name: array if name == "image" else array.astype(np.float16) for name, array in values.items()}
    np.savez(tmp_path / "half.npz", **halves)
    command = ("bisect", net, "-b", "ort", "--test-tensors", tmp_path / "half.npz")
    assert "--tensors-precision fp16 allows for its rounding" in " ".join(run(*command)[1].split())
    code, text = run(*command, "--tensors-precision", "fp16")
    assert (code, "allows for" in text) == (0, False), text


def test_raw_numbers_in_types_that_numpy_lacks(tmp_path: Path) -> None:
    array = np.arange(6).astype(ml_dtypes.bfloat16).reshape(2, 3)
    [(name, read)] = read_dump(raw_dump(tmp_path / "dump", {"x": array})).items()
    assert (name, read.dtype) == ("x", array.dtype)
    np.testing.assert_array_equal(read, array)


@pytest.mark.parametrize(
    ("sidecar", "says"),
    [
        (None, "expected a.bin.json beside it"),
        ({"dtype": "float32", "shape": [3]}, "has 8 bytes; by a.bin.json, float32[3] takes 12 bytes"),
        ({"dtype": "floaty", "shape": [2]}, "dtype is 'floaty'"),
        ({"dtype": "float32", "shape": [-2]}, "sizes from 0 on"),
        ({"shape": [2]}, "a.bin.json"),
        ({"dtype": "object", "shape": [1]}, "expected numbers"),
    ],
)
def test_raw_files_that_do_not_fit(sidecar: dict | None, says: str, net: Path, tmp_path: Path) -> None:
    folder = tmp_path / "dump"
    folder.mkdir()
    (folder / "a.bin").write_bytes(bytes(8))
    if sidecar is not None:
        (folder / "a.bin.json").write_text(json.dumps(sidecar))
    code, text = run("import", folder, "--model", net, "-o", tmp_path / "out")
    assert code == 2
    assert says in text
    assert not (tmp_path / "out").exists()


def test_a_dump_of_another_network_is_refused(net: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "dump.npz", a=np.ones(3), b=np.ones(2))
    code, text = run("import", tmp_path / "dump.npz", "--model", net, "-o", tmp_path / "out")
    assert code == 2
    assert "none of its 2 tensors is a value of" in text
    assert not (tmp_path / "out").exists()


def test_levels_of_a_quantizer_are_no_values(net: Path, values: dict, tmp_path: Path) -> None:
    name = next(name for name in values if name not in ("image", "scores"))
    for levels in ({"scores": np.int8}, {name: np.uint8}):
        given = {n: a.astype(levels.get(n, a.dtype)) for n, a in values.items()}
        np.savez(tmp_path / "levels.npz", **given)
        for command in (
            ["import", str(tmp_path / "levels.npz"), "--model", str(net), "-o", str(tmp_path / "here")],
            ["bisect", str(net), "-b", "ort", "--test-tensors", str(tmp_path / "levels.npz")],
        ):
            code, text = run(*command)
            assert code == 2
            assert "levels of a quantizer" in text
        assert not (tmp_path / "here").exists()


def test_an_import_counts_what_a_bisect_counts(net: Path, values: dict, tmp_path: Path) -> None:
    """The inputs are values too; constants are none, though a dump may hold them."""
    np.savez(tmp_path / "all.npz", **values)
    code, text = run("import", tmp_path / "all.npz", "--model", net, "-o", tmp_path / "here", "--json", tmp_path / "j")
    assert f"{len(values)}of{len(values)}valuesof{net},inputsamongthem" in "".join(text.split())
    assert (code, json.loads((tmp_path / "j").read_text())["matched"]) == (0, len(values))
    code, text = run("bisect", net, "-b", "ort", "--test-tensors", tmp_path / "all.npz")
    assert f"{len(values)} of {len(values)} values" in text
    np.savez(tmp_path / "less.npz", **dict(list(values.items())[::2]))
    text = run("import", tmp_path / "less.npz", "--model", net, "-o", tmp_path / "there")[1]
    assert f"less.npz:2of{len(values)}values" in "".join(text.split())


def test_tensors_of_a_dump_that_are_not_as_declared(monkeypatch: pytest.MonkeyPatch) -> None:
    value = ValueInfo("x", np.dtype(np.float32), (2, 3))
    graph: Any = SimpleNamespace(inputs=[value], outputs=[])
    monkeypatch.setattr(
        "cp_debug.bisect.import_dump.known_shape", lambda graph, name, types: (2, 3) if name == "x" else None
    )
    tensors = {"x": np.zeros((3, 2), np.float16), "z": np.zeros(1)}
    assert _other_dtypes(graph, tensors) == {"x": "float16, declared float32"}
    assert _other_shapes(graph, tensors, {}) == {"x": "[3, 2], the graph's is [2, 3]"}
    assert _other_dtypes(graph, {"x": np.zeros((2, 3), np.float32)}) == {}
    assert _other_shapes(graph, {"x": np.zeros((2, 3))}, {}) == {}
