"""Epilogue of TensorRT's FP16 convolution kernels, as a change of the nodes that are executed.

Fitted on TensorRT 8.6 and an H100, element by element (``docs/gpu/h100-kernels.md``): a residual is added to the
accumulated sum *before* the bias, each addition rounded to FP16, and ``x · sigmoid(x)`` behind it is rounded once, not
twice. Kernels without shared memory add the bias first.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import numpy as np
import onnx

from cp_debug.graph.graph import Graph, Node

BIAS = "\x1fbias"
"""Suffix of a convolution's name for its bias as a value of its own."""


def fused(
    graph: Graph, nodes: Sequence[Node], starts: Collection[str], *, bias_first: bool = False
) -> tuple[list[Node], Mapping[str, np.ndarray]]:
    """The nodes in the order of such a kernel, and the biases as further values, [C, 1, …] float32.

    The bias of a Conv whose result is added to one of ``starts`` comes behind the addition, unless ``bias_first``.
    Other patterns stay as they are.
    """
    if bias_first:
        return _once_rounded(nodes), {}
    readers: dict[str, list[Node]] = {}
    for node in nodes:
        for name in node.inputs:
            readers.setdefault(name, []).append(node)
    reordered: list[Node] = []
    values: dict[str, np.ndarray] = {}
    behind: dict[str, str] = {}
    for node in nodes:
        follower = next(iter(readers.get(node.outputs[0], ())), None)
        biased = node.op == "Conv" and len(node.inputs) == 3 and node.proto.input[2] in graph.initializers
        if biased and follower is not None and follower.op == "Add" and set(follower.inputs) & set(starts):
            name = node.proto.input[2]
            bias = graph.initializer(name).astype(np.float32)
            dims = len(graph.weight(node.proto.input[1]).dims) - 2
            values[node.name + BIAS] = bias.reshape(-1, *(1,) * dims)
            behind[follower.name] = node.name + BIAS
            reordered.append(node.changed(node.proto.input[:2]))
        elif node.name in behind:
            between = f"{node.outputs[0]}\x1fsum"
            reordered.append(node.changed(outputs=[between]))
            proto = onnx.helper.make_node("Add", [between, behind[node.name]], [node.outputs[0]], f"{node.name}{BIAS}")
            reordered.append(Node.of(-1 - len(reordered), proto))
        else:
            reordered.append(node)
    return _once_rounded(reordered), values


def _once_rounded(nodes: Sequence[Node]) -> list[Node]:
    """The nodes with Sigmoid and the Mul by its own input as one operator."""
    sigmoids = {node.outputs[0]: node for node in nodes if node.op == "Sigmoid"}
    replaced: dict[str, Node] = {}
    absorbed: set[str] = set()
    for node in nodes:
        for gate, sigmoid in sigmoids.items():
            if node.op == "Mul" and set(node.inputs) == {gate, sigmoid.inputs[0]}:
                proto = onnx.helper.make_node("Swish", [sigmoid.inputs[0]], [node.outputs[0]], node.name)
                replaced[node.name] = Node.of(node.index, proto)
                absorbed.add(sigmoid.name)
    return [replaced.get(node.name, node) for node in nodes if node.name not in absorbed]
