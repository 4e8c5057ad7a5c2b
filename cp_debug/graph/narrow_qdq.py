"""Q/DQ nodes of INT8, FP8 and 4-bit types in an ONNX graph: checked, read, put in front of layers; weights in codes.

All nodes are ONNX's own: a constant scale for a tensor of data, or scales that the graph computes from the data it
reads, one for each block of the axis that is summed (``block_size``, opset 21). Nodes and values keep their names.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import ml_dtypes
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from cp_debug.errors import InputError
from cp_debug.graph.graph import QUANTIZING, Graph, Node, refill
from cp_debug.graph.onnx_file import reads
from cp_debug.graph.operators import QUANTIZERS
from cp_debug.graph.surgery import raised, save, unused_names

_CODES = {
    TensorProto.FLOAT8E4M3FN: ml_dtypes.float8_e4m3fn,
    TensorProto.FLOAT8E5M2: ml_dtypes.float8_e5m2,
    TensorProto.FLOAT4E2M1: ml_dtypes.float4_e2m1fn,
    TensorProto.INT4: ml_dtypes.int4,
    TensorProto.UINT4: ml_dtypes.uint4,
    TensorProto.UINT8: np.uint8,
    TensorProto.INT8: np.int8,
}
_LARGEST = {TensorProto.FLOAT8E4M3FN: 448.0, TensorProto.FLOAT8E5M2: 57344.0, TensorProto.FLOAT4E2M1: 6.0}
_BLOCK_OPSET = 21
"""Oldest opset whose Q/DQ nodes have ``block_size``."""
_LEAST = 2.0**-118
"""Smallest magnitude for which an E8M0 scale is made; its 2^-126 is the smallest normal number of FP32."""


@dataclass(frozen=True)
class StoredWeight:
    """A weight in codes with its scales."""

    kind: int
    """ONNX data type of the codes."""
    codes: np.ndarray
    """Numbers that the type holds, float32, in the shape in which the layer reads the weight."""
    scale: np.ndarray
    """float32: one number, [C] along ``axis``, or with ``block`` one for each block of ``axis``."""
    axis: int = 0
    block: int = 0
    zero: np.ndarray | None = None
    """Zero points in the shape of ``scale``; None: 0."""
    coarse: float | None = None
    """FP32 scale of the tensor, where ``scale`` holds numbers of E4M3 to be multiplied by it (NVFP4)."""
    bits: int | None = None
    """Bits that the codes were made for, where ``kind`` has more; written as metadata of the node."""
    order: np.ndarray | None = None
    """int64 [length of ``axis`` in the layer], the place in ``codes`` of each slice; None: in order."""


@dataclass(frozen=True)
class DataCodes:
    """Encoding of the data that a layer reads."""

    kind: int
    """ONNX data type of the codes."""
    rule: Literal["amax", "mx", "mx-up", "nvfp4"] = "amax"
    """Rule by which a block's scale is made of its largest magnitude."""
    scale: Any = None
    """Constant scale of the tensor, or float32 [C] along ``axis``; for ``nvfp4`` the one that the blocks' E4M3 scales
    are multiplied by."""
    axis: int = -1
    """Axis that is summed: not negative, or -1. Blocks, or scales, lie along it."""
    size: int = 0
    """Length of that axis."""
    block: int = 0
    """Length of a block; 0: one constant scale for the tensor."""


@dataclass(frozen=True)
class NarrowLayer:
    """A layer with its weight in codes, and its data too unless only weights are quantized."""

    weight: StoredWeight
    data: DataCodes | None


def needed_opset(layers: Mapping[str, NarrowLayer]) -> int:
    """The oldest opset in which these layers can be written."""
    parts = [part for layer in layers.values() for part in (layer.weight, layer.data) if part is not None]
    return max((max(FIRST_OPSET.get(part.kind, 19), _BLOCK_OPSET if part.block else 0) for part in parts), default=19)


def insert_narrow_qdq(graph: Graph, layers: Mapping[str, NarrowLayer], target: Path, what: str) -> Path:
    """Write ``graph`` as ``target`` with ``layers`` (nodes by name) in narrow types, and return it.

    ``what`` names the precision in messages. A graph whose opset is too old is raised to the one that is needed, where
    ONNX can convert it. Weights that nothing else reads are left out. Raises InputError for a name that is no node, and
    an opset that ONNX cannot raise.
    """
    nodes = {node.name for node in graph.nodes}
    if unknown := sorted(layers.keys() - nodes):
        raise InputError(f"{graph}: no node {unknown[0]!r} to quantize")

    def wanted(proto: onnx.NodeProto) -> Mapping[int, StoredWeight | DataCodes]:
        layer = layers.get(proto.name)
        slots = {0: layer.data, 1: layer.weight} if layer is not None else {}
        return {slot: codes for slot, codes in slots.items() if codes is not None}

    return insert_pairs(graph, wanted, target, what, needed_opset(layers))


