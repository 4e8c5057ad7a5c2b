"""Makes a failing case smaller while it still fails: fewer nodes, then smaller shapes, then simpler values.

Every step is verified by running it, and a case counts only while it fails in the same way as the first one did, and
about as strongly: a reducer that accepts any failure wanders off to another one, such as a division by zeros that it
put there.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice

import numpy as np

from cp_debug.errors import InputError
from cp_debug.minimize import Minimizer, find_integer
from cp_debug.reports.bundle.case import Case, Cutter, Piece, declared
from cp_debug.reports.bundle.verify import Measured, Verifier, fails, strength
from cp_debug.safe_text import amount

MARGIN = 0.1
"""Share of the first case's strength that a smaller one must keep."""
BLOCKS = 32
"""Runs of elements of an input that are set to zero together."""
BITS = (1, 2, 4, 8, 12)
"""Mantissa bits that are tried for the values that remain."""

OnText = Callable[[str], None]


@dataclass
class Shrinker:
    """Reduces cases that ``verifier`` runs; ``on_text`` hears what is being tried."""

    cutter: Cutter
    verifier: Verifier
    on_text: OnText = lambda text: None
    needed: float = 0.0
    """The strength that a case must have."""
    kinds: frozenset[str] = frozenset()
    """Kinds of failure that count, those of the first case: ``shape``, ``nonfinite`` or ``numbers``."""
    finite: bool = False
    """Whether the oracle's values must be finite, as the first case's were."""
    seconds: float = math.inf
    """Time for making the case smaller, once it is known to fail: what would not fit into it is not tried."""
    _end: float = math.inf
    _longest: float = 0.0

    def find(self, layer: list[int]) -> list[int]:
        """The first cut around ``layer`` that fails: the layer alone, then with neighbours 1, 3, 7, … edges away.

        Each is tried as it is, then with the layer's own value among its outputs, where neighbours read that. Raises
        InputError when none does, up to the whole component.
        """
        nodes, hops, reasons = layer, 1, []
        while True:
            self.on_text(f"does it fail with {amount(len(nodes), 'node')}?")
            for self.cutter.compares_layer in (False, True) if len(nodes) > len(layer) else (False,):
                begun = time.monotonic()
                try:
                    measured = self.verifier.measure(self.cutter.case(nodes))
                    self._longest = time.monotonic() - begun
                    if fails(measured):
                        self.needed = MARGIN * strength(measured)
                        self.kinds, self.finite = _kinds(measured), _finite(measured)
                        self._end = time.monotonic() + self.seconds
                        return nodes
                    reasons.append(f"{amount(len(nodes), 'node')}: {_innocent(measured)}")
                except InputError as error:
                    reasons.append(f"{amount(len(nodes), 'node')}: {error}")
            grown = self.cutter.grow(nodes, hops)
            if grown == nodes:
                lines = [*reasons[:2], "…", reasons[-1]] if len(reasons) > 3 else reasons
                raise InputError("no cut around the layer fails by itself:\n" + "\n".join(lines))
            nodes, hops = grown, 2 * hops

    def nodes(self, nodes: list[int]) -> Case:
        """The case of as few of ``nodes`` as still fail."""
        self.on_text("leaving out nodes")
        everything = frozenset(nodes)

        def fails(nodes_left: frozenset[int]) -> bool:
            return nodes_left == everything or (bool(nodes_left) and self._cut_fails(nodes_left))

        return self.cutter.case(Minimizer[int](fails).minimize(nodes))

    def shapes(self, case: Case) -> Case:
        """The case with every axis of its inputs as short as it can be, cut out around the worst element."""
        if self.stopped:
            return case
        worst, changed = self._worst(case), True
        while changed:
            changed = False
            for group in _axes(case.inputs):
                size = case.inputs[group[0][0]].shape[group[0][1]]
                self.on_text(f"shortening axis {group[0][1]} of {', '.join(name for name, _ in group)}")
                smaller = self._shortest(case, group, size, worst)
                if smaller is not None:
                    case, changed = smaller, True
        return case

    def values(self, case: Case) -> Case:
        """The case with inputs of zeros, else with few values that are not zero, of few bits."""
        for name, array in case.inputs.items():
            if array.dtype.kind == "f" and not self.stopped:
                self.on_text(f"simplifying {name}")
                case = self._sparse(case, name)
                case = self._short(case, name)
        return case

    def accepts(self, case: Case) -> bool:
        """Whether the case fails as the first one did, about as strongly; False where there is no time left to try."""
        if self.stopped:
            return False
        begun = time.monotonic()
        try:
            measured = self.verifier.measure(case)
        except InputError:
            return False
        finally:
            self._longest = max(self._longest, time.monotonic() - begun)
        alike = _kinds(measured) <= self.kinds and _finite(measured) >= self.finite
        return fails(measured) and alike and strength(measured) >= self.needed

    @property
    def stopped(self) -> bool:
        """Whether another run would take longer than the time that is left."""
        return time.monotonic() + self._longest > self._end

    def _cut_fails(self, nodes: frozenset[int]) -> bool:
        if self.stopped:
            return False
        try:
            return self.accepts(self.cutter.case(nodes))
        except InputError:
            return False

    def _shortest(self, case: Case, group: list[tuple[str, int]], size: int, worst: tuple[float, ...]) -> Case | None:
        """The case with the axes of ``group`` shortened as far as it goes; None when they cannot be."""

        found: dict[int, Case] = {}

        def passes(length: int) -> bool:
            if length >= size:
                return False
            starts = dict.fromkeys([_start(worst, group[0][1], size, length), 0])
            windows = (_window(case, group, start, length) for start in starts)
            found.update((length, window) for window in islice(filter(self.accepts, windows), 1))
            return length not in found

        return found.get(find_integer(passes) + 1)

    def _worst(self, case: Case) -> tuple[float, ...]:
        """Place of the worst element of the worst output, each coordinate relative to its axis."""
        output = max(self.verifier.measure(case).values(), key=lambda o: (o.fails, o.strength))
        place = output.stats.argmax or ()
        return tuple(i / n for i, n in zip(place, output.exact.shape, strict=False))

    def _sparse(self, case: Case, name: str) -> Case:
        array = case.inputs[name]
        blocks = [slice(b[0], b[-1] + 1) for b in np.array_split(np.arange(array.size), BLOCKS) if b.size]

        def with_blocks(indices: frozenset[int]) -> Case:
            sparse = np.zeros_like(array).reshape(-1)
            for i in indices:
                sparse[blocks[i]] = array.reshape(-1)[blocks[i]]
            return _with_input(case, name, sparse.reshape(array.shape))

        minimizer = Minimizer[int](lambda indices: self.accepts(with_blocks(indices)))
        everything = range(len(blocks))
        return with_blocks(frozenset(minimizer.minimize(everything))) if minimizer.holds(everything) else case

    def _short(self, case: Case, name: str) -> Case:
        array = case.inputs[name]
        candidates = (_with_input(case, name, rounded) for rounded in _roundings(array))
        return next((c for c in candidates if self.accepts(c)), case)


