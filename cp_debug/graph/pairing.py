"""Pairing of the values of two graphs: one network exported twice, simplified, fused, renamed.

Equal names are believed where the nodes behind them agree. Else what each value holds on the same inputs decides, and
the dataflow decides among equal tensors (``programs/pairing_numbers.py``). Inputs and outputs are paired by name, else
by what they hold, else by position and shape; a torch module's outputs, which have places alone, must not stand in
another order. What the user said goes before all of it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from cp_debug.errors import InputError
from cp_debug.graph.constants import Constants
from cp_debug.graph.graph import Graph, Node, ValueInfo, data_values, readers
from cp_debug.graph.integer_values import named_levels
from cp_debug.graph.operators import PRODUCTS, QUANTIZERS
from cp_debug.graph.tensor_ends import part_of
from cp_debug.safe_text import did_you_mean, some
from cp_debug.serialize import JsonForm

UNPAIRED = " (test)"
"""Suffix for the name of a test's value without a partner, where the reference has another value of that name."""
TRUST = 0.6
"""Share of equal names whose nodes must agree (operator, inputs) before names alone are believed."""
MOST_MISPLACED = 2
"""Layers whose weights are those of another name before names are not believed any more: fewer are faults."""
PUT_IN = 3
"""Nodes in a row that the test may have put in behind a layer, under whose name the last of them goes on."""


@dataclass(frozen=True)
class Pairing(JsonForm):
    """The values of a test's graph by the names of the reference's."""

    names: Mapping[str, str] = field(metadata={"written": False})
    """Test value (inputs included) → reference value."""
    inputs: Mapping[str, str]
    """Reference input → test input."""
    outputs: Mapping[str, str]
    """Reference output → test output; those without a counterpart are left out."""
    inside: Mapping[str, str] = field(default_factory=dict)
    """Reference output → value of the test that is none of its outputs, where the user said so: a probe shows it."""
    how: Mapping[str, int] = field(default_factory=dict)
    """``name``, ``numbers``, ``structure``, ``position``, ``map`` → how many values were paired so."""
    missing: Sequence[str] = ()
    """Values of the reference that the test does not have: left out, or inside a fused operator."""
    added: Sequence[str] = ()
    """Values that only the test has."""
    left_out: Sequence[str] = ()
    """Outputs of the reference that are compared with nothing, as the user said."""
    moved: Mapping[str, str] = field(default_factory=dict)
    """Output of a torch module → output of the test that stands in its place, but holds what another one of the module
    does."""

    def reference_outputs(self, outputs: Mapping[str, Any]) -> dict[str, Any]:
        """A run's outputs under the reference's names, in the reference's order; unpaired ones are left out."""
        by_reference: dict[str, Any] = {}
        for name, test_name in self.outputs.items():
            if test_name in outputs:
                by_reference[name] = outputs[test_name]
            else:  # parts of an output that is no tensor
                parts = [part for part in outputs if part_of(part) == test_name]
                by_reference |= {name + part.removeprefix(test_name): outputs[part] for part in parts}
        return by_reference

    def other_names(self, told: Sequence[str] = ()) -> list[str]:
        """A sentence about the inputs and outputs that are paired under different names, other than those ``told``."""
        ends = [
            f"{name} = {test_name}"
            for pairs in (self.inputs, self.outputs)
            for name, test_name in pairs.items()
            if name != test_name and f"{name}={test_name}" not in told
        ]
        how = "paired by their values, else by position and shape; `--map REFERENCE=TEST` overrides this"
        return [f"inputs and outputs have other names in the test: {some(ends)}: {how}"] if ends else []

    def lacks(self, output: str) -> bool:
        """Whether an output of the reference has no counterpart in the test, although nobody left it out."""
        return not (output in self.outputs or output in self.inside or output in self.left_out)

    def derived(self) -> dict[str, Any]:
        """The pairs whose names differ; the others are not written."""
        return {"renamed": {test_name: name for test_name, name in self.names.items() if test_name != name}}

    @classmethod
    def fields_from(cls, document: dict[str, Any]) -> dict[str, Any]:
        """The document with the renamed values as ``names``."""
        return {"names": document.get("renamed", {})} | document


