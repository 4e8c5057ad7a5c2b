"""Against the real mmdet3d, in this Python or in that of CPDEBUG_MMDET3D_PYTHON: ``make test-mmdet3d``."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from test_field import MMDET3D, rows_of
from test_tutorial import tutorial

from cp_debug.bisect.engine import Options, bisect
from cp_debug.errors import InputError
from cp_debug.recipes.centerpoint.config import NUS_PILLAR02
from cp_debug.recipes.centerpoint.model import build_model
from cp_debug.recipes.centerpoint.recipe import WEIGHTS, CenterPointModel
from cp_debug.recipes.mmdet3d.client import ENVIRONMENT, DetectorClient
from cp_debug.recipes.mmdet3d.recipe import DetectorLayers, Mmdet3dCenterPoint, stage_differences
from cp_debug.recipes.registry import load_model

pytestmark = [
    pytest.mark.mmdet3d,
    pytest.mark.timeout(900),
    pytest.mark.skipif(
        importlib.util.find_spec("mmdet3d") is None and ENVIRONMENT not in os.environ, reason="needs the real mmdet3d"
    ),
]

PILLARS = "centerpoint_pillar02_second_secfpn_head-circlenms_8xb4-cyclic-20e_nus-3d"
TOLERANCE = 2e-5
STAGES = {
    *("voxels", "num_points", "coors", "input_features", "pillar_features", "spatial_features"),
    *("backbone.0", "backbone.1", "backbone.2", "neck", *NUS_PILLAR02.output_names, "boxes", "scores", "labels"),
}

TINY = """
_base_ = [{base!r}]
region = [-25.6, -25.6, -5.0, 25.6, 25.6, 3.0]
size = [0.4, 0.4, 8.0]
tasks = [
    dict(num_class=2, class_names=['car', 'truck']), dict(num_class=2, class_names=['pedestrian', 'cyclist'])
]
model = dict(
    data_preprocessor=dict(voxel_layer=dict(voxel_size=size, point_cloud_range=region, max_voxels=(10000, 10000))),
    pts_voxel_encoder=dict(feat_channels=[32], voxel_size=size, point_cloud_range=region),
    pts_middle_encoder=dict(in_channels=32, output_shape=(128, 128)),
    pts_backbone=dict(in_channels=32, out_channels=[32, 64, 128], layer_nums=[2, 2, 2], layer_strides=[1, 2, 2]),
    pts_neck=dict(in_channels=[32, 64, 128], out_channels=[64, 64, 64]),
    pts_bbox_head=dict(
        in_channels=192, share_conv_channel=32, tasks=tasks, separate_head=dict(head_conv=32),
        bbox_coder=dict(out_size_factor=2, voxel_size=size[:2], pc_range=region[:2],
            post_center_range=[-30.0, -30.0, -10.0, 30.0, 30.0, 10.0])),
    test_cfg=dict(pts=dict(
        out_size_factor=2, voxel_size=size[:2], pc_range=region[:2], min_radius=[4.0, 0.5],
        post_center_limit_range=[-30.0, -30.0, -10.0, 30.0, 30.0, 10.0])),
)
"""


def real_stages(checkpoint: Path, points: np.ndarray) -> dict[str, np.ndarray]:
    """What mmdet3d computes."""
    client = DetectorClient()
    client.call("open", config=client.call("configs").result["configs"][PILLARS], seed=0)
    client.call("load", file=str(checkpoint))
    return dict(client.call("stages", {"points": points}).arrays)


def assert_equal(model: CenterPointModel, points: np.ndarray, real: dict[str, np.ndarray]) -> None:
    """Every stage, of values that mean something."""
    differences = stage_differences(model, points, real)
    assert set(differences) == set(real) == STAGES
    assert all(np.ptp(real[name]) > 0 for name in STAGES - {"labels"})
    for name in ("voxels", "num_points", "coors", "labels"):
        assert differences.pop(name) == 0
    print(*(f"{name} {difference:.2g}" for name, difference in differences.items()), sep=", ")
    assert max(differences.values()) <= TOLERANCE


def test_the_recipe_equals_mmdet3d_with_random_weights(tmp_path: Path) -> None:
    checkpoint = tmp_path / "random.pt"
    torch.save(build_model(NUS_PILLAR02, seed=3).state_dict(), checkpoint)
    model = CenterPointModel("nus-pillar02", checkpoint=checkpoint)
    (sample,) = model.samples(1, 0, None)
    assert_equal(model, sample.arrays["points"], real_stages(checkpoint, sample.arrays["points"]))


def test_the_recipe_equals_mmdet3d_with_fitted_weights_on_a_real_frame(shared: Path) -> None:
    checkpoint = shared / "parity/state_dict_overfit.pt"
    model = CenterPointModel("nus-pillar02", checkpoint=checkpoint)
    (sample,) = model.samples(1, 0, shared / "data/nuscenes_frame.pcd.bin")
    real = real_stages(checkpoint, sample.arrays["points"])
    assert_equal(model, sample.arrays["points"], real)
    recorded = np.load(shared / "parity/overfit_06_predict_circlenms.npz")
    np.testing.assert_array_equal(real["labels"], recorded["labels_3d"])
    np.testing.assert_allclose(real["boxes"], recorded["bboxes_3d"], rtol=0, atol=1e-3)


def test_bisect_a_config_file(tmp_path: Path) -> None:
    base = DetectorClient().call("configs").result["configs"][PILLARS]
    config = tmp_path / "tiny.py"
    config.write_text(TINY.format(base=base))
    model = load_model(f"mmdet3d:{config}", checkpoint=WEIGHTS / "tiny.safetensors")
    assert isinstance(model, Mmdet3dCenterPoint)
    assert model.config.class_names == ("car", "truck", "pedestrian", "cyclist")
    result = bisect(model, "torch,ort,emu-fp16")
    assert result.agrees
    layers = {row.name for row in result.tests[0].rows}
    assert {"pts_voxel_encoder.pfn_layers.0.linear", "pts_backbone.blocks.2.7", "pts_neck/cat"} <= layers
    detections = result.tests[0].detections
    assert detections is not None
    assert "mmdet3d 1.4.0" in result.tests[0].notes[0]


def test_bisect_another_detector() -> None:
    options = Options(replay=False, explain=False)
    result = bisect("mmdet3d:pointpillars_hv_secfpn_sbn-all_8xb4-2x_nus-3d", "torch,ort", options=options)
    assert result.agrees
    layers = {row.name for row in result.tests[0].rows}
    assert {"pts_backbone.blocks.0.1", "pts_neck.deblocks.2.1", "pts_bbox_head.conv_cls"} <= layers


def test_a_head_with_custom_operators_is_cut_off() -> None:
    model = load_model("mmdet3d:smoke_dla34_dlaneck_gn-all_4xb8-6x_kitti-mono3d")
    assert isinstance(model, DetectorLayers)
    assert [component.name for component in model.components] == ["backbone"]
    assert any("without neck" in note for note in model.notes)


def test_an_unknown_configuration_is_told_the_nearest() -> None:
    with pytest.raises(InputError, match=rf"did you mean .*{PILLARS}"):
        load_model(f"mmdet3d:{PILLARS[:-3]}")


def test_a_checkpoint_of_another_head_names_the_layer() -> None:
    with pytest.raises(InputError, match=r"pts_backbone\.blocks\.0\.0\.weight \[32, 32, 3, 3\] \(expected \[64, 64, 3"):
        load_model(f"mmdet3d:{PILLARS}", checkpoint=WEIGHTS / "tiny.safetensors")


@pytest.mark.parametrize(("command", "line"), rows_of(MMDET3D))
def test_rows_of_the_field_reports_print_their_lines(tmp_path: Path, command: str, line: str) -> None:
    ((_, holds),) = tutorial.updated([line], tutorial.run(command, tmp_path))
    assert holds, command
