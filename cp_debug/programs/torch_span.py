"""Operators of a module, run again between values that are known: as they were, changed, or in FP64.

The exported graph has decompositions of some of torch's operators, which need not agree with them everywhere: where y
is Inf, x − ⌊x ÷ y⌋·y is NaN, and ``torch.remainder`` is x. Where two runs of one module are compared, its own operators
decide.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from cp_debug.backends.base import Program
from cp_debug.backends.base import Tensor as AnyTensor
from cp_debug.backends.determinism import deterministic
from cp_debug.probes.arrays import as_numpy, as_torch
from cp_debug.probes.trace import Operation, TorchValue, trace
from cp_debug.programs.matching import nearest

Load = Callable[[str], AnyTensor]
"""A captured value by its name in the graph."""
Scalar = Callable[[Operation, float], float]
"""The number that an operator takes for a Python scalar among its arguments."""
_NARROW = (torch.float16, torch.bfloat16)


def in_fp32(operation: Operation, scalar: float) -> float:
    """A Python scalar as torch's kernels take it in FP32, FP16 and BF16, which all compute in FP32."""
    return float(torch.tensor(scalar, dtype=torch.float32))


@dataclass(eq=False)
class TorchSpan:
    """The operators of torch between a fault and what is right before it."""

    target: TorchValue
    between: Collection[TorchValue]
    """Values between the paired ones and ``target``."""
    tensors: Mapping[TorchValue, Tensor]
    call: Callable[[Operation, Any, Any], Any] = lambda operation, args, kwargs: operation.function(*args, **kwargs)
    """How an operator is called with its arguments."""
    _order: list[TorchValue] = field(default_factory=list)

    def __post_init__(self) -> None:
        inside = {self.target, *self.between}
        reached, passed = nearest(
            self.target, _read, lambda v: v not in inside and v in self.tensors and not is_view(v.operation)
        )
        self._order = sorted({self.target, *reached, *passed}, key=lambda v: v.index)
        self._inside = inside

    def computed(self) -> Iterator[TorchValue]:
        """The values that are computed, in execution order: the target, and what is between it and known tensors."""
        return (v for v in self._order if v in self._inside or v not in self.tensors or is_view(v.operation))

    def given(self) -> Iterator[TorchValue]:
        """The values whose tensors are read."""
        computed = set(self.computed())
        return (value for value in self._order if value not in computed)

    @property
    def operations(self) -> dict[Operation, TorchValue]:
        """Each operator in execution order, with what it gives; those that only look at memory otherwise left out where
        others are there."""
        found = {v.operation: v for v in self._order if v.operation and v.from_data and v in self._inside}
        return {o: v for o, v in found.items() if not is_view(o)} or found

    def run(self, changed: Operation | None = None, args: Any = None, kwargs: Any = None) -> Tensor | None:
        """The target, any shape, with one operator ``changed`` to other arguments, or left out where these are None.

        None where it cannot be computed so.
        """
        made: dict[TorchValue, Tensor] = {}
        done: dict[Operation, list[Tensor]] = {}

        def tensor(leaf: Any) -> Any:
            return made[leaf] if isinstance(leaf, TorchValue) else leaf

        computed = set(self.computed())
        for value in self._order:
            operation = value.operation
            if value not in computed:
                made[value] = self.tensors[value].clone()
            elif value.op == "mutated":
                made[value] = made[value.inputs[0]]
            elif operation is None:
                return None
            else:
                if operation not in done:
                    own = operation is changed
                    chosen = (args, kwargs) if own and args is not None else (operation.args, operation.kwargs)
                    given = tree_map(tensor, chosen)
                    if own and args is None:
                        alike = [t for t in tree_leaves(given) if isinstance(t, Tensor) and t.shape == value.shape]
                        if not alike:
                            return None
                        result: Any = alike[0]
                    else:
                        result = self.call(operation, *given)
                    written = [given[0][0]] if operation.function._schema.is_mutable else []
                    found = [t for t in tree_leaves((result, written)) if isinstance(t, Tensor)]
                    done[operation] = list({id(t): t for t in found}.values())
                if not done[operation]:
                    return None
                made[value] = done[operation].pop(0)
        return made[self.target]


