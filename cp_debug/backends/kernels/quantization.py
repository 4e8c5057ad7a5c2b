"""QuantizeLinear and DequantizeLinear to 8 and 16 bits; narrower and FP8 types go to ONNX's reference."""

from __future__ import annotations

import torch
from onnx import TensorProto
from torch import Tensor

from cp_debug.backends.kernels.registry import Call, kernel

_QUANTIZED = {TensorProto.INT8: torch.int8, TensorProto.UINT8: torch.uint8, TensorProto.INT16: torch.int16}


@kernel("QuantizeLinear", "com.microsoft.QuantizeLinear", rounds=False, exact=True)
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
    limits = torch.iinfo(dtype)
    levels = torch.round(x.to(scale.dtype) / _along_axis(call, scale, x))
    if zero_point is not None:
        levels = levels + _along_axis(call, zero_point, x)
    return levels.clamp(limits.min, limits.max).to(dtype)


@kernel("DequantizeLinear", "com.microsoft.DequantizeLinear", rounds=False, exact=True)
def dequantize_linear(call: Call, x: Tensor, scale: Tensor, zero_point: Tensor | None = None) -> Tensor:
    levels = x.to(scale.dtype)
    if zero_point is not None:
        levels = levels - _along_axis(call, zero_point, x)
    return levels * _along_axis(call, scale, x)


def _along_axis(call: Call, parameter: Tensor, x: Tensor) -> Tensor:
    """Scale or zero point, shaped to meet ``x``: one for all, one an index of the axis, or one a block of the axis."""
    if parameter.numel() == 1 and parameter.dim() <= 1:
        return parameter.reshape(())
    axis = (1 if call["axis"] is None else call["axis"]) % x.dim()
    if call["block_size"]:
        return parameter.repeat_interleave(call["block_size"], axis).narrow(axis, 0, x.shape[axis])
    return parameter.reshape(-1, *(1,) * (x.dim() - axis - 1))
