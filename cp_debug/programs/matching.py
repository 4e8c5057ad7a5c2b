"""Finds, for every value of an ONNX graph, the tensor of the eager forward that it equals.

Numbers decide what may match (equal shape, fingerprints equal up to FP32 rounding). Equal tensors are common, though:
an identity, a ReLU on positive values, heads that are still zero. Among those the dataflow decides, then what the
exporter recorded, then whether the module's own code had the tensor, then the shortest way from what is matched
already, then the order of execution.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Iterable, Mapping
from typing import TypeVar

from cp_debug.graph.graph import Graph
from cp_debug.probes.fingerprint import Fingerprint
from cp_debug.probes.trace import TorchValue, Trace

_T = TypeVar("_T", bound=Hashable)

Source = frozenset[bytes]
"""Contents of the matched values that a value is computed from."""


class Matching:
    """``pairs``: ONNX value → (torch value, relative L2 distance).

    ``data`` are the graph's values that depend on an input's elements; only they are matched.
    """

    def __init__(
        self,
        graph: Graph,
        data: Collection[str],
        onnx_prints: Mapping[str, Fingerprint],
        trace: Trace,
        torch_prints: Mapping[TorchValue, Fingerprint],
        hints: Mapping[str, str],
        tolerance: float,
    ) -> None:
        self._graph, self._data, self._trace, self._hints = graph, data, trace, hints
        self._content = {v: repr(p.shape).encode() + p.projections.tobytes() for v, p in torch_prints.items()}
        self._by_shape: dict[tuple[int, ...], list[TorchValue]] = {}
        for value in torch_prints:
            self._by_shape.setdefault(value.shape, []).append(value)
        inputs = {v.name: v for v in trace.values if v.op == "input"}
        self.pairs: dict[str, tuple[TorchValue, float]] = {
            info.name: (inputs[info.name], 0.0) for info in graph.inputs if info.name in inputs
        }
        self._taken: set[TorchValue] = {v for v, _ in self.pairs.values()}
        self._matched = {self._content[v] for v in self._taken}
        self.prints, self.tolerance = torch_prints, tolerance
        for name in graph.values:
            if name in data and name in onnx_prints:
                self.match(name, onnx_prints[name])

    def match(self, name: str, print_: Fingerprint) -> None:
        """Pair a value of the graph with the tensor that it equals, if there is one."""
        near = [(self.prints[v].distance(print_), v) for v in self._by_shape.get(print_.shape, [])]
        best = min((d for d, _ in near), default=float("inf"))
        if best > self.tolerance:
            return
        # Rounding moves equal tensors apart by about as much as the best is away: more is another tensor.
        distances = {v: d for d, v in near if d <= max(10 * best, 1e-6)}
        source = self._onnx_source(name)
        chosen = min(distances, key=lambda v: self._rank(v, source, self._hints.get(name)))
        if self._rank(chosen, source, None)[0] > 1:
            return
        # The last of several equal tensors inside a leaf module is the one with the module's name.
        for output in self._trace.leaves.get(chosen.call, []):
            if output in distances and output not in self._taken and output.index > chosen.index:
                chosen = output
        self.pair(name, chosen, distances[chosen])

    def pair(self, name: str, value: TorchValue, distance: float) -> None:
        """Let a torch value stand for a value of the graph, from which it has this relative L2 distance."""
        self.pairs[name] = (value, distance)
        self._matched.add(self._content[value])
        self._taken.add(value)

    def counterparts(self, name: str, op: str) -> list[TorchValue]:
        """Torch values that nothing in the graph equals, those first that ``name`` most likely should be.

        ``op`` is the operator of torch that the exporter recorded for it, or empty: what that made is taken although
        another value has the same numbers, as ``remainder`` by Inf has those of what it reads.
        """
        source, hint = self._onnx_source(name), self._hints.get(name)
        free = [
            v
            for v in self.prints
            if v not in self._taken and (self._content[v] not in self._matched or (op and v.op == op))
        ]
        ranked = [(self._rank(v, source, hint), v) for v in free]
        return [v for _, v in sorted(ranked, key=lambda item: (item[0][0], bool(op) and item[1].op != op, item[0][1:]))]

    def sources(
        self, value: TorchValue, passes: Callable[[TorchValue], bool] = lambda v: False
    ) -> tuple[list[TorchValue], list[TorchValue]]:
        """The nearest paired values that a torch value is computed from, and the unpaired ones between. ``passes``:
        whether one that only equals a paired one is none."""
        matched = lambda v: self._content.get(v) in self._matched and not passes(v)  # noqa: E731
        return nearest(value, lambda v: v.inputs, lambda v: v in self._taken or matched(v))

    def _rank(self, value: TorchValue, source: Source, hint: str | None) -> tuple[int, bool, bool, bool, int, int]:
        torch_source, steps = self._torch_source(value)
        passed_through = source == {self._content[value]}
        agreement = 0 if torch_source == source or passed_through else 1 if torch_source & source else 2
        return agreement, value.path != hint, value in self._taken, ":" in value.name, steps, value.index

    def _onnx_source(self, name: str) -> Source:
        producer = self._graph.producer
        sources, _ = nearest(
            name,
            lambda n: [i for i in producer[n].inputs if i in self._data or i in self.pairs] if n in producer else [],
            self.pairs.__contains__,
        )
        return frozenset(self._content[self.pairs[n][0]] for n in sources)

    def _torch_source(self, value: TorchValue) -> tuple[Source, int]:
        # Another tensor with a matched content will do, as exporters merge equal computations; not one that equals
        # this value, as they also leave out the first of two operations in a row that give the same.
        other_contents = self._matched - {self._content[value]}
        sources, passed = nearest(
            value,
            lambda v: [i for i in v.inputs if i.from_data],
            lambda v: v in self._taken or self._content.get(v) in other_contents,
        )
        return frozenset(self._content[v] for v in sources), len(passed)

    def consistent(self, name: str) -> bool:
        """Whether a matched value is computed from the same matched values on both sides.

        Then what lies between is one computation, done in other steps: nothing in it is unaccounted for.
        """
        return self._rank(self.pairs[name][0], self._onnx_source(name), None)[0] == 0

    def next_matched(self, name: str) -> list[str]:
        """The nearest matched values downstream of an unmatched one."""
        consumers = self._graph.consumers
        downstream, _ = nearest(
            name, lambda n: [o for node in consumers.get(n, []) for o in node.outputs], self.pairs.__contains__
        )
        return downstream


def nearest(
    start: _T, neighbours: Callable[[_T], Iterable[_T]], stop: Callable[[_T], bool]
) -> tuple[list[_T], list[_T]]:
    """Walk from ``start`` to the nearest values where ``stop`` holds; return those, and the ones passed on the way."""
    reached: dict[_T, None] = {}
    passed: dict[_T, None] = {}
    stack = list(neighbours(start))
    while stack:
        value = stack.pop()
        if value in reached or value in passed:
            continue
        if stop(value):
            reached[value] = None
        else:
            passed[value] = None
            stack.extend(neighbours(value))
    return list(reached), list(passed)
