"""Debug tensors of TensorRT-LLM, vLLM and SGLang, in the folders that they write: read, matched by module, judged."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from test_cli import run

from cp_debug.bisect.import_dump import match_dump
from cp_debug.errors import InputError
from cp_debug.graph.graph import Graph
from cp_debug.probes.dumps import read_dump

TOKENS, WIDTH = 5, 8
Arrays = dict[str, np.ndarray]


def decoder(path: Path, *, scopes: bool) -> tuple[Path, Arrays]:
    """Two layers as an exporter names their nodes (by metadata or by names), and module → what it computes."""
    rng = np.random.default_rng(0)
    weights, nodes, values = [], [], {}
    x = value = rng.normal(size=(1, TOKENS, WIDTH)).astype(np.float32)
    previous = "hidden"
    for index in range(2):
        module = f"model.layers.{index}.mlp"
        weight = rng.normal(size=(WIDTH, WIDTH)).astype(np.float32)
        weights.append(numpy_helper.from_array(weight, f"w{index}"))
        out = f"out_{index}"
        for op, inputs, output in (("MatMul", [previous, f"w{index}"], f"m_{index}"), ("Relu", [f"m_{index}"], out)):
            name = f"n{len(nodes)}" if scopes else f"/model/layers.{index}/mlp/{op}"
            node = helper.make_node(op, inputs, [output], name)
            if scopes:
                names = ["", "model", f"model.layers.{index}", module, op.lower()]
                node.metadata_props.add(key="pkg.torch.onnx.name_scopes", value=str(names))
            nodes.append(node)
        value = np.maximum(value @ weight, 0)
        values[module], previous = value, out
    shape = [1, TOKENS, WIDTH]
    graph = helper.make_graph(
        nodes,
        "decoder",
        [helper.make_tensor_value_info("hidden", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info(previous, TensorProto.FLOAT, shape)],
        weights,
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path, {"model": x, **values}


def as_vllm(folder: Path, values: Arrays, device: str = "cuda_0") -> Path:
    """A run folder with two steps; tokens are not batched, as a server flattens them."""
    for step, factor in ((0, 1.0), (1, 7.0)):
        for module, array in values.items():
            inside = folder / "010fed05" / f"step_{step}" / module
            inside.mkdir(parents=True)
            (inside / "outputs.json").write_text("{}")
            what = "inputs_0" if module == "model" else "outputs"
            torch.save(torch.from_numpy(array[0] * np.float32(factor)), inside / f"{what}_{device}.pt")
    return folder / "010fed05"


def as_sglang(folder: Path, values: Arrays) -> Path:
    inside = folder / "TP0_PP0_Rank0_pid7"
    inside.mkdir(parents=True)
    for step in (0, 1):
        tensors: dict[str, Any] = {n: torch.from_numpy(a[0] * np.float32(1 + step)) for n, a in values.items()}
        torch.save(
            {"model/inputs_0" if n == "model" else n: t for n, t in tensors.items()}, inside / f"Pass0000{step}.pt"
        )
    return folder


@pytest.mark.parametrize("scopes", [True, False])
@pytest.mark.parametrize("dump", [as_vllm, as_sglang])
def test_tensors_by_module_become_a_capture(dump: Any, scopes: bool, tmp_path: Path) -> None:
    net, values = decoder(tmp_path / "net.onnx", scopes=scopes)
    folder = dump(tmp_path / "dump", values)
    code, text = run("import", folder, "--model", net, "-o", tmp_path / "here", "--map", "hidden=model/inputs_0")
    assert code == 0, text
    assert "model.layers.0.mlp is out_0" in text
    kept = read_dump(tmp_path / "here")
    np.testing.assert_array_equal(kept["out_1"], values["model.layers.1.mlp"])  # the first step, with its batch
    code, text = run("bisect", net, "-b", "ort", "--test-tensors", tmp_path / "here", "--rtol", "1e-4")
    assert code == 0, text


def test_a_run_of_vllm_lies_in_a_folder_of_a_random_name(tmp_path: Path) -> None:
    net, values = decoder(tmp_path / "net.onnx", scopes=True)
    as_vllm(tmp_path / "out", values)
    code, text = run("import", tmp_path / "out", "--model", net, "-o", tmp_path / "here")
    assert code == 0, text
    assert "extra: model/inputs_0 may be hidden: --map hidden=model/inputs_0" in text
    as_vllm(tmp_path / "again", values).rename(tmp_path / "out" / "another")
    with pytest.raises(InputError, match="holds 2 runs, 010fed05, another; give the folder of one"):
        read_dump(tmp_path / "out")


class Decoder(torch.nn.Module):
    """``model`` with two parts, and a head that runs after it."""

    def __init__(self) -> None:
        super().__init__()
        self.model = torch.nn.Sequential()
        self.model.add_module("embed_tokens", torch.nn.Linear(2, 2))
        self.model.add_module("norm", torch.nn.Tanh())
        self.logits_processor = torch.nn.Linear(2, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.logits_processor(self.model(x))


@pytest.mark.parametrize("inputs_noted", [True, False])
def test_sglang_writes_a_pass_before_its_top_module_has_returned(tmp_path: Path, inputs_noted: bool) -> None:
    """Hooks in the order of SGLang's ``_dump_hook``: the file of a pass lacks its logits, which begin the next one."""
    net, folder = Decoder(), tmp_path / "TP0_PP0_Rank0_pid7"
    plain = copy.deepcopy(net)
    folder.mkdir()
    noted: Arrays = {}
    passes = 0

    def hook(name: str, module: torch.nn.Module, inputs: Any, output: torch.Tensor) -> None:
        nonlocal passes
        if name == "model":
            if inputs_noted:
                noted["model.forward_batch_info.input_ids"] = inputs[0].clone()
            torch.save(dict(noted), folder / f"Pass{passes:05d}.pt")
            noted.clear()
            passes += 1
        noted[name] = output.clone()

    for name, module in net.named_modules():
        if name:
            module.register_forward_hook(lambda module, inputs, output, name=name: hook(name, module, inputs, output))
    given = [torch.full((1, 2), float(i)) for i in range(3)]
    with torch.no_grad():
        results = [net(x) for x in given]
    for index, (x, result) in enumerate(zip(given, results, strict=True)):
        path = folder / f"Pass{index:05d}.pt"
        tensors = read_dump(path if index else folder)
        np.testing.assert_array_equal(tensors["model.embed_tokens"], plain.model.embed_tokens(x).detach())
        if index == 2:  # of the last pass nobody wrote the logits
            assert not {"model", "logits_processor"} & {*tensors}
        else:
            np.testing.assert_array_equal(tensors["logits_processor"], result)
            np.testing.assert_array_equal(tensors["model"], plain.model(x).detach())


