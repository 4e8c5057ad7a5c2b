"""Modules that cannot be copied are refused in words."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import Tensor, nn

from cp_debug.errors import ModuleFailed
from cp_debug.probes.module_state import copied, copied_to


class Holds(nn.Module):
    """A layer with something beside its weights."""

    def __init__(self, what: object) -> None:
        super().__init__()
        self.layer, self.held = nn.Linear(4, 4), what

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


@pytest.mark.parametrize("what", [threading.Lock(), torch.ones(2, requires_grad=True) * 2, (x for x in ())])
def test_a_module_that_cannot_be_copied_is_refused_in_words(what: object) -> None:
    with pytest.raises(ModuleFailed, match="module 'Holds' cannot be copied, which is needed here"):
        copied(Holds(what))


def test_a_copy_shares_nothing() -> None:
    module = Holds("text")
    other = copied(module)
    other.layer.weight.data.zero_()
    assert module.layer.weight.abs().sum() > 0


class Tied(nn.Module):
    """Weights under two names, a table of integers, a recurrent layer, a tensor that is no buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.out, self.lstm = nn.Embedding(5, 4), nn.Linear(4, 5, bias=False), nn.LSTM(4, 4)
        self.out.weight = self.embed.weight
        self.register_buffer("table", torch.arange(5))
        self.plain = torch.ones(2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.lstm(self.embed(self.table[x]))[0]) * self.plain.sum()


@pytest.mark.parametrize("dtype", [None, torch.float64])
def test_a_copy_in_another_dtype_is_what_a_copy_and_a_conversion_make(dtype: torch.dtype | None) -> None:
    module, tokens = Tied(), torch.tensor([[0, 3]])
    module.out.weight.requires_grad_(False)
    ours, plain = copied_to(module, torch.device("cpu"), dtype), copied(module).to("cpu", dtype)
    assert torch.equal(ours(tokens), plain(tokens))
    assert ours.out.weight is ours.embed.weight
    assert not ours.out.weight.requires_grad
    assert [(n, t.dtype) for n, t in ours.state_dict().items()] == [(n, t.dtype) for n, t in plain.state_dict().items()]
    for tensor in ours.state_dict().values():
        tensor.zero_()
    assert all(tensor.any() for name, tensor in module.state_dict().items())


def test_integers_keep_their_type_on_the_way_to_another_device() -> None:
    there = copied_to(Tied(), torch.device("meta"), torch.float64)
    assert {name: tensor.dtype for name, tensor in there.state_dict().items() if name in ("table", "embed.weight")} == {
        "table": torch.int64,
        "embed.weight": torch.float64,
    }
    assert {tensor.device.type for tensor in there.state_dict().values()} == {"meta"}
