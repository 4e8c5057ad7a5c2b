"""Flips: whole numbers that come out otherwise because of a rounding in front of them, which have no derivative.

Indices, comparisons, casts to integers, Floor and Round do what they must with what they read; which of the values in
front was rounded across the border is the event that a reader wants to know.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping

import numpy as np

from cp_debug.bisect.candidate_run import CandidateRun
from cp_debug.bisect.result import INHERITED, LayerRow
from cp_debug.errors import InputError
from cp_debug.graph.graph import Graph
from cp_debug.probes.arrays import as_numpy
from cp_debug.probes.held import CapturedRun
from cp_debug.probes.integers import is_whole
from cp_debug.programs.pipeline import Key
from cp_debug.safe_text import amount, in_digits, some

ROUNDING = {"Ceil", "Floor", "Round", "Sign", "Trunc"}
"""Operators whose results are whole numbers held as floats."""
EVENTS = 8
"""Events that are told."""
MOST = 3
"""Layers that are named behind one event."""
ITS_OWN = 0.5
"""Part of a value's divergence from which its layer's own rounding has made it."""


def flips(
    run: CandidateRun,
    rows: Mapping[Key, LayerRow],
    reference: CapturedRun,
    test: CapturedRun,
    tied: Mapping[Key, str],
) -> Iterator[str]:
    """A sentence for each layer whose rounding makes whole numbers flip, though all do what they must: how many of the
    first layer that flips, and which layers do.

    ``tied``: layers where ties are broken differently, with the words for it: what flips behind one is told with it.
    """
    behind: dict[Key, list[str]] = {key: [] for key in tied}
    told: dict[Key, str] = {}
    for key, row in rows.items():
        if key in tied or row.verdict != INHERITED or row.kind != "data" or row.replay is None:
            continue
        replayer = run.replayer(key.component, test)
        if key.value in replayer.levels:
            continue  # of a quantizer, whose steps are its precision
        ours, theirs = (as_numpy(c.load(key.value, component=key.component)) for c in (reference, test))
        if not (is_whole(ours) or row.op in ROUNDING) or ours.shape != theirs.shape:
            continue
        places = np.argwhere(ours != theirs)
        graph, known = replayer.graph, replayer.known
        front = _front(graph, known, rows, key)
        if not len(places) or front is None:
            continue
        made_by = _maker(graph, known, rows, front, tied)
        if made_by in behind:
            behind[made_by].append(row.name)
            continue
        if rows[made_by].stats.is_whole:
            continue  # wrong, not rounded
        behind[made_by] = []
        says = f"{row.name} ({row.op}): {len(places)} of {ours.size} results flip, first at {places[0].tolist()}"
        value, near = rows[front], Key(front.component, front.value)
        pair = [as_numpy(c.load(near.value, component=near.component)) for c in (reference, test)]
        if pair[0].shape == pair[1].shape == ours.shape:
            exact, rounded = (float(a[tuple(places[0])]) for a in pair)
            says += f", where {value.name} ({value.op}) is {in_digits(rounded)} for {in_digits(exact)}"
        maker = rows[made_by]
        precision = ((maker.replay and maker.replay.precision) or run.precision.name).upper()
        told[made_by] = f"{says}; {maker.name} ({maker.op}) rounded it in {precision}"
    told |= {key: f"{rows[key].name} ({rows[key].op}): {says}" for key, says in tied.items()}
    more = len(told) - EVENTS
    for key, says in [*told.items()][:EVENTS]:
        verb = "differ" if len(behind[key]) > 1 else "differs"
        yield says + (f"; for that reason {some(behind[key], MOST)} {verb}, too" if behind[key] else "")
    if more > 0:
        yield f"{amount(more, 'more rounding')} {'makes' if more == 1 else 'make'} whole numbers flip"


def turned_zeros(
    run: CandidateRun, rows: Mapping[Key, LayerRow], reference: CapturedRun, test: CapturedRun
) -> Iterator[str]:
    """A sentence for the first layer whose Inf has the other sign, and the layer whose zeros have it: −0 equals 0."""
    for key, row in rows.items():
        if row.verdict != INHERITED or row.kind != "data" or np.isfinite(row.stats.rel_l2):
            continue
        replayer = run.replayer(key.component, test)
        pair = _pair(reference, test, key)
        if pair is None or not (np.isinf(pair[0]) & (pair[0] == -pair[1])).any():
            continue
        maker, count = None, 0
        while key.value in replayer.graph.producer:
            _, starts = replayer.graph.segment([key.value], replayer.known)
            for key in (Key(key.component, name) for name in starts):
                pair = _pair(reference, test, key) if key in rows else None
                if pair is None:
                    continue
                turned = (pair[0] == 0) & (pair[1] == 0) & (np.signbit(pair[0]) != np.signbit(pair[1]))
                if turned.any():
                    maker, count = rows[key], int(turned.sum())
                    break
            else:
                break
        if maker is not None:
            zeros = f"the sign of {amount(count, 'zero')} differs"
            yield f"{maker.name} ({maker.op}): {zeros}, of which {row.name} ({row.op}) makes Inf of other signs"
        return


def _pair(reference: CapturedRun, test: CapturedRun, key: Key) -> list[np.ndarray] | None:
    """A value of floats of both sides; None where they are none, or of different shapes."""
    pair = [as_numpy(c.load(key.value, component=key.component)) for c in (reference, test)]
    return pair if pair[0].shape == pair[1].shape and all(a.dtype.kind == "f" for a in pair) else None


def _front(graph: Graph, known: set[str], rows: Mapping[Key, LayerRow], key: Key) -> Key | None:
    """The value in front of ``key`` that differs most, by relative L2; None where none does."""
    if key.value not in graph.producer:
        return None
    try:
        _, starts = graph.segment([key.value], known)
    except (InputError, KeyError):
        return None
    read = [Key(key.component, name) for name in starts]
    differing = [k for k in read if k in rows and rows[k].stats.rel_l2 > 0]
    return max(differing, key=lambda k: rows[k].stats.rel_l2, default=None)


def _maker(graph: Graph, known: set[str], rows: Mapping[Key, LayerRow], key: Key, tied: Collection[Key]) -> Key:
    """The layer whose own rounding made most of the divergence of ``key``, or whose ties: itself, or one in front."""
    while True:
        row = rows[key]
        own = (row.replay and row.replay.introduced) or 0.0
        front = _front(graph, known, rows, key)
        if key in tied or own >= ITS_OWN * row.stats.rel_l2 or front is None:
            return key
        key = front
