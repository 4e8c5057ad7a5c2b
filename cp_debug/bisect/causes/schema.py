"""One operator with other arguments: attributes, indices off by one, operands or gates in another order."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import onnx
import torch
from onnx import helper
from torch import Tensor

from cp_debug.bisect.causes.base import Candidate, cause
from cp_debug.bisect.causes.segment import Segment, as_double
from cp_debug.graph.graph import Node
from cp_debug.graph.operators import GATES, RECURRENT
from cp_debug.programs.node_differences import _ACTIVATIONS_OF, NAMES, attributes
from cp_debug.programs.tensor_change import exchanges, regated

TEXTS = {
    "approximate": ("none", "tanh"),
    "coordinate_transformation_mode": ("half_pixel", "asymmetric", "align_corners", "pytorch_half_pixel"),
    "direction": ("forward", "reverse", "bidirectional"),
    "mode": (
        *("nearest", "linear", "cubic", "bilinear", "bicubic"),
        *("constant", "reflect", "edge", "wrap", "DCR", "CRD", "avg", "max"),
    ),
    "nearest_mode": ("round_prefer_floor", "round_prefer_ceil", "floor", "ceil"),
    "padding_mode": ("zeros", "border", "reflection"),
    "auto_pad": ("SAME_UPPER", "SAME_LOWER", "VALID"),
    "reduction": ("none", "add", "mul", "max", "min", "sum", "mean"),
}
"""Attribute → what operators know for it; what an operator does not know gives no candidate."""
RESIZED: list[dict[str, Any]] = [
    {"coordinate_transformation_mode": where, name: other}
    for where in TEXTS["coordinate_transformation_mode"]
    for name, others in (("nearest_mode", TEXTS["nearest_mode"]), ("mode", ("nearest", "linear")))
    for other in others
]
"""Attributes of Resize that go together."""
CELLS = ("Tanh", "Sigmoid", "Relu", "HardSigmoid", "Softsign")
"""Activations of recurrent layers."""
COUNTS = {"p", "blocksize", "sampling_ratio", "size", "rotary_embedding_dim", "ignore_index"}
"""Attributes that may be 0 or 1 without being flags."""
SMALL = (0, 1, 2, 3, 4, 5)
"""Counts that are tried besides the neighbours, the half and the double of the declared one."""
SKIPPED = {"pads", "kernel_shape", "to", "dtype", "group", "hidden_size", "num_outputs", "num_groups"}
"""Attributes with causes of their own, or that change what is computed altogether."""
EXCHANGED = (
    (
        *("Relu", "LeakyRelu", "Elu", "Selu", "Sigmoid", "HardSigmoid", "Tanh", "Softplus", "HardSwish", "Gelu"),
        *("Softsign", "Celu", "Mish", "ThresholdedRelu", "Erf", "PRelu"),
    ),
    ("ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin", "ReduceL2", "ReduceL1", "ReduceSumSquare", "ReduceProd"),
    ("ReduceLogSum", "ReduceLogSumExp"),
    ("Sin", "Cos", "Tan"),
    ("Sinh", "Cosh", "Tanh"),
    ("Exp", "Log", "Sqrt", "Reciprocal"),
    ("MaxPool", "AveragePool", "LpPool"),
    ("GlobalMaxPool", "GlobalAveragePool", "GlobalLpPool"),
    ("Add", "Sub", "Mul", "Div", "Min", "Max"),
    ("Floor", "Ceil", "Round"),
    ("Softmax", "LogSoftmax"),
)
"""Operators that are taken for one another; activations with their defaults."""
ORDERED = {"Sub", "Div", "Pow", "MatMul", "Mod", "Less", "Greater", "LessOrEqual", "GreaterOrEqual", "BitShift"}
MOST_PERMUTED = 4
"""Operands whose orders are all tried; of more only exchanges of two neighbours, and the reverse."""
MOST_OTHERS = 48
"""Values of an operand's shape that are tried in its place."""


