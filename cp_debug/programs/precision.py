"""Promises of each precision: unit roundoff, range, default tolerances, and the oracle that judges it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from cp_debug.backends.narrow_options import FAMILIES, NarrowOptions, is_narrow
from cp_debug.graph.operators import CONTRACTIONS


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
    atol: float


_FP32 = (3.4028235e38, 1.1754944e-38)
_RANGES = {"fp32": _FP32, "bf16": (3.3895314e38, 1.1754944e-38), "fp16": (65504.0, 6.103515625e-05)}
_ROUNDOFFS = {"fp8": 2.0**-4, "mxfp8": 2.0**-4, "mxfp4": 2.0**-2, "nvfp4": 2.0**-2, "int4": 2.0**-4}
"""Unit roundoffs of products' operands: E4M3 keeps 4 significant bits, E2M1 two, INT4 steps of 1/8 of the largest."""


class _Precisions(dict[str, Precision]):
    """Precisions by name; those with options are made when they are first asked for."""

    def __missing__(self, name: str) -> Precision:
        if not is_narrow(name):
            raise KeyError(name)
        options = NarrowOptions.parse(name)
        roundoff = _ROUNDOFFS[options.family] * (2 if options.element == "e5m2" else 1)
        rtol = 0.3 if roundoff < 0.1 else 0.6
        self[name] = made = Precision(name, roundoff, *_RANGES[options.out], rtol, 1e-3)
        return made


PRECISIONS: dict[str, Precision] = _Precisions(
    (p.name, p)
    for p in (
        Precision("fp64", 2.0**-53, 1.7976931348623157e308, 2.2250738585072014e-308, 1e-5, 1e-7),
        Precision("fp32", 2.0**-24, *_FP32, 1e-4, 1e-6),
        Precision("tf32", 2.0**-11, *_FP32, 1e-2, 1e-5),
        Precision("bf16", 2.0**-8, 3.3895314e38, 1.1754944e-38, 5e-2, 1e-4),
        Precision("fp16", 2.0**-11, 65504.0, 6.103515625e-05, 2e-2, 1e-4),
        Precision("fp16acc", 2.0**-11, 65504.0, 6.103515625e-05, 5e-2, 1e-4),
        Precision("int8", 2.0**-8, *_FP32, 2e-1, 1e-3),
    )
)
for _family in FAMILIES:
    PRECISIONS[_family]

BESIDE_INT8 = replace(PRECISIONS["int8"], roundoff=PRECISIONS["fp16"].roundoff)
"""INT8 where it is known which inputs are quantized: all else may be rounded to FP16."""
BESIDE_INT16 = replace(PRECISIONS["int8"], roundoff=PRECISIONS["fp32"].roundoff)
"""The same for levels of 16 bits, which are finer than FP16: all else is in FP32."""


def of_operators(name: str, operators: Iterable[str]) -> str:
    """The precision that operators have under one called ``name``: narrow ones encode the operands of products only."""
    if not is_narrow(name):
        return name
    options = NarrowOptions.parse(name)
    encoded = ("MatMul", "Gemm") if options.family == "int4" else CONTRACTIONS
    return name if any(op in encoded or op.startswith("com.microsoft.") for op in operators) else options.out


def coarsest(*names: str | None) -> Precision:
    """The least exact of some precisions, than which two results can agree no better; None is left out."""
    return max((PRECISIONS[name] for name in names if name), key=lambda p: (p.roundoff, p.rtol))


def oracle_for(reference: str, test: str) -> str:
    """``fp64`` where both sides claim FP32 or better; below that a deterministic FP32 replay is exact enough."""
    return "fp64" if coarsest(reference, test).name in ("fp64", "fp32") else "fp32"
