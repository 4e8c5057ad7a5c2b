"""Networks of the cases, out of ONNX's own text: a head and a tail of seeded weights around what a report is about."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx
from onnx import numpy_helper

Constants = Mapping[str, "np.ndarray | tuple[int, ...]"]
"""Name → array, or the shape of seeded weights."""


@dataclass(frozen=True)
class Frame:
    """What stands around the nodes of a report, in ONNX's text syntax; ``{}`` is their place."""

    text: str
    inputs: Mapping[str, Sequence[int]]
    constants: Constants = field(default_factory=dict)
    types: Mapping[str, str] = field(default_factory=dict)
    """Types of inputs that are not float."""


IMAGE = Frame(
    "c1 = Conv<pads=[1, 1, 1, 1]>(x, w1, b1)\nr1 = Relu(c1)\n{}\nc2 = Conv(m, w2, b2)\ny = Sigmoid(c2)",
    {"x": (1, 3, 12, 12)},
    {"w1": (8, 3, 3, 3), "b1": (8,), "w2": (4, 8, 1, 1), "b2": (4,)},
)
"""``r1``, 1×8×12×12, goes in; ``m``, with 8 channels, comes out."""
SQUARE = Frame(IMAGE.text, {"x": (1, 3, 8, 8)}, IMAGE.constants)
"""The same with ``r1`` of 1×8×8×8: axes that cannot be told apart by their lengths."""
TOKENS = Frame(
    "h1 = MatMul(x, w1)\nh2 = Add(h1, b1)\nt1 = Tanh(h2)\n{}\no1 = MatMul(m, w2)\ny = Add(o1, b2)",
    {"x": (2, 9, 16)},
    {"w1": (16, 16), "b1": (16,), "w2": (16, 5), "b2": (5,)},
)
"""``t1``, 2×9×16, goes in; ``m``, with 16 features, comes out."""
CUBE = Frame(TOKENS.text, {"x": (16, 16, 16)}, TOKENS.constants)
SCORES = Frame(
    "q1 = MatMul(x, wq)\nk1 = MatMul(x, wk)\nkt = Transpose<perm=[0, 2, 1]>(k1)\nt1 = MatMul(q1, kt)\n{}\n"
    "p1 = Softmax<axis=-1>(m)\nv1 = MatMul(x, wv)\ny = MatMul(p1, v1)",
    {"x": (2, 9, 16)},
    {"wq": (16, 16), "wk": (16, 16), "wv": (16, 16)},
)
"""Attention: ``t1``, the scores of 2×9×9, goes in; ``m`` is what Softmax reads."""


TYPES = {onnx.TensorProto.FLOAT: np.float32, onnx.TensorProto.INT64: np.int64}
"""Types that inputs may have."""


def ints(*values: int) -> np.ndarray:
    """Sizes, axes, indices: int64[N]."""
    return np.array(values, np.int64)


def floats(*values: float) -> np.ndarray:
    """float32[N]."""
    return np.array(values, np.float32)


def network(frame: Frame, nodes: str, constants: Constants, opset: int, seed: int = 0) -> onnx.ModelProto:
    """A checked model; each node has the name of its first output."""
    inputs = ", ".join(
        f"{frame.types.get(name, 'float')}[{', '.join(map(str, shape))}] {name}" for name, shape in frame.inputs.items()
    )
    head = f'<ir_version: 8, opset_import: ["" : {opset}, "com.microsoft" : 1]>\ng ({inputs}) => (float[] y) {{\n'
    model = onnx.parser.parse_model(f"{head}{frame.text.replace('{}', nodes)}\n}}")
    for node in model.graph.node:
        node.name = node.output[0]
    rng = np.random.default_rng(seed)
    read = {name for node in model.graph.node for name in node.input}
    for name, value in {**frame.constants, **constants}.items():
        if isinstance(value, tuple):
            fan = max(1, int(np.prod(value[1:])) if len(value) == 4 else value[0])
            value = (rng.standard_normal(value) / np.sqrt(fan)).astype(np.float32)
        if name in read:
            model.graph.initializer.append(numpy_helper.from_array(np.asarray(value), name))
    return checked(model)


def checked(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with the shape of its output, which shape inference finds, or ONNX Runtime does. Raises what the
    checker raises."""
    made = onnx.shape_inference.infer_shapes(model)
    del made.graph.value_info[:]
    if not made.graph.output[0].type.tensor_type.HasField("shape"):
        fed = {
            v.name: np.ones([d.dim_value for d in v.type.tensor_type.shape.dim], TYPES[v.type.tensor_type.elem_type])
            for v in made.graph.input
        }
        shape = values_of(made, fed)["y"].shape
        made.graph.output[0].CopyFrom(onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, shape))
    onnx.checker.check_model(made)
    return made


def written_otherwise(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same network as another tool would write it: other names within, constants as nodes, an Identity in it."""
    made = onnx.ModelProto()
    made.CopyFrom(model)
    graph = made.graph
    ends = {v.name for v in (*graph.input, *graph.output)}
    weights = {t.name for t in graph.initializer}
    inner = {o for node in graph.node for o in node.output if o} - ends
    renamed = {name: f"/net/{place}/out" for place, name in enumerate(sorted(inner))}
    for place, node in enumerate(graph.node):
        node.name = f"/net/{place}"
        for values in (node.input, node.output):
            values[:] = [renamed.get(name, name) for name in values]
    small = [t for t in graph.initializer if t.name in weights and np.prod(t.dims) < 64]
    for tensor in small:
        node = onnx.helper.make_node("Constant", [], [tensor.name], name=f"/const/{tensor.name}", value=tensor)
        graph.node.insert(0, node)
        graph.initializer.remove(tensor)
    last = graph.node[-1]
    last.output[0] = "/net/last"
    graph.node.append(onnx.helper.make_node("Identity", ["/net/last"], ["y"], name="/net/end"))
    return checked(made)


def values_of(model: onnx.ModelProto, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Every value that the model computes, by ONNX Runtime without its optimizer."""
    import onnxruntime as ort

    made = onnx.ModelProto()
    made.CopyFrom(model)
    have = {v.name for v in made.graph.output}
    made.graph.output.extend(
        onnx.ValueInfoProto(name=o) for node in made.graph.node for o in node.output if o and o not in have
    )
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    session = ort.InferenceSession(made.SerializeToString(), options, providers=["CPUExecutionProvider"])
    names = [v.name for v in session.get_outputs()]
    return dict(zip(names, session.run(names, dict(inputs)), strict=True))


def behind(model: onnx.ModelProto, name: str, dtype: np.dtype) -> onnx.ModelProto:
    """What the model computes from its value ``name`` on, which becomes an input of type ``dtype``."""
    made = onnx.ModelProto()
    made.CopyFrom(model)
    place = next(i for i, node in enumerate(made.graph.node) if name in node.output)
    kept = list(made.graph.node)[place + 1 :]
    del made.graph.node[:]
    made.graph.node.extend(kept)
    made.graph.input.append(onnx.helper.make_empty_tensor_value_info(name))
    made.graph.input[-1].type.tensor_type.elem_type = onnx.helper.np_dtype_to_tensor_dtype(dtype)
    return made
