"""Values that a graph's inputs may hold: indices below the axis that they choose from, masks, lengths, positives.

They are told from the operators that read an input, through those that only move numbers; each way to fill an input is
followed by others, to be tried where the first does not run.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import ml_dtypes
import numpy as np

from cp_debug.graph.free_axes import attribute, known_dims, scalar
from cp_debug.graph.graph import Graph, Node, ValueInfo

Maker = Callable[[np.random.Generator, Sequence[int], int], np.ndarray]
"""Makes the values of an input: (generator, shape, size of the longest free axis of all inputs) → array."""

# fmt: off
_MOVERS = {
    "Cast", "Concat", "Expand", "Flatten", "Gather", "Identity", "Pad", "Reshape", "Slice", "Split", "Squeeze", "Tile",
    "Transpose", "Unsqueeze",
}
# Positive inputs give positive outputs.
_KEEP_SIGN = _MOVERS | {
    "AveragePool", "GlobalAveragePool", "MaxPool", "ReduceMax", "ReduceMean", "ReduceMin", "ReduceSum", "Sqrt",
}
_ARGUMENTS = {
    ("CenterCropPad", 1), ("ConstantOfShape", 0), ("Expand", 1), ("Loop", 0), ("NonMaxSuppression", 2), ("OneHot", 1),
    ("Pad", 1), ("Range", 0), ("Range", 1), ("Range", 2), ("Reshape", 1), ("Resize", 2), ("Resize", 3), ("Slice", 1),
    ("Slice", 2), ("Slice", 3), ("Slice", 4), ("Split", 1), ("Squeeze", 1), ("Tile", 1), ("TopK", 1), ("Trilu", 1),
    ("Unsqueeze", 1), ("CumSum", 1), ("Upsample", 1), ("Dropout", 1), ("NonMaxSuppression", 3),
    ("NonMaxSuppression", 4),
}
# fmt: on
"""(Operator, place) of inputs that say how, not what, it computes."""
_LENGTHS = {("LSTM", 4), ("GRU", 4), ("RNN", 4), ("ReverseSequence", 1)}
_POSITIVE = {("Log", 0), ("Sqrt", 0), ("Pow", 0), ("Acosh", 0), ("Div", 1), ("Reciprocal", 0)}
_WITHIN_ONE = {("Asin", 0), ("Acos", 0), ("Atanh", 0)}
DOMAINS = {"Log", "Sqrt", "Pow", "Acosh", "Asin", "Acos", "Atanh"}
"""Operators that are not defined for every number."""
_IMAGE_SIZE = re.compile(r"(im|img|image|orig|original|target|ori)_?\w*_?(shape|size|sizes|hw)$")
_FACTOR = re.compile(r"scale_factor|(^|_)(scales?|speed|temperature)$")
_LARGE = 16.0
"""A constant that images are divided by, or that is subtracted from them, when they are not scaled before."""


@dataclass(frozen=True)
class Ways:
    """Ways to fill an input: the first one to try, then others."""

    makers: tuple[Maker, ...]
    certain: bool
    """Whether any values of this dtype do, so that nothing need be tried."""


def ways(graph: Graph, value: ValueInfo) -> Ways:
    """Makers of values for one input, best first, and whether any values of its dtype would do."""
    assert value.dtype is not None
    kind = _kind(value.dtype)
    uses = list(_uses(graph, value.name))
    if kind == "b":
        return Ways((_booleans, _filled(True), _filled(False)), certain=False)
    if kind == "i":
        first = list(_integers(graph, value, uses))
        if not first and value.dtype.itemsize <= 2:
            return Ways((_whole_range(value.dtype), _bits), certain=True)
        fallback = (_bits, _filled(1), _filled(0), _counted, _longest, _below(10))
        return Ways((*first, *fallback), certain=False)
    special = list(_floats(graph, value, uses))
    return Ways((*special, _normal, _positive, _uniform(0, 1), _filled(1), _filled(0)), certain=not special)


def plain(dtype: np.dtype) -> Maker:
    """The maker for an input of which only the dtype is known."""
    if _kind(dtype) == "b":
        return _booleans
    if _kind(dtype) == "i":
        return _whole_range(dtype) if dtype.itemsize <= 2 else _bits
    return _normal


def _kind(dtype: np.dtype) -> str:
    """``b``, ``i`` or ``f``; the types of ``ml_dtypes``, which numpy calls void, included."""
    return {"b": "b", "i": "i", "u": "i"}.get(dtype.kind, "i" if "int" in dtype.name else "f")


def _integers(graph: Graph, value: ValueInfo, uses: Sequence[tuple[Node, int]]) -> Iterator[Maker]:
    """Makers for an integer input, from the operators that read it (``uses``) and from its name."""
    limits = [limit for node, place in uses if (limit := _index_limit(graph, node, place)) is not None]
    name = value.name.lower()
    if limits and 0 in limits:  # chosen from an axis whose size is free
        yield from (_below_longest, _below(1))
    elif limits:
        yield _counted_below(min(limits)) if "position" in name else _below(min(limits))
    for node, place in uses:
        compared = node.op == "Equal" and not limits and "mask" not in name
        if compared and (compared_with := scalar(graph, node.proto.input[1 - place])):  # a sample rate, a mode
            yield _filled(compared_with)
        if (node.op, place) in _LENGTHS:
            yield _longest
        if (node.op, place) in _ARGUMENTS:
            yield from _arguments(node.op, place)
    if "mask" in name:
        yield _filled(1)
    elif "position" in name and not limits:
        yield _counted
    elif _IMAGE_SIZE.search(name) and not limits:
        yield _image_size(graph)
    elif re.search(r"len(gth)?s?$|_len|length", name) and not limits:
        yield _longest


def _index_limit(graph: Graph, node: Node, place: int) -> int | None:
    """Number of elements that an index chooses from; None for an input that is no index."""
    if node.op in ("Gather", "GatherElements", "GatherND", "ScatterND", "ScatterElements") and place == 1:
        dims = known_dims(graph, node.proto.input[0])
        axis = attribute(node, "axis", 0)
        if not dims:
            return 0
        return dims[axis] if node.op in ("Gather", "GatherElements", "ScatterElements") else min(dims)
    if node.op == "com.microsoft.EmbedLayerNormalization" and place < 2:
        dims = known_dims(graph, node.proto.input[2 if place == 0 else 4])
        return dims[0] if dims else 1
    if node.op == "OneHot" and place == 0 and (depth := scalar(graph, node.proto.input[1])) is not None:
        return int(depth)
    return None


def _arguments(op: str, place: int) -> Iterator[Maker]:
    """Values for what says how an operator computes."""
    if op in ("Reshape", "Split"):
        yield _one_free
    if op in ("Pad", "CumSum", "Trilu", "Squeeze", "Unsqueeze", "Dropout") or (op, place) in {
        ("Slice", 1),
        ("Range", 0),
    }:
        yield _filled(0)
    if (op, place) in {("Slice", 2), ("Range", 1), ("OneHot", 1), ("Resize", 3), ("NonMaxSuppression", 2)}:
        yield _filled(8)
    if (op, place) == ("Slice", 3):
        yield _counted
    if op == "NonMaxSuppression" and place > 2:
        yield _filled(0.5)
    if op == "Loop":
        yield _filled(3)
    yield _filled(1)


def _floats(graph: Graph, value: ValueInfo, reads: Sequence[tuple[Node, int]]) -> Iterator[Maker]:
    direct = {(node.op, place) for node, place in _uses(graph, value.name, _KEEP_SIGN)}
    uses = {(node.op, place) for node, place in reads}
    name = value.name.lower()
    if _IMAGE_SIZE.search(name):
        yield from (_image_size(graph), _longest)
    elif _FACTOR.search(name):
        yield _filled(1)
    for op, place in sorted(uses & _ARGUMENTS):
        yield from _arguments(op, place)
    if direct & _WITHIN_ONE:
        yield _uniform(-0.99, 0.99)
    if direct & _POSITIVE and not direct <= {("Div", 0), ("Div", 1)}:
        yield _above_one if ("Acosh", 0) in direct else _positive
    elif ("Div", 1) in direct:
        yield _positive
    if any(_unscaled(graph, node, place) for node, place in reads) and value.shape is not None and len(value.shape) > 2:
        yield _uniform(0, 255)
    if {("LSTM", 5), ("GRU", 5), ("RNN", 5)} & uses:
        yield _squeezed
    if "mask" in name:
        added = ("Add", 0) in uses or ("Add", 1) in uses
        yield _filled(0) if added and not uses & {("Sub", 1), ("Mul", 0), ("Mul", 1)} else _filled(1)


def _unscaled(graph: Graph, node: Node, place: int) -> bool:
    """Whether ``node`` brings pixels from 0 … 255 to the size that networks want."""
    if place != 0 or node.op not in ("Div", "Mul", "Sub") or len(node.proto.input) < 2:
        return False
    factor = scalar(graph, node.proto.input[1])
    if factor is None:
        dims = known_dims(graph, node.proto.input[1])
        if node.proto.input[1] not in graph.initializers or dims is None or np.prod(dims) > 4:
            return False
        factor = float(np.abs(graph.initializer(node.proto.input[1])).mean())
    return 0 < abs(factor) < 1 / _LARGE if node.op == "Mul" else abs(factor) > _LARGE


def _uses(graph: Graph, name: str, through: set[str] = _MOVERS) -> Iterator[tuple[Node, int]]:
    """(Node, input place) of every operator that reads ``name``, as it is or moved by operators of ``through``."""
    stack, visited = [name], {name}
    while stack:
        name = stack.pop()
        for node in graph.consumers.get(name, ()):
            places = [i for i, operand in enumerate(node.proto.input) if operand == name]
            yield from ((node, place) for place in places)
            if node.op in through and 0 in places + [0] * (node.op == "Concat"):
                stack += [o for o in node.outputs if o not in visited]
                visited.update(node.outputs)


def _normal(rng: np.random.Generator, shape: Sequence[int], longest: int) -> np.ndarray:
    return np.asarray(rng.standard_normal(shape))


def _positive(rng: np.random.Generator, shape: Sequence[int], longest: int) -> np.ndarray:
    return 0.1 + np.abs(rng.standard_normal(shape))


def _above_one(rng: np.random.Generator, shape: Sequence[int], longest: int) -> np.ndarray:
    return 1.1 + np.abs(rng.standard_normal(shape))


def _squeezed(rng: np.random.Generator, shape: Sequence[int], longest: int) -> np.ndarray:
    return np.tanh(rng.standard_normal(shape))


def _booleans(rng: np.random.Generator, shape: Sequence[int], longest: int) -> np.ndarray:
    return np.asarray(rng.integers(0, 2, shape))


_bits = _booleans


def _counted(rng: np.random.Generator, shape: Sequence[int], longest: int) -> np.ndarray:
    return np.broadcast_to(
        np.arange(shape[-1] if len(shape) else 1)[: None if len(shape) else 1], shape or (1,)
    ).reshape(shape)


def _longest(rng: np.random.Generator, shape: Sequence[int], longest: int) -> np.ndarray:
    return np.full(shape, longest)


def _one_free(rng: np.random.Generator, shape: Sequence[int], longest: int) -> np.ndarray:
    return np.where(np.arange(int(np.prod(shape))) == 0, -1, 1).reshape(shape)


def _filled(value: float) -> Maker:
    return lambda rng, shape, longest: np.full(shape, value)


def _uniform(low: float, high: float) -> Maker:
    return lambda rng, shape, longest: np.asarray(rng.uniform(low, high, shape))


def _image_size(graph: Graph) -> Maker:
    """The height and width of the first image among the inputs; the longest free axis where they are free."""
    image = next((v.shape[-2:] for v in graph.inputs if v.shape is not None and len(v.shape) == 4), (None, None))

    def maker(rng: np.random.Generator, shape: Sequence[int], longest: int) -> np.ndarray:
        sizes = [size if isinstance(size, int) else longest for size in image]
        return np.resize(np.array(sizes), shape)

    return maker


def _below(limit: int) -> Maker:
    return lambda rng, shape, longest: np.asarray(rng.integers(0, max(limit, 1), shape))


def _below_longest(rng: np.random.Generator, shape: Sequence[int], longest: int) -> np.ndarray:
    return np.asarray(rng.integers(0, max(longest, 1), shape))


def _counted_below(limit: int) -> Maker:
    return lambda rng, shape, longest: _counted(rng, shape, longest) % max(limit, 1)


def _whole_range(dtype: np.dtype) -> Maker:
    limits = ml_dtypes.iinfo(dtype)
    return lambda rng, shape, longest: np.asarray(rng.integers(limits.min, limits.max + 1, shape))
