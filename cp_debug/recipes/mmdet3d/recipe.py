"""``mmdet3d:CONFIG``: a detector of the real mmdet3d, as the debugger sees it.

A pillar CenterPoint is this project's own with the detector's weights and settings, checked against every stage tensor
of the real one. Of any other detector the parts from a dense tensor on are compared: see ``layers.py``.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cp_debug.errors import InputError
from cp_debug.files import resolved
from cp_debug.recipes.base import Arrays, Model
from cp_debug.recipes.centerpoint.config import CenterPointConfig
from cp_debug.recipes.centerpoint.decode import decode
from cp_debug.recipes.centerpoint.pillar_encoder import decorate
from cp_debug.recipes.centerpoint.recipe import CenterPointModel, random_weights
from cp_debug.recipes.centerpoint.scatter import scatter
from cp_debug.recipes.centerpoint.voxelize import voxelize
from cp_debug.recipes.checkpoint import check_fit, read_state_dict
from cp_debug.recipes.mmdet3d.client import DetectorClient
from cp_debug.recipes.mmdet3d.convert import Unlike, center_point_config
from cp_debug.recipes.mmdet3d.layers import DetectorLayers
from cp_debug.safe_text import did_you_mean

PREFIX = "mmdet3d:"
TOLERANCE = 1e-4
"""Largest difference between two FP32 computations of one stage, relative to the stage's largest element."""


def load_detector(name: str, *, checkpoint: Path | None = None, seed: int = 0) -> Model:
    """The detector of ``mmdet3d:CONFIG.py`` or of a configuration that mmdet3d ships, by its name.

    Without a checkpoint its weights are random. Raises MissingPackage when there is no mmdet3d, InputError for an
    unknown configuration, one that cannot be built, and a checkpoint that does not fit.
    """
    client = DetectorClient()
    config = _find(client, name.removeprefix(PREFIX))
    about = client.call("open", config=str(config), seed=seed).result
    weights = f"untrained, random seed {seed}"
    if checkpoint is not None:
        _load(client, about["shapes"], checkpoint)
        weights = checkpoint.name
    try:
        settings = center_point_config(config.stem, about["model"], about["columns"])
        model: Mmdet3dCenterPoint | DetectorLayers = Mmdet3dCenterPoint(name, client, settings, weights, about)
    except Unlike as reason:
        model = DetectorLayers(name, client, about, seed)
        model.notes.append(f"only layers, without boxes: {reason}")
    if checkpoint is None:
        model.notes.append(random_weights(seed))
    return model


class Mmdet3dCenterPoint(CenterPointModel):
    """A pillar CenterPoint of mmdet3d. Where mmdet3d runs in this process, the components are its own modules.

    Raises Unlike when a weight or a stage tensor of the real detector differs from this project's.
    """

    def __init__(
        self, name: str, client: DetectorClient, config: CenterPointConfig, weights: str, about: Mapping[str, Any]
    ) -> None:
        with tempfile.TemporaryDirectory(prefix="cpdebug-") as folder:
            file = Path(folder) / "weights.pt"
            client.call("save", file=str(file))
            try:
                super().__init__(config.name, checkpoint=file, config=config)
            except InputError as error:
                raise Unlike(str(error).partition("\n")[2].partition("\n")[0]) from None
        self.name, self.weights = name, weights
        nms = about["model"]["test_cfg"]["pts"].get("nms_type")
        self.verified = self._verify(client, boxes=nms in ("circle", "rotate"))
        """Stage → largest absolute difference from the real detector on one synthetic scene."""
        encoder, dense_part = self.components
        encoder.module = client.encoder or encoder.module
        dense_part.module = client.module(dense_part.name) or dense_part.module
        self.notes = [
            f"mmdet3d {about['versions']['mmdet3d']} in {client.where}: {len(self.verified)} stages of one synthetic "
            f"scene equal up to {max(self.verified.values()):.2g} (max |Δ|)"
        ]
        if nms not in ("circle", "rotate"):
            self.notes.append(f"boxes after circle NMS; this configuration has {nms} NMS in mmdet3d")

    def _verify(self, client: DetectorClient, *, boxes: bool) -> dict[str, float]:
        (sample,) = self.samples(1, 0, None)
        real = client.call("stages", sample.arrays).arrays
        differences = stage_differences(self, sample.arrays["points"], real, boxes=boxes)
        for stage, difference in differences.items():
            if not difference <= TOLERANCE * float(np.abs(real[stage]).max(initial=0)):
                raise Unlike(f"this project's CenterPoint computes another {stage} (max |Δ| {difference:.3g})")
        return differences


def stage_differences(
    model: CenterPointModel, points: np.ndarray, real: Arrays, *, boxes: bool = True
) -> dict[str, float]:
    """Stage → max |Δ| of ``model`` on ``points`` [N, C] from ``real``, as the runner's ``stages`` gives them.

    Each stage computes on from this project's own tensors; only the boxes are decoded from ``real``'s head maps, so
    that no rounding upstream moves a score across the threshold. Infinite where the shapes differ.
    """
    ours = {name: tensor.numpy() for name, tensor in _stages(model, torch.from_numpy(points)).items()}
    if boxes:
        maps = {name: torch.from_numpy(real[name]) for name in model.config.output_names}
        (detections,) = decode(maps, model.config)
        ours |= {"boxes": detections.boxes, "scores": detections.scores, "labels": detections.labels}
    return {name: _difference(array, real[name]) for name, array in ours.items()}


def _stages(model: CenterPointModel, points: torch.Tensor) -> dict[str, torch.Tensor]:
    network, config = model.network, model.config
    pillars = voxelize(points, config)
    with torch.no_grad():
        features = decorate(pillars, config)
        pillar_features = network.pts_voxel_encoder(features)
        canvas = scatter(pillar_features, pillars.coors, config.grid)
        blocks = network.pts_backbone(canvas)
        neck = network.pts_neck(blocks)
        heads = network.pts_bbox_head(neck)
    return {
        **pillars._asdict(),
        "input_features": features,
        "pillar_features": pillar_features,
        "spatial_features": canvas,
        **{f"backbone.{index}": block for index, block in enumerate(blocks)},
        "neck": neck,
        **heads,
    }


def _difference(ours: np.ndarray, real: np.ndarray) -> float:
    if ours.shape != real.shape:
        return float("inf")
    return float(np.abs(ours.astype(np.float64) - real).max(initial=0))


def _find(client: DetectorClient, text: str) -> Path:
    """The config file that ``text`` names. Raises InputError for one that does not exist."""
    if text.endswith(".py"):
        if not (path := Path(text)).is_file():
            raise InputError(f"{PREFIX}{text}: no such config file")
        return resolved(path)
    shipped = client.call("configs").result["configs"]
    if text not in shipped:
        hint = did_you_mean(text, shipped, 3)
        raise InputError(f"{PREFIX}{text}: neither a .py file nor one of mmdet3d's {len(shipped)} configurations{hint}")
    return Path(shipped[text])


def _load(client: DetectorClient, shapes: Mapping[str, list[int]], checkpoint: Path) -> None:
    """Hand the weights over, once they are known to be plain tensors that fit."""
    state = read_state_dict(checkpoint)
    check_fit(shapes, state, str(checkpoint))
    with tempfile.TemporaryDirectory(prefix="cpdebug-") as folder:
        file = Path(folder) / "weights.pt"
        torch.save(state, file)
        client.call("load", file=str(file))
