"""Outputs of two models: each of the reference's is compared, or its absence is told; `--map` does what it says."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper, parser
from test_cli import run
from torch import nn

import cp_debug
from cp_debug.reports.deployment import render_junit as verification_junit
from cp_debug.reports.files import render_github, render_junit
from cp_debug.reports.saved import SavedResult
from cp_debug.reports.verdict_line import verdict_line

RNG = np.random.default_rng(0)
WEIGHTS = {name: RNG.standard_normal((8, 8)).astype(np.float32) for name in ("w", "w2")}
Y, A, B = "    y = MatMul (x, w)", "    a = Relu (y)", "    b = MatMul (a, w2)"


def save(path: Path, outputs: str, *nodes: str, scale: float = 1.0) -> Path:
    text = f"""<ir_version: 8, opset_import: ["" : 17]>
net (float[2,8] x) => ({outputs})
{{
{chr(10).join(nodes)}
}}"""
    model = parser.parse_model(text)
    read = {name for node in model.graph.node for name in node.input}
    arrays = {name: array * np.float32(scale) for name, array in WEIGHTS.items() if name in read}
    model.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in arrays.items())
    onnx.save(model, path)
    return path


def both(folder: Path, *, scale: float = 1.0) -> tuple[Path, Path]:
    """A network with the outputs a and b, and one without b."""
    ours = save(folder / "ab.onnx", "float[2,8] a, float[2,8] b", Y, A, B)
    return ours, save(folder / "a_only.onnx", "float[2,8] a", Y, A, scale=scale)


class TwoHeads(nn.Module):
    """Two outputs of one shape; ``swap`` gives them in the other order."""

    def __init__(self, swap: bool = False) -> None:
        super().__init__()
        self.first, self.second, self.swap = nn.Linear(8, 4), nn.Linear(8, 4), swap

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        outputs = self.first(x), self.second(x)
        return outputs[::-1] if self.swap else outputs


def exported(path: Path, module: TwoHeads, like: TwoHeads, *, scale: float = 1.0) -> Path:
    """The module with the weights of ``like``, those of one head scaled, in a file."""
    module.load_state_dict(like.state_dict())
    with torch.no_grad():
        module.first.weight *= scale
    names = ["y0", "y1"]
    torch.onnx.export(module.eval(), (torch.ones(2, 8),), path, dynamo=False, input_names=["x"], output_names=names)
    return path


def words(text: str) -> str:
    return " ".join(text.split())


def test_an_output_that_the_test_lacks_is_no_agreement(tmp_path: Path) -> None:
    ours, theirs = both(tmp_path)
    for command in (("bisect", ours, theirs), ("verify", ours, "--test-model", theirs, "-b", "ort")):
        code, text = run(*command)
        assert (code, "lacks output b of the reference" in words(text)) == (1, True), text
        code, text = run(*command, "--map", "b=")
        assert (code, "note: output b left out by --map" in words(text)) == (0, True), text
        code, text = run(*command, "--map", "c=")
        assert (code, "'c' is not an output of the reference; its outputs are a, b" in words(text)) == (2, True)
    with pytest.raises(AssertionError, match="lacks output b of the reference; the outputs of both agree"):
        cp_debug.assert_agree(ours, "ort,ort", test_model=theirs)
    assert not cp_debug.verify(ours, "ort,ort", test_model=theirs).passed


def test_what_else_is_wrong_is_told_beside_a_missing_output(tmp_path: Path) -> None:
    ours, theirs = both(tmp_path, scale=1.05)
    code, text = run("bisect", ours, theirs)
    assert code == 1
    assert "guilty: y (MatMul)" in words(text)
    assert "100% of the final divergence" in words(text)
    assert "compared: 1 of 2 outputs, 3 of 4 values (without b;" in words(text)


def test_gates_fail_where_an_output_is_missing(tmp_path: Path) -> None:
    ours, theirs = both(tmp_path)
    saved = SavedResult.of(cp_debug.diagnose(ours, "ort,ort", test_model=theirs))
    assert 'failures="1"' in render_junit(saved)
    assert render_github(saved).startswith("::error")
    (block,) = saved.result.to_dict()["tests"]
    assert (block["agrees"], block["compared"]["missing"]) == (False, ["b"])
    page = tmp_path / "page.html"
    saved.result.write_html(page)
    assert "✗ output missing" in page.read_text(encoding="utf-8")


def test_outputs_that_only_the_test_has_are_told(tmp_path: Path) -> None:
    ours, theirs = both(tmp_path)
    for command in (("bisect", theirs, ours), ("verify", theirs, "--test-model", ours, "-b", "ort")):
        code, text = run(*command)
        assert (code, "not compared: 1 output of the test that the reference lacks: b" in words(text)) == (0, True)


def test_captures_are_held_to_the_same(tmp_path: Path) -> None:
    for model in both(tmp_path):
        assert run("capture", model, "-b", "ort", "-o", tmp_path / model.stem)[0] == 0
    full, part = tmp_path / "ab", tmp_path / "a_only"
    code, text = run("compare", full, part, "--force")
    assert (code, "✗ ort: lacks output b of the reference" in words(text)) == (1, True)
    assert run("compare", full, part, "--force", "--map", "b=")[0] == 0
    code, text = run("compare", part, full, "--force")
    assert (code, "output of the test that the reference lacks: b" in words(text)) == (0, True)
    assert run("compare", full, full)[0] == 0
    for useless in (["--force"], ["--map", "a=a"]):
        code, text = run("compare", full, full, *useless)
        assert (code, "it would do nothing here" in words(text)) == (2, True)


def test_an_output_is_compared_with_the_inner_value_that_map_names(tmp_path: Path) -> None:
    ours, _ = both(tmp_path)
    result = cp_debug.diagnose(ours, "ort,ort", test_model=ours, options=cp_debug.Options(maps=["a=y"]))
    (test,) = result.tests
    assert [row.onnx for row in test.guilty] == ["a"]
    assert (test.outputs[0].onnx, test.outputs[0].stats.rel_l2 > 0.1, test.missing_outputs) == ("a", True, [])
    relu_left_out = save(tmp_path / "no_relu.onnx", "float[2,8] y, float[2,8] b", Y, "    b = MatMul (y, w2)")
    named = save(tmp_path / "named.onnx", "float[2,8] last", Y, A, "    last = Neg (a)")
    assert run("bisect", relu_left_out, ours, "--map", "y=y")[0] == 1  # b is another
    alone = save(tmp_path / "alone.onnx", "float[2,8] a", Y, A)
    assert run("bisect", alone, named)[0] == 1  # a against −a, by position
    code, text = run("bisect", alone, named, "--map", "a=a")
    assert (code, "output of the test that the reference lacks: last" in words(text)) == (0, True)
    code, text = run("verify", alone, "--test-model", named, "-b", "ort", "--map", "a=a")
    assert (code, "a=a: only outputs are verified; those of" in words(text)) == (2, True)


def test_an_inner_value_that_map_pairs_with_an_output_takes_its_place(tmp_path: Path) -> None:
    ours, _ = both(tmp_path)
    code, text = run("bisect", ours, ours, "--map", "y=a")
    assert code == 1
    assert "guilty: y (MatMul)" in words(text)
    assert "without a" in words(text)
    for pair, says in (("x=y", "input of the reference"), ("y=x", "input of the test")):
        code, text = run("bisect", ours, ours, "--map", pair)
        assert (code, f"'{pair}' pairs an {says} with a value that the" in words(text)) == (2, True)


@pytest.mark.parametrize(
    ("node", "kind", "dtype"),
    [("c", "int32", "int64"), ("d", "float32", "int64"), ("e", "float64", "int64")],
)
def test_another_type_of_an_output_is_told(tmp_path: Path, node: str, kind: str, dtype: str) -> None:
    index = "    i = ArgMax <axis = 1> (y)"
    ours = save(tmp_path / "ours.onnx", "int64[2,1] o", Y, index, "    o = Identity (i)")
    number = {"int32": 6, "float32": 1, "float64": 11}[kind]
    shown = {"int32": "int32", "float32": "float", "float64": "double"}[kind]
    theirs = save(tmp_path / f"{node}.onnx", f"{shown}[2,1] o", Y, index, f"    o = Cast <to = {number}> (i)")
    told = f"note: output o is {dtype} in the reference and {kind} in the test"
    for command in (("bisect", ours, theirs), ("verify", ours, "--test-model", theirs, "-b", "ort")):
        code, text = run(*command)
        assert (code, told in words(text)) == (0, True), text
    for model in (ours, theirs):
        assert run("capture", model, "-b", "ort", "-o", tmp_path / f"c_{model.stem}")[0] == 0
    code, text = run("compare", tmp_path / "c_ours", tmp_path / f"c_{node}", "--force")
    assert (code, told in words(text)) == (0, True)


def test_another_precision_of_one_model_is_no_other_type(tmp_path: Path) -> None:
    ours, _ = both(tmp_path)
    for backend in ("ort", "emu-fp16"):
        assert run("capture", ours, "-b", backend, "-o", tmp_path / backend)[0] == 0
    _, text = run("compare", tmp_path / "ort", tmp_path / "emu-fp16")
    assert "in the reference and" not in words(text)
    assert "note: output" not in words(run("bisect", ours, "-b", "ort,emu-fp16")[1])


def test_outputs_of_a_module_in_another_order_are_no_agreement(tmp_path: Path) -> None:
    """What reads a module's outputs by their places is given the wrong ones, though each has its twin."""
    torch.manual_seed(0)
    module, x = TwoHeads().eval(), torch.randn(2, 8, generator=torch.Generator().manual_seed(1))
    swapped = exported(tmp_path / "swapped.onnx", TwoHeads(swap=True), module)
    said = "the outputs are in another order: in the place of output_0 is y0, in the place of output_1 is y1"
    (test,) = cp_debug.diagnose(module, "torch,ort", inputs=x, test_model=swapped).tests
    assert not test.agrees
    assert not test.guilty
    assert said in words(verdict_line(test).plain)
    result = cp_debug.verify(module, "torch,ort", inputs=x, test_model=swapped)
    assert not result.passed
    assert said in words(str(result))
    assert "y0 takes the place of this output" in verification_junit(result)
    meant = cp_debug.Options(maps=["output_0=y1", "output_1=y0"])
    assert cp_debug.diagnose(module, "torch,ort", inputs=x, test_model=swapped, options=meant).agrees


def test_a_guilty_layer_does_not_hide_that_outputs_were_moved(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module, x = TwoHeads().eval(), torch.randn(2, 8, generator=torch.Generator().manual_seed(1))
    faulty = exported(tmp_path / "faulty.onnx", TwoHeads(swap=True), module, scale=1.05)
    (test,) = cp_debug.diagnose(module, "torch,ort", inputs=x, test_model=faulty).tests
    assert [row.name for row in test.guilty] == ["first"]
    assert "in the place of output_0 is y0" in verdict_line(test).plain


def test_outputs_of_a_module_that_are_alike_stand_in_their_places(tmp_path: Path) -> None:
    """Two outputs that hold the same are not told apart: nobody could say that they were moved."""
    torch.manual_seed(0)
    module, x = TwoHeads().eval(), torch.randn(2, 8, generator=torch.Generator().manual_seed(1))
    module.second.load_state_dict(module.first.state_dict())
    for swap in (False, True):
        path = exported(tmp_path / f"{swap}.onnx", TwoHeads(swap), module)
        assert cp_debug.diagnose(module, "torch,ort", inputs=x, test_model=path).agrees
