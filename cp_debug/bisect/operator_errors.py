"""Errors that an operator may make: those of correct FP32 implementations, by operator and by who implements it.

A result ``y`` is off by at most about ``u·√((absolute·s)² + (relative·|y|)²)``, root mean square over neighbouring
arguments, u = 2⁻²⁴ and ``s`` the size that the absolute part refers to. Correct rounding has ``relative`` 0.3 to 0.4
and no absolute part. Approximations whose authors bound the *absolute* error have one: ONNX Runtime's Sigmoid is a
rational function plus ½ (MLAS, ``logistic.cpp``), right to 1.5 u of 1 where it should give 1e-8.

The figures for elementary functions are measured: ``benchmarks/operator_errors.py`` compares ONNX Runtime, torch and
oneDNN with FP64 in each half octave of the argument, on a CPU and on CUDA; ``docs/data/operator_errors.json`` and
``docs/gpu/data/h200-operators.json`` hold what it found. A model is about the root mean square of the worst half octave
and at least a third of the largest error, since a flat map repeats one argument and its error.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

from cp_debug.backends.base import Backend
from cp_debug.backends.kernels import KERNELS
from cp_debug.graph.graph import Node

Size = Callable[[Node, Sequence[Tensor], Tensor], Tensor]
"""Size that an absolute error refers to, for every element, from a node, its inputs and its result."""


def _unit(node: Node, inputs: Sequence[Tensor], result: Tensor) -> Tensor:
    return torch.ones_like(result)


def _argument(node: Node, inputs: Sequence[Tensor], result: Tensor) -> Tensor:
    return inputs[0].abs().clamp(max=32.0)


def _below_zero(node: Node, inputs: Sequence[Tensor], result: Tensor) -> Tensor:
    return (inputs[0] < 0).to(result.dtype)


def _normalizer(node: Node, inputs: Sequence[Tensor], result: Tensor) -> Tensor:
    """1 + the logarithm of each row's sum, which is subtracted from the argument."""
    return 1 + (inputs[0] - result).abs().nan_to_num(0.0, 0.0, 0.0)


def _logarithm_of_sum(node: Node, inputs: Sequence[Tensor], result: Tensor) -> Tensor:
    """1 + |result| + ln K: the largest argument, added last, is at most so far from 0."""
    return 1 + result.abs() + math.log(max(inputs[0].numel() / max(result.numel(), 1), 1))


def _terms_of_batch_norm(node: Node, inputs: Sequence[Tensor], result: Tensor) -> Tensor:
    """|x·a| + |mean·a| + |bias| with a = scale ÷ √(variance + ε): x·a + (bias − mean·a) may cancel.

    In training mode mean and variance are those of the batch; of the running ones, the other outputs, the size is that
    of the sums over each channel.
    """
    x, scale, bias, mean, variance = inputs[:5]
    if bool(node.attribute("training_mode", 0)):
        channels = x.transpose(0, 1).flatten(1)
        if result.shape != x.shape:
            return result.abs() + channels.abs().mean(1) + channels.square().mean(1)
        mean, variance = channels.mean(1), channels.var(1, correction=0)
    epsilon = node.attribute("epsilon", 1e-5)
    along = [1, -1, *[1] * (x.dim() - 2)]
    factor = (scale / (variance + epsilon).sqrt()).abs()
    return x.abs() * factor.reshape(along) + (mean.abs() * factor + bias.abs()).reshape(along)


@dataclass(frozen=True)
class Errors:
    """Root mean square errors in FP32's unit roundoffs: of the result, and of the size ``of``."""

    relative: float
    absolute: float = 0.0
    of: Size = _unit

    def spread(self, node: Node, inputs: Sequence[Tensor], result: Tensor) -> Tensor:
        """The error of every element of ``result``, root mean square, in units of FP32's roundoff."""
        relative = self.relative * result.abs()
        if not self.absolute:
            return relative
        return torch.hypot(relative, self.absolute * self.of(node, inputs, result))


ROUNDED = Errors(0.5)
"""Errors of Add, Mul, Div, Sqrt …: rounded once or twice, correctly."""
EXACT = Errors(0.0)
"""Errors of operators that move data, choose or compare."""
APPROXIMATED = Errors(1.5)
"""Errors of elementary functions that nobody has measured: 3 to 4 units in the last place, as libraries promise."""

TORCH = {
    "Sigmoid": Errors(0.9),
    "Tanh": Errors(0.7),
    "Erf": Errors(0.6),
    "Exp": Errors(0.7),
    "Softplus": Errors(1.2),
    "Elu": Errors(0.6),
    "Selu": Errors(0.9),
    "Celu": Errors(0.6),
    "Gelu": Errors(1.0, 2.0, _argument),
    "Mish": Errors(1.4),
    "HardSwish": Errors(0.8, 0.4, _argument),
    "HardSigmoid": Errors(0.5, 0.5),
    "Softsign": Errors(0.9),
    "Sin": Errors(0.7),
    "Cos": Errors(0.6),
    "Tan": Errors(0.9),
    "Atan": Errors(0.7),
    "Sinh": Errors(0.8),
    "Cosh": Errors(0.8),
    "Asinh": Errors(0.8),
    "Log": Errors(0.6),
    "Asin": Errors(0.7),
    "Acos": Errors(0.7),
    "Atanh": Errors(0.9),
    "Acosh": Errors(0.9),
    "Sqrt": Errors(0.7),
    "Reciprocal": Errors(0.6),
    "Pow": Errors(0.8),
    "BatchNormalization": Errors(0.5, 0.5, _terms_of_batch_norm),
    "LogSoftmax": Errors(1.0, 1.0, _normalizer),
    "ReduceLogSumExp": Errors(1.0, 1.0, _logarithm_of_sum),
}
"""Errors measured with torch 2.13 on the CPU (SLEEF); oneDNN's are no larger, but for Sigmoid below 1e-19."""

