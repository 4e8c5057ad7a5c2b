"""Faces of results: a registry of how each shows itself, so that a result need not import what draws it.

``FACES`` names the one module that registers them; it is imported when the first face is looked up.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from rich.console import RenderableType

FACES = "cp_debug.reports.faces"
"""The module that calls ``register``."""

T = TypeVar("T")
_TERMINAL: dict[type, Callable[[Any], Iterable[RenderableType]]] = {}
_NOTEBOOK: dict[type, Callable[[Any], str]] = {}


def register(
    kind: type[T],
    terminal: Callable[[Any], Iterable[RenderableType]],
    notebook: Callable[[T], str] | None = None,
) -> None:
    """Give results of a type their face in a terminal (parts that rich renders) and in a notebook (HTML)."""
    _TERMINAL[kind] = terminal
    if notebook is not None:
        _NOTEBOOK[kind] = notebook


def terminal(result: Any, kind: type | None = None) -> Iterable[RenderableType]:
    """The parts of a result in the order in which they are read; ``kind`` where the registered type is not its own.

    Raises LookupError for a type that has no face.
    """
    return _face(_TERMINAL, kind or type(result))(result)


def notebook(result: Any, kind: type | None = None) -> str:
    """A result as HTML in a notebook's own style. Raises LookupError for a type that has no such face."""
    return str(_face(_NOTEBOOK, kind or type(result))(result))


def _face(faces: dict[type, Any], kind: type) -> Any:
    if kind not in faces:
        importlib.import_module(FACES)
    return faces[kind]
