"""Small parts that much stands on: paths of modules, windows, sizes of weights, kinds of layers, flags in a remedy."""

from __future__ import annotations

import math
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from nets import NetBuilder
from rich.console import Console
from torch import nn

from cp_debug.backends.arithmetic import FP32
from cp_debug.backends.base import Program
from cp_debug.backends.codecs import E4M3
from cp_debug.backends.kernels.registry import Call
from cp_debug.backends.kernels.windows import Window, split_padding
from cp_debug.bisect.causes.findings import Explainer, _node_names, _some
from cp_debug.bisect.causes.layout import _same_rows
from cp_debug.bisect.causes.narrow_files import _of_data
from cp_debug.bisect.regions.hypotheses import _reduce
from cp_debug.bisect.regions.region import Region, region_of
from cp_debug.bisect.result import LayerRow, check_not_empty, has_no_elements
from cp_debug.detection.detection_change import DetectionChange
from cp_debug.errors import InputError
from cp_debug.graph.bodies import _scan_batch
from cp_debug.graph.constants import Constants
from cp_debug.graph.graph import Graph
from cp_debug.graph.onnx_tensors import array_of
from cp_debug.graph.opset import _keep_notes, converted
from cp_debug.graph.pairing import believable
from cp_debug.graph.surgery import tensor_bytes, unused_names
from cp_debug.probes.fingerprint import fingerprint
from cp_debug.probes.outputs import flatten_outputs
from cp_debug.probes.statistics import compare
from cp_debug.programs.layers import all_layers, layers_of
from cp_debug.programs.pairing_numbers import run_in_ort
from cp_debug.programs.torch_layers import channels, full_path, matches, own_path, select, weight_axis
from cp_debug.programs.weight_differences import weight_differences
from cp_debug.quantization.toggles import QuantizerRow
from cp_debug.reports.numbers import fixed, signed
from cp_debug.reports.quantization import layers


def test_paths_in_a_component_and_in_the_whole_model_lead_back() -> None:
    pairs = {
        ("head", "conv.0"): "head.conv.0",
        ("", "conv"): "conv",
        ("head", ""): "head",
        ("head", "/add"): "head/add",
    }
    for (prefix, own), whole in pairs.items():
        assert full_path(prefix, own) == whole
        assert own_path(prefix, whole) == own
    assert own_path("head", "headless.conv") == "less.conv"  # never asked: the prefix is a whole module's


def test_a_glob_means_a_layer_or_what_a_container_holds() -> None:
    assert matches("head.conv", "head")
    assert matches("head/add", "head")
    assert matches("head.conv.0", "*.conv")
    assert not matches("header.conv", "head")
    assert select(["a.x", "a.y", "b"], ["a", "*.y"]) == {"a.x": "a", "a.y": "*.y"}
    with pytest.raises(InputError, match=r"no layer matches 'a\.z'; the nearest names are"):
        select(["a.x", "b"], ["a.z"])


def test_output_channels_lie_along_the_axis_of_their_layer() -> None:
    for layer in (nn.Linear(3, 7), nn.Conv2d(3, 7, 2), nn.ConvTranspose2d(3, 7, 2)):
        assert channels(layer) == 7
        assert layer.weight.shape[weight_axis(layer)] == 7


# Windows ------------------------------------------------------------------------------------------------------------


def test_windows_that_are_padded_alike_at_both_ends() -> None:
    def window(*pads: int) -> Window:
        return Window((3, 3), (1, 2), (1, 1), pads[:2], pads[2:])

    assert window(1, 2, 1, 2).symmetric
    assert not window(1, 2, 2, 1).symmetric
    assert window(1, 2, 3, 4).torch_pads() == [2, 4, 1, 3]
    assert window(1, 2, 3, 4).torch_pads([10, 20]) == [2, 24, 1, 13]
    assert window(1, 0, 1, 0).output_size((8, 8)) == (8, 3)
    assert window(0, 0, 0, 0).output_size((8, 8), ceil=True) == (6, 4)
    assert window(0, 0, 0, 1).output_size((8, 6), ceil=True) == (6, 3)
    assert split_padding([3, 2], extra_at_end=True) == (1, 1, 2, 1)
    assert split_padding([3, 2], extra_at_end=False) == (2, 1, 1, 1)


