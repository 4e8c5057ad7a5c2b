"""Random weights and inputs in place of the user's, of the same statistics."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

from cp_debug.errors import InputError
from cp_debug.files import resolved
from cp_debug.graph.exporter_notes import quotes_source
from cp_debug.graph.graph import Graph
from cp_debug.reports.bundle.case import Case, Piece
from cp_debug.reports.bundle.shrink import Shrinker

TRIES = 5
"""Seeds tried before giving up."""


def redact(case: Case, shrinker: Shrinker) -> Case:
    """The case with every tensor of more than one number replaced by random ones of its mean, deviation and range.

    That includes constants inside nodes, branches, loops and functions, and the tables of trees and linear models.
    Shapes, names, text, other attributes, integers that are no quantized weights, and single numbers stay; metadata
    goes everywhere, as it quotes source code and its paths. Raises InputError when the fault does not survive it.
    """
    if len(case.pieces) > 1 and _weights(case.program) != _weights(case.reference):
        raise InputError("--redact: the fault is a difference in the weights, which random ones cannot show")
    for seed in range(TRIES):
        random = _redacted(case, seed)
        if shrinker.accepts(random):
            return random
    raise InputError(f"--redact: the fault did not survive random weights and inputs ({TRIES} seeds were tried)")


def holds_source(case: Case) -> bool:
    """Whether a graph of the case holds source lines or paths of the module that it was exported from."""
    return any(quotes_source(node) for piece in case.pieces for _, node in _nodes(piece.model))


def _redacted(case: Case, seed: int) -> Case:
    def piece(part: Piece) -> Piece:
        model = onnx.ModelProto()
        model.CopyFrom(part.model)
        for name, tensor in _tensors(model):  # the same seed and name: the same weight on both sides
            array = _array(tensor, part.home)
            tensor.CopyFrom(numpy_helper.from_array(_random(array, _generator(seed, name)), tensor.name))
        for name, numbers in _tables(model):
            drawn = _random(np.array(numbers, np.float32), _generator(seed, name))
            numbers[:] = drawn.tolist()
        _strip(model)
        return Piece(model, part.home)

    program = piece(case.program)
    return replace(
        case,
        program=program,
        reference=program if case.reference is case.program else piece(case.reference),
        inputs={name: _random(array, _generator(seed, name)) for name, array in case.inputs.items()},
        notes=(
            *case.notes,
            "weights and inputs are random, of the original's mean, deviation and range",
            "source lines and paths of the module that the graph was exported from are left out",
        ),
    )


def _random(array: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    if not _replaceable(array):
        return array
    wide = array.astype(np.float64)
    finite = wide[np.isfinite(wide)] if np.isfinite(wide).any() else np.zeros(1)
    drawn = np.clip(rng.normal(finite.mean(), finite.std(), array.shape), finite.min(), finite.max())
    drawn = np.where(np.isfinite(wide), drawn, wide)
    return (np.round(drawn) if array.dtype.kind in "iub" else drawn).astype(array.dtype)


def _replaceable(array: np.ndarray) -> bool:
    """Integers of more than a byte are indices and shapes."""
    return array.size > 1 and (array.dtype.kind in "fb" or (array.dtype.kind in "iu" and array.dtype.itemsize == 1))


def _generator(seed: int, name: str) -> np.random.Generator:
    return np.random.default_rng([seed, *name.encode()])


def _weights(piece: Piece) -> dict[str, bytes]:
    arrays = {name: _array(tensor, piece.home) for name, tensor in _tensors(piece.model)}
    arrays |= {name: np.array(numbers, np.float32) for name, numbers in _tables(piece.model)}
    return {name: array.tobytes() for name, array in arrays.items() if _replaceable(array)}


def _array(tensor: onnx.TensorProto, home: Graph) -> np.ndarray:
    return numpy_helper.to_array(tensor, str(resolved(home.path).parent))


def _tensors(model: onnx.ModelProto) -> Iterator[tuple[str, onnx.TensorProto]]:
    """Name and tensor of every constant: initializers, sparse ones by their values, and attributes of nodes."""
    for place, graph in _graphs(model):
        yield from ((f"{place}{tensor.name}", tensor) for tensor in graph.initializer)
        yield from ((f"{place}{sparse.values.name}", sparse.values) for sparse in graph.sparse_initializer)
    for name, node in _nodes(model):
        for attribute in node.attribute:
            yield from ((f"{name}.{attribute.name}", tensor) for tensor in attribute.tensors)
            if attribute.type == onnx.AttributeProto.TENSOR:
                yield name, attribute.t
            elif attribute.type == onnx.AttributeProto.SPARSE_TENSOR:
                yield name, attribute.sparse_tensor.values


def _tables(model: onnx.ModelProto) -> Iterator[tuple[str, Any]]:
    """Name and numbers of the attributes that are weights: of Constant, and of trees, linear models and scalers."""
    for name, node in _nodes(model):
        if node.op_type == "Constant" or node.domain == "ai.onnx.ml":
            for attribute in node.attribute:
                if attribute.type == onnx.AttributeProto.FLOATS:
                    yield f"{name}.{attribute.name}", attribute.floats


_QUOTES = ("doc_string", "metadata_props", "training_info")
"""Fields that may quote what a file, or any part of it, was made of."""


def _strip(part: Any) -> None:
    """Clear these fields in a message and all that it holds."""
    for name in _QUOTES:
        if name in part.DESCRIPTOR.fields_by_name:
            part.ClearField(name)
    for field, value in () if isinstance(part, onnx.TensorProto) else part.ListFields():  # its numbers stay
        if field.message_type is not None:
            for inner in value if isinstance(value, Sequence) else [value]:
                _strip(inner)


def _graphs(model: onnx.ModelProto) -> Iterator[tuple[str, onnx.GraphProto]]:
    """The graph, and those inside nodes, each with the beginning of the names of what is in it."""
    yield "", model.graph
    for name, node in _nodes(model):
        yield from _inside(name, node)


def _inside(name: str, node: onnx.NodeProto) -> Iterator[tuple[str, onnx.GraphProto]]:
    for attribute in node.attribute:
        inner = [attribute.g] if attribute.type == onnx.AttributeProto.GRAPH else attribute.graphs
        yield from ((f"{name}.{attribute.name}.", graph) for graph in inner)


def _nodes(model: onnx.ModelProto) -> Iterator[tuple[str, onnx.NodeProto]]:
    """The nodes of the graph, of functions and of graphs inside nodes, each by its place and its first output."""
    waiting = [("", model.graph.node), *((f"{f.domain}.{f.name}.", f.node) for f in model.functions)]
    while waiting:
        place, nodes = waiting.pop(0)
        for node in nodes:
            name = f"{place}{next(iter(node.output), node.name)}"
            yield name, node
            waiting += [(inner, graph.node) for inner, graph in _inside(name, node)]
