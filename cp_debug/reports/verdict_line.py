"""Verdicts in words: of a test in one line, the guilty layer or how far it agrees; of layers that are not finite."""

from __future__ import annotations

import math
from typing import Any

from rich.text import Text

from cp_debug.bisect.finding import MISSING_CASTS, ROUNDED_SCALAR
from cp_debug.bisect.result import DIVERGENT, INHERITED, MOST_NAMES, OK, SHAPE, LayerRow, TestResult
from cp_debug.graph.pairing import places
from cp_debug.probes.caveats import ALL_ZERO, TIES
from cp_debug.reports.numbers import number, share_in_words
from cp_debug.safe_text import amount, one_line, some

MOST = 0.8
"""Share of the divergence from which an INT8 layer that does what it declares is named for it."""


def verdict_line(test: TestResult) -> Text:
    """One line: the guilty layer, its excess, its share of the final divergence, and what was not emulated."""
    text = _verdict_line(test)
    if (lost := "; ".join(test.lost)) and lost not in text.plain:
        text.append(f"; {lost}", "bold red")
    if strange := test.not_finite:
        text.append(f"; {strange}", "yellow")
    if left_out := test.backend.settings.get("not_emulated"):
        text.append(f"; not emulated, but computed in FP32 and rounded once: {setting_text(left_out)}", "yellow")
    return text


def headline(test: TestResult) -> Text:
    """The verdict in a few words, and how far the final outputs differ: what stands above the tables."""
    whole = _verdict_line(test)
    first = whole.spans[0]
    lead = whole[: first.start or first.end]  # the rest may be what has a style of its own
    return Text.assemble(lead, _end(test))


def _verdict_line(test: TestResult) -> Text:
    first, end = test.first_divergent, _end(test)
    spec, tolerance = test.backend.spec, f"rtol {test.rtol:g}, atol {test.atol:g}"
    if test.undecided:
        return Text.assemble((f"✗ {spec}: nothing is decided", "bold yellow"), f", {test.coverage}{end}")
    if test.lacks_outputs_alone:
        lacks = f"output{'s' * (len(test.missing_outputs) > 1)} {some(test.missing_outputs, MOST_NAMES)}"
        text = Text(f"✗ {spec}: lacks {lacks} of the reference", "bold red")
        rest = f"within {tolerance}, {test.coverage}{_unpaired(test)}{end}"
        return text.append(f"; the outputs of both agree {rest}", "not bold")
    if test.moves_outputs_alone:
        text = Text(f"✗ {spec}: the outputs are in another order", "bold red")
        rest = f"each agrees with its counterpart, within {tolerance}, {test.coverage}{_unpaired(test)}{end}"
        meant = "if this is intended, say so with `--map REFERENCE=TEST`"
        return text.append(f": {places(test.moved_outputs)}; {rest}; {meant}", "not bold")
    if math.isinf(test.atol) and not test.guilty:
        text = Text(f"✓ {spec}: no layer introduces more than its precision explains", "bold green")
        return text.append(f"; divergence was not judged, {test.coverage}{end}", "not bold")
    if test.guilty:
        assert first is not None
        names = f"{len(test.guilty)} layers are guilty, the first is" if len(test.guilty) > 1 else "guilty:"
        of_end = f", {share_in_words(first.share)}" if first.share is not None else ""
        heaviest = max(test.rows, key=lambda row: row.share or 0.0)
        if of_end and (first.share or 0.0) < 0.5 < (heaviest.share or 0.0):
            how = "" if heaviest in test.guilty else f" ({heaviest.op}), which rounds as declared"
            of_end += f"; most of it comes from {heaviest.name}{how}"
        text = Text.assemble(
            (f"✗ {spec}: {names} {first.name}", "bold red"),
            f" ({first.op}{_judged_together(first)}): {first.why}{of_end}{end}",
        )
        if test.first_beyond is not None and test.first_beyond.index != first.index:
            text.append(_why_views_differ(test, first, test.first_beyond))
        return text.append(_uncovered(test))
    if test.lost and not test.first_beyond:
        text = Text(f"✗ {spec}: {'; '.join(test.lost)}", "bold red")
        return text.append(f"; as a whole within {tolerance}, {test.coverage}{_unpaired(test)}{end}", "not bold")
    if first is not None and first.why.startswith(TIES) and not test.agrees:
        at = ", ".join(filter(None, (first.op, first.source.partition(": ")[0])))
        text = Text(f"✗ {spec}: {TIES} at {first.name} ({at})", "bold yellow")
        rest = f"no layer introduces more than its precision explains{_uncovered(test)}"
        return text.append(f"{first.why.removeprefix(TIES)}{end}; {rest}", "not bold")
    if first is not None and not test.agrees:
        few = _comes_from(test) if test.oracle and test.remainder else ""
        why = f"{f' ({first.op})' if first.op else ''}{f': {first.why}' if first.why else ''}"
        beyond = f"; beyond {tolerance} from {first.name}{why} on" if few else f"{why}, {tolerance}"
        style = "bold yellow" if test.oracle else "bold red"
        lead = f"✗ {spec}: {few or f'first divergent layer: {first.name}'}"
        text = Text.assemble((lead, style), f"{beyond}{end}")
        if test.oracle and first.verdict != SHAPE:  # a shape says who is wrong
            says = f": {test.remainder}" if test.remainder and not few else ""
            text.append(f"; no layer introduces more than its precision explains{says}{_avoidable(test)}")
        return text.append(_uncovered(test))
    between = _beyond_between(test)
    style = "bold yellow" if _unpaired(test) or between or test.not_finite else "bold green"
    who = "the outputs agree" if between else "agrees"
    covers = f"{test.coverage}{_unpaired(test) or _unseen(test)}{between}"
    return Text.assemble((f"✓ {spec}: {who}", style), f" within {tolerance}, {covers}{end}")


