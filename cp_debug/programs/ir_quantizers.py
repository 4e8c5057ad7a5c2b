"""Quantizers of an OpenVINO IR, as NNCF puts them in, as Q/DQ pairs of the ONNX graph that the IR was made of."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import numpy as np
from onnx import ModelProto, NodeProto, helper, numpy_helper

from cp_debug.graph.graph import Graph
from cp_debug.graph.surgery import unused_names

LOOKS = 0.1
"""Relative L2 distance from the weight up to which dequantized levels are that weight's, in one layout or another."""


class Quantizers:
    """Adds an IR's quantizers to a copy of its ONNX model: ``FakeQuantize`` of values, and weights stored as levels.

    Operators of the IR have the names of ONNX nodes, or of parts of them: ``conv1/WithoutBiases``.
    """

    def __init__(self, proto: ModelProto, graph: Graph) -> None:
        self._proto, self._graph, self._fresh = proto, graph, unused_names(graph)
        self._nodes = {name: node for node in proto.graph.node for name in (node.name, *node.output) if name}
        self._behind: dict[str, list[NodeProto]] = defaultdict(list)
        """Value → pairs that read it; the empty name: what reads stored levels."""
        self.unplaced: list[str] = []
        """Quantizers of the IR that have no place in the graph."""

    def add(self, model: Any) -> bool:
        """Add those of ``model``, an ``openvino.Model``; whether there are any."""
        found = False
        for operation in model.get_ordered_ops():
            name = operation.get_friendly_name()
            if operation.get_type_name() == "FakeQuantize":
                placed = self._rounded_weight(operation) or self._value(operation)
            elif operation.get_type_name() == "Multiply" and "/fq_weights_" in name:
                placed = self._weight(operation)
            else:
                continue
            found = True
            self.unplaced += [name] * (not placed)
        inputs = ["", *(value.name for value in self._graph.inputs), *self._graph.initializers]
        nodes = [new for name in inputs for new in self._behind.get(name, ())]
        for node in self._proto.graph.node:
            nodes += [node, *(new for name in node.output for new in self._behind.get(name, ()))]
        kept = [NodeProto.FromString(node.SerializeToString()) for node in nodes]
        del self._proto.graph.node[:]
        self._proto.graph.node.extend(kept)
        return found

    def _readers(self, operation: Any) -> Iterator[NodeProto]:
        """ONNX nodes that read an operator of the IR, behind others that stand for no node."""
        for target in operation.output(0).get_target_inputs():
            name = target.get_node().get_friendly_name()
            node = self._nodes.get(name) or self._nodes.get(name.rpartition("/")[0])
            if node is not None:
                yield node
            else:
                yield from self._readers(target.get_node())

    def _value(self, operation: Any) -> bool:
        """Put a pair behind a value for those that read the IR's quantizer of it."""
        names, readers = operation.input_value(0).get_names(), [*self._readers(operation)]
        limits = [_constant(operation, place) for place in range(1, 5)]
        places = [(node, i) for node in readers for i, name in enumerate(node.input) if name in names]
        if not places or any(limit is None or limit.size != 1 for limit in limits):
            return False
        low, high = (float(limit.item()) for limit in limits[:2] if limit is not None)
        scale = (high - low) / (operation.get_levels() - 1)
        source, result = places[0][0].input[places[0][1]], self._fresh(operation.get_friendly_name())
        levels = self._fresh(f"{result}/levels")
        parts = {"scale": np.float32(scale), "zero": np.uint8(round(-low / scale))}
        stored = [self._store(f"{result}/{part}", array) for part, array in parts.items()]
        self._behind[source] += [
            helper.make_node("QuantizeLinear", [source, *stored], [levels], levels),
            helper.make_node("DequantizeLinear", [levels, *stored], [result], result),
        ]
        for node, place in places:
            node.input[place] = result
        return True

    def _rounded_weight(self, operation: Any) -> bool:
        """Let the nodes that read a weight read what the IR's quantizer makes of it, if it is one of a weight."""
        data, *limits = (_constant(operation, place) for place in range(5))
        if data is None or any(limit is None for limit in limits):
            return False
        low, high, *ends = (limit.astype(np.float64) for limit in limits if limit is not None)
        data, steps = data.reshape(operation.get_output_shape(0)), operation.get_levels() - 1
        levels = np.round((np.clip(data, low, high) - low) / (high - low) * steps)
        rounded, placed = levels / steps * (ends[1] - ends[0]) + ends[0], False
        for node in self._readers(operation):
            for place, name in enumerate(node.input):
                if name in self._graph.initializers and self._graph.initializer(name).size == data.size:
                    weight = self._graph.initializer(name)
                    node.input[place] = self._store(
                        f"{name}/rounded", rounded.reshape(weight.shape).astype(weight.dtype)
                    )
                    placed = True
        return placed

    def _weight(self, operation: Any) -> bool:
        """Let the nodes that read a weight read the IR's levels of it."""
        data = operation.input_value(0).get_node()
        shift: np.ndarray | None = np.zeros(1, np.int8)
        if data.get_type_name() == "Subtract":
            shift, data = _constant(data, 1), data.input_value(0).get_node()
        levels, scale = _constant(data, 0), _constant(operation, 1)
        if levels is None or scale is None or shift is None or levels.dtype not in (np.int8, np.uint8):
            return False
        placed = False
        for node in self._readers(operation):
            for place, name in enumerate(node.input):
                if name in self._graph.initializers and self._graph.initializer(name).size == levels.size:
                    placed |= self._as_levels(node, place, levels, *np.broadcast_arrays(scale, shift, levels)[:2])
        return placed

    def _as_levels(self, node: NodeProto, place: int, *parts: np.ndarray) -> bool:
        """Store levels, scale and zero point, all of a weight's size, in the layout that gives the weight."""
        weight = self._graph.initializer(node.input[place])
        for levels, scale, zero in ([p.reshape(weight.shape) for p in parts], [p.T for p in parts]):
            own = (levels.astype(np.float32) - zero) * scale.astype(np.float32)
            if own.shape == weight.shape and np.linalg.norm(own - weight) <= LOOKS * np.linalg.norm(weight):
                axes = [axis for axis in range(scale.ndim) if np.ptp(scale.astype(np.float64), axis).any()]
                if len(axes) > 1:
                    return False
                along = tuple(slice(None) if axis in axes else 0 for axis in range(scale.ndim))
                stored = levels, scale[along].astype(np.float32), zero[along].astype(levels.dtype)
                result = self._fresh(f"{node.input[place]}/dequantized")
                names = "levels", "scale", "zero"
                inputs = [self._store(f"{node.input[place]}/{part}", a) for part, a in zip(names, stored, strict=True)]
                axis = {"axis": axes[0]} if axes else {}
                self._behind[""].append(helper.make_node("DequantizeLinear", inputs, [result], result, **axis))
                node.input[place] = result
                return True
        return False

    def _store(self, wish: str, array: Any) -> str:
        name = self._fresh(wish)
        self._proto.graph.initializer.append(numpy_helper.from_array(np.array(array), name))
        return name


def _constant(operation: Any, place: int) -> np.ndarray | None:
    """The constant that an operator of an IR reads at ``place``, behind conversions and other shapes; None where it
    reads another value."""
    node = operation.input_value(place).get_node()
    while node.get_type_name() in ("Convert", "Reshape"):
        node = node.input_value(0).get_node()
    return np.array(node.data) if node.get_type_name() == "Constant" else None
