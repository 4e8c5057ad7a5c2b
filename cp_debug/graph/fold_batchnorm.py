"""BatchNormalization folded into the convolution in front of it, in an ONNX file, as engines do it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from onnx import numpy_helper

from cp_debug.graph.graph import Graph, Node
from cp_debug.graph.qdq import weight_axis
from cp_debug.graph.surgery import save


def foldable(graph: Graph) -> list[tuple[Node, Node]]:
    """Each Conv or ConvTranspose with the BatchNormalization that alone reads it; all their constants are weights."""
    pairs = []
    for norm in (node for node in graph.nodes if node.op == "BatchNormalization" and len(node.outputs) == 1):
        product = graph.producer.get(norm.inputs[0])
        if product is None or product.op not in ("Conv", "ConvTranspose") or len(graph.consumers[norm.inputs[0]]) > 1:
            continue
        groups = product.attribute("group", 1)
        constants = (*norm.proto.input[1:5], *product.proto.input[1:])
        single = all(len(graph.consumers[name]) == 1 for name in product.proto.input[1:])
        is_output = any(v.name == norm.inputs[0] for v in graph.outputs)
        plain = all(name in graph.initializers for name in constants) and (product.op == "Conv" or groups == 1)
        if plain and single and not is_output:
            pairs.append((product, norm))
    return pairs


def fold_batchnorm(graph: Graph, path: Path) -> Graph:
    """The graph with each such pair as one node, written to ``path``; the graph itself where it has none.

    The folded node has the BatchNormalization's output.
    """
    pairs = foldable(graph)
    if not pairs:
        return graph
    model = graph.copied()
    weights = {t.name: t for t in model.graph.initializer}
    by_output = {output: node for node in model.graph.node for output in node.output}
    for product, norm in pairs:
        gamma, beta, mean, variance = (graph.initializer(i).astype(np.float64) for i in norm.proto.input[1:5])
        epsilon = norm.attribute("epsilon", 1e-5)
        scale = gamma / np.sqrt(variance + epsilon)
        weight = graph.initializer(product.proto.input[1])
        folded = weight.astype(np.float64) * np.expand_dims(
            scale, [a for a in range(weight.ndim) if a != weight_axis(product, weight.ndim)]
        )
        bias = graph.initializer(product.proto.input[2]).astype(np.float64) if len(product.proto.input) > 2 else 0.0
        node, norm_node = by_output[product.outputs[0]], by_output[norm.outputs[0]]
        names = [node.input[1], node.input[2] if len(node.input) > 2 else f"{node.input[1]}.bias"]
        node.input[:] = [node.input[0], *names]
        node.output[0] = norm.outputs[0]
        for name, array in zip(names, (folded, (bias - mean) * scale + beta), strict=True):
            if name not in weights:
                weights[name] = model.graph.initializer.add()
            weights[name].CopyFrom(numpy_helper.from_array(array.astype(weight.dtype), name))
        model.graph.node.remove(norm_node)
    save(model, graph, path)
    return Graph(path, source=graph)
