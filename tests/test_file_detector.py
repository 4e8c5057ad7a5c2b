"""Descriptions of exported files and engines."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from cp_debug.backends.spec import BackendSpec
from cp_debug.deploy.file_evaluation import COMPONENTS, _backend, read_description
from cp_debug.errors import InputError
from cp_debug.recipes.centerpoint.config import TINY


def test_engines_are_in_one_folder_or_in_one_for_each_backend(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    path = tmp_path / "files.yaml"
    for engines, found in (("", {}), ("a", {"": tmp_path / "a"}), ("{trt-fp16: a}", {"trt-fp16": tmp_path / "a"})):
        path.write_text(f"{{model: tiny, engines: {engines}}}")
        assert read_description(path).engines == found
    for wrong, says in (("[1]", "expected a valid dictionary"), ("{trt: 1}", "expected"), ("b", "there is no folder")):
        path.write_text(f"{{model: tiny, engines: {wrong}}}")
        with pytest.raises(InputError, match=f"engines.*{says}"):
            read_description(path)


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
        ("[1]", "expected settings by name"),
        ("{model: tiny, folde: a}", "unknown key 'folde'.* folder"),
        ("{model: 1}", "model is 1; expected a valid string"),
        ("{model: tiny, glue: [a]}", r"glue is .*; expected a valid dictionary"),
        ("{model: tiny, glue: {size: 1}}", r"glue\.size: there is no such setting"),
        ("{model: tiny, files: {neck: a.onnx}}", r"files\.neck.* expected 'pts_voxel_encoder' or"),
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
