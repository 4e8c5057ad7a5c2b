"""Numbers of 4 and 8 bits with scales: how both operands of a product are encoded, and what is left of them.

Sources: OCP Microscaling Formats (MX) 1.0 (blocks of 32 with a scale in E8M0), NVIDIA's NVFP4 (blocks of 16 with a
scale in E4M3 and one FP32 scale for the tensor), DeepSeek-V3's report (arXiv 2412.19437: 1×128 data and 128×128 weights
in E4M3), ONNX Runtime's MatMulNBits (INT4 weights by group, symmetric or with a zero point).

Codecs are the types themselves (E4M3, E5M2, E2M1 and the scales E8M0), element by element, by OCP's 8-bit Floating
Point Specification (OFP8) 1.0 and MX. Rounding is to nearest, ties to even. Numbers beyond a type's range become its
largest finite one, as quantizers do it (``satfinite`` of PTX); what a plain cast does instead is ``Codec.overflow``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cp_debug.backends.narrow_options import NarrowOptions
from cp_debug.graph.graph import Node

MX_BLOCK = 32
NVFP4_BLOCK = 16
FP8_BLOCK = 128


@dataclass(frozen=True)
class Axes:
    """Axes of an operand that its scales follow. Negative ones count from the end."""

    reduced: int
    """The axis along which products are summed: blocks lie along it."""
    kept: int | None
    """The axis of rows or output channels, which may have a scale each; None: there is none, as in a convolution's
    data, where one output reads many places."""


ROWS, COLUMNS = Axes(-1, -2), Axes(-2, -1)
"""Operands of a matrix product."""
DATA, KERNEL, TRANSPOSED_KERNEL = Axes(1, None), Axes(1, 0), Axes(0, 1)
"""Operands of a convolution and of a transposed one."""


def axes_of(node: Node) -> tuple[Axes, Axes]:
    """Axes that the scales of a product's operands follow, as the node reads them."""
    if node.op in ("Conv", "ConvTranspose"):
        return DATA, KERNEL if node.op == "Conv" else TRANSPOSED_KERNEL
    return COLUMNS if node.attribute("transA") else ROWS, ROWS if node.attribute("transB") else COLUMNS


@dataclass
class Encoded:
    """An operand in codes and scales: ``codes · fine · coarse`` is what the multiplier knows of it."""

    codes: Tensor
    """Numbers that the element type holds, float32, in the operand's shape."""
    fine: Tensor | None
    """Scales of blocks, one for each element, float32 in the operand's shape; None where there are no blocks."""
    coarse: Tensor
    """Scales of the tensor or of its rows, float32, broadcast to the operand's shape; applied to sums."""

    def mapped(self, change: Callable[[Tensor], Tensor], scales: Callable[[Tensor], Tensor] | None = None) -> Encoded:
        """The operand with ``change`` made to its codes and ``scales`` (without it ``change``, too) to its scales, each
        in the operand's shape; what is one number for all elements stays."""
        scales = scales or change

        def changed(part: Tensor) -> Tensor:
            return scales(part.expand_as(self.codes)) if part.dim() else part

        return Encoded(change(self.codes), None if self.fine is None else changed(self.fine), changed(self.coarse))

    @property
    def multiplied(self) -> Tensor:
        """Codes with the scales of their blocks, in the operand's shape, float32."""
        return self.codes if self.fine is None else self.codes * self.fine

    @property
    def values(self) -> Tensor:
        """Decoded values, in the operand's shape, float32."""
        return self.multiplied * self.coarse


