"""Values that a graph's inputs may hold: indices below the axis that they choose from, masks, lengths, positives.

They are told from the operators that read an input, through those that only move numbers; each way to fill an input is
followed by others, to be tried where the first does not run.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from cp_debug.graph.free_axes import known_dims, scalar
from cp_debug.graph.graph import Graph, Node, ValueInfo, readers
from cp_debug.graph.operators import MOVERS

Maker = Callable[[np.random.Generator, Sequence[int], int], Any]
"""Makes the values of an input: (generator, shape, size of the longest free axis of all inputs) → array or number."""

# fmt: off
_MOVERS = MOVERS | {"Cast", "Pad"}
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
class Way:
    """One way to fill an input."""

    make: Maker
    says: str = ""
    """The values, and why these, to follow the input's name; empty for numbers that nothing asks for."""


@dataclass(frozen=True)
class Ways:
    """Ways to fill an input: the first one to try, then others."""

    ways: tuple[Way, ...]
    certain: bool
    """Whether any values of this dtype do, so that nothing need be tried."""


def ways(graph: Graph, value: ValueInfo) -> Ways:
    """Ways to fill one input, best first, and whether any values of its dtype would do."""
    assert value.dtype is not None
    kind = _kind(value.dtype)
    uses = list(_uses(graph, value.name))
    if kind == "b":
        return Ways((Way(_MADE["bits"]), Way(_filled(True), "true"), Way(_filled(False), "false")), certain=False)
    if kind == "i":
        first = list(_integers(graph, value, uses))
        if not first and value.dtype.itemsize <= 2:
            pixels = ", like an image" if value.dtype == np.uint8 and looks_like_image(value.shape) else ""
            limits = ml_dtypes.iinfo(value.dtype)
            whole = Way(_below(limits.max + 1, limits.min), f"over the range of {value.dtype}{pixels}")
            return Ways((whole, Way(_MADE["bits"], "0 or 1")), certain=True)
        fallback = (
            Way(_MADE["bits"], "0 or 1, because nothing requires other integers"),
            Way(_filled(1), "1"),
            Way(_filled(0), "0"),
            Way(_MADE["counted"], "0, 1, 2 …"),
            Way(_MADE["longest"], "the size of the longest free axis"),
            Way(_below(10), "below 10"),
        )
        return Ways((*first, *fallback), certain=False)
    special = list(_floats(graph, value, uses))
    normal = Way(_MADE["normal"], "N(0, 1), like a normalized image" if looks_like_image(value.shape) else "")
    others = (
        normal,
        Way(_MADE["positive"], "positive"),
        Way(_uniform(0, 1), "between 0 and 1"),
        Way(_filled(1), "1"),
        Way(_filled(0), "0"),
    )
    return Ways((*special, *others), certain=not special)


def looks_like_image(shape: Sequence[int | str | None] | None) -> bool:
    """Whether a shape of rank 4 has 1, 3 or 4 channels, first or last."""
    return shape is not None and len(shape) == 4 and bool({shape[1], shape[3]} & {1, 3, 4})


def _kind(dtype: np.dtype) -> str:
    """``b``, ``i`` or ``f``; the types of ``ml_dtypes``, which numpy calls void, included."""
    return {"b": "b", "i": "i", "u": "i"}.get(dtype.kind, "i" if "int" in dtype.name else "f")


def _integers(graph: Graph, value: ValueInfo, uses: Sequence[tuple[Node, int]]) -> Iterator[Way]:
    """Ways to fill an integer input, from the operators that read it (``uses``) and from its name."""
    limits = {limit: node for node, place in uses if (limit := _index_limit(graph, node, place)) is not None}
    name = value.name.lower()
    if 0 in limits:  # chosen from an axis whose size is free
        reader = f"of what {_reader(limits[0])} chooses from"
        yield from (Way(_MADE["below longest"], f"indices {reader}"), Way(_filled(0), f"0, an index {reader}"))
    elif limits:
        end = min(limits)
        if "position" in name:
            counted = lambda rng, shape, longest: _MADE["counted"](rng, shape, longest) % max(end, 1)  # noqa: E731
            yield Way(counted, f"0, 1, 2 … below {end}: positions, by its name")
        else:
            says = f"random integers 0 to {end - 1}, which {_reader(limits[end])} can pick"
            yield Way(_below(end), says)
    for node, place in uses:
        compared = node.op == "Equal" and not limits and "mask" not in name
        if compared and (compared_with := scalar(graph, node.proto.input[1 - place])):  # a sample rate, a mode
            yield Way(_filled(compared_with), f"{compared_with:g}, with which {_reader(node)} compares it")
        if (node.op, place) in _LENGTHS:
            yield Way(_MADE["longest"], f"the size of the longest free axis, as a length that {_reader(node)} takes")
        if (node.op, place) in _ARGUMENTS:
            yield from _arguments(node, place)
    if "mask" in name:
        yield Way(_filled(1), "1 everywhere: a mask, by its name")
    elif "position" in name and not limits:
        yield Way(_MADE["counted"], "0, 1, 2 …: positions, by its name")
    elif _IMAGE_SIZE.search(name) and not limits:
        yield Way(_image_size(graph), "height and width of the image, by its name")
    elif re.search(r"len(gth)?s?$|_len|length", name) and not limits:
        yield Way(_MADE["longest"], "the size of the longest free axis: a length, by its name")


