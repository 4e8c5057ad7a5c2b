"""The engine inspector's layers: which ONNX nodes each holds, which tensors the engine really has, in which types."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from cp_debug.backends.tensorrt.tactics import Tactic, decode, with_split
from cp_debug.serialize import JsonForm

_ONNX_LAYER = re.compile(r"\[ONNX Layer: ([^\x1e\x1f]*?)\](?=[\x1e\x1f\[]|$)")
_TYPES = (  # the inspector's descriptions: "Row major linear FP32", "Channel major FP16 format where …", "Half"
    ("BF16", r"\bBF16\b|BFloat16"),
    ("Half", r"\bFP16\b|\bHalf\b"),
    ("FP8", r"\bFP8\b"),
    ("FP4", r"\bFP4\b"),
    ("Float", r"\bFP32\b|\bFloat\b"),
    ("Int8", r"\bINT8\b"),
    ("Int4", r"\bINT4\b"),
    ("Int64", r"\bINT64\b"),
    ("Int32", r"\bINT32\b"),
    ("UInt8", r"\bUINT8\b"),
    ("Bool", r"\bBOOL\b"),
)
_FORMATS = {
    "HWC8": r"^Channel major FP16 format where channel % 8 == 0$",
    "HWC": r"^Channel major FP32 format\b",
    "CHW2": r"^Two wide channel vectorized row major FP16 format$",
    "CHW4": r"^Four wide channel vectorized row major (FP32|INT8) format$",
    "CHW16": r"^Sixteen wide channel vectorized row major FP16 format$",
    "CHW32": r"^Thirty-two wide channel vectorized row major (FP32|INT8) format$",
}
"""``tensorrt.TensorFormat`` → how the inspector describes it; anything else is left to TensorRT."""
PRECISIONS = ("Float", "BF16", "Half", "FP8", "Int8", "FP4", "Int4")
"""Types that a precision setting chooses between, as the inspector calls them."""
COMPILED = ("Myelin", "ForeignNode")
"""Kinds of layers that TensorRT compiles out of many nodes: the inspector tells the types at their borders alone."""


@dataclass(frozen=True)
class EngineTensor:
    """An input or output of a layer. ``dtype`` is the inspector's word (``Half``), empty if it has none."""

    name: str
    dtype: str
    format: str
    shape: tuple[int, ...]

    @property
    def tensor_format(self) -> str | None:
        """The layout as ``tensorrt.TensorFormat`` calls it; None for a linear one and those it has no name for."""
        return next((name for name, pattern in _FORMATS.items() if re.search(pattern, self.format)), None)


@dataclass(frozen=True)
class EngineLayer(JsonForm):
    """One layer of a built engine."""

    name: str
    kind: str
    nodes: tuple[str, ...]
    """The ONNX nodes fused into it, by name; empty for what TensorRT added (reformats, shape arithmetic)."""
    inputs: tuple[EngineTensor, ...] = field(metadata={"written": False})
    outputs: tuple[EngineTensor, ...] = field(metadata={"written": False})
    tactic: Tactic = field(metadata={"written": False})
    tactic_id: str = ""
    """Kernels with one name can differ in it (how often K is split, for one)."""

    @property
    def computes_in(self) -> str:
        """Arithmetic that the kernel's name tells, or else the type that the layer writes: ``fp16acc``, ``fp32``.

        ``unknown`` for a compiled layer; empty where no type is a precision.
        """
        types = [tensor.dtype for tensor in self.outputs if tensor.dtype in PRECISIONS]
        written = {"Float": "fp32", "Half": "fp16"}.get(types[0], types[0].lower()) if types else ""
        return self.tactic.arithmetic or ("unknown" if self.kind in COMPILED else written)

    @property
    def program(self) -> str:
        """Tactic with its types: kernels without a name, such as pointwise ones, are told apart by types."""
        types = (tensor.dtype for tensor in (*self.inputs, *self.outputs))
        return " ".join((self.tactic.name, self.tactic_id, *types))

    def derived(self) -> dict[str, Any]:
        """The types of its tensors by name, and its kernel with the arithmetic that the name tells."""
        return {
            "inputs": {t.name: t.dtype for t in self.inputs},
            "outputs": {t.name: t.dtype for t in self.outputs},
            "tactic": self.tactic.name,
            "arithmetic": self.tactic.arithmetic,
        }


