"""Activations with attributes, softmax included, and those that other operators name in theirs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional

from cp_debug.backends.kernels.elementwise import UNARY
from cp_debug.backends.kernels.registry import Call, kernel

Activation = Callable[[Tensor], Tensor]
_FUNCTIONS: dict[str, tuple[Callable[..., Tensor], dict[str, float]]] = {
    **{op: (UNARY[op], {}) for op in ("Sigmoid", "Softplus", "Softsign", "Tanh")},
    "Affine": (lambda x, alpha, beta: alpha * x + beta, {"alpha": 0.0, "beta": 0.0}),
    "Celu": (functional.celu, {"alpha": 1.0}),
    "Clip": (torch.clamp, {"min": -math.inf, "max": math.inf}),
    "Elu": (functional.elu, {"alpha": 1.0}),
    "HardSigmoid": (lambda x, alpha, beta: (alpha * x + beta).clamp(0, 1), {"alpha": 0.2, "beta": 0.5}),
    "LeakyRelu": (functional.leaky_relu, {"alpha": 0.01}),
    "Relu": (torch.relu, {}),
    "ScaledTanh": (lambda x, alpha, beta: alpha * torch.tanh(beta * x), {"alpha": 0.0, "beta": 0.0}),
    "Selu": (
        lambda x, alpha, gamma: torch.where(x > 0, x, alpha * torch.expm1(x)) * gamma,
        {"alpha": 1.6732632, "gamma": 1.050701},
    ),
    "Swish": (lambda x, alpha: x * torch.sigmoid(x * alpha), {"alpha": 1.0}),
    "ThresholdedRelu": (lambda x, alpha: torch.where(x > alpha, x, torch.zeros_like(x)), {"alpha": 0.0}),
}
"""Activation → the function, and its parameters where another operator names it and gives none."""
_NAMED = {name.lower(): found for name, found in _FUNCTIONS.items()}


def activation(name: str, *given: Iterator[float]) -> Activation:
    """The activation that an attribute calls ``name``. It takes the next number of the first of ``given`` for its first
    parameter, of the second for its second, if it has such. Raises KeyError for an unknown one."""
    function, parameters_by_name = _NAMED[name.lower()]
    defaults = (*parameters_by_name.values(),)
    numbers = [next(those, default) for those, default in zip(given, defaults, strict=False)]
    parameters = (*numbers, *defaults[len(numbers) :])
    return lambda x: function(x, *parameters)


@kernel("Celu", "Elu", "HardSigmoid", "LeakyRelu", "Selu", "Swish")
def with_parameters(call: Call, x: Tensor) -> Tensor:
    function, parameters = _FUNCTIONS[call.node.op]
    return function(x, *(call[name] for name in parameters))


kernel("ThresholdedRelu", rounds=False)(with_parameters)


@kernel("PRelu")
def prelu(call: Call, x: Tensor, slope: Tensor) -> Tensor:
    return torch.where(x < 0, x * slope, x)


@kernel("Gelu")
def gelu(call: Call, x: Tensor) -> Tensor:
    return functional.gelu(x, approximate=call["approximate"])


@kernel("Softmax", "LogSoftmax")
def softmax(call: Call, x: Tensor) -> Tensor:
    function = torch.softmax if call.node.op == "Softmax" else torch.log_softmax
    axis = call["axis"]
    if call.opset >= 13:
        return function(x, axis)
    # Before opset 13 everything from the axis on was one dimension.
    return function(x.flatten(axis % x.dim()), -1).reshape(x.shape)
