"""Verification and the whole deployment: limits, NaN, voxels, the guilty layer, and going on where a run stopped."""

from __future__ import annotations

import json
import shutil
import xml.etree.ElementTree as ET
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from test_cli import run

from cp_debug.cli.deploy import each_test, parse_scenarios
from cp_debug.deploy.config import load_config
from cp_debug.deploy.interface_checks import compare_voxels, read_voxels
from cp_debug.deploy.runner import deploy
from cp_debug.deploy.stages import Deployment
from cp_debug.deploy.verify import MARGIN, Tolerances, noise_floors, what_is_wrong
from cp_debug.errors import InputError
from cp_debug.probes.statistics import compare
from cp_debug.programs.pipeline import Key, Pipeline
from cp_debug.recipes.base import Arrays, Sample
from cp_debug.recipes.centerpoint.config import TINY
from cp_debug.recipes.centerpoint.model import Voxels, voxelize
from cp_debug.recipes.centerpoint.recipe import CenterPointModel

HEAD = "pts_backbone_neck_head"


@pytest.fixture(scope="module")
def deployed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A work folder in which everything passed."""
    folder = tmp_path_factory.mktemp("deployed")
    records = deploy(deployment(folder))
    assert [r.name for r in records] == ["load", "export", "verify", "evaluate"]
    assert all(r.passed and not r.resumed for r in records)
    return folder


def deployment(folder: Path, **changes: str) -> Deployment:
    lines = {
        "model": "centerpoint:tiny",
        "work_dir": str(folder),
        "verify": "{samples: 2}",
        "evaluate": "{samples: 1}",
        **changes,
    }
    path = folder / "deploy.yaml"
    path.write_text("".join(f"{key}: {value}\n" for key, value in lines.items()))
    return Deployment(load_config(path), str(path))


@pytest.fixture
def broken(deployed: Path, tmp_path: Path) -> Path:
    """A folder of its files in which one output channel of ``task0.dim`` is 5 % too large."""
    folder = tmp_path / "onnx"
    shutil.copytree(deployed / "onnx", folder)
    proto = onnx.load(folder / f"{HEAD}.onnx")
    weight = next(w for w in proto.graph.initializer if w.name.endswith("task_heads.0.dim.1.weight"))
    values = numpy_helper.to_array(weight).copy()
    values[0] *= 1.05
    weight.CopyFrom(numpy_helper.from_array(values, weight.name))
    onnx.save(proto, folder / f"{HEAD}.onnx")
    return folder


@pytest.mark.slow
def test_a_second_run_repeats_nothing_and_a_changed_file_is_noticed(deployed: Path) -> None:
    again = deploy(deployment(deployed))
    assert all(r.resumed for r in again)
    changed = deploy(deployment(deployed, verify="{samples: 1}"))
    assert {r.name: r.resumed for r in changed} == {"load": True, "export": True, "verify": False, "evaluate": True}
    (deployed / "onnx" / f"{HEAD}.onnx").write_bytes(b"")
    assert [r.name for r in deploy(deployment(deployed, verify="{samples: 1}")) if not r.resumed] == ["export"]
    (deployed / "deploy.json").write_text("{")
    assert not any(r.resumed for r in deploy(deployment(deployed)))


@pytest.mark.slow
def test_a_failed_verification_names_layer_and_cause(broken: Path, tmp_path: Path) -> None:
    junit, report = tmp_path / "junit.xml", tmp_path / "verify.json"
    code, text = run(
        "verify", "centerpoint:tiny", "-s", "torch@cpu,ort@cpu", "--onnx-dir", broken, "--samples", 2,
        "--junit", junit, "--json", report,
    )  # fmt: skip
    assert code == 1
    flat = " ".join(text.split())
    assert "1 of 13 outputs fail, the worst is task0.dim" in flat
    assert "guilty layer pts_bbox_head.task_heads.0.dim.1" in flat
    assert "Conv weights: channel 0 × 1.05" in flat
    failed = [c for c in ET.parse(junit).iter("testcase") if c.find("failure") is not None]
    assert [c.get("name") for c in failed] == [f"{HEAD}/task0.dim"]
    assert "guilty layer" in failed[0].find("failure").get("message")
    (scenario,) = json.loads(report.read_text())["scenarios"]
    assert scenario["bisect"]["guilty"] == ["pts_bbox_head.task_heads.0.dim.1"]


@pytest.mark.slow
def test_a_reference_of_two_scenarios_runs_each_sample_once(deployed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And both are judged as each by itself."""
    scenarios = "[{reference: torch, test: ort}, {reference: torch, test: emu-fp16}]"
    both = deployment(deployed, verify=f"{{samples: 2, scenarios: {scenarios}}}")
    ran: list[str] = []
    run_pipeline = Pipeline.run

    def counted(pipeline: Pipeline, sample: Sample) -> dict[str, Arrays]:
        ran.append(str(pipeline.backend.spec))
        return run_pipeline(pipeline, sample)

    with monkeypatch.context() as patched:
        patched.setattr(Pipeline, "run", counted)
        together = both.verify(both.onnx_dir)
    assert Counter(ran) == {"torch": 2, "ort": 2, "emu-fp16": 2, "torch-fp64": 1}
    for test, scenario in zip(("ort", "emu-fp16"), together.scenarios, strict=True):
        one = deployment(deployed, verify=f"{{samples: 2, scenarios: [{{reference: torch, test: {test}}}]}}")
        (alone,) = one.verify(one.onnx_dir).scenarios
        assert {**scenario.to_dict(), "seconds": 0} == {**alone.to_dict(), "seconds": 0}


