"""A result for build gates: JUnit XML, and annotations of GitHub's workflow log."""

from __future__ import annotations

import xml.etree.ElementTree as ET

from cp_debug.bisect.result import GUILTY, SHAPE, LayerRow, TestResult
from cp_debug.reports.numbers import number
from cp_debug.reports.saved import SavedResult
from cp_debug.reports.verdict_line import verdict_line
from cp_debug.safe_text import annotation, visible


def render_junit(saved: SavedResult) -> str:
    """One suite for each test backend, with a test case for the verdict and one for each layer, failed if guilty."""
    result = saved.result
    root = ET.Element("testsuites", name=f"cpdebug {result.model}")
    for test in result.tests:
        suite = ET.SubElement(root, "testsuite", name=f"{result.reference.spec} → {test.backend.spec}")
        overall = ET.SubElement(suite, "testcase", classname=test.backend.spec, name="verdict", time="0")
        if not test.agrees:
            fail(overall, "divergence", verdict_line(test).plain)
        for row in test.rows:
            name = f"{row.component}/{row.onnx}"
            case = ET.SubElement(suite, "testcase", classname=test.backend.spec, name=f"{row.name} ({name})", time="0")
            if row.verdict in (GUILTY, SHAPE):
                fail(case, row.verdict, _figures(row))
        cases = suite.findall("testcase")
        suite.set("tests", str(len(cases)))
        suite.set("failures", str(sum(case.find("failure") is not None for case in cases)))
        suite.set("errors", "0")
    return document(root)


def document(root: ET.Element) -> str:
    """The whole file; characters that XML cannot hold, and invisible ones, stand in it as escapes."""
    for element in root.iter():
        element.text = element.text and visible(element.text)
        for name, value in element.items():
            element.set(name, visible(value))
    ET.indent(root)
    text = ET.tostring(root, encoding="unicode").replace("##[", "&#35;#[")  # a command, in a log of GitHub's
    return f'<?xml version="1.0" encoding="UTF-8"?>\n{text}\n'


def render_github(saved: SavedResult) -> str:
    """One line for each test backend.

    ``::error``; ``::warning`` where only rounding adds up; ``::notice`` when it agrees.
    """
    return "".join(_annotation(test, saved.result.model) for test in saved.result.tests)


def _annotation(test: TestResult, model: str) -> str:
    explained = test.remainder is None or test.remainder.adds_up
    otherwise = test.guilty or test.undecided or test.missing_outputs or test.moved_outputs
    rounding = test.oracle and not otherwise and explained
    level = "notice" if test.agrees else "warning" if rounding else "error"
    title = annotation(f"cpdebug: {model} on {test.backend.spec}", name=True)
    return f"::{level} title={title}::{annotation(verdict_line(test).plain)}\n"


def fail(case: ET.Element, kind: str, message: str) -> None:
    """Mark a test case as failed, with a message."""
    ET.SubElement(case, "failure", type=kind, message=message).text = message


def _figures(row: LayerRow) -> str:
    replay = row.replay
    figures = [f"max |Δ| {number(row.stats.max_abs)}", f"rel. L2 {number(row.stats.rel_l2)}"]
    if replay and replay.introduced is not None:
        figures += [f"{name} {number(getattr(replay, name))}" for name in ("introduced", "expected", "excess")]
    return f"{row.why}; {', '.join(figures)}"
