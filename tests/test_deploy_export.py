"""Exported files: complete, checked on two sizes, and absent when the graph is not the module."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from cp_debug.deploy.exporting import (
    ExportOptions,
    compared_outputs,
    export_model,
    load_exported,
    resized,
    shapes_of,
    worst_output,
)
from cp_debug.deploy.stages import turn_outputs
from cp_debug.errors import InputError
from cp_debug.probes.alignment import Alignment
from cp_debug.recipes.base import Component, Model
from cp_debug.recipes.centerpoint.recipe import CenterPointModel
from cp_debug.recipes.onnx_file import OnnxFileModel
from cp_debug.recipes.torch_programs import load_callable


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model, folder = CenterPointModel("tiny"), tmp_path_factory.mktemp("onnx")
    turn_outputs(model)
    export_model(model, next(model.samples(1, 0, None)), folder, ExportOptions(opset=16, simplify=True))
    return folder


def test_files_have_awmls_interface_and_the_opset_asked_for(folder: Path) -> None:
    assert sorted(p.name for p in folder.iterdir()) == [
        f"{name}{suffix}"
        for name in ("pts_backbone_neck_head", "pts_voxel_encoder")
        for suffix in (".alignment.json", ".onnx")
    ]
    encoder, rest = load_exported(CenterPointModel("tiny"), folder)
    assert [str(v) for v in encoder.graph.inputs] == ["input_features: float32[num_voxels, num_max_points, 11]"]
    assert [str(v) for v in rest.graph.inputs] == ["spatial_features: float32[batch_size, 32, H, W]"]
    assert [v.name for v in encoder.graph.outputs] == ["pillar_features"]
    assert encoder.graph.opsets[""] == rest.graph.opsets[""] == 16
    assert isinstance(rest.alignment, Alignment)
    assert rest.alignment.coverage().values == rest.alignment.coverage().values_total


def test_turned_outputs_decode_to_the_same_boxes(folder: Path) -> None:
    from cp_debug.backends.registry import create
    from cp_debug.backends.spec import BackendSpec
    from cp_debug.programs.pipeline import Pipeline

    plain, turned = CenterPointModel("tiny"), CenterPointModel("tiny")
    turned.use_rot_y_axis_reference()
    sample = next(plain.samples(1, 0, None))
    boxes = []
    for model, spec in ((plain, "torch"), (turned, "ort")):
        with Pipeline(model, load_exported(model, folder), create(BackendSpec(spec))) as pipeline:
            boxes.append(model.decode(sample, pipeline.run(sample)))
    assert len(boxes[0].boxes) > 0
    np.testing.assert_allclose(boxes[1].boxes, boxes[0].boxes, rtol=1e-3, atol=1e-4)


class Freezes(nn.Module):
    """Its trace holds the example's size."""

    def forward(self, x: Tensor) -> Tensor:
        return x * float(x.shape[0])


def model_of(module: nn.Module, tmp_path: Path) -> Model:
    file = tmp_path / "made.py"
    file.write_text("import torch\ndef build():\n    return torch.nn.Identity(), (torch.ones(4, 3),)\n")
    model = load_callable(f"{file}:build")
    axes = {"x": {0: "n"}}
    model.components = [Component("net", ("x",), ("y",), module.eval(), deployed_axes=axes)]
    model.feed = lambda component, sample, results: {"x": np.ones((4, 3), np.float32)}
    return model


def test_frozen_sizes_are_found_and_nothing_is_left_behind(tmp_path: Path) -> None:
    model = model_of(Freezes(), tmp_path)
    target = tmp_path / "out"
    says = "net: on x 5×3 the exported graph computes another y than its module"
    with pytest.warns(torch.jit.TracerWarning), pytest.raises(InputError, match=says):
        export_model(model, next(iter(model.samples(1, 0, None))), target)
    assert not target.exists()  # an empty folder would look like one that was exported


def test_an_onnx_file_is_not_exported_again(folder: Path, tmp_path: Path) -> None:
    model = OnnxFileModel(folder / "pts_voxel_encoder.onnx")
    with pytest.raises(InputError, match="is an ONNX file already"):
        export_model(model, next(iter(model.samples(1, 0, None))), tmp_path)


def test_missing_and_foreign_files_are_named(folder: Path, tmp_path: Path) -> None:
    model = CenterPointModel("tiny")
    encoder = (folder / "pts_voxel_encoder.onnx").read_bytes()
    (tmp_path / "pts_voxel_encoder.onnx").write_bytes(encoder)
    with pytest.raises(InputError, match=r"there is no pts_backbone_neck_head.onnx"):
        load_exported(model, tmp_path)
    (tmp_path / "pts_backbone_neck_head.onnx").write_bytes(encoder)
    with pytest.raises(InputError, match=r"its inputs are \['input_features'\]; expected those of pts_back"):
        load_exported(model, tmp_path)


def test_resized_inputs_share_symbols_and_stay_divisible() -> None:
    inputs = {"a": np.arange(24.0).reshape(1, 24), "b": np.zeros((24, 2))}
    made = resized(inputs, {"a": {0: "batch", 1: "n"}, "b": {0: "n"}})
    assert made["a"].shape == (2, 8)
    assert made["b"].shape == (8, 2)
    np.testing.assert_array_equal(made["a"][1], np.arange(8.0))
    assert torch.from_numpy(made["a"]).is_contiguous()


def test_inputs_are_halved_to_multiples_of_strides_along_free_axes() -> None:
    arrays = {"a": np.arange(40.0).reshape(1, 40), "b": np.arange(40.0)[:, None], "c": np.arange(3.0), "d": np.ones(1)}
    axes = {"a": {1: "n"}, "b": {0: "n"}, "c": {0: "m"}, "d": {0: "k"}}
    small = resized(arrays, axes)
    assert {name: array.shape for name, array in small.items()} == {"a": (1, 16), "b": (16, 1), "c": (4,), "d": (2,)}
    assert small["c"].tolist() == [0, 1, 2, 0]
    assert small["a"][0].tolist() == list(range(16))
    assert small["a"].flags.c_contiguous
    assert resized({"e": np.zeros((0, 2))}, {"e": {0: "n"}})["e"].shape == (0, 2)
    assert shapes_of(small) == "a 1×16, b 16×1, c 4, d 2"
    run = compared_outputs({"x": np.ones(2), "y": np.ones(2)}, {"x": np.full(2, 1.1), "y": np.full(2, 1.2)})
    assert worst_output(run)[0] == "y"
