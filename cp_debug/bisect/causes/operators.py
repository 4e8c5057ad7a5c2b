"""Another operator: one left out, done twice, put behind a layer or in front of it, or with other padding.

In front of a layer a function is applied to what it reads, or that is multiplied by a number.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from cp_debug.bisect.causes.base import Candidate, cause
from cp_debug.bisect.causes.schema import TEXTS
from cp_debug.bisect.causes.segment import Segment
from cp_debug.bisect.causes.single_numbers import Number, by_search, is_told
from cp_debug.graph.graph import Node
from cp_debug.graph.operators import GATES, PRODUCTS
from cp_debug.probes.arrays import as_numpy, as_torch
from cp_debug.probes.caveats import ties
from cp_debug.programs.node_differences import ACTIVATIONS
from cp_debug.safe_text import amount

ROUNDED: Mapping[str, Callable[[Tensor], Tensor]] = {
    "takes halves to even numbers": torch.round,
    "takes halves away from zero": lambda x: torch.sign(x) * torch.floor(x.abs() + 0.5),
    "takes halves up": lambda x: torch.floor(x + 0.5),
    "takes halves down": lambda x: torch.ceil(x - 0.5),
    "cuts fractions off": torch.trunc,
    "rounds down": torch.floor,
    "rounds up": torch.ceil,
}
"""Ways in which runtimes make whole numbers, in words."""
TO_WHOLE = {
    "Round": "the nearest number, of two the even one",
    "Cast": "fractions cut off",
    "Div": "fractions cut off",
}
"""Operators that make whole numbers, and how ONNX wants it; others of their kind have names of their own."""
NUDGES = list(itertools.product((-1e-5, 1e-5), repeat=2))
"""Moves of a sampled place, of an image from −1 to 1, that choose among neighbours that are equally near."""
FUNCTIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    name.replace("_", ""): getattr(functional, name.lower(), None) or getattr(torch, name.lower())
    for name in (
        *("Relu", "Sigmoid", "Tanh", "Exp", "Softplus", "Gelu", "Silu", "Abs", "Celu", "Elu", "Erf", "HardSigmoid"),
        *("HardSwish", "Leaky_Relu", "Mish", "Selu", "Softsign", "Sqrt", "Square"),
    )
}
"""Functions that are put behind or in front of a layer; with the frameworks' defaults."""


@cause(by_node=True)
def left_out(segment: Segment) -> Iterator[Candidate]:
    """Candidates: the value passes one of the nodes unchanged."""
    for node in segment.nodes:
        for source in node.inputs:
            if not segment.context.constants.holds(source):
                value = segment.edited(node, op="Identity", reads=[source])
                kind = "activation" if node.op in ACTIVATIONS else "operator"
                says = f"{node.op} is left out" + (f": {source} passes" if len(node.inputs) > 1 else "")
                fix, evidence = f"apply {node.op} after {source} before {{layers}} is read", {"node": node.name}
                yield Candidate(f"missing-{kind}", says, value, 0, {**evidence, "op": node.op}, fix)


@cause(by_node=True)
def one_more(segment: Segment) -> Iterator[Candidate]:
    """Candidates: the activation done twice, or a function behind the layer: another one, Softmax along each axis."""
    exact, fix = segment.exact, "remove one {op} behind {{layers}}"
    if segment.op in ACTIVATIONS and exact.shape == segment.test.shape:  # with its own attributes and slopes
        again, evidence = segment.edited(segment.nodes[-1], inputs={0: exact}), {"op": segment.op}
        if again is not None and not torch.equal(again, exact):
            says = f"{segment.op} is applied twice"
            yield Candidate("doubled-activation", says, again, 0, evidence, fix.format(op=segment.op))
    functions = dict(FUNCTIONS)
    for axis in (axis for axis, count in enumerate(exact.shape) if count > 1):
        functions[f"Softmax along axis {axis}"] = partial(torch.softmax, dim=axis)
        functions[f"LogSoftmax along axis {axis}"] = partial(torch.log_softmax, dim=axis)
    for name, function in functions.items():
        value = function(exact)
        if segment.op != name.partition(" ")[0] and not torch.equal(value, exact):
            says = f"{name} is applied although the graph has none here"
            yield Candidate("extra-activation", says, value, 0, {"op": name}, fix.format(op=name))


