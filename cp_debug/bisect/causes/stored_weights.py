"""Constants that are stored in fewer bits, or that belong elsewhere: another layer's weights, channels exchanged."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from cp_debug.bisect.causes.base import Candidate, cause
from cp_debug.bisect.causes.constant_changes import Change, tried
from cp_debug.bisect.causes.segment import Segment, as_double
from cp_debug.graph.constants import is_uniform
from cp_debug.graph.graph import Node
from cp_debug.graph.qdq import weight_axis
from cp_debug.programs.node_differences import role_of_constant
from cp_debug.programs.tensor_change import stored_forms

FEWEST = 4
"""Elements of a constant from which its storage is looked at."""
FEWEST_COARSE = 32
"""Elements from which fewer bits than INT8 has are tried."""
WITHIN = 8.0
"""Factor between the relative change of a constant and that of the result, beyond which they are not computed: rounded
weights change a sum about as much as themselves."""
COPIED = 4
"""Output channels that may be copies of others: near ones are found for any."""
MOST_LAYERS = 32
"""Other constants of one shape that are tried."""
_KEEP = "keep the weights of {layers} in FP32, or accept it"


def _weights(segment: Segment) -> Iterator[tuple[Node, int, Tensor]]:
    for node in segment.nodes:
        for place in range(len(node.proto.input)):
            weight = segment.weight(node, place)
            if weight is not None and weight.numel() >= FEWEST and node.op not in ("Gather", "Slice", "Reshape"):
                yield node, place, weight


@cause(costly=True)
def in_fewer_bits(segment: Segment) -> Iterator[Candidate]:
    """Candidates: one constant stored in fewer bits, everything else as declared."""
    size = float(torch.linalg.vector_norm(torch.where(segment.finite, segment.exact, 0.0)))
    for node, place, weight in _weights(segment):
        norm = float(torch.linalg.vector_norm(weight)) or 1.0
        for kind, says, values, evidence in stored_forms(weight.numpy()):
            changed = torch.from_numpy(values)
            moved = float(torch.linalg.vector_norm(changed - weight)) / norm * size
            far = not segment.introduced / WITHIN < moved < segment.introduced * WITHIN
            if kind == "coarse" and (far or segment.strange or weight.numel() < FEWEST_COARSE):
                continue
            if bool(torch.isfinite(changed).all()):
                yield from tried(segment, node, place, Change(kind, says, changed, 0, evidence), _KEEP)


@cause(costly=True)
def of_another_layer(segment: Segment) -> Iterator[Candidate]:
    """Candidates: the weights of another layer that have the same shape and type: scales are no levels of a bias."""
    constants, graph = segment.context.constants, segment.graph
    for node, place, weight in _weights(segment):
        name = node.proto.input[place]
        if name not in graph.initializers or role_of_constant(node, place) in ("scale", "zero"):
            continue
        forms = {n: (graph.weight(n).data_type, *graph.weight(n).dims) for n in graph.initializers}
        alike = [n for n, form in forms.items() if n != name and form == forms[name]]
        for other_name in alike[:MOST_LAYERS]:
            stored = as_double(constants[other_name])
            if torch.equal(stored, weight) or is_uniform(stored.numpy()):  # zeros and ones are no layer's own
                continue
            if (value := segment.edited(node, inputs={place: stored})) is not None:
                says = f"{node.op} has the weights of another layer ({other_name} instead of {name})"
                evidence = {"of": other_name, "instead_of": name}
                yield Candidate(
                    "weights-of-another-layer", says, value, 0, evidence, "compare both checkpoints: {layers}"
                )


@cause(costly=True)
def exchanged_channels(segment: Segment) -> Iterator[Candidate]:
    """Candidate: output channels of the weight in another order, or a few of them copies of others, the bias as it was,
    by the nearest slices."""
    node = segment.product
    weight = segment.weight(node, 1) if node is not None else None
    if node is None or weight is None or weight.dim() < 2 or segment.test.shape != segment.exact.shape:
        return
    if not bool(segment.finite.all()) or math.prod(segment.test.shape) // segment.test.shape[segment.axis] < 4:
        return
    bias = 0.0 if segment.bias is None else segment.bias
    count = segment.test.shape[segment.axis]
    axis = weight_axis(node, weight.dim())
    if weight.shape[axis] != count or count > 1024:
        return
    exact_slices, test_slices = (
        (t - bias).movedim(segment.axis, 0).reshape(count, -1) for t in (segment.before, segment.test)
    )
    distance = exact_slices.square().sum(1) - 2 * test_slices @ exact_slices.T
    order = torch.where(distance.diagonal() <= distance.min(1).values, torch.arange(count), distance.argmin(1))
    moved = (order != torch.arange(count)).nonzero().flatten()
    copied = len(order.unique()) != count
    if not len(moved) or (copied and len(moved) > COPIED):
        return
    if (value := segment.edited(node, inputs={1: weight.index_select(axis, order)})) is not None:
        pairs = ", ".join(f"{int(i)}←{int(order[i])}" for i in moved[:6])
        what = "hold those of others" if copied else "are exchanged"
        says = f"output channels of the weight {what}: {pairs}" + (", …" if len(moved) > 6 else "")
        yield Candidate(
            "weight-layout", says, value, len(moved), {"moved": len(moved)}, "compare both checkpoints: {layers}"
        )
