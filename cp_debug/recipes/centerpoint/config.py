"""Configurations of CenterPoint: what one is built from, and those that are known by name.

``nus-pillar02`` is ``centerpoint_pillar02_second_secfpn_head-circlenms_8xb4-cyclic-20e_nus-3d`` of mmdet3d 1.4.0;
``awml-base`` is ``second_secfpn_4xb16_121m_base_amp`` of TIER IV's AWML, ``awml-j6gen2`` its
``second_secfpn_4xb16_121m_j6gen2_base_amp``, ``awml-base-1020`` its
``second_secfpn_8xb16_121m_base_amp``; ``tiny`` is this project's own.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from cp_debug.errors import InputError

HEAD_CHANNELS = {"reg": 2, "height": 1, "dim": 3, "rot": 2, "vel": 2}
"""Regression heads in mmdet3d's order; every task has a heatmap with one channel a class besides."""

OUTPUT_ORDER = ("heatmap", "reg", "height", "dim", "rot", "vel")
"""Order of a task's outputs in AWML's ONNX file."""


@dataclass(frozen=True)
class CenterPointConfig:
    """Sizes of one CenterPoint. Lengths in metres, ranges as (x0, y0, z0, x1, y1, z1) in the LiDAR frame."""

    name: str
    summary: str
    voxel_size: tuple[float, float, float]
    point_cloud_range: tuple[float, float, float, float, float, float]
    max_num_points: int
    max_voxels: int
    encoder_channels: tuple[int, ...]
    backbone_channels: tuple[int, ...]
    backbone_layers: tuple[int, ...]
    backbone_strides: tuple[int, ...]
    neck_channels: tuple[int, ...]
    neck_strides: tuple[float, ...]
    tasks: tuple[tuple[str, ...], ...]
    nms_min_radius: tuple[float, ...]
    """Circle NMS's threshold of each task, in m²: mmdet3d compares the *squared* centre distance with it."""
    post_center_range: tuple[float, float, float, float, float, float]
    point_features: tuple[str, ...] = ("x", "y", "z", "intensity", "dt")
    head_channels: int = 64
    head_kernel: int = 3
    heatmap_bias: float = -2.19
    score_threshold: float = 0.1
    max_num: int = 500
    post_max_size: int = 83
    nms_overlap: float | None = None
    """Intersection over union above which mmdet3d's rotated NMS drops the worse box; None: circle NMS."""
    nms_pre_max_size: int = 1000
    """Boxes that rotated NMS looks at, best first."""

    @property
    def grid(self) -> tuple[int, int, int]:
        """Numbers of voxels along x, y and z."""
        low, high = self.point_cloud_range[:3], self.point_cloud_range[3:]
        nx, ny, nz = (round((b - a) / size) for a, b, size in zip(low, high, self.voxel_size, strict=True))
        return nx, ny, nz

    @property
    def decorated_channels(self) -> int:
        """Channels of ``input_features``: the raw ones, 3 to the cluster's mean and 3 to the voxel's centre."""
        return len(self.point_features) + 6

    @property
    def out_size_factor(self) -> int:
        """Voxels along one side of a cell of the heatmap."""
        return round(self.backbone_strides[0] / self.neck_strides[0])

    @property
    def class_names(self) -> tuple[str, ...]:
        """All classes in label order."""
        return tuple(name for task in self.tasks for name in task)

    @property
    def output_names(self) -> tuple[str, ...]:
        """Names of the head's outputs: AWML's for one task, ``task0.heatmap`` … for several."""
        if len(self.tasks) == 1:
            return OUTPUT_ORDER
        return tuple(f"task{index}.{head}" for index in range(len(self.tasks)) for head in OUTPUT_ORDER)


