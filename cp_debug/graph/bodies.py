"""Graphs inside nodes: the branches of If, the body of Loop, and the functions that a file defines."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import onnx
import torch
from onnx import numpy_helper

from cp_debug.graph.graph import Node


@dataclass(frozen=True)
class Body:
    """Nodes with the names of what goes in and comes out, and the constants that belong to them."""

    nodes: Sequence[Node]
    inputs: Sequence[str]
    outputs: Sequence[str]
    opsets: Mapping[str, int]
    constants: dict[str, Any]

    @classmethod
    def of_graph(cls, graph: onnx.GraphProto, opsets: Mapping[str, int]) -> Body:
        """A branch or loop body."""
        return cls(
            [Node.of(i, n) for i, n in enumerate(graph.node)],
            [v.name for v in graph.input],
            [v.name for v in graph.output],
            opsets,
            {t.name: numpy_helper.to_array(t) for t in graph.initializer},
        )

    @classmethod
    def of_function(cls, function: onnx.FunctionProto, caller: Node) -> Body:
        """The body of a function with the attributes of the node that calls it."""
        attributes = {a.name: a for a in (*function.attribute_proto, *caller.proto.attribute)}
        nodes = []
        for i, template in enumerate(function.node):
            proto = onnx.NodeProto()
            proto.CopyFrom(template)
            del proto.attribute[:]
            for attribute in template.attribute:
                if not attribute.ref_attr_name:
                    proto.attribute.append(attribute)
                elif attribute.ref_attr_name in attributes:
                    given = proto.attribute.add()
                    given.CopyFrom(attributes[attribute.ref_attr_name])
                    given.name = attribute.name
            nodes.append(Node.of(i, proto))
        opsets = {o.domain: o.version for o in function.opset_import}
        return cls(nodes, function.input, function.output, opsets, {})


Execute = Callable[[Body, Sequence[Any]], list[Any]]
"""Runs a body on its inputs; values of the surrounding graph are known to it."""


def run_if(bodies: Mapping[str, Body], execute: Execute, condition: Any) -> list[Any]:
    """ONNX If."""
    return execute(bodies["then_branch" if bool(condition) else "else_branch"], [])


def run_loop(bodies: Mapping[str, Body], execute: Execute, trips: Any, condition: Any, *carried: Any) -> list[Any]:
    """ONNX Loop; a scan output of a loop that never ran is an empty vector."""
    body, state, go_on = bodies["body"], list(carried), condition is None or bool(condition)
    scans: list[list[Any]] = [[] for _ in body.outputs[1 + len(state) :]]
    trip = 0
    while go_on and (trips is None or trip < int(trips)):
        more, *results = execute(body, [torch.tensor(trip), torch.tensor(True), *state])
        go_on, state = bool(more), results[: len(state)]
        for scan, value in zip(scans, results[len(state) :], strict=True):
            scan.append(value)
        trip += 1
    return [*state, *(torch.stack(scan) if scan else torch.empty(0) for scan in scans)]
