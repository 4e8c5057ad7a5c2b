"""Entries of mmdet3d's info files that are read, and the type that each must have; all else is left out."""

from __future__ import annotations

from typing import Annotated, Any

import numpy as np
from pydantic import AfterValidator, BeforeValidator, Field
from typing_extensions import TypedDict

from cp_debug.recipes.data.attributes import NAMES


def _plain(value: Any) -> Any:
    """numpy's numbers and arrays as Python's own; what takes too much room stays, and is then refused."""
    if isinstance(value, np.generic) or (isinstance(value, np.ndarray) and value.size < 1000):
        return value.tolist()
    return value


def _invertible(matrix: list[list[float]]) -> list[list[float]]:
    array = np.array(matrix)
    if not np.isfinite(array).all() or abs(np.linalg.det(array)) < 1e-9:
        raise ValueError("expected a matrix that can be inverted")
    return matrix


def _without_null(text: str) -> str:
    if "\0" in text:
        raise ValueError("a null byte")
    return text


Number = Annotated[float, BeforeValidator(_plain)]
Whole = Annotated[int, BeforeValidator(_plain), Field(ge=-(1 << 31), lt=1 << 31)]
Box = Annotated[list[float], BeforeValidator(_plain), Field(min_length=7, max_length=7)]
_Row = Annotated[list[float], BeforeValidator(_plain), Field(min_length=4, max_length=4)]
Matrix = Annotated[list[_Row], BeforeValidator(_plain), Field(min_length=4, max_length=4), AfterValidator(_invertible)]
Velocity = Annotated[list[float], BeforeValidator(_plain), Field(min_length=2, max_length=2)]


class Cloud(TypedDict, total=False):
    """Entry ``lidar_points`` of an info: the file of the cloud, and its place on the vehicle."""

    lidar_path: Annotated[str, AfterValidator(_without_null)]
    num_pts_feats: Whole | None
    lidar2sensor: Matrix


class Sweep(TypedDict, total=False):
    """An earlier sweep: an entry of ``lidar_sweeps``."""

    timestamp: Number
    lidar_points: Cloud


class Instance(TypedDict, total=False):
    """An object: an entry of ``instances``."""

    bbox_3d: Box
    bbox_label_3d: Annotated[Whole, Field(ge=-1)]
    velocity: Velocity
    num_lidar_pts: Whole
    num_radar_pts: Whole | None


class Camera(TypedDict, total=False):
    """A camera: an entry of ``images``."""

    lidar2cam: Matrix


class CameraObject(TypedDict, total=False):
    """An object in a camera's frame: an entry of ``cam_instances``."""

    bbox_3d: Annotated[list[float], BeforeValidator(_plain), Field(min_length=3, max_length=9)]
    attr_label: Annotated[Whole, Field(ge=0, lt=len(NAMES))]


class Info(TypedDict, total=False):
    """Entry of ``data_list``: one sample."""

    token: Any
    sample_idx: Any
    sample_id: Any
    timestamp: Number
    lidar_points: Cloud
    lidar_sweeps: list[Sweep] | None
    instances: list[Instance] | None
    images: dict[str, Any]
    """Camera → ``Camera``; KITTI's infos have matrices among them."""
    cam_instances: dict[str, list[CameraObject]] | None


class Meta(TypedDict, total=False):
    """Entry ``metainfo``: what holds for all samples, class names first of all."""

    dataset: Any
    DATASET: Any
    categories: dict[str, Whole] | list[str] | None
    classes: list[str] | None
