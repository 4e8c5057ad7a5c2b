"""Reports of a saved result: the page, the formats for machines, and reading the result back."""

from __future__ import annotations

import base64
import io
import json
import math
import re
import struct
import sys
import xml.etree.ElementTree as ET
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from nets import second_like
from rich.console import Console
from test_bisect import scale_weight
from typer.testing import CliRunner

from cp_debug.bisect.engine import Options, bisect
from cp_debug.bisect.result import GUILTY, BisectResult
from cp_debug.cli.console import show_document
from cp_debug.cli.main import app
from cp_debug.detection.changes import GAINED, KEPT, LOST, MOVED_BOX, changes
from cp_debug.errors import CpdebugError, InputError, MissingPackage
from cp_debug.programs.scene import DecodedBoxes, SavedScene, keep_scene
from cp_debug.recipes.base import Sample
from cp_debug.reports.causes import parts_of_fix
from cp_debug.reports.evidence import charts, chosen_rows, evidence, worst_elements
from cp_debug.reports.files import csv_text, layer_frame, render_github, render_junit, write_json
from cp_debug.reports.growth import growth_chart, stage_spans
from cp_debug.reports.page import matrix, render_page, shown, told_before, tone
from cp_debug.reports.saved import SavedResult
from cp_debug.reports.sheet_terminal import Terminal
from cp_debug.reports.summary import render_markdown
from cp_debug.reports.svg import Scale, opacity_png
from cp_debug.reports.tables import layer_table, stage_table
from cp_debug.reports.verdict_line import layer_verdict

EVIL = '<script>alert(1)</script>"&|`\n'
FINDING = {
    "cause": "scale",
    "says": "scaled by 1.02",
    "layers": ["conv_4"],
    "explained": 0.998,
    "evidence": {"factor": 1.02},
    "fix": "export it again",
    "unheard_of": [1, 2],
}


def boxes(places: list[list[float]], scores: list[float], labels: list[int]) -> DecodedBoxes:
    """Boxes of 4 × 2 m at x, y."""
    rest = np.tile([0.0, 4.0, 2.0, 1.5, 0.3, 0.0, 0.0], (len(places), 1))
    whole = np.hstack((np.reshape(places, (-1, 2)), rest)).astype(np.float32)
    return DecodedBoxes(whole, np.array(scores, np.float32), np.array(labels, np.int32))


REFERENCE = boxes([[0, 0], [10, 0], [20, 0], [30, 5]], [0.9, 0.8, 0.7, 0.6], [0, 0, 1, 1])
TEST = boxes([[0, 0.01], [10.5, 0], [30, 5], [-12, 3]], [0.9, 0.8, 0.5, 0.4], [0, 0, 1, 0])


def save_faulty(folder: Path) -> Path:
    """A saved result: a net whose fourth convolution has other weights in the tests, and made-up detections."""
    net = second_like(folder / "net.onnx")
    convolution = [n.output[0] for n in onnx.load(net).graph.node if n.op_type == "Conv"][3]
    scale_weight(net, folder / "test.onnx", convolution, 1.02)
    saved = folder / "saved"
    result = bisect(str(net), "ort,ort-none@cpu,emu-fp16", test_model=folder / "test.onnx", options=Options(save=saved))
    result.command = "cpdebug bisect net.onnx --test-model test.onnx"
    write_json(result, saved / "result.json")
    points = np.random.default_rng(0).uniform(-30, 30, (500, 4)).astype(np.float32)
    decoded = {"ort": REFERENCE, "ort-none@cpu": TEST, "emu-fp16": REFERENCE}
    keep_scene(saved / "sample-0", Sample({"points": points}, "made up"), decoded)
    return saved


@pytest.fixture(scope="module")
def saved_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_faulty(tmp_path_factory.mktemp("net"))


@pytest.fixture(scope="module")
def saved(saved_folder: Path) -> SavedResult:
    return SavedResult.open(saved_folder)


