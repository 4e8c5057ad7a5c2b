"""Synthetic LiDAR scenes: a spinning sensor ray-cast against uneven ground and oriented boxes, with exact ground truth.

Coordinates are metres in the sensor's frame (x forward, y left, z up), yaw is counter-clockwise from x. A scene holds
two sweeps of one static sensor: the later one (``dt = 0``) defines the ground truth, the earlier one makes velocity
observable.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]
Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

SENSOR_HEIGHT = 1.84
"""Height of the sensor over the mean ground, as on the nuScenes car."""

HELD_OUT_SEED = 1_000_000
"""Scenes from this seed on are never trained on."""


class Cuboid(NamedTuple):
    """One cuboid of an object, in fractions of its box: the centre along length and height, then the size."""

    x: float
    z: float
    length: float
    width: float
    height: float


@dataclass(frozen=True)
class Kind:
    """Objects of one class: how many a scene, how large, how fast, how bright.

    count: fewest and most a scene. size: mean (l, w, h) in m, spread: its relative deviation. still: share that stands
    still, speed: that of the others in m/s. reflectivity: range, 0 to 1. parts: the cuboids that the sensor sees.
    Several parts make the heading visible: a car's cabin sits behind its middle, a truck's cab in front.
    """

    count: tuple[int, int]
    size: tuple[float, float, float]
    spread: float
    still: float
    speed: tuple[float, float]
    reflectivity: tuple[float, float]
    parts: tuple[Cuboid, ...] = (Cuboid(0, 0, 1, 1, 1),)


_CAR = (Cuboid(0, -0.22, 1, 1, 0.56), Cuboid(-0.1, 0.28, 0.55, 0.88, 0.44))
_TRUCK = (Cuboid(0.4, -0.1, 0.2, 0.95, 0.8), Cuboid(-0.12, 0.05, 0.76, 1, 0.9))
_CYCLIST = (Cuboid(0, -0.25, 1, 0.4, 0.5), Cuboid(-0.1, 0.2, 0.35, 1, 0.6))

CLASSES: dict[str, Kind] = {
    "car": Kind((4, 9), (4.5, 1.9, 1.65), 0.08, 0.4, (2, 12), (0.3, 0.9), _CAR),
    "truck": Kind((1, 3), (8.0, 2.5, 3.1), 0.12, 0.3, (2, 10), (0.3, 0.9), _TRUCK),
    "pedestrian": Kind((3, 7), (0.65, 0.65, 1.75), 0.08, 0.2, (0.5, 2), (0.1, 0.5)),
    "cyclist": Kind((2, 5), (1.8, 0.65, 1.7), 0.08, 0.1, (2, 7), (0.2, 0.7), _CYCLIST),
}
CLUTTER: tuple[Kind, ...] = (
    Kind((3, 7), (0.3, 0.3, 4.5), 0.2, 1, (0, 0), (0.2, 0.8)),  # poles
    Kind((0, 2), (12.0, 0.5, 3.0), 0.3, 1, (0, 0), (0.3, 0.7)),  # walls
    Kind((2, 5), (1.6, 1.2, 1.0), 0.2, 1, (0, 0), (0.1, 0.4)),  # hedges
)


@dataclass(frozen=True)
class Lidar:
    """A spinning LiDAR. Elevations in degrees, ranges in metres, ``sweeps`` as seconds before the reference time."""

    beams: int = 32
    columns: int = 900
    elevation: tuple[float, float] = (-25.0, 3.0)
    max_range: float = 40.0
    noise: float = 0.02
    dropout: float = 0.03
    sweeps: tuple[float, ...] = (0.0, 0.2)


@dataclass(frozen=True)
class Scene:
    """A point cloud with its ground truth; only objects with enough points at ``dt = 0`` are in the ground truth.

    points: [N, 5] x, y, z, intensity (0–255), dt (s, how long before the reference time).
    boxes: [M, 7] x, y, z of the gravity centre, length, width, height, yaw.
    labels: [M] index into ``CLASSES``. velocities: [M, 2] m/s. num_points: [M] points at ``dt = 0``.
    source: [N] the box that a point was reflected by, -1 for ground, clutter and dropped objects.
    """

    points: Array
    boxes: Array
    labels: Ints
    velocities: Array
    num_points: Ints
    source: Ints


@dataclass
class Ground:
    """Height field: the mean plane plus three long, low waves."""

    rng: np.random.Generator
    waves: Floats = field(init=False)
    phase: Floats = field(init=False)

    def __post_init__(self) -> None:
        angle, length = self.rng.uniform(0, 2 * np.pi, 3), self.rng.uniform(15, 50, 3)
        self.waves = 2 * np.pi / length * np.stack((np.cos(angle), np.sin(angle)))
        self.phase = self.rng.uniform(0, 2 * np.pi, 3)

    def height(self, xy: Floats) -> Floats:
        """Height [...] of the ground at places [..., 2], in m in the sensor's frame."""
        return -SENSOR_HEIGHT + 0.04 * np.sin(xy @ self.waves + self.phase).sum(-1)

    def cast(self, rays: Floats, max_range: float) -> Floats:
        """Distance along each unit ray [..., 3] from the sensor, by fixed-point iteration; inf beyond the range."""
        down = rays[..., 2] < -SENSOR_HEIGHT / (2 * max_range)
        directions = rays[down]
        t = -SENSOR_HEIGHT / directions[:, 2]
        for _ in range(6):
            t = self.height(directions[:, :2] * t[:, None]) / directions[:, 2]
        depth = np.full(rays.shape[:-1], np.inf)
        depth[down] = np.where((t > 0) & (t < max_range), t, np.inf)
        return depth


