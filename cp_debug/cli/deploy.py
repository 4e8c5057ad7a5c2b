"""``cpdebug deploy``, ``export``, ``build``, ``verify`` and ``bench``: from a checkpoint to files that are checked."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from cp_debug.backends.spec import BackendSpec, parse_backends
from cp_debug.cli import flags, tensorrt
from cp_debug.cli.console import command_line, console, show_document, show_notes, steps
from cp_debug.cli.flags import LAST_SEED, MOST, check_made_up, grouped
from cp_debug.cli.given import check_configured, check_given, check_installed, check_new
from cp_debug.cli.typed import once, refuse, refuse_export_folder, refuse_seed
from cp_debug.errors import CpdebugError, InputError, system_reason
from cp_debug.files import make_folder
from cp_debug.loading import load_torch
from cp_debug.safe_text import amount

if TYPE_CHECKING:
    from cp_debug.deploy.runner import StageRecord
    from cp_debug.deploy.schema import ScenarioConfig


def deploy(
    config: Annotated[Path, typer.Argument(help="A .yaml, .toml or .json file, or AWML's deploy_config.py.")],
    model: Annotated[str | None, typer.Option(help="For a configuration that names no model, such as AWML's.")] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Run finished stages again.")] = False,
    html: Annotated[Path | None, typer.Option(help="The page.  [default: report.html in the work folder]")] = None,
    json: flags.JsonFile = None,
    rot_y_axis_reference: flags.RotYAxis = False,
    data_root: Annotated[
        Path | None, typer.Option(help="Folder that paths in the info file are relative to.  [default: data.root]")
    ] = None,
    trt_python: tensorrt.Python = None,
) -> None:
    """Export, build, verify and evaluate from one configuration. Exit code 1 when a stage fails.

    A run that was interrupted goes on where it stopped: a stage whose inputs and files are unchanged is not repeated.
    """
    from rich.text import Text

    from cp_debug.deploy.config import named_config, override

    overrides = {
        "tensorrt.python": trt_python,
        "export.rot_y_axis_reference": rot_y_axis_reference or None,
        "data.root": data_root,
    }
    settings = override(named_config(config, model), overrides)
    show_notes(settings.notes)
    check_installed(*settings.backends, trt_python=settings.tensorrt.python)
    if settings.verify.enabled:
        check_configured(settings, settings.verify.samples, flag=f"{config}: data.path")
    if settings.evaluate.enabled:
        check_configured(settings, settings.evaluate.samples, truth=True, flag=f"{config}: data.path")
    engines = settings.export.mode in ("trt", "both") or any(
        "trt" in scenario.test for scenario in settings.scenarios()
    )
    refuse(("data_root",), unless=settings.data.path is not None, why=f"{config} names no data")
    refuse(("trt_python",), unless=engines, why=f"{config} builds no engine")
    load_torch()
    from cp_debug.deploy.runner import deploy as run
    from cp_debug.deploy.stages import Deployment
    from cp_debug.reports.deployment import stage_table, write_summary
    from cp_debug.reports.sheet_terminal import Terminal

    log = DeployLog(settings.log_file)
    for note in settings.notes:
        log.line(note)
    try:
        with steps() as on_step:
            deployment = Deployment(settings, str(config), on_step, on_event=on_step.on_event)
            records = run(deployment, fresh=fresh, on_stage=log.stage)
    except CpdebugError as error:
        with suppress(InputError):  # a full disk is not what ended it
            log.line(str(error))
        raise
    passed = all(record.passed for record in records)
    page = html or settings.work_dir / "report.html"
    write_summary(records, f"{settings.model}, {config.name}", command_line(), page)
    verdict = Text(f"{'✓' if passed else '✗'} {page}", style="green" if passed else "bold red")
    document = {"passed": passed, "stages": {record.name: record.document for record in records}}
    show_document([Terminal(stage_table(records)), verdict], document, json)
    raise typer.Exit(0 if passed else 1)


class DeployLog:
    """Lines with times, appended to a file where there is one. Raises InputError where it cannot be written."""

    def __init__(self, file: Path | None) -> None:
        self._file = file
        if file is not None:
            make_folder(file.parent)

    def line(self, text: str) -> None:
        """Append a line."""
        if self._file is None:
            return
        try:
            with self._file.open("a", encoding="utf-8") as lines:
                lines.write(f"{datetime.now():%Y-%m-%d %H:%M:%S} {text}\n")
        except OSError as error:
            raise InputError(f"{self._file}: the log cannot be written ({system_reason(error)})") from None

    def stage(self, name: str, record: StageRecord | None) -> None:
        """Append that a stage begins (no record), or what it gave."""
        if record is None:
            self.line(f"{name}: begins")
            return
        outcome = "as before" if record.resumed else f"{record.seconds:.1f} s"
        self.line(f"{name}: {'passed' if record.passed else 'FAILED'}, {outcome}: {record.line}")


OLDEST_EXPORTED = 11
"""Oldest opset to which a torch module is exported."""


def export(
    model: flags.ModelName,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the files.")],
    checkpoint: flags.PlainCheckpoint = None,
    opset: Annotated[
        int | None,
        typer.Option(min=7, max=100, help="TensorRT 8 reads up to 17.  [default: 17; that of an ONNX file]"),
    ] = None,
    exporter: Annotated[
        flags.Exporter, typer.Option(help="auto: TorchScript below opset 18, dynamo from there.")
    ] = "auto",
    unfolded: Annotated[bool, typer.Option("--unfolded", help="Do not fold BatchNorm and constants.")] = False,
    simplify: Annotated[bool, typer.Option("--simplify", help="Run onnxscript's optimizer over the graph.")] = False,
    rot_y_axis_reference: flags.RotYAxis = False,
    quantized: Annotated[
        Path | None, typer.Option(help="Checkpoint of `quantize ptq` or `qat`: the files get its Q/DQ pairs.")
    ] = None,
    inputs: Annotated[Path | None, typer.Option(help="Samples to export and compare with; default: generated.")] = None,
    seed: flags.MadeSeed = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier export in --output.")] = False,
) -> None:
    """Export a model's components as ONNX files. Their batch and spatial axes are free; each file is aligned with
    its module and checked on two inputs of different sizes.

    An ONNX file is checked, brought to --opset by ONNX's own converter, and compared with the original by ONNX Runtime.
    """
    is_file = model.endswith(".onnx")
    of_modules = ("checkpoint", "exporter", "unfolded", "rot_y_axis_reference", "quantized")
    refuse(of_modules, unless=not is_file, why=f"{model} is an ONNX file, which no torch module is exported for")
    if not is_file and opset is not None and opset < OLDEST_EXPORTED:
        raise InputError(f"--opset: {opset}; expected {OLDEST_EXPORTED} or more to export a torch module")
    refuse_seed([model], inputs)
    check_given(model, inputs=inputs, checkpoint=checkpoint)
    load_torch()
    from cp_debug.deploy.exporting import OPSET, SAMPLES, ExportOptions, export_files, export_model, own_files
    from cp_debug.deploy.quantize_output import export_quantized
    from cp_debug.deploy.stages import turn_outputs
    from cp_debug.files import resolved
    from cp_debug.quantization.open_quantized import open_quantized
    from cp_debug.recipes.abilities import Remarks
    from cp_debug.recipes.registry import load_model
    from cp_debug.reports.deployment import export_lines

    loaded = load_model(model, checkpoint=checkpoint, seed=seed)
    originals = {resolved(component.onnx_path) for component in loaded.components if component.onnx_path is not None}
    files = [output / f"{component.name}.onnx" for component in loaded.components]
    check_new("--output", (file for file in files if resolved(file) not in originals), overwrite)
    if rot_y_axis_reference:
        turn_outputs(loaded)
    options = ExportOptions(opset or OPSET, flags.chosen(exporter), not unfolded, simplify)
    with steps() as on_step:
        samples = list(loaded.samples(SAMPLES if is_file else 1, seed, inputs))
        remarks = Remarks(loaded)
        for sample in samples:
            remarks.see(sample)
        show_notes(remarks.sentences)
        if is_file:
            programs = own_files(loaded) or []
            exported = export_files(loaded, programs, samples, output, opset=opset, simplify=simplify, on_step=on_step)
        elif quantized is None:
            exported = export_model(loaded, samples[0], output, options, on_step=on_step)
        else:
            opened = open_quantized(loaded, quantized)
            exported = export_quantized(loaded, opened, samples[0], output, options, on_step=on_step)
    for line in export_lines(exported):
        console.print(line, soft_wrap=True)


PrecisionPolicy = Literal["auto", "fp32", "fp32_tf32", "fp16", "bf16", "int8", "strongly_typed"]
"""Precisions that TensorRT may compute in."""


@grouped
def build(
    model: flags.ModelOrConfig,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the engines.")],
    precision: Annotated[
        PrecisionPolicy | None, typer.Option(help="auto sets no flag: TensorRT then uses TF32.  [default: auto]")
    ] = None,
    onnx_dir: flags.OnnxFolder = None,
    checkpoint: flags.PlainCheckpoint = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace earlier engines in --output.")] = False,
    *,
    engines: tensorrt.RangeFlags,
) -> None:
    """Build TensorRT engines, one for each component. A manifest beside them is checked before one is loaded."""
    from contextlib import ExitStack

    from cp_debug.deploy.schema import SUFFIXES, VARIANTS

    profiles = engines.profiles
    if not model.endswith(SUFFIXES):  # a configuration may name another interpreter
        check_given(model, checkpoint=checkpoint)
        refuse_export_folder(model)
        policy = precision or "auto"
        backend_name = f"trt-{VARIANTS.get(policy, policy)}"
        _refuse_ranges(backend_name)
        check_installed(backend_name, trt_python=engines.trt_python)
    load_torch()
    from cp_debug.deploy.config import override
    from cp_debug.deploy.engines import MANIFEST, build_engines
    from cp_debug.deploy.stages import Deployment, configured

    check_new("--output", [output / MANIFEST], overwrite)
    with ExitStack() as stack, steps() as on_step:
        scratch = stack.enter_context(TemporaryDirectory(prefix="cpdebug-"))
        config, source = configured(model, None, Path(scratch))
        show_notes(config.notes)
        overrides = {
            "checkpoint": checkpoint,
            "tensorrt.precision": precision,
            "tensorrt.python": engines.trt_python,
            "tensorrt.workspace_mib": engines.workspace,
            "tensorrt.timing_cache": engines.timing_cache,
            "tensorrt.keep_fp32": list(tensorrt.named(engines.keep_fp32)) if engines.keep_fp32 else None,
        }
        config = override(config, overrides)
        refuse_export_folder(config.model or "")
        options: dict[str, Any] = {"on_event": on_step.on_event, "calibration_cache": engines.calibration_cache}
        options |= {"profiles": profiles} if profiles else {}
        assert config.model is not None
        _refuse_ranges(config.engine_backend)
        spec = BackendSpec.parse(config.engine_backend)
        strongly_typed = config.tensorrt.precision == "strongly_typed"
        why = f"{spec} computes nothing in less than FP32 or TF32; expected --precision fp16, bf16 or int8"
        refuse(("keep_fp32",), unless=tensorrt.keeps_fp32(spec) or strongly_typed, why=why)
        options |= engines.calibration(config.model, config.checkpoint, stack)
        deployment = Deployment(config, source, on_step, **options)
        backend = deployment.backend(config.engine_backend)  # before the export: it may be missing here
        if onnx_dir is None:
            deployment.ensure_files()
        kept_by = "--keep-fp32" if engines.keep_fp32 else deployment.kept_by
        built = build_engines(deployment.programs(onnx_dir), backend, output, deployment.engine_files, on_step, kept_by)
    for engine in built:
        console.print(
            f"{output / engine.file}: built in {engine.seconds:.1f} s; layer inputs and outputs: {engine.types}"
        )


def _refuse_ranges(backend: str) -> None:
    """Refuse the flags about TensorRT's own calibration for a ``backend`` that has none."""
    refuse(tensorrt.RANGES, unless=backend in tensorrt.CALIBRATED, why=f"{backend} is built; expected --precision int8")


