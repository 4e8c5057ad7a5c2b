"""A convolution or product with other weights: flipped or transposed kernels, or weights that only a fit can tell."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional

from cp_debug.bisect.causes.base import Candidate, cause
from cp_debug.bisect.causes.segment import Segment
from cp_debug.probes.distance import relative_l2

MOST_UNKNOWNS = 1200
"""Number of weights of an output channel up to which they are fitted."""
_FIX = "compare the weights of {layers} in both programs: layout, checkpoint, folding"


@cause()
def other_layout(segment: Segment) -> Iterator[Candidate]:
    """Candidates: the declared weights in another layout, flipped or transposed."""
    node = segment.product
    weight = segment.weight(node, 1) if node is not None else None
    if node is None or weight is None or weight.dim() < 2:
        return
    spatial = list(range(2, weight.dim()))
    ways = []
    if spatial:
        ways.append(("the kernel is flipped (convolution instead of correlation)", weight.flip(spatial)))
    if len(spatial) == 2 and weight.shape[2] == weight.shape[3]:
        ways.append(("rows and columns of the kernel are exchanged", weight.transpose(2, 3)))
    if weight.shape[0] == weight.shape[1]:
        ways.append(("input and output channels of the weight are exchanged", weight.transpose(0, 1)))
    for says, rearranged in ways:
        if not torch.equal(rearranged, weight) and (value := segment.edited(node, inputs={1: rearranged})) is not None:
            yield Candidate("weight-layout", says, value, fix=_FIX)


@cause(costly=True)
def fitted(segment: Segment) -> Iterator[Candidate]:
    """Candidate: any other weights and bias, fitted on one half of the result and tried on the other."""
    node = segment.product
    if node is None or node.op != "Conv" or segment.before is not segment.exact or len(segment.nodes) > 1:
        return
    weight = segment.weight(node, 1)
    attributes = {a.name: list(a.ints) for a in node.proto.attribute if a.ints}
    groups = next((a.i for a in node.proto.attribute if a.name == "group"), 1)
    pads = attributes.get("pads", [0] * 4)
    if weight is None or weight.dim() != 4 or groups != 1 or weight[0].numel() > MOST_UNKNOWNS or pads[:2] != pads[2:]:
        return
    layer_input = segment.input(node.proto.input[0])
    dilation, stride = (tuple(attributes.get(name, (1, 1))) for name in ("dilations", "strides"))
    columns = functional.unfold(layer_input, tuple(weight.shape[2:]), dilation, tuple(pads[:2]), stride)
    columns = columns.transpose(1, 2).flatten(0, 1)
    columns = torch.cat([columns, torch.ones(len(columns), 1, dtype=torch.float64)], 1)
    captured = segment.test.flatten(2).transpose(1, 2).flatten(0, 1)
    coin = torch.rand(len(columns), generator=torch.Generator().manual_seed(0)) < 0.5
    unknowns = columns.shape[1]
    if min(int(coin.sum()), int((~coin).sum())) < 2 * unknowns or not bool(segment.finite.all()):
        return
    prediction = torch.empty_like(captured)
    for fold in (coin, ~coin):
        solution = _least_squares(columns[fold], captured[fold])
        prediction[~fold] = columns[~fold] @ solution
    fitted_weight = solution[:-1].T.reshape(weight.shape)
    difference = relative_l2(fitted_weight, weight)
    shape = (layer_input.shape[0], -1, weight.shape[0])
    value = prediction.reshape(shape).transpose(1, 2).reshape(segment.test.shape)
    says = f"the weights are others: they differ by {difference:.2g} (rel. L2)"
    evidence = {"weights_differ_by": difference, "unknowns_per_channel": unknowns}
    yield Candidate("other-weights", says, value, unknowns * weight.shape[0], evidence, _FIX)


def _least_squares(a: Tensor, b: Tensor) -> Tensor:
    gram = a.T @ a
    gram.diagonal().add_(1e-12 * float(gram.diagonal().mean()))
    return torch.linalg.solve(gram, a.T @ b)
