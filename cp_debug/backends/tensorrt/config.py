"""Build settings of an engine as data, decided from the request and the version before any library is loaded.

Two typing regimes exist. *Weakly typed* (8.6 to 10): the graph is FP32, flags allow lower precisions, constraints pin
layers. *Strongly typed* (on request from 10, always from 11): every type comes from the ONNX graph, which cast surgery
rewrites. Members are named, never numbered; which version has which was read off the bindings.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from cp_debug.errors import BackendUnavailable, InputError

STRONG_ONLY = (11,)
"""First version without precision flags, layer precisions and calibrators."""
STRONG_POSSIBLE = (10,)
BF16_FLAG = (10,)
UNFUSED_DEBUG_TENSORS = (10, 12)
OPSET_17 = (8,)
"""Last version whose ONNX parser was written for opset 17."""

_WEAK_FLAGS: dict[str, tuple[str, ...]] = {
    "fp32": (),
    "tf32": (),
    "fp16": ("FP16",),
    "bf16": ("BF16",),
    "int8": ("INT8",),
}


@dataclass(frozen=True)
class BuildConfig:
    """Everything about a build that does not depend on the model's files."""

    regime: str
    """``weak`` or ``strong``."""
    network_flags: tuple[str, ...]
    set_flags: tuple[str, ...]
    clear_flags: tuple[str, ...]
    graph_precision: str | None = None
    """``fp16`` or ``bf16``: cast surgery puts it into the ONNX graph before TensorRT sees it."""
    layer_precisions: Mapping[str, str] = field(default_factory=dict)
    """ONNX node → ``FLOAT``: layers pinned to FP32 while flags allow less."""
    unfused_debug_tensors: bool = False
    """Whether this version can show unfused tensors without changing the engine."""

    def step(self) -> dict[str, Any]:
        """The part of the runner's ``build`` step that this decides."""
        return {
            "network_flags": list(self.network_flags),
            "set_flags": list(self.set_flags),
            "clear_flags": list(self.clear_flags),
            "layer_precisions": dict(self.layer_precisions),
        }


NARROW = {"FP8": ((10, 0), (10, 0)), "INT4": ((10, 0), (10, 3)), "FP4": ((10, 8), (10, 8))}
"""Type of Q/DQ nodes → the first release that takes them, and the first with a builder flag for weakly typed networks.
8.6 has a data type and a flag for FP8, but reads ONNX up to opset 17; FP8 begins with 19."""


def decide(
    variant: str,
    version: str,
    *,
    strongly_typed: bool = False,
    quantized: bool = False,
    calibrated: bool = False,
    keep_fp32: Collection[str] = (),
    fp16_fallback: bool = False,
    narrow: Collection[str] = (),
) -> BuildConfig:
    """The build configuration of ``trt-<variant>`` on a TensorRT version (``8.6.0``, ``10.12.0.36`` …).

    ``quantized``: the graph has Q/DQ nodes. ``calibrated``: TensorRT's calibrator has a cache or data for it.
    ``keep_fp32``: ONNX nodes that stay FP32. ``fp16_fallback``: layers of an INT8 engine that are not quantized
    may run in FP16, where the network is weakly typed. ``narrow``: types of its Q/DQ nodes, of ``FP8``, ``INT4``,
    ``FP4``, others by ONNX's name. Raises InputError or BackendUnavailable where the version has no
    way to do it.
    """
    release = release_of(version)
    for kind in sorted(narrow):
        if kind not in NARROW:
            raise BackendUnavailable(
                f"trt-{variant}",
                f"the graph has {kind} Q/DQ nodes, which TensorRT does not support; it supports FLOAT8E4M3FN, INT4 and "
                "FLOAT4E2M1",
                nearest="ort",
            )
        if release < (first := NARROW[kind][0]):
            needed = ".".join(map(str, first))
            raise BackendUnavailable(
                f"trt-{variant}",
                f"the graph has {kind} Q/DQ nodes, and TensorRT {version} does not support them; {needed} and newer do",
                nearest="ort",
            )
    strong = strongly_typed or release >= STRONG_ONLY
    if strong and release < STRONG_POSSIBLE:
        raise InputError(f"--strongly-typed needs TensorRT 10 or newer; this is {version}")
    if variant == "int8":
        _check_int8(version, strong, quantized, calibrated)
    tf32 = variant in ("tf32", "best")
    unfused = release >= UNFUSED_DEBUG_TENSORS
    if strong:
        if variant == "best":
            reason = (
                f"TensorRT {version}, strongly typed, takes every type from the graph, so there is nothing to choose"
            )
            raise BackendUnavailable("trt-best", reason, nearest="trt-fp16")
        return BuildConfig(
            regime="strong",
            network_flags=("STRONGLY_TYPED",),
            set_flags=("TF32",) if tf32 else (),
            clear_flags=() if tf32 else ("TF32",),
            graph_precision=variant if variant in ("fp16", "bf16") else None,
            unfused_debug_tensors=unfused,
        )
    if variant == "bf16" and release < BF16_FLAG:
        raise BackendUnavailable("trt-bf16", f"TensorRT {version} has no BF16; 10 and newer do", nearest="trt-fp16")
    flags = _best(release, quantized or calibrated) if variant == "best" else _WEAK_FLAGS[variant]
    if variant == "int8" and fp16_fallback:
        flags = ("FP16", *flags)
    flags = (*flags, *(kind for kind in sorted(narrow) if release >= NARROW[kind][1]))
    pinned = dict.fromkeys(keep_fp32, "FLOAT") if flags else {}
    return BuildConfig(
        regime="weak",
        network_flags=("EXPLICIT_BATCH",) if release < STRONG_POSSIBLE else (),
        set_flags=(*flags, *(("TF32",) if tf32 else ()), *(("OBEY_PRECISION_CONSTRAINTS",) if pinned else ())),
        clear_flags=() if tf32 else ("TF32",),
        layer_precisions=pinned,
        unfused_debug_tensors=unfused,
    )


def largest_opset(version: str) -> int | None:
    """The ONNX opset up to which a TensorRT version reads; None where torch's exporters stay below it by default."""
    return 17 if release_of(version)[:1] <= OPSET_17 else None


def release_of(version: str) -> tuple[int, ...]:
    """Major and minor number of a version of TensorRT."""
    return tuple(int(part) for part in version.split(".")[:2])


def _best(release: tuple[int, ...], scaled: bool) -> tuple[str, ...]:
    # INT8 without Q/DQ nodes or a calibrator has no scales: TensorRT would warn and ignore it
    return ("FP16", *(("BF16",) if release >= BF16_FLAG else ()), *(("INT8",) if scaled else ()))


def _check_int8(version: str, strong: bool, quantized: bool, calibrated: bool) -> None:
    if quantized:
        return
    if strong:
        raise InputError(
            f"trt-int8: the graph has no QuantizeLinear/DequantizeLinear nodes, and TensorRT {version} takes INT8 from "
            "the graph only; quantize the model first"
        )
    if not calibrated:
        raise InputError(
            "trt-int8: the graph has no QuantizeLinear/DequantizeLinear nodes; quantize the model first, or let "
            "TensorRT's calibrator find scales: --trt-calibrator, or --calibration-cache with its file"
        )
