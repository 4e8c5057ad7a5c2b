"""``mmdet3d:CONFIG`` against a fake of the package: the protocol, both ways to reach it, and what can go wrong."""

from __future__ import annotations

import copy
import os
import signal
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fake_mmdet3d import FILES, install

from cp_debug.bisect.engine import bisect
from cp_debug.errors import InputError, MissingPackage
from cp_debug.interpreter import Interpreter
from cp_debug.recipes.centerpoint.config import TINY
from cp_debug.recipes.centerpoint.model import build_model
from cp_debug.recipes.centerpoint.recipe import WEIGHTS, CenterPointModel
from cp_debug.recipes.checkpoint import read_state_dict
from cp_debug.recipes.mmdet3d.client import ENVIRONMENT, DetectorClient, Unlike, center_point_config
from cp_debug.recipes.mmdet3d.recipe import DetectorLayers, Mmdet3dCenterPoint
from cp_debug.recipes.registry import load_model

NAME = "mmdet3d:centerpoint_pillar_tiny"
CHECKPOINT = WEIGHTS / "tiny.safetensors"
CONFIG = FILES["mmdet3d/.mim/configs/centerpoint/centerpoint_pillar_tiny.py"]


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Python that has them."""
    return install(tmp_path_factory.mktemp("fake"))


@pytest.fixture
def new_python(packages: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same, named in the environment."""
    monkeypatch.setenv(ENVIRONMENT, str(packages))
    return packages


@pytest.fixture(scope="module")
def running(packages: Path) -> Iterator[Interpreter]:
    """The process that a client starts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(ENVIRONMENT, str(packages))
        interpreter = DetectorClient()._interpreter
    assert interpreter is not None
    yield interpreter
    interpreter.close()


@pytest.fixture
def python(new_python: Path, running: Interpreter, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same, where a process runs already: it loads torch once, and holds the detector that was opened last."""
    monkeypatch.setattr("cp_debug.recipes.mmdet3d.client.Interpreter", lambda *given, **how: running)
    return new_python


@pytest.mark.slow
def test_a_pillar_centerpoint_is_this_projects_own_with_its_weights(python: Path) -> None:
    model = load_model(NAME, checkpoint=CHECKPOINT)
    assert isinstance(model, Mmdet3dCenterPoint)
    own = CenterPointModel("tiny")
    assert (model.name, model.weights, model.class_names) == (NAME, "tiny.safetensors", own.class_names)
    assert set(model.verified) >= {"voxels", "spatial_features", "backbone.2", "neck", "task1.heatmap", "boxes"}
    assert set(model.verified.values()) == {0.0}
    assert f"mmdet3d 0.1 in {python}: 25 stages" in model.notes[0]
    assert not any("random" in note for note in model.notes)
    assert any(n.startswith("the weights are random (seed 0): no checkpoint was given") for n in load_model(NAME).notes)
    ours, theirs = own.network.state_dict(), model.network.state_dict()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_weights_are_random_from_the_seed(python: Path, tmp_path: Path) -> None:
    client, file = DetectorClient(), tmp_path / "weights.pt"
    config = client.call("configs").result["configs"]["voxel_net"]
    found = []
    for seed in (1, 1, 2):
        client.call("open", config=config, seed=seed)
        client.call("save", file=str(file))
        found.append(torch.load(file)["backbone.0.weight"])
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


@pytest.mark.slow
def test_a_config_file_with_something_of_its_own_is_compared_by_layers(python: Path, tmp_path: Path) -> None:
    config = tmp_path / "mine.py"
    config.write_text(CONFIG + "model['eps'] = 0.1\n")
    model = load_model(f"mmdet3d:{config}", checkpoint=CHECKPOINT)
    assert isinstance(model, DetectorLayers)
    assert any("computes another backbone.0" in note for note in model.notes)
    (component,) = model.components
    assert component.name == "pts_backbone_neck_head"
    paths = {path for path, _ in component.module.named_modules()}
    assert {"pts_backbone.blocks.0.1", "pts_neck.deblocks.2.1", "pts_bbox_head.task_heads.1.vel.0.bn"} <= paths
    assert [stage.path for stage in component.stages] == ["pts_backbone", "pts_neck", "pts_bbox_head"]


def settings() -> dict[str, Any]:
    """The model of the fake's CenterPoint, resolved."""
    found: dict[str, Any] = {}
    exec(CONFIG, found)
    return copy.deepcopy(found["model"])


