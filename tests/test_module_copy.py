"""Modules that cannot be copied are refused in words."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import Tensor, nn

from cp_debug.errors import ModuleFailed
from cp_debug.probes.module_copy import copied


class Holds(nn.Module):
    """A layer with something beside its weights."""

    def __init__(self, what: object) -> None:
        super().__init__()
        self.layer, self.held = nn.Linear(4, 4), what

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


@pytest.mark.parametrize("what", [threading.Lock(), torch.ones(2, requires_grad=True) * 2, (x for x in ())])
def test_a_module_that_cannot_be_copied_is_refused_in_words(what: object) -> None:
    with pytest.raises(ModuleFailed, match="module 'Holds' cannot be copied, which this needs"):
        copied(Holds(what))


def test_a_copy_shares_nothing() -> None:
    module = Holds("text")
    other = copied(module)
    other.layer.weight.data.zero_()
    assert module.layer.weight.abs().sum() > 0
