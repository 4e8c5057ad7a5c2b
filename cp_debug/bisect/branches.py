"""Control flow that takes another way on the two sides: the finding, whatever the numbers behind it are."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from cp_debug.backends.base import Program
from cp_debug.bisect.finding import Finding
from cp_debug.bisect.result import GUILTY, INHERITED, LayerRow
from cp_debug.errors import InputError
from cp_debug.graph.flatten import Branch, Decision
from cp_debug.graph.graph import Graph
from cp_debug.probes.arrays import as_numpy
from cp_debug.probes.held import CapturedRun
from cp_debug.programs.pipeline import Key

Branches = Mapping[str, Sequence[Branch]]
"""Component → its decisions of the flattening."""
_FIX = "compare what decides in both programs: a condition and its threshold, or a count of passes that tracing stored"


@dataclass(frozen=True)
class OtherWay:
    """A control flow node that decides differently on both sides."""

    component: str
    branch: Branch
    """The node in the reference's program."""
    ours: Decision
    theirs: Decision
    decided: str = ""
    """The first value that it decides by and that both sides have otherwise, in words."""

    def __str__(self) -> str:
        return in_words(self.branch.op, self.branch.path, self.ours, self.theirs) + self.decided


def in_words(op: str, path: str, ours: Decision, theirs: Decision) -> str:
    """A sentence about a control flow node that decides ``theirs`` in the test and ``ours`` on the reference."""

    def said(decision: Decision) -> str:
        return f"takes {decision}" if isinstance(decision, str) else f"runs {decision} times"

    return f"{op} {path} {said(theirs)}, on the reference it {said(ours)}"


def other_ways(
    branches: tuple[Branches, Branches],
    captures: tuple[CapturedRun, CapturedRun],
    components: Mapping[str, str],
    named: Callable[[Key], Key] = lambda key: key,
) -> Iterator[OtherWay]:
    """Control flow nodes that decide differently in the test than in the reference.

    ``branches`` and ``captures`` are the reference's and the test's; ``components`` says which of the test's stands for
    one of the reference's that has another name, ``named`` under which name a value of the test was captured.
    A captured condition of an If goes before the decision that was taken when the bodies were flattened.
    """
    for component, own in branches[0].items():
        both = component, components.get(component, component)
        theirs = {branch.path: branch for branch in branches[1].get(both[1], ())}
        for branch in own:
            if (test_branch := theirs.get(branch.path)) is None:
                continue
            names = [named(Key(both[1], value)).value for value in test_branch.decided_by]
            ours = _decision_of(branch, branch.decided_by[0], captures[0], component)
            their_decision = _decision_of(test_branch, names[0], captures[1], both[1])
            if ours != their_decision:
                decided = _differing_condition(branch.decided_by, names, captures, both)
                yield OtherWay(component, branch, ours, their_decision, decided)


def _differing_condition(
    ours: Sequence[str], theirs: Sequence[str], captures: tuple[CapturedRun, CapturedRun], components: tuple[str, str]
) -> str:
    """The first pair of scalars that both captures hold and that differ, in words; empty where there is none."""
    for name, test_name in zip(ours, theirs, strict=False):
        places = zip(captures, (name, test_name), components, strict=True)
        scalars = [_scalar(capture, own_name, component) for capture, own_name, component in places]
        if None not in scalars and scalars[0] != scalars[1]:
            return f"; what decides, {name}, is {scalars[1]} for {scalars[0]}"
    return ""


def _scalar(capture: CapturedRun, name: str, component: str) -> bool | int | float | None:
    """The value of a captured tensor of one element; None for all else."""
    try:
        value = as_numpy(capture.load(name, component=component))
    except InputError:
        return None
    return value.reshape(-1)[0].item() if value.size == 1 else None


def _decision_of(branch: Branch, condition: str, capture: CapturedRun, component: str) -> Decision:
    if branch.op != "If" or (value := _scalar(capture, condition, component)) is None:
        return branch.decision
    return "then_branch" if value else "else_branch"


def judge_ways(
    ways: list[OtherWay], programs: Mapping[str, Program], rows: Mapping[Key, LayerRow]
) -> dict[Key, Finding]:
    """Give the results of such control flow their verdict: guilty, unless a value that it decides by is.

    Such a value's verdict tells what it leads to. Returns the values that are guilty now → their finding.
    """
    settled: dict[Key, Finding] = {}
    for way in ways:
        above = _above(programs[way.component].graph, way.branch)
        keys = [Key(way.component, value) for value in above]
        accused = [rows[k] for k in keys if k in rows and rows[k].verdict == GUILTY and k not in settled]
        for culprit in accused:
            culprit.why = f"{culprit.why}; so {way}"
        for name in way.branch.outputs:
            row_key = Key(way.component, name)
            if (row := rows.get(row_key)) is not None:
                row.verdict, row.why = INHERITED if accused else GUILTY, str(way)
                if not accused:
                    says, layers = str(way), [row.name]
                    settled[row_key] = Finding("control-flow", says, layers, [row.op], fix=_FIX)
    return settled


def _above(graph: Graph, branch: Branch) -> set[str]:
    """The values that ``branch`` decides by, and all that they are computed from, but for its own results."""
    nodes, _ = graph.segment([v for v in branch.decided_by if v in graph.producer], ())
    return {*branch.decided_by, *(name for node in nodes for name in (*node.inputs, *node.outputs))} - {*branch.outputs}
