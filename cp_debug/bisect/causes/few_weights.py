"""Single wrong weights of a convolution or product, told by which column of the regression the error follows.

A fit of all weights needs more equations than unknowns. Where one or two weights of a channel are wrong (a bit flip, a
damaged file) far fewer do: the channel's error is a multiple of what those weights alone make of the input, which is
found by matching pursuit (Mallat and Zhang, 1993).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from cp_debug.bisect.causes.base import Candidate, cause
from cp_debug.bisect.causes.linear_parts import ProductLayout
from cp_debug.bisect.causes.segment import Segment
from cp_debug.graph.operators import PRODUCTS

MOST = 3
"""Output channels with a wrong weight, and wrong weights of one of them."""
FEWEST_ROWS = 8
"""Elements of an output channel from which a weight can be told from the others."""
REST = 1e-3
"""Share of a channel's error that its wrong weights may leave."""
TRACE = 1e-4
"""Share of the largest channel's error below which a channel is right."""
_FIX = "compare the weights of {layers} in both programs: a damaged file, a bit flip"


@cause(costly=True)
def single_weights(segment: Segment) -> Iterator[Candidate]:
    """Candidate: one to three weights of one to three output channels are others."""
    node = segment.nodes[-1] if segment.nodes else None
    if node is None or node.op not in PRODUCTS or segment.test.shape != segment.exact.shape or not segment.introduced:
        return
    place = 1 if segment.weight(node, 1) is not None else 0
    weight = segment.weight(node, place)
    if weight is None or weight.dim() < 2 or (place == 0 and node.op != "MatMul") or not bool(segment.finite.all()):
        return
    layout = ProductLayout.of(segment, node, place, weight)
    if layout is None or not layout.fits(segment):
        return
    error = layout.flat(segment.error)  # [groups, rows, outputs]
    if error.shape[1] < FEWEST_ROWS:
        return
    sizes = error.square().sum(1).sqrt()
    off = (sizes > max(TRACE * float(sizes.max()), 4 * segment.expected / len(sizes.flatten()) ** 0.5)).nonzero()
    if not 0 < len(off) <= MOST or (columns := layout.columns(segment)) is None:
        return
    theta = layout.theta_of(weight).clone()
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
    if (value := segment.edited(node, inputs={place: changed})) is not None:
        pairs = ", ".join(f"{p}: {float(weight[tuple(p)]):.6g} → {float(changed[tuple(p)]):.6g}" for p in places)
        says = f"{count} of {weight.numel()} weights of {node.op} {'is' if count == 1 else 'are'} another: {pairs}"
        evidence = {"constant": node.proto.input[place], "elements": places}
        yield Candidate("other-weights", says, value, 2 * count, evidence, _FIX)


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
