"""Graphs inside nodes: the branches of If, the body of Loop, and the functions that a file defines."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import onnx
import torch
from onnx import numpy_helper

from cp_debug.graph.graph import Node, refill
from cp_debug.graph.onnx_runtime import LIMIT, MOST_PASSES, Endless, loop_seconds


@dataclass(frozen=True)
class Body:
    """Nodes with the names of what goes in and comes out, and the constants that belong to them."""

    nodes: Sequence[Node]
    inputs: Sequence[str]
    outputs: Sequence[str]
    opsets: Mapping[str, int]
    constants: dict[str, Any]
    vectors: frozenset[str] = frozenset()
    """Inputs that are declared with one axis. A Loop's counter is a scalar by ONNX, yet TorchScript declares one, and
    runtimes make what is declared."""

    def counter(self, trip: int) -> np.ndarray:
        """The number of a Loop's pass, in the shape in which its body takes it, int64."""
        return np.full([1] * (self.inputs[0] in self.vectors), trip, np.int64)

    @classmethod
    def of_graph(cls, graph: onnx.GraphProto, opsets: Mapping[str, int]) -> Body:
        """A branch or loop body as a ``Body``; ``opsets``: domain → version of the graph around it."""
        return cls(
            [Node.of(i, n) for i, n in enumerate(graph.node)],
            [v.name for v in graph.input],
            [v.name for v in graph.output],
            opsets,
            {t.name: numpy_helper.to_array(t) for t in graph.initializer},
            frozenset(v.name for v in graph.input if len(v.type.tensor_type.shape.dim) == 1),
        )

    @classmethod
    def of_function(cls, function: onnx.FunctionProto, caller: Node) -> Body:
        """The body of a function with the attributes of the node that calls it."""
        attributes = {a.name: a for a in (*function.attribute_proto, *caller.proto.attribute)}
        nodes = [Node.of(i, _with_arguments(template, attributes)) for i, template in enumerate(function.node)]
        opsets = {o.domain: o.version for o in function.opset_import}
        return cls(nodes, function.input, function.output, opsets, {})


def _with_arguments(template: onnx.NodeProto, arguments: Mapping[str, onnx.AttributeProto]) -> onnx.NodeProto:
    """A node of a function with the function's arguments in place of the references to them, in its bodies, too."""
    node = onnx.NodeProto()
    node.CopyFrom(template)
    del node.attribute[:]
    for attribute in template.attribute:
        if attribute.ref_attr_name and attribute.ref_attr_name not in arguments:
            continue
        own = node.attribute.add()
        own.CopyFrom(arguments[attribute.ref_attr_name] if attribute.ref_attr_name else attribute)
        own.name = attribute.name
        for graph in () if attribute.ref_attr_name else (*([own.g] if own.HasField("g") else []), *own.graphs):
            refill(graph.node, (_with_arguments(each, arguments) for each in graph.node))
    return node


Execute = Callable[[Body, Sequence[Any]], list[Any]]
"""Runs a body on its inputs; values of the surrounding graph are known to it."""


class Attributes(Protocol):
    """The attributes of a node; None for one that it lacks."""

    def __getitem__(self, name: str) -> Any: ...


@dataclass
class LoopClock:
    """Passes of all Loops of one run, and the time since the first of them began."""

    passes: int = 0
    started: float = 0.0

    def tick(self, endless: bool) -> None:
        """Count a pass. Raises Endless for too many passes, or those of an ``endless`` loop, in too long a time."""
        if not self.passes:
            self.started = time.monotonic()
        self.passes += 1
        seconds = loop_seconds()
        if (endless or self.passes > MOST_PASSES) and time.monotonic() - self.started > seconds:
            raise Endless(
                f"it has not finished after {self.passes} passes, {seconds:g} s, and no end is in sight; "
                f"{LIMIT}=600 in the environment allows more time"
            )


