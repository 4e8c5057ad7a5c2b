"""Small parts of programs and of quantization, with results worked out by hand: factors, settings, names, levels."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from cp_debug.backends.narrow_options import NarrowOptions
from cp_debug.deploy.engines import check_engines
from cp_debug.errors import InputError
from cp_debug.files import file_hash
from cp_debug.graph.graph import Graph, Node
from cp_debug.mixed_precision import activation_reuse, fusion_groups
from cp_debug.mixed_precision.predict import enough_of
from cp_debug.programs import node_differences, scope_names
from cp_debug.programs.align import module_digest
from cp_debug.programs.attribute_meaning import says_nothing
from cp_debug.programs.export import _reason
from cp_debug.programs.pipeline import choose_export, merge_settings, settings_by_component
from cp_debug.programs.precision import PRECISIONS, coarser, of_operators
from cp_debug.quantization import amax_checkpoint, histogram, narrow_layers
from cp_debug.quantization.awml_names import also_named
from cp_debug.quantization.calibration import _frozen
from cp_debug.quantization.nested_batches import tensors_only
from cp_debug.quantization.qat import _stale, _unfreeze


def node_of(folder: Path, op: str, inputs: list[str], **attributes: Any) -> Node:
    """A node that reads ``x`` of any shape and weights ``w`` [6, 4, 1, 1] or [6, 4]."""
    shape = (6, 4) if op in ("Gemm", "MatMul") else (6, 4, 1, 1)
    weights = [numpy_helper.from_array(np.zeros(shape, np.float32), name) for name in inputs if name != "x"]
    values = [helper.make_tensor_value_info("x", TensorProto.FLOAT, None)]
    graph = helper.make_graph(
        [helper.make_node(op, inputs, ["y"], **attributes)],
        "g",
        values,
        [helper.make_empty_tensor_value_info("y")],
        weights,
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), folder / "g.onnx")
    return Graph(folder / "g.onnx").nodes[0]


def test_settings_of_all_components_stand_once() -> None:
    settings = {"a": {"threads": 1, "level": "all", "fast": True}, "b": {"threads": 1, "level": "none"}}
    merged = merge_settings(settings)
    assert merged == {"threads": 1, "components": {"a": {"level": "all", "fast": True}, "b": {"level": "none"}}}
    assert settings_by_component(merged) == settings
    assert merge_settings({"a": {"threads": 1}, "b": {"threads": 1}}) == {"threads": 1}
    assert settings_by_component({"threads": 1}) == {"": {"threads": 1}}


def test_an_export_is_what_the_oldest_reader_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    backends: Any = [SimpleNamespace(spec=name, opset=opset) for name, opset in (("a", None), ("b", 17), ("c", 13))]
    monkeypatch.setattr("cp_debug.programs.pipeline.wants_int8", lambda backend: backend.spec == "b")
    monkeypatch.setattr("cp_debug.programs.pipeline.largest_opset", lambda backend: backend.opset)
    plain, nothing = choose_export(backends[:1], None)
    assert (plain.exporter, plain.fused, nothing) == ("dynamo", False, None)
    chosen, note = choose_export(backends, None)
    assert (chosen.exporter, chosen.opset, chosen.fused) == ("torchscript", 13, True)
    assert note == "exported with torchscript at opset 13, up to which c reads ONNX"
    assert choose_export(backends, "dynamo")[0].exporter == "dynamo"
    assert choose_export([backends[0], backends[2]], None)[0].fused is False


def test_the_reason_of_a_failed_export_is_its_first_cause() -> None:
    error = RuntimeError("outer")
    error.__cause__ = ValueError("\n  inner  \nmore")
    assert _reason(error) == "ValueError: inner"
    assert _reason(ValueError("")) == "ValueError"


@pytest.mark.parametrize(
    ("a", "b", "name"),
    [("fp32", "fp16", "fp16"), ("bf16", "fp16", "bf16"), ("fp32", "fp32", "fp32"), ("tf32", "fp32", "tf32")],
)
def test_two_results_agree_as_well_as_the_coarser_precision(a: str, b: str, name: str) -> None:
    assert coarser(a, b).name == coarser(b, a).name == name


def test_limits_of_precisions_are_those_of_their_types() -> None:
    for name, kind in (("fp32", torch.float32), ("fp16", torch.float16), ("bf16", torch.bfloat16)):
        found, info = PRECISIONS[name], torch.finfo(kind)
        assert found.roundoff == info.eps / 2
        assert found.largest == pytest.approx(info.max, rel=1e-6)
        assert found.tiniest == pytest.approx(info.tiny, rel=1e-6)
    assert PRECISIONS["fp8:e5m2"].roundoff == 2 * PRECISIONS["fp8"].roundoff


def test_only_products_are_narrow() -> None:
    assert of_operators("fp32", ["Relu"]) == "fp32"
    assert of_operators("int4", ["Relu", "MatMul"]) == "int4"
    assert of_operators("int4", ["Conv"]) == NarrowOptions.parse("int4").out
    assert of_operators("fp8", ["Conv"]) == "fp8"
    assert of_operators("fp8", ["Relu"]) == NarrowOptions.parse("fp8").out


@pytest.mark.parametrize(
    ("op", "roles"),
    [
        ("Conv", ["weights", "weights", "bias"]),
        ("MatMul", ["weights", "weights"]),
        ("LSTM", ["", "weights", "weights", "bias", ""]),
        ("BatchNormalization", ["parameters", "parameters", "parameters", "statistics", "statistics"]),
        ("QuantizeLinear", ["weights", "scale", "zero", ""]),
        ("Relu", [""]),
    ],
)
def test_what_a_node_reads_has_a_role(op: str, roles: list[str]) -> None:
    node: Any = SimpleNamespace(op=op)
    assert [node_differences.role_of_constant(node, place) for place in range(len(roles))] == roles


@pytest.mark.parametrize(
    ("op", "name", "value", "nothing"),
    [
        ("Conv", "pads", [0, 0, 0, 0], True),
        ("Conv", "pads", [0, 1, 0, 0], False),
        ("Conv", "strides", [1, 1], True),
        ("Conv", "strides", [1, 2], False),
        ("Conv", "dilations", [0, 1], False),
        ("Transpose", "perm", [2, 1, 0], True),
        ("Transpose", "perm", [0, 1, 2], False),
        ("LSTM", "activations", [b"sigmoid", b"TANH", b"Tanh"], True),
        ("LSTM", "activations", [b"Sigmoid", b"Relu", b"Tanh"], False),
        ("GRU", "activations", [b"Sigmoid", b"Tanh", b"Sigmoid", b"Tanh"], True),
        ("Conv", "group", 1, False),
    ],
)
def test_an_attribute_that_says_its_default_says_nothing(op: str, name: str, value: Any, nothing: bool) -> None:
    given = node_differences._plain_value(value)
    assert says_nothing(op, name, given, None) is nothing
    assert says_nothing(op, name, None, given) is nothing
    assert not says_nothing(op, name, given, given)


def test_values_are_shown_with_six_digits() -> None:
    assert node_differences._shown(1 / 3) == "0.333333"
    assert node_differences._shown(None) == "not given"
    assert node_differences._shown([1, 2]) == "[1, 2]"
    assert node_differences._plain_value([b"a", 2, 3.5]) == ["a", 2, 3.5]
    assert node_differences._plain_value(numpy_helper.from_array(np.arange(2))).tolist() == [0, 1]


def test_inputs_that_were_attributes_have_their_names(tmp_path: Path) -> None:
    clip = node_of(tmp_path, "Clip", ["x", "a", "b"])
    assert [node_differences.argument_of(clip, place) for place in range(4)] == [None, "min", "max", None]


def test_modules_are_named_as_torchscript_nests_them() -> None:
    called = {"layers", "layers.0", "layers.0.conv", "head.1"}
    assert scope_names._torchscript_scope("layers.0.conv", called) == "/layers/layers.0/conv"
    assert scope_names._torchscript_scope("head.1", called) == "/head.1"
    assert scope_names._torchscript_scope("layers.0.conv", {"layers.0.conv"}) == "/conv"
    assert scope_names._torchscript_scope("layers.0.1", {"layers.0.1"}) == "/layers.0.1"


@pytest.mark.parametrize(
    ("text", "names"),
    [("['a', 'b.c']", ["a", "b.c"]), ("('a',)", []), ("a", []), ("[1]", ["1"]), ("[" * 5000, []), ("'a'", [])],
    ids=["list", "tuple", "name", "number", "deep", "text"],
)
def test_dynamos_scopes_are_lists_of_names(text: str, names: list[str]) -> None:
    assert scope_names._listed(text) == names


def test_a_digest_changes_with_names_values_and_buffers() -> None:
    def net() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2))

    first, same, moved, named = net(), net(), net(), nn.Sequential(*reversed([*net()]))
    moved[1].running_mean += 1  # type: ignore[index, union-attr]
    assert module_digest(first) == module_digest(same)
    assert len({module_digest(each) for each in (first, moved, named)}) == 3
    assert len(module_digest(first)) == 64


def test_layers_are_taken_until_the_rest_keeps_the_limit() -> None:
    alone = {"a": 3.0, "b": 4.0, "c": 12.0}.__getitem__
    assert enough_of("cba", 13.0, alone, 13.0) == []
    assert enough_of("cba", 13.0, alone, 5.0) == ["c"]  # 13² − 12² = 5²
    assert enough_of("cba", 13.0, alone, 4.9) == ["c", "b"]
    assert enough_of("cba", 13.0, alone, 3.0) == ["c", "b"]
    assert enough_of("cba", 13.0, alone, 1.0, squares=False) == ["c"]
    assert enough_of("cba", 13.0, alone, 0.9, squares=False) == ["c", "b"]
    assert enough_of("abc", 13.0, alone, -99.0) == ["a", "b", "c"]


def test_tensors_are_the_same_where_they_are_one_object() -> None:
    ones = torch.ones(2)
    assert activation_reuse._same(ones, ones)
    assert not activation_reuse._same(ones, torch.ones(2))
    assert activation_reuse._same((1, "a"), (1, "a"))
    assert not activation_reuse._same(1, ones)
    versions = activation_reuse._versions([ones, {"a": torch.zeros(1)}, 3])
    ones += 1
    assert [after - before for before, after in zip(versions, activation_reuse._versions([ones]), strict=False)] == [1]


@pytest.mark.parametrize(
    ("precision", "opset"), [("fp8", 19), ("fp8:block", 21), ("int4", 21), ("mxfp8", 21), ("mxfp4", 23), ("nvfp4", 23)]
)
def test_the_oldest_opset_that_can_say_a_precision(precision: str, opset: int) -> None:
    assert narrow_layers.opset_of(NarrowOptions.parse(precision)) == opset


def test_input_channels_of_a_layer(tmp_path: Path) -> None:
    weight, matrix = torch.zeros(6, 4, 1, 1), torch.zeros(6, 4)
    assert narrow_layers._channels(node_of(tmp_path, "Conv", ["x", "w"]), weight) == 4
    assert narrow_layers._channels(node_of(tmp_path, "ConvTranspose", ["x", "w"], group=2), weight) == 3
    assert narrow_layers._channels(node_of(tmp_path, "MatMul", ["x", "w"]), matrix) == 6
    assert narrow_layers._channels(node_of(tmp_path, "Gemm", ["x", "w"]), matrix) == 6
    assert narrow_layers._channels(node_of(tmp_path, "Gemm", ["x", "w"], transB=1), matrix) == 4


def test_layers_that_a_format_cannot_hold(tmp_path: Path) -> None:
    grouped = node_of(tmp_path, "ConvTranspose", ["x", "w"], group=2)
    by_channel = NarrowOptions.parse("fp8:channel")
    assert by_channel.granularity == "channel"
    assert "grouped ConvTranspose" in narrow_layers._unsuited(grouped, torch.zeros(6, 4, 1, 1), by_channel)
    plain = node_of(tmp_path, "ConvTranspose", ["x", "w"])
    assert not narrow_layers._unsuited(plain, torch.zeros(6, 4, 1, 1), by_channel)
    assert not narrow_layers._unsuited(grouped, torch.zeros(6, 4, 1, 1), NarrowOptions.parse("fp8"))
    assert narrow_layers._unsuited(plain, torch.zeros(6), by_channel) == "its weight has no matrix"
    conv, blocks = node_of(tmp_path, "Conv", ["x", "w"], group=2), NarrowOptions.parse("mxfp8")
    assert narrow_layers._unsuited(conv, torch.zeros(6, 48, 1, 1), blocks).endswith(
        "48 channels are no multiple of a block of 32"
    )
    assert not narrow_layers._unsuited(conv, torch.zeros(6, 64, 1, 1), blocks)
    assert not narrow_layers._unsuited(conv, torch.zeros(6, 32, 1, 1), blocks)
    assert not narrow_layers._unsuited(conv, torch.zeros(6, 20, 1, 1), blocks)


def test_a_block_has_the_number_of_its_first_element() -> None:
    spread = torch.tensor([[1.0, 1, 2, 2, 3]])
    assert narrow_layers._first_of_blocks(spread, 1, 2).tolist() == [[1, 2, 3]]


def test_least_squares_take_the_limit_that_costs_least() -> None:
    rng = np.random.default_rng(0)
    values = np.abs(rng.standard_normal(20_000))
    values[0] = 40
    counts, edges = np.histogram(values, bins=4096, range=(0, 40))
    limit = histogram._least_squares(counts, (edges[1:] + edges[:-1]) / 2, 40.0)

    def error(limit: float) -> float:
        scale = limit / 127
        return float(((np.clip(np.round(values / scale), 0, 127) * scale - values) ** 2).sum())

    tried = 40 * np.arange(1, 129) / 128
    assert error(limit) <= 1.02 * min(map(error, tried))
    assert limit == pytest.approx(tried[np.abs(tried - limit).argmin()])


def test_single_high_bins_are_cut_to_what_stands_beside_them() -> None:
    bins = np.full(40, 5.0)
    bins[20] = 900
    bins[30:38] = 50
    cut = histogram._without_spikes(bins)
    assert cut[20] == 5
    assert cut[30:37].tolist() == [50] * 7
    assert histogram._without_spikes(np.zeros(20)).tolist() == [0] * 20
    lonely = np.zeros(20)
    lonely[9] = 7
    assert histogram._without_spikes(lonely)[9] == 1


def test_parameters_are_frozen_for_a_while_and_only_those_that_were_not() -> None:
    net = nn.Linear(2, 2)
    net.bias.requires_grad_(False)
    with _frozen(net):
        assert not net.weight.requires_grad
    assert net.weight.requires_grad
    assert not net.bias.requires_grad


def test_validations_since_the_best_one() -> None:
    assert _stale([(0, 0.0, 3.0), (1, 0.0, 1.0), (2, 0.0, 2.0)]) == 1
    assert _stale([(0, 0.0, 1.0), (1, 0.0, 1.0)]) == 1
    assert _stale([(0, 0.0, 2.0), (1, 9.0, 1.0)]) == 0


def test_batch_norms_stay_as_they_are_while_the_rest_is_trained() -> None:
    net = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2), nn.Conv2d(2, 1, 1)).requires_grad_(False).train()
    trained = _unfreeze(net)
    assert [id(p) for p in trained] == [id(p) for part in (net[0], net[2]) for p in part.parameters()]
    assert not net[1].training
    assert net[0].training


def test_arguments_may_have_the_names_that_others_gave_them() -> None:
    @also_named(amax_method="method")
    def called(method: str = "mse") -> str:
        return method

    assert called(amax_method="max") == called("max") == called(method="max") == "max"  # type: ignore[call-arg]
    assert called() == "mse"
    with pytest.raises(InputError, match="method and amax_method are one thing"):
        called(method="a", amax_method="b")  # type: ignore[call-arg]


def test_of_what_a_model_predicts_tensors_alone_count() -> None:
    ones = torch.ones(2)
    assert tensors_only(lambda model, batch: {"a": [ones, "text"], "b": None})(nn.Identity(), None) == (ones,)
    assert tensors_only(lambda model, batch: "text")(nn.Identity(), None) == torch.zeros(())


def test_a_scale_of_a_whole_weight_is_repeated_for_its_channels() -> None:
    conv = nn.Conv2d(1, 3, 1)
    assert amax_checkpoint._for_channels(conv, torch.tensor(2.0), "w").tolist() == [2, 2, 2]
    assert amax_checkpoint._for_channels(conv, torch.tensor([[1.0], [2], [3]]), "w").tolist() == [1, 2, 3]
    with pytest.raises(InputError, match="w has 2 scales for its weight; expected one, or one for each of its 3"):
        amax_checkpoint._for_channels(conv, torch.ones(2), "w")


def test_what_belongs_to_the_layer_before_it(tmp_path: Path) -> None:
    """An activation of a product's only result belongs to it; one of an output, or of a result read twice, does not."""
    weight = numpy_helper.from_array(np.zeros((4, 4), np.float32), "w")
    reads = [("MatMul", ["x", "w"]), ("Relu", ["n0"]), ("MatMul", ["n1", "w"]), ("Sigmoid", ["n2"]), ("Tanh", ["n2"])]
    reads += [("Add", ["n3", "n4"]), ("Relu", ["x"]), ("Relu", ["n5"])]
    nodes = [helper.make_node(op, inputs, [f"n{i}"], f"n{i}") for i, (op, inputs) in enumerate(reads)]
    outputs = [helper.make_empty_tensor_value_info(name) for name in ("n5", "n6", "n7")]
    given = [helper.make_tensor_value_info("x", TensorProto.FLOAT, [4, 4])]
    graph = helper.make_graph(nodes, "g", given, outputs, [weight])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), tmp_path / "g.onnx")
    opened = Graph(tmp_path / "g.onnx")
    joined = [fusion_groups._joined(opened, each) for each in opened.nodes]
    assert [each.name if each else None for each in joined] == [None, "n0", None, None, None, None, None, None]


