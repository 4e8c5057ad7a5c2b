"""Regions: many nodes that an engine computes as one are called so, and looked into where they are guilty."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fake_tensorrt
import numpy as np
import onnx
import pytest
import torch
from nets import NetBuilder, node_of
from test_trt_runner import install, save_net

from cp_debug.backends.arithmetic import FP32
from cp_debug.backends.kernels.registry import Call
from cp_debug.backends.registry import create
from cp_debug.backends.spec import parse_backends
from cp_debug.backends.tensorrt import engines
from cp_debug.backends.tensorrt.inspector import EngineLayer, EngineTensor, decode
from cp_debug.bisect.causes import findings
from cp_debug.bisect.causes.base import CAUSES
from cp_debug.bisect.causes.segment import Segment
from cp_debug.bisect.engine import Options, bisect
from cp_debug.bisect.regions import hypotheses
from cp_debug.bisect.regions.hypotheses import _reduce
from cp_debug.bisect.regions.region import Region, region_of
from cp_debug.bisect.result import BisectResult, TestResult
from cp_debug.graph.graph import Graph
from cp_debug.reports.causes import lines
from cp_debug.reports.saved import SavedResult
from cp_debug.reports.tables import kernels

BLOCKS = 2
X = np.random.default_rng(5).standard_normal((1, 6, 8)).astype(np.float32)


def save_transformer(folder: Path) -> Path:
    """Two blocks of LayerNorm, attention with a Split, and two products, on [1, 6, 8]."""
    body = []
    for i in range(BLOCKS):
        x = f"x{i}" if i else "x"
        body += [
            f"n{i} = LayerNormalization <axis = -1> ({x}, g, b)",
            f"m{i} = MatMul (n{i}, wqkv{i})",
            f"a{i} = Add (m{i}, bqkv)",
            f"q{i}, k{i}, v{i} = Split <axis = -1> (a{i}, three)",
            f"t{i} = Transpose <perm = [0, 2, 1]> (k{i})",
            f"s{i} = MatMul (q{i}, t{i})",
            f"c{i} = Mul (s{i}, scale)",
            f"p{i} = Softmax <axis = -1> (c{i})",
            f"o{i} = MatMul (p{i}, v{i})",
            f"r{i} = Add ({x}, o{i})",
            f"h{i} = MatMul (r{i}, w1{i})",
            f"e{i} = Relu (h{i})",
            f"f{i} = MatMul (e{i}, w2{i})",
            f"x{i + 1} = Add (r{i}, f{i})",
        ]
    body.append(f"y = Mul (x{BLOCKS}, one)")
    model = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["" : 17]> net (float[1,6,8] x) => (float[1,6,8] y) {' + "\n".join(body) + "}"
    )
    rng = np.random.default_rng(0)
    weights: dict[str, Any] = {"g": np.ones(8), "b": np.zeros(8), "bqkv": rng.standard_normal(24) * 0.2}
    weights |= {"scale": np.asarray(0.35), "one": np.asarray(1.25)}
    for i in range(BLOCKS):
        for name, shape in (("wqkv", (8, 24)), ("w1", (8, 16)), ("w2", (16, 8))):
            weights[f"{name}{i}"] = rng.standard_normal(shape) * 0.5
    for name, array in weights.items():
        model.graph.initializer.append(onnx.numpy_helper.from_array(array.astype(np.float32), name))
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.asarray([8, 8, 8]), "three"))
    for node in model.graph.node:
        node.name = f"/{node.output[0]}/{node.op_type}"
    onnx.save(model, folder / "net.onnx")
    np.savez(folder / "x.npz", x=X)
    return folder / "net.onnx"


@pytest.fixture
def region(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """TensorRT 8.6 that takes all but the last node of the network as one region."""
    install("8.6.0", monkeypatch)
    monkeypatch.setattr("fake_tensorrt.REGION", {"/n0/LayerNormalization", f"/x{BLOCKS}/Add"})
    return monkeypatch


def run(folder: Path, spec: str = "trt-fp16", **options: Any) -> BisectResult:
    path = save_transformer(folder)
    return bisect(str(path), f"ort-none,{spec}", options=Options(inputs=folder / "x.npz", **options))


def first(result: BisectResult) -> TestResult:
    return result.tests[0]


def softmaxes(factor: float = 1.5) -> dict[str, float]:
    return {f"/p{i}/Softmax": factor for i in range(BLOCKS)}


def test_a_region_is_never_called_by_its_last_node(region: pytest.MonkeyPatch, tmp_path: Path) -> None:
    test = first(run(tmp_path))
    row = next(row for row in test.rows if row.onnx == f"x{BLOCKS}")
    assert row.name == f"fused region of 28 nodes (/n0/LayerNormalization … /x{BLOCKS}/Add)"
    assert row.op == "Myelin"
    assert row.to_dict()["region"]["nodes"][0] == "/n0/LayerNormalization"
    assert not test.guilty
    assert next(row for row in test.rows if row.onnx == "y").name == "/y/Mul"


def test_a_region_of_several_layers_is_not_called_by_the_last_one(tmp_path: Path) -> None:
    graph = Graph(save_transformer(tmp_path))
    names = [f"/{value}/{op}" for value, op in (("h0", "MatMul"), ("e0", "Relu"), ("f0", "MatMul"), ("x1", "Add"))]

    def layer(kind: str, nodes: list[str], value: str, dtype: str = "Half", kernel: str = "") -> EngineLayer:
        tensor = EngineTensor(value, dtype, "", ())
        return EngineLayer(" + ".join(nodes), kind, tuple(nodes), (), (tensor,), decode(kernel))

    def found(*layers: EngineLayer) -> tuple[str, dict[str, int]]:
        region = region_of(names, "x1", graph, layers)
        assert region is not None
        return region.kind, dict(region.kernels)

    product = layer("Gemm", names[:1], "h0", kernel="sm80_xmma_gemm_f16f16_f16f16_f16_nn_n_tilesize32x32x64")
    last = layer("PointWise", names[2:], "x1", "Float", "sm50_xmma_gemm_f32f32_f32f32_f32_nn_n")
    several = {"fp16acc": 1, "fp16": 1, "fp32": 1}
    assert found(product, layer("PointWise", names[1:2], "e0"), last) == ("3 layers", several)
    whole = layer("Myelin", names[:3], "f0", "Float")
    assert found(whole, layer("PointWise", names[3:], "x1")) == ("Myelin", {"unknown": 1, "fp16": 1})
    assert found(layer("Myelin", names, "x1")) == ("Myelin", {})


def test_a_region_of_several_layers_tells_what_all_of_them_compute_in(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    install("8.6.0", monkeypatch)
    model = onnx.load(save_net(tmp_path))
    model.graph.node.pop()
    model.graph.output[0].name = "c2"
    onnx.save(model, tmp_path / "net.onnx")
    specs = parse_backends("ort-none,trt-fp16")
    engine = create(specs[1], probes="auto", keep_fp32=frozenset({"/c2/Conv"}))
    (row,) = (row for row in bisect(str(tmp_path / "net.onnx"), [create(specs[0]), engine]).tests[0].rows if row.region)
    assert (kernels(row), row.tactic) == ("1 fp16acc, 1 fp32", "")


def test_what_a_compiled_layer_does_inside_is_not_told_by_its_borders(
    region: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    region.setitem(fake_tensorrt._OLD_WORDS, "HALF", fake_tensorrt._OLD_WORDS["FLOAT"])
    test = first(run(tmp_path))
    assert not [note for note in test.notes if "runs in FP16" in note]
    assert {row.replay.precision for row in test.rows if row.replay is not None} == {"fp16"}


@pytest.mark.slow
def test_an_operator_at_fault_everywhere_is_found_and_the_fix_is_verified(
    region: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    faulty = {name.replace("/p0/", "/p 0/"): factor for name, factor in softmaxes().items()}
    region.setattr("fake_tensorrt.FAULTY", faulty)
    told: list[str] = []
    path = save_transformer(tmp_path)
    model = onnx.load(path)
    for node in model.graph.node:
        node.name = node.name.replace("/p0/", "/p 0/")
    onnx.save(model, path)
    options = Options(inputs=tmp_path / "x.npz", save=tmp_path / "saved")
    result = bisect(str(path), "ort-none,trt-fp16", options=options, on_step=lambda text, *_: told.append(text))
    (finding,) = first(result).findings
    inside = finding.inside
    assert inside is not None
    assert (inside["suspects"], inside["operators"]) == ([*faulty], ["Softmax"])
    assert set(inside["kept"]) == set(faulty)
    assert inside["mended"] < inside["limit"] < inside["error"]
    assert len(inside["steps"]) <= 6
    assert "--keep-fp32 '/p 0/Softmax' --keep-fp32 /p1/Softmax" in finding.fix
    assert any("build 2 of at most 6" in text for text in told), "what is known is told before each build"
    assert any(label.startswith("build 1") for label, _ in lines(finding))
    (tmp_path / "saved" / "result.json").write_text(json.dumps(result.to_dict()))
    again = SavedResult.open(tmp_path / "saved").result.tests[0]
    assert again.findings[0].inside == json.loads(json.dumps(inside))
    assert again.guilty[0].region == first(result).guilty[0].region


@pytest.mark.parametrize("spec", ["trt-fp16", "trt-fp32"])
def test_results_taken_for_each_other_are_named_before_anything_is_built(
    region: pytest.MonkeyPatch, tmp_path: Path, spec: str
) -> None:
    region.setattr("fake_tensorrt.CROSSED", {f"/q{i}/Split" for i in range(BLOCKS)})
    (finding,) = first(run(tmp_path, spec, max_builds=0)).findings
    assert finding.cause == "crossed"
    assert "in the order 2, 1, 0" in finding.says
    assert finding.explained is not None
    assert finding.explained > 0.99
    assert finding.inside is not None
    assert (finding.inside["suspects"], finding.inside["steps"]) == (["/q0/Split", "/q1/Split"], [])


@pytest.mark.slow
def test_a_fault_that_values_shown_undo_is_found_by_keeping_precision(
    region: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    region.setattr("fake_tensorrt.FAULTY", {"/p1/Softmax": 1.5, "/p0/Softmax": 1.5})
    region.setattr(
        "fake_tensorrt.MENDING", {o for i in range(BLOCKS) for o in (f"r{i}", f"h{i}", f"a{i}", f"n{i}", "x1")}
    )
    (finding,) = first(run(tmp_path, max_builds=12)).findings
    inside = finding.inside
    assert inside is not None
    assert set(inside["kept"]) == set(softmaxes())
    assert inside["in_fp32"] < inside["limit"], "a matter of precision"


@pytest.mark.slow
def test_a_fault_of_the_fusion_is_not_called_rounding(region: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The whole region is wrong in FP32, too, while keeping one node there mends it: its fusion is undone."""
    region.setattr("fake_tensorrt.FAULTY", {"/o0/MatMul": 1.5})
    region.setattr("fake_tensorrt.STUBBORN", True)
    region.setattr("fake_tensorrt.MENDING", {"r0", "h0", "a0", "n0", "x1", "r1", "h1", "a1", "n1", "m0", "m1"})
    (finding,) = first(run(tmp_path, max_builds=8)).findings
    assert "the fusion is at fault, not the rounding" in finding.says


