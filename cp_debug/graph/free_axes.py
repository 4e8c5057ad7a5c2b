"""Sizes for the free axes of a graph's inputs: what names, readers and constants say, and what else can be tried."""

from __future__ import annotations

import ast
import math
import operator
import re
import sys
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations

from cp_debug.errors import InputError
from cp_debug.graph.check_inputs import known_shape
from cp_debug.graph.constants import constant
from cp_debug.graph.graph import Graph, Node, ValueInfo
from cp_debug.graph.operators import ACTIVATIONS, RECURRENT
from cp_debug.reading import physical_memory

FREE_SIZE = 64
"""Size of a free axis that is no batch and of which nothing is known."""
SIZES = (
    *(32, 128, 224, 16, 48, 256, 8, 96, 112, 160, 192, 299, 320, 384, 448, 512, 640, 4),
    *(2, 1, 3, 5, 10, 80, 100, 1024),
)
"""Other sizes that a free axis may need: multiples of 32, the inputs of classifiers, small counts."""

MOST_SIZES = 128
"""Sizes up to this one are all tried for the long axes together, after ``SIZES``."""
_LONGEST = 80
"""Characters of a symbol that is taken for an expression."""
_BATCH = re.compile(r"(?i)n|b|bs|.*batch.*")
_TORCH_AXIS = re.compile(r".+_dynamic_axes_\d+")
"""Symbols that torch makes of an input's name for axes that nobody named."""
_TIME = re.compile(r"(?i)t|.*(seq|time|step|len).*")
_OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.FloorDiv: operator.floordiv}
_KEEP_SHAPE = ACTIVATIONS | {"Abs", "Add", "Cast", "Div", "Exp", "Identity", "Log", "Mul", "Neg", "Sqrt", "Sub"}


Choice = dict[str, int]
"""Symbol, or ``input[axis]`` of an axis without one, → size."""


