"""FP8 and 4 bits: narrow sums, coarse blocks and groups, scales that do not fit the numbers at hand."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from cp_debug.backends.arithmetic import ARITHMETICS
from cp_debug.backends.narrow_options import FAMILIES, NarrowOptions, is_narrow
from cp_debug.backends.scaling import E2M1, E4M3, Axes, Codec, FixedScaling, Scaling, axes_of
from cp_debug.bisect.causes.base import Candidate, cause
from cp_debug.bisect.causes.linear_parts import ProductLayout
from cp_debug.bisect.causes.segment import Segment, as_double
from cp_debug.bisect.narrow_variants import MOST_WORK, variants, work
from cp_debug.graph.graph import Node
from cp_debug.probes.distance import relative_l2

OCTAVES = (-14, 20)
"""Powers of two, relative to the scale that fits the data, between which a scale is searched for."""
STEPS = 32
"""Scales tried in an octave, in which E4M3 has 8 numbers: one of them rounds most values as the right one does."""
REFINED = 4
"""Times that the best of them is searched for in ever smaller steps."""
ROWS_SEEN, OUTPUTS_SEEN = 12, 64
"""Rows and outputs that a scale is fitted to."""
UNSCALED = 1.05
"""Squared error without a scale, relative to that with the best one, up to which there is said to be none."""
BF16_ADVICE = "keep them in BF16"
FIXES = {
    "fp8-accumulation": "promote the sums of {layers} into FP32 every 128 products (torch._scaled_mm: "
    "use_fast_accum=False; DeepGEMM does), or " + BF16_ADVICE,
    "fp8-saturated": "scale {layers} by the largest magnitude ÷ 448 before the cast, or " + BF16_ADVICE,
    "fp8-underflow": "scale {layers} by the largest magnitude ÷ 448 before the cast, if needed in blocks of 128, or "
    + BF16_ADVICE,
    "scale-stale": "compute the scales of {layers} from the current tensor, keep a shorter history of maxima with a "
    "margin, or calibrate again on data like this",
    "block-scale": "scale {layers} by finer blocks: 1x128 for data and 128x128 for weights, or " + BF16_ADVICE,
    "int4-group": "quantize the weights of {layers} in smaller groups, or " + BF16_ADVICE,
    "int4-outlier": "scale the input channels of {layers} by the size of their data before quantizing (AWQ), and "
    "divide what writes the data by it, or keep these channels in BF16",
    "fp4-outlier": "keep the outliers of {layers} apart in BF16, rotate them away (Hadamard), or " + BF16_ADVICE,
    "fp8-element": "use E4M3 in the forward pass of {layers}",
}
_OTHERWISE = "keep {layers} in the declared precision"
_SAYS = {
    "fp8-accumulation": "operands are what is declared, sums are kept in {sum}",
    "block-scale": "one scale for {blocks}; {declared} is declared",
    "int4-group": "groups of {group} values share a scale; {declared_group} are declared",
    "fp8-element": "operands are in E5M2, which keeps one bit less than E4M3",
}


def departure(segment: Segment, options: NarrowOptions, computed_in: str) -> Candidate | None:
    """The candidate of a layer that is known to be computed in another narrow arithmetic than ``options``; None where
    that is none of the known departures."""
    for name, other in variants(options):
        if str(other) == computed_in:
            return _departure(segment, options, name, other)
    return None


@cause(approximate=True)
def overflowing_sums(segment: Segment) -> Iterator[Candidate]:
    """Candidates: sums that are narrower than the claimed precision's, where Inf or NaN are born."""
    claim = segment.context.claim.name
    if segment.product is None or not is_narrow(claim) or not segment.strange:
        return
    options = NarrowOptions.parse(claim)
    if work(segment.nodes, segment.given, segment.exact, segment.graph) <= MOST_WORK:
        for name, other in variants(options):
            if other.half_sum:
                yield _departure(segment, options, name, other)


