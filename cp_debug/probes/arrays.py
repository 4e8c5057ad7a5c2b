"""Tensors of any origin as numpy arrays, also for dtypes that numpy does not have."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeGuard, Union

import ml_dtypes
import numpy as np

from cp_debug.errors import InputError, in_one_line, module_of

if TYPE_CHECKING:
    import torch

Tensor = Union["np.ndarray", "torch.Tensor"]

Sink = Callable[[str, Tensor], None]
"""Takes (ONNX value name, tensor) in execution order. The tensor is valid during the call only: copy what you keep."""

_ML_DTYPES = {
    name: np.dtype(getattr(ml_dtypes, name))
    for name in ("bfloat16", "float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu")
}

_TORCH_TYPES = {"bool", "uint8", "int8", "int16", "int32", "int64", "float16", "float32", "float64"}


def is_torch(tensor: Any) -> TypeGuard[torch.Tensor]:
    """Whether this is a torch tensor, found out without importing torch."""
    return module_of(type(tensor)).partition(".")[0] == "torch"


def is_dense(tensor: torch.Tensor) -> bool:
    """Whether a tensor of torch, of any shape, is as an array is: not sparse, nested, quantized or without values."""
    # Subclasses that only say they lie on ``meta`` may have values.
    has_none = tensor.is_meta and type(tensor).__name__ in ("Tensor", "Parameter")
    return str(tensor.layout) == "torch.strided" and not (tensor.is_nested or tensor.is_quantized or has_none)


def layout_of(tensor: torch.Tensor) -> str:
    """The layout, dtype and device of a tensor of any shape, for messages: ``nested torch.float32 on cpu``."""
    return f"{'nested' if tensor.is_nested else tensor.layout} {tensor.dtype} on {tensor.device}"


def device_of(tensor: Tensor) -> str:
    """The device where a tensor of any shape lies, as torch writes it: ``cpu`` for arrays, ``cuda:0``."""
    return str(tensor.device) if is_torch(tensor) else "cpu"


def as_numpy(tensor: Tensor) -> np.ndarray:
    """The tensor as a numpy array of the same shape, sharing memory where it lies on the host.

    bfloat16 and float8 tensors of torch become arrays of the ``ml_dtypes`` type of that name, bit for bit. Raises
    InputError for tensors that are no arrays: sparse, nested, quantized, without values, subclasses that refuse.
    """
    try:
        return _as_numpy(tensor) if is_torch(tensor) else np.asarray(tensor)
    except (TypeError, RuntimeError, NotImplementedError) as error:
        # A module may return them in one forward, and arrays in those before.
        what = f"a tensor of {dtype_name(tensor)} ({type(tensor).__name__})"
        raise InputError(f"{what} cannot be read as an array: {in_one_line(error)}") from error


def _as_numpy(tensor: torch.Tensor) -> np.ndarray:
    import torch

    host = tensor.detach().resolve_neg().resolve_conj().cpu()
    extension = _ML_DTYPES.get(str(host.dtype).removeprefix("torch."))
    if extension is None:
        return host.numpy()
    bits = host.view(torch.int16 if extension.itemsize == 2 else torch.int8)
    return bits.numpy().view(extension)


def as_torch(array: np.ndarray) -> torch.Tensor:
    """The array as a torch tensor of the same shape and type, sharing memory; bfloat16 and FP8 of ``ml_dtypes``, too.

    Raises TypeError for a type that torch has not.
    """
    import torch

    if array.dtype not in _ML_DTYPES.values():
        return shared(array)
    bits = shared(
        np.ascontiguousarray(array).reshape(array.shape).view(np.int16 if array.dtype.itemsize == 2 else np.int8)
    )
    return bits.view(getattr(torch, array.dtype.name))


def shared(array: np.ndarray) -> torch.Tensor:
    """A tensor of the array's shape and type in its memory, read-only or not: nothing writes to what it is given.

    Raises TypeError for a type that torch has not.
    """
    import torch

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(np.ascontiguousarray(array).reshape(array.shape))


def dtype_name(tensor: Tensor) -> str:
    """``float32``, ``bfloat16``, ``float8_e4m3fn``, …: numpy, ml_dtypes and torch agree on these names."""
    return str(tensor.dtype).removeprefix("torch.")


def has_torch_type(array: Tensor) -> bool:
    """Whether torch can reckon with an array's type: not with wide unsigned integers, nor with those of 4 bits."""
    return dtype_name(array) in _TORCH_TYPES or dtype_name(array) in _ML_DTYPES


def is_text(array: Tensor) -> bool:
    """Whether an array of any shape holds strings."""
    return getattr(array.dtype, "kind", "") in {"O", "S", "U"}


def in_one_place(ours: Tensor, theirs: Tensor) -> tuple[Tensor, Tensor]:
    """Two tensors of any shapes and dtypes on the device where one of them lies, that of ``theirs`` before the other.

    As arrays where both lie on the host, or one has a type that torch has not.
    """
    device = next((device for t in (theirs, ours) if (device := device_of(t)) != "cpu"), None)
    if device is None or not all(is_torch(t) or has_torch_type(t) for t in (ours, theirs)):
        return as_numpy(ours), as_numpy(theirs)
    return to_device(ours, device), to_device(theirs, device)


def to_device(tensor: Tensor, device: str | torch.device) -> torch.Tensor:
    """The tensor on a device of torch, sharing memory where it lies there; shape and dtype stay.

    Raises TypeError for a type that torch has not.
    """
    return (tensor if is_torch(tensor) else as_torch(np.asarray(tensor))).to(device)