@dataclass(frozen=True)
class FreeAxes:
    """The free axes of some inputs. Inputs without a shape have the rank that their readers want, else ``ranks``."""

    inputs: Sequence[ValueInfo]
    ranks: Mapping[str, int] = field(default_factory=dict)
    fixed: Mapping[tuple[str, int], int] = field(default_factory=dict)
    """(Input, axis) → the only size that the operators reading it take."""
    tables: Collection[tuple[str, int]] = ()
    """(Input, axis) from which the indices in another input choose: nodes of a graph, not a batch."""

    @classmethod
    def of(cls, graph: Graph) -> FreeAxes:
        """The free axes of the inputs of ``graph``, and what the weights of their readers say about them."""
        ranks: dict[str, int] = {}
        fixed: dict[tuple[str, int], int] = {}
        for value in graph.inputs:
            for rank, sizes in _wanted(graph, value):
                ranks.setdefault(value.name, rank)
                fixed |= {(value.name, axis): size for axis, size in sizes.items()}
        return cls(graph.inputs, ranks, fixed, _tables(graph))

    def first(self) -> Choice:
        """The choice tried first: one sample, sizes that weights ask for, else ``FREE_SIZE``; a symbol has one size."""
        chosen: Choice = {}
        certain: set[str] = set()
        for value, axis, symbol in self._places():
            key = _key(value, axis, symbol)
            fixed_size = self.fixed.get((value.name, axis))
            if fixed_size is not None:
                chosen[key] = fixed_size
                certain.add(key)
            elif key not in certain:
                size = self._size(value, axis, symbol)
                chosen[key] = min(size, chosen.get(key, size))
        atoms = {name for expression in self._expressions().values() for name in _names(expression)}
        return dict.fromkeys(atoms, FREE_SIZE) | {k: v for k, v in chosen.items() if k not in self._expressions()}

    def others(self, chosen: Choice) -> Iterator[Choice]:
        """Other choices, one change from ``chosen`` each: a sum of two axes, then all long axes alike, those of one
        input, each by itself."""
        first = self.first()
        long = [key for key in first if first[key] != 1]
        for key in long if len(long) > 2 else ():  # what was kept from before and what is new make the whole
            for size in {chosen[a] + chosen[b] for a, b in combinations(long, 2) if key not in (a, b)}:
                if size != chosen[key]:
                    yield chosen | {key: size}
        numbers = [*range(1, MOST_SIZES + 1)]
        declared = (d for value in self.inputs for d in self._dimensions(value) if isinstance(d, int) and d > 1)
        sizes = tuple(dict.fromkeys((FREE_SIZE, *declared, *SIZES)))
        groups: list[tuple[str, ...]] = [tuple(long)]
        for value in self.inputs:
            keys = [_key(v, axis, symbol) for v, axis, symbol in self._places() if v is value]
            groups.append(tuple(key for key in dict.fromkeys(keys) if key in long))
        groups += [(key,) for key in (*long, *(k for k in first if k not in long))]
        for group in dict.fromkeys(g for g in groups if g):
            for size in sizes:
                if any(chosen[key] != size for key in group):
                    yield chosen | dict.fromkeys(group, size)
        for size in (n for n in numbers if long and n not in sizes):  # a Gemm behind a Flatten takes one size only
            yield chosen | dict.fromkeys(long, size)

    def shape(self, value: ValueInfo, chosen: Choice) -> list[int]:
        """The shape of an input under the sizes ``chosen``; an expression of other symbols (``past + 1``) is computed.

        Raises InputError when the values would take more than a quarter of the machine's memory, and when an array
        without elements has axes that numpy cannot count beside its empty one.
        """
        expressions = self._expressions()
        sizes = []
        for axis, dimension in enumerate(self._dimensions(value)):
            if isinstance(dimension, int):
                sizes.append(dimension)
            elif dimension in expressions:
                sizes.append(max(_evaluate(expressions[dimension], chosen), 0))
            else:
                sizes.append(chosen[_key(value, axis, dimension)])
        if (size := math.prod(sizes) * 8) > physical_memory() // 4:  # values are made in FP64
            too_large = f"generated values would take {size / 2**30:.3g} GiB"
            raise InputError(f"input {value}: {too_large}; give values with --inputs, or free the dimension")
        if math.prod(length or 1 for length in sizes) * 8 > sys.maxsize:
            raise InputError(f"input {value}: no array has axes of these sizes; free the dimension")
        return sizes

    def _size(self, value: ValueInfo, axis: int, symbol: str | None) -> int:
        """Size of one free axis without a known one: 1 for what is taken for a batch, else ``FREE_SIZE``."""
        dimensions = self._dimensions(value)
        first = dimensions[0]
        if axis == 0:
            beside = dimensions[1] if len(dimensions) > 2 else 0
            time_major = len(dimensions) > 2 and not isinstance(beside, int)
            lone = len(dimensions) == 1
            own_name = symbol is not None and _TORCH_AXIS.fullmatch(symbol) is not None  # says nothing of the axis
            is_time = symbol is not None and not own_name and _TIME.fullmatch(symbol) is not None
            if (value.name, axis) in self.tables or ((time_major or lone) and is_time):
                return FREE_SIZE
            return 1
        if symbol and _BATCH.fullmatch(symbol):  # [batch, 3, N]: N points
            is_batch_first = isinstance(first, str) and first != symbol and _BATCH.fullmatch(first) is not None
            return FREE_SIZE if is_batch_first else 1
        time_major = axis == 1 and len(dimensions) > 2 and isinstance(first, str) and bool(_TIME.fullmatch(first))
        return 1 if time_major and not (symbol and _TIME.fullmatch(symbol)) else FREE_SIZE

    def _dimensions(self, value: ValueInfo) -> tuple[int | str | None, ...]:
        return (None,) * self.ranks.get(value.name, 2) if value.shape is None else value.shape

    def _places(self) -> Iterator[tuple[ValueInfo, int, str | None]]:
        for value in self.inputs:
            for axis, dimension in enumerate(self._dimensions(value)):
                if not isinstance(dimension, int):
                    yield value, axis, dimension

    def _expressions(self) -> dict[str, ast.expr]:
        """Symbols that are sums or products of others, which occur by themselves."""
        symbols = {symbol for _, _, symbol in self._places() if symbol}
        expressions: dict[str, ast.expr] = {}
        for symbol in symbols:
            if len(symbol) > _LONGEST:
                continue
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # of the parser, about what the name looks like
                    parsed = ast.parse(symbol, mode="eval").body
            except (SyntaxError, ValueError, RecursionError, MemoryError):
                continue
            names = set(_names(parsed))
            if isinstance(parsed, ast.BinOp) and _computable(parsed) and names & (symbols - {symbol}):
                expressions[symbol] = parsed
        return expressions


def _key(value: ValueInfo, axis: int, symbol: str | None) -> str:
    return symbol or f"{value.name}[{axis}]"


def _names(expression: ast.expr) -> Iterator[str]:
    return (node.id for node in ast.walk(expression) if isinstance(node, ast.Name))


def _computable(node: ast.expr) -> bool:
    if isinstance(node, ast.BinOp):
        return type(node.op) in _OPERATORS and _computable(node.left) and _computable(node.right)
    return isinstance(node, ast.Name) or (isinstance(node, ast.Constant) and isinstance(node.value, int))


def _evaluate(node: ast.expr, chosen: Choice) -> int:
    if isinstance(node, ast.BinOp):
        left, right = _evaluate(node.left, chosen), _evaluate(node.right, chosen)
        return int(_OPERATORS[type(node.op)](left, right or 1 if isinstance(node.op, ast.FloorDiv) else right))
    if isinstance(node, ast.Name):
        return chosen[node.id]
    assert isinstance(node, ast.Constant)
    assert isinstance(node.value, int)
    return node.value


