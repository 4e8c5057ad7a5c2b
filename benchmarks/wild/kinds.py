"""The kinds of faults: where each can strike, how it edits the graph, and which names of a cause are right or near."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import onnx

from .edits import Net, attribute, set_attribute


@dataclass(frozen=True)
class Place:
    """One place for a fault."""

    values: list[str]
    """The results of the faulty node: the names that may be called guilty."""
    what: str
    apply: Callable[[Net], Any]
    """Edits a copy of the network."""


Places = Callable[[Net, np.random.Generator], Iterator[Place]]


@dataclass(frozen=True)
class Kind:
    """A class of faults."""

    places: Places
    right: frozenset[str]
    """Names of causes that tell what is wrong."""
    near: frozenset[str]
    """Names that are true but say less, or name a neighbour."""


KINDS: dict[str, Kind] = {}


def kind(name: str, right: str, near: str = "") -> Callable[[Places], Places]:
    """Register places under a kind's name; ``right`` and ``near`` are names of causes, separated by blanks."""

    def register(places: Places) -> Places:
        KINDS[name] = Kind(places, frozenset(right.split()), frozenset(near.split()) - frozenset(right.split()))
        return places

    return register


def _changed_weight(change: Callable[[np.ndarray, np.random.Generator], np.ndarray | None], *ops: str) -> Places:
    def places(net: Net, rng: np.random.Generator) -> Iterator[Place]:
        for node, name, array in net.weighted(*ops):
            made = change(array, rng)
            if made is not None and not np.array_equal(made, array):
                yield Place([*filter(None, node.output)], f"{name} of {node.op_type}", _set(name, made))

    return places


def _set(name: str, array: np.ndarray) -> Callable[[Net], None]:
    return lambda net: net.set_constant(name, array)


def _int8(array: np.ndarray, axis: int | None) -> np.ndarray:
    axes = tuple(i for i in range(array.ndim) if i != axis) if axis is not None else None
    scale = np.abs(array).max(axis=axes, keepdims=True) / 127
    return (np.round(array / np.where(scale, scale, 1)) * scale).astype(np.float32)


def _channel_axis(array: np.ndarray) -> int:
    return 0 if array.ndim != 2 else 1


def _one_channel(array: np.ndarray, rng: np.random.Generator, factor: float) -> np.ndarray:
    made = array.copy()
    axis = 0 if array.ndim > 2 else array.ndim - 1
    np.moveaxis(made, axis, 0)[rng.integers(array.shape[axis])] *= factor
    return made


def _swap(array: np.ndarray, rng: np.random.Generator) -> np.ndarray | None:
    axis = 0 if array.ndim > 2 else array.ndim - 1
    if array.shape[axis] < 2:
        return None
    order = np.arange(array.shape[axis])
    first, second = rng.choice(len(order), 2, replace=False)
    order[[first, second]] = order[[second, first]]
    return np.take(array, order, axis)


def _transpose(array: np.ndarray, rng: np.random.Generator) -> np.ndarray | None:
    square = array.ndim >= 2 and array.shape[0] == array.shape[1] > 1
    return np.ascontiguousarray(np.swapaxes(array, 0, 1)) if square else None


def _flip(array: np.ndarray, rng: np.random.Generator) -> np.ndarray | None:
    return array[..., ::-1, ::-1] if array.ndim == 4 and array.shape[-1] > 1 else None