@pytest.mark.slow
def test_what_was_learnt_survives_an_interruption(region: pytest.MonkeyPatch, tmp_path: Path) -> None:
    region.setattr("fake_tensorrt.FAULTY", softmaxes())
    from cp_debug.backends.tensorrt.session import EngineSession

    real, calls = EngineSession.trial, []

    def trial(self: EngineSession, *args: Any, **kwargs: Any) -> Any:
        calls.append(kwargs)
        if len(calls) == 3:  # the first tries all of it
            raise KeyboardInterrupt
        return real(self, *args, **kwargs)

    region.setattr(EngineSession, "trial", trial)
    result = run(tmp_path)
    (finding,) = first(result).findings
    assert finding.inside is not None
    assert (finding.inside["ended"], len(finding.inside["steps"])) == ("interrupted", 2)
    assert 0 < len(finding.inside["suspects"]) < 20
    assert not result.agrees


def test_an_engine_without_names_still_has_regions(region: pytest.MonkeyPatch, tmp_path: Path) -> None:
    region.setattr("fake_tensorrt.NAMELESS", {"8.6.0"})
    row = next(row for row in first(run(tmp_path)).rows if row.onnx == "y")
    assert row.region is not None
    assert (row.name, row.region.kind) == ("fused region of 29 nodes (/n0/LayerNormalization … /y/Mul)", "")


