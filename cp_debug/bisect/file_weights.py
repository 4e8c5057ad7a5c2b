"""Weights that a quantized file stores in codes, beside the float ones that they were made from.

Codes tell the scales that they were made with: those by which they come nearest to the float weight. A stored scale
that is another one makes an error that no rounding makes. The same goes for zero points, for the group that each input
belongs to, and for the order in which codes lie within their words.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from onnx import TensorProto
from torch import Tensor

from cp_debug.graph.constants import Constants
from cp_debug.graph.graph import Graph, Node
from cp_debug.graph.integer_values import constant_type
from cp_debug.graph.narrow_qdq import order_behind, stated_bits
from cp_debug.graph.operators import PRODUCTS

BETTER = 1.6
"""Factor by which other scales must lower an error to be called the right ones. Those of a rounding lower it by 1.05
at most."""
OFF = 0.05
"""Relative difference from which a scale counts as another one; a block of 16 codes tells its scale to 2 %."""
SHIFTED = (TensorProto.UINT8, TensorProto.INT8, TensorProto.UINT4, TensorProto.INT4)
"""ONNX data types of codes that have zero points, which a file may have lost."""
WORD = 8
"""Codes of 4 bits in a word."""


@dataclass(frozen=True)
class Repair:
    """A weight that its codes make when one thing is read otherwise."""

    kind: str
    """``scales``, ``axis``, ``zero-points``, ``groups``, ``order``, or ``codes``: they are of another weight."""
    value: Tensor
    """float64, in the shape of the weight."""
    evidence: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class StoredCodes:
    """The constant codes that one product of a file reads, with their scales."""

    dequantizer: Node
    """The node whose result is the weight: DequantizeLinear, or the Gather that puts its slices in order."""
    kind: int
    """ONNX data type of the codes."""
    codes: Tensor
    """Codes without their zero points, float64, in the shape of the weight."""
    scale: Tensor
    """Scales, spread to the shape of the weight."""
    axes: tuple[int, ...] | None
    """Axes that a scale covers; None: ``groups`` along ``axis``."""
    axis: int
    groups: Tensor | None
    """int64 [length of ``axis``], the group of each slice."""
    zero: Tensor | None
    """Zero points, spread to the shape of the weight; None: none are stored."""
    bits: int | None = None
    """Bits that the codes were made for, where the file says it."""

    def refitted(self, weight: Tensor) -> Tensor:
        """The scales by which the codes come nearest to a float ``weight`` of their shape, spread like ``scale``."""
        top, bottom = self._sums(weight * self.codes), self._sums(self.codes * self.codes)
        return torch.where(bottom > 0, top / torch.where(bottom > 0, bottom, 1.0), self.scale)

    def _sums(self, x: Tensor) -> Tensor:
        if self.axes is not None or self.groups is None:
            return x.sum(self.axes, keepdim=True).expand_as(x) if self.axes else x
        count = int(self.groups.max()) + 1
        shape = [count if d == self.axis else size for d, size in enumerate(x.shape)]
        return x.new_zeros(shape).index_add(self.axis, self.groups, x).index_select(self.axis, self.groups)

    def repair(self, weight: Tensor, *, codes: bool = False) -> Repair | None:
        """The reading that brings the codes nearest to ``weight``, float64 in their shape; None where the stored one is
        about as near as any. ``codes``: where no reading helps, the codes themselves may be those of another weight."""
        if weight.shape != self.codes.shape:
            return None
        now, least = float((weight - self.scale * self.codes).norm()), 1e-3 * float(weight.norm())
        best, then = None, now
        for tried in self._readings(weight):
            distance = float((weight - tried.value).norm())
            if distance < then:
                best, then = tried, distance
        if now > BETTER * then and now - then > least:
            return best
        # Rounding, also one that makes up for what others lost, moves few of the codes by more than a level.
        steps = torch.where(self.scale != 0, weight / torch.where(self.scale != 0, self.scale, 1.0), self.codes)
        ends = self.codes.abs() < self.codes.abs().max()
        share = float((((steps - self.codes).abs() > 1) & ends).double().mean())
        return Repair("codes", weight, {"share": share}) if codes and share > OFF and now > least else None

    def _readings(self, weight: Tensor) -> Iterator[Repair]:
        scale = self.refitted(weight)
        yield Repair("scales", scale * self.codes, {"fitted": scale})
        if self.axes is not None and len(self.axes) < self.codes.dim():
            for axis in (d for d in self.axes if self.codes.shape[d] == self.codes.shape[self.axis]):
                turned = self.scale.transpose(axis, self.axis)
                yield Repair("axis", turned * self.codes, {"axis": self.axis, "right": axis})
        if (self.zero is not None or self.kind in SHIFTED) and (shifted := self._shifted(weight)) is not None:
            yield shifted
        if self.zero is not None and self.groups is not None and self.codes.dim() == 2:
            yield from self._regrouped(weight)
            yield from self._reordered(weight)

    def _shifted(self, weight: Tensor) -> Repair | None:
        """Other zero points, whole numbers, the scales as stored."""
        steps = torch.where(self.scale != 0, weight / torch.where(self.scale != 0, self.scale, 1.0), self.codes)
        by = (self._sums(self.codes - steps) / self._sums(torch.ones_like(steps))).round()
        if not bool((by != 0).any()):
            return None
        counts = torch.unique(by, return_counts=True)
        most = float(counts[0][counts[1].argmax()])
        share = float((by == most).double().mean())
        return Repair("zero-points", self.scale * (self.codes - by), {"by": most, "share": share})

    def _regrouped(self, weight: Tensor) -> Iterator[Repair]:
        """Inputs in other groups: each in that whose scales and zero points bring its codes nearest."""
        assert self.groups is not None
        assert self.zero is not None
        count = int(self.groups.max()) + 1
        if count < 2:
            return
        first = torch.stack([(self.groups == g).nonzero()[0, 0] if bool((self.groups == g).any()) else
                             self.groups.new_zeros(()) for g in range(count)])  # fmt: skip
        w, codes, s, z = (t if self.axis == 0 else t.T for t in (weight, self.codes + self.zero, self.scale, self.zero))
        scale, offset = s[first], (s * z)[first]
        # |w - s (c - z)|², multiplied out, for every input and every group
        squares = (
            -2 * (w * codes) @ scale.T + 2 * w @ offset.T + codes.square() @ scale.square().T
            - 2 * codes @ (scale * offset).T + offset.square().sum(1)
        )  # fmt: skip
        nearest = squares.argmin(1)
        moved = int((nearest != self.groups).sum())
        if moved:
            value = scale[nearest] * codes - offset[nearest]
            evidence = {"moved": moved, "of": len(nearest)}
            yield Repair("groups", value if self.axis == 0 else value.T, evidence)

    def _reordered(self, weight: Tensor) -> Iterator[Repair]:
        """Codes in another order within words of eight, along either axis, with their zero points or without."""
        assert self.zero is not None
        for axis in (0, 1):
            w, codes, s, z = (t if axis == 0 else t.T for t in (weight, self.codes + self.zero, self.scale, self.zero))
            if len(w) % WORD:
                continue
            signed = codes * s.sign() if axis == self.axis else codes  # a word has one group, whose scale is its own
            ours, theirs = (_standardized(t).unflatten(0, (-1, WORD)) for t in (w, signed))
            alike = torch.einsum("bix,bjx->ij", ours, theirs)
            order = alike.argmax(1)
            if len(order.unique()) != WORD or torch.equal(order, torch.arange(WORD)):
                continue
            places = (torch.arange(0, len(w), WORD)[:, None] + order).flatten()
            for zero, what in ((z, "codes"), (z[places], "codes and zero points")):
                value = s * (codes[places] - zero)
                evidence = {"order": order.tolist(), "axis": axis, "what": what}
                yield Repair("order", value if axis == 0 else value.T, evidence)


def _standardized(rows: Tensor) -> Tensor:
    """Rows without their mean, of length 1: scales and zero points of a whole row make no difference."""
    return torch.nn.functional.normalize(rows - rows.mean(1, keepdim=True), dim=1)


def twin_of(product: Node, nodes: Sequence[Node]) -> Node | None:
    """The only product among ``nodes``, if it does what ``product`` does; None where there are none or several."""
    found = [node for node in nodes if node.op in PRODUCTS]
    return found[0] if len(found) == 1 and same_product(product, found[0]) else None


def same_product(node: Node, other: Node) -> bool:
    """Whether two nodes have one operator, or both multiply matrices: optimizers make a Gemm of MatMul and Add."""
    return node.op == other.op or {node.op, other.op} <= {"Gemm", "MatMul"}


def turned(weight: Tensor, product: Node, twin: Node) -> Tensor:
    """The weight [rows, columns] of ``product``, or [columns, rows] where ``twin`` has it so."""
    return weight.mT if bool(product.attribute("transB")) != bool(twin.attribute("transB")) else weight


def stored_codes(graph: Graph, product: Node) -> StoredCodes | None:
    """Constant codes behind the second operand of ``product``; None without such, and where a scale is computed."""
    node = last = graph.producer.get(product.proto.input[1]) if len(product.proto.input) > 1 else None
    constants, order = Constants(graph), None
    if node is not None and node.op == "Gather":
        node = graph.producer.get(node.proto.input[0])
    if node is None or last is None or node.op != "DequantizeLinear" or node.proto.input[0] not in constants:
        return None
    kind = constant_type(graph, node.proto.input[0])
    arrays = [constants[name] for name in node.proto.input if name in constants]
    if kind is None or len(arrays) != len(node.proto.input):
        return None
    codes, scale, *zero = (torch.from_numpy(np.asarray(array).astype(np.float64)) for array in arrays)
    axis, block = node.attribute("axis", 1) % max(codes.dim(), 1), node.attribute("block_size", 0)
    shape = codes.shape

    def spread(part: Tensor) -> Tensor:
        if part.numel() == 1:
            return part.reshape(()).expand(shape)
        if block:
            return part.repeat_interleave(block, axis).narrow(axis, 0, shape[axis])
        return part.reshape([-1 if d == axis else 1 for d in range(len(shape))]).expand(shape)

    zeros = spread(zero[0]) if zero else None
    codes, scales = codes if zeros is None else codes - zeros, spread(scale)
    groups = torch.arange(shape[axis]) // block if block else None
    if last is not node:
        behind = order_behind(graph, node)
        if behind is None or groups is None or last.attribute("axis", 0) != axis:
            return None
        order = torch.from_numpy(behind[1]).long()
        codes, scales = codes.index_select(axis, order), scales.index_select(axis, order)
        zeros, groups = None if zeros is None else zeros.index_select(axis, order), groups[order]
    axes = tuple(d for d in range(codes.dim()) if d != axis or scale.numel() == 1)
    return StoredCodes(last, kind, codes, scales, None if block else axes, axis, groups, zeros, stated_bits(node))