def _wanted(graph: Graph, value: ValueInfo) -> Iterator[tuple[int, dict[int, int]]]:
    """Ranks and sizes that operators want of ``value``, seen through operators that keep its shape.

    Each item is (rank, axis → size).
    """
    rank = None if value.shape is None else len(value.shape)
    stack: list[tuple[str, tuple[int, ...] | None]] = [(value.name, None if rank is None else tuple(range(rank)))]
    visited = set()
    while stack:
        name, axes = stack.pop()
        for node in graph.consumers.get(name, ()):
            if name not in node.proto.input or (name, node.index) in visited:
                continue
            visited.add((name, node.index))
            if node.op in _KEEP_SHAPE:
                stack.append((node.outputs[0], axes))
                if axes is not None and len(node.proto.input) == 2:
                    yield len(axes), _beside_constant(graph, node, name, axes)
            elif node.op == "Transpose" and axes is not None:
                order = node.attribute("perm", list(reversed(range(len(axes)))))
                if sorted(order) == list(range(len(axes))):
                    stack.append((node.outputs[0], tuple(axes[i] for i in order)))
            elif (weight_wants := _by_weight(graph, node, name, axes)) is not None:
                wanted_rank, sizes = weight_wants
                if axes is None:
                    yield wanted_rank, {axis % wanted_rank: size for axis, size in sizes.items()}
                elif len(axes) == wanted_rank or all(axis < 0 for axis in sizes):
                    yield (
                        len(axes),
                        {axes[axis]: size for axis, size in sizes.items() if -len(axes) <= axis < len(axes)},
                    )


def _beside_constant(graph: Graph, node: Node, name: str, axes: tuple[int, ...]) -> dict[int, int]:
    """The axes of ``name`` that an elementwise operator lines up with those of a constant, and their sizes there."""
    constant_shape = constant_dims(graph, node.proto.input[1 - list(node.proto.input).index(name)])
    if constant_shape is None or len(constant_shape) > len(axes):
        return {}
    return {axes[i - len(constant_shape)]: size for i, size in enumerate(constant_shape) if size > 1}


def _by_weight(graph: Graph, node: Node, name: str, axes: tuple[int, ...] | None) -> tuple[int, dict[int, int]] | None:
    """Rank and sizes (axis → size) that one operator wants of its data ``name``, from the shape of its weight.

    None for an operator whose weight says nothing about its data.
    """
    place = list(node.proto.input).index(name)
    operand_dims = [known_dims(graph, operand) for operand in node.proto.input]
    second = operand_dims[1] if len(operand_dims) > 1 else None
    if place == 0 and second is not None:
        if node.op == "Conv" and len(second) > 2:
            return len(second), {1: second[1] * node.attribute("group", 1)}
        if node.op == "ConvTranspose" and len(second) > 2:
            return len(second), {1: second[0]}
        if node.op == "Gemm" and len(second) == 2:
            return 2, {0 if node.attribute("transA", 0) else 1: second[1 if node.attribute("transB", 0) else 0]}
        if node.op == "MatMul" and len(second) > 1:
            return len(axes) if axes else len(second), {-1: second[-2]}
        if node.op in RECURRENT and len(second) == 3:
            return 3, {2: second[2]}
        if node.op == "BatchNormalization" and len(second) == 1:
            return len(axes) if axes else 4, {1: second[0]}
        if node.op == "LayerNormalization" and len(second) == 1 and node.attribute("axis", -1) == -1:
            return len(axes) if axes else 3, {-1: second[0]}
    if place == 1 and operand_dims[0] is not None and node.op == "MatMul" and len(operand_dims[0]) > 1:
        return len(axes) if axes else 2, {-2: operand_dims[0][-1]}
    return None


def _tables(graph: Graph) -> set[tuple[str, int]]:
    """(Input, axis) from which indices choose that come from another input."""
    inputs = {v.name: v for v in graph.inputs}
    chosen = set()
    for node in graph.nodes:
        if node.op not in ("Gather", "GatherND") or node.proto.input[0] not in inputs:
            continue
        others = {name for name in inputs if name != node.proto.input[0]}
        indices = node.proto.input[1]
        if others & {indices, *(graph.segment([indices], ())[1] if indices in graph.producer else ())}:
            axis, shape = node.attribute("axis", 0), inputs[node.proto.input[0]].shape
            chosen.add((node.proto.input[0], axis if axis >= 0 or not shape else axis + len(shape)))
    return chosen


def constant_dims(graph: Graph, name: str) -> tuple[int, ...] | None:
    """The shape of a weight or of a Constant node's tensor; None for what is computed."""
    return None if (tensor := graph.constant(name)) is None else tuple(tensor.dims)


def known_dims(graph: Graph, name: str) -> tuple[int, ...] | None:
    """The shape of any value or weight; None unless every dimension is known."""
    dims = constant_dims(graph, name)
    return known_shape(graph, name) if dims is None else dims


def scalar(graph: Graph, name: str) -> float | None:
    """The value of a constant with one element; None for all else."""
    node = graph.producer.get(name)
    if node is not None and node.op == "Constant":
        array = constant(node)
    elif name in graph.initializers and math.prod(graph.weight(name).dims) == 1:
        array = graph.initializer(name)
    else:
        return None
    return float(array.reshape(-1)[0]) if array.size == 1 and array.dtype.kind in "fiub" else None
