"""A result in a notebook: the verdict, the findings and the layers around it, in the notebook's own style."""

from __future__ import annotations

from markupsafe import Markup

from cp_debug.bisect.result import BisectResult, TestResult
from cp_debug.reports.sheet_markup import table_notebook
from cp_debug.reports.summary import MOST_FINDINGS
from cp_debug.reports.tables import short_layer_table
from cp_debug.reports.verdict_line import verdict_line


def render_notebook(result: BisectResult) -> str:
    """HTML of a verdict for each test backend; one that does not agree has its findings and a small table, too."""
    title = Markup("<p><b>{}</b>, reference {}</p>").format(result.subject, result.reference.spec)
    return str(title + Markup("").join(_test(test) for test in result.tests))


def _test(test: TestResult) -> Markup:
    told = [Markup("<p><b>{}</b><br/>{}</p>").format(f.headline, f.fix) for f in test.findings[:MOST_FINDINGS]]
    table = Markup("") if test.agrees else table_notebook(short_layer_table(test))
    return Markup("<p>{}</p>{}{}").format(verdict_line(test).plain, Markup("").join(told), table)
