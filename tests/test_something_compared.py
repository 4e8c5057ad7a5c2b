"""A pass means that something was compared: outputs that are constants, empty, zeros, or of other names."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper, parser
from test_cli import run

import cp_debug
from cp_debug.errors import InputError
from cp_debug.mixed_precision.sensitivity import ErrorSum, relative_errors

NET = """
net (float[1,2,4,4] x) => ({outputs})
{{
    a = Abs (x)
{nodes}
}}"""


def save(path: Path, outputs: str, nodes: str = "", **weights: np.ndarray) -> Path:
    text = NET.format(outputs=outputs, nodes=nodes)
    model = parser.parse_model(f'<ir_version: 8, opset_import: ["" : 17]>\n{text}')
    model.graph.initializer.extend(numpy_helper.from_array(w, n) for n, w in weights.items())
    onnx.save(model, path)
    return path


A = "float[1,2,4,4] a"
ANCHORS = np.arange(4, dtype=np.float32)
SLICE = "    y = Slice (a, zero, zero, one)"
PLACES = {"zero": np.array([0]), "one": np.array([1])}


def with_anchors(folder: Path, name: str, kind: str, factor: float) -> Path:
    held = (factor * ANCHORS).astype(np.float32)
    if kind == "initializer":
        return save(folder / name, f"{A}, float[4] c", c=held)
    numbers = ", ".join(map(str, held))
    return save(folder / name, f"{A}, float[4] c", f"    c = Constant <value = float[4] {{{numbers}}}> ()")


@pytest.mark.parametrize("kind", ["initializer", "node"])
@pytest.mark.parametrize("backends", ["ort,ort", "ort,emu-fp16"])
def test_a_constant_that_is_an_output_is_compared(tmp_path: Path, kind: str, backends: str) -> None:
    good, bad = with_anchors(tmp_path, "good.onnx", kind, 1.0), with_anchors(tmp_path, "bad.onnx", kind, 2.0)
    same = with_anchors(tmp_path, "same.onnx", kind, 1.0)
    healthy = cp_debug.diagnose(good, backends, test_model=same)
    assert healthy.agrees
    assert healthy.tests[0].coverage == "2 of 2 outputs, 2 of 2 values"
    faulty = cp_debug.diagnose(good, backends, test_model=bad)
    assert not faulty.agrees
    assert faulty.tests[0].first_divergent.onnx == "c"
    assert "it is another constant in the test" in str(faulty)


def test_no_output_with_an_element_is_no_verdict(tmp_path: Path) -> None:
    empty = save(tmp_path / "empty.onnx", "float[1,N,4,4] y", SLICE, **PLACES)
    code, text = run("bisect", empty, "-b", "ort,ort-all")
    assert (code, "no output was compared: y (1×0×4×4) without an element on both sides" in text) == (2, True)
    for name in ("a", "b"):
        assert run("capture", empty, "-b", "ort", "-o", tmp_path / name)[0] == 0
    code, text = run("compare", tmp_path / "a", tmp_path / "b")
    assert (code, "no output was compared" in text) == (2, True)


def test_an_empty_output_beside_others_is_in_the_verdict(tmp_path: Path) -> None:
    both = save(tmp_path / "both.onnx", f"{A}, float[1,N,4,4] y", SLICE, **PLACES)
    code, text = run("bisect", both, "-b", "ort,ort-all")
    assert code == 0
    assert "(y: without an element on both sides)" in " ".join(text.split())


def test_outputs_of_zeros_are_in_the_verdict(tmp_path: Path) -> None:
    dead = save(tmp_path / "dead.onnx", "float[1,2,4,4] y", "    n = Neg (a)\n    y = Relu (n)")
    code, text = run("bisect", dead, "-b", "ort,ort-all")
    assert code == 0
    assert "every output is 0 everywhere on both sides" in " ".join(text.split())


def test_outputs_of_other_names_are_told(tmp_path: Path) -> None:
    ours = save(tmp_path / "ours.onnx", "float[1,2,4,4] y", "    y = Neg (a)")
    theirs = save(tmp_path / "theirs.onnx", "float[1,2,4,4] other", "    other = Neg (a)")
    code, text = run("bisect", ours, theirs)
    assert code == 0
    assert "inputs and outputs have other names in the test: y = other:" in " ".join(text.split())
    _, text = run("bisect", ours, theirs, "--map", "y=other")
    assert "other names" not in text


def test_a_verification_tells_what_it_did_not_compare(tmp_path: Path) -> None:
    empty = save(tmp_path / "empty.onnx", "float[1,N,4,4] y", SLICE, **PLACES)
    code, text = run("verify", empty, "-s", "ort,ort-all")
    assert (code, "no output was compared: y without an element on both sides" in text) == (2, True)
    both = save(tmp_path / "both.onnx", f"{A}, float[1,N,4,4] y", SLICE, **PLACES)
    code, text = run("verify", both, "-s", "ort,ort-all")
    assert (code, "limits (y: without an element on both sides)" in " ".join(text.split())) == (0, True)
    ours = save(tmp_path / "ours.onnx", "float[1,2,4,4] y", "    y = Neg (a)")
    theirs = save(tmp_path / "theirs.onnx", "float[1,2,4,4] other", "    other = Neg (a)")
    code, text = run("verify", ours, "--test-model", theirs, "-s", "ort,ort")
    assert (code, "other names in the test: y = other" in text) == (0, True)
    assert "`--map REFERENCE=TEST` overrides this" in " ".join(text.split())
    code, text = run("verify", ours, "--test-model", theirs, "-s", "ort,ort", "--map", "y=other")
    assert (code, "other names" in text) == (0, False)


def test_captures_have_no_stages_and_no_operators(tmp_path: Path) -> None:
    log = save(tmp_path / "log.onnx", "float[1,2,4,4] y", "    n = Neg (a)\n    y = Log (n)")
    for name in ("a", "b"):
        assert run("capture", log, "-b", "ort", "-o", tmp_path / name)[0] == 0
    code, text = run("compare", tmp_path / "a", tmp_path / "b")
    assert code == 1
    assert "NaN is first in y on both sides" in " ".join(text.split())
    assert "stage " not in text
    assert " op " not in text
    assert "()" not in text


def test_commands_that_judge_outputs_refuse_to_judge_nothing(tmp_path: Path) -> None:
    """Outputs without an element, and NaN everywhere, are no goal that holds, no distance of 0 and no infinite SQNR."""
    nets = {
        "without an element on both sides": matmul(tmp_path / "empty.onnx", "    y = Slice (a, zero, zero, zero)"),
        "NaN or Inf everywhere on both sides": matmul(
            tmp_path / "nan.onnx", "    n = Sqrt (minus)\n    y = Add (a, n)"
        ),
    }
    for why, net in nets.items():
        out = tmp_path / f"{net.stem}-out"
        for command in (["export", net, "-o", out], ["quantize", "ptq", net, "-o", out, "--batches", 2]):
            code, text = run(*command)
            assert (code, why in text, out.exists()) == (2, True, False), text
        code, text = run("search", net, "-b", "ort,emu-fp16", "--goal", "rel_l2<1e-30")
        assert code == 2
        assert (
            f"no goal can be judged: y is {why}" if "empty" in net.name else "y holds 16 NaN of 16 elements"
        ) in text
        with pytest.raises(InputError, match="no error of an output can be measured"):
            relative_errors("net", {"y": ErrorSum()})


def test_outputs_of_zeros_get_no_perfect_score(tmp_path: Path) -> None:
    dead = matmul(tmp_path / "dead.onnx", "    y = Mul (a, none)")
    says = "every output is 0 everywhere on both sides: other inputs may tell more"
    commands = (
        ["verify", dead, "-b", "ort,ort-all"],
        ["export", dead, "-o", tmp_path / "exported"],
        ["search", dead, "-b", "ort,emu-fp16", "--goal", "rel_l2<1e-30"],
        ["predict", dead, "--precision", "fp16"],
    )
    for command in commands:
        code, text = run(*command)
        assert (code, says in " ".join(text.split())) == (0, True), text
    code, text = run("quantize", "ptq", dead, "-o", tmp_path / "quantized", "--batches", 2, "--json", "-")
    assert json.loads(text[text.index("{") : text.rindex("}") + 1])["sqnr_db"] == {"dead/y": "NaN"}
    assert "inf" not in text


def test_a_sample_of_zeros_does_not_stand_for_others(tmp_path: Path) -> None:
    """The caveat is for outputs that are 0 on every sample: of samples that agree alike, one with numbers is shown."""
    half = matmul(tmp_path / "half.onnx", "    y = Abs (a)")
    for name, value in (("a", 0), ("b", 1), ("c", 0)):
        (tmp_path / "in").mkdir(exist_ok=True)
        np.savez(tmp_path / "in" / f"{name}.npz", x=np.full((2, 8), value, np.float32))
    code, text = run("verify", half, "-b", "ort,ort-all", "--inputs", tmp_path / "in")
    assert (code, "other inputs may tell more" in text) == (0, False)


def test_inf_at_the_same_places_is_within_the_limits_and_told(tmp_path: Path) -> None:
    mask = matmul(tmp_path / "mask.onnx", "    g = Greater (a, none)\n    y = Where (g, minus_inf, a)")
    code, text = run("verify", mask, "-b", "ort,ort-all")
    assert (code, "(y: Inf at the same places on both sides)" in " ".join(text.split())) == (0, True)
    other = matmul(tmp_path / "other.onnx", "    g = Less (a, none)\n    y = Where (g, minus_inf, a)")
    assert run("verify", mask, "--test-model", other, "-b", "ort", "--no-explain")[0] == 1


def test_a_limit_of_0_is_kept_by_equal_outputs_alone(tmp_path: Path) -> None:
    net = matmul(tmp_path / "net.onnx", "    y = Relu (a)")
    assert run("verify", net, "-b", "ort,ort-none", "--max-abs", 0)[0] == 0
    code, text = run("verify", net, "-b", "ort,emu-fp16", "--max-abs", 0, "--no-explain")
    assert (code, "expected at most 0" in " ".join(text.split())) == (1, True)


def matmul(path: Path, nodes: str) -> Path:
    """``x`` [2, 8] times a matrix is ``a`` [2, 8], of which ``nodes`` make ``y``."""
    text = f"net (float[2,8] x) => (float[N,M] y) {{\n    a = MatMul (x, w)\n{nodes}\n}}"
    model = parser.parse_model(f'<ir_version: 8, opset_import: ["" : 17]>\n{text}')
    numbers = {"minus": -1.0, "none": 0.0, "minus_inf": -np.inf}
    held = {name: np.full(1, value, np.float32) for name, value in numbers.items()}
    held |= {"w": np.random.default_rng(0).standard_normal((8, 8)).astype(np.float32), "zero": np.array([0])}
    read = {name for node in model.graph.node for name in node.input}
    model.graph.initializer.extend(numpy_helper.from_array(w, n) for n, w in held.items() if n in read)
    onnx.save(model, path)
    return path
