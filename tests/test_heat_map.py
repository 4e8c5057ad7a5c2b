"""The heat map of a sweep, and failed tasks told by reason."""

from __future__ import annotations

import base64
import json
import math
import zlib

import pytest

from cp_debug.reports.svg import LEVELS
from cp_debug.reports.sweep import by_reason, render, render_page, strips
from cp_debug.serialize import decode, encode
from cp_debug.sweep.bisecting import MAP_COLUMNS, MAP_LAYERS, BisectGroup, HeatMap
from cp_debug.sweep.run import FailedTasks, SweepResult


def test_a_column_is_the_worst_of_its_samples() -> None:
    count = 2 * MAP_COLUMNS + 1
    quiet, loud = [0.5] * count, [1.0] * count
    quiet[-1], loud[4], loud[5] = 7.0, math.nan, 30.0
    found = HeatMap.of({"quiet": quiet, "loud": loud, "unknown": [math.nan] * count})
    assert found is not None
    assert found.width == 3
    assert len(found.excess[0]) == math.ceil(count / 3) <= MAP_COLUMNS
    assert dict(zip(found.layers, (max(v or 0 for v in row) for row in found.excess), strict=True)) == {
        "quiet": 7.0,
        "loud": 30.0,
        "unknown": 0,
    }
    assert found.excess[found.layers.index("loud")][1] == 30.0
    assert found.excess[2] == [None] * len(found.excess[0])


def test_of_many_layers_the_worst_are_drawn_in_their_order() -> None:
    figures = {f"l{i}": [float(i % 7), 0.0] for i in range(MAP_LAYERS + 30)}
    found = HeatMap.of(figures)
    assert found is not None
    assert len(found.layers) == MAP_LAYERS
    assert found.layers == [name for name in figures if name in found.layers]
    left_out = {name: max(values) for name, values in figures.items() if name not in found.layers}
    assert max(left_out.values()) <= min(max(figures[name]) for name in found.layers)
    assert HeatMap.of({"l": [1.0]}) is None


def test_strips_say_what_they_show() -> None:
    heat_map = HeatMap(["a", "b"], 2, [[0.05, math.inf], [None, None]])
    first, second = strips(heat_map, ["s0", "s1", "s2"])
    assert first.says == "excess at most inf, on s2"
    assert second.says == "not replayed"
    data = base64.b64decode(first.picture.partition(",")[2])
    start = data.index(b"IDAT") + 4
    assert list(zlib.decompress(data[start:])[1:3]) == [0, LEVELS - 1]


def test_what_is_rounding_is_not_red() -> None:
    (strip,) = strips(HeatMap(["a"], 1, [[0.3, 1.0, 4.0, 100.0]]), ["s0", "s1", "s2", "s3"])
    data = base64.b64decode(strip.picture.partition(",")[2])
    levels = list(zlib.decompress(data[data.index(b"IDAT") + 4 :])[1:5])
    assert levels == [0, 0, round(math.log10(4) / 2 * (LEVELS - 1)), LEVELS - 1]


@pytest.fixture
def result() -> SweepResult:
    heat_map = HeatMap(["a<b>"], 1, [[5.0, math.nan]])
    group = BisectGroup("net", "ort", "ort-all", False, ["s0", "s1"], 2, None, [], [], {}, None, {}, heat_map)
    failed = [FailedTasks("net", ["ort", "trt"], f"sample {i}", "no TensorRT here" if i else "odd") for i in range(5)]
    return SweepResult("bisect", 7, 7, 1.0, [group], failed, "log.jsonl")


def test_one_reason_of_many_failures_is_told_once(result: SweepResult) -> None:
    assert [(error, len(tasks)) for error, tasks in by_reason(result.failures)] == [("no TensorRT here", 4), ("odd", 1)]
    said = [str(part) for part in render(result)]
    assert "4 tasks, the first net, ort, trt, sample 1: no TensorRT here" in said
    assert "net, ort, trt, sample 0: odd" in said
    page = render_page(result)
    assert page.count("no TensorRT here") == 1
    assert "a&lt;b&gt;" in page
    assert "at 4, where a layer is guilty" in page
    assert "a<b>" not in page


def test_a_heat_map_is_saved_and_read_again(result: SweepResult) -> None:
    (group,) = decode(SweepResult, json.loads(json.dumps(result.to_dict(), allow_nan=False)), "sweep.json").groups
    assert encode(group) == encode(result.groups[0])
