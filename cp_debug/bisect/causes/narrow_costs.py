"""Layers that do what their narrow precision declares and lose much by it: what the declaration could do better."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from cp_debug.backends.arithmetic import ARITHMETICS
from cp_debug.backends.narrow_options import GRANULARITIES, GROUPS, Granularity, NarrowOptions, is_narrow
from cp_debug.backends.scaling import MX_BLOCK, NVFP4_BLOCK, Axes, Codec, Scaling
from cp_debug.bisect.causes.base import Candidate
from cp_debug.bisect.causes.narrow import FIXES, Operands, blocks, decoded
from cp_debug.bisect.causes.segment import Segment
from cp_debug.bisect.finding import Finding
from cp_debug.bisect.narrow_variants import MOST_WORK, work
from cp_debug.bisect.result import GUILTY, LayerRow
from cp_debug.probes.distance import relative_l2
from cp_debug.programs.pipeline import Key

GAIN = 1.6
"""Factor by which a remedy must make a layer's error smaller: on numbers that fit their blocks, none reaches 1.35."""
AS_GOOD = 0.8
"""Gain relative to the best one up to which a remedy that stands before it is named."""
OUTLIER = 6.0
"""Magnitude of an outlier, in root mean squares of the other values of its block."""
SMALLEST_GROUP = 32
"""The smallest group of INT4 that every runtime has."""
POWERS = (0.25, 0.5, 0.75, 1.0)
"""Powers of the inputs' mean magnitudes that are tried as scales of INT4 weights' channels."""
NOTABLE = 0.5
"""Introduced error, in unit roundoffs of the element type, from which a layer is asked for a remedy: numbers that fit
their scales introduce less than one."""
ASKED = 8
"""Layers that are asked, those that introduce most first."""


def costs(
    rows: Mapping[Key, LayerRow], claim: str, roundoff: float, segment: Callable[[Key, LayerRow], Segment]
) -> Iterator[Finding]:
    """A finding for each cause that makes layers lose more than their format must, though they do what it declares.

    ``claim``: the precision of the test, ``roundoff`` its unit roundoff. Others than narrow ones have no findings.
    """
    if not is_narrow(claim):
        return
    asked = [
        (key, row)
        for key, row in rows.items()
        if row.verdict != GUILTY
        and row.replay is not None
        and row.replay.precision == claim
        and (row.replay.introduced or 0.0) > NOTABLE * roundoff
    ]
    asked.sort(key=lambda item: item[1].replay.introduced or 0.0, reverse=True)  # type: ignore[union-attr]
    groups: dict[str, list[tuple[LayerRow, Candidate]]] = {}
    for key, row in asked[:ASKED]:
        if (found := remedy(segment(key, row), NarrowOptions.parse(claim))) is not None:
            groups.setdefault(found.cause, []).append((row, found))
    for cause, members in groups.items():
        worst = max(members, key=lambda pair: pair[1].evidence["error_as_declared"])[1]
        names = [row.name for row, _ in members]
        evidence = {"declared": True, **worst.evidence, "gains": {row.name: r.evidence["gain"] for row, r in members}}
        fix = worst.fix.replace("{layers}", ", ".join(names))
        yield Finding(cause, worst.says, names, [row.op for row, _ in members], evidence=evidence, fix=fix)


def remedy(segment: Segment, options: NarrowOptions) -> Candidate | None:
    """The change of the declaration that makes a layer's error smaller by most; None where none gains enough.

    ``options``: the layer's declared precision. The layer is computed again by each remedy from its captured inputs.
    """
    declared = relative_l2(segment.claimed, segment.exact)
    found = []
    for cause, text, value, evidence in _tried(segment, options):
        error = relative_l2(value, segment.exact)
        gain = declared / error if error else float("inf")
        if gain >= GAIN:
            figures = {"error_as_declared": declared, "error_then": error, "gain": gain, **evidence}
            says = f"{text}: the error falls from {declared:.2g} to {error:.2g}"
            found.append(Candidate(cause, says, value, 0, figures, FIXES[cause]))
    best = max((r.evidence["gain"] for r in found), default=0.0)
    return next((r for r in found if r.evidence["gain"] >= AS_GOOD * best), None)


def _tried(segment: Segment, options: NarrowOptions) -> Iterator[tuple[str, str, Tensor, dict[str, Any]]]:
    """(Cause, words, result, figures) of every remedy that the format has, the least invasive first."""

    def run(other: NarrowOptions) -> Tensor:
        return segment.run(ARITHMETICS[str(other)])

    if options.significant is not None:
        wide = replace(options, significant=None, half_sum=False, nearest=False, promote=None)
        if work(segment.nodes, segment.given, segment.exact, segment.graph) <= MOST_WORK:
            yield "fp8-accumulation", "its sums are too narrow; keep them in FP32", run(wide), {}
        options = wide
    if options.family == "int4":
        for group in (g for g in reversed(GROUPS) if SMALLEST_GROUP <= g < options.group):
            text = f"groups of {options.group} weights are too large; take {group}"
            yield "int4-group", text, run(replace(options, group=group)), {"group": options.group, "then": group}
    if options.family == "fp8":
        granularity: Granularity
        for granularity in GRANULARITIES[GRANULARITIES.index(options.granularity) + 1 :]:
            evidence = {"granularity": options.granularity, "then": granularity}
            other = replace(options, granularity=granularity)
            yield "block-scale", f"one scale spans too much; let {blocks(other)} share one", run(other), evidence
    operands = Operands.of(segment)
    if operands is None:
        return
    scaling = Scaling(options)
    if options.family == "int4":
        if (found := _channels_scaled(segment, operands, scaling)) is not None:
            value, power, times = found
            text = f"inputs of some channels are up to {times:.3g} times the usual size, and their weights are lost in "
            text += f"groups of {options.group}; scale channels by the size of their inputs before quantizing"
            yield "int4-outlier", text, value, {"power": power, "largest_input": times}
        return
    if options.family in ("mxfp4", "nvfp4"):
        block = MX_BLOCK if options.family == "mxfp4" else NVFP4_BLOCK
        apart = _outliers_apart(segment, operands, scaling, block)
        if apart is not None:
            kept, shares = apart
            of = " and ".join(f"{share:.2%} of operand {place}" for place, share in enumerate(shares) if share >= 5e-5)
            text = f"outliers ({of or 'few'}) take the scale of their blocks of {block}; keep them apart"
            yield "fp4-outlier", text, kept, {"outliers": shares, "block": block}
    if options.family in ("fp8", "mxfp8") and (codec := scaling.codec) is not None:
        encoded = [_Unlimited(options).encode(*each, place) for place, each in enumerate(operands.pairs)]
        result = segment.edited(operands.node, inputs={p: each.values.double() for p, each in enumerate(encoded)})
        if result is not None:
            small = [(each.codes != 0) & (each.codes.abs() < codec.tiniest) for each in encoded]
            lost = [float(mask.double().mean()) for mask in small]
            text = f"numbers lie below the normal range of their scale ({lost[0]:.1%} of operand 0, {lost[1]:.1%} of "
            yield "fp8-underflow", text + "operand 1); more exponents would keep them", result, {"below_normal": lost}


