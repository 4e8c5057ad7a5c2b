"""A table as data: columns with a kind and an importance, and rows of values.

``sheet_terminal`` draws it in a terminal, ``sheet_markup`` in HTML, Markdown and notebooks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from cp_debug.reports.numbers import number
from cp_debug.safe_text import one_line

Kind = Literal["name", "text", "number", "mark"]
"""``name``: of a layer, a file, a backend; where there is no room it is shortened in the middle. ``text``: goes on in
further lines. ``number`` (to the right) and ``mark`` (a verdict, an operator): never shortened, never broken."""
Tone = Literal["", "good", "note", "bad", "worst", "quiet", "strong", "differs"]
"""Meaning of a cell or a row to a reader; ``differs`` is marked on pages alone."""
ALWAYS = 0
"""Importance of a column that is never left out."""


@dataclass(frozen=True)
class Column:
    """One column."""

    title: str
    kind: Kind = "text"
    leave_out: int = ALWAYS
    """In a narrow terminal columns are left out, those with the largest number first; never those with 0."""
    unit: str = ""
    show: Callable[[Any], str] | None = None
    """A value as text; without it numbers have three digits."""
    of: Callable[[Any], Any] = lambda item: item
    """What stands in this column for an item of ``Sheet.of``: a value, a ``Cell``, or a tuple of values."""

    @property
    def header(self) -> str:
        """Title and unit."""
        return f"{self.title}, {self.unit}" if self.unit else self.title

    def text(self, value: Any) -> str:
        """One value as one line. Text stands as it is; None is a dash in a column of numbers, else empty."""
        if isinstance(value, str):
            return one_line(value)
        if value is None and self.kind != "number":
            return ""
        if self.show is not None and value is not None:
            return one_line(self.show(value))
        return number(value) if self.kind == "number" else one_line(str(value))


@dataclass(frozen=True)
class Cell:
    """A value with a tone."""

    value: Any
    tone: Tone = ""
    badge: str = ""
    """Kind of verdict, for pages, which show it as a badge of that kind's colour."""


@dataclass(frozen=True)
class Row:
    """A row that is more than its values."""

    values: Sequence[Any] = ()
    """A value, a ``Cell``, or a tuple of values that stand one below the other, for each column."""
    tone: Tone = ""
    ends: bool = False
    """Whether a group of rows ends here."""
    gap: bool = False
    """Whether it only says that rows are left out here."""


@dataclass(frozen=True)
class Sheet:
    """A table."""

    columns: Sequence[Column]
    rows: Sequence[Row | Sequence[Any]]
    title: str = ""
    most: int = 0
    """Rows that a terminal shows; 0: all."""
    ruled: bool = False
    """Whether a line stands below the header in a terminal."""
    details: str = field(default="", kw_only=True)
    """Hint where a reader finds the columns and rows that a terminal leaves out."""
    narrow: Sheet | None = field(default=None, kw_only=True)
    """Table of the same figures with fewer columns and more rows, for terminals that this one does not fit into."""

    @classmethod
    def of(
        cls,
        columns: Sequence[Column],
        items: Iterable[Any],
        title: str = "",
        *,
        tone: Callable[[Any], Tone] = lambda item: "",
        **more: Any,
    ) -> Sheet:
        """A row for each item, with what each column says of it; ``tone``: that of an item's row."""
        rows = [Row([column.of(item) for column in columns], tone(item)) for item in items]
        return cls(columns, rows, title, **more)

    def lines(self) -> Iterable[tuple[Row, list[list[str]]]]:
        """Every row with the lines of text of each of its cells."""
        for row in self.rows:
            full_row = row if isinstance(row, Row) else Row(row)
            yield full_row, [_lines(c, v) for c, v in zip(self.columns, full_row.values, strict=not full_row.gap)]


def tone_of(value: Any) -> Tone:
    """The tone of a cell; none for a bare value."""
    return value.tone if isinstance(value, Cell) else ""


def _lines(column: Column, value: Any) -> list[str]:
    inner = value.value if isinstance(value, Cell) else value
    return [column.text(each) for each in inner] if type(inner) is tuple else [column.text(inner)]
