"""Networks with TensorRT's own plug-ins between other layers, and with control flow.

    python benchmarks/engine_networks_plugins.py FOLDER [NAME …]

writes ``FOLDER/NAME.onnx`` and ``FOLDER/NAME.npz`` as ``engine_networks.py`` does. Plug-ins are operators of the domain
``trt.plugins``; TensorRT's parser finds them by their name, and nothing else computes them: the reference for them is
``trt-fp32``.
"""

from __future__ import annotations

import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

DOMAIN = "trt.plugins"
WIDTH, TOKENS = 64, 48


class Net:
    """An ONNX graph written node by node; weights come from a seed. ``prefix``: of names in a body of control flow."""

    def __init__(self, name: str, prefix: str = "") -> None:
        self.prefix = prefix
        self.name, self.rng = name, np.random.default_rng(zlib.crc32(name.encode()))
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []

    def constant(self, array: Any) -> str:
        name = f"{self.prefix}w{len(self.weights)}"
        self.weights.append(onnx.numpy_helper.from_array(array, name))
        return name

    def weight(self, *shape: int) -> str:
        scale = int(np.prod(shape[1:] if len(shape) == 4 else shape[:-1])) ** -0.5
        return self.constant((self.rng.standard_normal(shape) * scale).astype(np.float32))

    def add(self, op: str, *inputs: str, outputs: tuple[str, ...] = (), domain: str = "", **attributes: object) -> str:
        """Add a node; returns the name of its first output."""
        made = outputs or (f"{self.prefix}{op.lower()}{len(self.nodes)}",)
        self.nodes.append(helper.make_node(op, inputs, made, f"/{made[0]}/{op}", domain=domain, **attributes))
        return made[0]

    def norm(self, x: str) -> str:
        """LayerNorm over the last axis, in the operators of opset 17's predecessors."""
        centred = self.add("Sub", x, self.add("ReduceMean", x, axes=[-1]))
        variance = self.add("ReduceMean", self.add("Mul", centred, centred), axes=[-1])
        steady = self.add("Add", variance, self.constant(np.float32(1e-5)))
        return self.add("Div", centred, self.add("Sqrt", steady))

    def save(self, folder: Path, inputs: dict[str, np.ndarray], outputs: dict[str, int]) -> Path:
        """Write the file and its sample. ``outputs``: name → type."""
        given = [
            helper.make_tensor_value_info(k, helper.np_dtype_to_tensor_dtype(v.dtype), v.shape)
            for k, v in inputs.items()
        ]
        made = [helper.make_tensor_value_info(name, kind, None) for name, kind in outputs.items()]
        graph = helper.make_graph(self.nodes, self.name, given, made, self.weights)
        opsets = [helper.make_opsetid("", 17), helper.make_opsetid(DOMAIN, 1)]
        path = folder / f"{self.name}.onnx"
        folder.mkdir(parents=True, exist_ok=True)
        onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=8), path)
        np.savez(path.with_suffix(".npz"), **inputs)  # type: ignore[arg-type]
        return path


def value(name: str, kind: int, *shape: int) -> onnx.ValueInfoProto:
    """A value's name, type and shape."""
    return helper.make_tensor_value_info(name, kind, shape)


def feed_forward(net: Net, x: str, gelu: Callable[[str], str]) -> str:
    """``x + W2 · gelu(W1 · norm(x))``."""
    wide = net.add("MatMul", net.norm(x), net.weight(WIDTH, 4 * WIDTH))
    return net.add("Add", x, net.add("MatMul", gelu(wide), net.weight(4 * WIDTH, WIDTH)))


def plug(folder: Path) -> Path:
    """Two blocks with a plug-in for GELU between their products."""
    net = Net("plug")

    def gelu(x: str) -> str:
        return net.add("CustomGeluPluginDynamic", x, domain=DOMAIN, type_id=0, plugin_version="1")

    x = net.add("Add", "x", net.weight(1, TOKENS, WIDTH))
    y = feed_forward(net, feed_forward(net, x, gelu), gelu)
    net.add("MatMul", net.norm(y), net.weight(WIDTH, 16), outputs=("y",))
    return net.save(folder, {"x": net.rng.standard_normal((1, TOKENS, WIDTH)).astype(np.float32)}, {"y": 1})


def plug_norm(folder: Path) -> Path:
    """Products with a plug-in for LayerNorm between them, of a width that it has a kernel for."""
    net, width = Net("plug_norm"), 320
    x = "x"
    for _ in range(2):
        ones, zeros = (net.constant(np.full(width, value, np.float32)) for value in (1, 0))
        y = net.add("LayerNorm", x, ones, zeros, domain=DOMAIN, plugin_version="1", epsilon=1e-5, axis=-1)
        wide = net.add("Relu", net.add("MatMul", y, net.weight(width, 2 * width)))
        x = net.add("Add", x, net.add("MatMul", wide, net.weight(2 * width, width)))
    net.add("MatMul", x, net.weight(width, 16), outputs=("y",))
    return net.save(folder, {"x": net.rng.standard_normal((1, TOKENS, width)).astype(np.float32)}, {"y": 1})


