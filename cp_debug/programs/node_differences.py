"""Differences between two pieces of two graphs that should compute one value.

Attributes are compared by what they mean: an axis from the front or from the back, a default that is written out.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import numpy as np
import onnx
from onnx import helper

from cp_debug.graph.constants import Constants
from cp_debug.graph.graph import Graph, Node
from cp_debug.graph.operators import ACTIVATIONS as EACH_ELEMENT
from cp_debug.graph.operators import COMMUTATIVE, GATES, MOVERS, PRODUCTS, QUANTIZERS, RECURRENT
from cp_debug.programs.tensor_change import TensorChange, describe

MOVES = MOVERS | {"Cast"}
"""Operators that prepare weights: what they read is named after what reads them."""
ACTIVATIONS = EACH_ELEMENT | {"Exp", "LogSoftmax", "Softmax"}
NAMES = {
    "auto_pad": "padding",
    "epsilon": "normalization-eps",
    "pads": "padding",
    "training_mode": "batchnorm-statistics",
}
"""Attribute → the name of the cause, where it has one of its own."""
FUSED = {"FusedConv": "Conv", "FusedGemm": "Gemm", "FusedMatMul": "MatMul"}
"""Operators of ONNX Runtime that are one of ONNX's and an activation or scale behind it."""
MOST_EXCHANGED = 2
"""Operators that are exchanged, left out or added, up to which that is a fault and not another way to write it."""
FEW = 12
"""Elements of a constant up to which it is written out."""
INDICES = {"Gather", "GatherElements", "GatherND", "Slice", "ScatterND", "ScatterElements"}


@dataclass(frozen=True)
class NodeDifference:
    """One difference, by the name that the cause has in ``docs/causes.md``."""

    cause: str
    says: str
    node: str
    evidence: dict[str, Any] = field(default_factory=dict)
    added: bool = False
    """Whether it is a node that only the test has: what that node does may have a better name."""
    structural: bool = False
    """Whether it is about which operators there are, and not about what one of them is told."""
    attributes: Mapping[str, Any] = field(default_factory=dict)
    """Attributes of the reference's node that the test has otherwise, as the test has them."""
    inputs: Mapping[int, str] = field(default_factory=dict)
    """Place of a constant that the reference's node reads, or lacks → the constant that the test has there."""


