"""Progress of a call: one line in a terminal or a notebook that says what is being done, and goes when it is done."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from cp_debug.bisect.options import OnStep
from cp_debug.display import in_notebook


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
    if in_notebook():
        with _notebook_line() as on_line:
            yield on_line
        return
    from rich.console import Console

    from cp_debug.reports.progress_bar import progress_bar

    # The stream as it is now: an export puts another in its place, and a bar there draws itself again.
    with progress_bar(Console(file=sys.stderr, markup=False)) as bar:
        task = bar.add_task("", total=None)
        yield lambda text, done, total: bar.update(task, description=text, completed=done, total=total or None)


@contextmanager
def _notebook_line() -> Iterator[OnStep]:
    """One line below a notebook's cell, by IPython alone; it is gone at the end."""
    from IPython.display import display

    line = display({"text/plain": ""}, raw=True, display_id=True)

    def show(text: str, done: int, total: int) -> None:
        line.update({"text/plain": f"{text} ({done} of {total})" if total else text}, raw=True)

    try:
        yield show
    finally:  # HTML takes no room where it is empty; text leaves an empty <pre>
        line.update({"text/html": "", "text/plain": ""}, raw=True)


def _somebody_looks() -> bool:
    kernel = sys.modules.get("ipykernel")
    return sys.stderr.isatty() or kernel is not None
