"""Two results against each other: what got worse, better, new and gone, and what is only noise."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from nets import NetBuilder
from onnx import numpy_helper
from test_cli import run

import cp_debug
from cp_debug.bisect.result_diff import BETTER, GONE, NEW, WORSE


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``good.json`` and ``bad.json``: a file against itself, and against one whose second weight is 5 % too large."""
    folder = tmp_path_factory.mktemp("results")
    net = NetBuilder()
    x = net.op("Relu", net.conv("image", 3, 4, name="first"))
    path = net.save(folder / "net.onnx", {"image": (1, [1, 3, 8, 8])}, [net.conv(x, 4, 2, name="second")])
    proto = onnx.load(path)
    weight = [tensor for tensor in proto.graph.initializer if len(tensor.dims) == 4][1]
    weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight) * np.float32(1.05), weight.name))
    onnx.save(proto, folder / "wrong.onnx")
    for name, test in (("good", "net"), ("bad", "wrong")):
        code, text = run("bisect", path, folder / f"{test}.onnx", "-b", "ort,ort", "--json", folder / f"{name}.json")
        assert code == (name == "bad"), text
    return folder


def test_a_layer_that_became_guilty(folder: Path) -> None:
    code, text = run("diff", folder / "good.json", folder / "bad.json")
    assert code == 1
    assert "no longer agrees" in text
    assert "ok → guilty" in text
    assert "second (Conv): the scale of the weights" in text
    assert "new cause: " in text
    diff = cp_debug.diff_results(*(cp_debug.open_result(folder / f"{n}.json") for n in ("good", "bad")))
    assert diff.worse
    [first, *_] = diff.tests[0].layers
    assert first.name.endswith("second")
    assert first.change == WORSE
    assert str(diff).splitlines()[-1].startswith("✗")


def test_the_other_way_it_is_better_and_exit_0(folder: Path, tmp_path: Path) -> None:
    code, text = run("diff", folder / "bad.json", folder / "good.json", "--json", "-", "--html", tmp_path / "d.html")
    assert code == 0
    document = json.loads(text)
    assert document["schema"] == "cpdebug.diff/1"
    assert document["worse"] is False
    test = document["tests"][0]
    assert (test["agrees"], test["layers"][0]["change"], test["outputs"][0]["change"]) == (
        [False, True],
        BETTER,
        BETTER,
    )
    assert test["gone_causes"]
    assert not test["new_causes"]
    page = (tmp_path / "d.html").read_text(encoding="utf-8")
    assert "guilty → ok" in page
    assert "http://" not in page.replace("http://www.w3.org", "")


def test_what_is_no_worse_and_still_not_right_is_no_green_tick(folder: Path, tmp_path: Path) -> None:
    page = tmp_path / "same.html"
    assert run("diff", folder / "bad.json", folder / "bad.json", "--html", page)[0] == 0
    text = page.read_text(encoding="utf-8")
    assert "– no worse, still not right" in text
    assert '<article class="verdict ok">' not in text


def test_a_result_against_itself_is_unchanged(folder: Path) -> None:
    code, text = run("diff", folder / "bad.json", folder / "bad.json")
    assert code == 0
    assert "still does not agree; layers: none changed" in text
    assert "✓" not in text


def edited(folder: Path, target: Path, change: object) -> Path:
    document = json.loads((folder / "good.json").read_text())
    change(document)  # type: ignore[operator]
    target.write_text(json.dumps(document))
    return target


def test_layers_that_come_and_go_and_noise(folder: Path, tmp_path: Path) -> None:
    def renamed(document: dict) -> None:
        row = document["tests"][0]["layers"][0]
        row |= {"name": "other", "onnx": "other", "op": "Gemm"}
        document["tests"][0]["layers"][1]["rel_l2"] = 3e-8  # within rounding: no change

    diff = cp_debug.diff_results(
        cp_debug.open_result(folder / "good.json"), cp_debug.open_result(edited(folder, tmp_path / "e.json", renamed))
    )
    assert {c.change for c in diff.tests[0].layers} == {NEW, GONE}
    assert not diff.worse


def test_versions_and_samples_that_differ_are_told(folder: Path, tmp_path: Path) -> None:
    def changed(document: dict) -> None:
        document["backends"][1]["versions"]["onnxruntime"] = "9.9"
        document["samples"] = ["another"]

    code, text = run("diff", folder / "good.json", edited(folder, tmp_path / "e.json", changed))
    assert code == 0
    assert "is 9.9" in text
    assert "the samples are others" in text


def test_what_cannot_be_compared_is_refused(folder: Path, tmp_path: Path) -> None:
    code, text = run("diff", folder / "good.json", tmp_path / "nothing")
    assert (code, "no such file" in text) == (2, True)

    b = NetBuilder()
    b.save(tmp_path / "other.onnx", {"x": (1, [1, 4])}, [b.op("Exp", "x", name="another")])
    assert run("bisect", tmp_path / "other.onnx", "-b", "ort,ort-all", "--json", tmp_path / "o.json")[0] == 0
    code, text = run("diff", folder / "good.json", tmp_path / "o.json")
    assert code == 2
    assert "no layer is in both results" in text
    code, text = run("diff", folder / "good.json", folder / "good.json", "--factor", "0.5")
    assert code == 2
