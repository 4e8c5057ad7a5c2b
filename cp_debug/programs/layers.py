"""Layers of a program: the values to compare, their names, where a stage ends; side values that were folded."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from cp_debug.backends.arithmetic import FP32
from cp_debug.backends.base import Program
from cp_debug.backends.base import Tensor as AnyTensor
from cp_debug.backends.executor import Executor
from cp_debug.errors import InputError
from cp_debug.graph.graph import Graph, data_values
from cp_debug.recipes.base import Component


@dataclass(frozen=True)
class Layer:
    """One value to compare. ``index`` counts in execution order over all components, side values included."""

    index: int
    component: str
    onnx: str
    name: str
    op: str
    kind: str = "data"
    """``data``: depends on the elements of an input. Side values do not: ``constant`` ones are made of weights alone
    (Slice and Concat of recurrent weights, DequantizeLinear), ``shape`` ones are arithmetic on shapes."""


def layers_of(programs: Sequence[Program]) -> list[Layer]:
    """Inputs of every component, and every value that its graph computes from their elements, in execution order."""
    return [layer for layer in all_layers(programs) if layer.kind == "data"]


def all_layers(programs: Sequence[Program]) -> list[Layer]:
    """``layers_of`` and the side values: what nodes compute from weights alone, and from shapes, in execution order.

    The results of Constant nodes are none of them: like a weight, a constant belongs to those that read it. Only a
    constant that is an output itself stands for itself (anchors, priors), after all that is computed.
    """
    layers: list[Layer] = []

    def add(program: Program, value: str, name: str, op: str, kind: str) -> None:
        layers.append(Layer(len(layers), program.name, value, name, op, kind))

    for program in programs:
        for info in program.graph.inputs:
            add(program, info.name, info.name, "input", "data")
        sides = side_values(program.graph)
        for value, node in program.graph.producer.items():
            if node.op != "Constant":
                add(program, value, layer_name(program, value), node.op, sides.get(value, "data"))
        for name in constant_outputs(program.graph):
            add(program, name, name, "Constant", "constant")
    return layers


def constant_outputs(graph: Graph) -> list[str]:
    """Outputs that nothing computes: initializers, and the results of Constant nodes."""
    names = dict.fromkeys(info.name for info in graph.outputs)
    held = graph.initializers
    return [n for n in names if n in held or (n in graph.producer and graph.producer[n].op == "Constant")]


def side_values(graph: Graph) -> dict[str, str]:
    """Value → ``constant`` or ``shape``, for nodes that read no element of an input, in execution order."""
    data = set(data_values(graph))
    constant = {v for v in graph.values if v not in data}
    shaped: set[str] = set()
    for node in graph.nodes:
        if node.op in ("Shape", "Size") or not shaped.isdisjoint(node.inputs):
            shaped.update(constant.intersection(node.outputs))
    return {
        v: "shape" if v in shaped else "constant"
        for v, node in graph.producer.items()
        if v in constant and node.op != "Constant"
    }


def layer_name(program: Program, value: str) -> str:
    """The torch path that produced the value; without one the node's name, or the value's own."""
    if program.alignment is not None and (name := program.alignment.layer_name(value)):
        return name
    node = program.graph.producer[value]
    return node.proto.name if node.proto.name and len(node.outputs) == 1 else value


class StageLayers(NamedTuple):
    """A stage with its last layer and all layers that it holds."""

    name: str
    last: Layer
    layers: list[Layer]


def stage_layers(components: Sequence[Component], layers: Sequence[Layer]) -> list[StageLayers]:
    """Every stage that has layers, in the order in which they end.

    What lies under no stage's path belongs to the stage of its component that ends next: glue, and inputs.
    """
    stages = []
    for component in components:
        component_layers = [layer for layer in layers if layer.component == component.name]
        listed: list[StageLayers] = []
        placed: set[int] = set()
        for stage in component.stages:
            inside = [
                layer
                for layer in component_layers
                if layer.op != "input" and (_under(stage.path, layer.name) or _under(stage.path, layer.onnx))
            ]
            if inside:
                listed.append(StageLayers(stage.name, inside[-1], inside))
                placed.update(layer.index for layer in inside)
        listed.sort(key=lambda stage: stage.last.index)
        for layer in component_layers:
            later = next((stage for stage in listed if stage.last.index > layer.index), None)
            if layer.index not in placed and later is not None:
                later.layers.append(layer)
        stages += listed
    return sorted(stages, key=lambda stage: stage.last.index)


def _under(prefix: str, name: str) -> bool:
    return name == prefix or (name.startswith(prefix) and name[len(prefix)] in "./@#")


class Folded:
    """Side values of ``graph`` that are not ``exposed``, computed again.

    An optimizer computes what hangs on weights alone, and on shapes, before the first run: no probe shows it. Where
    test and reference are different graphs, such a branch may hold the difference. Every value of a run goes through
    ``see``; then ``values`` gives those that were not seen.
    """

    def __init__(self, graph: Graph, exposed: Collection[str]) -> None:
        self._graph = graph
        numeric = set(graph.tensors)
        self.names = [v for v in side_values(graph) if v not in exposed and v in numeric]
        self._measured = {n.inputs[0] for n in graph.nodes if n.op in ("Shape", "Size") and n.inputs}
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._executor = Executor(graph, FP32)

    def see(self, name: str, tensor: AnyTensor) -> None:
        """Keep the shape of a tensor (any shape and dtype) of the run, where an operator asks for it."""
        if name in self._measured:
            self._shapes[name] = tuple(tensor.shape)

    def values(self) -> Iterator[tuple[str, np.ndarray]]:
        """Each folded value with its name, in execution order; what cannot be computed is left out.

        Arrays have the shape and dtype that the node gives.
        """
        # Of a tensor whose elements nobody reads, one zero in its shape will do.
        computed: dict[str, Any] = {name: torch.zeros(()).expand(shape) for name, shape in self._shapes.items()}
        for node in self._graph.nodes:
            if not (node.op == "Constant" or set(node.outputs) & set(self.names)):
                continue
            try:
                results = self._executor.run_nodes([node], computed, node.outputs)
            except InputError:  # an operator that nothing here can execute, or a shape that no probe showed
                continue
            computed |= results
            for name, value in results.items():
                if name in self.names:
                    yield name, value.cpu().numpy() if isinstance(value, Tensor) else np.asarray(value)
