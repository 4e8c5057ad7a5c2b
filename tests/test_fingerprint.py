"""The fingerprint's estimate against the distance computed element by element."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cp_debug.probes import fingerprint as module
from cp_debug.probes.fingerprint import fingerprint


@settings(deadline=None, max_examples=40)
@given(
    shape=st.lists(st.integers(1, 40), max_size=3),
    scale=st.floats(1e-7, 10),
    seed=st.integers(0, 99),
    sparse=st.booleans(),
)
def test_estimates_the_relative_l2_distance(shape: list[int], scale: float, seed: int, sparse: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    delta = torch.randn(shape, generator=generator, dtype=torch.float64) * scale
    if sparse:
        delta.view(-1)[1:] = 0
    y = x + delta
    true = float((x - y).norm() / max(x.norm(), y.norm()))
    # 16 degrees of freedom: outside of these factors once in 10^7.
    assert true / 4 < fingerprint(x).distance(fingerprint(y)) < 2.5 * true


def test_reads_every_block(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(3 * module._CHUNK + 5)
    reference = fingerprint(x)
    for position in (0, module._BLOCK, module._CHUNK, 3 * module._CHUNK + 4):
        y = x.clone()
        y[position] += 100
        assert reference.distance(fingerprint(y)) > 0.02


def test_equal_contents_have_distance_zero_whatever_holds_them() -> None:
    x = torch.randn(3, 4, 5)
    assert fingerprint(x).distance(fingerprint(x.numpy())) == 0
    assert fingerprint(x.transpose(0, 2)).distance(fingerprint(x.transpose(0, 2).contiguous())) == 0
    for other in (torch.zeros(0, 3), torch.tensor(3), torch.tensor([True, False]), torch.zeros(2, 2)):
        assert fingerprint(other).distance(fingerprint(other.clone())) == 0


def test_shape_and_special_values_count() -> None:
    x = torch.randn(4)
    assert fingerprint(x).distance(fingerprint(x.view(2, 2))) == np.inf
    y = torch.tensor([1.0, float("nan"), float("inf"), 2.0])
    assert fingerprint(y).distance(fingerprint(y.clone())) == 0
    assert fingerprint(y).distance(fingerprint(torch.tensor([1.0, float("nan"), float("-inf"), 2.0]))) == np.inf


@pytest.mark.filterwarnings("error")
def test_complex_numbers_count_with_both_parts() -> None:
    x = torch.complex(torch.ones(2, 3), torch.ones(2, 3))
    assert fingerprint(x).distance(fingerprint(x.numpy())) == 0
    assert fingerprint(x).distance(fingerprint(x.conj())) > 0.1


def test_a_distance_is_relative_to_the_larger_of_both() -> None:
    x = torch.ones(4096)
    for factor in (0.5, 0.01):
        assert fingerprint(factor * x).distance(fingerprint(x)) == pytest.approx(
            fingerprint(x).distance(fingerprint(factor * x))
        )
        assert 0.5 * (1 - factor) < fingerprint(x).distance(fingerprint(factor * x)) < 1.7 * (1 - factor)


def test_a_number_of_numpy_is_an_array_without_axes() -> None:
    number = np.float64(2.5)
    assert fingerprint(number).shape == ()  # type: ignore[arg-type]
    assert fingerprint(number).distance(fingerprint(np.array(2.5))) == 0  # type: ignore[arg-type]


def test_a_fingerprint_counts_what_is_not_finite_and_measures_the_rest() -> None:
    x = torch.tensor([3.0, -torch.inf, 4.0, torch.nan, torch.inf, -torch.inf])
    found = fingerprint(x)
    assert found.special == (1, 1, 2)
    assert found.norm == pytest.approx(5)
    assert found.distance(fingerprint(x)) == 0
    assert found.distance(fingerprint(x[:5])) == float("inf")
    assert found.distance(fingerprint(torch.where(x == torch.inf, 0.0, x))) == float("inf")


def test_a_fingerprints_distance_is_relative_to_the_larger_one() -> None:
    """16 projections know it to a fifth."""
    generator = torch.Generator().manual_seed(0)
    distances = []
    for _ in range(20):
        x, d = torch.randn(2, 10_000, generator=generator).double()
        distances.append(fingerprint(x).distance(fingerprint(10 * x + 0.1 * d)))
        assert distances[-1] == fingerprint(10 * x + 0.1 * d).distance(fingerprint(x))
    assert np.mean(distances) == pytest.approx(0.9, rel=0.15)


@pytest.mark.parametrize("size", [1e-30, 1e-3, 1e30, 3e38])
def test_in_fp32_it_says_what_it_says_in_fp64(size: float) -> None:
    """Also where squares leave FP32's range, in some pieces or in all."""
    x = torch.rand(2 * module._PIECE + 7)
    x[: module._PIECE] *= size
    y = x.clone()
    y[3::5] *= 1.01
    given = x.clone()
    apart, exact = fingerprint(x).distance(fingerprint(y)), fingerprint(x.double()).distance(fingerprint(y.double()))
    assert apart == pytest.approx(exact, rel=1e-3)
    assert fingerprint(x).distance(fingerprint(x.double())) < 2e-6
    assert torch.equal(x, given)


def test_numbers_whose_squares_float64_has_no_room_for_have_distances() -> None:
    x = torch.randn(1000, dtype=torch.float64) * 1e200
    y = x.clone()
    y[7] += 1e201
    true = float((x / 1e200 - y / 1e200).norm() / (y / 1e200).norm())
    assert fingerprint(x).distance(fingerprint(x)) == 0
    assert true / 4 < fingerprint(x).distance(fingerprint(y)) < 2.5 * true
