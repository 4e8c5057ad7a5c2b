"""A device that is none: tensors that say they lie on ``meta`` and compute on the CPU, and refuse to meet the CPU's.

What forgets to put a new tensor on the device of those that it works on raises here as it would on a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

DEVICE = "meta"


class FakeTensor(torch.Tensor):
    """A tensor on the fake device; ``inner`` has its numbers."""

    inner: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner: Tensor) -> FakeTensor:
        size, strides = inner.size(), inner.stride()
        made = torch.Tensor._make_wrapper_subclass(
            cls, size, strides=strides, storage_offset=inner.storage_offset(), dtype=inner.dtype, device=DEVICE
        )
        made.inner = inner
        return made

    def __repr__(self, *args: Any, **kwargs: Any) -> str:
        return f"FakeTensor({self.inner!r})"

    def tolist(self) -> Any:
        return self.inner.tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})


FakeTensor.__module__ = "torch"  # as a real one, ``is_torch`` knows it by its module


class _Mode(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})


class _Functions(TorchFunctionMode):
    """``torch.tensor`` and ``new_tensor`` make a tensor of the real ``meta`` before any operator is seen."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.tensor and kwargs.get("device") is not None and torch.device(kwargs["device"]).type == DEVICE:
            return FakeTensor(func(*args, **{**kwargs, "device": "cpu"}))
        if func is torch.Tensor.new_tensor and isinstance(args[0], FakeTensor) and "device" not in kwargs:
            return FakeTensor(args[0].inner.new_tensor(*args[1:], **kwargs))
        return func(*args, **kwargs)


COPIES = {"aten::_to_copy", "aten::copy_"}
INDEXED = {"aten::index", "aten::index_put_", "aten::index_put", "aten::_unsafe_index"}
"""Operators that take indices of the CPU for a tensor of a GPU."""


def run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Compute on what is inside; wrap the results of what lies, or was asked for, on the fake device."""
    leaves = [leaf for leaf in tree_flatten([args, kwargs])[0] if isinstance(leaf, Tensor)]
    name, fake = func._schema.name, any(isinstance(leaf, FakeTensor) for leaf in leaves)
    asked = kwargs.get("device")
    if fake and name not in COPIES | INDEXED:
        strangers = [leaf for leaf in leaves if not isinstance(leaf, FakeTensor) and leaf.dim()]
        if strangers:
            raise RuntimeError(f"{func}: expected all tensors to be on the same device, found {DEVICE} and cpu")
    on_device = fake if asked is None else torch.device(asked).type == DEVICE
    if name == "aten::copy_":
        on_device = isinstance(args[0], FakeTensor)
    if asked is not None:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    args, kwargs = tree_map(_inside, (args, kwargs))
    result = func(*args, **kwargs)
    if func._schema.is_mutable and not func._schema.name.startswith("aten::_to"):
        written = [leaf for leaf in leaves if isinstance(leaf, FakeTensor) and leaf.inner is result]
        if written:
            return written[0]
    wrapped = tree_map(lambda leaf: FakeTensor(leaf) if isinstance(leaf, Tensor) else leaf, result)
    return wrapped if on_device else result


def _inside(leaf: Any) -> Any:
    return leaf.inner if isinstance(leaf, FakeTensor) else leaf


@contextmanager
def fake_device() -> Iterator[str]:
    """Context in which ``device="meta"`` means the fake device; yields its name."""
    with _Mode(), _Functions():
        yield DEVICE