def insert_pairs(
    graph: Graph,
    wanted: Callable[[onnx.NodeProto], Mapping[int, StoredWeight | DataCodes]],
    target: Path,
    what: str,
    opset: int,
) -> Path:
    """Write ``graph`` as ``target`` with the operands of nodes that are ``wanted`` (by place) in codes; return it.

    What reads one value in one encoding shares its nodes. ``what``, and the errors: as of ``insert_narrow_qdq``.
    """
    model = raised(graph, opset, what)
    surgery = _Pairs(unused_names(graph))
    for proto in model.graph.node:
        surgery.put(proto, wanted(proto))
    nodes, weights = surgery.nodes, list(model.graph.initializer)
    if surgery.stores:
        nodes, needed = _needed(nodes, {v.name for v in model.graph.output})
        weights = [t for t in weights if t.name in needed]
        model.ir_version = max(model.ir_version, {19: 9, 21: 10}.get(opset, 11))
    refill(model.graph.node, nodes)
    refill(model.graph.initializer, weights + surgery.constants)
    save(model, graph, target)
    return target


@dataclass
class _Pairs:
    """One rewriting of a graph; each value gets one pair for an encoding."""

    fresh: Callable[[str], str]
    constants: list[onnx.TensorProto] = field(default_factory=list)
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    """All nodes of the new graph so far."""
    made: dict[tuple[Any, ...], str] = field(default_factory=dict)
    """Value and encoding → the name of what comes out of DequantizeLinear, where it is made already."""
    stores: bool = False
    """Whether any weight is stored in codes."""

    def add(self, op: str, inputs: list[str], wish: str, **attributes: Any) -> str:
        """Name of the result of a new node."""
        name = self.fresh(wish)
        self.nodes.append(helper.make_node(op, inputs, [name], name=self.fresh(f"{name}_{op}"), **attributes))
        return name

    def constant(self, wish: str, array: np.ndarray) -> str:
        """Name of a new constant."""
        name = self.fresh(wish)
        self.constants.append(numpy_helper.from_array(np.ascontiguousarray(array).reshape(array.shape), name))
        return name

    def integers(self, wish: str, numbers: list[int] | np.ndarray) -> str:
        """Name of a new constant of int64."""
        return self.constant(wish, np.asarray(numbers, np.int64))

    def put(self, proto: onnx.NodeProto, wanted: Mapping[int, StoredWeight | DataCodes]) -> None:
        """Add a node behind the nodes that it is the first to need."""
        for slot, codes in wanted.items():
            value = proto.input[slot]
            key: tuple[Any, ...]
            if isinstance(codes, StoredWeight):
                key = (value, codes.codes.tobytes(), codes.axis, codes.block)
                self.stores = True
                made = self.made.get(key) or self._weight(value, codes)
            else:
                scale = np.asarray(codes.scale, np.float32).tobytes()
                key = (value, scale, codes.axis, codes.block, codes.kind, codes.rule)
                made = self.made.get(key) or self._data(value, codes)
            self.made[key] = proto.input[slot] = made
        self.nodes.append(proto)

    def _weight(self, value: str, weight: StoredWeight) -> str:
        codes = self.constant(f"{value}__codes", weight.codes.astype(_CODES[weight.kind], copy=False))
        scale = weight.scale.astype(np.float32)
        along = {"axis": weight.axis} if scale.ndim else {}
        if weight.block:
            along["block_size"] = weight.block
        if weight.coarse is None:
            scales = self.constant(f"{value}__scale", scale)
        else:
            fine = self.constant(f"{value}__block_scales", scale.astype(ml_dtypes.float8_e4m3fn))
            coarse = self.constant(f"{value}__scale", np.asarray(weight.coarse, np.float32))
            scales = self.add("DequantizeLinear", [fine, coarse], f"{value}__scales")
        zero = []
        if weight.zero is not None:
            zero = [self.constant(f"{value}__zero_point", weight.zero.astype(_CODES[weight.kind]))]
        elif weight.coarse is None:
            zero = [self.constant(f"{value}__zero_point", np.zeros(scale.shape, _CODES[weight.kind]))]
        whole = self.add("DequantizeLinear", [codes, scales, *zero], f"{value}__dequantized", **along)
        if weight.bits is not None:
            helper.set_metadata_props(self.nodes[-1], {BITS: str(weight.bits)})
        if weight.order is not None:
            order = self.integers(f"{value}__order", weight.order)
            whole = self.add("Gather", [whole, order], f"{value}__in_order", axis=weight.axis)
        return whole

    def _data(self, value: str, data: DataCodes) -> str:
        codes, result = f"{value}__codes", f"{value}__dequantized"
        if not data.block:
            array = np.asarray(data.scale, np.float32)
            zeros = self.constant(f"{value}__zero_point", np.zeros(array.shape, _CODES[data.kind]))
            parameters = [self.constant(f"{value}__scale", array), zeros]
            by = {"axis": data.axis} if array.ndim else {}
            quantized = self.add("QuantizeLinear", [value, *parameters], codes, **by)
            return self.add("DequantizeLinear", [quantized, *parameters], result, **by)
        along = {"axis": data.axis, "block_size": data.block}
        scale = self._scales(self._largest(value, data), data, value)
        quantized = self.add("QuantizeLinear", [value, scale], codes, output_dtype=data.kind, **along)
        return self.add("DequantizeLinear", [quantized, scale], result, **along)

    def _largest(self, value: str, data: DataCodes) -> str:
        """Largest magnitude of each block."""
        name, count = f"{value}__largest", math.ceil(data.size / data.block)
        source = value
        if short := count * data.block - data.size:
            pads, axes = self.integers(f"{name}_pads", [0, short]), self.integers(f"{name}_axis", [data.axis])
            source = self.add("Pad", [value, pads, "", axes], f"{name}_padded")
        shape = [self.integers(f"{name}_blocks", [count, data.block])]
        if data.axis != 0:
            shape.insert(0, self.add("Shape", [value], f"{name}_before", end=data.axis))
        if data.axis >= 0:
            shape.append(self.add("Shape", [value], f"{name}_behind", start=data.axis + 1))
        whole = self.add("Concat", shape, f"{name}_shape", axis=0)
        blocks = self.add("Reshape", [source, whole], f"{name}_reshaped")
        inner = self.integers(f"{name}_inner", [-1 if data.axis < 0 else data.axis + 1])
        return self.add("ReduceMax", [self.add("Abs", [blocks], f"{name}_abs"), inner], name, keepdims=0)

    def _scales(self, largest: str, data: DataCodes, value: str) -> str:
        """Scales of blocks from their largest magnitudes, by the same divisions as the emulation makes them."""
        name = f"{value}__scale"

        def number(given: str | float) -> str:
            return given if isinstance(given, str) else self.constant(f"{name}_constant", np.asarray(given, np.float32))

        def binary(op: str, one: str, other: str | float) -> str:
            return self.add(op, [one, number(other)], f"{name}_{op}")

        def where(condition: str, one: str | float, other: str | float) -> str:
            return self.add("Where", [condition, number(one), number(other)], f"{name}_chosen")

        if data.rule == "amax":
            scale = binary("Div", largest, _LARGEST[data.kind])
            return where(binary("Greater", scale, 0.0), scale, 1.0)
        if data.rule == "nvfp4":
            assert data.scale is not None
            fine = binary("Div", binary("Div", largest, 6.0), data.scale)
            one = number(1.0)
            codes = self.add("QuantizeLinear", [fine, one], f"{name}_codes", output_dtype=TensorProto.FLOAT8E4M3FN)
            fine = self.add("DequantizeLinear", [codes, one], f"{name}_fine")
            return binary("Mul", where(binary("Greater", fine, 0.0), fine, 1.0), data.scale)
        # 2 to floor(log2(largest)): the logarithm may be off by one unit next to a power of two, which is then seen.
        largest = binary("Max", largest, _LEAST)
        exponent = self.add("Log", [largest], f"{name}_log")
        exponent = self.add("Floor", [binary("Mul", exponent, 1 / math.log(2))], f"{name}_floor")
        power = self.add("Pow", [number(2.0), exponent], f"{name}_power")
        power = where(binary("Greater", power, largest), binary("Mul", power, 0.5), power)
        power = where(binary("LessOrEqual", binary("Mul", power, 2.0), largest), binary("Mul", power, 2.0), power)
        scale = binary("Mul", power, 2.0 ** -math.floor(math.log2(_LARGEST[data.kind])))
        if data.rule == "mx":
            return scale
        beyond = binary("Greater", binary("Div", largest, scale), _LARGEST[data.kind])
        return where(beyond, binary("Mul", scale, 2.0), scale)


def _needed(nodes: list[onnx.NodeProto], outputs: set[str]) -> tuple[list[onnx.NodeProto], set[str]]:
    """Nodes without those that computed weights for layers alone which are stored in codes now; values that are read.

    A node with a body may read anything by name.
    """
    needed, kept = set(outputs), []
    for node in reversed(nodes):
        if needed.isdisjoint(filter(None, node.output)):
            continue
        kept.append(node)
        needed.update(reads(node))
    return kept[::-1], needed


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
    for node in graph.nodes:
        if node.op.rpartition(".")[2] not in QUANTIZERS:
            continue
        inputs = node.proto.input
        names = [inputs[0]] if "Dequantize" in node.op else [*node.proto.output[:1], *inputs[2:3]]
        names += inputs[2:3]
        types = [*map(graph.element_type, names), node.attribute("output_dtype", 0)]
        if kind := next((t for t in types if t in FIRST_OPSET), None):
            yield node, kind
