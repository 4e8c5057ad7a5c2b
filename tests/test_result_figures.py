"""Figures and orders of results from rows that are given: severities, counts, coverage, what of a sample is kept."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from nets import NetBuilder
from torch import Tensor

from cp_debug.backends.base import Program, RunRecord
from cp_debug.backends.scaling import E4M3
from cp_debug.backends.spec import BackendSpec
from cp_debug.bisect import assemble, candidate_run
from cp_debug.bisect.assemble import Collected
from cp_debug.bisect.candidate_run import CandidateRun
from cp_debug.bisect.options import Options
from cp_debug.bisect.quantized_segment import Levels
from cp_debug.bisect.replayed import EXCESS, Replay
from cp_debug.bisect.result import BisectResult, LayerRow, Remainder, StageRow, TestResult
from cp_debug.bisect.standards import int8_notes, tolerance
from cp_debug.graph.control_flow import ControlFlow
from cp_debug.graph.graph import Graph
from cp_debug.probes.statistics import compare
from cp_debug.programs.layers import Layer, all_layers, layers_of
from cp_debug.programs.pipeline import Key
from cp_debug.programs.precision import PRECISIONS
from cp_debug.reports.verdict_line import verdict_line


def row(name: str, off: float = 0.0, *, index: int = 0, kind: str = "data", **fields: Any) -> LayerRow:
    stats = compare(np.array([1.0, 2.0]), np.array([1.0, 2.0 + off]))
    given: dict[str, Any] = {"verdict": "ok", "within": True, "replay": Replay(introduced=0.0, excess=1.0)} | fields
    return LayerRow(index, "net", name, name, "Conv", stats, kind=kind, **given)


def result(rows: list[LayerRow], outputs: list[LayerRow], **fields: Any) -> TestResult:
    record = RunRecord("ort", "fp32", "cpu", False)
    figures: dict[str, Any] = {"compared": len(rows), "total": len(rows)} | fields
    return TestResult(record, rows, [], outputs, rtol=1e-3, atol=1e-4, oracle="fp64", **figures)


# Orders -------------------------------------------------------------------------------------------------------------


def test_rows_are_ordered_by_verdict_then_excess_then_divergence() -> None:
    ordered = [
        row("ok", 9.0),
        row("inherited", verdict="inherited", replay=Replay(excess=2.0)),
        row("more", 0.1, verdict="inherited", replay=Replay(excess=3.0)),
        row("apart", 0.2, verdict="inherited", replay=Replay(excess=3.0)),
        row("divergent", verdict="divergent", replay=None),
        row("shape", verdict="shape", replay=None),
        row("guilty", verdict="guilty", replay=Replay(excess=1.5)),
    ]
    backwards = ordered[::-1]
    assert sorted(backwards, key=lambda r: r.severity) == ordered


def test_a_stage_with_a_guilty_layer_is_worse_than_one_that_ends_further_off() -> None:
    guilty, far = StageRow("a", row("a"), ["inner"]), StageRow("b", row("b", 5.0, verdict="shape"))
    assert guilty.severity > far.severity
    assert (guilty.verdict, far.verdict) == ("guilty", "shape")
    assert StageRow("c", row("c", 0.2)).severity > StageRow("d", row("d", 0.1)).severity
    assert guilty.derived()["verdict"] == "guilty"
    assert far.derived()["max_abs"] == pytest.approx(5.0)


# Agreement ----------------------------------------------------------------------------------------------------------


def test_an_output_with_nan_on_both_sides_decides_nothing() -> None:
    both = compare(np.array([1.0, np.nan]), np.array([1.0, np.nan]))
    clean = row("y")
    unknown = replace(clean, stats=both)
    assert result([clean], [clean]).agrees
    found = result([unknown], [clean, unknown])
    assert not found.agrees
    assert found.undecided
    assert not result([clean], [clean]).undecided
    assert not result([], []).agrees
    beyond = replace(clean, within=False, verdict="inherited")
    assert not result([beyond], [clean, beyond]).agrees
    guilty = replace(clean, verdict="guilty")
    assert not result([guilty], [clean]).agrees


@pytest.mark.parametrize("verdict", ["divergent", "inherited", "shape"])
def test_outputs_that_agree_say_so_of_themselves_alone_where_a_value_between_does_not(verdict: str) -> None:
    rows = [row("a"), row("b", within=False, verdict=verdict), row("c", within=False, verdict=verdict), row("d")]
    said = verdict_line(result(rows, rows[-1:])).plain
    assert "the outputs agree within" in said
    assert f"values in between do not: b ({verdict}) and 1 more" in said
    said = verdict_line(result([rows[0], rows[3]], rows[-1:])).plain
    assert ": agrees within" in said
    assert "between" not in said


def test_the_first_layer_beyond_tolerance_is_told_beside_the_first_guilty_one() -> None:
    rows = [row("a"), row("b", within=False, verdict="inherited"), row("c", verdict="guilty"), row("d", within=False)]
    found = result(rows, rows[-1:])
    assert found.first_beyond is rows[1]
    assert found.first_divergent is rows[2]
    assert found.derived()["first_divergent"] == "c"
    assert found.derived()["first_beyond_tolerance"] == "b"
    assert result(rows[:1], rows[:1]).first_divergent is None


def test_coverage_counts_outputs_that_were_expected_and_values_that_were_compared() -> None:
    found = result([row("a")], [row("a")], expected_outputs=["a", "b"], compared=3, total=7)
    assert found.coverage == "1 of 2 outputs, 3 of 7 values"
    assert found.missing_outputs == ["b"]
    assert result([row("a")], [row("a")]).coverage == "1 of 1 outputs, 1 of 1 values"
    assert (
        found.derived() | {"compared.outputs": 1, "compared.values": 3, "compared.values_expected": 7}
        == found.derived()
    )


@pytest.mark.parametrize(("ratio", "adds_up"), [(EXCESS, True), (1.01 * EXCESS, False), (0.1, True)])
def test_rounding_adds_up_to_a_few_times_what_it_makes(ratio: float, adds_up: bool) -> None:
    found = Remainder(ratio * 0.01, 0.01)
    assert found.adds_up == adds_up
    assert str(found) == ("the rounding adds up" if adds_up else "but rounding explains only 0.01 (rel. L2) of it")
    assert Remainder(9.0).adds_up
    assert Remainder(9.0, 1.0, shared_out=True).adds_up
    assert not Remainder(0.01, 1.0, {"n": "why"}).adds_up
    many = Remainder(0.01, 1.0, dict.fromkeys("abcde", "no probe"))
    assert str(many) == "not replayed or not emulated, so not explained: a, b, c and 2 more"


def test_zeros_everywhere_hide_any_fault() -> None:
    zeros = replace(row("z"), stats=compare(np.zeros(3), np.zeros(3)))
    assert result([zeros], [zeros]).all_zeros
    assert not result([zeros], [zeros, row("y")]).all_zeros
    one_side = replace(row("z"), stats=compare(np.zeros(3), np.array([0, 1e-9, 0])))
    assert not result([one_side], [one_side]).all_zeros


# Samples and stages -------------------------------------------------------------------------------------------------


def boxes(*rows: tuple[float, float]) -> Any:
    """Boxes at x, with a score."""
    array = np.array([[x, 0, 0, 4, 2, 1.5, 0, 0, 0] for x, _ in rows], np.float64).reshape(-1, 9)
    return SimpleNamespace(
        boxes=array, scores=np.array([s for _, s in rows]), labels=np.zeros(len(rows), np.int64), class_names=("car",)
    )


def test_changes_of_the_detections_add_up_over_samples() -> None:
    collected = Collected()
    collected.detect(boxes((0, 0.9), (9, 0.8)), boxes((0.5, 0.9)))
    collected.detect(boxes((0, 0.9)), boxes((0, 0.7), (20, 0.5)))
    found = collected.detections
    assert found is not None
    assert (found.reference, found.lost, found.gained, found.moved) == (3, 1, 1, 2)
    assert found.max_center == pytest.approx(0.5)
    assert found.max_score == pytest.approx(0.2)
    assert found.mean_score == pytest.approx(-0.1)  # of the two that were found again


def test_a_stage_names_its_own_guilty_layers_and_side_values_are_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = {
        Key("net", n): row(n, index=i, kind=kind, verdict=verdict)
        for i, (n, kind, verdict) in enumerate(
            [("a", "data", "guilty"), ("w", "constant", "ok"), ("b", "data", "ok"), ("c", "data", "guilty")]
        )
    }
    layers = [Layer(r.index, "net", n.value, r.name, "Conv", r.kind) for n, r in rows.items()]
    layers.append(Layer(9, "net", "lost", "lost", "Conv"))
    stages = [
        SimpleNamespace(name="first", last=layers[2], layers=layers[:3]),
        SimpleNamespace(name="second", last=layers[3], layers=layers[3:4]),
    ]
    monkeypatch.setattr(assemble, "stage_layers", lambda components, layers: stages)
    graph = SimpleNamespace(outputs=[SimpleNamespace(name="c")])
    program = SimpleNamespace(name="net", graph=graph, pairing=None, flow=ControlFlow())
    pipeline = SimpleNamespace(
        programs=[program],
        program=lambda name: program,
        record=lambda: None,
        backend=SimpleNamespace(spec="ort"),
        unrealised_note="",
    )
    run: Any = SimpleNamespace(
        pipeline=pipeline, programs={"net": program}, tolerance=(1e-3, 1e-4), oracle=None, graphs={}
    )
    collected = Collected()
    collected.rows = rows
    model: Any = SimpleNamespace(components=[SimpleNamespace(name="net")])
    found = assemble.result_of(model, run, collected, layers, (), Options(), "")
    assert [(s.name, s.guilty, s.layer.name) for s in found.stages] == [("first", ["a"], "b"), ("second", ["c"], "c")]
    assert (found.compared, found.total) == (3, 4)
    assert (found.rtol, found.atol) == (1e-3, 1e-4)


def test_a_backend_without_integer_kernels_is_told_where_no_component_has_any(monkeypatch: pytest.MonkeyPatch) -> None:
    backend: Any = SimpleNamespace(precision="int8", spec=BackendSpec.parse("ort-int8"), emulated=False)
    reference: Any = SimpleNamespace(
        backend=SimpleNamespace(precision="fp32", spec="torch", emulated=False), programs=[]
    )
    monkeypatch.setattr("cp_debug.bisect.standards.integer_kernels_of", lambda session: session)
    for counts, told in (((0, 0), True), ((0, 3), False), ((None,), False), ((), False)):
        sessions = {str(i): count for i, count in enumerate(counts)}
        pipeline: Any = SimpleNamespace(backend=backend, programs=[], sessions=sessions)
        notes = list(int8_notes(reference, pipeline, [], {}))
        assert any("no integer kernel ran" in note for note in notes) == told, counts


# Who is asked for what ----------------------------------------------------------------------------------------------


def test_a_replayer_is_told_each_sides_own_claims_the_references_first(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    net = NetBuilder()
    net.op("Neg", "x", name="y")
    graph = Graph(net.save(tmp_path / "net.onnx", {"x": (1, [1])}, ["y"]))

    def side(family: str, precision: str, device: str) -> Any:
        spec = SimpleNamespace(family=family, name=family)
        backend = SimpleNamespace(precision=precision, spec=spec, device=device)
        program = SimpleNamespace(module=None, alignment=None)
        own = {"backend": backend, "precision": precision, "name": family}
        return SimpleNamespace(**own, kept=lambda component: frozenset(), program=lambda component: program)

    run = CandidateRun.__new__(CandidateRun)
    run._replayers, run._files, run.oracle, run.device = {}, {}, "fp64", "cpu"
    run._seen = {Key("net", "y")}
    run.reference, run.pipeline = side("torch", "fp32", "cuda:1"), side("ort", "fp16", "cpu")
    run.programs = {"net": SimpleNamespace(graph=graph, alignment=None)}  # type: ignore[dict-item]
    told: list[Any] = []
    monkeypatch.setattr(candidate_run, "Replayer", lambda *given, **named: told.append((given, named)))
    monkeypatch.setattr(run, "_narrow", lambda component, of: {of.name: "narrow"})
    monkeypatch.setattr(run, "_quantized", lambda component, of, capture=None: (of.name, capture))
    monkeypatch.setattr(run, "_emulates", lambda of: of is graph)
    capture: Any = SimpleNamespace(names=lambda component: ["y", "own"])
    run.replayer("net", capture)
    ((given, named),) = told
    assert given == (graph, ("fp32", "fp16"), "fp64", ["y"], "cpu")
    assert named["implementers"] == ("torch@cuda", "ort")
    assert named["narrow"] == ({"torch": "narrow"}, {"ort": "narrow"})
    assert named["quantized"] == (("torch", None), ("ort", capture))
    assert named["emulated"]


@pytest.mark.parametrize(
    ("off", "within", "diverges"), [(1e-7, True, False), (8e-4, True, False), (1.1e-3, True, True), (1e-7, False, True)]
)
def test_an_engine_is_looked_into_where_its_outputs_are_further_off_than_its_precision_makes_them(
    tmp_path: Path, off: float, within: bool, diverges: bool
) -> None:
    """FP16 is 2.4e-4 off a third: twice that and a roundoff, 9.8e-4, are let through; the tolerance goes before."""
    net = NetBuilder()
    net.op("Neg", "x", name="y")
    graph = Graph(net.save(tmp_path / "net.onnx", {"x": (1, [1, 8])}, ["y"]))
    x = np.full((1, 8), 1 / 3, np.float32)
    run = CandidateRun.__new__(CandidateRun)
    run.tolerance, run.device = (0.0, 1.0 if within else 1e-9), "cpu"
    run.pipeline = SimpleNamespace(precision="fp16")  # type: ignore[assignment]
    run._levels = set()
    run.programs = {"net": SimpleNamespace(graph=graph, alignment=None)}  # type: ignore[dict-item]
    reference: Any = SimpleNamespace(load=lambda name, component: -x)
    outputs = {"y": (-x.astype(np.float64) * (1 + off))}
    why = run._diverges("net", reference, {"x": x}, outputs)
    says = "beyond the tolerance" if not within else "within the tolerance, but FP16 makes 2.4e-04"
    assert why == (f"y is off by {off:.1e} (rel. L2), {says}" if diverges else "")


def test_tolerances_are_those_that_were_asked_for_or_of_the_coarser_side() -> None:
    def side(precision: str) -> Any:
        return SimpleNamespace(precision=precision, implicit_int8=False, spec=precision)

    def found(*sides: str, **asked: Any) -> tuple[float, float]:
        return tolerance(side(sides[0]), side(sides[1]), [], Options(**asked))

    fp16 = PRECISIONS["fp16"]
    assert found("fp32", "fp16") == found("fp16", "fp32") == (fp16.rtol, fp16.atol)
    assert found("fp32", "fp32") == (PRECISIONS["fp32"].rtol, PRECISIONS["fp32"].atol)
    assert found("fp32", "fp16", rtol=0.25) == (0.25, fp16.atol)
    assert found("fp32", "fp16", atol=0.5) == (fp16.rtol, 0.5)
    assert found("fp32", "fp16", rtol=0.25, atol=0.0) == (0.25, 0.0)


@pytest.mark.parametrize(
    ("element", "shown"), [("INT8", "int8"), ("INT4", "int4"), ("FLOAT8E4M3FN", "fp8"), ("FLOAT4E2M1", "mxfp4")]
)
def test_the_tolerance_of_a_quantized_file_is_that_of_its_own_levels(element: str, shown: str, tmp_path: Path) -> None:
    kind = getattr(onnx.TensorProto, element)
    weight = onnx.helper.make_tensor("w", kind, [8, 4], np.ones(32))
    scale = onnx.numpy_helper.from_array(np.float32(0.1), "s")
    nodes = [
        onnx.helper.make_node("DequantizeLinear", ["w", "s"], ["d"], name="d"),
        onnx.helper.make_node("MatMul", ["x", "d"], ["y"], name="m"),
    ]
    ends = [onnx.helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, [1, k]) for n, k in (("x", 8), ("y", 4))]
    graph = onnx.helper.make_graph(nodes, "net", ends[:1], ends[1:], [weight, scale])
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 23)]), tmp_path / "net.onnx")
    side: Any = SimpleNamespace(precision="fp32", implicit_int8=False, spec="ort")
    found = tolerance(side, side, [Program("net", Graph(tmp_path / "net.onnx"))], Options())
    assert found == (PRECISIONS[shown].rtol, PRECISIONS[shown].atol)


# Grids --------------------------------------------------------------------------------------------------------------


def on(levels: Levels, *numbers: float, axis: int | None = None, **how: Any) -> list[float]:
    found: Tensor = levels.applied(torch.tensor(numbers).double(), axis, **how)
    assert found.shape == (len(numbers),)
    return found.tolist()


def test_a_symmetric_grid_ends_at_the_largest_magnitude_on_both_sides() -> None:
    """Two bits: −1, 0 and 1 times the largest; four levels from least to greatest without symmetry."""
    assert on(Levels(2, symmetric=True), -1.0, 0.4, 0.6, 4.0, -4.0, 2.1) == [0, 0, 0, 4, -4, 4]
    assert on(Levels(2), -1.0, 0.4, 0.6, 2.0) == [-1, 0, 1, 2]
    assert on(Levels(8, symmetric=True), -127.0, 63.4, 1.2) == [-127, 63, 1]
    assert on(Levels(8), 0.0, 255.0, 63.4) == [0, 255, 63]
    assert on(Levels(8), 100.0, 255.0, 63.4) == [100, 255, 63]  # 0 is on every grid


def test_a_grid_may_be_larger_or_cover_a_range_that_is_given() -> None:
    assert on(Levels(8), 0.0, 127.5, 0.6, scale_margin=2.0) == [0, 128, 1]
    assert on(Levels(8), 0.0, 10.0, 0.6, least=(0.0, 255.0)) == [0, 10, 1]
    assert on(Levels(8), 0.0, 10.2, 0.6, least=(-155.0, 100.0)) == [0, 10, 1]


def test_inf_is_cut_off_and_makes_no_grid_of_its_own() -> None:
    found = on(Levels(8), 0.0, 255.0, float("inf"), 63.4)
    assert found == [0, 255, 255, 63]


def test_channels_and_blocks_have_scales_of_their_own() -> None:
    weight = torch.tensor([[127.0, 63.4, 0.4, 0.6], [1.27, 0.634, 0.004, 0.006]]).double()
    whole = Levels(8, symmetric=True).applied(weight, 0)
    assert whole.tolist() == [[127, 63, 0, 1], [1, 1, 0, 0]]
    rows = Levels(8, symmetric=True, channels=True).applied(weight, 0)
    torch.testing.assert_close(rows[1], torch.tensor([1.27, 0.63, 0, 0.01]).double())
    columns = Levels(8, symmetric=True, channels=True).applied(weight, 1)
    torch.testing.assert_close(columns[:, 3], torch.tensor([0.6, 0.0047244]).double(), rtol=1e-4, atol=0)
    blocks = Levels(8, symmetric=True, block=2).applied(weight, 0)
    torch.testing.assert_close(blocks[0], torch.tensor([127, 63, 0.4, 0.6]).double(), rtol=0.01, atol=0)
    # Three rows of one column in blocks of two: the last block is short.
    down = Levels(8, symmetric=True, block=2, block_axis=0).applied(torch.tensor([[127.0], [63.4], [0.4]]).double(), 1)
    torch.testing.assert_close(down, torch.tensor([[127.0], [63], [0.4]]).double())


def test_levels_of_fp8_reach_its_largest_number() -> None:
    found = on(Levels(codec=E4M3), 448.0, 17.0, -3.3)
    assert found == [448, 16, -3.25]
    assert on(Levels(codec=E4M3), 4.48, 0.17, -0.033) == pytest.approx([4.48, 0.16, -0.0325])


def test_a_result_stands_for_its_tests() -> None:
    row = SimpleNamespace(name="conv")
    tests: Any = [
        SimpleNamespace(agrees=True, first_divergent=None, findings=["a"], layers="first"),
        SimpleNamespace(agrees=False, first_divergent=row, findings=["b", "c"], layers="second"),
    ]
    result: Any = BisectResult.__new__(BisectResult)
    result.tests = tests
    assert list(result) == tests
    assert result.first_divergent is row
    assert result.findings == ["a", "b", "c"]
    assert result.layers == "first"
    assert not result.agrees
    result.tests = tests[:1]
    assert result.agrees
    assert result.first_divergent is None


def test_a_row_in_a_word_says_why_where_it_knows() -> None:
    row: Any = SimpleNamespace(name="conv", op="Conv", verdict="guilty", why="")
    assert LayerRow.__repr__(row) == "<LayerRow conv (Conv): guilty>"
    row.why = "excess 70"
    assert LayerRow.__repr__(row) == "<LayerRow conv (Conv): guilty: excess 70>"


def test_layers_of_data_are_told_from_those_of_shapes_and_constants(tmp_path: Path) -> None:
    net = NetBuilder()
    net.op("Neg", "x", name="data")
    net.op("Neg", net.weight(np.ones(2, np.float32), "w"), name="made")
    net.op("Shape", "data", name="shape")
    net.op("Cast", "shape", name="cast", to=1)
    net.op("Add", "data", "made", name="y")
    graph = Graph(net.save(tmp_path / "net.onnx", {"x": (1, [2])}, ["y", "cast", "w"]))
    listed = all_layers([Program("net", graph)])
    assert {layer.onnx: layer.kind for layer in listed} == {
        "x": "data", "data": "data", "made": "constant", "shape": "shape", "cast": "shape", "y": "data", "w": "constant"
    }  # fmt: skip
    assert [layer.onnx for layer in layers_of([Program("net", graph)])] == ["x", "data", "y"]
    assert {layer.onnx: layer.op for layer in listed}["x"] == "input"
    assert [layer.index for layer in listed] == list(range(7))
