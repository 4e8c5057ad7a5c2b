"""Constants that the captured result tells: fitted to it, compared with the declared ones, and put to the proof.

Where the layer is linear in its constants and has more equations than unknowns, least squares give the constants that
the test had. What they look like beside the declared ones (zero slices, another order, another layer's) is computed
anew with exactly that change, and judged like any other cause; only where none fits are they merely "other weights".
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

from cp_debug.bisect.causes.base import Candidate, cause
from cp_debug.bisect.causes.constant_changes import Change, cause_of, of_slices, rearranged
from cp_debug.bisect.causes.linear_parts import FittedConstants, fit
from cp_debug.bisect.causes.segment import Segment, as_double
from cp_debug.graph.constants import is_uniform

PROVED = 6
"""Changes of one constant, the nearest to the fit, that are computed anew."""
NEAR = 0.5
"""Share of the fitted change that a change may leave to be one of them."""
DIFFERS = 4.0
"""Multiple of its deviation from which a fitted constant counts as another one than the declared one."""
_FIX = "compare the weights of {layers} in both programs: layout, checkpoint, folding"


@cause(costly=True, structural=True)
def fitted(segment: Segment) -> Iterator[Candidate]:
    """Candidates: what happened to the constants of the last node, and other constants without a name, by a fit."""
    if not segment.nodes or not segment.introduced:
        return
    node = segment.nodes[-1]
    estimate = fit(segment, node)
    if estimate is None:
        return
    own = {place: w for place in estimate.tensors if (w := segment.weight(node, place)) is not None}
    changed = [p for p in own if _norm(estimate.tensors[p] - own[p]) > DIFFERS * _norm(estimate.deviations[p])]
    near = {p: list(_nearest(segment, own[p], estimate, p)) for p in changed}
    for choice in itertools.product(*near.values()) if near and all(near.values()) else ():
        yield from _proved(segment, estimate, dict(zip(near, choice, strict=True)))
    for place in changed:  # one of them may be within what the fit of the other leaves open
        if len(changed) > 1:
            for change in near[place]:
                yield from _proved(segment, estimate, {place: change})
    if changed:
        sizes = {p: _norm(estimate.tensors[p] - own[p]) / (_norm(own[p]) or 1.0) for p in changed}
        names = [node.proto.input[p] for p in changed]
        says = "the weights are others: " + ", ".join(
            f"{name} differs by {size:.2g} (rel. L2)" for name, size in zip(names, sizes.values(), strict=True)
        )
        evidence = {"constants": names, "weights_differ_by": max(sizes.values()), "unknowns": estimate.unknowns}
        yield Candidate("other-weights", says, estimate.predicted, estimate.unknowns, evidence, _FIX)


def _nearest(segment: Segment, own: Tensor, estimate: FittedConstants, place: int) -> Iterator[Change]:
    fitted_tensor, deviation = estimate.tensors[place], estimate.deviations[place]
    size = _norm(fitted_tensor - own)
    guesses = [*rearranged(own), *of_slices(own, fitted_tensor, deviation), *_of_others(segment, estimate, place, own)]
    distances = [(_norm(fitted_tensor - g.value), i) for i, g in enumerate(guesses)]
    for distance, i in sorted(distances)[:PROVED]:
        if distance < NEAR * size:
            yield guesses[i]


def _of_others(segment: Segment, estimate: FittedConstants, place: int, own: Tensor) -> Iterator[Change]:
    """Other constants of the shape, the one nearest to the fit."""
    graph, name = segment.graph, estimate.node.proto.input[place]
    best = (float("inf"), "", own)
    for other in graph.initializers:
        if other == name or tuple(graph.weight(other).dims) != tuple(own.shape):
            continue
        stored = segment.context.constants[other]
        if not stored.is_floating_point() or is_uniform(as_double(stored).numpy()):
            continue
        if (distance := _norm(estimate.tensors[place] - as_double(stored))) < best[0]:
            best = (distance, other, as_double(stored))
    if best[1]:
        yield Change("another", f"those of another layer ({best[1]})", best[2], 0, {"of": best[1]})


def _proved(segment: Segment, estimate: FittedConstants, changes: dict[int, Change]) -> Iterator[Candidate]:
    value = segment.edited(estimate.node, inputs={place: change.value for place, change in changes.items()})
    if value is None:
        return
    named = {place: cause_of(change, estimate.node, place) for place, change in changes.items()}
    place = max(changes, key=lambda p: changes[p].value.numel())
    name, _, evidence = named[place]
    says = "; ".join(text for _, text, _ in named.values())
    parameters, empty = sum(c.parameters for c in changes.values()), min(c.degenerate for c in changes.values())
    yield Candidate(name, says, value, parameters, evidence, _FIX, degenerate=empty)


def _norm(x: Tensor) -> float:
    return float(torch.linalg.vector_norm(x))