def plug_nms(folder: Path) -> Path:
    """Convolutions, boxes and scores, and the plug-in that suppresses boxes behind them."""
    net = Net("plug_nms")
    x = "x"
    for a, b in ((3, 32), (32, 64), (64, 64)):
        x = net.add("Relu", net.add("Conv", x, net.weight(b, a, 3, 3), pads=[1] * 4, strides=[2, 2]))
    rows = {}
    for name, channels in (("boxes", 4), ("scores", 5)):
        y = net.add("Conv", x, net.weight(channels, 64, 1, 1))
        y = net.add("Reshape", y, net.constant(np.array([1, channels, -1], np.int64)))
        rows[name] = net.add("Sigmoid", net.add("Transpose", y, perm=[0, 2, 1]))
    low, high = (net.add("Slice", rows["boxes"], *map(net.constant, cut)) for cut in _halves())
    corners = net.add("Concat", low, net.add("Add", low, net.add("Mul", high, net.constant(np.float32(0.2)))), axis=2)
    net.add(
        "EfficientNMS_TRT", corners, rows["scores"], outputs=("count", "found", "score", "kind"), domain=DOMAIN,
        plugin_version="1", score_threshold=0.3, iou_threshold=0.5, max_output_boxes=20, background_class=-1,
        score_activation=0, box_coding=0,
    )  # fmt: skip
    sample = {"x": net.rng.standard_normal((1, 3, 96, 96)).astype(np.float32)}
    return net.save(folder, sample, {"count": TensorProto.INT32, "found": 1, "score": 1, "kind": TensorProto.INT32})


def _halves() -> list[tuple[np.ndarray, ...]]:
    return [tuple(np.array([n], np.int64) for n in (first, first + 2, 2)) for first in (0, 2)]


def branch(folder: Path) -> Path:
    """An If between products: the condition comes from the data."""
    net = Net("branch")
    x = net.norm(net.add("MatMul", "x", net.weight(WIDTH, WIDTH)))
    often = net.add("Greater", net.add("ReduceMean", x, keepdims=0), net.constant(np.float32(-1.0)))
    ways = []
    for name in ("then", "else"):
        inner = Net(f"branch {name}", f"{name}_")
        made = inner.add("Tanh", inner.add("MatMul", x, inner.weight(WIDTH, WIDTH)))
        result = [value(made, TensorProto.FLOAT, 1, TOKENS, WIDTH)]
        ways.append(helper.make_graph(inner.nodes, name, [], result, inner.weights))
    x = net.add("If", often, then_branch=ways[0], else_branch=ways[1])
    net.add("MatMul", net.norm(x), net.weight(WIDTH, 16), outputs=("y",))
    return net.save(folder, {"x": net.rng.standard_normal((1, TOKENS, WIDTH)).astype(np.float32)}, {"y": 1})


def loop(folder: Path) -> Path:
    """A Loop of three turns, a product and a normalization each, between products."""
    net = Net("loop")
    x = net.add("MatMul", "x", net.weight(WIDTH, WIDTH))
    weight = net.weight(WIDTH, WIDTH)
    inner = Net("turn", "turn_")
    y = inner.norm(inner.add("MatMul", "state", weight))
    results = [inner.add("Identity", "go"), inner.add("Add", "state", y)]
    inputs = [value("i", TensorProto.INT64), value("go", TensorProto.BOOL)]
    state = [TensorProto.FLOAT, 1, TOKENS, WIDTH]
    outputs = [value(results[0], TensorProto.BOOL), value(results[1], *state)]
    body = helper.make_graph(inner.nodes, "turn", [*inputs, value("state", *state)], outputs, inner.weights)
    x = net.add("Loop", net.constant(np.array(3, np.int64)), net.constant(np.array(True)), x, body=body)
    net.add("MatMul", net.norm(x), net.weight(WIDTH, 16), outputs=("y",))
    return net.save(folder, {"x": net.rng.standard_normal((1, TOKENS, WIDTH)).astype(np.float32)}, {"y": 1})


NETWORKS: dict[str, Callable[[Path], Path]] = {f.__name__: f for f in (plug, plug_norm, plug_nms, branch, loop)}


def main() -> None:
    folder, *names = sys.argv[1:] or ["networks"]
    for name in names or NETWORKS:
        path = NETWORKS[name](Path(folder))
        print(path, f"{path.stat().st_size >> 10} KiB")


if __name__ == "__main__":
    main()