# Graphs -------------------------------------------------------------------------------------------------------------


def test_a_weight_takes_its_elements_times_their_size() -> None:
    for dtype, size in ((np.float32, 4), (np.float16, 2), (np.int64, 8), (np.uint8, 1)):
        assert tensor_bytes(onnx.numpy_helper.from_array(np.zeros((3, 5), dtype))) == 15 * size


def test_new_names_are_those_that_nobody_has(tmp_path: Path) -> None:
    net = NetBuilder()
    net.op("Add", "x", net.weight(np.ones(1, np.float32), "w"), name="y")
    fresh = unused_names(Graph(net.save(tmp_path / "net.onnx", {"x": (1, [1])}, ["y"])))
    assert [fresh(n) for n in ("x", "w", "y", "node_y", "z", "z")] == ["x_", "w_", "y_", "node_y_", "z", "z_"]


def test_an_opset_is_one_that_the_converter_describes(tmp_path: Path) -> None:
    net = NetBuilder()
    net.op("Relu", "x", name="y")
    graph = Graph(net.save(tmp_path / "net.onnx", {"x": (1, [1])}, ["y"], opset=8))
    newest = onnx.defs.onnx_opset_version()
    assert [o.version for o in converted(graph.proto, graph, 7).opset_import] == [7]
    for opset in (6, newest + 1):
        with pytest.raises(InputError, match=f"--opset: {opset}; expected 7 to {newest}"):
            converted(graph.proto, graph, opset)


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


# Results ------------------------------------------------------------------------------------------------------------


def row(name: str, *shape: int) -> LayerRow:
    return LayerRow(0, "net", name, name, "Neg", compare(np.ones(shape), np.ones(shape)), "ok", True)


def test_a_verdict_about_nothing_is_refused() -> None:
    assert has_no_elements(row("a", 0, 3))
    assert not has_no_elements(row("a", 1, 3))
    check_not_empty("ort", [])
    check_not_empty("ort", [row("a", 0, 3), row("b", 1)])
    with pytest.raises(InputError, match=r"ort: no output was compared: a \(0×3\), b \(0\) without an element"):
        check_not_empty("ort", [row("a", 0, 3), row("b", 0)])


def explainer(implicit: bool) -> Any:
    made = Explainer.__new__(Explainer)
    made.notes = []
    run: Any = SimpleNamespace(
        implicit=implicit,
        quantized_names=lambda r: [f"{r.component}.{r.name}"],
        came_quantized=lambda component: False,
    )
    made.run = run
    return made


def test_layers_are_left_out_of_int8_by_the_flag_that_the_backend_has() -> None:
    assert explainer(False)._unquantized([row("a", 1)]) == "--skip-layers net.a"
    assert explainer(True)._unquantized([row("a", 1)]) == "--keep-fp32 net.a"
    several = explainer(False)._unquantized([row(name, 1) for name in ("a", "b c")])
    assert several == "--skip-layers net.a --skip-layers 'net.b c'", "as a shell takes them"


def test_a_cause_that_could_not_be_tried_is_told_once() -> None:
    made = explainer(False)
    for name in ("a", "a", "b"):
        made._failed(row(name, 1), ValueError("no room"))
    assert [note.partition(":")[0] for note in made.notes] == ["a", "b"]
    assert all("no room" in note for note in made.notes)


