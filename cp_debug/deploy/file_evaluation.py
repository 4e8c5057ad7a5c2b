"""Exported files and engines of a CenterPoint, told by a small description and scored as the model itself is."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from cp_debug.backends.base import Backend, Program
from cp_debug.backends.registry import create
from cp_debug.backends.spec import BackendSpec
from cp_debug.deploy.documents import read_document
from cp_debug.deploy.engines import check_engines
from cp_debug.deploy.exporting import load_exported
from cp_debug.deploy.schema import DescribedFiles, validate
from cp_debug.detection.evaluate import evaluate
from cp_debug.detection.evaluation import EvaluationOptions, EvaluationResult
from cp_debug.display import OnStep
from cp_debug.errors import InputError
from cp_debug.reading import typed
from cp_debug.recipes.centerpoint.config import CenterPointConfig, get_config
from cp_debug.recipes.centerpoint.recipe import BACKBONE_NECK_HEAD, ENCODER, CenterPointModel
from cp_debug.recipes.data.base import DataOptions

COMPONENTS = (ENCODER, BACKBONE_NECK_HEAD)


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
    document = read_document(path, "description")
    if isinstance(document, dict):  # a key without a value is as good as none
        document = {key: value for key, value in document.items() if value is not None}
        if isinstance(engines := document.get("engines"), str):
            document["engines"] = {"": engines}
    written = validate(DescribedFiles, document, path)
    base = get_config(written.model.removeprefix("centerpoint:"))
    if wrong := [key for key in written.glue if key not in asdict(base)]:
        raise InputError(f"{path}: glue.{wrong[0]}: there is no such setting; expected {', '.join(asdict(base))}")
    config: CenterPointConfig = typed(CenterPointConfig, {**asdict(base), **written.glue}, f"{path}: glue")
    names = {part: f"{part}.onnx" for part in COMPONENTS} | {**written.files}
    files = {part: path.parent / written.folder / name for part, name in names.items()}
    folders = {backend: path.parent / folder for backend, folder in written.engines.items()}
    if missing := [folder for folder in folders.values() if not folder.is_dir()]:
        raise InputError(f"{path}: engines: there is no folder {missing[0]}; expected what `cpdebug build` writes")
    return FilesDescription(files, config, folders, written.rot_y_axis_reference, str(path))


def evaluate_files(
    description: FilesDescription,
    specs: Sequence[BackendSpec],
    data: Path | None,
    count: int,
    options: EvaluationOptions,
    *,
    seed: int,
    read: DataOptions | None = None,
    python: str | None = None,
    on_event: Callable[[Mapping[str, Any]], None] | None = None,
    on_step: OnStep = lambda text, done, total: None,
) -> EvaluationResult:
    """Score files on a data set; the first backend is the reference.

    ``python`` and ``on_event``: of ``RunnerClient``, for engines. Raises InputError for files that are missing or have
    other inputs and outputs than the model, and for data without ground truth.
    """
    config = description.config
    names = ", ".join(path.name for path in description.files.values())
    model = CenterPointModel(f"{config.name} ({names})", config=config)  # its glue: the files have the weights
    if description.turned:
        model.use_rot_y_axis_reference()
    programs = load_exported(model, Path(), {part: str(path) for part, path in description.files.items()})
    programs = [replace(program, module=None, alignment=None) for program in programs]
    backends = [_backend(description, spec, programs, python, on_event) for spec in specs]
    opened = model.data(data, count, seed, read or DataOptions())
    return evaluate(model, backends, opened, options, programs=programs, on_step=on_step)


def _backend(
    description: FilesDescription, spec: BackendSpec, programs: Sequence[Program], python: str | None, on_event: Any
) -> Backend:
    """A backend, with the description's engines where it is TensorRT.

    Raises InputError for a description without engines of ``spec``, and for engines of other files or another machine.
    """
    if spec.family != "trt":
        return create(spec)
    folder = description.engines.get(spec.name, description.engines.get(""))
    if folder is None:
        raise InputError(
            f"{description.source}: names no engines of {spec}; expected engines: FOLDER, of `cpdebug build`"
        )
    from cp_debug.backends.tensorrt.backend import PrebuiltBackend

    builder: Any = create(spec, python=python, on_event=on_event)
    return PrebuiltBackend(builder, check_engines(folder, programs, builder.versions(), spec.name))
