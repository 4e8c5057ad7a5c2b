"""Two results against each other: what got worse, better, new and gone, and what is only noise."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from nets import NetBuilder
from onnx import numpy_helper
from test_cli import run

import cp_debug
from cp_debug.bisect.result import BisectResult, TestResult
from cp_debug.bisect.result_diff import BETTER, GONE, NEW, UNKNOWN, WORSE, LayerState, TestDiff


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
    assert "second (Conv): Conv weights are scaled by" in text
    assert "new cause: " in text
    diff = cp_debug.diff_results(*(cp_debug.open_result(folder / f"{n}.json") for n in ("good", "bad")))
    assert diff.worse
    [first, *_] = diff.tests[0].layers
    assert first.name.endswith("second")
    assert first.change == WORSE
    *_, verdict = [line for line in str(diff).splitlines() if line[:1] in "✓✗–"]
    assert verdict.startswith("✗")


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
    assert "the samples are different" in text


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


def result_of(target: Path, *models: Path, more: tuple[str, ...] = ()) -> Path:
    tests = "ort,ort" if len(models) == 2 else "ort,ort-all"
    assert run("bisect", *models, "-b", tests, *more, "--json", target)[0] < 2
    return target


@pytest.fixture(scope="module")
def renamed(folder: Path) -> Path:
    """``one.json`` of ``net.onnx``, and of its copy under another name; ``less.json`` of it with another output."""
    shutil.copyfile(folder / "net.onnx", folder / "net_v2.onnx")
    for name in ("net", "net_v2"):
        result_of(folder / f"one_{name}.json", folder / f"{name}.onnx")
    return folder


def test_the_same_file_under_another_name_is_paired_and_that_is_said(renamed: Path) -> None:
    code, text = run("diff", renamed / "one_net.json", renamed / "one_net_v2.json")
    assert code == 0, text
    assert "layers: none changed" in text
    assert "components paired: net = net_v2, because each result has only one" in text
    assert "the models are the same network" in text


def test_components_of_other_names_are_paired_by_what_they_share(renamed: Path, tmp_path: Path) -> None:
    """Three components each, one of equal name; two whose values are as much those of both stay alone."""
    first, second = (cp_debug.open_result(renamed / f"one_{name}.json") for name in ("net", "net_v2"))

    def parts(result: BisectResult, values: dict[str, list[str]]) -> TestResult:
        row = result.tests[0].rows[0]
        rows = [replace(row, component=part, onnx=name, name=name) for part, names in values.items() for name in names]
        return replace(result.tests[0], rows=rows, outputs=rows[-1:])

    ours = {"head": ["a", "b"], "neck": ["x", "y", "z"], "twin": ["same"], "twin2": ["same"]}
    theirs = {"head_v2": ["a", "b", "c"], "neck": ["x"], "neck_v2": ["q"], "other": ["same"]}
    first.tests, second.tests = [parts(first, ours)], [parts(second, theirs)]
    diff = cp_debug.diff_results(first, second)
    assert diff.tests[0].same == 3  # a, b, x
    assert "components paired: head = head_v2, by the values they share" in diff.notes
    assert "components only before: twin, twin2" in diff.notes
    assert "components only after: neck_v2, other" in diff.notes


def test_other_weights_under_the_same_name_are_told(folder: Path, tmp_path: Path) -> None:
    results = []
    for name in ("net", "wrong"):
        shutil.copyfile(folder / f"{name}.onnx", tmp_path / "cur.onnx")
        results.append(result_of(tmp_path / f"{name}.json", tmp_path / "cur.onnx"))
    code, text = run("diff", *results)
    assert code == 0
    assert "cur.onnxhaschanged" in "".join(text.split())
    assert "haschanged" not in "".join(run("diff", results[0], results[0])[1].split())


def test_other_weights_of_the_tests_alone_are_told(folder: Path, tmp_path: Path) -> None:
    results = []
    for name in ("net", "wrong"):
        shutil.copyfile(folder / f"{name}.onnx", tmp_path / "cur.onnx")
        results.append(result_of(tmp_path / f"{name}.json", folder / "net.onnx", tmp_path / "cur.onnx"))
    text = " ".join(run("diff", *results)[1].split())
    assert "ran another network than before" in text
    assert "has changed: its graph or its weights differ" not in text


def test_other_values_under_the_same_names_of_samples_are_told(folder: Path, tmp_path: Path) -> None:
    results = []
    for value in (1, 2):
        np.savez(tmp_path / "x.npz", image=np.full((1, 3, 8, 8), value, np.float32))
        given = ("--inputs", str(tmp_path / "x.npz"))
        results.append(result_of(tmp_path / f"{value}.json", folder / "net.onnx", more=given))
    assert "the samples have other values under the same names" in " ".join(run("diff", *results)[1].split())


def test_a_lost_output_is_the_reason_that_is_named(folder: Path, tmp_path: Path) -> None:
    before = cp_debug.open_result(folder / "good.json")
    after = cp_debug.open_result(folder / "good.json")
    name = after.tests[0].outputs.pop().onnx
    after.tests[0].outputs = [after.tests[0].rows[0]]
    diff = cp_debug.diff_results(before, after)
    assert diff.worse
    assert diff.tests[0].says.startswith(f"no longer agrees: output {name} is gone;")


def test_without_a_replay_nothing_got_worse_or_better(folder: Path, tmp_path: Path) -> None:
    for name in ("net", "wrong"):
        pair = (folder / "net.onnx", folder / f"{name}.onnx")
        result_of(tmp_path / f"{name}.json", *pair, more=("--no-replay",))
    for full, bare, unknown in (("good", "net", 0), ("bad", "wrong", 1)):
        results = [cp_debug.open_result(path) for path in (folder / f"{full}.json", tmp_path / f"{bare}.json")]
        for before, after in (results, results[::-1]):
            diff = cp_debug.diff_results(before, after)
            [test] = diff.tests
            assert [change.change for change in test.layers] == [UNKNOWN] * unknown
            assert not test.new_causes
            assert not test.gone_causes
            assert not diff.worse
            assert any("no layer was replayed" in note for note in diff.notes)


def test_a_divergence_that_only_one_side_replayed_is_still_compared(folder: Path, tmp_path: Path) -> None:
    bare = result_of(tmp_path / "w.json", folder / "net.onnx", folder / "wrong.onnx", more=("--no-replay",))
    diff = cp_debug.diff_results(cp_debug.open_result(folder / "good.json"), cp_debug.open_result(bare))
    assert diff.worse
    assert WORSE in {change.change for change in diff.tests[0].layers}


def test_the_state_of_a_layer_has_its_replays_figures_and_else_its_divergence() -> None:
    row: Any = SimpleNamespace(
        verdict="ok", within=True, stats=SimpleNamespace(rel_l2=0.5), replay=SimpleNamespace(introduced=0.1, excess=2.0)
    )
    assert LayerState.of(row) == LayerState("ok", True, 0.5, 0.1, 2.0)
    assert LayerState.of(row).error == 0.1
    row.replay = None
    assert LayerState.of(row) == LayerState("ok", True, 0.5, None, None)
    assert LayerState.of(row).error == 0.5
    row.stats.rel_l2 = float("nan")
    assert LayerState.of(row).error == float("inf")


@pytest.mark.parametrize(
    ("agrees", "said"),
    [((True, True), "agrees as before"), ((True, False), "no longer agrees"), ((False, True), "agrees now"),
     ((False, False), "still does not agree")],
)  # fmt: skip
def test_a_difference_of_two_results_in_a_sentence(agrees: tuple[bool, bool], said: str) -> None:
    diff = TestDiff("ort", "ort", agrees, [], [], [], [], 7)
    assert diff.says == f"{said}; layers: none changed, 7 as before"
    assert diff.worse == (agrees == (True, False))
