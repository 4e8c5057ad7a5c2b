"""``cpdebug import``: tensors that another program dumped, as a capture."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cp_debug.cli.bisect import DumpLayout
from cp_debug.cli.flags import JsonFile
from cp_debug.cli.saving import replacing
from cp_debug.loading import load_torch


def import_dump(
    dump: Annotated[
        Path,
        typer.Argument(
            help="Folder of .npy, .pb, .pt or raw files; .npz, safetensors, Polygraphy, TensorRT-LLM, vLLM."
        ),
    ],
    model: Annotated[Path, typer.Option(help="The .onnx file whose values the tensors are.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the capture; new or empty.")],
    precision: Annotated[str, typer.Option(help="Precision of the tensors.")] = "fp32",
    layout: Annotated[
        DumpLayout, typer.Option(help="Layout of the tensors; flat: row by row, without the graph's axes.")
    ] = DumpLayout.nchw,
    maps: Annotated[
        list[str] | None, typer.Option("--map", help="VALUE=TENSOR: the name in the graph and in the dump; repeatable.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier capture in --output.")] = False,
    json: JsonFile = None,
) -> None:
    """Match dumped tensors with a graph and save them as a capture. List what does not fit.

    `cpdebug compare` and `cpdebug bisect --test-tensors` read it. Exit code 1 where outputs are missing or shapes
    differ.
    """
    from cp_debug.errors import InputError
    from cp_debug.graph.graph import Graph
    from cp_debug.reading import check_file

    graph = Graph(model)
    if not dump.is_dir():
        check_file(dump, "file of tensors")
    load_torch()
    from cp_debug.backends.arithmetic import ARITHMETICS
    from cp_debug.probes.dumps import read_dumps, steps_left_out

    if precision not in ARITHMETICS:
        raise InputError(f"--precision: {precision!r}; expected one of {', '.join(ARITHMETICS)}")
    tensors, *others = read_dumps(dump)
    from cp_debug.bisect.import_dump import match_dump, write_dump
    from cp_debug.cli.console import say, show_document, show_notes
    from cp_debug.reports.import_dump import render

    last, flat = layout is DumpLayout.nhwc, layout is DumpLayout.flat
    matched = match_dump(graph, tensors, str(dump), maps=maps or (), channels_last=last, flat=flat)
    with replacing("--output", output, overwrite) as target:
        write_dump(matched, graph, target, precision)
    if others:
        show_notes([f"1 of {len(others) + 1} samples of {dump} is imported, the first"])
    if steps := steps_left_out(dump):
        show_notes([f"1 of {steps + 1} steps in {dump} is imported, the first; for another one, give its folder"])
    show_document(render(matched), matched.to_dict(), json)
    if json != "-":
        say(f"written: {output}")
    raise typer.Exit(0 if matched.complete else 1)
