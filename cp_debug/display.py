"""Faces of results: a registry of how each shows itself, so that a result need not import what draws it.

``FACES`` names the one module that registers them; it is imported when the first face is looked up.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from rich.console import RenderableType

FACES = "cp_debug.reports.faces"
"""The module that calls ``register``."""

T = TypeVar("T")
_TERMINAL: dict[type, Callable[[Any], Iterable[RenderableType]]] = {}
_NOTEBOOK: dict[type, Callable[[Any], str]] = {}
_PLAIN: dict[type, Callable[[Any], str]] = {}
_PAGE: dict[type, Callable[[Any, Path], None]] = {}


def register(
    kind: type[T],
    terminal: Callable[[Any], Iterable[RenderableType]],
    notebook: Callable[[T], str] | None = None,
    plain: Callable[[T], str] | None = None,
    page: Callable[[T, Path], None] | None = None,
) -> None:
    """Give results of a type their faces.

    ``terminal``: parts that rich renders; ``notebook``: HTML; ``plain``: a few lines of text; ``page``: writes the
    HTML report to a file.
    """
    _TERMINAL[kind] = terminal
    faces: tuple[tuple[dict[type, Any], Any], ...] = ((_NOTEBOOK, notebook), (_PLAIN, plain), (_PAGE, page))
    for registered, face in faces:
        if face is not None:
            registered[kind] = face


def terminal(result: Any, kind: type | None = None) -> Iterable[RenderableType]:
    """Parts of a result in the order in which they are read in a terminal.

    ``kind`` is the type under which the face is registered, where that is not the result's own. Raises LookupError for
    a type that has no face.
    Raises LookupError for a type that has no face.
    """
    return _face(_TERMINAL, kind or type(result))(result)


def notebook(result: Any, kind: type | None = None) -> str:
    """A result as HTML in a notebook's own style. Raises LookupError for a type that has no such face."""
    return str(_face(_NOTEBOOK, kind or type(result))(result))


def plain(result: Any, kind: type | None = None) -> str:
    """A result in a few lines of plain text. Raises LookupError for a type that has no such face."""
    return str(_face(_PLAIN, kind or type(result))(result))


def write_page(result: Any, target: Path, kind: type | None = None) -> None:
    """Write the HTML report of a result. Raises LookupError for a type that has none, InputError as the writer does."""
    _face(_PAGE, kind or type(result))(result, target)


def _face(faces: dict[type, Any], kind: type) -> Any:
    if kind not in faces:
        importlib.import_module(FACES)
    return faces[kind]
