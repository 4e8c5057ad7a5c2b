"""Where the difference comes from when every layer does what its precision must, and a fix that was tried."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from nets import NetBuilder, calibrate_graph
from onnx import helper
from test_cli import run

from cp_debug.backends.registry import create
from cp_debug.backends.spec import BackendSpec
from cp_debug.bisect import kept
from cp_debug.bisect.engine import Options, bisect
from cp_debug.bisect.finding import Finding
from cp_debug.bisect.kept import KeepTrials, TriedSet, in_words
from cp_debug.bisect.result import TestResult
from cp_debug.errors import InputError
from cp_debug.graph.graph import Graph
from cp_debug.graph.qdq import insert_qdq, remove_qdq
from cp_debug.programs.precision import PRECISIONS
from cp_debug.quantization.quantized_programs import Calibration
from cp_debug.reports.causes import lines
from cp_debug.reports.verdict_line import headline, verdict_line
from cp_debug.safe_text import percent


def const(net: NetBuilder, value: float) -> str:
    return net.weight(np.array(value, np.float32))


def offset(folder: Path) -> Path:
    """Four products, + 1000, − 1000, another product."""
    net, value = NetBuilder(), "x"
    for i in range(4):
        weight = net.weight((net.rng.standard_normal((8, 8)) / 2).astype(np.float32))
        value = net.op("Relu", net.op("MatMul", value, weight, name=f"fc{i}"), name=f"relu{i}")
    value = net.op("Add", value, const(net, 1000), name="offset")
    value = net.op("Sub", value, const(net, 1000), name="centred")
    net.op("MatMul", value, net.weight(net.rng.standard_normal((8, 2)).astype(np.float32)), name="y")
    np.savez(folder / "x.npz", x=net.rng.standard_normal((4, 8)).astype(np.float32))
    return net.save(folder / "offset.onnx", {"x": (1, [4, 8])}, ["y"])


def positions(folder: Path) -> Path:
    """Whole positions of 5000 and more, cast to floats, as angles of a sine."""
    net = NetBuilder()
    frequencies = net.weight(np.array([[1, 0.3, 0.1, 0.03]], np.float32))
    angle = net.op("Mul", net.op("Cast", "x", name="cast", to=1), frequencies, name="angle")
    net.op("MatMul", net.op("Sin", angle, name="sin"), net.weight(np.ones((4, 2), np.float32)), name="y")
    np.savez(folder / "x.npz", x=5000 + np.arange(8)[:, None])
    return net.save(folder / "positions.onnx", {"x": (7, [8, 1])}, ["y"])


def deep(folder: Path) -> Path:
    """Twenty products: nothing stands out."""
    net, value = NetBuilder(), "x"
    for i in range(20):
        weight = net.weight((net.rng.standard_normal((64, 64)) / 8).astype(np.float32))
        value = net.op("MatMul", value, weight, name=f"fc{i}")
    np.savez(folder / "x.npz", x=net.rng.standard_normal((4, 64)).astype(np.float32))
    return net.save(folder / "deep.onnx", {"x": (1, [4, 64])}, [value])


def found(path: Path, precision: str = "fp16", **options: Any) -> tuple[TestResult, Finding]:
    (test,) = bisect(str(path), f"ort,emu-{precision}", options=Options(inputs=path.parent / "x.npz", **options)).tests
    assert test.guilty == []
    (finding,) = test.findings
    return test, finding


def followed(path: Path, finding: Finding, precision: str = "fp16") -> TestResult:
    backend: Any = create(BackendSpec.parse(f"emu-{precision}"))
    sides = [create(BackendSpec.parse("ort")), backend.keeping(finding.evidence["keep_fp32"])]
    (test,) = bisect(str(path), sides, options=Options(inputs=path.parent / "x.npz")).tests
    return test


def rotation(folder: Path) -> Path:
    """Positions of 3000 and more times a frequency, both constants, as angles of what the input is multiplied with."""
    net = NetBuilder()
    places = net.weight(np.arange(3000, 3032, dtype=np.float32)[None])
    angles = net.op("Mul", places, const(net, 0.5), name="angles")
    net.op("Mul", "x", net.op("Cos", angles, name="cos"), name="y")
    np.savez(folder / "x.npz", x=net.rng.standard_normal((8, 32)).astype(np.float32))
    return net.save(folder / "rotation.onnx", {"x": (1, [8, 32])}, ["y"])


@pytest.mark.parametrize(
    ("network", "layers", "says"),
    [
        (offset, ["node_offset"], "100% of the final divergence comes from here: 1001.27 is 1001.5 in FP16"),
        (positions, ["node_cast"], "84% of the final divergence comes from here: 5002 is 5000 in FP16"),
        (rotation, ["node_angles"], "100% of the final divergence comes from here: 1508.5 is 1508 in FP16"),
    ],
)
def test_the_layer_that_makes_most_is_named_and_what_is_told_to_keep_was_tried(
    tmp_path: Path, network: Any, layers: list[str], says: str
) -> None:
    path = network(tmp_path)
    test, finding = found(path)
    assert finding.layers == layers
    assert finding.says.startswith(says)
    assert "which has 11 bits; " in finding.says
    assert "after it enlarges it" in finding.says
    assert "adds up" not in str(test)
    after = followed(path, finding)
    flags = " ".join(f"--keep-fp32 {name}" for name in finding.evidence["keep_fp32"])
    assert finding.fix.startswith(f"keep in FP32: {flags}: ")
    assert max(row.stats.rel_l2 for row in after.outputs) == pytest.approx(finding.evidence["after"], rel=1e-3)
    assert max(row.stats.rel_l2 for row in test.outputs) == pytest.approx(finding.evidence["before"], rel=1e-3)
    assert finding.evidence["after"] < 0.01 * finding.evidence["before"]


def test_what_overflows_is_kept_in_fp32_as_far_as_what_makes_it_small_again(tmp_path: Path) -> None:
    net = NetBuilder()
    large = net.op("Mul", "x", const(net, 1e6), name="up")
    net.op("Relu", net.op("Mul", large, const(net, 1e-6), name="down"), name="y")
    np.savez(tmp_path / "x.npz", x=net.rng.standard_normal((4, 8)).astype(np.float32))
    path = net.save(tmp_path / "large.onnx", {"x": (1, [4, 8])}, ["y"])
    (test,) = bisect(str(path), "ort,emu-fp16", options=Options(inputs=tmp_path / "x.npz")).tests
    assert [finding.layers for finding in test.findings] == [["node_up"], ["node_down"]]
    for finding in test.findings:
        assert finding.evidence["keep_fp32"] == ["node_up", "node_down"]
        after = followed(path, finding)
        assert max(row.stats.rel_l2 for row in after.outputs) == pytest.approx(finding.evidence["after"], rel=1e-3)
        assert finding.evidence["after"] < 1e-3 < finding.evidence["before"]


def test_an_overflow_is_found_where_another_one_hides_it(tmp_path: Path) -> None:
    """A quotient of two sums beyond FP16: NaN of the one is all that is left of the other."""
    net = NetBuilder()
    rows = net.op("Relu", "x", name="rows")
    above = net.op("MatMul", net.op("Transpose", rows, perm=[1, 0]), rows, name="above")
    above = net.op("MatMul", rows, above, name="read")
    below = net.op("ReduceSum", rows, net.weight(np.array([0])), name="below")
    below = net.op("ReduceSum", net.op("Mul", rows, below, name="each"), net.weight(np.array([1])), name="all")
    net.op("Div", above, net.op("Add", below, const(net, 1e-3)), name="y")
    x = (200 * net.rng.standard_normal((2000, 8))).astype(np.float32)
    x[np.arange(2000), np.arange(2000) % 8] = 0  # 0 · Inf is NaN in each row
    np.savez(tmp_path / "x.npz", x=x)
    path = net.save(tmp_path / "sums.onnx", {"x": (1, [2000, 8])}, ["y"])
    (test,) = bisect(str(path), "ort,emu-fp16", options=Options(inputs=tmp_path / "x.npz")).tests
    (finding,) = test.findings
    assert set(finding.layers) == {"node_above", "node_below"}
    assert re.search(r"values up to [^ ,]+, the largest", finding.says)  # the larger one of both
    assert {*finding.layers, "node_y"} <= set(finding.evidence["keep_fp32"])
    assert followed(path, finding).agrees


def test_a_layer_that_loses_numbers_is_innocent_after_its_fix(tmp_path: Path) -> None:
    """Numbers of 1e-6 in two layers, and a factor of 1e6: with one of the two in FP32 the tolerance holds."""
    net = NetBuilder()
    small = net.op("Tanh", net.op("Mul", "x", const(net, 1e-6), name="small"), name="still")
    large = net.op("Mul", small, const(net, 1e6), name="large")
    net.op("MatMul", large, net.weight(net.rng.standard_normal((8, 4)).astype(np.float32)), name="y")
    np.savez(tmp_path / "x.npz", x=net.rng.standard_normal((4, 8)).astype(np.float32))
    path = net.save(tmp_path / "small.onnx", {"x": (1, [4, 8])}, ["y"])
    (test,) = bisect(str(path), "ort,emu-fp16", options=Options(inputs=tmp_path / "x.npz")).tests
    assert {name for finding in test.findings for name in finding.layers} == {"node_small", "node_large"}
    (lost,) = [finding for finding in test.findings if finding.layers == ["node_small"]]
    assert lost.evidence["keep_fp32"] == ["node_small", "node_still", "node_large"]
    for finding in test.findings:
        assert finding.layers[0] not in [row.name for row in followed(path, finding).guilty]


def test_the_layer_that_most_comes_from_is_told_beside_a_guilty_one_with_little(tmp_path: Path) -> None:
    """The inverse sigmoid of what is nearly 1: the quotient overflows where the sigmoid was rounded to 1."""
    net = NetBuilder()
    near = net.op("Sigmoid", net.op("Add", "x", const(net, 8), name="shifted"), name="near")
    rest = net.op("Clip", net.op("Sub", const(net, 1), near, name="rest"), const(net, 1e-5), name="least")
    back = net.op("Log", net.op("Div", near, rest, name="ratio"), name="back")
    net.op("Sigmoid", net.op("Sub", back, const(net, 8)), name="y")
    np.savez(tmp_path / "x.npz", x=net.rng.standard_normal((50, 4)).astype(np.float32))
    path = net.save(tmp_path / "inverse.onnx", {"x": (1, [50, 4])}, ["y"])
    (test,) = bisect(str(path), "ort,emu-fp16", options=Options(inputs=tmp_path / "x.npz")).tests
    assert [row.name for row in test.guilty] == ["node_ratio"]
    assert "; most of it comes from node_near (Sigmoid), which rounds as declared; " in verdict_line(test).plain


def test_what_rounds_in_front_is_kept_in_fp32_too(tmp_path: Path) -> None:
    """|a|² + |b|² − 2ab: the squares round as much as the difference that cancels them, so all of it must be exact."""
    net = NetBuilder()
    squares = [
        net.op("ReduceSum", net.op("Mul", s, s, name=f"{s}{s}"), net.weight(np.array([1])), name=s * 3) for s in "ab"
    ]
    twice = net.op("Mul", net.op("MatMul", "a", net.op("Transpose", "b", perm=[1, 0])), const(net, 2.0), name="twice")
    total = net.op("Add", squares[0], net.op("Transpose", squares[1], perm=[1, 0]), name="total")
    apart = net.op("Sqrt", net.op("Abs", net.op("Sub", total, twice, name="apart")))
    net.op("ReduceMin", apart, axes=[1], name="y")
    path = net.save(tmp_path / "distance.onnx", {"a": (1, [16, 3]), "b": (1, [16, 3])}, ["y"])
    a = net.rng.uniform(0, 100, (16, 3)).astype(np.float32)
    np.savez(tmp_path / "x.npz", a=a, b=a + 0.3 * net.rng.standard_normal((16, 3)).astype(np.float32))
    _, finding = found(path)
    assert {"node_aa", "node_bb", "node_apart"} <= set(finding.evidence["keep_fp32"])
    assert finding.evidence["after"] < 0.02 < finding.evidence["before"]
    assert followed(path, finding).agrees


def test_a_set_grows_in_front_where_what_lies_behind_helps_no_more(tmp_path: Path) -> None:
    """A scan as Mamba's: exp(−s) · cumsum(x · exp(s)), where exp(s) overflows and exp(−s) loses digits."""
    net = NetBuilder()
    total = net.op("CumSum", net.op("Softplus", "x"), net.weight(np.array(0)), name="total")
    value = net.op("CumSum", net.op("Mul", "x", net.op("Exp", total, name="grows")), net.weight(np.array(0)))
    value = net.op("Mul", value, net.op("Exp", net.op("Neg", total), name="decays"), name="scanned")
    for i in range(12):
        weight = net.weight((net.rng.standard_normal((8, 8)) / 2).astype(np.float32))
        value = net.op("Relu", net.op("MatMul", value, weight, name=f"fc{i}"), name="y" if i == 11 else f"relu{i}")
    np.savez(tmp_path / "x.npz", x=net.rng.standard_normal((24, 8)).astype(np.float32))
    path = net.save(tmp_path / "scan.onnx", {"x": (1, [24, 8])}, ["y"])
    (test,) = bisect(str(path), "ort,emu-fp16", options=Options(inputs=tmp_path / "x.npz")).tests
    finding = test.findings[0]
    assert {"node_grows", "node_decays", "node_scanned"} <= set(finding.evidence["keep_fp32"])
    assert not {"node_fc1", "node_relu1"} & set(finding.evidence["keep_fp32"])
    assert followed(path, finding).agrees


