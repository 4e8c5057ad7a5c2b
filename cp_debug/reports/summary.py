"""A result in short: as text, which ``print`` and failed tests show, in a notebook, and as Markdown for an issue."""

from __future__ import annotations

import re
from collections.abc import Iterator

from markupsafe import Markup

from cp_debug.bisect.finding import Finding
from cp_debug.bisect.result import BisectResult, TestResult
from cp_debug.reports.causes import lines
from cp_debug.reports.saved import SavedResult
from cp_debug.reports.sheet import Column, Sheet
from cp_debug.reports.sheet_markup import table_markdown, table_notebook
from cp_debug.reports.tables import SETTINGS, short_layer_table, weight_lines
from cp_debug.reports.verdict_line import verdict_line
from cp_debug.safe_text import amount, markdown, no_command, one_line, visible

MOST_FINDINGS = 3
"""Findings that are told of one test; the others are counted."""
MOST_NOTES = 6
"""Notes that are told of one test; the others are counted."""
MOST_LINES = 9
"""Lines of the message of a failed check; one more says how to see more."""


def summary(result: BisectResult) -> str:
    """The model, the verdict on each test with its notes, and of its findings the largest: cause, effect and fix.

    A note that several tests have is told once.
    """
    tests = ", ".join(test.backend.spec for test in result.tests)
    text = [f"{result.subject}: {result.reference.spec} against {tests}", *weight_lines(result)]
    told = set[str]()
    for place, test in enumerate(result.tests):
        text += _test(test)
        notes = [note for note in dict.fromkeys(test.notes) if note not in told]
        told.update(notes)
        text += [f"  note: {note}" for note in notes[:MOST_NOTES]]
        if (more := len(notes) - MOST_NOTES) > 0:
            text.append(f"  and {amount(more, 'more note')}: result.tests[{place}].notes")
    return "\n".join(map(one_line, text))


def disagreement(result: BisectResult) -> str:
    """Message of a failed check, in at most ``MOST_LINES`` lines: the first test that does not agree, with as many of
    its findings as there is room for but at least the largest, and the verdicts on the others."""
    first, *others = (test for test in result.tests if not test.agrees)
    tests = ", ".join(test.backend.spec for test in result.tests)
    heading = f"{_accused(first)}{result.subject}: {result.reference.spec} against {tests}"
    told = [[heading, *_test(first, findings)] for findings in range(MOST_FINDINGS, 0, -1)]
    text = next((lines for lines in told if len(lines) + len(others) <= MOST_LINES), told[-1])
    room = MOST_LINES - len(text)
    named = others if len(others) <= room else others[: room - 1]
    text += [verdict_line(test).plain for test in named]
    if len(named) < len(others):
        text.append(f"and {len(others) - len(named)} more that do not agree")
    return "\n".join(map(one_line, text))


def _accused(test: TestResult) -> str:
    """The guilty layer in front of all else: the first line is the one that a list of failed tests shows."""
    if not test.guilty:
        return ""
    first, *others = test.guilty
    return f"guilty: {first.name} ({first.op}){f' and {len(others)} more' if others else ''}: "


def _test(test: TestResult, findings: int = MOST_FINDINGS) -> Iterator[str]:
    yield verdict_line(test).plain
    for finding in test.findings[:findings]:
        yield f"  {finding.headline}"
        labelled = dict(lines(finding))
        yield from (f"    {label}: {labelled[label]}" for label in ("effect", "fix", "source") if label in labelled)
    if (more := len(test.findings) - findings) > 0:
        yield f"  and {amount(more, 'more finding')}"
    if test.detections is not None:
        yield f"  detections: {test.detections}"


def render_notebook(result: BisectResult) -> str:
    """HTML of a verdict for each test backend; one that does not agree has its findings and a small table, too."""
    title = Markup("<p><b>{}</b>, reference {}</p>").format(result.subject, result.reference.spec)
    return str(title + Markup("").join(_test_in_notebook(test) for test in result.tests))


def _test_in_notebook(test: TestResult) -> Markup:
    told = [Markup("<p><b>{}</b><br/>{}</p>").format(f.headline, f.fix) for f in test.findings[:MOST_FINDINGS]]
    table = Markup("") if test.agrees else table_notebook(short_layer_table(test))
    return Markup("<p>{}</p>{}{}").format(verdict_line(test).plain, Markup("").join(told), table)


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
    command = "--" in finding.fix or finding.fix.startswith("cpdebug ")  # to copy; else it is a sentence
    yield f"- **{markdown(finding.headline)}**"
    for name, line in lines(finding):
        if name != "fix" or not command:
            yield f"  - {name}: {markdown(line)}"
    if command:
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
    columns = (
        Column("backend", of=lambda record: record.spec),
        Column("precision", of=lambda record: record.computes_in),
        Column("device", of=lambda record: record.device),
        Column("versions", of=lambda record: ", ".join(f"{n} {v}" for n, v in record.versions.items())),
        Column(
            "settings", of=lambda r: ", ".join(f"{SETTINGS[n]} {v}" for n, v in r.settings.items() if n in SETTINGS)
        ),
    )
    yield from table_markdown(Sheet.of(columns, records))
    yield from ("", "</details>")


def _fenced(text: str) -> list[str]:
    """A code block, in a fence longer than any within."""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return [f"{fence}sh", *map(no_command, visible(text).splitlines()), fence]
