"""The constants of a graph, both initializers and Constant nodes, by name and by value; of a whole file, too.

In a whole file names tell where a constant stands, as those of a flattened graph do: ``If_3/then_branch/weight``,
``Loop_2/body/Constant_1``, ``Dense/weight`` of a function. Bodies that never run are read, too.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from weakref import WeakKeyDictionary

import numpy as np
import onnx
from onnx import helper, numpy_helper

from cp_debug.graph.graph import Graph, Node
from cp_debug.graph.onnx_tensors import array_of

TELLING = 16
"""Elements from which the contents of a constant tell which node it belongs to."""


_DIGESTS: WeakKeyDictionary[Graph, dict[str, str]] = WeakKeyDictionary()
"""Digests by graph and name: gigabytes of weights are read for them once, whoever asks."""


class Constants:
    """The constants of a graph by what they hold.

    ``settled``: value → what nodes make of constants and shapes alone, which counts as one, too.
    """

    def __init__(self, graph: Graph, settled: Mapping[str, np.ndarray] = MappingProxyType({})) -> None:
        self.graph, self._settled = graph, settled
        self._nodes = {n.outputs[0]: n for n in graph.nodes if n.op == "Constant"}
        self._digests = _DIGESTS.setdefault(graph, {})

    def __contains__(self, name: str) -> bool:
        return name in self.graph.initializers or name in self._nodes or name in self._settled

    def __getitem__(self, name: str) -> np.ndarray:
        if name in self._settled:
            return self._settled[name]
        return self.graph.initializer(name) if name in self.graph.initializers else constant(self._nodes[name])

    @property
    def names(self) -> list[str]:
        """Every constant that a node reads, in file order."""
        read = self.graph.consumers
        return [n for n in (*self.graph.initializers, *self._nodes) if n in read]

    def digest_transposed(self, name: str) -> str:
        """``digest`` of a matrix with its axes exchanged."""
        return _digest(self[name].T)

    def digest(self, name: str) -> str:
        """Dtype, shape and contents in one word."""
        if name in self._settled:
            return _digest(self[name])
        if name not in self._digests:
            self._digests[name] = _digest(self[name])
        return self._digests[name]

    def size(self, name: str) -> int:
        """The number of elements."""
        if name in self.graph.initializers:
            return math.prod(self.graph.weight(name).dims)
        return self[name].size

    def uniform(self, name: str) -> bool:
        """Whether all elements are equal: zeros and ones lie in many layers, so that they tell none from another."""
        return is_uniform(self[name])

    def twin(self, name: str, theirs: Constants, other: str) -> str | None:
        """The constant, another than ``name``, that holds what ``theirs`` has as ``other``; None without one, and where
        too few numbers or equal ones tell nothing."""
        if self.size(name) < TELLING or theirs.uniform(other):
            return None
        digest = theirs.digest(other)
        alike = (n for n in self.names if n != name and self.size(n) == theirs.size(other))
        return next((n for n in alike if self.digest(n) == digest), None)

    def readers(self, name: str) -> Sequence[Node]:
        """The nodes that read a constant."""
        return self.graph.consumers.get(name, [])

    def of(self, node: Node) -> tuple[str, ...]:
        """The digests of a node's constants that are large enough to tell it from others."""
        return tuple(self.digest(n) for n in node.proto.input if n in self and self.size(n) >= TELLING)


def is_uniform(array: np.ndarray) -> bool:
    """Whether all elements of an array of any shape and dtype are equal."""
    flat = array.reshape(-1)
    return not flat.size or bool((flat == flat[0]).all())


def _digest(array: np.ndarray) -> str:
    sha = hashlib.blake2b(f"{array.dtype}{array.shape}".encode(), digest_size=16)
    if array.dtype != object and array.size:
        sha.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    elif array.size:
        sha.update(repr(array.tolist()).encode())
    return sha.hexdigest()


def constant(node: Node) -> np.ndarray:
    """The value of a Constant node.

    In the dtype and shape that its attribute gives: a tensor's own, else float32, int64 or text.
    """
    (attribute,) = node.proto.attribute
    value = helper.get_attribute_value(attribute)
    if attribute.name == "value":
        return numpy_helper.to_array(value)
    kind = attribute.name.removeprefix("value_")[0]
    return np.array(value, {"f": np.float32, "i": np.int64, "s": np.object_}[kind])


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
