"""Activations, softmax included."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from cp_debug.backends.kernels.registry import Call, kernel


@kernel("Relu", rounds=False)
def relu(call: Call, x: Tensor) -> Tensor:
    return torch.relu(x)


@kernel("LeakyRelu")
def leaky_relu(call: Call, x: Tensor) -> Tensor:
    return functional.leaky_relu(x, call["alpha"])


@kernel("PRelu")
def prelu(call: Call, x: Tensor, slope: Tensor) -> Tensor:
    return torch.where(x < 0, x * slope, x)


@kernel("ThresholdedRelu", rounds=False)
def thresholded_relu(call: Call, x: Tensor) -> Tensor:
    return torch.where(x > call["alpha"], x, torch.zeros_like(x))


@kernel("Sigmoid")
def sigmoid(call: Call, x: Tensor) -> Tensor:
    return torch.sigmoid(x)


@kernel("HardSigmoid")
def hard_sigmoid(call: Call, x: Tensor) -> Tensor:
    return (x * call["alpha"] + call["beta"]).clamp(0, 1)


@kernel("HardSwish")
def hard_swish(call: Call, x: Tensor) -> Tensor:
    return x * (x / 6 + 0.5).clamp(0, 1)


@kernel("Swish")
def swish(call: Call, x: Tensor) -> Tensor:
    return x * torch.sigmoid(x * call["alpha"])


@kernel("Gelu")
def gelu(call: Call, x: Tensor) -> Tensor:
    return functional.gelu(x, approximate=call["approximate"])


@kernel("Elu")
def elu(call: Call, x: Tensor) -> Tensor:
    return functional.elu(x, call["alpha"])


@kernel("Celu")
def celu(call: Call, x: Tensor) -> Tensor:
    return functional.celu(x, call["alpha"])


@kernel("Selu")
def selu(call: Call, x: Tensor) -> Tensor:
    return torch.where(x > 0, x, call["alpha"] * torch.expm1(x)) * call["gamma"]


@kernel("Softplus")
def softplus(call: Call, x: Tensor) -> Tensor:
    return torch.logaddexp(x, torch.zeros_like(x))


@kernel("Softsign")
def softsign(call: Call, x: Tensor) -> Tensor:
    return functional.softsign(x)


@kernel("Mish")
def mish(call: Call, x: Tensor) -> Tensor:
    return functional.mish(x)


@kernel("Softmax", "LogSoftmax")
def softmax(call: Call, x: Tensor) -> Tensor:
    function = torch.softmax if call.node.op == "Softmax" else torch.log_softmax
    axis = call["axis"]
    if call.opset >= 13:
        return function(x, axis)
    # Before opset 13 everything from the axis on was one dimension.
    return function(x.flatten(axis % x.dim()), -1).reshape(x.shape)