@cause(by_node=True)
def integers(segment: Segment) -> Iterator[Candidate]:
    """Candidates: the result passed an integer type, which cut its fractions off or rounded them."""
    captured = segment.test[segment.finite]
    if segment.op == "QuantizeLinear" or not torch.equal(captured, captured.round()):
        return
    ways = {"cut off": torch.trunc, "rounded": torch.round, "rounded down": torch.floor, "rounded up": torch.ceil}
    for text, function in ways.items():
        value = function(segment.exact)
        if not torch.equal(value, segment.exact):
            says = f"the result passed an integer type: its fractions are {text}"
            fix = "remove the Cast to an integer after {layers}"
            yield Candidate("integer-cast", says, value, fix=fix, degenerate=1)


@cause(by_node=True)
def other_neighbour(segment: Segment) -> Iterator[Candidate]:
    """Candidates: a Resize or GridSample that picks the other neighbour at some of the places in the middle of two."""
    for node in segment.nodes:
        ways: list[tuple[dict[str, Any], list[Tensor | None]]] = []
        if node.op == "Resize":
            ways = [({"nearest_mode": m}, [segment.edited(node, nearest_mode=m)]) for m in TEXTS["nearest_mode"]]
        elif node.op == "GridSample" and node.attribute("mode", b"linear") == b"nearest":
            (grid,) = segment.context.oracle.run_nodes(segment.nodes, segment.given, node.inputs[1:]).values()
            if grid.shape[-1] == len(NUDGES[0]):
                moved = (grid + grid.new_tensor(by) for by in NUDGES)
                ways = [({}, [segment.edited(node, inputs={1: to}) for to in moved])]
        for evidence, others in ways:
            found = [other for other in others if other is not None]
            between = sum((other != segment.exact for other in found), torch.zeros_like(segment.exact)).bool()
            taken = sum((other == segment.test for other in found), torch.zeros_like(segment.exact)).bool() & (
                segment.test != segment.exact
            )
            count, ties = int(taken.sum()), int(between.sum())
            if count and (count < ties or node.op != "Resize"):  # all of them: the mode is another
                says = f"{node.op} picks the other neighbour at {count} of {ties} places where two are equally near"
                evidence |= {"first": [int(i) for i in taken.nonzero()[0]]}
                fix = "the file is right: the runtime rounds coordinates; use a newer runtime, or sizes without ties"
                yield Candidate("resize-ties", says, torch.where(taken, segment.test, segment.exact), 0, evidence, fix)


@cause(by_node=True)
def to_whole_numbers(segment: Segment) -> Iterator[Candidate]:
    """Candidates: whole numbers that are made in another way than ONNX says."""
    for node in segment.nodes:
        if node.op not in TO_WHOLE:
            continue
        made = node.outputs[0]
        values = segment.context.oracle.run_nodes(segment.nodes, segment.given, [*node.inputs, made])
        whole, *read = (torch.as_tensor(values[name]) for name in (made, *node.inputs))
        if whole.is_floating_point() != (node.op == "Round") or read[0].is_floating_point() != (node.op != "Div"):
            continue
        x = read[0].double() / read[1].double() if node.op == "Div" else read[0]
        for text, function in ROUNDED.items() if bool(torch.isfinite(x).all()) else ():
            value = segment.edited(node, op="Identity", reads=[node.inputs[0]], inputs={0: function(x).to(whole.dtype)})
            if value is not None and not torch.equal(value, segment.exact):
                places = int((value != segment.exact).sum())
                says = f"{node.op} {text} at {amount(places, 'place')}: ONNX wants {TO_WHOLE[node.op]}"
                fix = "the file is right: use a runtime that rounds as ONNX says"
                yield Candidate("rounded", says, value, 0, {"node": node.name, "places": places}, fix)