def document(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "result.json").read_text())


def rewritten(tmp_path: Path, changed: object) -> Path:
    path = tmp_path / "result.json"
    path.write_text(json.dumps(changed))
    return path


def run(*args: object) -> str:
    done = CliRunner().invoke(app, [str(a) for a in args], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


def test_a_saved_result_is_read_back_as_it_was(saved_folder: Path, saved: SavedResult) -> None:
    assert json.loads(json.dumps(saved.result.to_dict())) == document(saved_folder)


def test_findings_are_read_back_and_unknown_fields_are_left_alone(saved_folder: Path, tmp_path: Path) -> None:
    changed = document(saved_folder)
    changed["tests"][0]["findings"] = [FINDING]
    changed["tests"][0]["layers"][2]["new_figure"] = 3
    changed["of_the_future"] = {}
    finding = SavedResult.open(rewritten(tmp_path, changed)).result.tests[0].findings[0]
    assert (finding.says, finding.explained, finding.evidence) == ("scaled by 1.02", 0.998, {"factor": 1.02})


def drop(*path: str | int) -> Any:
    def change(whole: Any) -> None:
        for key in path[:-1]:
            whole = whole[key]
        del whole[path[-1]]

    return change


def put(value: object, *path: str | int) -> Any:
    def change(whole: Any) -> None:
        for key in path[:-1]:
            whole = whole[key]
        whole[path[-1]] = value

    return change


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (drop("model"), "model"),
        (put("cpdebug.bisect/9", "schema"), "schema"),
        (put([], "tests"), "tests"),
        (drop("backends", 1, "spec"), "backends[1].spec"),
        (drop("tests", 0, "layers", 3, "max_abs"), "tests[0].layers[3].max_abs"),
        (put("many", "tests", 1, "layers", 0, "rel_l2"), "tests[1].layers[0].rel_l2"),
        (put("3", "tests", 0, "layers", 0, "index"), "tests[0].layers[0].index"),
        (put(7, "tests", 0, "stages"), "tests[0].stages"),
        (put("gone", "tests", 0, "outputs", 0, "onnx"), "tests[0].outputs[0].onnx"),
    ],
)
def test_a_broken_result_is_an_error_with_file_and_field(
    saved_folder: Path, tmp_path: Path, change: Any, field: str
) -> None:
    whole = document(saved_folder)
    change(whole)
    with pytest.raises(InputError, match=re.escape(field)) as caught:
        SavedResult.open(rewritten(tmp_path, whole))
    assert "result.json" in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "[]", '"x"'])
def test_what_is_no_result_is_an_error(tmp_path: Path, text: str) -> None:
    (tmp_path / "result.json").write_text(text)
    with pytest.raises(InputError, match=r"result\.json"):
        SavedResult.open(tmp_path)
    with pytest.raises(InputError, match="no such file"):
        SavedResult.open(tmp_path / "nothing")


def test_the_page_carries_everything_and_asks_for_nothing(saved: SavedResult) -> None:
    page = render_page(saved)
    assert saved.result.tests[0].guilty[0].name in page
    assert saved.result.command in page
    assert page.count("data:image/png") >= 3  # error against magnitude, error map, points
    assert not re.findall(r"""(?:src|href|action)=["'](?!#|data:)""", page)
    assert "://" not in page
    assert "@import" not in page


def test_the_page_of_the_json_alone_says_that_tensors_are_missing(saved_folder: Path) -> None:
    page = render_page(SavedResult.open(saved_folder / "result.json"))
    assert "Tensors were not saved" in page
    assert "data:image/png" not in page