def test_a_remedy_names_nodes_a_regions_own_where_the_row_stands_for_one() -> None:
    rows = [row("a", 1), row("b", 1)]
    rows[1].region = Region(("n1", "n2"))
    assert _node_names(rows) == ["a", "n1", "n2"]
    assert _some(["a", "b"]) == "a, b"
    assert _some([str(i) for i in range(8)]) == "0, 1, 2, 3, 4, 5, 6, 7"
    assert _some([str(i) for i in range(11)]) == "0, 1, 2, 3, 4, 5, 6, 7 and 3 more"


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

    def engine(name: str, kind: str, nodes: list[str], output: str = "") -> Any:
        return SimpleNamespace(name=name, kind=kind, nodes=nodes, outputs=[SimpleNamespace(name=output)])

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


# Outputs and fingerprints -------------------------------------------------------------------------------------------


def test_outputs_are_named_by_where_they_stand() -> None:
    t = torch.zeros(1)
    assert list(flatten_outputs(t)) == ["output"]
    assert list(flatten_outputs((t, [t, None, 3], {"a": t, "b": (t, t)}))) == [
        "output_0", "output_1.0", "output_2.a", "output_2.b.0", "output_2.b.1"
    ]  # fmt: skip
    assert list(flatten_outputs({"b": t, "a": {"c": t}})) == ["b", "a.c"]


def test_a_fingerprint_counts_what_is_not_finite_and_measures_the_rest() -> None:
    x = torch.tensor([3.0, -torch.inf, 4.0, torch.nan, torch.inf, -torch.inf])
    found = fingerprint(x)
    assert found.special == (1, 1, 2)
    assert found.norm == pytest.approx(5)
    assert found.distance(fingerprint(x)) == 0
    assert found.distance(fingerprint(x[:5])) == float("inf")
    assert found.distance(fingerprint(torch.where(x == torch.inf, 0.0, x))) == float("inf")


def test_a_fingerprints_distance_is_relative_to_the_larger_one() -> None:
    """16 projections know it to a fifth."""
    generator = torch.Generator().manual_seed(0)
    distances = []
    for _ in range(20):
        x, d = torch.randn(2, 10_000, generator=generator).double()
        distances.append(fingerprint(x).distance(fingerprint(10 * x + 0.1 * d)))
        assert distances[-1] == fingerprint(10 * x + 0.1 * d).distance(fingerprint(x))
    assert np.mean(distances) == pytest.approx(0.9, rel=0.15)


# Definitions that faults alone reach --------------------------------------------------------------------------------


def test_rows_of_equal_numbers_are_taken_in_their_order() -> None:
    rows = torch.tensor([[1.0, 2.0], [3.0, 4.0], [1.0, 2.0], [5.0, 6.0]])
    order = _same_rows(rows, rows[[3, 0, 1, 2]])
    assert order is not None
    assert order.tolist() == [3, 0, 1, 2]
    assert _same_rows(rows, rows[[3, 0, 1, 1]]) is None  # one row twice, another gone
    assert _same_rows(rows, rows + 1) is None


@pytest.mark.parametrize(
    ("scale", "cause", "what"),
    [
        (1.0, "fp8-saturated", "25.00% are cut off at 448"), (0.5, "scale-stale", "50.00% are cut off at 224"),
        (4.0, "scale-stale", "25% lie below its normal numbers"),
    ],
)  # fmt: skip
def test_a_scale_that_is_not_that_of_its_data_is_told_with_what_it_costs(scale: float, cause: str, what: str) -> None:
    """E4M3 ends at 448, its normal numbers begin at 1/64."""
    x = torch.tensor([0.05, 10.0, 300.0, 900.0])
    found = _of_data(x, E4M3, 17, scale, 900 / 448)
    assert found.cause == cause
    assert found.says == (f"its data reaches 900, the file's FP8 scale {scale:.3g} is for {scale * 448:.4g}: {what}")
    assert found.fix.endswith("a scale of 2.01")
    assert found.evidence["needed_scale"] == pytest.approx(900 / 448)
    assert found.evidence["clipped"] == (0.5 if scale < 1 else 0.25 if scale == 1 else 0.0)
    assert found.evidence["below_normal"] == (0.25 if scale == 4 else 0.0)