@cause(costly=True, structural=True, by_node=True)
def by_schema(segment: Segment) -> Iterator[Candidate]:
    """Candidates: every attribute of every operator but numbers, with every value that its schema allows."""
    for node in segment.nodes:
        declared = attributes(segment.graph, node)
        if node.op in _ACTIVATIONS_OF and "activations" not in declared:
            declared["activations"] = _ACTIVATIONS_OF[node.op] * (
                2 if declared.get("direction") == "bidirectional" else 1
            )
        if isinstance(kernel := declared.get("kernel_shape"), list):
            declared = {"dilations": [1] * len(kernel), "strides": [1] * len(kernel), **declared}
        for name, value in declared.items():
            for tried in _values(name, value):
                yield with_attributes(node, {name: tried}, {name: value}, segment.edited(node, **{name: tried}))
        for tried in RESIZED if node.op == "Resize" else ():
            yield with_attributes(node, tried, declared, segment.edited(node, **tried))
        yield from _apart(segment, node, declared)
        yield from _declared_by_inputs(segment, node)


def _apart(segment: Segment, node: Node, own: dict[str, Any]) -> Iterator[Candidate]:
    """Windows whose elements lie further apart or closer together, padded so that the result keeps its size."""
    kernel, pads = own.get("kernel_shape"), own.get("pads")
    if not kernel or not pads:
        return
    before = own.get("dilations") or [1] * len(kernel)
    for apart in (1, 2, 3):
        more = [(k - 1) * (apart - b) for k, b in zip(kernel, before, strict=True)]
        begins = [p + m // 2 for p, m in zip(pads, more, strict=False)]
        ends = [p + m - m // 2 for p, m in zip(pads[len(more) :], more, strict=True)]
        if not any(more) or min(begins + ends) < 0:
            continue
        other = [apart] * len(kernel)
        value = segment.edited(node, dilations=other, pads=begins + ends)
        yield with_attributes(node, {"dilations": other}, {"dilations": before}, value)


def _declared_by_inputs(segment: Segment, node: Node) -> Iterator[Candidate]:
    """Axes and counts that newer opsets take as inputs."""
    schema = onnx.defs.get_schema(node.op) if onnx.defs.has(node.op) and not node.proto.domain else None
    for place, declared in enumerate(schema.inputs if schema is not None else ()):
        name = node.proto.input[place] if place < len(node.proto.input) else ""
        if declared.name not in ("axes", "axis", "k") or not name or not segment.context.constants.holds(name):
            continue
        own = segment.context.constants[name]
        value = own.flatten().tolist() if declared.name == "axes" else int(own.flatten()[0])
        others = (own.item() - 1, own.item() + 1) if declared.name == "k" else _values(declared.name, value)
        for other in others:
            replacement = torch.tensor(other, dtype=own.dtype).reshape(own.shape)
            result = segment.edited(node, inputs={place: replacement})
            yield with_attributes(node, {declared.name: other}, {declared.name: value}, result)


def _values(name: str, value: Any) -> Iterator[Any]:
    if name in SKIPPED:
        return
    if name == "activations":
        for own, other in itertools.product(sorted(set(value)), CELLS):
            if own.lower() != other.lower():
                yield [other if v == own else v for v in value]
        yield from ([*value[:i], other, *value[i + 1 :]] for i in range(len(value)) for other in CELLS)
        return
    if isinstance(value, str):
        yield from (t for t in TEXTS.get(name, ()) if t != value)
    elif isinstance(value, int):
        flag = value in (0, 1) and name not in COUNTS
        others: Iterable[int] = dict.fromkeys((value - 1, value + 1, 2 * value, value // 2, *SMALL))
        if "axis" in name or flag:
            others = range(-1, 5) if "axis" in name else (1 - value,)
        yield from (v for v in others if v != value)
    elif isinstance(value, list) and all(isinstance(v, int) for v in value):
        if name == "perm" and len(value) <= 5:
            yield from (list(p) for p in itertools.permutations(range(len(value))) if list(p) != value)
        elif name == "axes":
            yield from (list(c) for c in itertools.combinations(range(5), len(value)) if list(c) != value)
        elif name == "output_padding":
            yield from (
                [*value[:i], v + d, *value[i + 1 :]] for i, v in enumerate(value) for d in (-1, 1) if v + d >= 0
            )
        elif name in ("strides", "dilations"):
            yield from ([v] * len(value) for v in (1, 2, 3) if [v] * len(value) != value)


def with_attributes(
    node: Node, tried: Mapping[str, Any], declared: Mapping[str, Any], result: Tensor | None
) -> Candidate:
    """The candidate of a node that gives ``result``, float64 in the captured result's shape, with the attributes
    ``tried`` instead of the declared ones."""
    evidence: dict[str, Any] = {}
    comparisons = []
    for name, value in tried.items():
        own, called = declared[name], "eps" if name == "epsilon" else name
        evidence |= {called: value, "instead_of": own}
        texts = [f"{v:.4g}" if isinstance(own, float) else str(v) for v in (value, own)]
        comparisons.append(f"{called} is {texts[0]} instead of {texts[1]}")
    says = f"{node.op}: {', '.join(comparisons)}"
    cause = NAMES.get(next(iter(tried)), "attribute")
    return Candidate(cause, says, result, 0, evidence, f"set it as declared: {says}")


@cause(costly=True, structural=True, by_node=True)
def off_by_one(segment: Segment) -> Iterator[Candidate]:
    """Candidates: slices, gathers and paddings that begin one element too early or too late."""
    for node in segment.nodes:
        for inputs, shift in _shifted(segment, node):
            says, value = f"{node.op} is off by one: {shift}", segment.edited(node, inputs=inputs)
            yield Candidate("index-shifted", says, value, 0, {"node": node.name}, "check the indices of {layers}")


def _shifted(segment: Segment, node: Node) -> Iterator[tuple[dict[int, Tensor], str]]:
    def constant(place: int) -> Tensor | None:
        name = node.proto.input[place] if place < len(node.proto.input) else ""
        constants = segment.context.constants
        return constants[name] if name and constants.holds(name) else None

    steps = ((1, "one later"), (-1, "one earlier"))
    if node.op == "Slice" and (starts := constant(1)) is not None:
        ends = constant(2)
        for step, shift in steps:
            yield {1: starts + step} | ({} if ends is None else {2: ends + step}), shift
            yield {1: starts + step}, f"begins {shift}"
            if ends is not None:
                yield {2: ends + step}, f"ends {shift}"
    elif node.op in ("Gather", "GatherElements", "GatherND"):
        indices, name = constant(1), node.proto.input[1]
        if indices is None and name in segment.given:
            indices = segment.input(name).long()
        if indices is not None:
            yield from (({1: indices + step}, shift) for step, shift in steps)
    elif node.op == "Pad" and (pads := constant(1)) is not None:
        rank = pads.numel() // 2
        for axis, (step, shift) in itertools.product(range(rank), steps):
            moved = pads.clone()
            moved[axis] += step
            moved[axis + rank] -= step
            yield {1: moved}, f"axis {axis}, {shift}"


@cause(by_node=True)
def operand_order(segment: Segment) -> Iterator[Candidate]:
    """Candidates: operands that have changed places."""
    for node in segment.nodes:
        reads = list(node.proto.input)
        for order in _orders(node, len(reads)):
            moved = [reads[i] for i in order]
            if moved != reads:
                name = "concat-order" if node.op == "Concat" else "operand-order"
                says = f"{node.op} reads {', '.join(moved)} in this order instead of {', '.join(reads)}"
                value, evidence = segment.edited(node, reads=moved), {"order": list(order)}
                yield Candidate(name, says, value, 0, evidence, "give {layers} its operands in order")


def _orders(node: Node, count: int) -> Iterator[tuple[int, ...]]:
    if node.op in ORDERED and count == 2:
        yield 1, 0
    elif node.op in ("Clip", "Where") and count == 3:
        yield 0, 2, 1
    elif node.op in RECURRENT and count > 2:
        yield 0, 2, 1, *range(3, count)
    elif node.op in ("Concat", "Einsum") and 1 < count <= MOST_PERMUTED:
        yield from itertools.islice(itertools.permutations(range(count)), 1, None)
    elif node.op == "Concat":
        for i in range(count - 1):
            yield (*range(i), i + 1, i, *range(i + 2, count))
        yield tuple(reversed(range(count)))


@cause(costly=True, by_node=True)
def another_operand(segment: Segment) -> Iterator[Candidate]:
    """Candidates: an operand with another value of the run: read too late, overwritten in place, or mixed up."""
    for node in segment.nodes:
        for place, name in enumerate(node.proto.input):
            if name not in segment.given or node.op in ("Conv", "ConvTranspose"):
                continue
            captured = segment.input(name)
            if captured.numel() < 8:
                continue
            loaded = ((other, load()) for other, load in segment.others if other != name)
            alike = ((other, tensor) for other, tensor in loaded if tuple(tensor.shape) == tuple(captured.shape))
            for other, tensor in itertools.islice(alike, MOST_OTHERS):
                says = f"{node.op} reads {other} instead of {name}: mixed up, or overwritten in place"
                value = segment.edited(node, inputs={place: as_double(tensor)})
                evidence = {"of": other, "instead_of": name}
                yield Candidate("another-operand", says, value, 0, evidence, f"feed {{layers}} {name} unchanged")


@cause(costly=True, structural=True, by_node=True)
def gate_order(segment: Segment) -> Iterator[Candidate]:
    """Candidates: a recurrent layer whose weights have their gates in another framework's order."""
    for node in segment.nodes:
        gates = GATES.get(node.op, 0)
        weights = {place: w for place in (1, 2, 3) if gates and (w := segment.weight(node, place)) is not None}
        if not weights:
            continue
        groups = {"": list(weights)} | {f", those of {node.proto.input[p]} alone": [p] for p in weights}
        for order, (whose, places) in itertools.product(itertools.permutations(range(gates)), groups.items()):
            if list(order) == list(range(gates)) or (len(places) < len(weights) and exchanges(order)[1] > 2):
                continue
            moved = {place: torch.from_numpy(regated(weights[place].numpy(), order)) for place in places}
            says = f"the gates of {node.op} are in the order {list(order)}{whose}"
            value = segment.edited(node, inputs=moved)
            yield Candidate("gate-order", says, value, 0, {"order": list(order)}, "reorder the gates of {layers}")


@cause(costly=True, structural=True, by_node=True)
def another_operator(segment: Segment) -> Iterator[Candidate]:
    """Candidates: another operator of the same kind: activations, reductions, pooling, arithmetic."""
    for node in segment.nodes:
        family = dict.fromkeys(op for f in EXCHANGED if node.op in f for op in f)
        declared = {a.name: helper.get_attribute_value(a) for a in node.proto.attribute}
        reads = node.proto.input[:1] if node.op == "PRelu" else None
        for op in (op for op in family if op != node.op):
            value = segment.edited(node, op=op, reads=reads, **({} if op in EXCHANGED[0] else declared))
            yield computed_as(node, op, value)


def computed_as(node: Node, op: str, value: Tensor | None, **attributes: float) -> Candidate:
    """The candidate of a node that is computed as the operator ``op``, with these ``attributes``; ``value``: what that
    gives, float64 in the captured result's shape."""
    says = f"{node.op} is computed as {op}" + "".join(f" with {name} = {v:.4g}" for name, v in attributes.items())
    evidence = {"op": node.op, "test_op": op, **attributes}
    return Candidate("other-operator", says, value, 0, evidence, f"compare both programs at {{layers}}: {says}")
