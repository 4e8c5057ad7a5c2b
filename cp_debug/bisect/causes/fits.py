"""Linear fits whose predictions are all out of sample, so that a fit explains no more than it has learnt."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

PER_PARAMETER = 2
"""Elements that a fold needs for each number fitted to it."""


def halves(mask: Tensor) -> tuple[Tensor, Tensor]:
    """``mask`` dealt out by chance to two folds; the same on every call.

    ``mask`` is bool of any shape; both folds have that shape, and no element in common.
    """
    places = mask.flatten().nonzero().flatten()
    order = torch.randperm(len(places), generator=torch.Generator().manual_seed(0))
    first = torch.zeros_like(mask).flatten()
    first[places[order[: len(places) // 2]]] = True
    first = first.reshape(mask.shape)
    return first, mask & ~first


def cross_fit(
    y: Tensor, basis: Sequence[Tensor], folds: tuple[Tensor, Tensor], axis: int | None = None
) -> tuple[Tensor, Tensor] | None:
    """Fit y ≈ Σ θ_k · basis_k on the elements of both ``folds``, with one θ for all or (``axis``) one for each channel.

    Returns the prediction, each element from the fold that it is not in, and θ [C or 1, K] of both folds together.
    None where there are too few elements.
    """
    basis = [b.expand_as(y) for b in basis]
    dims = [d for d in range(y.dim()) if d != axis]
    if not dims:
        return None
    first, second = (sums(y, basis, fold, dims) for fold in folds)
    if min(float(each[0].double().median()) for each in (first, second)) < PER_PARAMETER * len(basis):
        return None
    shape = [1 if d in dims else y.shape[d] for d in range(y.dim())]

    def predicted(theta: Tensor) -> Tensor:
        return sum((t.reshape(shape) * b for t, b in zip(theta.unbind(-1), basis, strict=True)), torch.zeros_like(y))

    ours, theirs, both = (
        _solve(*each) for each in (first, second, [a + b for a, b in zip(first, second, strict=True)])
    )
    return torch.where(folds[0], predicted(theirs), predicted(ours)), both.reshape(-1, len(basis))


def sums(y: Tensor, basis: Sequence[Tensor], mask: Tensor, dims: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Count [C], Gram matrix [C, K, K] and right side [C, K] of the normal equations over the elements of ``mask``, for
    each slice [C] along what is not in ``dims``."""
    masked = [torch.where(mask, b, 0.0) for b in basis]
    gram = torch.stack([torch.stack([(a * b).sum(dims) for b in masked], -1) for a in masked], -2)
    y = torch.where(mask, y, 0.0)
    return mask.sum(dims), gram, torch.stack([(a * y).sum(dims) for a in masked], -1)


def nearest_slices(rows: Tensor, wanted: Tensor) -> Tensor:
    """[slices] int64: for each slice of ``wanted`` the nearest one of ``rows``, its own where none is nearer; both
    [slices, elements]."""
    distance = rows.square().sum(1) - 2 * wanted @ rows.T
    nearest = distance.argmin(1)
    unmoved = distance.diagonal() <= distance.min(1).values + 1e-9 * wanted.square().sum(1)
    return torch.where(unmoved, torch.arange(len(nearest)), nearest)


def _solve(count: Tensor, gram: Tensor, right: Tensor) -> Tensor:
    """θ [C, K] or [K]; a channel without elements or signal gets 0."""
    return (torch.linalg.pinv(gram, rtol=1e-12, hermitian=True) @ right[..., None])[..., 0]
