"""Products whose derivatives are asked for and whose results are not."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from cp_debug.bisect.backward import _Uncomputed

CASES: dict[str, tuple[Callable[..., Tensor], list[tuple[int, ...]]]] = {
    "strided": (lambda x, w: functional.conv2d(x, w, stride=2, padding=1), [(2, 3, 9, 9), (4, 3, 3, 3)]),
    "with a bias": (lambda x, w, b: functional.conv1d(x, w, b, dilation=2), [(2, 3, 9), (4, 3, 3), (4,)]),
    "depthwise": (lambda x, w: functional.conv3d(x, w, groups=3), [(2, 3, 5, 5, 5), (3, 1, 3, 3, 3)]),
    "transposed": (
        lambda x, w: functional.conv_transpose2d(x, w, stride=2, padding=1, output_padding=1),
        [(2, 3, 9, 9), (3, 4, 3, 3)],
    ),
    "one matrix for all": (torch.matmul, [(2, 3, 4, 5), (5, 6)]),
    "a matrix for each": (torch.matmul, [(2, 3, 4, 5), (2, 3, 5, 6)]),
    "of two matrices": (torch.matmul, [(4, 5), (5, 6)]),
    "added": (torch.addmm, [(6,), (4, 5), (5, 6)]),
}


@pytest.mark.parametrize("case", CASES)
def test_derivatives_of_a_product_need_no_product(case: str) -> None:
    function, shapes = CASES[case]
    given = [torch.randn(shape, requires_grad=True) for shape in shapes]

    def derivatives(result: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad([result], given, [torch.ones_like(result)])

    computed = function(*given)
    with _Uncomputed():
        uncomputed = function(*given)
    assert (uncomputed.shape, uncomputed.dtype) == (computed.shape, computed.dtype)
    for ours, theirs in zip(derivatives(uncomputed), derivatives(computed), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_torch_keeps_no_compiler_off_products_that_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(torch, "_disable_dynamo", lambda function, recursive: asked.append(function) or function)
    assert type("Mode", (_Uncomputed,), {"__torch_dispatch__": lambda self, func, *rest: func}) is not None
    assert not asked


@pytest.mark.slow
def test_a_product_that_is_left_out_imports_neither_compiler_nor_algebra() -> None:
    """Each takes seconds."""
    code = """
import sys, torch
from cp_debug.bisect.backward import _Uncomputed
with _Uncomputed():
    torch.conv2d(torch.ones(1, 3, 8, 8), torch.ones(4, 3, 3, 3))
print("torch._dynamo" in sys.modules, "sympy" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]
