"""Files that are scored without a model, by themselves: engines, descriptions, order of outputs, empty clouds."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from nets import NetBuilder

from cp_debug.backends.spec import BackendSpec
from cp_debug.deploy import file_evaluation
from cp_debug.deploy.file_evaluation import (
    COMPONENTS,
    FileDetector,
    FilesDescription,
    OnnxRuns,
    _check,
    _engine_folders,
    open_runs,
    read_description,
)
from cp_debug.errors import InputError
from cp_debug.recipes.centerpoint.config import TINY


def written(folder: Path, batch: Any = "n", outputs: tuple[str, ...] = ("y", "z")) -> Path:
    """A file with x [batch, 4] → y = relu(x + 1), z = x·w."""
    net = NetBuilder()
    net.op("Relu", net.op("Add", "x", net.weight(np.ones(4, np.float32))), name="y")
    net.op("MatMul", "x", net.weight(np.eye(4, dtype=np.float32)), name="z")
    return net.save(folder / "net.onnx", {"x": (1, [batch, 4])}, list(outputs), opset=13)


def test_engines_are_in_one_folder_or_in_one_for_each_backend(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    path = tmp_path / "files.yaml"
    assert _engine_folders(None, path) == {}
    assert _engine_folders("a", path) == {"": tmp_path / "a"}
    assert _engine_folders({"trt-fp16": "a"}, path) == {"trt-fp16": tmp_path / "a"}
    for wrong, says in (([1], "expected a folder"), ({"trt": 1}, "expected a folder"), ("b", "there is no folder")):
        with pytest.raises(InputError, match=f"engines: {says}"):
            _engine_folders(wrong, path)


@pytest.mark.parametrize("name", ["torch", "ort-qdq", "emu-fp16"])
def test_files_run_on_onnx_runtime_and_engines_alone(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match=f"{name}.* needs torch; without it files run on ort"):
        open_runs(FilesDescription({}, TINY), BackendSpec(name))
    with pytest.raises(InputError, match=r"d: names no engines of trt-fp16.*; expected engines: FOLDER"):
        open_runs(FilesDescription({}, TINY, source="d"), BackendSpec("trt-fp16"))


def test_a_files_outputs_have_its_own_order_and_names(tmp_path: Path) -> None:
    path = written(tmp_path, outputs=("z", "y"))
    runs = OnnxRuns(FilesDescription({"net": path}, TINY), BackendSpec("ort"))
    outputs = runs.run("net", {"x": np.array([[-3, 0, 1, 2]], np.float32)})
    assert {name: array.tolist() for name, array in outputs.items()} == {"z": [[-3, 0, 1, 2]], "y": [[0, 1, 2, 3]]}
    assert list(outputs) == ["z", "y"]
    assert (runs.record.spec, runs.record.precision, runs.record.device) == ("ort", "fp32", "cpu")
    with pytest.raises(InputError, match=r"net\.onnx: ONNX Runtime cannot run it"):
        runs.run("net", {"x": np.ones((1, 5), np.float32)})
    path.write_bytes(b"no graph")
    with pytest.raises(InputError, match=r"net\.onnx: ONNX Runtime refuses it"):
        OnnxRuns(FilesDescription({"net": path}, TINY), BackendSpec("ort"))


def test_clouds_with_outputs_that_are_not_finite_are_counted_and_empty_ones_skip_the_encoder(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ran: list[str] = []
    values = iter([1.0, np.nan, 1.0])

    class Known:
        record = "record"

        def run(self, part: str, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
            ran.append(part)
            if part == COMPONENTS[0]:
                return {"pillar_features": np.ones((len(inputs["input_features"]), 1, 32), np.float32)}
            return {"heat": np.array([next(values)], np.float32)}

    monkeypatch.setattr(file_evaluation, "_check", lambda description: None)
    monkeypatch.setattr(file_evaluation, "open_runs", lambda description, spec: Known())
    monkeypatch.setattr(file_evaluation, "canvas", lambda features, coors, grid: features)
    monkeypatch.setattr(file_evaluation, "boxes_of", lambda outputs, config: outputs)
    monkeypatch.setattr(file_evaluation, "unturned", lambda outputs: "unturned")
    detector = FileDetector(FilesDescription({}, TINY), BackendSpec("ort"))
    cloud = np.full((9, len(TINY.point_features)), 0.5, np.float32)
    found = [detector.detect(each) for each in (cloud, cloud, cloud[:0])]
    assert ran == [*COMPONENTS, *COMPONENTS, COMPONENTS[1]]
    assert detector.strange == 1
    assert [list(each) for each in found] == [["heat"]] * 3
    turned = FileDetector(FilesDescription({}, TINY, turned=True), BackendSpec("ort"))
    values = iter([1.0])
    assert turned.detect(cloud) == "unturned"


def test_files_must_have_the_inputs_and_outputs_of_their_model(tmp_path: Path) -> None:
    nx, ny, _ = TINY.grid

    def description(features: int, canvas: list[Any], heads: list[str] | None = None) -> FilesDescription:
        paths = {}
        for part, (given, shape, outputs) in zip(
            COMPONENTS,
            [("input_features", ["n", "k", features], ["pillar_features"]),
             ("spatial_features", canvas, heads or list(TINY.output_names))],
            strict=True,
        ):  # fmt: skip
            net = NetBuilder()
            for output in outputs:
                net.op("Neg", given, name=output)
            paths[part] = net.save(tmp_path / f"{part}.onnx", {given: (1, shape)}, outputs)
        return FilesDescription(paths, TINY)

    right = TINY.decorated_channels
    _check(description(right, [1, 32, ny, nx]))
    _check(description(right, ["b", 32, "h", "w"]))
    with pytest.raises(InputError, match=f"takes {right + 1} features a point; tiny decorates points to {right}"):
        _check(description(right + 1, [1, 32, ny, nx]))
    for height, width in ((ny + 1, nx), (ny, nx + 1)):
        with pytest.raises(InputError, match=f"takes a canvas of {height}×{width}; the glue of .* {ny}×{nx}"):
            _check(description(right, [1, 32, height, width]))
    with pytest.raises(InputError, match=r"it has \['spatial_features'\] → \['other'\]"):
        _check(description(right, [1, 32, ny, nx], ["other"]))


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
        ("{model: tiny, glue: {score_threshold: high}}", r"glue\.score_threshold: "),
        ("{model: tiny}", r"pts_voxel_encoder: there is no .*pts_voxel_encoder\.onnx; expected what `cpdebug export`"),
    ],
)
def test_a_description_that_says_something_else_is_refused(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "files.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match=says):
        read_description(path)
