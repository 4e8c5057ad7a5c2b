"""Runtimes that a prediction can be made for: their kernels, their fusions, the opsets that they read."""

from __future__ import annotations

from dataclasses import dataclass, replace

from cp_debug.backends.arithmetic import (
    BF16,
    FP16,
    FP16ACC,
    INT8,
    TF32,
    TF32_CUT,
    TF32_DECONV,
    Arithmetic,
    round_bf16,
    round_fp16,
)
from cp_debug.errors import InputError

TILES = (32, 64, 128)
"""Channels per tile of the kernels that accumulate in FP16."""


@dataclass(frozen=True)
class Kernel:
    """One way in which all layers of a network may be computed.

    ``once``: the result of a fused group is rounded, as ``arithmetic.value`` of ``stored`` says, and nothing inside.
    """

    name: str
    says: str
    arithmetic: Arithmetic
    stored: Arithmetic | None = None
    """Rounding of a fused group's result where ``arithmetic`` rounds no results."""
    fused: bool = False
    """Whether additions behind a convolution come in the order of ``epilogue.fused``."""
    mixed: bool = False
    """Whether layers that the target may leave in FP32 (``undecided``) are computed so."""


@dataclass(frozen=True)
class Target:
    """A runtime of one version."""

    name: str
    opset: int | None
    """The ONNX opset up to which it reads; None where torch's exporters stay below it."""
    precisions: tuple[str, ...]
    weak: bool
    """Whether it may leave any layer in FP32 because that is faster."""
    measured: str = ""
    """Place where its kernels were measured; empty where those of another version are assumed."""


TARGETS = {
    target.name: target
    for target in (
        Target("trt-8.6", 17, ("fp16", "tf32", "int8"), True, "TensorRT 8.6.0 on an H100 and an H200"),
        Target("trt-10", None, ("fp16", "bf16", "tf32", "int8"), True),
        Target("trt-11", None, ("fp16", "bf16", "tf32", "int8"), False),
    )
}
PRECISIONS = ("fp16", "bf16", "tf32", "int8")

_ONCE = "operands rounded, sums in FP32, a fused layer's result rounded once"
_EACH = "sums in FP32, every operator's result rounded"
_KERNELS: dict[str, tuple[Kernel, ...]] = {
    "fp16": (
        Kernel("fp16acc/64", "sums in FP16, 64 channels a tile", FP16ACC, fused=True),
        *(
            Kernel(f"fp16acc/{t}", f"sums in FP16, {t} channels a tile", replace(FP16ACC, tile=t), fused=True)
            for t in TILES
            if t != FP16ACC.tile
        ),
        Kernel("fp16", _EACH, FP16),
        Kernel("fp16-once", _ONCE, Arithmetic("fp16", operand=round_fp16), FP16),
    ),
    "bf16": (
        Kernel("bf16", _EACH, BF16),
        Kernel("bf16-once", _ONCE, Arithmetic("bf16", operand=round_bf16), BF16),
    ),
    "tf32": (
        Kernel("tf32", "operands of products rounded to TF32", TF32),
        Kernel("tf32-cut", "operands of products truncated after 10 bits", TF32_CUT),
        Kernel("tf32-weights-cut", "operands rounded, weights truncated after 10 bits", TF32_DECONV),
    ),
    "int8": (
        Kernel("int8", "as the file's Q/DQ pairs say, FP32 between them", INT8),
        Kernel("int8-fp16", "as the file's Q/DQ pairs say, FP16 between them", FP16),
    ),
}
"""Precision → the plausible ways, the most likely first."""


def target_of(name: str) -> Target:
    """The target of this name. Raises InputError naming the known ones."""
    if name not in TARGETS:
        raise InputError(f"--target: no target {name!r}; known are {', '.join(TARGETS)}")
    return TARGETS[name]


def kernels_of(target: Target, precision: str) -> tuple[Kernel, ...]:
    """The plausible ways in which ``target`` computes in ``precision``, the most likely first.

    Raises InputError for a precision that is none or that the target does not have.
    """
    if precision not in PRECISIONS:
        raise InputError(f"--precision: no precision {precision!r}; known are {', '.join(PRECISIONS)}")
    if precision not in target.precisions:
        raise InputError(
            f"--precision: {target.name} does not compute in {precision}; it knows {', '.join(target.precisions)}"
        )
    kernels = _KERNELS[precision]
    if not target.weak or precision == "int8":
        return kernels
    says = f"layers that may stay in FP32 stay there; the others: {kernels[-1].says}"  # the smallest error to expect
    return (*kernels, replace(kernels[-1], name="mixed", says=says, mixed=True))
