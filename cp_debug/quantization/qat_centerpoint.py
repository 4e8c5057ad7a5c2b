"""Fine-tune a quantised CenterPoint from clouds to head maps, on scenes with ground truth."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from cp_debug.errors import InputError
from cp_debug.quantization.qat import OnStep, QatOptions, QatResult, finetune
from cp_debug.recipes.base import Model
from cp_debug.recipes.centerpoint.loss import centerpoint_loss
from cp_debug.recipes.centerpoint.model import CenterPoint
from cp_debug.recipes.centerpoint.recipe import BACKBONE_NECK_HEAD, ENCODER, CenterPointModel
from cp_debug.recipes.centerpoint.scenes import generate_scene
from cp_debug.recipes.centerpoint.targets import make_targets
from cp_debug.recipes.centerpoint.training import Example, evaluate
from cp_debug.recipes.data.base import DataSet, Truth

HELD = 256
"""Training scenes kept in memory."""
CRITERIA = ("loss", "map")


def quantized_network(model: CenterPointModel, modules: Mapping[str, nn.Module]) -> CenterPoint:
    """The whole network with the quantised components in place, whose weights it shares."""
    network = copy.copy(model.network)
    network._modules = dict(network._modules)
    network.pts_voxel_encoder = modules[ENCODER]  # type: ignore[assignment]
    for name, part in modules[BACKBONE_NECK_HEAD].named_children():
        setattr(network, name, part)
    return network


def examples_of(data: DataSet) -> list[Example]:
    """Clouds with their boxes. Raises InputError for a sample without ground truth."""
    made = []
    for index in range(len(data)):
        sample = data.sample(index)
        if not isinstance(sample.truth, Truth):
            raise InputError(f"{sample.source}: has no ground truth; expected an info file (.pkl)")
        boxes = np.concatenate((sample.truth.boxes, sample.truth.velocities), axis=1)
        made.append(Example(*map(torch.from_numpy, (sample.arrays["points"], boxes, sample.truth.labels))))
    return made


def training_scenes(count: int) -> Callable[[int], Example]:
    """The first scenes that the tiny model was trained on, made when they are asked for."""
    return lru_cache(HELD)(lambda index: Example.of(generate_scene(index % count)))


def finetune_centerpoint(
    model: Model,
    modules: Mapping[str, nn.Module],
    scene: Callable[[int], Example],
    count: int,
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
    """Fine-tune the quantised components of a CenterPoint in place, on ``count`` scenes by number.

    Order and augmentation are drawn from ``seed``. ``criterion`` is ``loss`` or ``map``, on ``held_out``. Raises
    InputError for another model and as ``finetune`` does.
    """
    if not isinstance(model, CenterPointModel):
        raise InputError(f"MODEL: {model.name} has no training loss here; use finetune() with your own")
    if criterion not in CRITERIA:
        raise InputError(f"--early-stop: {criterion!r}; expected one of {', '.join(CRITERIA)}")
    network = quantized_network(model, modules)

    def scenes(step: int) -> list[Example]:
        rng = np.random.default_rng([seed, step])
        places = range(step * batch, (step + 1) * batch)
        chosen = [np.random.default_rng([seed, p // count]).permutation(count)[p % count] for p in places]
        return [scene(int(index)).augmented(rng) for index in chosen]

    def loss(module: nn.Module, examples: Sequence[Example]) -> Tensor:
        boxes, labels = [each.boxes for each in examples], [each.labels for each in examples]
        targets = make_targets(boxes, labels, model.config)
        return centerpoint_loss(module([each.points for each in examples]), targets).total

    def validate(module: nn.Module) -> float:
        if criterion == "map":
            return -float(evaluate(module, held_out).mean())  # type: ignore[arg-type]
        return float(np.mean([loss(module, [each]).item() for each in held_out]))

    return finetune(network, scenes, loss, validate, options, state=state, resume=resume, on_step=on_step)
