"""Models that take strings, sequences, optionals or maps, as models that take tensors of numbers."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from cp_debug.errors import InputError
from cp_debug.graph import surgery
from cp_debug.graph.graph import Graph
from cp_debug.graph.other_inputs import TensorInputs, other_inputs, with_tensor_inputs
from cp_debug.recipes.abilities import with_samples
from cp_debug.recipes.base import Model, Sample


def has_other_inputs(model: Model) -> bool:
    """Whether the model is one ONNX file with inputs that are no tensors of numbers."""
    paths = [component.onnx_path for component in model.components]
    return len(paths) == 1 and paths[0] is not None and bool(other_inputs(Graph.shared(paths[0])))


def as_numbers(model: Model, samples: Sequence[Sample], folder: Path, names_of: Model | None = None) -> Model:
    """A copy of ``model`` with tensors of numbers for inputs, which gives ``samples`` so; its file lies in ``folder``.

    ``names_of``: the model by whose input names the samples' arrays are called; None: by this one's. Raises InputError
    as ``with_tensor_inputs`` does, and where the inputs of the two models are of other kinds.
    """
    [component] = model.components
    assert component.onnx_path is not None
    graph = Graph.shared(component.onnx_path, source=component.shown)
    path, made = _written(graph, samples, folder, names_of)
    changed: Model = copy.copy(model)
    numbers = [v.name for v in Graph(path).inputs]
    changed.components = [replace(component, onnx_path=path, shown=str(graph), input_names=numbers)]
    return with_samples(changed, [replace(sample, arrays=made.of(sample.arrays)) for sample in samples])


def numbers_where_needed(model: Model, samples: Sequence[Sample], folder: Path) -> tuple[Model, list[Sample]]:
    """The model and its samples with tensors of numbers for inputs (``as_numbers``); both as they are, if they have
    them."""
    if not samples or not has_other_inputs(model):
        return model, list(samples)
    changed = as_numbers(model, samples, folder)
    return changed, list(changed.samples(len(samples), 0, None))


def file_as_numbers(path: Path, samples: Sequence[Sample], folder: Path, names_of: Model) -> Path:
    """An ONNX file like ``as_numbers`` makes it; the same file where its inputs are all tensors of numbers."""
    graph = Graph(path)
    if not other_inputs(graph):
        return path
    return _written(graph, samples, folder / "test", names_of)[0]


def _names(graph: Graph, names_of: Model | None) -> dict[str, str]:
    """Other inputs of ``graph`` by the names that those at the same place have in a model."""
    if names_of is None:
        return {}
    [component] = names_of.components
    assert component.onnx_path is not None
    reference = Graph.shared(component.onnx_path)
    own, theirs = other_inputs(graph), other_inputs(reference)
    if own.keys() == theirs.keys():
        return {}
    there = [v.name for v in reference.inputs]
    pairs = {v.name: n for v, n in zip(graph.inputs, there, strict=False)}
    if len(there) != len(graph.inputs) or any(pairs[n] not in theirs for n in own):
        expected = ", ".join(map(str, reference.inputs))
        raise InputError(f"{graph}: its inputs are {', '.join(map(str, graph.inputs))}; expected {expected}")
    return {name: pairs[name] for name in own}


def _written(
    graph: Graph, samples: Sequence[Sample], folder: Path, names_of: Model | None
) -> tuple[Path, TensorInputs]:
    made = with_tensor_inputs(graph, [sample.arrays for sample in samples], _names(graph, names_of))
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{graph.path.stem}.numbers.onnx"
    surgery.save(made.model, graph, path)
    return path, made