def test_the_fix_of_one_of_two_losses_helps_beside_the_other_one(tmp_path: Path) -> None:
    """A square overflows, and an ε vanishes: with one of the two in FP32, nothing of the result is right."""
    net = NetBuilder()
    large = net.op("Mul", "x", const(net, 3000), name="large")
    size = net.op("Sqrt", net.op("ReduceMean", net.op("Mul", large, large, name="square"), axes=[1]), name="size")
    hidden = net.op("Relu", net.op("Div", large, size, name="normal"), name="hidden")
    least = net.op("Clip", net.op("ReduceSum", hidden, net.weight(np.array([1]))), const(net, 1e-9), name="least")
    net.op("Add", net.op("Div", hidden, least, name="parts"), hidden, name="y")
    x = net.rng.standard_normal((4, 8)).astype(np.float32)
    x[2] = -np.abs(x[2])
    np.savez(tmp_path / "x.npz", x=x)
    path = net.save(tmp_path / "two.onnx", {"x": (1, [4, 8])}, ["y"])
    (test,) = bisect(str(path), "ort,emu-fp16", options=Options(inputs=tmp_path / "x.npz")).tests
    assert {finding.layers[0] for finding in test.findings} == {"node_square", "node_least"}
    for finding in test.findings:
        assert {"node_square", "node_least"} <= set(finding.evidence["keep_fp32"])
        assert followed(path, finding).agrees


