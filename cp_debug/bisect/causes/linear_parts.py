"""Products, whose result is linear in their weights: the columns of the regression that tells the weights they had.

A convolution or product gives its columns itself, computed with unit vectors for weights, whatever its strides,
padding, dilation and groups.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cp_debug.bisect.causes.fits import halves
from cp_debug.bisect.causes.segment import Segment
from cp_debug.graph.graph import Node
from cp_debug.graph.operators import PRODUCTS
from cp_debug.programs.node_differences import attributes

MOST_COLUMNS = 1 << 24
"""Elements of a regression's columns."""
MOST_UNKNOWNS = 1200
"""Unknown weights of one output channel."""
PER_UNKNOWN = 1.5
"""Equations that a fold needs for each unknown."""


@dataclass(frozen=True)
class FittedConstants:
    """Constants of one node as its captured result tells them."""

    node: Node
    tensors: dict[int, Tensor]
    """Place → fitted tensor."""
    deviations: dict[int, Tensor]
    """Place → how far the fits of two halves of the result lie from one another, halved, by element."""
    predicted: Tensor
    """The result, each element predicted from the half that it is not in."""
    unknowns: int
    """Numbers fitted."""


def fit(segment: Segment, node: Node) -> FittedConstants | None:
    """The constants that ``node``, the last one of the segment, had in the test; None where that cannot be told."""
    if node is not segment.nodes[-1]:
        return None
    if "fit" not in segment.kept:
        segment.kept["fit"] = _fit(segment, node)
    found: FittedConstants | None = segment.kept["fit"]
    return found


def _fit(segment: Segment, node: Node) -> FittedConstants | None:
    if segment.test.shape != segment.exact.shape or segment.strange:
        return None
    if not bool(segment.finite.all()) or segment.test.numel() < 4:
        return None
    layout = ProductLayout.of(segment, node)
    if layout is None or layout.unknowns > MOST_UNKNOWNS:
        return None
    rows = segment.test.numel() // (layout.groups * layout.outputs)
    bias = segment.weight(node, 2)
    with_bias = bias is not None and bias.numel() == layout.groups * layout.outputs
    unknowns = layout.unknowns + with_bias
    if rows // 2 < PER_UNKNOWN * unknowns or rows * layout.groups * unknowns > MOST_COLUMNS:
        return None
    columns = layout.columns(segment)
    if columns is None:
        return None
    captured = layout.flat(segment.test)  # [groups, rows, outputs]
    known = torch.zeros(())
    if bias is not None and not with_bias:
        known = layout.flat((segment.exact - layout.without_bias(segment)).expand_as(segment.test))
    if with_bias:
        beta = float(attributes(segment.graph, node).get("beta", 1.0)) if node.op == "Gemm" else 1.0
        columns = torch.cat([columns, torch.full_like(columns[..., :1], beta)], -1)
    solved = _cross_fit(columns, captured - known)
    if solved is None:
        return None
    (first, second, both), prediction = solved
    thetas = [layout.weight_of(t[:, : layout.unknowns]) for t in (first, second, both)]
    tensors, deviations = {layout.place: thetas[2]}, {layout.place: (thetas[0] - thetas[1]).abs() / 2}
    if with_bias and bias is not None:
        ends = [t[:, -1].reshape(bias.shape) for t in (first, second, both)]
        tensors[2], deviations[2] = ends[2], (ends[0] - ends[1]).abs() / 2
    count = unknowns * layout.groups * layout.outputs
    return FittedConstants(node, tensors, deviations, layout.unflat(prediction + known, segment.test), count)


def _cross_fit(columns: Tensor, captured: Tensor) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor] | None:
    """Solutions [groups, unknowns, outputs] of both halves and of all, and the prediction out of sample.

    ``columns`` [groups, rows, unknowns], ``captured`` [groups, rows, outputs].
    """
    folds = halves(torch.ones(columns.shape[1], dtype=torch.bool))
    sums = []
    for rows in folds:
        a, b = columns[:, rows], captured[:, rows]
        sums.append((a.mT @ a, a.mT @ b))
    gram, right = sums[0][0] + sums[1][0], sums[0][1] + sums[1][1]
    values = torch.linalg.eigvalsh(gram)
    if bool((values[:, 0] <= 1e-11 * values[:, -1].clamp(min=1e-300)).any()):
        return None  # inputs that depend on each other do not tell their weights
    try:
        first, second, both = (torch.linalg.solve(g, r) for g, r in (*sums, (gram, right)))
    except torch.linalg.LinAlgError:  # one half alone does not tell them
        return None
    prediction = torch.empty_like(captured)
    prediction[:, folds[0]] = columns[:, folds[0]] @ second
    prediction[:, folds[1]] = columns[:, folds[1]] @ first
    return (first, second, both), prediction


