"""Precision of a trial: which nodes are low, and which go on in FP32 when some layers are kept."""

from __future__ import annotations

from collections.abc import Collection

from cp_debug.backends.base import Backend
from cp_debug.backends.narrow_options import is_narrow
from cp_debug.errors import InputError
from cp_debug.graph.casts import computed_low
from cp_debug.graph.graph import Graph, data_values
from cp_debug.graph.operators import ALL_MOVERS, BODIES, CONTRACTIONS
from cp_debug.graph.qdq import quantized_inputs

_CASTS = {"fp16": "fp16", "fp16acc": "fp16", "bf16": "bf16"}
"""Arithmetics that cast surgery puts into a graph → its name for them."""


class TrialPrecision:
    """Precision of a trial by the name of its arithmetic: which nodes are low, and which go on in FP32."""

    def __init__(self, name: str) -> None:
        self.name = name

    def candidates(self, graph: Graph) -> frozenset[str]:
        """The nodes whose precision makes a difference."""
        if self.name == "int8":
            return frozenset(quantized_inputs(graph))
        data = set(data_values(graph))
        nodes = [n for n in graph.nodes if not data.isdisjoint(n.outputs) and n.op not in BODIES]
        if self.name.partition(":")[0] == "int4":  # weights alone
            return frozenset(n.name for n in nodes if n.op in ("MatMul", "Gemm") and n.proto.input[1] not in data)
        if self.name == "tf32" or is_narrow(self.name):
            return frozenset(n.name for n in nodes if n.op in CONTRACTIONS)
        low = computed_low(graph, _CASTS[self.name])
        return frozenset(n.name for n in nodes if n.name in low and n.op not in ALL_MOVERS)

    def high(self, graph: Graph, kept_nodes: Collection[str]) -> frozenset[str]:
        """The nodes in FP32 when those of ``kept`` are: operators that only move numbers follow them."""
        if self.name not in _CASTS:
            return frozenset(kept_nodes)
        everything = frozenset(node.name for node in graph.nodes)
        return everything - computed_low(graph, _CASTS[self.name], kept_nodes)

    def keep(self, graph: Graph, kept_nodes: Collection[str]) -> frozenset[str]:
        """The nodes that a backend must be told to keep: ``kept``, operators that move numbers between them, and casts
        from other types in front of them, which would round what they are to read."""
        if self.name not in _CASTS or not kept_nodes:
            return frozenset(kept_nodes)
        followers = self.high(graph, kept_nodes) - self.high(graph, ())
        high = frozenset(kept_nodes) | {n.name for n in graph.nodes if n.name in followers and n.op in ALL_MOVERS}
        read = {name for node in graph.nodes if node.name in high for name in node.inputs}
        return high | {n.name for n in graph.nodes if n.op == "Cast" and not read.isdisjoint(n.outputs)}


def precision_of(backend: Backend, quantized: bool) -> TrialPrecision:
    """The precision of a test backend from which layers can be kept. ``quantized``: its graphs have Q/DQ nodes.

    Raises InputError for a backend whose layers cannot be told apart, or that has nothing but FP32.
    """
    name, family = str(backend.spec), backend.spec.family
    if family != "torch" and (backend.precision == "int8" or (quantized and family == "ort")):
        return TrialPrecision("int8")
    if family == "emu" and (backend.precision in ("tf32", *_CASTS) or is_narrow(backend.precision)):
        return TrialPrecision(backend.precision)
    if family == "trt" and backend.precision in ("fp16", "bf16") and backend.spec.variant != "best":
        return TrialPrecision("fp16acc" if backend.precision == "fp16" else "bf16")
    if backend.spec.name == "ort-fp16":
        return TrialPrecision("fp16")
    why = {
        "tf32": "TF32 is on or off for a whole engine or session; emu-tf32 shows which layers it hurts",
        "fp32": "it computes in FP32 already",
        "fp64": "it computes in FP64",
    }.get(backend.precision, "its layers cannot be kept one by one; try emu-fp16acc, emu-int8 or trt-fp16")
    raise InputError(f"--backends: {name}: {why}")
