"""Constants that the captured result tells: fitted to it, compared with the declared ones, and put to the proof.

Where the layer is linear in its constants and has more equations than unknowns, least squares give the constants that
the test had. What they look like beside the declared ones (zero slices, another order, another layer's) is computed
anew with exactly that change, and judged like any other cause; only where none fits are they merely "other weights".

A fit of all weights needs more equations than unknowns. Where one or two weights of a channel are wrong (a bit flip, a
damaged file) far fewer do: the channel's error is a multiple of what those weights alone make of the input, which is
found by matching pursuit (Mallat and Zhang, 1993).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

from cp_debug.bisect.causes.base import Candidate, cause
from cp_debug.bisect.causes.constant_changes import Change, of_slices, others, rearranged, tried
from cp_debug.bisect.causes.linear_parts import FittedConstants, ProductLayout, fit
from cp_debug.bisect.causes.segment import Segment, l2

PROVED = 6
"""Changes of one constant, the nearest to the fit, that are computed anew."""
NEAR = 0.5
"""Share of the fitted change that a change may leave to be one of them."""
DIFFERS = 4.0
"""Multiple of its deviation from which a fitted constant counts as another one than the declared one."""
MOST = 3
"""Output channels with a wrong weight, and wrong weights of one of them."""
FEWEST_ROWS = 8
"""Elements of an output channel from which a weight can be told from the others."""
REST = 1e-3
"""Share of a channel's error that its wrong weights may leave."""
TRACE = 1e-4
"""Share of the largest channel's error below which a channel is right."""
FIX = "compare the weights of {layers} in both programs: layout, checkpoint, folding"
_DAMAGED = "compare the weights of {layers} in both programs: a damaged file, a bit flip"


@cause(costly=True, structural=True, by_node=True)
def fitted(segment: Segment) -> Iterator[Candidate]:
    """Candidates: what happened to the constants of the last node, and other constants without a name, by a fit."""
    if not segment.nodes or not segment.introduced:
        return
    node = segment.nodes[-1]
    estimate = fit(segment, node)
    if estimate is None:
        return
    own = {place: w for place in estimate.tensors if (w := segment.weight(node, place)) is not None}
    changed = [p for p in own if l2(estimate.tensors[p] - own[p]) > DIFFERS * l2(estimate.deviations[p])]
    near = {p: list(_nearest(segment, own[p], estimate, p)) for p in changed}
    for choice in itertools.product(*near.values()) if near and all(near.values()) else ():
        yield tried(segment, node, dict(zip(near, choice, strict=True)), FIX)
    for place in changed:  # one of them may be within what the fit of the other leaves open
        if len(changed) > 1:
            for change in near[place]:
                yield tried(segment, node, {place: change}, FIX)
    if changed:
        sizes = {p: l2(estimate.tensors[p] - own[p]) / (l2(own[p]) or 1.0) for p in changed}
        names = [node.proto.input[p] for p in changed]
        says = "the weights are not the declared ones: " + ", ".join(
            f"{name} differs by {size:.2g} (rel. L2)" for name, size in zip(names, sizes.values(), strict=True)
        )
        evidence = {"constants": names, "weights_differ_by": max(sizes.values()), "unknowns": estimate.unknowns}
        yield Candidate("other-weights", says, estimate.predicted, estimate.unknowns, evidence, FIX)


def _nearest(segment: Segment, own: Tensor, estimate: FittedConstants, place: int) -> Iterator[Change]:
    fitted_tensor, deviation = estimate.tensors[place], estimate.deviations[place]
    size = l2(fitted_tensor - own)
    guesses = [*rearranged(own), *of_slices(own, fitted_tensor, deviation), *others(segment, estimate.node, place)]
    distances = [(l2(fitted_tensor - g.value), i) for i, g in enumerate(guesses)]
    for distance, i in sorted(distances)[:PROVED]:
        if distance < NEAR * size:
            yield guesses[i]


@cause(costly=True, by_node=True)
def single_weights(segment: Segment) -> Iterator[Candidate]:
    """Candidate: one to three weights of one to three output channels are others."""
    node = segment.nodes[-1] if segment.nodes else None
    if node is None or segment.test.shape != segment.exact.shape or not segment.introduced:
        return
    layout = ProductLayout.of(segment, node)
    if layout is None or not layout.fits(segment) or not bool(segment.finite.all()):
        return
    error = layout.flat(segment.error)  # [groups, rows, outputs]
    if error.shape[1] < FEWEST_ROWS:
        return
    sizes = error.square().sum(1).sqrt()
    off = (sizes > max(TRACE * float(sizes.max()), 4 * segment.expected / len(sizes.flatten()) ** 0.5)).nonzero()
    if not 0 < len(off) <= MOST or (columns := layout.columns(segment)) is None:
        return
    weight, theta = layout.weight, layout.theta_of(layout.weight).clone()
    count = 0
    for group, output in off.tolist():
        found = _pursued(columns[group], error[group, :, output])
        if found is None:
            return
        for index, change in found.items():
            theta[group, index, output] += change
        count += len(found)
    changed = layout.weight_of(theta)
    places = (changed != weight).nonzero().tolist()
    value = segment.edited(node, inputs={layout.place: changed})
    pairs = ", ".join(f"{p}: {float(weight[tuple(p)]):.6g} → {float(changed[tuple(p)]):.6g}" for p in places)
    says = f"{count} of {weight.numel()} weights of {node.op} {'differs' if count == 1 else 'differ'}: {pairs}"
    evidence = {"constant": node.proto.input[layout.place], "elements": places}
    yield Candidate("other-weights", says, value, 2 * count, evidence, _DAMAGED)


def _pursued(columns: Tensor, error: Tensor) -> dict[int, float] | None:
    """Column → its multiple in ``error`` [rows], of [rows, unknowns]; None where more than ``MOST`` are needed."""
    norms = columns.square().sum(0).sqrt()
    chosen: list[int] = []
    left, limit = error, REST * float(error.norm())
    while len(chosen) < MOST:
        chosen.append(int(((columns.T @ left).abs() / norms.clamp(min=1e-30)).argmax()))
        solved = torch.linalg.lstsq(columns[:, chosen], error[:, None]).solution[:, 0]
        left = error - columns[:, chosen] @ solved
        if float(left.norm()) <= limit:
            return dict(zip(chosen, solved.tolist(), strict=True))
    return None
