"""What an export lost: torch's operators at a fault, run again without an argument, or left out.

A cause is named only where that reproduces what the graph computes, from the module's own tensors.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from cp_debug.graph.graph import Graph
from cp_debug.graph.source_lines import source_line
from cp_debug.probes.alignment import TIE, Departure
from cp_debug.probes.trace import Operation, TorchValue
from cp_debug.programs.behind import WrongValue, apart
from cp_debug.programs.ties import ties
from cp_debug.programs.torch_span import TorchSpan

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
    for operation, how, result in () if says else _tried(region):
        if apart(result, fault.got) <= min(CLOSE * fault.error, 1e-3):
            cause, culprit = ("lost-argument" if how else "lost-operator"), operation
            called = f"`{_name(operation)}`"
            says = f"the graph computes {called} {how}" if how else f"the graph leaves {in_words(operation)} out"
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
        in_words(own[0]) if len(own) == 1 else f"`{scope.rpartition('/')[2]}` ({', '.join(map(_name, own))})"
        for scope, own in inside.items()
    ]


def _ties(fault: WrongValue, operation: Operation | None, tensors: Mapping[TorchValue, Tensor]) -> str:
    """In words, where the fault is no more than a tie that is broken differently; else empty."""
    if operation is None or fault.got.is_floating_point():
        return ""
    read = [tensors[v] for v in tree_leaves(operation.args) if isinstance(v, TorchValue) and v in tensors]
    keys = (t for t in read if t.is_floating_point())
    return next(filter(None, (ties(t, tensors[fault.value], fault.got) for t in keys)), "")


def in_words(operation: Operation) -> str:
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