def _kinds(measured: Measured) -> frozenset[str]:
    return frozenset(output.kind for output in measured.values() if output.fails)


def _finite(measured: Measured) -> bool:
    return all(output.finite for output in measured.values())


def _innocent(measured: Measured) -> str:
    lines = [
        f"{name} {output.judgement.why or output.judgement.verdict}"
        + (f", excess {output.replay.excess:.3g}" if output.replay and output.replay.excess is not None else "")
        for name, output in measured.items()
    ]
    return "; ".join(lines[:3])


def _axes(inputs: Mapping[str, np.ndarray]) -> list[list[tuple[str, int]]]:
    """Axes that must have equal length, as far as one can tell: same place, same length. The longest first."""
    groups: dict[tuple[int, int], list[tuple[str, int]]] = {}
    for name, array in inputs.items():
        for axis, length in enumerate(array.shape):
            if length > 1:
                groups.setdefault((length, axis), []).append((name, axis))
    return [groups[key] for key in sorted(groups, reverse=True)]


def _start(worst: tuple[float, ...], axis: int, size: int, length: int) -> int:
    """Place where a window of ``length`` begins so that the worst element lies in its middle, as far as possible."""
    middle = worst[axis] * size if axis < len(worst) else 0.0
    return min(max(round(middle - length / 2), 0), size - length)


def _window(case: Case, group: list[tuple[str, int]], start: int, length: int) -> Case:
    inputs = dict(case.inputs)
    for name, axis in group:
        inputs[name] = np.ascontiguousarray(inputs[name].take(range(start, start + length), axis))
    return with_inputs(case, inputs)


def _with_input(case: Case, name: str, array: np.ndarray) -> Case:
    return replace(case, inputs={**case.inputs, name: array})


def with_inputs(case: Case, inputs: Mapping[str, np.ndarray]) -> Case:
    """The case with other inputs of whatever shapes."""
    program = Piece(declared(case.program.model, inputs), case.program.home)
    reference = program
    if case.reference is not case.program:
        reference = Piece(declared(case.reference.model, inputs), case.reference.home)
    return replace(case, program=program, reference=reference, inputs=dict(inputs))


def _roundings(array: np.ndarray) -> Iterator[np.ndarray]:
    """The array with few mantissa bits, ever more."""
    mantissa, exponent = np.frexp(array.astype(np.float64))
    for bits in BITS:
        yield np.ldexp(np.round(mantissa * 2**bits) / 2**bits, exponent).astype(array.dtype)
