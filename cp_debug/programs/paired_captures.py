"""Which tensor of one capture is which of another, made from another file or by another exporter."""

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
    """Reference tensor → test tensor: as ``maps`` says (``REFERENCE=TEST`` each), by name, by what they hold on the
    first sample, in order; final outputs that are left by position and shape.

    Components are paired by name, else in order where both captures have as many. Raises InputError for a wrong map.
    """
    components = _components(reference, test)
    ours = [(e.component, e.name) for e in _first(reference)]
    theirs = [(e.component, e.name) for e in _first(test)]
    told = parse_map_of(maps, {name for _, name in ours}, {name for _, name in theirs})
    fixed = {name: own for own, name in told.items()}
    pairs: dict[Tensor, Tensor] = {}
    free = dict.fromkeys(theirs)
    for component, name in ours:
        wanted = (components.get(component, component), fixed.get(name, name))
        if wanted in free and (name in fixed or name not in told):
            pairs[component, name] = wanted
            del free[wanted]
    left = [key for key in ours if key not in pairs]
    if left and free:
        for key, own in _by_contents(reference, test, left, list(free), components):
            pairs[key] = own
            free.pop(own)
        for key, own in _by_position(reference, test, pairs):
            pairs[key] = own
    return pairs


def _first(capture: Capture) -> Iterator[TensorEntry]:
    sample = min(capture.samples, default=0)
    return (e for e in capture.entries if e.sample == sample)


def _components(reference: Capture, test: Capture) -> dict[str, str]:
    ours, theirs = (list(dict.fromkeys(e.component for e in c.entries)) for c in (reference, test))
    paired = {name: name for name in ours if name in theirs}
    left, free = ([n for n in names if n not in paired] for names in (ours, theirs))
    return paired | (dict(zip(left, free, strict=True)) if len(left) == len(free) else {})


def _by_contents(
    reference: Capture, test: Capture, left: Sequence[Tensor], free: Sequence[Tensor], components: Mapping[str, str]
) -> Iterator[tuple[Tensor, Tensor]]:
    """Equal tensors, the first free one in execution order for each."""
    sample = min(reference.samples)
    prints: dict[Tensor, Fingerprint] = {}

    def held(capture: Capture, key: Tensor) -> Fingerprint | None:
        array = capture.load(key[1], sample, key[0])
        return fingerprint(np.asarray(array, np.float64)) if array.dtype.kind in "fiub" else None

    for key in free:
        if (found := held(test, key)) is not None:
            prints[key] = found
    for key in left:
        own = held(reference, key)
        component = components.get(key[0])
        if own is None or component is None:
            continue
        near = ((own.distance(print_), k) for k, print_ in prints.items() if k[0] == component)
        twin = next((k for distance, k in near if distance <= TOLERANCE), None)
        if twin is not None:
            del prints[twin]
            yield key, twin


def _by_position(reference: Capture, test: Capture, pairs: Mapping[Tensor, Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """Final outputs of one shape, in the order of both models."""
    shapes = [{(e.component, e.name): e.shape for e in _first(c)} for c in (reference, test)]
    outputs = [[(str(c), str(n)) for c, n in capture.manifest.get("outputs", [])] for capture in (reference, test)]
    free = [key for key in outputs[1] if key in shapes[1] and key not in set(pairs.values())]
    for key in outputs[0]:
        if key in shapes[0] and key not in pairs:
            own = next((k for k in free if shapes[1][k] == shapes[0][key]), None)
            if own is not None:
                free.remove(own)
                yield key, own
