"""Channels that are gone from an output are no agreement, however small they are beside the others."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from nets import NetBuilder
from onnx import numpy_helper

from cp_debug.bisect.engine import Options, bisect
from cp_debug.bisect.lost_channels import lost_channels
from cp_debug.reports.verdict_line import verdict_line


def detector(folder: Path, scale: float | None) -> Path:
    """Boxes up to 640 and scores below 1 in one tensor, in INT8 by one scale."""
    net = NetBuilder()
    boxes = net.op("Mul", net.op("Sigmoid", "box"), net.weight(np.array(640, np.float32)))
    value = net.op("Concat", boxes, net.op("Sigmoid", "score", name="scores"), name="both", axis=1)
    if scale is not None:
        step, zero = net.weight(np.array(scale, np.float32)), net.weight(np.array(0, np.int8))
        value = net.op("DequantizeLinear", net.op("QuantizeLinear", value, step, zero), step, zero)
    net.op("Identity", value, name="y")
    rng = np.random.default_rng(0)
    shapes = {"box": [1, 4, 50], "score": [1, 3, 50]}
    np.savez(
        folder / "x.npz", **{name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    )
    return net.save(folder / f"{scale}.onnx", {name: (1, shape) for name, shape in shapes.items()}, ["y"])


@pytest.mark.parametrize(("scale", "channels"), [(640 / 127, "4, 5, 6 are 0"), (1 / 127, "0, 1, 2, 3 are 1")])
def test_scores_that_share_the_scale_of_boxes_are_not_lost_in_silence(
    tmp_path: Path, scale: float, channels: str
) -> None:
    """With a step of 5 all scores are 0. A step of 1/127 clips the boxes, which is told as what it is."""
    paths = detector(tmp_path, None), detector(tmp_path, scale)
    options = Options(inputs=tmp_path / "x.npz")
    (test,) = bisect(str(paths[0]), "ort,ort", test_model=paths[1], options=options).tests
    assert not test.agrees
    assert [text.partition(" everywhere")[0] for text in test.lost] == [f"y: channels {channels}"]
    shared = [f for f in test.findings if f.cause == "int8-shared-scale"]
    assert bool(shared) == (scale > 1)
    assert test.guilty
    assert "everywhere" in verdict_line(test).plain
    for finding in shared:
        assert finding.layers == [row.name for row in test.guilty] == ["node_y"]
        assert f"scale of {scale:.3g} serves channels of very different sizes" in finding.says
        assert finding.evidence["channels"] == [4, 5, 6]
        assert finding.evidence["before"] == 1
        assert finding.evidence["after"] < 0.01
        assert finding.fix.startswith("quantize channels 4, 5, 6 apart from the others")


HEAD = "b = Sigmoid(box)\nw = Mul(b, size)\n"
PAIR = "q = QuantizeLinear(c, s, z)\nk = DequantizeLinear(q, s, z)\n"
APART = """q1 = QuantizeLinear({0}, s, z)
d1 = DequantizeLinear(q1, s, z)
q2 = QuantizeLinear({1}, u, z)
d2 = DequantizeLinear(q2, u, z)
"""
SHARED = {
    "channels last, a step above all scores, UINT8": (
        HEAD + "p = Sigmoid(score)\nc = Concat<axis=2>(w, p)\n",
        "y = Mul(k, one)",
        ((1, 60, 4), (1, 60, 2), 255, 13),
        ("y", {4, 5}),
    ),
    "logits that are taken apart again": (
        HEAD + "c = Concat<axis=1>(w, score)\n",
        "y, l = Split<axis=1>(k, parts)\no = Sigmoid(l)",
        ((1, 4, 50), (1, 3, 50), 127, 17),
        ("l", {0, 1, 2}),
    ),
    "the best class": (
        HEAD + "p = Sigmoid(score)\nc = Concat<axis=1>(w, p)\n",
        "y, l = Split<axis=1>(k, parts)\nm = ReduceMax<axes=[1], keepdims=0>(l)\no = Add(m, one)",
        ((1, 4, 50), (1, 3, 50), 127, 13),
        ("l", {0, 1, 2}),
    ),
    "five axes": (
        HEAD + "p = Sigmoid(score)\nc = Concat<axis=2>(w, p)\n",
        "y = Mul(k, one)",
        ((1, 3, 4, 5, 5), (1, 3, 6, 5, 5), 255, 17),
        ("y", {4, 5, 6, 7, 8, 9}),
    ),
    "behind movers, one score": (
        HEAD + "p = Sigmoid(score)\nc = Concat<axis=1>(w, p)\n",
        "t = Transpose<perm=[0, 2, 1]>(k)\ny = Relu(t)",
        ((2, 4, 40), (2, 1, 40), 127, 19),
        ("t", {4}),
    ),
}
"""Name → nodes in front of the pair and behind it, shapes, the most level, opset, the layer and its lost channels."""


def networks(folder: Path, name: str, *, apart: bool = False, size: float = 640) -> tuple[Path, Path]:
    """A network of ``SHARED`` in floats and with the pair, ``apart``: with one pair for boxes and one for scores."""
    head, tail, (box, score, most, opset), _ = SHARED[name]
    kind, pair = np.uint8 if most == 255 else np.int8, PAIR
    if apart:
        joined = head.splitlines()[-1]
        first, second = joined[joined.index("(") + 1 : -1].split(", ")
        pair = APART.format(first, second) + joined.replace("c =", "k =").replace(f"({first}, {second})", "(d1, d2)")
    constants = {"size": np.float32(size), "s": np.float32(size / most), "z": kind(0), "one": np.float32(1)}
    constants |= {"parts": np.array([4, 3]), "u": np.float32(4 / 127)}
    inputs = {"box": box, "score": score}
    paths = folder / f"{size}.onnx", folder / f"{size}.{apart}.int8.onnx"
    plain = tail.replace("(k", "(c")
    for path, text in zip(paths, (head + plain, f"{head}{pair}\n{tail}"), strict=True):
        ends = "float[] y, float[] o" if "\no = " in tail else "float[] y"
        fed = ", ".join(f"float[{', '.join(map(str, shape))}] {n}" for n, shape in inputs.items())
        model = onnx.parser.parse_model(
            f'<ir_version: 8, opset_import: ["" : {opset}]>\ng ({fed}) => ({ends}) {{\n{text}\n}}'
        )
        for node in model.graph.node:
            node.name = node.output[0]
        read = {n for node in model.graph.node for n in node.input}
        model.graph.initializer.extend(numpy_helper.from_array(v, n) for n, v in constants.items() if n in read)
        onnx.save(onnx.shape_inference.infer_shapes(model), path)
    rng = np.random.default_rng(3)
    np.savez(folder / "x.npz", **{n: rng.standard_normal(shape).astype(np.float32) for n, shape in inputs.items()})
    return paths


@pytest.mark.few(2)
@pytest.mark.parametrize("name", SHARED)
def test_one_scale_for_sizes_that_differ_is_found_whatever_is_around_it(tmp_path: Path, name: str) -> None:
    paths, (*_, (layer, channels)) = networks(tmp_path, name), SHARED[name]
    options = Options(inputs=tmp_path / "x.npz")
    (test,) = bisect(str(paths[0]), "ort,ort", test_model=paths[1], options=options).tests
    (finding,) = (f for f in test.findings if f.cause == "int8-shared-scale")
    assert [row.name for row in test.guilty] == finding.layers == [layer]
    assert set(finding.evidence["channels"]) == channels
    assert finding.evidence["after"] < 0.02 < 0.1 < finding.evidence["before"]


def test_a_scale_is_not_at_fault_where_exact_values_bring_nothing_nearer(tmp_path: Path) -> None:
    """What is in front is wrong, too: the scores that come back are other ones."""
    paths = networks(tmp_path, "the best class")
    model = onnx.load(paths[1])
    (joined,) = (node for node in model.graph.node if node.op_type == "Concat")
    joined.input[1] = "other"
    model.graph.node.insert(0, onnx.helper.make_node("Neg", ["score"], ["other"], name="other"))
    onnx.save(model, paths[1])
    (test,) = bisect(str(paths[0]), "ort,ort", test_model=paths[1], options=Options(inputs=tmp_path / "x.npz")).tests
    assert test.lost
    assert test.guilty
    assert "int8-shared-scale" not in [f.cause for f in test.findings]


@pytest.mark.few(2)
@pytest.mark.parametrize("name", SHARED)
def test_scales_apart_and_sizes_that_are_alike_lose_nothing(tmp_path: Path, name: str) -> None:
    for paths in (networks(tmp_path, name, apart=True), networks(tmp_path, name, size=3)):
        options = Options(inputs=tmp_path / "x.npz")
        (test,) = bisect(str(paths[0]), "ort,ort", test_model=paths[1], options=options).tests
        assert not test.lost
        assert "int8-shared-scale" not in [f.cause for f in test.findings]


def test_channels_count_that_are_gone_and_large_enough_and_not_alone() -> None:
    ours = np.ones((1, 3, 20), np.float32)
    theirs = ours.copy()
    theirs[:, 1] = 0
    assert [text[:20] for text in lost_channels({"y": ours}, {"y": theirs}, 1e-3)] == ["y: channel 1 is 0 ev"]
    assert not list(lost_channels({"y": ours}, {"y": theirs}, 0.2)), "too small to count"
    assert not list(lost_channels({"y": ours}, {"y": 0 * theirs}, 1e-3)), "an output of zeros is beyond any tolerance"
    strange = np.where(theirs == 0, np.float32(np.nan), theirs)
    assert not list(lost_channels({"y": ours}, {"y": strange}, 1e-3)), "NaN is told as what it is"
    assert not list(lost_channels({"y": ours[..., :15]}, {"y": theirs[..., :15]}, 1e-3)), "too few elements to tell"
    steps = np.linspace(0.1, 0.9, 20, dtype=np.float32)
    scores = np.stack([640 * steps, steps])[None]
    coarse = np.stack([640 * steps, np.round(steps / 1.2) * np.float32(1.2)])[None]
    assert [text.partition(" everywhere")[0] for text in lost_channels({"y": scores}, {"y": coarse}, 1e-3)] == [
        "y: channel 1 is 0 or 1.2"
    ]
    masks = np.stack([640 * steps, np.round(steps)])[None]
    assert not list(lost_channels({"y": masks}, {"y": masks}, 1e-3)), "few numbers that are right"
    assert not list(lost_channels({"y": masks}, {"y": np.where(steps > 0.7, masks, 0)}, 1e-3)), (
        "as few in the reference"
    )
    alike = np.stack([steps, steps])[None], np.stack([steps, np.round(steps / 0.6) * np.float32(0.6)])[None]
    assert not list(lost_channels({"y": alike[0]}, {"y": alike[1]}, 1e-3)), "coarse, beside others that are as large"
    rows = np.moveaxis(ours, 1, 2), np.moveaxis(theirs, 1, 2)
    assert [text[:12] for text in lost_channels({"y": rows[0]}, {"y": rows[1]}, 1e-3)] == ["y: channel 1"]


def test_lost_channels_are_told_beside_what_passes_the_tolerance_in_front(tmp_path: Path) -> None:
    """With a tolerance that the INT8 steps pass, the verdict begins with that."""
    paths = detector(tmp_path, None), detector(tmp_path, 640 / 127)
    options = Options(inputs=tmp_path / "x.npz", rtol=1e-3, atol=1e-3)
    (test,) = bisect(str(paths[0]), "ort,ort", test_model=paths[1], options=options).tests
    line = verdict_line(test).plain
    assert "0 everywhere" not in line.partition(";")[0]
    assert line.count("y: channels 4, 5, 6 are 0 everywhere, but reach 0.9") == 1
