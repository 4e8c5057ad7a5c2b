"""CenterPoint as the debugger sees it: two components, voxelization before the first and scatter between them.

It remarks on clouds that are empty, out of the model's range, or hold NaN and Inf, and takes AWML's
``--rot-y-axis-reference``: yaw counted from the y axis, as Autoware's node reads it. A checkpoint of another one is
refused with the sizes that differ, and the recipe that has them.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cp_debug.errors import InputError
from cp_debug.recipes.base import Arrays, Component, Sample, Stage
from cp_debug.recipes.centerpoint.config import CONFIGS, OUTPUT_ORDER, CenterPointConfig, get_config
from cp_debug.recipes.centerpoint.decode import Detections, decode
from cp_debug.recipes.centerpoint.model import BackboneNeckHead, Voxels, build_model, decorate, scatter, voxelize_batch
from cp_debug.recipes.checkpoint import load_state, read_checkpoint
from cp_debug.recipes.data.base import DataOptions, DataSet, iterate
from cp_debug.recipes.data.open_data import DEFAULT_OPTIONS, count_data, open_data

LARGEST_CONFIG = 1 << 20
"""Characters of a configuration in a checkpoint that are looked at."""
_GRID = ("voxel_size", "point_cloud_range")


def load_weights(network: nn.Module, path: Path, config: CenterPointConfig) -> None:
    """Fill ``network``, built from ``config``, from a checkpoint.

    Raises InputError as ``load_checkpoint`` does; for one of another CenterPoint it names the sizes that differ, and
    the recipe that has them. Weights know no voxel size, so one that mmengine wrote is refused, too, where its own
    configuration has another grid.
    """
    state, meta = read_checkpoint(path)
    trained = _grid_of(meta)
    wrong = {key: value for key, value in trained.items() if not np.allclose(value, getattr(config, key))}
    if wrong:
        differing = ", ".join(f"{key} {value} (it has {list(getattr(config, key))})" for key, value in wrong.items())
        other = f"trained on another grid than that of centerpoint:{config.name}: {differing}"
        raise InputError(f"{path}: {other}; {_offer(state, trained)}")
    try:
        load_state(network, state, str(path))
    except InputError as error:
        ours, theirs = _sizes_of(config), _sizes_in(state)
        differing = ", ".join(
            f"{key} {value} (it has {ours[key]})" for key, value in theirs.items() if value != ours[key]
        )
        if not differing:
            raise
        other = f"it belongs to another CenterPoint than centerpoint:{config.name}: {differing}"
        raise InputError(f"{error}\n{other}; {_offer(state, trained)}") from None


def _offer(state: Mapping[str, Tensor], grid: Mapping[str, list[float]]) -> str:
    """The recipes that have a checkpoint's sizes, in words."""
    sizes = _sizes_in(state)
    fitting = [
        f"centerpoint:{name}"
        for name, config in CONFIGS.items()
        if sizes
        and all(_sizes_of(config)[key] == value for key, value in sizes.items())
        and all(np.allclose(value, getattr(config, key)) for key, value in grid.items())
    ]
    if fitting:
        known = "" if grid else ", judging by the weights, which say nothing about voxel size and range"
        return f"expected {' or '.join(fitting)}{known}"
    return "no recipe has these; expected mmdet3d:CONFIG.py with its own configuration"


def _sizes_of(config: CenterPointConfig) -> dict[str, Any]:
    return {
        "features a point": len(config.point_features),
        "encoder channels": list(config.encoder_channels),
        "backbone channels": list(config.backbone_channels),
        "head channels": config.head_channels,
        "classes of each task": [len(task) for task in config.tasks],
    }