@dataclass
class _SceneObjects:
    """Everything that stands on the ground; label -1 is clutter."""

    boxes: Floats  # [K, 7]
    labels: Ints
    velocities: Floats  # [K, 2]
    reflectivity: Floats
    kinds: list[Kind]


def _place(rng: np.random.Generator, ground: Ground, extent: float) -> _SceneObjects:
    """Draw objects and set them down without overlap (their circles stay apart), clear of the sensor."""
    rows: list[tuple[Kind, int]] = []
    for label, kind in [*enumerate(CLASSES.values()), *((-1, kind) for kind in CLUTTER)]:
        rows += [(kind, label)] * int(rng.integers(kind.count[0], kind.count[1] + 1))
    rows.sort(key=lambda row: -row[0].size[0])  # the long ones find room first

    placed: list[tuple[Floats, float, Kind, int]] = []
    centers, radii = np.zeros((1, 2)), np.array([2.5])  # the sensor's own car
    for kind, label in rows:
        size = np.array(kind.size) * np.clip(1 + kind.spread * rng.standard_normal(3), 0.6, 1.4)
        radius = math.hypot(size[0], size[1]) / 2
        candidates = rng.uniform(-extent, extent, (20, 2))
        gaps = np.linalg.norm(candidates[:, None] - centers, axis=-1) - radii - radius
        free = np.flatnonzero((gaps > 0.3).all(axis=1))
        yaw, speed = rng.uniform(-np.pi, np.pi), rng.uniform(*kind.speed) * (rng.random() >= kind.still)
        if not len(free):
            continue
        center = candidates[free[0]]
        z = ground.height(center) + size[2] / 2
        placed.append((np.array([*center, z, *size, yaw]), speed, kind, label))
        centers, radii = np.vstack((centers, center)), np.append(radii, radius)

    boxes = np.stack([box for box, *_ in placed])
    heading = np.stack((np.cos(boxes[:, 6]), np.sin(boxes[:, 6])), axis=1)
    kinds = [kind for _, _, kind, _ in placed]
    return _SceneObjects(
        boxes=boxes,
        labels=np.array([label for *_, label in placed], dtype=np.int64),
        velocities=heading * np.array([[speed] for _, speed, *_ in placed]),
        reflectivity=np.array([rng.uniform(*kind.reflectivity) for kind in kinds]),
        kinds=kinds,
    )


def part_boxes(box: Floats, parts: tuple[Cuboid, ...]) -> Floats:
    """The cuboids [P, 7] that an object with the box [7] consists of."""
    shape = np.array(parts)
    length, height, yaw = box[3], box[5], box[6]
    out = np.empty((len(parts), 7))
    out[:, 0] = box[0] + shape[:, 0] * length * math.cos(yaw)
    out[:, 1] = box[1] + shape[:, 0] * length * math.sin(yaw)
    out[:, 2] = box[2] + shape[:, 1] * height
    out[:, 3:6] = shape[:, 2:] * box[3:6]
    out[:, 6] = yaw
    return out


