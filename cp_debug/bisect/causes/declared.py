"""Findings where no layer is guilty: which layers the declared precision costs most in, and which of them to keep."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from statistics import fmean
from typing import Any

import torch

from cp_debug.backends.arithmetic import ARITHMETICS
from cp_debug.bisect.candidate_run import CandidateRun
from cp_debug.bisect.causes.nonfinite import rounded_off
from cp_debug.bisect.causes.precision import PROMOTED
from cp_debug.bisect.causes.search import Explanation
from cp_debug.bisect.causes.segment import Segment
from cp_debug.bisect.causes.where import locate
from cp_debug.bisect.finding import Effect, Finding
from cp_debug.bisect.kept import COUNTS, HELPS, KeepTrials, gave, in_words
from cp_debug.bisect.kept import MOST as NAMED
from cp_debug.bisect.remainder import Flip
from cp_debug.bisect.replayed import EXCESS
from cp_debug.bisect.result import GUILTY, LayerRow
from cp_debug.bisect.shares import NOT_LINEAR
from cp_debug.errors import InputError
from cp_debug.graph.graph import downstream
from cp_debug.programs.pipeline import Key
from cp_debug.safe_text import in_digits, percent

MOST = 0.8
"""Part of what all layers make of the divergence that the named layers make."""
NOTICED = 0.01
"""Share from which a layer is named after the first."""
FEW = 3, 0.2
"""At most so many layers, or such a part of all that round, are few: never more than a line can name."""
MUCH = 0.2
"""Share from which one of many layers contributes much."""
NAMED_FIRST = 3
"""Layers that are named where it adds up over many."""
CARRIED = 0.5
"""Share of the divergence that derivatives carry to the end, up to which whole numbers that flip are its cause."""
CANCELS = 1.5
"""Sum of the magnitudes of all shares from which errors cancel each other."""
ENLARGES = 3.0
"""Amplification from which the layer that enlarges an error is named."""
TRIED = 8
"""Layers on which the emulation of the declared precision is tried."""
BITS = {"fp16": 11, "fp16acc": 11, "tf32": 11, "bf16": 8}
"""Significant bits of a value."""

Rows = Mapping[Key, LayerRow]
Costliest = Callable[[Rows], Mapping[Key, float]]


def int8(
    rows: Rows,
    kind: str,
    unquantized: Callable[[Sequence[LayerRow]], str],
    trials: KeepTrials | None = None,
    costliest: Costliest = lambda rows: {},
    outliers: Callable[[Key, LayerRow], tuple[str, str]] = lambda key, row: ("", ""),
) -> Iterator[Finding]:
    """A finding about the layer whose correct rounding to levels costs most.

    ``kind``: the precision of the levels, as ``CandidateRun.kind`` names it. ``unquantized``: the flag
    that leaves layers out of it. ``costliest``: see ``Effects.costliest``. ``outliers``: why
    a layer costs much, and what helps.
    """
    # What one layer rounds whose quantizers lie in others counts as well.
    sound = [(k, r) for k, r in rows.items() if r.verdict != GUILTY and r.replay and r.replay.introduced]
    sound.sort(key=lambda item: _size(item[1]), reverse=True)
    wrong = any(row.verdict == GUILTY for row in rows.values())  # that comes first, and makes shares mislead by itself
    sound, alone = (sound, {}) if wrong else _costliest_first(sound, costliest)
    ranked = [(key, row) for key, row in sound if key in alone or _size(row) >= NOTICED]
    if not ranked:
        return
    row, (why, helps) = ranked[0][1], outliers(*ranked[0])
    most = f"; of {len(sound)} correct layers, this one costs most" * (len(sound) > 1) + _off(alone)
    fix, figures = f"accept it, or leave it unquantized (not tried): {unquantized([row])}", dict[str, Any]()
    if wrong:
        fix = helps = ""
    elif trials is not None:
        with suppress(InputError):
            fix, figures = _left_out(trials, dict(ranked), unquantized)
    yield Finding(
        "int8",
        f"{kind.upper()} as declared{most}{why}",
        [row.name],
        [row.op],
        evidence={
            "introduced": row.replay and row.replay.introduced,
            "then": ", ".join(f"{r.name} ({percent(r.share or 0.0)})" for _, r in ranked[1:4]),
            **figures,
        },
        effect=Effect(row.share),
        fix=" · or ".join(filter(None, (fix, helps))),
    )


def _costliest_first(
    items: list[tuple[Key, LayerRow]], costliest: Costliest
) -> tuple[list[tuple[Key, LayerRow]], dict[Key, float]]:
    """The items, given with the largest share first, in the order of their ``Effects.costliest``, and these; as they
    are and without where shares do not mislead: they add up and do not cancel."""
    total, sizes = sum(row.share or 0.0 for _, row in items), sum(_size(row) for _, row in items)
    if sizes <= CANCELS and abs(1 - total) <= NOT_LINEAR:
        return items, {}
    alone = {key: off for key, off in costliest(dict(items)).items() if off}
    return sorted(items, key=lambda item: alone.get(item[0], 0.0), reverse=True), alone


def _off(alone: Mapping[Key, float]) -> str:
    """``: the outputs are 0.94 off by its error alone``, of the costliest; empty without any."""
    return f": the outputs are {max(alone.values()):.2g} off by its error alone" if alone else ""


def _size(row: LayerRow) -> float:
    """Size of a share: what one layer adds, another may take off, and on other inputs it is the other way round."""
    return abs(row.share or 0.0)


def _left_out(
    trials: KeepTrials, ranked: Rows, unquantized: Callable[[Sequence[LayerRow]], str]
) -> tuple[str, dict[str, Any]]:
    """(What leaving the first layers unquantized gave, in words; the layers and the figures), as it was tried.

    Where that does not halve the divergence, those with the largest shares are tried, too: they fit this sample best.
    """
    found, chosen = trials.first(ranked), [*ranked.values()]
    if found is None or found.after > HELPS * found.before:
        by_share = dict(sorted(ranked.items(), key=lambda item: _size(item[1]), reverse=True))
        other = trials.first(by_share, COUNTS[-1:])
        if other is not None and (found is None or other.after < found.after):
            found, chosen = other, [*by_share.values()]
    if found is None:
        return "no fix found: with the layers that cost most unquantized, most of it remains, emulated", {}
    chosen = chosen[: found.layers]
    return (
        f"leave unquantized: {unquantized(chosen)}: {gave(found)}",
        {"unquantized": [row.name for row in chosen], "after": found.after, "before": found.before},
    )


def declared(
    run: CandidateRun,
    rows: Rows,
    segment: Callable[[Key, LayerRow], Segment],
    explain: Callable[[Key, LayerRow], Explanation],
    trials: KeepTrials | None,
    costliest: Costliest,
) -> Iterator[Finding]:
    """A finding about what the rounding of a floating-point precision makes: where most of it comes from, or that it
    adds up over many layers; with the nodes to keep in FP32, where a set was found that helps.

    ``explain`` tries the causes on a layer. ``costliest``: see ``Effects.costliest``.
    """
    claim = run.precision.name
    own = ((key, row, row.replay) for key, row in rows.items() if row.replay and row.op != "input")
    # What is right and introduces more, as in another basis that its readers undo, does not round.
    rounds = [(key, row) for key, row, replay in own if replay.introduced and (replay.excess or 0.0) <= EXCESS]
    if claim not in (*PROMOTED, "fp32") or not rounds:
        return
    rounds.sort(key=lambda item: (_size(item[1]), item[1].replay.introduced), reverse=True)  # type: ignore[union-attr]
    first = _first(rounds)
    few = bool(first) and len(first) <= min(NAMED, max(FEW[0], FEW[1] * len(rounds)))
    if claim == "fp32" and not few:  # nothing computes more exactly than that everywhere
        return
    told = first if few else rounds
    segments = [segment(key, row) for key, row in told[:TRIED]]
    explained = fmean(part.explained(part.claimed)[0] for part in segments)
    # Where less than half is explained, the kernels sum in another order: what the emulation has right is the size.
    evidence: dict[str, Any] = {"declared": True, "explained_over": len(segments)} | (
        {"magnitude_only": True} if explained < 0.5 else {}
    )
    name = claim.upper()
    says = f"{name} as declared: its rounding adds up over {len(rounds)} layers"
    if few:
        says = _where_from(run, rows, first, segments[0])
    elif rounds[0][1].share:
        most = ", ".join(f"{row.name} ({percent(row.share or 0.0)})" for _, row in rounds[:NAMED_FIRST] if row.share)
        cancels = sum(_size(row) for _, row in rounds) > CANCELS
        much = _size(rounds[0][1]) >= MUCH
        says += f"; most comes from {most}" if much else f"; none contributes much, {most} most"
        says += ", and errors of other layers cancel much of it" * cancels
        told, alone = _costliest_first(rounds, costliest)
        says += f"; {told[0][1].name} costs most{_off(alone)}" * bool(alone)
    fix = "accept it, or compute in FP32: " + PROMOTED[claim] if claim == "tf32" else ""
    if claim == "fp32":
        names = ", ".join(row.name for _, row in told)
        fix = f"accept it if the kernel is known to be approximate, or compute {names} in FP64"
        of_first = explain(*told[0])  # what precision excuses may be another program, or a known way to compute it
        # What the emulation of FP32 gives needs no other explanation.
        better = not few or of_first.explained > explained
        if (cause := of_first.cause) and not cause.parameters and not cause.by_magnitude and (better or cause.declared):
            says, fix = f"{says}: {cause.says}", cause.fix.replace("{layers}", told[0][1].name)
            evidence, explained = {"declared": True, **cause.evidence}, of_first.explained
    elif trials is not None:
        fix, figures = kept(trials, [row for _, row in first or rounds])
        evidence |= figures
        if not math.isfinite(figures.get("before", 0.0)):  # shares of NaN say nothing
            vital = [
                item for item in sorted(rounds, key=lambda item: item[1].index) if item[1].name in figures["vital"]
            ]
            parts = ((item, segment(*item)) for item in vital)
            lost = ((item, rounded_off(part.exact, part.test, claim)) for item, part in parts)
            if found := next((each for each in lost if each[1]), None):
                told, says = [found[0]], f"{name} as declared: {found[1]}; NaN or Inf follows later"
                evidence["lost"] = found[1]
    yield Finding(
        claim,
        says,
        [row.name for _, row in told],
        [row.op for _, row in told],
        explained=explained,
        evidence=evidence,
        where=[locate(segments[0], told[0][1].name)] if few else [],
        effect=Effect(sum(row.share or 0.0 for _, row in told)) if few else Effect(),
        fix=fix,
    )


def flipped(run: CandidateRun, rows: Rows, flips: Sequence[Flip], trials: KeepTrials | None) -> Finding | None:
    """The finding on a rounding that makes whole numbers flip, where the divergence beyond the tolerance begins with
    these, and nothing that is carried by derivatives explains it. None elsewhere."""
    claim, beyond = run.precision.name, next((key for key, row in rows.items() if not row.within), None)
    flip = next((flip for flip in flips if flip.first == beyond), None)
    carried = abs(sum(row.share or 0.0 for row in rows.values()))
    if flip is None or claim not in (*PROMOTED, "fp32") or (claim != "fp32" and carried > CARRIED):
        return None
    row, first = rows[flip.maker], rows[flip.first]  # type: ignore[index]
    own = f"{row.name} ({row.op}): "
    says = flip.told.removeprefix(own) if row is first else f"makes whole numbers flip: {flip.told}"
    evidence: dict[str, Any] = {"declared": True, "flips": first.name}
    fix = f"decide with a margin, or compute {row.name} in FP64"
    if claim != "fp32" and trials is not None:
        tried, figures = kept(trials, [row])
        if not figures:  # boxes and scores may both decide: then from what makes most of the divergence on
            most = sorted(rows.items(), key=lambda item: _size(item[1]), reverse=True)
            tried, figures = kept(trials, [each for _, each in _first(most)])
        fix, evidence = f"decide with a margin, or {tried}" if figures else "decide with a margin", evidence | figures
    return Finding(claim, says, [row.name], [row.op], evidence=evidence, fix=fix)


def kept(trials: KeepTrials, rows: Sequence[LayerRow]) -> tuple[str, dict[str, Any]]:
    """(What keeping these layers in FP32 gave, in words; all nodes of the set and the figures), as it was tried."""
    nodes = [(row.component, node) for row in rows for node in (row.replay and row.replay.nodes) or ()]
    try:
        found = trials.find(nodes, guilty=any(row.verdict == GUILTY for row in rows))
    except InputError:
        found = None
    if found is None:
        return "no fix found: with these layers and those around them in FP32, over half of it remains, emulated", {}
    names = trials.names(found.nodes)
    vital = {} if math.isfinite(found.before) else {"vital": trials.names(found.vital)}
    return in_words(found, names), {"keep_fp32": names, "after": found.after, "before": found.before, **vital}


def _first(rounds: Sequence[tuple[Key, LayerRow]]) -> list[tuple[Key, LayerRow]]:
    """The layers with the largest shares that make ``MOST`` of what all layers make; empty where none has a share."""
    total = sum(_size(row) for _, row in rounds)
    taken: list[tuple[Key, LayerRow]] = []
    reached = 0.0
    for item in rounds:
        if reached >= MOST * total:
            break
        taken.append(item)
        reached += _size(item[1])
    return taken


def _where_from(run: CandidateRun, rows: Rows, first: Sequence[tuple[Key, LayerRow]], segment: Segment) -> str:
    """``97% of the final divergence comes from here: 1000.37 is 1000.5 in FP16, which has 11 bits; ln/sub (Sub) behind
    it enlarges it 3,300 times``."""
    (key, row), claim = first[0], run.precision.name
    share = sum(r.share or 0.0 for _, r in first)
    parts = ", ".join(f"{r.name} {percent(r.share or 0.0)}" for _, r in first) if len(first) > 1 else ""
    text = f"{percent(min(share, 1.0))} of the final divergence comes from here" + (f" ({parts})" if parts else "")
    worst = next(iter(locate(segment, row.name).worst), None)
    if worst is not None and claim in BITS:
        rounded = ARITHMETICS[claim].round(torch.tensor(worst.oracle, dtype=torch.float64))
        verb = "is" if float(rounded) == worst.value else "is computed as"
        held = f"{in_digits(worst.oracle)} {verb} {in_digits(worst.value)} in {claim.upper()}"
        text += f": {held}, which has {BITS[claim]} bits"
    graph = run.programs[key.component].graph
    behind = downstream(graph.nodes, [key.value])
    rates = {k: r.replay.amplification or 0.0 for k, r in rows.items() if k.value in behind and r.replay}
    rates = {k: rate for k, rate in rates.items() if k.component == key.component and math.isfinite(rate)}
    if rates and rates[most := max(rates, key=rates.__getitem__)] >= ENLARGES:
        text += f"; {rows[most].name} ({rows[most].op}) after it enlarges it {float(f'{rates[most]:.2g}'):,.0f} times"
    return text