_PLAIN = ("Conv", "ConvTranspose", "Gemm", "MatMul")
_SCALED = "weights-scaled scaled"
kind("weights-scaled", _SCALED, "affine other-weights channels-scaled")(
    _changed_weight(lambda w, r: w * np.float32(1.05))
)
kind("weights-noise", "other-weights", "weights-scaled weights-layout")(
    _changed_weight(lambda w, r: (w + 0.01 * w.std() * r.standard_normal(w.shape)).astype(np.float32), *_PLAIN)
)
kind("weights-fp16", "weights-fp16 fp16-weights fp16", "other-weights tf32")(
    _changed_weight(lambda w, r: w.astype(np.float16).astype(np.float32))
)
kind("weights-bf16", "weights-bf16 bf16-weights bf16", "other-weights")(
    _changed_weight(lambda w, r: w.astype(ml_dtypes.bfloat16).astype(np.float32))
)
kind("weights-int8-tensor", "int8-weights int8-per-tensor", "int8 other-weights")(
    _changed_weight(lambda w, r: _int8(w, None), *_PLAIN)
)
kind("weights-int8-channel", "int8-weights", "int8 int8-per-tensor other-weights")(
    _changed_weight(lambda w, r: _int8(w, _channel_axis(w)), *_PLAIN)
)
kind("weights-transposed", "weight-layout", "other-weights")(_changed_weight(_transpose, *_PLAIN))
kind("kernel-flipped", "weight-layout", "other-weights")(_changed_weight(_flip, "Conv", "ConvTranspose"))
kind("channels-swapped", "weight-layout channels-swapped permuted", "other-weights channels-scaled flipped")(
    _changed_weight(_swap, *_PLAIN)
)
kind("channel-zeroed", "channels-zeroed channels-scaled channels-affine", "other-weights weight-layout")(
    _changed_weight(lambda w, r: _one_channel(w, r, 0.0), *_PLAIN)
)
kind("channel-scaled", "channels-scaled", "channels-affine other-weights weights-scaled")(
    _changed_weight(lambda w, r: _one_channel(w, r, 1.05), *_PLAIN)
)


@kind("weights-of-another-layer", "other-weights weights-of-another-layer another-tensor")
def _of_another(net: Net, rng: np.random.Generator) -> Iterator[Place]:
    found = list(net.weighted())
    for node, name, array in found:
        for _, other, theirs in found:
            if other != name and theirs.shape == array.shape and not np.array_equal(theirs, array):
                yield Place([*filter(None, node.output)], f"{name} is {other}", _set(name, theirs))


@kind(
    "bias-dropped",
    "bias-scaled bias-dropped",
    "channels-shifted missing-operator other-weights shifted channels-affine",
)
def _bias(net: Net, rng: np.random.Generator) -> Iterator[Place]:
    constants = net.constants()
    for node in net.of("Conv", "ConvTranspose", "Gemm", "LSTM", "GRU"):
        index = 3 if node.op_type in ("LSTM", "GRU") else 2
        name = node.input[index] if len(node.input) > index else ""
        if name in constants:
            yield Place([*filter(None, node.output)], f"{name} is zero", _set(name, 0 * constants[name]))


@kind("batchnorm-statistics", "batchnorm-statistics", "batchnorm-parameters batchnorm-folding channels-affine")
def _statistics(net: Net, rng: np.random.Generator) -> Iterator[Place]:
    constants = net.constants()
    for node in net.of("BatchNormalization"):
        mean, variance = node.input[3:5]
        if mean in constants and variance in constants:

            def apply(spoilt: Net, mean: str = mean, variance: str = variance) -> None:
                spoilt.set_constant(mean, 0 * constants[mean])
                spoilt.set_constant(variance, 0 * constants[variance] + 1)

            yield Place([node.output[0]], "means 0, variances 1", apply)


def _attribute(name: str, default: Any, change: Callable[[Any], Any], *ops: str) -> Places:
    def places(net: Net, rng: np.random.Generator) -> Iterator[Place]:
        for node in net.of(*ops):
            before = attribute(node, name, default)
            after = change(before) if before is not None else None
            if after is None or after == before:
                continue

            def apply(spoilt: Net, value: str = node.output[0], after: Any = after) -> None:
                set_attribute(spoilt.node(value), name, after)

            yield Place([*filter(None, node.output)], f"{name} {before} → {after}", apply)

    return places


def _shifted_pads(pads: list[int]) -> list[int] | None:
    half, made = len(pads) // 2, list(pads)
    if pads[half - 1] == 0:
        return None
    made[half - 1] -= 1
    made[2 * half - 1] += 1
    return made


