"""Weights that a quantized file stores in codes, beside the float ones that they were made from.

Codes tell the scales that they were made with: those by which they come nearest to the float weight. A stored scale
that is another one makes an error that no rounding makes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cp_debug.graph.constants import Constants
from cp_debug.graph.graph import Graph, Node
from cp_debug.graph.integer_values import constant_type
from cp_debug.graph.narrow_types import FIRST_OPSET
from cp_debug.graph.operators import PRODUCTS

BETTER = 1.6
"""Factor by which other scales must lower an error to be called the right ones. Those of a rounding lower it by 1.05
at most."""
OFF = 0.05
"""Relative difference from which a scale counts as another one; a block of 16 codes tells its scale to 2 %."""


@dataclass(frozen=True)
class StoredCodes:
    """The constant codes that one product of a file reads, with their scales."""

    dequantizer: Node
    kind: int
    """ONNX data type of the codes."""
    codes: Tensor
    """Codes without their zero points, float64, in the shape of the weight."""
    scale: Tensor
    """Scales, spread to the shape of the weight."""
    axes: tuple[int, ...] | None
    """Axes that a scale covers; None: ``block`` along ``axis``."""
    axis: int = 0
    block: int = 0

    def refitted(self, weight: Tensor) -> Tensor:
        """The scales by which the codes come nearest to a float ``weight`` of their shape, spread like ``scale``."""
        top, bottom = self._sums(weight * self.codes), self._sums(self.codes * self.codes)
        return torch.where(bottom > 0, top / torch.where(bottom > 0, bottom, 1.0), self.scale)

    def _sums(self, x: Tensor) -> Tensor:
        if self.axes is not None:
            return x.sum(self.axes, keepdim=True).expand_as(x) if self.axes else x
        moved = x.movedim(self.axis, -1)
        size = moved.shape[-1]
        padded = torch.nn.functional.pad(moved, (0, -size % self.block)).unflatten(-1, (-1, self.block))
        total = padded.sum(-1, keepdim=True).expand_as(padded).flatten(-2)[..., :size]
        return total.movedim(-1, self.axis)

    def misfits(self, weight: Tensor) -> bool:
        """Whether other scales bring the codes much nearer to ``weight``, float64 in the shape of the codes."""
        if weight.shape != self.codes.shape:
            return False
        now, then = (float((weight - s * self.codes).norm()) for s in (self.scale, self.refitted(weight)))
        return now > BETTER * then and now - then > 1e-3 * float(weight.norm())


def product_of(nodes: Sequence[Node], op: str) -> Node | None:
    """The only product of operator ``op`` among ``nodes``; None where there are none or several."""
    found = [node for node in nodes if node.op == op and node.op in PRODUCTS]
    return found[0] if len(found) == 1 else None


def stored_codes(graph: Graph, product: Node) -> StoredCodes | None:
    """Constant codes behind the second operand of ``product``; None without such, and where a scale is computed."""
    node = graph.producer.get(product.proto.input[1]) if len(product.proto.input) > 1 else None
    constants = Constants(graph)
    if node is None or node.op != "DequantizeLinear" or node.proto.input[0] not in constants:
        return None
    kind = constant_type(graph, node.proto.input[0])
    arrays = [constants[name] for name in node.proto.input if name in constants]
    if kind is None or len(arrays) != len(node.proto.input):
        return None
    codes, scale, *zero = (torch.from_numpy(np.asarray(array).astype(np.float64)) for array in arrays)
    attributes = {a.name: a.i for a in node.proto.attribute}
    axis, block = attributes.get("axis", 1) % max(codes.dim(), 1), attributes.get("block_size", 0)

    def spread(part: Tensor) -> Tensor:
        if part.numel() == 1:
            return part.reshape(()).expand_as(codes)
        if block:
            return part.repeat_interleave(block, axis).narrow(axis, 0, codes.shape[axis])
        return part.reshape([-1 if d == axis else 1 for d in range(codes.dim())]).expand_as(codes)

    if zero:
        codes = codes - spread(zero[0])
    axes = tuple(d for d in range(codes.dim()) if d != axis or scale.numel() == 1)
    return StoredCodes(node, kind, codes, spread(scale), None if block else axes, axis, block)


def is_narrow_kind(kind: int | None) -> bool:
    """Whether an ONNX data type is FP8, or has 4 bits."""
    return kind in FIRST_OPSET
