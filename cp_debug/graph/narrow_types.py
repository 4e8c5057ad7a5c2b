"""Q/DQ nodes of FP8 and 4-bit types: opsets that have them, scales that mean something, one FP8 type in a graph."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from onnx import TensorProto

from cp_debug.errors import InputError
from cp_debug.graph.graph import QUANTIZING, Graph, Node
from cp_debug.graph.operators import QUANTIZERS

_FP8 = range(TensorProto.FLOAT8E4M3FN, TensorProto.FLOAT8E5M2FNUZ + 1)
_INT4 = TensorProto.INT4, TensorProto.UINT4
FIRST_OPSET = {**dict.fromkeys(_FP8, 19), **dict.fromkeys(_INT4, 21), TensorProto.FLOAT4E2M1: 23}
"""ONNX opset since which QuantizeLinear and DequantizeLinear take a type."""
FAMILIES = {**dict.fromkeys(_FP8, "fp8"), **dict.fromkeys(_INT4, "int4"), TensorProto.FLOAT4E2M1: "fp4"}
"""ONNX data type of levels → the narrow format that it is of."""
BITS = "cpdebug.bits"
"""Metadata of a DequantizeLinear whose codes were made for fewer bits than their type has."""
_name = TensorProto.DataType.Name


def check_narrow_types(graph: Graph) -> None:
    """Raise InputError for what no runtime can compute as it is meant.

    That is: Q/DQ nodes of a type that the graph's opset lacks, with a scale that is 0, negative, Inf or NaN, or of two
    FP8 types in one graph. Q/DQ nodes of 8 and 16 bits integers are left alone.
    """
    seen: dict[int, Node] = {}
    opset = graph.opsets.get("", 0)
    for node, kind in quantizers(graph):
        place = f"{graph}: node {node.name!r} ({node.op})"
        if node.proto.domain in ("", "ai.onnx") and opset < FIRST_OPSET[kind]:
            raise InputError(f"{place}: {_name(kind)} needs opset {FIRST_OPSET[kind]}; the file has opset {opset}")
        scale = node.proto.input[1]
        if scale in graph.initializers:
            values = graph.initializer(scale).astype(np.float64)
            if not (np.isfinite(values) & (values > 0)).all():
                wrong = values[~(np.isfinite(values) & (values > 0))].flat[0]
                raise InputError(f"{place}: scale {scale!r} holds {wrong:g}; expected finite numbers above 0")
        if kind in _FP8:
            seen.setdefault(kind, node)
    if len(seen) > 1:
        (one, first), (other, second), *_ = seen.items()
        raise InputError(
            f"{graph}: node {first.name!r} quantizes to {_name(one)} and {second.name!r} to {_name(other)}; expected "
            "one FP8 type in a graph"
        )


def narrow_kinds(graph: Graph) -> set[str]:
    """Kinds of the narrow types of a graph's Q/DQ nodes: ``FP8`` (E4M3), ``INT4``, ``FP4``; others by ONNX's name.

    Raises InputError as ``check_narrow_types`` does.
    """
    check_narrow_types(graph)
    kinds = {TensorProto.FLOAT8E4M3FN: "FP8", TensorProto.FLOAT4E2M1: "FP4"}
    return {kinds.get(kind, _name(kind)) for _, kind in quantizers(graph)}


def without_int8(graph: Graph) -> str | None:
    """Words for what a graph quantizes to where none of it is INT8 (``INT4``, ``levels of 4 bits``); else None."""
    return ", ".join(sorted(_narrow_levels(graph))) or None


def narrow_precision(graph: Graph) -> str | None:
    """The coarsest precision that a graph quantizes to where none of it is INT8: fp8, int4 or mxfp4; else None."""
    found = _narrow_levels(graph).values()
    return next((precision for precision in ("mxfp4", "int4", "fp8") if precision in found), None)


def _narrow_levels(graph: Graph) -> dict[str, str]:
    """Words for each kind of levels → the precision that it stands for; empty where any are INT8."""
    levels = {node.name: (_name(kind), FAMILIES[kind].replace("fp4", "mxfp4")) for node, kind in quantizers(graph)}
    for node in graph.nodes:
        if node.op.rpartition(".")[2] in ("MatMulNBits", "GatherBlockQuantized"):
            bits = node.attribute("bits", 4)
            if bits < 8:
                levels[node.name] = f"levels of {bits} bits", "int4"
    quantizing = [node for node in graph.nodes if any(mark in node.op for mark in QUANTIZING)]
    return dict(levels.values()) if all(node.name in levels for node in quantizing) else {}


def stated_bits(node: Node) -> int | None:
    """Bits that a DequantizeLinear's codes were made for, where it says so."""
    said = next((entry.value for entry in node.proto.metadata_props if entry.key == BITS), "")
    return int(said) if said.isdecimal() and 0 < int(said) <= 16 else None


def order_behind(graph: Graph, dequantizer: Node) -> tuple[Node, np.ndarray] | None:
    """The Gather that puts slices of a dequantized weight in order, and its int64 indices [slices]; else None."""
    readers = graph.consumers.get(dequantizer.outputs[0], [])
    if len(readers) != 1 or readers[0].op != "Gather" or readers[0].proto.input[0] != dequantizer.outputs[0]:
        return None
    name = readers[0].proto.input[1]
    order = graph.initializer(name) if name in graph.initializers else None
    return (readers[0], order) if order is not None and order.ndim == 1 and order.size else None


def quantizers(graph: Graph) -> Iterator[tuple[Node, int]]:
    """Q/DQ nodes of FP8 and 4-bit types with the element type of their quantized side, as far as the file tells it."""
    constants = {t.name: t.data_type for t in graph.proto.graph.initializer}
    for node in graph.nodes:
        if node.op.rpartition(".")[2] not in QUANTIZERS:
            continue
        inputs = node.proto.input
        names = [inputs[0]] if "Dequantize" in node.op else [*node.proto.output[:1], *inputs[2:3]]
        names += inputs[2:3]
        types = [graph.types[n].tensor_type.elem_type for n in names if n in graph.types]
        types += [constants[n] for n in names if n in constants]
        types += [a.i for a in node.proto.attribute if a.name == "output_dtype"]
        if kind := next((t for t in types if t in FIRST_OPSET), None):
            yield node, kind
