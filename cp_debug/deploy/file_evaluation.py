"""Evaluation of exported files and engines with numpy alone: no torch, no module, a small description instead."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from cp_debug.backends.base import Program, RunRecord
from cp_debug.backends.ort_options import LEVELS
from cp_debug.backends.spec import BackendSpec
from cp_debug.backends.tensorrt.client import RunnerClient
from cp_debug.backends.tensorrt.engine_runs import EngineRuns
from cp_debug.deploy.documents import read_document
from cp_debug.deploy.engines import check_engines
from cp_debug.detection.evaluation import EvaluationOptions, EvaluationResult, score_backends
from cp_debug.detection.predictions import Predictions
from cp_debug.doing import doing
from cp_debug.errors import BackendUnavailable, InputError
from cp_debug.graph.graph import Graph
from cp_debug.graph.onnx_runtime import session_options, told
from cp_debug.optional import require
from cp_debug.recipes.abilities import Remarks
from cp_debug.recipes.centerpoint.clouds import cloud_remarks
from cp_debug.recipes.centerpoint.config import CenterPointConfig, get_config
from cp_debug.recipes.centerpoint.numpy_glue import boxes_of, canvas, decorated, gather_pillars, unturned
from cp_debug.recipes.data.base import DataOptions, Truth, iterate
from cp_debug.recipes.data.open_data import open_data

COMPONENTS = ("pts_voxel_encoder", "pts_backbone_neck_head")
_KEYS = ("model", "folder", "files", "engines", "glue", "rot_y_axis_reference")


@dataclass(frozen=True)
class FilesDescription:
    """Exported files of a CenterPoint, and the glue around them.

    ``files``: component → its ONNX file. ``config``: the glue's sizes. ``engines``: backend, such as ``trt-fp16``, →
    the folder of `cpdebug build` with its engines of these files; the name "" stands for every backend. ``turned``:
    whether the files count yaw from the y axis (``--rot-y-axis-reference``).
    """

    files: Mapping[str, Path]
    config: CenterPointConfig
    engines: Mapping[str, Path] = field(default_factory=dict)
    turned: bool = False
    source: str = field(default="", compare=False)


def read_description(path: Path) -> FilesDescription:
    """The description in a YAML, TOML or JSON file: ``model``, ``folder`` or ``files``, ``glue`` over the model's own
    settings.

    ``engines`` is a folder, or a mapping of backends to folders. Paths are relative to the file. Raises InputError,
    which names the file and the key.
    """
    from pydantic import TypeAdapter, ValidationError

    document = read_document(path, "description")
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
    turned = document.get("rot_y_axis_reference", False)
    if not isinstance(turned, bool):
        raise InputError(f"{path}: rot_y_axis_reference: {turned!r}; expected true or false")
    return FilesDescription(paths, config, _engine_folders(document.get("engines"), path), turned, str(path))


def _engine_folders(engines: Any, path: Path) -> dict[str, Path]:
    """Backend → folder. Raises InputError for what is neither a folder nor a mapping of backends to folders."""
    folders = engines if isinstance(engines, dict) else {"": engines} if engines is not None else {}
    for name, folder in folders.items():
        if not isinstance(name, str) or not isinstance(folder, str):
            raise InputError(f"{path}: engines: expected a folder, or backends like trt-fp16 with a folder each")
        if not (path.parent / folder).is_dir():
            raise InputError(
                f"{path}: engines: there is no folder {path.parent / folder}; expected what `cpdebug build` writes"
            )
    return {name: path.parent / folder for name, folder in folders.items()}


class Runs(Protocol):
    """The files of all components, ready to run on one backend."""

    record: RunRecord
    """Versions, device and settings."""

    def run(self, part: str, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Outputs of a component, in the file's order: name → array. Raises InputError for inputs that do not fit."""
        ...


