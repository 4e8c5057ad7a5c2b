"""Values of two graphs paired by what they hold on the same inputs, and by the dataflow.

The test's graph is executed node by node, but every value that is paired already is read as the *reference* has it.
A value at fault has no equal, nor has what follows from it. It is paired with what the reference has in its place (the
same operator on the same inputs, the same weights, else what has its shape and comes from the same values) when that is
verified: given the reference's tensor for it, the test computes what the reference computes from it. Then all that lies
behind is computed anew, and equals again.
Intermediate results that only one side has (a convolution before its BatchNorm, which the other has folded) equal
nothing and verify nothing; they stay unpaired.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import torch
from onnx import helper
from torch import Tensor

from cp_debug.backends.executor import Executor
from cp_debug.doing import doing
from cp_debug.errors import InputError
from cp_debug.graph import onnx_runtime
from cp_debug.graph.constants import Constants
from cp_debug.graph.graph import Graph, Node, data_values, readers
from cp_debug.graph.onnx_runtime import to_numpy, to_ort
from cp_debug.graph.operators import MOVERS, PRODUCTS
from cp_debug.graph.qdq import weight_axis
from cp_debug.probes.fingerprint import Fingerprint, fingerprint
from cp_debug.programs.align import TOLERANCE
from cp_debug.programs.matching import nearest

Load = Callable[[str], Any]
LOOSER = {torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""Relative L2 distance up to which a value in a narrow type equals one in FP32: some roundings of one layer."""
QUANTIZED = 0.3
"""Relative L2 distance up to which a value behind quantizers equals one of the reference."""
FEW = 16
"""Number of elements below which contents alone pair nothing: so few are equal by chance."""
SCALED = 0.8
"""Cosine of a channel's weights above which they are the same ones times a factor, or nearly."""
AHEAD = 4
"""Number of nodes in a row that another operator, or several, may stand for."""
FAR = 16
"""Number of nodes within which a reference's tensor in the place of a test's must lead to another of the reference."""
MOST = 8
"""Number of values that are tried in a place for their shape alone."""
TRIES = 512
"""Number of such values in a whole graph: each costs up to ``FAR`` nodes."""