TINY = CenterPointConfig(
    name="tiny",
    summary="synthetic scenes, 4 classes, ships with trained weights",
    voxel_size=(0.4, 0.4, 8.0),
    point_cloud_range=(-25.6, -25.6, -5.0, 25.6, 25.6, 3.0),
    max_num_points=20,
    max_voxels=10_000,
    encoder_channels=(32,),
    backbone_channels=(32, 64, 128),
    backbone_layers=(2, 2, 2),
    backbone_strides=(1, 2, 2),
    neck_channels=(64, 64, 64),
    neck_strides=(0.5, 1, 2),
    tasks=(("car", "truck"), ("pedestrian", "cyclist")),
    nms_min_radius=(4.0, 0.5),
    post_center_range=(-30.0, -30.0, -10.0, 30.0, 30.0, 10.0),
    head_channels=32,
)

NUS_PILLAR02 = CenterPointConfig(
    name="nus-pillar02",
    summary="mmdet3d's nuScenes model, 10 classes in 6 tasks, 512×512",
    voxel_size=(0.2, 0.2, 8.0),
    point_cloud_range=(-51.2, -51.2, -5.0, 51.2, 51.2, 3.0),
    max_num_points=20,
    max_voxels=40_000,
    encoder_channels=(64,),
    backbone_channels=(64, 128, 256),
    backbone_layers=(3, 5, 5),
    backbone_strides=(2, 2, 2),
    neck_channels=(128, 128, 128),
    neck_strides=(0.5, 1, 2),
    tasks=(
        ("car",),
        ("truck", "construction_vehicle"),
        ("bus", "trailer"),
        ("barrier",),
        ("motorcycle", "bicycle"),
        ("pedestrian", "traffic_cone"),
    ),
    nms_min_radius=(4, 12, 10, 1, 0.85, 0.175),
    post_center_range=(-61.2, -61.2, -10.0, 61.2, 61.2, 10.0),
)

AWML_BASE = CenterPointConfig(
    name="awml-base",
    summary="AWML 121 m, 5 classes in one task, x y z dt, 760×760",
    voxel_size=(0.32, 0.32, 8.0),
    point_cloud_range=(-121.6, -121.6, -3.0, 121.6, 121.6, 5.0),
    max_num_points=32,
    max_voxels=64_000,
    encoder_channels=(32, 32),
    backbone_channels=(64, 128, 256),
    backbone_layers=(3, 5, 5),
    backbone_strides=(1, 2, 2),
    neck_channels=(128, 128, 128),
    neck_strides=(1, 2, 4),
    tasks=(("car", "truck", "bus", "bicycle", "pedestrian"),),
    nms_min_radius=(1.0,),
    post_center_range=(-200.0, -200.0, -10.0, 200.0, 200.0, 10.0),
    point_features=("x", "y", "z", "dt"),
    head_kernel=1,
    heatmap_bias=-4.595,
    post_max_size=100,
)

AWML_J6GEN2 = replace(
    AWML_BASE,
    name="awml-j6gen2",
    summary="AWML 122 m, 5 classes in one task, 1020×1020",
    voxel_size=(0.24, 0.24, 8.0),
    point_cloud_range=(-122.4, -122.4, -3.0, 122.4, 122.4, 5.0),
    max_voxels=96_000,
    neck_strides=(0.5, 1, 2),
    point_features=NUS_PILLAR02.point_features,
)

AWML_BASE_1020 = replace(
    AWML_J6GEN2,
    name="awml-base-1020",
    summary="AWML 122 m, today's base: 5 classes in one task, x y z dt, 1020×1020",
    point_features=("x", "y", "z", "dt"),
)

CONFIGS = {config.name: config for config in (TINY, NUS_PILLAR02, AWML_BASE, AWML_J6GEN2, AWML_BASE_1020)}


def get_config(name: str) -> CenterPointConfig:
    """The configuration of a name, e.g. ``nus-pillar02``. Raises InputError, which lists the known ones."""
    if name not in CONFIGS:
        raise InputError(f"CenterPoint has no configuration {name!r}; known: {', '.join(CONFIGS)}")
    return CONFIGS[name]