def test_a_converted_graph_keeps_the_notes_of_its_nodes() -> None:
    def graph(*notes: str) -> onnx.GraphProto:
        nodes = []
        for place, note in enumerate(notes):
            node = onnx.helper.make_node("Neg", ["x"], [f"y{place}"])
            if note:
                node.metadata_props.add(key="source", value=note)
            nodes.append(node)
        return onnx.helper.make_graph(nodes, "net", [], [])

    new = graph("", "own", "")
    _keep_notes(graph("a", "b"), new)
    assert [[p.value for p in node.metadata_props] for node in new.node] == [["a"], ["own"], []]


def test_scan_of_opset_8_goes_over_each_entry_of_the_batch_by_itself() -> None:
    """Running sums; the second entry is two long, one input is read backwards."""

    def execute(body: Any, values: Any) -> Any:
        total, forward, backward = values
        return [total + forward, total * 10 + backward]

    body: Any = SimpleNamespace(outputs=["total", "mixed"])
    x = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    attributes: Any = {"num_scan_inputs": 2, "directions": [0, 1]}
    total, mixed = _scan_batch(body, execute, attributes, torch.tensor([3, 2]), [torch.tensor([0.0, 1.0]), x, x])
    assert total.tolist() == [6, 10]
    assert mixed.tolist() == [[3, 12, 31], [15, 54, 0]]
    attributes["directions"] = None
    total, mixed = _scan_batch(body, execute, attributes, None, [torch.tensor([0.0, 1.0]), x, x])
    assert total.tolist() == [6, 16]
    assert mixed.tolist() == [[1, 12, 33], [14, 55, 106]]


def test_what_is_known_to_onnx_runtime_alone_is_computed_by_it(tmp_path: Path) -> None:
    net = NetBuilder()
    net.op("Sub", "x", net.weight(np.float32([1, 2]), name="w"), name="y")
    graph = Graph(net.save(tmp_path / "n.onnx", {"x": (1, [2])}, ["y"]))
    (node,) = graph.nodes
    given = {"x": torch.tensor([5.0, 5.0])}
    found = run_in_ort(graph, Constants(graph), node, given, ["y"])
    assert found["y"].tolist() == [4, 3]
    assert run_in_ort(graph, Constants(graph), node, {"x": torch.zeros(3)}, ["y"]) == {}


@pytest.mark.parametrize(("divide", "keep"), [(True, 1), (False, 0)])
def test_reductions_round_each_partial_sum(divide: bool, keep: int) -> None:
    """2048 + 1 is 2048 in FP16."""
    node = onnx.helper.make_node("ReduceMean" if divide else "ReduceSum", ["x"], ["y"], axes=[1], keepdims=keep)
    x = torch.tensor([[2048.0, 1.0, 1.0, 2.0], [1.0, 1.0, 2.0, 4.0]])
    call: Any = Call.of(SimpleNamespace(proto=node, op=node.op_type, domain=""), 13, FP32, torch.device("cpu"))  # type: ignore[arg-type]
    found = _reduce(divide)(call, [x])
    assert found.shape == ((2, 1) if keep else (2,))
    assert found.flatten().tolist() == ([512.5, 2.0] if divide else [2050.0, 8.0])


# What is printed ----------------------------------------------------------------------------------------------------


def test_what_rounds_to_zero_has_no_minus() -> None:
    assert [signed(v) for v in (-0.00001, -0.0, 0.00001, -0.00006)] == ["+0.0000", "+0.0000", "+0.0000", "-0.0001"]
    assert [fixed(v, 1) for v in (-0.04, -0.06, math.nan)] == ["0.0", "-0.1", "–"]
    change = DetectionChange(3, 0, 0, mean_score=-0.0)
    assert "+0 on average" in str(change)


