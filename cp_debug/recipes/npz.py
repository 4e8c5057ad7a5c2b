"""Samples from ``.npz`` files: one a file, an array for each input."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np

from cp_debug.errors import InputError
from cp_debug.graph.check_inputs import check_inputs
from cp_debug.graph.graph import ValueInfo
from cp_debug.reading import read_npz
from cp_debug.recipes.base import Sample


def npz_samples(inputs: Path, expected: list[ValueInfo], count: int) -> Iterator[Sample]:
    """At most ``count`` samples from one ``.npz`` file, or from the folder ``inputs`` of them, by name.

    Raises InputError for files that are no ``.npz`` of plain arrays, and for wrong names, dtypes and shapes in them.
    """
    for file in islice(_files(inputs), count):
        arrays = _typed(_read(file), expected)
        check_inputs(expected, arrays, str(file))
        yield Sample(arrays, str(file))


def first_arrays(inputs: Path) -> dict[str, np.ndarray]:
    """The arrays of the first file, unchecked. Raises InputError for what is no ``.npz`` of plain arrays."""
    return _read(next(_files(inputs)))


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


def _typed(arrays: dict[str, np.ndarray], expected: list[ValueInfo]) -> dict[str, np.ndarray]:
    """The arrays in the types of the graph, where numpy, and so an ``.npz`` file, lacks them (bfloat16, FP8, 4 bits).

    Bits without a type are taken for them; float32 is rounded to them.
    """
    extension_types = {v.name: v.dtype for v in expected if v.dtype is not None and v.dtype.isbuiltin != 1}

    def typed(name: str, array: np.ndarray) -> np.ndarray:
        dtype = extension_types.get(name)
        if dtype is None or array.dtype == dtype:
            return array
        if array.dtype.kind == "V" and array.dtype.itemsize == dtype.itemsize:
            return array.view(dtype)
        return array.astype(dtype) if array.dtype == np.float32 else array

    return {name: typed(name, array) for name, array in arrays.items()}


def _read(file: Path) -> dict[str, np.ndarray]:
    if not file.exists():
        raise InputError(f"--inputs: no such file {file}")
    try:
        return read_npz(file)
    except InputError as error:
        raise InputError(f"--inputs: {error}") from None
