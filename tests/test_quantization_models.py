"""Whole models in INT8, and ``cpdebug quantize ptq``."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import get_args

import nets
import numpy as np
import pytest
import torch
from extras import needs
from typer.testing import CliRunner

from cp_debug.cli.main import app
from cp_debug.deploy.exporting import load_exported
from cp_debug.deploy.quantize_output import FILE, cache_file, read_caches
from cp_debug.errors import InputError
from cp_debug.graph.graph import Graph
from cp_debug.programs.batchnorm_folding import fuse_model_bn
from cp_debug.programs.walk import run_module
from cp_debug.quantization.calibration import CalibrationManager
from cp_debug.quantization.checkpoint import load_ptq_model
from cp_debug.quantization.histogram import METHODS
from cp_debug.quantization.models import output_sqnr, quantize_model, reapply_scales
from cp_debug.quantization.ptq import quantized
from cp_debug.recipes.base import Model, Sample
from cp_debug.recipes.registry import load_model

pytestmark = needs("modelopt")
ENCODER, BACKBONE = "pts_voxel_encoder", "pts_backbone_neck_head"


@pytest.fixture(scope="module")
def model() -> Model:
    return load_model("centerpoint:tiny")


@pytest.fixture(scope="module")
def samples(model: Model) -> list[Sample]:
    return list(model.samples(4, 1000, None))


def rms_db(sqnr: dict[str, float]) -> float:
    """From the root mean square of the outputs' relative errors."""
    return -10 * math.log10(sum(10 ** (-value / 10) for value in sqnr.values()) / len(sqnr))


def test_every_component_is_calibrated_on_what_it_is_fed(model: Model, samples: list[Sample]) -> None:
    made = quantize_model(model, iter(samples), method="max", skip_layers=["*.task_heads.1.*", "pts_neck"])
    features = [model.feed(model.components[0], sample, {})["input_features"] for sample in samples]
    encoder = made[ENCODER].scales.layers["pts_voxel_encoder.pfn_layers.0.linear"]
    assert encoder.input == max(np.abs(array).max() for array in features)
    results = {ENCODER: run_module(model.components[0], {"input_features": features[0]})}
    canvas = model.feed(model.components[1], samples[0], results)["spatial_features"]
    layers = made[BACKBONE].scales.layers
    assert layers["pts_backbone.blocks.0.0"].input >= canvas.max() > 0
    assert not any("task_heads.1" in name or name.startswith("pts_neck") for name in layers)


@pytest.mark.slow
def test_mse_beats_percentiles_at_the_outputs(model: Model, samples: list[Sample]) -> None:
    component = model.components[1]
    encoder = {component.name: component.module for component in model.components[:1]}

    def canvas(sample: Sample) -> tuple[torch.Tensor]:
        fed = model.feed(model.components[0], sample, {})
        results = {ENCODER: run_module(model.components[0], fed)}
        return (torch.from_numpy(model.feed(component, sample, results)["spatial_features"]),)

    batches = [canvas(sample) for sample in samples]
    folded = fuse_model_bn(component.module, batches[0])
    held_out = list(model.samples(2, 0, None))

    def sqnr(method: str, percentile: float = 99.99) -> float:
        manager = CalibrationManager(folded, method=method, percentile=percentile)
        manager.calibrate(batches)
        found = output_sqnr(model, encoder | {BACKBONE: quantized(manager)}, held_out)
        return rms_db({name: value for name, value in found.items() if name.startswith(BACKBONE)})

    least = sqnr("mse")
    assert least > 20
    assert all(least > other + 1 for other in (sqnr("percentile", 99.9), sqnr("percentile"), sqnr("max")))


def test_bad_samples_and_globs(model: Model, samples: list[Sample]) -> None:
    with pytest.raises(InputError, match="no calibration data"):
        quantize_model(model, [])
    with pytest.raises(InputError, match=r"no layer matches 'pts_bakbone.\*'; the nearest names are pts_backbone"):
        quantize_model(model, samples, skip_layers=["pts_bakbone.*"])
    points = samples[1].arrays["points"].copy()
    points[5, 3] = np.inf
    broken = Sample({"points": points}, "scan 12")
    with pytest.raises(InputError, match="scan 12: calibration batch 1: the input 'input_features' holds"):
        quantize_model(model, [samples[0], broken])


