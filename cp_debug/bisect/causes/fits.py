"""Linear fits whose every prediction is out of sample, so that a fit can explain no more than it has found."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

PER_PARAMETER = 2
"""Elements that a fold needs for each number fitted to it."""


def halves(mask: Tensor) -> tuple[Tensor, Tensor]:
    """``mask`` dealt out by chance to two folds; the same on every call."""
    places = mask.flatten().nonzero().flatten()
    order = torch.randperm(len(places), generator=torch.Generator().manual_seed(0))
    first = torch.zeros_like(mask).flatten()
    first[places[order[: len(places) // 2]]] = True
    first = first.reshape(mask.shape)
    return first, mask & ~first


def cross_fit(
    y: Tensor, basis: Sequence[Tensor], mask: Tensor, axis: int | None = None
) -> tuple[Tensor, Tensor] | None:
    """Fit y ≈ Σ θ_k · basis_k on the elements of ``mask``, with one θ for all or (``axis``) one for each channel.

    Returns the prediction, each element from the half that it is not in, and θ [C or 1, K] of both halves together.
    None where there are too few elements.
    """
    basis = [b.expand_as(y) for b in basis]
    dims = [d for d in range(y.dim()) if d != axis]
    prediction = torch.zeros_like(y)
    first, second = halves(mask)
    for fold, rest in ((first, ~first), (second, first)):
        theta = _solve(y, basis, fold, dims)
        if theta is None:
            return None
        part = sum((t * b for t, b in zip(theta, basis, strict=True)), torch.zeros_like(y))
        prediction = torch.where(rest, part, prediction)
    theta = _solve(y, basis, mask, dims)
    assert theta is not None
    return prediction, torch.stack([t.flatten() for t in theta], -1)


def _solve(y: Tensor, basis: Sequence[Tensor], mask: Tensor, dims: list[int]) -> list[Tensor] | None:
    """θ for each basis tensor, shaped to be multiplied with it; a channel without elements or signal gets 0."""
    if not dims:
        return None
    count = mask.sum(dims, keepdim=True)
    if float(count.double().median()) < PER_PARAMETER * len(basis):
        return None
    masked = [torch.where(mask, b, 0.0) for b in basis]
    y = torch.where(mask, y, 0.0)
    gram = torch.stack([torch.stack([(a * b).sum(dims) for b in masked], -1) for a in masked], -2)
    right = torch.stack([(a * y).sum(dims) for a in masked], -1)
    theta = torch.linalg.pinv(gram, rtol=1e-12, hermitian=True) @ right[..., None]
    shape = [1 if d in dims else y.shape[d] for d in range(y.dim())]
    return [theta[..., k, 0].reshape(shape) for k in range(len(basis))]
