"""rich's table, whose cells are shown as they are: one line each, no markup, nothing that steers a terminal."""

from __future__ import annotations

from typing import Any

from rich import table
from rich.text import Text

from cp_debug.safe_text import one_line


class Table(table.Table):
    """A table whose cells may come from anywhere, on every console."""

    def add_row(self, *cells: Any, **options: Any) -> None:
        """Add a row; text stands in one line, other cells are as for rich's table."""
        super().add_row(*(Text(one_line(cell)) if isinstance(cell, str) else cell for cell in cells), **options)