def parse_layers(layers: Sequence[Any], nodes: Collection[str]) -> list[EngineLayer]:
    r"""The layers in the ``"Layers"`` list of the inspector's JSON. ``nodes``: the ONNX graph's node names.

    Layers are joined to nodes by metadata (``[ONNX Layer: a]\\x1f[ONNX Layer: b]``), and by the parts of their name
    where there is none. An engine built without detailed verbosity gives bare names, which are kept as such.
    """
    node_names = frozenset(nodes)
    return [_layer({"Name": entry} if isinstance(entry, str) else entry, node_names) for entry in layers]


def materialized(layers: Iterable[EngineLayer], values: Collection[str]) -> dict[str, EngineTensor]:
    """The graph ``values`` that layers write to memory, as they are there, in the layers' order."""
    value_names = frozenset(values)
    return {t.name: t for layer in layers for t in layer.outputs if t.name in value_names}


def realised_precision(layers: Iterable[EngineLayer]) -> dict[str, float]:
    """Share of each floating-point or quantized type among the inputs and outputs of layers that hold ONNX nodes.

    Reformats are left out: they carry a type from where it is to where it is wanted, and compute nothing. So are FP32
    borders of compiled layers, which may hold anything inside.
    """
    counts = Counter(
        tensor.dtype
        for layer in layers
        if layer.nodes and layer.kind != "Constant"
        for tensor in (*layer.inputs, *layer.outputs)
        if tensor.dtype in PRECISIONS and not (tensor.dtype == "Float" and layer.kind in COMPILED)
    )
    return {dtype: counts[dtype] / counts.total() for dtype in PRECISIONS if counts[dtype]}


def fusions(layers: Iterable[EngineLayer]) -> dict[frozenset[str], str]:
    """Fused group of ONNX nodes → its tactic and types, for telling whether two engines are the same program."""
    return {frozenset(layer.nodes): layer.program for layer in layers if layer.nodes}


@dataclass(frozen=True)
class EngineDifference:
    """Differences of a second build from the first."""

    fusions: tuple[str, ...]
    """Groups of nodes, joined by `` + ``, that the first build fuses and the second does not."""
    tactics: tuple[str, ...]
    """Groups that both have, with another kernel in each."""

    @property
    def same(self) -> bool:
        """Whether both builds fuse alike and have the same kernels."""
        return not self.fusions and not self.tactics


def compare_engines(first: Iterable[EngineLayer], second: Iterable[EngineLayer]) -> EngineDifference:
    """Fusions and tactics of ``first`` that ``second`` does not have."""
    before, after = fusions(first), fusions(second)
    return EngineDifference(
        fusions=tuple(" + ".join(sorted(group)) for group in before if group not in after),
        tactics=tuple(" + ".join(sorted(g)) for g, tactic in before.items() if g in after and after[g] != tactic),
    )


def changed_nodes(first: Iterable[EngineLayer], second: Iterable[EngineLayer]) -> set[str]:
    """ONNX nodes of ``first`` that ``second`` fuses otherwise or gives another kernel."""
    before, after = fusions(first), fusions(second)
    return {node for group, tactic in before.items() if after.get(group) != tactic for node in group}


def _layer(entry: Mapping[str, Any], known: frozenset[str]) -> EngineLayer:
    name, kind = entry["Name"], entry.get("LayerType", "")
    layer_nodes = _ONNX_LAYER.findall(entry.get("Metadata") or "") or _parts(name)
    if kind in ("Reformat", "NoOp"):
        layer_nodes = []  # their name quotes the layer that they serve
    return EngineLayer(
        name=name,
        kind=kind,
        nodes=tuple(dict.fromkeys(node for node in layer_nodes if node in known)),
        inputs=tuple(_tensor(t) for t in entry.get("Inputs") or ()),
        outputs=tuple(_tensor(t) for t in entry.get("Outputs") or ()),
        tactic=decode(with_split(entry.get("TacticName") or "", entry.get("TacticValue") or "")),
        tactic_id=entry.get("TacticValue") or "",
    )


def _parts(name: str) -> list[str]:
    """ONNX node names out of ``/b0/Conv + /b0/Relu`` and ``PWN(PWN(/a/Sigmoid), /a/Mul)``."""
    return re.split(r"\s\+\s|\s\|\|\s|PWN\(|,\s|\)", name)


def _tensor(entry: Mapping[str, Any]) -> EngineTensor:
    text = str(entry.get("Format/Datatype") or " ".join(str(entry.get(k, "")) for k in ("Format", "Datatype")))
    dtype = next((t for t, pattern in _TYPES if re.search(pattern, text, re.IGNORECASE)), "")
    return EngineTensor(entry["Name"], dtype, text, tuple(entry.get("Dimensions") or ()))
