"""Samples from ``.npz`` files: one a file, an array for each input."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np

from cp_debug.errors import InputError
from cp_debug.graph.graph import ValueInfo
from cp_debug.graph.random_inputs import check_inputs
from cp_debug.reading import read_npz
from cp_debug.recipes.base import Sample


def npz_samples(inputs: Path, expected: list[ValueInfo], count: int) -> Iterator[Sample]:
    """At most ``count`` samples from one ``.npz`` file, or from the folder ``inputs`` of them, by name.

    Raises InputError for files that are no ``.npz`` of plain arrays, and for wrong names, dtypes and shapes in them.
    """
    for file in islice(_files(inputs), count):
        arrays = _read(file)
        check_inputs(expected, arrays, str(file))
        yield Sample(arrays, str(file))


def _files(inputs: Path) -> Iterator[Path]:
    if inputs.is_dir():
        files = sorted(inputs.glob("*.npz"))
        if not files:
            raise InputError(f"--inputs: {inputs} holds no .npz file")
        yield from files
    elif inputs.suffix == ".npz":
        yield inputs
    else:
        raise InputError(
            f"--inputs: {inputs}: an ONNX file is fed with an .npz file of its named inputs, or a folder of them; "
            "point clouds are for recipes such as centerpoint:tiny"
        )


def _read(file: Path) -> dict[str, np.ndarray]:
    if not file.exists():
        raise InputError(f"--inputs: no such file {file}")
    try:
        return read_npz(file)
    except InputError as error:
        raise InputError(f"--inputs: {error}") from None
