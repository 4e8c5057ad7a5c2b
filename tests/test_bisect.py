"""The main job, from Python: right answers on small ONNX files, torch modules and broken programs."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from nets import residual, second_like
from onnx import TensorProto, helper, numpy_helper

from cp_debug.bisect.engine import Options, bisect
from cp_debug.errors import BackendUnavailable, InputError
from cp_debug.recipes.torch_callable import TorchModel
from cp_debug.reports.verdict_line import verdict_line


def scale_weight(source: Path, target: Path, output: str, factor: float) -> None:
    """Write a copy of the model in which the weight of the node that makes ``output`` is scaled."""
    model = onnx.load(source)
    node = next(n for n in model.graph.node if output in n.output)
    for tensor in model.graph.initializer:
        if tensor.name == node.input[1]:
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) * np.float32(factor), tensor.name))
    onnx.save(model, target)


@pytest.fixture(scope="module")
def net(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return second_like(tmp_path_factory.mktemp("net") / "net.onnx")


def convolutions(path: Path) -> list[str]:
    return [n.output[0] for n in onnx.load(path).graph.node if n.op_type == "Conv"]


def test_equal_programs_agree(net: Path) -> None:
    result = bisect(str(net), "ort,ort-all,torch,emu-tf32")
    assert result.agrees
    assert [t.guilty for t in result.tests] == [[], [], []]
    assert all(t.compared == t.total for t in result.tests if t.backend.spec != "ort-all")
    assert {t.backend.spec: t.oracle for t in result.tests} == {"ort-all": "fp64", "torch": "fp64", "emu-tf32": "fp32"}
    assert all(t.observation is not None and t.observation.observer_gap == 0 for t in result.tests)


@pytest.mark.few(1)
@pytest.mark.parametrize("place", [1, 4, -1])
def test_the_layer_with_another_weight_is_the_guilty_one(net: Path, tmp_path: Path, place: int) -> None:
    output = convolutions(net)[place]
    scale_weight(net, tmp_path / "test.onnx", output, 1.02)
    test = bisect(str(net), "ort,ort-none@cpu", test_model=tmp_path / "test.onnx").tests[0]
    assert [row.onnx for row in test.guilty] == [output]
    row = test.guilty[0]
    assert row.replay is not None
    assert row.replay.introduced == pytest.approx(0.02, rel=0.2)
    assert row.replay.inherited < 1e-6  # the rounding of the reference
    assert row.share == pytest.approx(1, abs=0.05)
    later = [r for r in test.rows if r.index > row.index]
    assert all(r.replay is not None and r.replay.excess is not None and r.replay.excess < 2 for r in later)


def test_two_faults_are_two_findings_and_share_the_divergence(net: Path, tmp_path: Path) -> None:
    first, second = convolutions(net)[2], convolutions(net)[5]
    scale_weight(net, tmp_path / "one.onnx", first, 1.01)
    scale_weight(tmp_path / "one.onnx", tmp_path / "two.onnx", second, 1.01)
    test = bisect(str(net), "ort,ort-none@cpu", test_model=tmp_path / "two.onnx").tests[0]
    assert [row.onnx for row in test.guilty] == [first, second]
    assert sum(row.share or 0 for row in test.guilty) == pytest.approx(1, abs=0.1)
    assert "most of it" not in verdict_line(test).plain


def test_of_two_layers_with_one_cause_each_is_told_and_the_one_that_weighs(net: Path, tmp_path: Path) -> None:
    first, second = convolutions(net)[2], convolutions(net)[5]
    scale_weight(net, tmp_path / "one.onnx", first, 1.001)
    scale_weight(tmp_path / "one.onnx", tmp_path / "two.onnx", second, 1.5)
    test = bisect(str(net), "ort,ort-none@cpu", test_model=tmp_path / "two.onnx").tests[0]
    assert [(f.says, set(f.layers)) for f in test.findings] == [
        ("Conv weights are scaled by 1.001 or 1.5", {row.name for row in test.guilty})
    ]
    assert f"; most of it comes from {test.guilty[1].name}; " in verdict_line(test).plain


def test_json_has_the_promised_fields(net: Path, tmp_path: Path) -> None:
    scale_weight(net, tmp_path / "test.onnx", convolutions(net)[3], 2.0)
    result = bisect(str(net), "ort,ort-none@cpu", test_model=tmp_path / "test.onnx")
    found = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert found["schema"] == "cpdebug.bisect/1"
    assert {"model", "backends", "samples", "alignment", "stages", "layers", "outputs", "first_divergent"} <= set(found)
    assert {"guilty", "noise_floor", "observer_gap", "oracle"} <= set(found)
    assert found["alignment"] == {"aligned": len(found["layers"]), "total": len(found["layers"])}
    names = "index name onnx op shape max_abs mean_abs rel_l2 cosine sqnr_db p99_abs max_ref nan_ref nan_test inf_ref"
    names += " inf_test verdict introduced inherited amplification expected excess"
    assert set(names.split()) <= set(found["layers"][0])
    assert found["first_divergent"] == found["guilty"][0]
    assert {"spec", "versions", "device", "settings"} <= set(found["backends"][0])
    assert len(result.layers) == len(found["layers"])


def test_an_oracle_is_one_of_two(net: Path) -> None:
    with pytest.raises(InputError, match=r"^oracle: 'fp16'; expected 'fp32' or 'fp64'$"):
        bisect(str(net), "ort,emu-fp16", options=Options(oracle="fp16"))


def test_samples_keep_the_worst_of_each_layer(net: Path) -> None:
    one = bisect(str(net), "ort,emu-fp16", options=Options(samples=1))
    three = bisect(str(net), "ort,emu-fp16", options=Options(samples=3))
    assert len(three.samples) == 3
    assert len(one.tests[0].rows) == len(three.tests[0].rows)
    assert all(a.stats.max_abs <= b.stats.max_abs for a, b in zip(one.tests[0].rows, three.tests[0].rows, strict=True)
               if b.verdict == a.verdict and b.sample == 0)  # fmt: skip
    assert {row.sample for row in three.tests[0].rows} <= {0, 1, 2}


def test_a_wrong_shape_is_a_finding(tmp_path: Path) -> None:
    def save(name: str, axis_size: int) -> Path:
        graph = helper.make_graph(
            [helper.make_node("Relu", ["x"], ["r"]), helper.make_node("Slice", ["r", "s", "e"], ["y"])],
            "g",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 8])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
            [
                numpy_helper.from_array(np.array([0, 0]), "s"),
                numpy_helper.from_array(np.array([2, axis_size]), "e"),
            ],
        )
        path = tmp_path / name
        onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)
        return path

    reference, test = save("a.onnx", 8), save("b.onnx", 7)
    result = bisect(str(reference), "ort,ort-none@cpu", test_model=test)
    row = result.tests[0].rows[-1]
    assert (row.verdict, row.stats.shape, row.stats.shape_test) == ("shape", (2, 8), (2, 7))
    assert not result.agrees


def test_data_dependent_shapes_that_differ_are_found(tmp_path: Path) -> None:
    def save(name: str, bias: float) -> Path:
        graph = helper.make_graph(
            [
                helper.make_node("Add", ["x", "b"], ["shifted"]),
                helper.make_node("Relu", ["shifted"], ["r"]),
                helper.make_node("NonZero", ["r"], ["where"]),
            ],
            "g",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, [64])],
            [helper.make_tensor_value_info("where", TensorProto.INT64, [1, None])],
            [numpy_helper.from_array(np.float32(bias), "b")],
        )
        path = tmp_path / name
        onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)
        return path

    result = bisect(str(save("a.onnx", 0.0)), "ort,ort-none@cpu", test_model=save("b.onnx", 0.5))
    test = result.tests[0]
    assert [row.onnx for row in test.guilty] == ["shifted"]
    assert test.rows[-1].verdict == "shape"


class Shared(torch.nn.Module):
    """A shared convolution, in-place ReLU, a functional add and a tuple of outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(4, 4, 3, padding=1)
        self.norm = torch.nn.BatchNorm2d(4)
        self.relu = torch.nn.ReLU(inplace=True)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = self.relu(self.norm(self.conv(x)))
        z = self.conv(y) + x
        return y.clone(), z


