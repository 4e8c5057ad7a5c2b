"""What a bisect costs as networks grow: seconds a node, and memory against the weights.

    python benchmarks/scale.py nodes [COUNT ...] [--json FILE]
    python benchmarks/scale.py weights [MILLIONS ...] [--backends torch,ort] [--json FILE]

``nodes``: two files of one network, with a weight of the second 1 % larger an eighth behind its input: 1,000, 5,000
and 20,000 nodes, each fifth a convolution of 16 channels of 16 × 16. ``weights``: one file of a decoder with attention
and 64 tokens, its weights in a file beside it: 250 and 1,000 million parameters in FP32.
Each bisect is a process of its own, as a user runs it; memory is the peak of what it holds, pages of mapped files
included. Networks are made in a temporary folder: 4 bytes a parameter.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

WIDTH, TOKENS, HEADS = 2048, 64, 16
OF_A_BLOCK = 12 * WIDTH * WIDTH
"""Parameters of a block, biases and norms apart."""


class Net:
    """An ONNX graph that grows node by node; weights of 1 KiB and more go into one file beside it."""

    def __init__(self, path: Path, shape: list[int]) -> None:
        self.path, self.shape, self.rng = path, shape, np.random.default_rng(0)
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []
        self.outside, self.end = path.with_suffix(".data"), 0

    def weight(self, *shape: int, scale: float) -> str:
        """A random weight in FP32, written at once where it is large."""
        name = f"w{len(self.weights)}"
        values = self.rng.standard_normal(shape, np.float32) * np.float32(scale)
        tensor = numpy_helper.from_array(values if values.nbytes < 1024 else values[:0], name)
        if values.nbytes >= 1024:
            with self.outside.open("ab") as file:
                values.tofile(file)
            tensor.ClearField("raw_data")
            tensor.dims[:] = shape
            tensor.data_location = TensorProto.EXTERNAL
            about = {"location": self.outside.name, "offset": self.end, "length": values.nbytes}
            for key, value in about.items():
                tensor.external_data.add(key=key, value=str(value))
            self.end += values.nbytes
        self.weights.append(tensor)
        return name

    def constant(self, values: Any) -> str:
        self.weights.append(numpy_helper.from_array(np.asarray(values), f"w{len(self.weights)}"))
        return self.weights[-1].name

    def add(self, op: str, *inputs: str, **attributes: Any) -> str:
        name = f"{op.lower()}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, [*inputs], [f"{name}_out"], name=name, **attributes))
        return f"{name}_out"

    def save(self, output: str) -> None:
        ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, self.shape) for n in ("x", output)]
        graph = helper.make_graph(self.nodes, "net", ends[:1], ends[1:], self.weights)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
        onnx.save(model, self.path)


def many_nodes(path: Path, count: int, factor: float) -> None:
    """``count`` nodes; the weight of a convolution an eighth behind the input times ``factor``."""
    net = Net(path, [1, 16, 16, 16])
    one, zero, x = net.constant(np.ones(16, np.float32)), net.constant(np.zeros(16, np.float32)), "x"
    for block in range(count // 5):
        weight = net.weight(16, 16, 3, 3, scale=(2 / 144) ** 0.5 * (factor if block == count // 40 else 1.0))
        y = net.add("Conv", x, weight, pads=[1] * 4)
        x = net.add("Add", x, net.add("Mul", y, net.add("Sigmoid", y)))
        x = net.add("LayerNormalization", x, one, zero)
    net.save(x)


def decoder(path: Path, millions: int) -> None:
    """Blocks of attention and feed-forward layers, of so many million parameters."""
    net, x = Net(path, [1, TOKENS, WIDTH]), "x"
    one, zero = net.constant(np.ones(WIDTH, np.float32)), net.constant(np.zeros(WIDTH, np.float32))
    heads, whole = net.constant([1, TOKENS, HEADS, WIDTH // HEADS]), net.constant([1, TOKENS, WIDTH])
    scale = net.constant(np.float32((WIDTH // HEADS) ** -0.5))
    for _ in range(round(millions * 1e6 / OF_A_BLOCK)):
        y = net.add("LayerNormalization", x, one, zero)
        q, k, v = (net.add("MatMul", y, net.weight(WIDTH, WIDTH, scale=WIDTH**-0.5)) for _ in range(3))
        q, v = (net.add("Transpose", net.add("Reshape", t, heads), perm=[0, 2, 1, 3]) for t in (q, v))
        k = net.add("Transpose", net.add("Reshape", k, heads), perm=[0, 2, 3, 1])
        mixed = net.add("MatMul", net.add("Softmax", net.add("Mul", net.add("MatMul", q, k), scale)), v)
        mixed = net.add("Reshape", net.add("Transpose", mixed, perm=[0, 2, 1, 3]), whole)
        x = net.add("Add", x, net.add("MatMul", mixed, net.weight(WIDTH, WIDTH, scale=0.1 * WIDTH**-0.5)))
        y = net.add("LayerNormalization", x, one, zero)
        y = net.add("Gelu", net.add("MatMul", y, net.weight(WIDTH, 4 * WIDTH, scale=WIDTH**-0.5)))
        x = net.add("Add", x, net.add("MatMul", y, net.weight(4 * WIDTH, WIDTH, scale=0.1 * WIDTH**-0.5)))
    net.save(x)


def bisect(*arguments: str | Path) -> dict[str, Any]:
    """Seconds and MiB at most of one bisect in a process of its own, and what it says first."""
    start = time.monotonic()
    run = subprocess.Popen(
        [sys.executable, "-m", "cp_debug", "bisect", *map(str, arguments)], stdout=subprocess.PIPE, text=True
    )
    assert run.stdout is not None
    says = [line for line in run.stdout if line.startswith(("✓", "✗"))]
    _, status, usage = os.wait4(run.pid, 0)
    run.returncode = os.waitstatus_to_exitcode(status)
    seconds, memory = round(time.monotonic() - start, 1), usage.ru_maxrss / 1024
    return {"seconds": seconds, "mib": round(memory), "code": run.returncode, "says": "".join(says[:1]).strip()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["nodes", "weights"])
    parser.add_argument("sizes", nargs="*", type=int)
    parser.add_argument("--backends", default="torch,ort")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rows = []
    for size in args.sizes or ([1000, 5000, 20000] if args.what == "nodes" else [250, 1000]):
        with tempfile.TemporaryDirectory() as made:
            first, second = Path(made, "a.onnx"), Path(made, "b.onnx")
            if args.what == "nodes":
                many_nodes(first, size, 1.0)
                many_nodes(second, size, 1.01)
                row = {"nodes": size, **bisect(first, "-b", "ort", "--test-model", second)}
                row["ms_a_node"] = round(1000 * row["seconds"] / size, 1)
            else:
                decoder(first, size)
                weights = first.with_suffix(".data").stat().st_size / 2**20
                row = {"millions": size, "weights_mib": round(weights), **bisect(first, "-b", args.backends)}
                row["memory_over_weights"] = round(row["mib"] / weights, 2)
        rows.append(row)
        print(json.dumps(row), flush=True)
    if args.json:
        about = {"command": " ".join(["python", *sys.argv]), "cpus": len(os.sched_getaffinity(0)), "rows": rows}
        args.json.write_text(json.dumps(about, indent=1) + "\n")


if __name__ == "__main__":
    main()
