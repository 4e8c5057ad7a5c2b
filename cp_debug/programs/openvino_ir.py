"""OpenVINO's IR (``.xml`` beside ``.bin``) as the test model of an ONNX file, whose values have the same names.

Its quantizers, as NNCF puts them in, become Q/DQ pairs of the ONNX graph that it was made of.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from onnx import ModelProto, NodeProto, helper, numpy_helper

from cp_debug.backends.base import Backend, Program
from cp_debug.backends.openvino_backend import words
from cp_debug.errors import InputError
from cp_debug.graph.graph import Graph, refill
from cp_debug.graph.surgery import save, unused_names
from cp_debug.optional import require
from cp_debug.safe_text import did_you_mean

IR = ".xml"
"""Suffix of such files."""


def ir_program(program: Program, path: Path, folder: Path) -> Program:
    """The program that runs the IR at ``path``. Its graph, written to ``folder``, is the one of ``program`` with the
    weights that the IR has under the same names, as a converter may have rounded them to FP16, and with Q/DQ pairs for
    the quantizers that NNCF put in.

    Raises InputError for a file that OpenVINO does not read, one without an output of the graph, and one with a
    quantizer that has no place in it.
    """
    with words(path, "cannot read it"):
        model, graph = require("openvino", "openvino").Core().read_model(str(path)), program.graph
    outputs = {name for port in model.outputs for name in port.get_names()}
    if lost := [value.name for value in graph.outputs if value.name not in outputs]:
        hint = did_you_mean(lost[0], outputs) or f"; it has {', '.join(sorted(outputs))}"
        raise InputError(f"--test-model: {path} has no output that is called {lost[0]!r}{hint}")
    stored = {
        name: operation.data
        for operation in model.get_ops()
        if operation.get_type_name() == "Constant"
        for name in operation.output(0).get_names()
    }
    proto = ModelProto()
    proto.CopyFrom(graph.proto)
    changed = False
    for weight in proto.graph.initializer:
        own, theirs = graph.initializer(weight.name), stored.get(weight.name)
        if theirs is not None and theirs.shape == own.shape and theirs.dtype.kind == own.dtype.kind == "f":
            theirs = np.asarray(theirs, own.dtype)
            if not np.array_equal(own, theirs, equal_nan=True):
                weight.CopyFrom(numpy_helper.from_array(theirs, weight.name))
                changed = True
    quantizers = Quantizers(proto, graph)
    changed |= quantizers.add(model)
    if lost := quantizers.unplaced:
        raise InputError(f"--test-model: {path} has the quantizer {lost[0]!r}, which has no place in {graph}")
    if not changed:
        return replace(program, ir=path)
    file = folder / f"{program.name}.ir.onnx"
    save(proto, graph, file)
    return Program(program.name, Graph(file, source=graph), example=program.example, ir=path)


def check_run_irs(backends: Iterable[Backend], programs: Iterable[Program]) -> None:
    """Raise InputError where a backend does not run the IR of a program as it is."""
    irs = [program.ir for program in programs if program.ir is not None]
    for backend in backends if irs else ():
        if backend.spec.family != "openvino" or backend.precision == "int8":
            others = "openvino, openvino-fp16 and openvino-bf16"
            raise InputError(f"--test-model: {irs[0]} is an IR of OpenVINO, which {others} run, not {backend.spec}")


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
        refill(self._proto.graph.node, nodes)
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
        for node, place, weight in self._weights(operation, data.size):
            array = rounded.reshape(weight.shape).astype(weight.dtype)
            node.input[place], placed = self._store(f"{node.input[place]}/rounded", array), True
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
        parts = levels, *np.broadcast_arrays(scale, shift, levels)[:2]
        for node, place, weight in self._weights(operation, levels.size):
            placed |= self._as_levels(node, place, weight, *parts)
        return placed

    def _weights(self, operation: Any, size: int) -> Iterator[tuple[NodeProto, int, np.ndarray]]:
        """Weights of so many elements that are read behind an operator of the IR: node, place and array of each."""
        for node in self._readers(operation):
            for place, name in enumerate(node.input):
                if name in self._graph.initializers and (weight := self._graph.initializer(name)).size == size:
                    yield node, place, weight

    def _as_levels(self, node: NodeProto, place: int, weight: np.ndarray, *parts: np.ndarray) -> bool:
        """Store levels, scale and zero point, all of a weight's size, in the layout that gives the weight."""
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
