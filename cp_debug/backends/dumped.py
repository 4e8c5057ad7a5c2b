"""Tensors that were computed elsewhere, as a backend: what a C++ runtime wrote is judged like any other test."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import onnx
from onnx import TensorProto

from cp_debug.backends.base import Program, Session, Sink
from cp_debug.backends.spec import BackendSpec
from cp_debug.errors import InputError
from cp_debug.graph.check_inputs import known_shape
from cp_debug.graph.graph import Graph, fits_shape
from cp_debug.graph.onnx_tensors import FLOATS
from cp_debug.probes.capture import array_hash
from cp_debug.safe_text import some


class DumpedBackend:
    """Gives back the tensors of a dump, by the names of the graph's values, whatever it is fed with.

    ``precision`` is what the program that wrote them claims to compute in.
    """

    emulated = False
    device = "elsewhere"

    def __init__(
        self,
        tensors: Mapping[str, np.ndarray],
        source: str,
        precision: str = "fp32",
        samples: Mapping[str, Mapping[str, np.ndarray]] = MappingProxyType({}),
    ) -> None:
        """``samples``: where there are several, the ``inputs_digest`` of each → its tensors; ``tensors`` are the
        first's."""
        self.spec, self.precision = BackendSpec("dump"), precision
        self._tensors, self._source, self._samples = tensors, source, samples

    def open(self, program: Program) -> Session:
        """The dump against one program. Raises InputError where it has none of the graph's outputs."""
        graph = program.graph
        samples = {digest: named_values(graph, tensors) for digest, tensors in self._samples.items()}
        return _DumpedSession(named_values(graph, self._tensors), graph, self._source, samples)

    def versions(self) -> dict[str, str]:
        """Nothing is known of the libraries that computed it."""
        return {"dump": self._source}


def inputs_digest(inputs: Mapping[str, np.ndarray]) -> str:
    """Digest of the inputs of one sample, name → array of any shape and dtype: the same for the same inputs alone."""
    return " ".join(f"{name} {array_hash(inputs[name])}" for name in sorted(inputs))


class _DumpedSession:
    def __init__(
        self, values: dict[str, np.ndarray], graph: Graph, source: str, samples: Mapping[str, dict[str, np.ndarray]]
    ) -> None:
        self._values, self._outputs = values, [output.name for output in graph.outputs]
        self._samples, self._source = samples, source
        for tensors in (values, *samples.values()):
            missing = [name for name in self._outputs if name not in tensors]
            if missing:
                has = some(tensors, 5) or "none of the graph's values"
                raise InputError(f"{source}: lacks the output {missing[0]!r}; it has {has}")
        self.exposed: Collection[str] = [name for name in graph.values if name in values]
        self.settings: Mapping[str, Any] = {"tensors": len(self.exposed)}

    def run(
        self, inputs: Mapping[str, np.ndarray], sink: Sink | None = None, probes: Collection[str] | None = None
    ) -> dict[str, np.ndarray]:
        """The tensors, in the order in which the graph computes them; of several samples those of these inputs."""
        values = self._samples.get(inputs_digest(inputs)) if self._samples else self._values
        if values is None:
            count = len(self._samples)
            raise InputError(f"{self._source}: none of its {count} samples was computed from these inputs")
        if sink is not None:
            for name in self.exposed:
                if name in values and (probes is None or name in probes):
                    sink(name, values[name])
        return {name: values[name] for name in self._outputs}

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


class InGraph(NamedTuple):
    """The tensors of a dump as a graph has them, and what the asked layout did not fit."""

    values: dict[str, np.ndarray]
    """Value of the graph → array, those of rank 3 to 5 with channels at axis 1."""
    notes: list[str]


