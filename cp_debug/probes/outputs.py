"""Outputs of a module as named tensors in one fixed order: that of the exported graph's outputs."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor


def flatten_outputs(result: Any) -> dict[str, Tensor]:
    """The tensors in ``result``: a tensor, or tuples, lists, mappings and dataclasses of them, nested at will.

    In the order in which they are held; None and plain numbers are left out. A lone tensor is ``output``, those of a
    sequence are ``output_0``, ``output_1`` …, those of a mapping or dataclass carry its keys; dots join nested names.
    Shapes and dtypes are as they come.
    """
    return {".".join(path) or "output": tensor for path, tensor in _leaves(result, ())}


def _leaves(result: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Tensor]]:
    if isinstance(result, Tensor):
        yield path, result
        return
    if isinstance(result, Mapping):
        parts = {str(key): value for key, value in result.items()}
    elif dataclasses.is_dataclass(result):
        parts = {f.name: getattr(result, f.name) for f in dataclasses.fields(result)}
    elif isinstance(result, (tuple, list)):
        parts = {str(i) if path else f"output_{i}": value for i, value in enumerate(result)}
    else:
        return
    for name, value in parts.items():
        yield from _leaves(value, (*path, name))
