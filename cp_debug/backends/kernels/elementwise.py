"""Functions of single elements: arithmetic, comparison, logic, elementary functions; and activations, with softmax."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional

from cp_debug.backends.kernels.registry import Call, kernel


def _of_torch(*ops: str, prefix: str = "") -> dict[str, Callable[..., Tensor]]:
    """Operators that torch has by the same names, in its own spelling: ``BitwiseAnd`` is ``bitwise_and``."""
    return {op: getattr(torch, prefix + re.sub(r"(?<=[a-z])(?=[A-Z])", "_", op).lower()) for op in ops}


UNARY: dict[str, Callable[[Tensor], Tensor]] = {
    **_of_torch("Acos", "Acosh", "Asin", "Asinh", "Atan", "Atanh", "Cos", "Cosh", "Erf", "Exp", "Log", "Reciprocal"),
    **_of_torch("Sigmoid", "Sin", "Sinh", "Sqrt", "Tan", "Tanh"),
    "HardSwish": lambda x: x * (x / 6 + 0.5).clamp(0, 1),
    "Mish": functional.mish,
    "Softplus": lambda x: torch.logaddexp(x, torch.zeros_like(x)),
    "Softsign": functional.softsign,
}
_EXACT_UNARY: dict[str, Callable[[Tensor], Tensor]] = {
    **_of_torch("Abs", "BitwiseNot", "Ceil", "Floor", "Neg", "Relu", "Round", "Sign"),
    **_of_torch("Not", prefix="logical_"),
    "Identity": lambda x: x,
    "IsNaN": torch.isnan,
}
_BINARY = _of_torch("Add", "Mul", "Sub")
_EXACT_BINARY: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    **_of_torch("And", "Or", "Xor", prefix="logical_"),
    **_of_torch("BitwiseAnd", "BitwiseOr", "BitwiseXor", "Greater", "Less"),
    "Equal": torch.eq,
    "GreaterOrEqual": torch.ge,
    "LessOrEqual": torch.le,
}


@kernel(*UNARY)
def unary(call: Call, x: Tensor) -> Tensor:
    return UNARY[call.node.op](x)


@kernel(*_EXACT_UNARY, rounds=False)
def exact_unary(call: Call, x: Tensor) -> Tensor:
    return _EXACT_UNARY[call.node.op](x)


@kernel(*_BINARY)
def binary(call: Call, a: Tensor, b: Tensor) -> Tensor:
    return _BINARY[call.node.op](*_aligned(call, a, b))


@kernel(*_EXACT_BINARY, rounds=False)
def exact_binary(call: Call, a: Tensor, b: Tensor) -> Tensor:
    return _EXACT_BINARY[call.node.op](*_aligned(call, a, b))


@kernel("Div")
def div(call: Call, a: Tensor, b: Tensor) -> Tensor:
    a, b = _aligned(call, a, b)
    return torch.div(a, b) if a.is_floating_point() else torch.div(a, b, rounding_mode="trunc")


@kernel("Mod")
def mod(call: Call, a: Tensor, b: Tensor) -> Tensor:
    return torch.fmod(a, b) if call["fmod"] else torch.remainder(a, b)


@kernel("Pow")
def power(call: Call, base: Tensor, exponent: Tensor) -> Tensor:
    return torch.pow(base, exponent).to(base.dtype)


@kernel("Sum", "Mean")
def total(call: Call, *values: Tensor) -> Tensor:
    summed = functools.reduce(torch.add, values)
    return summed / len(values) if call.node.op == "Mean" else summed


@kernel("Max", "Min", rounds=False)
def extreme(call: Call, *values: Tensor) -> Tensor:
    return functools.reduce(torch.maximum if call.node.op == "Max" else torch.minimum, values)


@kernel("Where", rounds=False)
def where(call: Call, condition: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return torch.where(condition, a, b)


@kernel("Clip", rounds=False)
def clip(call: Call, x: Tensor, low: Tensor | None = None, high: Tensor | None = None) -> Tensor:
    for bound, name, choose in ((low, "min", torch.maximum), (high, "max", torch.minimum)):
        if bound is None and call[name] is not None:
            bound = x.new_tensor(call[name])
        if bound is not None:
            x = choose(x, bound)
    return x


@kernel("IsInf", rounds=False)
def is_inf(call: Call, x: Tensor) -> Tensor:
    positive = torch.isposinf(x) if call["detect_positive"] else torch.zeros_like(x, dtype=torch.bool)
    return positive | torch.isneginf(x) if call["detect_negative"] else positive


@kernel("Dropout", rounds=False)
def dropout(call: Call, x: Tensor, ratio: Tensor | None = None, training: Tensor | None = None) -> list[Tensor]:
    if training is not None and bool(training):
        return NotImplemented
    return [x, torch.ones_like(x, dtype=torch.bool)]


def _aligned(call: Call, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Both operands, the second lined up with an inner axis of the first where opset 6 and older ask for it."""
    if call.opset < 7 and call["broadcast"] and b.dim() and call["axis"] is not None:
        b = b.reshape(*b.shape, *(1,) * (a.dim() - call["axis"] % a.dim() - b.dim()))
    return a, b


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
