"""Nodes that read no element of an input, weights being prepared and shapes being computed, are judged like layers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from nets import NetBuilder
from onnx import numpy_helper, parser

from cp_debug.bisect.engine import Options, bisect
from cp_debug.bisect.result import SHAPE, TestResult
from cp_debug.graph.graph import Graph
from cp_debug.programs.layers import Folded, side_values

LEVELS = ["ort,ort-none", "ort,ort-all", "ort-all,ort-basic", "ort,emu-fp16", "emu-fp32,ort-basic"]


def random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def save(path: Path, text: str, weights: dict[str, np.ndarray], opset: int = 17) -> Path:
    model = parser.parse_model(f'<ir_version: 8, opset_import: ["" : {opset}]>\n{text}')
    for node in model.graph.node:
        node.name = node.name or node.output[0]
    model.graph.initializer.extend(numpy_helper.from_array(w, n) for n, w in weights.items())
    onnx.save(model, path)
    return path


def compared(folder: Path, good: Path, bad: Path, backends: str, x: np.ndarray) -> TestResult:
    np.savez(folder / "inputs.npz", x=x)
    return bisect(str(good), backends, test_model=bad, options=Options(inputs=folder / "inputs.npz")).tests[0]


CHAIN = """
net (float[4,12] x) => (float[N,M] y)
{
    narrow = Cast <to = 10> (w)
    left = Slice (narrow, zero, six, zero)
    right = Slice (narrow, six, twelve, zero)
    swapped = Concat <axis = 0> (right, left)
    wide = Cast <to = 1> (swapped)
    turned = Transpose <perm = [1,0]> (wide)
    product = MatMul (x, turned)
    y = Relu (product)
}"""
FAULTS = {
    "narrow": ("Cast <to = 10> (w)", "Cast <to = 10> (other)"),
    "left": ("(narrow, zero, six, zero)", "(narrow, one, seven, zero)"),
    "swapped": ("(right, left)", "(left, right)"),
    "turned": ("perm = [1,0]", "perm = [0,1]"),
}


def chain(path: Path, faulty: str = "") -> Path:
    text = CHAIN.replace(*FAULTS[faulty]) if faulty else CHAIN
    numbers = {"zero": 0, "one": 1, "six": 6, "seven": 7, "twelve": 12}
    weights = {n: np.array([v]) for n, v in numbers.items()} | {"w": random(12, 12), "other": 1.05 * random(12, 12)}
    return save(path, text, {n: w for n, w in weights.items() if n in text})


@pytest.mark.few(5)
@pytest.mark.parametrize("backends", LEVELS)
@pytest.mark.parametrize("node", FAULTS)
def test_the_guilty_node_of_a_constant_branch_is_named(tmp_path: Path, backends: str, node: str) -> None:
    good, bad = chain(tmp_path / "good.onnx"), chain(tmp_path / "bad.onnx", node)
    test = compared(tmp_path, good, bad, backends, random(4, 12))
    assert [row.name for row in test.guilty] == [node]
    assert test.guilty[0].kind == "constant"


@pytest.mark.parametrize("backends", LEVELS)
def test_a_healthy_constant_branch_is_not_shown(tmp_path: Path, backends: str) -> None:
    good = chain(tmp_path / "good.onnx")
    test = compared(tmp_path, good, chain(tmp_path / "same.onnx"), backends, random(4, 12))
    assert not test.guilty
    assert {row.kind for row in test.rows} == {"data"}
    assert test.compared == test.total == 3


SHAPES = """
net (float[2,6,4] x) => (float[N,M] y)
{
    a = Relu (x)
    whole = Shape (a)
    channels = Gather (whole, index)
    more = Mul (channels, two)
    rows = Concat <axis = 0> (more, rest)
    b = Reshape (a, rows)
    y = Sigmoid (b)
}"""


def shapes(path: Path, index: int) -> Path:
    return save(path, SHAPES, {"index": np.array([index]), "two": np.array([2]), "rest": np.array([-1])})


@pytest.mark.parametrize("backends", ["ort,ort-none", "ort,ort-all"])
def test_a_size_that_a_reshape_may_leave_open_is_nobodys_fault(tmp_path: Path, backends: str) -> None:
    """As ONNX Runtime's optimizer leaves it open; another number in its place is wrong all the same."""
    weights = {"index": np.array([1]), "two": np.array([2])}
    made = {n: save(tmp_path / f"{n}.onnx", SHAPES, weights | {"rest": np.array([n])}) for n in (4, -1)}
    healthy = compared(tmp_path, made[4], made[-1], backends, random(2, 6, 4))
    assert not healthy.guilty
    assert healthy.agrees
    wrong = save(
        tmp_path / "wrong.onnx", SHAPES, {"index": np.array([2]), "two": np.array([2]), "rest": np.array([-1])}
    )
    assert compared(tmp_path, made[4], wrong, backends, random(2, 6, 4)).guilty


