"""Promises of each precision: unit roundoff, range, default tolerances, and the oracle that judges it."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Precision:
    """Limits of one precision.

    ``roundoff`` is half the spacing of numbers at 1; ``largest`` the largest finite number, ``tiniest`` the smallest
    normal one. ``rtol`` is the default tolerance of a layer's max |Δ|, relative to its max |reference|.
    """

    name: str
    roundoff: float
    largest: float
    tiniest: float
    rtol: float
    atol: float = 0.0


_FP32 = (3.4028235e38, 1.1754944e-38)
PRECISIONS = {
    p.name: p
    for p in (
        Precision("fp64", 2.0**-53, 1.7976931348623157e308, 2.2250738585072014e-308, 1e-5, 1e-7),
        Precision("fp32", 2.0**-24, *_FP32, 1e-4, 1e-6),
        Precision("tf32", 2.0**-11, *_FP32, 1e-2, 1e-5),
        Precision("bf16", 2.0**-9, 3.3895314e38, 1.1754944e-38, 5e-2, 1e-4),
        Precision("fp16", 2.0**-11, 65504.0, 6.103515625e-05, 2e-2, 1e-4),
        Precision("fp16acc", 2.0**-11, 65504.0, 6.103515625e-05, 5e-2, 1e-4),
        Precision("int8", 2.0**-8, *_FP32, 2e-1, 1e-3),
    )
}

BESIDE_INT8 = replace(PRECISIONS["int8"], roundoff=PRECISIONS["fp16"].roundoff)
"""INT8 where it is known which inputs are quantized: all else may be rounded to FP16."""


def coarser(a: str, b: str) -> Precision:
    """The less exact of two precisions: two results can agree no better than it allows."""
    return coarsest(a, b)


def coarsest(*names: str | None) -> Precision:
    """The least exact of some precisions; None is left out."""
    return max((PRECISIONS[name] for name in names if name), key=lambda p: (p.roundoff, p.rtol))


def oracle_for(reference: str, test: str) -> str:
    """``fp64`` where both sides claim FP32 or better; below that a deterministic FP32 replay is exact enough."""
    return "fp64" if coarser(reference, test).name in ("fp64", "fp32") else "fp32"
