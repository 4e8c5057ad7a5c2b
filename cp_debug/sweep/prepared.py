"""Parts that tasks on one worker share: loaded models, their exported programs, and one sample picked out of many."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import torch

from cp_debug.backends.base import Backend, Program
from cp_debug.backends.registry import create
from cp_debug.backends.spec import BackendSpec
from cp_debug.errors import InputError
from cp_debug.programs.pipeline import Export, choose_export, prepare
from cp_debug.quantization.checkpoint import FILE
from cp_debug.quantization.models import QuantizedComponent
from cp_debug.quantization.open_quantized import calibration_samples
from cp_debug.quantization.quantized_programs import Calibration, already_quantized, load_quantized, quantize_programs
from cp_debug.recipes.abilities import HasData
from cp_debug.recipes.base import Model, Sample
from cp_debug.recipes.data.base import DataOptions
from cp_debug.recipes.data.open_data import DEFAULT_OPTIONS
from cp_debug.sweep.tasks import Parameters

_KEPT = 2
"""Number of models that a worker holds: at the border between two models of a grid, tasks of both come in turn."""


class Subject(NamedTuple):
    """Identity of a model: equal while its files have the same contents, so that a worker may keep results."""

    model: str
    checkpoint: str | None
    seed: int
    files: tuple[tuple[str, str], ...]

    @classmethod
    def of(cls, params: Parameters) -> Subject:
        """The subject of a task, from its parameters; files of its sample do not matter."""
        model, checkpoint = params["model"], params["checkpoint"]
        model_files = {model, model.rpartition(":")[0], checkpoint, checkpoint and str(Path(checkpoint) / FILE)}
        files = tuple((path, digest) for path, digest in params["files"].items() if path in model_files)
        return cls(model, checkpoint, params["seed"], files)


class Prepared(NamedTuple):
    """Programs, whose files live as long as ``folder``."""

    programs: list[Program]
    folder: TemporaryDirectory[str]


def load(params: Parameters) -> Model:
    """The model ``params["model"]`` with ``params["checkpoint"]``, loaded once while their files stay the same."""
    return load_subject(Subject.of(params))


def programs_of(params: Parameters, backends: Sequence[Backend]) -> list[Program]:
    """The model's programs for these backends, exported once."""
    return _export(Subject.of(params), choose_export(backends, params["exporter"])[0], params["folded"]).programs


def int8_programs_of(params: Parameters, backends: Sequence[Backend]) -> list[Program]:
    """Programs with Q/DQ pairs: as the checkpoint has them, else calibrated once, on ``params["calibration"]``."""
    settings = params["calibration"]
    data = None if settings["data"] is None else Path(settings["data"])
    calibration = Calibration(data, settings["samples"], settings["method"], tuple(settings["skip_layers"]))
    how, _ = choose_export(backends, params["exporter"])
    return _quantize(Subject.of(params), how, params["folded"], calibration).programs


def make_backends(specs: Sequence[str]) -> list[Backend]:
    """Backends that use as many threads as torch does here, so that workers do not take each other's cores."""
    parsed = [BackendSpec.parse(spec) for spec in specs]
    threads = torch.get_num_threads()
    return [create(spec, threads=threads) if spec.family == "ort" else create(spec) for spec in parsed]


def pick(model: Model, params: Parameters, options: DataOptions = DEFAULT_OPTIONS) -> Sample:
    """Sample ``params["index"]`` of ``inputs``, or of those made from ``seed``.

    Raises InputError where there is none.
    """
    index, seed = params["index"], params["seed"]
    inputs = None if params["inputs"] is None else Path(params["inputs"])
    if isinstance(model, HasData):
        data = model.data(inputs, index + 1, seed, options)
        if index < len(data):
            return data.sample(index)
    elif picked := list(islice(model.samples(index + 1, seed, inputs), index, None)):
        return picked[0]
    raise InputError(f"{inputs}: has no sample {index}")


def parts_of(params: Parameters) -> Mapping[str, QuantizedComponent]:
    """The components in INT8, where the checkpoint is of a quantized model."""
    return _load(Subject.of(params))[1]


def load_subject(subject: Subject) -> Model:
    """The model, loaded once while its files stay the same."""
    return _load(subject)[0]


@lru_cache(_KEPT)
def _load(subject: Subject) -> tuple[Model, Mapping[str, QuantizedComponent]]:
    checkpoint = None if subject.checkpoint is None else Path(subject.checkpoint)
    return load_quantized(subject.model, checkpoint, subject.seed)


@lru_cache(_KEPT)
def _export(subject: Subject, how: Export, folded: bool) -> Prepared:
    model = load_subject(subject)
    folder = TemporaryDirectory(prefix="cpdebug-")
    (example,) = model.samples(1, subject.seed, None)
    return Prepared(prepare(model, example, Path(folder.name), how=how, folded=folded), folder)


@lru_cache(_KEPT)
def _quantize(subject: Subject, how: Export, folded: bool, calibration: Calibration) -> Prepared:
    exported, (model, parts) = _export(subject, how, folded), _load(subject)
    if int8_programs := already_quantized(exported.programs):
        return Prepared(int8_programs, exported.folder)
    folder = TemporaryDirectory(prefix="cpdebug-")
    samples = calibration_samples(model, calibration.data, calibration.samples)
    int8_programs, _ = quantize_programs(
        model, exported.programs, Path(folder.name), samples, parts=parts, calibration=calibration
    )
    return Prepared(int8_programs, folder)
