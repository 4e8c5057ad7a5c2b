"""Attributes of ONNX nodes by what they mean: an axis from the front or from the back, a default written out."""

from __future__ import annotations

from typing import Any

from onnx import helper

from cp_debug.graph.graph import Graph, Node

RESULTS_AXES = {"Unsqueeze"}
"""Operators whose axes are those of the result."""
SHAPES = {"hidden_size", "kernel_shape", "num_outputs", "output_shape", "split"}
"""Attributes that are inferred where they are absent: they differ only where both sides have them."""
ACTIVATIONS_OF = {"GRU": ["Sigmoid", "Tanh"], "LSTM": ["Sigmoid", "Tanh", "Tanh"], "RNN": ["Tanh"]}
"""Activations of recurrent layers that name none."""


def same_axes(graph: Graph, node: Node, name: str, a: Any, b: Any) -> bool:
    """Whether two values of a node's attribute name the same axes, one from the front and one from the back.

    A reduction reduces its axes in any order, and all of them where they are absent.
    """
    reduces = node.op.startswith("Reduce") and name == "axes"
    if name not in ("axis", "axes") or ((a is None or b is None) and not reduces):
        return False
    names = node.outputs if node.op in RESULTS_AXES else node.inputs
    declared = graph.types.get(names[0]) if names else None
    if declared is None or not declared.tensor_type.HasField("shape"):
        return False
    rank = len(declared.tensor_type.shape.dim)
    axes = [list(range(rank)) if v is None else v if isinstance(v, list) else [v] for v in (a, b)]
    front = [[axis + rank if axis < 0 else axis for axis in each] for each in axes]
    return sorted(front[0]) == sorted(front[1]) if reduces else front[0] == front[1]


def implied(node: Node, name: str) -> Any:
    """The value that an absent attribute of a node stands for, where that is one number for each axis; else None."""
    given = {a.name: helper.get_attribute_value(a) for a in node.proto.attribute}
    if name == "pads" and given.get("auto_pad", b"NOTSET") == b"NOTSET":
        return 0
    return 1 if name in ("strides", "dilations") else None


def says_nothing(op: str, name: str, a: Any, b: Any) -> bool:
    """Whether only one side has the attribute, and it says there what holds without it."""
    if a is not None and b is not None:
        return False
    value = b if a is None else a
    if name in ("pads", "output_padding"):
        return not any(value)
    if name in ("strides", "dilations"):
        return all(v == 1 for v in value)
    if name == "perm":
        return list(value) == list(range(len(value)))[::-1]
    if name == "activations":
        usual = ACTIVATIONS_OF[op]
        return [v.lower() for v in value] == [v.lower() for v in usual] * (len(value) // len(usual))
    return name in SHAPES or (name == "axes" and not op.startswith("Reduce"))
