"""Causes for nodes that only one of two graphs has, read from their operators and constants alone."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx

from cp_debug.graph.constants import Constants
from cp_debug.graph.graph import Graph, Node
from cp_debug.graph.operators import QUANTIZERS, VIEWS
from cp_debug.programs.node_differences import ACTIVATIONS, attributes

FEW = 3
"""Elements of a tensor that are changed one by one."""
_STORED = {onnx.TensorProto.FLOAT16: "fp16", onnx.TensorProto.BFLOAT16: "bf16"}
_MOVES = VIEWS | {"Transpose"}
_ARITHMETIC = {"Add", "Sub", "Mul", "Div"}


def what_is_added(graph: Graph, nodes: Sequence[Node], known: Sequence[Node]) -> tuple[str, str] | None:
    """(name of the cause, in words) of added ``nodes``, in execution order; None where there is no saying.

    ``known``: the nodes that both graphs have at this layer. A dense tensor that is added is anything: no cause.
    """
    ops = [n.op for n in nodes]
    kinds = set(ops)
    constants = Constants(graph)
    if not nodes or "Constant" in kinds:
        return None
    if kinds == {"Cast"}:
        return _casts(graph, nodes)
    if kinds <= QUANTIZERS:
        return "int8", "QuantizeLinear and DequantizeLinear are added"
    if kinds <= _MOVES:
        return ("transposed", "a Transpose is added") if "Transpose" in kinds else None
    if kinds <= _ARITHMETIC:
        return _arithmetic(nodes, constants)
    (node, *more) = nodes
    if more:
        return "extra-operator", f"{', '.join(ops)} are added"
    if node.op == "Gather" and node.proto.input[1] in constants:
        order = np.ravel(constants[node.proto.input[1]])
        if np.array_equal(np.sort(order), np.arange(order.size)):
            axis = attributes(graph, node)["axis"]
            moved = int((order != np.arange(order.size)).sum())
            return "permuted", f"a Gather is added that puts {moved} slices of axis {axis} in another order"
    if node.op in ("Clip", "Min", "Max"):
        return _bounds(node, constants)
    if node.op in ACTIVATIONS:
        doubled = any(n.op == node.op for n in known)
        return ("doubled-activation" if doubled else "extra-activation"), f"{node.op} is added: {node.name}"
    return "extra-operator", f"{node.op} is added: {node.name}"


def _casts(graph: Graph, nodes: Sequence[Node]) -> tuple[str, str]:
    to = [attributes(graph, n)["to"] for n in nodes]
    for kind, name in _STORED.items():
        if kind in to:
            return name, f"a Cast to {name.upper()} is added: the result is rounded to it and read back"
    return "extra-operator", f"a Cast to {onnx.TensorProto.DataType.Name(to[0])} is added: {nodes[0].name}"


def _arithmetic(nodes: Sequence[Node], constants: Constants) -> tuple[str, str] | None:
    """Factors and summands; tensors with many other elements have no name."""
    names = []
    for node in nodes:
        own = [constants[n] for n in node.proto.input if n in constants]
        if len(own) != 1:
            return "extra-operator", f"{node.op} is added: {node.name}"
        neutral = 0.0 if node.op in ("Add", "Sub") else 1.0
        count = int((own[0] != neutral).sum())
        if own[0].size == 1:
            names.append("shifted" if node.op in ("Add", "Sub") else "scaled")
        elif own[0].size == max(own[0].shape):
            names.append("channels-shifted" if node.op in ("Add", "Sub") else "channels-scaled")
        elif count <= FEW:
            names.append("isolated")
        else:
            return None
    if len(nodes) == 1 and nodes[0].op == "Mul" and names == ["channels-scaled"]:
        (factors,) = [np.ravel(constants[n]) for n in nodes[0].proto.input if n in constants]
        if np.isin(factors, (0.0, 1.0)).all():
            kept = int(np.flatnonzero(factors).max(initial=-1)) + 1
            if kept and factors[:kept].all():
                return "truncated", f"a Mul is added that sets all after the first {kept} of {factors.size} slices to 0"
            zeros = int((factors == 0).sum())
            return "channels-zeroed", f"a Mul is added that makes {zeros} of {factors.size} slices 0: {nodes[0].name}"
    if not np.isfinite([np.abs(constants[n]).max() for d in nodes for n in d.proto.input if n in constants]).all():
        return None
    says = f"{' and '.join(n.op for n in nodes)} {'is' if len(nodes) == 1 else 'are'} added: {nodes[0].name}"
    if len(set(names)) == 1:
        return names[0], says
    return ("affine", says) if set(names) == {"shifted", "scaled"} else ("extra-operator", says)


def _bounds(node: Node, constants: Constants) -> tuple[str, str]:
    own = [float(np.ravel(constants[n])[0]) for n in node.proto.input if n in constants and constants[n].size == 1]
    legacy = [a.f for a in node.proto.attribute if a.name in ("min", "max")]
    bounds = own + legacy
    if bounds == [0.0]:
        return "extra-activation", f"{node.op} at 0 is added: {node.name}"
    if not bounds:
        return "extra-operator", f"{node.op} is added: {node.name}"
    return "saturated", f"a {node.op} is added that stops at {', '.join(f'{b:.4g}' for b in bounds)}: {node.name}"
