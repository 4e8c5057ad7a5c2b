"""QATHook in a real runner: quantized before the first step, trained, saved, resumed."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from extras import module_needs
from torch import Tensor, nn

from cp_debug.errors import InputError
from cp_debug.programs.torch_layers import is_quantized
from cp_debug.quantization.ptq import scales_of
from cp_debug.quantization.record import quantization_of

pytestmark = module_needs("mmengine")

from mmengine.hooks import Hook  # noqa: E402
from mmengine.model import BaseModel  # noqa: E402
from mmengine.runner import Runner  # noqa: E402
from torch.utils.data import Dataset  # noqa: E402

from cp_debug.quantization.mmengine_hook import KEY, QATHook  # noqa: E402


class Net(BaseModel):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
        self.lonely = nn.BatchNorm2d(8)  # behind a ReLU: it cannot be folded
        self.head = nn.Conv2d(8, 1, 1)

    def forward(self, inputs: Tensor, target: Tensor, mode: str = "tensor") -> Any:
        found = self.head(self.lonely(self.stem(inputs)))
        return {"loss": (found - target).square().mean()} if mode == "loss" else found


class Images(Dataset[dict[str, Tensor]]):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        image = torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(index))
        return {"inputs": image, "target": image.sum(0, keepdim=True)}


class Watch(Hook):
    """What training saw."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.modes: set[bool] = set()
        self.start: dict[str, Tensor] = {}

    def before_train_epoch(self, runner: Runner) -> None:
        self.start = self.start or copy.deepcopy(runner.model.state_dict())

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        self.losses.append(outputs["loss"].item())
        self.modes.add(runner.model.lonely.training)


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    net = Net()
    with torch.no_grad():
        for norm in (net.stem[1], net.lonely):
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2)
    return net


def runner(folder: Path, net: Net, epochs: int = 2, watch: Watch | None = None, **options: Any) -> Runner:
    resume = options.pop("resume", False)
    hook = {"type": "QATHook", "calibration_batches": 3, **options}
    logging.getLogger("mmengine").setLevel(logging.ERROR)
    return Runner(
        model=net,
        work_dir=str(folder),
        train_dataloader={
            "dataset": Images(),
            "batch_size": 2,
            "sampler": {"type": "DefaultSampler", "shuffle": False},
            "collate_fn": {"type": "default_collate"},
        },
        train_cfg={"by_epoch": True, "max_epochs": epochs},
        optim_wrapper={"optimizer": {"type": "SGD", "lr": 0.01, "momentum": 0.9}},
        custom_hooks=[hook, watch or Watch()],
        default_hooks={"checkpoint": {"type": "CheckpointHook", "interval": 1}, "logger": None},
        experiment_name=f"{folder.name}-{epochs}-{resume}-{id(net)}",
        resume=resume,
        log_level="ERROR",
    )


def test_quantized_before_the_first_step_and_trained(tmp_path: Path, net: Net) -> None:
    data = Images()
    batch = torch.stack([data[index]["inputs"] for index in range(8)])
    before = copy.deepcopy(net).eval()(batch, torch.zeros(1))
    watch = Watch()
    training = runner(tmp_path, net, epochs=4, watch=watch)
    training.train()
    assert isinstance(net.stem[1], nn.Identity), "BatchNorm behind the convolution was folded"
    assert watch.modes == {False}, "the other one stayed in eval mode in every step"
    assert torch.equal(net.lonely.running_mean, watch.start["lonely.running_mean"])
    assert watch.losses[-1] < watch.losses[0]
    trained = {name for name, tensor in net.state_dict().items() if not torch.equal(tensor, watch.start[name])}
    assert {"stem.0.weight", "stem.0.bias", "head.weight", "head.bias"} == trained, "and scales are as calibrated"
    start = copy.deepcopy(net)
    start.load_state_dict(watch.start)
    after = start.eval()(batch, torch.zeros(1))
    assert 0 < (after - before).norm() / before.norm() < 0.05, "training started where calibration ended"


def test_sensitive_layers_stay_in_fp32(tmp_path: Path, net: Net) -> None:
    runner(tmp_path, net, epochs=1, sensitive_layers=["head"], amax_method="max").train()
    assert list(scales_of(net).layers) == ["stem.0"]
    assert scales_of(net).method == "max"


