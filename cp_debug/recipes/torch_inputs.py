"""Example inputs of any shape for a torch module: nested containers become flat, named tensors."""

from __future__ import annotations

import copy
import dataclasses
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cp_debug.errors import InputError
from cp_debug.probes.arrays import is_dense, layout_of

Build = Callable[[Iterator[Tensor]], Any]
"""Makes a value again out of its tensors, which it takes from the iterator in their order."""


@dataclasses.dataclass(frozen=True)
class FlatInputs:
    """The tensors of a call, by name, and the module that takes them by position."""

    names: list[str]
    """Names of the parameters (``image``), and below them of keys or indices (``batch.image``, ``levels.0``)."""
    tensors: list[Tensor]
    module: nn.Module
    """The module itself where it takes the tensors as they stand; else a shallow copy of it, with the same submodules,
    parameters and paths, whose ``forward`` puts the containers together again."""
    remark: str = ""
    """Reading of a mapping that might have been meant as keyword arguments: for the error of a ``forward`` that
    cannot use it."""


def flat_inputs(
    name: str,
    module: nn.Module,
    inputs: Any,
    parameters: Sequence[str] | None = None,
    keywords: Sequence[str] = (),
) -> FlatInputs:
    """Flatten the example inputs of ``module``: a tensor, a tuple or list of arguments, or a mapping by parameter.

    A mapping at the end of a tuple holds keyword arguments where ``forward`` takes them so (``with_keywords``).
    An argument is a tensor or an array, or a mapping, list, tuple or dataclass of them, nested at will. Numbers, text
    and None in it are constants of the call. ``parameters`` names the positional arguments and ``keywords`` those
    that are passed by name, where the signature of ``forward`` does not say so.
    Raises InputError, with ``name``, for arguments that ``forward`` lacks and for tensors that are not dense.
    """
    if isinstance(inputs, Tensor | np.ndarray):
        inputs = (inputs,)
    if not isinstance(inputs, list | tuple | Mapping):
        type_text = f"the example inputs are {type(inputs).__name__}"
        raise InputError(f"MODEL: {name}: {type_text}; expected tensors, in a tuple or by parameter")
    signature = _parameters(module) if parameters is None else _named(parameters, keywords)
    known = [p.name for p in signature if p.kind not in _STARS]
    by_name = {p.name for p in signature if p.kind is inspect.Parameter.KEYWORD_ONLY}
    positional = [key for key in known if key not in by_name]
    remark = ""
    args: Sequence[Any] = ()
    given_by_name: Mapping[str, Any]
    if isinstance(inputs, Mapping):
        unknown = [key for key in inputs if key not in known]
        takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in signature)
        if unknown and not takes_any:
            raise InputError(
                f"MODEL: {name}: example input {unknown[0]!r} is not a parameter of forward({', '.join(known)})"
            )
        given_by_name = inputs
    else:
        args, given_by_name = with_keywords(inputs, signature)
        if args is inputs and args and isinstance(args[-1], Mapping):
            strange = next((str(key) for key in args[-1] if key not in known), "")
            remark = f"the mapping at the end is an argument; forward({', '.join(known)}) has no parameter {strange!r}"
    names = [*positional, *(f"input_{i}" for i in range(len(positional), len(args)))]
    order = [key for key in known if key in given_by_name] + [key for key in given_by_name if key not in known]
    arguments = [*zip(names, args, strict=False), *((key, given_by_name[key]) for key in order)]
    in_place = {key for key, (given, _) in zip(names, arguments, strict=False) if key == given}
    by_name |= {key for key in order if key not in in_place}
    tensors: dict[str, Tensor] = {}
    builds = [_flatten(name, key, value, tensors) for key, value in arguments]
    if not tensors:
        raise InputError(f"MODEL: {name}: the example inputs hold no tensor")
    if any(key in by_name or not isinstance(value, Tensor | np.ndarray) for key, value in arguments):
        module = _taking_flat(
            module, [((key, key in by_name), build) for (key, _), build in zip(arguments, builds, strict=True)]
        )
    return FlatInputs(list(tensors), list(tensors.values()), module, remark)


_STARS = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def _parameters(module: nn.Module) -> list[inspect.Parameter]:
    try:
        return list(inspect.signature(module.forward).parameters.values())
    except ValueError:  # of compiled code
        return []


