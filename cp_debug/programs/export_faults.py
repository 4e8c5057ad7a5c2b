"""Faults of an export: where the graph computes something else than the module, and what it lost there.

Behind the first wrong operator no number of the graph equals one of torch, so that nothing could be paired there. A
value that is not paired is tried with the torch values that it may stand for, those first that the exporter's record
and the dataflow propose. The pair is right where the numbers behind it match again; the fault then lies between it and
what was matched before. Several faults are found one after the other.

torch's operators at a fault are run again without an argument, or left out. A cause is named only where that reproduces
what the graph computes, from the module's own tensors.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from cp_debug.backends.executor import Executor
from cp_debug.errors import InputError
from cp_debug.graph.exporter_notes import source_line
from cp_debug.graph.graph import Graph, Node
from cp_debug.graph.operators import ALL_MOVERS
from cp_debug.graph.randomness import draws
from cp_debug.probes.alignment import TIE, Departure
from cp_debug.probes.caveats import ties
from cp_debug.probes.distance import relative_l2, zeros_differ
from cp_debug.probes.fingerprint import fingerprint
from cp_debug.probes.trace import Operation, TorchValue, Trace
from cp_debug.programs.matching import Matching
from cp_debug.programs.torch_span import TorchSpan

LOOKAHEAD = 24
"""Nodes behind a value that are computed to see whether their numbers match."""
TRIED = 16
"""Torch values that are tried for one value of the graph."""
OPEN = 64
"""Values of the graph for which that is done before a fault is given up."""
_FX_NODE = "pkg.torch.onnx.fx_node"
_FX_TARGET = re.compile(r"target=torch\.ops\.\w+\.(\w+)")
_MOVES = ALL_MOVERS | {"Cast"}
"""Operators that make numbers of nothing but the numbers given: that these match says nothing."""


@dataclass(frozen=True, eq=False)
class WrongValue:
    """A value of the graph that is computed from the module's own numbers, and is not what the module makes of them."""

    name: str
    value: TorchValue
    """Counterpart in the module."""
    got: Tensor
    """What the graph makes, of any shape; ``value`` has another tensor."""
    between: Collection[TorchValue]
    """Values of torch between ``value`` and what is paired before it."""
    error: float
    """Relative L2 distance of the two; infinite where the shapes differ."""


