"""A result as Markdown, short enough to be read in an issue tracker."""

from __future__ import annotations

import re
from collections.abc import Iterator

from cp_debug.bisect.finding import Finding
from cp_debug.bisect.result import TestResult
from cp_debug.reports.causes import lines
from cp_debug.reports.saved import SavedResult
from cp_debug.reports.sheet import Column, Sheet
from cp_debug.reports.sheet_markup import table_markdown
from cp_debug.reports.tables import SETTINGS, short_layer_table, weight_lines
from cp_debug.reports.verdict_line import verdict_line
from cp_debug.safe_text import amount, markdown, no_command, visible


def render_markdown(saved: SavedResult) -> str:
    """Verdicts, findings, the layers around the fault, versions and the command."""
    return "\n".join(_lines(saved)) + "\n"


def _lines(saved: SavedResult) -> Iterator[str]:
    result = saved.result
    yield f"## cpdebug: {markdown(result.subject)}"
    yield ""
    sources = markdown(", ".join(result.samples[:3]))
    yield f"Reference {markdown(result.reference.spec)}, {amount(len(result.samples), 'sample')}: {sources}"
    for line in weight_lines(result):
        yield f"\n{markdown(line)}"
    for test in result.tests:
        yield ""
        pair = f"{result.reference.spec} → {test.backend.spec}{' (emulated)' if test.backend.emulated else ''}"
        yield f"### {markdown(pair)}"
        yield ""
        yield f"**{markdown(verdict_line(test).plain)}**"
        yield ""
        for finding in test.findings:
            yield from _finding(finding)
        if test.detections is not None:
            yield f"Detections: {markdown(str(test.detections))}.\n"
        yield from (f"> {markdown(note)}\n" for note in test.notes)
        yield from _layers(test)
    yield ""
    yield from _backends(saved)
    if result.command:
        yield ""
        yield from ("Repeat it:", "", *_fenced(result.command))


def _finding(finding: Finding) -> Iterator[str]:
    yield f"- **{markdown(finding.headline)}**"
    for name, line in lines(finding):
        if name != "fix":
            yield f"  - {name}: {markdown(line)}"
    if finding.fix:
        yield from ("", *(f"  {line}" for line in _fenced(finding.fix)))
    yield ""


def _layers(test: TestResult) -> Iterator[str]:
    sheet = short_layer_table(test)
    yield from table_markdown(sheet)
    if len(sheet.rows) < len(test.rows):
        yield f"\n{len(sheet.rows)} of {len(test.rows)} layers."


def _backends(saved: SavedResult) -> Iterator[str]:
    records = (saved.result.reference, *(test.backend for test in saved.result.tests))
    yield from ("<details><summary>Versions and settings</summary>", "")
    rows = [
        (
            record.spec, record.computes_in, record.device,
            ", ".join(f"{name} {version}" for name, version in record.versions.items()),
            ", ".join(f"{SETTINGS[name]} {value}" for name, value in record.settings.items() if name in SETTINGS),
        )
        for record in records
    ]  # fmt: skip
    columns = [Column(title) for title in ("backend", "precision", "device", "versions", "settings")]
    yield from table_markdown(Sheet(columns, rows))
    yield from ("", "</details>")


def _fenced(text: str) -> list[str]:
    """A code block, in a fence longer than any within."""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return [f"{fence}sh", *map(no_command, visible(text).splitlines()), fence]
