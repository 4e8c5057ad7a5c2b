"""The inputs of a graph: checked against what it declares, or made up."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence

import numpy as np

from cp_debug.errors import InputError
from cp_debug.graph.graph import ValueInfo
from cp_debug.reading import physical_memory

_BATCH = re.compile(r"(?i)n|b|bs|.*batch.*")
_FREE_SIZE = 64


def check_inputs(expected: Sequence[ValueInfo], given: Mapping[str, np.ndarray], source: str) -> None:
    """Raise InputError, starting with ``source``, unless names, dtypes and shapes fit and every symbol has one size."""
    wanted = "expected " + ", ".join(str(v) for v in expected)
    names = {v.name for v in expected}
    if wrong := sorted(given.keys() - names) or sorted(names - given.keys()):
        raise InputError(f"{source}: {'unknown' if wrong[0] in given else 'missing'} input {wrong[0]!r}; {wanted}")
    sizes: dict[str, int] = {}
    for value in expected:
        array = given[value.name]
        if value.dtype is not None and array.dtype != value.dtype:
            raise InputError(f"{source}: input {value.name!r} is {array.dtype}; {wanted}")
        if value.shape is None:
            continue
        fits = len(array.shape) == len(value.shape) and all(
            d is None or (sizes.setdefault(d, size) if isinstance(d, str) else d) == size
            for d, size in zip(value.shape, array.shape, strict=True)
        )
        if not fits:
            raise InputError(f"{source}: input {value.name!r} has shape {list(array.shape)}; {wanted}")


def random_inputs(expected: Sequence[ValueInfo], seed: int | Sequence[int]) -> dict[str, np.ndarray]:
    """Seeded inputs: floats from N(0, 1), int8 and uint8 over their range, other integers 0 or 1 (they are often
    indices), booleans evenly.

    A free dimension is 1 where it is a batch (first axis, named ``N``, ``batch`` … or not at all), else 64; the same
    symbol has the same size everywhere. Raises InputError for an input that is no tensor of numbers or has no shape.
    """
    rng = np.random.default_rng(seed)
    return {v.name: _random(v, rng) for v in expected}


def _random(value: ValueInfo, rng: np.random.Generator) -> np.ndarray:
    if value.dtype is None or value.dtype.kind in "OSUc" or value.shape is None:
        raise InputError(f"input {value}: no random value can be made for this; give one with --inputs")
    shape = [d if isinstance(d, int) else _free(axis, d) for axis, d in enumerate(value.shape)]
    if (size := math.prod(shape) * 8) > physical_memory() // 4:  # random numbers are made in FP64
        told = f"made-up values would take {size / 2**30:.3g} GiB"
        raise InputError(f"input {value}: {told}; give values with --inputs, or free the dimension")
    if value.dtype.kind == "b" or (value.dtype.kind in "iu" and value.dtype.itemsize > 1):
        return rng.integers(0, 2, shape).astype(value.dtype)
    if value.dtype.kind in "iu":
        limits = np.iinfo(value.dtype)
        return rng.integers(limits.min, limits.max + 1, shape).astype(value.dtype)
    return rng.standard_normal(shape).astype(value.dtype)


def _free(axis: int, symbol: str | None) -> int:
    return 1 if (_BATCH.fullmatch(symbol) if symbol else axis == 0) else _FREE_SIZE
