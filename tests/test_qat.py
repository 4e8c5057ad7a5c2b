"""Fine-tuning: it gets better, keeps the best, stops, resumes to the same bits, and survives Ctrl-C."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from extras import needs
from torch import Tensor, nn

from cp_debug.errors import InputError
from cp_debug.quantization.checkpoint import load_ptq_model, save_ptq_model
from cp_debug.quantization.open_quantized import adopt_weights, modules_of, open_quantized, unquantized
from cp_debug.quantization.ptq import apply_scales, quantize_ptq, scales_of
from cp_debug.quantization.qat import QatOptions, QatResult, Validation, _stale, _unfreeze, finetune
from cp_debug.quantization.qat_centerpoint import (
    Scenes,
    as_trainable,
    finetune_centerpoint,
    quantized_network,
    training_scenes,
)
from cp_debug.recipes.registry import load_model

Batch = tuple[Tensor, Tensor]


def build() -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.BatchNorm2d(8), nn.Conv2d(8, 1, 1)
    )
    return net.eval()


@pytest.fixture
def net() -> nn.Module:
    return build()


@pytest.fixture
def quantized(net: nn.Module) -> nn.Module:
    """With weights that are not the best for the grid that they are on."""
    made = quantize_ptq(net, [torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(5))])
    with torch.no_grad():
        made[4].weight.mul_(0.7)
    return made


def batch(step: int) -> Batch:
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(step))
    with torch.no_grad():
        return x, build()(x)


def loss(module: nn.Module, batch: Batch) -> Tensor:
    return (module(batch[0]) - batch[1]).square().mean()


def validate(module: nn.Module) -> float:
    assert not module.training
    return loss(module, batch(10_000)).item()


def interrupted(step: int) -> Batch:
    if step == 25:
        raise KeyboardInterrupt
    return batch(step)


OPTIONS = QatOptions(steps=40, rate=1e-2, interval=10)


def run(module: nn.Module, options: QatOptions = OPTIONS, **more: object) -> QatResult:
    return finetune(module, batch, loss, validate, options, **more)  # type: ignore[arg-type]


@needs("modelopt")
def test_fine_tuning_recovers_and_leaves_batchnorm_and_scales_alone(quantized: nn.Module) -> None:
    before = copy.deepcopy(quantized.state_dict())
    result = run(quantized)
    assert result.best[1] < result.history[0][2] / 2
    assert validate(quantized) == result.best[1]
    changed = {name for name, tensor in quantized.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {"0.weight", "0.bias", "4.weight", "4.bias"}
    assert not any(parameter.requires_grad for parameter in quantized.parameters())
    assert result.to_dict()["history"][0]["training_loss"] == "NaN"


@needs("modelopt")
def test_the_best_is_kept_and_training_stops(quantized: nn.Module) -> None:
    values = iter([5.0, 3.0, 4.0, 3.5, 3.2, 0.0])
    kept = []

    def noted(module: nn.Module) -> float:
        kept.append(copy.deepcopy(module.state_dict()))
        return next(values)

    result = finetune(quantized, batch, loss, noted, QatOptions(steps=100, rate=1e-2, interval=2, patience=3))
    assert (result.ended, result.best) == ("patience", (2, 3.0))
    assert [step for step, *_ in result.history] == [0, 2, 4, 6, 8]
    assert all(torch.equal(tensor, kept[1][name]) for name, tensor in quantized.state_dict().items())


@needs("modelopt")
def test_the_start_is_kept_when_nothing_is_better(quantized: nn.Module) -> None:
    before = copy.deepcopy(quantized.state_dict())
    values = iter([1.0, 2.0, 3.0])
    result = finetune(quantized, batch, loss, lambda module: next(values), QatOptions(steps=4, rate=1e-2, interval=2))
    assert result.best == (0, 1.0)
    assert all(torch.equal(tensor, before[name]) for name, tensor in quantized.state_dict().items())


@needs("modelopt")
def test_a_resumed_run_ends_where_an_uninterrupted_one_does(quantized: nn.Module, tmp_path: Path) -> None:
    whole, first, second = (copy.deepcopy(quantized) for _ in range(3))
    expected = run(whole)
    finetune(first, interrupted, loss, validate, OPTIONS, state=tmp_path / "state")
    result = run(second, state=tmp_path / "state", resume=True)
    assert result.history[1:] == expected.history[1:]
    assert all(torch.equal(tensor, whole.state_dict()[name]) for name, tensor in second.state_dict().items())


@needs("modelopt")
def test_ctrl_c_keeps_the_best(quantized: nn.Module, tmp_path: Path) -> None:
    result = finetune(quantized, interrupted, loss, validate, OPTIONS, state=tmp_path / "state")
    assert result.ended == "interrupted"
    assert result.history[-1][0] == 20
    assert validate(quantized) == result.best[1]
    assert not list(tmp_path.glob("*.partial"))


def _state_of_another_rate(path: Path, quantized: nn.Module) -> None:
    run(quantized, QatOptions(steps=1, rate=1e-4, interval=10), state=path)


@needs("modelopt")
@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda path, module: None, "there is no state"),
        (lambda path, module: path.write_bytes(b"no state"), "not a state of this fine-tuning"),
        (lambda path, module: torch.save({"format": "other"}, path), "not a state of this fine-tuning"),
        (_state_of_another_rate, "has rate 0.0001, not 0.01"),
    ],
)
def test_a_state_that_does_not_fit(
    quantized: nn.Module, tmp_path: Path, make: Callable[[Path, nn.Module], None], says: str
) -> None:
    make(tmp_path / "state", copy.deepcopy(quantized))
    with pytest.raises(InputError, match=says):
        run(quantized, state=tmp_path / "state", resume=True)


@needs("modelopt")
def test_bad_input(net: nn.Module, quantized: nn.Module) -> None:
    with pytest.raises(InputError, match="is not quantized"):
        run(net)
    with pytest.raises(InputError, match="steps is 0"):
        QatOptions(steps=0)
    with pytest.raises(InputError, match="learning rate is 2"):
        QatOptions(rate=2.0)
    with pytest.raises(InputError, match="step 0: the loss is nan"):
        finetune(quantized, batch, lambda module, each: loss(module, each) * float("nan"), validate, OPTIONS)


@needs("modelopt")
def test_scales_belong_to_the_trained_weights(net: nn.Module, quantized: nn.Module, tmp_path: Path) -> None:
    run(quantized)
    with pytest.raises(InputError, match="other weights"):
        apply_scales(unquantized(net, quantized), scales_of(quantized))
    adopt_weights(net, quantized)
    x, _ = batch(7)
    again = apply_scales(unquantized(net, quantized), scales_of(quantized))
    assert torch.equal(again(x), quantized(x))
    save_ptq_model(quantized, tmp_path / "qat.pt")
    assert torch.equal(load_ptq_model(net, tmp_path / "qat.pt")(x), quantized(x))


@needs("modelopt")
@pytest.mark.slow
def test_centerpoint_is_fine_tuned_in_place() -> None:
    model = as_trainable(load_model("centerpoint:tiny"))
    modules = modules_of(open_quantized(model, None, count=2, method="max"))
    untouched = {name: tensor.clone() for name, tensor in model.network.state_dict().items()}
    scenes = training_scenes(model, None, 4)
    held_out = [scenes[3]]
    result = finetune_centerpoint(model, modules, scenes, held_out, QatOptions(steps=3, rate=1e-4, interval=1), batch=1)
    losses = [value for _, _, value in result.history]
    assert losses[-1] < losses[0]
    assert all(torch.equal(tensor, untouched[name]) for name, tensor in model.network.state_dict().items())
    network = quantized_network(model, modules)
    assert network.pts_bbox_head is modules["pts_backbone_neck_head"].pts_bbox_head
    with pytest.raises(InputError, match="expected one of loss, map"):
        finetune_centerpoint(model, modules, scenes, held_out, OPTIONS, criterion="speed")
    with pytest.raises(InputError, match="nothing to train"):
        finetune_centerpoint(model, modules, Scenes(0, scenes.__getitem__), held_out, OPTIONS)


def test_a_quantized_network_has_the_parts_of_the_quantized_components() -> None:
    own, encoder, head = nn.Identity(), nn.Identity(), nn.Identity()
    network, rest = nn.Module(), nn.Module()
    network.pts_voxel_encoder, network.pts_bbox_head, rest.pts_bbox_head = own, own, head
    model: Any = SimpleNamespace(network=network)
    found = quantized_network(model, {"pts_voxel_encoder": encoder, "pts_backbone_neck_head": rest})
    assert (found.pts_voxel_encoder, found.pts_bbox_head) == (encoder, head)
    assert (network.pts_voxel_encoder, network.pts_bbox_head) == (own, own)


def test_models_without_a_training_loss() -> None:
    other = as_trainable(load_model("centerpoint:awml-base"))
    with pytest.raises(InputError, match="needs an info file"):
        training_scenes(other, None, 4)


@needs("modelopt")
def test_the_rate_falls_along_a_cosine_gradients_are_bounded_and_losses_averaged(
    quantized: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates, norms, losses = [], [], []
    step = torch.optim.Adam.step

    def noted(optimizer: torch.optim.Adam) -> None:
        (group,) = optimizer.param_groups
        rates.append(group["lr"])
        norms.append(math.hypot(*(float(p.grad.norm()) for p in group["params"] if p.grad is not None)))
        step(optimizer)

    def steep(module: nn.Module, each: Batch) -> Tensor:
        value = 1e6 * loss(module, each)
        losses.append(value.item())
        return value

    monkeypatch.setattr(torch.optim.Adam, "step", noted)
    result = finetune(quantized, batch, steep, validate, QatOptions(steps=5, rate=1e-3, interval=3))
    assert rates == pytest.approx([1e-3 * (1 + math.cos(math.pi * k / 5)) / 2 for k in range(5)])
    assert norms == pytest.approx([35.0] * 5, rel=1e-3)
    assert [done for done, *_ in result.history] == [0, 3, 5]
    assert [mean for _, mean, _ in result.history[1:]] == pytest.approx([sum(losses[:3]) / 3, sum(losses[3:]) / 2])


def test_validations_since_the_best_one() -> None:
    assert _stale([Validation(0, 0.0, 3.0), Validation(1, 0.0, 1.0), Validation(2, 0.0, 2.0)]) == 1
    assert _stale([Validation(0, 0.0, 1.0), Validation(1, 0.0, 1.0)]) == 1
    assert _stale([Validation(0, 0.0, 2.0), Validation(1, 9.0, 1.0)]) == 0


def test_batch_norms_stay_as_they_are_while_the_rest_is_trained() -> None:
    net = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2), nn.Conv2d(2, 1, 1)).requires_grad_(False).train()
    trained = _unfreeze(net)
    assert [id(p) for p in trained] == [id(p) for part in (net[0], net[2]) for p in part.parameters()]
    assert not net[1].training
    assert net[0].training