def with_keywords(
    inputs: Sequence[Any], parameters: Sequence[inspect.Parameter]
) -> tuple[Sequence[Any], Mapping[str, Any]]:
    """The positional and the keyword arguments in a tuple of example inputs, as torch's exporters take them.

    ``(x, {"mask": mask})`` is what ``torch.onnx.export`` takes, ``((x,), {"mask": mask})`` what ``torch.export.export``
    does. Where ``parameters`` fit more than one reading, a mapping of parameters' names holds keyword arguments, and
    any other mapping is the argument in whose place it stands; where none has that place, torch's reading holds.
    """
    last = inputs[-1] if inputs else None
    if not isinstance(last, Mapping) or not all(isinstance(key, str) for key in last):
        return inputs, {}
    signature = inspect.Signature(parameters)
    nested = len(inputs) == 2 and type(inputs[0]) is tuple
    readings = [inputs[0], inputs[:-1]] if nested else [inputs[:-1]]
    named = {p.name for p in parameters if p.kind not in _STARS}
    places = sum(p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in parameters)
    if not {*last} <= named and len(inputs) <= places and _binds(signature, inputs, {}):
        return inputs, {}
    return next(((args, last) for args in readings if _binds(signature, args, last)), (inputs, {}))


def _binds(signature: inspect.Signature, args: Sequence[Any], keywords: Mapping[str, Any]) -> bool:
    try:
        signature.bind(*args, **keywords)
    except TypeError:
        return False
    return True


def _named(positional: Sequence[str], keywords: Sequence[str]) -> list[inspect.Parameter]:
    """Parameters of these names, for a module whose ``forward`` does not say them; none of them is required."""
    kind = inspect.Parameter
    return [
        *(kind(name, kind.POSITIONAL_OR_KEYWORD, default=None) for name in positional),
        *(kind(name, kind.KEYWORD_ONLY, default=None) for name in keywords),
    ]


def _flatten(name: str, path: str, value: Any, tensors: dict[str, Tensor]) -> Build:
    """Add the tensors of one argument under their paths; returns the function that builds the argument again."""
    if isinstance(value, np.ndarray | np.generic):
        value = _tensor(name, path, value)
    if isinstance(value, Tensor):
        _check_dense(name, path, value)
        tensors[path] = value
        return next
    if isinstance(value, Mapping):
        parts = {key: _flatten(name, f"{path}.{key}", part, tensors) for key, part in value.items()}
        return lambda flat: _mapping_like(value, {key: build(flat) for key, build in parts.items()})
    if isinstance(value, list | tuple):
        keys = getattr(value, "_fields", range(len(value)))
        items = [_flatten(name, f"{path}.{key}", part, tensors) for key, part in zip(keys, value, strict=True)]
        return lambda flat: _sequence_like(value, [build(flat) for build in items])
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {
            f.name: _flatten(name, f"{path}.{f.name}", getattr(value, f.name), tensors)
            for f in dataclasses.fields(value)
            if f.init
        }
        return lambda flat: dataclasses.replace(value, **{key: build(flat) for key, build in fields.items()})
    if value is None or isinstance(value, bool | int | float | str | torch.dtype | torch.device):
        return lambda flat: value
    type_text = f"example input {path!r} is {type(value).__name__}"
    raise InputError(f"MODEL: {name}: {type_text}; expected a tensor, or a container of tensors")


def _tensor(name: str, path: str, array: Any) -> Tensor:
    try:
        return torch.from_numpy(np.asarray(array, order="C"))
    except TypeError:
        raise InputError(
            f"MODEL: {name}: example input {path!r} is of dtype {array.dtype}, which torch lacks"
        ) from None


def _mapping_like(like: Mapping[Any, Any], parts: dict[Any, Any]) -> Any:
    """The parts in a mapping of the same class, where that is made from a dict (``BatchEncoding``, ``OrderedDict``)."""
    if type(like) is dict:
        return parts
    try:
        return type(like)(parts)  # type: ignore[call-arg]
    except TypeError:
        return parts


def _sequence_like(like: Any, parts: list[Any]) -> Any:
    if isinstance(like, tuple):
        return type(like)(*parts) if hasattr(like, "_fields") else tuple(parts)
    return parts


def _check_dense(name: str, key: str, tensor: Tensor) -> None:
    if not is_dense(tensor) or tensor.is_complex():
        raise InputError(
            f"MODEL: {name}: example input {key!r} is {layout_of(tensor)}; expected a dense tensor of real numbers"
        )


def _taking_flat(module: nn.Module, arguments: Sequence[tuple[tuple[str, bool], Build]]) -> nn.Module:
    """A shallow copy of ``module`` that takes tensors by position.

    The class changes, not the instance: a deep copy of the result, in another precision, still calls itself.
    """
    base = type(module)

    def forward(self: Any, *flat: Tensor) -> Any:
        remaining = iter(flat)
        built = [(key, by_keyword, build(remaining)) for (key, by_keyword), build in arguments]
        args = [value for _, by_keyword, value in built if not by_keyword]
        return base.forward(self, *args, **{key: value for key, by_keyword, value in built if by_keyword})

    flat_module = copy.copy(module)
    flat_module.__class__ = type(base.__name__, (base,), {"forward": forward, "__module__": base.__module__})
    return flat_module
