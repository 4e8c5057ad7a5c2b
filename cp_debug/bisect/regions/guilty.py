"""The guilty regions of one run, looked into one after the other while engines may be built."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

from cp_debug.backends.capabilities import INTERRUPTED, BuildsVariations, build_info_of
from cp_debug.bisect.candidate_run import CandidateRun, loader
from cp_debug.bisect.causes.findings import Explainer
from cp_debug.bisect.finding import UNKNOWN, Finding
from cp_debug.bisect.regions.descent import Descent, RegionSearch
from cp_debug.bisect.result import GUILTY, LayerRow
from cp_debug.errors import InputError
from cp_debug.probes.arrays import as_numpy
from cp_debug.programs.pipeline import Key
from cp_debug.safe_text import flags

NAMED = 8
"""Nodes that an advice names."""
FUSED = "fused-region"
"""The cause where no hypothesis reproduces what a region does."""
LOWER = ("fp16", "bf16", "best")
"""Variants in which nodes can be kept in FP32."""


def look_inside(
    explainer: Explainer,
    rows: Mapping[Key, LayerRow],
    findings: Sequence[Finding],
    max_builds: int,
    tell: Callable[[str], None],
) -> list[Finding]:
    """The findings, with those about unexplained guilty regions replaced by findings about their inside.

    At most ``max_builds`` engines are built for all regions together, the worst one first.
    """
    open_findings = (f for f in findings if f.cause == UNKNOWN or f.evidence.get("magnitude_only"))
    unexplained = {name for finding in open_findings for name in finding.layers}
    regions = [(k, r) for k, r in rows.items() if r.verdict == GUILTY and r.region and r.name in unexplained]
    regions = [(k, r) for k, r in regions if r.side == "test" and can_build(explainer.run, k.component)]
    regions.sort(key=lambda item: item[1].severity, reverse=True)
    new_findings: list[Finding] = []
    for key, row in regions:
        try:
            descent = _descend(explainer, key, row, max_builds, tell)
        except InputError:  # the replay of this region says why it cannot be computed
            continue
        max_builds -= len(descent.steps)
        new_findings.append(_finding(explainer, key, row, descent))
    explained_names = {name for finding in new_findings for name in finding.layers}
    other_findings = [
        remaining for finding in findings if (remaining := _without(finding, explained_names)) is not None
    ]
    return [*new_findings, *other_findings]


def can_build(run: CandidateRun, component: str) -> bool:
    """Whether the backend builds engines of the very graph that is judged."""
    graph = run.programs[component].graph
    same = run.pipeline.program(component).graph is graph
    return same and isinstance(run.pipeline.sessions[component], BuildsVariations)


def _descend(explainer: Explainer, key: Key, row: LayerRow, max_builds: int, tell: Callable[[str], None]) -> Descent:
    run, session = explainer.run, explainer.run.pipeline.sessions[key.component]
    load = loader(explainer.test, key.component)
    inputs = {info.name: as_numpy(load(info.name)) for info in run.programs[key.component].graph.inputs}
    assert row.region is not None
    assert isinstance(session, BuildsVariations)
    info = build_info_of(session)
    search = RegionSearch(
        row.region,
        explainer.segment(key, row),
        as_numpy(loader(explainer.reference, key.component)(key.value)),
        partial(session.trial, inputs),
        inherited=(row.replay.inherited or 0.0) if row.replay else 0.0,
        max_builds=0 if info is not None and info.stopped == INTERRUPTED else max_builds,
        lower=run.pipeline.backend.spec.variant in LOWER,
        tell=tell,
    )
    return search.descend()


def _finding(explainer: Explainer, key: Key, row: LayerRow, descent: Descent) -> Finding:
    best = descent.reproduced
    others = [h for h in descent.hypotheses if best is None or h.name != best.name]
    evidence = {
        "why": row.why,
        "error": descent.error,
        "error_in_fp32": descent.in_fp32,
        "builds": len(descent.steps),
        "nodes_named": len(descent.suspects),
    }
    return Finding(
        cause=best.name if best else FUSED,
        says=descent.says,
        layers=[row.name],
        ops=[row.op],
        side=row.side,
        explained=best.explained if best else None,
        runner_up=others[0].name if others else None,
        runner_up_explained=max(others[0].explained, 0.0) if others else None,
        evidence={name: value for name, value in evidence.items() if value is not None},
        effect=explainer.effects.of([row]),
        fix=_fix(descent, row),
        inside=descent.to_dict(),
    )


def _fix(descent: Descent, row: LayerRow) -> str:
    if descent.kept:
        more = ": the JSON has all" if len(descent.kept) > NAMED else ""
        return f"{flags('--keep-fp32', descent.kept, NAMED)}{more}"
    return f"cpdebug bundle RESULT --layer {row.onnx}"


def _without(finding: Finding, layers: set[str]) -> Finding | None:
    """The finding without what is said of these layers elsewhere; None where nothing is left."""
    if layers.isdisjoint(finding.layers):
        return finding
    pairs = [(n, op) for n, op in zip(finding.layers, finding.ops, strict=True) if n not in layers]
    if not pairs:
        return None
    finding.layers, finding.ops = [n for n, _ in pairs], [op for _, op in pairs]
    finding.where = [place for place in finding.where if place.layer not in layers]
    return finding