def test_awmls_head_is_mmdet3ds_but_for_its_first_bias() -> None:
    model = settings()
    model["pts_bbox_head"]["separate_head"] = {"type": "CustomSeparateHead", "init_bias": -4.595, "final_kernel": 1}
    assert center_point_config("mine", model, None).heatmap_bias == -4.595
    model["pts_bbox_head"]["separate_head"]["type"] = "DCNSeparateHead"
    with pytest.raises(Unlike, match="separate_head is DCNSeparateHead, not SeparateHead"):
        center_point_config("mine", model, None)


def test_the_nms_is_that_of_the_configuration() -> None:
    model = settings()
    assert center_point_config("mine", model, None).nms_overlap is None
    model["test_cfg"]["pts"] = {"nms_type": "rotate", "nms_thr": 0.2, "pre_max_size": 500, "post_max_size": 83}
    config = center_point_config("mine", model, None)
    assert (config.nms_overlap, config.nms_pre_max_size) == (0.2, 500)


def test_convnext_is_refused_with_every_part_that_differs_and_why() -> None:
    model = settings()
    model["pts_voxel_encoder"]["type"] = "BackwardPillarFeatureNet"
    model["pts_backbone"]["type"] = "ConvNeXt_PC"
    with pytest.raises(Unlike) as refusal:
        center_point_config("mine", model, None)
    assert "two offsets to the voxel's centre instead of three" in str(refusal.value)
    assert "pts_backbone is ConvNeXt_PC (ConvNeXt blocks: depthwise convolutions" in str(refusal.value)


def test_an_roi_head_is_said_to_be_left_out(python: Path, tmp_path: Path) -> None:
    config = tmp_path / "rcnn.py"
    pipeline = "test_pipeline = [dict(type='LoadPointsFromFile', use_dim=5)]\n"
    config.write_text(f"model = dict(type='VoxelNet', channels=5, roi=True)\n{pipeline}")
    model = load_model(f"mmdet3d:{config}")
    assert "left out, because it refines the output of the head: roi_head (Linear)" in model.notes
    assert any("the weights are random (seed 0)" in note for note in model.notes)


def test_a_detector_is_fed_what_it_makes_of_a_cloud(python: Path, tmp_path: Path) -> None:
    model = load_model("mmdet3d:voxel_net")
    (component,) = model.components
    assert component.name == "backbone_head"
    first, second = model.samples(2, 0, None)
    assert first.arrays["backbone_head_input"].shape == (1, 5, 8, 8)
    assert not np.array_equal(first.arrays["backbone_head_input"], second.arrays["backbone_head_input"])
    np.savez(tmp_path / "a.npz", backbone_head_input=np.zeros((1, 5, 12, 9), np.float32))
    (given,) = model.samples(3, 0, tmp_path)
    assert model.feed(component, given, {})["backbone_head_input"].shape == (1, 5, 12, 9)


def test_the_report_tells_what_the_model_tells(python: Path) -> None:
    result = bisect("mmdet3d:voxel_net", "torch,ort")
    assert result.agrees
    assert [row.name for row in result.tests[0].rows][1:] == ["backbone.0", "backbone.1", "bbox_head"]
    assert "only layers, without boxes: VoxelNet has no pts_voxel_encoder" in result.tests[0].notes


@pytest.mark.slow
def test_noise_where_no_cloud_reaches_and_cut_where_no_export_does(python: Path, tmp_path: Path) -> None:
    config = tmp_path / "custom.py"
    config.write_text("model = dict(type='VoxelNet', channels=3, custom=True)")
    model = load_model(f"mmdet3d:{config}")
    (component,) = model.components
    assert component.name == "backbone"
    assert any(note.startswith("without bbox_head, which torch cannot export") for note in model.notes)
    (sample,) = model.samples(1, 0, None)
    assert sample.arrays["backbone_head_input"].shape == (1, 3, 256, 448)
    assert "noise for backbone_head, which no cloud reaches (RuntimeError: not implemented on CPU)" in sample.source


@pytest.mark.slow
def test_in_this_python_the_components_are_the_detectors_own_modules(packages: Path) -> None:
    code = f"""
from pathlib import Path
import torch
from cp_debug.recipes.registry import load_model
model = load_model({NAME!r}, checkpoint=Path({str(CHECKPOINT)!r}))
print([type(m).__module__ for c in model.components for m in c.module.children()][1:])
encoder, sample = model.components[0], next(model.samples(1, 0, None))
features = torch.from_numpy(model.feed(encoder, sample, {{}})["input_features"])
print(torch.equal(encoder.module(features), model.network.pts_voxel_encoder(features)))
print(model.notes)
"""
    environment = {key: value for key, value in os.environ.items() if key != ENVIRONMENT}
    done = subprocess.run([packages, "-c", code], capture_output=True, text=True, check=True, env=environment)
    modules, equal, notes = done.stdout.splitlines()[-3:]
    assert modules == "['cp_debug.recipes.centerpoint.model', 'mmdet3d.registry', 'mmdet3d.registry']"
    assert equal == "True"
    assert "mmdet3d 0.1 in this Python: 25 stages" in notes


