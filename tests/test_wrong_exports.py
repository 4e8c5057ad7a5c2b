"""A module against its own export: outputs by position, the operator that was exported wrongly, and what is healthy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cp_debug.api.diagnose import diagnose
from cp_debug.bisect.options import Options
from cp_debug.bisect.result import BisectResult


class Around(nn.Module):
    """A linear layer, ``op``, and where ``layers`` is larger as many more layers behind it."""

    def __init__(self, op: Callable[[Tensor], Any], layers: int = 0) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.a, self.op = nn.Linear(6, 16), op
        self.rest = nn.Sequential(*(nn.Sequential(nn.Linear(16, 16), nn.Tanh()) for _ in range(layers)))

    def forward(self, x: Tensor) -> Any:
        result = self.op(self.a(x))
        return self.rest(result) if len(self.rest) else result


def bisected(op: Callable[[Tensor], Any], layers: int = 0, exporter: str = "torchscript") -> BisectResult:
    """``torch,ort`` of a module around ``op``, which takes and gives [2, 9, 16]."""
    module = Around(op, layers).eval()
    x = torch.randn(2, 9, 6, generator=torch.Generator().manual_seed(0))
    return diagnose(module, "torch,ort", inputs=(x,), options=Options(exporter=exporter, cache=False))


def far_roll(x: Tensor) -> Tensor:
    """The TorchScript exporter writes a roll by more than the length as if nothing moved."""
    return torch.roll(x, 20, 1)


def written_late(x: Tensor) -> Tensor:
    """Written through a view after it was made: the TorchScript exporter gives it as it was before."""
    y = x.clone()
    y.transpose(1, 2).add_(torch.arange(9).float())
    return y


@pytest.mark.parametrize(
    ("op", "outputs"),
    [
        (far_roll, 1),
        (written_late, 1),
        (lambda x: (x * 2, far_roll(x)), 1),
        (lambda x: {"b": x + 1, "a": [x, {"c": written_late(x)}]}, 1),
        (lambda x: (far_roll(x), x, far_roll(x)), 2),
    ],
    ids=["only one", "written", "tuple", "nested", "twice"],
)
def test_an_output_is_what_the_module_returned_and_no_equal_tensor_inside(op: Any, outputs: int) -> None:
    result = bisected(op)
    assert not result.agrees
    wrong = [row for row in result.tests[0].outputs if not row.within]
    assert len(wrong) == outputs
    assert all(row.stats.rel_l2 > 0.1 for row in wrong)


@pytest.mark.parametrize("exporter", ["dynamo", "torchscript"])
@pytest.mark.parametrize(
    "op",
    [
        lambda x: (x, x),
        lambda x: {"b": x.relu(), "a": (x, [x.relu()])},
        lambda x: x.transpose(1, 2).contiguous(),
        lambda x: (x[0], x.sum(), torch.zeros(3)),
    ],
    ids=["twice", "nested", "view", "constant"],
)
def test_healthy_outputs_agree(op: Callable[[Tensor], Any], exporter: str) -> None:
    result = bisected(op, exporter=exporter)
    assert result.agrees
    assert all(row.within for row in result.tests[0].outputs)


@pytest.mark.parametrize("exporter", ["dynamo", "torchscript"])
def test_an_output_that_is_an_input_is_compared(exporter: str) -> None:
    class Given(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            return x, x * 2, x

    result = diagnose(
        Given().eval(), "torch,ort", inputs=(torch.randn(2, 3),), options=Options(exporter=exporter, cache=False)
    )
    assert result.agrees
    assert len(result.tests[0].outputs) == 3
