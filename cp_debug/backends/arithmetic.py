"""Arithmetics in which a graph can be executed: how values are held, and how operations are rounded."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import ml_dtypes
import numpy as np
import torch
from torch import Tensor

from cp_debug.backends.narrow_options import FAMILIES, NarrowOptions, is_narrow
from cp_debug.backends.running_sums import FP16_SUM, HOPPER_FP8, RunningSum
from cp_debug.backends.scaling import COLUMNS, ROWS, Axes, Scaling
from cp_debug.graph.graph import Graph
from cp_debug.graph.operators import CONTRACTIONS
from cp_debug.probes.arrays import shared


def round_tf32(x: Tensor) -> Tensor:
    """Round a tensor to TF32 (8 exponent bits, 10 mantissa bits), to nearest, ties away from zero.

    This is PTX's ``cvt.rna.tf32``. NaN and Inf stay; a finite value at least half a step above the largest TF32 value
    becomes Inf. The dtype stays; float64 is rounded to float32 first. Integers are returned as they are.
    """
    if not x.is_floating_point():
        return x
    single = x.to(torch.float32)
    # Half a step is added to the magnitude and the 13 low bits are cut off; a carry walks into the exponent.
    rounded = single.view(torch.int32).add(0x1000).bitwise_and_(~0x1FFF).view(torch.float32)
    if single.sum().isnan():  # one reading pass; only NaN payloads do not survive the bit arithmetic
        rounded = torch.where(single.isnan(), single, rounded)
    return rounded.to(x.dtype)


def truncate_tf32(x: Tensor) -> Tensor:
    """Cut FP32 off after TF32's 10 mantissa bits. Integers are returned as they are; the dtype stays.

    Any shape. The mantissa's last 13 bits are set to 0.
    """
    if not x.is_floating_point():
        return x
    return x.to(torch.float32).view(torch.int32).bitwise_and(~0x1FFF).view(torch.float32).to(x.dtype)


def round_fp16(x: Tensor) -> Tensor:
    """Round to IEEE half precision, ties to even; beyond 65504 by half a step or more becomes Inf. The dtype stays.

    IEEE 754 binary16; any shape. Integers are returned as they are.
    """
    return x.to(torch.float16).to(x.dtype) if x.is_floating_point() else x


def round_bf16(x: Tensor) -> Tensor:
    """Round to bfloat16, ties to even. The dtype stays.

    The upper 16 bits of binary32; any shape. Integers are returned as they are.
    """
    return x.to(torch.bfloat16).to(x.dtype) if x.is_floating_point() else x


Rounding = Callable[[Tensor], Tensor]

_TORCH_TYPES = {np.dtype(t) for t in ("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "?")}


@dataclass(frozen=True)
class Arithmetic:
    """The rules by which every float of a graph is held, computed and rounded.

    Float values are *held* in ``dtype`` whatever narrower type the graph declares (float64 stays float64), and rounded
    where the arithmetic says so. An explicit Cast to FLOAT16, BFLOAT16 or FP8 in the graph is part of the program and
    rounds in every arithmetic, the oracle's too; a Cast to FLOAT or DOUBLE only changes how the value is held.
    Integers and booleans are never rounded, and QuantizeLinear/DequantizeLinear are exact everywhere.
    """

    name: str
    dtype: torch.dtype = torch.float32
    value: Rounding | None = None
    """Rounding of weights, of inputs and of the result of every operation."""
    operand: Rounding | None = None
    """Rounding of both operands of convolutions and matrix products."""
    weight: Rounding | None = None
    """Rounding of the second operand, in place of ``operand``."""
    tile: int | None = None
    """Channels per tile where convolutions and products accumulate in FP16; None accumulates in ``dtype``."""
    slices: int = 1
    """Number of partial sums that share a tile's channels; a divisor of ``tile`` ÷ 16."""
    vector: int = 0
    """Values that a thread of a convolution kernel without shared memory loads at once, 4 or 8; 0 for other kernels."""
    split: int = 1
    """Parts of a product's sum that are added at the end (split-K); the tiles take turns."""
    split_kernels: int = 1
    """Kernels that add the parts: 2 do so front to back, 1 begins with the last part."""
    scaling: Scaling | None = None
    """Encoding of operands in 4 and 8 bits, in place of ``operand``."""
    running_sum: RunningSum | None = None
    """Running sum of scaled products; None accumulates in ``dtype``."""
    paired_sums: bool = False
    """Whether products of unsigned and signed bytes are added in pairs in 16 bits, which saturate."""

    def held(self, dtype: torch.dtype) -> torch.dtype:
        """Dtype in which values are held that the graph declares as ``dtype``."""
        return self.dtype if dtype.is_floating_point and dtype != torch.float64 else dtype

    def hold(self, value: Any, device: torch.device | str) -> Any:
        """A numpy array or tensor as kernels take it: a torch tensor of the held dtype on ``device``.

        Types that torch cannot compute with (FP8, 4-bit and unsigned wide integers, strings, sequences) are returned as
        they are; ONNX's reference implementation takes them from there.
        """
        if isinstance(value, list) or value is None:
            return value
        if not isinstance(value, Tensor):
            array = np.asarray(value)
            if array.dtype == ml_dtypes.bfloat16:
                array = array.astype(np.float32)
            if array.dtype not in _TORCH_TYPES:
                return array
            value = shared(array)
        return value.to(device, self.held(value.dtype))

    def round(self, value: Any) -> Any:
        """``value`` as this arithmetic stores it between operations."""
        return self.value(value) if self.value is not None and isinstance(value, Tensor) else value

    def round_constant(self, value: Any) -> Any:
        """``value`` as a weight or another constant of the graph.

        What is finite stays so: TensorRT's builder and the FP16 converters of ONNX Runtime and ModelOpt take the
        closest finite number for one that is out of range, such as a mask of −3.4e38.
        """
        rounded = self.round(value)
        if self.value is None or not isinstance(value, Tensor) or not value.is_floating_point():
            return rounded
        overflown = torch.isinf(rounded) & torch.isfinite(value)
        if not bool(overflown.any()):
            return rounded
        return torch.where(overflown, torch.sign(value) * self.largest, rounded)

    @property
    def largest(self) -> float:
        """The largest finite number that ``value`` keeps finite."""
        numbers = [torch.finfo(kind).max for kind in (torch.float16, torch.bfloat16)]
        finite_kept = [n for n in numbers if self.value is None or math.isfinite(float(self.value(torch.tensor(n))))]
        return max(finite_kept)

    def operands(self, *values: Tensor, axes: Sequence[Axes] = (ROWS, COLUMNS)) -> tuple[Tensor, ...]:
        """The operands of a convolution or matrix product as the multiplier reads them.

        ``axes``: what the scales of each operand follow, where it has any. Shapes and dtypes stay; the values are those
        that the operand's type can hold.
        """
        if self.scaling is not None:
            encode = self.scaling.encode
            return tuple(
                encode(v, axes[min(i, len(axes) - 1)], i).values.to(v.dtype) if v.dim() else v
                for i, v in enumerate(values)
            )
        if self.operand is None:
            return values
        first, *second_operands = values
        return (self.operand(first), *map(self.weight or self.operand, second_operands))

    @property
    def settings(self) -> dict[str, Any]:
        """Everything about this arithmetic that can change numbers, in words, JSON-safe."""
        order = f"channel tiles of {self.tile}, kernel taps row by row, blocks of 16 channels"
        if self.vector:
            order = f"kernel taps row by row, channels in vectors of {self.vector}, four of each of four at a time"
        accumulated = self.running_sum.name if self.running_sum else str(self.dtype).removeprefix("torch.")
        return {
            "arithmetic": self.name,
            "held_as": str(self.dtype).removeprefix("torch."),
            "values_rounded_by": self.value and self.value.__name__,
            "operands_rounded_by": self.operand and self.operand.__name__,
            "accumulation": f"float16, {order}" if self.tile else accumulated,
            "tile": self.tile,
            "slices": self.slices,
            **({"split": self.split, "split_kernels": self.split_kernels} if self.split > 1 else {}),
            **({"vector": self.vector} if self.vector else {}),
            **({"paired_sums": True} if self.paired_sums else {}),
            **(self.scaling.settings if self.scaling else {}),
            **(self.running_sum.settings if self.running_sum else {}),
        }


