"""Changes that may have happened to a constant (rearranged, in fewer bits, another one) and the causes they are."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cp_debug.bisect.causes.base import Candidate
from cp_debug.bisect.causes.fits import nearest_slices
from cp_debug.bisect.causes.segment import Segment, as_double
from cp_debug.graph.constants import is_uniform
from cp_debug.graph.graph import Node
from cp_debug.graph.operators import PRODUCTS
from cp_debug.programs.node_differences import named, role_of_constant
from cp_debug.programs.tensor_change import Form, TensorChange, in_order, rolled_forms, slice_forms, turned_forms

SIGNIFICANT = 5.0
"""Multiple of its deviation from which a fitted slice counts as another one than the declared one."""
TRACE = 1e-3
"""Share of the largest change below which a slice is not changed."""
SIZED = {"Range", "Resize", "Upsample"}
"""Operators whose float constants say how large the result is: another one makes another shape, at any cost."""
MOST_OTHERS = 32
"""Other constants of one shape that are tried."""
MOST_SLICES = 2048
"""Slices along an axis up to which each is compared with each."""


@dataclass(frozen=True)
class Change:
    """One thing that may have happened to a constant, and the constant that it gives."""

    kind: str
    """Name of the change, as in ``TensorChange``."""
    says: str
    value: Tensor
    parameters: int = 0
    """Numbers read off the captured result: which slices, which factors."""
    evidence: dict[str, Any] = field(default_factory=dict)

    @property
    def degenerate(self) -> int:
        """``Candidate.degenerate`` of the change: 2 where the constant is all zero, else 0."""
        return 0 if bool(self.value.any()) else 2


def rearranged(own: Tensor) -> Iterator[Change]:
    """Everything that may happen to a constant of any shape as a whole, with nothing to fit."""
    if bool(own.any()):
        yield Change("channels-zero", "all zero", torch.zeros_like(own))
        yield Change("negated", "the sign is flipped", -own)
    yield from of_forms(own, turned_forms, rolled_forms)


def of_forms(own: Tensor, *forms: Callable[[np.ndarray], Iterator[Form]]) -> Iterator[Change]:
    """What ``forms`` make of a constant, but for what leaves it as it is or finite no longer; float64, in its shape."""
    for kind, says, value, evidence in (each for form in forms for each in form(own.numpy())):
        changed = torch.from_numpy(np.ascontiguousarray(value))
        if bool(torch.isfinite(changed).all()) and not torch.equal(changed, own):
            yield Change(kind, says, changed, 0, evidence)


def others(segment: Segment, node: Node, place: int) -> Iterator[Change]:
    """Other constants of the file of one shape and type; zeros and ones are no layer's own."""
    graph, constants, name = segment.graph, segment.context.constants, node.proto.input[place]
    if name not in graph.initializers or role_of_constant(node, place) in ("scale", "zero"):
        return  # scales are no levels of a bias
    kinds = {n: (graph.weight(n).data_type, *graph.weight(n).dims) for n in graph.initializers}
    for other in [n for n, kind in kinds.items() if n != name and kind == kinds[name]][:MOST_OTHERS]:
        stored = as_double(constants[other])
        if not is_uniform(stored.numpy()) and not torch.equal(stored, as_double(constants[name])):
            yield Change("another", f"those of another layer ({other} instead of {name})", stored, 0, {"of": other})


def of_slices(own: Tensor, fitted: Tensor, deviation: Tensor) -> Iterator[Change]:
    """Slices of a constant that are zero, scaled or in another order, as a fit tells; all of one shape, float64."""
    for axis in range(own.dim()):
        count = own.shape[axis]
        if not 1 < count <= MOST_SLICES:
            continue
        rows, fits, noise = (t.movedim(axis, 0).reshape(count, -1) for t in (own, fitted, deviation))
        off = _off(fits - rows, noise)
        places = off.nonzero().flatten()
        if not len(places):
            continue
        for kind, text, value, evidence in slice_forms(own.numpy(), fitted.numpy(), axis, places.numpy()):
            numbers = len(places) * (2 if kind == "channels-scaled" else 1)
            yield Change(kind, text, torch.from_numpy(np.ascontiguousarray(value)), numbers, evidence)
        order = _order(rows, fits, off)
        if order is not None:
            kind, text, value, evidence = in_order(own.numpy(), order.tolist(), axis)
            yield Change(kind, text, torch.from_numpy(value), evidence["moved"], evidence)
    if (norm := float(own.square().sum())) and (factor_of_all := float((own * fitted).sum()) / norm):
        yield Change("scaled", f"× {factor_of_all:.6g}", own * factor_of_all, 1, {"factor": factor_of_all})


def _off(change: Tensor, noise: Tensor) -> Tensor:
    """[slices] bool: those that have changed by more than the fit's own uncertainty."""
    size, uncertain = change.square().sum(1).sqrt(), noise.square().sum(1).sqrt()
    floor = torch.maximum(uncertain, uncertain.median())
    return (size > SIGNIFICANT * floor) & (size > TRACE * size.max())


def _order(rows: Tensor, fits: Tensor, off: Tensor) -> Tensor | None:
    """The order in which ``rows`` come nearest to ``fits``; None unless it is another one, each row once."""
    order = torch.where(off, nearest_slices(rows, fits), torch.arange(len(rows)))
    moved = bool((order != torch.arange(len(rows))).any())
    return order if moved and len(order.unique()) == len(order) else None


def cause_of(change: Change, node: Node, place: int) -> tuple[str, str, dict[str, Any]]:
    """(Cause, in words, evidence) of a change to one constant of a node: the name that it has with both graphs."""
    what = {"weights": "the weights", "bias": "the bias"}.get(role_of_constant(node, place), node.proto.input[place])
    said = TensorChange(change.kind, change.says, change.evidence)
    evidence = {"constant": node.proto.input[place], "change": change.kind, **change.evidence}
    return named(said, role_of_constant(node, place), node.op), f"{what} of {node.op}: {change.says}", evidence


def tried(segment: Segment, node: Node, changes: Mapping[int, Change], fix: str) -> Candidate:
    """The candidate of changes to constants of a node, by place: the largest constant names the cause."""
    value = segment.edited(node, inputs={place: change.value for place, change in changes.items()})
    told = {}
    for place, change in changes.items():
        lost = [n for n in segment.nodes if change.degenerate and n.op in PRODUCTS and node.outputs == n.inputs[2:3]]
        told[place] = cause_of(change, *((lost[0], 2) if lost else (node, place)))  # levels of a bias
    name, _, evidence = told[max(changes, key=lambda place: changes[place].value.numel())]
    says, count = "; ".join(text for _, text, _ in told.values()), sum(c.parameters for c in changes.values())
    empty = min(change.degenerate for change in changes.values())
    return Candidate(name, says, value, count, evidence, fix, degenerate=empty)


def constants_of(segment: Segment, node: Node, fewest: int = 2, *, levels: bool = False) -> dict[int, Tensor]:
    """Place → constant of at least ``fewest`` elements that a node reads, any shape, float64; whole numbers only
    with ``levels``."""
    constants = segment.context.constants
    if node.op in SIZED:
        return {}
    return {
        place: weight
        for place, name in enumerate(node.proto.input)
        if (weight := segment.weight(node, place)) is not None
        and weight.numel() >= fewest
        and (levels or constants[name].is_floating_point())
    }
