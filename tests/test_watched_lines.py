"""Small behaviours that a mutation run found unwatched."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch

from cp_debug.probes.arrays import has_torch_type
from cp_debug.probes.dumps import read_dump
from cp_debug.programs.pairing_numbers import _tolerance


@pytest.mark.parametrize("dtype", [np.float32, np.int64, np.bool_, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn])
def test_types_that_torch_has(dtype: type) -> None:
    assert has_torch_type(np.zeros(2, dtype))


@pytest.mark.parametrize("dtype", [ml_dtypes.int4, ml_dtypes.uint4])
def test_types_that_torch_cannot_reckon_with(dtype: type) -> None:
    assert not has_torch_type(np.zeros(2, dtype))


def test_the_first_of_several_iterations_is_the_dump(tmp_path: Path) -> None:
    def encoded(number: float) -> dict[str, str]:
        np.save(held := io.BytesIO(), np.full(3, number, np.float32))
        return {"array": base64.b64encode(held.getvalue()).decode()}

    path = tmp_path / "inputs.json"
    path.write_text(json.dumps([{"x": encoded(1)}, {"x": encoded(2)}]), encoding="utf-8")
    np.testing.assert_array_equal(read_dump(path)["x"], np.full(3, 1, np.float32))


def test_a_narrow_tensor_is_paired_with_more_room() -> None:
    narrow, wide = torch.zeros(1, dtype=torch.float16), torch.zeros(1)
    assert _tolerance(torch.zeros(1, dtype=torch.bfloat16)) > _tolerance(narrow) > _tolerance(wide)
    assert _tolerance(np.zeros(1, np.float32)) == _tolerance(wide)
