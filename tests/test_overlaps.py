"""Overlap of turned boxes: against shapely where it is installed, and by what must hold."""

from __future__ import annotations

import math

import numpy as np
import pytest
from extras import needs
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose

from cp_debug.detection.boxes import Boxes
from cp_debug.detection.metrics import intersection_areas, match_overlaps, overlaps

# Half of the rectangles lie on a grid and turn by right angles: common edges and corners must come up often.
coordinate = st.one_of(st.integers(-6, 6).map(float), st.floats(-6, 6))
side = st.one_of(st.integers(1, 6).map(float), st.floats(0.2, 6))
yaw = st.one_of(st.integers(-4, 4).map(lambda quarter: quarter * math.pi / 2), st.floats(-7, 7))
rectangle = st.tuples(coordinate, coordinate, side, side, yaw)


def area(a, b) -> float:
    return float(intersection_areas(np.array([a]), np.array([b]))[0])


def boxes(*rows) -> Boxes:
    """From x, y, z, length, width, height, yaw, all in one sample."""
    table = np.hstack((np.array(rows, dtype=np.float64).reshape(-1, 7), np.zeros((len(rows), 2))))
    zeros = np.zeros(len(rows), dtype=np.int64)
    return Boxes.of(table, zeros, zeros, np.arange(len(rows), 0, -1), np.full(len(rows), ""))


@needs("shapely")
@given(rectangle, rectangle)
@settings(max_examples=100, deadline=None)
def test_agrees_with_shapely(a, b):
    import shapely
    from shapely import affinity

    def polygon(x, y, length, width, yaw):
        upright = shapely.box(-length / 2, -width / 2, length / 2, width / 2)
        return affinity.translate(affinity.rotate(upright, yaw, origin=(0, 0), use_radians=True), x, y)

    # Without a grid, shapely 2.2 takes some pairs that touch along an edge for the same rectangle.
    expected = shapely.intersection(polygon(*a), polygon(*b), grid_size=1e-10).area
    assert area(a, b) == pytest.approx(expected, abs=1e-7)


@given(rectangle, rectangle, st.floats(-7, 7))
def test_symmetric_and_blind_to_the_frame(a, b, turn):
    assert area(a, b) == pytest.approx(area(b, a), abs=1e-9)
    cos, sin = math.cos(turn), math.sin(turn)
    moved = [(x * cos - y * sin + 50, x * sin + y * cos - 9, *size, yaw + turn) for x, y, *size, yaw in (a, b)]
    assert area(*moved) == pytest.approx(area(a, b), abs=1e-9)


@given(rectangle)
def test_with_itself_its_neighbour_and_what_it_contains(a):
    x, y, length, width, yaw = a
    assert area(a, a) == pytest.approx(length * width, abs=1e-9)
    assert area(a, (x + length * math.cos(yaw), y + length * math.sin(yaw), length, width, yaw)) < 1e-9
    assert area(a, (x, y, length / 2, width / 3, yaw)) == pytest.approx(length * width / 6, abs=1e-9)


def test_of_boxes_by_hand():
    a = boxes((0, 0, 0, 4, 2, 2, 0), (0, 0, 0, 4, 2, 2, 0), (0, 0, 0, 4, 2, 2, 0), (0, 0, np.nan, 4, 2, 2, 0))
    b = boxes((1, 0, 0, 4, 2, 2, math.pi), (0, 0, 1, 4, 2, 2, 0), (0, 0, 5, 4, 2, 2, 0), (0, 0, 0, 4, 2, 2, 0))
    pairs = np.arange(4)
    assert_allclose(overlaps(a, b, pairs, pairs, bev=True), [0.6, 1, 1, np.nan], atol=1e-12)
    assert_allclose(overlaps(a, b, pairs, pairs, bev=False), [0.6, 1 / 3, 0, np.nan], atol=1e-12)


def test_a_match_needs_more_than_the_threshold_and_broken_boxes_find_nothing():
    truth = boxes((0, 0, 0, 4, 2, 2, 0), (np.nan, 0, 0, 4, 2, 2, 0), (10, 0, 0, 4, 2, 2, 0))
    predicted = boxes((0.5, 0, 0, 4, 2, 2, 0), (0, 0, 0, np.inf, 2, 2, 0), (10, 0, 0.9, 4, 2, 2, 0))
    assert match_overlaps(predicted, truth, (0.5, 0.8), bev=True).tolist() == [[0, -1, 2], [-1, -1, 2]]
    assert match_overlaps(predicted, truth, (0.5,), bev=False).tolist() == [[0, -1, -1]]