@pytest.mark.slow
def test_a_deployment_of_broken_files_fails_in_page_and_exit_code(broken: Path, tmp_path: Path) -> None:
    folder = tmp_path / "work"
    folder.mkdir()
    config = folder / "c.toml"
    config.write_text(
        f"model = 'centerpoint:tiny'\nwork_dir = '{folder}'\n[export]\nmode = 'none'\nonnx_dir = '{broken}'\n"
        "[verify]\nsamples = 1\nscenarios = [{reference = 'torch', test = 'ort'}]\n[evaluate]\nenabled = false\n"
    )
    code, text = run("deploy", config)
    assert code == 1
    assert "FAILED" in text
    page = (folder / "report.html").read_text()
    assert "guilty layer pts_bbox_head.task_heads.0.dim.1" in page
    assert "http" not in page.replace("http-equiv", "")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--tolerance", "fp32=-1"], "command line: verify.tolerances.fp32 is -1.0; expected greater than 0"),
        (["--tolerance", "fp32=x"], "--tolerance: 'fp32=x'; expected NAME=NUMBER"),
        (["--scenario", "torch"], "--scenario: 'torch' names 1 backend; expected REFERENCE,TEST"),
        (["--scenario", "torch,ort,emu-fp16"], "names 3 backends"),
        (["-b", "torch"], "--backends: 'torch'; expected a reference and at least one test, as in torch,ort"),
        (["-b", "torch,ort", "-s", "torch,ort"], "--backends: it would do nothing here: --scenario says which"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: list[object], says: str) -> None:
    code, text = run("verify", "centerpoint:tiny", *options)
    assert code == 2
    assert says in " ".join(text.split())


def test_backends_are_a_scenario_for_each_test() -> None:
    assert each_test("torch,ort,emu-fp16") == parse_scenarios(["torch,ort", "torch,emu-fp16"])
    assert each_test("ort", repeats=True) == parse_scenarios(["ort"], repeats=True)


def test_a_deployment_needs_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    code, text = run("deploy", "centerpoint:tiny")
    assert code == 2
    assert "centerpoint:tiny: expected a .yaml, .toml, .json or .py file, whose `model` may be that" in " ".join(
        text.split()
    )
    assert not list(tmp_path.iterdir())


def test_awmls_file_needs_a_model() -> None:
    code, text = run("deploy", Path(__file__).parent / "data" / "awml" / "deploy_config.py")
    assert code == 2
    assert "model is missing" in text


@pytest.mark.slow
def test_profile_of_another_head_is_refused_with_the_shape(deployed: Path) -> None:
    profile = "{min: [1, 20, 11], opt: [9, 20, 11], max: [99, 32, 11]}"
    given = f"{{dynamic_axes: {{input_features: {{0: n}}}}, profile: {{input_features: {profile}}}}}"
    components = f"{{pts_voxel_encoder: {given}}}"
    made = deployment(deployed, components=components)
    with pytest.raises(
        InputError, match=r"input_features.max is \[99, 32, 11\]; centerpoint:tiny takes .*\[n, 20, 11\]"
    ):
        made.export()


def test_limits_follow_noise_and_precision() -> None:
    given = Tolerances({"fp16": 0.5, "reg@fp16": 0.25, "dim": 0.125}, ["reg", "dim", "rot"])
    assert given.limit("rot", 1e-7, "fp32", "fp32") == MARGIN * 1e-7
    assert 2.8 < MARGIN <= 10  # 2.8 times the prediction is the largest that was measured
    assert given.limit("rot", 1e-7, "fp32", "tf32") == pytest.approx(MARGIN * 1e-7 * 2**13)
    assert given.limit("rot", 1e-7, "fp32", "fp16") == 0.5
    assert given.limit("reg", 1e-7, "fp32", "fp16") == 0.25
    assert given.limit("dim", 1e-7, "fp16", "fp32") == 0.125
    with pytest.raises(InputError, match="tolerance 'rott': expected a tensor"):
        Tolerances({"rott": 1.0}, ["rot"])


@pytest.mark.slow
def test_noise_floors_are_small_and_of_every_output(deployed: Path) -> None:
    made = deployment(deployed)
    if not made.onnx_dir.joinpath(f"{HEAD}.onnx").stat().st_size:
        made.export()
    floors = noise_floors(made.model, made.programs(), made.samples(1)[0])
    assert len(floors) == 13
    assert Key(HEAD, "task1.rot") in floors
    assert all(2**-24 <= floor < 1e-5 for floor in floors.values())