class Behind:
    """The graph, computed once more with torch's tensors in the place of what is wrong."""

    def __init__(
        self,
        graph: Graph,
        executor: Executor,
        matching: Matching,
        data: Collection[str],
        record: Trace,
        tensors: Mapping[TorchValue, Tensor],
        inputs: Mapping[str, Tensor],
    ) -> None:
        """``tensors`` are those of ``record``'s values, FP32 or whole numbers; ``data`` as ``Matching`` has it."""
        self._graph, self._executor, self._matching, self._data = graph, executor, matching, data
        self._record, self._tensors = record, tensors
        self._values: dict[str, Any] = dict(inputs)
        executor.run(inputs, self._values.__setitem__)
        returned = zip(graph.outputs, record.outputs, record.tensors, strict=True)
        self._returned = {info.name: (value, tensor) for info, value, tensor in returned}
        self._fx = {name: _fx_node(node) for name, node in graph.producer.items()}

    def faults(self) -> list[WrongValue]:
        """The faults, in execution order; what they stand for is paired, and all that matches behind them."""
        found = []
        while (fault := self._next()) is not None:
            found.append(self._take(*fault))
        for name, (value, tensor) in self._returned.items():
            wrong = name in self._values and _apart(self._values[name], tensor) > self._matching.tolerance
            if wrong and value is not None and value in self._tensors:  # by position, whatever else is equal
                found.append(self._take(name, value))
        return sorted(found, key=lambda fault: self._graph.producer[fault.name].index)

    def _next(self) -> tuple[str, TorchValue] | None:
        """The next value to be put right, and the torch value that what follows proves to be its counterpart.

        Values inside a function of torch, whose steps an exporter may write otherwise, come after all others.
        """
        pairs = self._matching.pairs
        candidates: dict[str, list[TorchValue]] = {}
        for name in self._open()[:OPEN]:
            value = self._values.get(name)
            if isinstance(value, Tensor) and name in pairs and self._lost_zeros(name):
                candidates[name] = [pairs[name][0]]
            elif isinstance(value, Tensor) and self._leaves(name):
                fx = _FX_TARGET.search(self._fx[name])
                candidates[name] = [
                    v
                    for v in self._matching.counterparts(name, fx.group(1) if fx else "")
                    if v in self._tensors
                    and _fits(self._tensors[v], value)
                    and (name not in pairs or v is not pairs[name][0])
                ]
        for inside in (False, True):
            for name, values in candidates.items():
                for candidate in [v for v in values if (":" in v.name) == inside][:TRIED]:
                    if self._proved(name, candidate):
                        return name, candidate
        return None

    def _open(self) -> list[str]:
        """Values of the graph without a counterpart, in execution order; before each what it reads that may be wrong.

        That is what equals a torch value which an earlier value equals, too: a step that was left out; or what is 0
        where torch has a number beside which all distances are large: an ε that was left out.
        """
        pairs, producer = self._matching.pairs, self._graph.producer
        first: dict[TorchValue, str] = {}
        for name in (*self._values, *pairs):
            if name in pairs:
                first.setdefault(pairs[name][0], name)
        found: dict[str, None] = {}
        for name in self._graph.values:
            if name not in self._data or name in pairs:
                continue
            if any(self._matching.consistent(n) for n in self._matching.next_matched(name)):
                continue
            for read in producer[name].inputs:
                if read in pairs and read in producer and (first[pairs[read][0]] != read or self._lost_zeros(read)):
                    found[read] = None
            found[name] = None
        return list(found)

    def _lost_zeros(self, name: str) -> bool:
        """Whether a value is 0 elsewhere than the torch value that it is paired with."""
        value, tensor = self._values.get(name), self._tensors.get(self._matching.pairs[name][0])
        return isinstance(value, Tensor) and tensor is not None and zeros_differ(value, tensor)

    def _moves_zeros(self, value: TorchValue) -> bool:
        """Whether a value of torch differs from what it is computed from in its zeros: + ε."""
        known = [v for v in value.inputs if v in self._tensors] if value in self._tensors else []
        return any(zeros_differ(self._tensors[value], self._tensors[v]) for v in known)

    def _leaves(self, name: str) -> bool:
        """Whether a value leaves the operator of torch that its node was made of, as far as the exporter recorded."""
        readers = self._graph.consumers.get(name, [])
        fx = self._fx[name]
        return not fx or not readers or any(_fx_node(node) != fx for node in readers)

    def _proved(self, name: str, value: TorchValue) -> bool:
        """Whether a number behind ``name`` matches one of torch behind ``value`` once that stands in its place."""
        after = {value}
        for later in self._record.values[value.index + 1 :]:
            if not after.isdisjoint(later.inputs):
                after.add(later)
        changed: dict[str, Any] = {name: self._held(name, value)}
        moved, prints = {name}, self._matching.prints
        for node in self._readers(changed, LOOKAHEAD):
            for output, result in self._compute(node, changed).items():
                changed[output] = result
                if not isinstance(result, Tensor):
                    continue
                returned = self._returned.get(output)
                if returned is not None and _apart(result, returned[1]) <= self._matching.tolerance:
                    return True
                if node.op in _MOVES and moved.issuperset(set(node.inputs) & changed.keys()):
                    moved.add(output)
                    continue
                own = fingerprint(result)
                near = (v for v in after if v is not value and v.shape == own.shape and v in prints)
                if own.norm and any(prints[v].distance(own) <= self._matching.tolerance for v in near):
                    return True
        return False

    def _take(self, name: str, value: TorchValue) -> WrongValue:
        """Put torch's tensor in the place of a value, compute what reads it, and match that."""
        got, right = self._values[name], self._tensors[value]
        error, (_, between) = _apart(got, right), self._matching.sources(value, self._moves_zeros)
        self._matching.pair(name, value, error)
        changed: dict[str, Any] = {name: self._held(name, value)}
        for node in self._readers(changed, len(self._graph.nodes)):
            changed |= self._compute(node, changed)
        self._values |= changed
        for output, result in changed.items():
            if output in self._data and output not in self._matching.pairs and isinstance(result, Tensor):
                self._matching.match(output, fingerprint(result))
        return WrongValue(name, value, got, between, error)

    def _readers(self, changed: Mapping[str, Any], most: int) -> list[Node]:
        """The first ``most`` nodes that are computed from ``changed``, in execution order."""
        reached, nodes = set(changed), []
        for node in self._graph.nodes:
            if not reached.isdisjoint(node.inputs) and not draws(node, self._graph):
                reached.update(node.outputs)
                nodes.append(node)
            if len(nodes) == most:
                break
        return nodes

    def _compute(self, node: Node, changed: Mapping[str, Any]) -> dict[str, Any]:
        given = {name: changed.get(name, self._values.get(name)) for name in node.inputs}
        try:
            wanted = [name for name in node.outputs if name in self._values]
            return self._executor.run_nodes(
                [node], {name: tensor for name, tensor in given.items() if tensor is not None}, wanted
            )
        except InputError:
            return {}

    def _held(self, name: str, value: TorchValue) -> Tensor:
        return self._tensors[value].to(self._values[name].dtype)


