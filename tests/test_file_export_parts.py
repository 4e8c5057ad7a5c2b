"""Files that are written again, and files that are scored without a model: what is checked, compared and refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from nets import NetBuilder

from cp_debug.backends.base import Program
from cp_debug.backends.spec import BackendSpec
from cp_debug.deploy import file_evaluation
from cp_debug.deploy.exporting import outcome
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
from cp_debug.deploy.file_export import _checked, _checked_run, export_files
from cp_debug.errors import InputError
from cp_debug.graph.graph import Graph
from cp_debug.recipes.base import Sample
from cp_debug.recipes.centerpoint.config import TINY
from cp_debug.recipes.registry import load_model


def written(folder: Path, batch: Any = "n", outputs: tuple[str, ...] = ("y", "z")) -> Path:
    """A file with x [batch, 4] → y = relu(x + 1), z = x·w."""
    net = NetBuilder()
    net.op("Relu", net.op("Add", "x", net.weight(np.ones(4, np.float32))), name="y")
    net.op("MatMul", "x", net.weight(np.eye(4, dtype=np.float32)), name="z")
    return net.save(folder / "net.onnx", {"x": (1, [batch, 4])}, list(outputs), opset=13)


def exported(path: Path, folder: Path, **how: Any) -> Any:
    model = load_model(str(path))
    samples = [Sample({"x": np.full((size, 4), size, np.float32)}, str(size)) for size in (6, 3)]
    program = Program(model.components[0].name, Graph(path))
    (found,) = export_files(model, [program], samples, folder, **how)
    return found


@pytest.mark.parametrize("how", [{}, {"opset": 17}, {"simplify": True}, {"opset": 17, "simplify": True}], ids=str)
def test_a_file_written_again_is_compared_on_all_samples_and_a_second_size(tmp_path: Path, how: dict[str, Any]) -> None:
    path = written(tmp_path)
    found = exported(path, tmp_path / "out", **how)
    assert found.sizes == ("x 6×4", "x 3×4", "x 7×4")  # half of six is no multiple of what strides divide
    assert found.error == 0.0
    assert found.checked_by == "ort"
    assert found.source.path == path
    proto = onnx.load(found.program.graph.path)
    assert found.program.graph.path.parent == tmp_path / "out"
    assert proto.opset_import[0].version == how.get("opset", 13)


def test_a_file_of_fixed_sizes_runs_on_them_alone_and_goes_where_it_is_told(tmp_path: Path) -> None:
    path = written(tmp_path, batch=3)
    model = load_model(str(path))
    name = model.components[0].name
    sample = Sample({"x": np.ones((3, 4), np.float32)}, "s")
    steps: list[Any] = []
    (found,) = export_files(
        model, [Program(name, Graph(path))], [sample], tmp_path / "out", files={name: "other.onnx"},
        on_step=lambda *told: steps.append(told),
    )  # fmt: skip
    assert found.sizes == ("x 3×4",)
    assert found.program.graph.path == tmp_path / "out" / "other.onnx"
    assert steps == [(f"writing {name}", 0, 1)]
    with pytest.raises(InputError, match=r"net\.onnx would replace MODEL itself; expected another folder"):
        export_files(model, [Program(name, Graph(path))], [sample], tmp_path, files={name: "net.onnx"})


def test_another_result_or_signature_is_refused(tmp_path: Path) -> None:
    graph = Graph(written(tmp_path))
    ours = {"y": np.ones(4, np.float32), "z": np.ones(4, np.float32)}
    assert outcome([_checked_run(graph, ours, ours)]) == (0.0, ())
    near = ours | {"z": np.full(4, 1 + 1e-6, np.float32)}
    error, _ = outcome([_checked_run(graph, ours, ours), _checked_run(graph, ours, near)])
    assert error == pytest.approx(1e-6, rel=0.2)
    for strange, says in ((np.full(4, 2, np.float32), r"\[4\], relative L2 1;"), (np.ones(5, np.float32), r"\[5\]")):
        with pytest.raises(InputError, match=f"rewritten it gives another z than before: {says}"):
            _checked_run(graph, ours, ours | {"z": strange})
    (tmp_path / "other").mkdir()
    fewer = written(tmp_path / "other", outputs=("y",))
    with pytest.raises(InputError, match=r"its outputs are \['y', 'z'\]; rewritten they would be \['y'\]"):
        _checked(fewer, graph)
    assert [v.name for v in _checked(graph.path, graph).outputs] == ["y", "z"]
    (tmp_path / "no.onnx").write_bytes(b"no graph")
    with pytest.raises(InputError, match=r"onnx\.checker refuses it"):
        _checked(tmp_path / "no.onnx", graph)


# Scored without a model ---------------------------------------------------------------------------------------------


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