def test_nan_fails_even_where_the_reference_has_it() -> None:
    bad = np.array([1.0, np.nan], np.float32)
    assert what_is_wrong(compare(bad, bad), 1.0, None) == "1 NaN or Inf"
    assert what_is_wrong(compare(bad, bad[:1]), 1.0, None).startswith("the shape is [1]")
    good = np.ones(2, np.float32)
    assert what_is_wrong(compare(good, good), 1e-9, 1e-9) == ""
    assert what_is_wrong(compare(good, good * 1.5), 1.0, 0.1) == "max |Δ| 0.5; expected at most 0.1"


@pytest.fixture(scope="module")
def cloud() -> np.ndarray:
    return np.ascontiguousarray(next(CenterPointModel("tiny").samples(1, 0, None)).arrays["points"])


def test_voxels_in_another_order_and_cut_elsewhere_are_told(cloud: np.ndarray) -> None:
    ours = voxelize(torch.from_numpy(cloud), TINY)
    assert compare_voxels(ours, ours, cloud, TINY).agrees
    reverse = Voxels(*(tensor.flip(0) for tensor in ours))
    change = compare_voxels(ours, reverse, cloud, TINY)
    assert (change.lost, change.gained, change.changed) == (0, 0, 0)
    assert change.reordered >= len(ours.voxels) - 1
    short = voxelize(torch.from_numpy(cloud), replace(TINY, max_num_points=5, max_voxels=100))
    change = compare_voxels(ours, short, cloud, TINY)
    assert change.lost == len(ours.voxels) - 100
    assert change.changed > 0
    assert change.dropped_points[1] > change.dropped_points[0]
    assert "points dropped" in str(change)


def test_nan_in_a_pillar_differs_from_a_number_and_not_from_nan(cloud: np.ndarray) -> None:
    ours = voxelize(torch.from_numpy(cloud), TINY)
    broken = ours._replace(voxels=ours.voxels.clone())
    broken.voxels[7, 0, 3] = np.nan
    change = compare_voxels(ours, broken, cloud, TINY)
    assert (change.agrees, change.changed, change.max_abs) == (False, 1, np.inf)
    assert compare_voxels(broken, broken, cloud, TINY).agrees


def test_voxels_of_another_implementation_are_read_and_checked(cloud: np.ndarray, tmp_path: Path) -> None:
    ours = voxelize(torch.from_numpy(cloud), TINY)
    path = tmp_path / "v.npz"
    np.savez(path, voxels=ours.voxels, num_points=ours.num_points, coors=ours.coors[:, 1:])
    assert compare_voxels(ours, read_voxels(path, TINY), cloud, TINY).agrees
    np.savez(path, voxels=ours.voxels[:, :, :4], num_points=ours.num_points, coors=ours.coors)
    with pytest.raises(InputError, match=r"v.npz: voxels has shape .*; expected \[N, P, 5\]"):
        read_voxels(path, TINY)
    np.savez(path, voxels=ours.voxels)
    with pytest.raises(InputError, match=r"v.npz: expected an .npz file with voxels, num_points, coors"):
        read_voxels(path, TINY)


HALF_NET = """
import torch

def net(half=False, fault=1.0):
    torch.manual_seed(0)
    middle = torch.nn.Linear(8, 8)
    module = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), middle, torch.nn.ReLU(), torch.nn.Linear(8, 3))
    middle.weight.data *= fault
    x = torch.linspace(-1, 1, 8).reshape(2, 4)
    return (module.eval().half(), (x.half(),)) if half else (module.eval(), (x,))

def half():
    return net(True)
"""


@pytest.mark.parametrize("reference", ["net", "half"])
@pytest.mark.parametrize(("fault", "code"), [(1.0, 0), (1.1, 1)])
def test_a_file_in_fp16_is_judged_by_limits_of_fp16(tmp_path: Path, reference: str, fault: float, code: int) -> None:
    source = tmp_path / "nets.py"
    source.write_text(HALF_NET)
    space: dict[str, object] = {}
    exec(HALF_NET, space)
    module, arguments = space["net"](True, fault)  # type: ignore[operator]
    names = {"input_names": ["input"], "output_names": ["output"]}
    torch.onnx.export(module, arguments, str(tmp_path / "half.onnx"), dynamo=False, **names)
    report = tmp_path / "verified.json"
    options = ["--test-model", tmp_path / "half.onnx", "-b", "torch,ort", "--no-explain", "--json", report]
    exit_code, text = run("verify", f"{source}:{reference}", *options)[:2]
    assert exit_code == code, text
    scenario = json.loads(report.read_text())["scenarios"][0]
    assert scenario["judged_as"] == "fp16"
    assert "limits: those of FP16" in text
    assert 0.003 < scenario["tensors"][0]["limit"] < 0.05  # 8 times 2⁻¹¹, or more where the network amplifies
