"""Checkpoints of other CenterPoints: which sizes differ from the model's, and the recipe that has theirs."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from cp_debug.errors import InputError
from cp_debug.recipes.centerpoint.config import CONFIGS, CenterPointConfig
from cp_debug.recipes.checkpoint import load_state, read_checkpoint

LARGEST_CONFIG = 1 << 20
"""Characters of a configuration in a checkpoint that are looked at."""
_GRID = ("voxel_size", "point_cloud_range")


def load_weights(network: nn.Module, path: Path, config: CenterPointConfig) -> None:
    """Fill ``network``, built from ``config``, from a checkpoint.

    Raises InputError as ``load_checkpoint`` does; for one of another CenterPoint it names the sizes that differ, and
    the recipe that has them. Weights know no voxel size, so one that mmengine wrote is refused, too, where its own
    configuration has another grid.
    """
    state, meta = read_checkpoint(path)
    trained = _grid_of(meta)
    wrong = {key: value for key, value in trained.items() if not np.allclose(value, getattr(config, key))}
    if wrong:
        differing = ", ".join(f"{key} {value} (it has {list(getattr(config, key))})" for key, value in wrong.items())
        other = f"trained on another grid than that of centerpoint:{config.name}: {differing}"
        raise InputError(f"{path}: {other}; {_offer(state, trained)}")
    try:
        load_state(network, state, str(path))
    except InputError as error:
        ours, theirs = _sizes_of(config), _sizes_in(state)
        differing = ", ".join(
            f"{key} {value} (it has {ours[key]})" for key, value in theirs.items() if value != ours[key]
        )
        if not differing:
            raise
        other = f"it belongs to another CenterPoint than centerpoint:{config.name}: {differing}"
        raise InputError(f"{error}\n{other}; {_offer(state, trained)}") from None


def _offer(state: Mapping[str, Tensor], grid: Mapping[str, list[float]]) -> str:
    """The recipes that have a checkpoint's sizes, in words."""
    sizes = _sizes_in(state)
    fitting = [
        f"centerpoint:{name}"
        for name, config in CONFIGS.items()
        if sizes
        and all(_sizes_of(config)[key] == value for key, value in sizes.items())
        and all(np.allclose(value, getattr(config, key)) for key, value in grid.items())
    ]
    if fitting:
        known = "" if grid else ", judging by the weights, which say nothing about voxel size and range"
        return f"expected {' or '.join(fitting)}{known}"
    return "no recipe has these; expected mmdet3d:CONFIG.py with its own configuration"


def _sizes_of(config: CenterPointConfig) -> dict[str, Any]:
    return {
        "features a point": len(config.point_features),
        "encoder channels": list(config.encoder_channels),
        "backbone channels": list(config.backbone_channels),
        "head channels": config.head_channels,
        "classes of each task": [len(task) for task in config.tasks],
    }


def _sizes_in(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Sizes that shapes tell, by the names of ``_sizes_of``; none for the weights of another kind of network."""
    encoder = _listed(state, "pts_voxel_encoder.pfn_layers.{}.linear.weight", 2)
    backbone = _listed(state, "pts_backbone.blocks.{}.0.weight", 4)
    tasks = _listed(state, "pts_bbox_head.task_heads.{}.heatmap.1.weight", 4)
    shared = _listed(state, "pts_bbox_head.shared_conv.conv.weight", 4)[:1]
    sizes: dict[str, Any] = {}
    if encoder:
        sizes["features a point"] = encoder[0][1] - 6
        widths = [shape[0] for shape in encoder]
        sizes["encoder channels"] = [*(2 * width for width in widths[:-1]), widths[-1]]
    if backbone:
        sizes["backbone channels"] = [shape[0] for shape in backbone]
    if shared:
        sizes["head channels"] = shared[0][0]
    if tasks:
        sizes["classes of each task"] = [shape[0] for shape in tasks]
    return sizes


def _listed(state: Mapping[str, Tensor], key: str, ndim: int) -> list[list[int]]:
    """Shapes of the weights that are numbered at ``{}`` in ``key``, from 0 on."""
    shapes: list[list[int]] = []
    while (
        (tensor := state.get(key.format(len(shapes)))) is not None and tensor.ndim == ndim and len(shapes) < len(state)
    ):
        shapes.append(list(tensor.shape))
    return shapes


def _grid_of(meta: Any) -> dict[str, list[float]]:
    """Voxel size and range from the configuration that mmengine keeps as text in ``meta``; empty without one."""
    text = meta.get("cfg") if isinstance(meta, dict) else None
    if not isinstance(text, str) or len(text) > LARGEST_CONFIG:
        return {}
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return {}
    found: dict[str, list[float]] = {}
    for layer in (word.value for node in ast.walk(tree) if isinstance(node, ast.Call) for word in node.keywords
                  if word.arg == "voxel_layer"):  # fmt: skip
        for word in layer.keywords if isinstance(layer, ast.Call) else ():
            if word.arg in _GRID:
                try:
                    value = np.asarray(ast.literal_eval(word.value), np.float64)
                except (ValueError, TypeError, SyntaxError, RecursionError):
                    continue
                if value.shape == (3 if word.arg == "voxel_size" else 6,):
                    found[word.arg] = value.tolist()
    return found
