"""Grids that quantized files put numbers on: the kind of a grid, and what is on which between two values."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from cp_debug.backends.base import Tensor as AnyTensor
from cp_debug.backends.scaling import Codec
from cp_debug.bisect.quantized_segment import QuantizerGrid

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
