"""Layers that keep their precision as a whole, an operator and what is fused into it, and what follows them in FP32."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from cp_debug.backends.base import Backend, Program
from cp_debug.backends.narrow_options import is_narrow
from cp_debug.errors import InputError
from cp_debug.graph.graph import Graph, Node, data_values
from cp_debug.graph.half_precision import computed_low
from cp_debug.graph.operators import ACTIVATIONS, ALL_MOVERS, BODIES, CONTRACTIONS, PRODUCTS, QUANTIZERS
from cp_debug.graph.qdq import quantized_inputs
from cp_debug.programs.layers import layer_name

_JOINING = ACTIVATIONS | {"Add", "BatchNormalization", "Div", "Mul", "Sub"}
"""Operators that join the layer before them, where they read nothing else but constants."""


@dataclass(frozen=True)
class FusionGroup:
    """Nodes of one component that keep their precision together."""

    component: str
    nodes: tuple[str, ...]
    name: str = field(metadata={"key": "layer"})
    """Torch path of its first value, or the node's name."""
    engine_layer: str = field(default="", metadata={"key": "group"})
    """Name of the engine's layer, where the backend tells."""

    def share(self, of_nodes: Mapping[tuple[str, str], float]) -> float:
        """Its share, from those of nodes by (component, node)."""
        return sum(of_nodes.get((self.component, node), 0.0) for node in self.nodes)


Kept = frozenset[FusionGroup]


def nodes_of(groups: Iterable[FusionGroup], component: str) -> frozenset[str]:
    """The nodes of a component that a set of groups holds."""
    return frozenset(node for group in groups if group.component == component for node in group.nodes)


def fusion_groups_of(program: Program, candidates: Collection[str]) -> list[FusionGroup]:
    """The ``candidates`` (nodes by name) of a program in groups, in execution order.

    An activation, a normalization or arithmetic with constants joins the layer that it alone reads from.
    """
    graph = program.graph
    groups: dict[int, list[Node]] = {}
    home: dict[str, int] = {}
    for node in graph.nodes:
        if node.name not in candidates:
            continue
        before = _joined(graph, node)
        place = home.get(before.name, node.index) if before is not None else node.index
        groups.setdefault(place, []).append(node)
        home[node.name] = place
    return [_group(program, nodes) for nodes in groups.values()]


def _group(program: Program, nodes: Sequence[Node], engine_layer: str = "") -> FusionGroup:
    name = layer_name(program, nodes[0].outputs[0])
    return FusionGroup(program.name, tuple(node.name for node in nodes), name, engine_layer)


def fused(
    groups: Sequence[FusionGroup], programs: Iterable[Program], layers: Mapping[str, Sequence[Mapping]]
) -> list[FusionGroup]:
    """The groups regrouped as an engine fused them. ``layers``: component → ``name`` and ``nodes`` of its layers.

    An engine layer of several convolutions or products (TensorRT's compiler for transformers makes such) says nothing
    of them, and nodes that no layer holds stay as they are.
    """
    regrouped: list[FusionGroup] = []
    for program in programs:
        own = [group for group in groups if group.component == program.name]
        left = nodes_of(own, program.name)
        parts: list[tuple[list[Node], str]] = []
        for layer in layers.get(program.name, ()):
            inside = [node for node in program.graph.nodes if node.name in left.intersection(layer["nodes"])]
            if sum(node.op in PRODUCTS for node in inside) <= 1:
                parts.append((inside, layer["name"]))
                left -= {node.name for node in inside}
        for group in own:
            rest = [n for n in program.graph.nodes if n.name in left.intersection(group.nodes)]
            parts.append((rest, group.engine_layer))
        parts = sorted((part for part in parts if part[0]), key=lambda part: part[0][0].index)
        regrouped += [_group(program, nodes, engine_layer) for nodes, engine_layer in parts]
    return regrouped


def _joined(graph: Graph, node: Node) -> Node | None:
    """The node to which this one belongs; None where it begins a layer."""
    data = [name for name in node.inputs if name in graph.producer and graph.producer[name].op != "Constant"]
    if node.op not in _JOINING or len(data) != 1 or any(v.name in node.inputs for v in graph.inputs):
        return None
    (value,) = data
    alone = len(graph.consumers[value]) == 1 and all(v.name != value for v in graph.outputs)
    return graph.producer[value] if alone else None


CASTS = {"fp16": "fp16", "fp16acc": "fp16", "bf16": "bf16"}
"""Arithmetics that casts put into a graph → their name for cast surgery, TensorRT's flags and AutoCast."""


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
        low = computed_low(graph, CASTS[self.name])
        # Beside them, what depends on no input: the angles of a rotation are rounded, too.
        nodes += [n for n in graph.nodes if data.isdisjoint(n.outputs) and n.op not in {*BODIES, *QUANTIZERS}]
        return frozenset(n.name for n in nodes if n.name in low and n.op not in ALL_MOVERS)

    def high(self, graph: Graph, kept_nodes: Collection[str]) -> frozenset[str]:
        """The nodes in FP32 when those of ``kept`` are: operators that only move numbers follow them."""
        if self.name not in CASTS:
            return frozenset(kept_nodes)
        everything = frozenset(node.name for node in graph.nodes)
        return everything - computed_low(graph, CASTS[self.name], kept_nodes)

    def keep(self, graph: Graph, kept_nodes: Collection[str]) -> frozenset[str]:
        """The nodes that a backend must be told to keep: ``kept``, operators that move numbers between them, and casts
        from other types in front of them, which would round what they are to read."""
        if self.name not in CASTS or not kept_nodes:
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
    if family == "emu" and (backend.precision in ("tf32", *CASTS) or is_narrow(backend.precision)):
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
