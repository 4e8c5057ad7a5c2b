"""Rounding of FP32 values to the types that tensor cores read, element by element and exact."""

from __future__ import annotations

import torch
from torch import Tensor


def round_tf32(x: Tensor) -> Tensor:
    """Round a tensor to TF32 (8 exponent bits, 10 mantissa bits), to nearest, ties away from zero.

    This is PTX's ``cvt.rna.tf32``. NaN and Inf stay; a finite value at least half a step above the largest TF32 value
    becomes Inf. The dtype stays; float64 is rounded to float32 first. Integers are returned as they are.
    """
    if not x.is_floating_point():
        return x
    single = x.to(torch.float32)
    # Half a step is added to the magnitude and the 13 low bits are cut off; a carry walks into the exponent.
    rounded = single.view(torch.int32).add(0x1000).bitwise_and_(~0x1FFF).view(torch.float32)
    if single.sum().isnan():  # one reading pass; only NaN payloads do not survive the bit arithmetic
        rounded = torch.where(single.isnan(), single, rounded)
    return rounded.to(x.dtype)


def truncate_tf32(x: Tensor) -> Tensor:
    """Cut FP32 off after TF32's 10 mantissa bits. Integers are returned as they are; the dtype stays.

    Any shape. The mantissa's last 13 bits are set to 0.
    """
    if not x.is_floating_point():
        return x
    return x.to(torch.float32).view(torch.int32).bitwise_and(~0x1FFF).view(torch.float32).to(x.dtype)


def round_fp16(x: Tensor) -> Tensor:
    """Round to IEEE half precision, ties to even; beyond 65504 by half a step or more becomes Inf. The dtype stays.

    IEEE 754 binary16; any shape. Integers are returned as they are.
    """
    return x.to(torch.float16).to(x.dtype) if x.is_floating_point() else x


def round_bf16(x: Tensor) -> Tensor:
    """Round to bfloat16, ties to even. The dtype stays.

    The upper 16 bits of binary32; any shape. Integers are returned as they are.
    """
    return x.to(torch.bfloat16).to(x.dtype) if x.is_floating_point() else x