_NORMS = ("BatchNormalization", "LayerNormalization", "InstanceNormalization", "GroupNormalization", "RMSNormalization")
kind("epsilon", "normalization-eps", "attribute batchnorm-parameters batchnorm-statistics")(
    _attribute("epsilon", 1e-5, lambda e: 1e-2 if e < 5e-3 else 1e-5, *_NORMS)
)
kind("pads", "padding attribute", "spatial-shift")(
    _attribute("pads", None, _shifted_pads, "Conv", "MaxPool", "AveragePool")
)
kind("alpha", "attribute", "affine scaled")(
    _attribute("alpha", None, lambda a: a * 1.5 + 0.01, "LeakyRelu", "Elu", "HardSigmoid", "Celu", "Selu")
)
kind("alpha-default", "attribute", "affine scaled")(
    _attribute("alpha", None, lambda a: 0.2 if abs(a - 0.2) > 1e-6 else None, "HardSigmoid")
)
kind("axis", "attribute", "transposed permuted")(
    _attribute("axis", -1, lambda a: a - 1 if a < 0 else (a - 1 if a else a + 1), "Softmax", "LogSoftmax", "ArgMax")
)
kind("resize", "attribute", "spatial-shift")(
    _attribute(
        "coordinate_transformation_mode",
        b"half_pixel",
        lambda m: "align_corners" if m != b"align_corners" else "half_pixel",
        "Resize",
    )
)
kind("resize-mode", "attribute", "spatial-shift")(
    _attribute("mode", b"nearest", lambda m: "linear" if m == b"nearest" else "nearest", "Resize")
)
kind("dilation", "attribute padding", "spatial-shift other-weights")(
    _attribute("auto_pad", b"NOTSET", lambda m: None if m != b"SAME_LOWER" else "SAME_UPPER", "Conv", "MaxPool")
)
kind("count-include-pad", "attribute", "padding")(_attribute("count_include_pad", 0, lambda c: 1 - c, "AveragePool"))
kind("perm", "attribute transposed", "permuted")(
    _attribute("perm", None, lambda p: [*p[:-2], p[-1], p[-2]] if len(p) > 2 else None, "Transpose")
)
kind("direction", "attribute direction", "flipped other-weights")(
    _attribute("direction", b"forward", lambda d: "reverse" if d == b"forward" else None, "LSTM", "GRU", "RNN")
)
kind("linear-before-reset", "attribute", "other-weights")(_attribute("linear_before_reset", 0, lambda f: 1 - f, "GRU"))


@kind("operands-swapped", "operands operand-order", "scaled affine missing-operator")
def _operands(net: Net, rng: np.random.Generator) -> Iterator[Place]:
    for node in net.of("Sub", "Div", "MatMul", "Pow"):
        first, second = list(node.input)[:2]
        if net.values.get(first) is None or net.values.get(second) is None:
            continue

        def apply(spoilt: Net, value: str = node.output[0]) -> None:
            struck = spoilt.node(value)
            struck.input[0], struck.input[1] = struck.input[1], struck.input[0]

        yield Place([node.output[0]], f"{node.op_type}({second}, {first})", apply)


@kind("concat-order", "concat-order operands operand-order", "permuted flipped spatial-shift attribute")
def _concat(net: Net, rng: np.random.Generator) -> Iterator[Place]:
    for node in net.of("Concat"):
        if len(node.input) < 2 or net.values[node.output[0]].dtype != np.float32:
            continue

        def apply(spoilt: Net, value: str = node.output[0]) -> None:
            struck = spoilt.node(value)
            names = list(struck.input)
            struck.input[:] = [*names[1:], names[0]]

        yield Place([node.output[0]], "operands turned by one", apply)


@kind("gate-order", "gate-order weight-layout", "other-weights permuted")
def _gates(net: Net, rng: np.random.Generator) -> Iterator[Place]:
    constants = net.constants()
    for node in net.of("LSTM", "GRU"):
        gates = 4 if node.op_type == "LSTM" else 3
        order = [0, 2, 1, 3] if gates == 4 else [1, 0, 2]
        names = [n for n in node.input[1:4] if n in constants]
        if len(names) < 3:
            continue

        def apply(
            spoilt: Net, names: list[str] = names, gates: int = gates, order: list[int] = order, copies: int = 2
        ) -> None:
            for index, name in enumerate(names):
                array = constants[name]
                size = array.shape[1] // (gates * (copies if index == 2 else 1))
                blocks = array.reshape(array.shape[0], -1, gates, size, *array.shape[2:])
                spoilt.set_constant(name, blocks[:, :, order].reshape(array.shape))

        yield Place([*filter(None, node.output)], f"gates {order}", apply)


