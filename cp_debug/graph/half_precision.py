"""FP16 and BF16 in ONNX graphs: what files declare, value by value, and casts put into FP32 graphs.

Casts stand as strongly typed TensorRT and ONNX Runtime's CUDA provider want them. Every node computes in the low
precision unless it is told to stay FP32 or its ONNX definition wants FP32. Values keep their names, whatever their
type; graph inputs and outputs stay FP32; a value is cast at most once in each direction.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
from onnx import TensorProto, helper

from cp_debug.errors import InputError
from cp_debug.graph.constants import constant
from cp_debug.graph.graph import Graph, Node, refill
from cp_debug.graph.integer_values import level_kind
from cp_debug.graph.operators import ALL_MOVERS, BODIES
from cp_debug.graph.surgery import save, unused_names

_TYPES = {
    "fp16": (TensorProto.FLOAT16, np.dtype(np.float16)),
    "bf16": (TensorProto.BFLOAT16, np.dtype(ml_dtypes.bfloat16)),
}

_STAY = {
    *BODIES,
    *("Bernoulli", "Cast", "CastLike", "ConcatFromSequence", "Constant", "ConstantOfShape", "DequantizeLinear"),
    *("DynamicQuantizeLinear", "EyeLike", "Multinomial", "Optional", "QuantizeLinear", "RandomNormal"),
    *("RandomNormalLike", "RandomUniform", "RandomUniformLike", "SequenceAt", "SequenceConstruct", "SequenceEmpty"),
    *("SequenceInsert", "SplitToSequence"),
}
"""Operators whose output type comes from an attribute or another input, or that hold subgraphs or sequences."""


def cast_surgery(graph: Graph, dtype: str, keep_fp32: Collection[str], target: Path) -> Path:
    """Write ``graph`` in ``dtype`` (``fp16`` or ``bf16``) as ``target`` and return it.

    ``keep_fp32`` names nodes that go on computing in FP32. Metadata, node names and every value's name are kept; a
    graph output computed in low precision is cast under its own name. Raises InputError for a name that is no node, and
    for a weight beyond the range of ``dtype``.
    """
    if unknown := sorted(set(keep_fp32) - {node.name for node in graph.nodes}):
        raise InputError(f"{graph}: no node {unknown[0]!r} to keep in FP32")
    save(_CastSurgery(graph, dtype, frozenset(keep_fp32)).model(), graph, target)
    return target


def computed_low(graph: Graph, dtype: str, keep_fp32: Collection[str] = ()) -> frozenset[str]:
    """The nodes that compute in the low precision in the graph that ``cast_surgery`` writes."""
    chosen = _CastSurgery(graph, dtype, frozenset(keep_fp32)).low_nodes
    return frozenset(graph.nodes[index].name for index in chosen)


@dataclass
class _CastSurgery:
    """One rewriting of ``graph`` into ``dtype``: decides node by node, then writes nodes, casts and weights."""

    graph: Graph
    dtype: str
    keep: frozenset[str]
    low_values: set[str] = field(default_factory=set)
    """Values that are computed in the low precision."""
    casts: dict[tuple[str, bool], str] = field(default_factory=dict)
    """(Value, to low) → name of the value's cast."""

    def __post_init__(self) -> None:
        self.elem_type, self.numpy_type = _TYPES[self.dtype]
        graph = self.graph
        names = (*graph.types, *graph.initializers)
        self.floats = {name for name in names if graph.element_type(name) == TensorProto.FLOAT}
        constants = {node.outputs[0] for node in graph.nodes if node.op == "Constant"}
        self.weights = self.floats.intersection((*graph.initializers, *constants))
        captured = {name for node in graph.nodes for name in set(node.inputs) - set(node.proto.input)}
        self.pinned = {v.name for v in graph.outputs} | captured
        """Values that must be FP32 under their own names."""
        self.read_low, self.read_high = set[str](), self.pinned & self.weights
        """Weights that nodes read in each precision."""
        self._fresh = unused_names(graph)
        self.low_nodes = {node.index for node in graph.nodes if self._decide(node)}

    def model(self) -> onnx.ModelProto:
        """The rewritten model; weights that are read in low precision only are converted in place."""
        model = self.graph.copied()
        self.low_values |= self.read_low - self.read_high
        self.pinned -= self.weights
        refill(model.graph.node, (proto for node in self.graph.nodes for proto in self._rewrite(node)))
        self._convert_weights(model)
        for info in model.graph.value_info:
            if info.name in self.low_values and info.name not in self.pinned:
                info.type.tensor_type.elem_type = self.elem_type
        return model

    def _decide(self, node: Node) -> bool:
        """Whether the node computes in the low precision; notes what it wants of its weights and puts out."""
        slots = list(_slots(node, self.graph.opsets))
        reads = [(name, can) for name, can, output in slots if not output and name in self.floats]
        writes = [(name, can) for name, can, output in slots if output and name in self.floats]
        low = node.name not in self.keep and node.op not in _STAY and all(can for _, can in writes)
        if node.op in ALL_MOVERS or not writes:  # between FP32 neighbours casts would round for nothing
            sources = [name for name, _ in reads if name not in self.weights]
            low = low and bool(sources) and all(name in self.low_values for name in sources)
        for name, can in reads:
            if name in self.weights:
                (self.read_low if low and can else self.read_high).add(name)
        if low:
            self.low_values.update(name for name, _ in writes)
        return low

    def _rewrite(self, node: Node) -> Iterator[onnx.NodeProto]:
        """The node with its inputs and outputs in place, the casts that it needs around it."""
        proto = node.changed().proto
        low = node.index in self.low_nodes
        reads = [slot for slot in _slots(node, self.graph.opsets) if not slot[2]]
        for i, (name, can, _) in enumerate(reads):
            if name in self.floats:
                proto.input[i], cast = self._read(name, low and can)
                if cast:
                    yield cast
        if node.op == "Constant" and node.outputs[0] in self.low_values:
            narrow = self._narrow(node.outputs[0], constant(node))
            refill(proto.attribute, [helper.make_attribute("value", narrow)])
        yield proto
        for i, name in enumerate(node.proto.output):
            if low and name in self.low_values and name in self.pinned:
                proto.output[i] = self.casts[name, True] = self._fresh(f"{name}__{self.dtype}")
                yield self._cast(proto.output[i], name, TensorProto.FLOAT)

    def _read(self, name: str, low: bool) -> tuple[str, onnx.NodeProto | None]:
        """The name under which a value is read in the wanted precision, and the cast that makes it, if it is new."""
        stored_low = name in self.low_values and name not in self.pinned
        if stored_low == low:
            return name, None
        if (name, low) in self.casts:
            return self.casts[name, low], None
        alias = self.casts[name, low] = self._fresh(f"{name}__{self.dtype if low else 'fp32'}")
        if name in self.graph.initializers:
            return alias, None  # a second copy of the weight, see _convert_weights
        return alias, self._cast(name, alias, self.elem_type if low else TensorProto.FLOAT)

    def _cast(self, source: str, target: str, to: int) -> onnx.NodeProto:
        return helper.make_node("Cast", [source], [target], name=self._fresh(f"{target}_Cast"), to=to)

    def _convert_weights(self, model: onnx.ModelProto) -> None:
        """Convert weights that are only read in low precision; add a converted copy where both are read."""
        weights = list(model.graph.initializer)
        for weight in weights:
            alias = self.casts.get((weight.name, True))
            if weight.name in self.low_values:
                weight.CopyFrom(self._narrow(weight.name, self.graph.initializer(weight.name)))
            elif alias:
                copy = self._narrow(weight.name, self.graph.initializer(weight.name))
                copy.name = alias
                model.graph.initializer.append(copy)

    def _narrow(self, name: str, array: np.ndarray) -> onnx.TensorProto:
        """A weight in the low precision. Raises InputError when a finite value becomes infinite."""
        with np.errstate(over="ignore"):
            narrow = array.astype(self.numpy_type)
        if np.isinf(narrow.astype(np.float32)).sum() > np.isinf(array).sum():
            reader = self.graph.consumers[name][0].name
            raise InputError(
                f"{self.graph}: weight {name!r} reaches {np.abs(array).max():.4g}, beyond {self.dtype}; "
                f"keep node {reader!r} in FP32"
            )
        return TensorProto(name=name, data_type=self.elem_type, dims=array.shape, raw_data=narrow.tobytes())


