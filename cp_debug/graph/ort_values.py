"""Tensors of ONNX Runtime as arrays and back, in every type that a file may declare."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import onnx

if TYPE_CHECKING:
    import onnxruntime


def to_ort(arrays: Mapping[str, np.ndarray]) -> dict[str, onnxruntime.OrtValue]:
    """The arrays as ONNX Runtime takes them, ``ml_dtypes`` included, in memory of its own."""
    from onnxruntime import OrtValue

    values = {}
    for name, array in arrays.items():
        if array.dtype.isbuiltin == 1:
            values[name] = OrtValue.ortvalue_from_numpy(np.asarray(array, order="C"))
        else:
            bits = np.asarray(array, order="C").view(f"u{array.dtype.itemsize}")
            element = onnx.helper.np_dtype_to_tensor_dtype(array.dtype)
            values[name] = OrtValue.ortvalue_from_numpy_with_onnx_type(bits, element)
    return values


def to_numpy(value: onnxruntime.OrtValue) -> np.ndarray:
    """The tensor as numpy, bfloat16, FP8, 4 and 2 bits as ``ml_dtypes``; a view on the CPU where there is one."""
    dtype = onnx.helper.tensor_dtype_to_np_dtype(value.element_type())
    if dtype.isbuiltin != 1:  # its own conversion refuses most of these, others in each of its versions
        count = math.prod(value.shape())
        each = next((n for kinds, n in _PACKED.items() if value.data_type().startswith(kinds)), 1)
        size = -(-count // each) if each > 1 else count * dtype.itemsize
        buffer = (ctypes.c_char * size).from_address(value.data_ptr())
        if each == 1:
            return np.frombuffer(buffer, dtype).reshape(value.shape()).copy()
        width = 8 // each
        shifts = np.arange(0, 8, width, dtype=np.uint8)
        codes = np.frombuffer(buffer, np.uint8)[:, None] >> shifts & (2**width - 1)
        codes = codes.reshape(-1)[:count].reshape(value.shape())
        return codes.view(dtype) if dtype.kind == "V" and "float" in dtype.name else _integers(codes, dtype, width)
    return value.numpy()


_PACKED = {("tensor(int4", "tensor(uint4", "tensor(float4"): 2, ("tensor(int2", "tensor(uint2"): 4}
"""Types of ONNX Runtime with several elements a byte, the first in its lowest bits."""


def _integers(codes: np.ndarray, dtype: np.dtype, width: int) -> np.ndarray:
    """Codes of ``width`` bits, uint8 of any shape, as the integers that they are in ``dtype``."""
    negative = (codes >= 2 ** (width - 1)) & dtype.name.startswith("int")
    return np.where(negative, codes.astype(np.int8) - 2**width, codes).astype(dtype)
