"""The calls of AWML's own quantization, with its names, beside this project's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from extras import module_needs
from torch import Tensor, nn

from cp_debug.errors import InputError
from cp_debug.quantization import (
    CalibrationManager,
    disable_quantization,
    enable_quantization,
    fuse_model_bn,
    load_ptq_model,
    print_quantizer_status,
    quantize_ptq,
    save_ptq_model,
    scales_of,
)

pytestmark = module_needs("modelopt")


class Detector(nn.Module):
    """Takes nested batches, as a data loader of mmdet3d gives them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.pts_backbone = nn.Sequential(nn.Conv2d(3, 16, 3, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        self.pts_bbox_head = nn.Conv2d(16, 2, 1)
        self.seen = 0
        with torch.no_grad():
            self.pts_backbone[1].running_mean.normal_()
        self.eval()

    def forward(self, inputs: dict[str, Any], data_samples: Any = None, mode: str = "tensor") -> Any:
        maps = self.pts_bbox_head(self.pts_backbone(inputs["canvas"]))
        return [{"boxes": maps.flatten(), "sample": data_samples}] if mode == "predict" else maps

    def test_step(self, data: dict[str, Any]) -> Any:
        self.seen += 1
        return self(**data, mode="predict")


def loader(count: int = 5) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(1)
    canvases = [torch.randn(1, 3, 8, 8, generator=generator) for _ in range(count)]
    return [{"inputs": {"canvas": canvas, "name": "frame"}, "data_samples": [object()]} for canvas in canvases]


def plain(batches: list[dict[str, Any]]) -> list[Tensor]:
    return [batch["inputs"]["canvas"] for batch in batches]


class Dense(Detector):
    def forward(self, canvas: Tensor) -> Any:  # type: ignore[override]
        return self.pts_bbox_head(self.pts_backbone(canvas))

    test_step = None  # type: ignore[assignment]


def test_the_reports_call_gives_what_this_projects_call_gives() -> None:
    model, batches = Detector(), loader()
    quantized = quantize_ptq(model, batches, 3, "max", True)  # in the order of AWML's signature
    by_name = quantize_ptq(model, batches, num_calibration_batches=3, amax_method="max", fuse_bn=True)
    assert type(model) is Detector
    assert type(quantized) is Detector
    ours = quantize_ptq(Dense(), plain(batches[:3]), method="max")
    assert scales_of(quantized).layers.keys() == {"pts_backbone.0", "pts_bbox_head"}
    for name, layer in scales_of(ours).layers.items():
        assert scales_of(quantized).layers[name].input == layer.input
    canvas = plain(batches)[4]
    assert torch.equal(quantized(inputs={"canvas": canvas}), ours(canvas))
    assert torch.equal(by_name(inputs={"canvas": canvas}), ours(canvas))
    (boxes,) = quantized.test_step({"inputs": {"canvas": canvas}})
    assert torch.equal(boxes["boxes"], ours(canvas).flatten())


def test_every_call_takes_awmls_keywords(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """``model=``, ``dataloader=`` and ``checkpoint_path=`` are ours under AWML's names; without a method it is mse."""
    batches = loader()
    quantized = quantize_ptq(model=Detector(), dataloader=batches, num_calibration_batches=3)
    assert scales_of(quantized).method == "mse"
    same = quantize_ptq(Detector(), batches[:3], method="mse")
    canvas = {"canvas": plain(batches)[4]}
    assert torch.equal(quantized(inputs=canvas), same(inputs=canvas))
    print_quantizer_status(model=quantized)
    assert "pts_backbone.0.weight_quantizer" in capsys.readouterr().out
    save_ptq_model(model=quantized, path=tmp_path / "ptq.pth")
    loaded = load_ptq_model(model=Detector(), checkpoint_path=tmp_path / "ptq.pth")
    assert torch.equal(loaded(inputs=canvas), quantized(inputs=canvas))
    with disable_quantization(model=quantized):
        off = quantized(inputs=canvas)
    assert not torch.equal(off, quantized(inputs=canvas))


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda: quantize_ptq(Detector(), model=Detector(), dataloader=[]), TypeError, "multiple values .* 'module'"),
        (lambda: quantize_ptq(module=Detector(), model=Detector(), dataloader=[]), InputError, "mean the same"),
        (lambda: quantize_ptq(model="net", dataloader=loader()), InputError, "^model: str; expected a torch module"),
        (lambda: quantize_ptq(model=Detector(), dataloader=5), InputError, "^dataloader: int; expected batches"),
        (lambda: quantize_ptq(Detector(), loader(), num_batches=3), TypeError, "unexpected keyword .*num_batches"),
        (lambda: CalibrationManager(model=Detector()).calibrate(loader(), 0), InputError, "num_batches is 0"),
    ],
)
def test_calls_that_cannot_be_meant(call: Callable[[], Any], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        call()


def test_sensitive_layers_forward_fn_and_no_folding() -> None:
    called: list[str] = []

    def forward_fn(model: nn.Module, batch: dict[str, Any]) -> Any:
        called.append(batch["inputs"]["name"])
        return model(batch["inputs"])

    model = Detector()
    quantized = quantize_ptq(
        model,
        loader(),
        num_calibration_batches=2,
        amax_method="entropy",
        fuse_bn=False,
        sensitive_layers={"pts_backbone.0"},
        forward_fn=forward_fn,
    )
    assert called
    assert set(called) == {"frame"}
    assert not model.seen, "forward_fn goes before test_step"
    assert list(scales_of(quantized).layers) == ["pts_bbox_head"]
    assert scales_of(quantized).method == "entropy"
    assert isinstance(quantized.pts_backbone[1], nn.BatchNorm2d)


def test_a_quantized_model_is_saved_and_loaded(tmp_path: Path) -> None:
    quantized = quantize_ptq(Dense(), plain(loader()), amax_method="max")
    save_ptq_model(quantized, tmp_path / "ptq.pth")
    loaded = load_ptq_model(Dense(), tmp_path / "ptq.pth")
    (canvas,) = plain(loader(1))
    assert torch.equal(loaded(canvas), quantized(canvas))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"method": "mse", "amax_method": "max"}, "method and amax_method mean the same"),
        ({"fold": False, "fuse_bn": True}, "fold and fuse_bn mean the same"),
        ({"skip_layers": ["a"], "sensitive_layers": ["b"]}, "skip_layers and sensitive_layers mean the same"),
        ({"num_calibration_batches": 0}, "num_calibration_batches is 0; expected at least 1"),
        ({"amax_method": "median"}, "^amax_method: 'median' is unknown"),
        ({"sensitive_layers": ["pts_nek"]}, "no layer matches 'pts_nek'"),
    ],
)
def test_names_that_contradict_or_mean_nothing(options: dict[str, Any], says: str) -> None:
    model = Detector()
    with pytest.raises(InputError, match=says):
        quantize_ptq(model, loader(1), **options)
    assert type(model) is Detector