def _reader(node: Node) -> str:
    return f"{node.op} {node.name!r}" if node.proto.name else node.op


def _index_limit(graph: Graph, node: Node, place: int) -> int | None:
    """Number of elements that an index chooses from; None for an input that is no index."""
    if node.op in ("Gather", "GatherElements", "GatherND", "ScatterND", "ScatterElements") and place == 1:
        dims = known_dims(graph, node.proto.input[0])
        axis = node.attribute("axis", 0)
        if not dims:
            return 0
        return dims[axis] if node.op in ("Gather", "GatherElements", "ScatterElements") else min(dims)
    if node.op == "com.microsoft.EmbedLayerNormalization" and place < 2:
        dims = known_dims(graph, node.proto.input[2 if place == 0 else 4])
        return dims[0] if dims else 1
    if node.op == "OneHot" and place == 0 and (depth := scalar(graph, node.proto.input[1])) is not None:
        return int(depth)
    return None


def _arguments(node: Node, place: int) -> Iterator[Way]:
    """Values for what says how an operator computes."""
    op, why = node.op, f"an argument of {_reader(node)}"
    if op in ("Reshape", "Split"):
        yield Way(_MADE["one free"], f"-1, 1, 1 …: {why}")
    if op in ("Pad", "CumSum", "Trilu", "Squeeze", "Unsqueeze", "Dropout") or (op, place) in {
        ("Slice", 1),
        ("Range", 0),
    }:
        yield Way(_filled(0), f"0: {why}")
    if (op, place) in {("Slice", 2), ("Range", 1), ("OneHot", 1), ("Resize", 3), ("NonMaxSuppression", 2)}:
        yield Way(_filled(8), f"8: {why}")
    if (op, place) == ("Slice", 3):
        yield Way(_MADE["counted"], f"0, 1, 2 …: {why}")
    if op == "NonMaxSuppression" and place > 2:
        yield Way(_filled(0.5), f"0.5: {why}")
    if op == "Loop":
        yield Way(_filled(3), f"3: {why}")
    yield Way(_filled(1), f"1: {why}")


def _floats(graph: Graph, value: ValueInfo, reads: Sequence[tuple[Node, int]]) -> Iterator[Way]:
    direct = {(node.op, place): node for node, place in _uses(graph, value.name, _KEEP_SIGN)}
    uses = {(node.op, place): node for node, place in reads}
    name = value.name.lower()
    if _IMAGE_SIZE.search(name):
        yield Way(_image_size(graph), "height and width of the image, by its name")
        yield Way(_MADE["longest"], "the size of the longest free axis")
    elif _FACTOR.search(name):
        yield Way(_filled(1), "1: a factor, by its name")
    for op, place in sorted(uses.keys() & _ARGUMENTS):
        yield from _arguments(uses[op, place], place)
    if bounded := sorted(direct.keys() & _WITHIN_ONE):
        yield Way(_uniform(-0.99, 0.99), f"within ±0.99, for {_reader(direct[bounded[0]])}")
    positive = sorted(direct.keys() & _POSITIVE)
    if positive and not direct.keys() <= {("Div", 0), ("Div", 1)}:
        if ("Acosh", 0) in direct:
            yield Way(_MADE["above one"], f"above 1, for {_reader(direct['Acosh', 0])}")
        else:
            yield Way(_MADE["positive"], f"positive, for {_reader(direct[positive[0]])}")
    elif ("Div", 1) in direct:
        yield Way(_MADE["positive"], f"positive, as {_reader(direct['Div', 1])} divides by it")
    scalers = [node for node, place in reads if _unscaled(graph, node, place)]
    if scalers and value.shape is not None and len(value.shape) > 2:
        yield Way(_uniform(0, 255), f"0 to 255: pixels, which {_reader(scalers[0])} scales")
    if states := sorted({("LSTM", 5), ("GRU", 5), ("RNN", 5)} & uses.keys()):
        yield Way(_MADE["squeezed"], f"within ±1, as a state of {_reader(uses[states[0]])}")
    if "mask" in name:
        added = [uses[key] for key in (("Add", 0), ("Add", 1)) if key in uses]
        if added and not uses.keys() & {("Sub", 1), ("Mul", 0), ("Mul", 1)}:
            yield Way(_filled(0), f"0 everywhere: a mask, by its name, that {_reader(added[0])} adds")
        else:
            yield Way(_filled(1), "1 everywhere: a mask, by its name")
    axis = _point_axis(value)
    if axis is not None and not uses.keys() & _ARGUMENTS:
        yield Way(_points(axis), "x, y within ±10, z within ±2, others 0 to 1: a point cloud, by its name and shape")