def _end(test: TestResult) -> str:
    """Phrase about the final outputs: by how much the worst one differs, and in how many elements where they are whole
    numbers that had to be equal."""
    compared = [row for row in test.outputs if not row.stats.nothing_compared]
    if not compared:
        return "; no number of the final outputs could be compared" if test.outputs else ""
    unequal = [row for row in compared if _counts(row)]
    rest = [row for row in compared if not _counts(row)]
    parts = []
    if rest:
        worst = max(rest, key=lambda row: row.stats.rel_l2)
        parts.append(f"by {number(worst.stats.rel_l2)} (rel. L2, {worst.name})")
    if unequal:
        worst = max(unequal, key=lambda row: (row.stats.unequal or 0) / row.stats.count)
        more = f" and {amount(len(unequal) - 1, 'more output')}" if len(unequal) > 1 else ""
        parts.append(f"in {worst.stats.unequal} of {worst.stats.count} elements ({worst.name}){more}")
    return f"; final outputs differ {', and '.join(parts)}"


def _counts(row: LayerRow) -> bool:
    return bool(row.stats.unequal) and not row.within


def _judged_together(row: LayerRow) -> str:
    """Phrase about nodes before a layer whose results nobody showed, so that any of them may be guilty."""
    nodes = row.replay.nodes if row.replay and row.region is None and row.side != "export" else ()
    before = [one_line(name) for name in nodes if name != row.name]
    if len(before) < 2:
        return ""
    return f", with the {len(before)} nodes before it, from {before[0]} on: nothing between was compared"


def _comes_from(test: TestResult) -> str:
    """Phrase about the few layers whose rounding makes most of the divergence, or about rounding that one side leaves
    out; empty where it adds up over many."""
    if any(finding.cause == MISSING_CASTS for finding in test.findings):
        return "inductor leaves out casts that eager makes"
    if scalars := [name for f in test.findings if f.cause == ROUNDED_SCALAR for name in f.layers]:
        return f"one side alone rounds a scalar, at {some(scalars, MOST_NAMES)}"
    if flips := [name for f in test.findings if "flips" in f.evidence for name in f.layers]:
        return f"the rounding of {some(flips, MOST_NAMES)} makes whole numbers flip"
    if lost := next((f for f in test.findings if "lost" in f.evidence), None):
        return f"NaN or Inf comes from {lost.layers[0]}: {lost.evidence['lost']}"
    few = next((f for f in test.findings if f.evidence.get("declared") and f.effect.share is not None), None)
    few = few or next((f for f in test.findings if f.cause == "int8" and (f.effect.share or 0.0) >= MOST), None)
    if few is None:
        return ""
    return f"{share_in_words(min(few.effect.share or 0.0, 1.0))} comes from {some(few.layers, MOST_NAMES)}"


def _avoidable(test: TestResult) -> str:
    """Phrase about layers that do what they declare, and would lose less by a better declaration."""
    found = [f for f in test.findings if "gain" in f.evidence]
    layers = sum(len(f.layers) for f in found)
    if not found:
        return ""
    causes = ", ".join(dict.fromkeys(f.cause for f in found))
    return f", but {layers} layer{'s' * (layers != 1)} would lose less with a better declaration ({causes})"


