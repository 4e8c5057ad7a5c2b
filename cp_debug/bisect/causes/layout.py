"""The right numbers in the wrong places: permuted, transposed, flipped, shifted, cut off, or another tensor's."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cp_debug.bisect.causes.base import Candidate, cause
from cp_debug.bisect.causes.fits import nearest_slices
from cp_debug.bisect.causes.segment import Segment, as_double, l2
from cp_debug.programs.tensor_change import exchanges, same_slices, shifted_in, turned_forms

MOST_SLICES = 1024
"""Slices along an axis up to which each is compared with each."""
FEW = 4
"""Elements of a slice below which it must equal its partner, and have one of its own."""
SAME = 0.1
"""Relative L2 distance below which another value is the same one, and not a mistaken one."""
COPIED = 4
"""Output channels of a weight that may be copies of others: near ones are found for any."""
REACH = 2
"""Cells by which a map may be shifted."""


@cause()
def turned(segment: Segment) -> Iterator[Candidate]:
    """Candidates: axes exchanged and the buffer read in the old shape, or running backwards."""
    if segment.exact.shape != segment.test.shape:
        return
    for kind, says, value, evidence in turned_forms(segment.exact.numpy()):
        fix = f"flip {{layers}} along {evidence.get('axis')}"
        if kind == "transposed":
            fix = f"permute{tuple(evidence['axes'])} {{layers}} before it is read, instead of reshaping"
        yield Candidate(kind, says, torch.from_numpy(np.ascontiguousarray(value)), evidence=evidence, fix=fix)


@cause()
def permuted(segment: Segment) -> Iterator[Candidate]:
    """Candidates: slices along one axis in another order (channels, voxels), each matched with the nearest one; of a
    product also those of its weights, the bias as it was."""
    if segment.exact.shape != segment.test.shape or not bool(segment.finite.all()):
        return
    for axis in range(segment.exact.dim()):
        if (found := _reordered(segment, axis, segment.exact, segment.test)) is not None:
            text, value, count, evidence = found
            fix = f"restore the order of axis {axis} of {{layers}}"
            yield Candidate("permuted", f"axis {axis} is permuted: {text}", value, count, evidence, fix)
    if segment.bias is None or segment.product is None or segment.weight(segment.product, 1) is None:
        return
    without = segment.before - segment.bias, segment.test - segment.bias
    if (found := _reordered(segment, segment.axis, *without)) is not None:
        text, value, count, evidence = found
        what = "are exchanged" if evidence["bijective"] else "hold those of others"
        if evidence["bijective"] or evidence["moved"] <= COPIED:
            says, value = f"output channels of the weight {what}: {text}", segment.activate(value + segment.bias)
            yield Candidate("weight-layout", says, value, count, evidence, "compare both checkpoints: {layers}")


def _reordered(
    segment: Segment, axis: int, exact: Tensor, test: Tensor
) -> tuple[str, Tensor, int, dict[str, Any]] | None:
    """The order in which slices of ``exact`` are nearest to those of ``test`` (in words, what it gives, its numbers,
    figures), both of one shape; None where it is the one that they have, or as good as any."""
    count = exact.shape[axis]
    if count < 2:
        return None
    exact_slices, test_slices = (t.movedim(axis, 0).reshape(count, -1) for t in (exact, test))
    order = nearest_slices(exact_slices, test_slices) if count <= MOST_SLICES else None
    if order is None:
        same = same_slices(exact_slices.numpy(), test_slices.numpy())
        if same is None or len(set(same)) < count:
            return None
        order = torch.tensor(same)
    pairs, moved = exchanges(order.tolist())
    if not moved:
        return None
    bijective = len(order.unique()) == count
    tolerance = max(1e-3, 4 * segment.context.claim.roundoff)
    if exact_slices.shape[1] < FEW and not (
        bijective and torch.allclose(exact_slices[order], test_slices, rtol=tolerance)
    ):
        return None  # so few elements find a near partner by chance
    value = exact_slices[order].reshape(exact.movedim(axis, 0).shape).movedim(0, axis)
    rule = _rule(order.tolist())
    evidence = {"axis": axis, "moved": moved, "order": order[:64].tolist(), "bijective": bijective}
    # Copied rows of a big table leave no room for chance: their order counts as one number, like one with a rule.
    return rule or pairs, value, moved if count <= MOST_SLICES and not rule else 1, evidence


def _rule(order: list[int]) -> str:
    """One number that tells a whole order, in words: by how many slices it is rolled, how many lie inside one another;
    empty without one."""
    count = len(order)
    if count > FEW and len({(i - j) % count for i, j in enumerate(order)}) == 1:
        return f"rolled by {-order[0] % count}"
    for parts in (p for p in range(2, count // 2 + 1) if count % p == 0):
        if order == [i * parts + j for j in range(parts) for i in range(count // parts)]:
            return f"{count // parts} × {parts} slices are read as {parts} × {count // parts}"
    return ""


@cause()
def shifted(segment: Segment) -> Iterator[Candidate]:
    """Candidates: a map moved by some cells; the border that the shift lays bare is not judged."""
    exact, test = segment.exact, segment.test
    if exact.shape != test.shape or exact.dim() < 3:
        return
    axes = [d for d in (-2, -1) if exact.dim() + d >= 1 and exact.shape[d] > 8 * REACH]
    if not axes:
        return
    for steps in itertools.product(range(-REACH, REACH + 1), repeat=len(axes)):
        if not any(steps):
            continue
        value = torch.from_numpy(shifted_in(exact.numpy(), test.numpy(), dict(zip(axes, steps, strict=True))))
        says = f"the map is shifted by {list(steps)} cells along axes {axes}"
        fix = "check padding, stride and the alignment of corners above {layers}"
        yield Candidate("spatial-shift", says, value, len(axes), {"shift": list(steps), "axes": axes}, fix)


@cause()
def cut_off(segment: Segment) -> Iterator[Candidate]:
    """Candidates: zeros from some place of an axis on (truncated), or everywhere (never written)."""
    exact, test = segment.exact, segment.test
    if exact.shape != test.shape or not test.dim():
        return
    fix = "check buffer sizes and limits (maximum number of voxels, batch) where {layers} is written"
    if not bool(test.any()):
        says = "the tensor is all zero: nothing wrote it"
        yield Candidate("never-written", says, test, fix=fix, degenerate=2)
        return
    for axis in range(test.dim()):
        dims = [d for d in range(test.dim()) if d != axis]
        used = test.abs().sum(dims) if dims else test.abs()
        length = int(used.nonzero().max()) + 1
        if length < test.shape[axis]:
            value = exact.clone()
            value.narrow(axis, length, test.shape[axis] - length).zero_()
            says = f"axis {axis} is truncated after {length} of {test.shape[axis]}"
            yield Candidate("truncated", says, value, 1, {"axis": axis, "kept": length}, fix)


@cause()
def another_result(segment: Segment) -> Iterator[Candidate]:
    """Candidates: another result of the same node, as of a Split whose parts have changed places."""
    node = segment.nodes[-1] if segment.nodes else None
    for index, name in enumerate(node.outputs if node is not None and len(node.outputs) > 1 else ()):
        if not name or name == segment.target:
            continue
        value = segment.run(segment.context.oracle.arithmetic, target=name)
        if value.shape == segment.test.shape:
            says = f"this is result {index} of {segment.op}, {name}"
            fix = "compare the order of the results of {layers} in both programs"
            yield Candidate("another-tensor", says, value, evidence={"of": name}, fix=fix)


@cause(costly=True)
def another_tensor(segment: Segment) -> Iterator[Candidate]:
    """Candidates: the contents of another value of the same run, read in this shape and repeated to its size."""
    captured = segment.test.flatten()
    head = captured[:64]
    if len(head) < 8 or not bool(head.any()):
        return
    inside = {n for node in segment.nodes for n in (*node.inputs, *node.outputs)}
    for name, load in segment.others:
        if name.removesuffix(" of the reference") in inside:
            continue  # then a node is left out, which says more
        contents = as_double(load()).flatten()
        first = contents[: len(head)]
        if len(first) < len(head) or not torch.allclose(first, head, rtol=1e-3, atol=1e-6):
            continue
        value = contents.repeat(math.ceil(len(captured) / len(contents)))[: len(captured)].reshape(segment.test.shape)
        if value.shape == segment.exact.shape and _same(value, segment):
            continue  # the right result under another name
        fix = f"feed {{layers}} its own tensor instead of {name}"
        yield Candidate(
            "another-tensor", f"this is {name}, read in another shape", value, evidence={"of": name}, fix=fix
        )


def _same(value: Tensor, segment: Segment) -> bool:
    """Whether ``value`` equals what the layer should give, but for the error in question."""
    size = l2(segment.exact) or 1.0
    return l2(value - segment.exact) < SAME * size


@cause()
def isolated(segment: Segment) -> Iterator[Candidate]:
    """Candidates: a handful of wrong elements among right ones: a bit flip, a race, an index out of bounds."""
    if not segment.introduced or segment.exact.numel() < 64:
        return
    size = segment.error.abs().flatten()
    for count in (1, 2, 3):
        places = size.topk(count).indices
        value = segment.exact.flatten().clone()
        value[places] = segment.test.flatten()[places]
        index = np.stack(np.unravel_index(places.numpy(), segment.exact.shape), -1).tolist()
        says = f"{count} element{'s are' if count > 1 else ' is'} wrong, all others are right"
        fix = "look for a race, an index out of bounds or a corrupted weight behind {layers}"
        value = value.reshape(segment.exact.shape)
        yield Candidate("isolated", says, value, 2 * count, {"elements": index}, fix, located=True)
