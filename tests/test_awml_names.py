"""Arguments and checkpoints under the names that AWML's own quantization gave them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from extras import needs
from torch import Tensor, nn

from cp_debug.errors import InputError
from cp_debug.quantization import open_quantized
from cp_debug.quantization.open_quantized import load_amax_checkpoint
from cp_debug.quantization.record import also_named
from cp_debug.recipes.torch_callable import TorchModel


def test_arguments_may_have_the_names_that_others_gave_them() -> None:
    @also_named(amax_method="method")
    def called(method: str = "mse") -> str:
        return method

    assert called(amax_method="max") == called("max") == called(method="max") == "max"  # type: ignore[call-arg]
    assert called() == "mse"
    with pytest.raises(InputError, match="method and amax_method mean the same"):
        called(method="a", amax_method="b")  # type: ignore[call-arg]


def test_a_scale_of_a_whole_weight_is_repeated_for_its_channels() -> None:
    conv = nn.Conv2d(1, 3, 1)
    assert open_quantized._for_channels(conv, torch.tensor(2.0), "w").tolist() == [2, 2, 2]
    assert open_quantized._for_channels(conv, torch.tensor([[1.0], [2], [3]]), "w").tolist() == [1, 2, 3]
    with pytest.raises(InputError, match="w has 2 scales for its weight; expected one, or one for each of its 3"):
        open_quantized._for_channels(conv, torch.ones(2), "w")


def state_of(layer: nn.Linear, **more: Tensor) -> dict[str, Tensor]:
    own = {f"layer.{name}": tensor for name, tensor in layer.state_dict().items()}
    ranges = {"_input": torch.tensor([1.0, 3.0]), "_weight": torch.tensor(2.0)}
    return own | {f"layer.{kind}_quantizer._amax": amax for kind, amax in ranges.items()} | more


@needs("modelopt")
def test_scales_of_another_tools_checkpoint_are_the_largest_and_belong_to_layers(tmp_path: Path) -> None:
    module = nn.Sequential()
    module.add_module("layer", nn.Linear(4, 3))
    model = TorchModel("net", module.eval(), torch.ones(1, 4))
    (sample,) = model.samples(1, 0, None)
    torch.save(state_of(module.layer), tmp_path / "a.pt")  # type: ignore[arg-type]
    (found,) = load_amax_checkpoint(model, tmp_path / "a.pt", sample).values()
    (scales,) = found.scales.layers.values()
    assert scales.input == 3.0
    assert scales.weight.tolist() == [2.0] * 3
    torch.save(state_of(module.layer, **{"other._input_quantizer._amax": torch.tensor(1.0)}), tmp_path / "b.pt")  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"b\.pt: other\._input_quantizer\._amax is the scale of no layer of net"):
        load_amax_checkpoint(model, tmp_path / "b.pt", sample)
