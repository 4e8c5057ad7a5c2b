"""Sweeps of each kind: tasks are the same wherever they run, and what they merge to is what the plain command says."""

from __future__ import annotations

import csv
import json
import math
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pandas as pd
import pytest
import torch
from extras import needs
from nets import NetBuilder, second_like
from onnx import numpy_helper
from test_cli import run as cli

from cp_debug.backends.registry import create
from cp_debug.backends.spec import BackendSpec, parse_backends
from cp_debug.bisect.engine import Options, bisect
from cp_debug.cli.sweep import _progress_on
from cp_debug.detection.evaluate import as_detector, evaluate
from cp_debug.detection.evaluation import EvaluationOptions
from cp_debug.errors import InputError
from cp_debug.probes.caveats import ALL_ZERO
from cp_debug.quantization.quantized_programs import Calibration
from cp_debug.recipes.data.base import DataOptions
from cp_debug.recipes.registry import load_model
from cp_debug.reports.sweep import section
from cp_debug.sweep import bisecting, evaluating, sensitivity
from cp_debug.sweep.prepared import Grid
from cp_debug.sweep.run import Progress
from cp_debug.sweep.tasks import Task, run_task
from cp_debug.sweep.workers import needs_gpu

INT8 = {"data": None, "samples": 2, "method": "max", "skip_layers": []}
HOW = {"rtol": None, "atol": None, "explain": False, "calibration": INT8}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """As workers have it: the order of sums, and so the last bits, may depend on it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def net(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return second_like(tmp_path_factory.mktemp("net") / "net.onnx")


def grid_of(*models: Path | str, backends: str = "ort,emu-fp16", samples: int = 3, **options: Any) -> Grid:
    return Grid([str(m) for m in models], parse_backends(backends), samples=samples, how=HOW, **options)


def records(tasks: Iterator[Task]) -> list[dict[str, Any]]:
    """In-process, in order: the serial run."""
    found = []
    for place, task in enumerate(tasks):
        outcome = run_task(task.kind, task.params)
        assert "error" not in outcome, outcome
        found.append({"key": task.key, "kind": task.kind, "params": task.params, "place": place, **outcome})
    return found


def test_outputs_that_say_little_are_noted(tmp_path: Path) -> None:
    """Zeros everywhere, and an output without an element: the samples agree, and the notes say what that is worth."""
    net = NetBuilder()
    dead = net.op("Relu", net.op("Neg", net.op("Abs", net.op("Mul", "x", net.weight(np.float32([2]))))))
    zero = net.weight(np.array([0]))
    path = net.save(
        tmp_path / "net.onnx", {"x": (1, [2, 8])}, [dead, net.op("Slice", dead, zero, zero, zero, name="s")]
    )
    (group,) = bisecting.merge(records(bisecting.tasks(grid_of(path, backends="ort,ort-all", samples=2))))
    assert group.passed
    assert group.notes[ALL_ZERO] == 2
    assert group.notes["s: without an element on both sides"] == 2


def test_a_grid_is_the_product_of_its_axes(net: Path, tmp_path: Path) -> None:
    other = shutil.copy(net, tmp_path / "other.onnx")
    tasks = list(bisecting.tasks(grid_of(net, other, backends="ort,ort-all,emu-fp16", samples=4)))
    assert len({task.key for task in tasks}) == len(tasks) == 2 * 2 * 4
    assert {tuple(task.params["backends"]) for task in tasks} == {("ort", "ort-all"), ("ort", "emu-fp16")}


def test_keys_are_of_contents_not_of_places(net: Path, tmp_path: Path) -> None:
    moved = tmp_path / "elsewhere" / "net.onnx"
    moved.parent.mkdir()
    shutil.copy(net, moved)
    keys = [task.key for task in bisecting.tasks(grid_of(net))]
    assert [task.key for task in bisecting.tasks(grid_of(moved))] == keys
    model = onnx.load(moved)
    model.graph.initializer[0].CopyFrom(
        numpy_helper.from_array(numpy_helper.to_array(model.graph.initializer[0]) * 2, model.graph.initializer[0].name)
    )
    onnx.save(model, moved)
    assert not set(keys) & {task.key for task in bisecting.tasks(grid_of(moved))}
    changed = [
        replace(grid_of(net), seed=1),
        grid_of(net, backends="ort,emu-bf16"),
        replace(grid_of(net), folded=False),
    ]
    assert not any(set(keys) & {task.key for task in bisecting.tasks(grid)} for grid in changed)


def test_a_file_that_changed_since_is_refused_by_the_worker(net: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copy(net, tmp_path / "net.onnx"))
    task = next(bisecting.tasks(grid_of(copy)))
    second_like(copy, depth=1)
    assert "not the file that the sweep was started with" in run_task(task.kind, task.params)["error"]
    copy.unlink()
    assert "every worker must see it" in run_task(task.kind, task.params)["error"]


def test_a_folder_gives_a_sample_a_file(net: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for index in range(3):
        np.savez(tmp_path / f"{index}.npz", x=rng.standard_normal((1, 16, 32, 32)).astype(np.float32))
    grid = grid_of(net, samples=2, inputs=tmp_path)
    found = [record["result"]["sample"] for record in records(bisecting.tasks(grid))]
    assert found == [str(tmp_path / "0.npz"), str(tmp_path / "1.npz")]
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="holds no sample"):
        list(grid_of(net, inputs=tmp_path / "empty").picked({}))


@pytest.mark.few(1)
@pytest.mark.parametrize("backends", ["ort,emu-fp16", "ort,emu-int8"])
def test_a_task_is_the_bisect_of_its_sample(net: Path, backends: str) -> None:
    """In INT8 the scales are of the calibration's samples, not of the one that is bisected."""
    found = records(bisecting.tasks(grid_of(net, backends=backends)))
    options = Options(samples=3, explain=False, calibration=Calibration(samples=2, method="max"))
    whole = bisect(str(net), backends, options=options)
    assert [record["result"]["sample"] for record in found] == whole.samples
    rows = {(place, row["onnx"]): row for place, r in enumerate(found) for row in r["result"]["layers"]}
    for expected in whole.tests[0].rows:  # of the sample on which the layer is worst
        row = rows[expected.sample, expected.onnx]
        row.pop("noise_floor")  # a whole bisect observes the reference on its first sample
        assert {name: value for name, value in expected.to_dict().items() if name in row} == row


