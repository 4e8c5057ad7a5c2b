"""ONNX's own reference implementation, for the operators that have no torch kernel."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
from onnx import helper
from onnx.reference import ReferenceEvaluator
from torch import Tensor

from cp_debug.graph.graph import Graph, Node


class Reference:
    """Executes single nodes of a graph with numpy; functions that the file defines and nodes with bodies included."""

    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        self._evaluators: dict[tuple[Any, ...], ReferenceEvaluator] = {}

    def knows(self, node: Node) -> bool:
        """Whether ONNX's reference implementation can execute ``node``."""
        try:
            self._evaluator(node, {})
        except Exception:  # the reference raises many kinds for an operator that it does not know
            return False
        return True

    def run(self, node: Node, inputs: Mapping[str, Any]) -> list[Any]:
        """The outputs of ``node`` as numpy arrays or lists of them, for inputs by value name."""
        arrays = {n: v.detach().cpu().numpy() if isinstance(v, Tensor) else v for n, v in inputs.items()}
        outputs = dict(zip(node.outputs, self._evaluator(node, arrays).run(None, arrays), strict=True))
        return [outputs.get(name) for name in node.proto.output]

    def _evaluator(self, node: Node, inputs: Mapping[str, Any]) -> ReferenceEvaluator:
        types = {n: v.dtype for n, v in inputs.items() if isinstance(v, np.ndarray)}
        key = (node.index, *types.items())
        if key not in self._evaluators:
            body = helper.make_graph(
                [node.proto],
                node.name,
                [_declare(name, types.get(name)) for name in node.inputs],
                [onnx.ValueInfoProto(name=name) for name in node.outputs],
            )
            source = self._graph.proto
            model = helper.make_model(body, opset_imports=source.opset_import, functions=source.functions)
            self._evaluators[key] = ReferenceEvaluator(model)
        return self._evaluators[key]


def _declare(name: str, dtype: np.dtype | None) -> onnx.ValueInfoProto:
    # Without a type the reference finds the body of a type-dependent function when it runs.
    if dtype is None:
        return onnx.ValueInfoProto(name=name)
    return helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(dtype), None)
