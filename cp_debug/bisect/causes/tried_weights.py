"""Constants rearranged, in fewer bits, with slices zero, scaled or exchanged, where no fit tells them: by trying.

The layer is computed with every change of the constant as a whole. Then each slice is left out in turn: those without
which the result moves where the error lies are tried as zero, scaled, and exchanged with one another. That needs no
linearity, so it holds for recurrent layers, whose gates' rows are slices of their weights.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from cp_debug.bisect.causes.affine import off_channels
from cp_debug.bisect.causes.base import Candidate, cause
from cp_debug.bisect.causes.constant_changes import Change, constants_of, of_forms, others, rearranged, tried
from cp_debug.bisect.causes.linear_parts import fit
from cp_debug.bisect.causes.segment import Segment, l2
from cp_debug.bisect.causes.single_numbers import Number, by_search
from cp_debug.graph.graph import Node
from cp_debug.graph.operators import PRODUCTS
from cp_debug.programs.tensor_change import interleaved_forms, stored_forms

MOST_WORK = 1 << 27
"""Elements of results and inputs that are computed for one constant's slices."""
FEWEST = 4
"""Elements of a constant from which its storage is looked at."""
FEWEST_COARSE = 32
"""Elements from which fewer bits than INT8 has are tried."""
WITHIN = 8.0
"""Factor between the relative change of a constant and that of the result, beyond which they are not computed: rounded
weights change a sum about as much as themselves."""
FEWEST_DEALT = 8
"""Elements of a constant from which its slices may be interleaved."""
MOVES = 100.0
"""Share of a result's size, its inverse, below which its error is too small for weights that are all elsewhere."""
BLOCKS = 64
"""Parts of a longer axis that are left out as a whole first; the best of them slice by slice."""
BEST_BLOCKS = 3
SUSPECTS = 12
"""Slices of an axis that are exchanged with one another."""
TENDS = 0.8
"""Cosine between the error and the effect of leaving a slice out, from which a factor on it is searched for."""
FIX = "compare the weights of {layers} in both programs: layout, checkpoint, order of gates"
_KEEP = "keep the weights of {layers} in FP32, or accept it"


@cause(costly=True, structural=True, by_node=True)
def as_a_whole(segment: Segment) -> Iterator[Candidate]:
    """Candidates: each constant rearranged, negated or zero."""
    for node in segment.nodes:
        told = fit(segment, node)  # of which constants it tells these changes, too
        for place, own in constants_of(segment, node).items():
            if told is not None and place in told.tensors:
                continue
            yield from (tried(segment, node, {place: change}, FIX) for change in rearranged(own))


@cause(costly=True, structural=True, by_node=True)
def times(segment: Segment) -> Iterator[Candidate]:
    """Candidates: a constant × the number that tells most of the error, where the result is linear in the constant."""
    for node in (node for node in segment.nodes if node.op not in PRODUCTS):
        for place, own in constants_of(segment, node).items():
            without = segment.edited(node, inputs={place: torch.zeros_like(own)})
            effect = torch.where(segment.finite, segment.exact - (0.0 if without is None else without), 0.0)
            size = float(effect.square().sum())
            if without is not None and 0 < size < math.inf:
                factor = 1 + float((effect * segment.error).sum()) / size
                change = Change("scaled", f"× {factor:.6g}", own * factor, 1, {"factor": factor})
                yield tried(segment, node, {place: change}, FIX)


