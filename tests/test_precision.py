"""Precisions: limits of their types, the coarser of two, the oracle that judges them."""

from __future__ import annotations

import pytest
import torch

from cp_debug.backends.narrow_options import NarrowOptions
from cp_debug.programs.precision import PRECISIONS, coarsest, of_operators, oracle_for


@pytest.mark.parametrize(
    ("a", "b", "name"),
    [("fp32", "fp16", "fp16"), ("bf16", "fp16", "bf16"), ("fp32", "fp32", "fp32"), ("tf32", "fp32", "tf32")],
)
def test_two_results_agree_as_well_as_the_coarser_precision(a: str, b: str, name: str) -> None:
    assert coarsest(a, b).name == coarsest(b, a).name == name


def test_limits_of_precisions_are_those_of_their_types() -> None:
    for name, kind in (("fp32", torch.float32), ("fp16", torch.float16), ("bf16", torch.bfloat16)):
        found, info = PRECISIONS[name], torch.finfo(kind)
        assert found.roundoff == info.eps / 2
        assert found.largest == pytest.approx(info.max, rel=1e-6)
        assert found.tiniest == pytest.approx(info.tiny, rel=1e-6)
    assert PRECISIONS["fp8:e5m2"].roundoff == 2 * PRECISIONS["fp8"].roundoff


def test_only_products_are_narrow() -> None:
    assert of_operators("fp32", ["Relu"]) == "fp32"
    assert of_operators("int4", ["Relu", "MatMul"]) == "int4"
    assert of_operators("int4", ["Conv"]) == NarrowOptions.parse("int4").out
    assert of_operators("fp8", ["Conv"]) == "fp8"
    assert of_operators("fp8", ["Relu"]) == NarrowOptions.parse("fp8").out


@pytest.mark.parametrize(
    ("reference", "test", "oracle"),
    [("fp32", "fp32", "fp64"), ("fp64", "fp32", "fp64"), ("fp32", "fp16", "fp32"), ("fp32", "tf32", "fp32"),
     ("bf16", "fp32", "fp32")],
)  # fmt: skip
def test_the_oracle_is_finer_than_what_is_judged(reference: str, test: str, oracle: str) -> None:
    assert oracle_for(reference, test) == oracle
    assert coarsest(reference, None, test).name == (test if reference in ("fp32", "fp64") else reference)