@cause(by_node=True)
def equal_values(segment: Segment) -> Iterator[Candidate]:
    """Candidates: an operator that finds values, and chooses others of equal ones than ONNX says."""
    node = segment.nodes[-1] if segment.nodes else None
    if node is None or node.op not in ("ArgMax", "ArgMin", "TopK", "Hardmax"):
        return
    if segment.target != node.outputs[-1] or not node.attribute("sorted", 1):  # values; indices in any order
        return
    ours, theirs = (
        side.argmax(node.attribute("axis", -1)) if node.op == "Hardmax" else side.long()
        for side in (segment.exact, segment.test)
    )
    if ties(segment.input(node.inputs[0]), ours, theirs):
        wanted = "last" if node.attribute("select_last_index", 0) else "first"
        places = (ours != theirs).nonzero()
        says = f"{node.op} chooses others of equal values at {amount(len(places), 'place')}: ONNX wants the {wanted}"
        fix = "the file is right: use a runtime that breaks ties as ONNX says, or make the values distinct"
        yield Candidate("other-ties", says, segment.test, 0, {"first": places[0].tolist()}, fix)


@cause(by_node=True)
def padding(segment: Segment) -> Iterator[Candidate]:
    """Candidates: a window operator that pads elsewhere, or with other values than zeros."""
    for node in segment.nodes:
        pads = list(node.attribute("pads", []))
        if node.op not in ("Conv", "ConvTranspose", "MaxPool", "AveragePool") or not any(pads):
            continue
        rank = len(pads) // 2
        totals = [pads[i] + pads[i + rank] for i in range(rank)]
        ways: list[tuple[str, dict[str, Any], Tensor | None]] = []
        for begins in itertools.product(*(range(t + 1) for t in totals)):
            moved = [*begins, *(t - b for t, b in zip(totals, begins, strict=True))]
            if moved != pads:
                figures = {"pads": moved, "instead_of": pads}
                ways.append((f"pads {moved} instead of {pads}", figures, segment.edited(node, pads=moved)))
        for mode in ("replicate", "reflect", "circular"):
            value = _filled(segment, node, pads, mode)
            ways.append((f"pads with {mode} values instead of zeros", {"mode": mode}, value))
        for text, figures, value in ways:
            says = f"{node.op} {text}"
            yield Candidate("padding", says, value, 0, figures, f"give the layer its padding explicitly: {says}")


def _filled(segment: Segment, node: Node, pads: list[int], mode: str) -> Tensor | None:
    rank = len(pads) // 2
    source = node.proto.input[0]
    if node.op != "Conv" or source not in segment.given or rank > 2:
        return None
    unpadded = segment.input(source)
    order = [p for axis in reversed(range(rank)) for p in (pads[axis], pads[axis + rank])]
    try:
        return segment.edited(node, inputs={0: functional.pad(unpadded, order, mode=mode)}, pads=[0] * len(pads))
    except RuntimeError:  # more padding than there is to reflect
        return None


