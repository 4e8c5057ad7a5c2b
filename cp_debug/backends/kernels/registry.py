"""The table of kernels: ONNX operators written in torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import onnx
import torch
from torch import Tensor

from cp_debug.backends.arithmetic import Arithmetic
from cp_debug.backends.scaling import COLUMNS, ROWS, Axes, Scaling
from cp_debug.graph.graph import Node

WITH_WEIGHTS = ("MatMul", "Gemm", "FusedMatMul", "FusedGemm")
"""Operators whose constant second operand weight-only quantizers take, by their names without a domain."""


@dataclass(frozen=True)
class Call:
    """A kernel's view of its node, besides the inputs. ``call["axis"]`` is an attribute, or the operator's default."""

    node: Node
    opset: int
    arithmetic: Arithmetic
    device: torch.device
    literal: bool = False
    """Whether to compute as ONNX's reference implementation where runtimes agree with each other and not with it."""
    weights: frozenset[int] = frozenset()
    """Places of inputs that are constants of the graph, or made of nothing else."""
    attributes: dict[str, Any] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        proto = self.node.proto
        if (schema := schema_of(proto, self.opset)) is not None:
            defaults = {name: a.default_value for name, a in schema.attributes.items()}
            self.attributes.update({name: _value(a) for name, a in defaults.items() if a.type})
        self.attributes.update({a.name: _value(a) for a in proto.attribute})

    def __getitem__(self, name: str) -> Any:
        return self.attributes.get(name)

    @property
    def scaling(self) -> Scaling | None:
        """Encoding of this node's operands; None where the arithmetic leaves them as they are, as weight-only INT4
        does with convolutions and with products of two results."""
        scaling = self.arithmetic.scaling
        if scaling is None or not scaling.weights_only:
            return scaling
        return scaling if 1 in self.weights and self.node.op in WITH_WEIGHTS else None

    def operands(self, *operands: Tensor, axes: Sequence[Axes] = (ROWS, COLUMNS)) -> tuple[Tensor, ...]:
        """Operands of a product as the multiplier reads them, shapes and dtypes as they are: rounded, or encoded and
        decoded where this node's are. ``axes``: what their scales follow."""
        if self.arithmetic.scaling and not self.scaling:
            return operands
        return self.arithmetic.operands(*operands, axes=axes)

    @property
    def outputs(self) -> int:
        """Number of outputs of the node; trailing unused ones are not counted."""
        return max((i for i, name in enumerate(self.node.proto.output, 1) if name), default=0)

    def ints(self, name: str, tensor: Tensor | None = None) -> list[int] | None:
        """A list of integers that older opsets give as an attribute and newer ones as an input."""
        if tensor is not None:
            return [int(v) for v in tensor.flatten().tolist()]
        given = self.attributes.get(name)
        return None if given is None else [int(v) for v in given]


OF_LEVELS = {
    **dict.fromkeys(("Add", "Mul"), "a a_scale a_zero? b b_scale b_zero? y_scale y_zero="),
    **dict.fromkeys(("AveragePool", "GlobalAveragePool"), "x x_scale x_zero? y_scale y_zero="),
    **dict.fromkeys(("LeakyRelu", "Sigmoid", "Softmax"), "x x_scale x_zero? y_scale y_zero="),
    "Concat": "y_scale y_zero *parts",
    "Where": "condition a a_scale a_zero b b_scale b_zero y_scale y_zero",
}
"""Operators that ONNX Runtime has for levels, too, as ``QLinear…`` → the names of their inputs there, with ``?`` where
one may be absent, ``=`` where it may be left out at the end."""
_EXTENDED = {"FusedConv": "Conv", "FusedGemm": "Gemm", "QGemm": "Gemm", **{f"QLinear{op}": op for op in OF_LEVELS}}
"""Operators of ONNX Runtime that have the attributes of one of ONNX's, and its defaults."""


def schema_of(proto: onnx.NodeProto, opset: int) -> onnx.defs.OpSchema | None:
    """The node's schema, with the defaults of its attributes; the newest one for opsets before an operator's first,
    which ONNX Runtime allows for some."""
    name, domain = proto.op_type, proto.domain
    if domain == "com.microsoft" and name in _EXTENDED:
        return onnx.defs.get_schema(_EXTENDED[name])
    if not onnx.defs.has(name, domain):
        return None
    try:
        return onnx.defs.get_schema(name, opset, domain)
    except onnx.defs.SchemaError:
        return onnx.defs.get_schema(name, domain)


def _value(attribute: onnx.AttributeProto) -> Any:
    value = onnx.helper.get_attribute_value(attribute)
    if isinstance(value, bytes):
        return value.decode(errors="replace")
    return [v.decode(errors="replace") for v in value] if attribute.type == attribute.STRINGS else value


Function = Callable[..., "Tensor | Sequence[Tensor]"]
F = TypeVar("F", bound=Function)


@dataclass(frozen=True)
class OperatorKernel:
    """A torch implementation of an operator: ``function(call, *inputs)``, absent optional inputs None.

    It never writes to its inputs, and returns one tensor, a sequence of tensors, or NotImplemented to leave the case
    to ONNX's reference implementation.
    """

    function: Function
    rounds: bool
    """The result is new arithmetic, to be rounded; False for operators that only choose among their inputs' values."""
    exact: bool
    """Weights are parameters (scales, sizes), read without rounding."""
    multiplies: bool
    """Whether it reads its operands as the multiplier does (``Arithmetic.operands``)."""


KERNELS: dict[str, OperatorKernel] = {}


def kernel(*ops: str, rounds: bool = True, exact: bool = False, multiplies: bool = False) -> Callable[[F], F]:
    """Register a function as the kernel of the named ONNX operators. Raises ValueError for one that has a kernel."""

    def register(function: F) -> F:
        if twice := KERNELS.keys() & ops:
            raise ValueError(f"two kernels of {', '.join(sorted(twice))}; the second is {function.__qualname__}")
        KERNELS.update(dict.fromkeys(ops, OperatorKernel(function, rounds, exact, multiplies)))
        return function

    return register