def _departure(segment: Segment, options: NarrowOptions, name: str, other: NarrowOptions) -> Candidate:
    value = segment.run(ARITHMETICS[str(other)])
    error, declared = (relative_l2(v, segment.exact) for v in (value, segment.claimed))
    figures = {"computed_in": str(other), "instead_of": str(options), "error": error, "error_as_declared": declared}
    says = _SAYS[name].format(
        sum=_sum(other),
        blocks=blocks(other),
        declared=blocks(options),
        group=other.group,
        declared_group=options.group,
    )
    if segment.strange:
        says, figures = f"{says}, and overflow", {k: v for k, v in figures.items() if not k.startswith("error")}
    else:
        says += f": an error of {error:.2g} where {declared:.2g} is declared"
    return Candidate(name, says, value, 0, figures, FIXES[name], heard=True)


@cause(costly=True, approximate=True)
def family(segment: Segment) -> Iterator[Candidate]:
    """Candidates: the layer in FP8 or 4 bits where a wider precision is claimed."""
    if segment.product is None or is_narrow(segment.context.claim.name) or segment.context.quantized is not None:
        return
    for name in (*FAMILIES, "fp8:channel", "fp8:block", "fp8:e5m2", "int4:g32"):
        options = NarrowOptions.parse(name)
        if options.family == "int4" and not (
            segment.product.op in ("MatMul", "Gemm") and segment.weight(segment.product, 1) is not None
        ):
            continue
        says = f"operands are in {options.family.upper()} ({blocks(options)} with one scale)"
        yield Candidate(options.family, says, segment.run(ARITHMETICS[name]), 0, {"computed_in": name}, _OTHERWISE)
    yield from _with_scales(segment, NarrowOptions("fp8"))


def _sum(options: NarrowOptions) -> str:
    if options.half_sum:
        return "FP16"
    return f"{options.significant} significant bits" + (
        f" and promoted every {options.promote} products" if options.promote else ", never promoted"
    )


def blocks(options: NarrowOptions) -> str:
    """What shares a scale, in words."""
    if options.family == "fp8":
        return {"tensor": "a tensor", "channel": "a row or output channel", "block": "1x128 and 128x128 values"}[
            options.granularity
        ]
    return {"int4": f"{options.group} values", "nvfp4": "16 values"}.get(options.family, "32 values")


@dataclass
class Operands:
    """Both operands of a layer's product, float64, and the axes that their scales follow."""

    node: Node
    values: tuple[Tensor, Tensor]
    axes: tuple[Axes, Axes]

    @property
    def pairs(self) -> list[tuple[Tensor, Axes]]:
        """Each operand with its axes; shapes and dtypes as in ``values``."""
        return list(zip(self.values, self.axes, strict=True))

    @classmethod
    def of(cls, segment: Segment) -> Operands | None:
        """The operands that the segment's one product reads; None without one."""
        node = segment.product
        if node is None:
            return None
        names = node.proto.input[:2]
        earlier = segment.nodes[: segment.nodes.index(node)]
        values = segment.context.oracle.run_nodes(earlier, segment.given, list(dict.fromkeys(names)))
        pair = tuple(as_double(values[name]) for name in names)
        return cls(node, pair, axes_of(node))  # type: ignore[arg-type]


def decoded(operands: Operands, scaling: Scaling) -> dict[int, Tensor]:
    """Both operands as the encoding leaves them, by place, float64 in their shapes."""
    return {place: scaling.encode(*each, place).values.double() for place, each in enumerate(operands.pairs)}


@cause(approximate=True)
def wrong_scale(segment: Segment) -> Iterator[Candidate]:
    """Candidates: data whose scale is not that of its values, where FP8 is claimed."""
    claim = segment.context.claim.name
    if is_narrow(claim) and (options := NarrowOptions.parse(claim)).family == "fp8":
        yield from _with_scales(segment, options)


