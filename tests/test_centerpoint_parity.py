"""``centerpoint:nus-pillar02`` against the tensors of mmdet3d 1.4.0 for the same frame and weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from cp_debug.recipes.centerpoint.config import OUTPUT_ORDER
from cp_debug.recipes.centerpoint.decode import decode
from cp_debug.recipes.centerpoint.model import decorate, scatter, voxelize
from cp_debug.recipes.centerpoint.recipe import CenterPointModel

TOLERANCE = 2e-5
RELATIVE = 2e-6
"""Rounding of FP32 sums in another order, absolute and as a share of the largest value, whose terms any sum may hold:
with AVX2 alone up to 2.7e-5, 9e-7 of it."""


@pytest.fixture(scope="module")
def model(shared: Path) -> CenterPointModel:
    return CenterPointModel("nus-pillar02", checkpoint=shared / "parity/state_dict_overfit.pt")


@pytest.fixture(scope="module")
def points(shared: Path, model: CenterPointModel) -> np.ndarray:
    (sample,) = model.samples(1, 0, shared / "data/nuscenes_frame.pcd.bin")
    return sample.arrays["points"]


def parity(shared: Path, name: str) -> Mapping[str, np.ndarray]:
    return np.load(shared / f"parity/overfit_{name}.npz")


def assert_near(tensor: torch.Tensor, expected: np.ndarray) -> None:
    rounding = max(TOLERANCE, RELATIVE * float(np.abs(expected).max()))
    np.testing.assert_allclose(tensor.numpy(), expected, rtol=0, atol=rounding, strict=True)


def test_names_and_shapes(shared: Path, model: CenterPointModel) -> None:
    expected = json.loads((shared / "parity/centerpoint_pillar02_state_dict.json").read_text())
    shapes = {key: list(tensor.shape) for key, tensor in model.network.state_dict().items()}
    assert shapes == {key: entry["shape"] for key, entry in expected.items()}


@pytest.mark.slow
def test_every_stage(shared: Path, model: CenterPointModel, points: np.ndarray) -> None:
    config, network = model.config, model.network
    first = parity(shared, "01_voxel_pillar")
    np.testing.assert_array_equal(points, first["points"], strict=True)
    pillars = voxelize(torch.from_numpy(points), config)
    for field in pillars._fields:
        np.testing.assert_array_equal(getattr(pillars, field).numpy(), first[field], strict=True)
    with torch.inference_mode():
        features = decorate(pillars, config)
        assert_near(features, first["decorated"])
        pillar_features = network.pts_voxel_encoder(features)
        assert_near(pillar_features.squeeze(1), first["pillar_features"])
        canvas = scatter(pillar_features, pillars.coors, config.grid)
        assert_near(canvas, parity(shared, "02_canvas")["canvas"])
        stages = network.pts_backbone(canvas)
        for index, stage in enumerate(stages):
            assert_near(stage, parity(shared, "03_backbone")[f"stage{index}"])
        neck = network.pts_neck(stages)
        assert_near(neck, parity(shared, "04_neck")["neck"])
        heads = network.pts_bbox_head(neck)
    expected = parity(shared, "05_heads")
    assert set(heads) == set(expected)
    for name, tensor in heads.items():
        assert_near(tensor, expected[name])


def test_boxes_before_and_after_circle_nms(shared: Path, model: CenterPointModel) -> None:
    """From mmdet3d's own head maps, so that no rounding upstream can move a score across the threshold."""
    outputs = {name: torch.from_numpy(array) for name, array in parity(shared, "05_heads").items()}
    (found,) = decode(outputs, model.config)
    expected = parity(shared, "06_predict_circlenms")
    np.testing.assert_array_equal(found.labels, expected["labels_3d"], strict=True)
    np.testing.assert_allclose(found.boxes, expected["bboxes_3d"], rtol=0, atol=TOLERANCE, strict=True)
    np.testing.assert_allclose(found.scores, expected["scores_3d"], rtol=0, atol=TOLERANCE, strict=True)

    (unsuppressed,) = decode(outputs, model.config, nms=False)
    raw = parity(shared, "07_decoded_prenms")
    boxes = np.concatenate([raw[f"task{task}.bboxes"] for task in range(len(model.config.tasks))])
    boxes[:, 2] -= boxes[:, 5] / 2
    np.testing.assert_allclose(unsuppressed.boxes, boxes, rtol=0, atol=TOLERANCE)


def test_boxes_after_rotated_nms(shared: Path, model: CenterPointModel) -> None:
    outputs = {name: torch.from_numpy(array) for name, array in parity(shared, "05_heads").items()}
    (found,) = decode(outputs, replace(model.config, nms_overlap=0.2))
    expected = parity(shared, "08_predict_rotatenms")
    np.testing.assert_array_equal(found.labels, expected["labels_3d"], strict=True)
    np.testing.assert_allclose(found.boxes, expected["bboxes_3d"], rtol=0, atol=TOLERANCE, strict=True)
    np.testing.assert_allclose(found.scores, expected["scores_3d"], rtol=0, atol=TOLERANCE, strict=True)


def test_the_recipe_detects_what_mmdet3d_detects(shared: Path, model: CenterPointModel, points: np.ndarray) -> None:
    with torch.inference_mode():
        outputs = model.network([torch.from_numpy(points)])
    assert tuple(outputs) == model.config.output_names
    assert [name.partition(".")[2] for name in list(outputs)[:6]] == list(OUTPUT_ORDER)
    (found,) = decode(outputs, model.config)
    expected = parity(shared, "06_predict_circlenms")
    np.testing.assert_array_equal(found.labels, expected["labels_3d"])
    np.testing.assert_allclose(found.boxes, expected["bboxes_3d"], rtol=0, atol=1e-3)
