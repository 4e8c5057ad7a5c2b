"""``cpdebug bisect``, the main job, and ``demo``: a known fault, and the tool finding it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.text import Text

from cp_debug.cli import flags, tensorrt
from cp_debug.cli.console import command_line, console, errors, say, show, steps
from cp_debug.cli.flags import INPUTS_HELP, MOST, check_calibration, check_device, grouped, own_scales, size_in_bytes
from cp_debug.cli.given import has_result, replacing
from cp_debug.cli.typed import refuse, typed
from cp_debug.errors import InputError
from cp_debug.loading import load_torch, start_gpu
from cp_debug.safe_text import did_you_mean

if TYPE_CHECKING:
    from cp_debug.backends.base import Backend
    from cp_debug.bisect.demos import Seeded
    from cp_debug.bisect.result import TestResult
    from cp_debug.recipes.base import Model


@grouped
def bisect(
    model: flags.ModelName = "centerpoint:tiny",
    other: Annotated[
        Path | None, typer.Argument(metavar="TEST_MODEL", help="A second file or folder, as --test-model.")
    ] = None,
    backends: Annotated[
        str, typer.Option("--backends", "-b", help="Reference first, then the tests: torch,ort,emu-fp16.")
    ] = "torch,ort",
    test_model: Annotated[
        Path | None, typer.Option(help="Another .onnx for the tests (a folder: several components, or transformers).")
    ] = None,
    test_tensors: Annotated[
        Path | None,
        typer.Option(help="The test's values, computed elsewhere: .npy folder, .npz, safetensors, Polygraphy, .pb."),
    ] = None,
    tensors_precision: Annotated[str, typer.Option(help="Precision of --test-tensors.")] = "fp32",
    tensors_layout: Annotated[
        flags.DumpLayout,
        typer.Option(help="Layout of --test-tensors; flat: row by row, without the graph's axes."),
    ] = "nchw",
    maps: flags.Maps = None,
    checkpoint: flags.Checkpoint = None,
    test_checkpoint: Annotated[Path | None, typer.Option(help="Other weights for the test backends.")] = None,
    test_train_mode: Annotated[bool, typer.Option(help="Run the test's module in train mode.")] = False,
    test_out_of_place: Annotated[bool, typer.Option(help="Replace the test's in-place activations.")] = False,
    inputs: Annotated[Path | None, typer.Option(help=INPUTS_HELP)] = None,
    samples: Annotated[int, typer.Option(min=1, max=MOST, help="How many samples.")] = 1,
    seed: flags.MadeSeed = 0,
    level: Annotated[Literal["stages", "layers"], typer.Option(help="stages: only the stage table.")] = "layers",
    show_all: Annotated[
        bool, typer.Option("--all", help="Every layer, not only those near the first divergent one.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Only the verdict, one line for each test.")] = False,
    rtol: flags.Rtol = None,
    atol: flags.Atol = None,
    oracle: Annotated[
        Literal["auto", "fp32", "fp64"], typer.Option(help="auto: FP64 for FP32 tests, FP32 below.")
    ] = "auto",
    oracle_device: Annotated[
        str, typer.Option(help="Where layers are replayed: auto (where the test runs), cpu, cuda:N.")
    ] = "auto",
    memory: Annotated[
        str | None, typer.Option(help="Memory for captured values, such as 2G; the rest goes to disk.")
    ] = None,
    replay: Annotated[bool, typer.Option(help="Separate a layer's own error from that of its inputs.")] = True,
    knobs: Annotated[
        bool,
        typer.Option("--knobs", help="Find what an optimizer does wrong: ort-basic, ort-all, torch-compile, openvino."),
    ] = False,
    explain: Annotated[bool, typer.Option(help="Try the known causes on every guilty layer.")] = True,
    max_builds: Annotated[
        int, typer.Option("--max-builds", min=0, help="Most further engines for the search inside a guilty region.")
    ] = 6,
    exporter: flags.CommonExporter = "auto",
    unfolded: Annotated[
        bool, typer.Option("--unfolded", help="Do not fold BatchNorm, to debug module by module.")
    ] = False,
    json: flags.JsonFile = None,
    csv: Annotated[Path | None, typer.Option(help="Write the layer table as CSV; - is stdout.")] = None,
    html: Annotated[Path | None, typer.Option(help="Write the HTML report: one file, works offline.")] = None,
    save: Annotated[Path | None, typer.Option(help="Save result, graphs and captures in this folder.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="--save replaces an earlier run's folder.")] = False,
    *,
    int8: flags.CalibrationFlags,
    engines: tensorrt.ProbeFlags,
    files: flags.ReadingFlags,
) -> None:
    """Run backends side by side; name the layer that is wrong."""
    from contextlib import ExitStack
    from dataclasses import replace

    from cp_debug.backends.spec import BackendSpec, parse_backends
    from cp_debug.reading import RESULT
    from cp_debug.recipes.registry import is_folder

    if other is not None and test_model is not None:
        raise InputError(f"--test-model: {test_model}, but {other} is the second model already; expected one of them")
    test_model = test_model or other
    folder = test_model is not None and is_folder(test_model)
    two = other is not None and (model.endswith(".onnx") or (folder and is_folder(Path(model))))
    chosen = typed(("backends",))
    if two and not chosen:
        backends = "ort,ort"  # two files: the question is what differs between them, not between runtimes
    other_test = test_model or test_checkpoint or test_train_mode * "train mode" or test_out_of_place * "out of place"
    dumped = test_tensors is not None
    refuse(("tensors_precision", "tensors_layout"), unless=dumped, why="it says how to read --test-tensors")
    why = "the test's values are those of --test-tensors"
    refuse(("test_model", "other", "test_checkpoint", "knobs", "maps"), unless=not dumped, why=why)
    refuse(("samples",), unless=not dumped, why="all samples of --test-tensors are used")
    if dumped and not chosen:
        backends = "ort"
    if dumped and "," in backends:
        raise InputError(f"--backends: {backends!r}; with --test-tensors as the test, expected only the reference")
    specs = [BackendSpec.parse(backends)] if dumped else parse_backends(backends, test=other_test)
    tests = specs[1:]
    engines.check(specs, exports=not model.endswith(".onnx"))
    built = any(spec.family == "trt" for spec in specs)
    refuse(("max_builds",), unless=built, why=f"none of {', '.join(map(str, specs))} is TensorRT")
    int8.check(specs, own_scales(specs, model, checkpoint, test_model))
    why = "two other models of the tests; expected one of --test-model and --test-checkpoint"
    refuse(("test_checkpoint",), unless=test_model is None, why=why)
    why = f"{model} holds its weights; --test-model gives the tests another file"
    refuse(("test_checkpoint",), unless=not model.endswith(".onnx"), why=why)
    names = ", ".join(map(str, tests))
    why = f"it changes the torch module, which none of the tests {names} runs; expected torch among them"
    refuse(("test_train_mode", "test_out_of_place"), unless=any(spec.family == "torch" for spec in tests), why=why)
    refuse(("oracle", "explain", "oracle_device"), unless=replay, why="--no-replay leaves nothing to judge or explain")
    refuse(("level", "show_all"), unless=not quiet, why="--quiet shows no layers")
    refuse(("show_all",), unless=level == "layers", why="--level stages shows no layers")
    refuse(("overwrite",), unless=save is not None, why="without --save nothing is kept")
    check_device(oracle_device)
    held = None if memory is None else size_in_bytes(memory, "--memory")
    calibrated = [int8.calib_data] if any("int8" in spec.name for spec in specs) else []
    how = files.checked(model, inputs, samples, *calibrated, checkpoint=checkpoint, test_model=test_model)
    engines.check_installed(specs)
    check_calibration(model, int8.calib_data, int8.calib_samples, reading=how)
    load_torch()
    for device in {spec.device for spec in specs if spec.device and spec.device.startswith("cuda")}:
        start_gpu(device)
    from cp_debug.api.dumps import with_dump
    from cp_debug.bisect.engine import Options
    from cp_debug.bisect.engine import bisect as run
    from cp_debug.recipes.registry import load_model
    from cp_debug.reports.files import write_json

    stack = ExitStack()
    run_folder = save and stack.enter_context(replacing("--save", save, overwrite, has_result))
    if html and save is None:  # the report shows tensors
        run_folder = Path(stack.enter_context(TemporaryDirectory(prefix="cpdebug-")))
    options = Options(
        checkpoint=checkpoint,
        test_checkpoint=test_checkpoint,
        test_train_mode=test_train_mode,
        test_out_of_place=test_out_of_place,
        inputs=inputs,
        samples=samples,
        seed=seed,
        reading=how,
        rtol=rtol,
        atol=atol,
        oracle=None if oracle == "auto" else oracle,
        oracle_device=oracle_device,
        cache=not engines.no_cache,
        memory=held,
        replay=replay,
        explain=explain,
        optimizer_blame=knobs,
        max_builds=max_builds,
        exporter=flags.chosen(exporter),
        folded=not unfolded,
        calibration=int8.chosen,
        maps=maps or (),
        save=run_folder,
    )
    # For a reader whose results go elsewhere; any other finds it with them.
    said_before = errors.print if errors.is_terminal and not console.is_terminal else lambda text: None
    with stack, steps(compares=True) as on_step:
        engine_options = engines.calibrated(model, checkpoint, stack)
        opened_backends: Sequence[Backend] = tensorrt.make(specs, engine_options, on_step)
        subject: str | Model = model
        if test_tensors is not None:
            subject, [_, dump], taken = with_dump(
                load_model(model, inputs=inputs, reading=how),
                backends,
                test_tensors,
                tensors_precision,
                channels_last=tensors_layout == "nhwc",
                flat=tensors_layout == "flat",
                inputs_given=inputs is not None,
                inputs=inputs,
            )
            options = replace(options, samples=taken)
            opened_backends = [*opened_backends, dump]
        test = load_model(str(test_model), reading=how) if folder else test_model
        result = run(subject, opened_backends, test_model=test, options=options, on_step=on_step, on_say=said_before)
        result.command = command_line()
        if html:
            from cp_debug.reports.page import write_page
            from cp_debug.reports.saved import SavedResult

            write_page(SavedResult.of(result, run_folder), html)
        if save:
            assert run_folder is not None
            write_json(result, run_folder / RESULT)
    show(result, json=json, csv=csv, layers=level == "layers", show_all=show_all, quiet=quiet)
    if html and not quiet:
        say(f"written: {html}")
    raise typer.Exit(0 if result.agrees else 1)


def demo(
    fault: Annotated[str | None, typer.Argument(help="A fault to inject; without one, they are listed.")] = None,
    json: flags.JsonFile = None,
    html: Annotated[Path | None, typer.Option(help="Write the HTML report: one file, works offline.")] = None,
) -> None:
    """Watch cpdebug find a known fault in the built-in model."""
    load_torch()
    from cp_debug.bisect.demos import DEMOS
    from cp_debug.bisect.engine import Options, bisect
    from cp_debug.reports.page import write_page
    from cp_debug.reports.saved import SavedResult
    from cp_debug.reports.sheet import Column, Sheet
    from cp_debug.reports.sheet_terminal import Terminal

    if fault is None:
        refuse(("json", "html"), unless=False, why="the list of faults is no result; name a FAULT")
        rows = [(name, each.summary, each.symptom) for name, each in DEMOS.items()]
        console.print(Terminal(Sheet((Column("fault", "name"), Column("what is wrong"), Column("in the field")), rows)))
        console.print("\nrun one:  cpdebug demo weight-scale")
        return
    if fault not in DEMOS:
        hint = did_you_mean(fault, DEMOS) or f"; expected one of {', '.join(DEMOS)}"
        raise InputError(f"FAULT: there is no fault {fault!r}{hint}")
    seeded = DEMOS[fault].seed()
    with TemporaryDirectory(prefix="cpdebug-") as folder, steps() as on_step:
        captures = Path(folder, "kept") if html else None  # the report shows tensors
        result = bisect(
            seeded.model,
            seeded.backends,
            test_model=seeded.test_model,
            options=Options(save=captures),
            on_step=on_step,
        )
        result.command = command_line()
        if html:
            write_page(SavedResult.of(result, captures), html)
    if json != "-":
        console.print(Text.assemble(("injected:", "bold"), f" {DEMOS[fault].summary} ({seeded.where})"))
        console.print(Text.assemble(("in the field:", "bold"), f" {DEMOS[fault].symptom}\n"))
    show(result, json=json, csv=None, rest="--html has all")
    if json != "-":
        console.print(verdict(seeded, result.tests[0]))
    raise typer.Exit(0 if found(seeded, result.tests[0]) else 1)


def found(seeded: Seeded, test: TestResult) -> bool:
    """Whether the guilty layers are the injected ones, no more and no fewer."""
    return [row.name for row in test.rows if seeded.strikes(row.name, row.op)] == [row.name for row in test.guilty]


def verdict(seeded: Seeded, test: TestResult) -> Text:
    """One line: what was found, and what was missed or wrongly accused."""
    injected = [row.name for row in test.rows if seeded.strikes(row.name, row.op)]
    guilty = [row.name for row in test.guilty]
    if found(seeded, test):
        what = f"the {len(guilty)} injected layers" if len(guilty) > 1 else "the one injected layer"
        return Text(f"found: {what}, and no other", "bold green")
    wrong = [f"{name} is innocent" for name in guilty if name not in injected]
    missed = [f"{name} was missed" for name in injected if name not in guilty]
    return Text(f"not found: {'; '.join(wrong + missed)}", "bold red")
