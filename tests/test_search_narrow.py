"""``search`` with FP8 and INT4: the set that is kept, and the file that is written for it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from nets import NetBuilder
from onnx import TensorProto as T
from test_cli import run

from cp_debug.backends.executor import Executor
from cp_debug.graph.graph import Graph
from cp_debug.graph.made_up import MadeUp
from cp_debug.probes.distance import relative_l2


def net(folder: Path) -> Path:
    """Three products; the weight of the second has a few large values in every group, which costs INT4 most."""
    builder = NetBuilder(3)
    x = "x"
    for i in range(3):
        w = (builder.rng.standard_normal((64, 64)) / 8).astype(np.float32)
        if i == 1:
            w[::16] *= 30
        x = builder.op("MatMul", x, builder.weight(w), name=f"product_{i}")
        x = builder.op("Relu", x) if i < 2 else x
    return builder.save(folder / "net.onnx", {"x": (1, [4, 64])}, [x], opset=21)


@pytest.mark.parametrize(
    ("precision", "kind", "goal"), [("int4:g32:sym", T.INT4, "rel_l2<0.15"), ("fp8", T.FLOAT8E4M3FN, "rel_l2<0.045")]
)
def test_the_file_keeps_what_the_search_kept(tmp_path: Path, precision: str, kind: int, goal: str) -> None:
    pytest.importorskip("onnxruntime")
    file, target, result = net(tmp_path), tmp_path / "mixed.onnx", tmp_path / "result.json"
    flags = ["-b", f"ort,emu-{precision}", "--goal", goal, "--onnx", target, "--json", result]
    code, text = run("search", file, *flags)
    assert code == 0, text
    document = json.loads(result.read_text())
    kept = set(document["keep"]["net"])
    assert document["layers"] == 3
    assert len(kept) in (1, 2)
    written = onnx.load(target)
    producer = {name: node.op_type for node in written.graph.node for name in node.output}
    for node in written.graph.node:
        if node.op_type == "MatMul":
            assert (producer.get(node.input[1]) == "DequantizeLinear") == (node.name not in kept)
    assert kind in {tensor.data_type for tensor in written.graph.initializer}
    inputs = MadeUp(Graph(file)).sample([0, 0])
    exact, test = (next(iter(Executor(Graph(f)).run(inputs).values())) for f in (file, target))
    assert relative_l2(test, exact) == pytest.approx(document["best"]["figures"]["rel_l2"], rel=0.02)
    command = document["arguments"]["net"]["modelopt"]
    assert f"--quantize_mode {precision.partition(':')[0]} --nodes_to_exclude " in command
    assert all(f"^{name}$" in command for name in kept)


def test_a_precision_that_no_file_can_say_is_refused_before_the_search(tmp_path: Path) -> None:
    code, text = run(
        "search", net(tmp_path), "-b", "ort,emu-fp8:acc=fp22", "--goal", "rel_l2<0.5", "--onnx", tmp_path / "mixed.onnx"
    )
    assert code == 2
    assert "a file cannot set accumulation" in " ".join(text.split())
    assert not (tmp_path / "mixed.onnx").exists()