def test_checkpoint_restores_scales_and_training_goes_on(
    tmp_path: Path, net: Net, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(
        "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1"
    )  # mmengine 0.10.7 cannot resume with torch 2.6 and later
    fresh = copy.deepcopy(net)
    straight = copy.deepcopy(net)
    runner(tmp_path / "once", straight, epochs=3).train()
    runner(tmp_path / "twice", net, epochs=2).train()
    saved = torch.load(tmp_path / "twice" / "epoch_2.pth", weights_only=False)
    assert saved[KEY]["about"]["layers"] == ["stem.0", "head"]
    watch = Watch()
    runner(tmp_path / "twice", fresh, epochs=3, watch=watch, resume=True, calibration_batches=1).train()
    assert len(watch.losses) == 4, "one epoch"
    for name, tensor in straight.state_dict().items():
        assert torch.allclose(fresh.state_dict()[name], tensor, atol=1e-6), name


def test_batchnorm_may_be_left_alone(tmp_path: Path, net: Net) -> None:
    watch = Watch()
    runner(tmp_path, net, epochs=1, freeze_bn=False, watch=watch).train()
    assert isinstance(net.stem[1], nn.BatchNorm2d)
    assert is_quantized(net)
    assert watch.modes == {True}


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"amax_method": "median"}, "QATHook: amax_method: 'median' is unknown"),
        ({"sensitive_layers": "head"}, "QATHook: sensitive_layers is 'head'; expected a list of module paths"),
        ({"keep_fp16": [0]}, r"QATHook: keep_fp16 is \[0\]; expected a list of module paths"),
        ({"calib_cache_path": "epoch_29.calib"}, "QATHook: calib_cache_path: 'epoch_29.calib' is not read"),
    ],
)
def test_bad_options(options: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=says):
        QATHook(**options)


def test_layer_that_does_not_exist(tmp_path: Path, net: Net) -> None:
    with pytest.raises(InputError, match=r"no layer matches 'heads'; the nearest names are head"):
        runner(tmp_path, net, sensitive_layers=["heads"]).train()


def test_the_snippet_of_the_report(tmp_path: Path) -> None:
    """Named parts and all: those that the model lacks are not missed."""
    torch.manual_seed(0)
    net = Net()
    net.pts_bbox_head = nn.Conv2d(8, 1, 1)  # never runs
    hook = {"calibration_epoch": 0, "freeze_bn": True, "sensitive_layers": ["stem.0"], "amax_method": "max"}
    parts = {"quant_backbone": False, "quant_neck": False, "quant_head": False, "quant_voxel_encoder": True}
    runner(tmp_path, net, epochs=1, **hook, **parts).train()
    assert list(scales_of(net).layers) == ["head"]
    assert quantization_of(net).skipped["pts_bbox_head"] == "skipped by 'pts_bbox_head'"


def test_the_later_spelling_of_the_report(tmp_path: Path, net: Net, monkeypatch: pytest.MonkeyPatch) -> None:
    """``keep_fp16``, all batches, and settings that change nothing here, which the log names."""
    said: list[str] = []
    training = runner(
        tmp_path, net, 1, calibration_batches=None, keep_fp16=["head"], disable_recipes=["add"], quant_add=False
    )
    monkeypatch.setattr(training.logger, "warning", said.append)
    read: list[int] = []
    monkeypatch.setattr(type(net.data_preprocessor), "forward", _counted(type(net.data_preprocessor).forward, read))
    training.train()
    assert list(scales_of(net).layers) == ["stem.0"]
    assert "QATHook: without effect here: quant_add, disable_recipes" in said
    assert len(read) == 4 + 4, "all batches were calibrated on, and all trained on"


def _counted(function: Any, calls: list[int]) -> Any:
    def called(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return function(*args, **kwargs)

    return called


def test_a_later_epoch_calibrates_what_was_trained_until_then(tmp_path: Path, net: Net) -> None:
    quantized: list[tuple[int, bool]] = []

    class Epochs(Watch):
        def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
            quantized.append((runner.epoch, is_quantized(runner.model)))

    training = runner(tmp_path, net, epochs=3, watch=Epochs(), calibration_epoch=1)
    training.train()
    assert set(quantized) == {(0, False), (1, True), (2, True)}
    assert KEY not in torch.load(tmp_path / "epoch_1.pth", weights_only=False)
    assert KEY in torch.load(tmp_path / "epoch_2.pth", weights_only=False)
    with pytest.raises(InputError, match="calibration_epoch is 3; training ends after 3 epochs"):
        runner(tmp_path / "never", Net(), epochs=3, calibration_epoch=3).train()
    with pytest.raises(InputError, match="calibration_epoch is -1"):
        QATHook(calibration_epoch=-1)
