"""ONNX files written for deployment: checked, in the wished opset, compared with the originals by ONNX Runtime."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import replace
from pathlib import Path

import onnx

from cp_debug.backends.base import Backend, Program
from cp_debug.deploy.exporting import (
    Exported,
    OnStep,
    Run,
    check_compared,
    checker,
    compared_outputs,
    outcome,
    resized,
    shapes_of,
    worst_output,
)
from cp_debug.doing import doing
from cp_debug.errors import InputError, in_one_line
from cp_debug.files import complete_folder, resolved
from cp_debug.graph.graph import Graph
from cp_debug.graph.randomness import refuse_random
from cp_debug.graph.surgery import converted, inlined, save
from cp_debug.programs.align import TOLERANCE
from cp_debug.programs.walk import ComponentStep, Walk
from cp_debug.recipes.base import Arrays, Model, Sample

SAMPLES = 3
"""Samples on which a written file is compared with its original, where they are made up."""


def export_files(
    model: Model,
    programs: Sequence[Program],
    samples: Sequence[Sample],
    folder: Path,
    *,
    opset: int | None = None,
    simplify: bool = False,
    files: Mapping[str, str] | None = None,
    on_step: OnStep = lambda text, done, total: None,
) -> list[Exported]:
    """Write the ONNX files ``programs`` of ``model`` as ``<component>.onnx`` into ``folder``; ``files`` replaces names.

    ``opset`` None keeps the file's; ``simplify`` runs onnxscript's optimizer over it. Weights in external data go into
    the file, or beside it where they are too many. Each file is checked by ``onnx.checker`` and gives the original's
    outputs on all ``samples``, at least one, and on a second size of the free axes where the original runs on one,
    before one of them appears. Raises InputError for what does not, where no output holds a number, for a file that
    would replace its own original, and for an opset to which ONNX does not convert.
    """
    names = {program.name: (files or {}).get(program.name, f"{program.name}.onnx") for program in programs}
    for program in programs:
        target = folder / names[program.name]
        if resolved(target) == resolved(program.graph.path):
            raise InputError(f"--output: {target} would replace MODEL itself; expected another folder")
        refuse_random([program.graph], "the written file cannot be compared with it")
    written, walks = [], [Walk(model, sample) for sample in samples]
    with complete_folder(folder) as scratch:
        backend = checker()
        for place, program in enumerate(programs):
            on_step(f"writing {program.name}", place, len(programs))
            source = program.graph
            graph = _checked(_rewritten(source, scratch / names[program.name], opset, simplify), source)
            steps = [walk.at(program.name) for walk in walks]
            runs = _runs(backend, Program(program.name, source), Program(program.name, graph), steps)
            sizes, compared = zip(*runs, strict=True)
            error, says = outcome(compared)
            written.append(Exported(replace(program, graph=graph), sizes, error, str(backend.spec), says, source))
        check_compared(model.name, written)
    return [replace(w, program=replace(w.program, graph=Graph(folder / w.program.graph.path.name))) for w in written]


def _rewritten(source: Graph, path: Path, opset: int | None, simplify: bool) -> Path:
    """``source`` written to ``path``, in another opset or simplified where that is asked for."""
    proto = source.proto
    if simplify or opset not in (None, source.opsets.get("", 1)):
        proto = inlined(source)
        proto = converted(proto, source, opset) if opset is not None else proto
        proto = _simplified(proto, source) if simplify else proto
    save(proto, source, path)
    return path


def _runs(
    backend: Backend, source: Program, rewritten: Program, steps: Sequence[ComponentStep]
) -> Iterator[tuple[str, Run]]:
    """(Shapes, outputs compared) of each run of both graphs; ``steps`` get their outputs.

    The last run has other sizes along the free axes, where there are some and the original runs on them.
    """
    graph = source.graph
    axes = {v.name: {i: str(d) for i, d in enumerate(v.shape or ()) if not isinstance(d, int)} for v in graph.inputs}
    fed = [step.inputs for step in steps]
    with closing(backend.open(source)) as session:
        for step in steps:
            step.outputs = session.run(step.inputs)
        expected: list[Arrays] = [step.outputs for step in steps]
        if shapes_of(other := resized(fed[0], axes)) != shapes_of(fed[0]):
            with suppress(InputError):  # of a size that the original does not take
                expected.append(session.run(other))
                fed.append(other)
    with closing(backend.open(rewritten)) as session:
        for inputs, outputs in zip(fed, expected, strict=True):
            yield shapes_of(inputs), _checked_run(graph, outputs, session.run(inputs))


def _simplified(proto: onnx.ModelProto, source: Graph) -> onnx.ModelProto:
    from onnxscript import optimizer

    try:
        return optimizer.optimize(proto)
    except Exception as error:  # the optimizer raises nearly everything
        raise InputError(f"--simplify: onnxscript's optimizer fails on {source}: {in_one_line(error)}") from error


def _checked(path: Path, source: Graph) -> Graph:
    """The written file, opened. Raises InputError where ``onnx.checker`` refuses it, or its signature is another."""
    try:
        with doing(f"onnx checked {source}"):
            onnx.checker.check_model(path)
    except Exception as error:  # ValidationError, and what the checker's own parser raises
        raise InputError(f"{source}: onnx.checker refuses it: {' '.join(str(error).split())}") from error
    graph = Graph(path)
    for kind, ours, theirs in (
        ("inputs", [v.name for v in source.inputs], [v.name for v in graph.inputs]),
        ("outputs", [v.name for v in source.outputs], [v.name for v in graph.outputs]),
    ):
        if ours != theirs:
            raise InputError(f"{source}: its {kind} are {ours}; rewritten, they would be {theirs}")
    return graph


def _checked_run(source: Graph, ours: Arrays, theirs: Arrays) -> Run:
    """Every output compared. Raises InputError beyond ``TOLERANCE``."""
    run = compared_outputs(ours, theirs)
    worst, stats = worst_output(run)
    if stats.shape_mismatch or stats.mismatched or not stats.finite_rel_l2 <= TOLERANCE:
        raise InputError(
            f"{source}: rewritten, it computes another {worst} than before: {list(stats.shape_test)}, relative L2 "
            f"{stats.rel_l2:.2g}; expected {list(stats.shape)} within {TOLERANCE:g}"
        )
    return run