FP64 = Arithmetic("fp64", torch.float64)
FP32 = Arithmetic("fp32")
TF32 = Arithmetic("tf32", operand=round_tf32)
TF32_CUT = Arithmetic("tf32", operand=truncate_tf32)
"""TF32 of TensorRT's kernels without shared memory: the tensor core takes no notice of the lower bits."""
TF32_DECONV = Arithmetic("tf32", operand=round_tf32, weight=truncate_tf32)
"""TF32 of TensorRT's kernels for transposed convolutions."""
BF16 = Arithmetic("bf16", value=round_bf16)
FP16 = Arithmetic("fp16", value=round_fp16)
FP16ACC = Arithmetic("fp16acc", value=round_fp16, tile=64)
INT8 = Arithmetic("int8")
"""FP32 between the graph's own QuantizeLinear and DequantizeLinear nodes: what they let through is exact in FP32."""

_OUT = {"fp32": None, "bf16": round_bf16, "fp16": round_fp16}
_SUBNORMAL = {"e4m3": -6, "e5m2": -14, "e2m1": 0}
"""Exponents of the smallest normal numbers."""


def narrow_arithmetic(options: NarrowOptions) -> Arithmetic:
    """The arithmetic of products with operands of 4 or 8 bits: everything else is held, and stored as ``out`` says."""
    scaling = Scaling(options)
    running_sum = None
    if options.half_sum:
        running_sum = replace(FP16_SUM, promote=options.promote)
    elif options.significant is not None:
        bits = options.significant - 1
        name = "fp22" if bits == HOPPER_FP8.kept else f"{options.significant}-bit"
        lowest = _SUBNORMAL[scaling.codec.name] if scaling.codec and options.family == "fp8" else -126
        running_sum = replace(HOPPER_FP8, name=name, aligned=bits, kept=bits, lowest=lowest)
        running_sum = replace(running_sum, nearest=options.nearest, promote=options.promote)
    return Arithmetic(str(options), value=_OUT[options.out], scaling=scaling, running_sum=running_sum)


