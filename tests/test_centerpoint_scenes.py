"""What the synthetic scenes promise: exact ground truth, occlusion, one scene a seed."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cp_debug.recipes.centerpoint.scenes import CLASSES, Ground, Lidar, Scene, cast_box, generate_scene, part_boxes

KINDS = list(CLASSES.values())
EXACT = Lidar(noise=0.0, dropout=0.0)
seeds = st.integers(0, 2**31)
few = settings(deadline=None, max_examples=8)


def outside(points, box):
    """How far points [N, 3] are outside a box [7], in m along the worst axis; negative: the depth inside."""
    cos, sin = math.cos(box[6]), math.sin(box[6])
    local = (points - box[:3]) @ np.array([[cos, -sin, 0], [sin, cos, 0], [0, 0, 1]])
    return (np.abs(local) - box[3:6] / 2).max(axis=-1)


def objects(scene: Scene):
    """Of each object: its box and its points, as if the earlier sweep's had moved along with it."""
    for index, box in enumerate(scene.boxes.astype(np.float64)):
        points = scene.points[scene.source == index].astype(np.float64)
        moved = points[:, :3] + points[:, 4:] * [*scene.velocities[index], 0.0]
        yield index, box, points, moved


@few
@given(seeds)
def test_points_lie_on_the_surfaces_of_their_object(seed):
    scene = generate_scene(seed, lidar=EXACT)
    for index, box, _, moved in objects(scene):
        parts = part_boxes(box, KINDS[scene.labels[index]].parts)
        distance = np.min([np.abs(outside(moved, part)) for part in parts], axis=0)
        assert distance.max() < 1e-3


@few
@given(seeds)
def test_no_ray_passes_through_an_object(seed):
    """First hit wins: nothing known stands on the way from the sensor to a point."""
    scene = generate_scene(seed, lidar=EXACT)
    rng = np.random.default_rng(seed)
    now = scene.points[scene.points[:, 4] == 0, :3].astype(np.float64)
    chosen = now[rng.permutation(len(now))[:400]]
    on_the_way = (chosen[:, None] * np.linspace(0.05, 0.999, 60)[:, None]).reshape(-1, 3)
    for index, box, *_ in objects(scene):
        for part in part_boxes(box, KINDS[scene.labels[index]].parts):
            assert outside(on_the_way, part).min() > -2e-3


@few
@given(seeds)
def test_ground_truth_counts_the_points_in_each_box(seed):
    scene = generate_scene(seed, min_points=7)
    now = scene.points[scene.points[:, 4] == 0, :3]
    source = scene.source[scene.points[:, 4] == 0]
    for index, box, *_ in objects(scene):
        assert scene.num_points[index] == (source == index).sum() >= 7
        assert outside(now[source == index], box).max() < 0.2
        assert outside(now[source != index], box).min() > -0.2
    assert scene.source.max(initial=-1) < len(scene.boxes)


@few
@given(seeds)
def test_boxes_stand_apart_on_the_ground_in_range(seed):
    scene = generate_scene(seed, extent=20)
    centers, radii = scene.boxes[:, :2], np.linalg.norm(scene.boxes[:, 3:5], axis=1) / 2
    gaps = np.linalg.norm(centers[:, None] - centers, axis=-1) - radii - radii[:, None]
    assert (gaps[~np.eye(len(gaps), dtype=bool)] > 0.29).all()
    assert np.abs(centers).max() <= 20
    assert np.abs(scene.boxes[:, 2] - scene.boxes[:, 5] / 2 + 1.84).max() <= 0.12001
    heading = np.stack((np.cos(scene.boxes[:, 6]), np.sin(scene.boxes[:, 6])), axis=1)
    np.testing.assert_allclose(scene.velocities, heading * np.linalg.norm(scene.velocities, axis=1)[:, None], atol=1e-4)


def test_a_seed_is_a_scene():
    np.random.seed(1)  # noqa: NPY002
    first = generate_scene(11)
    np.random.seed(2)  # noqa: NPY002
    second, other = generate_scene(11), generate_scene(12)
    for name in Scene.__dataclass_fields__:
        np.testing.assert_array_equal(getattr(first, name), getattr(second, name))
    assert first.points.shape != other.points.shape or not np.array_equal(first.points, other.points)


def test_shapes_and_ranges():
    scene = generate_scene(0)
    assert scene.points.dtype == scene.boxes.dtype == scene.velocities.dtype == np.float32
    assert scene.points.shape[1] == 5
    assert np.isfinite(scene.points).all()
    assert scene.points[:, 3].min() >= 0
    assert scene.points[:, 3].max() <= 255
    assert set(np.unique(scene.points[:, 4])) == {np.float32(0), np.float32(0.2)}
    many = generate_scene(0, min_points=10**6)
    assert many.boxes.shape == (0, 7)
    assert (many.source == -1).all()
    np.testing.assert_array_equal(many.points, scene.points)


def test_noise_and_dropout():
    exact, noisy = generate_scene(3, lidar=EXACT), generate_scene(3, lidar=Lidar(dropout=0.5))
    assert 0.2 < len(noisy.points) / len(exact.points) < 0.5
    _, box, _, moved = next(objects(generate_scene(3, lidar=Lidar(noise=0.05))))
    assert 0 < outside(moved, box).max() < 0.4


@given(seeds)
@few
def test_rays_end_on_the_height_field(seed):
    ground = Ground(np.random.default_rng(seed))
    angle = np.random.default_rng(seed).uniform(-np.pi, np.pi, 200)
    down = np.linspace(math.radians(-25), math.radians(-6), 200)
    rays = np.stack((np.cos(angle) * np.cos(down), np.sin(angle) * np.cos(down), np.sin(down)), axis=1)
    hits = rays * ground.cast(rays, 40.0)[:, None]
    np.testing.assert_allclose(hits[:, 2], ground.height(hits[:, :2]), atol=2e-3)
    assert np.isinf(ground.cast(-rays, 40.0)).all()


def test_slab_test_by_hand():
    box = np.array([10.0, 0, 0, 4, 2, 2, 0])
    rays = np.array([[1.0, 0, 0], [-1, 0, 0], [0, 1, 0], [0.8, 0.6, 0]])
    hit, cosine = cast_box(rays, box)
    assert hit.tolist() == [8, np.inf, np.inf, np.inf]
    assert cosine[0] == 1
    turned = np.array([10.0, 0, 0, 4, 2, 2, np.pi / 2])
    assert cast_box(rays, turned)[0][0] == pytest.approx(9)
    assert np.isinf(cast_box(rays, np.array([0.0, 0, 0, 4, 2, 2, 0]))[0]).all()  # from inside: no return
