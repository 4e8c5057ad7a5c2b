"""Control flow that takes another way on the two sides: the finding, whatever the numbers behind it are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from cp_debug.backends.base import Program
from cp_debug.bisect.candidate_run import CandidateRun
from cp_debug.bisect.result import GUILTY, INHERITED, LayerRow
from cp_debug.errors import InputError
from cp_debug.graph.flatten import Branch, Decision
from cp_debug.graph.graph import Graph
from cp_debug.probes.capture import Capture
from cp_debug.programs.pipeline import Key


@dataclass(frozen=True)
class OtherWay:
    """A control flow node that decides differently on both sides."""

    component: str
    branch: Branch
    """The node in the reference's program."""
    ours: Decision
    theirs: Decision

    def __str__(self) -> str:
        def said(decision: Decision) -> str:
            return f"takes {decision}" if isinstance(decision, str) else f"runs {decision} times"

        return f"{self.branch.op} {self.branch.path} {said(self.theirs)}, on the reference it {said(self.ours)}"


def other_ways(run: CandidateRun, captures: tuple[Capture, Capture]) -> Iterator[OtherWay]:
    """Control flow nodes that decide differently in the test than in the reference.

    A captured condition of an If goes before the decision that was taken when the bodies were flattened.
    """
    test = {p.name: p for p in run.pipeline.programs}
    for component, program in run.programs.items():
        theirs = {b.path: b for b in test[component].branches}
        for branch in program.branches:
            if branch.path not in theirs:
                continue
            test_branch = theirs[branch.path]
            condition = run.name(Key(component, test_branch.decided_by[0])).value
            ours = _flattened(branch, branch.decided_by[0], captures[0], component)
            way = OtherWay(component, branch, ours, _flattened(test_branch, condition, captures[1], component))
            if way.ours != way.theirs:
                yield way


def _flattened(branch: Branch, condition: str, capture: Capture, component: str) -> Decision:
    if branch.op != "If":
        return branch.decision
    try:
        value = capture.load(condition, component=component)
    except InputError:
        return branch.decision
    return "then_branch" if bool(value.reshape(-1)[0]) else "else_branch"


def judge_ways(ways: list[OtherWay], programs: Mapping[str, Program], rows: Mapping[Key, LayerRow]) -> dict[Key, str]:
    """Give the results of such control flow their verdict: guilty, unless a value that it decides by is.

    Returns the values that are guilty now → of what.
    """
    settled = {}
    for way in ways:
        above = _above(programs[way.component].graph, way.branch.decided_by)
        accused = any(rows[k].verdict == GUILTY for k in (Key(way.component, v) for v in above) if k in rows)
        for name in way.branch.outputs:
            row_key = Key(way.component, name)
            if (row := rows.get(row_key)) is not None:
                row.verdict, row.why = INHERITED if accused else GUILTY, str(way)
                if not accused:
                    settled[row_key] = str(way)
    return settled


def _above(graph: Graph, values: tuple[str, ...]) -> set[str]:
    """``values`` and all that they are computed from."""
    nodes, _ = graph.segment([v for v in values if v in graph.producer], ())
    return {*values, *(name for node in nodes for name in (*node.inputs, *node.outputs))}
