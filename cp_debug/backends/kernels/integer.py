"""Integer arithmetic of ONNX Runtime's quantized graphs: its QLinear operators and packed weights.

Formulas: ONNX's operator specification and ONNX Runtime's ``docs/ContribOperators.md`` (1.2x). Integers and their sums
are exact in every arithmetic: sums are formed in float64, which holds each of them. Scales are read as they are.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from cp_debug.backends.kernels.contrib import MS
from cp_debug.backends.kernels.matmul import matmul
from cp_debug.backends.kernels.paired_sums import lost_in_product
from cp_debug.backends.kernels.pooling import average_pool
from cp_debug.backends.kernels.quantization import dynamic_quantize_linear
from cp_debug.backends.kernels.registry import Call, kernel


def _real(x: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
    """Dequantized, by one scale and one zero point."""
    levels = x.to(scale.dtype)
    return (levels if zero is None else levels - zero.reshape(())) * scale.reshape(())


def _levels(x: Tensor, scale: Tensor, zero: Tensor | None, dtype: torch.dtype = torch.uint8) -> Tensor:
    dtype = dtype if zero is None else zero.dtype
    limits = torch.iinfo(dtype)
    levels = torch.round(x / scale.reshape(()))
    levels = levels if zero is None else levels + zero.reshape(())
    return levels.clamp(limits.min, limits.max).to(dtype)


def _shifted(x: Tensor, zero: Tensor | None, axis: int | None = None) -> Tensor:
    """x − zero point in float64, where sums of products of such integers are exact."""
    if zero is None:
        return x.double()
    if zero.numel() == 1:
        return x.double() - zero.reshape(()).double()
    if axis is None:
        return x.double() - zero.double()
    return x.double() - zero.double().reshape([-1 if i == axis % x.dim() else 1 for i in range(x.dim())])


@kernel(MS + "QLinearAdd", MS + "QLinearMul", rounds=False, exact=True)
def qlinear_binary(
    call: Call,
    a: Tensor,
    a_scale: Tensor,
    a_zero: Tensor | None,
    b: Tensor,
    b_scale: Tensor,
    b_zero: Tensor | None,
    y_scale: Tensor,
    y_zero: Tensor | None = None,
) -> Tensor:
    x, y = _real(a, a_scale, a_zero), _real(b, b_scale, b_zero)
    return _levels(x + y if call.node.op.endswith("Add") else x * y, y_scale, y_zero, a.dtype)


@kernel(MS + "QLinearSigmoid", MS + "QLinearLeakyRelu", MS + "QLinearSoftmax", rounds=False, exact=True)
def qlinear_activation(
    call: Call, x: Tensor, x_scale: Tensor, x_zero: Tensor | None, y_scale: Tensor, y_zero: Tensor | None = None
) -> Tensor:
    real = _real(x, x_scale, x_zero)
    if call.node.op.endswith("Softmax"):
        axis = -1 if call["axis"] is None else call["axis"]
        if (call["opset"] or 13) < 13:
            real = torch.softmax(real.flatten(axis % x.dim()), -1).reshape(x.shape)
        else:
            real = torch.softmax(real, axis)
    elif call.node.op.endswith("Sigmoid"):
        real = torch.sigmoid(real)
    else:
        real = functional.leaky_relu(real, 0.01 if call["alpha"] is None else call["alpha"])
    return _levels(real, y_scale, y_zero, x.dtype)


@kernel(MS + "QLinearGlobalAveragePool", MS + "QLinearAveragePool", rounds=False, exact=True)
def qlinear_average_pool(
    call: Call, x: Tensor, x_scale: Tensor, x_zero: Tensor | None, y_scale: Tensor, y_zero: Tensor | None = None
) -> Tensor:
    planes = x.movedim(-1, 1) if call["channels_last"] else x
    real = _real(planes, x_scale, x_zero)
    if call.node.op.endswith("GlobalAveragePool"):
        real = real.mean(list(range(2, real.dim())), keepdim=True)
    else:
        pooled = average_pool(call, real)
        assert isinstance(pooled, Tensor)
        real = pooled
    levels = _levels(real, y_scale, y_zero, x.dtype)
    return levels.movedim(1, -1) if call["channels_last"] else levels


@kernel(MS + "QLinearConcat", rounds=False, exact=True)
def qlinear_concat(call: Call, y_scale: Tensor, y_zero: Tensor, *parts: Tensor) -> Tensor:
    real = [_real(x, scale, zero) for x, scale, zero in zip(parts[::3], parts[1::3], parts[2::3], strict=True)]
    return _levels(torch.cat(real, call["axis"]), y_scale, y_zero)


@kernel(MS + "QLinearWhere", rounds=False, exact=True)
def qlinear_where(
    call: Call,
    condition: Tensor,
    a: Tensor,
    a_scale: Tensor,
    a_zero: Tensor,
    b: Tensor,
    b_scale: Tensor,
    b_zero: Tensor,
    y_scale: Tensor,
    y_zero: Tensor,
) -> Tensor:
    return _levels(torch.where(condition, _real(a, a_scale, a_zero), _real(b, b_scale, b_zero)), y_scale, y_zero)


@kernel(MS + "QGemm", rounds=False, exact=True)
def qgemm(
    call: Call,
    a: Tensor,
    a_scale: Tensor,
    a_zero: Tensor,
    b: Tensor,
    b_scale: Tensor,
    b_zero: Tensor,
    c: Tensor | None = None,
    y_scale: Tensor | None = None,
    y_zero: Tensor | None = None,
) -> Tensor:
    left, right = _shifted(a, a_zero), _shifted(b, b_zero, 0 if call["transB"] else 1)
    if call["transA"]:
        a, left = a.mT, left.mT
    if call["transB"]:
        b, right = b.mT, right.mT
    sums = (left @ right + lost_in_product(call, a, b)) * call["alpha"]
    result = (sums if c is None else sums + c.double()) * (a_scale.double() * b_scale.double())
    return result.to(a_scale.dtype) if y_scale is None else _levels(result, y_scale.double(), y_zero)


@kernel(MS + "MatMulIntegerToFloat", exact=True)
def matmul_integer_to_float(
    call: Call,
    a: Tensor,
    b: Tensor,
    a_scale: Tensor,
    b_scale: Tensor,
    a_zero: Tensor | None = None,
    b_zero: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    sums = torch.matmul(_shifted(a, a_zero), _shifted(b, b_zero)) + lost_in_product(call, a, b)
    result = (sums * (a_scale.double() * b_scale.double())).to(call.arithmetic.dtype)
    return result if bias is None else result + bias


@kernel(MS + "DynamicQuantizeMatMul", exact=True)
def dynamic_quantize_matmul(
    call: Call, a: Tensor, b: Tensor, b_scale: Tensor, b_zero: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:
    levels, scale, zero = dynamic_quantize_linear(call, a)
    result = matmul_integer_to_float(call, levels, b, scale, b_scale, zero, b_zero, bias)
    assert isinstance(result, Tensor)
    return result


@kernel(MS + "MatMulNBits", multiplies=True, exact=True)
def matmul_n_bits(
    call: Call,
    a: Tensor,
    b: Tensor,
    scales: Tensor,
    zeros: Tensor | None = None,
    order: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """A [.., K] times the transpose of a weight [N, K] of ``bits`` bits, packed [N, blocks, block · bits ÷ 8], low bits
    first; scales [N · blocks]; zero points, packed the same way or in floats, are 2^(bits − 1) when absent."""
    bits, rows, columns, block = (call[n] for n in ("bits", "N", "K", "block_size"))
    bits = 4 if bits is None else bits
    blocks = -(-columns // block)
    levels = _unpacked(b.reshape(rows, -1), bits)[:, : blocks * block].reshape(rows, blocks, block).to(scales.dtype)
    if zeros is None:
        zero = torch.full((rows, blocks), 2.0 ** (bits - 1), dtype=scales.dtype, device=a.device)
    elif zeros.is_floating_point():
        zero = zeros.reshape(rows, -1)[:, :blocks].to(scales.dtype)
    else:
        zero = _unpacked(zeros.reshape(rows, -1), bits)[:, :blocks].to(scales.dtype)
    scale = scales.reshape(rows, blocks)
    if order is not None:
        flat, which = levels.reshape(rows, -1)[:, :columns], order[:columns].long()
        weight = (flat - zero[:, which]) * scale[:, which]
    else:
        weight = ((levels - zero[..., None]) * scale[..., None]).reshape(rows, -1)[:, :columns]
    result = matmul(call, a, call.arithmetic.round(weight.to(a.dtype)).mT)
    assert isinstance(result, Tensor)
    return result if bias is None else result + bias


def _unpacked(x: Tensor, bits: int) -> Tensor:
    """uint8 [rows, bytes] → [rows, bytes · 8 ÷ bits], the lowest bits first."""
    shifts = torch.arange(0, 8, bits, device=x.device)
    return ((x.to(torch.int32)[..., None] >> shifts) & (2**bits - 1)).flatten(1)
