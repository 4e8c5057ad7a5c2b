"""Descriptions of exported files and engines."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from cp_debug.backends.spec import BackendSpec
from cp_debug.deploy.file_evaluation import COMPONENTS, _backend, _engine_folders, read_description
from cp_debug.errors import InputError
from cp_debug.recipes.centerpoint.config import TINY


def test_engines_are_in_one_folder_or_in_one_for_each_backend(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    path = tmp_path / "files.yaml"
    assert _engine_folders(None, path) == {}
    assert _engine_folders("a", path) == {"": tmp_path / "a"}
    assert _engine_folders({"trt-fp16": "a"}, path) == {"trt-fp16": tmp_path / "a"}
    for wrong, says in (([1], "expected a folder"), ({"trt": 1}, "expected a folder"), ("b", "there is no folder")):
        with pytest.raises(InputError, match=f"engines: {says}"):
            _engine_folders(wrong, path)


def test_a_description_names_files_engines_and_what_differs_from_the_model(tmp_path: Path) -> None:
    path = tmp_path / "files.yaml"
    (tmp_path / "out").mkdir()
    (tmp_path / "built").mkdir()
    for part in (f"{COMPONENTS[0]}.onnx", "head.onnx"):
        (tmp_path / "out" / part).write_bytes(b"")
    path.write_text(
        "model: centerpoint:tiny\nfolder: out\nfiles: {pts_backbone_neck_head: head.onnx}\nengines: built\n"
        "glue: {score_threshold: 0.25}\nrot_y_axis_reference: true\n"
    )
    found = read_description(path)
    assert found.files == {
        COMPONENTS[0]: tmp_path / "out" / f"{COMPONENTS[0]}.onnx", COMPONENTS[1]: tmp_path / "out" / "head.onnx",
    }  # fmt: skip
    assert found.config == replace(TINY, score_threshold=0.25)
    assert found.engines == {"": tmp_path / "built"}
    assert found.turned
    assert found.source == str(path)
    path.write_text("model: tiny\nfolder: out\nfiles: {pts_backbone_neck_head: head.onnx}\n")
    plain = read_description(path)
    assert (plain.config, plain.engines, plain.turned) == (TINY, {}, False)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[1]", "expected a mapping with the keys model, folder, files"),
        ("{model: tiny, fold: a}", "unknown key 'fold'; expected model, folder"),
        ("{model: 1}", "expected model as the name of a CenterPoint"),
        ("{model: tiny, glue: [a]}", "expected model as the name of a CenterPoint, glue and files as mappings"),
        ("{model: tiny, glue: {size: 1}}", r"glue\.size: there is no such setting"),
        ("{model: tiny, files: {neck: a.onnx}}", r"files\.neck: there is no such component"),
        (
            "{model: tiny, glue: {score_threshold: high}}",
            'glue: score_threshold is "high"; expected a valid number',
        ),
    ],
)
def test_a_description_that_says_something_else_is_refused(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "files.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match=says):
        read_description(path)


def test_a_backend_without_engines_in_the_description_is_refused(tmp_path: Path) -> None:
    (tmp_path / "files.yaml").write_text("model: tiny\n")
    found = read_description(tmp_path / "files.yaml")
    with pytest.raises(InputError, match=r"files\.yaml: names no engines of trt-fp16; expected engines: FOLDER"):
        _backend(found, BackendSpec.parse("trt-fp16"), [], None, None)