def _uncovered(test: TestResult) -> str:
    """Phrases about values left out of a comparison of two models, and outputs in another order; empty without any."""
    unpaired = any(p.get("missing") for p in test.pairing.values())
    lacking = test.unseen if test.backend.spec == "dump" else ()
    is_complete = not (test.missing_outputs or test.empty_outputs or test.not_run or unpaired or lacking)
    covers = "" if is_complete else f"; compared: {test.coverage}{_unpaired(test) or _unseen(test)}"
    return f"{covers}; {places(test.moved_outputs)}" if test.moved_outputs else covers


def _unpaired(test: TestResult) -> str:
    """The outputs and the number of values of which nothing could be compared, or nothing learned."""
    missing = sum(len(p.get("missing", ())) for p in test.pairing.values())
    missing = min(missing, test.total - test.compared)  # torch's values stand in for some
    parts = [f"without {some(test.missing_outputs, MOST_NAMES)}"] if test.missing_outputs else []
    parts += [f"but {caveat}" if caveat == ALL_ZERO else caveat for caveat in test.caveats]
    noun = "value has" if missing == 1 else "values have"
    parts += [f"{missing} {noun} no counterpart in the test"] if missing else []
    return f" ({'; '.join(parts)})" if parts else ""


def _unseen(test: TestResult) -> str:
    """The values that were not compared, by name, and why; empty where all were."""
    why = "not in the dump" if test.backend.spec == "dump" else "not visible in the test"
    return f" ({len(test.unseen)} {why}: {some(test.unseen, 2)})" if test.unseen else ""


def _beyond_between(test: TestResult) -> str:
    """Phrase about values that are beyond the tolerance although the outputs are not; empty without one."""
    outputs = {(row.component, row.onnx) for row in test.outputs}
    rows = [
        row
        for row in test.rows
        if row.verdict in (INHERITED, DIVERGENT, SHAPE) and (row.component, row.onnx) not in outputs
    ]
    if not rows:
        return ""
    return f"; values in between do not: {some([f'{row.name} ({row.verdict})' for row in rows], 1)}"


def _why_views_differ(test: TestResult, guilty: LayerRow, beyond: LayerRow) -> str:
    if beyond.index > guilty.index:
        return f"; its divergence passes the tolerance only at {beyond.name}, where the network amplifies it"
    return f"; {beyond.name} passes the tolerance before it, but adds no more than its precision explains"


def setting_text(value: Any) -> str:
    """A setting of a backend in words: ``on``, or the operators of a mapping by node."""
    if isinstance(value, dict):  # node → operator
        return ", ".join(sorted(set(value.values())))
    return ("off", "on")[value] if isinstance(value, bool) else str(value)


def not_finite(row: LayerRow) -> str:
    """``∞`` or ``NaN`` for a row with a figure that is no number, or with such elements in its tensors; else empty."""
    stats, replay = row.stats, row.replay
    figures = [stats.rel_l2, stats.max_abs, *((replay.introduced, replay.inherited) if replay else ())]
    if stats.nan_ref or stats.nan_test or any(v is not None and math.isnan(v) for v in figures):
        return "NaN"
    return "∞" if stats.inf_ref or stats.inf_test or any(v is not None and math.isinf(v) for v in figures) else ""


def _born(row: LayerRow) -> str:
    """``18 Inf``, ``3 NaN`` or ``5 NaN or Inf`` for a layer that makes such values of finite ones, and the reverse,
    ``2 NaN or Inf lost``; else empty."""
    count = row.replay.new_nonfinite if row.replay else 0
    numbers = row.replay is not None and row.replay.numbers == count
    return f"{count} {'NaN or Inf lost' if numbers else _kind(row)}" if count else ""


def layer_verdict(row: LayerRow) -> str:
    """The verdict, with what is born in a guilty layer: its figures are of the finite values alone."""
    return f"{row.verdict}: {_born(row)}" if _born(row) else unless_nothing(row, row.verdict)


def unless_nothing(row: LayerRow, verdict: str) -> str:
    """``verdict``, or ``not compared`` for one that would say that all is well where there was no number."""
    return "not compared" if verdict == OK and row.stats.nothing_compared else verdict


def side_by_side(row: LayerRow) -> str:
    """Kind of value that is not finite on the test's side alone; empty where the excess says what the layer did."""
    if row.replay and row.replay.new_nonfinite:
        return _kind(row)
    return "" if math.isfinite(row.stats.rel_l2) else _kind(row)


def _kind(row: LayerRow) -> str:
    kinds = [name for name, count in (("NaN", row.stats.nan_test), ("Inf", row.stats.inf_test)) if count]
    return " or ".join(kinds) or "NaN or Inf"
