"""Pairing of the tensors of two captures, made from different files or by different exporters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from cp_debug.graph.pairing import parse_map_of
from cp_debug.probes.capture import Capture, TensorEntry
from cp_debug.probes.fingerprint import Fingerprint, fingerprint
from cp_debug.programs.align import TOLERANCE

Tensor = tuple[str, str]
"""Component and name."""


def pair_captures(reference: Capture, test: Capture, maps: Sequence[str] = ()) -> dict[Tensor, Tensor]:
    """Reference tensor → test tensor, for the tensors of two captures.

    They are paired as ``maps`` says (``REFERENCE=TEST`` each), by name, by what they hold on the first sample, in
    order; final outputs that are left by position and shape. Components are paired by name, else in order where both
    captures have as many. Raises InputError for a wrong map.
    """
    components = _components(reference, test)
    ours = [(e.component, e.name) for e in _first(reference)]
    theirs = [(e.component, e.name) for e in _first(test)]
    mapped = parse_map_of(maps, {name for _, name in ours}, {name for _, name in theirs})
    fixed = {name: test_key for test_key, name in mapped.items()}
    pairs: dict[Tensor, Tensor] = {}
    free = dict.fromkeys(theirs)
    for component, name in ours:
        candidate = (components.get(component, component), fixed.get(name, name))
        if candidate in free and (name in fixed or name not in mapped):
            pairs[component, name] = candidate
            del free[candidate]
    unpaired = [key for key in ours if key not in pairs]
    if unpaired and free:
        for key, test_key in _by_contents(reference, test, unpaired, list(free), components):
            pairs[key] = test_key
            free.pop(test_key)
        for key, test_key in _by_position(reference, test, pairs):
            pairs[key] = test_key
    return pairs


def _first(capture: Capture) -> Iterator[TensorEntry]:
    sample = min(capture.samples, default=0)
    return (e for e in capture.entries if e.sample == sample)


def _components(reference: Capture, test: Capture) -> dict[str, str]:
    ours, theirs = (list(dict.fromkeys(e.component for e in c.entries)) for c in (reference, test))
    paired = {name: name for name in ours if name in theirs}
    unpaired, unpaired_test = ([n for n in names if n not in paired] for names in (ours, theirs))
    return paired | (dict(zip(unpaired, unpaired_test, strict=True)) if len(unpaired) == len(unpaired_test) else {})


def _by_contents(
    reference: Capture, test: Capture, left: Sequence[Tensor], free: Sequence[Tensor], components: Mapping[str, str]
) -> Iterator[tuple[Tensor, Tensor]]:
    """Pairs of equal tensors: each of ``left`` with the first free one in execution order."""
    sample = min(reference.samples)
    prints: dict[Tensor, Fingerprint] = {}

    def held(capture: Capture, key: Tensor) -> Fingerprint | None:
        array = capture.load(key[1], sample, key[0])
        return fingerprint(np.asarray(array, np.float64)) if array.dtype.kind in "fiub" else None

    for key in free:
        if (test_print := held(test, key)) is not None:
            prints[key] = test_print
    for key in left:
        own_print = held(reference, key)
        component = components.get(key[0])
        if own_print is None or component is None:
            continue
        near = ((own_print.distance(print_), k) for k, print_ in prints.items() if k[0] == component)
        twin = next((k for distance, k in near if distance <= TOLERANCE), None)
        if twin is not None:
            del prints[twin]
            yield key, twin


def _by_position(reference: Capture, test: Capture, pairs: Mapping[Tensor, Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """Pairs of final outputs of one shape, in the order of both models."""
    shapes = [{(e.component, e.name): e.shape for e in _first(c)} for c in (reference, test)]
    outputs = [[(str(c), str(n)) for c, n in capture.manifest.get("outputs", [])] for capture in (reference, test)]
    free = [key for key in outputs[1] if key in shapes[1] and key not in set(pairs.values())]
    for key in outputs[0]:
        if key in shapes[0] and key not in pairs:
            candidate = next((k for k in free if shapes[1][k] == shapes[0][key]), None)
            if candidate is not None:
                free.remove(candidate)
                yield key, candidate
