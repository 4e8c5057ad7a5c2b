"""The engine inspector's layers: which ONNX nodes each holds, which tensors the engine really has, in which types.

A kernel's arithmetic is read from its tactic name. The newer ones carry their types as
``<in><out>_<multiplied as><accumulated in>_<scale>``:
``f16f16_f16f16_f16`` multiplies FP16 and accumulates in FP16, ``f16f16_f16f32_f32`` accumulates in FP32,
``f32f32_tf32f32_f32`` multiplies TF32, ``i8f32_i8i32_f32`` reads INT8 and writes FP32. Winograd kernels leave the third
out (``wngd_f32f32_f32_f32``), and so do products by a vector (``gemvx_f16f16_f32_f32``) and depthwise convolutions
(``conv3d_c1_k1_f16f16_f16_f16``; those with ``depthwiseHMMA`` accumulate in FP32). Older kernels say
``h884``/``h1688``/``h16816`` (FP16 accumulation) or ``s…`` (FP32), those without tensor cores
``…_fused_conv_act_fp32_…_Accfloat`` and ``…_FP32FP32FP32NCHW_…``. Whether a GEMM splits its sum no name tells; the
tactic's number does.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

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


_TYPE = r"(?:tf32|bf16|f16|f32|f64|e4m3|e5m2|i8|u8|s8|i32|s32)"
_NAMES = (
    re.compile(rf"_(?P<reads>{_TYPE})(?P<writes>{_TYPE})_(?P<multiplies>{_TYPE})(?P<sums>{_TYPE})_{_TYPE}(?=_|$)"),
    re.compile(r"_wngd_(?P<reads>f16|f32)(?:f16|f32)_(?P<sums>f16|f32)_"),
    re.compile(r"_(?:gemvx|conv3d_c1_k1)_(?P<reads>f16|f32)(?P<writes>f16|f32)_(?P<sums>f16|f32)_f(?:16|32)(?=_|$)"),
    re.compile(r"_depthwise(?:HMMA|Conv)_(?P<reads>FP16|fp32)"),
    re.compile(r"_fused_conv_act_(?P<reads>fp16|fp32)_.*_Acc(?P<sums>float|half)(?=_|$)"),
)
"""Forms of kernels' names, with the types that they read, write and multiply and the type of their sums; a type that
the name leaves out is that which they read, and FP32 for the sum."""
_PLAIN = re.compile(r"_(?:FP32){3}N")
_OLD_TENSOR_CORE = re.compile(r"(?:^|_)(?P<kind>[hsi])(?:884|1688|16816|8816|16832)(?=[a-z_]|$)")
_SLICES = re.compile(r"_warpsize\d+x\d+x(\d+)(?=_|$)")
_ALIGNED = re.compile(r"_aligna(\d+)(?=_|$)")
_TILE = re.compile(r"tilesize(\d+)x(\d+)x(\d+)")
_SPLIT = re.compile(r" numSplitK: (\d+) numBuffers: (\d+) numKernels: (\d+)$")
_LONG = {"f16": "fp16", "f32": "fp32", "f64": "fp64", "i8": "int8", "s8": "int8", "u8": "int8", "i32": "int32"}
_LONG |= {"s32": "int32", "float": "fp32", "half": "fp16"}


@dataclass(frozen=True)
class Tactic:
    """One kernel as its name describes it; fields are None where the name does not tell."""

    name: str
    reads: str | None = None
    writes: str | None = None
    multiplies: str | None = None
    accumulates: str | None = None
    """Type of partial sums: ``fp16``, ``fp32``, ``int32`` …"""
    tile: tuple[int, int, int] | None = None
    """Rows × columns × depth of one block's tile; the depth is the channel tile of the accumulation order."""
    slices: int = 1
    """Warps that share a tile's depth, each with a partial sum of its own."""
    winograd: bool = False
    vector: int = 0
    """Values that a thread loads at once in kernels without shared memory (``wo_smem``), else 0. The name tells it: the
    alignment, at most an eighth of the tile's depth; fitted on 3 layers and right on 4 others."""

    split: int = 1
    """Parts of a sum (split-K): part i takes the tiles i, i + ``split``, i + 2 · ``split`` and so on."""
    split_kernels: int = 1
    """Kernels of a split sum: where there are two, the second adds the parts."""

    @property
    def arithmetic(self) -> str | None:
        """Arithmetic in the project's words: ``fp32 tf32 bf16 fp16 fp16acc int8``; None where unknown."""
        if self.multiplies == "fp16" and self.accumulates == "fp16":
            return "fp16acc"
        return self.multiplies


def with_split(name: str, number: str) -> str:
    """The name of a GEMM with what TensorRT's log says behind it where the tactic's number tells a split sum.

    Such a number, ``0x2080802df``, has the parts in bits 17 to 24, the buffers between them in bits 25 to 32, and in
    bit 33 whether a second kernel adds them, as TensorRT 8.6's log says beside 1,200 of them. Those of convolutions are
    hashes.
    """
    try:
        value = int(number, 16)
    except ValueError:
        return name
    parts, buffers, kernels = value >> 17 & 255, value >> 25 & 255, 1 + (value >> 33)
    if "_gemm_" not in name or parts < 2 or kernels > 2 or buffers != parts + kernels - 2:
        return name
    return f"{name} numSplitK: {parts} numBuffers: {buffers} numKernels: {kernels}"


def decode(name: str) -> Tactic:
    """Decode a tactic name; an unknown one gives a Tactic that only has its name."""
    if split := _SPLIT.search(name):
        whole = decode(name[: split.start()])
        return replace(whole, name=name, split=int(split[1]), split_kernels=int(split[3]))
    tile, slices = _TILE.search(name), _SLICES.search(name)
    aligned = _ALIGNED.search(name)
    vector = min(int(aligned[1]) if aligned else 8, int(tile[3]) // 8) if tile and "wo_smem" in name else 0
    reads, writes, multiplies, accumulates = _types(name) or (None, None, None, None)
    return Tactic(
        name,
        reads,
        writes,
        multiplies,
        accumulates,
        tile=(int(tile[1]), int(tile[2]), int(tile[3])) if tile else None,
        slices=int(slices[1]) if slices else 1,
        winograd="winograd" in name or "wngd" in name,
        vector=vector,
    )


def _types(name: str) -> tuple[str, str, str, str] | None:
    for known in filter(None, (form.search(name) for form in _NAMES)):
        told = {part: _LONG.get(short, short).lower() for part, short in known.groupdict().items()}
        reads = told["reads"]
        return reads, told.get("writes", reads), told.get("multiplies", reads), told.get("sums", "fp32")
    if match := _OLD_TENSOR_CORE.search(name):
        if match["kind"] == "i":
            return "int8", "int8", "int8", "int32"
        if match["kind"] == "h":
            return "fp16", "fp16", "fp16", "fp16"
        if "tf32" in name:
            return "fp32", "fp32", "tf32", "fp32"
        return "fp16", "fp16", "fp16", "fp32"
    if "scudnn" in name or "sgemm" in name or _PLAIN.search(name):  # FP32 on the ordinary cores
        return "fp32", "fp32", "fp32", "fp32"
    return None
