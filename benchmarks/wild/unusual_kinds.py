"""Further kinds of faults, for the operators of ``unusual.py``: scans, samplers, spectra, codebooks, reductions.

Which names of a cause are right was written down before the first run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from onnx import helper

from .edits import Net, attribute, set_attribute
from .kinds import _PLAIN, Kind, Place, Places, _attribute, _changed_weight, _int8, _set

UNUSUAL_KINDS: dict[str, Kind] = {}


def _kind(name: str, right: str, near: str, places: Places) -> None:
    UNUSUAL_KINDS[name] = Kind(places, frozenset(right.split()), frozenset(near.split()))


def _roll(axis: int) -> Callable[[np.ndarray, np.random.Generator], np.ndarray | None]:
    def change(array: np.ndarray, rng: np.random.Generator) -> np.ndarray | None:
        place = axis if array.ndim > 2 else 1 - axis
        return np.roll(array, 1, place) if array.ndim > 1 and array.shape[place] > 2 else None

    return change


def _operand(change: Callable[[np.ndarray], np.ndarray | None], *ops: str) -> Places:
    """Constants of several elements that are no weights of products."""

    def places(net: Net, rng: np.random.Generator) -> Iterator[Place]:
        constants = net.constants()
        for node in net.of(*ops):
            for name in node.input:
                array = constants.get(name)
                if array is None or array.dtype != np.float32 or array.size < 4:
                    continue
                made = change(array)
                if made is not None and not np.array_equal(made, array):
                    yield Place([*filter(None, node.output)], f"{name} of {node.op_type}", _set(name, made))

    return places


def _other(others: dict[str, str]) -> Places:
    def places(net: Net, rng: np.random.Generator) -> Iterator[Place]:
        for node in net.of(*others):

            def apply(spoilt: Net, value: str = node.output[0], other: str = others[node.op_type]) -> None:
                spoilt.node(value).op_type = other

            yield Place([node.output[0]], f"{node.op_type} → {others[node.op_type]}", apply)

    return places


def _exchanged(first: int, second: int, *ops: str) -> Places:
    def places(net: Net, rng: np.random.Generator) -> Iterator[Place]:
        for node in net.of(*ops):
            if len(node.input) <= max(first, second):
                continue

            def apply(spoilt: Net, value: str = node.output[0]) -> None:
                struck = spoilt.node(value)
                struck.input[first], struck.input[second] = struck.input[second], struck.input[first]

            yield Place([*filter(None, node.output)], f"{node.op_type}: inputs {first} and {second}", apply)

    return places


def _parts(net: Net, rng: np.random.Generator) -> Iterator[Place]:
    """The first two results of a Split, of equal shape, change places."""
    for node in net.of("Split"):
        first, second = list(node.output)[:2]
        if net.values[first].shape != net.values[second].shape:
            continue

        def apply(spoilt: Net, value: str = first) -> None:
            struck = spoilt.node(value)
            struck.output[0], struck.output[1] = struck.output[1], struck.output[0]

        yield Place([first, second], "parts exchanged", apply)


def _slices(net: Net, rng: np.random.Generator) -> Iterator[Place]:
    """One slice of floats begins and ends a place later, where the axis has room."""
    constants = net.constants()
    for node in net.of("Slice"):
        names = list(node.input)[1:4]
        if len(names) < 3 or any(n not in constants or constants[n].size != 1 for n in names):
            continue
        start, end, axis = (int(constants[n].item()) for n in names)
        shape = net.values[node.input[0]].shape
        length = shape[axis]
        stop = min(end, length) if end >= 0 else length + end
        if not 0 <= start < stop or net.values[node.output[0]].dtype != np.float32:
            continue
        step = 1 if stop + 1 <= length else -1 if start >= 1 else 0
        if step == 0:
            continue

        def apply(spoilt: Net, names: Any = tuple(names), moved: Any = (start + step, stop + step)) -> None:
            for name, value in zip(names, moved, strict=False):
                spoilt.set_constant(name, np.full(constants[name].shape, value, np.int64))

        yield Place([node.output[0]], f"{start}:{stop} → {start + step}:{stop + step}", apply)


def _twice(net: Net, rng: np.random.Generator) -> Iterator[Place]:
    """A factor of 2 behind a node."""
    for node in net.of("Add", "MatMul", "Conv", "Einsum", "ReduceSum"):
        value = node.output[0]
        if net.values[value].dtype != np.float32 or value in {v.name for v in net.graph.output}:
            continue

        def apply(spoilt: Net, value: str = value) -> None:
            inner = f"{value}.before"
            maker = spoilt.node(value)
            maker.output[0] = inner
            two = spoilt.constant(f"{value}.two", np.float32(2))
            place = list(spoilt.graph.node).index(maker) + 1
            spoilt.graph.node.insert(place, helper.make_node("Mul", [inner, two], [value], f"{value}.mul"))

        yield Place([value], "× 2", apply)


def _turned(net: Net, rng: np.random.Generator) -> Iterator[Place]:
    """A Transpose that exchanges two axes of equal length as well."""
    for node in net.of("Transpose"):
        perm = attribute(node, "perm")
        shape = net.values[node.output[0]].shape
        pairs = [(i, j) for i in range(len(shape)) for j in range(i) if shape[i] == shape[j] > 1]
        if perm is None or not pairs:
            continue

        def apply(spoilt: Net, value: str = node.output[0], perm: Any = tuple(perm), pair: Any = pairs[0]) -> None:
            made, (i, j) = list(perm), pair
            made[i], made[j] = made[j], made[i]
            set_attribute(spoilt.node(value), "perm", made)

        yield Place([node.output[0]], f"axes {pairs[0]} exchanged", apply)


def _exponent(net: Net, rng: np.random.Generator) -> Iterator[Place]:
    constants = net.constants()
    for node in net.of("Pow"):
        if node.input[1] in constants:
            yield Place([node.output[0]], "exponent + 1", _set(node.input[1], constants[node.input[1]] + 1))


def _indices(net: Net, rng: np.random.Generator) -> Iterator[Place]:
    """Computed indices that a Gather reads are rolled by one along their last axis."""
    constants = net.constants()
    for node in net.of("GatherND", "ScatterElements"):
        name = node.input[1]
        if name in constants and constants[name].ndim and constants[name].shape[0] > 2:
            yield Place([node.output[0]], f"{name} rolled", _set(name, np.roll(constants[name], 1, 0)))


_LAYOUT = "weight-layout permuted index-shifted"
_kind("rows-rolled", _LAYOUT, "other-weights spatial-shift", _changed_weight(lambda w, r: _roll(0)(w, r), *_PLAIN))
_kind("columns-rolled", _LAYOUT, "other-weights", _changed_weight(lambda w, r: _roll(1)(w, r), *_PLAIN))
_kind(
    "operand-fp16",
    "fp16-weights fp16",
    "tf32 other-weights constant-differs",
    _operand(lambda a: a.astype(np.float16).astype(np.float32), "Mul", "Add", "Sub", "Div", "Einsum"),
)
_kind(
    "operand-int8",
    "int8-weights int8-per-tensor",
    "int8 other-weights constant-differs",
    _operand(lambda a: _int8(a, None), "Mul", "Add", "Sub", "Div", "Einsum", "LayerNormalization"),
)
_kind(
    "operand-rolled",
    "index-shifted weight-layout permuted",
    "other-weights constant-differs channels-shifted channels-scaled",
    _operand(lambda a: np.roll(a, 1, -1) if a.shape[-1] > 2 else None, "Mul", "Add", "Sub", "LayerNormalization"),
)
_kind("exclusive", "attribute", "spatial-shift", _attribute("exclusive", 0, lambda v: 1 - v, "CumSum"))
_kind("reverse", "attribute", "flipped", _attribute("reverse", 0, lambda v: 1 - v, "CumSum"))
_kind("largest", "attribute", "", _attribute("largest", 1, lambda v: 1 - v, "TopK"))
_kind("align-corners", "attribute", "spatial-shift", _attribute("align_corners", 0, lambda v: 1 - v, "GridSample"))
_kind(
    "padding-mode",
    "attribute",
    "padding",
    _attribute("padding_mode", b"zeros", lambda m: "border" if m == b"zeros" else "zeros", "GridSample"),
)
_kind(
    "sampling-mode",
    "attribute",
    "",
    _attribute("mode", b"linear", lambda m: "nearest" if m != b"nearest" else "linear", "GridSample"),
)
_kind(
    "depth-to-space",
    "attribute",
    "permuted",
    _attribute("mode", b"DCR", lambda m: "CRD" if m == b"DCR" else "DCR", "DepthToSpace"),
)
_kind("inverse", "attribute", "scaled flipped", _attribute("inverse", 0, lambda v: 1 - v, "DFT"))
_kind(
    "approximate",
    "attribute other-operator",
    "",
    _attribute("approximate", b"none", lambda m: "none" if m == b"tanh" else "tanh", "Gelu"),
)
_kind(
    "scatter-reduction",
    "attribute",
    "",
    _attribute("reduction", b"none", lambda m: "none" if m == b"add" else None, "ScatterElements"),
)
_kind(
    "other-function",
    "other-operator operator-exchanged",
    "missing-operator missing-activation attribute extra-activation",
    _other(
        {
            "Sin": "Cos",
            "Cos": "Sin",
            "Softplus": "Relu",
            "ReduceSum": "ReduceMean",
            "ReduceL2": "ReduceL1",
            "ReduceLogSumExp": "ReduceLogSum",
            "ArgMin": "ArgMax",
            "Exp": "Softplus",
            "Erf": "Tanh",
            "LogSoftmax": "Softmax",
            "Elu": "Selu",
            "Greater": "Less",
        }
    ),
)
_kind("where-exchanged", "operand-order operands", "", _exchanged(1, 2, "Where"))
_kind("einsum-exchanged", "operand-order operands", "", _exchanged(0, 1, "Einsum", "MatMul"))
_kind("parts-exchanged", "another-tensor operand-order", "permuted flipped", _parts)
_kind("slice-moved", "index-shifted", "spatial-shift attribute", _slices)
_kind("doubled", "extra-operator scaled", "weights-scaled", _twice)
_kind("axes-exchanged", "attribute transposed", "permuted", _turned)
_kind("exponent", "constant-differs", "attribute other-operator missing-operator extra-activation", _exponent)
_kind("indices-rolled", "index-shifted permuted spatial-shift", "constant-differs", _indices)
