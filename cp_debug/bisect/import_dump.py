"""Import of tensors that another program wrote: matched with a graph, what does not fit told, kept as a capture."""

from __future__ import annotations

import difflib
import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from cp_debug.backends.base import Program
from cp_debug.backends.dumped import as_in_graph, named_values, types_of
from cp_debug.display import Shown
from cp_debug.errors import InputError
from cp_debug.graph.check_inputs import known_shape
from cp_debug.graph.exporter_notes import module_values
from cp_debug.graph.graph import Graph
from cp_debug.graph.integer_values import level_values
from cp_debug.graph.pairing import parse_map_of
from cp_debug.probes.arrays import dtype_name
from cp_debug.probes.capture import CaptureWriter, array_hash
from cp_debug.programs.layers import layers_of
from cp_debug.safe_text import some
from cp_debug.serialize import JsonForm

SCHEMA = "cpdebug.import/1"
_Types = Mapping[str, onnx.TypeProto]


@dataclass(repr=False)
class ImportedDump(JsonForm, Shown):
    """The tensors of a dump by the names of a graph's values, and what does not fit."""

    model: str
    source: str
    tensors: dict[str, np.ndarray] = field(metadata={"written": False})
    """Value → array as dumped, channels first."""
    values: int
    """Number of values that a bisect compares: the graph's inputs, and what is computed from them."""
    matched: int
    """Number of those that the dump has."""
    renamed: dict[str, str]
    """Name in the dump → value of the graph, where a sign differs or the user paired them."""
    missing_inputs: list[str]
    missing_outputs: list[str]
    missing: list[str]
    """Values in between that the dump lacks."""
    extra: list[str]
    """Names in the dump that are no value of the graph."""
    suggestions: dict[str, str]
    """Extra name → missing value that it may be, by shape or by name."""
    dtypes: dict[str, str]
    """Value → its dtype in the dump and in the graph, where they differ."""
    shapes: dict[str, str]
    """Value → its shape in the dump and in the graph, where they differ."""
    notes: list[str] = field(default_factory=list)
    """Sentences about how the tensors were read, where it is not as asked."""

    @property
    def complete(self) -> bool:
        """Whether the outputs are there and nothing has another shape."""
        return not self.missing_outputs and not self.shapes

    def derived(self) -> dict[str, Any]:
        """The schema, whether the dump is complete, and the names of its tensors."""
        return {"schema": SCHEMA, "complete": self.complete, "tensors": list(self.tensors)}


def match_dump(
    graph: Graph,
    tensors: Mapping[str, np.ndarray],
    source: str,
    *,
    maps: Sequence[str] = (),
    channels_last: bool = False,
    flat: bool = False,
) -> ImportedDump:
    """Match the tensors of a dump (name → array of any shape and dtype) with the values of ``graph``.

    A tensor that is called as a torch module is the value that leaves the module, where the exporter recorded modules;
    axes of size 1 that it lacks, or has too many, are put right: serving runtimes drop the batch.
    ``maps``: ``VALUE=TENSOR`` each, for names that say nothing. ``channels_last``: tensors of rank 3 to 5 are NHWC;
    ``flat``: tensors of another shape hold the value's numbers row by row.
    Raises InputError for a map that fits nothing, for tensors that fit only with their channels elsewhere or without
    their axes, and for a dump of which no tensor is in the graph.
    """
    names = [*(value.name for value in graph.inputs), *graph.values]
    pairs = parse_map_of(maps, names, list(tensors))
    modules = module_values(graph)
    taken = {*named_values(graph, tensors), *pairs.values()}
    pairs |= {
        n: modules[n] for n in tensors if n not in pairs and n not in names and modules.get(n, n) not in {n, *taken}
    }
    types = types_of(graph, named_values(graph, {pairs.get(n, n): a for n, a in tensors.items()}), last=channels_last)
    tensors = {
        # Of those with channels last a batch comes in front once the channels are where they belong.
        name: array if channels_last and array.ndim > 2 else _batched(graph, pairs.get(name), array, types)
        for name, array in tensors.items()
    }
    given = {pairs.get(name, name): array for name, array in tensors.items()}
    matched = named_values(graph, given)
    if not matched:
        raise InputError(
            f"{source}: none of its {len(tensors)} tensors is a value of {graph}: {some(tensors, 4)} against "
            f"{some(names, 4)}; --map VALUE=TENSOR pairs two of them"
        )
    values, notes = as_in_graph(graph, given, source, last=channels_last, flat=flat, flag="--layout")
    used = {id(array) for array in matched.values()}
    extra = [name for name, array in tensors.items() if id(given[pairs.get(name, name)]) not in used]
    own = {id(array): name for name, array in tensors.items()}
    renamed = {own[id(array)]: name for name, array in matched.items() if own.get(id(array), name) != name}
    outputs = [value.name for value in graph.outputs]
    ordered = {name: values[name] for name in names if name in values}
    compared = {layer.onnx for layer in layers_of([Program(graph.path.stem, graph)])}
    missing = [name for name in graph.values if name not in ordered]
    unknown = {name: tensors[name] for name in extra}
    return ImportedDump(
        model=str(graph.path),
        source=source,
        tensors=ordered,
        values=len(compared),
        matched=len(compared & ordered.keys()),
        renamed=renamed,
        missing_inputs=[value.name for value in graph.inputs if value.name not in ordered],
        missing_outputs=[name for name in outputs if name not in ordered],
        missing=[name for name in missing if name in compared and name not in outputs],
        extra=extra,
        suggestions=_suggestions(graph, unknown, missing, types) | _input_suggestions(graph, unknown, ordered),
        dtypes=_other_dtypes(graph, ordered),
        shapes=_other_shapes(graph, ordered, types),
        notes=notes,
    )