@grouped
def bench(
    model: flags.ModelOrConfig = "centerpoint:tiny",
    backends: Annotated[str, typer.Option("--backends", "-b", help="Ratios refer to the first one.")] = (
        "torch,ort,ort-all"
    ),
    onnx_dir: flags.OnnxFolder = None,
    recipe: Annotated[str | None, typer.Option("--model", help="For a configuration that names no model.")] = None,
    checkpoint: flags.Checkpoint = None,
    inputs: Annotated[Path | None, typer.Option(help="Files or a folder, as for bisect, or an info file.")] = None,
    batch: Annotated[int, typer.Option(min=1, max=MOST, help="Clouds in one pass (CenterPoint).")] = 1,
    warmup: Annotated[int, typer.Option(min=0, max=MOST, help="Warm-up passes.")] = 3,
    repeats: Annotated[int, typer.Option("--repeats", "-n", min=1, max=MOST, help="Timed passes.")] = 20,
    json: flags.JsonFile = None,
    trt_python: tensorrt.Python = None,
    *,
    files: flags.ReadingFlags,
) -> None:
    """Measure latency and memory on each backend. Every component, the glue in front of it, decoding and the
    whole are timed, with percentiles."""
    from cp_debug.deploy.schema import SUFFIXES

    if not model.endswith(SUFFIXES):
        check_given(model, checkpoint=checkpoint)
    load_torch()
    from cp_debug.deploy.config import override
    from cp_debug.deploy.stages import Deployment, configured
    from cp_debug.reports.deployment import latency_table
    from cp_debug.reports.sheet_terminal import Terminal

    with TemporaryDirectory(prefix="cpdebug-") as scratch, steps() as on_step:
        config, source = configured(model, recipe, Path(scratch))
        show_notes(config.notes)
        specs = [part.strip() for part in backends.split(",") if part.strip()]
        if not specs:
            raise InputError(f"--backends: {backends!r} names none; expected at least one, such as torch,ort")
        parsed = [BackendSpec.parse(spec) for spec in specs]
        why = f"none of {', '.join(specs)} is TensorRT"
        refuse(("trt_python",), unless=any(spec.family == "trt" for spec in parsed), why=why)
        why = f"{source} is a model, not a configuration"
        refuse(("recipe",), unless=config.model != model, why=why)
        on_the_fly = config.quantization is None and any("int8" in spec.name for spec in parsed)
        overrides = {"checkpoint": checkpoint, "data.path": inputs, "tensorrt.python": trt_python}
        config = override(config, {**overrides, "quantization": {"samples": 8} if on_the_fly else None})
        refuse_export_folder(config.model or "")
        how = files.chosen(config.model or "", config.data.path)
        check_configured(config, batch, reading=how)
        deployment = Deployment(config, source, on_step, how, on_event=on_step.on_event)
        benches = deployment.bench(specs, onnx_dir, batch=batch, warmup=warmup, repeats=repeats)
    show_notes(deployment.remarks.sentences)
    document = {"model": config.model, "batch": batch, "warmup": warmup, "repeats": repeats}
    title = f"{config.model}, batch {batch}, {repeats} passes after {warmup}"
    show_document(
        [Terminal(latency_table(benches, title))],
        {**document, "backends": [backend_bench.to_dict() for backend_bench in benches]},
        json,
    )


