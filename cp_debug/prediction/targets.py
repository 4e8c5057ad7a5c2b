"""Runtimes that a prediction can be made for, and their precisions."""

from __future__ import annotations

from dataclasses import dataclass

from cp_debug.errors import InputError


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


def target_of(name: str, precision: str) -> Target:
    """The target of this name. Raises InputError naming the known ones, and for a precision that it does not have."""
    if name not in TARGETS:
        raise InputError(f"--target: no target {name!r}; known are {', '.join(TARGETS)}")
    target = TARGETS[name]
    if precision not in PRECISIONS:
        raise InputError(f"--precision: no precision {precision!r}; known are {', '.join(PRECISIONS)}")
    if precision not in target.precisions:
        known = ", ".join(target.precisions)
        raise InputError(f"--precision: {target.name} does not compute in {precision}; it knows {known}")
    return target
