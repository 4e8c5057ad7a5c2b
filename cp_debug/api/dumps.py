"""A bisect whose test ran elsewhere: tensors that somebody dumped, against a reference that runs here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cp_debug.api.models import given_array
from cp_debug.backends.arithmetic import ARITHMETICS
from cp_debug.backends.base import Backend
from cp_debug.backends.dumped import (
    DumpedBackend,
    as_in_graph,
    dumped_inputs,
    in_types_of_graph,
    inputs_digest,
    types_of,
)
from cp_debug.backends.registry import create
from cp_debug.backends.spec import BackendSpec
from cp_debug.errors import InputError
from cp_debug.graph.check_inputs import as_declared, known_shape
from cp_debug.graph.graph import Graph, ValueInfo
from cp_debug.probes.arrays import dtype_name
from cp_debug.probes.dumps import read_dumps, steps_left_out
from cp_debug.programs.tensor_inputs import has_other_inputs
from cp_debug.recipes.abilities import CountsSamples, with_notes, with_samples
from cp_debug.recipes.base import Model, Sample

DEFAULT_REFERENCE = "ort"


class Dumped(NamedTuple):
    """A bisect of a dump: the model that gives its samples, the reference and the dump as backends, their number."""

    model: Model
    backends: Sequence[Backend]
    samples: int


def with_dump(
    model: Model,
    reference: str,
    tensors: Path | Mapping[str, Any],
    precision: str,
    *,
    channels_last: bool = False,
    flat: bool = False,
    inputs_given: bool,
    inputs: Path | None = None,
) -> Dumped:
    """The model fed with what the dump was fed with, and the two backends: ``reference``, and the dump.

    ``tensors`` is the path of a dump (see ``read_dumps``) or a mapping of arrays by value name; ``channels_last``:
    those of rank 3 to 5 were dumped as NHWC; ``flat``: those of another shape hold their numbers row by row. A tensor
    in between that still has another shape is left out, and a note of the model tells so. ``inputs_given``: the dump
    was computed from the model's samples, of the file or folder ``inputs`` or its own; else the dump must hold the
    graph's inputs. All samples of the dump are taken, or a note tells that some are not.
    Raises InputError for a model that is no ONNX file, and for dumps without a usable input or output.
    """
    source = str(tensors) if isinstance(tensors, Path) else "test_tensors"
    path = model.components[0].onnx_path if len(model.components) == 1 else None
    if path is None:
        raise InputError(f"{source}: tensors are matched by the names of an ONNX file; {model.name} is not one")
    if precision not in ARITHMETICS:
        raise InputError(f"precision of {source}: {precision!r}; expected one of {', '.join(ARITHMETICS)}")
    names = [part for part in reference.split(",") if part.strip()]
    if len(names) != 1:
        raise InputError(f"--backends: {reference!r}; with tensors as the test, expected only the reference")
    if isinstance(tensors, Path):
        several = read_dumps(tensors)
    else:
        several = [{name: given_array(value, f"test_tensors: {name!r}") for name, value in tensors.items()}]
    graph, notes = Graph(path), dict[str, None]()
    dumps = []
    for dump in several[:1] if has_other_inputs(model) else several:
        read = as_in_graph(graph, dump, source, last=channels_last, flat=flat)
        arrays, left_out = _of_known_shape(graph, read.values)
        arrays, converted = _of_known_types(graph, arrays, precision)
        notes |= dict.fromkeys([*read.notes, *left_out, *converted, *_other_precision(graph, arrays, precision)])
        dumps.append(arrays)
    if inputs_given:
        samples = list(islice(model.samples(len(dumps), 0, inputs), len(dumps)))
        total = model.sample_count(inputs) if inputs is not None and isinstance(model, CountsSamples) else 0
        if total > len(dumps):
            notes[f"{len(dumps)} of {total} samples of {inputs} compared: the dump has no more"] = None
    else:
        samples = [_sample(graph, arrays, source, i, len(dumps)) for i, arrays in enumerate(dumps)]
    digests = [inputs_digest(as_declared(graph, sample.arrays)) for sample in samples]
    first = {digest: i for i, digest in reversed([*enumerate(digests)])}
    kept = [i for i, digest in enumerate(digests) if first[digest] == i]
    if len(kept) < len(several):
        alike = len(kept) < len(digests)
        why = "others have the same inputs as one of them" if alike else "there are no more inputs"
        notes[f"{len(kept)} of {len(several)} samples of {source} compared: {why}"] = None
    if isinstance(tensors, Path) and (steps := steps_left_out(tensors)):
        notes[f"{source}: the first of {steps + 1} steps was compared; for another one, give its folder"] = None
    by_inputs = {digests[i]: dumps[i] for i in kept} if len(kept) > 1 else {}
    backend = DumpedBackend(dumps[0], source, precision, by_inputs)
    model = with_samples(with_notes(model, list(notes)), [samples[i] for i in kept])
    return Dumped(model, [create(BackendSpec.parse(names[0])), backend], len(kept))


def _sample(graph: Graph, arrays: Mapping[str, np.ndarray], source: str, index: int, count: int) -> Sample:
    """The inputs that a dump holds for its sample ``index`` of ``count``. Raises InputError where it lacks one."""
    inputs = dumped_inputs(graph, arrays)
    if inputs is None:
        missing = [value.name for value in graph.inputs if value.name not in arrays]
        raise InputError(f"{source}: lacks the input {missing[0]!r}, from which it was computed; give --inputs")
    shown = source if count == 1 else f"{source}, sample {index}"
    return Sample({value.name: _in_dtype(inputs[value.name], value) for value in graph.inputs}, shown)


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


def _of_known_types(
    graph: Graph, arrays: dict[str, np.ndarray], precision: str
) -> tuple[dict[str, np.ndarray], list[str]]:
    """The arrays in types that the graph computes with, and a note where that rounds them.

    In a dump that is said to be computed in FP64 floats stay: their last bits are the result.
    """
    converted = in_types_of_graph(graph, arrays)
    rounded = {n for n, a in converted.items() if arrays[n].dtype == np.float64 and a.dtype == np.float32}
    if precision == "fp64":
        return converted | {name: arrays[name] for name in rounded}, []
    if not rounded:
        return converted, []
    says = "the tensor in FP64 is" if len(rounded) == 1 else f"the {len(rounded)} tensors in FP64 are"
    return converted, [f"{says} read as FP32; --tensors-precision fp64 judges what was computed in FP64"]


def _other_precision(graph: Graph, arrays: Mapping[str, np.ndarray], precision: str) -> list[str]:
    """A note where all that the dump computed is in a lower precision than it is said to be computed in."""
    computed = [arrays[name] for name in graph.values if name in arrays and arrays[name].dtype.kind in "fV"]
    found = {dtype_name(array) for array in computed}
    named = {"float16": "fp16", "bfloat16": "bf16"}.get(found.pop() if len(found) == 1 else "")
    if named is None or precision != "fp32":
        return []
    return [
        f"all tensors of the dump are {named.upper()}, but they are judged as FP32; --tensors-precision {named} allows "
        "for its rounding"
    ]


def _in_dtype(array: np.ndarray, value: ValueInfo) -> np.ndarray:
    """The array as the graph declares it: a runtime of lower precision dumps its inputs in that."""
    same_kind = value.dtype is not None and array.dtype.kind == "f" and value.dtype.kind == "f"
    return array.astype(value.dtype) if same_kind else array