def _with_scales(segment: Segment, options: NarrowOptions) -> Iterator[Candidate]:
    """Candidates: data in FP8 with another scale; fitted to few rows and outputs, judged by all."""
    claim, operands = segment.context.claim.name, Operands.of(segment)
    if operands is None or segment.context.quantized is not None:
        return
    others, x = decoded(operands, Scaling(options)), operands.values[0]
    largest = float(x.abs().max()) if x.numel() else 0.0
    codec = Scaling(options).codec
    if not math.isfinite(largest) or not largest or codec is None:
        return

    def result(scale: float, saturates: bool = True) -> Tensor | None:
        data = FixedScaling(options, (scale, None), saturates).encode(x, operands.axes[0], 0).values.double()
        return segment.edited(operands.node, inputs={**others, 0: data})

    if segment.strange:
        if codec.largest < largest:
            figures: dict[str, Any] = {"largest": largest, "ends_at": codec.largest, "scale": 1.0}
            says = f"its data reaches {largest:.4g} and is cast to {codec.name.upper()} without a scale: that ends at "
            says += f"{codec.largest:g}" + (" and has no Inf, so larger values become NaN" if codec is E4M3 else "")
            yield Candidate("fp8-saturated", says, result(1.0, False), 0, figures, FIXES["fp8-saturated"], heard=True)
        return
    scale = _fitted(segment, lambda scale: FixedScaling(options, (scale, None)), operands, others)
    if scale is not None:
        name, says, figures = misfit(x, codec, scale)
        yield Candidate(name, says, result(scale), 1, figures, FIXES[name], heard=is_narrow(claim))


def misfit(x: Tensor, codec: Codec, scale: float) -> tuple[str, str, dict[str, Any]]:
    """(Cause, words, figures) of a scale that does not fit an operand, float64 of any shape."""
    rounded, largest = codec((x / scale).float()).double() * scale, float(x.abs().max())
    beyond, lost = x.abs() > codec.largest * scale, (x.abs() < codec.tiniest * scale) & (x != 0)
    squares = (rounded - x).square()
    cut, under = (float(squares[mask].sum()) / (float(squares.sum()) or 1.0) for mask in (beyond, lost))
    figures: dict[str, Any] = {
        "scale": scale, "needed_scale": largest / codec.largest, "clipped": float(beyond.double().mean()),
        "below_normal": float(lost.double().mean()), "error_clipped": cut, "error_underflow": under,
    }  # fmt: skip
    effect = (
        f"{figures['clipped']:.2%} of it are clipped at {codec.largest * scale:.4g}"
        if cut > under
        else f"{figures['below_normal']:.2%} of it lie below {codec.tiniest * scale:.3g}, where bits are lost"
    )
    if scale == 1.0 and codec is not E2M1:
        name = "fp8-saturated" if cut > under else "fp8-underflow"
        says = f"its data is cast to {codec.name.upper()} without a scale (it reaches {largest:.4g}): {effect}"
        return name, says, figures
    says = f"the scale {scale:.3g} of its data is for numbers up to {scale * codec.largest:.4g}, but they "
    return "scale-stale", says + f"reach {largest:.4g}: {effect}", figures


def _fitted(
    segment: Segment, fixed: Callable[[float], FixedScaling], operands: Operands, others: Mapping[int, Tensor]
) -> float | None:
    """The best scale of the data for the rows and outputs with the largest errors, which are few of all; None where
    none explains half of their error."""
    if operands.node is not segment.nodes[-1] or not bool(segment.finite.all()):
        return None
    layout = ProductLayout.of(segment, operands.node)
    if layout is None or layout.place != 1 or not layout.fits(segment):
        return None
    if (columns := layout.columns(segment)) is None:
        return None
    known = layout.flat((segment.exact - layout.without_bias(segment)).expand_as(segment.test))
    wrong = layout.flat(segment.error).square()
    rows = wrong.sum((0, 2)).argsort(descending=True)[:ROWS_SEEN].sort().values
    outputs = wrong.sum((0, 1)).argsort(descending=True)[:OUTPUTS_SEEN].sort().values
    x, w = columns[:, rows], layout.theta_of(others[1])[:, :, outputs]
    y = (layout.flat(segment.test) - known)[:, rows][..., outputs]

    def error(scale: float) -> float:
        return float((fixed(scale).decoded(x) @ w - y).square().sum())

    top = float(operands.values[0].abs().max()) / fixed(1.0).largest
    grid = [top * 2.0 ** (k / STEPS) for k in range(OCTAVES[0] * STEPS, OCTAVES[1] * STEPS + 1)]
    best, step = min(grid, key=error), 2.0 ** (1 / STEPS)
    for _ in range(REFINED):
        best, step = min((best * step ** (k / 8) for k in range(-8, 9)), key=error), step ** (1 / 6)
    best = 1.0 if error(1.0) <= UNSCALED * error(best) + 1e-12 * float(y.square().sum()) else best
    return best if error(best) <= 0.5 * float(wrong[:, rows][..., outputs].sum()) else None