def test_for_whole_numbers_a_set_is_told_by_how_many_flip(tmp_path: Path) -> None:
    """Cells of a grid, (x + 51.2) ÷ 0.05: the index is off by little, and the cell is another one."""
    net = NetBuilder()
    places = net.op("Div", net.op("Add", "x", const(net, 51.2), name="shifted"), const(net, 0.05), name="cells")
    net.op("Cast", net.op("Floor", places, name="floor"), to=7, name="index")
    path = net.save(tmp_path / "cells.onnx", {"x": (1, [500])}, ["index"])
    np.savez(tmp_path / "x.npz", x=net.rng.uniform(-51, 51, 500).astype(np.float32))
    test, finding = found(path)
    assert finding.evidence["before"] == test.outputs[0].stats.unequal / 500 > 0.2
    assert finding.evidence["after"] < 0.01
    assert finding.evidence["keep_fp32"] == ["node_shifted", "node_cells", "node_floor"]


def test_a_result_beyond_fp16_is_another_finding_than_a_constant(tmp_path: Path) -> None:
    net = NetBuilder()
    net.op("Div", net.op("Exp", "x", name="exp"), const(net, 1e5), name="y")
    path = net.save(tmp_path / "net.onnx", {"x": (1, [12])}, ["y"])
    np.savez(tmp_path / "x.npz", x=np.linspace(-10, 18, 12, dtype=np.float32))
    (test,) = bisect(str(path), "ort,emu-fp16", options=Options(inputs=tmp_path / "x.npz")).tests
    says = {finding.layers[0]: finding.says for finding in test.findings if len(finding.layers) == 1}
    assert says.keys() == {"node_exp", "node_y"}
    assert says["node_exp"].startswith("FP16 overflow: values up to 6.57e+07")
    assert " is beyond FP16: values up to 1e+05" in says["node_y"]


