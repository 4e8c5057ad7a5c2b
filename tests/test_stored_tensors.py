"""Weights and buffers are found as torch finds them, whatever the module says of itself."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from cp_debug.errors import InputError
from cp_debug.probes.module_state import stored_tensors
from cp_debug.programs.export import export


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = self.first  # one layer, two names
        self.norm = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 2, bias=False))
        self.register_buffer("table", torch.ones(3))
        self.register_buffer("scratch", torch.zeros(2), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.second(self.first(x)))


def test_they_are_those_of_the_state_dict_in_its_order() -> None:
    net = Net()
    expected = net.state_dict()
    found = stored_tensors(net)
    assert list(found) == list(expected)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("replaced", [3, None, lambda: 3, lambda: {"x": "y"}])
def test_a_state_dict_of_ones_own_is_no_crash(tmp_path: Path, replaced: object) -> None:
    net = Net().eval()
    net.state_dict = replaced  # type: ignore[method-assign, assignment]
    assert "norm.1.weight" in stored_tensors(net)
    # The exporter asks the module, too: what it raises is a sentence.
    with pytest.raises(InputError, match="torchscript"):
        export(
            net,
            (torch.ones(2, 4),),
            tmp_path / "net.onnx",
            input_names=["x"],
            output_names=["y"],
            exporter="torchscript",
        )
    assert not list(tmp_path.iterdir())