def places(moved: Mapping[str, str]) -> str:
    """A phrase about ``Pairing.moved``: ``in the place of a is y1``."""
    return some([f"in the place of {name} is {other}" for name, other in moved.items()])


def left_out(texts: Iterable[str], outputs: Collection[str]) -> tuple[list[str], list[str]]:
    """The outputs of the reference that ``--map OUTPUT=`` leaves out of the comparison, and the other texts.

    Raises InputError for a name that is none of ``outputs``.
    """
    omitted = [text for text in texts if text.endswith("=")]
    names = [text.removesuffix("=") for text in omitted]
    if (unknown := next((name for name in names if name not in outputs), None)) is not None:
        raise InputError(f"--map: {unknown!r} is not an output of the reference; its outputs are {', '.join(outputs)}")
    return names, [text for text in texts if text not in omitted]


def parse_map(texts: Iterable[str], reference: Iterable[Graph], test: Iterable[Graph]) -> dict[str, str]:
    """``--map REFERENCE=TEST`` as test value → reference value.

    Raises InputError for a text without ``=``, for a name that no graph of its side has, with the nearest, and for an
    input paired with a value that the other side computes.
    """
    reference, test = [*reference], [*test]
    pairs = parse_map_of(texts, known_names(reference), known_names(test))
    fed, fed_test = ({v.name for g in graphs for v in g.inputs} for graphs in (reference, test))
    for test_name, name in pairs.items():
        if (name in fed) != (test_name in fed_test):
            one, other = ("reference", "test") if name in fed else ("test", "reference")
            raise InputError(
                f"--map: '{name}={test_name}' pairs an input of the {one} with a value that the {other} computes; "
                "expected two inputs, or two computed values"
            )
    return pairs


def parse_map_of(texts: Iterable[str], ours: Collection[str], theirs: Collection[str]) -> dict[str, str]:
    """Parse ``--map REFERENCE=TEST`` texts against the names of both sides, as test value → reference value.

    Raises InputError for a text without ``=``, for a name that its side does not have, and for a value paired twice.
    """
    pairs: dict[str, str] = {}
    for text in texts:
        places = [i for i, c in enumerate(text) if c == "="]
        splits = [(text[:i], text[i + 1 :]) for i in places]
        if not splits:
            raise InputError(f"--map: {text!r}; expected REFERENCE=TEST, the names of two values")
        pair = next((s for s in splits if s[0] in ours and s[1] in theirs), splits[0])
        for name, names, side in ((pair[0], ours, "reference"), (pair[1], theirs, "test")):
            if name not in names:
                raise InputError(f"--map: the {side} has no value {name!r}{did_you_mean(name, names)}")
        if (pair[1] in pairs and pairs[pair[1]] != pair[0]) or pair[0] in set(pairs.values()) - {pairs.get(pair[1])}:
            raise InputError(f"--map: {text!r} pairs a value that is paired already")
        pairs[pair[1]] = pair[0]
    return pairs


def known_names(graphs: Iterable[Graph]) -> set[str]:
    """Names of all inputs and computed values of some graphs."""
    return {name for g in graphs for name in (*(v.name for v in g.inputs), *g.producer)}


def pair_inputs(reference: Graph, test: Graph, fixed: Mapping[str, str], where: str) -> dict[str, str]:
    """Reference input → test input: by ``fixed`` (test → reference), by name, else in the order of both files.

    A test may lack inputs, as an exporter drops what nothing reads. Raises InputError, starting with ``where``, for an
    input of the test without a counterpart, and where it lacks some and another of the reference's may be meant.
    """
    paired = _pair_ends(reference.inputs, test.inputs, fixed, {})
    certain = {ours for ours, theirs in paired.items() if ours == theirs or fixed.get(theirs) == ours}
    left = [v for v in reference.inputs if v.name not in certain]
    unclear = any(sum(_alike(v, t) for v in left) > 1 for t in test.inputs if t.name not in map(paired.get, certain))
    if len(paired) < len(test.inputs) or (len(test.inputs) < len(reference.inputs) and unclear):
        ours, theirs = (", ".join(map(str, g.inputs)) for g in (reference, test))
        advice = "" if len(test.inputs) > len(reference.inputs) else "; --map REFERENCE=TEST pairs two of them"
        raise InputError(f"{where} takes {theirs}; the reference takes {ours}{advice}")
    return paired


