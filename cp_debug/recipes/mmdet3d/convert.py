"""A model config of mmdet3d as a ``CenterPointConfig``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from cp_debug.recipes.centerpoint.config import HEAD_CHANNELS, CenterPointConfig

COLUMNS = ("x", "y", "z", "intensity", "dt")
PARTS = {
    "pts_voxel_encoder": "PillarFeatureNet",
    "pts_middle_encoder": "PointPillarsScatter",
    "pts_backbone": "SECOND",
    "pts_neck": "SECONDFPN",
    "pts_bbox_head": "CenterHead",
}


SEPARATE_HEADS = ("SeparateHead", "CustomSeparateHead")
"""Heads that compute the same: AWML's differs in the bias that training starts with."""
_KNOWN = {
    "BackwardPillarFeatureNet": "two offsets to the voxel's centre instead of three: one feature less",
    "ConvNeXt_PC": "ConvNeXt blocks: depthwise convolutions, LayerNorm and GELU, no BatchNorm to fold",
}


class Unlike(Exception):
    """The config is not a pillar CenterPoint as this project builds it; the message says where."""


def center_point_config(name: str, model: Mapping[str, Any], columns: Sequence[int] | None) -> CenterPointConfig:
    """The sizes in ``model``, a resolved config; ``columns`` of a stored cloud are fed to it.

    Whether the parts compute the same is not looked at here: weights and tensors tell. Raises Unlike for a config that
    is no such CenterPoint.
    """
    types = {part: model.get(part, {}).get("type") for part in PARTS}
    if missing := [part for part, part_type in types.items() if part_type is None]:
        raise Unlike(f"{model.get('type')} has no {missing[0]}")
    others = [
        f"{part} is {types[part]}{_why(types[part])}, not {kind}"
        for part, kind in PARTS.items()
        if types[part].rpartition(".")[2] != kind
    ]
    if others:
        raise Unlike("; ".join(others))
    try:
        return _converted(name, model, columns)
    except (KeyError, TypeError, IndexError) as error:
        raise Unlike(f"its config has no usable {error}") from None


def _why(part_type: str) -> str:
    """Words on how a part of AWML differs; empty for others."""
    about = _KNOWN.get(part_type.rpartition(".")[2])
    return f" ({about})" if about else ""


def _converted(name: str, model: Mapping[str, Any], columns: Sequence[int] | None) -> CenterPointConfig:
    encoder, backbone, neck, head = (model[part] for part in PARTS if part != "pts_middle_encoder")
    voxels, test = model["data_preprocessor"]["voxel_layer"], model["test_cfg"]["pts"]
    heads = {key: value[0] for key, value in head["common_heads"].items()}
    if heads != HEAD_CHANNELS:
        raise Unlike(f"pts_bbox_head.common_heads is {heads}, not {HEAD_CHANNELS}")
    if columns is None or len(columns) != encoder["in_channels"]:
        columns = range(encoder["in_channels"])
    separate, coder = head["separate_head"], head["bbox_coder"]
    if separate["type"].rpartition(".")[2] not in SEPARATE_HEADS:
        raise Unlike(f"pts_bbox_head.separate_head is {separate['type']}, not {SEPARATE_HEADS[0]}")
    max_voxels = voxels["max_voxels"]
    tasks = tuple(tuple(task["class_names"]) for task in head["tasks"])
    return CenterPointConfig(
        name=name,
        summary="from mmdet3d",
        voxel_size=tuple(voxels["voxel_size"]),
        point_cloud_range=tuple(voxels["point_cloud_range"]),
        max_num_points=voxels["max_num_points"],
        max_voxels=max_voxels if isinstance(max_voxels, int) else max_voxels[1],
        encoder_channels=tuple(encoder["feat_channels"]),
        backbone_channels=tuple(backbone["out_channels"]),
        backbone_layers=tuple(backbone["layer_nums"]),
        backbone_strides=tuple(backbone["layer_strides"]),
        neck_channels=tuple(neck["out_channels"]),
        neck_strides=tuple(neck["upsample_strides"]),
        tasks=tasks,
        nms_min_radius=_radii(test.get("min_radius"), len(tasks)),
        nms_overlap=test["nms_thr"] if test.get("nms_type") == "rotate" else None,
        nms_pre_max_size=test.get("pre_max_size") or 1000,
        post_center_range=tuple(coder["post_center_range"]),
        point_features=tuple(COLUMNS[column] for column in columns),
        head_channels=head.get("share_conv_channel", 64),
        head_kernel=separate.get("final_kernel", 1),
        heatmap_bias=separate.get("init_bias", -2.19),
        score_threshold=coder["score_threshold"],
        max_num=coder["max_num"],
        post_max_size=test["post_max_size"],
    )


def _radii(given: Any, count: int) -> tuple[float, ...]:
    """Circle NMS's threshold of each task; configurations with rotated NMS may have none."""
    radii = tuple(given) if isinstance(given, Sequence) else (given or 0.0,)
    return (radii * count if len(radii) == 1 else radii)[:count]
