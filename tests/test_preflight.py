"""The pre-flight checks: each trouble is found where it is, and a sound model has none."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import pytest
import torch
from nets import NetBuilder, second_like
from typer.testing import CliRunner

from cp_debug.backends.base import Program
from cp_debug.bisect import preflight
from cp_debug.bisect.causes.ranges import HALF
from cp_debug.bisect.preflight import PROBLEM, RISK, Concern, Preflight, _clipped, _quantized_weight, leaves_half
from cp_debug.bisect.verdict import RANGE
from cp_debug.cli.main import app
from cp_debug.probes.distance import all_finite
from cp_debug.programs.pipeline import prepare
from cp_debug.recipes.base import Arrays, Sample
from cp_debug.recipes.onnx_file import OnnxFileModel


def check(path: Path, size: float = 1.0) -> list[Concern]:
    model = OnnxFileModel(path)
    sample = next(iter(model.samples(1, 0, None)))
    sample.arrays["x"] = sample.arrays["x"] * np.float32(size)
    return Preflight(model, prepare(model, sample, path.parent), sample).concerns()


def build(folder: Path, net: NetBuilder, output: str, channels: int = 4) -> Path:
    return net.save(folder / "net.onnx", {"x": (1, [1, channels, 8, 8])}, [output])


def test_a_sound_model_has_no_concern(tmp_path: Path) -> None:
    assert check(second_like(tmp_path / "net.onnx")) == []


@pytest.mark.parametrize(("number", "softmax", "concerns"), [(-np.inf, 1, 0), (-np.inf, 0, 1), (np.inf, 1, 2)])
def test_a_mask_is_sound_where_the_outputs_are(tmp_path: Path, number: float, softmax: bool, concerns: int) -> None:
    """−Inf in front of a Softmax is meant; as an output it is told, and +Inf is no mask."""
    net = NetBuilder()
    mask = net.weight(np.array([0, number, 0, 0, 0, 0, 0, number], np.float32))
    masked = net.op("Add", "x", mask)
    found = check(build(tmp_path, net, net.op("Softmax" if softmax else "Identity", masked)))
    assert ["NaN or Inf" in concern.says for concern in found] == [True] * concerns


@pytest.mark.parametrize("kind", [np.uint16, np.int16, np.int8, ml_dtypes.int4, ml_dtypes.float8_e4m3fn])
def test_zero_points_of_all_types_are_compared(tmp_path: Path, kind: type) -> None:
    net = NetBuilder()
    scale = net.weight(np.array(0.1, np.float32))
    points = [onnx.numpy_helper.from_array(np.array(value, kind), f"point{value}") for value in (0, 1)]
    levels = net.op("QuantizeLinear", "x", scale, "point0")
    path = build(tmp_path, net, net.op("DequantizeLinear", levels, scale, "point1"))
    model = onnx.load(path)
    model.graph.initializer.extend(points)
    model.opset_import[0].version = 21
    model.ir_version = 10
    onnx.save(model, path)
    opened = OnnxFileModel(path)
    sample = next(iter(opened.samples(1, 0, None)))
    found = Preflight(opened, prepare(opened, sample, tmp_path), None).concerns()
    assert any("disagree in scale or zero point" in concern.says for concern in found)


@pytest.mark.parametrize(("scale", "words"), [(1e6, "overflow"), (1e-7, "vanish")])
def test_weights_and_activations_beyond_half_precision(tmp_path: Path, scale: float, words: str) -> None:
    net = NetBuilder()
    weight = net.weight((np.random.default_rng(0).standard_normal((4, 4, 1, 1)) * scale).astype(np.float32))
    found = check(build(tmp_path, net, net.op("Conv", "x", weight, name="conv")))
    assert {(c.check, c.severity) for c in found} == {("weights", PROBLEM), ("activations", PROBLEM)}
    assert all(words in c.says for c in found)
    assert any("node_conv" in layer for c in found for layer in c.layers)


def test_long_sums_and_tiny_variances_are_risks(tmp_path: Path) -> None:
    net = NetBuilder()
    x = net.conv("x", 256, 4, name="long")
    scale, shift, mean = (net.weight(np.ones(4, np.float32)) for _ in range(3))
    variance = net.weight(np.array([1, 1e-9, 1, 1], np.float32))
    found = check(build(tmp_path, net, net.op("BatchNormalization", x, scale, shift, mean, variance), 256))
    assert [(c.check, c.severity) for c in found] == [("accumulation", RISK), ("batchnorm", RISK)]
    assert found[0].figures["lengths"] == {"node_long": 2304}
    assert list(found[1].figures["channels"].values()) == [1]


def test_quantizers_that_disagree_clip_or_are_coarse(tmp_path: Path) -> None:
    net = NetBuilder()
    scales = [net.weight(np.float32(s)) for s in (0.001, 0.002, 10.0)]
    zero = net.weight(np.int8(0))
    clipped = net.op("DequantizeLinear", net.op("QuantizeLinear", "x", scales[0], zero), scales[1], zero)
    coarse = net.op("DequantizeLinear", net.op("QuantizeLinear", clipped, scales[2], zero), scales[2], zero)
    says = " ".join(c.says for c in check(build(tmp_path, net, coarse)))
    assert "disagree" in says
    assert "what their INT8 scale holds" in says
    assert "too coarse" in says


class Scores:
    def __init__(self, scores: np.ndarray) -> None:
        self.scores = scores


@pytest.mark.parametrize(("sigmoids", "words"), [(0, "logits are read"), (2, "probabilities are read"), (1, None)])
def test_logits_and_probabilities(tmp_path: Path, sigmoids: int, words: str | None) -> None:
    net = NetBuilder()
    x = net.conv("x", 4, 4)
    path = build(tmp_path, net, net.op("Sigmoid", x) if sigmoids == 2 else x)

    class Decoding(OnnxFileModel):
        def decode(self, sample: Sample, results: dict[str, Arrays]) -> Scores:
            (outputs,) = results.values()
            (values,) = outputs.values()
            scores = torch.from_numpy(values)
            return Scores((scores if sigmoids == 0 else scores.sigmoid()).numpy().ravel())

    model = Decoding(path)
    sample = next(iter(model.samples(1, 0, None)))
    programs: Sequence[Program] = prepare(model, sample, tmp_path)
    found = [c.says for c in Preflight(model, programs, sample).concerns() if c.check == "probabilities"]
    assert [words in says for says in found if words] == ([True] if words else [])
    assert bool(found) == (words is not None)


def test_the_command_exits_with_one_on_problems_only(tmp_path: Path) -> None:
    sound = second_like(tmp_path / "sound.onnx")
    assert CliRunner().invoke(app, ["check", str(sound)]).exit_code == 0
    net = NetBuilder()
    weight = net.weight(np.full((4, 4, 1, 1), 1e6, np.float32))
    broken = build(tmp_path, net, net.op("Conv", "x", weight))
    told = CliRunner().invoke(app, ["check", str(broken), "--json", "--no-activations"])
    assert told.exit_code == 1
    assert [c["check"] for c in json.loads(told.stdout)] == ["weights"]


def test_what_is_in_order_says_what_was_looked_at(tmp_path: Path) -> None:
    net = NetBuilder()
    path = net.save(tmp_path / "net.onnx", {"x": (1, [1, 3, 8, 8])}, [net.conv("x", 3, 4)])
    for more, says in (
        ([], "and the activations of one sample"),
        (["--no-activations"], "in weights, sums and scales"),
    ):
        done = CliRunner().invoke(app, ["check", str(path), *more])
        assert done.exit_code == 0
        assert "✓ nothing found in weights, sums" in done.output.replace("\n", " ")
        assert says in " ".join(done.output.split())


@pytest.mark.parametrize("rare", [0.0, 1e-3, 1.0])
def test_what_fp16_loses_of_a_tensor_is_what_numpy_says(rare: float) -> None:
    """Two quick passes leave most tensors out; what is lost is none the less found at every size of the numbers."""
    rng = np.random.default_rng(0)
    found = []
    for scale in (0, 1e-12, 1e-9, 1e-8, 1e-7, 3e-7, 1e-6, 1e-5, 1e-4, 1e-2, 1, 1e4, 6e4, 7e4):
        values = np.clip(rng.standard_normal(5000), -0.99, 0.99) * scale
        values[rng.random(5000) < rare] *= 1e-6
        with np.errstate(over="ignore"):
            stored = values.astype(np.float16).astype(np.float64)
        kept = np.isfinite(stored)
        lost = np.linalg.norm((stored - values)[kept]) / (np.linalg.norm(values[kept]) or 1.0)
        leaves = bool((~kept).any() or lost > RANGE * HALF.roundoff)
        figures = leaves_half(torch.from_numpy(values))
        assert (figures is not None) == leaves, scale
        assert figures is None or figures["storage_loss"] == pytest.approx(lost, rel=1e-6)
        found.append(leaves)
    assert True in found
    assert False in found
    assert leaves_half(torch.zeros(0, dtype=torch.float64)) is None
    assert leaves_half(torch.tensor([1.0, np.inf, np.nan])) is None, "what is not finite is another finding"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int32])
def test_one_nan_or_inf_among_many_is_seen(dtype: torch.dtype) -> None:
    values = torch.full((3, 1000), 3e4).to(dtype)  # whose sum FP16 has no room for
    assert all_finite(values)
    assert all_finite(values[:0])
    if dtype.is_floating_point:
        for number in (np.nan, np.inf, -np.inf):
            strange = values.clone()
            strange[1, 7] = number
            assert not all_finite(strange)
        strange[2, 7] = np.inf
        assert not all_finite(strange), "Inf less Inf"


@pytest.mark.parametrize("kind", [np.int8, np.uint8])
def test_a_sound_quantized_file_has_nothing_to_say(tmp_path: Path, kind: type) -> None:
    """Scales of an INT32 bias are tiny, its levels beyond those of weights; a range that begins at 0 is a Relu's."""
    rng, net = np.random.default_rng(0), NetBuilder()
    weight, zero = rng.integers(-127, 128, (4, 1, 3, 3)).astype(np.int8), net.weight(np.zeros(4, np.int8))
    scale, activation = net.weight(np.full(4, 1e-3, np.float32)), net.weight(np.float32(4 / np.iinfo(kind).max))
    start = net.weight(kind(0))
    x = net.op("DequantizeLinear", net.op("QuantizeLinear", "x", activation, start), activation, start)
    bias = net.weight(rng.integers(-(2**20), 2**20, 4).astype(np.int32))
    tiny = net.weight(np.full(4, 4e-3 / 127 * 1e-3, np.float32))
    b = net.op("DequantizeLinear", bias, tiny, net.weight(np.zeros(4, np.int32)), axis=0)
    w = net.op("DequantizeLinear", net.weight(weight), scale, zero, axis=0)
    found = check(build(tmp_path, net, net.op("Conv", x, w, b, pads=[1] * 4), 1))
    assert [c for c in found if c.check in ("quantization", "weights")] == []


