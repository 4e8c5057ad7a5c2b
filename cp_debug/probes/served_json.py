"""Requests and answers of inference servers as JSON: KServe's protocol V2 (Triton, MLServer, OpenVINO) and
TensorFlow Serving's."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy as np

from cp_debug.errors import InputError
from cp_debug.reading import typed

_COLUMNS, _ROWS = ("outputs", "inputs"), ("predictions", "instances")
_DTYPES: dict[str, Any] = {
    "BOOL": np.bool_,
    **{f"{sign}INT{bits}": np.dtype(f"{sign}int{bits}".lower()) for sign in ("", "U") for bits in (8, 16, 32, 64)},
    "FP16": np.float16,
    "FP32": np.float32,
    "FP64": np.float64,
    "BF16": ml_dtypes.bfloat16,
}


@dataclass
class _ServedTensor:
    """A tensor of KServe's protocol V2."""

    name: str
    shape: list[int]
    datatype: str
    data: list[Any] | None = None
    """Numbers in row-major order, flat or nested; None: they are elsewhere, as ``parameters`` say."""
    parameters: dict[str, Any] = field(default_factory=dict)


def served_tensors(document: Any, source: str) -> dict[str, np.ndarray] | None:
    """The tensors of a request or an answer, name → array; None for a document that is neither.

    KServe's have the shape and dtype that it states. TensorFlow Serving's states none: numbers with a point are taken
    for float32, others for int64; rows of named values are put together along a new first axis.
    Raises InputError, with ``source``, for data that is not there, or that does not fit its shape or type.
    """
    if not isinstance(document, Mapping):
        return None
    for key in _COLUMNS:
        given = document.get(key)
        if isinstance(given, list) and given:
            tensors: list[_ServedTensor] = [
                typed(_ServedTensor, item, f"{source}: {key}[{i}]") for i, item in enumerate(given)
            ]
            return {each.name: _of_kserve(each, f"{source}: {each.name!r}") for each in tensors}
        if isinstance(given, Mapping) and given:
            return {str(name): _plain(value, f"{source}: {name!r}") for name, value in given.items()}
    for key in _ROWS:
        rows = document.get(key)
        if isinstance(rows, list) and rows:
            if not all(isinstance(row, Mapping) for row in rows):
                return {key: _plain(rows, f"{source}: {key}")}
            return {
                str(name): _plain([row.get(name) for row in rows], f"{source}: {name!r} of {key}") for name in rows[0]
            }
    return None


def _of_kserve(tensor: _ServedTensor, source: str) -> np.ndarray:
    if tensor.data is None:
        raise InputError(
            f"{source}: has no data in the JSON ({', '.join(tensor.parameters) or 'no parameters'}); expected numbers: "
            "ask the server without binary data and shared memory"
        )
    dtype = _DTYPES.get(tensor.datatype)
    if dtype is None:
        raise InputError(f"{source}: datatype is {tensor.datatype!r}; expected one of {', '.join(_DTYPES)}")
    numbers = _numbers(tensor.data, source)
    if any(size < 0 for size in tensor.shape) or numbers.size != math.prod(tensor.shape):
        raise InputError(f"{source}: has {numbers.size} numbers for the shape {tensor.shape}")
    with np.errstate(over="ignore"):  # beyond the type's range is what the server says: infinite
        held = numbers.astype(dtype)
    if held.dtype.kind in "iub" and not np.array_equal(held, numbers):
        raise InputError(f"{source}: holds numbers that are not {tensor.datatype}")
    return held.reshape(tensor.shape)


def _plain(value: Any, source: str) -> np.ndarray:
    numbers = _numbers(value if isinstance(value, list) else [value], source)
    numbers = numbers if isinstance(value, list) else numbers[0]
    return numbers.astype(np.float32) if numbers.dtype.kind == "f" else numbers


def _numbers(data: Sequence[Any], source: str) -> np.ndarray:
    """Nested lists as an array of float64, int64, uint64 or bool."""
    try:
        numbers = np.array(data)
    except (ValueError, OverflowError):
        raise InputError(f"{source}: its lists have different lengths; expected rows of one length") from None
    if numbers.dtype.kind not in "fiub":
        raise InputError(f"{source}: holds something other than numbers")
    return numbers