@pytest.mark.slow
def test_where_there_is_no_mmdet3d_both_ways_to_get_it_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.delenv(ENVIRONMENT, raising=False)
    with pytest.raises(MissingPackage, match=rf"no mmdet3d.*{ENVIRONMENT}.*make mmdet3d-env.*pip install") as caught:
        load_model(NAME)
    assert caught.value.exit_code == 3
    for wrong in ("/nowhere/python", "/bin/true"):
        monkeypatch.setenv(ENVIRONMENT, wrong)
        with pytest.raises(MissingPackage, match=rf"{ENVIRONMENT}: {wrong} .*make mmdet3d-env"):
            load_model(NAME)
    monkeypatch.setenv(ENVIRONMENT, sys.executable)
    with pytest.raises(MissingPackage, match=r"cannot import mm(engine|det3d).*make mmdet3d-env"):
        load_model("mmdet3d:any")


def test_an_unknown_configuration_and_a_missing_file(python: Path) -> None:
    with pytest.raises(InputError, match=r"one of mmdet3d's 2 configurations; did you mean centerpoint_pillar_tiny\?"):
        load_model("mmdet3d:centerpoint_pilar_tiny")
    with pytest.raises(InputError, match=r"mmdet3d:gone\.py: no such config file"):
        load_model("mmdet3d:gone.py")


def test_a_config_that_cannot_be_built(python: Path, tmp_path: Path) -> None:
    config = tmp_path / "bad.py"
    config.write_text("model = dict(type='Unheard')")
    with pytest.raises(InputError, match=r"bad\.py: mmdet3d cannot build it: KeyError: 'Unheard'"):
        load_model(f"mmdet3d:{config}")


def test_a_checkpoint_of_another_shape_names_the_layer(python: Path, tmp_path: Path) -> None:
    state = build_model(TINY).state_dict()
    state["pts_neck.deblocks.1.0.weight"] = torch.zeros(1, 2, 3, 4)
    torch.save({"state_dict": state}, tmp_path / "a.pth")
    with pytest.raises(
        InputError, match=r"a\.pth: .*(?s:.*)pts_neck\.deblocks\.1\.0\.weight \[1, 2, 3, 4\] \(expected"
    ):
        load_model(NAME, checkpoint=tmp_path / "a.pth")


@pytest.mark.process
def test_a_detector_that_crashes(new_python: Path, tmp_path: Path) -> None:
    config = tmp_path / "crash.py"
    config.write_text("import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)")
    with pytest.raises(MissingPackage, match=rf"died: {signal.strsignal(signal.SIGSEGV)} \(in open\)"):
        load_model(f"mmdet3d:{config}")


@pytest.mark.process
def test_the_process_ends_with_its_client(new_python: Path) -> None:
    client = DetectorClient()
    assert set(client.call("configs").result["configs"]) == {"centerpoint_pillar_tiny", "voxel_net"}
    assert client._interpreter is not None
    process = client._interpreter.process
    assert process is not None
    del client
    assert process.wait() != 0


def test_what_mmengine_saves_while_it_trains_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its checkpoints hold the history of the losses, which are objects of its own with arrays and methods."""
    module = types.ModuleType("mmengine.logging.history_buffer")

    class HistoryBuffer:
        def __init__(self) -> None:
            self.history, self.mean = np.ones(3), np.float64(2)

        def __reduce__(self) -> tuple:
            return HistoryBuffer, (), {"history": self.history, "statistics": {"mean": HistoryBuffer.current}}

        def current(self) -> None: ...

    HistoryBuffer.__module__, HistoryBuffer.__qualname__ = module.__name__, "HistoryBuffer"
    HistoryBuffer.current.__qualname__ = "HistoryBuffer.current"
    HistoryBuffer.current.__module__ = module.__name__
    module.HistoryBuffer = HistoryBuffer
    for name in ("mmengine", "mmengine.logging"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    state = {"conv.weight": torch.ones(2)}
    torch.save({"state_dict": state, "message_hub": {"loss": HistoryBuffer()}, "meta": {}}, tmp_path / "epoch_1.pth")
    assert torch.equal(read_state_dict(tmp_path / "epoch_1.pth")["conv.weight"], state["conv.weight"])