@kind("slice-off-by-one", "slice index-shifted off-by-one", "attribute spatial-shift truncated permuted")
def _slice(net: Net, rng: np.random.Generator) -> Iterator[Place]:
    constants = net.constants()
    for node in net.of("Slice"):
        names = list(node.input)[1:3]
        if any(n not in constants for n in names) or net.values[node.output[0]].dtype != np.float32:
            continue
        starts, ends = (constants[n].copy() for n in names)
        limit = min(net.values[node.input[0]].shape)
        step = 1 if starts[0] == 0 and abs(int(ends[0])) < 2**30 and limit > 1 else -1

        def apply(spoilt: Net, names: list[str] = names, moved: Any = (starts + step, ends + step)) -> None:
            for name, array in zip(names, moved, strict=True):
                spoilt.set_constant(name, array)

        yield Place([node.output[0]], f"starts {starts} → {starts + step}", apply)


@kind("gather-off-by-one", "gather index-shifted off-by-one", "spatial-shift permuted another-tensor attribute")
def _gather(net: Net, rng: np.random.Generator) -> Iterator[Place]:
    constants = net.constants()
    for node in net.of("Gather"):
        name = node.input[1]
        if name not in constants or net.values[node.output[0]].dtype != np.float32:
            continue
        yield Place([node.output[0]], f"{constants[name]} + 1", _set(name, constants[name] + 1))


_ACTIVATIONS = (
    "Relu",
    "Sigmoid",
    "HardSwish",
    "HardSigmoid",
    "Tanh",
    "Elu",
    "LeakyRelu",
    "Clip",
    "Erf",
    "Gelu",
    "Softplus",
)


@kind("dropped", "missing-activation missing-operator", "doubled-activation")
def _dropped(net: Net, rng: np.random.Generator) -> Iterator[Place]:
    outputs = {v.name for v in net.graph.input} | {v.name for v in net.graph.output}
    for node in net.of(*_ACTIVATIONS):
        source = node.input[0]
        if source in outputs or len(net.readers(source)) > 1:
            continue
        yield Place(
            [node.output[0], source], f"{node.op_type} is gone", lambda n, v=node.output[0]: n.remove(n.node(v))
        )


@kind(
    "operator-exchanged",
    "operator-exchanged other-operator missing-operator missing-activation extra-activation",
    "attribute affine",
)
def _exchanged(net: Net, rng: np.random.Generator) -> Iterator[Place]:
    others = {
        "Relu": "LeakyRelu",
        "MaxPool": "AveragePool",
        "Tanh": "Softsign",
        "ReduceMean": "ReduceMax",
        "Max": "Min",
    }
    for node in net.of(*others):

        def apply(spoilt: Net, value: str = node.output[0], other: str = others[node.op_type]) -> None:
            spoilt.node(value).op_type = other

        yield Place([node.output[0]], f"{node.op_type} → {others[node.op_type]}", apply)


@kind("clip-bound", "attribute saturated clip-bound operand", "affine scaled other-weights extra-activation")
def _clip(net: Net, rng: np.random.Generator) -> Iterator[Place]:
    constants = net.constants()
    for node in net.of("Clip"):
        for name in list(node.input)[1:3]:
            if name in constants and constants[name].size == 1 and 0 < abs(constants[name].item()) < 1e3:
                value = np.asarray(constants[name] * np.float32(0.6), constants[name].dtype)
                yield Place([node.output[0]], f"bound {constants[name]} → {value}", _set(name, value))