class Pieces:
    """The nodes that make one value on both sides, matched."""

    def __init__(
        self,
        reference: Graph,
        ours: Sequence[Node],
        test: Graph,
        theirs: Sequence[Node],
        names: Mapping[str, str],
        settled: tuple[Mapping[str, np.ndarray], Mapping[str, np.ndarray]] = ({}, {}),
    ) -> None:
        """``names``: test value → reference value; ``settled``: what nodes of each side make of constants alone. Those
        nodes are not matched: what they make is compared where it is read."""
        self._reference, self._test = reference, test
        self._ours, self._theirs = Constants(reference, settled[0]), Constants(test, settled[1])
        self._mine, self._own = (
            [n for n in nodes if known.keys().isdisjoint(n.outputs)]
            for nodes, known in zip((ours, theirs), settled, strict=True)
        )
        self._names, self._given = dict(names), names
        self._pairs = self._matched()
        for a, b in self._pairs:
            self._names.update(zip(b.outputs, a.outputs, strict=False))
        fused = {activation for _, b in self._pairs if (activation := attributes(test, b).get("activation"))}
        present = {id(a) for a, _ in self._pairs}
        self._missing = [n for n in self._mine if id(n) not in present and n.op not in {"Constant", *fused}]
        self._added = [n for n in self._own if not any(n is b for _, b in self._pairs) and n.op != "Constant"]

    def _matched(self) -> list[tuple[Node, Node]]:
        by_output = {n.outputs[0]: n for n in self._mine if n.outputs}
        pairs = []
        for node in self._own:
            twin = by_output.get(self._names.get(node.outputs[0], "")) if node.outputs else None
            # Another operator under the same name, the old one before it: the name went on to what was added, or back
            # to what stood before what was left out.
            moved = twin is not None and any(n.op == twin.op for n in self._own) | any(
                n.op == _plain(node) for n in self._mine
            )
            if twin is not None and (twin.op == _plain(node) or not moved):
                pairs.append((twin, self._same_inputs(twin, node)))
        unmatched = [n for n in self._mine if not any(n is a for a, _ in pairs) and n.op != "Constant"]
        unmatched_test = [n for n in self._own if not any(n is b for _, b in pairs) and n.op != "Constant"]
        names = self._names | {o: name for a, b in pairs for o, name in zip(b.outputs, a.outputs, strict=False)}
        for alike in (True, False):
            # As many nodes on both sides: another operator on the same operands was exchanged, and none left out.
            for node in [*unmatched_test] if alike or len(unmatched) == len(unmatched_test) else ():
                read = sorted(
                    self._theirs.digest(n) if n in self._theirs else names.get(n, n) for n in node.proto.input
                )
                twins = [n for n in unmatched if (n.op == _plain(node)) is alike and self._read(n) == read]
                told = attributes(self._test, node)
                twin = min(twins, key=lambda n: attributes(self._reference, n) != told, default=None)
                if twin is not None:
                    pairs.append((twin, node))
                    names.update(zip(node.outputs, twin.outputs, strict=False))
                    unmatched.remove(twin)
                    unmatched_test.remove(node)
        for a, b in pairs:  # which grow: what two of them read at one place
            for x, y in zip(a.proto.input, b.proto.input, strict=False):
                made = next((n for n in unmatched if x in n.outputs), None)
                own = next((n for n in unmatched_test if y in n.outputs), None)
                if made is not None and own is not None and made.op == _plain(own):
                    pairs.append((made, own))
                    unmatched.remove(made)
                    unmatched_test.remove(own)
        matcher = difflib.SequenceMatcher(
            None, [n.op for n in unmatched], [_plain(n) for n in unmatched_test], autojunk=False
        )
        for tag, i, j, k, m in matcher.get_opcodes():
            if tag == "equal" or (tag == "replace" and j - i == m - k == 1):
                pairs += zip(unmatched[i:j], unmatched_test[k:m], strict=True)
        return pairs

    def _read(self, node: Node) -> list[str]:
        """What a node of the reference reads, constants by what they hold, in no order."""
        return sorted(self._ours.digest(n) if n in self._ours else n for n in node.proto.input)

    def _same_inputs(self, ours: Node, theirs: Node) -> Node:
        """``theirs``, or the node of its kind that reads what ``ours`` reads: another was put behind it, which took
        over its result's name."""

        def read(node: Node, names: Mapping[str, str], constants: Constants) -> list[str]:
            return [names.get(n, n) for n in node.proto.input if n not in constants]

        wanted = read(ours, {}, self._ours)
        if read(theirs, self._names, self._theirs) == wanted:
            return theirs
        others = (n for n in self._own if n.op == ours.op and read(n, self._names, self._theirs) == wanted)
        return next(others, theirs)

    @property
    def added(self) -> list[Node]:
        """The nodes that only the test has, in execution order."""
        return sorted(self._added, key=lambda n: n.index)

    @property
    def common(self) -> list[Node]:
        """The test's nodes that the reference has, too."""
        return [b for _, b in self._pairs]

    @property
    def replaced(self) -> tuple[list[Node], list[Node]]:
        """The reference's nodes that the test does not have, and those that it has instead, in execution order."""
        exchanged = [(a, b) for a, b in self._pairs if a.op != _plain(b)]
        sides = [*self._missing, *(a for a, _ in exchanged)], [*self._added, *(b for _, b in exchanged)]
        ours, theirs = (sorted(nodes, key=lambda n: n.index) for nodes in sides)
        return ours, theirs

    @property
    def is_rewritten(self) -> bool:
        """Whether one side computes the value with other operators (fused, folded, as another exporter writes it): then
        that operators differ is no fault by itself."""
        exchanged = sum(a.op != _plain(b) for a, b in self._pairs)
        both = bool(self._missing) and bool(self._added)
        foreign = any(b.op != a.op and b.proto.domain not in ("", a.proto.domain) for a, b in self._pairs)
        several = exchanged + len(self._missing) + len(self._added) > MOST_EXCHANGED
        return both or foreign or (several and bool(exchanged or self._added))

    def differences(self) -> list[NodeDifference]:
        """Every difference, in execution order; nodes that only the test has come last."""
        listed = [d for a, b in self._pairs for d in self._of_pair(a, b)]
        for node in self._missing:
            listed.append(_missing(node))
            if constant := self._constant_for(node):
                says = f"{constant} is a constant in the test, the reference computes it with {node.op}"
                listed[-1] = replace(listed[-1], says=says, evidence={"op": node.op, "constant": constant})
        for node in self._added:
            name, says = f"extra-{_kind(node)}", f"{node.op} is added: {node.name}"
            listed.append(NodeDifference(name, says, node.name, {"op": node.op}, added=True, structural=True))
        return listed

    def _constant_for(self, node: Node) -> str:
        """Constant that the test reads in place of what ``node`` computes; empty where it reads none."""
        places = ((x, y) for a, b in self._pairs for x, y in zip(a.proto.input, b.proto.input, strict=False))
        return next((y for x, y in places if x in node.outputs and y in self._theirs), "")

    def _of_pair(self, ours: Node, theirs: Node) -> Iterator[NodeDifference]:
        if theirs.op in QUANTIZERS and ours.op not in QUANTIZERS:
            return  # a quantizer is judged by its scale; where its levels end at 0, it is the activation, too
        if ours.op != _plain(theirs):
            says, evidence = f"{ours.op} is {theirs.op} in the test", {"op": ours.op, "test_op": theirs.op}
            exchange = NodeDifference("other-operator", says, ours.name, evidence, structural=True)
            yield _missing(ours) if theirs.op == "Identity" else exchange
            return
        results = [self._given.get(o, o) for o in theirs.outputs]
        if results != list(ours.outputs) and sorted(results) == sorted(ours.outputs):
            says = f"the results of {ours.op} are exchanged: {', '.join(results)}"
            yield NodeDifference("another-tensor", says, ours.name, {"results": results})
        yield from self._attributes(ours, theirs)
        exchanged = self._exchanged(ours, theirs)
        if exchanged is not None:
            yield exchanged
            return
        if not self._missing and not self._added:
            yield from self._operands(ours, theirs)
        yield from self._constants(ours, theirs)

    def _attributes(self, ours: Node, theirs: Node) -> Iterator[NodeDifference]:
        our_values, their_values = (attributes(g, n) for g, n in ((self._reference, ours), (self._test, theirs)))
        # Of two opsets one may have as an input what is an attribute in the other.
        alike = self._reference.opsets.get(ours.proto.domain) == self._test.opsets.get(theirs.proto.domain)
        names = our_values.keys() | their_values.keys() if alike else our_values.keys() & their_values.keys()
        for name in sorted(names, key=lambda n: (n in NAMES, n)):
            a, b = our_values.get(name), their_values.get(name)
            if isinstance(a, np.ndarray) or isinstance(b, np.ndarray) or a == b or says_nothing(ours.op, name, a, b):
                continue
            if _same_axes(self._reference, ours, name, a, b) or _same_axes(self._test, theirs, name, a, b):
                continue
            a, b = (_implied(n, name) if v is None else v for n, v in ((ours, a), (theirs, b)))
            after, before = ("all" if name == "axes" and v is None else _shown(v) for v in (b, a))
            says = f"{ours.op}: {name} is {after} instead of {before}"
            evidence: dict[str, Any] = {name: b, "instead_of": a}
            if name == "epsilon" and isinstance(a, float) and isinstance(b, float):
                says = f"{ours.op}: eps is {b:.3g} instead of {a:.3g}"
                evidence = {"eps": b, "instead_of": a}
            if name == "training_mode":
                batch, running = "the statistics of the batch", "the running statistics"
                used, wanted = (batch, running) if b else (running, batch)
                says = f"{ours.op} normalizes with {used} instead of {wanted}: {name} is {b} instead of {a}"
            yield NodeDifference(NAMES.get(name, "attribute"), says, ours.name, evidence, attributes={name: b})

    def _exchanged(self, ours: Node, theirs: Node) -> NodeDifference | None:
        """The difference of a node whose constants, all of them there, stand in another order; None if it is none."""
        if ours.op in COMMUTATIVE | {"BatchNormalization", "QuantizeLinear", "DequantizeLinear"}:
            return None  # no order, or constants that have names of their own
        mine, own = list(ours.proto.input), list(theirs.proto.input)
        read = [n for n in mine if n in self._ours], [n for n in own if n in self._theirs]
        held = [self._ours.digest(n) for n in read[0]], [self._theirs.digest(n) for n in read[1]]
        computed = (
            [(i, n) for i, n in enumerate(mine) if n not in self._ours],
            [(i, self._names.get(n, n)) for i, n in enumerate(own) if n not in self._theirs],
        )
        if computed[0] != computed[1] or held[0] == held[1] or sorted(held[0]) != sorted(held[1]):
            return None
        by_digest = dict(zip(held[0], read[0], strict=True))
        return _reordered(ours, [by_digest[digest] for digest in held[1]], read[0])

    def _operands(self, ours: Node, theirs: Node) -> Iterator[NodeDifference]:
        def read(node: Node, constants: Constants, names: Mapping[str, str]) -> list[str]:
            return [n if n in constants else names.get(n, n) for n in node.proto.input]

        a = read(ours, self._ours, {})
        b = read(theirs, self._theirs, self._names)
        computed = [x for x in a if x and x not in self._ours], [x for x in b if x and x not in self._theirs]
        places = [[i for i, x in enumerate(s) if x and x not in c] for s, c in ((a, self._ours), (b, self._theirs))]
        if computed[0] == computed[1] and places[0] == places[1]:
            return
        if sorted(computed[0]) == sorted(computed[1]):
            if ours.op in COMMUTATIVE:
                return
            yield _reordered(ours, computed[1], computed[0])
            return
        before, after = computed
        if len(before) == len(after):
            before, after = next(([x], [y]) for x, y in zip(before, after, strict=True) if x != y)
        says = f"{ours.op} reads {', '.join(after) or 'nothing'} instead of {', '.join(before)}"
        of, instead_of = (side[0] if len(before) == len(after) else side for side in (after, before))
        yield NodeDifference("another-operand", says, ours.name, {"of": of, "instead_of": instead_of})

    def _constants(self, ours: Node, theirs: Node) -> Iterator[NodeDifference]:
        our_inputs, their_inputs = list(ours.proto.input), list(theirs.proto.input)
        if ours.op in COMMUTATIVE and len(our_inputs) == len(their_inputs):
            their_inputs = self._in_order_of(our_inputs, their_inputs)
        for place in range(max(len(our_inputs), len(their_inputs))):
            a, b = (names[place] if place < len(names) else "" for names in (our_inputs, their_inputs))
            role = self._role(ours, place)
            if (a in self._ours and not b) or (b in self._theirs and not a):
                name = "bias-dropped" if a and role == "bias" else "constant-differs"
                argument = _argument(ours, place)
                which = f"{argument} ({a or b})" if argument else a or b
                says = f"{ours.op} has no {which}" if a else f"{ours.op} has {which} in the test alone"
                inputs = {} if a else {place: b}
                yield NodeDifference(name, says, ours.name, {"constant": a or b}, inputs=inputs)
            elif a in self._ours and b in self._theirs and self._ours.digest(a) != self._theirs.digest(b):
                if twin := self._ours.twin(a, self._theirs, b):
                    change: TensorChange | None = TensorChange(
                        "another", f"those of another layer ({twin})", {"of": twin}
                    )
                else:
                    change = describe(self._ours[a], self._theirs[b], GATES.get(ours.op, 0))
                argument = argument_of(ours, place) if role in ("", "index") else None
                sizes = self._ours.size(a), self._theirs.size(b)
                few = sizes[0] <= FEW and (role == "" or sizes[0] == sizes[1]) if argument else sizes == (1, 1)
                difference = change and replace(_of_constant(ours, a, role, change), inputs={place: b})
                if difference and few and role in ("", "index"):
                    arrays = self._ours[a], self._theirs[b]
                    before, after = (array.tolist() if argument else array.item() for array in arrays)
                    is_now = f"is {_shown(after)} instead of {_shown(before)}"
                    difference = replace(difference, says=f"{a} of {ours.op} {is_now}")
                    if argument is not None:
                        evidence = {argument: after, "instead_of": before, "constant": a}
                        cause = difference.cause if role else NAMES.get(argument, "attribute")
                        says = f"{ours.op}: {argument} {is_now}"
                        difference = replace(difference, cause=cause, says=says, evidence=evidence)
                if difference:
                    yield difference

    def _in_order_of(self, ours: Sequence[str], theirs: Sequence[str]) -> list[str]:
        """Operands of the test that have no order, in the reference's: equal constants first, then others by kind."""
        held = {self._theirs.digest(name): name for name in theirs if name in self._theirs}
        digests = [self._ours.digest(name) if name in self._ours else "" for name in ours]
        equal = {digest: held.pop(digest) for digest in {*digests} if digest in held}
        rest = iter([*held.values()]), iter([name for name in theirs if name not in self._theirs])
        return [equal.get(digest) or next(rest[0 if digest else 1], "?") for digest in digests]

    def of_constant(self, node: Node, place: int, change: TensorChange) -> NodeDifference:
        """One constant of a node of the reference, which the test holds changed."""
        return _of_constant(node, node.proto.input[place], self._role(node, place), change)

    def _role(self, node: Node, place: int) -> str:
        """Role of a node's input: weights, bias, statistics, parameters, scale, zero, index, or an empty string."""
        if node.op in MOVES and (place == 0 or node.op == "Concat"):
            readers = [n for o in node.outputs for n in self._reference.consumers.get(o, [])]
            if readers:
                value = next(o for o in node.outputs if o in readers[0].inputs)
                return self._role(readers[0], list(readers[0].proto.input).index(value))
        if node.op in ("Add", "Sub"):
            makers = [self._reference.producer[n].op for n in node.inputs if n in self._reference.producer]
            return "bias" if set(PRODUCTS).intersection(makers) else ""
        return role_of_constant(node, place) or ("index" if node.op in INDICES and place else "")