def test_tasks_again_in_another_order_give_the_same_bits(net: Path) -> None:
    tasks = list(bisecting.tasks(grid_of(net)))
    first = [run_task(task.kind, task.params)["result"] for task in tasks]
    again = [run_task(task.kind, task.params)["result"] for task in reversed(tasks)][::-1]
    assert json.dumps(first) == json.dumps(again)


def test_figures_over_samples(net: Path) -> None:
    found = records(bisecting.tasks(grid_of(net, samples=4)))
    (group,) = bisecting.merge(reversed(found))
    assert group.samples == [record["result"]["sample"] for record in found]
    by_layer = {row.onnx: row for row in group.layers}
    for name, layer in by_layer.items():
        values = [row["rel_l2"] for r in found for row in r["result"]["layers"] if row["onnx"] == name]
        spread = layer.figures["rel_l2"]
        assert spread is not None
        assert spread.median == pytest.approx(np.median(values))
        assert spread.worst == max(values) == values[spread.sample]
        assert layer.samples == 4
        guilty = [row["verdict"] for r in found for row in r["result"]["layers"] if row["onnx"] == name].count("guilty")
        assert layer.guilty == guilty
    json.dumps(group.to_dict(), allow_nan=False)


def test_a_layer_that_breaks_on_one_sample_is_named_with_it(net: Path) -> None:
    found = json.loads(json.dumps(records(bisecting.tasks(grid_of(net, samples=6)))))
    broken = found[4]["result"]
    broken["agrees"], broken["final"] = False, "NaN"
    broken["layers"][3] |= {"verdict": "guilty", "rel_l2": "Infinity", "introduced": "NaN", "excess": "Infinity"}
    (group,) = bisecting.merge(found)
    assert not group.passed
    assert group.agreeing == 5
    assert [(row.name, row.guilty) for row in group.guilty] == [(broken["layers"][3]["name"], 1)]
    assert group.guilty[0].figures["introduced"].worst == math.inf  # type: ignore[union-attr]
    assert group.outliers[0].sample == broken["sample"]
    assert broken["layers"][3]["name"] in group.outliers[0].layers
    json.dumps(group.to_dict(), allow_nan=False)


