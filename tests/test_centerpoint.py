"""CenterPoint: voxelization, decoding and the recipe, without mmdet3d's tensors (those: test_centerpoint_parity.py)."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch import nn

from cp_debug.errors import InputError
from cp_debug.recipes.centerpoint.config import CONFIGS, OUTPUT_ORDER, TINY, CenterPointConfig, get_config
from cp_debug.recipes.centerpoint.decode import circle_nms, decode, rotated_nms
from cp_debug.recipes.centerpoint.model import CenterPoint, build_model, decorate, scatter, voxelize, voxelize_batch
from cp_debug.recipes.centerpoint.recipe import CenterPointModel

SMALL = replace(TINY, voxel_size=(1, 1, 4), point_cloud_range=(0, 0, 0, 3, 2, 8), max_num_points=3, max_voxels=4)


def voxelize_one_by_one(points: np.ndarray, config: CenterPointConfig) -> tuple[np.ndarray, ...]:
    """The loop over points of mmcv's ``hard_voxelize_forward_cpu``."""
    low, size = (np.array(values, dtype=np.float32) for values in (config.point_cloud_range[:3], config.voxel_size))
    pillars: dict[tuple[int, ...], list[np.ndarray]] = {}
    for point in points:
        cell = np.floor((point[:3] - low) / size)
        if not all(0 <= c < limit for c, limit in zip(cell, config.grid, strict=True)):
            continue
        key = (0, *(int(c) for c in cell[::-1]))
        if key not in pillars:
            if len(pillars) >= config.max_voxels:
                continue
            pillars[key] = []
        if len(pillars[key]) < config.max_num_points:
            pillars[key].append(point)
    voxels = np.zeros((len(pillars), config.max_num_points, points.shape[1]), dtype=np.float32)
    for index, members in enumerate(pillars.values()):
        voxels[index, : len(members)] = members
    counts = np.array([len(members) for members in pillars.values()], dtype=np.int32)
    return voxels, counts, np.array(list(pillars), dtype=np.int32).reshape(-1, 4)


coordinates = st.one_of(
    st.floats(-1, 9, width=32), st.integers(-1, 9).map(float), st.sampled_from((math.nan, math.inf, -math.inf))
)


@pytest.mark.slow
@given(arrays(np.float32, st.tuples(st.integers(0, 60), st.just(5)), elements=coordinates))
def test_voxels_are_those_of_the_loop_over_points(points: np.ndarray) -> None:
    result = voxelize(torch.from_numpy(points), SMALL)
    for tensor, expected in zip(result, voxelize_one_by_one(points, SMALL), strict=True):
        np.testing.assert_array_equal(tensor.numpy(), expected, strict=True)


def test_a_batch_is_its_clouds_one_after_the_other() -> None:
    clouds = [torch.rand(20, 5), torch.zeros(0, 5), torch.rand(10, 5) * 2]
    batch = voxelize_batch(clouds, SMALL)
    assert set(batch.coors[:, 0].tolist()) == {0, 2}
    together = scatter(batch.num_points.float().view(-1, 1, 1), batch.coors, SMALL.grid, batch_size=3)
    for index, cloud in enumerate(clouds):
        alone = voxelize(cloud, SMALL)
        expected = scatter(alone.num_points.float().view(-1, 1, 1), alone.coors, SMALL.grid)
        assert torch.equal(together[index], expected[0])


def test_decoration_has_offsets_to_mean_and_centre_and_zeros_in_empty_slots() -> None:
    points = torch.tensor([[1.25, 0.5, 5.0, 7.0, 0.1], [1.75, 1.0 - 2**-10, 7.0, 9.0, 0.0]])
    features = decorate(voxelize(points, SMALL), SMALL)
    assert features.shape == (1, 3, SMALL.decorated_channels)
    mean, centre = points[:, :3].mean(dim=0), torch.tensor([1.5, 0.5, 6.0])
    expected = torch.cat((points, points[:, :3] - mean, points[:, :3] - centre), dim=1)
    torch.testing.assert_close(features[0, :2], expected)
    assert not features[0, 2].any()


@pytest.mark.parametrize(
    ("name", "grid", "channels", "cells"),
    [
        ("tiny", 128, 11, 64),
        ("nus-pillar02", 512, 11, 128),
        ("awml-base", 760, 10, 760),
        ("awml-j6gen2", 1020, 11, 510),
        ("awml-base-1020", 1020, 10, 510),
    ],
)
def test_sizes_of_the_named_configurations(name: str, grid: int, channels: int, cells: int) -> None:
    config = get_config(name)
    assert config.grid == (grid, grid, 1)
    assert config.decorated_channels == channels
    assert grid // config.out_size_factor == cells
    assert len(config.output_names) == 6 * len(config.tasks)
    assert len(config.nms_min_radius) == len(config.tasks)


