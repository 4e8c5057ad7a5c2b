"""ONNX files where modules are expected: verified, timed and deployed as they are, compared with modules and files."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from nets import NetBuilder, second_like
from onnx import numpy_helper
from test_cli import run
from test_trt_backend import install

from cp_debug.deploy import exporting
from cp_debug.recipes.registry import load_model

MODULE = """
import torch
from torch import nn


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Linear(6, 8), nn.Linear(8, 5)

    def forward(self, image):
        return self.head(torch.relu(self.stem(image)))


def build():
    torch.manual_seed(0)
    return Small().eval(), torch.randn(2, 6, generator=torch.Generator().manual_seed(1))
"""


@pytest.fixture
def net(tmp_path: Path) -> Path:
    return second_like(tmp_path / "net.onnx", depth=1, size=8)


@pytest.fixture
def pair(tmp_path: Path) -> tuple[str, Path]:
    """A module, and its weights in a file whose inputs and outputs are called otherwise."""
    import torch

    source = tmp_path / "measured_net.py"
    source.write_text(MODULE)
    scope: dict[str, object] = {}
    exec(MODULE, scope)
    module, _ = scope["build"]()  # type: ignore[operator]
    weights = {name: tensor.detach().numpy() for name, tensor in module.state_dict().items()}
    assert isinstance(next(iter(module.parameters())), torch.Tensor)
    b = NetBuilder()
    hidden = b.op("Gemm", "pixels", b.weight(weights["stem.weight"]), b.weight(weights["stem.bias"]), transB=1)
    x = b.op(
        "Gemm", b.op("Relu", hidden), b.weight(weights["head.weight"], "w"), b.weight(weights["head.bias"]), transB=1
    )
    return f"{source}:build", b.save(tmp_path / "file.onnx", {"pixels": (1, ["batch", 6])}, [x])


def changed(path: Path, factor: float) -> Path:
    proto = onnx.load(path)
    weight = next(tensor for tensor in proto.graph.initializer if tensor.name == "w")
    weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight) * np.float32(factor), weight.name))
    target = path.with_name("changed.onnx")
    onnx.save(proto, target)
    return target


def test_a_file_is_verified_on_two_backends_and_timed(net: Path) -> None:
    code, text = run("verify", net, "-s", "ort@cpu,ort-all@cpu")
    assert code == 0
    assert "all 2 outputs are within their limits" in text
    code, text = run("bench", net, "-b", "ort,ort-all", "-n", "2", "--json", "-")
    assert code == 0
    assert [backend["backend"] for backend in json.loads(text)["backends"]] == ["ort", "ort-all"]


def test_a_module_against_a_file_and_two_files(pair: tuple[str, Path]) -> None:
    module, file = pair
    code, text = run("verify", module, "--test-model", file)
    assert code == 0, text
    other = changed(file, 1.05)
    for model in (module, file):
        code, text = run("verify", model, "--test-model", other)
        assert code == 1
        assert "weights are scaled by 1.05" in " ".join(text.split())
    code, text = run("verify", file, "--test-model", file, "--map", "pixels=nothing")
    assert code == 2
    assert "--map: the test has no value 'nothing'" in text


def test_what_a_test_file_lacks_is_named(pair: tuple[str, Path], tmp_path: Path) -> None:
    proto = onnx.load(pair[1])
    proto.graph.node.append(onnx.helper.make_node("Exp", [proto.graph.output[0].name], ["more"], "more"))
    proto.graph.output.append(onnx.helper.make_tensor_value_info("more", 1, ["batch", 5]))
    onnx.save(proto, tmp_path / "more.onnx")
    code, text = run("verify", tmp_path / "more.onnx", "--test-model", pair[1])
    assert code == 1
    assert "lacks output more of the reference" in text
    code, text = run("verify", pair[1], "--map", "a=b")
    assert code == 2
    assert "without --test-model" in text


def test_a_file_is_exported_as_it_is(net: Path, tmp_path: Path) -> None:
    proto = onnx.load(net)
    onnx.save(proto, tmp_path / "ext.onnx", save_as_external_data=True, location="ext.bin", size_threshold=0)
    code, text = run("export", tmp_path / "ext.onnx", "-o", tmp_path / "out")
    assert code == 0, text
    assert "opset 17" in text
    assert "values of" in text
    assert "keep their names" in text
    assert "relative L2 at most 0" in text
    written = onnx.load(tmp_path / "out" / "ext.onnx", load_external_data=False)  # whole wherever it is carried
    original = {t.name: numpy_helper.to_array(t) for t in onnx.load(net).graph.initializer}
    assert {t.name for t in written.graph.initializer} == set(original)
    assert all((numpy_helper.to_array(t) == original[t.name]).all() for t in written.graph.initializer)
    code, text = run("verify", net, "--test-model", tmp_path / "out" / "ext.onnx")
    assert code == 0, text


def test_a_file_is_exported_to_another_opset_where_onnx_converts_it(tmp_path: Path) -> None:
    b = NetBuilder()
    mean = b.op("ReduceMean", b.op("Softmax", "x"), axes=[1], keepdims=1)
    net = b.save(tmp_path / "net.onnx", {"x": (1, ["batch", 6])}, [mean], opset=11)
    code, text = run("export", net, "-o", tmp_path / "out", "--opset", "18")
    assert code == 0, text
    written = onnx.load(tmp_path / "out" / "net.onnx")
    assert [entry.version for entry in written.opset_import] == [18]
    reduce = next(node for node in written.graph.node if node.op_type == "ReduceMean")
    assert (len(reduce.input), [a.name for a in reduce.attribute if a.name == "axes"]) == (
        2,
        [],
    )  # as opset 18 wants it
    code, text = run("export", tmp_path / "out" / "net.onnx", "-o", tmp_path / "old", "--opset", "9")
    assert code == 2
    assert "is in opset 18, and ONNX's converter cannot convert it to 9: No Adapter" in text
    assert not (tmp_path / "old").exists()


@pytest.mark.parametrize("fault", ["of other values", "of another size"])
def test_a_written_file_is_compared_on_several_samples_and_sizes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    b = NetBuilder()
    net = b.save(tmp_path / "net.onnx", {"x": (1, ["batch", 6])}, [b.op("Relu", "x")])
    code, text = run("export", net, "-o", tmp_path / "fine", "--simplify")
    assert code == 0, text
    assert "ort on 3 samples of x 1×6 and x 2×6: relative L2 at most 0" in text
    (first,) = load_model(str(net)).samples(1, 0, None)

    def wrong(proto: onnx.ModelProto, source: object) -> onnx.ModelProto:
        wrong = NetBuilder()
        if fault == "of other values":  # doubles all but the first sample
            known = wrong.op("Equal", "x", wrong.weight(first.arrays["x"]))
            out = wrong.op("Where", known, wrong.op("Relu", "x", name="inner"), wrong.op("Add", "x", "x"))
        else:
            out = wrong.op("Reshape", wrong.op("Relu", "x", name="inner"), wrong.weight(np.array([1, 6])))
        wrong.save(tmp_path / "wrong.onnx", {"x": (1, ["batch", 6])}, [out])
        made = onnx.load(tmp_path / "wrong.onnx")
        made.graph.node[-1].output[0] = made.graph.output[0].name = proto.graph.output[0].name
        return made

    monkeypatch.setattr(exporting, "_simplified", wrong)
    code, text = run("export", net, "-o", tmp_path / "out", "--simplify")
    assert code == 2, text
    assert ("rewritten, it computes another" if fault == "of other values" else "ONNX Runtime failed") in text
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("flags", [["--exporter", "dynamo"], ["--unfolded"], ["--quantized", "x.pt"]])
def test_flags_about_modules_are_refused_for_a_file(net: Path, tmp_path: Path, flags: list[str]) -> None:
    code, text = run("export", net, "-o", tmp_path / "out", *flags)
    assert (code, f"{flags[0]}: it would do nothing here" in text) == (2, True)


def test_an_exported_file_never_replaces_its_original(net: Path) -> None:
    before = net.read_bytes()
    code, text = run("export", net, "-o", net.parent)
    assert (code, "would replace MODEL itself" in text) == (2, True)
    assert net.read_bytes() == before


def test_an_earlier_export_is_replaced_only_when_that_is_asked_for(net: Path, tmp_path: Path) -> None:
    written = tmp_path / "out" / net.name
    written.parent.mkdir()
    written.write_text("mine")
    code, text = run("export", net, "-o", tmp_path / "out")
    assert (code, f"{written} exists already; --overwrite replaces it" in text.replace("\n", " ")) == (2, True)
    assert written.read_text() == "mine"
    assert run("export", net, "-o", tmp_path / "out", "--overwrite")[0] == 0
    assert onnx.load(written).graph.output


def test_a_file_is_deployed_as_it_is_and_a_changed_one_again(net: Path, tmp_path: Path) -> None:
    config = tmp_path / "deploy.yaml"
    config.write_text(f"model: {net}\nwork_dir: {tmp_path / 'work'}\nverify: {{samples: 1}}\n")
    code, text = run("deploy", config)
    assert code == 0, text
    assert "used unchanged" in text
    stages = json.loads((tmp_path / "work" / "deploy.json").read_text())["stages"]
    assert list(stages) == ["load", "export", "verify"]  # it detects nothing: not evaluated
    assert (tmp_path / "work" / "onnx" / "net.onnx").read_bytes() == net.read_bytes()
    proto = onnx.load(net)
    proto.doc_string = "changed"
    onnx.save(proto, net)
    assert run("deploy", config)[0] == 0
    assert (tmp_path / "work" / "onnx" / "net.onnx").read_bytes() == net.read_bytes()


def test_an_opset_that_deploy_names_is_given_to_a_file(net: Path, tmp_path: Path) -> None:
    config = tmp_path / "deploy.yaml"
    config.write_text(
        f"model: {net}\nwork_dir: {tmp_path / 'work'}\nexport: {{opset: 18}}\nverify: {{enabled: false}}\n"
    )
    code, text = run("deploy", config)
    assert code == 0, text
    assert "rewritten in opset 18" in text
    written = onnx.load(tmp_path / "work" / "onnx" / "net.onnx")
    assert [entry.version for entry in written.opset_import] == [18]


def test_quantization_of_a_file_in_deploy_names_the_command(net: Path, tmp_path: Path) -> None:
    config = tmp_path / "deploy.yaml"
    config.write_text(f"model: {net}\nwork_dir: {tmp_path / 'work'}\nquantization: {{samples: 2}}\n")
    code, text = run("deploy", config)
    assert code == 2
    assert f"`cpdebug quantize ptq {net} -o FOLDER`" in text


def test_an_engine_is_built_of_a_file(net: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install("10.3.0", monkeypatch)
    code, text = run("build", net, "-o", tmp_path / "engines", "--precision", "fp16")
    assert code == 0, text
    assert (tmp_path / "engines" / "net.engine").is_file()
