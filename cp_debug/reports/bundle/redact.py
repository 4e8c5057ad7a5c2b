"""Random weights and inputs in place of the user's, of the same statistics."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import onnx
from onnx import numpy_helper

from cp_debug.errors import InputError
from cp_debug.files import resolved
from cp_debug.graph.graph import Graph
from cp_debug.reports.bundle.case import Case, Piece
from cp_debug.reports.bundle.shrink import Shrinker

TRIES = 5
"""Seeds tried before giving up."""


def redact(case: Case, shrinker: Shrinker) -> Case:
    """The case with every tensor of more than one number replaced by random ones of its mean, deviation and range.

    Shapes, names, attributes, integers that are no quantized weights, and single numbers stay; metadata goes, as it
    quotes source code and its paths. Raises InputError when the fault does not survive it.
    """
    if len(case.pieces) > 1 and _weights(case.program) != _weights(case.reference):
        raise InputError("--redact: the fault is a difference in the weights, which no random ones could show")
    for seed in range(TRIES):
        random = _redacted(case, seed)
        if shrinker.accepts(random):
            return random
    raise InputError(f"--redact: the fault did not survive random weights and inputs ({TRIES} seeds were tried)")


def _redacted(case: Case, seed: int) -> Case:
    def piece(part: Piece) -> Piece:
        model = onnx.ModelProto()
        model.CopyFrom(part.model)
        for tensor in model.graph.initializer:  # the same seed and name: the same weight on both sides
            array = _array(tensor, part.home)
            tensor.CopyFrom(numpy_helper.from_array(_random(array, _generator(seed, tensor.name)), tensor.name))
        _strip(model)
        return Piece(model, part.home)

    program = piece(case.program)
    return replace(
        case,
        program=program,
        reference=program if case.reference is case.program else piece(case.reference),
        inputs={name: _random(array, _generator(seed, name)) for name, array in case.inputs.items()},
        notes=(*case.notes, "weights and inputs are random, of the original's mean, deviation and range"),
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
    arrays = {tensor.name: _array(tensor, piece.home) for tensor in piece.model.graph.initializer}
    return {name: array.tobytes() for name, array in arrays.items() if _replaceable(array)}


def _array(tensor: onnx.TensorProto, home: Graph) -> np.ndarray:
    return numpy_helper.to_array(tensor, str(resolved(home.path).parent))


def _strip(model: onnx.ModelProto) -> None:
    del model.metadata_props[:]
    model.ClearField("doc_string")
    for item in _described(model.graph):
        del item.metadata_props[:]
        item.ClearField("doc_string")


def _described(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto | onnx.NodeProto | onnx.TensorProto]:
    yield graph
    yield from graph.node
    yield from graph.initializer
