"""The axes of a sweep and their product: (model or checkpoint) × backend × sample."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

from cp_debug.backends.spec import BackendSpec
from cp_debug.errors import InputError
from cp_debug.files import resolved
from cp_debug.quantization.checkpoint import FILE
from cp_debug.recipes.abilities import HasData
from cp_debug.recipes.data.base import DataOptions
from cp_debug.recipes.data.open_data import DEFAULT_OPTIONS
from cp_debug.recipes.data.points import ENDINGS
from cp_debug.recipes.registry import kind_of
from cp_debug.sweep.prepared import load
from cp_debug.sweep.tasks import Task, digests
from cp_debug.sweep.workers import needs_gpu

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
            for file in sample_files(self.inputs)[: self.samples]:
                yield {"inputs": str(resolved(file)), "index": 0, "files": digests([file])}


def sample_files(inputs: Path) -> list[Path]:
    """Files with samples: ``inputs`` itself, or those of the folder, by name. Raises InputError for none."""
    if not inputs.is_dir():
        return [inputs]
    if files := sorted(file for file in inputs.iterdir() if file.name.endswith(ENDINGS)):
        return files
    raise InputError(f"{inputs}: holds no sample (a file whose name ends in {' '.join(ENDINGS)})")
