"""Fine-tune a quantized CenterPoint from clouds to head maps, on scenes with ground truth."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from cp_debug.detection.metrics import Objects, class_average_precisions
from cp_debug.display import OnStep
from cp_debug.errors import InputError
from cp_debug.quantization.open_quantized import adopt_weights
from cp_debug.quantization.qat import QatOptions, QatResult, finetune
from cp_debug.recipes.base import Model, Sample
from cp_debug.recipes.centerpoint.decode import decode
from cp_debug.recipes.centerpoint.loss import centerpoint_loss, make_targets
from cp_debug.recipes.centerpoint.model import CenterPoint
from cp_debug.recipes.centerpoint.recipe import BACKBONE_NECK_HEAD, ENCODER, CenterPointModel
from cp_debug.recipes.centerpoint.scenes import CLASSES, Scene, generate_scene
from cp_debug.recipes.data.base import DataOptions, Truth, iterate
from cp_debug.recipes.data.open_data import DEFAULT_OPTIONS


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


KEPT = 256
"""Number of training scenes in memory."""
VALIDATION_FIRST = 2000
"""First held-out synthetic scene that is validated on: neither calibrated nor evaluated on."""
CRITERIA = ("loss", "map")


def quantized_network(model: CenterPointModel, modules: Mapping[str, nn.Module]) -> CenterPoint:
    """The whole network with the quantized components in place, whose weights it shares."""
    network = copy.copy(model.network)
    network._modules = dict(network._modules)
    network.pts_voxel_encoder = modules[ENCODER]  # type: ignore[assignment]
    for name, part in modules[BACKBONE_NECK_HEAD].named_children():
        setattr(network, name, part)
    return network


def as_trainable(model: Model) -> CenterPointModel:
    """``model`` itself. Raises InputError for one whose training loss is not known here."""
    if not isinstance(model, CenterPointModel):
        raise InputError(f"MODEL: {model.name} has no training loss here; use quantization.qat.finetune with your own")
    return model


def example_of(sample: Sample) -> Example:
    """A cloud with its boxes. Raises InputError for a sample without ground truth."""
    if not isinstance(sample.truth, Truth):
        raise InputError(f"{sample.source}: has no ground truth to train on; expected an info file (.pkl)")
    boxes = np.concatenate((sample.truth.boxes, sample.truth.velocities), axis=1)
    return Example(*map(torch.from_numpy, (sample.arrays["points"], boxes, sample.truth.labels)))


class Scenes:
    """Examples by number, the last few of which are kept."""

    def __init__(self, count: int, make: Callable[[int], Example]) -> None:
        self._count = count
        self._make = lru_cache(KEPT)(make)

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Example:
        return self._make(index)


def training_scenes(
    model: CenterPointModel, data: Path | None, count: int, options: DataOptions = DEFAULT_OPTIONS
) -> Scenes:
    """At most ``count`` scenes of an info file, or of those that the tiny model was trained on.

    Raises InputError for unusable files, and for a model whose classes are not those of the synthetic scenes.
    """
    if data is None:
        if model.class_names != tuple(CLASSES):
            raise InputError(f"--data: the synthetic scenes show {', '.join(CLASSES)}; {model.name} needs an info file")
        return Scenes(count, lambda index: Example.of(generate_scene(index)))
    opened = model.data(data, count, options=options)
    return Scenes(len(opened), lambda index: example_of(opened.sample(index)))


def held_out_scenes(
    model: CenterPointModel, data: Path | None, count: int, options: DataOptions = DEFAULT_OPTIONS
) -> list[Example]:
    """At most ``count`` scenes to validate on, by default ones that neither calibration nor evaluation uses."""
    return [example_of(sample) for sample in iterate(model.data(data, count, VALIDATION_FIRST, options))]


def finetune_centerpoint(
    model: CenterPointModel,
    modules: Mapping[str, nn.Module],
    scenes: Scenes,
    held_out: Sequence[Example],
    options: QatOptions,
    *,
    batch: int = 2,
    criterion: str = "loss",
    seed: int = 0,
    state: Path | None = None,
    resume: bool = False,
    on_step: OnStep = lambda text, done, total: None,
) -> QatResult:
    """Fine-tune the quantized components of a CenterPoint in place.

    Order and augmentation are drawn from ``seed``. ``criterion`` is ``loss`` or ``map``, on ``held_out``. Raises
    InputError for another criterion, without scenes, and as ``finetune`` does.
    """
    if not len(scenes) or not held_out:
        raise InputError("there is nothing to train or validate on: expected at least one scene for each")
    if criterion not in CRITERIA:
        raise InputError(f"--early-stop: {criterion!r}; expected one of {', '.join(CRITERIA)}")
    network = quantized_network(model, modules)

    def examples(step: int) -> list[Example]:
        rng = np.random.default_rng([seed, step])
        passes = [divmod(place, len(scenes)) for place in range(step * batch, (step + 1) * batch)]
        orders = [np.random.default_rng([seed, epoch]).permutation(len(scenes)) for epoch, _ in passes]
        return [scenes[int(order[at])].augmented(rng) for order, (_, at) in zip(orders, passes, strict=True)]

    def loss(module: nn.Module, batch: Sequence[Example]) -> Tensor:
        boxes, labels = [example.boxes for example in batch], [example.labels for example in batch]
        targets = make_targets(boxes, labels, model.config)
        return centerpoint_loss(module([example.points for example in batch]), targets).total

    def validate(module: nn.Module) -> float:
        if criterion == "map":
            return -float(evaluate(module, held_out).mean())  # type: ignore[arg-type]
        return float(np.mean([loss(module, [example]).item() for example in held_out]))

    result = finetune(network, examples, loss, validate, options, state=state, resume=resume, on_step=on_step)
    for component in model.components:
        assert component.module is not None
        adopt_weights(component.module, modules[component.name])
    return result