@pytest.mark.parametrize(
    ("spec", "gpu"),
    [("torch", False), ("torch-tf32", True), ("torch-fp16", False), ("ort@cuda:1", True), ("ort-fp16", True),
     ("emu-tf32", False), ("trt-fp16", True), ("emu-fp16@cuda", True), ("ort-all@cpu", False)],
)  # fmt: skip
def test_which_backends_need_a_gpu(spec: str, gpu: bool) -> None:
    assert needs_gpu(BackendSpec.parse(spec)) is gpu


def test_progress_is_a_step_and_what_workers_lack_is_said_once(capsys: pytest.CaptureFixture[str]) -> None:
    steps: list[tuple[str, int, int]] = []
    show = _progress_on("sweep eval", lambda *step: steps.append(step))
    now = Progress(5, done=1, failed=1, present=2, waiting_for_gpu=True, store="shared store gone")
    for _ in range(2):
        show(now)
    assert [step[1:] for step in steps] == [(2, 5)] * 2
    assert steps[0][0].startswith("sweep eval: waiting for a worker with GPU=1, 1 failed, 0 running, ")
    said = capsys.readouterr().err
    assert said.count("--resources GPU=1; its tasks start when there is one") == 1
    assert said.count("warning: shared store gone") == 1
    assert "gets no tasks" not in said
    show(Progress(5, done=5, refused="tcp://a: Python 3.9"))
    assert "waiting" not in steps[-1][0]
    assert "warning: gets no tasks: tcp://a: Python 3.9" in capsys.readouterr().err


@pytest.mark.slow
def test_the_command_on_two_workers_says_what_the_serial_run_says(net: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    flags = ["-b", "ort,emu-fp16,emu-bf16", "-n", "4", "--no-explain", "--workers", "2", "-o", out]
    code, text = cli("sweep", "bisect", net, *flags, "--log", out / "log.parquet")
    assert code == 0, text
    assert "ort → emu-bf16" in text
    how = HOW | {"calibration": INT8 | {"samples": 8, "method": "mse"}}  # the command's defaults; no flag may say them
    grid = replace(grid_of(net, samples=4, backends="ort,emu-fp16,emu-bf16"), how=how)
    serial = records(bisecting.tasks(grid))
    logged = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()[1:]]
    assert {r["key"]: r["result"] for r in logged} == {r["key"]: json.loads(json.dumps(r["result"])) for r in serial}
    assert len({r["worker"] for r in logged}) == 2
    document = json.loads((out / "sweep.json").read_text())
    merged = json.loads(json.dumps([group.to_dict() for group in bisecting.merge(serial)]))
    assert [g | {"label": ""} for g in document["groups"]] == [g | {"label": ""} for g in merged]
    with (out / "sweep.csv").open() as stream:
        assert len(list(csv.DictReader(stream))) == sum(len(group["layers"]) for group in merged)
    assert "</html>" in (out / "sweep.html").read_text()
    assert len(pd.read_parquet(out / "log.parquet")) == sum(len(r["result"]["layers"]) for r in serial)
    code, text = cli("sweep", "bisect", net, *flags, "--log", out / "log.parquet")
    assert "8 of them in" in text


@pytest.mark.slow
def test_failed_tasks_are_told_and_the_rest_is_reported(net: Path, tmp_path: Path) -> None:
    inputs = tmp_path / "inputs"
    inputs.mkdir()
    np.savez(inputs / "0.npz", x=np.ones((1, 16, 32, 32), np.float32))
    np.savez(inputs / "1.npz", y=np.ones(3))
    code, text = cli("sweep", "bisect", net, "-b", "ort,emu-fp16", "--inputs", inputs, "--workers", 1, "--log",
                     tmp_path / "log.jsonl", "--no-explain")  # fmt: skip
    assert code == 2
    assert "1.npz" in "".join(text.split())
    assert "agrees on 1 of 1 samples" in " ".join(text.split())


