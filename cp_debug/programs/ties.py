"""Ties: indices that differ, of elements that are equal. Top-k, argmax, sort and suppression may choose either."""

from __future__ import annotations

import torch
from torch import Tensor

from cp_debug.safe_text import amount

ROUNDING = 1e-6
"""Difference of two elements, relative to the largest, up to which rounding decides which of them comes first."""


def ties(keys: Tensor, ours: Tensor, theirs: Tensor) -> str:
    """In words, where two tensors of indices into ``keys`` differ by ties alone; empty where they differ by more.

    ``keys`` are numbers of any shape; the indices count along one of its axes, whichever fits, or along all of them.
    """
    if ours.shape != theirs.shape or ours.is_floating_point() or theirs.is_floating_point() or not keys.numel():
        return ""
    numbers, places = keys.double(), [t.long() for t in (ours, theirs)]
    differs = places[0] != places[1]
    if not bool(differs.any()):
        return ""
    for chosen in _chosen(numbers, places):
        if chosen[0].shape != chosen[1].shape or chosen[0].numel() != differs.numel():
            continue
        apart = (chosen[0] - chosen[1]).abs().reshape(differs.shape)
        apart[chosen[0].reshape(differs.shape) == chosen[1].reshape(differs.shape)] = 0.0  # of Inf
        if float(apart.max()) <= ROUNDING * float(numbers.nan_to_num(0, 0, 0).abs().max()):
            first = differs.nonzero()[0].tolist()
            exact = "equal" if not float(apart.max()) else "equal but for rounding"
            which = f"{places[0][tuple(first)].item()} and {places[1][tuple(first)].item()}"
            return (
                f"ties are broken differently in {amount(int(differs.sum()), 'place')}, the first at {first}: elements "
                f"{which} are {exact}, so either choice is right"
            )
    return ""


def _chosen(numbers: Tensor, places: list[Tensor]) -> list[list[Tensor]]:
    """The elements that both tensors of indices choose, for each way in which these may count."""
    found = []
    flat = numbers.reshape(-1)
    if all(int(p.min()) >= 0 and int(p.max()) < len(flat) for p in places):
        found.append([flat[p] for p in places])
    for axis in range(numbers.dim()):
        own = [p if p.dim() == numbers.dim() else p.unsqueeze(axis) for p in places]
        others = [n for d, n in enumerate(numbers.shape) if d != axis]
        fits = own[0].dim() == numbers.dim() and [n for d, n in enumerate(own[0].shape) if d != axis] == others
        if fits and all(int(p.min()) >= 0 and int(p.max()) < numbers.shape[axis] for p in own):
            found.append([torch.gather(numbers, axis, p) for p in own])
    return found
