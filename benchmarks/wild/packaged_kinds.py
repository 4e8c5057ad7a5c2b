"""Further kinds of faults, of attention, residual and segmentation networks: ``packaged.py``'s and others.

Which names of a cause are right was written down before the first run.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx
from onnx import helper

from .edits import Net, attribute, set_attribute
from .kinds import _PLAIN, Kind, Place, Places, _attribute, _changed_weight, _set
from .unusual_kinds import _other

PACKAGED_KINDS: dict[str, Kind] = {}


def _kind(name: str, right: str, near: str, places: Places) -> None:
    PACKAGED_KINDS[name] = Kind(places, frozenset(right.split()), frozenset(near.split()))


def _insert(net: Net, before: onnx.NodeProto, *nodes: onnx.NodeProto) -> None:
    place = list(net.graph.node).index(before)
    for offset, node in enumerate(nodes):
        net.graph.node.insert(place + offset, node)


def _block_transposed(array: np.ndarray, rng: np.random.Generator) -> np.ndarray | None:
    """Rows in the order of another layout: row ``i·b + j`` is ``j·a + i``, as when C×HW is read as HW×C."""
    axis = 0 if array.ndim > 2 else 1
    rows = array.shape[axis]
    factor = next((f for f in (4, 3, 2, 5, 7) if rows % f == 0 and rows > f), None)
    if array.ndim < 2 or factor is None:
        return None
    return np.take(array, np.arange(rows).reshape(factor, -1).T.reshape(-1), axis)


def _masks(net: Net, rng: np.random.Generator) -> Iterator[Place]:
    """A mask that selects what should be left out: Not in front of Where, or ``1 − mask`` that is ``mask``."""
    constants = net.constants()
    for node in net.of("Where"):

        def inverted(spoilt: Net, value: str = node.output[0]) -> None:
            struck = spoilt.node(value)
            _insert(spoilt, struck, helper.make_node("Not", [struck.input[0]], [f"{value}.not"], f"{value}.not"))
            struck.input[0] = f"{value}.not"

        yield Place([node.output[0]], "condition inverted", inverted)
    for node in net.of("Sub"):
        if (one := constants.get(node.input[0])) is None or one.size != 1 or one.item() != 1:
            continue

        def kept(spoilt: Net, value: str = node.output[0]) -> None:
            struck = spoilt.node(value)
            struck.op_type = "Identity"
            del struck.input[0]

        yield Place([node.output[0]], "1 − mask is mask", kept)


def _scales(net: Net, rng: np.random.Generator) -> Iterator[Place]:
    """A Mul or Div by one number, as in front of attention's Softmax, is not there."""
    constants = net.constants()
    for node in net.of("Mul", "Div"):
        sides = [constants.get(name) for name in node.input]
        single = [a for a in sides if a is not None and a.size == 1 and a.dtype == np.float32]
        if len(single) != 1 or abs(single[0].item()) == 1 or net.values[node.output[0]].dtype != np.float32:
            continue

        def apply(spoilt: Net, value: str = node.output[0], number: int = 0 if sides[0] is not None else 1) -> None:
            struck = spoilt.node(value)
            struck.op_type = "Identity"
            del struck.input[number]

        yield Place([node.output[0]], f"{node.op_type} by {single[0].item():.4g} is gone", apply)


def _tanh(net: Net, rng: np.random.Generator) -> Iterator[Place]:
    """Gelu's Erf(x/√2) by the Tanh that approximates it."""
    for node in net.of("Erf"):

        def apply(spoilt: Net, value: str = node.output[0]) -> None:
            struck = spoilt.node(value)
            source, names = struck.input[0], [f"{value}.{n}" for n in ("cube", "part", "sum", "scaled")]
            three = spoilt.constant(f"{value}.three", np.float32(3))
            share = spoilt.constant(f"{value}.share", np.float32(0.044715 * 2))
            scale = spoilt.constant(f"{value}.scale", np.float32(2 / np.sqrt(np.pi)))
            _insert(
                spoilt,
                struck,
                helper.make_node("Pow", [source, three], [names[0]], names[0]),
                helper.make_node("Mul", [names[0], share], [names[1]], names[1]),
                helper.make_node("Add", [source, names[1]], [names[2]], names[2]),
                helper.make_node("Mul", [names[2], scale], [names[3]], names[3]),
            )
            struck.op_type, struck.input[0] = "Tanh", names[3]

        yield Place([node.output[0]], "Erf → Tanh of a cubic", apply)


def _regrouped(net: Net, rng: np.random.Generator) -> Iterator[Place]:
    """A convolution in groups is a dense one, with the groups' weights one group further than they belong."""
    for node, name, array in net.weighted("Conv"):
        group = attribute(node, "group", 1)
        if group < 2 or array.shape[0] * array.shape[1] * group > 40_000:
            continue
        rows, columns = array.shape[0] // group, array.shape[1]
        made = np.zeros((array.shape[0], columns * group, *array.shape[2:]), np.float32)
        for index in range(group):
            at = (index + 1) % group
            block = array[index * rows : (index + 1) * rows]
            made[index * rows : (index + 1) * rows, at * columns : (at + 1) * columns] = block

        def apply(spoilt: Net, value: str = node.output[0], name: str = name, made: np.ndarray = made) -> None:
            spoilt.set_constant(name, made)
            set_attribute(spoilt.node(value), "group", 1)

        yield Place([node.output[0]], f"{group} groups as one, a group off", apply)


