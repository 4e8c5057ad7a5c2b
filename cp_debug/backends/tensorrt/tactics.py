"""Arithmetic of a kernel, read from its tactic name.

The newer kernels carry their types in the name as ``<in><out>_<multiplied as><accumulated in>_<scale>``:
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
from dataclasses import dataclass, replace

_TYPE = r"(?:tf32|bf16|f16|f32|f64|e4m3|e5m2|i8|u8|s8|i32|s32)"
_TYPES = re.compile(
    rf"_(?P<reads>{_TYPE})(?P<writes>{_TYPE})_(?P<multiplies>{_TYPE})(?P<accumulates>{_TYPE})_{_TYPE}(?=_|$)"
)
_WINOGRAD = re.compile(r"_wngd_(?P<reads>f16|f32)(?:f16|f32)_(?P<accumulates>f16|f32)_")
_FUSED = re.compile(r"_fused_conv_act_(?P<reads>fp16|fp32)_.*_Acc(?P<accumulates>float|half)(?=_|$)")
_VECTOR = re.compile(r"_gemvx_(?P<reads>f16|f32)(?P<writes>f16|f32)_(?P<accumulates>f16|f32)_f(?:16|32)(?=_|$)")
_DEPTHWISE = re.compile(
    r"_conv3d_c1_k1_(?P<reads>f16|f32)(?P<writes>f16|f32)_(?P<accumulates>f16|f32)_f(?:16|32)(?=_|$)"
)
_DEPTHWISE_KINDS = {"_depthwiseHMMA_FP16": ("fp16", "fp32"), "_depthwiseConv_fp32": ("fp32", "fp32")}
"""Mark of the older depthwise kernels → the type that they read and multiply, and the type of their sums."""
_PLAIN = re.compile(r"_(?:FP32){3}N")
_OLD_TENSOR_CORE = re.compile(r"(?:^|_)(?P<kind>[hsi])(?:884|1688|16816|8816|16832)(?=[a-z_]|$)")
_SLICES = re.compile(r"_warpsize\d+x\d+x(\d+)(?=_|$)")
_ALIGNED = re.compile(r"_aligna(\d+)(?=_|$)")
_TILE = re.compile(r"tilesize(\d+)x(\d+)x(\d+)")
_SPLIT = re.compile(r" numSplitK: (\d+) numBuffers: (\d+) numKernels: (\d+)$")
_LONG = {"f16": "fp16", "f32": "fp32", "f64": "fp64", "i8": "int8", "s8": "int8", "u8": "int8", "i32": "int32"}
_LONG["s32"] = "int32"


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
    if match := _TYPES.search(name):
        reads, writes, multiplies, accumulates = (_LONG.get(short, short) for short in match.groups())
        return reads, writes, multiplies, accumulates
    if match := _WINOGRAD.search(name):
        reads, accumulates = (_LONG[match[kind]] for kind in ("reads", "accumulates"))
        return reads, reads, reads, accumulates
    if match := _VECTOR.search(name):
        reads, writes, accumulates = (_LONG[match[kind]] for kind in ("reads", "writes", "accumulates"))
        return reads, writes, reads, accumulates
    if match := _DEPTHWISE.search(name):
        reads, writes, accumulates = (_LONG[match[kind]] for kind in ("reads", "writes", "accumulates"))
        return reads, writes, reads, accumulates
    for kind, (reads, accumulates) in _DEPTHWISE_KINDS.items():
        if kind in name:
            return reads, reads, reads, accumulates
    if match := _FUSED.search(name):
        reads, accumulates = match["reads"], {"float": "fp32", "half": "fp16"}[match["accumulates"]]
        return reads, reads, reads, accumulates
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