def quantizer(name: str, amax: float | tuple[float, float] | None, why: str = "") -> QuantizerRow:
    return QuantizerRow(name, 8, 0 if isinstance(amax, tuple) else None, amax, not why, why)


@pytest.mark.parametrize("width", [60, 80])
def test_a_quantized_layer_is_one_row_with_its_whole_name(width: int) -> None:
    rows = [
        quantizer("pts_bbox_head.heads.0.conv.input_quantizer", 9.47),
        quantizer("pts_bbox_head.heads.0.conv.weight_quantizer", (0.0273, 0.154)),
        quantizer("pts_bbox_head.heads.0.conv.output_quantizer", None, "what reads this output quantizes it"),
        quantizer("pts_bbox_head.out.input_quantizer", None, "skipped by 'out'"),
        quantizer("pts_bbox_head.out.weight_quantizer", None, "skipped by 'out'"),
        quantizer("stem.input_quantizer", 1.5),
        quantizer("stem.weight_quantizer", (0.1, 0.2), "switched off"),
    ]
    console = Console(width=width, file=StringIO(), color_system=None)
    for part in layers(rows):
        console.print(part)
    told = console.file.getvalue()  # type: ignore[attr-defined]
    names = ("pts_bbox_head.heads.0.conv ", "pts_bbox_head.out ") if width == 80 else ("pts_", "0.conv ")
    for whole in (*names, "9.47", "0.0273 … 0.154", "skipped", "switched", "3 quantizers on in 3 layers"):
        assert whole in told
    assert "output_quantizer" not in told
    assert max(map(len, told.splitlines())) <= width


# Weights of gigabytes -----------------------------------------------------------------------------------------------


def test_weights_are_read_once_for_their_digests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    net = NetBuilder()
    net.op("Conv", "x", net.weight(np.ones((4, 3, 3, 3), np.float32), "w"), name="y")
    net.op("Conv", "y", net.weight(np.full((4, 4, 3, 3), 2, np.float32), "v"), name="z")
    ours, theirs = (Graph(net.save(tmp_path / name, {"x": (1, [1, 3, 8, 8])}, ["z"])) for name in ("a.onnx", "b.onnx"))
    read: list[tuple[int, str]] = []
    initializer = Graph.initializer
    monkeypatch.setattr(Graph, "initializer", lambda g, n: read.append((id(g), n)) or initializer(g, n))
    assert believable(ours, theirs)
    assert weight_differences(ours, theirs).compared == 2
    assert weight_differences(ours, theirs).compared == 2
    assert sorted(read) == sorted({(id(graph), name) for graph in (ours, theirs) for name in ("w", "v")})


@pytest.mark.parametrize("kind", ["FLOAT", "FLOAT16", "BFLOAT16", "FLOAT8E4M3FN", "INT64", "BOOL", "INT4", "COMPLEX64"])
def test_external_data_of_any_type_is_what_onnx_reads(kind: str, tmp_path: Path) -> None:
    number = onnx.TensorProto.DataType.Value(kind)
    values = np.arange(-6, 6).reshape(3, 4).astype(onnx.helper.tensor_dtype_to_np_dtype(number))
    inline = onnx.numpy_helper.from_array(values, "w")
    assert inline.data_type == number
    outside = onnx.TensorProto(name="w", data_type=number, dims=inline.dims, data_location=onnx.TensorProto.EXTERNAL)
    (tmp_path / "w.bin").write_bytes(b"12345678" + inline.raw_data + b"behind")
    for key, value in (("location", "w.bin"), ("offset", "8"), ("length", str(len(inline.raw_data)))):
        outside.external_data.add(key=key, value=value)
    found = array_of(outside, tmp_path / "net.onnx")
    assert found.dtype == values.dtype
    assert found.tobytes() == values.tobytes()
