"""Evaluation of exported files with ONNX Runtime and numpy alone: no torch, no module, a small description instead."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from cp_debug.backends.base import RunRecord
from cp_debug.backends.ort_options import LEVELS
from cp_debug.backends.spec import BackendSpec
from cp_debug.detection.evaluation import EvaluationOptions, EvaluationResult, score_backends
from cp_debug.detection.predictions import Predictions
from cp_debug.errors import InputError
from cp_debug.graph.onnx_runtime import session_options
from cp_debug.optional import require
from cp_debug.reading import plain, read_text
from cp_debug.recipes.centerpoint.config import CenterPointConfig, get_config
from cp_debug.recipes.centerpoint.numpy_glue import boxes_of, canvas, decorated, gather_pillars, unturned
from cp_debug.recipes.data.base import DataOptions, Truth, iterate
from cp_debug.recipes.data.open_data import open_data

COMPONENTS = ("pts_voxel_encoder", "pts_backbone_neck_head")
SUFFIXES = (".yaml", ".yml")
_KEYS = ("model", "folder", "files", "glue", "rot_y_axis_reference")


@dataclass(frozen=True)
class FilesDescription:
    """Exported files of a CenterPoint, and the glue around them.

    ``files``: component → its ONNX file. ``config``: the glue's sizes. ``turned``: whether the files count yaw from the
    y axis (``--rot-y-axis-reference``).
    """

    files: Mapping[str, Path]
    config: CenterPointConfig
    turned: bool = False
    source: str = field(default="", compare=False)


def read_description(path: Path) -> FilesDescription:
    """The description in a YAML file: ``model``, ``folder`` or ``files``, ``glue`` over the model's own settings.

    Paths are relative to the file. Raises InputError, which names the file and the key.
    """
    import yaml
    from pydantic import TypeAdapter, ValidationError

    try:
        document = plain(yaml.safe_load(read_text(path, what="description")), str(path))
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise InputError(f"{path}: not YAML that can be read ({' '.join(str(error).split())[:200]})") from None
    if not isinstance(document, dict):
        raise InputError(f"{path}: expected a mapping with the keys {', '.join(_KEYS)}")
    if unknown := [key for key in document if key not in _KEYS]:
        raise InputError(f"{path}: unknown key {unknown[0]!r}; expected {', '.join(_KEYS)}")
    name, glue, files = document.get("model"), document.get("glue") or {}, document.get("files") or {}
    if not isinstance(name, str) or not isinstance(glue, dict) or not isinstance(files, dict):
        raise InputError(f"{path}: expected model as the name of a CenterPoint, glue and files as mappings")
    base = get_config(name.removeprefix("centerpoint:"))
    if wrong := [key for key in glue if key not in asdict(base)]:
        raise InputError(f"{path}: glue.{wrong[0]}: there is no such setting; expected {', '.join(asdict(base))}")
    if wrong := [key for key in files if key not in COMPONENTS]:
        raise InputError(f"{path}: files.{wrong[0]}: there is no such component; expected {' and '.join(COMPONENTS)}")
    try:
        config = TypeAdapter(CenterPointConfig).validate_python({**asdict(base), **glue})
    except ValidationError as error:
        first = error.errors()[0]
        raise InputError(f"{path}: glue.{'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    folder = path.parent / str(document.get("folder") or ".")
    paths = {part: folder / str(files.get(part, f"{part}.onnx")) for part in COMPONENTS}
    for part, file in paths.items():
        if not file.is_file():
            raise InputError(f"{path}: {part}: there is no {file}; expected what `cpdebug export` writes")
    return FilesDescription(paths, config, document.get("rot_y_axis_reference") is True, str(path))


class FileDetector:
    """The files on one backend: ``ort`` (as they are) or ``ort-basic``, ``ort-all`` (optimized), on the CPU or CUDA.

    Raises MissingPackage without onnxruntime, InputError for another backend, and for files whose inputs or outputs
    are others than the description's model has.
    """

    def __init__(self, description: FilesDescription, spec: BackendSpec) -> None:
        if spec.family != "ort" or (spec.variant or "none") not in LEVELS:
            raise InputError(f"--backends: {spec} needs torch; without it files run on ort, ort-basic and ort-all")
        ort: Any = require("onnxruntime", "cpu")
        self.spec, self._description = spec, description
        options = session_options()
        options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, LEVELS[spec.variant or "none"])
        cuda = (spec.device or "cpu").startswith("cuda")
        providers = ["CUDAExecutionProvider"] if cuda else ["CPUExecutionProvider"]
        if cuda and providers[0] not in ort.get_available_providers():
            raise InputError(f"--backends: {spec}: this onnxruntime has no CUDA; expected {spec.name}@cpu")
        self._sessions: dict[str, Any] = {}
        for part, path in description.files.items():
            try:
                self._sessions[part] = ort.InferenceSession(str(path), options, providers=providers)
            except Exception as error:  # the library's own classes, of which it has a dozen
                raise InputError(f"{path}: ONNX Runtime refuses it: {' '.join(str(error).split())[:300]}") from None
        self._check()
        self.record = RunRecord(str(spec), "fp32", spec.device or "cpu", False, {"onnxruntime": ort.__version__})

    def _check(self) -> None:
        config = self._description.config
        expected = {
            COMPONENTS[0]: (["input_features"], ["pillar_features"]),
            COMPONENTS[1]: (["spatial_features"], list(config.output_names)),
        }
        for part, (inputs, outputs) in expected.items():
            session, path = self._sessions[part], self._description.files[part]
            names = [v.name for v in session.get_inputs()], [v.name for v in session.get_outputs()]
            if names != (inputs, outputs):
                raise InputError(f"{path}: it has {names[0]} → {names[1]}; {config.name} has {inputs} → {outputs}")
        features = self._sessions[COMPONENTS[0]].get_inputs()[0].shape[-1]
        if isinstance(features, int) and features != config.decorated_channels:
            raise InputError(
                f"{self._description.files[COMPONENTS[0]]}: takes {features} features a point; {config.name} decorates "
                f"points to {config.decorated_channels}"
            )

    def detect(self, points: np.ndarray) -> Any:
        """Boxes of one cloud [N, C] float32, as ``boxes_of`` gives them."""
        config = self._description.config
        pillars = gather_pillars(points, config)
        encoder, dense = (self._sessions[part] for part in COMPONENTS)
        (features,) = encoder.run(None, {"input_features": decorated(pillars, config)})
        maps = dense.run(None, {"spatial_features": canvas(features, pillars.coors, config.grid)})
        outputs = dict(zip(config.output_names, maps, strict=True))
        return boxes_of(unturned(outputs) if self._description.turned else outputs, config)


def evaluate_files(
    description: FilesDescription,
    specs: Sequence[BackendSpec],
    data: Path | None,
    count: int,
    options: EvaluationOptions,
    *,
    seed: int = 0,
    read: DataOptions | None = None,
    on_step: Callable[[str, int, int], None] = lambda text, done, total: None,
) -> EvaluationResult:
    """Score files on a data set, each sample read once; the first backend is the reference.

    Raises InputError for data without ground truth, and as ``FileDetector`` does.
    """
    config = description.config
    detectors = [FileDetector(description, spec) for spec in specs]
    opened = open_data(
        data,
        features=config.point_features,
        class_names=config.class_names,
        count=count,
        first=seed,
        options=read or DataOptions(),
    )
    names: list[str] = []
    truths: list[Truth] = []
    detected: list[list[Any]] = [[] for _ in detectors]
    started = time.perf_counter()
    for index, sample in enumerate(iterate(opened)):
        if sample.truth is None:
            raise InputError(f"{sample.source}: has no ground truth; expected an info file (.pkl)")
        names.append(sample.source)
        truths.append(sample.truth)
        for number, detector in enumerate(detectors):
            on_step(str(detector.spec), index * len(detectors) + number, len(opened) * len(detectors))
            detected[number].append(detector.detect(sample.arrays["points"]))
    x0, y0, _, x1, y1, _ = config.point_cloud_range
    options = options if options.region else replace(options, region=(x0, y0, x1, y1))
    predictions = {
        str(detector.spec): (detector.record, Predictions.gather(boxes))
        for detector, boxes in zip(detectors, detected, strict=True)
    }
    scores, notes = score_backends(predictions, truths, config.class_names, options)
    return EvaluationResult(
        model=f"{config.name} ({', '.join(path.name for path in description.files.values())})",
        data=opened.name,
        samples=names,
        options=options,
        backends=scores,
        predictions={spec: found for spec, (_, found) in predictions.items()},
        notes=[*opened.notes, *notes],
        seconds={"evaluate": time.perf_counter() - started},
    )