def test_constant_nodes_are_no_activations(tmp_path: Path) -> None:
    net = NetBuilder()
    eps = net.op("Constant", value=onnx.numpy_helper.from_array(np.float32(1e-12)))
    assert not check(build(tmp_path, net, net.op("Add", "x", eps)))


@pytest.mark.parametrize(
    ("numbers", "stays"),
    [
        ([1.0, 2.0], True),
        ([65519.0], True),
        ([65520.0], False),
        ([-65520.0], False),
        ([1e-7], False),
        ([math.nan], False),
        ([], True),
    ],
)
def test_what_fp16_holds(numbers: list[float], stays: bool) -> None:
    assert preflight._stays_half(torch.tensor(numbers)) is stays


def test_weights_at_the_end_of_their_range_are_told() -> None:
    scale, levels = torch.ones(1), torch.full((2, 50), 100, dtype=torch.int8)
    assert list(_quantized_weight("layer", levels, scale)) == []
    levels[0, :2] = torch.tensor([127, -127])  # the largest weight of either sign
    assert list(_quantized_weight("layer", levels, scale)) == []
    levels[0, 2] = -128
    (concern,) = _quantized_weight("layer", levels, scale)
    assert "3.0% of the quantized weights are at the end of the range" in str(concern)
    ones, ends = (torch.full((16,), 127, dtype=torch.int8) for _ in range(2))
    ends[::2] = -128
    assert list(_quantized_weight("layer", ones, scale)) == []  # of a norm: 127 times its scale is 1
    assert "100.0% of the quantized weights" in str(*_quantized_weight("layer", ends, scale))
    levels[1, :10] = 122  # a distribution that thins out, and is not cut off
    assert list(_quantized_weight("layer", levels, scale)) == []
    biases = torch.full((8,), 1 << 20, dtype=torch.int32)
    assert list(_quantized_weight("layer", biases, torch.ones(8))) == []
    biases[3] = torch.iinfo(torch.int32).max
    assert "12.5% of the quantized biases" in str(*_quantized_weight("layer", biases, torch.ones(8)))