class OnnxRuns:
    """ONNX files on ONNX Runtime: ``ort`` (as they are), ``ort-basic``, ``ort-all`` (optimized), on the CPU or CUDA.

    Raises MissingPackage without onnxruntime, BackendUnavailable where it has no CUDA, and InputError for a file that
    it refuses.
    """

    def __init__(self, description: FilesDescription, spec: BackendSpec) -> None:
        ort: Any = require("onnxruntime", "cpu")
        options = session_options()
        options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, LEVELS[spec.variant or "none"])
        cuda = (spec.device or "cpu").startswith("cuda")
        providers = ["CUDAExecutionProvider"] if cuda else ["CPUExecutionProvider"]
        if cuda and providers[0] not in ort.get_available_providers():
            raise BackendUnavailable(str(spec), "this onnxruntime has no CUDA", nearest=f"{spec.name}@cpu")
        self._files = description.files
        self._sessions: dict[str, Any] = {}
        for part, path in description.files.items():
            try:
                with doing(f"ONNX Runtime opened {path}"):
                    self._sessions[part] = ort.InferenceSession(str(path), options, providers=providers)
            except Exception as error:  # the library's own classes, of which it has a dozen
                raise InputError(f"{path}: ONNX Runtime refuses it: {told(error)[:300]}") from None
        self.record = RunRecord(str(spec), "fp32", spec.device or "cpu", False, {"onnxruntime": ort.__version__})

    def run(self, part: str, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Outputs of a component. Raises InputError for inputs that ONNX Runtime cannot run it on."""
        session = self._sessions[part]
        try:
            outputs = session.run(None, inputs)
        except Exception as error:
            raise InputError(f"{self._files[part]}: ONNX Runtime cannot run it: {told(error)[:300]}") from None
        return dict(zip((value.name for value in session.get_outputs()), outputs, strict=True))


class PrebuiltRuns:
    """Engines of ``cpdebug build`` on TensorRT, in the interpreter that has it.

    ``options``: ``python`` and ``on_event`` of ``RunnerClient``. Raises BackendUnavailable without TensorRT, and
    InputError for a description without engines of ``spec``, and for engines of other files or another machine.
    """

    def __init__(self, description: FilesDescription, spec: BackendSpec, **options: Any) -> None:
        folder = description.engines.get(spec.name, description.engines.get(""))
        if folder is None:
            raise InputError(
                f"{description.source}: names no engines of {spec}; expected engines: FOLDER, of `cpdebug build`"
            )
        device = spec.device or "cuda:0"
        index = int(device.partition(":")[2] or 0)
        client = RunnerClient(options.get("python"), spec=str(spec), on_event=options.get("on_event"))
        versions = client.versions(index)
        programs = [Program(part, Graph(path)) for part, path in description.files.items()]
        self._engines = check_engines(folder, programs, versions, spec.name)
        self._runs = {program.name: EngineRuns(client, program.graph, index) for program in programs}
        self._outputs = {program.name: [v.name for v in program.graph.outputs] for program in programs}
        precision = "fp16" if spec.variant == "best" else spec.variant
        settings = {"engines": {part: str(path) for part, path in self._engines.items()}}
        self.record = RunRecord(str(spec), precision, device, False, versions, settings)

    def run(self, part: str, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Outputs of a component. Raises InputError for inputs beyond the engine's profile."""
        outputs = self._runs[part].once(self._engines[part], inputs)
        return {name: outputs[name] for name in self._outputs[part]}


def open_runs(description: FilesDescription, spec: BackendSpec, **options: Any) -> Runs:
    """The description's files on one backend. Raises InputError for one that needs torch, else as the classes do."""
    if spec.family == "trt":
        return PrebuiltRuns(description, spec, **options)
    if spec.family != "ort" or (spec.variant or "none") not in LEVELS:
        raise InputError(
            f"--backends: {spec} needs torch; without it files run on ort, ort-basic and ort-all, engines on trt-*"
        )
    return OnnxRuns(description, spec)


class FileDetector:
    """The description's files on one backend, with the glue around them.

    ``options`` are for engines. Raises InputError for a backend that needs torch, for files whose inputs or outputs are
    others than the description's model has, and as ``OnnxRuns`` and ``PrebuiltRuns`` do.
    """

    def __init__(self, description: FilesDescription, spec: BackendSpec, **options: Any) -> None:
        _check(description)
        self.spec, self._description = spec, description
        self._runs = open_runs(description, spec, **options)
        self.record = self._runs.record
        self.strange = 0
        """Number of clouds for which an output held NaN or Inf."""

    def detect(self, points: np.ndarray) -> Any:
        """Boxes of one cloud [N, C] float32, as ``boxes_of`` gives them."""
        config = self._description.config
        pillars = gather_pillars(points, config)
        if len(pillars.coors):
            inputs = {"input_features": decorated(pillars, config)}
            features = self._runs.run(COMPONENTS[0], inputs)["pillar_features"]
        else:  # no engine runs on nothing
            features = np.zeros((0, 1, config.encoder_channels[-1]), np.float32)
        inputs = {"spatial_features": canvas(features, pillars.coors, config.grid)}
        outputs = self._runs.run(COMPONENTS[1], inputs)
        self.strange += not all(np.isfinite(array).all() for array in outputs.values())
        return boxes_of(unturned(outputs) if self._description.turned else outputs, config)


def _check(description: FilesDescription) -> None:
    """Raise InputError for files whose inputs or outputs are others than the description's model has."""
    config = description.config
    expected = {
        COMPONENTS[0]: (["input_features"], ["pillar_features"]),
        COMPONENTS[1]: (["spatial_features"], list(config.output_names)),
    }
    graphs = {part: Graph(path) for part, path in description.files.items()}
    for part, (inputs, outputs) in expected.items():
        names = [v.name for v in graphs[part].inputs], [v.name for v in graphs[part].outputs]
        if names != (inputs, outputs):
            path = description.files[part]
            raise InputError(f"{path}: it has {names[0]} → {names[1]}; {config.name} has {inputs} → {outputs}")
    points, canvas_shape = (graphs[part].inputs[0].shape or () for part in COMPONENTS)
    if points and isinstance(points[-1], int) and points[-1] != config.decorated_channels:
        raise InputError(
            f"{description.files[COMPONENTS[0]]}: takes {points[-1]} features a point; {config.name} decorates points "
            f"to {config.decorated_channels}"
        )
    nx, ny, _ = config.grid
    if len(canvas_shape) == 4 and any(
        isinstance(size, int) and size != made for size, made in zip(canvas_shape[2:], (ny, nx), strict=True)
    ):
        given = "×".join(map(str, canvas_shape[2:]))
        raise InputError(
            f"{description.files[COMPONENTS[1]]}: takes a canvas of {given}; the glue of {config.name} makes one of "
            f"{ny}×{nx} (voxel_size, point_cloud_range)"
        )


def evaluate_files(
    description: FilesDescription,
    specs: Sequence[BackendSpec],
    data: Path | None,
    count: int,
    options: EvaluationOptions,
    *,
    seed: int,
    read: DataOptions | None = None,
    engine_options: Mapping[str, Any] | None = None,
    on_step: Callable[[str, int, int], None] = lambda text, done, total: None,
) -> EvaluationResult:
    """Score files on a data set, each sample read once; the first backend is the reference.

    ``engine_options``: of ``PrebuiltRuns``.
    Raises InputError for data without ground truth, and as ``FileDetector`` does.
    """
    config = description.config
    detectors = [FileDetector(description, spec, **(engine_options or {})) for spec in specs]
    remarks = Remarks()
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
        remarks.add(cloud_remarks(sample.arrays["points"], sample.source, config))
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
    strange = {str(detector.spec): detector.strange for detector in detectors}
    scores, notes = score_backends(predictions, truths, config.class_names, options, strange, on_step)
    return EvaluationResult(
        model=f"{config.name} ({', '.join(path.name for path in description.files.values())})",
        data=opened.name,
        samples=names,
        options=options,
        backends=scores,
        predictions={spec: found for spec, (_, found) in predictions.items()},
        notes=[*opened.notes, *remarks.sentences, *notes],
        seconds={"evaluate": time.perf_counter() - started},
    )
