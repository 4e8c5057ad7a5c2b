"""Tensors that were computed elsewhere, as a backend: what a C++ runtime wrote is judged like any other test."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto

from cp_debug.backends.base import Program, Session, Sink
from cp_debug.backends.spec import BackendSpec
from cp_debug.errors import InputError
from cp_debug.graph.check_inputs import known_shape
from cp_debug.graph.graph import Graph, fits_shape


class DumpedBackend:
    """Gives back the tensors of a dump, by the names of the graph's values, whatever it is fed with.

    ``precision`` is what the program that wrote them claims to compute in.
    """

    emulated = False
    device = "elsewhere"

    def __init__(self, tensors: Mapping[str, np.ndarray], source: str, precision: str = "fp32") -> None:
        self.spec, self.precision = BackendSpec("dump"), precision
        self._tensors, self._source = tensors, source

    def open(self, program: Program) -> Session:
        """The dump against one program. Raises InputError where it has none of the graph's outputs."""
        return _DumpedSession(named_values(program.graph, self._tensors), program.graph, self._source)

    def versions(self) -> dict[str, str]:
        """Nothing is known of the libraries that computed it."""
        return {"dump": self._source}


class _DumpedSession:
    def __init__(self, values: dict[str, np.ndarray], graph: Graph, source: str) -> None:
        self._values, self._outputs = values, [output.name for output in graph.outputs]
        missing = [name for name in self._outputs if name not in values]
        if missing:
            some = ", ".join(list(values)[:5]) or "none of the graph's values"
            raise InputError(f"{source}: lacks the output {missing[0]!r}; it has {some}")
        self.exposed: Collection[str] = [name for name in graph.values if name in values]
        self.settings: Mapping[str, Any] = {"tensors": len(self.exposed)}

    def run(
        self, inputs: Mapping[str, np.ndarray], sink: Sink | None = None, probes: Collection[str] | None = None
    ) -> dict[str, np.ndarray]:
        """The tensors, in the order in which the graph computes them."""
        if sink is not None:
            for name in self.exposed:
                if probes is None or name in probes:
                    sink(name, self._values[name])
        return {name: self._values[name] for name in self._outputs}

    def close(self) -> None:
        """Nothing is held."""


def named_values(graph: Graph, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The tensors by the names of the graph's values and inputs; a file system's ``_`` stands for any sign.

    Shapes and dtypes are left as they are.
    """
    names = [*(value.name for value in graph.inputs), *graph.values]
    plain: dict[str, list[str]] = {}
    for name in names:
        plain.setdefault(_as_file(name), []).append(name)
    tensor_of = {name: tensors[name] for name in names if name in tensors}
    for file_name, tensor in tensors.items():
        candidates = plain.get(_as_file(file_name), [])
        if file_name not in tensor_of and len(candidates) == 1 and candidates[0] not in tensor_of:
            tensor_of[candidates[0]] = tensor
    return tensor_of


def as_in_graph(
    graph: Graph,
    tensors: Mapping[str, np.ndarray],
    source: str,
    *,
    last: bool,
    flat: bool = False,
    flag: str = "--tensors-layout",
) -> dict[str, np.ndarray]:
    """The tensors by the names of the graph's values, those of rank 4 and 5 with channels at axis 1.

    ``last``: they were dumped with channels at the last axis; ``flat``: a tensor of another shape holds its value's
    numbers row by row, as a buffer does; ``flag`` is the option that says so. Raises InputError for a tensor whose
    shape fits the graph's only so, saying how to read it, and for levels of a quantizer.
    """
    values = named_values(graph, tensors)
    types = types_of(graph, values, last=last)
    declared = {value.name: value.shape for value in graph.inputs if value.shape is not None}
    for name, tensor in values.items():
        _refuse_levels(graph, name, tensor, source)
        shape, moved = known_shape(graph, name, types), _channels_first(tensor)
        if shape is None and name in declared and not fits_shape(tensor.shape, declared[name]):  # free axes
            shape = moved.shape if moved is not None and fits_shape(moved.shape, declared[name]) else None
        if shape is not None and shape == tensor.shape:
            continue
        if shape is not None and tensor.size == math.prod(shape) == 1:  # a single number lies in one way
            values[name] = tensor.reshape(shape)
            continue
        same_moved = moved is not None and shape == moved.shape
        same_numbers = shape is not None and _has_its_numbers(tensor, shape)
        if last and moved is not None and (shape is None or same_moved):
            values[name] = moved
        elif flat and same_numbers:
            values[name] = tensor.reshape(shape)
        elif not last and shape is not None and (same_numbers or same_moved):
            how, layout = ("with channels last", "nhwc") if same_moved else ("without its axes, row by row", "flat")
            raise InputError(
                f"{source}: {name!r} has shape {list(tensor.shape)}, the graph's is {list(shape)}: it seems to be "
                f"dumped {how}; read it so with {flag} {layout}"
            )
    return values


def types_of(graph: Graph, values: Mapping[str, np.ndarray], *, last: bool = False) -> dict[str, onnx.TypeProto]:
    """Value → ONNX type, free axes sized by the shapes of the inputs among ``values``, channels last or not.

    ``values``: name → array of any dtype.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for value in graph.inputs:
        is_free = value.shape is not None and not all(isinstance(size, int) for size in value.shape)
        if value.name in values and is_free:
            array = values[value.name]
            moved = _channels_first(array) if last and not fits_shape(array.shape, value.shape) else None
            shape = array.shape if moved is None else moved.shape
            if fits_shape(shape, value.shape):
                shapes[value.name] = shape
    return graph.types_for(shapes) if shapes else graph.types


def _channels_first(tensor: np.ndarray) -> np.ndarray | None:
    """A tensor with channels last as the graph has it; None of other ranks than 4 and 5."""
    return np.moveaxis(tensor, -1, 1) if tensor.ndim in (4, 5) else None


def _has_its_numbers(tensor: np.ndarray, shape: tuple[int, ...]) -> bool:
    """Whether a tensor has the elements of a value of ``shape``, in one row or without axes of size 1."""
    in_one_row = tensor.ndim <= 1 and tensor.size == math.prod(shape)
    return in_one_row or [n for n in shape if n != 1] == [n for n in tensor.shape if n != 1]


def _refuse_levels(graph: Graph, name: str, tensor: np.ndarray, source: str) -> None:
    """Raise InputError for whole numbers of a byte where the graph computes in floating point."""
    kind = graph.types.get(name)
    if tensor.dtype.kind in "iu" and tensor.dtype.itemsize == 1 and kind is not None:
        declared = kind.tensor_type.elem_type
        if declared in (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE):
            own = TensorProto.DataType.Name(declared)
            raise InputError(
                f"{source}: {name!r} is {tensor.dtype}, and the graph computes in {own} there: levels of a "
                "quantizer, whose scale the dump does not tell; expected the numbers that they stand for, "
                "(level − zero point) × scale"
            )


def dumped_inputs(graph: Graph, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray] | None:
    """The graph's inputs, where the dump has them all.

    Name → array as the dump has it; None where one is missing. Arrays have the dtype and shape of the dump.
    """
    values = named_values(graph, tensors)
    names = [value.name for value in graph.inputs]
    return {name: values[name] for name in names} if all(name in values for name in names) else None


def _as_file(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9]+", "_", name).strip("_").lower()