class NumericPairing:
    """Extends ``pairs`` (test value → (reference value, how)) by walking through the test's graph."""

    def __init__(
        self,
        reference: Graph,
        test: Graph,
        pairs: Mapping[str, tuple[str, str]],
        prints: Mapping[str, Fingerprint],
        load: Load,
    ) -> None:
        """``prints`` and ``load`` give what the reference's values (inputs included) hold in one run."""
        self.pairs = dict(pairs)
        self.shapes: dict[str, tuple[int, ...]] = {}
        """Shapes of the test's values, as far as they could be computed."""
        self._reference, self._test, self._prints, self._load = reference, test, prints, load
        self._ours, self._theirs = Constants(reference), Constants(test)
        self._data, self._own_data = set(data_values(reference)), set(data_values(test))
        self._fed = {graph: {*data_values(graph), *(v.name for v in graph.inputs)} for graph in (reference, test)}
        self._ends = tuple({v.name for v in graph.outputs} for graph in (reference, test))
        self._claimed = {name for name, _ in self.pairs.values()}
        self._order = {v: i for i, v in enumerate(reference.values)}
        self._by_shape: dict[tuple[int, ...], list[str]] = {}
        for name in reference.values:
            if name in self._data and name in prints:
                self._by_shape.setdefault(prints[name].shape, []).append(name)
        self._by_weight: dict[str, list[Node]] = {}
        for node in reference.nodes:
            for name in node.inputs:
                if name in self._ours and self._ours.size(name) >= FEW:
                    self._by_weight.setdefault(name, []).append(node)
                    self._by_weight.setdefault(self._ours.digest(name), []).append(node)
        self._executor = Executor(test)
        self._values: dict[str, Any] = {}
        self._given_up: set[str] = set()
        self._guesses: dict[str, str] = {}
        """Values that nothing verifies alone → those of the reference that their operators or weights speak for."""
        self._left = TRIES
        self._loose = QUANTIZED if test.precision == "int8" and reference.precision != "int8" else 0.0

    def run(self) -> dict[str, tuple[str, str]]:
        """Every pair, the given ones included: test value → (reference value, how)."""
        with torch.no_grad():
            for node in self._test.nodes:
                self._numbers(node)
            while (value := self._open()) is not None:
                resolved = self._resolve(value)
                self._given_up.add(value)
                if resolved is not None:
                    self._again(resolved)
        return self.pairs

    def _open(self) -> str | None:
        """The first value that is neither paired nor given up."""
        unpaired = (v for v in self._test.values if v in self._own_data and v not in self.pairs)
        return next((v for v in unpaired if v not in self._given_up), None)

    def _again(self, value: str) -> None:
        """Compute anew what hangs on a value that has just been paired."""
        changed = {value}
        for node in self._test.nodes[self._test.producer[value].index + 1 :]:
            unpaired = [o for o in node.outputs if o not in self.pairs]
            if unpaired and not changed.isdisjoint(node.inputs):
                self._numbers(node)
                changed.update(unpaired)

    def _numbers(self, node: Node) -> None:
        """Compute a node's outputs, and pair those that equal a value of the reference."""
        unpaired = [o for o in node.outputs if o not in self.pairs or self.pairs[o][0] not in self._prints]
        for name, value in self._compute(node, unpaired).items():
            self._values[name] = value
            if not _has_numbers(value):
                continue
            self.shapes[name] = tuple(value.shape)
            if name in self._own_data and name not in self.pairs:
                self._match(node, name, fingerprint(value), _tolerance(value))

    def _value(self, name: str) -> Any:
        """A value as the reference has it where it is paired, else as computed here. Raises KeyError."""
        if name in self.pairs and self.pairs[name][0] in self._prints:
            return self._load(self.pairs[name][0])
        return self._values[name]

    def _compute(self, node: Node, wanted: Sequence[str], instead: Mapping[str, Any] = {}) -> dict[str, Any]:
        """Some outputs of a node, ``instead`` replacing values that it reads; empty where it cannot be computed."""
        try:
            names = [n for n in node.inputs if n not in self._theirs]
            operands = {n: instead[n] if n in instead else self._value(n) for n in names}
        except KeyError:
            return {}
        try:
            return self._executor.run_nodes([node], operands, wanted) if wanted else {}
        except InputError:
            return run_in_ort(self._test, self._theirs, node, operands, wanted)

    def _match(self, node: Node, name: str, own: Fingerprint, tolerance: float) -> None:
        free = [v for v in self._by_shape.get(own.shape, []) if v not in self._claimed]
        distances = {v: self._prints[v].distance(own) for v in free}
        best = min(distances.values(), default=math.inf)
        limit = tolerance if best <= tolerance else self._loose
        if best > limit:
            return
        equal = [v for v in free if distances[v] <= max(10 * best, 1e-6)]
        source = self._sources(self._test, node.outputs[0])
        ranks = {v: self._rank(v, node, name, source) for v in equal}
        chosen = min(equal, key=ranks.__getitem__)
        agreement, _, other_op = ranks[chosen][:3]
        unsure = math.prod(own.shape) < FEW or own.norm == 0 or best > tolerance
        if (agreement == 2 and len(equal) > 1) or (unsure and (agreement or other_op)):
            return
        self._pair(name, chosen, "numbers")

    def _rank(self, value: str, node: Node, name: str, source: frozenset[str]) -> tuple[int, bool, bool, bool, int]:
        maker = self._reference.producer[value]
        reference_source = self._sources(self._reference, value)
        agreement = 0 if reference_source == source else 1 if reference_source & source else 2
        inside = (value in self._ends[0]) != (name in self._ends[1])  # outputs are paired with outputs
        return agreement, inside, maker.op != node.op, value != name, self._order[value]

    def _sources(self, graph: Graph, value: str) -> frozenset[str]:
        """The reference's names of the nearest paired values upstream of a value of either graph."""
        upstream, _ = self._upstream(graph, value)
        return frozenset(upstream if graph is self._reference else [self.pairs[n][0] for n in upstream])

    def _upstream(self, graph: Graph, value: str) -> tuple[list[str], list[str]]:
        """The nearest paired values upstream of a value of either graph, and the unpaired ones on the way."""

        def inputs(name: str) -> list[str]:
            return self._data_inputs(graph, graph.producer[name]) if name in graph.producer else []

        return nearest(value, inputs, (self._claimed if graph is self._reference else self.pairs).__contains__)

    def _resolve(self, value: str) -> str | None:
        """Pair a value that equals nothing, or one soon behind it, with the reference's value in its place."""
        alike = self._candidates(value)
        behind = self._behind(value)
        guesses = {own: name for own, name in self._guesses.items() if self._fits(own, name)}
        for candidates in (lambda: alike, lambda: self._elsewhere(value)):
            for name, own in itertools.product(candidates(), behind):
                if not self._fits(own, name):
                    continue
                if used := self._verified(own, name, {}) or (guesses and self._verified(own, name, guesses)):
                    guesses[own] = name
                    for one in used:
                        self._pair(one, guesses[one], "structure")
                    return min(used, key=self._place)
        if fitting := [name for name in alike if self._fits(value, name)]:
            if value not in self._lost():
                self._guesses[value] = fitting[0]
            else:  # nothing verifies it, and nothing behind it equals anything: a guess
                self._pair(value, fitting[0], "structure")
                return value
        return None

    def _place(self, value: str) -> int:
        return self._test.producer[value].index

    def _elsewhere(self, value: str) -> list[str]:
        """The reference's values of a value's shape that follow from what it follows from, whatever computes them."""
        if value not in self.shapes or self._left <= 0 or self._loose:
            return []
        source = self._sources(self._test, value)
        shaped = [v for v in self._by_shape.get(self.shapes[value], []) if v not in self._claimed]
        near = [v for v in shaped if source & self._sources(self._reference, v)]
        self._left -= len(near[:MOST])
        return self._by_likeness(value, near)[:MOST]

    def _behind(self, value: str) -> list[str]:
        """A value, and those computed from it alone: a fused operator of the reference may stand for any of them."""
        chain = [value]
        while len(chain) < AHEAD:
            readers = [n for n in self._test.consumers.get(chain[-1], []) if n.outputs]
            if len(readers) != 1 or len(self._data_inputs(self._test, readers[0])) > 1:
                break
            if readers[0].outputs[0] in self.pairs:
                break
            chain.append(readers[0].outputs[0])
        return chain

    def _verified(self, own: str, name: str, guessed: Mapping[str, str]) -> list[str]:
        """Values of the test for which the reference's tensors make it compute something else of the reference.

        They are ``own``, which gets ``name``, and those of ``guessed`` that are read with what follows from it; none
        where nothing matches. What only moves numbers gives as much of any tensor, so what comes of it is asked.
        """
        given = {own: self._load(name)}
        used = [own]
        strict = not self._loose  # what is rounded otherwise looks like much that is further behind
        follows = {o for node, _ in readers(self._reference, name, lambda *_: strict) for o in node.outputs}
        later = self._test.nodes[self._test.producer[own].index + 1 :] if strict else self._test.consumers.get(own, [])
        for reader in itertools.islice((n for n in later if not given.keys().isdisjoint(n.inputs)), FAR):
            others = [n for n in reader.inputs if n in guessed and n not in given]
            used += others
            given |= {n: self._load(guessed[n]) for n in others}
            for out, result in self._compute(reader, reader.outputs, given).items():
                if not _has_numbers(result):
                    continue
                print_, limit = fingerprint(result), max(_tolerance(result), self._loose)
                paired, moved = self.pairs.get(out, ("",))[0], reader.op in MOVERS
                if not moved and any(
                    print_.distance(fingerprint(given[n])) <= limit for n in reader.inputs if n in given
                ):
                    continue  # Relu behind Relu: the value behind may be the one
                like = [paired] if paired else [] if moved else self._by_shape.get(print_.shape, [])
                if print_.norm and any(v in follows and self._prints[v].distance(print_) <= limit for v in like):
                    before = self._compute(reader, [out]).get(out)
                    if before is None or fingerprint(before).distance(print_) > limit:
                        return used
                if not paired:
                    given[out] = result
        return []

    def _lost(self) -> set[str]:
        """Unpaired values of the test on which its unpaired outputs depend by unpaired values alone."""
        ends = [v.name for v in self._test.outputs if v.name not in self.pairs]
        return {name for end in ends for name in (end, *self._upstream(self._test, end)[1])}

    def _candidates(self, value: str) -> list[str]:
        """The reference's values that may be this one: its operator on the same inputs, then with the same weights."""
        node = self._test.producer[value]
        inputs = {self.pairs[n][0] if n in self.pairs else None for n in self._data_inputs(self._test, node)}
        near = [n for name in inputs if name for n in self._reference.consumers.get(name, [])]
        same = [n for n in near if set(self._data_inputs(self._reference, n)) == inputs]
        keys = [k for n in node.inputs if n in self._theirs for k in (n, self._theirs.digest(n))]
        anchored = [n for key in keys for n in self._by_weight.get(key, [])]
        tiers = [[o for n in nodes if n.op == node.op for o in n.outputs] for nodes in (same, anchored)]
        return [name for names in tiers for name in self._by_likeness(value, names)]

    def _by_likeness(self, value: str, names: Sequence[str]) -> list[str]:
        """Those of some values that are unclaimed, the likeliest first.

        By weights of one shape, name, place in the node, equal weights, weights that differ by a factor a channel,
        equal constants, contents, place.
        """
        node, held = self._test.producer[value], self._values.get(value)
        own_print = fingerprint(held) if held is not None and _has_numbers(held) else None
        weights, constants = set(self._theirs.of(node)), self._digests(self._theirs, node)

        def key(name: str) -> tuple[bool, bool, bool, int, bool, bool, float, int]:
            twin = self._reference.producer[name]
            near = self._prints[name].distance(own_print) if own_print and name in self._prints else math.inf
            equal = len(weights & set(self._ours.of(twin)))
            reshaped, unlike = self._unlike(node, twin)
            same = twin.outputs.index(name) == node.outputs.index(value)
            other = constants != self._digests(self._ours, twin)
            return reshaped, name != value, not same, -equal, unlike, other, near, self._order[name]

        return sorted({name for name in names if name in self._data - self._claimed}, key=key)

    def _digests(self, constants: Constants, node: Node) -> list[str]:
        return [constants.digest(name) for name in node.inputs if name in constants]

    def _unlike(self, node: Node, twin: Node) -> tuple[bool, bool]:
        """Whether the weights of two products differ in shape, and by more than a factor for each output channel.

        A BatchNormalization that is folded in changes no more than these factors, whichever it is.
        """
        if node.op != twin.op or node.op not in PRODUCTS:
            return False, False
        name, twin_name = (n.proto.input[1] if len(n.proto.input) > 1 else "" for n in (node, twin))
        if name not in self._theirs or twin_name not in self._ours:
            return False, False
        weight, other = self._theirs[name], self._ours[twin_name]
        if weight.shape != other.shape:
            return True, True
        axis = weight_axis(node, weight.ndim)
        rows, twins = (np.moveaxis(w.astype(np.float64), axis, 0).reshape(w.shape[axis], -1) for w in (weight, other))
        sizes = np.linalg.norm(rows, axis=1) * np.linalg.norm(twins, axis=1)
        cosines = np.abs(np.einsum("ij,ij->i", rows, twins)) / np.where(sizes > 0, sizes, np.inf)
        return False, not float(np.median(cosines)) > SCALED

    def _fits(self, own: str, name: str) -> bool:
        if own in self.pairs or name in self._claimed:
            return False
        return own in self.shapes and name in self._prints and self.shapes[own] == self._prints[name].shape

    def _pair(self, own: str, name: str, how: str) -> None:
        self.pairs[own] = (name, how)
        self._claimed.add(name)

    def _data_inputs(self, graph: Graph, node: Node) -> list[str]:
        return [n for n in node.inputs if n in self._fed[graph]]