def _residuals(net: Net, rng: np.random.Generator) -> Iterator[Place]:
    """One summand of two computed ones is lost."""
    reached = net.reached()
    for node in net.of("Add"):
        first, second = node.input
        shape = net.values[node.output[0]].shape
        if {first, second} - reached or any(net.values[n].shape != shape for n in (first, second)):
            continue
        if net.values[first].dtype != np.float32:
            continue

        def apply(spoilt: Net, value: str = node.output[0], lost: int = int(rng.integers(2))) -> None:
            struck = spoilt.node(value)
            struck.op_type = "Identity"
            del struck.input[lost]

        yield Place([node.output[0]], "one summand is lost", apply)


def _softmax_twice(net: Net, rng: np.random.Generator) -> Iterator[Place]:
    outputs = {v.name for v in net.graph.output}
    for node in net.of("Softmax", "Sigmoid"):
        value = node.output[0]
        if value in outputs:
            continue

        def apply(spoilt: Net, value: str = value) -> None:
            struck = spoilt.node(value)
            again = onnx.NodeProto()
            again.CopyFrom(struck)
            again.input[0], again.output[0], again.name = f"{value}.once", value, f"{struck.name}.again"
            struck.output[0] = f"{value}.once"
            spoilt.graph.node.insert(list(spoilt.graph.node).index(struck) + 1, again)

        yield Place([value], f"{node.op_type} twice", apply)


def _biases(net: Net, rng: np.random.Generator) -> Iterator[Place]:
    """A bias that was added twice, as by two foldings."""
    constants = net.constants()
    for node in net.of("Conv", "ConvTranspose", "Gemm"):
        name = node.input[2] if len(node.input) > 2 else ""
        if name in constants:
            yield Place([node.output[0]], f"{name} twice", _set(name, constants[name] * 2))


def _dilations(net: Net, rng: np.random.Generator) -> Iterator[Place]:
    """A dilated convolution without its dilation, padded to the same size."""
    for node in net.of("Conv"):
        dilations, pads = attribute(node, "dilations", []), attribute(node, "pads", [])
        if not dilations or max(dilations) < 2 or any(p % d for p, d in zip(pads, dilations * 2, strict=False)):
            continue

        def apply(spoilt: Net, value: str = node.output[0], dilations: Any = dilations, pads: Any = pads) -> None:
            struck = spoilt.node(value)
            set_attribute(struck, "dilations", [1] * len(dilations))
            set_attribute(struck, "pads", [p // d for p, d in zip(pads, [*dilations, *dilations], strict=True)])

        yield Place([node.output[0]], f"dilations {dilations} → 1", apply)


def _operands(net: Net, rng: np.random.Generator) -> Iterator[Place]:
    """A node reads a brother of what it should: another result of equal shape that is made of the same value."""
    reached, brothers = net.reached(), {}
    for node in net.graph.node:
        value = net.values.get(node.output[0])
        if node.input and node.output[0] in reached and value is not None and value.dtype == np.float32:
            brothers.setdefault((node.input[0], node.op_type, value.shape), []).append(node.output[0])
    for names in brothers.values():
        for first, second in itertools.pairwise(names):
            for reader in net.readers(second):

                def apply(spoilt: Net, value: str = reader.output[0], first: str = first, second: str = second) -> None:
                    struck = spoilt.node(value)
                    struck.input[list(struck.input).index(second)] = first

                yield Place([*filter(None, reader.output)], f"reads {first} instead of {second}", apply)


_kind("block-transposed", "weight-layout permuted", "other-weights", _changed_weight(_block_transposed, *_PLAIN))
_kind(
    "mask-inverted",
    "extra-operator missing-operator operand-order operands other-operator",
    "another-operand attribute shifted affine",
    _masks,
)
_kind("scale-missing", "missing-operator scaled", "affine constant-differs other-operator", _scales)
_kind(
    "gelu-tanh",
    "other-operator extra-operator operator-exchanged attribute",
    "missing-operator missing-activation another-operand",
    _tanh,
)
_kind(
    "resize-asymmetric",
    "attribute",
    "spatial-shift",
    _attribute(
        "coordinate_transformation_mode",
        b"half_pixel",
        lambda m: "half_pixel" if m in (b"asymmetric", "asymmetric") else "asymmetric",
        "Resize",
    ),
)
_kind("regrouped", "weight-layout attribute other-weights", "another-operand permuted", _regrouped)
_kind(
    "residual-dropped",
    "missing-operator",
    "another-operand other-operator another-tensor isolated operand-order",
    _residuals,
)
_kind("softmax-twice", "extra-operator doubled-activation extra-activation", "missing-operator", _softmax_twice)
_kind("bias-doubled", "bias-scaled", "channels-shifted channels-affine other-weights constant-differs", _biases)
_kind("hard-variant", "other-operator", "attribute missing-operator", _other({"Sigmoid": "HardSigmoid"}))
_kind("dilation-dropped", "attribute", "padding other-weights", _dilations)
_kind("wrong-operand", "another-operand", "another-tensor other-weights operand-order", _operands)