def test_text_of_users_is_never_markup(saved: SavedResult) -> None:
    test = saved.result.tests[0]
    rows = [replace(row, name=EVIL, onnx=EVIL, op=EVIL, why=EVIL) for row in test.rows]
    record = replace(test.backend, spec=EVIL, settings={EVIL: EVIL}, versions={EVIL: EVIL})
    evil = replace(test, rows=rows, outputs=rows[-1:], stages=[], notes=[EVIL], backend=record)
    result = replace(saved.result, model=EVIL, samples=[EVIL], command=EVIL, tests=[evil])
    again = SavedResult.of(result)
    again.result.tests[0].findings = [replace(f, says=EVIL, fix=EVIL) for f in again.result.tests[0].findings]
    assert "<script>alert" not in render_page(again)
    assert "<script>alert" not in result._repr_html_()
    assert "<script>alert" not in re.sub(r"```sh.*?```", "", render_markdown(again), flags=re.S)
    ET.fromstring(render_junit(again))
    assert len(render_github(again).splitlines()) == 1


def test_no_printed_report_holds_a_command_of_a_workflow(
    saved: SavedResult, capsys: pytest.CaptureFixture[str]
) -> None:
    command = "a ##[error]b"
    test = saved.result.tests[0]
    rows = [replace(row, name=command, onnx=command, op=command, why=command) for row in test.rows]
    evil = replace(test, rows=rows, outputs=rows[-1:], stages=[], notes=[command])
    typed = f"cpdebug bisect 'a\n::endgroup::b' '{command}'"
    result = replace(saved.result, model=command, samples=[command], tests=[evil], command=typed)
    again = SavedResult.of(result)
    assert not any(line.startswith("::") for line in render_markdown(again).splitlines())
    show_document([], result.to_dict(), "-")
    printed = capsys.readouterr().out
    assert json.loads(printed)["model"] == command
    suites = render_junit(again)
    assert command in [case.get("name", "").partition(" (")[0] for case in ET.fromstring(suites).iter("testcase")]
    for text in (printed, suites, render_markdown(again), csv_text(layer_frame(again.result)), render_github(again)):
        assert text.strip()
        assert "##[" not in text


def test_two_hundred_layers_on_three_backends_stay_below_five_megabytes(saved: SavedResult) -> None:
    test = saved.result.tests[0]
    rows = [
        replace(test.rows[i % len(test.rows)], index=i, name=f"block.{i}.convolution", onnx=f"v{i}") for i in range(200)
    ]
    many = replace(saved.result, tests=[replace(test, rows=rows, outputs=rows[-1:], stages=[])] * 3)
    assert len(render_page(SavedResult.of(many)).encode()) < 2_000_000


def test_growth_marks_guilty_layers_and_stages(saved: SavedResult) -> None:
    test = saved.result.tests[0]
    chart = growth_chart(test, "t0-layer-")
    assert chart is not None
    picture = ET.fromstring(chart.__html__())
    links = [link.get("href") for link in picture.iter("a")]
    assert links == [f"#t0-layer-{row.index}" for row in test.rows if row.verdict == GUILTY]
    titles = {title.text for title in picture.iter("title")}
    assert {stage.name for stage in test.stages} <= titles


def test_the_smallest_error_is_drawn_above_the_axis(saved: SavedResult) -> None:
    test = saved.result.tests[0]
    rows = [
        replace(row, verdict="ok", replay=replace(row.replay, introduced=6.9e-8, inherited=9.8e-8, expected=9.8e-8))
        for row in test.rows
        if row.replay is not None
    ]
    chart = growth_chart(replace(test, rows=rows, stages=[]), "t0-layer-")
    assert chart is not None
    picture = ET.fromstring(chart.__html__())
    (dots,) = (path.get("d") for path in picture.iter("path") if path.get("class") == "dot")
    (stems,) = (path.get("d") for path in picture.iter("path") if path.get("class") == "stem")
    bottom = {float(y) for y in re.findall(r"M[\d.]+ ([\d.]+)V", stems or "")}
    assert max(float(y) for y in re.findall(r" ([\d.]+)h0", dots or "")) < min(bottom)