_POINTS = re.compile(r"(^|_)(points?|point_?clouds?|clouds?|pcd|pcl|lidar)$")


def _point_axis(value: ValueInfo) -> int | None:
    """Axis of x, y, z … in an input that is called a point cloud: of size 3 to 6, the last or the first but one."""
    if value.shape is None or len(value.shape) not in (2, 3) or not _POINTS.search(value.name.lower()):
        return None
    return next((axis for axis in (-1, -2) if value.shape[axis] in (3, 4, 5, 6)), None)


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


def _uses(graph: Graph, name: str, through: Collection[str] = _MOVERS) -> Iterator[tuple[Node, int]]:
    """(Node, input place) of every operator that reads ``name``, as it is or moved by operators of ``through``."""
    moves = lambda node, name: node.op in through and (node.op == "Concat" or node.proto.input[0] == name)  # noqa: E731
    for node, read in readers(graph, name, moves):
        yield from ((node, place) for place, operand in enumerate(node.proto.input) if operand == read)


_MADE: Mapping[str, Maker] = {
    "normal": lambda rng, shape, _: rng.standard_normal(shape),
    "positive": lambda rng, shape, _: 0.1 + np.abs(rng.standard_normal(shape)),
    "above one": lambda rng, shape, _: 1.1 + np.abs(rng.standard_normal(shape)),
    "squeezed": lambda rng, shape, _: np.tanh(rng.standard_normal(shape)),
    "bits": lambda rng, shape, _: rng.integers(0, 2, shape),
    "counted": lambda _, shape, __: np.broadcast_to(np.arange(shape[-1]) if len(shape) else 0, shape),
    "longest": lambda _, shape, longest: np.full(shape, longest),
    "below longest": lambda rng, shape, longest: rng.integers(0, max(longest, 1), shape),
    "one free": lambda _, shape, __: np.where(np.arange(math.prod(shape)) == 0, -1, 1).reshape(shape),
}
"""Name → maker of the values of an input that takes no numbers of its own."""


def _filled(value: float) -> Maker:
    return lambda rng, shape, longest: np.full(shape, value)


def _uniform(low: float, high: float) -> Maker:
    return lambda rng, shape, longest: rng.uniform(low, high, shape)


def _below(limit: int, low: int = 0) -> Maker:
    return lambda rng, shape, longest: rng.integers(low, max(limit, low + 1), shape)


def _image_size(graph: Graph) -> Maker:
    """The height and width of the first image among the inputs; the longest free axis where they are free."""
    image = next((v.shape[-2:] for v in graph.inputs if v.shape is not None and len(v.shape) == 4), (None, None))
    return lambda rng, shape, longest: np.resize([size if isinstance(size, int) else longest for size in image], shape)


def _points(axis: int) -> Maker:
    def maker(rng: np.random.Generator, shape: Sequence[int], longest: int) -> np.ndarray:
        low, high = np.zeros(shape[axis]), np.ones(shape[axis])
        low[:3], high[:3] = (-10, -10, -2), (10, 10, 2)
        cloud = rng.uniform(low, high, (*np.delete(np.asarray(shape), axis), shape[axis]))
        return np.moveaxis(cloud, -1, axis)

    return maker