@dataclass(frozen=True)
class Scaling:
    """Encoding of the operands of a product."""

    options: NarrowOptions

    @property
    def codec(self) -> Codec | None:
        """The element type; None for INT4."""
        if self.options.family == "int4":
            return None
        return E2M1 if self.options.family in ("mxfp4", "nvfp4") else CODECS[self.options.element]

    @property
    def weights_only(self) -> bool:
        """Whether only constant second operands of MatMul and Gemm are encoded."""
        return self.options.family == "int4"

    @property
    def segment(self) -> int | None:
        """Products with common FP32 scales, whose sum is scaled before it is added; None: all of them."""
        return FP8_BLOCK if self.options.family == "fp8" and self.options.granularity == "block" else None

    def encode(self, x: Tensor, axes: Axes, place: int) -> Encoded:
        """``x`` of any shape as operand 0 (data) or 1 (weights) of a product; NaN and Inf make what they touch NaN.

        Data stays as it is where only weights are encoded.
        """
        single = x.float()
        if not x.numel() or (self.weights_only and place == 0):
            return Encoded(single, None, single.new_ones(()))
        family, granularity = self.options.family, self.options.granularity
        if family == "int4":
            levels, zero, fine = int4_levels(single, axes, self.options)
            return Encoded(levels - zero, fine, single.new_ones(()))
        codec = self.codec
        assert codec is not None
        if family == "nvfp4":
            return _nvfp4(single, axes)
        if family in ("mxfp8", "mxfp4"):
            fine = mx_scales(_amax(single, axes, MX_BLOCK), codec, up=self.options.scale_up)
            return Encoded(codec(single / fine), fine, single.new_ones(()))
        if granularity == "block":
            fine = _safe(_over(_amax(single, axes, FP8_BLOCK, FP8_BLOCK if place else 1), codec.largest))
            return Encoded(codec(single / fine), fine, single.new_ones(()))
        if granularity == "channel" and axes.kept is not None and x.dim() > 1:
            others = [d for d in range(x.dim()) if d != axes.kept % x.dim()]
            if place == 0 or (x.dim() > 2 and axes == COLUMNS):  # every row, every matrix of a batch
                others = [axes.reduced % x.dim()]
            amax = single.abs().amax(others, keepdim=True)
        else:
            amax = single.abs().amax()
        coarse = _safe(_over(amax, codec.largest))
        return Encoded(codec(single / coarse), None, coarse)

    @property
    def settings(self) -> dict[str, Any]:
        """Elements, scales and blocks in words, JSON-safe."""
        family, codec = self.options.family, self.codec
        blocks = {
            "fp8": {"tensor": "tensor", "channel": "row or output channel", "block": "1x128 and 128x128"},
            "nvfp4": f"{NVFP4_BLOCK} and tensor",
            "int4": f"{self.options.group}, weights only" + (", zero points" if self.options.asymmetric else ""),
        }.get(family, str(MX_BLOCK))
        return {
            "elements": codec.name if codec else "int4",
            "scaled_by": blocks[self.options.granularity] if isinstance(blocks, dict) else blocks,
            "scales": {"nvfp4": "e4m3 and fp32", "fp8": "fp32", "int4": "fp32"}.get(family, "e8m0"),
        }


@dataclass(frozen=True)
class FixedScaling(Scaling):
    """Encoding in FP8 where operands have a scale that was chosen before their values were known.

    Delayed scaling takes it from earlier steps, calibration from other data; a scale of 1 is a plain cast.
    """

    scales: tuple[float | None, float | None] = (1.0, None)
    """Scale of operand 0 (data) and of operand 1; None: the operand is encoded as ``options`` say."""
    saturates: bool = True
    """Whether what lies beyond the range becomes the largest number; else NaN in E4M3, Inf in E5M2."""

    def encode(self, x: Tensor, axes: Axes, place: int) -> Encoded:
        """``x`` of any shape as operand 0 (data) or 1 (weights) of a product; in NVFP4 the scale is the tensor's."""
        scale = self.scales[place]
        if scale is None or not x.numel():
            return super().encode(x, axes, place)
        single = x.float()
        if self.options.family == "nvfp4":
            return _nvfp4(single, axes, single.new_tensor(scale))
        return Encoded(self._codes(_over(single, scale)), None, single.new_tensor(scale))

    def decoded(self, x: Tensor) -> Tensor:
        """Values of data as its scale and its codes leave them; shape and dtype of ``x`` stay."""
        scale = self.scales[0] or 1.0
        return self._codes(_over(x, scale).float()).to(x.dtype) * scale

    @property
    def largest(self) -> float:
        """The largest number of the element type."""
        assert self.codec is not None
        return self.codec.largest

    def _codes(self, quotients: Tensor) -> Tensor:
        codec = self.codec
        assert codec is not None
        codes = codec(quotients)
        if self.saturates:
            return codes
        half_step = 2.0 ** (codec.exponent - codec.mantissa - 1)
        beyond = quotients.abs() > codec.largest + half_step
        return torch.where(beyond, quotients.sign() * (torch.nan if codec.overflow == "nan" else torch.inf), codes)

    @property
    def settings(self) -> dict[str, Any]:
        """Elements, scales and blocks in words, JSON-safe."""
        return super().settings | {"fixed_scales": list(self.scales), "saturates": self.saturates}


