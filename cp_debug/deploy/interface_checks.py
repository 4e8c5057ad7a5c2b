"""Checks between the parts of a hybrid CenterPoint: voxels, scatter and decoding on torch, components anywhere.

Each interface is checked for shape, dtype, device and contiguity, and for the two mistakes that give numbers without an
error: features that were not decorated as the encoder expects, and logits taken for probabilities or the reverse. The
pillars of two voxelizations are compared: which there are, in what order, and where they are cut off.
"""

from __future__ import annotations

import math
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
from cp_debug.reading import read_npz
from cp_debug.recipes.base import Arrays, Component, Model, Sample
from cp_debug.recipes.centerpoint.config import HEAD_CHANNELS, CenterPointConfig
from cp_debug.recipes.centerpoint.decode import Detections
from cp_debug.recipes.centerpoint.model import Voxels, voxelize
from cp_debug.recipes.centerpoint.recipe import BACKBONE_NECK_HEAD, ENCODER, CenterPointModel
from cp_debug.serialize import JsonForm

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


@dataclass(frozen=True)
class VoxelChange(JsonForm):
    """Changes from the reference's pillars to the test's, for one cloud."""

    derives = ("agrees",)
    reference: int
    """Pillars of the reference."""
    test: int
    lost: int
    """Cells that only the reference has."""
    gained: int
    reordered: int
    """Pillars of both sides whose place among these differs."""
    changed: int
    """Pillars of both sides that hold other points, or the same in another order."""
    max_abs: float
    """Largest difference of a point's value, infinite where NaN meets a number; 0 where no pillar of both sides
    changed."""
    dropped_points: tuple[int, int]
    """Points in range that each side left out, as its pillar was full or one too many."""

    @property
    def agrees(self) -> bool:
        """Whether both sides feed the encoder the same tensor."""
        return not (self.lost or self.gained or self.reordered or self.changed)

    def __str__(self) -> str:
        ours, theirs = self.dropped_points
        dropped = f"{ours} points dropped" if ours == theirs else f"{ours} and {theirs} points dropped"
        if self.agrees and not self.reference:
            return f"no pillar on either side: the cloud is empty, or none of its points is in range; {dropped}"
        if self.agrees:
            return f"{self.reference} pillars, equal in order and content; {dropped}"
        phrases = [f"{self.reference} pillars against {self.test}"]
        phrases += [f"{self.lost} lost"] * bool(self.lost) + [f"{self.gained} gained"] * bool(self.gained)
        phrases += [f"{self.reordered} in another order"] * bool(self.reordered)
        phrases += [f"{self.changed} with other points (up to {self.max_abs:.3g})"] * bool(self.changed)
        return f"{', '.join(phrases)}; {dropped}"


def compare_voxels(reference: Voxels, test: Voxels, points: np.ndarray, config: CenterPointConfig) -> VoxelChange:
    """Compare the pillars of one cloud ``points`` [M, C], as two implementations made them."""
    ours, theirs = _cells(reference, config), _cells(test, config)
    common, place_in_reference, place_in_test = np.intersect1d(ours, theirs, return_indices=True)
    a, b = reference.voxels.cpu().numpy()[place_in_reference], test.voxels.cpu().numpy()[place_in_test]
    slots = max(a.shape[1], b.shape[1])
    a, b = _padded(a, slots), _padded(b, slots)
    equal = (a == b) | (np.isnan(a) & np.isnan(b))
    apart = np.where(equal, 0, np.nan_to_num(np.abs(a - b), nan=np.inf))
    gaps = apart.reshape(len(common), math.prod(apart.shape[1:])).max(axis=1, initial=0)
    counts = reference.num_points.cpu().numpy()[place_in_reference] != test.num_points.cpu().numpy()[place_in_test]
    inside = _in_range(points, config)
    return VoxelChange(
        reference=len(ours),
        test=len(theirs),
        lost=len(ours) - len(common),
        gained=len(theirs) - len(common),
        reordered=int((np.argsort(np.argsort(place_in_reference)) != np.argsort(np.argsort(place_in_test))).sum()),
        changed=int(((gaps > 0) | counts).sum()),
        max_abs=float(gaps.max(initial=0)),
        dropped_points=(inside - int(reference.num_points.sum()), inside - int(test.num_points.sum())),
    )


def voxelize_on(points: np.ndarray, config: CenterPointConfig, device: str) -> Voxels:
    """Pillars of one cloud ``points`` [M, C], made on a device and brought back to the CPU.

    They are made on the CPU where torch has no GPU, as beside TensorRT in an environment of its own.
    """
    pillars = voxelize(torch.from_numpy(points).to(device if torch.cuda.is_available() else "cpu"), config)
    return Voxels(*(tensor.cpu() for tensor in pillars))


def read_voxels(path: Path, config: CenterPointConfig) -> Voxels:
    """Pillars that another implementation wrote into an ``.npz`` file.

    It holds ``voxels`` [N, P, C] float, ``num_points`` [N] integers, ``coors`` [N, 3 or 4] integers (z, y, x last).
    Raises InputError that names file and array.
    """
    archive = read_npz(path)
    if missing := [name for name in Voxels._fields if name not in archive]:
        raise InputError(f"{path}: expected an .npz file with {', '.join(Voxels._fields)}; it has no {missing[0]}")
    voxels, counts, coors = (archive[name] for name in Voxels._fields)
    for name, array, kinds in (("voxels", voxels, "f"), ("num_points", counts, "iu"), ("coors", coors, "iu")):
        if array.dtype.kind not in kinds or not array.dtype.isnative:
            raise InputError(f"{path}: {name} is {array.dtype}; expected {'floats' if kinds == 'f' else 'integers'}")
    columns = len(config.point_features)
    if voxels.ndim != 3 or voxels.shape[2] != columns:
        raise InputError(f"{path}: voxels has shape {list(voxels.shape)}; expected [N, P, {columns}]")
    if counts.shape != (len(voxels),) or coors.shape[0] != len(voxels) or coors.shape[1:] not in ((3,), (4,)):
        raise InputError(
            f"{path}: num_points {list(counts.shape)} and coors {list(coors.shape)} do not fit {len(voxels)} voxels; "
            "expected [N] and [N, 3 or 4]"
        )
    return Voxels(torch.from_numpy(voxels), torch.from_numpy(counts), torch.from_numpy(coors))


def _cells(voxels: Voxels, config: CenterPointConfig) -> np.ndarray:
    """[N] one number a cell."""
    nx, ny, _ = config.grid
    z, y, x = voxels.coors.cpu().numpy().astype(np.int64).T[-3:]
    return (z * ny + y) * nx + x


def _padded(voxels: np.ndarray, slots: int) -> np.ndarray:
    return np.pad(voxels, ((0, 0), (0, slots - voxels.shape[1]), (0, 0)))


def _in_range(points: np.ndarray, config: CenterPointConfig) -> int:
    low, high = (
        np.array(limits, np.float32) for limits in (config.point_cloud_range[:3], config.point_cloud_range[3:])
    )
    cells = np.floor((points[:, :3] - low) / np.array(config.voxel_size, np.float32))
    return int(((cells >= 0) & (cells < np.round((high - low) / np.array(config.voxel_size)))).all(axis=1).sum())
