"""Operators along axes: reductions, arg-max, top-k, cumulative sums, normalizations, Fourier transforms."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from cp_debug.backends.kernels.registry import Call, kernel


def _product(x: Tensor, axes: list[int]) -> Tensor:
    for axis in axes:
        x = x.prod(axis, keepdim=True, dtype=x.dtype)
    return x


def _sum(x: Tensor, axes: list[int]) -> Tensor:
    return x.sum(axes, keepdim=True, dtype=x.dtype)


def _mean(x: Tensor, axes: list[int]) -> Tensor:
    if x.is_floating_point():
        return x.mean(axes, keepdim=True)
    return x.to(torch.float64).mean(axes, keepdim=True).to(x.dtype)


def _extreme(x: Tensor, axes: list[int], *, largest: bool) -> Tensor:
    if x.dtype == torch.bool:
        return _extreme(x.byte(), axes, largest=largest).bool()
    if not x.numel():
        shape = [1 if i in axes else n for i, n in enumerate(x.shape)]
        if x.is_floating_point():
            return x.new_full(shape, float("-inf" if largest else "inf"))
        limits = torch.iinfo(x.dtype)
        return x.new_full(shape, limits.min if largest else limits.max)
    return (torch.amax if largest else torch.amin)(x, axes, keepdim=True)


def _log_sum_exp(x: Tensor, axes: list[int]) -> Tensor:
    if not x.is_floating_point():
        return NotImplemented
    return torch.logsumexp(x, axes, keepdim=True)


_REDUCTIONS: dict[str, Callable[[Tensor, list[int]], Tensor]] = {
    "ReduceL1": lambda x, axes: _sum(x.abs(), axes),
    "ReduceL2": lambda x, axes: _sum(x * x, axes).sqrt().to(x.dtype),
    "ReduceLogSum": lambda x, axes: _sum(x, axes).log().to(x.dtype),
    "ReduceLogSumExp": _log_sum_exp,
    "ReduceMax": lambda x, axes: _extreme(x, axes, largest=True),
    "ReduceMean": _mean,
    "ReduceMin": lambda x, axes: _extreme(x, axes, largest=False),
    "ReduceProd": _product,
    "ReduceSum": _sum,
    "ReduceSumSquare": lambda x, axes: _sum(x * x, axes),
}


@kernel(*_REDUCTIONS)
def reduce(call: Call, x: Tensor, axes: Tensor | None = None) -> Tensor:
    dims = call.ints("axes", axes) or []
    if not dims and call["noop_with_empty_axes"]:
        # Nothing is summed, but what a reduction does to each element remains: a size-1 axis to reduce shows it.
        reduced = _REDUCTIONS[call.node.op](x[None], [0])
        return reduced if reduced is NotImplemented else reduced[0]
    dims = sorted({d % max(x.dim(), 1) for d in dims}) or list(range(x.dim()))
    flat = x if x.dim() else x[None]
    reduced = _REDUCTIONS[call.node.op](flat, dims or [0])
    if reduced is NotImplemented:
        return reduced
    if not call["keepdims"] or not x.dim():
        return reduced.reshape([n for i, n in enumerate(x.shape) if i not in dims])
    return reduced


@kernel("ArgMax", "ArgMin", rounds=False)
def arg_extreme(call: Call, x: Tensor) -> Tensor:
    axis, keep = call["axis"], bool(call["keepdims"])
    choose = torch.argmax if call.node.op == "ArgMax" else torch.argmin
    if call["select_last_index"]:
        return x.shape[axis] - 1 - choose(x.flip(axis), axis, keepdim=keep)
    return choose(x, axis, keepdim=keep)


@kernel("TopK", rounds=False)
def top_k(call: Call, x: Tensor, k: Tensor | None = None) -> list[Tensor]:
    count = int(k) if k is not None else call["k"]
    descending = call["largest"] is None or bool(call["largest"])
    # A stable sort: equal values keep their order, which torch.topk does not promise.
    values, indices = torch.sort(x, dim=call["axis"], descending=descending, stable=True)
    return [values.narrow(call["axis"], 0, count), indices.narrow(call["axis"], 0, count)]


@kernel("CumSum", "CumProd")
def cumulative(call: Call, x: Tensor, axis: Tensor) -> Tensor:
    dim, (function, first) = int(axis), {"CumSum": (torch.cumsum, 0), "CumProd": (torch.cumprod, 1)}[call.node.op]
    totals = function(x.flip(dim) if call["reverse"] else x, dim, dtype=x.dtype)
    if call["exclusive"]:
        start = torch.full_like(totals.narrow(dim, 0, 1), first)
        totals = torch.cat([start, totals.narrow(dim, 0, x.shape[dim] - 1)], dim)
    return totals.flip(dim) if call["reverse"] else totals


@kernel("Hardmax", rounds=False)
def hardmax(call: Call, x: Tensor) -> Tensor:
    axis = call["axis"] % x.dim() if x.dim() else 0
    if call.opset < 13:  # all axes from this one on are one
        flat = x.reshape(math.prod(x.shape[:axis]), -1)
        return functional.one_hot(flat.argmax(1), flat.shape[1]).to(x.dtype).reshape(x.shape)
    return functional.one_hot(x.argmax(axis), x.shape[axis]).movedim(-1, axis).to(x.dtype)


@kernel("Det")
def determinant(call: Call, x: Tensor) -> Tensor:
    return torch.linalg.det(x)


# In FP16 the parameters stay FP32: TensorRT folds them into one scale and shift when it reads the file, ONNX Runtime's
# CUDA provider hands them to cuDNN in FP32 (onnxruntime/core/providers/cuda/nn/batch_norm.cc).
@kernel("BatchNormalization", exact=True)
def batch_normalization(call: Call, x: Tensor, scale: Tensor, bias: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    if call["training_mode"] or call.outputs > 1 or call["spatial"] == 0:
        return NotImplemented
    return functional.batch_norm(x, mean, variance, scale, bias, eps=call["epsilon"])


@kernel("InstanceNormalization")
def instance_normalization(call: Call, x: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    return functional.instance_norm(x, weight=scale, bias=bias, eps=call["epsilon"])


@kernel("GroupNormalization")
def group_normalization(call: Call, x: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    groups = call["num_groups"]
    if call.opset < 21:  # one scale a group; later one a channel
        scale, bias = (p.repeat_interleave(x.shape[1] // groups) for p in (scale, bias))
    return functional.group_norm(x, groups, scale, bias, call["epsilon"])


@kernel("LayerNormalization")
def layer_normalization(call: Call, x: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor | list[Tensor]:
    shape = x.shape[call["axis"] :]
    result = functional.layer_norm(x, shape, eps=call["epsilon"]) * scale
    result = result if bias is None else result + bias
    if call.outputs == 1:
        return result
    variance, mean = torch.var_mean(x, dim=list(range(-len(shape), 0)), correction=0, keepdim=True)
    return [result, mean, torch.rsqrt(variance + call["epsilon"])]


@kernel("RMSNormalization")
def rms_normalization(call: Call, x: Tensor, scale: Tensor) -> Tensor:
    return functional.rms_norm(x, x.shape[call["axis"] :], eps=call["epsilon"]) * scale


@kernel("LpNormalization")
def lp_normalization(call: Call, x: Tensor) -> Tensor:
    norm = torch.linalg.vector_norm(x, call["p"], dim=call["axis"], keepdim=True)
    return torch.where(norm == 0, 0, x / norm)


@kernel("LRN")
def local_response_normalization(call: Call, x: Tensor) -> Tensor:
    size = call["size"]
    before = (size - 1) // 2
    squares = functional.pad(x.square().flatten(2), (0, 0, before, size - 1 - before))
    total = squares.unfold(1, size, 1).sum(-1).reshape(x.shape)
    return x / (call["bias"] + call["alpha"] / size * total) ** call["beta"]


@kernel("MeanVarianceNormalization")
def mean_variance_normalization(call: Call, x: Tensor) -> Tensor:
    axes = [a % x.dim() for a in call["axes"]]
    variance, mean = torch.var_mean(x, axes, correction=0, keepdim=True)
    return (x - mean) / (variance.sqrt() + 1e-9)


@kernel("DFT")
def dft(call: Call, x: Tensor, length: Tensor | None = None, axis: Tensor | None = None) -> Tensor:
    """x [B, …, 1 or 2]: real, or real and imaginary parts, in the last axis."""
    dim = int(axis) if axis is not None else call["axis"] if call.opset < 20 else -2
    dim %= x.dim()
    inverse, onesided = bool(call["inverse"]), bool(call["onesided"])
    whole = 2 * (x.shape[dim] - 1) if inverse and onesided else x.shape[dim]
    return _transformed(x, int(length) if length is not None else whole, dim, inverse, onesided)


@kernel("STFT")
def stft(
    call: Call, signal: Tensor, step: Tensor, window: Tensor | None = None, length: Tensor | None = None
) -> Tensor:
    """signal [B, N] or [B, N, 1 or 2] → [B, frames, bins, 2]."""
    if signal.dim() == 2:
        signal = signal[..., None]
    size = int(length) if length is not None else signal.shape[1] if window is None else window.shape[0]
    frames = signal.unfold(1, size, int(step)).movedim(-1, 2)
    if window is not None:
        if window.shape[0] < size:
            return NotImplemented
        frames = call.arithmetic.round(frames * window[:size, None])
    return _transformed(frames, size, 2, False, bool(call["onesided"]))


def _transformed(x: Tensor, length: int, dim: int, inverse: bool, onesided: bool) -> Tensor:
    """``x`` is cut, or filled with zeros, to ``length`` along ``dim``; one-sided are bins up to N/2."""
    signal = torch.complex(x[..., 0], x[..., 1]) if x.shape[-1] == 2 else x[..., 0]
    if inverse and onesided:
        return torch.fft.irfft(signal, length, dim)[..., None]
    if inverse:
        return torch.view_as_real(torch.fft.ifft(signal, length, dim).resolve_conj())
    result = torch.fft.fft(signal, length, dim)
    if onesided:
        result = result.narrow(dim, 0, length // 2 + 1)
    return torch.view_as_real(result.resolve_conj())
