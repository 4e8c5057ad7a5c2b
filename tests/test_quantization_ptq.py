"""Quantized modules compute as INT8 would, are saved bit for bit, and can be switched off."""

from __future__ import annotations

import copy
import pickle
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from extras import needs
from torch import Tensor, nn

from cp_debug import quantization
from cp_debug.errors import InputError, MissingPackage
from cp_debug.graph.scales import QMAX
from cp_debug.programs.torch_layers import quantizers
from cp_debug.quantization import (
    apply_scales,
    disable_quantization,
    enable_quantization,
    fuse_model_bn,
    load_ptq_model,
    print_quantizer_status,
    quantize_ptq,
    quantizer_table,
    save_ptq_model,
    scales_of,
)
from cp_debug.quantization.record import quantization_of
from cp_debug.quantization.residual_adds import add_quantizers, find_adds

pytestmark = needs("modelopt")


class Block(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)
        self.conv2, self.bn2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += x
        return self.relu(out)


class ResNet(nn.Module):
    """Two residual blocks, a transposed convolution with other channels in than out, a BatchNorm that stays."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.layer = nn.Sequential(Block(8), Block(8))
        self.up, self.norm = nn.ConvTranspose2d(8, 4, 2, 2), nn.BatchNorm2d(4)
        self.last = nn.BatchNorm2d(4)
        self.fc = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.up(self.layer(self.stem(x))))
        return self.fc(self.last(y.relu() + 1).mean((2, 3)))


def resnet(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    net = ResNet().eval()
    for part in net.modules():
        if isinstance(part, nn.BatchNorm2d):
            nn.init.normal_(part.running_mean, std=0.3)
            nn.init.uniform_(part.running_var, 0.5, 2)
    return net


def batches(count: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(2, 3, 12, 12, generator=generator) for _ in range(count)]


@pytest.fixture(scope="module")
def quantized() -> nn.Module:
    return quantize_ptq(resnet(), batches(), method="percentile", skip_layers=["net.fc"], prefix="net")


def run(module: nn.Module, x: Tensor | None = None) -> Tensor:
    with torch.no_grad():
        return module(batches()[0] if x is None else x)


def rounded(x: Tensor, amax: Tensor | float) -> Tensor:
    scale = amax / QMAX
    return (x / scale).round().clamp(-QMAX - 1, QMAX) * scale


def test_what_is_quantized(quantized: nn.Module) -> None:
    scales = scales_of(quantized, "net")
    assert set(scales.layers) == {"net.stem", "net.up", *(f"net.layer.{i}.conv{j}" for i in (0, 1) for j in (1, 2))}
    assert set(scales.residual_adds) == {"net.layer.0/add", "net.layer.1/add"}
    assert {path for path, q in quantizers(quantized) if q.is_enabled} == {
        *(f"{path.removeprefix('net.')}.{kind}_quantizer" for path in scales.layers for kind in ("input", "weight")),
        *(f"layer.{i}.add_quantizers.add" for i in (0, 1)),
    }
    error = (run(quantized) - run(resnet())).norm() / run(resnet()).norm()
    assert 1e-4 < error < 0.05


def test_a_layer_computes_as_int8_would(quantized: nn.Module) -> None:
    plain = fuse_model_bn(resnet(), (batches()[0],))
    scales = scales_of(quantized).layers
    x = torch.randn(2, 8, 5, 5)
    for path, axis in (("up", 1), ("layer.0.conv1", 0)):
        layer = plain.get_submodule(path)
        shape = [-1 if d == axis else 1 for d in range(4)]
        weight = rounded(layer.weight, torch.from_numpy(scales[path].weight).view(shape))
        assert len(scales[path].weight) == weight.shape[axis]
        with torch.no_grad():
            layer.weight.copy_(weight)
        expected = run(layer, rounded(x, scales[path].input))
        found = run(quantized.get_submodule(path), x)
        assert (found - expected).norm() < 1e-5 * expected.norm()


class Sums(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x + y


class Sum(nn.Module):
    """A sum in one of several spellings, beside sums that are no residual ones."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.inner, self.conv = how, Sums(), nn.Conv2d(3, 3, 1)
        self.bias = nn.Parameter(torch.ones(3, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        x = x + 1  # a number, a weight, another shape: no activations of one shape
        x = torch.add(x, self.bias) + x.mean((2, 3), keepdim=True)
        if self.how == "+":
            return (x + y) * 1
        if self.how == "torch.add":
            return torch.add(x, y) * 1
        if self.how == "+=":
            x += y
            return x * 1
        if self.how == "add_":
            x.add_(y)
            return x * 1
        return self.inner(x, y)


@pytest.mark.parametrize("how", ["+", "torch.add", "+=", "add_", "module"])
def test_both_operands_of_an_addition_share_a_scale(how: str) -> None:
    torch.manual_seed(0)
    module = Sum(how).eval()
    x = torch.randn(1, 3, 4, 4)
    name = "inner" if how == "module" else "/add#4"
    assert find_adds(module, (x,)) == [name]
    made = quantize_ptq(module, [x], method="max", skip_layers=["conv"])
    for each in (made, copy.deepcopy(made)):
        with torch.no_grad():
            y = module.conv(x)
            left = x + 1 + module.bias + (x + 1).mean((2, 3), keepdim=True)
        amax = torch.maximum(left.abs().max(), y.abs().max())
        assert scales_of(each).residual_adds == {name: pytest.approx(float(amax))}
        expected = rounded(left, amax) + rounded(y, amax)
        assert (run(each, x) - expected).abs().max() < 1e-5
        with disable_quantization(each, name):
            assert torch.equal(run(each, x), run(module, x))


def test_additions_train() -> None:
    made = quantize_ptq(resnet(), batches(1))
    made(batches()[0]).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in made.parameters())


def test_a_module_that_raises_leaves_no_trace(quantized: nn.Module) -> None:
    broken = copy.deepcopy(quantized)
    with pytest.raises(RuntimeError):
        run(broken, torch.randn(2, 5, 12, 12))
    assert torch.equal(run(broken), run(quantized))


def test_saved_and_restored_bit_for_bit(quantized: nn.Module, tmp_path: Path) -> None:
    save_ptq_model(quantized, tmp_path / "model.pt")
    torch.load(tmp_path / "model.pt", weights_only=True)
    restored = load_ptq_model(resnet(seed=7), tmp_path / "model.pt")
    assert torch.equal(run(restored), run(quantized))
    assert quantization_of(restored) == quantization_of(quantized)
    before, after = scales_of(quantized), scales_of(restored)
    assert (before.model, before.residual_adds, before.layers.keys()) == (
        after.model,
        after.residual_adds,
        after.layers.keys(),
    )


def test_what_is_switched_off_stays_off(quantized: nn.Module, tmp_path: Path) -> None:
    made = copy.deepcopy(quantized)
    disable_quantization(made, "layer.0")
    save_ptq_model({"part": made}, tmp_path / "model.pt")
    restored = load_ptq_model(resnet(), tmp_path / "model.pt", "part")
    assert torch.equal(run(restored), run(made))
    assert set(scales_of(restored).layers) == {"stem", "up", "layer.1.conv1", "layer.1.conv2"}
    assert set(scales_of(restored).residual_adds) == {"layer.1/add"}


@pytest.mark.parametrize(
    "found", ["missing", "text", "pickle", "state", "other model", "other shapes", "quantized", "part"]
)
def test_what_cannot_be_restored_is_said(found: str, quantized: nn.Module, tmp_path: Path) -> None:
    path, module, component = tmp_path / "model.pt", resnet(), ""
    save_ptq_model(quantized, path)
    match = {
        "missing": "no such checkpoint",
        "text": "not a readable torch checkpoint",
        "pickle": "would run code",
        "state": "not a checkpoint of a quantized model",
        "other model": "the checkpoint of another model",
        "other shapes": r"stem.*\(expected \[8, 4, 3, 3\]\)",
        "quantized": "quantized already",
        "part": "holds the components ''; expected 'head'",
    }[found]
    if found == "missing":
        path.unlink()
    elif found == "text":
        path.write_text("hello")
    elif found == "pickle":
        path.write_bytes(pickle.dumps(print, protocol=2))
    elif found == "state":
        torch.save(module.state_dict(), path)
    elif found == "other model":
        module = nn.Sequential(nn.Conv2d(3, 8, 3))
    elif found == "other shapes":
        module.stem = nn.Conv2d(4, 8, 3)
    elif found == "quantized":
        module = quantized
    else:
        component = "head"
    with pytest.raises(InputError, match=match):
        load_ptq_model(module, path, component)


def test_switches(quantized: nn.Module) -> None:
    made = copy.deepcopy(quantized)
    on = {path for path, q in quantizers(made) if q.is_enabled}
    plain = run(fuse_model_bn(resnet(), (batches()[0],)))
    with disable_quantization(made):
        assert torch.equal(run(made), plain)
        with enable_quantization(made, "stem"):
            assert {path for path, q in quantizers(made) if q.is_enabled} == {
                "stem.input_quantizer",
                "stem.weight_quantizer",
            }
    assert torch.equal(run(made), run(quantized))
    disable_quantization(made)
    enable_quantization(made)
    assert {path for path, q in quantizers(made) if q.is_enabled} == on
    with pytest.raises(InputError, match=r"no layer matches 'stern'; the nearest names are stem"):
        disable_quantization(made, "stern")
    with pytest.raises(InputError, match="not quantized"):
        disable_quantization(resnet())


def test_the_table_says_why(
    quantized: nn.Module, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = copy.deepcopy(quantized)
    disable_quantization(made, "layer.1.conv2")
    rows = {row.name: row for row in quantizer_table(made)}
    weight = scales_of(made).layers["up"].weight
    up = rows["up.weight_quantizer"]
    assert (up.bits, up.axis, up.enabled, up.amax) == (8, 1, True, (weight.min(), weight.max()))
    assert rows["stem.input_quantizer"].axis is None
    assert rows["stem.input_quantizer"].amax == scales_of(made).layers["stem"].input
    why = {name: row.why for name, row in rows.items() if not row.enabled}
    assert why["layer.1.conv2.input_quantizer"] == "switched off"
    assert why["fc.weight_quantizer"] == "skipped by 'net.fc'"
    assert why["last.input_quantizer"] == "BatchNorm2d stays in FP32"
    assert why["stem.output_quantizer"] == "its readers quantize this output"
    monkeypatch.setenv("COLUMNS", "150")
    print_quantizer_status(made)
    assert "skipped by 'net.fc'" in capsys.readouterr().out


def test_scales_are_applied_without_calibration(quantized: nn.Module) -> None:
    folded = fuse_model_bn(resnet(), (batches()[0],))
    scales = scales_of(quantized, "net")
    assert torch.equal(run(apply_scales(folded, scales, "net")), run(quantized))
    with pytest.raises(InputError, match="calibrated on other weights"):
        apply_scales(fuse_model_bn(resnet(seed=7), (batches()[0],)), scales, "net")


def test_a_module_that_the_library_cannot_take_is_told(quantized: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    def too_deep(*_: object, **__: object) -> None:
        raise RecursionError("maximum recursion depth exceeded")

    folded, scales = fuse_model_bn(resnet(), (batches()[0],)), scales_of(quantized, "net")
    monkeypatch.setattr("modelopt.torch.quantization.quantize", too_deep)
    with pytest.raises(InputError, match="modelopt cannot insert quantizers: RecursionError"):
        apply_scales(folded, scales, "net")


def test_layers_that_do_not_run_are_named() -> None:
    module = Block(3)
    module.unused = nn.Conv2d(3, 2, 1)
    made = quantize_ptq(module.eval(), batches(1))
    assert quantization_of(made).skipped == {"unused": "it did not run during calibration"}


def test_folding_can_be_left_out() -> None:
    made = quantize_ptq(resnet(), batches(1), fold=False)
    assert isinstance(made.norm, nn.BatchNorm2d)
    rows = {row.name: row for row in quantizer_table(made)}
    assert rows["norm.input_quantizer"].why == "BatchNorm2d stays in FP32"
    assert add_quantizers(made)


def test_bad_input(quantized: nn.Module) -> None:
    with pytest.raises(InputError, match="no calibration data"):
        quantize_ptq(resnet(), [])
    with pytest.raises(InputError, match="quantized already"):
        quantize_ptq(quantized, batches())
    with pytest.raises(InputError, match="bits: 4 is not supported; expected 8"):
        quantize_ptq(resnet(), batches(), bits=4)
    with pytest.raises(InputError, match="'minmax' is unknown"):
        quantize_ptq(resnet(), batches(), method="minmax")
    with pytest.raises(InputError, match=r"no layer matches 'layer.0.conv3'.*layer\.0\.conv"):
        quantize_ptq(resnet(), batches(), skip_layers=["layer.0.conv3"])
    wrong = batches()
    wrong[2][0, 0, 0, 0] = float("nan")
    with pytest.raises(InputError, match="batch 2: the input 'x' holds NaN"):
        quantize_ptq(resnet(), wrong)
    with pytest.raises(InputError, match="not quantized"):
        scales_of(resnet())


def test_dead_activations_and_channels_have_a_scale() -> None:
    module = nn.Sequential(nn.Conv2d(3, 2, 1), nn.ReLU(), nn.Conv2d(2, 2, 1)).eval()
    with torch.no_grad():
        module[0].weight.zero_()
        module[0].bias.fill_(-1)
    scales = scales_of(quantize_ptq(module, batches(1), method="mse"))
    assert all(layer.input > 0 and np.all(layer.weight > 0) for layer in scales.layers.values())


def test_one_sentence_without_modelopt(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "modelopt"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "modelopt", None)
    with pytest.raises(MissingPackage, match=r"pip install '\.\[quant\]'"):
        quantize_ptq(resnet(), batches(1))


def test_names_of_the_package() -> None:
    assert all(getattr(quantization, name) is not None for name in quantization.__all__)
    with pytest.raises(AttributeError, match="quantise_ptq"):
        _ = quantization.quantise_ptq


def test_scales_are_those_of_layers_and_additions_that_are_wholly_on(quantized: nn.Module) -> None:
    module = copy.deepcopy(quantized)
    before = scales_of(module)
    stem: Any = module.stem
    stem.weight_quantizer.disable()
    first = next(iter(before.residual_adds))
    add_quantizers(module)[first].disable()
    after = scales_of(module)
    assert before.layers.keys() - after.layers.keys() == {"stem"}
    assert before.residual_adds.keys() - after.residual_adds.keys() == {first}
    stem.weight_quantizer.enable()
    stem.input_quantizer.disable()
    assert "stem" not in scales_of(module).layers


class Twice(nn.Module):
    """Runs one residual block twice, and one once."""

    def __init__(self) -> None:
        super().__init__()
        self.shared, self.own = Block(4), Block(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.own(self.shared(self.shared(x)))


def test_additions_of_a_module_that_runs_twice_are_left_out() -> None:
    assert [name.partition("/")[0] for name in find_adds(Twice().eval(), (torch.randn(1, 4, 5, 5),))] == ["own"]
