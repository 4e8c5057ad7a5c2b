"""Progress of a call: one line in a terminal or a notebook that says what is being done, and goes when it is done."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec

from cp_debug.bisect.options import OnStep


@contextmanager
def shown_steps(progress: bool | None, on_step: OnStep | None) -> Iterator[OnStep]:
    """Context that gives the function called at each step.

    ``progress`` None shows the steps only in a terminal or a notebook.
    """
    if on_step is not None:
        yield on_step
        return
    if not (_somebody_looks() if progress is None else progress):
        yield lambda text, done, total: None
        return
    from rich.console import Console

    from cp_debug.reports.progress_bar import progress_bar

    # The stream as it is now: an export puts another in its place, and a bar there draws itself again.
    console = Console(file=sys.stderr, markup=False)
    if console.is_jupyter and find_spec("ipywidgets") is None:  # without it rich shows warnings instead of a bar
        with _notebook_line() as on_line:
            yield on_line
        return
    with progress_bar(console) as bar:
        task = bar.add_task("", total=None)
        yield lambda text, done, total: bar.update(task, description=text, completed=done, total=total or None)


@contextmanager
def _notebook_line() -> Iterator[OnStep]:
    """One line of plain text below a notebook's cell, by IPython alone; it is empty at the end."""
    from IPython.display import display

    line = display({"text/plain": ""}, raw=True, display_id=True)

    def show(text: str, done: int, total: int) -> None:
        line.update({"text/plain": f"{text} ({done} of {total})" if total else text}, raw=True)

    try:
        yield show
    finally:
        line.update({"text/plain": ""}, raw=True)


def _somebody_looks() -> bool:
    kernel = sys.modules.get("ipykernel")
    return sys.stderr.isatty() or kernel is not None