def test_nan_or_inf_come_from_what_became_1(tmp_path: Path) -> None:
    """p ÷ (1 − p) of a sure p, whose own rounding to 1 makes no NaN."""
    net = NetBuilder()
    p = net.op("Min", net.op("Sigmoid", "x", name="sure"), const(net, 1 - 1e-6), name="least")
    net.op("Log", net.op("Div", p, net.op("Sub", const(net, 1.0), p, name="rest"), name="odds"), name="y")
    path = net.save(tmp_path / "net.onnx", {"x": (1, [4, 8])}, ["y"])
    x = net.rng.standard_normal((4, 8)).astype(np.float32)
    x[2] = 20
    np.savez(tmp_path / "x.npz", x=x)
    test, finding = found(path)
    assert finding.layers == ["node_least"]
    assert finding.says == "FP16 as declared: 0.999999 is 1 in FP16; NaN or Inf follows later"
    assert "NaN or Inf comes from node_least: 0.999999 is 1 in FP16; " in verdict_line(test).plain
    assert "adds up" not in verdict_line(test).plain
    assert followed(path, finding).agrees


@pytest.mark.parametrize(
    ("way", "layer", "says"),
    [
        ("constant", "node_least", "FP16 underflow: the constant of node_least, 1e-12, is 0 in FP16"),
        ("result", "node_p", "FP16 underflow: 2.06e-09 and other numbers of the result are 0 in FP16"),
        ("input", "node_y", "Inf appears here in 1 value where a number is right: 1e-08 of x is 0 in FP16"),
    ],
)
def test_one_number_that_becomes_0_is_told_where_somebody_divides_by_it(
    way: str, layer: str, says: str, tmp_path: Path
) -> None:
    """x ÷ √(Σx² + ε) of zeros, the logarithm of one improbable class of 400, and that of one small input."""
    net, x = NetBuilder(), np.random.default_rng(0).uniform(1, 2, (4, 400)).astype(np.float32)
    if way == "constant":
        squares = net.op("ReduceSum", net.op("Mul", "x", "x"), net.weight(np.array([1])), name="squares")
        net.op("Div", "x", net.op("Sqrt", net.op("Add", squares, const(net, 1e-12), name="least")), name="y")
        x[2] = 0
    elif way == "result":
        net.op("Log", net.op("Mul", net.op("Exp", "x", name="p"), const(net, 0.5), name="half"), name="y")
        x[2, 7] = -20
    else:
        net.op("Log", "x", name="y")
        x[2, 7] = 1e-8
    path = net.save(tmp_path / "net.onnx", {"x": (1, [4, 400])}, ["y"])
    np.savez(tmp_path / "x.npz", x=x)
    (test,) = bisect(str(path), "ort,emu-fp16", options=Options(inputs=tmp_path / "x.npz")).tests
    assert [row.name for row in test.guilty] == [layer]
    assert test.findings[0].says == says
    assert followed(path, test.findings[0]).agrees


