"""Residual additions: found in one forward, and both operands handed through one module, whatever the source says."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from cp_debug.probes.trace import TorchValue, trace

_WHOLE = "*"
"""Key for the additions of a module that calls no other and returns the sum."""
_running = threading.local()


def find_adds(module: nn.Module, args: tuple[Tensor, ...]) -> list[str]:
    """Names of the sums of two activations of one shape, as a trace names values: ``layer1.0/add``, ``…/add#2``.

    A sum that a module without children returns is called as the module. Left out are modules that run more than once.
    """
    functions: dict[TorchValue, str] = {}

    def keep(value: TorchValue, tensor: Tensor) -> None:
        if "/" in value.name and ":" not in value.name:
            functions.setdefault(value, value.name)

    record = trace(module, {str(i): arg for i, arg in enumerate(args)}, keep)
    repeated = {call.partition("@")[0] for call in record.calls if "@" in call}
    names = []
    for value, name in functions.items():
        operands = value.inputs
        if (
            re.fullmatch(r"add(#\d+)?", name.rpartition("/")[2])
            and len(operands) == 2
            and all(o.from_data and o.shape == value.shape and o.dtype.is_floating_point for o in operands)
            and value.path not in repeated
        ):
            names.append(value.name)
    return names


def attach(module: nn.Module, operands: Mapping[str, nn.Module]) -> Callable[[], None]:
    """Hand both operands of every named addition through its module from now on, also in copies of ``module``.

    They are children of the module whose code adds, so they move, save and train with it. Returns a function that
    undoes this.
    """
    owners: dict[str, nn.ModuleDict] = {}
    for name, part in operands.items():
        path, _, key = name.partition("/")
        owner = module.get_submodule(path)
        if path not in owners:
            owners[path] = owner.add_quantizers = nn.ModuleDict()
        owners[path][key or _WHOLE] = part
    handles = []
    if owners:
        for part in list(module.modules()):
            handles.append(nn.Module.register_forward_pre_hook(part, _enter))
            handles.append(nn.Module.register_forward_hook(part, _leave, always_call=True))

    def undo() -> None:
        for handle in handles:
            handle.remove()
        for path in owners:
            del module.get_submodule(path).add_quantizers

    return undo


def add_quantizers(module: nn.Module) -> dict[str, Any]:
    """Modules in front of the additions of a module, by the additions' names."""
    by_name = {}
    for path, part in module.named_modules():
        for key, quantizer in getattr(part, "add_quantizers", nn.ModuleDict()).items():
            by_name[path if key == _WHOLE else f"{path}/{key}"] = quantizer
    return by_name


class _AddingCall(TorchFunctionMode):
    """One call of a module that adds; counts its own functions as a trace does, not those of the modules it calls."""

    def __init__(self, parts: nn.ModuleDict) -> None:
        super().__init__()
        self._parts = parts
        self._count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.__name__.strip("_") == "add" and _running.calls[-1] is self:
            self._count += 1
            key = _WHOLE if _WHOLE in self._parts else "add" if self._count == 1 else f"add#{self._count}"
            if key in self._parts and len(args) > 1:
                part = self._parts[key]
                first = part(args[0].clone())
                if func.__name__ != "add":  # in place: whoever holds it is meant to see the result
                    first = args[0].copy_(first)
                args = (first, part(args[1]), *args[2:])
        return func(*args, **(kwargs or {}))


def _enter(module: nn.Module, args: Any) -> None:
    if not hasattr(_running, "calls"):
        _running.calls = []
    parts = getattr(module, "add_quantizers", None)
    call = None if parts is None else _AddingCall(parts)
    _running.calls.append(call)
    if call is not None:
        call.__enter__()


def _leave(module: nn.Module, args: Any, output: Any) -> None:
    call = _running.calls.pop()
    if call is not None:
        call.__exit__(None, None, None)
