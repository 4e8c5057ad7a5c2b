"""Grids of quantized numbers: their kinds, what lies on one and what it cuts off; what a segment gives with the best.

Biases of 32 bits have steps of their own. Integer kernels add the bias to sums of products of levels, so that its scale
is the data's times the weights'. Where the data's is large, as for a value that was zero in calibration, the bias is
coarse, and nobody could choose better.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from onnx import TensorProto
from torch import Tensor

from cp_debug.backends.base import Tensor as AnyTensor
from cp_debug.backends.executor import Executor, Weights
from cp_debug.backends.scaling import E2M1, E4M3, E5M2, Codec
from cp_debug.graph.graph import Graph, Node
from cp_debug.graph.integer_values import constant_type, is_constant
from cp_debug.graph.operators import PRODUCTS
from cp_debug.graph.qdq import LEVELS

BITS = {2: 8, 3: 8, 4: 16, 5: 16, 21: 4, 22: 4, 25: 2, 26: 2, 6: 32, 17: 8, 18: 8, 19: 8, 20: 8, 23: 4}
"""ONNX data type of levels → bits."""
CODECS = {17: E4M3, 18: E4M3, 19: E5M2, 20: E5M2, 23: E2M1}
"""ONNX data type of levels in floating point → the type; the UZ ones differ by a factor of the scale."""
SIGNED = {3, 5, 6, 22, 26, 17, 18, 19, 20, 23}
FEW = 4
"""Number of elements that a channel must have on average before its error is held against it."""
FAR = 8
"""Part of a grid's levels by which another zero point must be off to be called wrong: calibration puts it nearer."""
NOTABLE = 0.01
"""Share of elements beyond a range from which it is no matter of a few outliers."""
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

    @property
    def has_middle(self) -> bool:
        """Whether as many levels lie on one side of 0 as on the other."""
        return self.codec is not None or abs(float(self.zero.flatten()[0]) - (self.low + self.high) / 2) <= 1

    def fitted(self, tensor: Tensor) -> QuantizerGrid:
        """The grid, with the one scale and zero point that the elements of ``tensor``, any shape, just need."""
        low, high = (min(float(tensor.min()), 0.0), max(float(tensor.max()), 0.0)) if tensor.numel() else (0.0, 0.0)
        low = low if self.range[0] else 0.0  # a grid that begins at 0 is a Relu, too
        if self.has_middle:
            return replace(self, scale=torch.tensor(max(-low, high) / self.most, dtype=torch.float64))
        scale = (high - low) / (self.high - self.low) or 1.0
        zero = torch.tensor(round(self.low - low / scale), dtype=torch.float64)
        return replace(self, scale=torch.tensor(scale, dtype=torch.float64), zero=zero)

    def moved(self, tensor: Tensor) -> QuantizerGrid | None:
        """The grid with the zero point by which its one scale holds all elements of ``tensor``, any shape.

        None where no zero point does, where the present one is near that or cuts off next to nothing, and for signed
        levels around 0, which are so by design.
        """
        by_design = self.codec is not None or (self.low < 0 and not bool(self.zero.any()))
        if by_design or self.scale.numel() > 1 or self.zero.numel() > 1 or self.clipped(tensor) < NOTABLE:
            return None
        step, low, high = float(self.scale), min(float(tensor.min()), 0.0), max(float(tensor.max()), 0.0)
        zero = torch.tensor(round(self.low - low / step), dtype=torch.float64)
        far = abs(float(zero - self.zero)) > (self.high - self.low) / FAR
        return replace(self, zero=zero) if far and high - low <= (self.high - self.low + 1) * step else None

    def equals(self, other: QuantizerGrid) -> bool:
        """Whether both have the same numbers."""
        return torch.equal(self.scale, other.scale) and torch.equal(self.zero, other.zero)

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


def level_type(graph: Graph, node: Node) -> int:
    """ONNX data type of the levels of a QuantizeLinear or DequantizeLinear."""
    levels, _, zero = [*node.proto.input, ""][:3]
    kind = constant_type(graph, zero) or (constant_type(graph, levels) if "Dequantize" in node.op else None)
    return kind or node.attribute("output_dtype", 0) or TensorProto.UINT8  # as ONNX has it without a zero point


