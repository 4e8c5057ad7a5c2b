"""Comparisons that a distance says little of: outputs without a number, outputs of zeros, tensors of strings, and ties.

Strings are the same or not, so that their distance is a share of elements. Ties are indices that differ, of elements
that are equal: top-k, argmax, sort and suppression may choose either.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from cp_debug.probes.arrays import Tensor as AnyTensor
from cp_debug.probes.arrays import is_text
from cp_debug.probes.statistics import TensorStats, compare
from cp_debug.safe_text import amount

IN_EVAL_MODE = "was passed in train mode and runs in eval mode"
"""What a note says of a module, told beside every verdict: another network was compared than was given."""
ALL_ZERO = "every output is 0 everywhere on both sides: other inputs may tell more"

Compared = Mapping[str, Sequence[TensorStats]]
"""Output → how it compared, by sample."""


def _silent(outputs: Compared) -> dict[str, str]:
    """Output of which no two numbers were compared on any sample → why."""
    return {
        name: reasons[0]
        for name, samples in outputs.items()
        if all(reasons := [stats.nothing_compared for stats in samples])
    }


def why_nothing(outputs: Compared) -> str:
    """The reason where nothing at all was compared; empty where something was."""
    found = _silent(outputs)
    if len(found) < len(outputs):
        return ""
    return ", ".join(f"{name} is {reason}" for name, reason in found.items()) or "there is no output"


def caveats(outputs: Compared) -> list[str]:
    """Phrases about outputs that say little: those that are silent, Inf on both sides, zeros where there is nothing
    else."""
    found = _silent(outputs)
    phrases = [f"{name}: {reason}" for name, reason in found.items()]
    both = [
        n for n, all_of in outputs.items() if n not in found and any(s.inf_ref and not s.mismatched for s in all_of)
    ]
    phrases += [f"{name}: Inf at the same places on both sides" for name in both]
    others = [stats for name, samples in outputs.items() if name not in found for stats in samples]
    return [*phrases, ALL_ZERO] if others and all(stats.both_zero for stats in others) else phrases


LONGEST = 40
"""Characters of a string that are shown."""


def compare_strings(reference: AnyTensor, test: AnyTensor) -> TensorStats:
    """Statistics of two tensors of strings, or of numbers that stand for strings, as if each were 1 where it is right.

    A string that differs counts as 0 in the test: ``max_abs`` is then 1, ``mean_abs`` the share that differs and
    ``rel_l2`` its square root. Shapes and dtypes of the two may be any.
    """
    ours, theirs = np.asarray(reference), np.asarray(test)
    right = np.ones(theirs.shape, np.float64)
    if ours.shape == theirs.shape:
        right = np.asarray(ours == theirs, np.float64)
    stats = compare(np.ones(ours.shape, np.float64), right)
    return replace(stats, dtype_ref="string", dtype_test="string")


def compare_any(reference: AnyTensor, test: AnyTensor) -> TensorStats:
    """``compare``, and ``compare_strings`` where a side of any shape holds strings."""
    text = is_text(reference) or is_text(test)
    return compare_strings(reference, test) if text else compare(reference, test)


def difference_in_words(reference: AnyTensor, test: AnyTensor) -> str:
    """Number of the strings that differ, with the first of them; empty where they agree, and for other shapes."""
    ours, theirs = np.asarray(reference), np.asarray(test)
    if ours.shape != theirs.shape or not len(wrong := np.argwhere(ours != theirs)):
        return ""
    place = tuple(int(i) for i in wrong[0])
    shown = [_shown(array[place]) for array in (theirs, ours)]
    count = f"{len(wrong)} of {ours.size} strings differ" if ours.size > 1 else "the string differs"
    at = f", the first at {list(place)}" if len(wrong) > 1 else f", at {list(place)}" if place else ""
    return f"{count}{at}: {shown[0]} for {shown[1]}"


def _shown(text: object) -> str:
    plain = text.decode(errors="replace") if isinstance(text, bytes) else str(text)
    return repr(plain if len(plain) <= LONGEST else plain[: LONGEST - 1] + "…")


ROUNDING = 1e-6
"""Difference of two elements, relative to the largest, up to which rounding decides which of them comes first."""


TIES = "ties are broken differently"
"""Beginning of the sentence of ``ties``."""


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
                f"{TIES} in {amount(int(differs.sum()), 'place')}, the first at {first}: elements "
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