def write_dump(dump: ImportedDump, graph: Graph, folder: Path, precision: str) -> None:
    """Write the matched tensors as a capture that ``compare`` and ``--test-tensors`` read.

    Raises InputError as ``CaptureWriter`` does.
    """
    component = graph.path.stem
    inputs = {value.name: dump.tensors[value.name] for value in graph.inputs if value.name in dump.tensors}
    manifest = {
        "backend": "dump",
        "precision": precision,
        "emulated": False,
        "versions": {"dump": dump.source},
        "device": "elsewhere",
        "settings": {},
        "model": {"name": str(graph.path), "sha256": hashlib.sha256(graph.digest.encode()).hexdigest()},
        "inputs": [{name: array_hash(array) for name, array in inputs.items()}],
        "samples": [dump.source],
        "layers": {component: {layer.onnx: layer.name for layer in layers_of([Program(component, graph)])}},
        "outputs": [[component, value.name] for value in graph.outputs],
        "levels": {component: sorted(level_values(graph))},
    }
    with CaptureWriter(folder, manifest) as writer:
        for name, array in dump.tensors.items():
            writer.put(name, array, 0, component)


def _batched(graph: Graph, value: str | None, array: np.ndarray, types: _Types) -> np.ndarray:
    """The array in the value's shape, where they differ in axes of size 1 alone; else as it is."""
    shape = known_shape(graph, value, types) if value is not None else None
    if shape is None or [n for n in shape if n != 1] != [n for n in array.shape if n != 1]:
        return array
    return array.reshape(shape)


def _suggestions(
    graph: Graph, extra: Mapping[str, np.ndarray], missing: Sequence[str], types: _Types
) -> dict[str, str]:
    """Extra name → the one missing value of its shape, else the one with the nearest name."""
    shapes: dict[tuple[int, ...], list[str]] = {}
    for name in missing:
        if (shape := known_shape(graph, name, types)) is not None:
            shapes.setdefault(shape, []).append(name)
    suggestions = {}
    for name, array in extra.items():
        same = shapes.get(array.shape, [])
        near = difflib.get_close_matches(name, missing, n=1, cutoff=0.6)
        if len(same) == 1 or near:
            suggestions[name] = same[0] if len(same) == 1 else near[0]
    return suggestions


def _input_suggestions(
    graph: Graph, extra: Mapping[str, np.ndarray], known: Mapping[str, np.ndarray]
) -> dict[str, str]:
    """Extra name → the missing input of its kind and shape: one that is called so, else what a module read there.

    Of modules that read the same the one with the shortest path is the outermost.
    """
    suggestions: dict[str, str] = {}
    for place, value in enumerate(graph.inputs):
        if value.name in known or value.dtype is None or value.shape is None:
            continue
        fixed = [size for size in value.shape if isinstance(size, int) and size != 1]
        free = sum(not isinstance(size, int) for size in value.shape)
        fitting = [
            name
            for name, array in extra.items()
            if name not in suggestions
            and array.dtype.kind == value.dtype.kind
            and len(fixed) <= len(sizes := [size for size in array.shape if size != 1]) <= len(fixed) + free
            and not Counter(fixed) - Counter(sizes)
            and (value.name in name or name.endswith(f"/inputs_{place}"))
        ]
        if fitting:
            suggestions[min(fitting, key=lambda name: (value.name not in name, len(name)))] = value.name
    return suggestions


def _other_dtypes(graph: Graph, tensors: Mapping[str, np.ndarray]) -> dict[str, str]:
    declared = {value.name: value.dtype for value in (*graph.inputs, *graph.outputs) if value.dtype is not None}
    return {
        name: f"{dtype_name(array)}, declared {declared[name]}"
        for name, array in tensors.items()
        if name in declared and array.dtype != declared[name]
    }


def _other_shapes(graph: Graph, tensors: Mapping[str, np.ndarray], types: _Types) -> dict[str, str]:
    shapes = {name: known_shape(graph, name, types) for name in tensors}
    return {
        name: f"{list(array.shape)}, the graph's is {list(shape)}"
        for name, array in tensors.items()
        if (shape := shapes[name]) is not None and shape != array.shape
    }
