"""Scales by what they do to a network's outputs, to first order.

Rounding what a layer reads, x, to levels s apart changes it by δ(x, s), and the outputs by J·δ. The scale with the
least ‖δ‖ does not serve: one element matters more than another, and errors that are alike in many places (the empty
part of a bird's-eye canvas holds a few constants) do not average out but add up. For a random sign vector v over the
outputs, E[(vᵀJ·δ)²] = ‖J·δ‖² (Hutchinson's estimator), and vᵀJ is one backward pass. As δ depends on the value of an
element alone, the gradient is summed in a histogram over these values: one pass serves every scale.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from cp_debug.graph.scales import QMAX

BATCHES = 16
"""Number of batches whose gradients are taken."""
_VECTORS = 4
"""Number of backward passes a batch."""
_HALF = 8192
"""Bins on each side of 0; the range is 2 to 4 times what the first batch holds."""
_CANDIDATES = 200
_LEAST = 0.01
"""The smallest scale that is tried, as a share of the largest magnitude."""


class OutputErrors:
    """The gradients of a network's outputs, by the tensors that its layers read."""

    def __init__(self) -> None:
        self._generator = torch.Generator().manual_seed(0)
        self._limits: dict[str, float] = {}
        self._rows: dict[str, list[Tensor]] = {}
        self._leaves: list[Tensor] = []

    def watch(self, name: str, tensor: Tensor) -> Tensor:
        """The tensor to hand to the layer: ``tensor`` itself, with only that layer's share of the gradient.

        Any shape, float dtype; both stay.
        """
        values = tensor.detach().flatten().float()
        largest = float(values.abs().amax()) if len(values) else 0.0
        if not largest:
            return tensor
        limit = self._limits.setdefault(name, 2.0 ** (math.ceil(math.log2(largest)) + 1))
        bins = (values * (_HALF / limit)).floor_().clamp_(-_HALF, _HALF - 1).int() + _HALF
        handed = tensor.view_as(tensor) if tensor.requires_grad else tensor.detach().requires_grad_()
        if handed.is_leaf:
            self._leaves.append(handed)

        def keep(gradient: Tensor) -> None:
            weights = gradient.flatten().double()
            self._rows[name][-1] += torch.bincount(bins, weights, minlength=2 * _HALF).cpu()

        self._rows.setdefault(name, [])
        handed.register_hook(keep)
        return handed

    def differentiate(self, outputs: Sequence[Tensor]) -> bool:
        """Go back from the outputs of a watched forward, each counting alike; False where torch cannot.

        Outputs have any shape and a float dtype.
        """
        ends = [output for output in outputs if output.requires_grad]
        leaves, self._leaves = self._leaves, []
        for _ in range(_VECTORS if ends else 0):
            for rows in self._rows.values():
                rows.append(torch.zeros(2 * _HALF, dtype=torch.float64))
            signs = [torch.randint(0, 2, end.shape, generator=self._generator) * 2.0 - 1 for end in ends]
            norms = [float(torch.linalg.vector_norm(end.detach())) or 1.0 for end in ends]
            starts = [(s / norm).to(end) for s, norm, end in zip(signs, norms, ends, strict=True)]
            try:
                torch.autograd.backward(ends, starts, retain_graph=True, inputs=leaves)
            except RuntimeError:  # an operation without derivative, or one in place on what it needs
                return False
        return bool(ends)

    def amax(self, name: str, largest: float) -> float | None:
        """The clip limit with the least error at the outputs, up to ``largest``; None where no gradient came.

        Hutchinson's estimate of ‖J·δ‖² decides; see the module's text.
        """
        rows = torch.stack(self._rows[name]) if self._rows.get(name) else torch.zeros(1, 2 * _HALF)
        occupied = rows.any(dim=0)
        occupied[_HALF] = False  # zeros are exact
        if not occupied.any():
            return None
        values = ((torch.arange(-_HALF, _HALF) + 0.5) * (self._limits[name] / _HALF)).double()[occupied]
        candidates = torch.logspace(math.log10(_LEAST), 0, _CANDIDATES, dtype=torch.float64) * largest
        steps = (candidates / QMAX)[:, None]
        changes = (values / steps).round_().clamp_(-QMAX - 1, QMAX).mul_(steps).sub_(values)
        errors = (rows[:, occupied] @ changes.T).square_().mean(dim=0)
        return float(candidates[errors.argmin()])
