"""BatchNormalization gone wrong, as a node or folded into the convolution before it: epsilon, statistics, folding.

With o = γ·(x − μ)/√(σ² + ε) + β exact, x follows from o, so every hypothesis is a per-channel function of o without a
free number, but for a fitted ε or unknown statistics.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from cp_debug.bisect.causes import single_numbers
from cp_debug.bisect.causes.affine import off_channels
from cp_debug.bisect.causes.base import Candidate, cause
from cp_debug.bisect.causes.batchnorm_pairing import Place, places
from cp_debug.bisect.causes.batchnorm_parameters import BatchNorm
from cp_debug.bisect.causes.fits import cross_fit
from cp_debug.bisect.causes.segment import Segment

_CHECKPOINT = "load running_mean and running_var into {layers}, call eval() before the export, and export again"


@cause()
def wrong_parameters(segment: Segment) -> Iterator[Candidate]:
    """Candidates without a fitted number: defaults that were never replaced, the batch's statistics, folding."""
    fold = "fold γ/√(σ² + ε) into output channels and β − μ·γ/√(σ² + ε) into the bias of {layers}"
    for place in places(segment):
        own, x = place.own, place.x
        if own is None or x is None:
            continue
        zeros, ones = torch.zeros_like(own.mean), torch.ones_like(own.mean)
        variance, mean = torch.var_mean(x, [d for d in range(x.dim()) if d != place.axis], correction=0)
        plain = BatchNorm(ones, zeros, zeros, ones, 0.0)
        shift = replace(plain, bias=own.bias - own.mean * own.scale)
        never = "never loaded"
        for name, says, base, norm in (
            ("statistics", f"the running statistics were {never} (mean 0, variance 1)", x,
             replace(own, mean=zeros, variance=ones)),
            ("statistics", f"the running mean was {never} (0)", x, replace(own, mean=zeros)),
            ("statistics", f"the running variance was {never} (1)", x, replace(own, variance=ones)),
            ("statistics", "the statistics of the batch are used: train mode", x,
             replace(own, mean=mean, variance=variance)),
            ("parameters", f"weight was {never} (1)", x, replace(own, weight=ones)),
            ("parameters", f"bias was {never} (0)", x, replace(own, bias=zeros)),
            ("folding", "it is left out", x, plain),
            ("folding", "it is applied twice: folded, and as a node", place.before, own),
            ("folding", "folded without its shift", x, replace(own, mean=zeros, bias=zeros)),
            ("folding", "folded without its scale", x, shift),
        ):  # fmt: skip
            value = place.finish(place.applied(norm, base))
            fix = fold if name == "folding" else _CHECKPOINT
            yield Candidate(f"batchnorm-{name}", f"BatchNorm: {says}", value, fix=fix)


@cause()
def epsilon(segment: Segment) -> Iterator[Candidate]:
    """Candidates: the ε of another framework, or any other, fitted as one number."""
    for place in places(segment):
        if place.own is not None and place.x is not None:
            number = _epsilon(place, place.own, place.x)
            yield from single_numbers.with_usual([number])
            yield from single_numbers.by_search(segment, [number])


def _epsilon(place: Place, own: BatchNorm, x: Tensor) -> single_numbers.Number:
    def tell(eps: float) -> tuple[str, str, dict[str, Any], str]:
        says, evidence = f"BatchNorm: eps is {eps:.3g} instead of {own.eps:.3g}", {"eps": eps, "instead_of": own.eps}
        return "normalization-eps", says, evidence, f"BatchNorm2d(…, eps={own.eps:g}) in {{layers}}, and export again"

    return single_numbers.epsilon(own.eps, lambda eps: place.finish(place.applied(replace(own, eps=eps), x)), tell)


@cause()
def unknown_statistics(segment: Segment) -> Iterator[Candidate]:
    """Candidates with fitted statistics: a scale and an offset for each channel that is off.

    The mean and variance that they imply are evidence. A simpler candidate has all means off by the same share of their
    deviations and all variances by one factor.
    """
    norm = segment.batch_norm
    if norm is None or segment.test.dim() < 2:
        return
    error, unit = segment.test - segment.before, torch.ones((), dtype=torch.float64)
    slope = segment.before - segment.along(norm.bias)
    off = off_channels(segment)
    for basis, axis in (([slope, unit], segment.axis), ([slope, segment.along(norm.weight)], None)):
        fit = cross_fit(error, basis, segment.folds, axis)
        if fit is None or not bool((fit[1][:, 0] > -1).all()):
            continue
        change, theta = fit
        if axis is not None:
            change = torch.where(segment.along(off), change, 0.0)
        ratio = 1 + theta[:, 0]
        offset = theta[:, 1] if axis is not None else theta[:, 1] * norm.weight
        variance = (norm.variance + norm.eps) / ratio**2 - norm.eps
        mean = norm.mean - offset / (norm.scale * ratio)
        evidence = {"implied_mean": mean[:8].tolist(), "mean": norm.mean[:8].tolist()}
        evidence |= {"implied_variance": variance[:8].tolist(), "variance": norm.variance[:8].tolist()}
        says = "BatchNorm: other statistics (channels are off in scale and offset)"
        # One less than any affine fit of the same channels: it says more about the same numbers. Not as few as a factor
        # for each: where that alone explains them, mean and variance would have to be off in step.
        count = int(off.sum())
        parameters = max(2 * count - 1, count + 1) if axis is not None else 2
        value = segment.activate(segment.before + change)
        yield Candidate("batchnorm-statistics", says, value, parameters, evidence, _CHECKPOINT)