class _Unlimited(Scaling):
    """The same, but of small numbers all bits are kept, as an unlimited exponent does."""

    @property
    def codec(self) -> Codec | None:
        own = super().codec
        return own and replace(own, nearest=partial(_to_bits, own.mantissa))


def _to_bits(mantissa: int, x: Tensor) -> Tensor:
    step = torch.exp2((torch.frexp(x).exponent - 1 - mantissa).to(x.dtype))
    return torch.round(x / step) * step


def _channels_scaled(segment: Segment, operands: Operands, scaling: Scaling) -> tuple[Tensor, float, float] | None:
    """The result with weights whose input channels were scaled before they were quantized, as by AWQ (Lin et al., 2023,
    equation 4), the power of the mean magnitude of the inputs that the scales are, and the largest of these magnitudes
    in multiples of their median; None without data or weights."""
    (x, x_axes), (w, w_axes) = operands.pairs
    axis = x_axes.reduced % x.dim()
    sizes = x.abs().mean([d for d in range(x.dim()) if d != axis])
    middle = float(sizes.median()) if sizes.numel() else 0.0
    if not middle or not bool(sizes.isfinite().all()):
        return None
    shape = [1] * w.dim()
    shape[w_axes.reduced] = -1
    best: tuple[float, Tensor, float] | None = None
    for power in POWERS:
        scale = (sizes / middle).clamp(min=1e-4).pow(power).reshape(shape)
        value = segment.edited(operands.node, inputs={1: scaling.encode(w * scale, w_axes, 1).values.double() / scale})
        if value is None:
            return None
        error = relative_l2(value, segment.exact)
        if best is None or error < best[0]:
            best = error, value, power
    return None if best is None else (best[1], best[2], float(sizes.max()) / middle)


def _outliers_apart(
    segment: Segment, operands: Operands, scaling: Scaling, block: int
) -> tuple[Tensor, list[float]] | None:
    """The result where products with an outlier are computed exactly, and the share of outliers in each operand; None
    where something else than a sum follows the product."""
    if any(n.op not in ("Add", "Sub") for n in segment.nodes[segment.nodes.index(operands.node) + 1 :]):
        return None
    a, b = operands.values
    apart = [torch.where(_outlying(x, axes, block), x, 0.0) for x, axes in operands.pairs]
    rest = decoded(replace(operands, values=(a - apart[0], b - apart[1])), scaling).values()
    none = torch.zeros_like(a)

    def product(left: Tensor, right: Tensor) -> Tensor | None:
        return segment.edited(operands.node, inputs={0: left, 1: right})

    terms = [product(*p) for p in (rest, (apart[0], b), (a, apart[1]), apart, (none, b))]
    if any(t is None for t in terms):
        return None
    both, left, right, twice, bias = (t for t in terms if t is not None)
    # Each of the products has the bias in it.
    value = both + left + right - twice - 2 * bias
    return value, [float((o != 0).double().mean()) for o in apart]


def _outlying(x: Tensor, axes: Axes, block: int) -> Tensor:
    """Mask of the elements of ``x`` that are far larger than the rest of their block along the reduced axis.

    Up to an eighth of a block's elements: the most of them of which the smallest is still far larger than the root mean
    square of the rest. Several outliers in one block do not hide each other.
    """
    axis = axes.reduced % x.dim()
    squares = x.square().movedim(axis, -1)
    size = squares.shape[-1]
    # What fills the last block up is below everything, and no part of the rest.
    padded = torch.nn.functional.pad(squares, (0, -size % block), value=-1.0).unflatten(-1, (-1, block))
    ordered = padded.sort(-1, descending=True).values
    counts = (ordered >= 0).sum(-1, keepdim=True) - torch.arange(1, block + 1)
    ordered = ordered.clamp(min=0)
    rest = (ordered.sum(-1, keepdim=True) - ordered.cumsum(-1)).clamp(min=0) / counts.clamp(min=1)
    most = max(1, block // 8)
    far = ((ordered > OUTLIER**2 * rest) & (counts > 0))[..., :most]
    limit = torch.where(far, ordered[..., :most], torch.inf).amin(-1, keepdim=True)
    return (padded >= limit).flatten(-2)[..., :size].movedim(-1, axis)