@kind("scalar", "scaled shifted affine constant-differs operand", "attribute other-weights")
def _scalar(net: Net, rng: np.random.Generator) -> Iterator[Place]:
    constants = net.constants()
    for node in net.of("Mul", "Div", "Add", "Sub"):
        for name in node.input:
            if name in constants and constants[name].size == 1 and constants[name].dtype == np.float32:
                value = np.asarray(constants[name] * np.float32(1.02))
                if value.item() != constants[name].item():
                    yield Place([node.output[0]], f"{constants[name]} → {value}", _set(name, value))


@kind(
    "constant-underflow",
    "constant-underflow fp16-underflow fp16-flush normalization-eps missing-operator",
    "attribute shifted",
)
def _underflow(net: Net, rng: np.random.Generator) -> Iterator[Place]:
    constants = net.constants()
    for node in net.of("Add", "Max", "Clip"):
        for name in node.input:
            if name in constants and constants[name].size == 1 and 0 < constants[name].item() < 1e-2:
                yield Place([node.output[0]], f"{constants[name]} → 0", _set(name, 0 * constants[name]))


def _constant_nodes(net: Net, *ops: str) -> Iterator[onnx.NodeProto]:
    """Nodes that are computed from constants alone and whose result reaches a product."""
    reached = net.reached()
    for node in net.graph.node:
        if node.op_type in ops and node.output[0] not in reached and net.values[node.output[0]].size > 8:
            yield node


@kind("branch-slice", "slice index-shifted off-by-one attribute", "spatial-shift permuted another-tensor truncated")
def _branch_slice(net: Net, rng: np.random.Generator) -> Iterator[Place]:
    constants = net.constants()
    for node in _constant_nodes(net, "Slice"):
        starts, ends = (constants.get(n) for n in node.input[1:3])
        if starts is None or ends is None:
            continue
        step = 1 if int(starts.flat[0]) == 0 else -1

        def apply(spoilt: Net, names: Any = tuple(node.input[1:3]), moved: Any = (starts + step, ends + step)) -> None:
            for name, array in zip(names, moved, strict=True):
                spoilt.set_constant(name, array)

        yield Place([node.output[0]], f"starts {starts} → {starts + step}", apply)


@kind("branch-concat", "concat-order operands operand-order", "permuted spatial-shift")
def _branch_concat(net: Net, rng: np.random.Generator) -> Iterator[Place]:
    for node in _constant_nodes(net, "Concat"):

        def apply(spoilt: Net, value: str = node.output[0]) -> None:
            struck = spoilt.node(value)
            names = list(struck.input)
            struck.input[:] = [*names[1:], names[0]]

        yield Place([node.output[0]], "operands turned by one", apply)


@kind("branch-transpose", "attribute transposed missing-operator", "permuted weight-layout")
def _branch_transpose(net: Net, rng: np.random.Generator) -> Iterator[Place]:
    for node in _constant_nodes(net, "Transpose"):
        if len(set(net.values[node.output[0]].shape)) > 1:
            continue
        yield Place(
            [node.output[0]],
            "perm is the identity",
            lambda n, v=node.output[0], d=net.values[node.output[0]].ndim: set_attribute(
                n.node(v), "perm", list(range(d))
            ),
        )


@kind("branch-stored", "scaled other-weights weights-scaled weights-differ", "channels-scaled affine")
def _branch_stored(net: Net, rng: np.random.Generator) -> Iterator[Place]:
    """Stored weights in FP16 or INT8 that are 5 % off."""
    constants = net.constants()
    for node in _constant_nodes(net, "Cast"):
        if (array := constants.get(node.input[0])) is not None:
            yield Place([node.output[0]], "weights × 1.05", _set(node.input[0], (array * 1.05).astype(array.dtype)))


@kind("branch-scale", "int8-scale scaled int8-axis", "channels-scaled other-weights affine")
def _branch_scale(net: Net, rng: np.random.Generator) -> Iterator[Place]:
    """The scale of weights in INT8 is 5 % off."""
    constants = net.constants()
    for node in _constant_nodes(net, "DequantizeLinear"):
        if (array := constants.get(node.input[1])) is not None:
            yield Place([node.output[0]], "scale × 1.05", _set(node.input[1], (array * 1.05).astype(array.dtype)))
