"""Fold BatchNorm into the layer before it: in a module, where data flow finds it, and in a file, as engines do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from onnx import numpy_helper
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_weights

from cp_debug.errors import InputError
from cp_debug.graph.graph import Graph, Node
from cp_debug.graph.surgery import save
from cp_debug.probes.module_state import copied
from cp_debug.probes.trace import trace, unwatched
from cp_debug.programs.torch_layers import Transposed, WeightedLayer, channels, is_quantized

_SAME_ELEMENTS = {"permute", "transpose", "t", "clone", "view", "_unsafe_view", "unsqueeze", "squeeze", "alias"}
"""ATen's operations that only put elements elsewhere."""


@dataclass(frozen=True)
class Folding:
    """Record of what was folded into what, by module paths, and why other BatchNorms were not."""

    pairs: Sequence[tuple[str, str]]
    """Pairs of a convolution or linear layer and its BatchNorm, by module path."""
    notes: Sequence[str] = ()


def fuse_model_bn(module: nn.Module, example_args: tuple[Tensor, ...]) -> nn.Module:
    """A copy in eval mode with every BatchNorm folded that alone reads the output of a convolution or linear layer.

    The two are found by running the copy once on ``example_args``; between them may lie what only moves elements, such
    as PFN's permute. A folded BatchNorm becomes an Identity, so module paths stay. ``folding`` on the copy says what
    was done. ``example_args`` are positional arguments, of any shape and dtype that the module takes.
    Raises InputError for a module that is quantized, ModuleFailed when it raises in forward.
    """
    folded = copied(module).eval()
    apply_folding(folded, find_folding(folded, example_args))
    return folded


def find_folding(module: nn.Module, example_args: tuple[Tensor, ...]) -> Folding:
    """The pairs of a module in eval mode that can be folded, told from one forward on ``example_args``.

    ``example_args`` are positional arguments, of any shape and dtype that the module takes.
    Raises ModuleFailed when the module raises in forward.
    """
    flow = _Flow(module, example_args)
    pairs, notes = [], []
    for path, norm in module.named_modules():
        if isinstance(norm, _BatchNorm):
            layer, why = flow.layer_before(path, norm)
            if layer is None:
                notes.append(f"{path}: not folded, {why}")
            else:
                pairs.append((layer, path))
    return Folding(pairs, notes)


def apply_folding(module: nn.Module, folding: Folding) -> None:
    """Fold these pairs of ``module``, in place. Raises InputError when the module does not have them."""
    if is_quantized(module):
        raise InputError(f"{type(module).__name__} is quantized already; BatchNorm is folded before that")
    for layer_path, norm_path in folding.pairs:
        try:
            layer, norm = module.get_submodule(layer_path), module.get_submodule(norm_path)
        except AttributeError as error:
            raise InputError(f"{type(module).__name__} has no {layer_path} with {norm_path} after it") from error
        if not (
            isinstance(layer, WeightedLayer) and isinstance(norm, _BatchNorm) and channels(layer) == norm.num_features
        ):
            raise InputError(f"{norm_path} is not a BatchNorm with as many channels as {layer_path} has")
        _fold(layer, norm)
        parent, _, name = norm_path.rpartition(".")
        setattr(module.get_submodule(parent), name, nn.Identity())
    module.folding = folding  # type: ignore[assignment]


def _fold(layer: WeightedLayer, norm: _BatchNorm) -> None:
    """Fold a BatchNorm into a layer in FP64, so that folding adds one rounding.

    The formula is torch's ``fuse_conv_bn_weights``, that of convolutions for linear layers, too.
    """
    assert norm.running_mean is not None
    assert norm.running_var is not None
    bias, scale, shift = (None if t is None else t.detach().double() for t in (layer.bias, norm.weight, norm.bias))
    weight, mean, var = (t.detach().double() for t in (layer.weight, norm.running_mean, norm.running_var))
    transposed = isinstance(layer, Transposed)
    folded = fuse_conv_bn_weights(weight, bias, mean, var, norm.eps, scale, shift, transposed)
    dtype, trained = layer.weight.dtype, layer.weight.requires_grad
    layer.weight, layer.bias = (nn.Parameter(tensor.detach().to(dtype), trained) for tensor in folded)