def _fx_node(node: Node) -> str:
    """The operator of torch that a node was made of, as dynamo's exporter wrote it; empty where nobody did."""
    return next((entry.value for entry in node.proto.metadata_props if entry.key == _FX_NODE), "")


def _apart(one: Tensor, other: Tensor) -> float:
    """Relative L2 distance of two tensors; infinite where shapes, NaN or Inf differ."""
    sides = [torch.view_as_real(t.resolve_conj()) if t.is_complex() else t for t in (one, other)]
    return max(relative_l2(*sides), relative_l2(*reversed(sides)))


def _fits(tensor: Tensor, value: Tensor) -> bool:
    return tensor.shape == value.shape and tensor.is_floating_point() == value.is_floating_point()


MOST = 400
"""Changed operators that are tried for one fault."""
CLOSE = 0.1
"""Part of the fault's size up to which the changed module may be off the graph's result."""
_WORDS = (None, "sum", "mean", "prod", "amax", "amin", "none", "tanh", "floor", "trunc")
"""Values of arguments that choose a mode by its name."""


def explained(fault: WrongValue, region: TorchSpan, graph: Graph, prefix: str) -> Departure:
    """The fault in words: which operators of the module, what the graph makes of them, and the proof."""
    operations = region.operations
    culprit = next(reversed(operations), None)
    says = _ties(fault, culprit, region.tensors)
    cause = TIE if says else ""
    lost_zeros = zeros_differ(region.tensors[fault.value], fault.got)
    for operation, how, result in () if says else _tried(region):
        an_epsilon = lost_zeros and not zeros_differ(result, fault.got)
        if _apart(result, fault.got) <= (1e-6 if an_epsilon else min(CLOSE * fault.error, 1e-3)):
            cause, culprit = ("lost-argument" if how else "lost-operator"), operation
            called = f"`{_name(operation)}`"
            says = f"the graph computes {called} {how}" if how else f"the graph leaves {_in_words(operation)} out"
            break
    node = graph.producer[fault.name]
    value = operations[culprit] if culprit is not None else fault.value
    return Departure(
        onnx=fault.name,
        torch=fault.value.name,
        path=value.path or prefix,
        calls=_calls(operations),
        at=fault.value.op if culprit is None else _function(value, operations),
        source=(culprit.source if culprit is not None else "") or source_line(node.proto),
        error=fault.error,
        cause=cause,
        says=says,
    )


def _function(value: TorchValue, operations: Mapping[Operation, TorchValue]) -> str:
    """The function of torch in which a value was computed, where it has several steps; else its own operator."""
    scope = value.name.partition(":")[0]
    alone = sum(other.name.partition(":")[0] == scope for other in operations.values()) == 1
    own = value.operation is None or alone or "/" not in scope
    return value.op if own else scope.rpartition("/")[2].partition("#")[0]


def _calls(operations: Mapping[Operation, TorchValue]) -> list[str]:
    """The operators in words; those inside one function of torch, which the module's code calls, as that function."""
    inside: dict[str, list[Operation]] = {}
    for operation, value in operations.items():
        inside.setdefault(value.name.partition(":")[0], []).append(operation)
    return [
        _in_words(own[0]) if len(own) == 1 else f"`{scope.rpartition('/')[2]}` ({', '.join(map(_name, own))})"
        for scope, own in inside.items()
    ]