def _slots(node: Node, opsets: dict[str, int]) -> Iterator[tuple[str, bool, bool]]:
    """(Value, may be FP16 here, is an output) for each input and output in place, by the operator's ONNX definition."""
    schema = node.schema(opsets)
    inputs, outputs = (schema.inputs, schema.outputs) if schema else ((), ())
    for names, formal, output in ((node.proto.input, inputs, False), (node.proto.output, outputs, True)):
        for i, name in enumerate(names):
            # BF16 came to most operators with opset 22; runtimes take it wherever FP16 may be
            yield name, bool(formal) and "tensor(float16)" in formal[min(i, len(formal) - 1)].types, output


_NARROW = {TensorProto.FLOAT16: "fp16", TensorProto.BFLOAT16: "bf16"}


def narrow_values(graph: Graph) -> dict[str, str]:
    """Inputs and computed values that the graph holds in less than FP32, and in what: ``fp16`` or ``bf16``.

    Where neither the file nor ONNX's shape inference knows a type (operators of other domains), a value has that of
    the first known float that its node reads. A file that computes nothing in less than FP32, but only casts values
    there and back, declares nothing: that is where a value lost its digits.
    """
    if not _NARROW.keys() & graph.element_types:
        return {}
    types = {name: graph.element_type(name) for name in (*graph.types, *graph.initializers)}
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
    wide = (name not in narrow and graph.element_type(name) == TensorProto.FLOAT for name in computed)
    return sorted({*narrow.values(), *(["fp32"] if any(wide) else [])})
