"""Displays of results and steps.

A result need not import its renderer: the one ``MODULE`` that knows them is imported when a face is looked up.
"""

from __future__ import annotations

import html
import importlib
import io
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType, RenderResult

MODULE = "cp_debug.reports.faces"
"""The module that has the ``FACES`` by type."""
WIDTH = 100
"""Columns of what ``print`` shows."""

OnStep = Callable[[str, int, int], None]
"""Told of each step of a long job: in words, how many are done, and how many there are."""


class Shown:
    """A result with a model's name that shows itself: by ``print``, in a rich terminal, in a notebook."""

    model: str

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield from terminal(self)

    def __str__(self) -> str:
        return plain(self)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of {self.model}>"

    def _repr_html_(self) -> str:
        return notebook(self)


class Faces(NamedTuple):
    """Displays of one type of results.

    ``terminal``: parts that rich renders; ``notebook``: HTML; ``plain``: a few lines of text; both are what a terminal
    shows where they are left out. ``page``: writes the HTML report to a file.
    """

    terminal: Callable[[Any], Iterable[RenderableType]]
    notebook: Callable[[Any], str] | None = None
    plain: Callable[[Any], str] | None = None
    page: Callable[[Any, Path], None] | None = None


def terminal(result: Any, kind: type | None = None) -> Iterable[RenderableType]:
    """Parts of a result in the order in which they are read in a terminal.

    ``kind`` is the type under which the face is known, where that is not the result's own. Raises LookupError for
    a type that has no face.
    """
    return _faces(kind or type(result)).terminal(result)


def notebook(result: Any) -> str:
    """A result as HTML in a notebook's own style. Raises LookupError for a type without a face."""
    faces = _faces(type(result))
    return faces.notebook(result) if faces.notebook else f"<pre>{html.escape(_as_text(faces.terminal(result)))}</pre>"


def plain(result: Any) -> str:
    """A result in a few lines of plain text. Raises LookupError for a type without a face."""
    faces = _faces(type(result))
    return faces.plain(result) if faces.plain else _as_text(faces.terminal(result))


def in_notebook() -> bool:
    """Is this a notebook's kernel, whose cells show HTML?"""
    from rich.console import Console

    return "IPython" in sys.modules and Console().is_jupyter


def show_inline(page: str) -> None:
    """Show a whole HTML page below the notebook's cell, in a frame of its own: its styles and ids stay in there."""
    from IPython.display import HTML, display

    frame = f'<iframe srcdoc="{html.escape(page)}" style="width: 100%; height: 80vh; border: 0"></iframe>'
    display(HTML(f"<div>{frame}</div>"))


def _as_text(parts: Iterable[RenderableType]) -> str:
    """Text that a terminal of ``WIDTH`` columns shows, without colours."""
    from rich.console import Console

    from cp_debug.safe_text import visible

    with io.StringIO() as stream:
        console = Console(file=stream, width=WIDTH, color_system=None, markup=False, emoji=False, highlight=False)
        for part in parts:
            console.print(part, soft_wrap=bool(getattr(part, "no_wrap", False)))
        return "\n".join(visible(line.rstrip()) for line in stream.getvalue().splitlines())


def write_page(result: Any, target: Path) -> None:
    """Write the HTML report of a result. Raises LookupError for a type that has none, InputError as the writer does."""
    write = _faces(type(result)).page
    if write is None:
        raise LookupError(type(result).__name__)
    write(result, target)


def _faces(kind: type) -> Faces:
    faces: Faces = importlib.import_module(MODULE).FACES[kind]
    return faces