ONNX_RUNTIME = TORCH | {
    "Sigmoid": Errors(0.9, 0.8),
    "Tanh": Errors(2.5),
    "Elu": Errors(0.6, 0.6, _below_zero),
    "Selu": Errors(0.9, 1.0, _below_zero),
    "Celu": Errors(0.6, 0.6, _below_zero),
    "Gelu": Errors(1.0, 1.0, _argument),
    "com.microsoft.Gelu": Errors(1.0, 1.0, _argument),
    "com.microsoft.BiasGelu": Errors(1.0, 1.0, _argument),
    "com.microsoft.FastGelu": Errors(1.0, 1.0, _argument),
    "com.microsoft.QuickGelu": Errors(1.0, 1.2, _argument),
    "Mish": Errors(1.5, 1.2, _argument),
    "HardSwish": Errors(1.0, 0.6, _argument),
    "Softplus": Errors(1.6),
    "Sin": Errors(1.2),
    "Cos": Errors(1.2),
    "Atan": Errors(1.8),
    "Log": Errors(1.4),
    "Asin": Errors(2.6),
    "Acos": Errors(2.6),
}
"""Errors measured with ONNX Runtime 1.31 on the CPU (MLAS, Eigen)."""


TORCH_CUDA = TORCH | {
    "Tanh": Errors(1.6),
    "Exp": Errors(0.9),
    "Elu": Errors(0.8),
    "Selu": Errors(1.1),
    "Celu": Errors(0.8),
    "Mish": Errors(1.6),
    "HardSwish": Errors(1.0, 0.6, _argument),
    "Cos": Errors(0.7),
    "Tan": Errors(1.1),
    "Atan": Errors(0.9),
    "Sinh": Errors(0.9),
    "Cosh": Errors(0.9),
    "Asin": Errors(0.9),
    "Acos": Errors(0.8),
    "Atanh": Errors(1.1),
}
"""Errors measured with torch 2.11 on CUDA 13."""

ONNX_RUNTIME_CUDA = TORCH_CUDA | {
    "Sigmoid": Errors(0.9, 0.8),
    "Softplus": Errors(1.2, 0.7),  # log(1 + exp(x)): what exp gives below 1e-8 is lost in the sum
    **{op: ONNX_RUNTIME[op] for op in ("Elu", "Selu", "Gelu", "Mish", "HardSwish")},
    **{op: errors for op, errors in ONNX_RUNTIME.items() if op.startswith("com.microsoft.")},
}
"""Errors measured with ONNX Runtime 1.31's CUDA provider; those of functions that it lacks are computed on the CPU."""


def _wider(a: Errors, b: Errors) -> Errors:
    return Errors(max(a.relative, b.relative), max(a.absolute, b.absolute), b.of if b.absolute else a.of)


BY_IMPLEMENTER = {
    "ort": ONNX_RUNTIME,
    "torch": TORCH,
    "ort@cuda": {op: _wider(ONNX_RUNTIME.get(op, ROUNDED), errors) for op, errors in ONNX_RUNTIME_CUDA.items()},
    "torch@cuda": TORCH_CUDA,
}
"""Library, and where it computes → operator → errors. What a GPU's provider lacks runs on the CPU."""
ANY = {
    op: reduce(_wider, (errors[op] for errors in BY_IMPLEMENTER.values() if op in errors))
    for op in dict.fromkeys(op for errors in BY_IMPLEMENTER.values() for op in errors)
}
"""Errors for implementations that nobody has measured: the widest of those that were, but for OpenVINO."""

BY_IMPLEMENTER["openvino"] = ANY | {
    "Erf": Errors(0.6, 3.2),
    "Exp": Errors(3.0),
    "Elu": Errors(0.8, 1.3, _below_zero),
    "Celu": Errors(0.8, 1.3, _below_zero),
    "Softplus": Errors(1.6, 2.4),
}
"""Where OpenVINO 2026.4's CPU plug-in is less exact than the others. Its Softplus is so above −6: below that, the error
grows to 1e-5 and is no rounding of any formula."""

_CORRECTLY_ROUNDED = {
    "Add", "Sub", "Mul", "Div", "Sum", "Mean", "Mod", "Neg", "Abs", "PRelu", "LeakyRelu", "Relu",
    "Clip", "Cast", "CastLike", "DequantizeLinear", "QuantizeLinear", "Range", "com.microsoft.FusedConv",
}  # fmt: skip


def implementer(backend: Backend) -> str:
    """Whoever computes the functions of a backend: a key of ``BY_IMPLEMENTER``, or the name of its family.

    ``emu-*`` computes with torch.
    """
    library = "torch" if backend.spec.family == "emu" else backend.spec.family
    return f"{library}@cuda" if backend.device.startswith("cuda") and library in BY_IMPLEMENTER else library


def errors_of(node: Node, by: str) -> Errors | None:
    """The errors of an elementwise operator as an ``implementer`` computes it.

    None for operators whose error depends on more than their own elements: sums, products, normalizations.
    """
    if measured := BY_IMPLEMENTER.get(by, ANY).get(node.op):
        return measured
    if node.op in _CORRECTLY_ROUNDED:
        return ROUNDED
    if node.op in KERNELS and not KERNELS[node.op].rounds:
        return EXACT
    return APPROXIMATED if node.op == "Swish" else None
