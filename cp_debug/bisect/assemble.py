"""The result of a bisect, put together from the results of its tests."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cp_debug.backends.base import Program
from cp_debug.bisect.candidate_run import CandidateRun
from cp_debug.bisect.result import GUILTY, StageRow, TestResult, check_not_empty
from cp_debug.bisect.strange_numbers import nan_without_trace
from cp_debug.bisect.worst_samples import Collected
from cp_debug.errors import InputError
from cp_debug.files import resolved
from cp_debug.graph.control_flow import idle_on_both
from cp_debug.graph.graph import Graph
from cp_debug.programs.layers import Layer, stage_layers
from cp_debug.programs.paired import end_notes
from cp_debug.recipes.base import Model


def result_of(
    model: Model,
    run: CandidateRun,
    collected: Collected,
    layers: Sequence[Layer],
    notes: Iterable[str],
    save: Path | None,
    told_by_user: Sequence[str] = (),
    model_sha256: str = "",
) -> TestResult:
    """The block of one test in the result.

    ``model`` is the reference's, ``save`` the folder to which saved files are relative, ``told_by_user`` the texts of
    --map, ``model_sha256`` that of what the test runs. Raises InputError where no output was compared.
    """
    rows = [collected.rows[key] for key in sorted(collected.rows, key=lambda k: collected.rows[k].index)]
    by_key = {(row.component, row.onnx): row for row in rows}
    stages = [
        StageRow(
            stage.name,
            by_key[stage.last.component, stage.last.onnx],
            [r.name for r in rows if r.verdict == GUILTY and (r.component, r.onnx) in of_stage],
        )
        for stage in stage_layers(model.components, layers)
        if (of_stage := {(layer.component, layer.onnx) for layer in stage.layers})
        and (stage.last.component, stage.last.onnx) in by_key
    ]
    last = model.components[-1]
    program = run.pipeline.program(last.name)
    pairing, expected = program.pairing, [v.name for v in run.programs[last.name].graph.outputs]
    if pairing is not None:
        expected = [name for name in expected if name not in pairing.left_out]
    given = [name for name in expected if pairing is None or not pairing.lacks(name)]
    outputs = [by_key[last.name, name] for name in given if (last.name, name) in by_key]
    if not outputs:
        raise InputError(nothing_compared(run, last.name, expected))
    check_not_empty(str(run.pipeline.backend.spec), outputs)
    rtol, atol = run.tolerance
    return TestResult(
        backend=run.pipeline.record(),
        rows=rows,
        stages=stages,
        outputs=outputs,
        expected_outputs=expected,
        moved_outputs=dict(pairing.moved) if pairing is not None else {},
        pairing={p.name: p.pairing.to_dict() for p in run.pipeline.programs if p.pairing is not None},
        compared=sum(row.kind == "data" for row in rows),
        total=sum(layer.kind == "data" for layer in layers),
        unseen=[x.name for x in layers if x.kind == "data" and (x.component, x.onnx) not in by_key],
        rtol=rtol,
        atol=atol,
        oracle=run.oracle,
        observation=collected.observation,
        notes=[
            *filter(None, [run.pipeline.unrealised_note]),
            *nan_without_trace(rows, outputs),
            *end_notes(list(run.programs.values()), run.pipeline.programs, told_by_user),
            *notes,
        ],
        programs={name: saved_name(graph, save) for name, graph in run.graphs.items()},
        optimizer_blame=collected.optimizer_blame,
        remainder=collected.remainder,
        attribution=collected.attribution,
        lost=list(collected.lost),
        model_sha256=model_sha256,
        findings=collected.findings,
        detections=collected.detections,
        not_run=[
            str(body)
            for ours, theirs in zip(run.programs.values(), run.pipeline.programs, strict=True)
            for body in idle_on_both(ours.flow, theirs.flow)
        ],
    )


def saved_name(graph: Graph, save: Path | None) -> str:
    """Path of a graph: relative to the saved folder if it lies there."""
    path, folder = resolved(graph.path), save and resolved(save)
    return path.relative_to(folder).as_posix() if folder and path.is_relative_to(folder) else str(path)


def nothing_compared(run: CandidateRun, component: str, expected: Sequence[str]) -> str:
    """Message that explains why there is no verdict, with the outputs of both sides."""
    program = run.pipeline.program(component)
    test_outputs = ", ".join(map(str, program.graph.outputs))
    return (
        f"{run.pipeline.backend.spec}: no output was compared: the reference has {', '.join(expected)}, "
        f"{program.graph} has {test_outputs}; --map REFERENCE=TEST pairs two of them"
    )


def coverage_of(programs: Sequence[Program]) -> dict[str, Any]:
    """Shares of the torch modules and of the deployed graphs that are accounted for, by component."""
    return {
        p.name: asdict(p.alignment.coverage())
        | {
            "absorbed": dict(p.alignment.absorbed),
            "unmatched_values": list(p.alignment.unmatched_values),
            "unmatched_modules": list(p.alignment.unmatched_modules),
        }
        for p in programs
        if p.alignment is not None
    }