@grouped
def verify(
    model: flags.ModelOrConfig,
    scenario: Annotated[
        list[str] | None, typer.Option("--scenario", "-s", help="REFERENCE,TEST, as torch@cpu,ort@cpu; repeatable.")
    ] = None,
    backends: Annotated[
        str | None, typer.Option("--backends", "-b", help="Reference first, then the tests: a scenario for each test.")
    ] = None,
    onnx_dir: flags.OnnxFolder = None,
    test_model: Annotated[
        Path | None, typer.Option(help="Another .onnx for the tests (a folder, for several components).")
    ] = None,
    maps: flags.Maps = None,
    recipe: Annotated[str | None, typer.Option("--model", help="For a configuration that names no model.")] = None,
    checkpoint: flags.PlainCheckpoint = None,
    inputs: Annotated[Path | None, typer.Option(help="Files or a folder, as for bisect, or an info file.")] = None,
    samples: Annotated[int | None, typer.Option(min=1, max=MOST, help="How many samples.  [default: 3]")] = None,
    seed: Annotated[
        int | None,
        typer.Option(min=0, max=LAST_SEED, help="Seed of inputs; first synthetic scene.  [default: 0]"),
    ] = None,
    tolerance: Annotated[
        list[str] | None,
        typer.Option(help="TENSOR=X, PRECISION=X or TENSOR@PRECISION=X: relative L2; else limits come from the noise."),
    ] = None,
    max_abs: Annotated[float | None, typer.Option(min=0.0, help="Additional limit of max |Δ|.")] = None,
    voxels: Annotated[
        Path | None, typer.Option(help="First sample's voxels, num_points, coors (.npz), by the test's own code.")
    ] = None,
    explain: Annotated[bool, typer.Option(help="Bisect what fails.")] = True,
    junit: Annotated[Path | None, typer.Option(help="Write JUnit XML.")] = None,
    json: flags.JsonFile = None,
    trt_python: tensorrt.Python = None,
    *,
    files: flags.ReadingFlags,
) -> None:
    """Compare every output of every component with the reference. Several samples; exit code 1 if one is off.

    Limits are multiples of the noise that rounding makes in this very network; NaN and Inf always fail. What fails is
    bisected, and the summary names the layer.
    """
    from cp_debug.deploy.schema import SUFFIXES

    refuse(("backends",), unless=not scenario, why="--scenario says which backends are compared")
    if not model.endswith(SUFFIXES):
        check_made_up(samples or 1, inputs)
        check_given(model, checkpoint=checkpoint)
    load_torch()
    from cp_debug.deploy.config import override
    from cp_debug.deploy.stages import Deployment, configured
    from cp_debug.files import write_text
    from cp_debug.programs.precision import coarsest
    from cp_debug.recipes.centerpoint.recipe import CenterPointModel
    from cp_debug.reports.deployment import render_junit, render_verification

    with TemporaryDirectory(prefix="cpdebug-") as scratch, steps() as on_step:
        config, source = configured(model, recipe, Path(scratch))
        show_notes(config.notes)
        overrides = {
            "checkpoint": checkpoint,
            "data.path": inputs,
            "data.first": seed,
            "tensorrt.python": trt_python,
            "verify.samples": samples,
            "verify.tolerances": {**config.verify.tolerances, **parse_tolerances(tolerance or ())},
            "verify.max_abs": max_abs,
            "verify.scenarios": parse_scenarios(scenario, repeats=test_model is not None)
            if scenario
            else each_test(backends, repeats=test_model is not None)
            if backends is not None
            else None,
        }
        config = override(config, overrides)
        specs = [
            spec for scenario_config in config.scenarios() for spec in (scenario_config.reference, scenario_config.test)
        ]
        why = f"none of {', '.join(dict.fromkeys(specs))} is TensorRT"
        refuse(("trt_python",), unless=any(spec.startswith("trt") for spec in specs), why=why)
        refuse(("recipe",), unless=config.model != model, why=f"{source} is a model, not a configuration")
        refuse(("maps",), unless=test_model is not None, why="without --test-model both sides run one file")
        refuse_export_folder(config.model or "")
        check_made_up(config.verify.samples, config.data.path)
        if config.model:
            refuse_seed([config.model], config.data.path, config.verify.samples)
        how = files.chosen(config.model or "", config.data.path)
        check_configured(config, config.verify.samples, test_model=test_model, reading=how)
        deployment = Deployment(config, source, on_step, how, on_event=on_step.on_event)
        why = f"{config.model} makes no voxels here; expected a CenterPoint"
        refuse(("voxels",), unless=voxels is None or isinstance(deployment.model, CenterPointModel), why=why)
        judged = {
            coarsest(deployment.backend(s.reference).precision, deployment.backend(s.test).precision).name
            for s in config.scenarios()
        }
        check_precisions(parse_tolerances(tolerance or ()), judged)
        result = deployment.verify(onnx_dir, test_model=test_model, maps=maps or (), voxels=voxels, explain=explain)
    show_document(render_verification(result), result.to_dict(), json)
    if junit:
        write_text(render_junit(result), junit)
    raise typer.Exit(0 if result.passed else 1)