def run(*args: object) -> str:
    result = CliRunner().invoke(app, ["quantize", "ptq", *map(str, args)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    folder = tmp_path_factory.mktemp("ptq") / "out"
    options = ("--batches", 2, "--skip-layers", "pts_voxel_encoder", "--method", "percentile", "--json", "-")
    return folder, json.loads(run("centerpoint:tiny", "-o", folder, *options))


def test_what_ptq_writes(written: tuple[Path, dict], model: Model) -> None:
    folder, document = written
    assert sorted(path.name for path in folder.iterdir()) == sorted(Path(file).name for file in document["files"])
    programs = {program.name: program for program in load_exported(model, folder)}
    assert programs[ENCODER].graph.precision == "fp32"
    graph = programs[BACKBONE].graph
    assert graph.precision == "int8"
    assert sum(node.op == "QuantizeLinear" for node in graph.nodes) > 36
    assert programs[BACKBONE].alignment is not None
    assert document["sqnr_db"]["pts_backbone_neck_head/task0.heatmap"] > 10
    rows = {row["name"]: row for row in document["components"][ENCODER]["quantizers"]}
    assert rows["pfn_layers.0.linear.weight_quantizer"]["why"] == "skipped by 'pts_voxel_encoder'"
    assert document["components"][BACKBONE]["layers"] == 37


def test_checkpoint_and_cache_of_ptq_give_the_same_model(written: tuple[Path, dict], model: Model) -> None:
    folder, _ = written
    sample = next(iter(model.samples(1, 0, None)))
    again = reapply_scales(model, sample, read_caches(model, folder))
    canvas = torch.rand(1, 32, 128, 128)
    with torch.no_grad():
        expected = load_ptq_model(model.components[1].module, folder / FILE, BACKBONE)(canvas)
        found = again[BACKBONE].module(canvas)
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


def test_cache_of_another_model_is_refused(written: tuple[Path, dict], tmp_path: Path) -> None:
    other = load_model("centerpoint:tiny", seed=1)
    state = {name: tensor * 1.5 for name, tensor in other.network.state_dict().items()}
    torch.save(state, tmp_path / "other.pt")
    with pytest.raises(InputError, match="calibrated on other weights"):
        run("centerpoint:tiny", "--checkpoint", tmp_path / "other.pt", "--cache", written[0], "-o", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_onnx_file_is_quantized_by_its_nodes(tmp_path: Path) -> None:
    path = nets.residual(tmp_path / "net.onnx")
    document = json.loads(run(path, "-o", tmp_path / "out", "--batches", 3, "--json", "-"))
    (name,) = document["components"]
    graph = Graph(tmp_path / "out" / f"{name}.onnx")
    assert graph.precision == "int8"
    assert document["components"][name]["adds"] == 2
    assert all(value > 15 for value in document["sqnr_db"].values())
    cache = cache_file(tmp_path / "out", name)
    run(path, "-o", tmp_path / "again", "--cache", cache)
    assert Graph(tmp_path / "again" / f"{name}.onnx").digest == graph.digest
    with pytest.raises(InputError, match="calibrated on another graph"):
        run(
            nets.second_like(tmp_path / "other.onnx"),
            "-o",
            tmp_path / "x",
            "--cache",
            cache_file(tmp_path / "out", name),
        )


def test_any_torch_module(tmp_path: Path) -> None:
    source = tmp_path / "quantized_by_ptq.py"
    source.write_text(
        "import torch\n"
        "def build():\n"
        "    torch.manual_seed(0)\n"
        "    net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU())\n"
        "    return net.eval(), torch.randn(1, 3, 8, 8)\n"
    )
    out = run(f"{source}:build", "-o", tmp_path / "out", "--batches", 4)
    assert re.search(r"^0 +[0-9.]+ ", out, re.MULTILINE)  # a row for the layer
    assert (tmp_path / "out" / "Sequential.onnx").is_file()


def test_methods_on_the_command_line_are_those_that_exist() -> None:
    from cp_debug.cli.flags import Method

    assert get_args(Method) == METHODS
