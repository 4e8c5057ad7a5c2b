"""Tasks' parameters and parts: the grid of models, backends and samples; what a worker keeps loaded and exported."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import islice, product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple, TypeVar

import torch

from cp_debug.backends.base import Backend, Program
from cp_debug.backends.registry import create
from cp_debug.backends.spec import BackendSpec
from cp_debug.errors import InputError
from cp_debug.files import file_hash, key_of, resolved
from cp_debug.programs.export_cache import ExportCache
from cp_debug.programs.pipeline import Export, choose_export, prepare
from cp_debug.quantization.checkpoint import FILE, save_ptq_model
from cp_debug.quantization.models import QuantizedComponent
from cp_debug.quantization.open_quantized import calibration_samples, open_quantized
from cp_debug.quantization.quantized_programs import (
    Calibration,
    already_quantized,
    calibrate,
    load_quantized,
    of_modules,
    quantize_programs,
)
from cp_debug.recipes.abilities import HasData
from cp_debug.recipes.base import Model, Sample
from cp_debug.recipes.data.base import DataOptions
from cp_debug.recipes.data.open_data import DEFAULT_OPTIONS
from cp_debug.recipes.data.points import point_files
from cp_debug.recipes.registry import kind_of
from cp_debug.store import cache_folder, fill
from cp_debug.sweep.tasks import Parameters, Task, digests, shared_store
from cp_debug.sweep.workers import needs_gpu, running

T = TypeVar("T")

_KEPT = 2
"""Number of models that a worker holds: at the border between two models of a grid, tasks of both come in turn."""


class Subject(NamedTuple):
    """Identity of a model: equal while its files have the same contents, so that a worker may keep results."""

    model: str
    checkpoint: str | None
    seed: int
    files: tuple[tuple[str, str], ...]
    shared: str | None = None
    """Store of exports and calibrations; None shares none."""

    @classmethod
    def of(cls, params: Parameters) -> Subject:
        """The subject of a task, from its parameters; files of its sample do not matter."""
        model, checkpoint = params["model"], params["checkpoint"]
        model_files = {model, model.rpartition(":")[0], checkpoint, checkpoint and str(Path(checkpoint) / FILE)}
        files = tuple((path, digest) for path, digest in params["files"].items() if path in model_files)
        return cls(model, checkpoint, params["seed"], files, params.get("shared"))


class Prepared(NamedTuple):
    """Programs, whose files live as long as ``folder``."""

    programs: list[Program]
    folder: TemporaryDirectory[str]


def load(params: Parameters) -> Model:
    """The model ``params["model"]`` with ``params["checkpoint"]``, loaded once while their files stay the same."""
    return opened(Subject.of(params))[0]


def programs_of(params: Parameters, backends: Sequence[Backend], *, int8: bool = False) -> list[Program]:
    """The model's programs for these backends, exported once.

    int8: with Q/DQ pairs, as the checkpoint has them, else calibrated once, on ``params["calibration"]``.
    """
    exported = Subject.of(params), choose_export(backends, params["exporter"])[0], params["folded"]
    if not int8:
        return _export(*exported).programs
    settings = params["calibration"]
    data = None if settings["data"] is None else Path(settings["data"])
    calibration = Calibration(data, settings["samples"], settings["method"], tuple(settings["skip_layers"]))
    return _quantize(*exported, calibration).programs


def make_backends(params: Parameters) -> list[Backend]:
    """Backends that use as many threads as torch does here, so that workers do not take each other's cores.

    Engines are kept where ``bisect`` keeps them, and shared with the other workers.
    """
    return [_backend(BackendSpec.parse(spec), params.get("shared")) for spec in params["backends"]]


def _backend(spec: BackendSpec, shared: str | None) -> Backend:
    if spec.family in ("ort", "openvino"):
        return create(spec, threads=torch.get_num_threads())
    if spec.family != "trt":
        return create(spec)
    from cp_debug.backends.tensorrt.engine_cache import EngineCache

    behind = None if shared is None else shared_store(shared)
    return create(spec, cache=EngineCache.open(cache_folder("engines"), asked=False, behind=behind))


def pick(model: Model, params: Parameters) -> Sample:
    """Sample ``params["index"]`` of ``inputs``, or of those made from ``seed``; clouds are read as the task says.

    Raises InputError where there is none.
    """
    options = DEFAULT_OPTIONS
    if "data_root" in params:
        root = params["data_root"] and Path(params["data_root"])
        options = DataOptions(root, params["sweeps"], params["skip_missing"])
    index, seed = params["index"], params["seed"]
    inputs = None if params["inputs"] is None else Path(params["inputs"])
    if isinstance(model, HasData):
        data = model.data(inputs, index + 1, seed, options)
        if index < len(data):
            return data.sample(index)
    elif picked := list(islice(model.samples(index + 1, seed, inputs), index, None)):
        return picked[0]
    raise InputError(f"{inputs}: has no sample {index}")


@lru_cache(_KEPT)
def opened(subject: Subject) -> tuple[Model, Mapping[str, QuantizedComponent]]:
    """The model and its components in INT8, where it has some; loaded once while its files stay the same."""
    checkpoint = None if subject.checkpoint is None else Path(subject.checkpoint)
    return load_quantized(subject.model, checkpoint, subject.seed)


@lru_cache(_KEPT)
def _export(subject: Subject, how: Export, folded: bool) -> Prepared:
    model, folder = opened(subject)[0], TemporaryDirectory(prefix="cpdebug-")
    (example,) = model.samples(1, subject.seed, None)
    cache = None if subject.shared is None else _exports(subject.shared)
    programs = prepare(model, example, Path(folder.name), how=how, folded=folded, cache=cache)
    return Prepared(programs, folder)


def _exports(shared: str) -> ExportCache:
    return ExportCache(shared_store(shared), running()["code"])


def _taken(
    subject: Subject,
    model: Model,
    settings: Mapping[str, Any],
    make: Callable[[Path], T],
    use: Callable[[Path], T],
) -> T:
    """What ``use`` reads of the files that a worker made with the same settings (JSON-safe), else what ``make`` gives,
    which writes them."""
    store, modules = shared_store(subject.shared or ""), [each for each in model.components if each.module is not None]
    known = [_exports(subject.shared).key(each, {}, settings) for each in modules] if subject.shared else []
    about = key_of({"modules": known, "subject": subject._replace(shared=None)})
    return store.take(about if known and None not in known else None, make, use)  # else of code that is not known


def calibrated(
    subject: Subject,
    model: Model,
    settings: Mapping[str, Any],
    calibrate: Callable[[], Mapping[str, QuantizedComponent]],
) -> Mapping[str, QuantizedComponent]:
    """Components as ``calibrate`` gives them, or gave them to another worker with the same ``settings`` (JSON-safe)."""
    if any(component.module is None for component in model.components):
        return calibrate()

    def make(folder: Path) -> Mapping[str, QuantizedComponent]:
        parts = calibrate()
        save_ptq_model({name: p.module for name, p in parts.items() if p.module is not None}, folder / FILE)
        return parts

    return _taken(subject, model, {"calibration": settings}, make, lambda folder: open_quantized(model, folder / FILE))


def shared_figures(subject: Subject, model: Model, settings: Mapping[str, Any], measure: Callable[[], Any]) -> Any:
    """Figures as ``measure`` gives them, or gave them to another worker with the same ``settings``, all JSON-safe."""

    def make(folder: Path) -> Any:
        figures = measure()
        fill(folder, {"figures.json": json.dumps(figures)})
        return figures

    return _taken(subject, model, settings, make, lambda folder: json.loads((folder / "figures.json").read_text()))


@lru_cache(_KEPT)
def _quantize(subject: Subject, how: Export, folded: bool, calibration: Calibration) -> Prepared:
    exported, (model, parts) = _export(subject, how, folded), opened(subject)
    if int8_programs := already_quantized(exported.programs):
        return Prepared(int8_programs, exported.folder)
    folder = TemporaryDirectory(prefix="cpdebug-")
    samples = list(calibration_samples(model, calibration.data, calibration.samples))
    if not parts and of_modules(model, exported.programs):
        data = calibration.data
        files = () if data is None else sorted(filter(Path.is_file, data.iterdir())) if data.is_dir() else (data,)
        settings = {"how": repr(calibration), "data": [(str(path), file_hash(path)) for path in files]}
        parts = calibrated(subject, model, settings, lambda: calibrate(model, exported.programs, samples, calibration))
    int8_programs, _ = quantize_programs(
        model, exported.programs, Path(folder.name), samples, parts=parts, calibration=calibration
    )
    return Prepared(int8_programs, folder)


WITHOUT_BOXES = ("onnx", "program", "transformers", "callable")
"""Kinds of models that detect nothing."""


@dataclass(frozen=True)
class Grid:
    """Axes of a sweep. Every model is paired with every checkpoint.

    samples: at most so many of ``inputs`` (a file, or a folder whose files are samples), else made from ``seed``.
    """

    models: Sequence[str]
    backends: Sequence[BackendSpec]
    """Backends, the reference first."""
    checkpoints: Sequence[Path] = ()
    samples: int = 8
    seed: int = 0
    inputs: Path | None = None
    data: DataOptions = DEFAULT_OPTIONS
    exporter: str | None = None
    folded: bool = True
    how: Mapping[str, Any] = field(default_factory=dict)
    """Further parameters of every task."""
    reads: Sequence[Path] = ()
    """Further files of every task."""

    def tests(self, kind: str) -> Iterator[Task]:
        """A task for each model, each backend with the reference, and each sample.

        Raises InputError for unusable files and a reference in INT8.
        """
        reference, *tests = self.backends
        if reference.variant.startswith("int8"):
            raise InputError(
                f"--backends: the reference of a sweep cannot be in INT8, as {reference} is; make it a test"
            )
        return self.tasks(kind, [(reference, test) for test in tests])

    def tasks(self, kind: str, pairs: Sequence[Sequence[BackendSpec]]) -> Iterator[Task]:
        """A task for each model, each of ``pairs`` of backends, and each sample.

        Raises InputError for unusable files.
        """
        for subject in self.subjects():
            gpu = {pair: any(map(needs_gpu, pair)) for pair in map(tuple, pairs)}
            for pair, sample in product(gpu, self.picked(subject)):
                files = {**subject["files"], **sample["files"]}
                settings = {"backends": [str(spec) for spec in pair], "exporter": self.exporter, "folded": self.folded}
                yield Task(kind, {**subject, **sample, **settings, **self.how, "files": files}, gpu[pair])

    def without_boxes(self) -> str | None:
        """The first model whose kind alone tells that it detects nothing; of others only the loaded model tells.

        Raises InputError for a text that names no model.
        """
        return next((model for model in self.models if kind_of(model) in WITHOUT_BOXES), None)

    def subjects(self) -> Iterator[dict[str, Any]]:
        """Parameters of each model; paths are absolute, as workers run elsewhere.

        Raises InputError for a text that names no model.
        """
        for model, checkpoint in product(self.models, self.checkpoints or (None,)):
            kind_of(model)  # a slip of the pen is told before a hundred tasks fail of it
            file, colon, name = (model, "", "") if model.endswith(".onnx") else model.rpartition(":")
            absolute_name = model
            files_read = list(self.reads)
            if checkpoint is not None:
                files_read.append(checkpoint / FILE if checkpoint.is_dir() else checkpoint)
            if file.endswith((".onnx", ".py")):
                files_read.append(Path(file))
                absolute_name = f"{resolved(Path(file))}{colon}{name}"
            yield {
                "label": model if checkpoint is None else f"{model} · {checkpoint}",
                "model": absolute_name,
                "checkpoint": None if checkpoint is None else str(resolved(checkpoint)),
                "seed": self.seed,
                "files": digests(files_read),
            }

    def picked(self, subject: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """Parameters of each sample. Raises InputError for files that hold none."""
        if self.inputs is None:
            for index in range(self.samples):
                yield {"inputs": None, "index": index, "files": {}}
        elif self.inputs.suffix == ".pkl":
            model = load(subject)
            if not isinstance(model, HasData):
                raise InputError(f"{self.inputs}: {model.name} reads no info files; expected .npz files of its inputs")
            info_digest = digests([self.inputs])
            for index in range(len(model.data(self.inputs, self.samples, self.seed, self.data))):
                yield {"inputs": str(resolved(self.inputs)), "index": index, "files": info_digest}
        else:
            for file in point_files(self.inputs)[: self.samples]:
                yield {"inputs": str(resolved(file)), "index": 0, "files": digests([file])}