def parse_scenarios(texts: Sequence[str], *, repeats: bool = False) -> list[ScenarioConfig]:
    """Parse ``torch@cpu,ort@cpu`` texts as references and tests.

    ``repeats``: the test runs another model, so it may run on the reference's backend. Raises InputError for a text
    that is none.
    """
    from dataclasses import replace

    from cp_debug.deploy.schema import ScenarioConfig

    scenarios = []
    for text in texts:
        count = sum(bool(part.strip()) for part in text.split(","))
        if count != 2 and not (repeats and count == 1):
            raise InputError(f"--scenario: {text!r} names {amount(count, 'backend')}; expected REFERENCE,TEST")
        reference, test = parse_backends(text, test=repeats)
        test = replace(test, test="")
        scenarios.append(ScenarioConfig(reference=str(reference), test=str(test)))
    return scenarios


def each_test(text: str, *, repeats: bool = False) -> list[ScenarioConfig]:
    """Parse ``torch,ort,ort-all`` as a reference and its tests, a scenario for each of these.

    ``repeats``: the tests run another model, so one may run on the reference's backend. Raises InputError for a text
    that is none.
    """
    names = [part.strip() for part in text.split(",")]
    if not all(names) or len(names) < (1 if repeats else 2):
        raise InputError(f"--backends: {text!r}; expected a reference and at least one test, as in torch,ort")
    return parse_scenarios([f"{names[0]},{test}" for test in names[1:]] or names, repeats=repeats)


def parse_tolerances(texts: Sequence[str]) -> dict[str, float]:
    """Parse ``heatmap=1e-3`` texts as name → limit. Raises InputError for a text that is none."""
    return once(map(_tolerance, texts), "--tolerance")


def _tolerance(text: str) -> tuple[str, float]:
    name, _, value = text.partition("=")
    try:
        limit = float(value)
        if not name or not math.isfinite(limit):
            raise ValueError
    except ValueError:
        raise InputError(f"--tolerance: {text!r}; expected NAME=NUMBER, such as heatmap=1e-3") from None
    return name, limit


def check_precisions(given: Iterable[str], compared: Collection[str]) -> None:
    """Raise InputError for a tolerance of a precision in which no scenario is judged."""
    from cp_debug.programs.precision import PRECISIONS

    for name in given:
        precision = name.rpartition("@")[2]
        if (name in PRECISIONS or "@" in name) and precision in PRECISIONS and precision not in compared:
            judged = ", ".join(sorted(compared))
            raise InputError(f"--tolerance: {name} would do nothing here: the scenarios are judged as {judged}")