def test_evidence_shows_the_guilty_layer_as_captured(saved: SavedResult) -> None:
    test = saved.result.tests[0]
    (found,) = evidence(saved, test)
    assert found.row.onnx == test.guilty[0].onnx
    assert found.error.startswith("introduced")
    assert len(found.charts) == 4
    ours, theirs = saved.capture(0, "ort"), saved.capture(0, test.backend.spec)
    assert ours is not None
    assert theirs is not None
    worst = found.worst[0]
    assert worst.reference == ours.load(found.row.onnx, 0, "net")[worst.index]
    assert worst.test == theirs.load(found.row.onnx, 0, "net")[worst.index]
    difference = np.abs(theirs.load(found.row.onnx, 0, "net") - ours.load(found.row.onnx, 0, "net"))
    assert difference[worst.index] == pytest.approx(difference.max(), rel=1e-3)


def test_changes_of_detections() -> None:
    found = changes(REFERENCE, TEST)
    assert [(c.kind, c.reference, c.test) for c in found] == [
        (KEPT, 0, 0), (MOVED_BOX, 1, 1), (MOVED_BOX, 3, 2), (GAINED, None, 3), (LOST, 2, None),
    ]  # fmt: skip
    assert found[1].distance == pytest.approx(0.5)
    assert found[2].score == pytest.approx(-0.1)
    assert {c.kind for c in changes(REFERENCE, REFERENCE)} == {KEPT}
    nothing = boxes([], [], [])
    assert {c.kind for c in changes(REFERENCE, nothing)} == {LOST}
    assert changes(nothing, nothing) == []


def test_a_scene_is_kept(saved_folder: Path) -> None:
    scene = SavedScene.open(saved_folder / "sample-0")
    assert scene is not None
    assert scene.source == "made up"
    np.testing.assert_array_equal(scene.detections["ort-none@cpu"].boxes, TEST.boxes)
    assert scene.class_name(1) == "1"


def test_markdown_names_the_guilty_layer(saved: SavedResult) -> None:
    text = render_markdown(saved)
    name = saved.result.tests[0].guilty[0].name
    assert re.search(rf"\| {re.escape(name)} .*\| guilty \|".replace("_", r"\\?_"), text)
    assert saved.result.command in text
    widths = {line.count(" | ") for line in text.splitlines() if line.startswith("| ") and "verdict" in line}
    assert widths == {9}


@pytest.mark.parametrize(
    ("fix", "as_command"),
    [("keep in FP32: --keep-fp32 a", True), ("cpdebug bundle RESULT --layer a", True), ("calibrate a again", False)],
)
def test_a_fix_to_copy_is_a_block_in_markdown_and_a_sentence_is_a_line(
    saved: SavedResult, fix: str, as_command: bool
) -> None:
    finding = replace(saved.result.tests[0].findings[0], fix=fix)
    test = replace(saved.result.tests[0], findings=[finding])
    text = render_markdown(replace(saved, result=replace(saved.result, tests=(test,))))
    assert (f"  ```sh\n  {fix}\n  ```" in text) is as_command
    assert (f"  - fix: {fix}" in text) is not as_command


@pytest.mark.parametrize(
    ("names", "fix", "copied"),
    [
        (
            ["a", "b c"],
            "keep: --keep-fp32 a --keep-fp32 'b c': 0.1",
            "--keep-fp32 a --keep-fp32 'b c'",
        ),
        ([], "calibrate a again", "calibrate a again"),
    ],
)
def test_of_a_fix_its_options_alone_are_copied(saved: SavedResult, names: list[str], fix: str, copied: str) -> None:
    finding = replace(saved.result.tests[0].findings[0], fix=fix, evidence={"keep_fp32": names})
    assert parts_of_fix(finding)[1] == copied
    assert "".join(parts_of_fix(finding)) == fix


