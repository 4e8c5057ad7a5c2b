"""Copies of a user's module, to be changed without changing the module itself."""

from __future__ import annotations

import copy
from typing import TypeVar

from torch import nn

from cp_debug.errors import ModuleFailed, in_one_line

M = TypeVar("M", bound=nn.Module)


def copied(module: M) -> M:
    """A deep copy of a module.

    Raises ModuleFailed for one that holds what Python or torch cannot copy: a tensor that was computed with a gradient,
    a lock, an open file, a class whose copying fails.
    """
    try:
        return copy.deepcopy(module)
    except MemoryError:
        raise
    except Exception as error:
        name = type(module).__name__
        raise ModuleFailed(f"module {name!r} cannot be copied, which this needs: {in_one_line(error)}") from error