def _kind(node: Node) -> str:
    return "activation" if node.op in ACTIVATIONS else "operator"


def _missing(node: Node) -> NodeDifference:
    return NodeDifference(
        f"missing-{_kind(node)}", f"{node.op} is left out", node.name, {"op": node.op}, structural=True
    )


def _reordered(node: Node, operands: list[str], wanted: list[str]) -> NodeDifference:
    """The difference of a node that reads what it should in another order."""
    says = f"{node.op} reads {', '.join(operands)} in this order instead of {', '.join(wanted)}"
    says = f"the operands of {node.op} are exchanged" if operands == wanted else says
    name = "concat-order" if node.op == "Concat" else "operand-order"
    return NodeDifference(name, says, node.name, {"operands": operands, "instead_of": wanted})


def role_of_constant(node: Node, place: int) -> str:
    """Role of what a node itself reads: weights, bias, statistics, parameters, scale, zero, or an empty string."""
    if node.op in PRODUCTS:
        return "bias" if place == 2 else "weights"
    if node.op in RECURRENT:
        return {1: "weights", 2: "weights", 3: "bias"}.get(place, "")
    if node.op == "BatchNormalization":
        return "statistics" if place > 2 else "parameters"
    if node.op in QUANTIZERS:
        return {0: "weights", 1: "scale", 2: "zero"}.get(place, "")
    return ""


