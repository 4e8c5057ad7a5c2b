"""Outputs that would replace what the same command line reads, or each other."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper
from typer.testing import CliRunner

from cp_debug.cli.given import check_outputs
from cp_debug.cli.main import app
from cp_debug.errors import InputError
from cp_debug.graph.graph import Graph


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current folder with ``net.onnx``: ``x`` [n, 4] by a matrix, reshaped to a batch of one by an ``If``."""
    branch = helper.make_graph([helper.make_node("Reshape", ["m", "s"], ["t"])], "b", [], [_value("t")])
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["m"], name="matmul"),
        helper.make_node("If", ["yes"], ["y"], name="if", then_branch=branch, else_branch=branch),
    ]
    weights = [
        numpy_helper.from_array(np.eye(4, dtype=np.float32), "w"),
        numpy_helper.from_array(np.array([1, 4], np.int64), "s"),
        numpy_helper.from_array(np.array(True), "yes"),
    ]
    graph = helper.make_graph(nodes, "net", [helper.make_tensor_value_info("x", 1, ["n", 4])], [_value("y")], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.save(model, str(tmp_path / "net.onnx"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def _value(name: str) -> onnx.ValueInfoProto:
    return onnx.ValueInfoProto(name=name)


def refused(argv: list[str]) -> str:
    result = CliRunner().invoke(app, argv)
    assert isinstance(result.exception, InputError), result.output
    return str(result.exception)


@pytest.mark.parametrize(
    "argv",
    [
        ["bisect", "net.onnx", "-b", "ort,emu-fp16", "--json", "net.onnx"],
        ["bisect", "net.onnx", "-b", "ort,emu-fp16", "--csv", "./net.onnx"],
        ["bisect", "other.onnx", "-b", "ort", "--test-model", "net.onnx", "--html", "net.onnx"],
        ["predict", "net.onnx", "--json", "link.onnx"],
        ["search", "net.onnx", "-b", "ort,emu-fp16", "--goal", "rel_l2<1", "--onnx", "net.onnx"],
        ["verify", "net.onnx", "-s", "ort,emu-fp16", "--samples", "1", "--junit", "net.onnx"],
        ["bench", "net.onnx", "-b", "ort", "--json", "net.onnx"],
        ["quantize", "ptq", "net.onnx", "-o", ".", "--batches", "1"],
        ["quantize", "sensitivity", "net.onnx", "--csv", "net.onnx"],
    ],
)
def test_no_output_replaces_the_model(folder: Path, argv: list[str]) -> None:
    shutil.copyfile("net.onnx", "other.onnx")
    Path("link.onnx").symlink_to("net.onnx")
    before = Path("net.onnx").read_bytes()
    told = refused(argv)
    assert "net.onnx" in told or "link.onnx" in told
    assert "expected another" in told
    assert Path("net.onnx").read_bytes() == before


def test_no_output_replaces_the_file_of_a_callable(folder: Path) -> None:
    Path("own.py").write_text("def make(): return None")
    assert refused(["bisect", "own.py:make", "--json", "own.py"]).startswith("--json: own.py is what MODEL reads")


def test_no_output_replaces_a_part_of_a_folder_that_is_read(folder: Path) -> None:
    (folder / "kept").mkdir()
    for name in ("manifest.json", "x.npy", "page.html"):
        (folder / "kept" / name).write_text("as it was")
    for name in ("manifest.json", "x.npy"):
        result = CliRunner().invoke(app, ["compare", "kept", "kept", "--json", f"kept/{name}"])
        assert "is a part of what" in str(result.exception or result.output)
        assert (folder / "kept" / name).read_text() == "as it was"
    check_outputs({"folder": "kept", "html": "kept/page.html"}, {"folder": "FOLDER", "html": "--html"})


def test_two_outputs_share_no_file(folder: Path) -> None:
    told = refused(["bisect", "net.onnx", "-b", "ort,emu-fp16", "--csv", "a", "--json", "./a"])
    assert told == "--json: ./a is the file of --csv too; expected another"
    assert not Path("a").exists()


def test_overwriting_a_folder_spares_what_is_read_from_it(folder: Path) -> None:
    Path("run").mkdir()
    shutil.copyfile("net.onnx", "run/net.onnx")
    Path("run/result.json").write_text("{}")
    told = refused(["bisect", "run/net.onnx", "-b", "ort,emu-fp16", "--save", "run", "--overwrite"])
    assert told == "--save: --overwrite would remove run/net.onnx, which MODEL reads, with it"


@pytest.mark.parametrize("command", [["bisect", "-b", "ort,emu-fp16"], ["capture", "-b", "ort", "-o", "out"]])
def test_messages_name_the_users_file_and_not_a_working_copy(folder: Path, command: list[str]) -> None:
    """The ``If`` is put flat in a copy, which then fails on a batch of two."""
    told = refused([command[0], "net.onnx", *command[1:], "--shape", "x=2x4"])
    assert told.startswith("net.onnx: ONNX Runtime failed at ")
    assert "unrolled" not in told


def test_onnx_runtimes_sentence_is_told_without_places_in_its_sources(folder: Path) -> None:
    told = refused(["bench", "net.onnx", "-b", "ort", "-n", "1", "--shape", "x=2x4"])
    assert "Input shape:{2,4}, requested shape:{1,4}" in told
    assert "/onnxruntime_src" not in told
    assert "ONNXRuntimeError" not in told


def test_a_working_copy_is_shown_as_its_source(folder: Path) -> None:
    shutil.copyfile("net.onnx", "copy.onnx")
    first = Graph("net.onnx")
    assert str(Graph("copy.onnx", source=Graph("copy.onnx", source=first))) == "net.onnx"
    assert str(Graph("copy.onnx")) == "copy.onnx"