def test_builds_that_fail_are_counted_and_told(region: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from cp_debug.backends.tensorrt.session import EngineSession
    from cp_debug.errors import InputError

    def trial(self: EngineSession, *args: Any, **kwargs: Any) -> Any:
        raise InputError("no kernel for this")

    region.setattr("fake_tensorrt.FAULTY", softmaxes())
    region.setattr(EngineSession, "trial", trial)
    (finding,) = first(run(tmp_path, max_builds=3)).findings
    assert finding.inside is not None
    assert {step["learnt"] for step in finding.inside["steps"]} == {"failed: no kernel for this"}
    assert (finding.inside["ended"], len(finding.inside["steps"])) == ("a build failed", 2)


def test_backends_are_made_once_for_the_search(region: pytest.MonkeyPatch, tmp_path: Path) -> None:
    region.setattr("fake_tensorrt.FAULTY", softmaxes())
    save_transformer(tmp_path)
    backends = [create(spec) for spec in parse_backends("ort-none,trt-fp16")]
    result = bisect(str(tmp_path / "net.onnx"), backends, options=Options(inputs=tmp_path / "x.npz", max_builds=1))
    assert len(first(result).findings[0].inside["steps"]) == 1  # type: ignore[index]


@pytest.mark.slow
def test_a_fact_of_the_engine_is_told_of_all_its_layers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Three products accumulate in FP16, one of them so long that it is guilty: the finding counts all three."""
    from nets import NetBuilder

    from cp_debug.backends.spec import BackendSpec
    from cp_debug.bisect.finding import Finding

    builder = NetBuilder()
    x = "x"
    for place, channels in enumerate((16, 32, 256, 16)):
        x = builder.conv(x, {0: 4, 1: 16, 2: 32, 3: 256}[place], channels, name=f"c{place}")
    path = builder.save(tmp_path / "net.onnx", {"x": (1, [1, 4, 12, 12])}, [x])
    np.savez(tmp_path / "in.npz", x=np.random.default_rng(1).standard_normal((1, 4, 12, 12)).astype(np.float32))

    class Claims:
        """FP16 accumulation that claims FP16."""

        def __init__(self) -> None:
            self.inner = create(BackendSpec.parse("emu-fp16acc"))
            self.spec, self.precision, self.device = BackendSpec.parse("emu-fp16"), "fp16", "cpu"
            self.emulated = False

        def __getattr__(self, name: str) -> Any:
            return getattr(self.inner, name)

    result = bisect(
        str(path), [create(BackendSpec.parse("ort-none")), Claims()], options=Options(inputs=tmp_path / "in.npz")
    )
    (finding,) = first(result).findings
    assert isinstance(finding, Finding)
    assert finding.cause == "fp16-accumulation"
    assert len(finding.layers) < finding.evidence["layers_in_all"] <= finding.evidence["of_products"] == 4
    assert finding.evidence["excess_least"] < 4 < finding.evidence["excess_most"]
    assert finding.says.startswith("sums are accumulated in FP16, in ")
    assert "of the final divergence" in finding.says


def test_a_region_is_not_asked_for_every_cause_of_a_layer(region: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What changes one node after the other took minutes on a region of many, and its hypotheses say more."""
    asked: list[bool] = []
    watching = []
    for family in CAUSES:

        def watched(segment: Segment, family: Any = family) -> Any:
            asked.append(family.by_node)
            return family(segment)

        watching.append(replace(family, emulate=watched))
    for module in ("search", "findings"):
        region.setattr(f"cp_debug.bisect.causes.{module}.CAUSES", watching)
    region.setattr("fake_tensorrt.CROSSED", {f"/q{i}/Split" for i in range(BLOCKS)})
    (finding,) = first(run(tmp_path, max_builds=0)).findings
    assert finding.cause == "crossed"
    assert asked
    assert not any(asked)
    assert any(family.by_node for family in CAUSES)


@pytest.mark.slow
def test_control_flow_inside_a_region(region: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = save_transformer(tmp_path)
    model = onnx.load(path)
    relu = next(node for node in model.graph.node if node.output[0] == "e1")
    bodies = {}
    for name, op in (("then_branch", "Relu"), ("else_branch", "Neg")):
        result = onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None)
        bodies[name] = onnx.helper.make_graph([onnx.helper.make_node(op, ["h1"], [name])], name, [], [result])
    model.graph.node[list(model.graph.node).index(relu)].CopyFrom(
        onnx.helper.make_node("If", ["wanted"], ["e1"], "/e1/If", **bodies)
    )
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(True), "wanted"))
    onnx.save(model, path)
    region.setattr("fake_tensorrt.FAULTY", softmaxes())
    options = Options(inputs=tmp_path / "x.npz")
    (finding,) = first(bisect(str(path), "ort-none,trt-fp16", options=options)).findings
    assert finding.inside is not None
    assert set(finding.inside["kept"]) == set(softmaxes())