def as_in_graph(
    graph: Graph,
    tensors: Mapping[str, np.ndarray],
    source: str,
    *,
    last: bool,
    flat: bool = False,
    flag: str = "--tensors-layout",
) -> InGraph:
    """The tensors by the names of the graph's values, those of rank 3 to 5 with channels at axis 1.

    ``last``: they were dumped with channels at the last axis, also where their shape would do as it is; those that fit
    as they are alone are told. Of rank 3 (channels, or rows of features?) one that fits as it is alone decides for all
    that fit either way. ``flat``: a tensor of another shape holds its value's numbers row by row, as a buffer does;
    ``flag`` is the option that says so. Numbers in another order of bytes, or in more bits than FP64, come in the
    machine's own types. Raises InputError for a tensor whose shape fits the graph's only in another layout, saying how
    to read it, for a layout that the shapes contradict or that changes nothing, and for levels of a quantizer.
    """
    values = {name: _native(tensor) for name, tensor in named_values(graph, tensors).items()}
    types = types_of(graph, values, last=last)
    declared = {value.name: value.shape for value in graph.inputs if value.shape is not None}
    shapes = {name: known_shape(graph, name, types) for name in values}
    rows = (tensor for name, tensor in values.items() if tensor.ndim == 3 and tensor.shape == shapes[name])
    lies_in_rows = last and any(_moved(tensor, tensor.shape) is None for tensor in rows)  # not with its last axis moved
    needed: list[str] = []
    """Tensors whose shape shows the layout that was asked for."""
    either: list[str] = []
    """Tensors that the layout decides about."""
    kept: list[str] = []
    for name, tensor in values.items():
        _refuse_levels(graph, name, tensor, source)
        shape, moved = shapes[name], _channels_first(tensor)
        if shape is None and name in declared and not fits_shape(tensor.shape, declared[name]):  # free axes
            shape = moved.shape if moved is not None and fits_shape(moved.shape, declared[name]) else None
        as_it_is, moved = shape is not None and shape == tensor.shape, _moved(tensor, shape)
        in_rows = tensor.ndim == 3 and (shape is None or (as_it_is and lies_in_rows))
        if last and moved is not None and not in_rows:
            values[name] = moved
            (either if as_it_is or shape is None else needed).append(name)
        elif as_it_is:
            kept.append(name)
        elif shape is not None and tensor.size == math.prod(shape) == 1:  # a single number lies in one way
            values[name] = tensor.reshape(shape)
            either.append(name)
        elif flat and shape is not None and _has_its_numbers(tensor, shape):
            values[name] = tensor.reshape(shape)
            needed.append(name)
        elif shape is not None and not last and (layout := _other_layout(tensor, shape)) is not None:
            raise InputError(
                f"{source}: {name!r} has shape {list(tensor.shape)}, the graph's is {list(shape)}: it seems to be "
                f"dumped {_DUMPED[layout]}; use {flag} {layout}"
            )
    against = [name for name in kept if values[name].ndim > 3]
    if (last or flat) and kept and not needed and (against or not either):
        layout, first = "nhwc" if last else "flat", (against or kept)[0]
        raise InputError(
            f"{source}: no tensor's shape shows that it was dumped {_DUMPED[layout]}, and {first!r} has the graph's, "
            f"{list(values[first].shape)}; leave {flag} {layout} out"
        )
    notes = []
    if last and against:
        named = some([f"{name} {list(values[name].shape)}" for name in against], 4)
        notes = [f"read as dumped, because they fit only so, not with channels last: {named}"]
    return InGraph(values, notes)


_DUMPED = {"nhwc": "with channels last", "flat": "without its axes, row by row"}
"""Layout → how its tensors were dumped, in words."""


def _other_layout(tensor: np.ndarray, shape: tuple[int, ...]) -> str | None:
    """The layout in which a tensor of another shape would fit."""
    if tensor.ndim == len(shape) and _moved(tensor, shape) is not None:
        return "nhwc"
    if _has_its_numbers(tensor, shape):
        return "flat"
    return None if _moved(tensor, shape) is None else "nhwc"


