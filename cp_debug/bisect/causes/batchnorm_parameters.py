"""Parameters of a BatchNormalization, what they make of a tensor, and where in a program they are found."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from cp_debug.backends.base import Program
from cp_debug.backends.executor import Weights
from cp_debug.graph.graph import Node
from cp_debug.programs.layers import layer_name
from cp_debug.programs.torch_layers import full_path, own_path

EPSILONS = (1e-3, 1e-5, 1e-6, 1e-12, 1e-8, 1e-4, 1e-2, 0.0)
"""Values of ε that are tried, the defaults of frameworks first."""


@dataclass(frozen=True)
class BatchNorm:
    """A BatchNormalization: parameters [C] in float64, and its epsilon."""

    weight: Tensor
    bias: Tensor
    mean: Tensor
    variance: Tensor
    eps: float

    @classmethod
    def of(cls, parameters: Sequence[Tensor | None], eps: float) -> BatchNorm | None:
        """The BatchNormalization with weight, bias, mean and variance, each [C]; None where one of them is missing."""
        present = [p.detach().double().cpu() for p in parameters if p is not None]
        return cls(present[0], present[1], present[2], present[3], eps) if len(present) == 4 else None

    @property
    def scale(self) -> Tensor:
        """[C] factor of each channel: weight ÷ √(variance + eps)."""
        return self.weight / torch.sqrt(self.variance + self.eps)

    def scale_of(self, weight: Tensor, *, transposed: bool) -> Tensor | None:
        """The factor of each output channel in a shape that meets the ``weight`` it is folded into: [C, …], or of a
        transposed convolution [inputs, C ÷ groups, …]. None for a weight of another size.
        """
        flat = [1] * (weight.dim() - 2)
        if not transposed:
            return self.scale.reshape(-1, 1, *flat) if weight.shape[0] == len(self.scale) else None
        inputs, outputs = weight.shape[:2]
        groups, rest = divmod(len(self.scale), outputs)
        if rest or inputs % groups:
            return None
        return (
            self.scale.reshape(groups, outputs).repeat_interleave(inputs // groups, 0).reshape(inputs, outputs, *flat)
        )

    def unfolded(self, weight: Tensor, bias: Tensor, *, transposed: bool) -> tuple[Tensor, Tensor] | None:
        """Weight (as in ``scale_of``) and bias [C] of a convolution before this was folded in; None where a channel is
        scaled by 0, or there are others."""
        scale = self.scale_of(weight, transposed=transposed)
        if scale is None or not bool((self.weight != 0).all()):
            return None
        return weight / scale, (bias - self.bias) / self.scale + self.mean

    def rounded(self, rounding: Callable[[Tensor], Tensor]) -> BatchNorm:
        """The BatchNormalization with every parameter rounded by itself.

        ``rounding`` is given each parameter, [C] float64, and keeps shape and dtype.
        """
        weight, bias, mean, variance = map(rounding, (self.weight, self.bias, self.mean, self.variance))
        return BatchNorm(weight, bias, mean, variance, self.eps)

    def applied(self, x: Tensor, along: Callable[[Tensor], Tensor]) -> Tensor:
        """The normalized ``x``; ``along`` shapes parameters to meet it."""
        return (x - along(self.mean)) * along(self.scale) + along(self.bias)


def batch_norms(program: Program, constants: Weights) -> dict[str, BatchNorm]:
    """Every BatchNormalization of a program by the name of its layer, in order: of the module where there is one.

    ``constants`` are the weights of the program's graph.
    """
    found: dict[str, BatchNorm] = {}
    if program.module is not None and program.alignment is not None:
        for path, module in program.module.named_modules():
            if isinstance(module, _BatchNorm) and (norm := _of_module(module)) is not None:
                found[full_path(program.alignment.prefix, path)] = norm
    for node in program.graph.nodes if not found else ():
        if node.op == "BatchNormalization" and (of_node := of_graph_node(node, constants)) is not None:
            found[layer_name(program, node.outputs[0])] = of_node
    return found


def of_graph_node(node: Node, constants: Weights) -> BatchNorm | None:
    """The BatchNormalization that a node of a graph computes; None where its parameters are no constants."""
    if not all(constants.holds(name) for name in node.proto.input[1:5]):
        return None
    eps = node.attribute("epsilon", 1e-5)
    return BatchNorm.of([torch.as_tensor(constants[name]) for name in node.proto.input[1:5]], eps)


def folded_batch_norm(program: Program, node: Node) -> BatchNorm | None:
    """The BatchNormalization of the module that was folded into a node's weights, which is the last module that the
    node computes; None where that is not known."""
    module = _submodule(program, _path(program, node))
    return _of_module(module) if isinstance(module, _BatchNorm) else None


def raw_layer(program: Program, node: Node) -> nn.Module | None:
    """The convolution or linear layer as it is in the module, before a BatchNorm was folded into it.

    None where that is not known.
    """
    alignment, path = program.alignment, _path(program, node)
    if alignment is None or not path:
        return None
    calls = [path, *(call for call, layer in alignment.absorbed.items() if layer == path)]
    layers = [_submodule(program, call) for call in calls]
    weighted = [layer for layer in layers if isinstance(getattr(layer, "weight", None), Tensor)]
    raw = [layer for layer in weighted if not isinstance(layer, _BatchNorm)]
    return raw[0] if len(raw) == 1 else None


def _path(program: Program, node: Node) -> str:
    links = program.alignment.links if program.alignment is not None else ()
    link = next((link for link in links if link.onnx == node.outputs[0]), None)
    return (link.path or "") if link is not None else ""


def _submodule(program: Program, path: str) -> nn.Module | None:
    if program.module is None or program.alignment is None or not path:
        return None
    try:
        return program.module.get_submodule(own_path(program.alignment.prefix, path))
    except AttributeError:
        return None


def _of_module(module: _BatchNorm) -> BatchNorm | None:
    mean, variance = module.running_mean, module.running_var
    if mean is None or variance is None:
        return None
    weight = torch.ones_like(mean) if module.weight is None else module.weight
    bias = torch.zeros_like(mean) if module.bias is None else module.bias
    return BatchNorm.of((weight, bias, mean, variance), module.eps)
