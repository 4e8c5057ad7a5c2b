"""Faults in shapes and glue: what is fed, how it is padded, an activation left out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cp_debug.bisect.faults.base import Fault, Seeded
from cp_debug.bisect.faults.edits import shift_padding
from cp_debug.bisect.faults.seeding import edited
from cp_debug.recipes.base import Arrays, Component, Sample
from cp_debug.recipes.centerpoint.model import BackboneNeckHead
from cp_debug.recipes.centerpoint.recipe import BACKBONE_NECK_HEAD, ENCODER, CenterPointModel


class _Refed(CenterPointModel):
    """Feeds the pillar encoder its own output, repeated to the shape of its input."""

    def feed(self, component: Component, sample: Sample, results: Mapping[str, Arrays]) -> dict[str, np.ndarray]:
        inputs = super().feed(component, sample, results)
        if component.name == ENCODER:
            features = inputs["input_features"]
            with torch.no_grad():
                pillars = self.network.pts_voxel_encoder(torch.from_numpy(features)).numpy()
            inputs["input_features"] = np.resize(pillars, features.shape)
        return inputs


class _Transposed(CenterPointModel):
    """Feeds features point by point where the encoder expects them feature by feature."""

    def feed(self, component: Component, sample: Sample, results: Mapping[str, Arrays]) -> dict[str, np.ndarray]:
        inputs = super().feed(component, sample, results)
        if component.name == ENCODER:
            features = inputs["input_features"]
            inputs["input_features"] = np.ascontiguousarray(features.transpose(0, 2, 1)).reshape(features.shape)
        return inputs


class _RawScores(CenterPointModel):
    """Decodes heatmaps as scores, as they come: the sigmoid belongs to the network."""

    def decode(self, sample: Sample, results: Mapping[str, Arrays]) -> Any:
        maps = {
            name: torch.logit(torch.from_numpy(values), eps=1e-7).numpy() if name.endswith("heatmap") else values
            for name, values in results[BACKBONE_NECK_HEAD].items()
        }
        return super().decode(sample, {**results, BACKBONE_NECK_HEAD: maps})


class _Probabilities(BackboneNeckHead):
    """Heatmaps as probabilities."""

    def forward(self, spatial_features: Tensor) -> tuple[Tensor, ...]:
        maps = self.pts_bbox_head(self.pts_neck(self.pts_backbone(spatial_features)))
        return tuple(t.sigmoid() if name.endswith("heatmap") else t for name, t in maps.items())


def _missing_sigmoid() -> Seeded:
    model = _RawScores("tiny")
    model.components = tuple(
        replace(c, module=_Probabilities(model.network).eval()) if c.name == BACKBONE_NECK_HEAD else c
        for c in model.components
    )
    where = "the exported heads end in logits; the reference's heatmaps are probabilities"
    return Seeded(model, where, ops=("Sigmoid",), test_model=_RawScores("tiny"))


def _features(test: type[CenterPointModel], where: str) -> Seeded:
    """Other glue around the same components."""
    model, fed = CenterPointModel("tiny"), test("tiny")
    fed.components = model.components
    return Seeded(model, where, ("input_features",), test_model=fed)


LAYOUT = (
    Fault("features-reshaped", "the pillar encoder is fed its own output, reshaped", "a maximum difference near 100",
          lambda: _features(_Refed, "input_features are pillar features of the right shape")),
    Fault("features-transposed", "points and features change places in the encoder's input", "no detections at all",
          lambda: _features(_Transposed, "input_features are transposed and reshaped back")),
    Fault("wrong-padding", "a convolution pads on one side only", "all boxes are off by a cell",
          lambda: edited("pts_backbone.blocks.0.3 pads 2 rows and columns before, none behind",
                         {"pts_backbone.blocks.0.4": shift_padding})),
    Fault("missing-sigmoid", "the sigmoid of the heatmaps was left out", "zero detections, or thousands",
          _missing_sigmoid),
)  # fmt: skip