def engine_manifest(folder: Path, program: Any, **changes: Any) -> Path:
    """A folder with an engine of ``program`` and its manifest."""
    folder.mkdir()
    (folder / "net.engine").write_bytes(b"engine")
    entry = {"component": "net", "file": "net.engine", "sha256": file_hash(folder / "net.engine"), "seconds": 1.0}
    entry |= {"onnx_sha256": program.graph.digest, "realised_precision": {"fp16": 1.0}}
    machine = {"tensorrt": "10.3", "gpu": "A", "compute_capability": "9.0"}
    document = {"backend": "trt-fp16@cuda:0", **machine, "engines": [entry | changes]}
    (folder / "engines.json").write_text(json.dumps(document), encoding="utf-8")
    return folder


def test_engines_are_those_of_this_machine_and_these_graphs(tmp_path: Path) -> None:
    node_of(tmp_path, "MatMul", ["x", "w"])
    program: Any = SimpleNamespace(name="net", graph=Graph(tmp_path / "g.onnx"))
    here = {"tensorrt": "10.3", "gpu": "A", "compute_capability": "9.0"}
    folder = engine_manifest(tmp_path / "good", program)
    assert check_engines(folder, [program], here, "trt-fp16") == {"net": folder / "net.engine"}
    assert check_engines(folder, [program], here) == {"net": folder / "net.engine"}
    refused = [
        (folder, here, "trt-int8", r"these are engines of trt-fp16@cuda:0; expected those of trt-int8"),
        (folder, here | {"gpu": "B"}, "", r"gpu is 'A'; here it is 'B'"),
        (folder, here | {"compute_capability": "8.0"}, "", r"compute_capability is '9.0'; here it is '8.0'"),
        (engine_manifest(tmp_path / "b", program, sha256="0"), here, "", "changed since it was built"),
        (engine_manifest(tmp_path / "c", program, onnx_sha256="0"), here, "", "built from another graph than"),
        (engine_manifest(tmp_path / "d", program, component="other"), here, "", "there is no engine of net"),
        (engine_manifest(tmp_path / "e", program, file="gone.engine"), here, "", "there is no engine of net"),
        (tmp_path, here, "", "not the manifest of `cpdebug build`"),
    ]
    for where, versions, backend, says in refused:
        with pytest.raises(InputError, match=says):
            check_engines(where, [program], versions, backend)
