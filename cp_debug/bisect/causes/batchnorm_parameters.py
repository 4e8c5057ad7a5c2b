"""Parameters of a BatchNormalization, and what they make of a tensor."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class BatchNorm:
    """A BatchNormalization: parameters [C] in float64, and its epsilon."""

    weight: Tensor
    bias: Tensor
    mean: Tensor
    variance: Tensor
    eps: float

    @classmethod
    def of(cls, parameters: Sequence[Tensor | None], eps: float) -> BatchNorm | None:
        """The BatchNormalization with weight, bias, mean and variance, each [C]; None where one of them is missing."""
        present = [p.detach().double().cpu() for p in parameters if p is not None]
        return cls(present[0], present[1], present[2], present[3], eps) if len(present) == 4 else None

    @property
    def scale(self) -> Tensor:
        """[C] factor of each channel: weight ÷ √(variance + eps)."""
        return self.weight / torch.sqrt(self.variance + self.eps)

    def rounded(self, rounding: Callable[[Tensor], Tensor]) -> BatchNorm:
        """The BatchNormalization with every parameter rounded by itself.

        ``rounding`` is given each parameter, [C] float64, and keeps shape and dtype.
        """
        weight, bias, mean, variance = map(rounding, (self.weight, self.bias, self.mean, self.variance))
        return BatchNorm(weight, bias, mean, variance, self.eps)

    def applied(self, x: Tensor, along: Callable[[Tensor], Tensor]) -> Tensor:
        """The normalized ``x``; ``along`` shapes parameters to meet it."""
        return (x - along(self.mean)) * along(self.scale) + along(self.bias)
