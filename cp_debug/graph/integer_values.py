"""Values that a quantized graph holds as levels: the scale and zero point behind them, and whose value they are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from onnx import TensorProto

from cp_debug.graph.graph import Graph, Node, readers
from cp_debug.graph.onnx_tensors import FLOATS
from cp_debug.graph.operators import ALL_MOVERS

_CUT_OFF = {"Relu", "Clip"}
"""Activations that quantizers leave out, because the range of the result does the same."""
_OF_LEVELS = {
    *("Add", "Sub", "Mul", "Div", "Sum", "Max", "Min", "Abs", "Neg", "Mod", "Where", "TopK", "Tile", "ScatterND"),
    *("ReduceMax", "ReduceMin", "ReduceSum", "ReduceMean", "CumSum", "GatherND", "GatherElements", *_CUT_OFF),
}
"""Operators whose results are levels, or sums and products of levels, where they read some."""
_KEEP_LEVELS = (ALL_MOVERS - _OF_LEVELS) | {"MaxPool", "Resize", "com.microsoft.NhwcMaxPool"}
_INTEGERS = {
    *(TensorProto.INT8, TensorProto.UINT8, TensorProto.INT16, TensorProto.UINT16, TensorProto.INT32),
    *(TensorProto.UINT32, TensorProto.INT4, TensorProto.UINT4),
}
WHOLE = frozenset({*_INTEGERS, TensorProto.INT64, TensorProto.UINT64, TensorProto.BOOL})
"""ONNX data types of whole numbers: integers of all sizes, and bool."""
INTEGER_PRODUCTS = ("ConvInteger", "MatMulInteger")
"""ONNX's own products of levels, whose sums stay integers."""
_RESULT_SCALE = {
    "QuantizeLinear": 1,
    "QLinearConcat": 0,
    "QGemm": 7,
    **dict.fromkeys(("QLinearAdd", "QLinearConv", "QLinearMatMul", "QLinearMul"), 6),
}
"""Operator → place of the scale of its result, in front of the zero point; 3 for other QLinear operators."""
_SUFFIXES = ("_quantized", "_QuantizeLinear_Output", "_DequantizeLinear_Output")


def level_kind(graph: Graph) -> str:
    """``int16`` for a quantized network all of whose quantizers round to 16 bits, else ``int8``."""
    zeros = [n.proto.input[2] for n in graph.nodes if n.op == "QuantizeLinear" and len(n.proto.input) > 2]
    kinds = {graph.weight(name).data_type if name in graph.initializers else 0 for name in zeros}
    return "int16" if kinds and kinds <= {TensorProto.INT16, TensorProto.UINT16} else "int8"


def rounded_values(graph: Graph) -> set[str]:
    """Values that ONNX Runtime rounds to levels: outputs of operators that round, or that compute with levels.

    A bias that the file left in FP32 is rounded, too, to the scale of data × scale of weights.
    """
    marks = ("QLinear", "QGemm", "DynamicQuantize", "QuantizeLinear")
    dequantized = {name for node in graph.nodes if node.op == "DequantizeLinear" for name in node.outputs}
    rounded: set[str] = set()
    for node in graph.nodes:
        moves = node.op in _KEEP_LEVELS | _CUT_OFF
        if any(mark in node.op for mark in marks) or not (moves or dequantized.isdisjoint(node.inputs)):
            rounded.update(node.outputs)
    return rounded


def level_values(graph: Graph) -> set[str]:
    """Values in which a graph holds levels, or sums and products of levels: what quantizers and integer kernels give,
    and what moves it, adds it up or stores it in another integer type. They are rounded, other integers are not.
    """
    made = ("QLinear", "QGemm", "QAttention", "DynamicQuantize", "ConvInteger", "MatMulInteger")
    levels: set[str] = set()
    for node in graph.nodes:
        op = node.op.rpartition(".")[2]
        if op == "QuantizeLinear" or op.startswith(made):
            levels.update(node.outputs)
        elif not levels.isdisjoint(node.inputs) and (op in _OF_LEVELS or node.op in _KEEP_LEVELS):
            levels.update(node.outputs[:1] if op == "TopK" else node.outputs)
        elif op == "Cast" and not levels.isdisjoint(node.inputs):
            to = node.attribute("to", TensorProto.UNDEFINED)
            levels.update(node.outputs if to in WHOLE - {TensorProto.BOOL} else ())
    return levels


def produced_grid(graph: Graph, value: str) -> list[str]:
    """Names of the scale and, if there is one, the zero point of levels that a node computes; empty without levels."""
    asked = value
    for _ in range(len(graph.nodes)):
        node = graph.producer.get(value)
        if node is None:  # chosen from constant levels: who makes floats of them knows their scale
            return _read_as(graph, asked) if value != asked else []
        op = node.op.removeprefix("com.microsoft.")
        if op in _RESULT_SCALE or op.startswith("QLinear"):
            place = _RESULT_SCALE.get(op, 3)
            return [*filter(None, node.proto.input[place : place + 2])]
        if node.op not in _KEEP_LEVELS:
            return []
        value = node.proto.input[0]
    return []