@pytest.mark.parametrize("exporter", ["dynamo", "torchscript"])
def test_any_torch_module(exporter: str) -> None:
    torch.manual_seed(0)
    model = TorchModel("shared", Shared(), torch.randn(1, 4, 8, 8))
    result = bisect(model, "torch,ort,emu-fp16", options=Options(exporter=exporter))
    assert result.agrees
    coverage = result.coverage["Shared"]
    assert coverage["values"] == coverage["values_total"]
    assert coverage["modules"] == coverage["modules_total"]
    names = [row.name for row in result.tests[0].rows]
    assert {"relu", "conv@2"} <= set(names)


def test_train_mode_is_told_apart() -> None:
    torch.manual_seed(0)
    model = TorchModel("shared", Shared(), torch.randn(2, 4, 8, 8) * 3 + 1)
    test = bisect(model, "torch,torch@cpu", options=Options(test_train_mode=True)).tests[0]
    assert [row.name for row in test.guilty] == ["norm"]
    out_of_place = bisect(model, "torch,torch@cpu", options=Options(test_out_of_place=True)).tests[0]
    assert out_of_place.agrees
    assert all(row.stats.equal for row in out_of_place.rows)


def test_a_residual_net_in_fp16_stays_within_its_precision(tmp_path: Path) -> None:
    test = bisect(str(residual(tmp_path / "net.onnx")), "ort,emu-fp16").tests[0]
    assert not test.guilty
    assert any((row.stats.max_abs > 0) for row in test.rows)


def test_unknown_and_unavailable_backends() -> None:
    with pytest.raises(InputError, match=r"'ort-cuda'; did you mean ort@cuda\?"):
        bisect("centerpoint:tiny", "torch,ort-cuda")
    with pytest.raises(InputError, match=r"no such backend 'emu-fp61'; did you mean emu-fp16\?"):
        bisect("centerpoint:tiny", "torch,emu-fp61")
    with pytest.raises(BackendUnavailable, match="emu-tf32"):
        bisect("centerpoint:tiny", "torch,torch-tf32")
    with pytest.raises(InputError, match="reference"):
        bisect("centerpoint:tiny", "torch")


def test_unknown_model_names_the_nearest() -> None:
    with pytest.raises(InputError, match="centerpoint:tiny"):
        bisect("centerpoint:tinny", "torch,ort")


def test_no_sample_is_refused() -> None:
    with pytest.raises(InputError, match="samples: 0; expected at least 1"):
        bisect("centerpoint:tiny", "torch,ort", options=Options(samples=0))