def pair_outputs(
    reference: Graph,
    test: Graph,
    names: Mapping[str, str],
    shapes: tuple[Mapping[str, tuple[int, ...]], Mapping[str, tuple[int, ...]]],
    paired: Collection[str] = (),
) -> dict[str, str]:
    """Reference output → test output: by ``names`` (test value → reference value), else by position and shape.

    ``shapes`` are those that values had in a run, where there was one; outputs in ``paired`` have their counterpart.
    """
    ours, theirs = (
        [replace(v, shape=known.get(v.name, v.shape)) for v in graph.outputs]
        for graph, known in zip((reference, test), shapes, strict=True)
    )
    return _pair_ends([value for value in ours if value.name not in paired], theirs, names, names)


def _pair_ends(
    ours: Sequence[ValueInfo], theirs: Sequence[ValueInfo], fixed: Mapping[str, str], taken: Mapping[str, str]
) -> dict[str, str]:
    """Our input or output → theirs: by ``fixed``, by name, else the next free one that may be the same."""
    paired = {fixed[v.name]: v.name for v in theirs if v.name in fixed and fixed[v.name] in {o.name for o in ours}}
    unpaired = {v.name for v in theirs} - set(paired.values()) - set(taken)
    for info in ours:
        if info.name in unpaired and info.name not in paired:
            paired[info.name] = info.name
            unpaired.discard(info.name)
    free = [v for v in theirs if v.name in unpaired]
    for info in ours:
        if info.name not in paired and (twin := next((v for v in free if _alike(info, v)), None)):
            paired[info.name] = twin.name
            free.remove(twin)
    return paired


def _alike(ours: ValueInfo, theirs: ValueInfo) -> bool:
    """Whether two inputs or outputs may be the same one, by all that is declared of them."""
    kinds = [v.dtype.kind for v in (ours, theirs) if v.dtype is not None]
    if len(set(kinds)) > 1 and set(kinds) != {"f", "V"}:
        return False
    if ours.shape is None or theirs.shape is None:
        return True
    sizes = zip(ours.shape, theirs.shape, strict=False)
    return len(ours.shape) == len(theirs.shape) and all(
        a == b or not (isinstance(a, int) and isinstance(b, int)) for a, b in sizes
    )


def believable(reference: Graph, test: Graph) -> bool:
    """Whether equal names mean equal values: most nodes behind them agree, and no weights say that names moved on."""
    ours, theirs = set(data_values(reference)), data_values(test)
    common = [v for v in theirs if v in ours]
    if not common or 2 * len(common) < min(len(ours), len(theirs)):
        return False
    known = known_names([reference]), known_names([test])
    agreeing = sum(
        _cut_off_by_range(reference, test, v) != v
        or (reference.producer[v].op == test.producer[v].op and not _rewired(reference, test, v, known))
        for v in common
    )
    return agreeing >= TRUST * len(common) and _misplaced(reference, test, common) <= MOST_MISPLACED