@pytest.mark.parametrize("columns", ["20", "40", "80"])
def test_the_status_never_cuts_names_or_ranges(
    columns: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    quantized = quantize_ptq(Dense(), plain(loader(1)), num_calibration_batches=1, verbose=True)
    text = capsys.readouterr().out
    assert "pts_backbone.0.weight_quantizer" in text
    weights = scales_of(quantized).layers["pts_backbone.0"].weight
    assert f"{weights.min():.3g} … {weights.max():.3g}" in text
    print_quantizer_status(quantized)
    assert capsys.readouterr().out == text


def test_layers_are_switched_off_one_by_one_with_apply() -> None:
    """The reports' loop over sensitive layers: ``disable_quantization(layer).apply()``."""
    batches = loader()
    quantized = quantize_ptq(Detector(), batches, num_calibration_batches=3, amax_method="max")
    canvas = {"canvas": plain(batches)[4]}
    before = quantized(inputs=canvas)
    switch = disable_quantization(quantized.pts_backbone).apply()
    partly = quantized(inputs=canvas)
    disable_quantization(quantized.pts_bbox_head).apply()
    with disable_quantization(quantized):
        assert torch.equal(quantized(inputs=canvas), quantized(inputs=canvas))
    exact = fuse_model_bn(Dense(), (canvas["canvas"],))(canvas["canvas"])
    assert not torch.equal(before, partly)
    assert torch.equal(quantized(inputs=canvas), exact)
    switch.apply(False)
    enable_quantization(quantized.pts_bbox_head).apply()
    assert torch.equal(quantized(inputs=canvas), before)
    with pytest.raises(InputError, match="Conv2d is not quantized"):
        disable_quantization(nn.Conv2d(3, 4, 1))


def test_a_calibration_manager_takes_the_data_loader() -> None:
    """The reports' ``CalibrationManager(model).calibrate(loader)``."""
    scales = CalibrationManager(Detector(), method="max").calibrate(loader())
    assert scales.layers.keys() >= {"pts_backbone.0", "pts_bbox_head"}


def test_a_calibration_manager_is_called_in_awmls_order() -> None:
    """``CalibrationManager(model).calibrate(dataloader, num_batches, method, forward_fn)``."""
    manager, batches = CalibrationManager(model=Detector()), loader()
    scales = manager.calibrate(batches, 3, "max", lambda model, batch: model(batch["inputs"]))
    by_name = CalibrationManager(Detector()).calibrate(dataloader=batches, num_batches=3, method="max")
    whole = CalibrationManager(Detector(), method="max").calibrate(batches)
    inputs = [found.layers["pts_backbone.0"].input for found in (scales, by_name, whole)]
    assert scales.method == "max"
    assert inputs[0] == inputs[1] < inputs[2], "the largest magnitude is in the fourth batch or later"
    with pytest.raises(InputError, match="the earlier batches were observed for 'max'"):
        manager.calibrate(batches, 1, "mse")