def types_of(graph: Graph, values: Mapping[str, np.ndarray], *, last: bool = False) -> dict[str, onnx.TypeProto]:
    """Value → ONNX type, free axes sized by the shapes of the inputs among ``values``, channels last or not.

    ``values``: name → array of any dtype.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for value in graph.inputs:
        is_free = value.shape is not None and not all(isinstance(size, int) for size in value.shape)
        if value.name in values and is_free:
            array = values[value.name]
            moved = _channels_first(array) if last else None
            layouts = [array] if moved is None else [array, moved] if array.ndim == 3 else [moved, array]
            shape = next((a.shape for a in layouts if fits_shape(a.shape, value.shape)), None)
            if shape is not None:
                shapes[value.name] = shape
    return graph.types_for(shapes) if shapes else graph.types


def _channels_first(tensor: np.ndarray) -> np.ndarray | None:
    """A tensor with channels last as the graph has it; None of other ranks than 3, 4 and 5."""
    return np.moveaxis(tensor, -1, 1) if tensor.ndim in (3, 4, 5) else None


def _moved(tensor: np.ndarray, shape: tuple[int, ...] | None) -> np.ndarray | None:
    """A tensor with channels last in a value's shape, also one that lacks a batch of 1; None where it does not fit."""
    moved = _channels_first(tensor)
    if shape is not None and shape[:1] == (1,) and len(shape) == tensor.ndim + 1:
        moved = _channels_first(tensor[None])
    return moved if moved is not None and (shape in (None, moved.shape)) else None


def _has_its_numbers(tensor: np.ndarray, shape: tuple[int, ...]) -> bool:
    """Whether a tensor has the elements of a value of ``shape``, in one row or without axes of size 1."""
    in_one_row = tensor.ndim <= 1 and tensor.size == math.prod(shape)
    return in_one_row or [n for n in shape if n != 1] == [n for n in tensor.shape if n != 1]


def _native(tensor: np.ndarray) -> np.ndarray:
    """The tensor in a type that is computed with: in the machine's order of bytes, and in FP64 at most."""
    if tensor.dtype.kind == "f" and tensor.dtype.itemsize > 8:
        return tensor.astype(np.float64)
    return tensor if tensor.dtype.isnative else tensor.astype(tensor.dtype.newbyteorder("="))


def in_types_of_graph(graph: Graph, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The tensors by name, in types that the graph's nodes take: dumps write FP64, INT32 and bytes for much else.

    FP64 where the graph computes in less becomes FP32, less than FP64 where it computes in that becomes FP64, and
    whole numbers become integers or booleans of the graph's type where it holds them all. Others stay as they are.
    """
    converted = dict(tensors)
    for name, tensor in tensors.items():
        kind = graph.types.get(name)
        element = kind.tensor_type.elem_type if kind is not None else TensorProto.UNDEFINED
        if element not in (TensorProto.UNDEFINED, TensorProto.STRING) and tensor.dtype.kind in "biufV":
            converted[name] = _converted(tensor, onnx.helper.tensor_dtype_to_np_dtype(element))
    return converted


def _converted(tensor: np.ndarray, declared: np.dtype) -> np.ndarray:
    if declared == tensor.dtype:
        return tensor
    if tensor.dtype.kind in "fV" and declared.kind in "fV":
        if np.float64 not in (declared, tensor.dtype):
            return tensor
        return tensor.astype(np.float64 if declared == np.float64 else np.float32)
    if declared.kind not in "biu":
        return tensor
    with np.errstate(invalid="ignore"):
        held = tensor.astype(declared)
    return held if np.array_equal(held.astype(tensor.dtype), tensor) else tensor


def _refuse_levels(graph: Graph, name: str, tensor: np.ndarray, source: str) -> None:
    """Raise InputError for whole numbers of a byte where the graph computes in floating point."""
    kind = graph.types.get(name)
    if tensor.dtype.kind in "iu" and tensor.dtype.itemsize == 1 and kind is not None:
        declared = kind.tensor_type.elem_type
        if declared in FLOATS:
            own = TensorProto.DataType.Name(declared)
            raise InputError(
                f"{source}: {name!r} is {tensor.dtype}, and the graph computes in {own} there: levels of a "
                "quantizer, whose scale is not in the dump; expected the dequantized numbers, (level − zero point) × "
                "scale"
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
