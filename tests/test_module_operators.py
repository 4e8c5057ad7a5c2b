"""A module's own operators as the judge of two runs of it, where its graph decomposes them into something else."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from torch import Tensor, nn

from cp_debug.backends.base import Program
from cp_debug.bisect.replay import Replayer
from cp_debug.bisect.replayed import Replay
from cp_debug.graph.graph import Graph
from cp_debug.programs.align import align
from cp_debug.programs.torch_span import ModuleOperators

DECOMPOSED = """<ir_version: 8, opset_import: ["": 18]>
g (float[2,4] x, float[2,4] y) => (float[2,4] z) {
  a = Add(x, x)
  q = Div(a, y)
  f = Floor(q)
  p = Mul(f, y)
  r = Sub(a, p)
  z = Neg(r)
}"""


class Remainder(nn.Module):
    """x by Inf is x, or Inf below 0, and x − ⌊x ÷ Inf⌋·Inf is NaN."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return -torch.remainder(x + x, y)


def remainder_program(folder: Path, inputs: dict[str, Tensor]) -> Program:
    onnx.save(onnx.parser.parse_model(DECOMPOSED), folder / "net.onnx")
    graph, module = Graph(folder / "net.onnx"), Remainder()
    return Program("net", graph, module, align(graph, module, [*inputs.values()]))


def given() -> dict[str, Tensor]:
    x = torch.tensor([[0.5, 3.0, 7.25, -1.0], [2.0, 4.0, 9.5, 1.0]])
    return {"x": x, "y": torch.full((2, 4), torch.inf)}


def replayed(program: Program, test: dict[str, Tensor], right: dict[str, Tensor], **options: Any) -> dict[str, Replay]:
    replayer = Replayer(program.graph, ("fp32", "fp32"), "fp64", {"a", "r", "z"}, **options)
    return dict(replayer.layers(right.__getitem__, test.__getitem__))


def values() -> dict[str, Tensor]:
    inputs = given()
    a = inputs["x"] * 2
    r = torch.where(a < 0, torch.inf, a)
    return {**inputs, "a": a, "r": r, "z": -r}


def test_nan_of_a_decomposition_is_a_fault_of_the_side_that_has_it(tmp_path: Path) -> None:
    program, right = remainder_program(tmp_path, given()), values()
    wrong = right | {"r": torch.full((2, 4), torch.nan), "z": torch.full((2, 4), torch.nan)}
    found = replayed(program, wrong, right, suspects=["r"], module=program)
    assert (found["r"].new_nonfinite, found["r"].reference_excess) == (8, 0)
    assert found["z"].new_nonfinite == 0, "what reads it is innocent"
    alone = replayed(program, wrong, right, suspects=["r"])
    assert (alone["r"].new_nonfinite, alone["r"].reference_excess) == (0, math.inf), "the graph takes the other side"


def test_what_the_module_makes_is_right_where_the_graph_has_nan(tmp_path: Path) -> None:
    program, right = remainder_program(tmp_path, given()), values()
    found = replayed(program, right, right, module=program)
    assert (found["r"].new_nonfinite, found["r"].reference_excess, found["r"].introduced) == (0, 0, 0)
    introduced, exact = _introduced(program, right)
    assert not introduced.nan_to_num().any()
    assert torch.equal(exact.float(), right["r"])


def test_what_equals_its_input_is_paired_by_the_operator_that_the_exporter_recorded(tmp_path: Path) -> None:
    inputs = {"x": given()["x"].abs(), "y": given()["y"]}
    onnx.save(onnx.parser.parse_model(DECOMPOSED), tmp_path / "net.onnx")
    model = onnx.load(tmp_path / "net.onnx")
    for node in model.graph.node[1:5]:
        target = "target=torch.ops.aten.remainder.Tensor"
        node.metadata_props.add(key="pkg.torch.onnx.fx_node", value=f"%r : call_function[{target}](args = (%a, %y))")
    onnx.save(model, tmp_path / "net.onnx")
    (departure,) = align(Graph(tmp_path / "net.onnx"), Remainder(), [*inputs.values()]).departures
    assert (departure.onnx, departure.at) == ("r", "remainder")


def _introduced(program: Program, right: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    replayer = Replayer(program.graph, ("fp32", "fp32"), "fp64", {"a", "r", "z"}, module=program)
    list(replayer.layers(right.__getitem__, right.__getitem__))
    return replayer.introduced("r", right.__getitem__)


class Scalars(nn.Module):
    """Python scalars, a constant of FP64, a cast to FP16."""

    def forward(self, x: Tensor) -> Tensor:
        y = torch.fmod(x, 2.3) + torch.tensor(-0.1, dtype=torch.float64)
        return (y * 2.0).half().float()


SCALARS = """<ir_version: 8, opset_import: ["": 18]>
g (float[4] x) => (float[4] z) <float b = {2.3}, float c = {-0.1}, float two = {2.0}> {
  m = Mod<fmod=1>(x, b)
  y = Add(m, c)
  d = Mul(y, two)
  h = Cast<to=10>(d)
  z = Cast<to=1>(h)
}"""


def test_operators_are_computed_in_fp64_with_scalars_as_they_are_asked_for(tmp_path: Path) -> None:
    onnx.save(onnx.parser.parse_model(SCALARS), tmp_path / "net.onnx")
    graph, module, x = Graph(tmp_path / "net.onnx"), Scalars(), torch.tensor([2.30078125, 5.0, -1.0, 0.3])
    program = Program("net", graph, module, align(graph, module, [x]))
    operators = ModuleOperators(program, {"x": x})
    between = operators.between("y", ["x"])
    assert [s for operation in between.values() for s in operators.scalars(operation)] == [2.3, -0.1]
    assert not [s for operation in operators.between("d", ["y"]).values() for s in operators.scalars(operation)]

    load = {"x": x}.__getitem__
    exact = torch.fmod(x.double(), float(np.float32(2.3))) + float(np.float32(-0.1))
    torch.testing.assert_close(operators.result("y", ["x"], load), exact, rtol=1e-15, atol=0)
    rounded = operators.result("y", ["x"], load, lambda operation, scalar: float(np.float16(scalar)))
    torch.testing.assert_close(rounded, torch.fmod(x.double(), 2.30078125) - 0.0999755859375, rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(operators.result("z", ["x"], load), (2 * exact).half().double(), rtol=0, atol=0)
    assert operators.result("other", ["x"], load) is None
    assert operators.starts("y", ["x", "m"]) == ["m"]
