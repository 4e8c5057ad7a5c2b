"""Defaults that a user reads, in ``--help`` or the documentation: Python's functions and classes have the same."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

from cp_debug.bisect.options import Options
from cp_debug.bisect.range_loss import NEGLIGIBLE, RANGE
from cp_debug.bisect.regions.descent import BUILDS
from cp_debug.bisect.replayed import ASKED, EXCESS, FLOOR
from cp_debug.bisect.result_diff import FACTOR
from cp_debug.bisect.scale_replay import SCALE_MARGINS
from cp_debug.bisect.summation import ROUNDING
from cp_debug.cli.main import app
from cp_debug.deploy.bench import bench
from cp_debug.deploy.exporting import DYNAMO_OPSET, OPSET, ExportOptions
from cp_debug.deploy.quantize_narrow import quantize_narrow
from cp_debug.deploy.quantize_output import quantize_ptq
from cp_debug.deploy.runner import deploy
from cp_debug.deploy.stages import Deployment
from cp_debug.deploy.verify import MARGIN, VerifyOptions
from cp_debug.detection.evaluate import evaluate
from cp_debug.detection.evaluation import EvaluationOptions
from cp_debug.mixed_precision.search import MixedPrecisionOptions
from cp_debug.mixed_precision.sensitivity import DRAWS
from cp_debug.programs.export import export
from cp_debug.programs.pipeline import DEFAULT_EXPORT, Export, prepare
from cp_debug.quantization.open_quantized import open_quantized
from cp_debug.quantization.qat import QatOptions
from cp_debug.quantization.qat_centerpoint import finetune_centerpoint
from cp_debug.quantization.quantized_programs import DEFAULT_CALIBRATION, Calibration

DOCS = Path(__file__).parents[1] / "docs"


def of_option(words: str, option: str) -> Any:
    """The default of an option, as the parser has it."""
    command: Any = get_command(app)
    for word in words.split():
        command = command.commands[word]
    return next(p.default for p in command.params if option in p.opts)


def of_parameter(owner: Callable[..., Any], name: str) -> Any:
    """The default of a parameter, or of a dataclass's field."""
    return inspect.signature(owner).parameters[name].default


SAME: list[tuple[Callable[..., Any], str, str, str, Any]] = [
    (Options, "samples", "bisect", "--samples", 1),
    (Options, "seed", "bisect", "--seed", 0),
    (Options, "replay", "bisect", "--replay", True),
    (Options, "explain", "bisect", "--explain", True),
    (Options, "test_train_mode", "bisect", "--test-train-mode", False),
    (Options, "test_out_of_place", "bisect", "--test-out-of-place", False),
    (Options, "optimizer_blame", "bisect", "--knobs", False),
    (Calibration, "samples", "bisect", "--calib-samples", 8),
    (Calibration, "samples", "eval", "--calib-samples", 8),
    (VerifyOptions, "explain", "verify", "--explain", True),
    (bench, "warmup", "bench", "--warmup", 3),
    (bench, "repeats", "bench", "--repeats", 20),
    (Deployment.bench, "batch", "bench", "--batch", 1),
    (Deployment.bench, "warmup", "bench", "--warmup", 3),
    (Deployment.bench, "repeats", "bench", "--repeats", 20),
    (deploy, "fresh", "deploy", "--fresh", False),
    (ExportOptions, "simplify", "export", "--simplify", False),
    (export, "simplify", "export", "--simplify", False),
    (EvaluationOptions, "min_points", "eval", "--min-points", 1),
    (EvaluationOptions, "draws", "eval", "--draws", 1000),
    (EvaluationOptions, "seed", "eval", "--seed", 0),
    (EvaluationOptions, "max_drop", "eval", "--max-drop", 0.01),
    (EvaluationOptions, "t4", "eval", "--t4", False),
    (quantize_ptq, "batches", "quantize ptq", "--batches", 100),
    (quantize_ptq, "overwrite", "quantize ptq", "--overwrite", False),
    (quantize_narrow, "batches", "quantize ptq", "--batches", 100),
    (quantize_narrow, "overwrite", "quantize ptq", "--overwrite", False),
    (open_quantized, "count", "quantize sensitivity", "--batches", 20),
    (QatOptions, "steps", "quantize qat", "--steps", 300),
    (QatOptions, "rate", "quantize qat", "--lr", 5e-4),
    (QatOptions, "interval", "quantize qat", "--interval", 50),
    (QatOptions, "patience", "quantize qat", "--patience", 4),
    (finetune_centerpoint, "batch", "quantize qat", "--batch", 2),
    (finetune_centerpoint, "seed", "quantize qat", "--seed", 0),
    (finetune_centerpoint, "resume", "quantize qat", "--resume", False),
]


