"""A result in a notebook: the verdict and the layers around it, in the notebook's own style."""

from __future__ import annotations

from collections.abc import Iterable

from markupsafe import Markup

from cp_debug.bisect.result import BisectResult, TestResult
from cp_debug.reports.rows import COLUMNS, cells
from cp_debug.reports.tables import layers_shown, verdict_line


def render_notebook(result: BisectResult) -> str:
    """HTML of a verdict and a small table for each test backend."""
    title = Markup("<p><b>{}</b>, reference {}</p>").format(result.model, result.reference.spec)
    return str(title + Markup("").join(_test(test) for test in result.tests))


def _test(test: TestResult) -> Markup:
    rows = Markup("").join(_row("td", cells(row)) for row in layers_shown(test))
    table = Markup("<p>{}</p><table><thead>{}</thead><tbody>{}</tbody></table>")
    return table.format(verdict_line(test).plain, _row("th", COLUMNS), rows)


def _row(tag: str, texts: Iterable[str]) -> Markup:
    cell = Markup(f"<{tag}>{{}}</{tag}>")
    return Markup("<tr>{}</tr>").format(Markup("").join(cell.format(text) for text in texts))
