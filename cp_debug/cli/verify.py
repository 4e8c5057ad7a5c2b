"""``cpdebug verify``: checks that the deployed files compute what the model computes."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cp_debug.cli import flags, tensorrt
from cp_debug.cli.flags import LAST_SEED, MOST, check_made_up, grouped
from cp_debug.cli.given import check_configured, check_given
from cp_debug.cli.typed import once, refuse, refuse_export_folder, refuse_seed
from cp_debug.loading import load_torch
from cp_debug.safe_text import amount

if TYPE_CHECKING:
    from cp_debug.deploy.schema import ScenarioConfig


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
    from tempfile import TemporaryDirectory

    from cp_debug.cli.console import show_document, show_notes, steps
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
    from cp_debug.reports.verification import render, render_junit

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
    show_document(render(result), result.to_dict(), json)
    if junit:
        write_text(render_junit(result), junit)
    raise typer.Exit(0 if result.passed else 1)


def parse_scenarios(texts: Sequence[str], *, repeats: bool = False) -> list[ScenarioConfig]:
    """Parse ``torch@cpu,ort@cpu`` texts as references and tests.

    ``repeats``: the test runs another model, so it may run on the reference's backend. Raises InputError for a text
    that is none.
    """
    from dataclasses import replace

    from cp_debug.backends.spec import parse_backends
    from cp_debug.deploy.schema import ScenarioConfig
    from cp_debug.errors import InputError

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
    from cp_debug.errors import InputError

    names = [part.strip() for part in text.split(",")]
    if not all(names) or len(names) < (1 if repeats else 2):
        raise InputError(f"--backends: {text!r}; expected a reference and at least one test, as in torch,ort")
    return parse_scenarios([f"{names[0]},{test}" for test in names[1:]] or names, repeats=repeats)


def parse_tolerances(texts: Sequence[str]) -> dict[str, float]:
    """Parse ``heatmap=1e-3`` texts as name → limit. Raises InputError for a text that is none."""
    return once(map(_tolerance, texts), "--tolerance")


def _tolerance(text: str) -> tuple[str, float]:
    from cp_debug.errors import InputError

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
    from cp_debug.errors import InputError
    from cp_debug.programs.precision import PRECISIONS

    for name in given:
        precision = name.rpartition("@")[2]
        if (name in PRECISIONS or "@" in name) and precision in PRECISIONS and precision not in compared:
            judged = ", ".join(sorted(compared))
            raise InputError(f"--tolerance: {name} would do nothing here: the scenarios are judged as {judged}")