LINEAR = {
    *PRODUCTS, *GATES, "Abs", "AveragePool", "BatchNormalization", "Div", "Einsum", "Flatten", "GlobalAveragePool",
    "GlobalMaxPool", "Identity", "LayerNormalization", "LeakyRelu", "MaxPool", "Mul", "Neg", "ReduceMax", "ReduceMean",
    "ReduceSum", "Relu", "Reshape", "Slice", "Squeeze", "Transpose", "Unsqueeze",
}  # fmt: skip
"""Operators of which a factor on what they read is one on their result or their weights, or changes nothing."""
SLOPED: Mapping[str, Callable[[Tensor], Tensor]] = {"Sigmoid": torch.sigmoid, "Tanh": torch.tanh}
"""Functions that are put behind or in front of a layer with a factor on what they read."""
STARTS = (0.1, 0.25, 0.5, 0.7071, 0.75, 0.9, 1.0, 1.1, 1.25, 1.414, 1.702, 2.0, 3.0, 4.0, 8.0)
"""Factors from which the search starts."""
BOUNDS = (1e-3, 3e-3, 0.01, 0.03, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
"""Bounds of an operand from which the search starts, as shares of its largest element."""
MOST = 1 << 20
"""Elements of a result up to which functions of an operand are tried."""


Edited = Callable[[Tensor], Tensor | None]
"""The layer's result where an operand is another tensor."""


def _operands(segment: Segment) -> Iterator[tuple[Node, int, str]]:
    """(Node, place, name) of every captured tensor of several fractions that a node of the segment reads."""
    for node in segment.nodes:
        for place, name in enumerate(node.proto.input):
            if (
                name in segment.given
                and segment.input(name).numel() > 1
                and as_torch(as_numpy(segment.given[name])).is_floating_point()
            ):
                yield node, place, name


@cause(costly=True, by_node=True)
def functions(segment: Segment) -> Iterator[Candidate]:
    """Candidates: a function is applied to one of a node's operands."""
    if segment.test.numel() > MOST:
        return
    for node, place, name in _operands(segment):
        own = segment.input(name)
        for text, function in FUNCTIONS.items():
            changed = function(own)
            if torch.equal(changed, own) or not bool(torch.isfinite(changed).all()):
                continue
            says, fix = f"{text} is applied to {name} before {node.op} reads it", f"remove the {text} before {{layers}}"
            value = segment.edited(node, inputs={place: changed})
            yield Candidate("extra-activation", says, value, evidence={"op": text, "operand": name}, fix=fix)


@cause(costly=True, by_node=True)
def factors(segment: Segment) -> Iterator[Candidate]:
    """Candidates: a factor on one of a node's operands, a bound for it, or Sigmoid and Tanh of a multiple of an operand
    or of the result."""
    if is_told(segment, MOST):
        for node, place, name in _operands(segment):
            yield from by_search(segment, _numbers(segment, node, place, name))
        if segment.nodes:
            what = "the result although the graph has none here"
            yield from by_search(segment, _sloped(segment, what, segment.exact, lambda value: value))


def _numbers(segment: Segment, node: Node, place: int, name: str) -> Iterator[Number]:
    own = segment.input(name)
    largest = float(own.abs().max())

    def edited(changed: Tensor) -> Tensor | None:
        return segment.edited(node, inputs={place: changed})

    def times(number: float) -> Candidate:
        says = f"{name} is multiplied by {number:.6g} before {node.op} reads it"
        fix, evidence = "compare what {layers} reads in both programs", {"operand": name, "factor": number}
        return Candidate("scaled", says, edited(own * number), 0, evidence, fix)

    def within(number: float) -> Candidate:
        bound = abs(number)
        says, evidence = f"{name} stops at ±{bound:.4g} before {node.op} reads it", {"operand": name, "bound": bound}
        value = edited(own.clamp(-bound, bound))
        return Candidate("saturated", says, value, 0, evidence, "remove the bound before {layers}")

    if node.op not in LINEAR:
        yield Number(1.0, times)
    if largest:
        yield Number(largest, within, [largest * share for share in BOUNDS])
    yield from _sloped(segment, f"{name} before {node.op} reads it", own, edited)


def _sloped(segment: Segment, what: str, own: Tensor, edited: Edited) -> Iterator[Number]:
    for text, function in SLOPED.items():

        def of_multiple(number: float, text: str = text, function: Callable[[Tensor], Tensor] = function) -> Candidate:
            says = f"{text} of {number:.6g} times the value is applied to {what}"
            value = edited(function(own * number)) if number else segment.exact
            fix, evidence = f"remove the {text} at {{layers}}", {"op": text, "factor": number}
            return Candidate("extra-activation", says, value, 0, evidence, fix)

        yield Number(0.0, of_multiple, (0.0, *STARTS))
