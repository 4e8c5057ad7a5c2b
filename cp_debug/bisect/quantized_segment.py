"""Grids of quantized numbers: what lies on one and what it cuts off; what a segment gives with the best of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cp_debug.backends.base import Tensor as AnyTensor
from cp_debug.backends.executor import Executor, Weights
from cp_debug.backends.scaling import E2M1, E4M3, E5M2, Codec
from cp_debug.graph.graph import Graph, Node
from cp_debug.graph.integer_values import constant_type
from cp_debug.graph.qdq import LEVELS

BITS = {2: 8, 3: 8, 4: 16, 5: 16, 21: 4, 22: 4, 25: 2, 26: 2, 6: 32, 17: 8, 18: 8, 19: 8, 20: 8, 23: 4}
"""ONNX data type of levels → bits."""
CODECS = {17: E4M3, 18: E4M3, 19: E5M2, 20: E5M2, 23: E2M1}
"""ONNX data type of levels in floating point → the type; the UZ ones differ by a factor of the scale."""
SIGNED = {3, 5, 6, 22, 26, 17, 18, 19, 20, 23}
FEW = 4
"""Number of elements that a channel must have on average before its error is held against it."""
DEAD = 1e-3
"""Size relative to the largest channel below which a channel is left out."""


@dataclass(frozen=True)
class QuantizerGrid:
    """Numbers that a quantized input can be: ``scale`` × (level − ``zero``), levels from ``low`` to ``high``."""

    scale: Tensor
    """float64, one number, or [C] along ``axis``."""
    zero: Tensor
    low: int
    high: int
    axis: int
    codec: Codec | None = None
    """Floating-point type of the levels, which are then quotients by the scale; None: whole numbers."""

    @classmethod
    def symmetric(cls, amax: float) -> QuantizerGrid:
        """A grid with one scale for a whole tensor; ``amax`` is the largest magnitude that is not clipped."""
        return cls(torch.tensor(amax / LEVELS, dtype=torch.float64), torch.zeros(()), -LEVELS - 1, LEVELS, 0)

    @property
    def range(self) -> tuple[float, float]:
        """The smallest and the largest number of the grid; with several scales, those of the first."""
        scale = float(self.scale.flatten()[0])
        if self.codec is not None:
            return -self.codec.largest * scale, self.codec.largest * scale
        zero = float(self.zero.flatten()[0])
        return (self.low - zero) * scale, (self.high - zero) * scale

    @property
    def most(self) -> int:
        """Levels on one side of the middle; of FP8 and 4-bit floats the number that INT8 has."""
        return (self.high - self.low) // 2 if self.codec is None and self.high - self.low > LEVELS else LEVELS

    def fits(self, shape: Sequence[int]) -> bool:
        """Whether a tensor of this shape has one scale and one zero point, or one for each channel."""
        counts = {self.scale.numel(), self.zero.numel()} - {1}
        return not counts or (-len(shape) <= self.axis < len(shape) and counts == {shape[self.axis]})

    def levels(self, tensor: Tensor) -> Tensor:
        """Levels that the elements are rounded to before the range cuts them off.

        Shape and float dtype of ``tensor`` stay; levels are whole numbers.
        """
        quotients = tensor / self._along(self.scale, tensor)
        if self.codec is not None:
            return quotients
        return torch.round(quotients) + self._along(self.zero, tensor)

    def value(self, levels: Tensor) -> Tensor:
        """The number behind each level.

        Shape and float dtype of ``levels`` stay.
        """
        if self.codec is not None:
            return levels * self._along(self.scale, levels)
        return (levels - self._along(self.zero, levels)) * self._along(self.scale, levels)

    def kept(self, levels: Tensor) -> Tensor:
        """Levels that the type holds: cut off at its ends, and rounded where it is a floating-point one.

        Shape and float dtype of ``levels`` stay.
        """
        return levels.clamp(self.low, self.high) if self.codec is None else self.codec(levels)

    def quantized(self, tensor: Tensor) -> Tensor:
        """``tensor`` after Quantize and Dequantize.

        Shape and float dtype stay.
        """
        return self.value(self.kept(self.levels(tensor)))

    def holds(self, tensor: Tensor) -> bool:
        """Whether every element is a number of the grid, up to the rounding of FP32."""
        exact = tensor.double()
        return bool(torch.isclose(self.quantized(exact), exact, rtol=1e-6, atol=0).all())

    def clipped(self, tensor: Tensor) -> float:
        """The share of elements beyond the range.

        ``tensor`` has the channels along ``axis``, and a float dtype; the share is from 0 to 1.
        """
        levels = self.levels(tensor)
        if self.codec is not None:
            return float((levels.abs() > self.codec.largest).double().mean())
        return float(((levels < self.low) | (levels > self.high)).double().mean())

    def _along(self, parameter: Tensor, tensor: Tensor) -> Tensor:
        parameter = parameter.to(tensor.device)
        if parameter.numel() == 1:
            return parameter.reshape(())
        return parameter.reshape([-1 if d == self.axis % tensor.dim() else 1 for d in range(tensor.dim())])


@dataclass
class EmulatedSegment:
    """A segment in INT8 with the best scales, and what its real scales do to the same inputs."""

    results: Mapping[str, AnyTensor]
    clipped: float = 0.0
    """Share of the elements of a quantized input that lie beyond its scale; of several inputs the largest."""
    step: float | None = None
    """The scale of that input: the distance of two levels."""


def constant_grid(graph: Graph, constants: Weights, scale: str, zero: str, axis: int) -> QuantizerGrid | None:
    """The grid of a quantizer by the names of its scale and zero point (empty: none); None where one is computed."""
    if not constants.holds(scale) or (zero and not constants.holds(zero)):
        return None
    kind = constant_type(graph, zero) or 2 if zero else 2  # without a zero point levels are uint8, as ONNX has it
    bits = BITS.get(kind, 8)
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if kind in SIGNED else (0, 2**bits - 1)
    offset = _plain(constants[zero]) if zero else torch.zeros((), dtype=torch.uint8)
    return QuantizerGrid(constants[scale].double(), offset.double(), low, high, axis, CODECS.get(kind))


def _plain(values: AnyTensor) -> Tensor:
    """Zero points as torch can hold them: those of FP8 and 4 bits as float32."""
    array = np.asarray(values)
    return torch.as_tensor(
        array.astype(np.float32) if array.dtype.name.startswith(("float8", "float4", "int4", "uint4")) else array
    )


def all_values(executor: Executor, nodes: Sequence[Node], given: Mapping[str, AnyTensor]) -> dict[str, AnyTensor]:
    """``given``, name → tensor in any float dtype, and all that the nodes of a segment make of it."""
    return {**given, **executor.run_nodes(nodes, given, [name for node in nodes for name in node.outputs])}


def balanced(error: Tensor, exact: Tensor, axis: int) -> float:
    """The relative error of the worst quarter of the channels: root mean square over these of ‖error‖ ÷ ‖exact‖.

    Unlike the norm over all channels it sees small ones whose weights share the scale of large ones. 0 where channels
    have too few elements to tell (``FEW``), or none has any size. ``error`` and ``exact`` have one shape and any float
    dtype; norms are taken in float64.
    """
    if not exact.dim() or exact.numel() < FEW * exact.shape[axis]:
        return 0.0
    reduced = [d for d in range(exact.dim()) if d != axis]
    wrong, size = (torch.linalg.vector_norm(t.double(), dim=reduced) for t in (error, exact))
    alive = size > DEAD * size.max()
    relative = (wrong[alive] / size[alive]).sort(descending=True).values
    return float(relative[: -(-len(relative) // 4)].square().mean().sqrt()) if len(relative) else 0.0