def _sizes_in(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Sizes that shapes tell, by the names of ``_sizes_of``; none for the weights of another kind of network."""
    encoder = _listed(state, "pts_voxel_encoder.pfn_layers.{}.linear.weight", 2)
    backbone = _listed(state, "pts_backbone.blocks.{}.0.weight", 4)
    tasks = _listed(state, "pts_bbox_head.task_heads.{}.heatmap.1.weight", 4)
    shared = _listed(state, "pts_bbox_head.shared_conv.conv.weight", 4)[:1]
    sizes: dict[str, Any] = {}
    if encoder:
        sizes["features a point"] = encoder[0][1] - 6
        widths = [shape[0] for shape in encoder]
        sizes["encoder channels"] = [*(2 * width for width in widths[:-1]), widths[-1]]
    if backbone:
        sizes["backbone channels"] = [shape[0] for shape in backbone]
    if shared:
        sizes["head channels"] = shared[0][0]
    if tasks:
        sizes["classes of each task"] = [shape[0] for shape in tasks]
    return sizes


def _listed(state: Mapping[str, Tensor], key: str, ndim: int) -> list[list[int]]:
    """Shapes of the weights that are numbered at ``{}`` in ``key``, from 0 on."""
    shapes: list[list[int]] = []
    while (
        (tensor := state.get(key.format(len(shapes)))) is not None and tensor.ndim == ndim and len(shapes) < len(state)
    ):
        shapes.append(list(tensor.shape))
    return shapes


def _grid_of(meta: Any) -> dict[str, list[float]]:
    """Voxel size and range from the configuration that mmengine keeps as text in ``meta``; empty without one."""
    text = meta.get("cfg") if isinstance(meta, dict) else None
    if not isinstance(text, str) or len(text) > LARGEST_CONFIG:
        return {}
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return {}
    found: dict[str, list[float]] = {}
    for layer in (word.value for node in ast.walk(tree) if isinstance(node, ast.Call) for word in node.keywords
                  if word.arg == "voxel_layer"):  # fmt: skip
        for word in layer.keywords if isinstance(layer, ast.Call) else ():
            if word.arg in _GRID:
                try:
                    value = np.asarray(ast.literal_eval(word.value), np.float64)
                except (ValueError, TypeError, SyntaxError, RecursionError):
                    continue
                if value.shape == (3 if word.arg == "voxel_size" else 6,):
                    found[word.arg] = value.tolist()
    return found


ENCODER, BACKBONE_NECK_HEAD = "pts_voxel_encoder", "pts_backbone_neck_head"
WEIGHTS = Path(__file__).parent / "weights"


class CenterPointModel:
    """A CenterPoint with weights: from ``checkpoint``, else those shipped with it, else random ones from ``seed``.

    ``config`` replaces the configuration that ``name`` stands for. Raises InputError for an unknown name, and a
    checkpoint that does not fit.
    """

    def __init__(
        self, name: str, *, checkpoint: Path | None = None, seed: int = 0, config: CenterPointConfig | None = None
    ) -> None:
        self.config = config or get_config(name)
        self.name = f"centerpoint:{name}"
        self.network = build_model(self.config, seed=seed).requires_grad_(False)
        shipped = WEIGHTS / f"{name}.safetensors"
        source = checkpoint or (shipped if shipped.is_file() else None)
        if source is not None:
            load_weights(self.network, source, self.config)
        self._last: tuple[Sample, Voxels] | None = None
        self._turned = False
        self.weights = f"untrained, random seed {seed}" if source is None else source.name
        self.notes = [random_weights(seed)] if source is None else []
        """Remarks that a reader of the results must know."""
        self.components: Sequence[Component] = (
            Component(
                name=ENCODER,
                input_names=("input_features",),
                output_names=("pillar_features",),
                module=self.network.pts_voxel_encoder,
                prefix="pts_voxel_encoder",
                dynamic_axes={"input_features": {0: "num_voxels"}},
                deployed_axes={"input_features": {0: "num_voxels", 1: "num_max_points"}},
                stages=(Stage("pillar encoder", "pts_voxel_encoder"),),
            ),
            Component(
                name=BACKBONE_NECK_HEAD,
                input_names=("spatial_features",),
                output_names=self.config.output_names,
                module=BackboneNeckHead(self.network).eval(),
                deployed_axes={"spatial_features": {0: "batch_size", 2: "H", 3: "W"}},
                stages=_stages(self.config),
            ),
        )

    def use_rot_y_axis_reference(self) -> None:
        """Switch ``dim`` and ``rot`` to AWML's ``--rot-y-axis-reference``, for export and ``decode``."""
        self._turned = True
        self.components[1].module = TurnedBackboneNeckHead(self.network).eval()

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes, in label order."""
        return self.config.class_names

    @property
    def region(self) -> tuple[float, float, float, float]:
        """The region that the model sees, from above: x0, y0, x1, y1 in m."""
        x0, y0, _, x1, y1, _ = self.config.point_cloud_range
        return x0, y0, x1, y1

    def samples(self, count: int, seed: int, inputs: Path | None) -> Iterator[Sample]:
        """At most ``count`` point clouds: ``points`` [N, C] float32; see ``data``."""
        return iterate(self.data(inputs, count, seed))

    def sample_count(self, inputs: Path) -> int:
        """Number of samples in an info file, a point file or a folder of them. Raises InputError for unusable files."""
        return count_data(inputs)

    def data(self, inputs: Path | None, count: int, seed: int = 0, options: DataOptions = DEFAULT_OPTIONS) -> DataSet:
        """A data set: an info file (``.pkl``), point files, or held-out synthetic scenes from ``seed`` on.

        ``inputs`` is the info file, one point file, a folder of them, or None. A sample's ``truth`` is a ``Truth``
        where the classes are known. Raises InputError for unusable files.
        """
        config = self.config
        return open_data(
            inputs,
            features=config.point_features,
            class_names=config.class_names,
            count=count,
            first=seed,
            options=options,
        )

    def remarks(self, sample: Sample) -> list[str]:
        """Whether a cloud is empty, out of the model's range, or holds NaN or Inf."""
        return cloud_remarks(sample.arrays["points"], sample.source, self.config)

    def batch(self, samples: Sequence[Sample]) -> Sample:
        """Join several clouds into one sample.

        ``points`` [ΣN, C] holds them one after the other, ``counts`` [B] the points of each.
        """
        clouds = [sample.arrays["points"] for sample in samples]
        arrays = {"points": np.concatenate(clouds), "counts": np.array([len(cloud) for cloud in clouds])}
        return Sample(arrays, " + ".join(sample.source for sample in samples))

    def feed(self, component: Component, sample: Sample, results: Mapping[str, Arrays]) -> dict[str, np.ndarray]:
        """``input_features`` from the sample's points; ``spatial_features`` from the results, of their dtype."""
        pillars = self.voxelize(sample)
        if component.name == ENCODER:
            return {"input_features": decorate(pillars, self.config).numpy()}
        pillar_features = _tensor(results[ENCODER]["pillar_features"])
        canvas = scatter(pillar_features, pillars.coors, self.config.grid, len(_counts(sample)))
        return {"spatial_features": canvas.numpy()}

    def decode(self, sample: Sample, results: Mapping[str, Arrays]) -> Detections | list[Detections]:
        """Boxes after NMS: one ``Detections``, or a list of them, one a cloud, for a batch."""
        outputs = {name: _tensor(array) for name, array in results[BACKBONE_NECK_HEAD].items()}
        detections = decode(turn(outputs) if self._turned else outputs, self.config)
        return detections if "counts" in sample.arrays else detections[0]

    def voxelize(self, sample: Sample) -> Voxels:
        """Pillars of a sample; the last one's are kept, as every backend and both components ask for them."""
        if self._last is None or self._last[0] is not sample:
            points = torch.from_numpy(sample.arrays["points"])
            self._last = sample, voxelize_batch(points.split(_counts(sample)), self.config)
        return self._last[1]


def random_weights(seed: int) -> str:
    """Note on a model that nobody trained."""
    return f"the weights are random (seed {seed}): no checkpoint was given, so boxes and figures mean nothing"


def _counts(sample: Sample) -> list[int]:
    """Numbers of points of each cloud in a sample."""
    counts = sample.arrays.get("counts")
    return [len(sample.arrays["points"])] if counts is None else counts.tolist()


def _stages(config: CenterPointConfig) -> tuple[Stage, ...]:
    """Stages: each backbone block, the neck, the shared convolution, and each output."""
    blocks = range(len(config.backbone_channels))
    heads = [f"task_heads.{task}.{head}" for task in range(len(config.tasks)) for head in OUTPUT_ORDER]
    return (
        *(Stage(f"backbone block {index}", f"pts_backbone.blocks.{index}") for index in blocks),
        Stage("neck", "pts_neck"),
        Stage("shared conv", "pts_bbox_head.shared_conv"),
        *(Stage(name, f"pts_bbox_head.{path}") for name, path in zip(config.output_names, heads, strict=True)),
    )


def _tensor(array: np.ndarray) -> Tensor:
    """The array as torch takes it; types that numpy does not know (bfloat16) are widened to float32."""
    return torch.from_numpy(array if array.dtype.kind == "f" else array.astype(np.float32))


def cloud_remarks(points: np.ndarray, source: str, config: CenterPointConfig) -> list[str]:
    """Sentences about a cloud ``points`` [N, C] float32 that a reader must know; none for a sound one."""
    limits = np.array(config.point_cloud_range, np.float32)
    if not len(points):
        return [f"{source}: the cloud is empty, so the model is compared without points"]
    lines = []
    inside = ((points[:, :3] >= limits[:3]) & (points[:, :3] < limits[3:])).all(axis=1)
    if not inside.any():
        where = ", ".join(f"{low:g} to {high:g}" for low, high in zip(limits[:3], limits[3:], strict=True))
        lines.append(f"{source}: none of the {len(points)} points is in the model's range (x, y, z: {where})")
    if strange := int((~np.isfinite(points).all(axis=1)).sum()):
        lines.append(f"{source}: {strange} of {len(points)} points hold NaN or Inf")
    return lines


_ORDER = {"dim": [1, 0, 2], "rot": [1, 0]}


def turn(maps: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Head maps [B, channels, H, W] in the other convention; doing it twice changes nothing.

    (length, width, height) becomes (width, length, height), (sin, cos) becomes (−cos, −sin).
    """
    turned = dict(maps)
    for name, tensor in maps.items():
        head = name.rpartition(".")[2]
        if head in _ORDER:
            reordered = tensor[:, _ORDER[head]]
            turned[name] = -reordered if head == "rot" else reordered
    return turned


class TurnedBackboneNeckHead(BackboneNeckHead):
    """``BackboneNeckHead`` with yaw counted from the y axis in its outputs."""

    def forward(self, spatial_features: Tensor) -> tuple[Tensor, ...]:
        """``spatial_features`` [B, C, ny, nx] to the turned maps, in the order of ``config.output_names``."""
        maps = super().forward(spatial_features)
        names = self.pts_bbox_head.output_names
        return tuple(turn(dict(zip(names, maps, strict=True))).values())
