"""Operators without a kernel, computed as ONNX defines them: by its schemas' functions, or by its reference.

Attention, RotaryEmbedding, NegativeLogLikelihoodLoss, AffineGrid and others are computed by their own definition, node
by node, so that every arithmetic rounds where an unfused implementation would.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import torch
from onnx import helper
from onnx.reference import ReferenceEvaluator
from torch import Tensor

from cp_debug.backends.kernels.shaping import DTYPES
from cp_debug.graph.bodies import Body
from cp_debug.graph.graph import Graph, Node

_TYPES = {dtype: kind for kind, dtype in DTYPES.items()}


def is_defined(node: Node, opsets: Mapping[str, int]) -> bool:
    """Whether ONNX defines the node's operator by other operators, for some inputs at least."""
    schema = node.schema(opsets)
    return schema is not None and (schema.has_function or schema.has_context_dependent_function)


def function_body(node: Node, opsets: Mapping[str, int], inputs: Sequence[Any], held: torch.dtype) -> Body | None:
    """The body of a node's operator for inputs of these types (None for an absent one).

    None where ONNX gives no body, or none for these. ``held``: the dtype that stands for FLOAT.
    """
    proto = node.proto
    version = opsets.get("" if proto.domain == "ai.onnx" else proto.domain, 1)
    schema = node.schema(opsets)
    if schema is None:
        return None
    if schema.has_function:
        body = _latest(schema.function_opset_versions, version, schema.get_function_with_opset_version)
    elif schema.has_context_dependent_function:
        types = [_type(value, held).SerializeToString() for value in inputs]

        def build(opset: int) -> bytes:
            return schema.get_context_dependent_function_with_opset_version(opset, proto.SerializeToString(), types)

        body = _latest(schema.context_dependent_function_opset_versions, version, build)
    else:
        return None
    if not body:
        return None
    function = onnx.FunctionProto()
    function.ParseFromString(body)
    defaults = [a.default_value for a in schema.attributes.values() if a.default_value.type]
    present_attributes = {a.name for a in function.attribute_proto}
    function.attribute_proto.extend(a for a in defaults if a.name not in present_attributes)
    if not any(o.domain in ("", "ai.onnx") for o in function.opset_import):
        function.opset_import.add(domain="", version=opsets.get("", version))
    return Body.of_function(function, node)


def _latest(versions: Sequence[int], opset: int, build: Any) -> bytes | None:
    fitting = [v for v in versions if v <= opset]
    return build(max(fitting)) if fitting else None


def _type(value: Any, held: torch.dtype) -> onnx.TypeProto:
    if isinstance(value, Tensor):
        kind = onnx.TensorProto.FLOAT if value.dtype == held else _TYPES.get(value.dtype, 0)
        return helper.make_tensor_type_proto(kind, [None] * value.dim())
    if isinstance(value, np.ndarray):
        return helper.make_tensor_type_proto(helper.np_dtype_to_tensor_dtype(value.dtype), [None] * value.ndim)
    return onnx.TypeProto()


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
