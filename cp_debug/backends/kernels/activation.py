"""Activations with attributes, softmax included, and those that other operators name in theirs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional

from cp_debug.backends.kernels.registry import Call, kernel

Activation = Callable[[Tensor], Tensor]
_NAMED: dict[str, tuple[Callable[..., Tensor], tuple[float, ...]]] = {
    "affine": (lambda x, alpha, beta: alpha * x + beta, (0.0, 0.0)),
    "clip": (torch.clamp, (-math.inf, math.inf)),
    "elu": (functional.elu, (1.0,)),
    "hardsigmoid": (lambda x, alpha, beta: (alpha * x + beta).clamp(0, 1), (0.2, 0.5)),
    "leakyrelu": (functional.leaky_relu, (0.01,)),
    "relu": (torch.relu, ()),
    "scaledtanh": (lambda x, alpha, beta: alpha * torch.tanh(beta * x), (0.0, 0.0)),
    "sigmoid": (torch.sigmoid, ()),
    "softplus": (lambda x: torch.logaddexp(x, torch.zeros_like(x)), ()),
    "softsign": (functional.softsign, ()),
    "tanh": (torch.tanh, ()),
    "thresholdedrelu": (lambda x, alpha: torch.where(x > alpha, x, torch.zeros_like(x)), (0.0,)),
}
"""Activation as an attribute names it, in small letters → the function, and its parameters by default."""


def activation(name: str, *given: Iterator[float]) -> Activation:
    """The activation that an attribute calls ``name``. It takes the next number of the first of ``given`` for its first
    parameter, of the second for its second, if it has such. Raises KeyError for an unknown one."""
    function, defaults = _NAMED[name.lower()]
    numbers = [next(those, default) for those, default in zip(given, defaults, strict=False)]
    parameters = (*numbers, *defaults[len(numbers) :])
    return lambda x: function(x, *parameters)


@kernel("LeakyRelu")
def leaky_relu(call: Call, x: Tensor) -> Tensor:
    return functional.leaky_relu(x, call["alpha"])


@kernel("PRelu")
def prelu(call: Call, x: Tensor, slope: Tensor) -> Tensor:
    return torch.where(x < 0, x * slope, x)


@kernel("ThresholdedRelu", rounds=False)
def thresholded_relu(call: Call, x: Tensor) -> Tensor:
    return torch.where(x > call["alpha"], x, torch.zeros_like(x))


@kernel("HardSigmoid")
def hard_sigmoid(call: Call, x: Tensor) -> Tensor:
    return (x * call["alpha"] + call["beta"]).clamp(0, 1)


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


@kernel("Softmax", "LogSoftmax")
def softmax(call: Call, x: Tensor) -> Tensor:
    function = torch.softmax if call.node.op == "Softmax" else torch.log_softmax
    axis = call["axis"]
    if call.opset >= 13:
        return function(x, axis)
    # Before opset 13 everything from the axis on was one dimension.
    return function(x.flatten(axis % x.dim()), -1).reshape(x.shape)
