"""The weights of two graphs compared directly, before anything runs: most wrong checkpoints are named by that alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from cp_debug.graph.constants import TELLING, BodyConstants, Constants
from cp_debug.graph.graph import QUANTIZING, Graph
from cp_debug.graph.operators import GATES
from cp_debug.graph.pairing import believable
from cp_debug.probes.distance import relative_l2
from cp_debug.programs.tensor_change import TensorChange, describe
from cp_debug.serialize import JsonForm

SHOWN = 3
"""Differences in one line."""
NEAR = 1.0
"""Relative L2 distance up to which two tensors of one shape, whose names tell nothing, may be the same weight."""
_FOLDED = "BatchNorm is folded"
"""Beginning of a note that says why nearly all tensors differ."""
DESCRIBED = 1 << 26
"""Elements of differing tensors that are described closely; of further ones only the distance is told."""


@dataclass(frozen=True)
class Difference:
    """One tensor that differs."""

    name: str
    test_name: str
    change: TensorChange = field(metadata={"inline": True})

    @property
    def says(self) -> str:
        """The difference in words, such as ``layer3.conv2.weight, channel 7 × 1.05``."""
        return f"{self.name}, {self.change.says}"


@dataclass
class WeightDifferences(JsonForm):
    """The weights of a test against those of its reference."""

    derives = ("says",)
    compared: int
    """Number of tensors that were paired with one of the test."""
    differing: list[Difference] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    """Tensors of the reference without one of this name, or like it, in the test."""
    added: list[str] = field(default_factory=list)
    note: str = ""
    """Reason why many may differ in a healthy model."""

    @property
    def says(self) -> str:
        """The result in one line: ``12 of 40 tensors differ: layer3.conv2.weight, channel 7 × 1.05; …``."""
        if not self.differing:
            many = f"all {self.compared} tensors that were paired are equal"
            text = many if self.compared else "no tensors of the two were paired"
        else:
            verb = "differs" if len(self.differing) == 1 else "differ"
            shown = "; ".join(d.says for d in self.differing[:SHOWN])
            more = f"; and {len(self.differing) - SHOWN} more" if len(self.differing) > SHOWN else ""
            text = f"{len(self.differing)} of {self.compared} tensors {verb}"
            text += "" if self.note.startswith(_FOLDED) else f": {shown}{more}"
        counts = [(len(self.missing), "only in the reference"), (len(self.added), "only in the test")]
        alone = [f"{count} {where}" for count, where in counts if count]
        if self.note and not self.compared:
            return "; ".join([self.note, *alone])
        return "; ".join([*filter(None, [self.note]), text, *alone])


def weight_differences(reference: Graph, test: Graph) -> WeightDifferences:
    """Compare the constants of two graphs, and of the branches, loop bodies and functions in them.

    They are paired by name where names can be believed, by equal nodes, by equal contents, and what is left by shape
    and nearness.
    """
    ours, theirs = BodyConstants(reference), BodyConstants(test)
    nodes = (*reference.nodes, *ours.inner_nodes.values())
    gates = {name: GATES[n.op] for n in nodes if n.op in GATES for name in [*ours.inputs(n)][1:4]}
    named = _paired(ours, theirs) if believable(reference, test) else []
    pairs = [(a, b) for a, b in named if not _renumbered(ours, theirs, a, b)]
    matched, unmatched_test = {a for a, _ in pairs}, [n for n in theirs.names if n not in {b for _, b in pairs}]
    unmatched = [n for n in ours.names if n not in matched]
    for a, b in _by_contents(ours, theirs, unmatched, unmatched_test):
        pairs.append((a, b))
        unmatched.remove(a)
        unmatched_test.remove(b)
    order = {name: i for i, name in enumerate(ours.names)}
    differences, budget = [], DESCRIBED
    for a, b in sorted(pairs, key=lambda pair: order[pair[0]]):
        if ours.digest(a) == theirs.digest(b):
            continue
        budget -= ours.size(a)
        change = describe(ours[a], theirs[b], gates.get(a, 0), closely=budget > 0)
        if change is None:
            continue
        if change.kind in ("transposed", "shape") and not change.size and not _same_reader(ours, theirs, a, b):
            continue
        if twin := ours.twin(a, theirs, b):
            x, y = (np.asarray(t).ravel() for t in (ours[a], theirs[b]))
            change = TensorChange("another", f"holds {twin}", {"of": twin}, relative_l2(y, x))
        differences.append(Difference(a, b, change))
    missing, added = (
        [n for n in names_left if c.size(n) >= TELLING]
        for c, names_left in ((ours, unmatched), (theirs, unmatched_test))
    )
    return WeightDifferences(len(pairs), differences, missing, added, _note(reference, test, bool(differences)))


def _note(reference: Graph, test: Graph, differ: bool) -> str:
    """What was done to the weights of one side as a whole, which no comparison of single tensors says."""
    sides = (reference, test)
    quantized = [any(n.op == "DequantizeLinear" and n.inputs[0] in g.initializers for n in g.nodes) for g in sides]
    if quantized[0] != quantized[1]:
        return f"only the {('reference', 'test')[quantized[1]]} is quantized"
    norms = [sum(n.op == "BatchNormalization" for n in g.nodes) for g in sides]
    folded = ("reference", "test")[norms[0] > norms[1]]
    return f"{_FOLDED} in the {folded} only" if differ and norms[0] != norms[1] else ""


def differences_of_states(ours: Mapping[str, np.ndarray], theirs: Mapping[str, np.ndarray]) -> WeightDifferences:
    """Compare two checkpoints (tensor name → array), tensor by tensor of one name.

    Arrays may have any shape and dtype, also others on each side.
    """
    common = [name for name in ours if name in theirs]
    differences, budget = [], DESCRIBED
    for name in common:
        if not np.array_equal(ours[name], theirs[name]):
            budget -= ours[name].size
        if (change := describe(ours[name], theirs[name], closely=budget > 0)) is not None:
            differences.append(Difference(name, name, change))
    missing, added = [n for n in ours if n not in theirs], [n for n in theirs if n not in ours]
    return WeightDifferences(len(common), differences, missing, added)


def _paired(ours: BodyConstants, theirs: BodyConstants) -> list[tuple[str, str]]:
    """(Reference, test) names of constants with one name, or at one input of nodes that make the same value."""
    pairs: dict[str, str] = {}
    makers = ours.inner_nodes | ours.graph.producer
    for value, node in (theirs.inner_nodes | theirs.graph.producer).items():
        twin = makers.get(value)
        if twin is None or twin.op != node.op:
            continue
        for a, b in zip(ours.inputs(twin), theirs.inputs(node), strict=False):
            if a in ours and b in theirs:
                pairs.setdefault(b, a)
    used, read = set(pairs.values()), set(ours.names)
    for name in theirs.names:
        if name in read and name not in pairs and name not in used:
            pairs[name] = name
    unique: dict[str, str] = {}
    for b, a in pairs.items():
        unique.setdefault(a, b)
    return list(unique.items())


def _by_contents(
    ours: Constants, theirs: Constants, left: Sequence[str], free: Sequence[str]
) -> Iterator[tuple[str, str]]:
    """Equal tensors first, then stored transposed, then the nearest of one shape."""
    our_names = [n for n in left if ours.size(n) >= TELLING and ours[n].dtype.kind == "f"]
    their_names = [n for n in free if theirs.size(n) >= TELLING and theirs[n].dtype.kind == "f"]
    by_digest: dict[str, list[str]] = {}
    for name in their_names:
        by_digest.setdefault(theirs.digest(name), []).append(name)
        if theirs[name].ndim == 2:
            by_digest.setdefault(theirs.digest_transposed(name), []).append(name)
    used: set[str] = set()
    for name in our_names:
        twin = next((n for n in by_digest.get(ours.digest(name), []) if n not in used), None)
        if twin is not None:
            used.update((twin, name))
            yield name, twin
    distances = []
    for a in (n for n in our_names if n not in used and not _is_scale(ours, n)):
        x = ours[a]
        for b in (n for n in their_names if n not in used and theirs[n].shape == x.shape and not _is_scale(theirs, n)):
            distance = relative_l2(theirs[b], x)
            if distance < NEAR:
                distances.append((distance, a, b))
    paired: tuple[set[str], set[str]] = (set(), set())
    for _, a, b in sorted(distances):
        if a not in paired[0] and b not in paired[1]:
            paired[0].add(a)
            paired[1].add(b)
            yield a, b


def _is_scale(constants: Constants, name: str) -> bool:
    """Whether only quantization reads a float constant, beside what it quantizes."""
    readers = constants.readers(name)
    return all(n.proto.input[0] != name and any(mark in n.op for mark in QUANTIZING) for n in readers)


def _renumbered(ours: Constants, theirs: Constants, a: str, b: str) -> bool:
    """Whether the name was counted on to another layer: ``b`` is read by other operators and has another size, or holds
    another of our constants, and no node that reads it has the data of one that reads ``a``."""

    def data(constants: Constants, name: str) -> set[frozenset[str]]:
        return {frozenset(i for i in n.inputs if i not in constants) for n in constants.readers(name)}

    ops = [{node.op for node in constants.readers(name)} for constants, name in ((ours, a), (theirs, b))]
    if ours.size(a) != theirs.size(b) and ops[0].isdisjoint(ops[1]):
        return True
    if ours.digest(a) == theirs.digest(b) or not data(ours, a).isdisjoint(data(theirs, b)):
        return False
    return ours.twin(a, theirs, b) is not None


def _same_reader(ours: Constants, theirs: Constants, a: str, b: str) -> bool:
    """Whether the same operators read a tensor in the same way on both sides, so that its layout matters."""

    def readers(constants: Constants, name: str) -> set[tuple[str, int, int]]:
        return {(n.op, n.attribute("transA", 0), n.attribute("transB", 0)) for n in constants.readers(name)}

    return readers(ours, a) == readers(theirs, b)