def cast_box(rays: Floats, box: Floats) -> tuple[Floats, Floats]:
    """Slab test of unit rays [..., 3] from the origin against one box [7].

    Returns the distance to the first hit (inf: none) and the cosine between the ray and the face's normal.
    """
    cos, sin = math.cos(box[6]), math.sin(box[6])
    to_box = np.array([[cos, -sin, 0], [sin, cos, 0], [0, 0, 1]])
    origin, directions = -box[:3] @ to_box, rays @ to_box
    with np.errstate(divide="ignore", invalid="ignore"):
        half = np.copysign(box[3:6] / 2, directions)
        first, last = (-half - origin) / directions, (half - origin) / directions
    axis = first.argmax(-1)[..., None]
    enter = np.take_along_axis(first, axis, -1)[..., 0]
    hit = (enter > 0) & (enter < last.min(-1))
    return np.where(hit, enter, np.inf), np.abs(np.take_along_axis(directions, axis, -1)[..., 0])


def _sweep(
    rng: np.random.Generator, lidar: Lidar, ground: Ground, objects: _SceneObjects, dt: float
) -> tuple[Floats, Ints]:
    """One revolution ``dt`` s before the reference time: points [N, 5] and the object that each hit (-1: ground)."""
    step = 2 * np.pi / lidar.columns
    phase = rng.uniform(0, step)
    azimuth = phase + step * np.arange(lidar.columns)
    elevation = np.deg2rad(np.linspace(*lidar.elevation, lidar.beams))
    rays = np.empty((lidar.columns, lidar.beams, 3))
    rays[..., 0] = np.cos(azimuth)[:, None] * np.cos(elevation)
    rays[..., 1] = np.sin(azimuth)[:, None] * np.cos(elevation)
    rays[..., 2] = np.sin(elevation)

    depth = ground.cast(rays, lidar.max_range)
    cosine = np.abs(rays[..., 2])
    source = np.full(depth.shape, -1, dtype=np.int64)
    for index, kind in enumerate(objects.kinds):
        box = objects.boxes[index].copy()
        box[:2] -= objects.velocities[index] * dt
        distance = math.hypot(box[0], box[1])
        half = math.asin(min(1.0, math.hypot(box[3], box[4]) / 2 / distance))
        middle = math.atan2(box[1], box[0]) - phase
        sector = np.arange(math.floor((middle - half) / step), math.ceil((middle + half) / step) + 1) % lidar.columns
        for part in part_boxes(box, kind.parts):
            hit, hit_cosine = cast_box(rays[sector], part)
            columns, beams = np.nonzero(hit < depth[sector])
            target = sector[columns], beams
            depth[target], cosine[target], source[target] = hit[columns, beams], hit_cosine[columns, beams], index

    lost = rng.random(depth.shape) <= lidar.dropout * (1 + np.minimum(depth / lidar.max_range, 1))
    returned = (depth < lidar.max_range) & ~lost
    rays, depth, cosine, source = rays[returned], depth[returned], cosine[returned], source[returned]
    reflectivity = np.append(objects.reflectivity, 0.15)[source]  # -1 picks the last: the ground
    intensity = 255 * reflectivity * (0.3 + 0.7 * cosine) * rng.normal(1, 0.1, depth.shape)
    points = np.empty((len(depth), 5))
    points[:, :3] = rays * (depth + lidar.noise * rng.standard_normal(depth.shape))[:, None]
    points[:, 3] = np.clip(intensity, 0, 255)
    points[:, 4] = dt
    return points, source


def generate_scene(seed: int, *, extent: float = 25.6, min_points: int = 5, lidar: Lidar | None = None) -> Scene:
    """Make the scene of a seed, the same for the same arguments: objects stand within ±``extent`` m in x and y.

    Objects with fewer than ``min_points`` points at ``dt = 0`` are left out of the ground truth.
    """
    lidar = lidar or Lidar()
    rng = np.random.default_rng(seed)
    ground = Ground(rng)
    objects = _place(rng, ground, extent)
    sweeps = [_sweep(rng, lidar, ground, objects, dt) for dt in lidar.sweeps]
    points = np.concatenate([points for points, _ in sweeps])
    source = np.concatenate([source for _, source in sweeps])
    order = rng.permutation(len(points))  # a pillar that keeps the first points must not keep one sweep's alone
    points, source = points[order], source[order]

    hits = np.bincount(source[(source >= 0) & (points[:, 4] == 0)], minlength=len(objects.labels))
    labelled = np.flatnonzero((objects.labels >= 0) & (hits >= min_points))
    renumber = np.full(len(objects.labels) + 1, -1)
    renumber[labelled] = np.arange(len(labelled))
    return Scene(
        points=points.astype(np.float32),
        boxes=objects.boxes[labelled].astype(np.float32),
        labels=objects.labels[labelled],
        velocities=objects.velocities[labelled].astype(np.float32),
        num_points=hits[labelled],
        source=renumber[source],
    )
