"""Factors of channels that one graph has and another has not, followed from the weights that make them to those that
take them back: cross-layer equalisation, SmoothQuant, AWQ, the scale of a norm that is folded into what reads it.

A layer's output channels are multiplied by s, the inputs of its readers divided by s. The network computes the same;
each value in between is another. Factors are read off the weights of both graphs, layer by layer, in the reference's
order: W' = diag(s_out) · W · diag(1 ÷ s_in), the factors of a row being those of least squares.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from cp_debug.backends.executor import Executor
from cp_debug.errors import InputError
from cp_debug.graph.constants import Constants
from cp_debug.graph.graph import Graph, Node
from cp_debug.graph.operators import PRODUCTS
from cp_debug.probes.distance import relative_l2
from cp_debug.programs.row_factors import BETTER, EQUAL, Fit, fit

NEAR = 0.3
"""Relative difference of two opinions about a factor up to which they are about one."""

REARRANGING = ("Flatten", "Gather", "Identity", "Reshape", "Slice", "Split", "Squeeze", "Transpose", "Unsqueeze")
SCALES_ALONG = (
    "Abs", "AveragePool", "Cast", "Dropout", "GlobalAveragePool", "GlobalMaxPool", "LeakyRelu", "MaxPool", "Neg",
    "PRelu", "Relu", "Resize", "Upsample",
)  # fmt: skip
"""Operators f with f(s · x) = s · f(x) for s > 0, as long as s is one number in each window."""
NORMS = (
    "LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization",
    "com.microsoft.SimplifiedLayerNormalization",
)  # fmt: skip
REDUCTIONS = ("ReduceMax", "ReduceMean", "ReduceSum")


@dataclass
class Factors:
    """Factors of a value's channels, and the layers that made them."""

    array: np.ndarray
    """FP64, as many axes as the value; an axis along which nothing changes has length 1."""
    origins: frozenset[Node] = frozenset()

    @property
    def plain(self) -> bool:
        """Whether all factors are 1."""
        return bool(np.abs(self.array - 1).max(initial=0) <= EQUAL)

    def varies(self, axis: int) -> bool:
        """Whether factors differ along an axis (negative ones count from the end)."""
        return self.array.shape[axis] > 1


class Broken(Exception):
    """Factors reach an operator that does not pass them on, or a layer that does not take them back."""

    def __init__(self, *factors: Factors) -> None:
        self.origins = frozenset[Node]().union(*(f.origins for f in factors))


