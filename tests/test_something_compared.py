"""A pass means that something was compared: outputs that are constants, empty, zeros, or of other names."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper, parser
from test_cli import run

import cp_debug

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
