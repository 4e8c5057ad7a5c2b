"""Checks between the parts of a hybrid CenterPoint: voxels, scatter and decoding on torch, components anywhere.

Each interface is checked for shape, dtype, device and contiguity, and for the two mistakes that give numbers without an
error: features that were not decorated as the encoder expects, and logits taken for probabilities or the reverse.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cp_debug.backends.base import Tensor as AnyTensor
from cp_debug.errors import InputError
from cp_debug.graph.graph import fits_shape
from cp_debug.probes.arrays import is_torch
from cp_debug.recipes.base import Arrays, Component, Model, Sample
from cp_debug.recipes.centerpoint.config import HEAD_CHANNELS, CenterPointConfig
from cp_debug.recipes.centerpoint.decode import Detections
from cp_debug.recipes.centerpoint.recipe import BACKBONE_NECK_HEAD, ENCODER, CenterPointModel

MEAN_TOLERANCE = 1e-3
"""Largest sum of the offsets to a pillar's mean, relative to the sum of their magnitudes."""


@dataclass(frozen=True)
class InterfaceChecks:
    """Checks of one CenterPoint's tensors, torch's or numpy's; each raises InputError that says what to feed."""

    config: CenterPointConfig
    device: str = "cpu"

    def points(self, points: AnyTensor) -> None:
        """Check one cloud [M, C] float32, before voxelization. Raises InputError."""
        columns = self.config.point_features
        feed = f"feed the raw cloud, {', '.join(columns)} of each point, as float32"
        if len(points.shape) == 2 and points.shape[1] == self.config.decorated_channels:
            feed = f"these look decorated already; {feed}"
        self._check("points", points, ("M", len(columns)), feed, dtypes=("float32",), any_layout=True)

    def input_features(self, features: AnyTensor, pillars: int | None = None) -> None:
        """Check the encoder's input [N, P, C + 6] float32; ``pillars`` is N, where it is known. Raises InputError."""
        raw, decorated = len(self.config.point_features), self.config.decorated_channels
        feed = (
            f"feed decorate(voxelize(points)): {', '.join(self.config.point_features)}, then 3 offsets to the pillar's "
            "mean and 3 to its centre"
        )
        shape = tuple(features.shape)
        if len(shape) == 3 and shape[2] == raw:
            feed = f"these are raw points, which the encoder does not decorate; {feed}"
        elif shape[-1:] == (self.config.encoder_channels[-1],):
            feed = f"this is the encoder's output, not its input; {feed}"
        size: tuple[Any, ...] = (pillars or "N", self.config.max_num_points, decorated)
        self._check("input_features", features, size, feed, dtypes=("float32",))
        offsets = torch.as_tensor(features)[:, :, raw : raw + 3]
        total, magnitude = offsets.sum(dim=1).abs().sum(), offsets.abs().sum()
        if total > MEAN_TOLERANCE * magnitude:
            raise InputError(
                f"input_features: the shape fits but the content does not: columns {raw} to {raw + 2} are no offsets "
                f"to the pillars' means, as they do not add up to 0; another tensor was reshaped into this one; {feed}"
            )

    def pillar_features(self, features: AnyTensor, pillars: int) -> None:
        """Check the encoder's output [N, 1, C], for N ``pillars``. Raises InputError."""
        shape = (pillars, 1, self.config.encoder_channels[-1])
        self._check("pillar_features", features, shape, "feed the encoder's output for these pillars")

    def spatial_features(self, canvas: AnyTensor, batch: int) -> None:
        """Check the backbone's input [B, C, ny, nx], for B = ``batch``. Raises InputError."""
        nx, ny, _ = self.config.grid
        feed = "feed scatter(pillar_features, coors): channels first, then y, then x"
        self._check("spatial_features", canvas, (batch, self.config.encoder_channels[-1], ny, nx), feed)

    def outputs(self, maps: Mapping[str, AnyTensor], batch: int) -> None:
        """Check the head's maps [B, channels, H, W], heatmaps as logits. Raises InputError."""
        expected = self.config.output_names
        if missing := [name for name in expected if name not in maps]:
            raise InputError(f"decode: there is no {', '.join(missing)}; feed the maps {', '.join(expected)}")
        nx, ny, _ = self.config.grid
        size = (ny // self.config.out_size_factor, nx // self.config.out_size_factor)
        widths = [len(task) for task in self.config.tasks]
        for place, name in enumerate(expected):
            head = name.rpartition(".")[2]
            channels = HEAD_CHANNELS.get(head) or widths[place // (len(HEAD_CHANNELS) + 1)]
            self._check(name, maps[name], (batch, channels, *size), f"feed the head's own map {name}")
            if head == "heatmap":
                check_logits(name, maps[name])

    def _check(
        self,
        name: str,
        tensor: AnyTensor,
        shape: Sequence[int | str],
        feed: str,
        dtypes: Sequence[str] = ("float16", "bfloat16", "float32", "float64"),
        any_layout: bool = False,
    ) -> None:
        """Raise InputError, ending with ``feed``, unless shape, dtype, device and layout of a tensor fit."""
        actual = list(tensor.shape)
        if not fits_shape(actual, shape):
            raise InputError(f"{name} has shape {actual}; expected [{', '.join(map(str, shape))}]: {feed}")
        dtype = str(tensor.dtype).removeprefix("torch.")
        if dtype not in dtypes:
            raise InputError(f"{name} is {dtype}; expected {' or '.join(dtypes)}: {feed}")
        device = str(tensor.device) if is_torch(tensor) else "cpu"
        if torch.device(device).type != torch.device(self.device).type:
            raise InputError(f"{name} is on {device}; expected {self.device}: feed {name}.to({self.device!r})")
        contiguous = tensor.is_contiguous() if isinstance(tensor, Tensor) else tensor.flags["C_CONTIGUOUS"]
        if not (contiguous or any_layout):
            fix = f"{name}.contiguous()" if is_torch(tensor) else f"np.ascontiguousarray({name})"
            raise InputError(f"{name} is not contiguous, so an engine reads it in another order: feed {fix}")


def check_logits(name: str, heatmap: AnyTensor) -> None:
    """Raise InputError when a heatmap that should hold logits went through a sigmoid already."""
    low, high = _range(heatmap)
    if low >= 0 and 0 < high <= 1:
        raise InputError(
            f"{name} lies between {low:.3g} and {high:.3g}: these are probabilities where logits are expected; leave "
            "the sigmoid out, decoding applies it (a second one makes every score at least 0.5)"
        )


def check_probabilities(name: str, scores: AnyTensor) -> None:
    """Raise InputError when scores that should be probabilities never went through a sigmoid."""
    low, high = _range(scores)
    if low < 0 or high > 1:
        raise InputError(
            f"{name} lies between {low:.3g} and {high:.3g}: these are logits where probabilities are expected; feed "
            f"sigmoid({name}) (without it nearly nothing passes the score threshold, and nothing is detected)"
        )


def _range(tensor: AnyTensor) -> tuple[float, float]:
    values = torch.as_tensor(np.asarray(tensor, np.float32) if isinstance(tensor, np.ndarray) else tensor.float())
    return (float(values.min()), float(values.max())) if values.numel() else (0.0, 0.0)


class CheckedModel(CenterPointModel):
    """A CenterPoint whose interfaces are checked wherever it runs; everything else is the model's.

    It derives from what it checks, since Python 3.12 looks for a protocol's members past ``__getattr__``.
    """

    def __init__(self, model: CenterPointModel) -> None:
        self.__dict__.update(model.__dict__)
        self._model = model
        self._checks = InterfaceChecks(model.config)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def samples(self, count: int, seed: int, inputs: Path | None) -> Iterator[Sample]:
        """The model's samples."""
        return self._model.samples(count, seed, inputs)

    def feed(self, component: Component, sample: Sample, results: Mapping[str, Arrays]) -> dict[str, np.ndarray]:
        """The model's ``feed``, checked. Raises InputError at the first tensor that does not fit."""
        checks, batch = self._checks, batch_size(sample)
        if component.name == ENCODER:
            checks.points(sample.arrays["points"])
        pillars = len(self._model.voxelize(sample).voxels)
        if component.name == BACKBONE_NECK_HEAD:
            checks.pillar_features(results[ENCODER]["pillar_features"], pillars)
        inputs = self._model.feed(component, sample, results)
        if component.name == ENCODER:
            checks.input_features(inputs["input_features"], pillars)
        else:
            checks.spatial_features(inputs["spatial_features"], batch)
        return inputs

    def decode(self, sample: Sample, results: Mapping[str, Arrays]) -> Detections | list[Detections]:
        """The model's ``decode``, after a check of the head's maps. Raises InputError for maps that do not fit."""
        self._checks.outputs(results[BACKBONE_NECK_HEAD], batch_size(sample))
        return self._model.decode(sample, results)


def checked(model: Model) -> Model:
    """``model`` with its interfaces checked, or ``model`` itself where this project does not know them."""
    return CheckedModel(model) if isinstance(model, CenterPointModel) else model


def batch_size(sample: Sample) -> int:
    """Number of clouds in a sample."""
    return len(sample.arrays.get("counts", (0,)))