def test_bad_usage(net: Path, tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    assert cli("sweep", "bisect", net, "--workers", 2, "--cluster", "tcp://x:1", "--log", log)[0] == 2
    assert cli("sweep", "bisect", tmp_path / "none.onnx", "--log", log)[0] == 2
    code, text = cli("sweep", "bisect", net, "--log", tmp_path / "run.csv")
    assert (code, "expected FILE.jsonl or FILE.parquet" in text) == (2, True)
    code, text = cli("sweep", "eval", "centerpoint:tini", "--log", log)
    assert (code, "did you mean centerpoint:tiny" in text) == (2, True)
    code, text = cli("sweep", "search", net, "-b", "ort,emu-fp16acc", "--goal", "map_drop<1", "--log", log)
    assert (code, "many samples" in text) == (2, True)
    code, text = cli("sweep", "bisect", net, net, "-b", "ort,emu-fp16", "--log", log)
    assert (code, "twice" in text) == (2, True)


@pytest.mark.slow
def test_search_over_samples(net: Path, tmp_path: Path) -> None:
    from cp_debug.sweep import searching

    grid = Grid(
        [str(net)],
        parse_backends("ort,emu-fp16acc"),
        samples=2,
        how={"goal": "rel_l2<8e-4", "max_builds": None, "test_model": None},
    )
    found = records(searching.tasks(grid))
    (group,) = searching.merge(found)
    for layer in group.layers:
        needed = sum(layer.layer in [kept["layer"] for kept in r["result"]["kept"]] for r in found)
        assert layer.needed == needed > 0
    assert group.passed == all(r["result"]["reached"] for r in found)
    assert set(group.keep["net"]) == {node for r in found for node in r["result"]["keep"]["net"]}
    assert section(group).passed is group.passed
    json.dumps(group.to_dict(), allow_nan=False)


def test_an_int8_reference_is_refused(net: Path) -> None:
    with pytest.raises(InputError, match="cannot be in INT8"):
        bisecting.tasks(grid_of(net, backends="emu-int8,ort"))


@pytest.mark.slow
def test_eval_says_what_the_plain_command_says() -> None:
    how = {"data_root": None, "sweeps": 9, "skip_missing": False, "calibration": INT8}
    grid = Grid(["centerpoint:tiny"], parse_backends("torch,emu-fp16"), samples=2, how=how)
    options = EvaluationOptions(draws=50)
    (group,) = evaluating.merge(records(evaluating.tasks(grid)), options)
    model = as_detector(load_model("centerpoint:tiny"))
    backends = [create(spec) for spec in grid.backends]
    plain = evaluate(model, backends, model.data(None, 2, 0, DataOptions()), options)
    left_out = {"data": "", "seconds": {}}
    assert group.result.to_dict() | left_out == plain.to_dict() | left_out
    assert group.passed
    json.dumps(group.to_dict(), allow_nan=False)
    assert section(group).sheets[0].rows[0].values[0] == "mAP"


NET = """
import torch
from torch import nn
def build():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 2, 1))
    return net, torch.randn(1, 3, 12, 12)
"""


@needs("modelopt")
def test_sensitivity_over_samples(tmp_path: Path) -> None:
    from cp_debug.mixed_precision.sensitivity import int8_runner, profile_of
    from cp_debug.quantization.open_quantized import open_quantized

    (tmp_path / "net.py").write_text(NET)
    name = f"{tmp_path / 'net.py'}:build"
    grid = Grid([name], parse_backends("torch,ort"), samples=3, how={"batches": 2, "method": "max"})
    model = load_model(name)
    parts = open_quantized(model, None, None, 2, method="max")
    found = records(sensitivity.tasks(grid, ()))
    (group,) = sensitivity.merge(found)
    for place, sample in enumerate(model.samples(3, 0, None)):
        shares = {row.layer: row.share for row in profile_of(int8_runner(model, parts, sample), [sample]).layers}
        for row in group.layers:
            assert row.share is not None
            assert shares[row.layer] <= row.share.worst
            if row.share.sample == place:
                assert shares[row.layer] == row.share.worst
    medians = [row.share.median for row in group.layers if row.share]
    assert medians == sorted(medians, reverse=True)
    json.dumps(group.to_dict(), allow_nan=False)
    assert section(group).passed
    assert [row["layer"] for row in group.rows()] == [row.layer for row in group.layers]
    assert set(sensitivity.rows(found[0])[0]) == set(sensitivity.COLUMNS)