@pytest.mark.parametrize("backends", LEVELS)
def test_a_wrong_shape_leads_to_the_node_that_computed_it(tmp_path: Path, backends: str) -> None:
    good, bad = shapes(tmp_path / "good.onnx", 1), shapes(tmp_path / "bad.onnx", 2)
    test = compared(tmp_path, good, bad, backends, random(2, 6, 4))
    assert [row.name for row in test.guilty] == ["channels"]
    assert test.guilty[0].kind == "shape"
    assert "is [4], but should be [6] for its inputs" in test.guilty[0].why
    wrong = [row for row in test.rows if row.verdict == SHAPE]
    assert [row.name for row in wrong] == ["b", "y"]
    assert all("channels (Gather)" in row.why for row in wrong)
    assert {row.name for row in test.rows if row.kind == "shape"} == {"channels", "more", "rows"}


@pytest.mark.parametrize("backends", LEVELS)
def test_constants_that_differ_belong_to_their_reader(tmp_path: Path, backends: str) -> None:
    text = """
    net (float[4,8] x) => (float[N,M] y)
    {
        c = Constant <value_floats = [VALUES]> ()
        d = Neg (c)
        e = Mul (x, d)
        y = Relu (e)
    }"""
    good, bad = (save(tmp_path / f"{v}.onnx", text.replace("VALUES", ",".join([f"{v}"] * 8)), {}) for v in (1.25, 1.5))
    test = compared(tmp_path, good, bad, backends, random(4, 8))
    assert [row.name for row in test.guilty] == ["d"]


def test_side_values_are_constant_or_shape(tmp_path: Path) -> None:
    assert set(side_values(Graph(chain(tmp_path / "a.onnx"))).values()) == {"constant"}
    assert side_values(Graph(shapes(tmp_path / "b.onnx", 1))) == dict.fromkeys(
        ("whole", "channels", "more", "rows"), "shape"
    )


def test_a_branch_whose_result_the_optimizer_hides_is_computed_again(tmp_path: Path) -> None:
    """A convolution in blocked layout has its weight reordered: the folded one is nowhere to be read."""
    text = """
    net (float[1,16,8,8] x) => (float[N,C,H,W] y)
    {
        kernel = Transpose <perm = [1,0,2,3]> (w)
        c = Conv <pads = [1,1,1,1]> (x, kernel)
        y = Relu (c)
    }"""
    weight = {"w": random(16, 16, 3, 3) * 0.1}
    good = save(tmp_path / "good.onnx", text, weight)
    bad = save(tmp_path / "bad.onnx", text.replace("[1,0,2,3]", "[0,1,2,3]"), weight)
    test = compared(tmp_path, good, bad, "ort,ort-all", random(1, 16, 8, 8))
    assert [row.name for row in test.guilty] == ["kernel"]


RESIZE = """
net (float[1,2,8,8] x) => (float[N,C,H,W] y)
{
    scales = Constant <value = float[4] {1.0, 1.0, 2.0, 2.0}> ()
    up = Resize <mode = "linear", coordinate_transformation_mode = "MODE"> (x, , scales)
    y = Sigmoid (up)
}"""


@pytest.mark.parametrize("backends", ["ort,ort-none", "ort,ort-all"])
def test_factors_of_a_resize_do_not_make_another_size(tmp_path: Path, backends: str) -> None:
    """Where a Resize is wrong, what its inputs may be off by is tried: not with another size."""
    good, bad = (
        save(tmp_path / f"{mode}.onnx", RESIZE.replace("MODE", mode), {}) for mode in ("half_pixel", "align_corners")
    )
    test = compared(tmp_path, good, bad, backends, random(1, 2, 8, 8))
    assert [row.name for row in test.guilty] == ["up"]


def test_a_size_that_is_taken_from_the_input_is_nobodys_fault(tmp_path: Path) -> None:
    """A Reshape's 0 stands for its input's size on that axis."""
    body = "{ rows = Concat <axis = 0> (first, rest)\n b = Reshape (x, rows)\n y = Sigmoid (b) }"
    text = f"net (float[2,6,4] x) => (float[N,M] y)\n{body}"
    good, bad = (
        save(tmp_path / f"{first}.onnx", text, {"first": np.array([first]), "rest": np.array([24])}) for first in (2, 0)
    )
    healthy = compared(tmp_path, good, bad, "ort,ort-none", random(2, 6, 4))
    assert not healthy.guilty
    assert healthy.agrees


def test_side_values_that_no_probe_shows_are_computed_from_the_shapes_of_the_run(tmp_path: Path) -> None:
    net = NetBuilder()
    shape = net.op("Shape", net.op("Relu", "x", name="mid"), name="shape")
    net.op("Reshape", "mid", net.op("Neg", net.op("Neg", shape, name="n"), name="same"), name="y")
    graph = Graph(net.save(tmp_path / "n.onnx", {"x": (1, [2, "n"])}, ["y"]))
    folded = Folded(graph, exposed=["mid", "y"])
    for name, array in (("x", np.zeros((2, 9))), ("mid", np.zeros((2, 5), np.float32)), ("y", np.zeros((2, 7)))):
        folded.see(name, array)
    assert {name: value.tolist() for name, value in folded.values()} == {
        "shape": [2, 5], "n": [-2, -5], "same": [2, 5],
    }  # fmt: skip
