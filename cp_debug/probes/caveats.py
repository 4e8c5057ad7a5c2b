"""Comparisons that a distance says little of: outputs without a number, outputs of zeros, and tensors of strings.

Strings are the same or not, so that their distance is a share of elements.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from cp_debug.probes.arrays import Tensor
from cp_debug.probes.statistics import TensorStats, compare

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


def is_text(array: Tensor) -> bool:
    """Whether an array of any shape holds strings."""
    return getattr(array.dtype, "kind", "") in {"O", "S", "U"}


def compare_strings(reference: Tensor, test: Tensor) -> TensorStats:
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


def compare_any(reference: Tensor, test: Tensor) -> TensorStats:
    """``compare``, and ``compare_strings`` where a side of any shape holds strings."""
    text = is_text(reference) or is_text(test)
    return compare_strings(reference, test) if text else compare(reference, test)


def difference_in_words(reference: Tensor, test: Tensor) -> str:
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