def _of_constant(node: Node, constant: str, role: str, change: TensorChange) -> NodeDifference:
    subject = f"{node.op} {role}" if role in ("weights", "bias") else f"{constant} of {node.op}"
    factor = change.says.removeprefix("× ")
    scaled = f"{subject} {'are' if role == 'weights' else 'is'} scaled by {factor}"
    says = scaled if factor != change.says else f"{subject}: {change.says}"
    evidence = {"constant": constant, "change": change.kind, **change.evidence, "differs_by": change.size}
    return NodeDifference(named(change, role, node.op), says, node.name, evidence)


def _plain(node: Node) -> str:
    """The operator that a node stands for: ONNX Runtime fuses what follows a product into it."""
    return FUSED.get(node.op.rpartition(".")[2], node.op)


@cache
def _attributes_once(op: str) -> frozenset[str]:
    """Names of the attributes that an operator of ONNX had in any opset."""
    history = [s for s in onnx.defs.get_all_schemas_with_history() if s.name == op and s.domain == ""]
    return frozenset(name for schema in history for name in schema.attributes)


def argument_of(node: Node, place: int) -> str | None:
    """Name of a node's input that older opsets have as an attribute, such as ``max`` of Clip; None for other inputs."""
    name = _argument(node, place)
    return name if name in _attributes_once(node.op) else None