class FactorWalk:
    """One walk through the reference's graph, from its inputs to its outputs."""

    def __init__(
        self,
        graph: Graph,
        weights_of: Callable[[Node], np.ndarray | None],
        fit_of: Callable[[Node], Fit | None],
        shapes: Mapping[str, tuple[int, ...]],
        numbers: Mapping[str, np.ndarray],
        refused: frozenset[Node] = frozenset(),
        bias_of: Callable[[Node], tuple[np.ndarray, np.ndarray] | None] = lambda node: None,
        *,
        by_bias: bool,
    ) -> None:
        """``weights_of`` a reference's node: the same weights in the test, in the reference's layout; None: unknown.
        ``fit_of`` it: the factors that lead from its own to those; None: they are equal, or unknown.

        ``shapes`` of all values of a run, ``numbers``: those of them that hold integers. ``refused``: layers that start
        no factors. ``bias_of`` a node: what is added to its results, in the reference and in the test. It tells the
        factors where weights are quantized; and where ``by_bias``, else the weights do.
        """
        self._graph, self._constants, self._weights_of = graph, Constants(graph), weights_of
        self._shapes, self._numbers, self._refused = shapes, numbers, refused
        self._fit_of, self._bias_of, self._by_bias = fit_of, bias_of, by_bias
        self._executor = Executor(graph)
        self._factors: dict[str, Factors] = {}
        self.scaled: dict[tuple[Node, int], np.ndarray] = {}
        """Node and place of an input → the constant that stands there in the reference, rescaled."""
        self.readers: dict[Node, list[Node]] = {}
        """Layers that start factors → layers that take them back."""

    def run(self) -> frozenset[Node]:
        """Walk; the layers whose factors nothing takes back. Empty: ``scaled`` is the reference rescaled."""
        broken: set[Node] = set()
        for node in self._graph.nodes:
            if node.op == "Constant":
                continue
            made: dict[str, Factors] = {}
            try:
                if node.op in REARRANGING:
                    made = self._moved(node)
                elif (factors := self._of(node)) is not None:
                    made = {node.outputs[0]: factors}
            except Broken as error:
                broken |= error.origins
            for name in node.outputs:
                self._factors[name] = made.get(name) or Factors(np.ones([1] * len(self._shapes.get(name, ()))))
        for value in self._graph.outputs:
            if value.name in self._factors and not self._factors[value.name].plain:
                broken |= self._factors[value.name].origins
        return frozenset(broken)

    def _of(self, node: Node) -> Factors | None:
        """Factors of what a node makes; None: all are 1."""
        if node.op in PRODUCTS and node.proto.input[1] in self._constants:
            return self._product(node)
        if node.op in NORMS:
            return self._norm(node)
        given = [self._given(name) for name in node.inputs]
        scaled = [f for f in given if f is not None and not f.plain]
        if node.op in ("Mul", "Div", "Add", "Sub") and len(node.proto.input) == 2:
            return self._elementwise(node)
        if not scaled:
            return None
        first = self._given(node.proto.input[0])
        if first is None or first.plain or any(f is not first for f in scaled):
            return self._multiplied(node) if node.op == "MatMul" else _only_plain(scaled)
        if node.op in SCALES_ALONG:
            spatial = range(2, first.array.ndim) if "Pool" in node.op or node.op in ("Resize", "Upsample") else ()
            passes = node.outputs[0] not in self._numbers and not any(map(first.varies, spatial))
            return first if passes else _only_plain(scaled)
        if node.op in REDUCTIONS:
            return self._reduced(node, first)
        return self._multiplied(node) if node.op == "MatMul" else _only_plain(scaled)

    def _given(self, name: str) -> Factors | None:
        """Factors of a value; None for a constant, and for what is no value of a run."""
        if name in self._factors:
            return self._factors[name]
        return None if name in self._constants else Factors(np.ones([1] * len(self._shapes.get(name, ()))))

    def _product(self, node: Node) -> Factors | None:
        given = self._given(node.proto.input[0])
        own = self._fit_of(node) if given is None or given.plain else None
        if given is None or (given.plain and (own is None or not own.scaled or node in self._refused)):
            return None
        weight = np.asarray(self._constants[node.proto.input[1]], np.float64)
        layout = _ProductWeights.of(node, weight)
        if layout is None or (not given.plain and not layout.takes(given)):
            return _only_plain([given])
        theirs = self._weights_of(node)
        if theirs is None or theirs.shape != weight.shape:
            return _only_plain([given])
        ours, theirs = layout.rows(weight), layout.rows(theirs)
        rescaled = ours / layout.of_inputs(given)
        fitted = own or fit(rescaled, theirs)
        starts = node not in self._refused and fitted.scaled
        out = self._told(node, fitted) if starts else np.ones(len(ours))
        if not given.plain:
            without = fit(ours, theirs).distance if starts else relative_l2(ours, theirs)
            left = relative_l2(rescaled * out[:, None, None], theirs)
            # A row of one input takes any factor back: what reads it says whether that was so.
            if not (left <= EQUAL or left < BETTER * without or (starts and ours.shape[1] == 1)):
                raise Broken(given)
            for origin in given.origins:
                self.readers.setdefault(origin, []).append(node)
        self._rescale(node, 1, layout.whole(rescaled * out[:, None, None], weight.shape))
        if len(node.proto.input) > 2 and node.proto.input[2]:
            if node.proto.input[2] not in self._constants:
                raise Broken(Factors(out, frozenset([node])), given)
            bias = np.asarray(self._constants[node.proto.input[2]], np.float64)
            self._rescale(node, 2, bias * out)
        rank = len(self._shapes.get(node.outputs[0], (0, 0)))
        shape = [1] * rank
        shape[layout.output_axis] = -1
        return Factors(out.reshape(shape), frozenset([node]) if starts else frozenset())

    def _told(self, node: Node, fitted: Fit) -> np.ndarray:
        """The factors of a layer's channels, by its weights and by what is added to its results."""
        biases = self._bias_of(node)
        if biases is None or any(bias.size != len(fitted.factors) for bias in biases):
            return fitted.factors
        ours, theirs = (bias.reshape(-1) for bias in biases)
        ratio = np.divide(theirs, ours, out=fitted.factors.copy(), where=ours != 0)
        near = np.abs(ratio - fitted.factors) < NEAR * fitted.factors
        return np.where(near & (self._by_bias | (fitted.noise > EQUAL)), ratio, fitted.factors)

    def _norm(self, node: Node) -> Factors | None:
        """A norm's own scale starts factors; what it reads must have none."""
        given, theirs = self._given(node.proto.input[0]), self._weights_of(node)
        if given is not None and not given.plain:
            raise Broken(given)
        if theirs is None or len(node.proto.input) < 2 or node.proto.input[1] not in self._constants:
            return None
        scale = np.asarray(self._constants[node.proto.input[1]], np.float64)
        fitted = fit(scale.reshape(-1, 1), theirs.reshape(-1, 1)) if theirs.shape == scale.shape else None
        if fitted is None or not fitted.scaled or node in self._refused:
            return None
        out = self._told(node, fitted).reshape(scale.shape)
        self._rescale(node, 1, scale * out)
        if len(node.proto.input) > 2 and node.proto.input[2]:
            self._rescale(node, 2, np.asarray(self._constants[node.proto.input[2]], np.float64) * out)
        rank = len(self._shapes.get(node.outputs[0], scale.shape))
        return Factors(out.reshape([1] * (rank - out.ndim) + list(out.shape)), frozenset([node]))

    def _elementwise(self, node: Node) -> Factors | None:
        names = list(node.proto.input)
        a, b = (self._given(name) for name in names)
        if a is None and b is None:
            return None
        if a is not None and b is not None:
            return _of_two(node, a, b)
        place = 0 if a is None else 1
        factors = b if a is None else a
        assert factors is not None
        constant = np.asarray(self._constants[names[place]])
        if constant.dtype.kind not in "fV":
            return None if factors.plain else _only_plain([factors])
        constant = constant.astype(np.float64)
        if node.op in ("Add", "Sub"):
            if factors.plain:
                return None
            self._rescale(node, place, _broadcast(constant, factors))
            return factors
        theirs = self._weights_of(node)
        if node.op == "Div" or theirs is None or theirs.shape != constant.shape or constant.size < 2:
            return None if factors.plain else _only_plain([factors]) if node.op == "Div" and place == 0 else factors
        fitted = fit(constant.reshape(-1, 1), theirs.reshape(-1, 1))
        if not fitted.scaled or node in self._refused:
            return None if factors.plain else factors
        own = fitted.factors.reshape(constant.shape)
        self._rescale(node, place, constant * own)
        own = own.reshape([1] * (factors.array.ndim - own.ndim) + list(own.shape))
        return Factors(factors.array * own, factors.origins | {node})

    def _moved(self, node: Node) -> dict[str, Factors]:
        """Factors behind an operator that only moves elements: it is run on them."""
        name = node.proto.input[0]
        first, shape = self._given(name), self._shapes.get(name)
        if first is None or first.plain or shape is None:
            _only_plain([f for n in node.inputs if (f := self._given(n)) is not None])
            return {}
        values = {name: np.broadcast_to(first.array, shape).astype(np.float32)}
        values |= {n: self._numbers[n] for n in node.inputs if n in self._numbers}
        try:
            moved = self._executor.run_nodes([node], values, node.outputs)
        except InputError:
            raise Broken(first) from None
        return {n: Factors(_narrowed(array.double().numpy()), first.origins) for n, array in moved.items()}

    def _reduced(self, node: Node, given: Factors) -> Factors | None:
        attributes = {a.name: a for a in node.proto.attribute}
        name = node.proto.input[1] if len(node.proto.input) > 1 else ""
        if "axes" in attributes:
            chosen: Sequence[int] = attributes["axes"].ints
        elif name:
            values = self._constants[name] if name in self._constants else self._numbers.get(name)
            if values is None:
                return _only_plain([given])
            chosen = values.tolist()
        else:
            chosen = range(given.array.ndim)
        if any(given.varies(axis) for axis in chosen):
            return _only_plain([given])
        keeps = attributes["keepdims"].i if "keepdims" in attributes else 1
        return given if keeps else Factors(given.array.squeeze(tuple(chosen)), given.origins)

    def _multiplied(self, node: Node) -> Factors | None:
        """A product of two results: factors along the summed axis do not pass."""
        a, b = (self._given(name) for name in node.proto.input)
        if a is None or b is None or a.array.ndim < 2 or b.array.ndim < 2 or a.varies(-1) or b.varies(-2):
            return _only_plain([f for f in (a, b) if f is not None])
        return Factors(a.array * b.array, a.origins | b.origins)

    def _rescale(self, node: Node, place: int, array: np.ndarray) -> None:
        self.scaled[node, place] = array


