"""Small ONNX files for tests, made with seeded weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from cp_debug.backends.executor import Executor
from cp_debug.graph.graph import Graph, Node
from cp_debug.graph.scales import Scales
from cp_debug.quantization.onnx_ptq import GraphCalibration


def node_of(op: str, inputs: Sequence[str], outputs: Sequence[str] = ("y",), index: int = 3, **attributes: Any) -> Node:
    """A node by itself, as a graph would read it."""
    return Node.of(index, helper.make_node(op, inputs, outputs, f"n{index}", **attributes))


def graph_of(
    folder: Path,
    nodes: Sequence[onnx.NodeProto],
    inputs: Mapping[str, Sequence[int | str | None] | None] | Sequence[onnx.ValueInfoProto],
    weights: Mapping[str, np.ndarray] | Sequence[onnx.TensorProto] = (),
) -> Graph:
    """A graph whose output is what the last of its nodes makes; inputs that are shapes alone are FP32."""
    if isinstance(inputs, Mapping):
        inputs = [helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, shape) for n, shape in inputs.items()]
    if isinstance(weights, Mapping):
        weights = [numpy_helper.from_array(array, name) for name, array in weights.items()]
    outputs = [helper.make_empty_tensor_value_info(nodes[-1].output[0])]
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    graph = helper.make_graph(nodes, "g", inputs, outputs, weights)
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=8), folder / "g.onnx")
    return Graph(folder / "g.onnx")


def read_node(folder: Path, op: str, inputs: Sequence[str], **attributes: Any) -> Node:
    """A node of a file: it reads ``x`` of any shape and weights of zeros, [6, 4] of a product and [6, 4, 1, 1] else."""
    shape = (6, 4) if op in ("Gemm", "MatMul") else (6, 4, 1, 1)
    weights = {name: np.zeros(shape, np.float32) for name in inputs if name != "x"}
    return graph_of(folder, [helper.make_node(op, inputs, ["y"], **attributes)], {"x": None}, weights).nodes[0]


def calibrate_graph(
    graph: Graph, samples: Iterable[Mapping[str, np.ndarray]], method: str = "max", skip: Sequence[str] = ()
) -> Scales:
    """The scales of ``graph`` from ``samples``, its inputs by name; the keys are names of nodes."""
    calibration, executor = GraphCalibration(graph, method, skip), Executor(graph)
    for inputs in samples:
        calibration.run(executor, inputs)
    return calibration.scales()


class NetBuilder:
    """Writes a graph node by node; every method returns the name of the value it made."""

    def __init__(self, seed: int = 0) -> None:
        self.rng = np.random.default_rng(seed)
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []

    def op(self, kind: str, *inputs: str, name: str = "", outputs: int = 1, **attributes: object) -> str:
        name = name or f"{kind.lower()}_{len(self.nodes)}"
        made = [name] if outputs == 1 else [f"{name}_{i}" for i in range(outputs)]
        node = helper.make_node(kind, inputs, made, name=f"node_{name}", **attributes)
        node.metadata_props.add(key="made_by", value="NetBuilder")
        self.nodes.append(node)
        return made[0]

    def weight(self, array: np.ndarray, name: str = "") -> str:
        name = name or f"w_{len(self.weights)}"
        self.weights.append(numpy_helper.from_array(array, name))
        return name

    def conv(self, x: str, cin: int, cout: int, *, k: int = 3, stride: int = 1, name: str = "") -> str:
        scale = np.sqrt(2 / (cin * k * k))
        w = self.weight((self.rng.standard_normal((cout, cin, k, k)) * scale).astype(np.float32))
        b = self.weight((self.rng.standard_normal(cout) * 0.1).astype(np.float32))
        return self.op("Conv", x, w, b, name=name, kernel_shape=[k, k], pads=[k // 2] * 4, strides=[stride] * 2)

    def batch_norm(self, x: str, channels: int) -> str:
        scale, shift, mean, var = (self.rng.uniform(0.5, 1.5, channels).astype(np.float32) for _ in range(4))
        return self.op("BatchNormalization", x, *(self.weight(a) for a in (scale, shift, mean, var)))

    def save(self, path: Path, inputs: dict[str, tuple[int, list]], outputs: list[str], opset: int = 17) -> Path:
        graph = helper.make_graph(
            self.nodes,
            "net",
            [helper.make_tensor_value_info(n, kind, shape) for n, (kind, shape) in inputs.items()],
            [onnx.ValueInfoProto(name=o) for o in outputs],
            self.weights,
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=9)
        onnx.save(onnx.shape_inference.infer_shapes(model), str(path))
        return path


def second_like(path: Path, *, depth: int = 2, size: int = 32) -> Path:
    """Conv + BatchNormalization + Relu in two blocks, deblocks, concat, two heads: ``x`` [1, 16, size, size]."""
    net = NetBuilder()

    def layer(x: str, cin: int, cout: int, stride: int = 1) -> str:
        return net.op("Relu", net.batch_norm(net.conv(x, cin, cout, stride=stride), cout))

    x = layer("x", 16, 32)
    for _ in range(depth):
        x = layer(x, 32, 32)
    y = layer(x, 32, 64, 2)
    for _ in range(depth):
        y = layer(y, 64, 64)
    up = net.weight((net.rng.standard_normal((64, 32, 2, 2)) * 0.1).astype(np.float32))
    y = net.op("Relu", net.batch_norm(net.op("ConvTranspose", y, up, kernel_shape=[2, 2], strides=[2, 2]), 32))
    z = layer(net.op("Concat", layer(x, 32, 32), y, axis=1), 64, 32)
    for head, channels in (("heatmap", 5), ("reg", 2)):
        net.conv(layer(z, 32, 32), 32, channels, name=head)
    return net.save(path, {"x": (1, [1, 16, size, size])}, ["heatmap", "reg"])


def residual(path: Path) -> Path:
    """Residual adds, pooling, concat, a matrix product: ``x`` [batch, 16, 16, 16] to ``y`` and ``logits``."""
    net = NetBuilder(1)
    x = net.op("Relu", net.conv("x", 16, 32))
    for _ in range(2):
        y = net.conv(net.op("Relu", net.conv(x, 32, 32)), 32, 32)
        x = net.op("Relu", net.op("Add", y, x))
    x = net.op("MaxPool", x, kernel_shape=[2, 2], strides=[2, 2])
    x = net.op("Concat", x, net.op("Sigmoid", net.conv(x, 32, 32, k=1)), axis=1)
    net.conv(x, 64, 8, name="y")
    pooled = net.op("Flatten", net.op("GlobalAveragePool", x))
    w = net.weight(net.rng.standard_normal((64, 10)).astype(np.float32))
    net.op("Softmax", net.op("MatMul", pooled, w), name="logits")
    return net.save(path, {"x": (1, ["batch", 16, 16, 16])}, ["y", "logits"])


def marked(graph: Graph, values: Iterable[str]) -> onnx.ModelProto:
    """The whole model with ``values`` as further outputs, typed where the type is known."""
    model = onnx.ModelProto()
    model.CopyFrom(graph.proto)
    present = {v.name for v in graph.outputs}
    for name in dict.fromkeys(values):
        if name not in present:
            model.graph.output.add(name=name, type=graph.types.get(name))
    return model


def random_dag(path: Path, recipe: list[tuple[int, int, int]], seed: int) -> Path:
    """A graph of one node (or two) per (kind, i, j), reading values i and j made before: input ``x`` [1, 4, 5, 5]."""
    net = NetBuilder(seed)
    values = ["x"]
    for kind, i, j in recipe:
        a, b = values[i % len(values)], values[j % len(values)]
        if kind == 0:
            values.append(net.conv(a, 4, 4))
        elif kind == 1:
            values.append(net.op("Add", a, b))
        elif kind == 2:
            values.append(net.op("Mul", net.op("Sigmoid", a), b))
        elif kind == 3:
            values.append(net.op("Relu", a))
        elif kind == 4:
            values.append(net.conv(net.op("Concat", a, b, axis=1), 8, 4, k=1))
        elif kind == 5:
            first = net.op("Split", a, outputs=2, axis=1, num_outputs=2)
            values.append(net.op("Concat", f"{first.removesuffix('_0')}_1", first, axis=1))
        elif kind == 6:
            values.append(net.op("MatMul", a, net.weight(net.rng.standard_normal((5, 5)).astype(np.float32))))
        else:
            values.append(net.op("If", net.weight(np.array(seed % 2 == 0)), **_branches(a, b, len(net.nodes))))
    return net.save(path, {"x": (1, [1, 4, 5, 5])}, list(dict.fromkeys(values[-2:])) or ["x"], opset=18)


def _branches(a: str, b: str, index: int) -> dict[str, onnx.GraphProto]:
    """Two branches that read outer values: ``a`` in one, ``a`` and ``b`` in the other."""

    def branch(name: str, kind: str, *inputs: str) -> onnx.GraphProto:
        out = f"{name}_{index}"
        return helper.make_graph([helper.make_node(kind, inputs, [out])], name, [], [onnx.ValueInfoProto(name=out)])

    return {"then_branch": branch("then", "Relu", a), "else_branch": branch("else", "Add", a, b)}