@cause(costly=True, by_node=True)
def otherwise(segment: Segment) -> Iterator[Candidate]:
    """Candidates: another constant of the file, one in fewer bits, or its slices dealt out in turn (even ones first,
    heads or groups inside one another) and the blocks of a recurrent layer's weights transposed."""
    size = l2(torch.where(segment.finite, segment.exact, 0.0))
    for node in segment.nodes:
        for place, own in constants_of(segment, node, FEWEST).items():
            if own.numel() >= FEWEST_DEALT and MOVES * segment.introduced >= size:
                yield from (tried(segment, node, {place: c}, FIX) for c in of_forms(own, interleaved_forms))
        for place, own in constants_of(segment, node, FEWEST, levels=True).items() if node.op != "Gather" else ():
            yield from (tried(segment, node, {place: change}, FIX) for change in others(segment, node, place))
            for change in of_forms(own, stored_forms):
                moved = l2(change.value - own) / (l2(own) or 1.0) * size
                far = not segment.introduced / WITHIN < moved < segment.introduced * WITHIN
                if change.kind != "coarse" or not (far or segment.strange or own.numel() < FEWEST_COARSE):
                    yield tried(segment, node, {place: change}, _KEEP)


@cause(costly=True, structural=True, by_node=True)
def slices(segment: Segment) -> Iterator[Candidate]:
    """Candidates: slices of a constant that are zero, scaled or exchanged."""
    if segment.strange or not segment.introduced or segment.test.shape != segment.exact.shape:
        return
    for node in segment.nodes:
        if fit(segment, node) is not None:  # which tells all of them at once
            continue
        for place, own in constants_of(segment, node, 3).items():
            for axis in range(own.dim()) if not _everywhere(segment, node, own) else ():
                for candidate in _of_axis(segment, node, place, own, axis) if own.shape[axis] > 2 else ():
                    settled = segment.explained(candidate.value)[1] <= segment.expected
                    yield candidate
                    if settled:
                        return


def _everywhere(segment: Segment, node: Node, own: Tensor) -> bool:
    """Whether more slices of the result are wrong than two numbers of a constant, one for each, can make so."""
    axes = [axis for axis, size in enumerate(segment.test.shape) if size == own.numel() == max(own.shape)]
    last = node is segment.nodes[-1] and bool(axes)
    return last and all(int(off_channels(segment, axis).sum()) > 2 for axis in axes)


def _of_axis(segment: Segment, node: Node, place: int, own: Tensor, axis: int) -> Iterator[Candidate]:
    count = own.shape[axis]
    work = segment.test.numel() + sum(int(torch.as_tensor(v).numel()) for v in segment.given.values())
    in_blocks = count > 4 * BLOCKS
    singles = BLOCKS + BEST_BLOCKS * -(-count // BLOCKS) if in_blocks else count
    if (singles + SUSPECTS**2 // 2) * work > MOST_WORK:
        return

    def tends(places: list[int]) -> float:
        without = own.index_fill(axis, torch.tensor(places), 0.0)
        return abs(segment.towards(segment.edited(node, inputs={place: without})))

    among = list(range(count))
    if in_blocks:
        blocks = sorted((among[i::BLOCKS] for i in range(BLOCKS)), key=tends, reverse=True)
        among = [i for block in blocks[:BEST_BLOCKS] for i in block]
    scores = {i: tends([i]) for i in among}
    suspects = sorted(among, key=scores.__getitem__, reverse=True)[:SUSPECTS]
    best = suspects[0]

    def times(number: float) -> Candidate:
        kind, says = ("channels-scaled", f"× {number:.6g}") if number else ("channels-zero", "is zero")
        value = own * torch.ones_like(own).index_fill(axis, torch.tensor([best]), number)
        change = Change(kind, f"slice {best} of axis {axis} {says}", value, 1, {"axis": axis, "channels": [best]})
        return tried(segment, node, {place: change}, FIX)

    yield times(0.0)
    if scores[best] > TENDS:
        yield from by_search(segment, [Number(1.0, times)])

    def exchanged(pair: tuple[int, int]) -> Candidate:
        order = torch.arange(count)
        order[[*pair]] = order[[*pair[::-1]]]
        says = f"slices {pair[0]} and {pair[1]} of axis {axis} are exchanged"
        change = Change("permuted", says, own.index_select(axis, order), 2, {"axis": axis, "channels": [*pair]})
        return tried(segment, node, {place: change}, FIX)

    pairs = map(exchanged, itertools.combinations(sorted(suspects), 2))
    yield min(pairs, key=lambda candidate: segment.explained(candidate.value)[1])
