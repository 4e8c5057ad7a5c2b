"""What tasks on one worker share: loaded models, their exported programs, and one sample picked out of many."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import lru_cache
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import torch

from cp_debug.backends.base import Backend, Program
from cp_debug.backends.registry import create
from cp_debug.backends.spec import BackendSpec
from cp_debug.bisect.pipeline import Export, choose_export, prepare
from cp_debug.errors import InputError
from cp_debug.recipes.base import Model, Sample
from cp_debug.recipes.data.base import DataOptions
from cp_debug.recipes.data.opening import DEFAULT_OPTIONS
from cp_debug.recipes.registry import load_model
from cp_debug.sweep.tasks import Parameters

_KEPT = 2
"""Models that a worker holds: at the border between two models of a grid, tasks of both come in turn."""


class Subject(NamedTuple):
    """Which model: equal while its files have the same contents, so that a worker may keep what it made of it."""

    model: str
    checkpoint: str | None
    seed: int
    files: tuple[tuple[str, str], ...]

    @classmethod
    def of(cls, params: Parameters) -> Subject:
        """Of the parameters of a task; files of its sample do not matter."""
        model, checkpoint = params["model"], params["checkpoint"]
        own = {model, model.rpartition(":")[0], checkpoint}
        files = tuple((path, digest) for path, digest in params["files"].items() if path in own)
        return cls(model, checkpoint, params["seed"], files)


class Prepared(NamedTuple):
    """A model and its programs, whose files live as long as ``folder``."""

    model: Model
    programs: list[Program]
    folder: TemporaryDirectory[str]


def load(params: Parameters) -> Model:
    """``params["model"]`` with ``params["checkpoint"]``, loaded once while their files stay the same."""
    return load_subject(Subject.of(params))


def programs_of(params: Parameters, backends: Sequence[Backend]) -> list[Program]:
    """The model's programs for these backends, exported once."""
    how, _ = choose_export(backends, params["exporter"])
    return _export(Subject.of(params), how, params["folded"]).programs


def make_backends(specs: Sequence[str]) -> list[Backend]:
    """Backends that use as many threads as torch does here, so that workers do not take each other's cores."""
    parsed = [BackendSpec.parse(spec) for spec in specs]
    threads = torch.get_num_threads()
    return [create(spec, threads=threads) if spec.family == "ort" else create(spec) for spec in parsed]


def pick(model: Model, params: Parameters, options: DataOptions = DEFAULT_OPTIONS) -> Sample:
    """Sample ``params["index"]`` of ``inputs``, or of those made from ``seed``. Raises InputError."""
    index, seed = params["index"], params["seed"]
    inputs = None if params["inputs"] is None else Path(params["inputs"])
    if hasattr(model, "data"):
        data = model.data(inputs, index + 1, seed, options)
        if index < len(data):
            return data.sample(index)
    elif found := list(islice(model.samples(index + 1, seed, inputs), index, None)):
        return found[0]
    raise InputError(f"{inputs}: has no sample {index}")


def with_sample(model: Model, sample: Sample) -> Model:
    """The same model, whose only sample is ``sample``."""
    one = copy.copy(model)
    one.samples = lambda count, seed, inputs: iter([sample])  # type: ignore[method-assign]
    return one


@lru_cache(_KEPT)
def load_subject(subject: Subject) -> Model:
    """The model, loaded once while its files stay the same."""
    checkpoint = None if subject.checkpoint is None else Path(subject.checkpoint)
    return load_model(subject.model, checkpoint=checkpoint, seed=subject.seed)


@lru_cache(_KEPT)
def _export(subject: Subject, how: Export, folded: bool) -> Prepared:
    model = load_subject(subject)
    folder = TemporaryDirectory(prefix="cpdebug-")
    (example,) = model.samples(1, subject.seed, None)
    return Prepared(model, prepare(model, example, Path(folder.name), how=how, folded=folded), folder)
