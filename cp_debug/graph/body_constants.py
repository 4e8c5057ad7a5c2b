"""Constants of a whole file: those of its main graph, and those inside branches, loop bodies and functions.

Names tell where one stands, as those of a flattened graph do: ``If_3/then_branch/weight``, ``Loop_2/body/Constant_1``,
``Dense/weight`` of a function. Bodies that never run are read, too.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import onnx

from cp_debug.graph.constants import Constants
from cp_debug.graph.graph import Graph, Node
from cp_debug.graph.onnx_tensors import array_of


class BodyConstants(Constants):
    """The constants of a graph and of the bodies in it, by what they hold."""

    def __init__(self, graph: Graph) -> None:
        super().__init__(graph)
        self._tensors: dict[str, onnx.TensorProto] = {}
        self._readers: dict[str, list[Node]] = {}
        self.inner_nodes: dict[str, Node] = {}
        """The nodes in bodies that compute a value, by its place."""
        self._names_of: dict[Node, Mapping[str, str]] = {}
        for node in graph.nodes:
            self._bodies_of(node, "", {})
        for function in graph.proto.functions:
            self._read(f"{function.name}/", [], function.node, {})

    def __contains__(self, name: str) -> bool:
        return super().__contains__(name) or name in self._tensors

    def __getitem__(self, name: str) -> np.ndarray:
        if name in self._tensors and not super().__contains__(name):
            return array_of(self._tensors[name], self.graph.path)
        return super().__getitem__(name)

    @property
    def names(self) -> list[str]:
        """Every constant that a node reads, those of bodies behind those of the main graph."""
        inner = (n for n in (*self._tensors, *self._nodes) if n in self._readers)
        return list(dict.fromkeys([*super().names, *inner]))

    def size(self, name: str) -> int:
        """The number of elements."""
        if name in self._tensors and not super().__contains__(name):
            return math.prod(self._tensors[name].dims)
        return super().size(name)

    def readers(self, name: str) -> Sequence[Node]:
        """The nodes that read a constant."""
        return [*super().readers(name), *self._readers.get(name, [])]

    def inputs(self, node: Node) -> Iterator[str]:
        """The inputs of a node, in order, by the names that they have here."""
        names = self._names_of.get(node, {})
        return (names.get(name, name) for name in node.proto.input)

    def _bodies_of(self, node: Node, path: str, outer: Mapping[str, str]) -> None:
        for attribute in node.proto.attribute:
            single = [attribute.g] if attribute.type == onnx.AttributeProto.GRAPH else []
            for i, graph in enumerate([*single, *attribute.graphs]):
                place = f"{path}{node.name}/{attribute.name}{f'_{i}' if attribute.graphs else ''}/"
                self._read(place, graph.initializer, graph.node, outer, [v.name for v in graph.input])

    def _read(
        self,
        path: str,
        tensors: Sequence[onnx.TensorProto],
        protos: Sequence[onnx.NodeProto],
        outer: Mapping[str, str],
        inputs: Sequence[str] = (),
    ) -> None:
        """Take in the body at ``path``; ``outer``: what the names around it are called here."""
        names = {**outer, **{name: f"{path}{name}" for name in inputs}}
        names |= {t.name: f"{path}{t.name}" for t in tensors}
        names |= {o: f"{path}{o}" for n in protos for o in n.output if o}
        self._tensors |= {names[t.name]: t for t in tensors if t.data_type != onnx.TensorProto.STRING}
        for node in (Node.of(i, proto) for i, proto in enumerate(protos)):
            if node.op == "Constant" and not any(a.ref_attr_name for a in node.proto.attribute):
                self._nodes.setdefault(names[node.outputs[0]], node)
            self._names_of[node] = names
            self.inner_nodes.update({names[o]: node for o in node.outputs})
            for name in node.inputs:
                self._readers.setdefault(names.get(name, name), []).append(node)
            self._bodies_of(node, path, names)
