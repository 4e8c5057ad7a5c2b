"""Integer arithmetic: quantizers to 8 and 16 bits, ONNX's own integer operators, and those of ONNX Runtime's graphs.

QLinear operators and packed weights are ONNX Runtime's. Formulas: ONNX's operator specification and ONNX Runtime's
``docs/ContribOperators.md`` (1.2x). Integers and their sums are exact in every arithmetic: sums are formed in float64,
which holds each of them. Scales are read as they are. Types narrower than 8 bits and FP8 go to ONNX's reference.
"""

from __future__ import annotations

from dataclasses import replace
from inspect import Parameter, Signature

import torch
from onnx import TensorProto
from torch import Tensor

from cp_debug.backends.arithmetic import FP64
from cp_debug.backends.kernels.contrib import MS
from cp_debug.backends.kernels.paired_sums import lost_in_convolution, lost_in_product
from cp_debug.backends.kernels.products import conv, matmul
from cp_debug.backends.kernels.registry import KERNELS, OF_LEVELS, Call, Function, kernel


def _real(x: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
    """Dequantized, by one scale and one zero point."""
    levels = x.to(scale.dtype)
    return (levels if zero is None else levels - zero.reshape(())) * scale.reshape(())


def _levels(x: Tensor, scale: Tensor, zero: Tensor | None, dtype: torch.dtype = torch.uint8) -> Tensor:
    zero = zero if zero is None else zero.reshape(())
    return _requantized(x / scale.reshape(()), zero, dtype if zero is None else zero.dtype)


def _on_levels(call: Call, *inputs: Tensor | None) -> Tensor:
    """An operator of levels: its own kernel on the numbers that they stand for, whose result is put on levels again.

    Each operand stands in front of its scale and zero point; the result's stand behind all, those of Concat before.
    """
    op, read = call.node.op.removeprefix(f"{MS}QLinear"), list(inputs)
    if op == "Concat":
        read = [*read[2:], *read[:2]]
    plain = [read.pop(0)] if op == "Where" else []  # the condition
    count = len(read) // 3
    real = [_real(*read[3 * i : 3 * i + 3]) for i in range(count)]  # type: ignore[arg-type]
    scale, zero = [*read[3 * count :], None][:2]
    if call["channels_last"]:
        real = [x.movedim(-1, 1) for x in real]
    # An attribute tells which opset's Softmax is meant; the domain of the node has versions of its own.
    own = replace(call, node=replace(call.node, op=op), opset=call["opset"] or 13)
    result = KERNELS[op].function(own, *plain, *real)
    assert isinstance(result, Tensor)
    assert scale is not None
    levels = _levels(result, scale, zero, read[0].dtype)  # type: ignore[union-attr]
    return levels.movedim(1, -1) if call["channels_last"] else levels


def _named(inputs: str) -> Function:
    """``_on_levels`` with the names of inputs that ``OF_LEVELS`` has: messages tell which is absent."""

    def function(call: Call, *given: Tensor | None) -> Tensor:
        return _on_levels(call, *given)

    parameters = [Parameter("call", Parameter.POSITIONAL_OR_KEYWORD)]
    for name in inputs.split():
        kind = Parameter.VAR_POSITIONAL if name.startswith("*") else Parameter.POSITIONAL_OR_KEYWORD
        default, annotation = (
            None if name.endswith("=") else Parameter.empty,
            Tensor | None if name[-1] in "?=" else Tensor,
        )
        parameters.append(Parameter(name.strip("*?="), kind, default=default, annotation=annotation))
    function.__signature__ = Signature(parameters)  # type: ignore[attr-defined]
    return function


for _op, _inputs in OF_LEVELS.items():
    kernel(f"{MS}QLinear{_op}", rounds=False, exact=True)(_named(_inputs))


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
    left, right = centred(a, a_zero), centred(b, b_zero, 0 if call["transB"] else 1)
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
    sums = torch.matmul(centred(a, a_zero), centred(b, b_zero)) + lost_in_product(call, a, b)
    result = (sums * (a_scale.double() * b_scale.double())).to(call.arithmetic.dtype)
    return result if bias is None else result + bias


@kernel(MS + "DynamicQuantizeMatMul", exact=True)
def dynamic_quantize_matmul(
    call: Call, a: Tensor, b: Tensor, b_scale: Tensor, b_zero: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:
    levels, scale, zero = dynamic_quantize_linear(call, a)
    return matmul_integer_to_float(call, levels, b, scale, b_scale, zero, b_zero, bias)


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
    return result if bias is None else result + bias


def _unpacked(x: Tensor, bits: int) -> Tensor:
    """uint8 [rows, bytes] → [rows, bytes · 8 ÷ bits], the lowest bits first."""
    shifts = torch.arange(0, 8, bits, device=x.device)
    return ((x.to(torch.int32)[..., None] >> shifts) & (2**bits - 1)).flatten(1)


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
    return _requantized(quotient, None if zero_point is None else _along_axis(call, zero_point, x), dtype)


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
    return [_requantized(single / scale, zero, torch.uint8), scale.to(x.dtype), zero.to(torch.uint8)]


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
    return _requantized(quotients, y_zero.reshape(()), y_zero.dtype)


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
    return _requantized(quotients, y_zero.reshape(()), y_zero.dtype)


def centred(levels: Tensor, zero: Tensor | None, axis: int | None = None) -> Tensor:
    """Levels without their zero point, in their shape, in FP64: sums of products stay exact.

    The zero point is one for all, one an index of ``axis``, or without an axis broadcast as it is.
    """
    if zero is None:
        return levels.double()
    shape = [-1 if i == axis % levels.dim() else 1 for i in range(levels.dim())] if axis is not None else zero.shape
    return levels.double() - zero.double().reshape(shape if zero.numel() > 1 else ())


def _convolved(call: Call, x: Tensor, w: Tensor) -> Tensor:
    return conv(replace(call, arithmetic=FP64), x, w)


def _requantized(quotients: Tensor, zero: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Numbers divided by their scale, as levels of ``dtype`` in their shape; ``zero`` is shaped to meet them."""
    limits = torch.iinfo(dtype)
    levels = _rounded(quotients) if zero is None else _rounded(quotients) + zero
    return _stored(levels.clamp(limits.min, limits.max), dtype)