def test_channels_of_very_different_range_want_a_scale_each() -> None:
    levels = torch.full((4, 50), 1, dtype=torch.int8)
    levels[0] = 120
    (concern,) = _quantized_weight("layer", levels, torch.ones(1))
    assert "one scale for channels whose ranges differ 120 times" in str(concern)
    assert list(_quantized_weight("layer", levels, torch.ones(4))) == []
    levels[1:] = 0  # channels of zeros have no range
    assert list(_quantized_weight("layer", levels, torch.ones(1))) == []


def test_activations_are_compared_with_what_their_scales_hold() -> None:
    assert list(_clipped({"a": (1.0, 0.0), "b": (1.3, 0.9), "c": (0.0, 0.0)})) == []
    over, coarse = _clipped({"a": (3.5, 20.0), "b": (1.2, 2.0), "c": (0.1, 0.0), "d": (0.2, 0.0)})
    assert "activations reach 3.50 times what their INT8 scale holds; clipping them costs 20 times" in str(over)
    assert "INT8 scales up to 10 times too coarse" in str(coarse)


@pytest.mark.parametrize("zeros", [True, False])
@pytest.mark.parametrize("between", [False, True])
def test_a_constant_that_vanishes_in_fp16_is_told_where_it_decides(zeros: bool, between: bool, tmp_path: Path) -> None:
    net = NetBuilder()
    norm = net.op("ReduceL2", "x", net.weight(np.array([1], np.int64)), name="norm")
    least = net.op("Max", norm, net.weight(np.array(1e-12, np.float32)), name="least")
    if between:
        least = net.op("Expand", least, net.weight(np.array([4, 8], np.int64)), name="expand")
    path = net.save(tmp_path / "net.onnx", {"x": (1, [4, 8])}, [net.op("Div", "x", least, name="div")], opset=18)
    model = OnnxFileModel(path)
    sample = next(iter(model.samples(1, 0, None)))
    if zeros:
        sample.arrays["x"][2] = 0
    told = Preflight(model, prepare(model, sample, tmp_path), sample).concerns()
    said = [(concern.severity, concern.says, concern.layers) for concern in told]
    born = (PROBLEM, "1e-12 is 0 in FP16: NaN or Inf first appears at node_div", ["node_least", "node_div"])
    assert said == [born] * zeros
