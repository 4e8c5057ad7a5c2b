"""What a torch module holds: weights and buffers, what it keeps between forwards, and copies of the module."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from cp_debug.errors import ModuleFailed, in_one_line
from cp_debug.probes.arrays import is_dense

_PLAIN = (bool, int, float, complex, str, type(None))


@contextmanager
def state_kept(module: nn.Module) -> Iterator[ModuleState]:
    """Context at whose end the module's buffers and plain attributes are what they were.

    A module with lazy parts is left alone: its first forward makes it. Parameters are not looked after.
    """
    state = ModuleState(module)
    try:
        yield state
    finally:
        state.restore()


class ModuleState:
    """The state of a module when this was made.

    Buffers of any shape and dtype are copied on their device. Of attributes numbers, texts, tensors, and the elements
    of lists and dicts are known, but none whose name begins with an underscore.
    """

    def __init__(self, module: nn.Module) -> None:
        lazy = any(is_lazy(tensor) for tensor in chain(module.parameters(), module.buffers()))
        parts = {} if lazy else dict(module.named_modules())
        self._parts = [_PartState(path, part) for path, part in parts.items()]

    def changed(self) -> list[str]:
        """Dotted names of buffers and attributes that differ from then, in the module's order."""
        return [name for part in self._parts for name in part.changed()]

    def restore(self) -> None:
        """Put back what has changed; attributes that were not there are removed."""
        for part in self._parts:
            part.restore()


@dataclass
class _KeptValue:
    """A value as it was: the object, and a copy of what it held."""

    value: Any
    copy: Any

    @classmethod
    def of(cls, value: Any) -> _KeptValue:
        if _is_plain_tensor(value):
            return cls(value, value.detach().clone())
        return cls(value, value.copy() if isinstance(value, list | dict) else value)

    def differs(self, value: Any) -> bool:
        """Whether ``value``, which is in its place by now, is another one or holds something else."""
        now, then = _elements(value), _elements(self.copy)
        return len(now) != len(then) or not all(map(_same, now, then))

    def put_back(self) -> Any:
        """The object that was there, with what it held."""
        if _is_plain_tensor(self.value):
            if not _same(self.value, self.copy):
                with torch.no_grad(), torch.inference_mode(self.value.is_inference()):
                    same_shape = self.value.shape == self.copy.shape
                    self.value.copy_(self.copy) if same_shape else self.value.set_(self.copy)
        elif isinstance(self.value, list):
            self.value[:] = self.copy
        elif isinstance(self.value, dict):
            self.value.clear()
            self.value.update(self.copy)
        return self.value


def _elements(value: Any) -> list[Any]:
    return [*value, *value.values()] if isinstance(value, dict) else value if isinstance(value, list) else [value]


def _same(a: Any, b: Any) -> bool:
    if a is b:
        return True
    if _is_plain_tensor(a) and _is_plain_tensor(b):
        alike = a.dtype == b.dtype and a.device == b.device and a.shape == b.shape
        return alike and torch.equal(_bytes(a), _bytes(b))  # NaN is itself
    return isinstance(a, _PLAIN) and type(a) is type(b) and a == b


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().reshape(-1).contiguous().view(torch.uint8)


def _is_plain_tensor(value: Any) -> bool:
    return type(value) is Tensor and is_dense(value) and not value.is_meta


class _PartState:
    """The state of one module, without those inside it."""

    def __init__(self, path: str, part: nn.Module) -> None:
        self._prefix = f"{path}." if path else ""
        self._part = part
        self._script = isinstance(part, torch.jit.ScriptModule)
        self._buffers = {name: _KeptValue.of(b) for name, b in part.named_buffers(recurse=False)}
        self._attributes = {name: _KeptValue.of(value) for name, value in self._own().items()}

    def _own(self) -> dict[str, Any]:
        if self._script:  # its attributes are those of its program, not of the object
            return {}
        return {
            name: value
            for name, value in vars(self._part).items()
            if not name.startswith("_")
            and name != "training"
            and (isinstance(value, (*_PLAIN, list, dict)) or _is_plain_tensor(value))
        }

    def changed(self) -> Iterator[str]:
        now = dict(self._part.named_buffers(recurse=False))
        for kept, there in ((self._buffers, now), (self._attributes, self._own())):
            for name in dict.fromkeys([*kept, *there]):
                if (name in kept) != (name in there) or kept[name].differs(there[name]):
                    yield f"{self._prefix}{name}"

    def restore(self) -> None:
        now = dict(self._part.named_buffers(recurse=False))
        for name, kept in self._buffers.items():
            value = kept.put_back()
            if now.get(name) is not value and not self._script:
                self._part._buffers[name] = value
        attributes = vars(self._part)
        for name, kept in self._attributes.items():
            attributes[name] = kept.put_back()
        for name in self._own().keys() - self._attributes.keys():
            del attributes[name]


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


def stored_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Tensors of any shape and dtype by the names, and in the order, of torch's own ``state_dict``."""
    return {
        f"{path}.{name}" if path else name: tensor
        for path, part in nn.Module.named_modules(module, remove_duplicate=False)
        for name, tensor in (*part._parameters.items(), *part._buffers.items())
        if tensor is not None and name not in part._non_persistent_buffers_set
    }
