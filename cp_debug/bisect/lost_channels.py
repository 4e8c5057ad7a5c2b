"""Channels of an output that are gone: one or a few numbers in the test, beside others of the tensor that are not.

Boxes of hundreds of pixels and scores below 1 may share a tensor and its scale. Judged as one tensor, scores that are
all 0 are a small difference. The layer that loses them is the one behind which they come back, if it has their numbers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch

from cp_debug.bisect.candidate_run import CandidateRun
from cp_debug.bisect.finding import Effect, Finding
from cp_debug.bisect.quantized_segment import Levels
from cp_debug.bisect.result import GUILTY, LayerRow
from cp_debug.bisect.shares import Shares
from cp_debug.errors import InputError
from cp_debug.graph.graph import downstream
from cp_debug.probes.distance import relative_l2
from cp_debug.programs.pipeline import Key
from cp_debug.recipes.base import Arrays
from cp_debug.safe_text import some

LEAST = 16
"""Elements of a channel that must be alike for it to count as gone, not as small by chance."""
BEYOND = 10.0
"""A channel counts that reaches, or varies by, so many times the absolute tolerance in the reference."""
NAMED = 8
"""Channels that are named."""
TRIED = 8
"""Layers that are tried for what is lost, those next to the output first."""
HALF = 0.5
"""Part of what a channel varies by which the few numbers that it has are off."""
HELPS = 0.5
"""Part of the error of what is lost that a change may leave to be told."""


@dataclass(frozen=True)
class Gone:
    """Channels of one tensor that are gone."""

    axis: int
    channels: tuple[int, ...]
    levels: tuple[float, ...]
    """The numbers that the first of them has in the test."""
    reach: float
    """Largest magnitude of them in the reference."""
    others: float
    """Largest magnitude that the test has."""
    whole: bool
    """Whether no other channel is left."""

    @property
    def named(self) -> str:
        """``channels 4, 5, 6``; ``all values`` of a tensor without channels."""
        if self.whole and len(self.channels) == 1:
            return "all values"
        return f"channel{'s' * self.several} {some(self.channels, NAMED)}"

    @property
    def several(self) -> bool:
        """Whether more than one channel is gone."""
        return self.whole or len(self.channels) > 1

    def __str__(self) -> str:
        """``channels 4, 5, 6 are 0 everywhere, but reach 0.94 in the reference; other channels reach 640``."""
        are, reach = ("are", "reach") if self.several else ("is", "reaches")
        rest = f"; other channels reach {self.others:.3g}" * (not self.whole)
        levels = " or ".join(f"{level:.3g}" for level in self.levels)
        return f"{self.named} {are} {levels} everywhere, but {reach} {self.reach:.3g} in the reference{rest}"

    def of(self, tensor: np.ndarray) -> np.ndarray:
        """These channels of a tensor of that shape, in its dtype."""
        return np.take(tensor, self.channels, self.axis)

    def put(self, tensor: np.ndarray, other: np.ndarray) -> np.ndarray:
        """``tensor`` with these channels of ``other``, in the shape of both and the dtype of ``tensor``."""
        made, at = tensor.copy(), (slice(None),) * self.axis + (list(self.channels),)
        made[at] = other[at]
        return made

    def in_int8(self, tensor: np.ndarray) -> np.ndarray:
        """``tensor`` in symmetric INT8, each channel by a scale of its own; float64, in its shape."""
        levels = Levels(symmetric=True, channels=True)
        return levels.applied(torch.from_numpy(tensor.astype(np.float64)), self.axis).numpy()


def gone(reference: np.ndarray, test: np.ndarray, least: float = 0.0) -> Gone | None:
    """The channels of ``test`` of which nothing is left, where those of ``reference`` vary by more than ``least``, or
    reach more than that and all is 0; None without any.

    They hold one number, or up to three that are off by half of what the channel varies, or more: less than a step of
    the scale. Channels lie along the second axis, along the last one, or along any other of five axes; a tensor of one
    axis, or without so many elements of each, is one channel. Both have one shape and a float dtype.
    """
    if test.shape != reference.shape or reference.dtype.kind != "f" or not reference.size:
        return None
    ours, theirs = (np.nan_to_num(np.atleast_2d(array)) for array in (reference, test))
    for axis in dict.fromkeys((1, ours.ndim - 1, *(range(2, ours.ndim) if ours.ndim > 4 else ()), 0)):
        if ours.size // ours.shape[axis] < LEAST:
            continue
        right, left = (np.moveaxis(array, axis, 0).reshape(array.shape[axis], -1) for array in (ours, theirs))
        levels = _levels(left)
        few = np.flatnonzero(~np.isnan(levels).any(0))
        a, b = right[few].astype(np.float64), left[few].astype(np.float64)
        varies = np.linalg.norm(a - a.mean(1, keepdims=True), axis=1)
        spread = np.where(b.any(1), np.ptp(a, axis=1), np.abs(a).max(1))
        continuous = (b == b[:, :1]).all(1) | np.isnan(_levels(a)).any(0)
        found = few[continuous & (np.linalg.norm(b - a, axis=1) >= HALF * varies) & (spread > least)]
        if found.size:
            reach, whole = float(np.abs(right[found]).max()), len(found) == len(left)
            first = tuple(sorted({float(level) for level in levels[:, found[0]]}))
            return Gone(axis, tuple(found.tolist()), first, reach, float(np.abs(theirs).max()), whole)
    return None


def _levels(rows: np.ndarray) -> np.ndarray:
    """The least, the largest and a third number of each row of [R, N], [3, R]; NaN where there are more."""
    low, high = rows.min(1), rows.max(1)
    third = np.where((rows != low[:, None]) & (rows != high[:, None]), rows, low[:, None]).max(1)
    levels = np.stack([low, high, third])
    more = np.logical_and.reduce([rows != level[:, None] for level in levels]).any(1)
    return np.where(more, np.nan, levels)


def lost_channels(reference: Arrays, test: Arrays, atol: float) -> Iterator[str]:
    """A sentence for each output, in both name → array of one shape and any float dtype, whose channels are lost."""
    for name, found in _gone_from(reference, test, atol).items():
        # Zeros, NaN and Inf are told as they are; a few numbers as large as those of the rest are chance.
        large = found.whole or len(found.levels) == 1 or found.others > BEYOND * found.reach
        if large and test[name].any() and np.isfinite(found.of(test[name])).all():
            yield f"{name}: {found}"


def _gone_from(reference: Arrays, test: Arrays, atol: float) -> dict[str, Gone]:
    pairs = {name: gone(ours, test[name], BEYOND * atol) for name, ours in reference.items() if name in test}
    return {name: found for name, found in pairs.items() if found is not None}


def judge_lost(
    run: CandidateRun, rows: Mapping[Key, LayerRow], shares: Shares, reference: Arrays, results: Arrays
) -> dict[Key, Finding]:
    """Make the layers guilty whose one scale serves channels of very different sizes, so that small ones, and with them
    channels of the final outputs, are gone. Returns them → their finding.

    Tried are scales of their own for what is gone in a layer, and its exact values, all behind it computed by the
    oracle: channels of the outputs have to come back. ``reference``, ``results``: the final outputs by name, of any
    shape and float dtype.
    """
    settled: dict[Key, Finding] = {}
    least = run.tolerance[1]
    lost = _gone_from(reference, results, least)
    if not any(row.replay and row.replay.step is not None for row in rows.values()):
        return settled
    tried = 0
    for key, row in sorted(rows.items(), key=lambda item: -item[1].index):
        if tried >= TRIED or not lost:
            break
        step = row.replay.step if row.replay else None
        if row.side != "test" or row.verdict == GUILTY or not (row.replay and row.replay.introduced):
            continue
        reached = {key.value, *downstream(run.programs[key.component].graph.nodes, [key.value])}
        if len(run.programs) == 1 and reached.isdisjoint(lost):
            continue
        try:
            value, exact = shares.captured(key), shares.exact(key)
            found = gone(exact, value)
            if found is None or (found.reach > found.others and not found.whole):
                continue
            tried += 1
            whole, own = (shares.behind(key, found.put(value, new)) for new in (exact, found.in_int8(exact)))
        except InputError:
            continue
        left = _gone_from(reference, whole, least)
        back = {n: g for n, g in lost.items() if n not in left or not set(g.channels) <= set(left[n].channels)}
        if not back:
            continue
        before, after, exactly = (
            max(relative_l2(g.of(outputs[n]), g.of(reference[n])) for n, g in back.items())
            for outputs in (results, own, whole)
        )
        if exactly > HELPS * before:  # what comes back is no nearer to the reference
            continue
        scale = f"one {run.kind(key.component).upper()} scale{'' if step is None else f' of {step:.3g}'}"
        does = "holds this and what is much larger" if found.whole else "serves channels of very different sizes"
        row.verdict, row.why = GUILTY, f"{scale} {does}: {found.named} {'are' if found.several else 'is'} lost"
        fix = f"leave {row.name} unquantized: {exactly:.2g} off in what {', '.join(back)} lost"
        if after <= HELPS * before:
            fix = f"quantize {found.named} apart from the others, by scales of their own: {after:.2g}; or {fix}"
        fix += f" ({before:.2g} before), emulated"
        evidence = {"scale": step, "axis": found.axis, "channels": [*found.channels], "reach": found.reach}
        evidence |= {"others": found.others, "before": before, "after": after, "after_unquantized": exactly}
        settled[key] = Finding(
            "int8-shared-scale",
            f"{scale} {does}: {found}",
            [row.name],
            [row.op],
            evidence=evidence,
            effect=Effect(row.share),
            fix=fix,
        )
        lost = {name: g for name, g in lost.items() if name not in back}
    return settled