def _argument(node: Node, place: int) -> str | None:
    """Name of a node's input in its operator's schema; None where ONNX has none."""
    if node.proto.domain not in ("", "ai.onnx") or not onnx.defs.has(node.op):
        return None
    inputs = onnx.defs.get_schema(node.op).inputs
    return inputs[place].name if place < len(inputs) else None


def named(change: TensorChange, role: str, op: str) -> str:
    """Name of the cause (as in ``docs/causes.md``) for a change of a constant with this role in an operator."""
    if role in ("statistics", "parameters"):
        return f"batchnorm-{role}"
    if role in ("scale", "zero"):
        return "int8-scale" if role == "scale" else "int8-zero-point"
    if role == "index":
        return "index-shifted"
    if change.kind in ("fp16", "bf16"):
        return f"{change.kind}-weights"
    if role == "bias" and change.kind == "channels-zero":
        return "bias-dropped"
    weights = {
        "another": "weights-of-another-layer",
        "channels-scaled": "channels-scaled",
        "channels-zero": "channels-zeroed",
        "clipped": "weights-clipped",
        "coarse": "coarse-weights",
        "copied": "weight-layout",
        "flipped": "weight-layout",
        "gates-permuted": "gate-order",
        "int8-per-channel": "int8-weights",
        "int8-per-tensor": "int8-per-tensor",
        "negated": "bias-scaled" if role == "bias" else "weights-scaled",
        "permuted": "weight-layout",
        "pruned": "weights-pruned",
        "rolled": "index-shifted",
        "scaled": "bias-scaled" if role == "bias" else "weights-scaled",
        "transposed": "weight-layout",
    }
    if role in ("weights", "bias"):
        return weights.get(change.kind, "other-weights")
    plain = ("another", "int8-per-channel", "int8-per-tensor", "rolled")
    return weights[change.kind] if change.kind in plain else "constant-differs"


