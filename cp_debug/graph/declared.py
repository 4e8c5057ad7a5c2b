"""The precision that a graph declares, value by value: files in FP16 or BF16, and files that mix them with FP32."""

from __future__ import annotations

from onnx import TensorProto

from cp_debug.graph.graph import Graph
from cp_debug.graph.integer_values import level_kind

_NARROW = {TensorProto.FLOAT16: "fp16", TensorProto.BFLOAT16: "bf16"}


def narrow_values(graph: Graph) -> dict[str, str]:
    """Inputs and computed values that the graph holds in less than FP32, and in what: ``fp16`` or ``bf16``.

    Where neither the file nor ONNX's shape inference knows a type (operators of other domains), a value has that of
    the first known float that its node reads. A file that computes nothing in less than FP32, but only casts values
    there and back, declares nothing: that is where a value lost its digits.
    """
    if not _NARROW.keys() & graph.element_types:
        return {}
    types = {name: kind.tensor_type.elem_type for name, kind in graph.types.items() if kind.HasField("tensor_type")}
    types |= {name: graph.weight(name).data_type for name in graph.initializers}
    floats = {*_NARROW, TensorProto.FLOAT, TensorProto.DOUBLE}
    for node in graph.nodes:
        unknown = [name for name in node.outputs if not types.get(name)]
        if unknown and (input_type := next((types[i] for i in node.inputs if types.get(i) in floats), None)):
            types |= dict.fromkeys(unknown, input_type)

    def is_narrow(name: str) -> bool:
        return types.get(name) in _NARROW

    ends = {v.name for v in (*graph.inputs, *graph.outputs)}
    computing = (n for n in graph.nodes if n.op not in ("Cast", "CastLike", "Constant"))
    if not any(map(is_narrow, ends)) and not any(is_narrow(v) for n in computing for v in (*n.inputs, *n.outputs)):
        return {}
    names = [*(v.name for v in graph.inputs), *graph.values]
    return {name: _NARROW[types[name]] for name in names if types.get(name) in _NARROW}


def declared_precisions(graph: Graph) -> list[str]:
    """Types that the nodes of a graph compute in, where some are narrower than FP32; else none.

    ``int8`` or ``int16`` for a quantized network. Casts compute nothing: a file that is FP16 between FP32 inputs and
    outputs computes in ``fp16`` alone.
    """
    if graph.precision == "int8":
        return [level_kind(graph)]
    narrow = narrow_values(graph)
    if not narrow:
        return []
    computed = [o for n in graph.nodes if n.op not in ("Cast", "CastLike", "Constant") for o in n.outputs]
    wide = (
        name not in narrow and graph.types[name].tensor_type.elem_type == TensorProto.FLOAT
        for name in computed
        if name in graph.types
    )
    return sorted({*narrow.values(), *(["fp32"] if any(wide) else [])})