def _read_as(graph: Graph, levels: str) -> list[str]:
    """The scale by which whoever makes floats of these levels, or computes with them, does so."""
    keeps = lambda node, name: node.op in _KEEP_LEVELS and node.proto.input[0] == name  # noqa: E731
    for node, name in readers(graph, levels, keeps):
        inputs, op = [*node.proto.input, "", ""], node.op.removeprefix("com.microsoft.")
        place = inputs.index(name) if name in inputs else 0
        if op == "DequantizeLinear" or op.startswith(("QLinear", "QGemm")):
            return [*filter(None, inputs[place + 1 : place + 3])]  # they stand behind the levels
        if (product := scaled_product(graph, node)) is not None:
            return [*filter(None, (product.scales[place], inputs[place + 2]))]
        if op == "MatMulIntegerToFloat":
            return [*filter(None, inputs[place + 2 : place + 5 : 2])]
    return []


class ScaledProduct(NamedTuple):
    """Names of the scales of both operands of an integer product, and the nodes behind it that multiply by them."""

    scales: tuple[str, str]
    nodes: tuple[Node, ...]


def scaled_product(graph: Graph, product: Node) -> ScaledProduct | None:
    """The scales of a ConvInteger or MatMulInteger: it has none, but the Mul behind it multiplies by theirs.

    In the order of ONNX Runtime's quantizers, that of the operands (onnxruntime/quantization/operators/conv.py,
    matmul.py). None where the Mul reads a product of the two that was folded to a constant, or something else.
    """
    value, nodes = product.outputs[0], list[Node]()
    while product.op in INTEGER_PRODUCTS and len(readers := graph.consumers.get(value, [])) == 1:
        (reader,) = readers
        nodes.append(reader)
        if reader.op == "Mul":
            (factor,) = [name for name in reader.proto.input if name != value] or [""]
            maker = graph.producer.get(factor)
            if maker is None or maker.op != "Mul":
                return None
            return ScaledProduct((maker.proto.input[0], maker.proto.input[1]), tuple(nodes))
        if reader.op not in ("Cast", *_KEEP_LEVELS):
            return None
        value = reader.outputs[0]
    return None


def unscaled_levels(plain: Graph, graph: Graph, names: Mapping[str, str]) -> set[str]:
    """Values of a quantized ``graph`` that are integers where its float parent ``plain`` has floats, while no constant
    tells the scale: as floats they are nothing.

    ``names``: value of ``graph`` → the parent's. A value whose type is not known is none of them.
    """
    return {
        value
        for value, name in names.items()
        if graph.element_type(value) in _INTEGERS
        and plain.element_type(name) in FLOATS
        and not any(is_constant(graph, name) for name in produced_grid(graph, value)[:1])
    }


def parent_values(plain: Graph, graph: Graph, names: Mapping[str, str]) -> dict[str, str]:
    """Value of a quantized ``graph`` → value of its float parent ``plain`` that it stands for, beyond ``names``.

    ``names``: the pairs known so far, in the same direction. Quantizers call levels after the value that they hold;
    where they left out an activation, because the range cuts off what it would, the levels are those of its result.
    """
    used = set(names.values())
    parents: dict[str, str] = {}
    for value in graph.values:
        if names.get(value) in plain.producer:
            continue
        if value in plain.producer and value not in used:  # another operator makes it, out of levels
            parents[value] = value
            used.add(value)
            continue
        node = graph.producer[value]
        base = next((value.removesuffix(s) for s in _SUFFIXES if value.endswith(s)), None)
        if base is None or not (produced_grid(graph, value) or node.op == "DequantizeLinear"):
            continue
        source = names.get(base, base)
        if source not in plain.producer:
            continue
        source = _behind_activation(plain, graph, source)
        if source not in used:
            parents[value] = source
            used.add(source)
    return parents


def named_levels(plain: Graph, graph: Graph) -> dict[str, str]:
    """Results of QLinearConv and QLinearMatMul → values of the float parent ``plain`` that they are called after.

    Branches that are alike are told apart by nothing else. Empty unless the parent has a Conv or a MatMul for each.
    """
    held: dict[str, str] = {}
    for node in graph.nodes:
        if node.op in ("QLinearConv", "QLinearMatMul"):
            value, base = node.outputs[0], node.outputs[0].removesuffix(_SUFFIXES[0])
            maker = plain.producer.get(base)
            while maker is not None and maker.op in _CUT_OFF:
                maker = plain.producer.get(maker.inputs[0])
            if base == value or base in graph.producer or maker is None or f"QLinear{maker.op}" != node.op:
                return {}
            held[value] = _behind_activation(plain, graph, base)
    return held


def _behind_activation(plain: Graph, graph: Graph, value: str) -> str:
    """The parent's value behind activations that the quantized ``graph`` leaves to the range."""
    readers = plain.consumers.get(value, [])
    while len(readers) == 1 and readers[0].op in _CUT_OFF:
        remaining = graph.producer.get(readers[0].outputs[0])
        if remaining is not None and remaining.op != "DequantizeLinear":
            break
        value = readers[0].outputs[0]
        readers = plain.consumers.get(value, [])
    return value


def is_constant(graph: Graph, name: str) -> bool:
    """Whether a name is a weight or the result of a Constant node."""
    return name in graph.initializers or (name in graph.producer and graph.producer[name].op == "Constant")


def constant_type(graph: Graph, name: str) -> int | None:
    """The ONNX data type (``TensorProto.DataType``) of a constant; None for a value that is computed."""
    return None if (tensor := graph.constant(name)) is None else int(tensor.data_type)
