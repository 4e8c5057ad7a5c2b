"""Faults in shapes and glue: what is fed, how it is padded."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from faults.edits import shift_padding
from faults.seeding import edited

from cp_debug.bisect.demos import Fault, fed_by
from cp_debug.recipes.base import Arrays, Component, Sample
from cp_debug.recipes.centerpoint.recipe import ENCODER, CenterPointModel


class _Transposed(CenterPointModel):
    """Feeds features point by point where the encoder expects them feature by feature."""

    def feed(self, component: Component, sample: Sample, results: Mapping[str, Arrays]) -> dict[str, np.ndarray]:
        inputs = super().feed(component, sample, results)
        if component.name == ENCODER:
            features = inputs["input_features"]
            inputs["input_features"] = np.ascontiguousarray(features.transpose(0, 2, 1)).reshape(features.shape)
        return inputs


LAYOUT = (
    Fault("features-transposed", "points and features change places in the encoder's input", "no detections at all",
          lambda: fed_by(_Transposed, "input_features are transposed and reshaped back")),
    Fault("wrong-padding", "a convolution pads on one side only", "all boxes are off by a cell",
          lambda: edited("pts_backbone.blocks.0.3 pads 2 rows and columns before, none behind",
                         {"pts_backbone.blocks.0.4": shift_padding})),
)  # fmt: skip
