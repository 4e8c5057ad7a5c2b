"""``cpdebug bisect``: the main job."""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cp_debug.cli import calibration, reading, tensorrt
from cp_debug.cli.flags import (
    MOST,
    Atol,
    Checkpoint,
    JsonFile,
    MadeSeed,
    ModelName,
    Rtol,
    check_device,
    grouped,
    size_in_bytes,
)
from cp_debug.cli.saving import has_result, replacing
from cp_debug.cli.typed import refuse, typed
from cp_debug.loading import load_torch, start_gpu

if TYPE_CHECKING:
    from cp_debug.backends.base import Backend
    from cp_debug.recipes.base import Model


class Level(str, Enum):
    """Fineness of the tables."""

    stages = "stages"
    layers = "layers"


class Exporter(str, Enum):
    """Torch's ONNX exporters, one of which makes the deployed graph."""

    auto = "auto"
    dynamo = "dynamo"
    torchscript = "torchscript"

    @property
    def chosen(self) -> str | None:
        """Name of the exporter; None leaves the choice to whoever exports."""
        return None if self is Exporter.auto else self.value


class DumpLayout(str, Enum):
    """Order of the numbers of dumped tensors: the graph's, channels last, or the graph's without its axes."""

    nchw = "nchw"
    nhwc = "nhwc"
    flat = "flat"


class Oracle(str, Enum):
    """The arithmetic that judges."""

    auto = "auto"
    fp32 = "fp32"
    fp64 = "fp64"


@grouped
def bisect(
    model: ModelName = "centerpoint:tiny",
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
        DumpLayout,
        typer.Option(help="Layout of --test-tensors; flat: row by row, without the graph's axes."),
    ] = DumpLayout.nchw,
    maps: Annotated[
        list[str] | None,
        typer.Option("--map", help="REFERENCE=TEST: compare these two values; OUTPUT=: leave one out; repeatable."),
    ] = None,
    checkpoint: Checkpoint = None,
    test_checkpoint: Annotated[Path | None, typer.Option(help="Other weights for the test backends.")] = None,
    test_train_mode: Annotated[bool, typer.Option(help="Run the test's module in train mode.")] = False,
    test_out_of_place: Annotated[bool, typer.Option(help="Replace the test's in-place activations.")] = False,
    inputs: Annotated[Path | None, typer.Option(help=reading.INPUTS_HELP)] = None,
    samples: Annotated[int, typer.Option(min=1, max=MOST, help="How many samples.")] = 1,
    seed: MadeSeed = 0,
    level: Annotated[Level, typer.Option(help="stages: only the stage table.")] = Level.layers,
    show_all: Annotated[
        bool, typer.Option("--all", help="Every layer, not only those near the first divergent one.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Only the verdict, one line for each test.")] = False,
    rtol: Rtol = None,
    atol: Atol = None,
    oracle: Annotated[Oracle, typer.Option(help="auto: FP64 for FP32 tests, FP32 below.")] = Oracle.auto,
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
    exporter: Annotated[Exporter, typer.Option(help="For torch models; auto: what all backends read.")] = Exporter.auto,
    unfolded: Annotated[
        bool, typer.Option("--unfolded", help="Do not fold BatchNorm, to debug module by module.")
    ] = False,
    json: JsonFile = None,
    csv: Annotated[Path | None, typer.Option(help="Write the layer table as CSV; - is stdout.")] = None,
    html: Annotated[Path | None, typer.Option(help="Write the HTML report: one file, works offline.")] = None,
    save: Annotated[Path | None, typer.Option(help="Save result, graphs and captures in this folder.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="--save replaces an earlier run's folder.")] = False,
    *,
    int8: calibration.CalibrationFlags,
    engines: tensorrt.ProbeFlags,
    files: reading.ReadingFlags,
) -> None:
    """Run backends side by side; name the layer that is wrong."""
    from contextlib import ExitStack
    from dataclasses import replace
    from tempfile import TemporaryDirectory

    from cp_debug.backends.spec import BackendSpec, parse_backends
    from cp_debug.cli.console import command_line, console, errors, say, show, steps
    from cp_debug.errors import InputError
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
    int8.check(specs, calibration.own_scales(specs, model, checkpoint, test_model))
    why = "two other models of the tests; expected one of --test-model and --test-checkpoint"
    refuse(("test_checkpoint",), unless=test_model is None, why=why)
    why = f"{model} holds its weights; --test-model gives the tests another file"
    refuse(("test_checkpoint",), unless=not model.endswith(".onnx"), why=why)
    names = ", ".join(map(str, tests))
    why = f"it changes the torch module, which none of the tests {names} runs; expected torch among them"
    refuse(("test_train_mode", "test_out_of_place"), unless=any(spec.family == "torch" for spec in tests), why=why)
    refuse(("oracle", "explain", "oracle_device"), unless=replay, why="--no-replay leaves nothing to judge or explain")
    refuse(("level", "show_all"), unless=not quiet, why="--quiet shows no layers")
    refuse(("show_all",), unless=level is Level.layers, why="--level stages shows no layers")
    refuse(("overwrite",), unless=save is not None, why="without --save nothing is kept")
    check_device(oracle_device)
    held = None if memory is None else size_in_bytes(memory, "--memory")
    calibrated = [int8.calib_data] if any("int8" in spec.name for spec in specs) else []
    how = files.checked(model, inputs, samples, *calibrated, checkpoint=checkpoint, test_model=test_model)
    engines.check_installed(specs)
    calibration.check_calibration(model, int8.calib_data, int8.calib_samples, reading=how)
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
        oracle=None if oracle is Oracle.auto else oracle.value,
        oracle_device=oracle_device,
        cache=not engines.no_cache,
        memory=held,
        replay=replay,
        explain=explain,
        optimizer_blame=knobs,
        max_builds=max_builds,
        exporter=exporter.chosen,
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
                channels_last=tensors_layout is DumpLayout.nhwc,
                flat=tensors_layout is DumpLayout.flat,
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
    show(result, json=json, csv=csv, layers=level is Level.layers, show_all=show_all, quiet=quiet)
    if html and not quiet:
        say(f"written: {html}")
    raise typer.Exit(0 if result.agrees else 1)