def test_junit_fails_where_a_layer_is_guilty(saved: SavedResult) -> None:
    suites = ET.fromstring(render_junit(saved)).findall("testsuite")
    for suite, test in zip(suites, saved.result.tests, strict=True):
        assert int(suite.get("failures", -1)) == len(test.guilty) + 1
        assert int(suite.get("tests", -1)) == len(test.rows) + 1
        assert len(suite.findall("testcase/failure")) == len(test.guilty) + 1


def test_github_annotations_are_one_line_each(saved: SavedResult) -> None:
    lines = render_github(saved).splitlines()
    assert len(lines) == 2
    assert all(line.startswith("::error title=cpdebug%3A ") for line in lines)


@pytest.mark.parametrize("external", [False, True])
def test_the_annotated_graph_carries_figures_and_runs_as_before(
    saved_folder: Path, saved: SavedResult, tmp_path: Path, external: bool
) -> None:
    import onnxruntime as ort

    path = Path(saved.result.programs["net"])
    if external:
        model = onnx.load(path)
        path = tmp_path / "external" / "net.onnx"
        path.parent.mkdir()
        onnx.save(model, path, save_as_external_data=True, location="weights.bin", size_threshold=0)
    whole = document(saved_folder) | {"programs": {"net": str(path)}}
    before = path.read_bytes()
    run("report", rewritten(tmp_path, whole), "--format", "onnx", "--output", tmp_path / "annotated.onnx")
    assert path.read_bytes() == before
    guilty = saved.result.tests[0].guilty[0]
    annotated = onnx.load(tmp_path / "annotated.onnx")
    node = next(n for n in annotated.graph.node if guilty.onnx in n.output)
    figures = {p.key: p.value for p in node.metadata_props}
    assert figures[f"cpdebug.ort-none@cpu.{guilty.onnx}.verdict"] == "guilty"
    assert float(figures[f"cpdebug.ort-none@cpu.{guilty.onnx}.introduced"]) == pytest.approx(0.02, rel=0.2)
    assert figures["made_by"] == "NetBuilder"
    assert "guilty" in node.doc_string
    x = {"x": np.random.default_rng(0).standard_normal((1, 16, 32, 32)).astype(np.float32)}
    one, other = (ort.InferenceSession(str(p)).run(None, x) for p in (path, tmp_path / "annotated.onnx"))
    for a, b in zip(one, other, strict=True):
        np.testing.assert_array_equal(a, b)


def test_the_graph_itself_is_not_overwritten(saved_folder: Path, saved: SavedResult) -> None:
    path = saved.result.programs["net"]
    with pytest.raises(InputError, match="is the graph itself"):
        CliRunner().invoke(app, ["report", str(saved_folder), "-f", "onnx", "-o", path], catch_exceptions=False)


def test_tables_hold_numbers(saved_folder: Path, saved: SavedResult, tmp_path: Path) -> None:
    first = run("report", saved_folder, "--format", "csv", "-o", tmp_path / "layers.csv")
    again = run("report", saved_folder, "--format", "csv", "-o", tmp_path / "layers.csv")
    assert again.split() == [*first.split()[:-1], "KiB,", "replaces", "an", "earlier", "file"]
    run("report", saved_folder, "--format", "parquet", "-o", tmp_path / "layers.parquet")
    rows = [row for test in saved.result.tests for row in test.rows]
    for table in (
        pd.read_csv(tmp_path / "layers.csv", float_precision="round_trip"),
        pd.read_parquet(tmp_path / "layers.parquet"),
    ):
        assert list(table.name) == [row.name for row in rows]
        np.testing.assert_array_equal(table.rel_l2.astype(float), [row.stats.rel_l2 for row in rows])
        assert table.excess.dtype == np.float64
        assert np.isinf(table.sqnr_db).any()


