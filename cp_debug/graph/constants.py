"""The constants of a graph, both initializers and Constant nodes, by name and by value."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from weakref import WeakKeyDictionary

import numpy as np
from onnx import helper, numpy_helper

from cp_debug.graph.graph import Graph, Node

TELLING = 16
"""Elements from which the contents of a constant tell which node it belongs to."""


_DIGESTS: WeakKeyDictionary[Graph, dict[str, str]] = WeakKeyDictionary()
"""Digests by graph and name: gigabytes of weights are read for them once, whoever asks."""


class Constants:
    """The constants of a graph by what they hold."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self._nodes = {n.outputs[0]: n for n in graph.nodes if n.op == "Constant"}
        self._digests = _DIGESTS.setdefault(graph, {})

    def __contains__(self, name: str) -> bool:
        return name in self.graph.initializers or name in self._nodes

    def __getitem__(self, name: str) -> np.ndarray:
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
