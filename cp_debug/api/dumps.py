"""A bisect whose test ran elsewhere: tensors that somebody dumped, against a reference that runs here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cp_debug.backends.arithmetic import ARITHMETICS
from cp_debug.backends.base import Backend
from cp_debug.backends.dumped import DumpedBackend, as_in_graph, dumped_inputs, types_of
from cp_debug.backends.registry import create
from cp_debug.backends.spec import BackendSpec
from cp_debug.errors import InputError
from cp_debug.graph.check_inputs import known_shape
from cp_debug.graph.graph import Graph, ValueInfo
from cp_debug.probes.arrays import dtype_name
from cp_debug.probes.dumps import read_dump
from cp_debug.recipes.abilities import with_notes, with_samples
from cp_debug.recipes.base import Model, Sample

DEFAULT_REFERENCE = "ort"


def with_dump(
    model: Model,
    reference: str,
    tensors: Path | Mapping[str, Any],
    precision: str,
    *,
    channels_last: bool = False,
    flat: bool = False,
    inputs_given: bool,
) -> tuple[Model, Sequence[Backend]]:
    """The model fed with what the dump was fed with, and the two backends: ``reference``, and the dump.

    ``tensors`` is the path of a dump (see ``read_dump``) or a mapping of arrays by value name; ``channels_last``: those
    of rank 4 and 5 were dumped as NHWC; ``flat``: those of another shape hold their numbers row by row. A tensor in
    between that still has another shape is left out, and a note of the model tells so. ``inputs_given``: the model's
    samples are those that the dump was computed from; else the dump must hold the graph's inputs.
    Raises InputError for a model that is no ONNX file, and for dumps without a usable input or output.
    """
    source = str(tensors) if isinstance(tensors, Path) else "test_tensors"
    path = model.components[0].onnx_path if len(model.components) == 1 else None
    if path is None:
        raise InputError(f"{source}: tensors are known by the names of an ONNX file; {model.name} is none")
    if precision not in ARITHMETICS:
        raise InputError(f"precision of {source}: {precision!r}; expected one of {', '.join(ARITHMETICS)}")
    names = [part for part in reference.split(",") if part.strip()]
    if len(names) != 1:
        raise InputError(f"--backends: {reference!r}; with tensors as the test expected the reference alone")
    arrays = read_dump(tensors) if isinstance(tensors, Path) else {n: np.asarray(a) for n, a in tensors.items()}
    graph = Graph(path)
    arrays = as_in_graph(graph, arrays, source, last=channels_last, flat=flat)
    arrays, left_out = _of_known_shape(graph, arrays)
    model = with_notes(model, [*left_out, *_other_precision(graph, arrays, precision)])
    if not inputs_given:
        inputs = dumped_inputs(graph, arrays)
        if inputs is None:
            missing = [value.name for value in graph.inputs if value.name not in arrays]
            raise InputError(f"{source}: lacks the input {missing[0]!r}, from which it was computed; give --inputs")
        sample = Sample({value.name: _in_dtype(inputs[value.name], value) for value in graph.inputs}, source)
        model = with_samples(model, [sample])
    return model, [create(BackendSpec.parse(names[0])), DumpedBackend(arrays, source, precision)]


def _of_known_shape(graph: Graph, arrays: Mapping[str, np.ndarray]) -> tuple[dict[str, np.ndarray], list[str]]:
    """The arrays but for those in between whose shape is none that the graph allows, and a note on each of these.

    They are no values of the graph, so nothing may be computed from them; inputs and outputs stay, and are told.
    """
    ends = {value.name for value in (*graph.inputs, *graph.outputs)}
    types = types_of(graph, arrays)
    known = {name: known_shape(graph, name, types) for name in arrays if name not in ends}
    others = {name: shape for name, shape in known.items() if shape not in (None, arrays[name].shape)}
    notes = [
        f"{name} is {list(arrays[name].shape)} in the dump and {list(shape or ())} in the graph: left out"
        for name, shape in others.items()
    ]
    return {name: array for name, array in arrays.items() if name not in others}, notes


def _other_precision(graph: Graph, arrays: Mapping[str, np.ndarray], precision: str) -> list[str]:
    """A note where all that the dump computed is in a lower precision than it is said to be computed in."""
    computed = [arrays[name] for name in graph.values if name in arrays and arrays[name].dtype.kind in "fV"]
    found = {dtype_name(array) for array in computed}
    named = {"float16": "fp16", "bfloat16": "bf16"}.get(found.pop() if len(found) == 1 else "")
    if named is None or precision != "fp32":
        return []
    return [
        f"all tensors of the dump are {named.upper()}, and they are judged as FP32: --tensors-precision {named} allows "
        "them its rounding"
    ]


def _in_dtype(array: np.ndarray, value: ValueInfo) -> np.ndarray:
    """The array as the graph declares it: a runtime of lower precision dumps its inputs in that."""
    same_kind = value.dtype is not None and array.dtype.kind == "f" and value.dtype.kind == "f"
    return array.astype(value.dtype) if same_kind else array
