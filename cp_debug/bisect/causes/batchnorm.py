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
from cp_debug.bisect.causes.batchnorm_parameters import BatchNorm
from cp_debug.bisect.causes.fits import cross_fit
from cp_debug.bisect.causes.segment import Segment

_CHECKPOINT = "load running_mean and running_var into {layers}, call eval() before the export, and export again"


@cause()
def wrong_parameters(segment: Segment) -> Iterator[Candidate]:
    """Candidates without a fitted number: defaults that were never replaced, the batch's statistics, folding."""
    norm = segment.batch_norm
    if norm is None or not bool((norm.weight != 0).all()):
        return
    x = _input(segment, norm)
    zeros, ones = torch.zeros_like(norm.mean), torch.ones_like(norm.mean)
    dims = [d for d in range(x.dim()) if d != segment.axis]
    variance, mean = torch.var_mean(x, dims, correction=0)
    statistics = "batchnorm-statistics"
    for name, says, parameters in (
        (
            statistics,
            "the running statistics were never loaded (mean 0, variance 1)",
            replace(norm, mean=zeros, variance=ones),
        ),
        (statistics, "the running mean was never loaded (0)", replace(norm, mean=zeros)),
        (statistics, "the running variance was never loaded (1)", replace(norm, variance=ones)),
        (statistics, "the statistics of the batch are used: train mode", replace(norm, mean=mean, variance=variance)),
        ("batchnorm-parameters", "weight was never loaded (1)", replace(norm, weight=ones)),
        ("batchnorm-parameters", "bias was never loaded (0)", replace(norm, bias=zeros)),
    ):
        yield Candidate(name, f"BatchNorm: {says}", _apply(segment, parameters, x), fix=_CHECKPOINT)
    fold = "fold γ/√(σ² + ε) into output channels and β − μ·γ/√(σ² + ε) into the bias of {layers}"
    along = segment.along
    for says, result in (
        ("BatchNorm is left out", x),
        ("BatchNorm is applied twice: folded, and as a node", norm.applied(segment.before, segment.along)),
        ("folded without its shift", x * along(norm.scale)),
        ("folded without its scale", x + along(norm.bias - norm.mean * norm.scale)),
    ):
        yield Candidate("batchnorm-folding", says, segment.activate(result), fix=fold)
    if (value := _wrong_axis(segment, norm)) is not None:
        yield Candidate("batchnorm-folding", "folded along the input channels of the weight", value, fix=fold)


@cause()
def epsilon(segment: Segment) -> Iterator[Candidate]:
    """Candidates: the ε of another framework, or any other, fitted as one number."""
    norm = segment.batch_norm
    if norm is None or not bool((norm.weight != 0).all()):
        return
    own, x = norm, _input(segment, norm)

    def tell(eps: float) -> tuple[str, str, dict[str, Any], str]:
        says, evidence = f"BatchNorm: eps is {eps:.3g} instead of {own.eps:.3g}", {"eps": eps, "instead_of": own.eps}
        return "normalization-eps", says, evidence, f"BatchNorm2d(…, eps={own.eps:g}) in {{layers}}, and export again"

    number = single_numbers.epsilon(own.eps, lambda eps: _apply(segment, replace(own, eps=eps), x), tell)
    yield from single_numbers.with_usual([number])
    yield from single_numbers.by_search(segment, [number])


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


def _input(segment: Segment, norm: BatchNorm) -> Tensor:
    """x: what the BatchNorm was given."""
    return (segment.before - segment.along(norm.bias)) / segment.along(norm.scale) + segment.along(norm.mean)


def _apply(segment: Segment, norm: BatchNorm, x: Tensor) -> Tensor:
    return segment.activate(norm.applied(x, segment.along))


def _wrong_axis(segment: Segment, norm: BatchNorm) -> Tensor | None:
    node = segment.product
    weight = segment.weight(node, 1) if node is not None else None
    if node is None or weight is None or weight.dim() < 3:
        return None
    transposed = node.op == "ConvTranspose"
    wrong, right = 0 if transposed else 1, norm.scale_of(weight, transposed=transposed)
    if right is None or weight.shape[wrong] != len(norm.scale):
        return None
    inputs = norm.scale.reshape([-1 if d == wrong else 1 for d in range(weight.dim())])
    return segment.edited(node, inputs={1: weight / right * inputs})
