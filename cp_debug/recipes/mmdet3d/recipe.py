"""``mmdet3d:CONFIG``: a detector of the real mmdet3d: a CenterPoint whole, any other from the first dense tensor on."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import fx, nn

from cp_debug.errors import InputError
from cp_debug.files import resolved
from cp_debug.graph.graph import ValueInfo
from cp_debug.recipes.base import Arrays, Component, Model, Sample, Stage, Unglued
from cp_debug.recipes.centerpoint.config import CenterPointConfig
from cp_debug.recipes.centerpoint.decode import decode
from cp_debug.recipes.centerpoint.model import decorate, scatter, voxelize
from cp_debug.recipes.centerpoint.recipe import CenterPointModel, random_weights
from cp_debug.recipes.checkpoint import check_fit, read_state_dict
from cp_debug.recipes.data.open_data import count_data, open_data
from cp_debug.recipes.input_files import count_samples, file_samples
from cp_debug.recipes.mmdet3d.client import COLUMNS, DetectorClient, ProgramFailed, Unlike, center_point_config
from cp_debug.safe_text import did_you_mean

IMAGE, CANVAS = (256, 448), (128, 128)
"""Height and width of made-up tensors: small, and divisible by the strides of the usual backbones."""
PROGRAM_TOLERANCE = 1e-5
"""Largest difference between a module and its exported program, relative to the output's largest element."""


class DetectorLayers(Unglued):
    """A detector's branches (backbone, neck and head behind one tensor each) as components.

    Boxes need the code of the detector, so that nothing is decoded. A branch is fed what it makes of a cloud; one that
    no cloud reaches (behind images, or behind operations that need CUDA) seeded noise. ``.npz`` files give the tensors
    themselves. Modules in another process come as exported programs of torch, checked for equal outputs. What torch
    cannot export (custom operators) is cut off, from the end. Raises InputError when there is no branch, or one of
    which nothing can be handed over.
    """

    def __init__(self, name: str, client: DetectorClient, about: Mapping[str, Any], seed: int) -> None:
        self.name = name
        self._client, self._torch = client, about["versions"]["torch"]
        self._columns = tuple(COLUMNS[column] for column in about["columns"] or range(4))
        cloud = open_data(None, features=self._columns, class_names=(), count=1, first=seed).sample(0)
        result, examples = client.call("inputs", cloud.arrays)
        self._reason = result["reason"]
        channels = {branch: c for branch, c in result["channels"].items() if branch not in examples and c}
        self._noise = {branch: (1, c, *(IMAGE if c == 3 else CANVAS)) for branch, c in channels.items()}
        self.notes: list[str] = []
        """Remarks that a reader of the results must know."""
        if left_out := about.get("left_out"):
            self.notes.append(f"left out, because it refines the output of the head: {', '.join(left_out)}")
        self.components: Sequence[Component] = [
            self._component(branch, array) for branch, array in {**examples, **self._made_up(seed)}.items()
        ]
        if not self.components:
            raise InputError(f"{name}: has no backbone that takes a dense tensor: {self._reason}")
        self._expected = [
            ValueInfo(_input(branch), np.dtype(np.float32), (None,) * 4) for branch in {**examples, **self._noise}
        ]

    def _component(self, branch: str, features: np.ndarray) -> Component:
        with tempfile.TemporaryDirectory(prefix="cpdebug-") as folder:
            file = Path(folder) / "branch.pt2"
            try:
                exported = self._client.call("program", {"features": features}, branch=branch, file=str(file)).result
                module = self._client.module(branch) or _read_program(file)
            except ProgramFailed as error:
                raise InputError(
                    f"{self.name}: torch {self._torch} in {self._client.where} cannot export {branch} for torch "
                    f"{torch.__version__} here: {error}"
                ) from error
        self.notes += [f"without {part}, which torch cannot export: {why}" for part, why in exported["dropped"].items()]
        result, outputs = self._client.call("run", {"features": features}, branch=branch)
        self._check(branch, module, features, [outputs[name] for name in result["outputs"]])
        return Component(
            name=exported["name"],
            input_names=(_input(branch),),
            output_names=result["outputs"],
            module=module,
            stages=[Stage(child, child) for child, _ in module.named_children()],
        )

    def _check(self, branch: str, module: nn.Module, features: np.ndarray, expected: Sequence[np.ndarray]) -> None:
        """Raise InputError where the module computes something else than the detector did."""
        with torch.no_grad():
            outputs = module(torch.from_numpy(features))
        for ours, real in zip(outputs, expected, strict=True):
            difference = np.abs(ours.numpy() - real).max(initial=0)
            if not difference <= PROGRAM_TOLERANCE * np.abs(real).max(initial=0):
                raise InputError(f"{self.name}: the exported program of {branch} differs from it by {difference:.3g}")

    def sample_count(self, inputs: Path) -> int:
        """Number of samples in these files. Raises InputError for unusable files."""
        return count_samples(inputs, self._expected) if _holds_tensors(inputs) else count_data(inputs)

    def samples(self, count: int, seed: int, inputs: Path | None) -> Iterator[Sample]:
        """At most ``count`` samples, noise included for branches that no cloud reaches.

        ``inputs``: ``.npz`` files of the branches' tensors, point files, or None for synthetic scenes from ``seed`` on.
        Raises InputError for unusable files.
        """
        if inputs is not None and _holds_tensors(inputs):
            yield from file_samples(inputs, self._expected, count)
            return
        clouds = open_data(inputs, features=self._columns, class_names=(), count=count, first=seed)
        for index in range(len(clouds)):
            cloud = clouds.sample(index)
            arrays = self._client.call("inputs", cloud.arrays).arrays
            noise = self._made_up([seed, index])
            noise_note = f"; noise for {', '.join(noise)}, which no cloud reaches ({self._reason})" if noise else ""
            yield Sample(
                {_input(branch): array for branch, array in {**arrays, **noise}.items()}, cloud.source + noise_note
            )

    def _made_up(self, seed: int | Sequence[int]) -> dict[str, np.ndarray]:
        rng = np.random.default_rng(seed)
        return {branch: rng.standard_normal(shape, np.float32) for branch, shape in self._noise.items()}

    def feed(self, component: Component, sample: Sample, results: Mapping[str, Arrays]) -> dict[str, np.ndarray]:
        """The tensor of the component's branch, by the input's name."""
        (name,) = component.input_names
        return {name: sample.arrays[name]}


def _read_program(file: Path) -> nn.Module:
    """An exported program as a module with the paths of the one that it was made from. Raises ProgramFailed."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = torch.export.unflatten(torch.export.load(file))
    except Exception as error:  # another version's format fails in many ways
        raise ProgramFailed(f"{type(error).__name__}: {error}") from error
    # Without the root's checks of its inputs, which no exporter can trace.
    return fx.GraphModule(tree, tree.graph).eval()


def _input(branch: str) -> str:
    """Name of a branch's input: unique among the branches, and not that of an output."""
    return f"{branch}_input"


def _holds_tensors(inputs: Path) -> bool:
    return inputs.suffix == ".npz" or (inputs.is_dir() and any(inputs.glob("*.npz")))


PREFIX = "mmdet3d:"
STAGE_TOLERANCE = 1e-4
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
            if not difference <= STAGE_TOLERANCE * float(np.abs(real[stage]).max(initial=0)):
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
