"""Findings in a terminal: cause, evidence, place, effect and fix, a few lines each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rich.console import RenderableType
from rich.text import Text

from cp_debug.bisect.finding import UNKNOWN, Finding, Where
from cp_debug.bisect.result import TestResult
from cp_debug.reports.numbers import number, share_in_words
from cp_debug.reports.sheet import Cell, Column, Sheet
from cp_debug.reports.sheet_terminal import Terminal
from cp_debug.safe_text import flags, in_digits, some

NAMED = 4
"""Layers and elements that are named; the JSON has all."""

SHOWN = 0.02
"""Share of the error from which a channel is named."""
SAID = {
    *(
        "magnitude_only",
        "why",
        "explained_least",
        "declared",
        "keep_fp32",
        "unquantized",
        "after",
        "before",
        "vital",
        "lost",
        "change",
        "read_off",
    ),
    *("layers_in_all", "layers_asked", "of_products", "excess_least", "excess_most", "share_in_all"),
}
"""Evidence that is said in words here, in the headline, or in the verdict."""


def findings(test: TestResult, *, show_all: bool = False) -> Iterator[RenderableType]:
    """One block for each finding. ``show_all``: with every name of a set that a fix keeps in FP32."""
    for place, finding in enumerate(test.findings, 1):
        yield Text()
        style = "bold yellow" if finding.cause == UNKNOWN else "bold red"
        yield Text.assemble((f"{place}. {finding.headline}", style))
        rows = [(Cell(f"   {label}", "quiet"), line) for label, line in lines(finding, show_all=show_all)]
        yield Terminal(Sheet((Column("", "mark"), Column("")), rows))


def lines(finding: Finding, *, show_all: bool = True) -> Iterator[tuple[str, str]]:
    """(label, text) in the order in which they are read. ``show_all``: as for ``findings``."""
    if len(finding.layers) > 1:
        yield "layers", some(finding.layers, NAMED)
    yield "evidence", "; ".join(_evidence(finding))
    for where in finding.where[:1]:
        yield "where", "; ".join(_where(where))
    if finding.inside:
        yield from _inside(finding.inside)
    if effect := list(_effect(finding)):
        yield "effect", "; ".join(effect)
    if finding.fix:
        before, every, after = parts_of_fix(finding)
        few = flags("--keep-fp32", finding.evidence.get("keep_fp32", ()))
        cut = not show_all and after and few != every
        yield "fix", f"{before}{few} (all: --all, or evidence.keep_fp32){after}" if cut else finding.fix
    if finding.source:
        yield "source", finding.source


def parts_of_fix(finding: Finding) -> tuple[str, str, str]:
    """A fix in three parts; the second is to be copied: the options that keep nodes in FP32, or all of it."""
    names = finding.evidence.get("keep_fp32", ())
    options = flags("--keep-fp32", names, len(names))
    return finding.fix.partition(options) if options and options in finding.fix else ("", finding.fix, "")


def _evidence(finding: Finding) -> Iterator[str]:
    if finding.evidence.get("magnitude_only"):
        yield "by magnitude only, the order of the sums is another one"
    elif finding.explained is not None:
        share = (
            f"{finding.explained:.1%}" if finding.explained > 0 else "nothing"
        )  # an order of sums that is none of it
        least = finding.evidence.get("explained_least")
        of_each = "" if least is None else f", at least {least:.1%} in each layer"
        yield f"explains {share} of the introduced error{of_each}"
    near = finding.runner_up_explained or 0.0
    if finding.runner_up and near > 0:
        best = "nearest" if finding.cause == UNKNOWN else "next best"
        yield f"{best} {finding.runner_up} {near:.1%}"
    for name, value in finding.evidence.items():
        if name in SAID or (not isinstance(value, bool) and value in (None, "", [], {})):
            continue
        if name in _SHARES:
            yield from [f"{value:.2%} {_SHARES[name]}"] if value else []
            continue
        words = _LABELS.get(name, name.replace("_", " "))
        yield f"{'' if value else 'not '}{words}" if isinstance(value, bool) else f"{words} {_show(value)}"


def _inside(inside: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """(Label, text) of the search inside a region: hypotheses, then engine by engine."""
    yield "suspects", some(inside["suspects"], NAMED)
    for place, step in enumerate(inside["steps"], 1):
        names = step["names"][0] if len(step["names"]) == 1 else f"{len(step['names'])} nodes"
        error = f"error {_show(step['error'])}, " if step["error"] is not None else ""
        yield f"build {place}", f"in FP32 {names}: {error}{step['learnt']} ({step['seconds']:.0f} s)"


def _where(where: Where) -> Iterator[str]:
    if where.channels:
        top = (f"{c} ({share:.0%})" for c, share in list(where.channels.items())[:NAMED] if share > SHOWN)
        yield f"channels {', '.join(top) or 'all alike'}"
    if where.concentrated < 0.5:
        yield f"region {where.region}, {where.concentrated:.1%} of the tensor"
    worst = (f"{e.index}: {in_digits(e.value)} for {in_digits(e.oracle)}" for e in where.worst[:2])
    if text := ", ".join(worst):
        yield f"worst {text}"


def _effect(finding: Finding) -> Iterator[str]:
    if finding.effect.share is not None:
        yield share_in_words(finding.effect.share)
    if finding.effect.detections is not None:
        yield f"by itself {finding.effect.detections}"


_LABELS = {"pairs": "BatchNorm taken from", "batchnorm_of": "BatchNorm of", "explained_over": "layers tried:"}
"""Evidence whose name in the JSON form is no text."""


_SHARES = {"overflows": "of the values overflow", "vanishes": "vanish", "subnormal": "become subnormal"}
"""Evidence that is a share of a tensor's values, with what happens to them."""


def _show(value: Any) -> str:
    if isinstance(value, Mapping):
        return some([f"{name}: {_show(each)}" for name, each in value.items()], NAMED)
    if isinstance(value, float):
        return number(value)
    if isinstance(value, list):
        return "[" + ", ".join(_show(v) for v in value[:6]) + (", …]" if len(value) > 6 else "]")
    return str(value)
