"""Scenes as a CenterPoint trains on them, and the score of one on scenes that it never saw."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cp_debug.detection.metrics import Objects, class_average_precisions
from cp_debug.recipes.centerpoint.decode import decode
from cp_debug.recipes.centerpoint.model import CenterPoint
from cp_debug.recipes.centerpoint.scenes import Scene


@dataclass(frozen=True)
class Example:
    """A scene as tensors: points [N, 5], boxes [M, 9] with velocity, labels [M]."""

    points: Tensor
    boxes: Tensor
    labels: Tensor

    @classmethod
    def of(cls, scene: Scene, device: str = "cpu") -> Example:
        """A scene's arrays as float32 and int64 tensors on a device."""
        boxes = np.concatenate((scene.boxes, scene.velocities), axis=1)
        return cls(*(torch.from_numpy(array).to(device) for array in (scene.points, boxes, scene.labels)))

    def augmented(self, rng: np.random.Generator) -> Example:
        """Mirrored, turned about the sensor's axis and scaled, at random."""
        angle, scale, mirror = rng.uniform(-math.pi, math.pi), rng.uniform(0.95, 1.05), rng.choice((-1, 1))
        cos, sin = math.cos(angle), math.sin(angle)
        turn = self.points.new_tensor([[cos, sin], [-sin * mirror, cos * mirror]])
        points, boxes = self.points.clone(), self.boxes.clone()
        heading = torch.stack((boxes[:, 6].cos(), boxes[:, 6].sin()), dim=1) @ turn
        boxes[:, 6] = torch.atan2(heading[:, 1], heading[:, 0])
        for xy in (points[:, :2], boxes[:, :2], boxes[:, 7:9]):
            xy.copy_(xy @ turn * scale)
        points[:, 2] *= scale
        boxes[:, 2:6] *= scale
        return Example(points, boxes, self.labels)


@torch.no_grad()
def evaluate(model: CenterPoint, examples: Sequence[Example]) -> np.ndarray:
    """AP of every class at every threshold of nuScenes [C, 4]; the mean is the mAP."""
    predicted, truth = [], []
    for example in examples:
        (detections,) = decode(model([example.points]), model.config)
        predicted.append((detections.boxes[:, :2], detections.labels, detections.scores))
        labels = example.labels.cpu().numpy()
        truth.append((example.boxes[:, :2].cpu().numpy(), labels, np.ones(len(labels))))
    return class_average_precisions(Objects.gather(predicted), Objects.gather(truth), len(model.config.class_names))
