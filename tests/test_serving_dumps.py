"""Debug tensors of TensorRT-LLM, vLLM and SGLang, in the folders that they write: read, matched by module, judged."""

from __future__ import annotations

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