def test_an_engine_whose_inspector_tells_no_nodes(region: pytest.MonkeyPatch, tmp_path: Path) -> None:
    told = engines.parse_layers
    region.setattr(engines, "parse_layers", lambda *a: [replace(layer, nodes=(), name="layer") for layer in told(*a)])
    region.setattr("fake_tensorrt.FAULTY", softmaxes())
    test = first(run(tmp_path, max_builds=2))
    assert [row.name for row in test.guilty] == [f"fused region of 28 nodes (/n0/LayerNormalization … /x{BLOCKS}/Add)"]
    (finding,) = test.findings
    assert "2 builds were allowed" in finding.says


@pytest.mark.slow
@pytest.mark.parametrize("alone", [False, True])
def test_a_plugin_inside_a_region(region: pytest.MonkeyPatch, tmp_path: Path, alone: bool) -> None:
    """Nothing here can execute it: what is in front of it and behind it is judged all the same."""
    path = save_transformer(tmp_path)
    model = onnx.load(path)
    for node in model.graph.node:
        if node.op_type == "Relu":
            node.op_type, node.domain, node.name = "Clipped", "trt.plugins", node.name.replace("Relu", "Clipped")
    model.opset_import.append(onnx.helper.make_opsetid("trt.plugins", 1))
    onnx.save(model, path)
    if alone:
        region.setattr("fake_tensorrt.REGION", {"/n0/LayerNormalization", "/h0/MatMul"})
    region.setattr("fake_tensorrt.FAULTY", softmaxes())
    test = first(bisect(str(path), "trt-fp32,trt-fp16", options=Options(inputs=tmp_path / "x.npz")))
    rows = {row.onnx: row for row in test.rows}
    assert (test.agrees, rows["y"].verdict) == (False, "inherited")
    reason = f"{path}: node '/e0/Clipped' (trt.plugins.Clipped) failed: cpdebug does not implement it"
    assert any(reason in note for note in test.notes)
    if alone:
        assert [row.onnx for row in test.guilty] == ["h0", "x1"], "x1 is r0 + f0, and r0 is inside"
        assert rows["e0"].replay.skipped == reason
    else:
        label = f"fused region of 28 nodes (/n0/LayerNormalization … /x{BLOCKS}/Add)"
        assert (rows["x2"].name, rows["x2"].replay.skipped) == (label, reason)


