"""Whole numbers computed in a type that does not hold them: INT64 in INT32, integers in FP32."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import onnx
import torch
from torch import Tensor

from cp_debug.backends.arithmetic import FP64
from cp_debug.bisect.causes.base import Candidate, cause
from cp_debug.bisect.causes.segment import Segment, as_double

_ENDS = -(1 << 31), (1 << 31) - 1
_MOST = 1 << 62
"""Magnitude below which FP32's nearest number is an INT64."""

_Way = Callable[[Tensor], Tensor]


def _wraps(value: Tensor) -> Tensor:
    return (((value.long() - _ENDS[0]) & 0xFFFFFFFF) + _ENDS[0]).to(value.dtype)


def _saturates(value: Tensor) -> Tensor:
    return value.clamp(*_ENDS)


def _becomes_smallest(value: Tensor) -> Tensor:
    """What x86 makes of floats beyond INT32."""
    return torch.where(value == value.clamp(*_ENDS), value, _ENDS[0])


def _loses_digits(value: Tensor) -> Tensor:
    return value.long().clamp(-_MOST, _MOST).float().long().to(value.dtype)


_WORDS: dict[_Way, str] = {
    _wraps: "wraps",
    _saturates: "saturates",
    _becomes_smallest: f"becomes {_ENDS[0]}",
    _loses_digits: "loses digits",
}
_TYPES: tuple[tuple[str, str, _Way, _Way, _Way], ...] = (
    ("int32-overflow", "INT64 is computed in INT32, which ends at 2³¹", _wraps, _saturates, _wraps),
    ("int32-overflow", "INT64 is computed in INT32, which ends at 2³¹", _wraps, _saturates, _saturates),
    ("int32-overflow", "INT64 is computed in INT32, which ends at 2³¹", _wraps, _saturates, _becomes_smallest),
    ("fp32-integers", "integers are computed in FP32, which holds them up to 2²⁴", *3 * (_loses_digits,)),
)
"""Cause, its words, and what becomes of data, constants and results."""


@cause()
def narrower(segment: Segment) -> Iterator[Candidate]:
    """Candidates: integers that are read, stored or computed are no longer what they were in a narrower type."""
    given = {name: FP64.hold(value, "cpu") for name, value in segment.given.items()}
    held = segment.context.constants
    constants = {name: held[name] for node in segment.nodes for name in node.inputs if held.holds(name)}
    casts = any(node.op == "Cast" and node.attribute("to", 0) == onnx.TensorProto.INT64 for node in segment.nodes)
    if not casts and not any(map(_is_integer, given.values())):
        return  # constants alone are axes, shapes
    for name, says, of_data, of_constants, of_results in _TYPES:
        changes: dict[str, None] = {}

        def changed(values: dict[str, Any], way: _Way, what: str, changes: dict[str, None] = changes) -> dict[str, Any]:
            new = {n: way(v) if _is_integer(v) else v for n, v in values.items()}
            lost = [n for n, v in values.items() if _is_integer(v) and not torch.equal(new[n], v)]
            changes |= dict.fromkeys(f"{what.format(n)} {_WORDS[way]}" for n in lost)
            return new

        values = changed(constants, of_constants, "the constant {}") | changed(given, of_data, "{}")
        for node in segment.nodes:
            results = segment.context.oracle.run_nodes([node], values, node.outputs)
            values |= changed(results, of_results, f"the result of {node.op}")
        if changes:
            value, limit = as_double(values[segment.target]), says.split()[-1]
            fix = f"keep integers of {{layers}} below {limit}, or compute them outside the network"
            yield Candidate(name, f"{says}: {', '.join(changes)}", value, fix=fix, heard=True)


def _is_integer(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype in (torch.int32, torch.int64)