def test_an_unknown_configuration_is_refused_with_the_known_ones() -> None:
    with pytest.raises(InputError, match=r"'huge'.*tiny, nus-pillar02"):
        get_config("huge")


def test_one_task_has_the_output_names_of_awml_and_several_have_the_task_before_them() -> None:
    assert get_config("awml-base").output_names == ("heatmap", "reg", "height", "dim", "rot", "vel")
    assert TINY.output_names[:2] == ("task0.heatmap", "task0.reg")
    assert TINY.output_names[-1] == "task1.vel"


@pytest.mark.parametrize("name", ["tiny", "awml-base"])
def test_untrained_activations_stay_near_one(name: str) -> None:
    config = replace(get_config(name), point_cloud_range=(-12.8, -12.8, -5, 12.8, 12.8, 3))
    model = build_model(config)
    spread = {}
    for path, module in model.named_modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.register_forward_hook(lambda _, __, out, path=path: spread.update({path: out.std().item()}))
    scale = torch.tensor([4, 4, 1, *[30.0, 0.1][-len(config.point_features) + 3 :]])
    with torch.inference_mode():
        model([torch.randn(4000, len(config.point_features)) * scale])
    assert len(spread) > 20
    assert all(0.1 < value < 4 for value in spread.values()), spread


def test_weights_depend_on_the_seed_alone() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first, again, other = (build_model(TINY, seed=seed).state_dict() for seed in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not torch.equal(first["pts_neck.deblocks.0.0.weight"], other["pts_neck.deblocks.0.0.weight"])


def test_gradients_reach_every_parameter() -> None:
    model: CenterPoint = build_model(TINY).train()
    outputs = model([torch.randn(500, 5) * 5, torch.randn(300, 5) * 5])
    assert {tensor.shape[0] for tensor in outputs.values()} == {2}
    sum(tensor.square().mean() for tensor in outputs.values()).backward()
    assert [name for name, value in model.named_parameters() if value.grad is None or not value.grad.any()] == []


def head_maps(config: CenterPointConfig, cells: int = 8) -> dict[str, torch.Tensor]:
    """Maps without any object."""
    channels = {"reg": 2, "height": 1, "dim": 3, "rot": 2, "vel": 2}
    maps = {}
    for name in config.output_names:
        head = name.rpartition(".")[2]
        count = channels.get(head) or len(config.tasks[int(name[4])])
        maps[name] = torch.full((1, count, cells, cells), -9.0 if head == "heatmap" else 0.0)
    return maps


def test_a_peak_becomes_the_box_that_it_encodes() -> None:
    maps = head_maps(TINY)
    y, x = 5, 2
    maps["task1.heatmap"][0, 1, y, x] = 2.0
    maps["task1.reg"][0, :, y, x] = torch.tensor([0.25, 0.75])
    maps["task1.height"][0, 0, y, x] = 1.5
    maps["task1.dim"][0, :, y, x] = torch.tensor([4.0, 2.0, 1.0]).log()
    maps["task1.rot"][0, :, y, x] = torch.tensor([math.sin(0.3), math.cos(0.3)])
    maps["task1.vel"][0, :, y, x] = torch.tensor([3.0, -1.0])
    (found,) = decode(maps, TINY)
    expected = [[-25.6 + 2.25 * 0.8, -25.6 + 5.75 * 0.8, 1.5 - 0.5, 4, 2, 1, 0.3, 3, -1]]
    np.testing.assert_allclose(found.boxes, expected, rtol=1e-5)
    np.testing.assert_allclose(found.scores, [1 / (1 + math.exp(-2))], rtol=1e-6)
    assert [TINY.class_names[label] for label in found.labels] == ["cyclist"]


def test_nothing_above_the_threshold_gives_no_boxes() -> None:
    (found,) = decode(head_maps(TINY), TINY)
    assert (found.boxes.shape, found.scores.shape, found.labels.shape) == ((0, 9), (0,), (0,))


def test_a_box_out_of_range_is_left_out() -> None:
    maps = head_maps(TINY)
    maps["task0.heatmap"][0, 0, 3, 3] = 5.0
    assert len(decode(maps, TINY)[0].scores) == 1
    maps["task0.height"][0, 0, 3, 3] = 11.0
    assert len(decode(maps, TINY)[0].scores) == 0


def test_rotated_nms_drops_what_overlaps_a_better_box() -> None:
    boxes = np.array([[0, 0, 4, 2, 0], [0, 0, 4, 2, np.pi / 2], [1, 0, 4, 2, 0], [9, 0, 0, 0, 0]], np.float32)
    scores = np.array([0.5, 0.9, 0.7, 0.6])
    assert rotated_nms(boxes, scores, 0.2).tolist() == [1, 3], "the crossed one overlaps each by a third"
    assert rotated_nms(boxes, scores, 0.34).tolist() == [1, 2, 3]
    assert rotated_nms(boxes, scores, 0.9).tolist() == [1, 2, 3, 0]
    assert rotated_nms(boxes[:0], scores[:0], 0.2).tolist() == []


def test_random_weights_are_said_and_trained_ones_are_not() -> None:
    assert CenterPointModel("tiny").notes == []
    assert CenterPointModel("nus-pillar02", seed=3).notes[0].startswith("the weights are random (seed 3)")


def test_circle_nms_compares_the_squared_distance() -> None:
    centres = np.array([[0, 0], [1.9, 0], [2.1, 0]], dtype=np.float32)
    scores = np.array([0.9, 0.8, 0.7], dtype=np.float32)
    assert circle_nms(centres, scores, 4.0).tolist() == [0, 2]


@given(
    arrays(np.float32, st.tuples(st.integers(0, 25), st.just(2)), elements=st.floats(-5, 5, width=16)),
    st.floats(0.125, 16),
    st.randoms(use_true_random=False),
)
@settings(max_examples=50)
def test_circle_nms_keeps_a_box_exactly_when_no_better_kept_one_is_near(centres, radius, random) -> None:  # type: ignore[no-untyped-def]
    scores = np.array(random.sample(range(1000), len(centres)), dtype=np.float32)
    kept = circle_nms(centres, scores, radius).tolist()
    assert [scores[i] for i in kept] == sorted((scores[i] for i in kept), reverse=True)
    for index in range(len(centres)):
        better = [k for k in kept if scores[k] > scores[index]]
        near = any(((centres[index] - centres[k]) ** 2).sum() <= radius for k in better)
        assert (index in kept) == (not near)


def run(model: CenterPointModel, points: np.ndarray):  # type: ignore[no-untyped-def]
    """The recipe's own chain, each component by its module."""
    from cp_debug.recipes.base import Sample

    sample, results = Sample({"points": points}, "test"), {}
    for component in model.components:
        assert component.module is not None
        inputs = model.feed(component, sample, results)
        assert list(inputs) == list(component.input_names)
        with torch.inference_mode():
            outputs = component.module(*(torch.from_numpy(array) for array in inputs.values()))
        tensors = outputs if isinstance(outputs, tuple) else (outputs,)
        results[component.name] = {
            name: tensor.numpy() for name, tensor in zip(component.output_names, tensors, strict=True)
        }
    return results, model.decode(sample, results)


def test_the_components_in_a_chain_are_the_whole_model() -> None:
    model = CenterPointModel("tiny")
    (sample,) = model.samples(1, 5, None)
    results, found = run(model, sample.arrays["points"])
    with torch.inference_mode():
        whole = model.network([torch.from_numpy(sample.arrays["points"])])
    for name, tensor in whole.items():
        np.testing.assert_array_equal(results["pts_backbone_neck_head"][name], tensor.numpy())
    np.testing.assert_array_equal(found.boxes, decode(whole, model.config)[0].boxes)


def test_an_empty_cloud_works() -> None:
    results, _ = run(CenterPointModel("tiny"), np.zeros((0, 5), dtype=np.float32))
    assert results["pts_voxel_encoder"]["pillar_features"].shape == (0, 1, 32)
    assert all(np.isfinite(array).all() for array in results["pts_backbone_neck_head"].values())


@pytest.mark.parametrize("name", list(CONFIGS))
def test_every_stage_is_a_module_of_the_network(name: str) -> None:
    model = CenterPointModel(name)
    for component in model.components:
        assert component.module is not None
        paths = {f"{component.prefix}.{path}".strip(".") for path, _ in component.module.named_modules()}
        assert {stage.path for stage in component.stages} <= paths
    heads = [stage.path for stage in model.components[1].stages][-len(model.config.output_names) :]
    assert [path.rpartition(".")[2] for path in heads] == list(OUTPUT_ORDER) * len(model.config.tasks)


def test_samples_are_the_synthetic_scenes_of_consecutive_seeds() -> None:
    model = CenterPointModel("awml-base")
    first, second = model.samples(2, 7, None)
    (alone,) = model.samples(1, 8, None)
    assert first.arrays["points"].shape[1] == 4
    assert (first.source, second.source) == ("held-out synthetic scene 7", "held-out synthetic scene 8")
    np.testing.assert_array_equal(second.arrays["points"], alone.arrays["points"])
