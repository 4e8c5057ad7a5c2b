"""Batches of any nesting on their way through a tracer that takes tensors alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cp_debug.quantization.calibration import NestedBatches, is_plain, tensors_only


def test_of_what_a_model_predicts_tensors_alone_count() -> None:
    ones = torch.ones(2)
    assert tensors_only(lambda model, batch: {"a": [ones, "text"], "b": None})(nn.Identity(), None) == (ones,)
    assert tensors_only(lambda model, batch: "text")(nn.Identity(), None) == torch.zeros(())


@pytest.mark.parametrize(
    ("batch", "plain"),
    [
        (torch.zeros(1), True),
        ([torch.zeros(1), torch.zeros(2)], True),
        ({"a": torch.zeros(1)}, True),
        ({"a": torch.zeros(1), "b": "text"}, False),
        ([torch.zeros(1), [torch.zeros(1)]], False),
        (7, False),
    ],
)
def test_a_plain_batch_holds_tensors_and_nothing_else(batch: Any, plain: bool) -> None:
    assert is_plain(batch) == plain


class Doubler(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


def test_nested_batches_reach_the_call_as_they_were() -> None:
    model, seen = Doubler(), []

    def call(module: nn.Module, batch: Any) -> Any:
        seen.append(batch)
        return module(batch["data"][0]), "no tensor"

    nested = NestedBatches(model, tensors_only(call))
    batches = [{"data": [torch.tensor([float(i)]), "name"], "count": i, "more": torch.tensor(9)} for i in (1, 2)]
    given = []
    for tensors in nested.tensors(batches):
        given.append(tensors)
        (result,) = model(*(t + 10 for t in tensors))
        assert result.tolist() == [2 * (tensors[0].item() + 10)]
    nested.restore(model)
    assert [[t.tolist() for t in each] for each in given] == [[[1.0], 9], [[2.0], 9]]
    assert [(b["data"][0].item(), b["data"][1], b["count"], b["more"].item()) for b in seen] == [
        (11.0, "name", 1, 19), (12.0, "name", 2, 19),
    ]  # fmt: skip
    assert type(model) is Doubler
    assert model(torch.ones(1)).tolist() == [2]


def test_a_call_that_gives_no_tensor_gives_one_nobody_looks_at() -> None:
    assert tensors_only(lambda model, batch: ["boxes", 3])(nn.Identity(), None).shape == ()
    found = tensors_only(lambda model, batch: {"a": torch.ones(2), "b": "text"})(nn.Identity(), None)
    assert [t.tolist() for t in found] == [[1, 1]]