def attributes(graph: Graph, node: Node) -> dict[str, Any]:
    """Attribute → value of a node, absent ones with their defaults, texts as ``str``; bodies are left out."""
    kinds = (onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS)
    schema = node.schema(graph.opsets)
    values = {
        name: helper.get_attribute_value(a.default_value)
        for name, a in (schema.attributes.items() if schema else ())
        if a.default_value.type not in (0, *kinds)
    }
    values |= {a.name: helper.get_attribute_value(a) for a in node.proto.attribute if a.type not in kinds}
    return {name: _plain_value(value) for name, value in values.items()}


def _plain_value(value: Any) -> Any:
    if isinstance(value, bytes):
        return value.decode(errors="replace")
    if isinstance(value, onnx.TensorProto):
        return onnx.numpy_helper.to_array(value)
    if isinstance(value, float | int | str):
        return value
    return [_plain_value(v) for v in value]


def _shown(value: Any) -> str:
    if value is None:
        return "not given"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


_RESULTS_AXES = {"Unsqueeze"}
"""Operators whose axes are those of the result."""
_SHAPES = {"hidden_size", "kernel_shape", "num_outputs", "output_shape", "split"}
"""Attributes that are inferred where they are absent: they differ only where both sides have them."""
_ACTIVATIONS_OF = {"GRU": ["Sigmoid", "Tanh"], "LSTM": ["Sigmoid", "Tanh", "Tanh"], "RNN": ["Tanh"]}
"""Activations of recurrent layers that name none."""


def _same_axes(graph: Graph, node: Node, name: str, a: Any, b: Any) -> bool:
    """Whether two values of a node's attribute name the same axes, one from the front and one from the back.

    A reduction reduces its axes in any order, and all of them where they are absent.
    """
    reduces = node.op.startswith("Reduce") and name == "axes"
    if name not in ("axis", "axes") or ((a is None or b is None) and not reduces):
        return False
    names = node.outputs if node.op in _RESULTS_AXES else node.inputs
    declared = graph.types.get(names[0]) if names else None
    if declared is None or not declared.tensor_type.HasField("shape"):
        return False
    rank = len(declared.tensor_type.shape.dim)
    axes = [list(range(rank)) if v is None else v if isinstance(v, list) else [v] for v in (a, b)]
    front = [[axis + rank if axis < 0 else axis for axis in each] for each in axes]
    return sorted(front[0]) == sorted(front[1]) if reduces else front[0] == front[1]


def _implied(node: Node, name: str) -> Any:
    """The value that an absent attribute of a node stands for, where that is one number for each axis; else None."""
    if name == "pads" and node.attribute("auto_pad", b"NOTSET") == b"NOTSET":
        return 0
    return 1 if name in ("strides", "dilations") else None


def says_nothing(op: str, name: str, a: Any, b: Any) -> bool:
    """Whether only one side has the attribute, and it says there what holds without it."""
    if a is not None and b is not None:
        return False
    value = b if a is None else a
    if name in ("pads", "output_padding"):
        return not any(value)
    if name in ("strides", "dilations"):
        return all(v == 1 for v in value)
    if name == "perm":
        return list(value) == list(range(len(value)))[::-1]
    if name == "activations":
        usual = _ACTIVATIONS_OF[op]
        return [v.lower() for v in value] == [v.lower() for v in usual] * (len(value) // len(usual))
    return name in _SHAPES or (name == "axes" and not op.startswith("Reduce"))
