"""The inputs of a graph: checked against what it declares, or made up."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from cp_debug.errors import InputError
from cp_debug.graph.free_axes import FreeAxes
from cp_debug.graph.graph import ValueInfo
from cp_debug.graph.input_values import plain


def check_inputs(expected: Sequence[ValueInfo], given: Mapping[str, np.ndarray], source: str) -> None:
    """Raise InputError, starting with ``source``, unless names, dtypes and shapes fit and every symbol has one size."""
    expectation = "expected " + ", ".join(str(v) for v in expected)
    names = {v.name for v in expected}
    if wrong := sorted(given.keys() - names) or sorted(names - given.keys()):
        raise InputError(f"{source}: {'unknown' if wrong[0] in given else 'missing'} input {wrong[0]!r}; {expectation}")
    sizes: dict[str, tuple[int, str]] = {}
    for value in expected:
        array = given[value.name]
        if value.dtype is not None and value.dtype.kind == "O":
            says = "holds strings, which cannot be given; cut the graph behind what reads them"
            raise InputError(f"{source}: input {value.name!r} {says}")
        if value.dtype is not None and array.dtype != value.dtype:
            raise InputError(f"{source}: input {value.name!r} is {array.dtype}; {expectation}")
        if value.shape is None:
            continue
        fixed = (d is None or isinstance(d, str) or d == n for d, n in zip(value.shape, array.shape, strict=False))
        if len(array.shape) != len(value.shape) or not all(fixed):
            raise InputError(f"{source}: input {value.name!r} has shape {list(array.shape)}; {expectation}")
        for symbol, size in zip(value.shape, array.shape, strict=True):
            if isinstance(symbol, str) and (first_use := sizes.setdefault(symbol, (size, value.name)))[0] != size:
                raise InputError(
                    f"{source}: input {value.name!r} has shape {list(array.shape)}; {expectation}; "
                    f"{symbol} is {size} here and {first_use[0]} in {first_use[1]!r}"
                )


def random_inputs(expected: Sequence[ValueInfo], seed: int | Sequence[int]) -> dict[str, np.ndarray]:
    """Seeded inputs by type and shape alone: floats from N(0, 1), integers of 8 and 16 bits over their range, others
    0 or 1, booleans evenly.

    A free first axis is one sample, whatever it is called, and so is one called ``N`` or ``batch``; any other free axis
    has 64 elements, and the same symbol the same size everywhere. Raises InputError for an input that is no tensor of
    numbers or has no shape.
    """
    for value in expected:
        if value.dtype is None or value.dtype.kind in "OSUc" or value.shape is None:
            raise InputError(f"input {value}: no random value can be made for this; give one with --inputs")
    rng = np.random.default_rng(seed)
    axes = FreeAxes(expected)
    sizes = axes.first()
    arrays = {}
    for value in expected:
        assert value.dtype is not None
        arrays[value.name] = plain(value.dtype)(rng, axes.shape(value, sizes), 1).astype(value.dtype)
    return arrays
