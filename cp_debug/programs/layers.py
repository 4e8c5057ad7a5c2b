"""Which values of a program are layers, what they are called, and where a stage ends."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cp_debug.backends.base import Program
from cp_debug.graph.downstream import data_values
from cp_debug.recipes.base import Component


@dataclass(frozen=True)
class Layer:
    """One value to compare. ``index`` counts in execution order over all components."""

    index: int
    component: str
    onnx: str
    name: str
    op: str


def layers_of(programs: Sequence[Program]) -> list[Layer]:
    """The inputs of every component, and every value that its graph computes from them, in execution order."""
    layers: list[Layer] = []
    for program in programs:
        graph = program.graph
        for info in graph.inputs:
            layers.append(Layer(len(layers), program.name, info.name, info.name, "input"))
        for value in data_values(graph):
            node = graph.producer[value]
            layers.append(Layer(len(layers), program.name, value, layer_name(program, value), node.op))
    return layers


def layer_name(program: Program, value: str) -> str:
    """The torch path that produced the value; without one the node's name, or the value's own."""
    if program.alignment is not None and (name := program.alignment.layer_name(value)):
        return name
    node = program.graph.producer[value]
    return node.proto.name if node.proto.name and len(node.outputs) == 1 else value


def stage_ends(components: Sequence[Component], layers: Sequence[Layer]) -> list[tuple[str, Layer]]:
    """(stage, its last layer) for every stage that has one, in execution order."""
    ends = []
    for component in components:
        own = [layer for layer in layers if layer.component == component.name and layer.op != "input"]
        for stage in component.stages:
            inside = [layer for layer in own if _under(stage.path, layer.name) or _under(stage.path, layer.onnx)]
            if inside:
                ends.append((stage.name, inside[-1]))
    return sorted(ends, key=lambda end: end[1].index)


def _under(prefix: str, name: str) -> bool:
    return name == prefix or (name.startswith(prefix) and name[len(prefix)] in "./@#")