class ModuleOperators:
    """What a module's operators make of values of its graph, in FP64."""

    def __init__(self, program: Program, inputs: Mapping[str, Tensor]) -> None:
        """``inputs``, by name, are those with which the module runs once; raises ModuleFailed when it raises."""
        assert program.module is not None
        assert program.alignment is not None
        with deterministic():
            prefix = program.alignment.prefix
            record = trace(program.module, inputs, lambda value, tensor: None, prefix=prefix, operations=True)
        by_name = {value.name: value for value in record.values}
        links = {k.onnx: by_name[k.torch] for k in program.alignment.links if k.torch in by_name}
        links |= {name: by_name[name] for name in inputs}
        returned = zip(program.graph.outputs, record.outputs, strict=True)
        self._values = links | {info.name: value for info, value in returned if value is not None}
        self._inputs = frozenset(inputs)
        self._names: dict[TorchValue, list[str]] = {}
        for name, value in self._values.items():
            self._names.setdefault(value, []).append(name)

    def between(self, target: str, known: Collection[str]) -> Mapping[TorchValue, Operation]:
        """The operators between a value of the graph and those that are ``known``, in execution order."""
        if target not in self._values:
            return {}
        span = TorchSpan(self._values[target], (), self._loaded(target, known))
        return {value: value.operation for value in span.computed() if value.operation is not None}

    def names(self, value: TorchValue) -> Sequence[str]:
        """The values of the graph that a value of the module is."""
        return self._names.get(value, ())

    def starts(self, target: str, known: Collection[str]) -> list[str]:
        """The nearest of the ``known`` values of the graph that ``target`` is computed from."""
        loaded = self._loaded(target, known)
        span = TorchSpan(self._values[target], (), loaded)
        return [loaded.name(value) for value in span.given()]

    def scalars(self, operation: Operation) -> list[float]:
        """The Python scalars among an operator's arguments that are no whole numbers, and constants of FP64 like
        them."""
        numbers = [leaf for leaf in tree_leaves((operation.args, operation.kwargs)) if isinstance(leaf, float)]
        made = [self._constant(value) for value in _constants(operation)]
        return [number for number in (*numbers, *made) if number is not None and not number.is_integer()]

    @staticmethod
    def _constant(value: TorchValue) -> float | None:
        read = [leaf for leaf in tree_leaves(value.operation and value.operation.args) if isinstance(leaf, Tensor)]
        return float(read[0]) if len(read) == 1 and read[0].numel() == 1 else None

    def result(self, target: str, known: Collection[str], load: Load, scalar: Scalar = in_fp32) -> Tensor | None:
        """A value of the graph from those of ``known`` that are nearest, which ``load`` gives, in FP64 on the CPU.

        None where it has no counterpart in the module, draws random numbers, or cannot be computed so.
        """
        if target not in self._values:
            return None

        def call(operation: Operation, args: Any, kwargs: Any) -> Any:
            return _exact(operation, args, kwargs, scalar)

        span = TorchSpan(self._values[target], (), self._loaded(target, known, load), call)
        operations = [value.operation for value in span.computed() if value.operation is not None]
        if any(torch.Tag.nondeterministic_seeded in operation.function.tags for operation in operations):
            return None
        try:
            with torch.no_grad(), deterministic():
                return span.run()
        except Exception:  # an operator that has no FP64
            return None

    def _loaded(self, target: str, known: Collection[str], load: Load | None = None) -> _Loaded:
        return _Loaded(self._names, {*known, *self._inputs} - {target}, load)


@dataclass(frozen=True)
class _Loaded(Mapping[TorchValue, Tensor]):
    """Values of a run by the module's, loaded when they are asked for."""

    names: Mapping[TorchValue, list[str]]
    known: Collection[str]
    load: Load | None

    def __contains__(self, value: object) -> bool:
        return not self.known.isdisjoint(self.names.get(value, ()))  # type: ignore[call-overload, attr-defined]

    def __getitem__(self, value: TorchValue) -> Tensor:
        assert self.load is not None
        return _wide(as_torch(as_numpy(self.load(self.name(value)))))

    def name(self, value: TorchValue) -> str:
        return next(name for name in self.names[value] if name in self.known)

    def __iter__(self) -> Iterator[TorchValue]:
        return (value for value in self.names if value in self)

    def __len__(self) -> int:
        return sum(1 for _ in self)


def _wide(leaf: Any) -> Any:
    return leaf.double() if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf


def _exact(operation: Operation, args: Any, kwargs: Any, scalar: Scalar) -> Any:
    """An operator in FP64; what it casts to FP16 or BF16 is rounded."""

    def given(leaf: Any, value: Any) -> Any:
        if isinstance(leaf, torch.dtype):
            return torch.float64 if leaf.is_floating_point else leaf
        if isinstance(leaf, float):
            return scalar(operation, leaf)
        if leaf in constants:
            return torch.tensor(scalar(operation, float(value)), dtype=torch.float64)
        return _wide(value)

    constants = _constants(operation)
    args, kwargs = (tree_map(given, *pair) for pair in ((operation.args, args), (operation.kwargs, kwargs)))
    result = operation.function(*args, **kwargs)
    narrow = [leaf for leaf in tree_leaves((operation.args, operation.kwargs)) if leaf in _NARROW]
    return tree_map(lambda t: _wide(t.to(narrow[0])), result) if narrow else result


def _constants(operation: Operation) -> list[TorchValue]:
    """Tensors of one number that no input made, and that take the type of the tensor that they meet."""
    values = [leaf for leaf in tree_leaves(operation.args) if isinstance(leaf, TorchValue)]
    if not any(v.from_data and v.dtype.is_floating_point and v.dtype != torch.float64 for v in values):
        return []
    return [v for v in values if not v.from_data and v.shape == () and v.dtype == torch.float64]


def _read(value: TorchValue) -> list[TorchValue]:
    if value.operation is None:
        return list(value.inputs)
    leaves = tree_leaves((value.operation.args, value.operation.kwargs))
    return [leaf for leaf in leaves if isinstance(leaf, TorchValue)]


def is_view(operation: Operation | None) -> bool:
    """Whether an operator only looks at memory that others have written."""
    if operation is None:
        return False
    return any(r.alias_info and not r.alias_info.is_write for r in operation.function._schema.returns)