def test_parquet_without_pyarrow_says_how_to_get_it(
    saved_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(MissingPackage, match=r"'\.\[parquet\]'"):
        CliRunner().invoke(
            app, ["report", str(saved_folder), "-f", "parquet", "-o", str(tmp_path / "x")], catch_exceptions=False
        )
    assert list(tmp_path.iterdir()) == []


def test_a_report_that_cannot_be_written_leaves_nothing(saved_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(CpdebugError, match="cannot be written"):
        CliRunner().invoke(app, ["report", str(saved_folder), "-o", str(tmp_path / "no" / "x")], catch_exceptions=False)


def test_a_notebook_shows_the_verdict_and_a_small_table(saved: SavedResult) -> None:
    html = saved.result._repr_html_()
    assert saved.result.tests[0].guilty[0].name in html
    assert len(html) < 10_000
    ET.fromstring(f"<div>{html}</div>")


def test_bisect_writes_the_page_without_keeping_captures(tmp_path: Path) -> None:
    net = second_like(tmp_path / "net.onnx")
    run("bisect", net, "--backends", "ort,ort-all", "--html", tmp_path / "out.html")
    page = (tmp_path / "out.html").read_text()
    assert "agrees" in page
    assert "data:image/png" in page  # it saw tensors
    assert sorted(p.name for p in tmp_path.iterdir()) == ["net.onnx", "out.html"]


def test_results_of_captures_have_a_page_too(saved: SavedResult) -> None:
    """Without a replay the divergence is drawn."""
    test = saved.result.tests[0]
    rows = [replace(row, replay=None) for row in test.rows]
    bare = replace(test, rows=rows, stages=[], outputs=[], oracle=None, observation=None)
    result = BisectResult("", saved.result.reference, [bare], [], {})
    assert "divergence" in render_page(SavedResult.of(result))


@pytest.mark.parametrize("shape", [(1, 3, 8, 6), (5, 2, 4), (7, 3), (9,), (1, 1, 1, 1), (2, 3, 4, 5, 6)])
@pytest.mark.parametrize("value", [0.0, 1e-40, 3.4e38, np.nan, np.inf, "some nan", "random"])
@pytest.mark.filterwarnings("error")
def test_charts_of_awkward_tensors_have_finite_coordinates(shape: tuple[int, ...], value: Any) -> None:
    ours = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    theirs = ours + np.float32(0.1) if isinstance(value, str) else np.full(shape, value, np.float32)
    if value == "some nan":
        theirs.flat[0], ours.flat[-1] = np.nan, np.inf
    drawn = charts(ours, theirs, None, "fp32", upwards=True)
    for _, chart in drawn:
        text = chart.__html__()
        ET.fromstring(text)
        assert not re.search(r"\b(?:nan|inf)\b", re.sub(r"base64,[^\"]*", "", text))
    assert all(len(w.index) == len(shape) for w in worst_elements(ours, theirs, None))


@given(
    st.floats(-1e6, 1e6), st.floats(1e-6, 1e6), st.booleans(), st.lists(st.floats(-1e7, 1e7), min_size=2, max_size=9)
)
def test_scales_keep_order_and_their_ticks_lie_inside(low: float, span: float, log: bool, values: list[float]) -> None:
    scale = Scale(10.0 ** round(low / 1e5), 10.0 ** (round(low / 1e5) + 3), 0, 1000, log=True)
    if not log:
        scale = Scale(low, low + span, 0, 1000)
    places = [scale(v) for v in sorted(map(abs, values) if log else values) if v > 0 or not log]
    assert places == sorted(places)
    assert all(0 <= place <= 1000 for place in places)
    room = (scale.high - scale.low) * 1e-6 + 4 * math.ulp(scale.high)
    assert all(scale.low - room <= tick <= scale.high + room for tick in scale.ticks())
    assert 1 <= len(scale.ticks()) <= 8


@given(arrays(np.float64, st.tuples(st.integers(1, 9), st.integers(1, 9)), elements=st.floats(-1, 2)))
def test_a_picture_holds_its_values_as_opacity(values: np.ndarray) -> None:
    raw = base64.b64decode(opacity_png(values, (1, 2, 3)).partition(",")[2])
    assert raw.startswith(b"\x89PNG\r\n\x1a\n")
    chunks, place = {}, 8
    while place < len(raw):
        length, kind = struct.unpack(">I4s", raw[place : place + 8])
        chunks[kind] = raw[place + 8 : place + 8 + length]
        assert zlib.crc32(kind + chunks[kind]) == struct.unpack(">I", raw[place + 8 + length : place + 12 + length])[0]
        place += 12 + length
    rows = np.frombuffer(zlib.decompress(chunks[b"IDAT"]), np.uint8).reshape(len(values), -1)
    opacity = np.frombuffer(chunks[b"tRNS"], np.uint8)[rows[:, 1:]] / 255
    np.testing.assert_allclose(opacity, np.clip(values, 0, 1), atol=0.5 / 31 + 1 / 255)


@pytest.mark.slow
def test_charts_of_further_layers_are_drawn_when_named(saved: SavedResult, saved_folder: Path, tmp_path: Path) -> None:
    assert render_page(saved).count('class="evidence"') == 2  # the guilty layer of each test
    assert render_page(saved, charts=["node_conv_0", "node_relu_*"]).count('class="evidence"') == 2 * (2 + 11)
    run("report", saved_folder, "-o", tmp_path / "report.html", "--charts", "node_conv_0")
    page = (tmp_path / "report.html").read_text()
    assert "--charts node_conv_0" not in page  # only beside layers without charts
    assert "--charts node_conv_3" in page
    with pytest.raises(InputError, match=r"--charts node_konv_0: fits no layer; nearest: node_conv_\d"):
        render_page(saved, charts=["node_konv_0"])
    with pytest.raises(InputError, match="csv has no charts"):
        CliRunner().invoke(app, ["report", str(saved_folder), "-f", "csv", "--charts", "x"], catch_exceptions=False)


def test_a_backend_that_is_a_path_leads_nowhere(saved: SavedResult) -> None:
    assert saved.capture(0, "ort") is not None
    assert saved.capture(0, "../sample-0/ort") is None
    assert saved.capture(0, "..") is None


def test_inf_and_nan_are_drawn_as_what_they_are(saved: SavedResult) -> None:
    test = saved.result.tests[0]
    rows = list(test.rows)
    rows[5] = replace(rows[5], stats=replace(rows[5].stats, nan_test=3, rel_l2=math.nan))
    rows[9] = replace(rows[9], stats=replace(rows[9].stats, inf_test=1, rel_l2=math.inf))
    chart = growth_chart(replace(test, rows=rows), "t0-layer-")
    assert chart is not None
    picture = ET.fromstring(chart.__html__())
    assert [text.text for text in picture.iter("text") if text.get("class") == "strange"] == ["NaN", "∞"]
    assert "2 layers are not finite" in (picture.get("aria-label") or "")
    x = np.linspace(-1, 1, 64, dtype=np.float32).reshape(1, 4, 4, 4)
    broken = x.copy()
    broken[0, 1, 2, 3], broken[0, 2, 0, 0], broken[0, 2, 0, 1] = np.nan, np.inf, -np.inf
    captions = dict(charts(x, broken, None, "fp16", upwards=False))
    histogram = captions["Values on both sides"].__html__()
    for wanted in ("1 NaN", "1 Inf", "1 −Inf"):
        assert wanted in histogram
    assert "NaN" not in dict(charts(x, x + 1, None, "fp16", upwards=False))["Values on both sides"].__html__()


def test_a_layer_that_makes_inf_says_so_wherever_its_verdict_stands(saved: SavedResult) -> None:
    first, second = saved.result.tests
    i = next(i for i, row in enumerate(first.rows) if row.verdict == GUILTY)
    guilty = first.rows[i]
    assert guilty.replay is not None
    stats = replace(guilty.stats, inf_test=18, rel_l2=math.inf)
    made = replace(guilty, stats=stats, replay=replace(guilty.replay, new_nonfinite=18, excess=0.76), share=None)
    came_in = replace(first.rows[i + 1], verdict="inherited", stats=replace(stats, inf_test=0, nan_test=2))
    rows = [*first.rows[:i], made, came_in, *first.rows[i + 2 :]]
    test = replace(first, rows=rows)
    assert layer_verdict(made) == "guilty: 18 Inf"
    line = matrix([test, second])[i]
    assert shown(line.rows[0]) == "✗ Inf"
    assert (shown(came_in), tone(came_in)) == ("NaN", "gained")
    assert shown(first.rows[0]) == "–"
    page = render_page(SavedResult.of(replace(saved.result, tests=[test, second])))
    assert "✗ Inf</a>" in page
    assert '<span class="badge guilty">guilty: 18 Inf</span>' in page
    out = Console(file=io.StringIO(), width=80)
    out.print(Terminal(layer_table(test)))
    assert "guilty: 18 Inf" in out.file.getvalue()  # type: ignore[attr-defined]


def test_where_nothing_differs_there_are_no_empty_charts() -> None:
    x = np.linspace(-1, 1, 64, dtype=np.float32).reshape(1, 4, 4, 4)
    assert [caption for caption, _ in charts(x, x, None, "fp16", upwards=False)] == ["Values on both sides"]
    assert worst_elements(x, x, None) == []


def test_layers_of_the_highest_excess_are_none_that_compute_nothing(saved: SavedResult) -> None:
    test = saved.result.tests[0]
    innocent = replace(test, rows=[replace(row, verdict="ok") for row in test.rows])
    assert all(row.replay and row.replay.excess is not None for row in chosen_rows(innocent))


def test_a_stage_that_holds_all_is_told_by_what_is_in_it(saved: SavedResult) -> None:
    test = saved.result.tests[0]
    rows = [replace(row, name=f"net.body.{('left', 'right')[i > 20]}.{i}") for i, row in enumerate(test.rows)]
    whole = replace(test, rows=rows, stages=[replace(test.stages[-1], name="net", layer=rows[-1])])
    assert stage_spans(whole) == [("net.body.left", -0.5, 20.5), ("net.body.right", 20.5, len(rows) - 0.5)]
    assert [name for name, _, _ in stage_spans(test)] == [stage.name for stage in test.stages]


def test_a_stage_whose_end_is_right_names_the_guilty_layer_in_it(saved: SavedResult) -> None:
    test = saved.result.tests[0]
    last = next(row for row in test.rows if row.verdict == "ok")
    inside = replace(test, stages=[replace(test.stages[0], layer=last, guilty=["a", "b"])])
    ((_, cells),) = stage_table(inside, show_all=True).lines()
    assert cells[-1] == ["guilty: a and 1 more"]


def test_backends_stand_side_by_side_and_a_finding_is_told_once(saved: SavedResult) -> None:
    first, second = saved.result.tests
    lines = matrix([first, second])
    assert [line.name for line in lines] == [row.name for row in first.rows]
    assert [line.name for line in lines if line.accused] == [first.guilty[0].name]
    assert matrix([first]) == []
    shorter = matrix([replace(first, rows=first.rows[:3]), second])
    assert [row is None for row in shorter[5].rows] == [True, False]
    assert [told_before([first, second], finding) for finding in second.findings] == [0] * len(second.findings)
    assert [told_before([first, second], finding) for finding in first.findings] == [None] * len(first.findings)
    page = render_page(saved)
    assert page.count('<article class="finding">') == len(first.findings)
    assert page.count("told above, for") == len(second.findings) > 0
    assert 'id="matrix"' not in render_page(SavedResult.of(replace(saved.result, tests=[first])))