@dataclass(frozen=True)
class ProductLayout:
    """Layout of a product's weights and of its result."""

    node: Node
    place: int
    """Place of the weights."""
    weight: Tensor
    """[outputs, inputs, …] or [rows, columns], float64."""
    groups: int
    unknowns: int
    """Weights of one output channel."""
    outputs: int
    """Output channels of one group."""

    @classmethod
    def of(cls, segment: Segment, node: Node) -> ProductLayout | None:
        """Layout of a product with constant weights; None for others, and for weights of other ranks."""
        place = 1 if segment.weight(node, 1) is not None else 0
        weight = segment.weight(node, place)
        if node.op not in PRODUCTS or weight is None or weight.dim() < 2 or (place == 0 and node.op != "MatMul"):
            return None
        shape, declared = weight.shape, attributes(segment.graph, node)
        if node.op in ("Conv", "ConvTranspose"):
            groups = int(declared.get("group", 1))
            if node.op == "Conv":
                return cls(node, place, weight, groups, weight[0].numel(), shape[0] // groups)
            return cls(node, place, weight, groups, shape[0] // groups * weight[0, 0].numel(), shape[1])
        if weight.dim() != 2:
            return None
        by_row = place == 0 or bool(declared.get("transB", 0))
        return cls(node, place, weight, 1, shape[1] if by_row else shape[0], shape[0] if by_row else shape[1])

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weights."""
        return tuple(self.weight.shape)

    @property
    def by_row(self) -> bool:
        """Whether a matrix holds the weights of one output in a row."""
        return self.place == 0 or bool(self.node.attribute("transB", 0))

    def fits(self, segment: Segment) -> bool:
        """Whether the columns for a segment's result are few enough to hold."""
        return segment.test.numel() // self.outputs * self.unknowns <= MOST_COLUMNS

    def columns(self, segment: Segment) -> Tensor | None:
        """[groups, rows, unknowns]: the results with unit vectors for weights, without bias."""
        k = self.unknowns
        units = self.weight_of(torch.eye(k, dtype=torch.float64).expand(self.groups, k, k))
        value = self._run(segment, units)
        return None if value is None else replace(self, outputs=k).flat(value)

    def without_bias(self, segment: Segment) -> Tensor:
        """The exact result without the bias, of the result's shape, float64."""
        value = self._run(segment, self.weight)
        return segment.exact if value is None else value

    def _run(self, segment: Segment, weight: Tensor) -> Tensor | None:
        reads = list(self.node.proto.input[:2])
        return segment.computed(self.node, inputs={self.place: weight}, reads=reads)

    @property
    def _axis(self) -> int:
        """The result's axis of output channels."""
        return -2 if self.place == 0 else 1 if "Conv" in self.node.op else -1

    def flat(self, value: Tensor) -> Tensor:
        """[groups, rows, outputs] from a result."""
        return value.movedim(self._axis, -1).reshape(-1, self.groups, self.outputs).movedim(1, 0)

    def unflat(self, rows: Tensor, like: Tensor) -> Tensor:
        """The inverse of ``flat``, in the shape of ``like``."""
        moved = like.movedim(self._axis, -1).shape
        return rows.movedim(0, 1).reshape(moved).movedim(-1, self._axis)

    def theta_of(self, weight: Tensor) -> Tensor:
        """[groups, unknowns, outputs] from the weight in the node's layout, float64."""
        if self.node.op == "Conv":
            return weight.reshape(self.groups, self.outputs, self.unknowns).mT
        if self.node.op == "ConvTranspose":
            inputs = self.shape[0] // self.groups
            parts = weight.reshape(self.groups, inputs, self.outputs, -1).mT
            return parts.reshape(self.groups, self.unknowns, self.outputs)
        return (weight.T if self.by_row else weight)[None]

    def weight_of(self, theta: Tensor) -> Tensor:
        """A weight in the node's layout from [groups, unknowns, outputs], of as many outputs."""
        inputs, outputs = self.shape[0] // self.groups, theta.shape[2]
        if self.node.op == "Conv":
            return theta.mT.reshape(-1, *self.shape[1:])
        if self.node.op == "ConvTranspose":
            parts = theta.reshape(self.groups, inputs, -1, outputs).mT
            return parts.reshape(self.groups * inputs, outputs, *self.shape[2:])
        return theta[0].T if self.by_row else theta[0]
