"""Figures that are printed as evidence: fits out of sample, channels and places of an error, orders told by kernels."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from cp_debug.bisect.causes import fits
from cp_debug.bisect.causes.fits import PER_PARAMETER, cross_fit, halves
from cp_debug.bisect.causes.where import in_words, locate, orders
from cp_debug.bisect.finding import Element, Finding, Where
from cp_debug.reports.evidence import worst_elements


def rng() -> torch.Generator:
    return torch.Generator().manual_seed(1)


# Fits ---------------------------------------------------------------------------------------------------------------


def test_halves_share_no_element_and_lose_none() -> None:
    mask = torch.rand(3, 40, generator=rng()) > 0.3
    first, second = halves(mask)
    assert not bool((first & second).any())
    assert torch.equal(first | second, mask)
    assert abs(int(first.sum()) - int(second.sum())) <= 1
    assert 0.2 < float(first[:, :20].sum() / first.sum()) < 0.8  # by chance, not the front half
    assert torch.equal(halves(mask)[0], first)


def test_a_fit_predicts_each_half_from_the_other_alone() -> None:
    """What stands in one half only cannot be known there; what was fitted is told of both together."""
    x = torch.randn(1, 200, generator=rng(), dtype=torch.float64)
    folds = halves(torch.ones(1, 200, dtype=torch.bool))
    found = cross_fit(torch.where(folds[0], 2 * x, 3 * x), [x], folds)
    assert found is not None
    prediction, theta = found
    torch.testing.assert_close(prediction[folds[0]], 3 * x[folds[0]])
    torch.testing.assert_close(prediction[folds[1]], 2 * x[folds[1]])
    assert 2 < float(theta) < 3


def test_noise_is_not_learnt_by_many_parameters() -> None:
    """In sample, 40 parameters would take away a fifth of the noise of 200 elements; out of sample they add to it."""
    y, *basis = torch.randn(41, 1, 200, generator=rng(), dtype=torch.float64)
    found = cross_fit(y, basis, halves(torch.ones(1, 200, dtype=torch.bool)))
    assert found is not None
    assert torch.linalg.vector_norm(y - found[0]) > torch.linalg.vector_norm(y)


def test_each_channel_is_fitted_by_itself() -> None:
    x = torch.randn(1, 3, 50, generator=rng(), dtype=torch.float64)
    scale, shift = torch.tensor([1.0, -2.0, 5.0]).double(), torch.tensor([0.5, 0.0, -3.0]).double()
    y = scale[:, None] * x + shift[:, None]
    found = cross_fit(y, [x, torch.ones_like(x)], halves(torch.ones(1, 3, 50, dtype=torch.bool)), axis=1)
    assert found is not None
    torch.testing.assert_close(found[0], y)
    torch.testing.assert_close(found[1], torch.stack([scale, shift], 1))


def test_too_few_elements_are_not_fitted() -> None:
    x = torch.randn(1, 100, generator=rng(), dtype=torch.float64)
    for count, fitted in ((2 * PER_PARAMETER - 1, False), (2 * PER_PARAMETER + 1, True)):
        mask = (torch.arange(100) < 2 * count)[None]
        assert (cross_fit(x, [x, x.square()], halves(mask)) is not None) == fitted


# Places -------------------------------------------------------------------------------------------------------------


@dataclass
class Cut:
    """What ``locate`` reads of a segment."""

    test: Tensor
    exact: Tensor
    axis: int = 1
    new_nonfinite: Tensor = field(init=False)
    error: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.new_nonfinite = ~torch.isfinite(self.test) & torch.isfinite(self.exact)
        self.error = torch.where(torch.isfinite(self.test), self.test - self.exact, 0.0)


def located(changes: dict[tuple[int, ...], float], shape: tuple[int, ...] = (1, 8, 6, 5), axis: int = 1) -> Where:
    exact = torch.arange(float(np.prod(shape))).double().reshape(shape)
    test = exact.clone()
    for place, change in changes.items():
        test[place] += change
    cut: Any = Cut(test, exact, axis)
    return locate(cut, "conv")


def test_channels_are_named_by_their_share_of_the_squared_error() -> None:
    found = located({(0, 6, 2, 3): 3.0, (0, 6, 2, 4): -4.0, (0, 1, 4, 3): 5.0, (0, 3, 3, 3): 1.0})
    assert found.channels == {6: pytest.approx(25 / 51), 1: pytest.approx(25 / 51), 3: pytest.approx(1 / 51)}
    many = located({(0, c, 0, 0): float(c + 1) for c in range(8)})
    assert list(many.channels) == [7, 6, 5, 4, 3]
    last = located({(2, 4): 2.0, (3, 4): 2.0, (1, 0): 2.0}, shape=(4, 5), axis=1)
    assert list(last.channels) == [4, 0]


def test_a_region_holds_all_that_is_above_a_tenth_of_the_largest_error() -> None:
    found = located({(0, 6, 2, 3): -10.0, (0, 2, 4, 3): 1.1, (0, 7, 5, 4): 0.9})
    assert found.region == [[0, 0], [2, 6], [2, 4], [3, 3]]
    assert found.concentrated == pytest.approx(5 * 3 / 240)


def test_the_worst_elements_come_first_with_both_values() -> None:
    found = located({(0, 6, 2, 3): -10.0, (0, 2, 4, 3): 1.0, (0, 7, 5, 4): 12.0})
    first = 7 * 30 + 5 * 5 + 4
    second = 6 * 30 + 2 * 5 + 3
    assert found.worst[:2] == [
        Element([0, 7, 5, 4], first + 12.0, float(first)),
        Element([0, 6, 2, 3], second - 10.0, float(second)),
    ]
    assert len(found.worst) == 3
    assert len(located({(0, c, 0, 0): 1.0 for c in range(8)}).worst) == 5


def test_what_is_not_finite_is_worse_than_any_number() -> None:
    found = located({(0, 6, 2, 3): -1e9, (0, 2, 4, 1): float("nan"), (0, 3, 5, 1): float("inf")})
    assert found.region == [[0, 0], [2, 3], [4, 5], [1, 1]]
    assert found.channels == {2: 0.5, 3: 0.5}
    assert {tuple(e.index) for e in found.worst[:2]} == {(0, 2, 4, 1), (0, 3, 5, 1)}


def test_a_layer_without_elements_has_no_place() -> None:
    assert located({}, shape=(0, 3)) == Where("conv")


@pytest.mark.parametrize("oracle", [False, True])
def test_worst_elements_of_a_page_are_measured_from_the_oracle_where_it_is_known(oracle: bool) -> None:
    reference, test = np.zeros((4, 5)), np.zeros((4, 5))
    reference[1, 2], test[3, 4], test[0, 1] = 7.0, 3.0, -5.0
    found = worst_elements(reference, test, np.zeros((4, 5)) if oracle else None)
    order = [(0, 1), (3, 4)] if oracle else [(1, 2), (0, 1), (3, 4)]
    assert [w.index for w in found] == order, "none that are right"
    by_index = {w.index: (w.reference, w.test, w.exact) for w in found}
    assert by_index[0, 1] == (0.0, -5.0, 0.0 if oracle else None)
    if not oracle:
        assert by_index[1, 2] == (7.0, 0.0, None)


# Words --------------------------------------------------------------------------------------------------------------


def test_a_fact_about_an_engine_is_told_with_its_range_and_joint_share() -> None:
    figures = {"layers_in_all": 3, "of_products": 9, "excess_least": 1.5, "excess_most": 6.25, "share_in_all": 0.8}
    assert in_words("it sums", figures) == (
        "it sums, in 3 of 9 layers with products, excess 1.5 to 6.2, together 80% of the final divergence"
    )
    alike = figures | {"excess_least": 6.25, "share_in_all": None}
    assert in_words("it sums", alike) == "it sums, in 3 of 9 layers with products, excess 6.2"
    some = {**alike, "layers_asked": 4}
    assert in_words("it sums", some) == "it sums, in 3 of 4 examined layers, of 9 with products, excess 6.2"
    assert in_words("it sums", {}) == "it sums"


def test_orders_that_a_kernels_name_tells_are_counted_apart_from_those_that_were_tried() -> None:
    tiled = "sm80_xmma_fprop_implicit_gemm_f16f16_f16f16_f16_nhwckrsc_nhwc_tilesize128x128x64_stage3_warpsize2x2x1_g1"
    figures = ({"tile": 64, "slices": 1}, {"tile": 32, "slices": 1}, {"tile": 64, "slices": 2})
    layers = [(tiled, each) for each in figures]
    assert orders("fp16-accumulation", layers) == {"orders_told": 1, "orders_fitted": 2}
    assert orders("tf32", layers) == {}


@pytest.mark.parametrize(
    ("layers", "side", "says"),
    [
        (["a"], "test", "a (Conv): sums"),
        (["a", "b"], "test", "2 layers (Conv, Gemm): sums"),
        (["a"], "reference", "a (Conv) of the reference: sums"),
        ([], "test", "sums"),
    ],
)
def test_a_headline_names_one_layer_or_counts_several_and_says_whose(layers: list[str], side: str, says: str) -> None:
    assert Finding("c", "sums", layers, ["Conv", "Gemm"][: len(layers)], side=side).headline == says


def test_labels_of_small_numbers_share_a_power_of_ten() -> None:
    """Labels such as 1.5e-08 would lie on the name of the axis."""
    from cp_debug.reports.svg import Canvas, Scale

    for largest, said in ((2.2e-8, "error × 10"), (0.3, ">error<")):
        canvas = Canvas(500, 270, "chart")
        canvas.axes(Scale(0, 10, 62, 488), Scale(0, largest, 222, 12), "channel", "error")
        picture = canvas.__html__()
        assert said in picture
        assert "e−08" not in picture


def test_least_squares_by_channel() -> None:
    x = torch.tensor([[1.0, 2, 3, 9], [1, 2, 3, 9]], dtype=torch.float64)
    y = torch.tensor([[3.0, 5, 7, 0], [0, 0, 0, 0]], dtype=torch.float64)
    mask = torch.tensor([[True, True, True, False]] * 2)
    count, gram, right = fits.sums(y, [x, torch.ones_like(x)], mask, [1])
    assert count.tolist() == [3, 3]
    assert gram[0].tolist() == [[14, 6], [6, 3]]
    assert right[0].tolist() == [34, 15]
    assert torch.allclose(
        fits._solve(count, gram, right), torch.tensor([[2.0, 1], [0, 0]], dtype=torch.float64), atol=1e-9
    )
