"""Comparisons that say little although they agree: outputs without a number, and outputs of zeros."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from cp_debug.probes.statistics import TensorStats

ALL_ZERO = "every output is 0 everywhere on both sides: other inputs may tell more"

Compared = Mapping[str, Sequence[TensorStats]]
"""Output → how it compared, by sample."""


def silent(outputs: Compared) -> dict[str, str]:
    """Output of which no two numbers were compared on any sample → why."""
    return {
        name: reasons[0]
        for name, samples in outputs.items()
        if all(reasons := [stats.nothing_compared for stats in samples])
    }


def why_nothing(outputs: Compared) -> str:
    """The reason where nothing at all was compared; empty where something was."""
    found = silent(outputs)
    if len(found) < len(outputs):
        return ""
    return ", ".join(f"{name} is {reason}" for name, reason in found.items()) or "there is no output"


def caveats(outputs: Compared) -> list[str]:
    """Phrases about outputs that say little: those that are silent, Inf on both sides, zeros where there is nothing
    else."""
    found = silent(outputs)
    phrases = [f"{name}: {reason}" for name, reason in found.items()]
    both = [
        n for n, all_of in outputs.items() if n not in found and any(s.inf_ref and not s.mismatched for s in all_of)
    ]
    phrases += [f"{name}: Inf at the same places on both sides" for name in both]
    others = [stats for name, samples in outputs.items() if name not in found for stats in samples]
    return [*phrases, ALL_ZERO] if others and all(stats.both_zero for stats in others) else phrases