class _Arithmetics(dict[str, Arithmetic]):
    """Arithmetics by name; those of the narrow precisions are made when they are first asked for."""

    def __missing__(self, name: str) -> Arithmetic:
        if not is_narrow(name):
            raise KeyError(name)
        options = NarrowOptions.parse(name)
        arithmetic = self.get(str(options)) or narrow_arithmetic(options)
        self[name] = self[str(options)] = arithmetic
        return arithmetic


ARITHMETICS: dict[str, Arithmetic] = _Arithmetics({a.name: a for a in (FP64, FP32, TF32, BF16, FP16, FP16ACC, INT8)})
for _family in FAMILIES:
    ARITHMETICS[_family]

_KEEPS_BITS = {"fp64": 53, "fp32": 24, "tf32": 24, "int8": 24, "fp16": 11, "fp16acc": 11, "bf16": 8}
"""Significant bits of the values that each arithmetic stores."""


def overrides_of(graph: Graph, narrow: Mapping[str, str], base: Arithmetic) -> dict[str, Arithmetic]:
    """Node → arithmetic, for the nodes of ``graph`` that compute in less than ``base``.

    A node computes as the narrowest of its results in ``narrow`` (value → ``fp16`` or ``bf16``). An exact arithmetic
    (FP64) has no overrides.
    """
    if base.name == "fp64":
        return {}
    overrides = {}
    for node in graph.nodes:
        arithmetic = min((ARITHMETICS[narrow[o]] for o in node.outputs if o in narrow), key=_bits, default=base)
        if _bits(arithmetic) < _bits(base):
            scaled = base.scaling is not None and node.op in CONTRACTIONS
            overrides[node.name] = replace(base, value=arithmetic.value) if scaled else arithmetic
    return overrides


def _bits(arithmetic: Arithmetic) -> int:
    if arithmetic.scaling is not None:
        return _KEEPS_BITS[arithmetic.scaling.options.out]
    return _KEEPS_BITS[arithmetic.name]