def moved_names(reference: Graph, test: Graph) -> set[str]:
    """Values of the test whose names both graphs have, but which are probably others: numbers in names that went on.

    An exporter numbers what has no name of its own (``/Add_3_output_0``): one node more, and all later numbers mean
    other values. Up to ``MOST_MISPLACED`` nodes that read other values are faults, unless other nodes read them, too.
    Of more, those are named here, and what is computed from them, unless its own weights say that it is the same layer.
    """
    data = set(data_values(reference)), set(data_values(test))
    of_both = data[0] & data[1]
    common = [v for v in test.values if v in reference.producer]
    unlike = {v for v in common if _reads(reference, v) != _reads(test, v) or (v in data[0]) != (v in data[1])}
    known = known_names([reference]), known_names([test])

    rewired = (_rewired(reference, test, v, known) for v in unlike if v in data[0] or v in data[1])
    shifted = sum(rewired) > MOST_MISPLACED
    mine, theirs = Constants(reference), Constants(test)
    moved: set[str] = set()
    for value in common if shifted else reversed(common):  # in execution order, or readers first
        nodes = reference.producer[value], test.producer[value]
        weights = mine.of(nodes[0])
        same = (node.op == nodes[0].op and weights == theirs.of(node) for node in _put_in(test, value, known[0]))
        if weights and any(same):
            continue
        later = shifted and (value in unlike or not moved.isdisjoint(nodes[1].inputs))
        both = () if weights else zip((mine, theirs), nodes, strict=True)
        few = [[c.digest(name) for name in node.proto.input if name in c] for c, node in both]
        other = value in of_both and (value in unlike or few[:1] != few[1:])
        if later or (other and _readers(reference, value) & _readers(test, value) <= moved):
            moved.add(value)
    return moved


def _put_in(graph: Graph, value: str, known: Collection[str]) -> Iterator[Node]:
    """The node of a value, and those in front of it as far as what one reads is computed here alone."""
    for _ in range(1 + PUT_IN):
        node = graph.producer[value]
        yield node
        data = [name for name in node.inputs if name in graph.producer]
        if len(data) != 1 or data[0] in known:
            return
        value = data[0]


def _readers(graph: Graph, value: str) -> set[str]:
    """What is computed from a value, behind any Q/DQ pair and Cast in between; ``""`` for an output."""
    found = readers(graph, value, lambda node, _: node.op in _CARRIERS)
    names = {o for node, _ in found if node.op not in _CARRIERS for o in node.outputs}
    return names | ({""} if any(value == info.name for info in graph.outputs) else set())


def _rewired(reference: Graph, test: Graph, value: str, known: tuple[Collection[str], Collection[str]]) -> bool:
    """Whether both nodes read other values that both graphs have: not what a node put in or left out does.

    ``known``: the names of each graph's values."""
    ours, theirs = _reads(reference, value)[1], _reads(test, value)[1]
    return ours != theirs and all(name in known[1] for name in ours) and all(name in known[0] for name in theirs)


_CARRIERS = {*QUANTIZERS, "Cast"}


def _reads(graph: Graph, value: str) -> tuple[str, set[str]]:
    """The operator behind a value, and what it reads that is computed, before any Q/DQ pair and Cast in between."""
    node = graph.producer[value]
    read = (_unquantized(graph, name) for name in node.inputs if name not in graph.initializers)
    return node.op, {name for name in read if name not in graph.initializers}


def _unquantized(graph: Graph, name: str) -> str:
    while (maker := graph.producer.get(name)) is not None and maker.op in _CARRIERS:
        name = maker.proto.input[0]
    return name


def _misplaced(reference: Graph, test: Graph, common: Sequence[str]) -> int:
    """Layers of the test whose weights the reference has under another name, and not the other way round."""
    ours, theirs = Constants(reference), Constants(test)
    our_digests = {v: ours.of(reference.producer[v]) for v in data_values(reference)}
    home = {digests: v for v, digests in our_digests.items() if digests}
    count = 0
    for value in common:
        digests = theirs.of(test.producer[value])
        elsewhere = home.get(digests) if digests and digests != our_digests[value] else None
        if elsewhere is not None:
            twin = test.producer.get(elsewhere)
            count += twin is None or theirs.of(twin) != digests
    return count