@pytest.mark.few(9)
@pytest.mark.parametrize(
    ("owner", "name", "words", "option", "value"), SAME, ids=lambda v: getattr(v, "__qualname__", str(v))
)
def test_python_and_the_command_line_have_the_same_default(
    owner: Callable[..., Any], name: str, words: str, option: str, value: Any
) -> None:
    assert of_parameter(owner, name) == value
    assert of_option(words, option) == value


@pytest.mark.few(6)
@pytest.mark.parametrize("owner", [Options, MixedPrecisionOptions, ExportOptions, evaluate, export, prepare])
@pytest.mark.parametrize("words", ["bisect", "search", "export", "eval"])
def test_batch_norms_are_folded_unless_one_says_unfolded(owner: Callable[..., Any], words: str) -> None:
    assert of_parameter(owner, "folded") is True
    assert of_option(words, "--unfolded") is False


def test_figures_that_stand_in_the_help() -> None:
    assert of_option("diff", "--factor") == FACTOR == 2.0
    assert of_option("bisect", "--max-builds") == BUILDS == 6
    assert of_option("quantize sensitivity", "--draws") == DRAWS == 200
    assert Calibration(samples=8) == DEFAULT_CALIBRATION


def test_results_are_not_taken_from_the_cache_without_being_asked_for() -> None:
    assert Options().cache is False
    assert of_option("bisect", "--no-cache") is False


def test_opsets_are_those_of_the_help() -> None:
    assert of_option("quantize ptq", "--opset") == OPSET == 17
    assert DYNAMO_OPSET == 18
    assert of_parameter(quantize_narrow, "options").opset == 21


def test_limits_of_guilt_are_those_of_the_documentation() -> None:
    text = (DOCS / "thresholds.md").read_text(encoding="utf-8")
    told = dict(re.findall(r"^\| `([A-Z]+)` \| ([\d.]+)", text, flags=re.M))
    code = {"EXCESS": EXCESS, "FLOOR": FLOOR, "ROUNDING": ROUNDING, "RANGE": RANGE, "NEGLIGIBLE": NEGLIGIBLE}
    assert {name: float(value) for name, value in told.items()} == code
    asked, margins = re.search(r"excess of ([\d.]+) \(`ASKED`, half[^`]*? scales ([^%]*) % larger", text).groups()  # type: ignore[union-attr]
    assert float(asked) == ASKED == EXCESS / 2
    assert [1 + int(part) / 100 for part in re.findall(r"\d+", margins)] == pytest.approx(SCALE_MARGINS)


def test_nothing_was_wrong_before_a_tensor_is_read() -> None:
    """Figures of what was not measured are those of what does not diverge."""
    from cp_debug.bisect.replayed import Replay
    from cp_debug.detection.changes import DetectionChange

    for kind in (Replay, DetectionChange):
        for field in dataclasses.fields(kind):
            if field.default is not dataclasses.MISSING and isinstance(field.default, int | float):
                assert not field.default, f"{kind.__name__}.{field.name}"


def test_a_modules_export_is_dynamos_with_its_batch_norms_left_to_the_graph() -> None:
    assert Export() == DEFAULT_EXPORT == Export("dynamo", None, fused=False)


def test_the_room_of_a_verification_is_that_of_the_documentation() -> None:
    text = (DOCS / "deploy.md").read_text(encoding="utf-8")
    assert float(re.search(r"limit of a tensor is (\d+) times the noise", text).group(1)) == MARGIN  # type: ignore[union-attr]
