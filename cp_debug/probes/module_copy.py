"""Copies of a user's module, to be changed without changing the module itself."""

from __future__ import annotations

import copy
from typing import Any, TypeVar

import torch
from torch import nn

from cp_debug.errors import ModuleFailed, in_one_line
from cp_debug.probes.arrays import is_dense

M = TypeVar("M", bound=nn.Module)


def copied_to(module: M, device: torch.device, dtype: torch.dtype | None) -> M:
    """A deep copy of a module on a device, its floating-point tensors in ``dtype``; None keeps each as it is.

    Plain weights, which keep their shapes, go there at once, without a copy on the host. Raises ModuleFailed as
    ``copied`` does.
    """

    def there(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.detach().to(device, dtype if tensor.is_floating_point() else None, copy=True)

    twins: dict[int, Any] = {}
    moves = device.type != "cpu"
    for weight in module.parameters():
        if type(weight) is nn.Parameter and is_dense(weight) and (moves or weight.is_floating_point()):
            twins[id(weight)] = nn.Parameter(there(weight), requires_grad=weight.requires_grad)
    for buffer in module.buffers():
        plain = type(buffer) is torch.Tensor and is_dense(buffer) and not buffer.requires_grad
        if plain and (moves or buffer.is_floating_point()):
            twins[id(buffer)] = there(buffer)
    return copied(module, twins).to(device, dtype)


def copied(module: M, twins: dict[int, Any] | None = None) -> M:
    """A deep copy of a module; ``twins`` stand for what has these ids.

    Raises ModuleFailed for one that holds what Python or torch cannot copy: a tensor that was computed with a gradient,
    a lock, an open file, a class whose copying fails.
    """
    try:
        return copy.deepcopy(module, twins)
    except MemoryError:
        raise
    except Exception as error:
        name = type(module).__name__
        raise ModuleFailed(f"module {name!r} cannot be copied, which is needed here: {in_one_line(error)}") from error