def test_types_that_numpy_lacks_are_told(tmp_path: Path) -> None:
    header = b"{'descr': 'x', 'fortran_order': False, 'shape': (4, )}"
    header += b" " * (-(len(header) + 11) % 16) + b"\n"
    (tmp_path / "kv.npy").write_bytes(b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + b"1234")
    with pytest.raises(InputError, match=r"kv\.npy: its dtype is 'x': TensorRT-LLM writes that for types that numpy l"):
        read_dump(tmp_path)


def test_tensorrt_llm_writes_a_folder_an_iteration(tmp_path: Path) -> None:
    """Under the graph's own names, with headers that leave the byte order out."""
    folder = tmp_path / "tllm_debug" / "PP_1" / "TP_1"
    for iteration in (2, 10):
        (folder / f"iteration_{iteration}").mkdir(parents=True)
        np.save(folder / f"iteration_{iteration}" / "logits.npy", np.full((1, 4), iteration, np.float16))
    header = b"{'descr': 'i4', 'fortran_order': False, 'shape': (3, )}"
    header += b" " * (-(len(header) + 11) % 16) + b"\n"
    data = np.arange(3, dtype="<i4").tobytes()
    first = folder / "iteration_2" / "request_ids.npy"
    first.write_bytes(b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + data)
    for given in (tmp_path, tmp_path / "tllm_debug", folder, folder / "iteration_2"):
        arrays = read_dump(given)
        assert arrays["logits"].tolist() == [[2, 2, 2, 2]]
        assert arrays["request_ids"].tolist() == [0, 1, 2]
    assert read_dump(folder / "iteration_10")["logits"][0, 0] == 10


def test_parts_of_several_ranks_are_refused(tmp_path: Path) -> None:
    _, values = decoder(tmp_path / "net.onnx", scopes=True)
    folder = as_vllm(tmp_path / "a", values)
    torch.save(torch.zeros(2), folder / "step_0" / "model.layers.0.mlp" / "outputs_cuda_1.pt")
    with pytest.raises(InputError, match=r"tensors of cuda_0, cuda_1, each with a part"):
        read_dump(folder)
    as_sglang(tmp_path / "b", values)
    (tmp_path / "b" / "TP1_PP0_Rank1_pid8").mkdir()
    with pytest.raises(InputError, match="give the folder of one"):
        read_dump(tmp_path / "b")


class _Evil:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return (print, ("ran",))


@pytest.mark.parametrize("content", [_Evil(), {"a": 1}, "text", None])
def test_pickles_are_not_run(content: object, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(InputError, match=r"a\.pt: holds (more than|no) tensors"):
        read_dump(tmp_path)
    assert "ran" not in capsys.readouterr().out
    (tmp_path / "a.pt").write_bytes(b"PK\x03\x04 nonsense")
    with pytest.raises(InputError, match=r"a\.pt"):
        read_dump(tmp_path / "a.pt")


def test_scopes_that_are_none_are_passed_over(tmp_path: Path) -> None:
    net, values = decoder(tmp_path / "net.onnx", scopes=True)
    model = onnx.load(net)
    for node, text in zip(model.graph.node, ("[", "7", "[1, 2, 3]", "__import__('os')"), strict=True):
        node.metadata_props[0].value = text
    onnx.save(model, net)
    matched = match_dump(Graph(net), {"out_1": values["model.layers.1.mlp"]}, "dump")
    assert matched.complete


def test_a_module_of_another_shape_is_told(tmp_path: Path) -> None:
    net, values = decoder(tmp_path / "net.onnx", scopes=True)
    tensors = {"model.layers.0.mlp": values["model.layers.0.mlp"][:, :3], "out_1": values["model.layers.1.mlp"]}
    matched = match_dump(Graph(net), tensors, "dump")
    assert list(matched.shapes) == ["out_0"]
    assert not matched.complete