def run_loop(
    clock: LoopClock,
    bodies: Mapping[str, Body],
    execute: Execute,
    attributes: Attributes,
    trips: Any = None,
    condition: Any = None,
    *carried: Any,
) -> list[Any]:
    """Execute an ONNX Loop and return its outputs: the carried values, then the scan outputs.

    ``trips`` (int64 scalar) and ``condition`` (bool scalar) may be None, as in ONNX. A scan output of a loop that never
    ran is an empty vector. Raises ValueError where iterations give results of different shapes, and Endless for a loop
    that its trip count does not end in time, and its condition neither.
    """
    body, state, go_on = bodies["body"], list(carried), condition is None or bool(condition)
    scans: list[list[Any]] = [[] for _ in body.outputs[1 + len(state) :]]
    trip = 0
    endless = trips is None or int(trips) > MOST_PASSES
    while go_on and (trips is None or trip < int(trips)):
        clock.tick(endless)
        more, *results = execute(body, [torch.from_numpy(body.counter(trip)), torch.tensor(True), *state])
        go_on, state = bool(more), results[: len(state)]
        for scan, value in zip(scans, results[len(state) :], strict=True):
            scan.append(value)
        trip += 1
    return [*state, *(_stacked(scan) for scan in scans)]


def run_scan(bodies: Mapping[str, Body], execute: Execute, attributes: Attributes, *inputs: Any) -> list[Any]:
    """Execute an ONNX Scan and return its outputs: the final states, then the scan outputs.

    Up to opset 8, where the first input is sequence lengths, every entry of the batch is scanned by itself. Raises
    ValueError where iterations give results of different shapes.
    """
    body, count = bodies["body"], attributes["num_scan_inputs"]
    if len(inputs) == len(body.inputs) + 1 or attributes["directions"] is not None:  # opset 8
        return _scan_batch(body, execute, attributes, inputs[0], inputs[1:])
    state, scanned = list(inputs[: len(inputs) - count]), inputs[len(inputs) - count :]
    axes = attributes["scan_input_axes"] or [0] * count
    backwards = attributes["scan_input_directions"] or [0] * count
    columns = [
        x.movedim(axis, 0).flip(0) if backward else x.movedim(axis, 0)
        for x, axis, backward in zip(scanned, axes, backwards, strict=True)
    ]
    state, scans = _passes(body, execute, state, columns)
    axes = attributes["scan_output_axes"] or [0] * len(scans)
    backwards = attributes["scan_output_directions"] or [0] * len(scans)
    stacked = [_stacked(scan[::-1] if backward else scan) for scan, backward in zip(scans, backwards, strict=True)]
    return [*state, *(x.movedim(0, axis) if x.dim() > 1 else x for x, axis in zip(stacked, axes, strict=True))]


def _passes(
    body: Body, execute: Execute, state: list[Any], columns: Sequence[Any]
) -> tuple[list[Any], list[list[Any]]]:
    """The states after a pass of ``body`` for each row of all ``columns``, and what every pass gave besides."""
    scans: list[list[Any]] = [[] for _ in body.outputs[len(state) :]]
    for rows in zip(*columns, strict=True):
        results = execute(body, [*state, *rows])
        state, given = results[: len(state)], results[len(state) :]
        for scan, value in zip(scans, given, strict=True):
            scan.append(value)
    return state, scans


def _scan_batch(body: Body, execute: Execute, attributes: Attributes, lengths: Any, inputs: Sequence[Any]) -> list[Any]:
    """Scan of opset 8: axis 0 is the batch, axis 1 the sequence; results behind a sequence's length are zeros."""
    count = attributes["num_scan_inputs"]
    state_count, size = len(inputs) - count, inputs[-1].shape[1]
    backwards = attributes["directions"] or [0] * count
    entries = []
    for entry in range(inputs[0].shape[0]):
        length = size if lengths is None else int(lengths[entry])
        columns = [
            x[entry][:length].flip(0) if backward else x[entry][:length]
            for x, backward in zip(inputs[state_count:], backwards, strict=True)
        ]
        state, scans = _passes(body, execute, [x[entry] for x in inputs[:state_count]], columns)
        padded = [_stacked([*scan, *(torch.zeros_like(scan[0]) for _ in range(size - length))]) for scan in scans]
        entries.append([*state, *padded])
    return [torch.stack(column) for column in zip(*entries, strict=True)]


def _stacked(scan: Sequence[Any]) -> Any:
    """The results that a loop collected, stacked along a new first axis; an empty vector for none.

    Raises ValueError for iterations of different shapes.
    """
    if not scan:
        return torch.empty(0)
    shapes = {tuple(value.shape) for value in scan}
    if len(shapes) > 1:
        raise ValueError(f"a loop's iterations give results of the shapes {sorted(map(list, shapes))}")
    return torch.stack(list(scan))