def _ties(fault: WrongValue, operation: Operation | None, tensors: Mapping[TorchValue, Tensor]) -> str:
    """In words, where the fault is no more than a tie that is broken differently; else empty."""
    if operation is None or fault.got.is_floating_point():
        return ""
    read = [tensors[v] for v in tree_leaves(operation.args) if isinstance(v, TorchValue) and v in tensors]
    keys = (t for t in read if t.is_floating_point())
    return next(filter(None, (ties(t, tensors[fault.value], fault.got) for t in keys)), "")


def _in_words(operation: Operation) -> str:
    """``avg_pool2d(kernel_size=[1, 2], divisor_override=3)``: what is not a tensor, and not the default."""
    given = [f"{n}={v!r}" for n, v, default in _arguments(operation) if not _holds_tensor(v) and v != default]
    return f"`{_name(operation)}({', '.join(given)})`"


def _tried(region: TorchSpan) -> Iterator[tuple[Operation, str, Tensor]]:
    """Each change of one operator: which, how in words (empty: left out), and the target that it gives."""
    tried = 0
    for operation in reversed(region.operations):
        changes: list[tuple[str, Any, Any]] = [*_changes(operation, region.tensors)]
        for how, args, kwargs in [("", None, None), *changes]:
            tried += 1
            if tried > MOST:
                return
            try:
                with torch.no_grad():
                    result = region.run(operation, args, kwargs)
            except Exception:  # an argument that the operator refuses
                continue
            if result is not None:
                yield operation, how, result


def _changes(operation: Operation, tensors: Mapping[TorchValue, Tensor]) -> Iterator[tuple[str, Any, Any]]:
    """Other arguments of an operator: how they differ, in words, and the arguments."""
    given = list(_arguments(operation))
    values = {name: value for name, value, _ in given}
    others: list[tuple[str, str, Any]] = []
    for name, value, default in given:
        if value is not None and value != default and not _holds_tensor(value) and default is not _REQUIRED:
            others.append((f"without {name}={value!r}", name, default))
    for name, value, default in given:
        if _holds_tensor(value):
            if default is None:
                others.append((f"without {name}", name, None))
            others += [(how, name, t) for how, t in _masks(value, tensors)]
            continue
        others += [
            (f"with {name}={other!r} in place of {value!r}", name, other)
            for other in _other_values(value)
            if other != value
        ]
    keyword_only = {spec.name for spec in operation.function._schema.arguments if spec.kwarg_only}
    for how, name, other in others:
        changed = values | {name: other}
        args = tuple(v for n, v in changed.items() if n not in keyword_only)
        yield how, args, {n: v for n, v in changed.items() if n in keyword_only}


def _other_values(value: Any) -> list[Any]:
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, str):
        return list(_WORDS)
    if isinstance(value, int | float):
        return [type(value)(n) for n in (0, 1, 2, 3, -1, -value)] + ([1 / value] if value else [])
    if isinstance(value, list) and value and all(isinstance(n, int | float) for n in value):
        own = [type(value[0])(n) for n in (0, 1)]
        return [*([n] * len(value) for n in own), [-n for n in value], value[::-1], [value[0]] * len(value)]
    return []


def _masks(value: Any, tensors: Mapping[TorchValue, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """A mask by the lowest number in the place of −Inf."""
    tensor = tensors.get(value) if isinstance(value, TorchValue) else value
    if not isinstance(tensor, Tensor):
        return
    lowest = torch.finfo(tensor.dtype if tensor.is_floating_point() else torch.float32).min
    how = f"with a mask of {lowest:.2g} where the module has −Inf"
    if tensor.dtype == torch.bool:
        yield how, torch.zeros(tensor.shape).masked_fill(~tensor, lowest)
    elif tensor.is_floating_point() and bool(tensor.isneginf().any()):
        yield how, tensor.nan_to_num(neginf=lowest)


_REQUIRED = object()


def _arguments(operation: Operation) -> Iterator[tuple[str, Any, Any]]:
    """Name, value and default (``_REQUIRED`` without one) of each argument, in the operator's order."""
    for position, spec in enumerate(operation.function._schema.arguments):
        default = spec.default_value if spec.has_default_value() else _REQUIRED
        value = operation.args[position] if position < len(operation.args) else operation.kwargs.get(spec.name, default)
        yield spec.name, list(value) if isinstance(value, tuple) else value, default


def _holds_tensor(value: Any) -> bool:
    return any(isinstance(leaf, Tensor | TorchValue) for leaf in tree_leaves(value))


def _name(operation: Operation) -> str:
    return str(operation.function._schema.name.partition("::")[2])
