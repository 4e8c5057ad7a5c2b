"""The layer graph of the page: what reads what, which modules fold, and how the page carries it."""

from __future__ import annotations

import base64
import gzip
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest
from nets import NetBuilder
from onnx import TensorProto, helper
from test_report import EVIL, save_faulty

from cp_debug.bisect.engine import bisect
from cp_debug.bisect.result import GUILTY
from cp_debug.reports.layer_graph import (
    LIBRARIES,
    MOST_MEMBERS,
    FoldedLayers,
    GraphLayer,
    _named_path,
    fold,
    graph_data,
    json_script,
    libraries,
    licences,
)
from cp_debug.reports.page import render_page
from cp_debug.reports.saved import SavedResult


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> SavedResult:
    return SavedResult.open(save_faulty(tmp_path_factory.mktemp("net")))


def layer(path: str, row: Any) -> GraphLayer:
    *modules, label = path.split("/")
    return GraphLayer(("net", path), row, tuple(modules), label)


def outline(members: list[FoldedLayers | GraphLayer]) -> list[Any]:
    return [m.label if isinstance(m, GraphLayer) else {m.label: outline(m.members)} for m in members]


def test_edges_are_those_of_the_file(saved: SavedResult) -> None:
    data = graph_data(saved, ["t0", "t1"])
    assert data is not None
    nodes = onnx.load(saved.result.programs["net"]).graph.node
    weights = {t.name for t in onnx.load(saved.result.programs["net"]).graph.initializer}
    onnx_of = [row.onnx for row in saved.result.tests[0].rows]
    wanted = {(read, node.output[0]) for node in nodes for read in node.input if read not in weights}
    assert {(onnx_of[a], onnx_of[b]) for a, b in data["edges"]} == wanted


def test_the_way_of_the_error_begins_at_the_guilty_layer(saved: SavedResult) -> None:
    data = graph_data(saved, ["t0", "t1"])
    assert data is not None
    test = saved.result.tests[0]
    (guilty,) = [i for i, row in enumerate(test.rows) if row.verdict == GUILTY]
    lit = {i for i, figures in data["figures"][0].items() if figures[-1]}
    assert guilty in lit
    assert all(i >= guilty for i in lit)
    assert {i for i, row in enumerate(test.rows) if row in test.outputs} <= lit
    innocent = replace(
        saved.result, tests=[replace(t, rows=[replace(r, verdict="ok") for r in t.rows]) for t in [test]]
    )
    data = graph_data(SavedResult.of(innocent), ["t0"])
    assert data is not None
    assert not any(figures[-1] for figures in data["figures"][0].values())


def test_modules_fold_and_those_of_one_member_do_not(saved: SavedResult) -> None:
    row = saved.result.tests[0].rows[1]
    names = [
        "stem/conv",
        "body/block.0/conv/Conv",
        "body/block.0/Relu",
        "body/block.1/Conv",
        "body/block.1/Relu",
        "end",
    ]
    assert outline(fold([layer(name, row) for name in names])) == [
        "stem",
        {"body": [{"block.0": ["conv", "Relu"]}, {"block.1": ["Conv", "Relu"]}]},
        "end",
    ]


@pytest.mark.parametrize("count", [MOST_MEMBERS, 41, 900, 3000])
def test_no_group_has_more_members_than_can_be_read(saved: SavedResult, count: int) -> None:
    row = saved.result.tests[0].rows[1]
    members = fold([layer(f"layer_{i}", row) for i in range(count)])

    def longest(of: list[FoldedLayers | GraphLayer]) -> int:
        return max([len(of), *(longest(m.members) for m in of if isinstance(m, FoldedLayers))])

    assert longest(members) <= MOST_MEMBERS

    def labels(of: list[FoldedLayers | GraphLayer]) -> list[str]:
        return [label for m in of for label in (labels(m.members) if isinstance(m, FoldedLayers) else [m.label])]

    assert labels(members) == [f"layer_{i}" for i in range(count)]


def test_sizes_are_no_edges_and_scopes_are_modules(tmp_path: Path) -> None:
    net = NetBuilder()
    y = net.op("Relu", net.conv("x", 3, 4))
    z = net.op("Reshape", net.op("Sigmoid", "x"), net.op("Shape", "x"))
    net.op("Concat", y, z, axis=1, name="out")
    path = net.save(tmp_path / "net.onnx", {"x": (1, [1, 3, 8, 8])}, ["out"])
    model = onnx.load(path)
    for node in model.graph.node:
        if node.op_type in ("Conv", "Relu"):
            node.name = f"/left/{node.op_type}"
    onnx.save(model, path)
    data = graph_data(SavedResult.of(bisect(str(path), "ort,ort-none@cpu")), ["t0"])
    assert data is not None
    names = [each[2] for each in data["layers"]]
    assert {(names[a], names[b]) for a, b in data["edges"]} == {
        ("input", "Conv"), ("Conv", "Relu"), ("Relu", "Concat"), ("input", "Sigmoid"), ("Sigmoid", "Reshape"),
        ("Reshape", "Concat"),
    }  # fmt: skip
    assert data["groups"] == [("left", -1)]


@pytest.mark.parametrize(
    ("name", "modules", "label"),
    [
        ("stage1.block.2.conv/Conv", ("stage1", "block.2", "conv"), "Conv"),
        ("enc/attn/MatMul", ("enc", "attn"), "MatMul"),
        ("Conv_12", (), "Conv_12"),
        ("./", (), "./"),
    ],
)
def test_names_stand_for_modules_where_the_file_records_none(name: str, modules: tuple[str, ...], label: str) -> None:
    assert _named_path(name) == (modules, label)


def test_without_its_file_or_with_another_there_is_no_graph(saved: SavedResult, tmp_path: Path) -> None:
    other = tmp_path / "other.onnx"
    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in ("a", "b")]
    graph = helper.make_graph([helper.make_node("Relu", ["a"], ["b"])], "g", value[:1], value[1:])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)]), other)
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(b"\xff" * 100)
    for path in (tmp_path / "gone.onnx", other, broken, tmp_path):
        moved = SavedResult.of(replace(saved.result, programs={"net": str(path)}))
        assert graph_data(moved, ["t0", "t1"]) is None
        page = render_page(moved)
        assert 'id="graph"' not in page
        assert "library-cytoscape" not in page


def test_the_page_carries_libraries_and_licences_once(saved: SavedResult) -> None:
    page = render_page(saved)
    for name, text in libraries().items():
        assert page.count(f'id="library-{name}"') == 1
        assert text in page
        assert b"function" in gzip.decompress(base64.b64decode(text))
    assert set(licences()) == set(LIBRARIES)
    assert all("Permission is hereby granted, free of charge" in text for text in licences().values())
    assert page.count("Permission is hereby granted") == len(LIBRARIES)
    assert len(page.encode()) < 1_000_000


def test_names_in_the_graph_are_never_markup() -> None:
    text = json_script({"name": EVIL + "</script><!--"})
    quoted = {"name": 'a"onmouseover="\\', "back": "\\u0022"}
    assert '"onmouseover' not in str(json_script(quoted))
    assert json.loads(str(json_script(quoted))) == quoted
    assert "<" not in text
    assert json.loads(text)["name"] == EVIL + "</script><!--"