def mx_scales(amax: Tensor, codec: Codec, *, up: bool = False) -> Tensor:
    """Scales in E8M0 of blocks whose largest magnitudes are ``amax``, float32 of the same shape.

    2 to floor(log2(amax)) − emax (MX 1.0, section 6.3): elements between the largest number and the next power of two
    are cut off. ``up``: the smallest power of two that cuts nothing off. NaN where ``amax`` is not finite.
    """
    exponent = floor_log2(amax) - codec.exponent
    if up:
        exponent = exponent + (amax / e8m0(exponent) > codec.largest)
    return torch.where(torch.isfinite(amax), e8m0(exponent), torch.nan)


def _nvfp4(x: Tensor, axes: Axes, coarse: Tensor | None = None) -> Encoded:
    if coarse is None:
        coarse = _safe(_over(x.abs().amax(), E4M3.largest * E2M1.largest))
    fine = E4M3(_over(_amax(x, axes, NVFP4_BLOCK), E2M1.largest) / coarse)
    codes = E2M1(torch.where(fine > 0, x / (torch.where(fine > 0, fine, 1.0) * coarse), x * 0))
    return Encoded(codes, fine, coarse)


def int4_levels(x: Tensor, axes: Axes, options: NarrowOptions) -> tuple[Tensor, Tensor, Tensor]:
    """Levels, zero points and scales of a weight in INT4, one for each element, float32 in the shape of ``x``.

    With zero points, levels are 0 … 15; else -8 … 7 with 0 as zero point. A scale is below 0 where a group's largest
    magnitude is positive and has level -8, as ONNX Runtime's MLAS makes them for MatMulNBits; never with ``symmetric``.
    A group of zeros has the scale 0.
    """
    group = options.group
    if options.symmetric:
        scale = _over(_amax(x, axes, group), 7.0)
        return torch.round(x / torch.where(scale > 0, scale, 1.0)).clamp(-8, 7), torch.zeros_like(x), scale
    if not options.asymmetric:
        low, high = _blocks(x, axes, group, 1, torch.amin), _blocks(x, axes, group, 1, torch.amax)
        scale = torch.where(high > -low, high, low) / -8
        inverse = torch.where(scale != 0, 1 / scale, 0.0)
        return torch.floor(x * inverse + 8.5).clamp(0, 15) - 8, torch.zeros_like(x), scale
    low = _blocks(x, axes, group, 1, torch.amin).clamp(max=0)
    high = _blocks(x, axes, group, 1, torch.amax).clamp(min=0)
    scale = _over(high - low, 15.0)
    inverse = torch.where(scale != 0, 1 / scale, 0.0)
    zero = torch.where(scale != 0, torch.round(-low / scale), 0.0).clamp(0, 15)
    return torch.round(x * inverse + zero).clamp(0, 15), zero, scale


def _amax(x: Tensor, axes: Axes, block: int, wide: int = 1) -> Tensor:
    """Largest magnitude of the block of each element, in the shape of ``x``."""
    return _blocks(x.abs(), axes, block, wide, torch.amax)