def test_a_fix_names_nodes_where_a_row_is_a_region() -> None:
    region = Region(("/a/MatMul", "/b/Softmax", "/c/MatMul"), "Myelin", "{ForeignNode[/a/MatMul.../c/MatMul]}")
    rows = [SimpleNamespace(name=region.label, region=region), SimpleNamespace(name="/d/Conv", region=None)]
    assert findings._node_names(rows) == ["/a/MatMul", "/b/Softmax", "/c/MatMul", "/d/Conv"]  # type: ignore[arg-type]


def test_nodes_stand_behind_what_they_read() -> None:
    nodes = [
        node_of("A", ["b"], ["a"], 0),
        node_of("B", ["c"], ["b"], 1),
        node_of("C", ["x"], ["c"], 2),
        node_of("D", ["a"], ["d"], 3),
    ]
    assert [n.op for n in hypotheses._ordered(nodes)] == ["C", "B", "A", "D"]


def test_partial_sums_of_fp16_and_its_range() -> None:
    x = torch.tensor([[2048.0, 1, 1], [1, 1, 2048]])
    assert hypotheses._sum(x, [1]).tolist() == [[2048], [2050]]
    assert hypotheses._sum(x, [-1]).shape == (2, 1)
    assert hypotheses._sum(x, [0, 1]).shape == (1, 1)
    assert hypotheses._saturate(torch.tensor([1e6, -1e6, 1.0])).tolist() == [65504, -65504, 1]
    assert hypotheses._saturate(torch.tensor([1 << 20])).tolist() == [1 << 20]
    call: Any = {"axis": None}
    large = torch.tensor([[12.0, 12.0]])
    assert hypotheses._softmax(True)(call, [large]).tolist() == [[0.5, 0.5]]
    assert not torch.isfinite(hypotheses._softmax(False)(call, [large])).all()


