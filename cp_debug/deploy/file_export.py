"""ONNX files written for deployment: checked, in the wished opset, compared with the originals by ONNX Runtime."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import onnx

from cp_debug.backends.base import Program
from cp_debug.deploy.exporting import Exported, OnStep, checker, run_once, shapes_of, worst_output
from cp_debug.errors import InputError, in_one_line
from cp_debug.files import complete_folder, resolved
from cp_debug.graph.graph import Graph
from cp_debug.graph.opset import converted, inlined
from cp_debug.graph.randomness import refuse_random
from cp_debug.graph.surgery import save
from cp_debug.programs.align import TOLERANCE
from cp_debug.programs.walk import Walk
from cp_debug.recipes.base import Arrays, Model, Sample


def export_files(
    model: Model,
    programs: Sequence[Program],
    sample: Sample,
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
    outputs on ``sample``, before one of them appears. Raises InputError for what does not, for a file that would
    replace its own original, and for an opset to which ONNX does not convert.
    """
    names = {program.name: (files or {}).get(program.name, f"{program.name}.onnx") for program in programs}
    for program in programs:
        target = folder / names[program.name]
        if resolved(target) == resolved(program.graph.path):
            raise InputError(f"--output: {target} would replace MODEL itself; expected another folder")
        refuse_random([program.graph], "the written file cannot be compared with it")
    named = {program.name: program for program in programs}
    written = []
    with complete_folder(folder) as scratch:
        backend = checker()
        for step in Walk(model, sample):
            on_step(f"writing {step.name}", step.place, len(programs))
            source = named[step.name].graph
            step.outputs = run_once(backend, Program(step.name, source), step.inputs)
            proto = source.proto
            if simplify or opset not in (None, source.opsets.get("", 1)):
                proto = inlined(source)
                proto = converted(proto, source, opset) if opset is not None else proto
                proto = _simplified(proto, source) if simplify else proto
            save(proto, source, path := scratch / names[step.name])
            graph = _checked(path, source)
            error = _distance(source, step.outputs, run_once(backend, Program(step.name, graph), step.inputs))
            program = replace(named[step.name], graph=graph)
            written.append(Exported(program, (shapes_of(step.inputs),), error, str(backend.spec), source))
    return [replace(w, program=replace(w.program, graph=Graph(folder / w.program.graph.path.name))) for w in written]


def _simplified(proto: onnx.ModelProto, source: Graph) -> onnx.ModelProto:
    from onnxscript import optimizer

    try:
        return optimizer.optimize(proto)
    except Exception as error:  # the optimizer raises nearly everything
        raise InputError(f"--simplify: onnxscript's optimizer fails on {source}: {in_one_line(error)}") from error


def _checked(path: Path, source: Graph) -> Graph:
    """The written file, opened. Raises InputError where ``onnx.checker`` refuses it, or its signature is another."""
    try:
        onnx.checker.check_model(path)
    except Exception as error:  # ValidationError, and what the checker's own parser raises
        raise InputError(f"{source}: onnx.checker refuses it: {in_one_line(error)}") from error
    graph = Graph(path)
    for kind, ours, theirs in (
        ("inputs", [v.name for v in source.inputs], [v.name for v in graph.inputs]),
        ("outputs", [v.name for v in source.outputs], [v.name for v in graph.outputs]),
    ):
        if ours != theirs:
            raise InputError(f"{source}: its {kind} are {ours}; rewritten they would be {theirs}")
    return graph


def _distance(source: Graph, ours: Arrays, theirs: Arrays) -> float:
    """Relative L2 distance of the worst output. Raises InputError beyond ``TOLERANCE``."""
    worst, stats = worst_output(ours, theirs)
    if stats.shape_mismatch or stats.mismatched or not stats.finite_rel_l2 <= TOLERANCE:
        raise InputError(
            f"{source}: rewritten it gives another {worst} than before: {list(stats.shape_test)}, relative L2 "
            f"{stats.rel_l2:.2g}; expected {list(stats.shape)} within {TOLERANCE:g}"
        )
    return stats.finite_rel_l2
