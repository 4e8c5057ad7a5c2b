"""Check of inputs against a graph's declarations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from cp_debug.errors import InputError
from cp_debug.graph.graph import ValueInfo


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
