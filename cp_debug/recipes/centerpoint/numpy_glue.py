"""CenterPoint's glue in numpy alone: pillars, decoration, canvas and boxes, for processes without torch.

The source of truth is the glue in torch (``voxelize``, ``pillar_encoder``, ``scatter``, ``decode``), which equals
mmdet3d's bit for bit. Tests hold this one to it: pillars, decorated points, canvas, places and velocities of boxes bit
for bit, their scores, sizes and yaws within four units in the last place: numpy's ``exp`` and ``arctan2`` are other
approximations than torch's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from cp_debug.recipes.centerpoint.config import OUTPUT_ORDER, CenterPointConfig
from cp_debug.recipes.centerpoint.nms import survivors


class Pillars(NamedTuple):
    """Points gathered into pillars, as ``voxelize.Voxels`` has them."""

    voxels: np.ndarray
    """[N, max_num_points, C] float32; unused slots are 0."""
    num_points: np.ndarray
    """[N] int32, how many slots are used."""
    coors: np.ndarray
    """[N, 4] int32: batch, z, y, x."""


class NumpyDetections(NamedTuple):
    """Boxes of one sample, as ``decode.Detections`` has them."""

    boxes: np.ndarray
    """[N, 9] float32: x, y, z of the bottom centre, length, width, height, yaw, vx, vy."""
    scores: np.ndarray
    """[N] float32 in (0, 1)."""
    labels: np.ndarray
    """[N] int32."""


def gather_pillars(points: np.ndarray, config: CenterPointConfig) -> Pillars:
    """Pillars of one cloud ``points`` [M, C] float32, in the order of ``voxelize.voxelize``, which equals mmcv's."""
    nx, ny, nz = config.grid
    low, size = np.array(config.point_cloud_range[:3], np.float32), np.array(config.voxel_size, np.float32)
    with np.errstate(invalid="ignore"):
        cells = np.floor((points[:, :3] - low) / size)
    inside = ((cells >= 0) & (cells < np.array((nx, ny, nz)))).all(axis=1)
    points, cells = points[inside], cells[inside].astype(np.int64)
    keys = (cells[:, 2] * ny + cells[:, 1]) * nx + cells[:, 0]
    order = np.argsort(keys, kind="stable")
    run_keys, run_starts, run_lengths = np.unique(keys[order], return_index=True, return_counts=True)
    ranked = np.argsort(order[run_starts])[: config.max_voxels]
    rank = np.full(len(run_keys), -1)
    rank[ranked] = np.arange(len(ranked))
    slot = np.arange(len(order)) - np.repeat(run_starts, run_lengths)
    pillar = np.repeat(rank, run_lengths)
    used = (pillar >= 0) & (slot < config.max_num_points)
    voxels = np.zeros((len(ranked), config.max_num_points, points.shape[1]), np.float32)
    voxels[pillar[used], slot[used]] = points[order[used]]
    kept = run_keys[ranked]
    coors = np.stack((np.zeros_like(kept), kept // (nx * ny), kept // nx % ny, kept % nx), axis=1)
    return Pillars(
        voxels, np.minimum(run_lengths[ranked], config.max_num_points).astype(np.int32), coors.astype(np.int32)
    )


def decorated(pillars: Pillars, config: CenterPointConfig) -> np.ndarray:
    """``input_features`` [N, P, C + 6] float32 of pillars, as ``pillar_encoder.decorate`` makes them."""
    voxels, num_points, coors = pillars
    xyz = voxels[:, :, :3]
    mean = _sum_of_points(xyz)[:, None] / num_points.astype(np.float32).reshape(-1, 1, 1)
    size = np.array(config.voxel_size, np.float32)
    first = [low + size / 2 for low, size in zip(config.point_cloud_range[:3], config.voxel_size, strict=True)]
    centre = coors[:, [3, 2, 1]].astype(np.float32) * size + np.array(first, np.float32)
    features = np.concatenate((voxels, xyz - mean, xyz - centre[:, None]), axis=2)
    used = np.arange(voxels.shape[1]) < num_points[:, None]
    return features * used[:, :, None]


def _sum_of_points(xyz: np.ndarray) -> np.ndarray:
    """Sums [N, 3] over the points of ``xyz`` [N, P, 3] float32, added up in torch's order.

    As ``row_sum`` of its ``SumKernel.cpp``: four interleaved sums, each in a cascade of blocks of 16 or more.
    """
    lanes, levels, rows = 4, 4, xyz.shape[1] // 4
    parts = xyz[:, : lanes * rows].reshape(len(xyz), rows, lanes, 3)
    totals = np.zeros((levels, len(xyz), lanes, 3), np.float32)
    power = max(4, (rows - 1).bit_length() // levels)
    block = 1 << power
    for row in range(rows):
        totals[0] += parts[:, row]
        done = row + 1
        if done % block == 0:
            for level in range(1, levels):
                totals[level] += totals[level - 1]
                totals[level - 1] = 0
                if done & ((block - 1) << (level * power)):
                    break
    for level in range(1, levels):
        totals[0] += totals[level]
    sums = totals[0, :, 0]
    for point in range(lanes * rows, xyz.shape[1]):
        sums += xyz[:, point]
    for lane in range(1, lanes):
        sums += totals[0, :, lane]
    return sums


def canvas(pillar_features: np.ndarray, coors: np.ndarray, grid: tuple[int, int, int]) -> np.ndarray:
    """``spatial_features`` [1, C, ny, nx]: ``pillar_features`` [N, 1, C] at ``coors`` [N, 4] (batch, z, y, x)."""
    nx, ny, _ = grid
    features = pillar_features.reshape(len(coors), pillar_features.shape[-1])
    flat = np.zeros((features.shape[1], ny * nx), features.dtype)
    flat[:, coors[:, 2].astype(np.int64) * nx + coors[:, 3]] = features.T
    return flat.reshape(1, -1, ny, nx)


def unturned(maps: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Head maps [1, channels, H, W] without AWML's ``--rot-y-axis-reference``, which the exported file applied."""
    plain = dict(maps)
    for name, array in maps.items():
        head = name.rpartition(".")[2]
        if head == "dim":
            plain[name] = array[:, [1, 0, 2]]
        elif head == "rot":
            plain[name] = -array[:, [1, 0]]
    return plain


def boxes_of(outputs: Mapping[str, np.ndarray], config: CenterPointConfig) -> NumpyDetections:
    """Boxes of head maps, by ``config.output_names``, each [1, channels, H, W]: as ``decode.decode`` gives them."""
    names, parts, first_label = iter(config.output_names), [], 0
    for task, class_names in enumerate(config.tasks):
        maps = {head: outputs[next(names)][0].astype(np.float32) for head in OUTPUT_ORDER}
        boxes, scores, labels = _task(maps, config)
        kept = survivors(boxes, scores, config, task)[: config.post_max_size]
        boxes, scores, labels = boxes[kept], scores[kept], labels[kept]
        boxes[:, 2] -= boxes[:, 5] * np.float32(0.5)
        parts.append((boxes, scores, labels + np.int32(first_label)))
        first_label += len(class_names)
    return NumpyDetections(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))


def _task(maps: Mapping[str, np.ndarray], config: CenterPointConfig) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Best peaks of one task: boxes [N, 9] (z of the centre), scores [N] float32, labels [N] int32."""
    with np.errstate(over="ignore"):
        heatmap = 1 / (1 + np.exp(-maps["heatmap"]))
    classes, _, width = heatmap.shape
    flat = heatmap.reshape(classes, -1)
    count = min(config.max_num, flat.shape[1])
    cells = np.argsort(-flat, axis=1, kind="stable")[:, :count]
    best = np.take_along_axis(flat, cells, axis=1)
    index = np.argsort(-best.ravel(), kind="stable")[:count]
    scores, labels, cell = best.ravel()[index], index // count, cells.ravel()[index]
    at = {head: maps[head].reshape(len(maps[head]), -1)[:, cell] for head in OUTPUT_ORDER[1:]}
    step = np.float32(config.out_size_factor)
    sizes, origin = np.array(config.voxel_size, np.float32), np.array(config.point_cloud_range, np.float32)
    row, column = np.divmod(cell, width)
    x = (column.astype(np.float32) + at["reg"][0]) * step * sizes[0] + origin[0]
    y = (row.astype(np.float32) + at["reg"][1]) * step * sizes[1] + origin[1]
    with np.errstate(over="ignore"):
        extent = np.exp(at["dim"])
    yaw = np.arctan2(at["rot"][0], at["rot"][1])
    boxes = np.stack((x, y, at["height"][0], *extent, yaw, *at["vel"]), axis=1).astype(np.float32)
    limits = np.array(config.post_center_range, np.float32)
    inside = ((boxes[:, :3] >= limits[:3]) & (boxes[:, :3] <= limits[3:])).all(axis=1)
    passing = inside & (scores > config.score_threshold)
    return boxes[passing], scores[passing].astype(np.float32), labels[passing].astype(np.int32)
