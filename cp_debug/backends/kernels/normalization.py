"""Normalizations."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from cp_debug.backends.kernels.registry import Call, kernel


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