@pytest.mark.parametrize(("share", "told"), [(-0.004, "0%"), (0.004, "0%"), (-0.006, "-1%"), (0.62, "62%")])
def test_a_share_that_rounds_to_nothing_has_no_sign(share: float, told: str) -> None:
    assert percent(share) == told


def test_many_layers_add_up_and_those_that_make_most_come_first(tmp_path: Path) -> None:
    test, finding = found(deep(tmp_path), "bf16", rtol=1e-6, atol=1e-6)
    says = "BF16 as declared: its rounding adds up over 20 layers; none contributes much, node_fc"
    assert finding.says.startswith(says)
    shares = {row.name: row.share or 0.0 for row in test.rows}
    assert finding.layers == sorted(finding.layers, key=lambda name: -shares[name])
    assert finding.fix.startswith("no fix found")  # but for all of it in FP32
    assert "keep_fp32" not in finding.evidence


def test_a_set_names_no_constants(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """− 1000 behind + 1000, with the constants in nodes without names; no trial is left to take any out."""
    monkeypatch.setattr(kept, "TRIALS", 3)
    path = offset(tmp_path)
    model = onnx.load(path)
    constants = [helper.make_node("Constant", [], [t.name], value=t) for t in model.graph.initializer]
    nodes = [*constants, *model.graph.node]
    del model.graph.initializer[:], model.graph.node[:]
    model.graph.node.extend(nodes)  # without names
    onnx.save(model, path)
    _, finding = found(path)
    assert not [name for name in finding.evidence["keep_fp32"] if name.startswith("Constant")]
    assert max(row.stats.rel_l2 for row in followed(path, finding).outputs) == pytest.approx(
        finding.evidence["after"], rel=1e-3
    )


def test_a_layer_that_is_kept_in_fp32_is_not_accused_of_fp16(tmp_path: Path) -> None:
    """x ÷ (sum + 1e-15) with a sum of 0: FP16 has no 1e-15, FP32 has."""
    net = NetBuilder()
    total = net.op("ReduceSum", "x", net.weight(np.array([1])), name="sum")
    net.op("Div", "x", net.op("Add", total, const(net, 1e-15), name="eps"), name="div")
    path = net.save(tmp_path / "net.onnx", {"x": (1, [4, 8])}, ["div"])
    x = np.abs(net.rng.standard_normal((4, 8))).astype(np.float32)
    x[2] = 0
    np.savez(tmp_path / "x.npz", x=x)
    (before,) = bisect(str(path), "ort,emu-fp16", options=Options(inputs=tmp_path / "x.npz")).tests
    assert [row.name for row in before.guilty] == ["node_eps"]
    assert before.findings[0].evidence["keep_fp32"] == ["node_eps", "node_div"]
    assert before.findings[0].evidence["before"] == np.inf
    after = followed(path, before.findings[0])
    assert after.agrees
    claims = {row.name: row.replay.precision for row in after.rows if row.replay}
    assert claims["node_eps"] == "fp32"
    assert claims["node_sum"] == "fp16"


def test_a_set_that_does_not_help_is_not_told(tmp_path: Path) -> None:
    class Tried(KeepTrials):
        def _error(self, kept: frozenset[tuple[str, str]]) -> float:
            return self._errors.setdefault(kept, 0.6 if kept else 1.0)

    graphs = {"net": Graph(offset(tmp_path))}
    pipeline = SimpleNamespace(model=None, kept=lambda name: ())
    candidate: Any = SimpleNamespace(
        pipeline=pipeline, programs=graphs, graphs=graphs, precision=PRECISIONS["fp16"], device="cpu"
    )
    sample: Any = None
    trials = Tried(candidate, sample, {})
    assert trials.find([("net", "node_offset")]) is None


OFFSET = """import torch


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.proj, self.out = torch.nn.Linear(16, 32), torch.nn.Linear(32, 4)
        self.proj.bias.data.fill_(300.0)

    def forward(self, x):
        y = self.proj(x)
        return self.out(y - y.mean(-1, keepdim=True))


def build():
    torch.manual_seed(0)
    return Net().eval(), torch.randn(8, 16)
"""


@pytest.mark.slow
def test_a_modules_layers_are_called_by_their_paths_and_lead_the_verdict(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(OFFSET, encoding="utf-8")
    net = f"{tmp_path / 'net.py'}:build"
    (test,) = bisect(net, "torch,emu-fp16").tests
    (finding,) = test.findings
    assert set(finding.layers) <= set(finding.evidence["keep_fp32"]) <= {row.name for row in test.rows}
    text = str(headline(test))
    assert text.startswith(f"✗ emu-fp16: {percent(min(finding.effect.share or 0, 1.0))} of the final divergence comes")
    assert f"from {', '.join(finding.layers)}; final outputs differ" in text
    names = [word for name in finding.evidence["keep_fp32"] for word in ("--keep-fp32", name)]
    assert run("bisect", net, "-b", "torch,emu-fp16", *names)[0] == 0
    code, text = run("bisect", f"{net}x", "-b", "torch,emu-fp16")
    assert (code, "has no callable 'buildx'; did you mean build?" in text) == (2, True)


@pytest.mark.slow
def test_nan_that_rounding_makes_inside_an_operator_of_torch_has_a_fix_that_was_tried(tmp_path: Path) -> None:
    """logsigmoid is Log of Sigmoid in the graph, and the Sigmoid of -20 is 0 in FP16."""
    model = OFFSET.replace("y - y.mean(-1, keepdim=True)", "torch.nn.functional.logsigmoid(y)")
    model = model.replace("bias.data.fill_(300.0)", "weight.data.mul_(16)")
    (tmp_path / "net.py").write_text(model, encoding="utf-8")
    net = f"{tmp_path / 'net.py'}:build"
    (test,) = bisect(net, "torch,emu-fp16").tests
    (finding,) = test.findings
    assert finding.cause == "nonfinite"
    names = [word for name in finding.evidence["keep_fp32"] for word in ("--keep-fp32", name)]
    assert run("bisect", net, "-b", "torch,emu-fp16", *names)[0] == 0


def test_nodes_to_keep_are_read_from_a_file(tmp_path: Path) -> None:
    path = offset(tmp_path)
    _, finding = found(path)
    names = tmp_path / "names.txt"
    names.write_text("\n".join(finding.evidence["keep_fp32"]) + "\n", encoding="utf-8")
    inputs = ["--inputs", tmp_path / "x.npz"]
    assert run("bisect", path, "-b", "ort,emu-fp16", *inputs)[0] == 1
    assert run("bisect", path, "-b", "ort,emu-fp16", *inputs, "--keep-fp32", f"@{names}")[0] == 0
    code, text = run("bisect", path, "-b", "ort,emu-fp16", *inputs, "--keep-fp32", f"@{tmp_path / 'none.txt'}")
    assert code == 2
    assert "none.txt" in text


SMOOTHED = " · or divide such channels of its input by a factor, and multiply what reads them by it (SmoothQuant)"


def outlier(folder: Path) -> Path:
    """Three products without names; one column in front of the second is a hundred times the others."""
    net = NetBuilder()
    first = net.weight((net.rng.standard_normal((16, 16)) / 4 * np.array([100.0] + [1.0] * 15)).astype(np.float32))
    second = net.weight((net.rng.standard_normal((16, 16)) / 4 / np.array([[100.0]] + [[1.0]] * 15)).astype(np.float32))
    value = net.op("MatMul", net.op("MatMul", "x", first, name="wide"), second, name="costly")
    net.op("MatMul", value, net.weight((net.rng.standard_normal((16, 8)) / 4).astype(np.float32)), name="y")
    for node in net.nodes:
        node.name = ""
    np.savez(folder / "x.npz", x=net.rng.standard_normal((32, 16)).astype(np.float32))
    return net.save(folder / "outlier.onnx", {"x": (1, [32, 16])}, ["y"])


def quantized(path: Path, test: Path | None = None, rtol: float | None = None, **calibration: Any) -> TestResult:
    calibrated = Calibration(method="max", **calibration)
    options = Options(inputs=path.parent / "x.npz", calibration=calibrated, rtol=rtol, atol=rtol)
    sides = "ort,ort" if test else "ort,emu-int8"
    return bisect(str(path), sides, test_model=test, options=options).tests[0]


def test_leaving_the_costliest_layer_unquantized_gives_what_the_line_says(tmp_path: Path) -> None:
    path = outlier(tmp_path)
    (finding,) = quantized(path).findings
    assert finding.layers == ["costly"]
    after, before = finding.evidence["after"], finding.evidence["before"]
    assert "; channel 0 of its input reaches " in finding.says
    advice = f"leave unquantized: --skip-layers costly: {after:.2g} ({before:.2g} before), emulated"
    assert finding.fix == f"{advice}{SMOOTHED}"
    assert after < 0.5 * before
    (row,) = quantized(path, skip_layers=["costly"]).outputs
    assert row.stats.rel_l2 == pytest.approx(after, rel=1e-3)


def test_a_quantized_file_is_tried_with_the_costliest_layer_in_fp32(tmp_path: Path) -> None:
    path = outlier(tmp_path)
    graph = Graph(path)
    with np.load(tmp_path / "x.npz") as inputs:
        scales = calibrate_graph(graph, [dict(inputs)])
    file = insert_qdq(graph, scales.layers, tmp_path / "int8.onnx")
    (finding,) = quantized(path, file).findings
    assert finding.fix.startswith("leave unquantized: costly (data, weights and result in FP32): ")
    (node,) = (node.name for node in Graph(file).nodes if node.outputs == ("costly",))
    (row,) = quantized(path, remove_qdq(Graph(file), [node], tmp_path / "without.onnx")).outputs
    assert row.stats.rel_l2 == pytest.approx(finding.evidence["after"], rel=1e-3)
    assert "% of the final divergence comes from costly" in headline(quantized(path, file, 1e-4)).plain


def test_leaving_a_clipped_layer_unquantized_is_tried_as_well(tmp_path: Path) -> None:
    path = outlier(tmp_path)
    with np.load(tmp_path / "x.npz") as inputs:
        np.savez(tmp_path / "small.npz", x=inputs["x"] / 8)
    test = quantized(path, data=tmp_path / "small.npz")
    finding = next(finding for finding in test.findings if finding.cause == "int8-clipped")
    advice, _, gave = finding.fix.partition(", or leave it unquantized: ")
    flags, _, figures = gave.partition(": ")
    assert advice.startswith("calibrate on data like this")
    assert figures == f"{finding.evidence['after']:.2g} ({finding.evidence['before']:.2g} before), emulated"
    skipped = [flag.strip() for flag in flags.split("--skip-layers") if flag.strip()]
    (row,) = quantized(path, data=tmp_path / "small.npz", skip_layers=skipped).outputs
    assert row.stats.rel_l2 == pytest.approx(finding.evidence["after"], rel=1e-3)
    costs = next(finding for finding in test.findings if finding.cause == "int8")
    assert costs.fix == "", "what is wrong comes first"


def test_what_cannot_be_tried_is_not_said_to_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: Any) -> Any:
        raise InputError("no such operator")

    monkeypatch.setattr(KeepTrials, "_without", refused)
    (finding,) = quantized(outlier(tmp_path)).findings
    assert finding.fix == f"accept it, or leave it unquantized (not tried): --skip-layers costly{SMOOTHED}"
    assert "after" not in finding.evidence


def test_a_long_set_is_cut_off_in_a_terminal_alone() -> None:
    nodes = ["node 0", *(f"node{i}" for i in range(1, 12))]
    fix = in_words(TriedSet((), 0.0011, 0.83, 1), nodes)
    flags = "--keep-fp32 'node 0' " + " ".join(f"--keep-fp32 {name}" for name in nodes[1:8])
    assert fix.startswith(f"keep in FP32: {flags} --keep-fp32 node8 "), "as a shell takes it"
    finding = Finding("fp16", "FP16 is too coarse", ["a"], ["Add"], fix=fix, evidence={"keep_fp32": nodes})
    assert dict(lines(finding))["fix"] == fix
    short = dict(lines(finding, show_all=False))["fix"]
    assert short.startswith(f"keep in FP32: {flags} and 4 more (all: --all, or evidence.keep_fp32): 0.0011")