def constant_grid(graph: Graph, constants: Weights, node: Node) -> QuantizerGrid | None:
    """The grid of a QuantizeLinear or DequantizeLinear; None where its scale or zero point is computed."""
    scale, zero = [*node.proto.input[1:], ""][:2]
    if not constants.holds(scale) or (zero and not constants.holds(zero)):
        return None
    kind = level_type(graph, node)
    bits = BITS.get(kind, 8)
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if kind in SIGNED else (0, 2**bits - 1)
    offset = constants.numbers(zero) if zero else None
    offset = torch.zeros((), dtype=torch.float64) if offset is None else offset.double()
    return QuantizerGrid(constants[scale].double(), offset, low, high, node.attribute("axis", 1), CODECS.get(kind))


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


Range = tuple[float, float]


@dataclass(frozen=True)
class Levels:
    """Kind of a grid for numbers: how many levels, whether zero is in the middle, one scale or one a channel."""

    bits: int = 8
    symmetric: bool = False
    channels: bool = False
    block: int = 0
    """Number of elements of the reduced axis that share a scale; 0: all."""
    block_axis: int | None = None
    """Axis that blocks lie along, where the file says it; None: the reduced one of a weight."""
    codec: Codec | None = None
    """Floating-point type of the levels; None: whole numbers."""
    order: Tensor | None = field(default=None, compare=False)
    """Place of each slice of the block axis in a sequence of whole blocks; None: blocks lie in order."""

    def applied(
        self,
        tensor: Tensor,
        axis: int | None,
        scale_margin: float = 1.0,
        least: Range = (0.0, 0.0),
        like: AnyTensor | None = None,
    ) -> Tensor:
        """``tensor`` with the best scales of this kind for it, ``scale_margin`` times as large.

        ``least`` is a range that they cover in any case, ``axis`` the channels'. ``like``: a tensor of any shape that
        one scale is the best for in place of ``tensor``, whose shape and dtype stay.
        """
        along = self.block_axis
        if along is None or not -tensor.dim() <= along < tensor.dim():
            along = -1 if axis == 0 or tensor.dim() > 2 else 0
        if self.block and (tensor.dim() > 1 or along == self.block_axis):
            rows = tensor.movedim(along, -1)
            order = None if self.order is None else self.order.to(rows.device)
            if order is not None and len(order) == rows.shape[-1]:
                size = int(order.max()) + 1
                padded = rows.new_zeros((*rows.shape[:-1], size + -size % self.block))
                padded[..., order] = rows
            else:
                order, padded = None, torch.nn.functional.pad(rows, (0, -rows.shape[-1] % self.block))
            blocks = padded.unflatten(-1, (-1, self.block))
            rounded = self._on(blocks, [-1], scale_margin, (0.0, 0.0), None).flatten(-2)
            kept = rounded[..., : rows.shape[-1]] if order is None else rounded[..., order]
            return kept.movedim(-1, along)
        reduced = [d for d in range(tensor.dim()) if d != axis] if self.channels and axis is not None else None
        return self._on(tensor, reduced, scale_margin, least, like if reduced is None else None)

    def _on(
        self, tensor: Tensor, reduced: list[int] | None, scale_margin: float, least: Range, like: AnyTensor | None
    ) -> Tensor:
        if not tensor.numel():
            return tensor
        like = tensor if like is None else torch.as_tensor(like).to(tensor)
        finite = torch.where(like.isfinite(), like, 0)  # Inf is cut off, NaN has no place on a grid
        ends = (finite.amin, finite.amax) if reduced != [] else ()
        low, high = (end(reduced or (), keepdim=bool(reduced)) for end in ends) if ends else (finite, finite)
        low, high = low.clamp(max=least[0]), high.clamp(min=least[1])
        if self.codec is not None:
            largest = torch.maximum(low.abs(), high.abs()) * scale_margin
            step = torch.where(largest > 0, largest / self.codec.largest, torch.ones_like(largest))
            return self.codec(tensor / step) * step
        if self.symmetric:
            high = torch.maximum(low.abs(), high.abs())
            low = -high
        low, high = low.clamp(max=0) * scale_margin, high.clamp(min=0) * scale_margin
        count = 2**self.bits - 1 - self.symmetric
        step = (high - low) / count
        step = torch.where(step > 0, step, torch.ones_like(step))
        zero = torch.zeros_like(step) if self.symmetric else torch.round(-low / step)
        bottom = -(count // 2) if self.symmetric else 0
        return (torch.round(tensor / step) + zero).clamp(bottom, bottom + count).sub(zero) * step


@dataclass(frozen=True)
class Scheme:
    """Quantization by the nodes between two of the parent's values. None: not at all."""

    data: Levels | None = None
    weights: Levels | None = None
    result: Levels | None = None
    grid: QuantizerGrid | None = None
    """Grid of the data, where its scale is constant."""
    bias_step: Tensor | None = None
    """Step of a bias of 32 bits, one number or one for each channel: the scale of the data times those of the weights,
    as every integer kernel has it, float64. None for a bias that is not rounded, or on another scale."""

    def __bool__(self) -> bool:
        return any((self.data, self.weights, self.result))


ON_SCALE = 0.01
"""Relative difference up to which the scale of a bias is that of data times weights."""


def bias_step(graph: Graph, constants: Weights, node: Node, *, rounds_floats: bool) -> Tensor | None:
    """The step of a product's bias, float64, one number or one for each channel: the data's scale times the weights'.

    None for a node that rounds no bias, and for one on another scale. ``rounds_floats``: the backend rounds biases that
    the file left in FP32, as ONNX Runtime's optimizer WeightBiasQuantization does.
    """
    step, stored = derived_step(graph, constants, node), stored_bias(graph, constants, node)
    if stored is None:
        bias = "".join(node.proto.input[2:3])
        return step if rounds_floats and is_constant(graph, bias) else None
    return step if step is not None and stored.on(step, ON_SCALE) else None


def derived_step(graph: Graph, constants: Weights, node: Node) -> Tensor | None:
    """The scale of a product's data times that of its weights, float64, one number or one a channel; else None."""
    makers = [graph.producer.get(name) for name in node.proto.input[:2]] if node.op in PRODUCTS else []
    scales = [maker.proto.input[1] for maker in makers if maker is not None and maker.op == "DequantizeLinear"]
    return _product(constants, *scales) if len(scales) == 2 else None


class StoredBias(NamedTuple):
    """A bias as a quantized file holds it: levels [channels] and their scale, one or one for each channel; float64."""

    levels: Tensor
    scale: Tensor

    def on(self, step: Tensor, rtol: float) -> bool:
        """Whether the scale is ``step``, float64, one number or one for each channel, up to a relative difference."""
        return step.numel() in (1, self.scale.numel()) and torch.allclose(self.scale, step, rtol=rtol, atol=0)


def stored_bias(graph: Graph, constants: Weights, node: Node) -> StoredBias | None:
    """The constant bias of a product of a quantized file, in levels; None where it has none or computes it."""
    made_by = graph.producer.get([*node.proto.input, *[""] * 3][2]) if node.op in PRODUCTS else None
    if made_by is None or made_by.op != "DequantizeLinear":
        return None
    levels, scale = made_by.proto.input[0], _product(constants, made_by.proto.input[1])
    if scale is None or not constants.holds(levels) or (numbers := constants.numbers(levels)) is None:
        return None
    return StoredBias(numbers.double().flatten(), scale)


def rounded_bias(executor: Executor, node: Node, values: Mapping[str, AnyTensor], step: Tensor) -> dict[str, Tensor]:
    """The constant bias of a product on whole steps, [channels], by its name.

    Empty without one, or where steps do not fit.
    """
    name = node.proto.input[2] if node.op in PRODUCTS and len(node.proto.input) > 2 else ""
    if not name or name in values or not is_constant(executor.graph, name):
        return {}
    bias = torch.as_tensor(executor.run_nodes([], values, [name])[name])
    if step.numel() not in (1, bias.shape[-1] if bias.dim() else 1):
        return {}
    return {name: ((bias.double() / step).round() * step).to(bias.dtype)}


def _product(constants: Weights, *scales: str) -> Tensor | None:
    """The product of constant scales, float64, one number or one for each channel; None where one is computed."""
    numbers = [constants.numbers(name) for name in scales if constants.holds(name)]
    known = [n.double().flatten() for n in numbers if n is not None]
    return math.prod(known[1:], start=known[0]) if len(known) == len(scales) else None