def channel_rows(node: Node, weight: np.ndarray) -> np.ndarray | None:
    """The weights of a layer, any shape, with a row for each channel of its result, FP64; None where none is known."""
    if node.op not in PRODUCTS:
        return weight.reshape(-1, 1).astype(np.float64)
    layout = _ProductWeights.of(node, weight)
    return None if layout is None else layout.rows(weight)


@dataclass(frozen=True)
class _ProductWeights:
    """Places of the output and input channels in a product's weights."""

    groups: int
    output_axis: int
    """Axis of the channels in the result."""
    turned: bool
    """Whether input channels stand before output channels."""
    outputs: int
    """Number of output channels."""

    @classmethod
    def of(cls, node: Node, weight: np.ndarray) -> _ProductWeights | None:
        attributes = {a.name: a for a in node.proto.attribute}
        groups = attributes["group"].i if "group" in attributes else 1
        if node.op in ("Conv", "ConvTranspose"):
            plain = node.op == "Conv" or groups == 1
            turned = node.op == "ConvTranspose"
            return cls(groups, 1, turned, weight.shape[turned]) if plain and weight.ndim > 2 else None
        if weight.ndim != 2 or ("transA" in attributes and attributes["transA"].i):
            return None
        turned = not ("transB" in attributes and attributes["transB"].i)
        return cls(1, -1, turned, weight.shape[turned])

    def rows(self, weight: np.ndarray) -> np.ndarray:
        """Weights [output channels, input channels of a group, taps], FP64."""
        turned = np.swapaxes(weight, 0, 1) if self.turned else weight
        return turned.reshape(*turned.shape[:2], -1).astype(np.float64)

    def whole(self, rows: np.ndarray, shape: Sequence[int]) -> np.ndarray:
        """``rows`` as they came, in their own shape."""
        return np.swapaxes(rows, 0, 1).reshape(shape) if self.turned else rows.reshape(shape)

    def takes(self, given: Factors) -> bool:
        """Whether factors vary along the summed channels alone."""
        rank = given.array.ndim
        return all(axis == self.output_axis % rank or not given.varies(axis) for axis in range(rank))

    def of_inputs(self, given: Factors) -> np.ndarray:
        """Factors of the input channels, to be broadcast with ``rows``."""
        by_group = given.array.reshape(1 if given.array.size == 1 else self.groups, -1, 1)
        return by_group if len(by_group) == 1 else np.repeat(by_group, self.outputs // self.groups, axis=0)


def _of_two(node: Node, a: Factors, b: Factors) -> Factors | None:
    if a.plain and b.plain:
        return None
    origins = a.origins | b.origins
    if node.op == "Mul":
        return Factors(a.array * b.array, origins)
    if node.op == "Div":
        return Factors(a.array / b.array, origins)
    left, right = np.broadcast_arrays(a.array, b.array)
    same = np.allclose(left, right, rtol=EQUAL, atol=0)
    return Factors(a.array, origins) if same else _only_plain([a, b])


def _broadcast(constant: np.ndarray, factors: Factors) -> np.ndarray:
    """A bias times the factors of what it is added to, in its own shape."""
    scaled = constant * factors.array
    if scaled.size != constant.size:
        raise Broken(factors)
    return scaled.reshape(constant.shape)


def _only_plain(factors: Sequence[Factors]) -> Factors | None:
    """None, for all factors are 1. Raises Broken else."""
    scaled = [f for f in factors if not f.plain]
    if scaled:
        raise Broken(*scaled)
    return None


def _narrowed(array: np.ndarray) -> np.ndarray:
    """The array with length 1 along each axis along which it does not change."""
    for axis in range(array.ndim):
        if array.shape[axis] and (np.take(array, [0], axis) == array).all():
            array = np.take(array, [0], axis)
    return array
