"""A result in a notebook: the verdict and the layers around it, in the notebook's own style."""

from __future__ import annotations

from markupsafe import Markup

from cp_debug.bisect.result import BisectResult, TestResult
from cp_debug.reports.sheet_markup import table_notebook
from cp_debug.reports.tables import short_layer_table
from cp_debug.reports.verdict_line import verdict_line


def render_notebook(result: BisectResult) -> str:
    """HTML of a verdict and a small table for each test backend."""
    title = Markup("<p><b>{}</b>, reference {}</p>").format(result.subject, result.reference.spec)
    return str(title + Markup("").join(_test(test) for test in result.tests))


def _test(test: TestResult) -> Markup:
    return Markup("<p>{}</p>{}").format(verdict_line(test).plain, table_notebook(short_layer_table(test)))