def pair_by_names(
    reference: Graph, test: Graph, fixed: Mapping[str, str], inputs: Mapping[str, str]
) -> dict[str, tuple[str, str]]:
    """Test value → (reference value, how) by what the user said and by equal names; inputs are taken as given."""
    pairs = {test_name: (name, "name" if test_name == name else "position") for name, test_name in inputs.items()}
    pairs |= {test_name: (name, "map") for test_name, name in fixed.items() if test_name in known_names([test])}
    used = {name for name, _ in pairs.values()}
    for value in test.values:
        if value in reference.producer and value not in pairs and value not in used:
            pairs[_cut_off_by_range(reference, test, value)] = (value, "name")
    used = {name for name, _ in pairs.values()}
    for value, held in named_levels(reference, test).items():
        if value not in pairs and held not in used:
            pairs[value] = (held, "name")
            used.add(held)
    return pairs


def _cut_off_by_range(reference: Graph, test: Graph, value: str) -> str:
    """The floats behind a Q/DQ pair whose range does what the activation left out at ``value`` does; else ``value``."""
    if reference.producer[value].op not in ("Relu", "Clip") or test.producer[value].op in ("Relu", "Clip"):
        return value
    name = value
    for op in ("QuantizeLinear", "DequantizeLinear"):
        reader = next((n for n in test.consumers.get(name, ()) if n.op == op), None)
        if reader is None:
            return value
        name = reader.outputs[0]
    return name


def _behind_folded(ours: Graph, theirs: Graph, pairs: Mapping[str, tuple[str, str]]) -> dict[str, tuple[str, str]]:
    """The pairs without products into which only the test has folded the BatchNormalization that reads them.

    Such a product is what the BatchNormalization gives, whatever it is called: it is paired with that, if nothing is.
    """
    result = dict(pairs)
    constants = Constants(ours), Constants(theirs)
    for test_name, (name, how) in pairs.items():
        made, test_made = ours.producer.get(name), theirs.producer.get(test_name)
        readers = ours.consumers.get(name, ())
        if made is None or test_made is None or how == "map" or made.op not in PRODUCTS or made.op != test_made.op:
            continue
        if len(readers) != 1 or readers[0].op != "BatchNormalization" or name in {v.name for v in ours.outputs}:
            continue
        unfolded = any(n.op == "BatchNormalization" for n in theirs.consumers.get(test_name, ()))
        if unfolded or constants[0].of(made) == constants[1].of(test_made):
            continue
        del result[test_name]
        if readers[0].outputs[0] not in {reference_name for reference_name, _ in result.values()}:
            result[test_name] = (readers[0].outputs[0], "structure")
    return result


def finish(
    ours: Graph,
    theirs: Graph,
    pairs: Mapping[str, tuple[str, str]],
    inputs: Mapping[str, str],
    shapes: tuple[Mapping[str, tuple[int, ...]], Mapping[str, tuple[int, ...]]] = ({}, {}),
) -> Pairing:
    """A whole ``Pairing`` from ``pairs``: outputs by position and shape where names do not tell, names for the rest."""
    pairs = _behind_folded(ours, theirs, pairs)
    names = {test_name: name for test_name, (name, _) in pairs.items()}
    ends = {v.name for v in ours.outputs}, {v.name for v in theirs.outputs}
    inside = {
        name: test_name
        for test_name, (name, kind) in pairs.items()
        if kind == "map" and name in ends[0] and test_name not in ends[1]
    }
    outputs = pair_outputs(ours, theirs, names, shapes, inside)
    how = Counter(kind for test_name, (_, kind) in pairs.items() if test_name in theirs.producer)
    for name, test_name in outputs.items():
        if names.get(test_name) != name:
            names = {o: n for o, n in names.items() if n != name} | {test_name: name}
            how["name" if name == test_name else "position"] += 1
    our_names, used = known_names([ours]), set(names.values())
    data, test_data = data_values(ours), set(data_values(theirs))
    added = [v for v in theirs.values if v not in names and v in test_data]
    for value in theirs.values:
        if value not in names and value in our_names:
            names[value] = value + UNPAIRED
    return Pairing(names, inputs, outputs, inside, how, [v for v in data if v not in used], added)