def _blocks(x: Tensor, axes: Axes, block: int, wide: int, reduce: Callable[..., Tensor]) -> Tensor:
    """``reduce`` of the block of each element: ``block`` along the reduced axis, ``wide`` along the kept one. The last
    block may be shorter: what it lacks counts as its last value."""
    lengths = [(axes.reduced % x.dim(), block)]
    lengths += [(axes.kept % x.dim(), wide)] if axes.kept is not None and x.dim() > 1 and wide > 1 else []
    result = x
    for axis, length in lengths:
        size = result.shape[axis]
        moved = result.movedim(axis, -1)
        short = -size % length
        if short:
            moved = torch.cat([moved, moved[..., -1:].expand(*moved.shape[:-1], short)], -1)
        reduced = reduce(moved.unflatten(-1, (-1, length)), -1, keepdim=True)
        spread = reduced.expand(*reduced.shape[:-1], length).flatten(-2)[..., :size]
        result = spread.movedim(-1, axis)
    return result


def _over(x: Tensor, number: float) -> Tensor:
    """``x`` divided by a number; torch multiplies by its rounded inverse on a GPU where it is no tensor."""
    return x / x.new_tensor(number)


def _safe(scale: Tensor) -> Tensor:
    """Scales to divide by: 1 where all values are 0, and where a scale is too small for FP32."""
    return torch.where(scale > 0, scale, torch.where(scale.isnan(), scale, 1.0))


@dataclass(frozen=True)
class Codec:
    """A type of 4 or 8 bits: what it can hold, and how FP32 is rounded to it."""

    name: str
    largest: float
    """The largest finite number."""
    tiniest: float
    """The smallest normal number."""
    exponent: int
    """Exponent of the largest power of two: ``emax`` in the MX specification."""
    mantissa: int
    """Explicit mantissa bits."""
    overflow: str
    """Result of a conversion without saturation by OFP8 and MX: ``nan`` in E4M3, which has no Inf, ``inf`` in E5M2,
    ``largest`` in E2M1. (torch's cast to E4M3 saturates on some devices and versions.)"""
    nearest: Callable[[Tensor], Tensor]
    """Rounding of float32 within the range; any shape, the dtype stays."""

    def __call__(self, x: Tensor) -> Tensor:
        """``x`` rounded to the type, saturating; any shape, the dtype stays. NaN stays NaN, also in E2M1, which has
        none: so it is not lost."""
        single = x.to(torch.float32).clamp(-self.largest, self.largest)
        return self.nearest(single).to(x.dtype)


def _through(dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    return lambda x: x.to(dtype).to(x.dtype)


def _e2m1(x: Tensor) -> Tensor:
    """Float32 of any shape rounded to 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives; beyond 6 nothing is cut off."""
    step = torch.exp2((torch.frexp(x).exponent - 2).clamp(min=-1).to(x.dtype))
    return torch.round(x / step) * step


E4M3 = Codec("e4m3", 448.0, 2.0**-6, 8, 3, "nan", _through(torch.float8_e4m3fn))
E5M2 = Codec("e5m2", 57344.0, 2.0**-14, 15, 2, "inf", _through(torch.float8_e5m2))
E2M1 = Codec("e2m1", 6.0, 1.0, 2, 1, "largest", _e2m1)
CODECS = {codec.name: codec for codec in (E4M3, E5M2, E2M1)}


def e8m0(exponent: Tensor) -> Tensor:
    """Powers of two that E8M0 holds, float32: 2 to ``exponent`` (integers, any shape), kept within −127 … 127.

    NaN, E8M0's only other value, is left to the caller.
    """
    # ldexp in two steps: torch computes 2**-127 as a power first, which is subnormal.
    kept = exponent.clamp(-127, 127)
    half = torch.div(kept, 2, rounding_mode="floor")
    return torch.exp2(half.to(torch.float32)) * torch.exp2((kept - half).to(torch.float32))


def floor_log2(x: Tensor) -> Tensor:
    """Exponents of positive float32 numbers, int32 of the same shape: the largest powers of two not above them.

    0 has −150, below every subnormal.
    """
    mantissa, exponent = torch.frexp(x)
    return torch.where(mantissa == 0, torch.full_like(exponent, -150), exponent - 1)
