"""A result for build gates: JUnit XML, and annotations of GitHub's workflow log."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Iterable, Mapping

from cp_debug.bisect.result import GUILTY, SHAPE, LayerRow, TestResult
from cp_debug.reports.numbers import number
from cp_debug.reports.saved import SavedResult
from cp_debug.reports.verdict_line import verdict_line
from cp_debug.safe_text import annotation, visible


def render_junit(saved: SavedResult) -> str:
    """One suite for each test backend, with a test case for the verdict and one for each layer, failed if guilty."""
    result, suites = saved.result, []
    for test in result.tests:
        cases = {"verdict": ("divergence", "" if test.agrees else verdict_line(test).plain)}
        for row in test.rows:
            failed = row.verdict in (GUILTY, SHAPE)
            cases[f"{row.name} ({row.component}/{row.onnx})"] = (row.verdict, _figures(row) if failed else "")
        suites.append((f"{result.reference.spec} → {test.backend.spec}", test.backend.spec, cases))
    return junit(f"cpdebug {result.model}", suites)


def junit(title: str, suites: Iterable[tuple[str, str, Mapping[str, tuple[str, str]]]]) -> str:
    """The whole file; characters that XML cannot hold, and invisible ones, stand in it as escapes.

    ``suites``: (name, class of its cases, case → kind of failure and message); a case without a message has passed.
    """
    root = ET.Element("testsuites", name=visible(title))
    for name, kind, cases in suites:
        failures = sum(bool(message) for _, message in cases.values())
        counts = {"tests": str(len(cases)), "failures": str(failures), "errors": "0"}
        suite = ET.SubElement(root, "testsuite", {"name": visible(name), **counts})
        for case, (failure, message) in cases.items():
            element = ET.SubElement(suite, "testcase", classname=visible(kind), name=visible(case), time="0")
            if said := visible(message):
                ET.SubElement(element, "failure", type=visible(failure), message=said).text = said
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


def _figures(row: LayerRow) -> str:
    replay = row.replay
    figures = [f"max |Δ| {number(row.stats.max_abs)}", f"rel. L2 {number(row.stats.rel_l2)}"]
    if replay and replay.introduced is not None:
        figures += [f"{name} {number(getattr(replay, name))}" for name in ("introduced", "expected", "excess")]
    return f"{row.why}; {', '.join(figures)}"