def _has_numbers(value: Any) -> bool:
    """Whether a value is a tensor of numbers: no sequence, no strings, not nothing."""
    return isinstance(value, Tensor) or (isinstance(value, np.ndarray) and value.dtype.kind in "fiub")


def _tolerance(value: Any) -> float:
    return LOOSER.get(value.dtype, TOLERANCE) if isinstance(value, Tensor) else TOLERANCE


def run_in_ort(
    graph: Graph, constants: Constants, node: Node, given: Mapping[str, Any], wanted: Sequence[str]
) -> dict[str, Any]:
    """The outputs ``wanted`` of one node by ONNX Runtime; empty where that fails, too.

    ONNX Runtime has operators of its own that nothing else knows. ``given``: value → array or tensor that the node
    reads.
    """
    import onnxruntime as ort

    arrays = {n: np.asarray(v) for n, v in given.items() if not isinstance(v, list)}
    arrays |= {n: constants[n] for n in node.inputs if n in constants}
    try:
        inputs = [
            helper.make_tensor_value_info(n, helper.np_dtype_to_tensor_dtype(a.dtype), a.shape)
            for n, a in arrays.items()
        ]
        outputs = [onnx.ValueInfoProto(name=o) for o in node.outputs]
        body = helper.make_graph([node.proto], "node", inputs, outputs)
        source = graph.proto
        opsets = [*source.opset_import]
        if node.proto.domain not in {o.domain for o in opsets}:
            opsets.append(helper.make_opsetid(node.proto.domain, 1))
        model = helper.make_model(body, opset_imports=opsets, ir_version=source.ir_version)
        options = onnx_runtime.session_options()
        options.intra_op_num_threads = 1
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        with doing(f"ONNX Runtime ran {node.name} of {graph}"):
            session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
            values = onnx_runtime.run(session, wanted, to_ort(arrays), onnx_runtime.time_limit(graph, [node]))
        return {name: to_numpy(value) for name, value in zip(wanted, values, strict=True)}
    except onnx_runtime.Endless:
        raise
    except Exception:  # the runtime raises kinds of its own; what cannot be computed is paired by structure
        return {}
