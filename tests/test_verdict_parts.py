"""Parts of the way to a verdict by themselves, each against what is known beforehand."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from faults import edits
from faults.edits import Editor
from nets import NetBuilder
from onnx import TensorProto, helper
from torch import nn

from cp_debug.backends.arithmetic import FP16, FP32, FP64
from cp_debug.backends.codecs import E2M1, E4M3, E5M2
from cp_debug.backends.executor import Executor
from cp_debug.backends.rounding import round_fp16
from cp_debug.backends.scaling import Encoded
from cp_debug.bisect.branches import in_words
from cp_debug.bisect.int8_notes import both_int8
from cp_debug.bisect.narrow_variants import departures
from cp_debug.bisect.operator_errors import ANY, ONNX_RUNTIME, TORCH
from cp_debug.bisect.result_diff import LayerState, TestDiff
from cp_debug.errors import InputError
from cp_debug.graph.constants import Constants
from cp_debug.graph.graph import Graph
from cp_debug.graph.input_values import ways
from cp_debug.graph.integer_values import unscaled_levels
from cp_debug.probes.distance import distance, relative_l2
from cp_debug.probes.statistics_cuda import source_of
from cp_debug.programs.folded import Folded
from cp_debug.programs.pipeline import as_declared
from cp_debug.programs.precision import coarsest, oracle_for
from cp_debug.programs.scope_names import enclosing_modules, module_values
from cp_debug.programs.torch_layers import is_quantized

# Numbers and arithmetic ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("codec", [E4M3, E5M2, E2M1], ids=lambda c: c.name)
def test_codes_stop_at_the_largest_number_on_both_sides(codec: Any) -> None:
    x = torch.tensor([0.0, 1.0, -1.0, codec.largest, 3 * codec.largest, -3 * codec.largest, codec.smallest / 8])
    expected = [0.0, 1.0, -1.0, codec.largest, codec.largest, -codec.largest, 0.0]
    assert codec(x).tolist() == expected
    assert codec(torch.tensor([float("nan")])).isnan().all()


def test_only_floats_are_rounded() -> None:
    whole = torch.tensor([70001, -3])
    assert torch.equal(round_fp16(whole), whole)
    assert round_fp16(torch.tensor([1 + 2**-12, 70000.0], dtype=torch.float64)).tolist() == [1.0, float("inf")]


@pytest.mark.parametrize(
    ("reference", "test", "oracle"),
    [("fp32", "fp32", "fp64"), ("fp64", "fp32", "fp64"), ("fp32", "fp16", "fp32"), ("fp32", "tf32", "fp32"),
     ("bf16", "fp32", "fp32")],
)  # fmt: skip
def test_the_oracle_is_finer_than_what_is_judged(reference: str, test: str, oracle: str) -> None:
    assert oracle_for(reference, test) == oracle
    assert coarsest(reference, None, test).name == (test if reference in ("fp32", "fp64") else reference)


def test_scales_of_rows_change_with_the_operand_and_one_scale_for_all_stays() -> None:
    codes = torch.arange(6.0).reshape(2, 3)
    rows = torch.tensor([[2.0], [3.0]])
    changed = Encoded(codes, None, rows).mapped(torch.t)
    assert torch.equal(changed.values, (codes * rows).T)
    one = Encoded(codes, rows.expand(2, 3), torch.tensor(5.0)).mapped(torch.t)
    assert one.coarse.dim() == 0
    assert torch.equal(one.values, (codes * rows).T * 5)


def test_errors_of_unknown_implementations_are_no_smaller_than_those_that_were_measured() -> None:
    for op, known in ANY.items():
        for table in (ONNX_RUNTIME, TORCH):
            one = table.get(op)
            if one is not None:
                assert known.relative >= one.relative, op
                assert known.absolute >= one.absolute, op
                assert not one.absolute or known.of == (ONNX_RUNTIME[op].of if ONNX_RUNTIME[op].absolute else one.of), (
                    op
                )


def test_distances_leave_out_what_neither_side_has_as_a_number() -> None:
    import ml_dtypes

    ours, theirs = np.array([1.0, 2.0, np.nan]), np.array([1.0, 4.0, np.nan])
    apart = distance(ours, theirs)
    assert (apart.difference, apart.new_nonfinite) == (2.0, 0)
    assert apart.whole == pytest.approx(17**0.5)
    assert distance(np.array([np.inf, 1.0]), np.ones(2)).new_nonfinite == 1
    for kind in (ml_dtypes.float8_e4m3fn, ml_dtypes.float4_e2m1fn, np.uint16, np.float16):
        assert relative_l2(np.array([1, 2], kind), np.array([1, 4], kind)) == pytest.approx(2 / 17**0.5)
    assert relative_l2(np.ones(2), np.ones(3)) == float("inf")


def test_blocks_of_a_long_tensor_add_up() -> None:
    count = (1 << 20) + 5  # FP16 goes by blocks
    ours, theirs = np.ones(count, np.float16), np.full(count, 0.5, np.float16)
    assert relative_l2(ours, theirs) == pytest.approx(1.0)


def test_the_gpu_kernel_is_told_which_types_it_reads() -> None:
    text = source_of(0, 1)
    assert text.startswith("#define REF_KIND 0\n#define TEST_KIND 1\n")
    assert source_of(1, 0) != text


# Operators ----------------------------------------------------------------------------------------------------------


def one_node(folder: Path, op: str, inputs: dict[str, np.ndarray], domain: str = "", **attributes: Any) -> Graph:
    """A graph of one node that reads ``inputs`` in their order and gives y."""
    node = helper.make_node(op, list(inputs), ["y"], name="node", domain=domain, **attributes)
    given = [
        helper.make_tensor_value_info(n, helper.np_dtype_to_tensor_dtype(a.dtype), a.shape) for n, a in inputs.items()
    ]
    graph = helper.make_graph([node], "g", given, [helper.make_tensor_value_info("y", 1, None)])
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets), folder / "one.onnx")
    return Graph(folder / "one.onnx")


def test_a_bias_is_added_rounded_and_then_the_skip(tmp_path: Path) -> None:
    arrays = {"x": np.float32([[2048.0]]), "bias": np.float32([1.0]), "skip": np.float32([[0.25]])}
    graph = one_node(tmp_path, "BiasAdd", arrays, "com.microsoft")
    assert Executor(graph, FP64).run(arrays)["y"].item() == 2049.25
    assert Executor(graph, FP16).run(arrays)["y"].item() == 2048.0


@pytest.mark.parametrize(("fmod", "expected"), [(1, [1.5, -1.5]), (0, [1, 2])])
def test_remainders_have_the_sign_of_the_dividend_or_of_the_divisor(
    tmp_path: Path, fmod: int, expected: list[float]
) -> None:
    a, b = ([5.5, -5.5], [4, 4]) if fmod else ([5, -2], [4, 4])
    kind = np.float32 if fmod else np.int64
    arrays = {"a": np.array(a, kind), "b": np.array(b, kind)}
    found = Executor(one_node(tmp_path, "Mod", arrays, fmod=fmod), FP32).run(arrays)["y"]
    assert found.tolist() == expected


@pytest.mark.parametrize("op", ["ReduceL2", "ReduceL1", "ReduceSumSquare", "ReduceLogSum", "ReduceLogSumExp"])
def test_reductions_of_numbers_that_are_not_one(tmp_path: Path, op: str) -> None:
    x = np.float32([[3.0, 4.0], [0.5, 2.0]])
    arrays = {"x": x}
    want = {
        "ReduceL2": np.sqrt((x * x).sum(1)), "ReduceL1": np.abs(x).sum(1), "ReduceSumSquare": (x * x).sum(1),
        "ReduceLogSum": np.log(x.sum(1)), "ReduceLogSumExp": np.log(np.exp(x).sum(1)),
    }[op]  # fmt: skip
    graph = one_node(tmp_path, op, arrays, axes=[1], keepdims=0)
    assert np.allclose(Executor(graph, FP64).run(arrays)["y"].numpy(), want, rtol=1e-6)


def test_a_value_that_nobody_gave_is_named(tmp_path: Path) -> None:
    net = NetBuilder()
    net.op("Relu", net.op("Neg", "x", name="mid"), name="y")
    executor = Executor(Graph(net.save(tmp_path / "n.onnx", {"x": (1, [2])}, ["y"])), FP32)
    assert executor.run_nodes([], {"mid": np.float32([1, 2])}, ["mid"])["mid"].tolist() == [1, 2]
    with pytest.raises(InputError, match="value 'mid' is needed, but neither given nor computed"):
        executor.run_nodes([], {}, ["mid"])


# Graphs -------------------------------------------------------------------------------------------------------------


def test_constants_are_found_in_initializers_and_in_nodes(tmp_path: Path) -> None:
    net = NetBuilder()
    net.weight(np.float32([1, 2, 3]), "w")
    net.nodes.append(
        helper.make_node("Constant", [], ["c"], name="c", value=onnx.numpy_helper.from_array(np.float32([[4, 5, 6]])))
    )
    net.op("Add", net.op("Add", "x", "w", name="s"), "c", name="y")
    constants = Constants(Graph(net.save(tmp_path / "n.onnx", {"x": (1, [1, 3])}, ["y"])))
    assert ["w" in constants, "c" in constants, "x" in constants, "s" in constants] == [True, True, False, False]
    assert (constants["w"].tolist(), constants["c"].tolist()) == ([1, 2, 3], [[4, 5, 6]])
    assert (constants.size("w"), constants.size("c"), constants.names) == (3, 3, ["w", "c"])
    assert constants.digest("w") == constants.digest("w")
    assert constants.digest("w") != constants.digest("c")


def test_side_values_that_no_probe_shows_are_computed_from_the_shapes_of_the_run(tmp_path: Path) -> None:
    net = NetBuilder()
    shape = net.op("Shape", net.op("Relu", "x", name="mid"), name="shape")
    net.op("Reshape", "mid", net.op("Neg", net.op("Neg", shape, name="n"), name="same"), name="y")
    graph = Graph(net.save(tmp_path / "n.onnx", {"x": (1, [2, "n"])}, ["y"]))
    folded = Folded(graph, exposed=["mid", "y"])
    for name, array in (("x", np.zeros((2, 9))), ("mid", np.zeros((2, 5), np.float32)), ("y", np.zeros((2, 7)))):
        folded.see(name, array)
    assert {name: value.tolist() for name, value in folded.values()} == {
        "shape": [2, 5], "n": [-2, -5], "same": [2, 5],
    }  # fmt: skip


def test_modules_are_read_off_the_names_that_an_exporter_wrote(tmp_path: Path) -> None:
    assert enclosing_modules("/backbone/blocks.0/blocks.0.3/Conv") == [
        "backbone",
        "backbone.blocks.0",
        "backbone.blocks.0.3",
    ]
    scopes = "['', 'head', 'head.conv', 'aten.conv']"

    def made(text: str, outputs: tuple[str, ...] = ("y",)) -> dict[str, str]:
        net = NetBuilder()
        net.op("Relu", net.op("Neg", "x", name="mid"), name="y")
        for node in net.nodes:
            node.metadata_props.add(key="pkg.torch.onnx.name_scopes", value=text)
        return module_values(Graph(net.save(tmp_path / "n.onnx", {"x": (1, [2])}, list(outputs))))

    assert made(scopes) == {"head": "y", "head.conv": "y"}
    assert made(scopes, ("y", "mid")) == {}  # two values leave
    for strange in ("7", "not python", "{'a': 1}"):
        assert made(strange) == {}


def test_levels_whose_scale_no_constant_tells_are_no_numbers(tmp_path: Path) -> None:
    net = NetBuilder()
    net.op("Relu", net.op("Neg", "x", name="mid"), name="y")
    plain = Graph(net.save(tmp_path / "plain.onnx", {"x": (1, [2])}, ["y"]))
    net = NetBuilder()
    net.op("Cast", "x", name="levels", to=TensorProto.INT8)
    net.op("Cast", "levels", name="y", to=TensorProto.FLOAT)
    graph = Graph(net.save(tmp_path / "int8.onnx", {"x": (1, [2])}, ["y"]))
    assert unscaled_levels(plain, graph, {"levels": "mid", "y": "y", "lost": "mid"}) == {"levels"}


def test_another_epsilon_leaves_the_other_attributes(tmp_path: Path) -> None:
    net = NetBuilder()
    for name in ("scale", "bias"):
        net.weight(np.ones(4, np.float32), name)
    net.op("LayerNormalization", "x", "scale", "bias", name="y", axis=-1, epsilon=1e-5)
    path = net.save(tmp_path / "n.onnx", {"x": (1, [2, 4])}, ["y"])
    editor = Editor(path)
    edits.epsilon(editor, "y", 1e-2)
    found = {a.name: a.i or a.f for a in editor.node("y").attribute}
    assert found == {"axis": -1, "epsilon": pytest.approx(1e-2)}


# Words and small decisions ------------------------------------------------------------------------------------------


def test_control_flow_is_told_by_branches_and_by_counts() -> None:
    assert in_words("If", "/a", "then_branch", "else_branch") == (
        "If /a takes else_branch, on the reference it takes then_branch"
    )
    assert in_words("Loop", "/b", 3, 4) == "Loop /b runs 4 times, on the reference it runs 3 times"


def test_both_sides_are_int8_only_where_both_are() -> None:
    def backend(precision: str) -> Any:
        return SimpleNamespace(precision=precision, spec="ort", emulated=False)

    pairs = [(a, b) for a in ("int8", "fp32") for b in ("int8", "fp32")]
    assert [both_int8(backend(a), backend(b)) for a, b in pairs] == [True, False, False, False]


def test_a_module_is_quantized_by_any_quantizer() -> None:
    TensorQuantizer = type("TensorQuantizer", (nn.Module,), {})
    plain = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    assert not is_quantized(plain)
    plain[0].add_module("input_quantizer", TensorQuantizer())
    assert is_quantized(plain)


def test_departures_are_looked_for_from_narrow_precisions_only(tmp_path: Path) -> None:
    net = NetBuilder()
    net.op("Relu", "x", name="y")
    graph = Graph(net.save(tmp_path / "n.onnx", {"x": (1, [2])}, ["y"]))
    assert [departures(graph, claim, "cpu") is not None for claim in ("fp32", "fp16", "fp8", "mxfp4")] == [
        False, False, True, True,
    ]  # fmt: skip


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


# Made-up inputs -----------------------------------------------------------------------------------------------------


def made(folder: Path, op: str, kind: int = TensorProto.FLOAT, **attributes: Any) -> np.ndarray:
    """What is made up first for an input of 64 elements that ``op`` reads."""
    net = NetBuilder()
    net.op(op, "x", name="y", **attributes)
    graph = Graph(net.save(folder / "n.onnx", {"x": (kind, [4, 16])}, ["y"]))
    way = ways(graph, graph.inputs[0]).ways[0]
    return np.asarray(way.make(np.random.default_rng(0), (4, 16), 99))


@pytest.mark.parametrize(
    ("op", "low", "high"),
    [("Log", 0, np.inf), ("Sqrt", 0, np.inf), ("Acosh", 1, np.inf), ("Atanh", -1, 1), ("Asin", -1, 1), ("Acos", -1, 1)],
)
def test_made_up_numbers_lie_where_the_function_has_a_value(tmp_path: Path, op: str, low: float, high: float) -> None:
    values = made(tmp_path, op)
    assert ((low < values) & (values < high)).all()
    assert len(np.unique(values)) == 64  # they differ


def test_made_up_integers_fill_the_range_of_their_type(tmp_path: Path) -> None:
    for kind, low, high in (
        (TensorProto.INT8, -128, 127),
        (TensorProto.UINT8, 0, 255),
        (TensorProto.INT16, -32768, 32767),
    ):
        values = made(tmp_path, "Identity", kind)
        assert (values >= low).all()
        assert (values <= high).all()
        assert values.max() - values.min() > 0.7 * (high - low)
    assert set(np.unique(made(tmp_path, "Not", TensorProto.BOOL))) == {0, 1}


def test_inputs_of_another_file_have_the_float_type_that_it_declares(tmp_path: Path) -> None:
    net = NetBuilder()
    net.op("Add", net.op("Cast", "half", to=TensorProto.FLOAT), net.op("Cast", "whole", to=TensorProto.FLOAT), name="y")
    inputs = {"half": (TensorProto.FLOAT16, [2]), "whole": (TensorProto.INT64, [2])}
    graph = Graph(net.save(tmp_path / "n.onnx", inputs, ["y"]))
    given = {"half": np.float32([1, 2]), "whole": np.array([3, 4]), "other": np.float32([5])}
    found = as_declared(graph, given)
    assert {n: a.dtype for n, a in found.items()} == {"half": np.float16, "whole": np.int64, "other": np.float32}
    assert all(np.array_equal(found[n], given[n]) for n in given)
    levels = as_declared(graph, {"half": np.array([1, 2])})["half"]
    assert levels.dtype == np.int64  # whoever gives integers is told, not served
