"""QuantizeLinear and DequantizeLinear to 8 and 16 bits, and ONNX's own integer operators.

Narrower and FP8 types go to ONNX's reference. Products of levels without their zero points are summed exactly.
"""

from __future__ import annotations

import torch
from onnx import TensorProto
from torch import Tensor
from torch.nn import functional

from cp_debug.backends.kernels.paired_sums import lost_in_convolution, lost_in_product
from cp_debug.backends.kernels.registry import Call, kernel
from cp_debug.backends.kernels.windows import Window

_QUANTIZED = {TensorProto.INT8: torch.int8, TensorProto.UINT8: torch.uint8, TensorProto.INT16: torch.int16}


@kernel("QuantizeLinear", rounds=False, exact=True)
def quantize_linear(call: Call, x: Tensor, scale: Tensor, zero_point: Tensor | None = None) -> Tensor:
    dtype: torch.dtype | None
    if zero_point is not None:
        dtype = zero_point.dtype
    elif call["output_dtype"]:
        dtype = _QUANTIZED.get(call["output_dtype"])
    else:
        dtype = torch.uint8
    if dtype is None:
        return NotImplemented
    # In FP32 on the oracle, too: the runtimes divide so, and a quotient may only then be a tie.
    quotient = x.to(scale.dtype).float() / _along_axis(call, scale, x).float()
    return requantized(quotient, None if zero_point is None else _along_axis(call, zero_point, x), dtype)


@kernel("DequantizeLinear", rounds=False, exact=True)
def dequantize_linear(call: Call, x: Tensor, scale: Tensor, zero_point: Tensor | None = None) -> Tensor:
    levels = x.to(scale.dtype)
    if zero_point is not None:
        levels = levels - _along_axis(call, zero_point, x)
    return levels * _along_axis(call, scale, x)


def _rounded(x: Tensor) -> Tensor:
    """x rounded to whole numbers, ties to even; where a gradient is asked for, with the slope 1 (straight-through)."""
    return x + (torch.round(x) - x).detach() if x.requires_grad else torch.round(x)


def _stored(levels: Tensor, dtype: torch.dtype) -> Tensor:
    """Whole numbers in ``dtype``; as they are where a gradient is asked for, which integers do not pass on."""
    return levels if levels.requires_grad else levels.to(dtype)


def _along_axis(call: Call, parameter: Tensor, x: Tensor) -> Tensor:
    """Scale or zero point, shaped to meet ``x``: one for all, one an index of the axis, or one a block of the axis."""
    if parameter.numel() == 1 and parameter.dim() <= 1:
        return parameter.reshape(())
    axis = (1 if call["axis"] is None else call["axis"]) % x.dim()
    if call["block_size"]:
        return parameter.repeat_interleave(call["block_size"], axis).narrow(axis, 0, x.shape[axis])
    return parameter.reshape(-1, *(1,) * (x.dim() - axis - 1))


@kernel("DynamicQuantizeLinear", rounds=False)
def dynamic_quantize_linear(call: Call, x: Tensor) -> list[Tensor]:
    """ONNX's definition: a scale over the range of x, zero included, and levels in uint8; scale and zero in FP32."""
    single = x.float()
    low, high = single.min().clamp(max=0), single.max().clamp(min=0)
    scale = (high - low) / 255
    scale = torch.where(scale > 0, scale, 1.0)
    zero = torch.round(-low / scale).clamp(0, 255).detach()  # who reads levels takes it off again
    return [requantized(single / scale, zero, torch.uint8), scale.to(x.dtype), zero.to(torch.uint8)]


@kernel("MatMulInteger", rounds=False, exact=True)
def matmul_integer(
    call: Call, a: Tensor, b: Tensor, a_zero: Tensor | None = None, b_zero: Tensor | None = None
) -> Tensor:
    rows = -2 if a_zero is not None and a_zero.dim() == 1 else None
    sums = torch.matmul(centred(a, a_zero, rows), centred(b, b_zero))
    return _stored(sums + lost_in_product(call, a, b), torch.int32)


@kernel("ConvInteger", rounds=False, exact=True)
def conv_integer(
    call: Call, x: Tensor, w: Tensor, x_zero: Tensor | None = None, w_zero: Tensor | None = None
) -> Tensor:
    return _stored(_convolved(call, centred(x, x_zero), centred(w, w_zero, 0)), torch.int32)


@kernel("QLinearConv", rounds=False, exact=True)
def qlinear_conv(
    call: Call,
    x: Tensor,
    x_scale: Tensor,
    x_zero: Tensor,
    w: Tensor,
    w_scale: Tensor,
    w_zero: Tensor,
    y_scale: Tensor,
    y_zero: Tensor,
    bias: Tensor | None = None,
) -> Tensor:
    total = _convolved(call, centred(x, x_zero), centred(w, w_zero, 0)) + lost_in_convolution(call, x, w, x_zero)
    shape = [-1, *[1] * (x.dim() - 2)]
    if bias is not None:
        total = total + bias.double().reshape(1, *shape)
    factor = (x_scale.double() * w_scale.double() / y_scale.double()).reshape(-1)
    quotients = total * (factor.reshape(shape) if factor.numel() > 1 else factor)
    return requantized(quotients, y_zero.reshape(()), y_zero.dtype)


@kernel("QLinearMatMul", rounds=False, exact=True)
def qlinear_matmul(
    call: Call,
    a: Tensor,
    a_scale: Tensor,
    a_zero: Tensor,
    b: Tensor,
    b_scale: Tensor,
    b_zero: Tensor,
    y_scale: Tensor,
    y_zero: Tensor,
) -> Tensor:
    if a_scale.numel() > 1 or y_scale.numel() > 1:
        return NotImplemented
    total = torch.matmul(centred(a, a_zero), centred(b, b_zero)) + lost_in_product(call, a, b)
    quotients = total * (a_scale.double() * b_scale.double() / y_scale.double())
    return requantized(quotients, y_zero.reshape(()), y_zero.dtype)


def centred(levels: Tensor, zero: Tensor | None, axis: int | None = None) -> Tensor:
    """Levels without their zero point, in their shape, in FP64: sums of products stay exact.

    The zero point is one for all, one an index of ``axis``, or without an axis broadcast as it is.
    """
    if zero is None:
        return levels.double()
    shape = [-1 if i == axis % levels.dim() else 1 for i in range(levels.dim())] if axis is not None else zero.shape
    return levels.double() - zero.double().reshape(shape if zero.numel() > 1 else ())


def _convolved(call: Call, x: Tensor, w: Tensor) -> Tensor:
    window = Window.of(call, w.shape[2:], x.shape[2:])
    x = functional.pad(x, window.torch_pads())
    function = {1: functional.conv1d, 2: functional.conv2d, 3: functional.conv3d}[x.dim() - 2]
    return function(x, w, None, window.stride, 0, window.dilation, call["group"] or 1)


def requantized(quotients: Tensor, zero: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Numbers divided by their scale, as levels of ``dtype`` in their shape; ``zero`` is shaped to meet them."""
    limits = torch.iinfo(dtype)
    levels = _rounded(quotients) if zero is None else _rounded(quotients) + zero
    return _stored(levels.clamp(limits.min, limits.max), dtype)
