"""A ``Sheet`` as HTML for pages, as HTML for notebooks, and as Markdown."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

from markupsafe import Markup, escape

from cp_debug.reports.sheet import Cell, Column, Sheet, Tone, tone_of
from cp_debug.safe_text import markdown

TALL = 30
"""Rows above which a table on a page scrolls by itself."""
_CLASSES: dict[Tone, str] = {"bad": "guilty", "worst": "guilty", "good": "ok", "quiet": "muted", "differs": "differs"}


def breakable(name: str) -> Markup:
    """The name, which may go on in a new line behind a dot, a slash or an underscore."""
    return Markup(re.sub(r"([./_])(?=.)", r"\1<wbr>", str(escape(name))))


def table_html(sheet: Sheet, label: str = "", *, caption: bool = False, small: bool = False) -> Markup:
    """The table of a page, within a region that scrolls; ``label`` names it for screen readers."""
    head = Markup("").join(
        Markup('<th scope="col"{}>{}</th>').format(_class(_numeric(column)), column.header)
        if column.header
        else Markup("<td></td>")  # to a screen reader a header without text is a mistake
        for column in sheet.columns
    )
    rows = Markup("\n").join(_rows(sheet))
    parts = Markup(
        '<div class="scroll{}" tabindex="0" role="region" aria-label="{}"><table{}>{}<thead><tr>{}</tr></thead>\n'
        "<tbody>\n{}\n</tbody></table></div>"
    )
    return parts.format(
        " tall" if len(sheet.rows) > TALL else "",
        label or sheet.title,
        _class("small" if small else ""),
        Markup("<caption>{}</caption>").format(sheet.title) if caption and sheet.title else "",
        head,
        rows,
    )


def _rows(sheet: Sheet) -> Iterator[Markup]:
    for row, cells in sheet.lines():
        if row.gap:
            yield Markup('<tr><td colspan="{}">⋮</td></tr>').format(len(sheet.columns))
            continue
        line = Markup("").join(map(_cell, sheet.columns, row.values, cells))
        yield Markup("<tr{}>{}</tr>").format(_class(_CLASSES.get(row.tone, "")), line)


def _cell(column: Column, value: Any, texts: Sequence[str]) -> Markup:
    shown = Markup("<br>").join(breakable(text) if column.kind in ("name", "text") else text for text in texts)
    if isinstance(value, Cell) and value.badge:
        return Markup('<td><span class="badge {}">{}</span></td>').format(value.badge, shown)
    return Markup("<td{}>{}</td>").format(
        _class(_numeric(column), _CLASSES.get(tone_of(value), ""), "name" if column.kind == "name" else ""), shown
    )


def table_notebook(sheet: Sheet) -> Markup:
    """The table in the notebook's own style."""
    head = Markup("").join(
        Markup("<th>{}</th>" if column.header else "<td>{}</td>").format(column.header) for column in sheet.columns
    )
    rows = Markup("").join(
        Markup("<tr>{}</tr>").format(Markup("").join(Markup("<td>{}</td>").format(" ".join(t)) for t in cells))
        for row, cells in sheet.lines()
        if not row.gap
    )
    return Markup("<table><thead><tr>{}</tr></thead><tbody>{}</tbody></table>").format(head, rows)


def table_markdown(sheet: Sheet) -> Iterator[str]:
    """The lines of the table."""
    yield f"| {' | '.join(markdown(column.header) for column in sheet.columns)} |"
    yield "|" + "".join("---:|" if column.kind == "number" else "---|" for column in sheet.columns)
    for row, cells in sheet.lines():
        if not row.gap:
            yield f"| {' | '.join('<br>'.join(markdown(text) for text in texts) for texts in cells)} |"


def _numeric(column: Column) -> str:
    return "n" if column.kind == "number" else ""


def _class(*names: str) -> Markup:
    joined = " ".join(name for name in names if name)
    return Markup(' class="{}"').format(joined) if joined else Markup("")
