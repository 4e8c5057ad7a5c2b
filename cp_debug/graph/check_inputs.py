"""Check of inputs, and of shapes that a user asks for, against a graph's declarations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import ml_dtypes
import numpy as np
import onnx

from cp_debug.errors import InputError
from cp_debug.graph.graph import Graph, ValueInfo, fits_shape
from cp_debug.graph.other_inputs import check_other

_TAKE_ALL = "`bisect`, `capture`, `check`, `predict` and `search`"
"""The commands that make tensors of numbers of other inputs."""
_FLOATS = {np.dtype(t) for t in (np.float16, np.float32, np.float64, ml_dtypes.bfloat16)}


def check_given_inputs(expected: Sequence[ValueInfo], given: Mapping[str, np.ndarray], source: str) -> None:
    """Raise InputError as ``check_inputs`` does, for inputs as files give them: strings and containers too.

    ``given``: name, as ``other_inputs`` has it → array in the dtype and shape of the declaration.
    """
    names: set[str] = set()
    for value in expected:
        if value.kind is not None:
            names |= check_other(value.name, value.kind, given, source)
    tensors = [v if v.kind is None else replace(v, dtype=None) for v in expected if v.container is None]
    own = {v.name for v in tensors}
    check_inputs(tensors, {n: a for n, a in given.items() if n in own or n not in names}, source, expected)


def check_inputs(
    expected: Sequence[ValueInfo],
    given: Mapping[str, np.ndarray],
    source: str,
    shown: Sequence[ValueInfo] | None = None,
) -> None:
    """Raise InputError, starting with ``source``, unless names, dtypes and shapes fit and every symbol has one size.

    ``shown``: the inputs that messages tell; None: those expected.
    """
    expectation = "expected " + ", ".join(str(v) for v in shown or expected)
    names = {v.name for v in expected}
    if wrong := sorted(given.keys() - names) or sorted(names - given.keys()):
        raise InputError(f"{source}: {'unknown' if wrong[0] in given else 'missing'} input {wrong[0]!r}; {expectation}")
    sizes: dict[str, tuple[int, str]] = {}
    for value in expected:
        array = given[value.name]
        if (refused := no_numbers(value)) is not None:
            raise InputError(f"{source}: {refused}")
        if value.dtype is not None and array.dtype != value.dtype:
            how = f"; .astype({value.dtype.name!r}) makes it so" if array.dtype.kind == value.dtype.kind == "f" else ""
            raise InputError(f"{source}: input {value.name!r} is {array.dtype}; {expectation}{how}")
        if not fits_shape(array.shape, value.shape):
            raise InputError(f"{source}: input {value.name!r} has shape {list(array.shape)}; {expectation}")
        for symbol, size in zip(value.shape or (), array.shape, strict=False):
            if isinstance(symbol, str) and (first_use := sizes.setdefault(symbol, (size, value.name)))[0] != size:
                raise InputError(
                    f"{source}: input {value.name!r} has shape {list(array.shape)}; {expectation}; "
                    f"{symbol} is {size} here and {first_use[0]} in {first_use[1]!r}"
                )


def as_declared(graph: Graph, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The inputs, each in the float type in which ``graph`` takes it: a file in FP16 beside one in FP32."""
    declared = {v.name: v.dtype for v in graph.inputs if v.dtype in _FLOATS}
    return {n: a.astype(declared.get(n, a.dtype), copy=False) if a.dtype in _FLOATS else a for n, a in inputs.items()}


def no_numbers(value: ValueInfo) -> str | None:
    """Sentence about an input that is no tensor of numbers, for who takes no others; None for one that is."""
    if value.dtype is not None and value.dtype.kind == "O":
        says = f"holds strings, which {_TAKE_ALL} alone can give; cut the graph after their readers"
    elif value.container is not None:
        says = f"holds {value.container}, which {_TAKE_ALL} alone can give; cut the graph after its readers"
    else:
        return None
    return f"input {value.name!r} {says}"


def with_shapes(expected: Sequence[ValueInfo], shapes: Mapping[str, Sequence[int]]) -> list[ValueInfo]:
    """The inputs with the sizes that ``shapes`` (input → sizes) gives their free axes; a symbol has one size.

    Raises InputError for an unknown input, another rank, another size than a fixed one, and two sizes of one symbol.
    """
    by_name = {value.name: value for value in expected}
    sizes: dict[str, int] = {}
    for name, shape in shapes.items():
        asked = f"--shape: {name}={'x'.join(map(str, shape))}"
        if name not in by_name:
            raise InputError(f"{asked}: no such input; expected one of {', '.join(map(str, expected))}")
        declared = by_name[name].shape
        if not fits_shape(shape, declared):
            raise InputError(f"{asked}: does not fit {by_name[name]}")
        for symbol, size in zip(declared or (), shape, strict=False):
            if isinstance(symbol, str) and sizes.setdefault(symbol, size) != size:
                raise InputError(f"{asked}: {symbol} is {sizes[symbol]} elsewhere")
    free = {v.name: tuple(sizes.get(d, d) if isinstance(d, str) else d for d in v.shape) for v in expected if v.shape}
    sized = free | {name: tuple(shape) for name, shape in shapes.items()}
    return [replace(value, shape=sized.get(value.name, value.shape)) for value in expected]


def known_shape(graph: Graph, name: str, types: Mapping[str, onnx.TypeProto] | None = None) -> tuple[int, ...] | None:
    """The shape of a value that the file states or ONNX infers, where every size is known.

    ``types``: those of ``Graph.types_for``, for inputs of certain sizes.
    """
    kind = (graph.types if types is None else types).get(name)
    if kind is None or not kind.HasField("tensor_type") or not kind.tensor_type.HasField("shape"):
        return None
    sizes = kind.tensor_type.shape.dim
    return tuple(size.dim_value for size in sizes) if all(size.HasField("dim_value") for size in sizes) else None
