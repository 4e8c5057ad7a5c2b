"""Shapes, ranges, fills and casts."""

from __future__ import annotations

import math

import torch
from onnx import TensorProto, numpy_helper
from torch import Tensor

from cp_debug.backends.kernels.registry import Call, kernel

DTYPES = {
    TensorProto.BFLOAT16: torch.bfloat16,
    TensorProto.BOOL: torch.bool,
    TensorProto.DOUBLE: torch.float64,
    TensorProto.FLOAT: torch.float32,
    TensorProto.FLOAT16: torch.float16,
    TensorProto.INT16: torch.int16,
    TensorProto.INT32: torch.int32,
    TensorProto.INT64: torch.int64,
    TensorProto.INT8: torch.int8,
    TensorProto.UINT8: torch.uint8,
}


@kernel("Shape", rounds=False)
def shape(call: Call, x: Tensor) -> Tensor:
    return torch.tensor(x.shape[call["start"] or 0 : call["end"]], dtype=torch.int64, device=call.device)


@kernel("Size", rounds=False)
def size(call: Call, x: Tensor) -> Tensor:
    return torch.tensor(x.numel(), dtype=torch.int64, device=call.device)


@kernel("Range", exact=True)
def range_(call: Call, start: Tensor, limit: Tensor, delta: Tensor) -> Tensor:
    count = max(0, math.ceil((limit.item() - start.item()) / delta.item()))
    return start + torch.arange(count, device=call.device).to(start.dtype) * delta


@kernel("ConstantOfShape")
def constant_of_shape(call: Call, sizes: Tensor) -> Tensor:
    fill = call["value"]
    if fill is None:
        return torch.zeros(sizes.tolist(), dtype=call.arithmetic.dtype, device=call.device)
    value = call.arithmetic.hold(numpy_helper.to_array(fill), call.device)
    # The value has one axis of length 1; no sizes make a number, without axes.
    return value.reshape(()).expand(sizes.tolist()) if isinstance(value, Tensor) else NotImplemented


@kernel("EyeLike", rounds=False)
def eye_like(call: Call, x: Tensor) -> Tensor:
    dtype = x.dtype if call["dtype"] is None else DTYPES.get(call["dtype"])
    if dtype is None:
        return NotImplemented
    rows, columns = (torch.arange(n, device=call.device) for n in x.shape)
    return (columns[None] - rows[:, None] == call["k"]).to(call.arithmetic.held(dtype))


@kernel("Cast")
def cast(call: Call, x: Tensor) -> Tensor:
    dtype = DTYPES.get(call["to"])
    if dtype is None:
        return NotImplemented
    held = call.arithmetic.held(dtype)
    return x.to(held) if dtype in (torch.float32, torch.float64) else x.to(dtype).to(held)


@kernel("CastLike")
def cast_like(call: Call, x: Tensor, like: Tensor) -> Tensor:
    return x.to(like.dtype)
