"""``cpdebug capture``, ``import`` and ``compare``: tensors kept for a comparison on another day or another machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cp_debug.cli import flags, tensorrt
from cp_debug.cli.console import console, say, show, show_document, show_notes, steps
from cp_debug.cli.flags import INPUTS_HELP, MOST, check_calibration, grouped, own_scales
from cp_debug.cli.given import replacing
from cp_debug.cli.typed import refuse
from cp_debug.loading import load_torch


@grouped
def capture(
    model: flags.ModelName = "centerpoint:tiny",
    backend: Annotated[str, typer.Option("--backend", "-b", help="The backend that runs.")] = "torch",
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the capture; new or empty.")] = Path(
        "capture"
    ),
    checkpoint: flags.PlainCheckpoint = None,
    inputs: Annotated[Path | None, typer.Option(help=INPUTS_HELP)] = None,
    samples: Annotated[int, typer.Option(min=1, max=MOST, help="How many samples.")] = 1,
    seed: flags.MadeSeed = 0,
    exporter: Annotated[flags.Exporter, typer.Option(help="For torch models; auto: what the backend reads.")] = "auto",
    unfolded: flags.Unfolded = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier capture in --output.")] = False,
    *,
    int8: flags.CalibrationFlags,
    engines: tensorrt.ProbeFlags,
    files: flags.ReadingFlags,
) -> None:
    """Run one backend with every probe and write a capture."""
    from contextlib import ExitStack

    from cp_debug.backends.spec import BackendSpec

    specs = [BackendSpec.parse(backend)]
    engines.check(specs)
    int8.check(specs, own_scales(specs, model, checkpoint, None))
    calibrated = [int8.calib_data] if "int8" in specs[0].name else []
    how = files.checked(model, inputs, samples, *calibrated, checkpoint=checkpoint)
    engines.check_installed(specs)
    check_calibration(model, int8.calib_data, int8.calib_samples, reading=how)
    load_torch()
    from cp_debug.bisect.recording import record
    from cp_debug.quantization.quantized_programs import load_quantized

    with ExitStack() as stack, steps() as on_step:
        target = stack.enter_context(replacing("--output", output, overwrite))
        engine_options = engines.calibrated(model, checkpoint, stack)
        (opened_backend,) = tensorrt.make(specs, engine_options, on_step)
        loaded, parts = load_quantized(model, checkpoint, seed, inputs, how)
        recorded = record(
            loaded,
            opened_backend,
            target,
            inputs=inputs,
            samples=samples,
            seed=seed,
            exporter=flags.chosen(exporter),
            folded=not unfolded,
            on_step=on_step,
            parts=parts,
            calibration=int8.chosen,
        )
    show_notes(recorded.manifest.get("notes", []))
    size = sum(file.stat().st_size for file in output.iterdir()) / 2**10
    amount = f"{size / 2**10:.1f} MiB" if size >= 2**10 else f"{size:.0f} KiB"
    samples_taken = f"{len(recorded.samples)} sample" + ("s" if len(recorded.samples) > 1 else "")
    console.print(f"{output}: {len(recorded.entries)} tensors of {samples_taken}, {amount}", soft_wrap=True)


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
        flags.DumpLayout, typer.Option(help="Layout of the tensors; flat: row by row, without the graph's axes.")
    ] = "nchw",
    maps: Annotated[
        list[str] | None, typer.Option("--map", help="VALUE=TENSOR: the name in the graph and in the dump; repeatable.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier capture in --output.")] = False,
    json: flags.JsonFile = None,
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
    from cp_debug.reports.import_dump import render

    last, flat = layout == "nhwc", layout == "flat"
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


def compare(
    reference: Annotated[Path, typer.Argument(help="A capture.")],
    test: Annotated[Path, typer.Argument(help="A capture of the same model and inputs.")],
    rtol: flags.Rtol = None,
    atol: flags.Atol = None,
    force: Annotated[bool, typer.Option("--force", help="Compare even if models or inputs differ.")] = False,
    maps: flags.Maps = None,
    show_all: Annotated[bool, typer.Option("--all", help="Every tensor.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Only the verdict, one line for each test.")] = False,
    json: flags.JsonFile = None,
    csv: Annotated[Path | None, typer.Option(help="Write the table as CSV; - is stdout.")] = None,
) -> None:
    """Compare two captures tensor by tensor."""
    from cp_debug.probes.capture import Capture

    captures = Capture.open(reference), Capture.open(test)
    why = "both captures are of one model and the same inputs"
    refuse(("force",), unless=bool(captures[0].differences(captures[1])), why=why)
    for text in maps or ():
        same = text == f"{text[: len(text) // 2]}={text[: len(text) // 2]}"  # names may hold a =, too
        refuse(("maps",), unless=not same, why=f"{text}: tensors of one name are compared as it is")
    from cp_debug.bisect.recording import compare_captures

    result = compare_captures(*captures, rtol=rtol, atol=atol, force=force, maps=maps or ())
    show(result, json=json, csv=csv, show_all=show_all, quiet=quiet)
    raise typer.Exit(0 if result.agrees else 1)
