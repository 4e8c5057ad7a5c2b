"""``Net``: an ONNX file that is edited: its constants, nodes and what one sample gives, by name."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

PRODUCTS = {"Conv": 1, "ConvTranspose": 1, "Gemm": 1, "MatMul": 1, "LSTM": 1, "GRU": 1}
"""Operators with weights, and which of their inputs these are."""


class Net:
    """The main graph of a model. ``values`` are the results of one run, by name, where ``run`` was called."""

    def __init__(self, model: onnx.ModelProto, values: dict[str, np.ndarray] | None = None) -> None:
        self.model, self.values = model, values or {}
        self.graph = model.graph

    def copy(self) -> Net:
        """Another one to edit; the values are shared."""
        return Net(copy.deepcopy(self.model), self.values)

    def constants(self) -> dict[str, np.ndarray]:
        """Initializers and Constant nodes that are consumed by one node at most."""
        found = {t.name: numpy_helper.to_array(t) for t in self.graph.initializer}
        for node in self.graph.node:
            if node.op_type == "Constant" and node.attribute[0].name == "value":
                found[node.output[0]] = numpy_helper.to_array(node.attribute[0].t)
        return {name: array for name, array in found.items() if len(self.readers(name)) == 1}

    def readers(self, name: str) -> list[onnx.NodeProto]:
        """The nodes that read a value."""
        return [node for node in self.graph.node if name in node.input]

    def node(self, value: str) -> onnx.NodeProto:
        """The node that writes a value. Raises KeyError for one that none writes."""
        for node in self.graph.node:
            if value in node.output:
                return node
        raise KeyError(value)

    def set_constant(self, name: str, array: np.ndarray) -> None:
        """Another array under the name, of any shape and type."""
        tensor = numpy_helper.from_array(np.ascontiguousarray(array), name)
        for initializer in self.graph.initializer:
            if initializer.name == name:
                initializer.CopyFrom(tensor)
                return
        self.node(name).attribute[0].t.CopyFrom(tensor)

    def constant(self, name: str, array: np.ndarray) -> str:
        """A new initializer."""
        self.graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(array), name))
        return name

    def weighted(self, *ops: str) -> Iterator[tuple[onnx.NodeProto, str, np.ndarray]]:
        """(node, its weight's name, the weight) of products whose weights are constants of their own."""
        constants = self.constants()
        for node in self.graph.node:
            index = PRODUCTS.get(node.op_type)
            if index is None or (ops and node.op_type not in ops):
                continue
            name = node.input[index]
            if name in constants and constants[name].dtype == np.float32 and constants[name].size > 8:
                yield node, name, constants[name]

    def of(self, *ops: str) -> Iterator[onnx.NodeProto]:
        """The nodes of some operators whose result the sample reaches."""
        reached = self.reached()
        for node in self.graph.node:
            if node.op_type in ops and node.output[0] in reached:
                yield node

    def reached(self) -> set[str]:
        """The values that hang on the network's inputs."""
        own = {t.name for t in self.graph.initializer}
        found = {v.name for v in self.graph.input if v.name not in own}
        for node in self.graph.node:
            if not found.isdisjoint(node.input):
                found.update(node.output)
        return found

    def rename_input(self, old: str, new: str) -> None:
        """All readers of a value read another."""
        for node in self.graph.node:
            for index, name in enumerate(node.input):
                if name == old:
                    node.input[index] = new

    def remove(self, node: onnx.NodeProto) -> None:
        """Take the node out: who wrote its first input writes its result now."""
        source, result = node.input[0], node.output[0]
        self.graph.node.remove(self.node(result))
        writer = self.node(source)
        writer.output[list(writer.output).index(source)] = result
        self.rename_input(source, result)

    def run(self, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """All values of the main graph for one sample, by ONNX Runtime without optimization."""
        import onnxruntime as ort

        model = copy.deepcopy(self.model)
        outputs = {v.name for v in model.graph.output}
        for node in model.graph.node:
            for name in node.output:
                if name and name not in outputs:
                    model.graph.output.append(onnx.ValueInfoProto(name=name))
        options = ort.SessionOptions()
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.intra_op_num_threads, options.log_severity_level = 1, 4
        session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        results = session.run(None, inputs)
        return {o.name: a for o, a in zip(session.get_outputs(), results, strict=True) if isinstance(a, np.ndarray)}


def attribute(node: onnx.NodeProto, name: str, default: Any = None) -> Any:
    """The value of an attribute, ``default`` where the node has none."""
    for found in node.attribute:
        if found.name == name:
            return helper.get_attribute_value(found)
    return default


def set_attribute(node: onnx.NodeProto, name: str, value: Any) -> None:
    """Set or replace an attribute."""
    for found in node.attribute:
        if found.name == name:
            node.attribute.remove(found)
            break
    node.attribute.append(helper.make_attribute(name, value))


def rename(source: Path, target: Path) -> None:
    """Write the model with other names for every node and every value between its inputs and outputs."""
    model = onnx.load(source)
    kept = {v.name for v in (*model.graph.input, *model.graph.output)} | {""}
    names: dict[str, str] = {}
    for tensor in model.graph.initializer:
        if tensor.name not in kept:
            tensor.name = names.setdefault(tensor.name, f"param.{len(names)}")
    for number, node in enumerate(model.graph.node):
        node.name = f"layer{number}"
        for field in (node.input, node.output):
            for index, name in enumerate(field):
                if name not in kept:
                    field[index] = names.setdefault(name, f"act.{len(names)}")
    del model.graph.value_info[:]
    onnx.save(model, target)
