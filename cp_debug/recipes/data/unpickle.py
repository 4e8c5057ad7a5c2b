"""Pickles of plain containers and numpy arrays, and of nothing else: reading one runs no code of the file's choice."""

from __future__ import annotations

import io
import pickle
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from cp_debug.errors import DAMAGED, InputError, library_reason
from cp_debug.reading import read_bytes

LARGEST = 1 << 32
"""Largest size of a file in bytes."""

_NUMPY_MODULES = {"numpy.core.multiarray", "numpy._core.multiarray", "numpy.core.numeric", "numpy._core.numeric"}
_NUMPY_FUNCTIONS = {"_reconstruct", "scalar", "_frombuffer"}


def _encode(text: str, encoding: str) -> bytes:
    """Bytes from text, as protocol 2 stores them."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"bytes in the encoding {encoding!r}; expected latin1")
    return text.encode("latin1")


_PLAIN: dict[tuple[str, str], Callable[..., Any]] = {
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("collections", "OrderedDict"): OrderedDict,
    ("_codecs", "encode"): _encode,
    **{(module, kind.__name__): kind for module in ("builtins", "__builtin__") for kind in (set, frozenset, complex)},
}


class _Refused(Exception):
    """A name that the file asks for and does not get."""


class _PlainUnpickler(pickle.Unpickler):
    """Unpickler that builds plain containers and numpy arrays, and refuses every other name."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _PLAIN:
            return _PLAIN[module, name]
        if module in _NUMPY_MODULES and name in _NUMPY_FUNCTIONS:
            return super().find_class(module, name)
        raise _Refused(f"{module}.{name}")

    def persistent_load(self, pid: Any) -> Any:
        raise _Refused("a persistent object")


def load_plain_pickle(path: Path) -> Any:
    """The object pickled in ``path``.

    Raises InputError for a missing or broken file, and for a name that is refused, which the message tells.
    """
    data = read_bytes(path, what="file", most=LARGEST)
    try:
        return _PlainUnpickler(io.BytesIO(data)).load()
    except _Refused as refused:
        raise InputError(
            f"{path}: refused, because it asks for {refused}; expected numpy arrays and plain containers only"
        ) from None
    except Exception as error:  # a broken pickle can raise anything
        raise InputError(f"{path}: not a readable pickle ({library_reason(error) or DAMAGED})") from None