class _Flow:
    """Data flow of one forward, and the range of every channel before and behind a BatchNorm."""

    def __init__(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        self._modules = dict(module.named_modules())
        self._ranges: dict[str, Tensor] = {}
        handles = []
        for path, part in self._modules.items():
            if isinstance(part, WeightedLayer):
                axis = -1 if isinstance(part, nn.Linear) else 1
                handles.append(nn.Module.register_forward_hook(part, self._keep(path, axis)))
            elif isinstance(part, _BatchNorm):
                handles.append(nn.Module.register_forward_hook(part, self._keep(path, 1, of_input=True)))
        try:
            record = trace(module, {str(i): arg for i, arg in enumerate(args)}, lambda value, tensor: None)
        finally:
            for handle in handles:
                handle.remove()
        self._record, self._outputs = record, set(record.outputs)
        self._maker = {v: call for call, values in record.leaves.items() for v in values if v.call == call}
        self._readers = record.readers()

    def layer_before(self, path: str, norm: _BatchNorm) -> tuple[str | None, str]:
        """Path of the layer that ``norm`` can be folded into, or None and the reason why there is none."""
        if path not in self._record.leaves:
            return None, "it did not run"
        if f"{path}@2" in self._record.leaves:
            return None, "it runs more than once"
        if norm.running_mean is None:
            return None, "it has no running statistics"
        (value,) = self._record.leaves[path]
        while value not in self._maker or value.call == path:
            if len(value.inputs) != 1 or (value.call != path and value.op not in _SAME_ELEMENTS):
                return None, f"it reads {value.name}, which is not the output of a layer"
            reader, (value,) = value, value.inputs
            # BatchNorm itself is one operation of several results, or several operations.
            if value in self._outputs or any(r is not reader and r.call != path for r in self._readers[value]):
                return None, f"something else reads {value.name} too"
        layer_call = self._maker[value]
        layer = self._modules.get(layer_call)
        if layer is None:
            return None, f"{layer_call.partition('@')[0]} runs more than once"
        if not isinstance(layer, WeightedLayer):
            return None, f"it reads {layer_call}, a {type(layer).__name__}"
        if f"{layer_call}@2" in self._record.leaves:
            return None, f"{layer_call} runs more than once"
        if isinstance(layer, Transposed) and layer.groups > 1:
            return None, f"{layer_call} is a transposed convolution in groups"
        before, behind = self._ranges[layer_call], self._ranges[path]
        if before.shape != behind.shape or not torch.equal(before, behind):
            return None, f"the channels of {layer_call} do not lie on its channel axis"
        return layer_call, ""

    def _keep(self, path: str, axis: int, *, of_input: bool = False) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            with unwatched():
                flat = (args[0] if of_input else output).movedim(axis, 0).flatten(1)
                self._ranges[path] = torch.stack(torch.aminmax(flat, dim=1))

        return hook


def _foldable(graph: Graph) -> list[tuple[Node, Node]]:
    """Each Conv or ConvTranspose with the BatchNormalization that alone reads it; all their constants are weights."""
    pairs = []
    for norm in (node for node in graph.nodes if node.op == "BatchNormalization" and len(node.outputs) == 1):
        product = graph.producer.get(norm.inputs[0])
        if product is None or product.op not in ("Conv", "ConvTranspose") or len(graph.consumers[norm.inputs[0]]) > 1:
            continue
        groups = product.attribute("group", 1)
        constants = (*norm.proto.input[1:5], *product.proto.input[1:])
        single = all(len(graph.consumers[name]) == 1 for name in product.proto.input[1:])
        is_output = any(v.name == norm.inputs[0] for v in graph.outputs)
        plain = all(name in graph.initializers for name in constants) and (product.op == "Conv" or groups == 1)
        if plain and single and not is_output:
            pairs.append((product, norm))
    return pairs


def fold_in_file(graph: Graph, path: Path) -> Graph:
    """The graph with each such pair as one node, written to ``path``; the graph itself where it has none.

    The folded node has the BatchNormalization's output.
    """
    pairs = _foldable(graph)
    if not pairs:
        return graph
    model = graph.copied()
    weights = {t.name: t for t in model.graph.initializer}
    by_output = {output: node for node in model.graph.node for output in node.output}
    for product, norm in pairs:
        constants = [graph.initializer(name) for name in (*norm.proto.input[1:5], *product.proto.input[1:])]
        gamma, beta, mean, variance, weight, *biases = (torch.from_numpy(c.astype(np.float64)) for c in constants)
        bias, transposed = biases[0] if biases else None, product.op == "ConvTranspose"
        epsilon = norm.attribute("epsilon", 1e-5)
        folded = fuse_conv_bn_weights(weight, bias, mean, variance, epsilon, gamma, beta, transposed)
        node, norm_node = by_output[product.outputs[0]], by_output[norm.outputs[0]]
        names = [node.input[1], node.input[2] if len(node.input) > 2 else f"{node.input[1]}.bias"]
        node.input[:] = [node.input[0], *names]
        node.output[0] = norm.outputs[0]
        for name, tensor in zip(names, folded, strict=True):
            if name not in weights:
                weights[name] = model.graph.initializer.add()
            array = tensor.detach().numpy().astype(constants[4].dtype)
            weights[name].CopyFrom(numpy_helper.from_array(array, name))
        model.graph.node.remove(norm_node)
    save(model, graph, path)
    return Graph(path, source=graph)