def chain(folder: Path, *ops: str) -> Graph:
    net, value = NetBuilder(), "x"
    for place, op in enumerate(ops):
        weights = [net.weight(np.eye(3, dtype=np.float32))] if op == "MatMul" else []
        value = net.op(op, value, *weights, name=f"v{place}")
    return Graph(net.save(folder / "net.onnx", {"x": (1, [3, 3])}, [value]))


@pytest.mark.parametrize(
    ("ops", "is_region"),
    [
        (("MatMul", *["Neg"] * 7), False), (("MatMul", *["Neg"] * 8), True), (("MatMul", "Neg", "MatMul"), True),
        (("MatMul", *["Neg"] * 7, *["Identity"] * 9), False), (("Neg",), False),
    ],
)  # fmt: skip
def test_many_nodes_or_two_products_are_a_region(tmp_path: Path, ops: tuple[str, ...], is_region: bool) -> None:
    graph = chain(tmp_path, *ops)
    names, last = [n.name for n in graph.nodes], graph.nodes[-1].outputs[0]
    found = region_of(names, last, graph)
    assert (found is not None) == is_region
    if found is not None:
        assert found.nodes == tuple(names)
        assert found.label == f"fused region of {len(names)} nodes ({names[0]} … {names[-1]})"
        assert (found.kind, found.layer) == ("", "")


def test_a_region_is_called_after_the_layer_that_holds_most_of_it(tmp_path: Path) -> None:
    graph = chain(tmp_path, "MatMul", "Neg", "MatMul", "Neg")
    names = [n.name for n in graph.nodes]

    def engine(name: str, kind: str, nodes: list[str], output: str = "") -> EngineLayer:
        return EngineLayer(name, kind, tuple(nodes), (), (EngineTensor(output, "Half", "", ()),), decode(""))

    most, few = engine("most", "Myelin", names[:3]), engine("few", "Conv", names[3:], "v3")
    found = region_of(names, "v3", graph, [few, most])
    assert found is not None
    assert (found.kind, found.layer) == ("Myelin", "most")
    halves = [engine("front", "Myelin", names[:2]), engine("back", "Conv", names[2:], "v3")]
    found = region_of(names, "v3", graph, halves)
    assert found is not None
    assert (found.kind, found.layer) == ("2 layers", "back")  # none holds most of it: who writes the result
    copies = [engine("copy", "Reformat", names[2:], "v3"), engine("writer", "Conv", [], "v3")]
    found = region_of(names, "v3", graph, copies)
    assert found is not None
    assert (found.kind, found.layer) == ("Conv", "writer")


@pytest.mark.parametrize(("divide", "keep"), [(True, 1), (False, 0)])
def test_reductions_round_each_partial_sum(divide: bool, keep: int) -> None:
    """2048 + 1 is 2048 in FP16."""
    node = onnx.helper.make_node("ReduceMean" if divide else "ReduceSum", ["x"], ["y"], axes=[1], keepdims=keep)
    x = torch.tensor([[2048.0, 1.0, 1.0, 2.0], [1.0, 1.0, 2.0, 4.0]])
    call: Any = Call(SimpleNamespace(proto=node, op=node.op_type, domain=""), 13, FP32, torch.device("cpu"))  # type: ignore[arg-type]
    found = _reduce(divide)(call, [x])
    assert found.shape == ((2, 1) if keep else (2,))
    assert found.flatten().tolist() == ([512.5, 2.0] if divide else [2050.0, 8.0])
