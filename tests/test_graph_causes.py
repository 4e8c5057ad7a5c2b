"""Causes that are read off the difference of two graphs, and the same ones found without the other graph."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnxruntime
import pytest
from nets import NetBuilder
from onnx import numpy_helper

from cp_debug.bisect.causes.base import CAUSES, Candidate, Cause
from cp_debug.bisect.causes.graphs import GraphReader
from cp_debug.bisect.causes.segment import Segment
from cp_debug.bisect.engine import Options, bisect
from cp_debug.bisect.finding import Finding
from cp_debug.graph.graph import Graph
from cp_debug.programs.node_differences import Pieces

Edit = Callable[[onnx.GraphProto], None]


@pytest.fixture(scope="module")
def net(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``x`` [1, 8, 12, 12]: operators with attributes, orders of operands, indices, weights and gates."""
    made = NetBuilder(3)
    rng = made.rng

    def weight(*shape: int) -> str:
        return made.weight((rng.standard_normal(shape) * 0.3).astype(np.float32))

    x = made.op("LeakyRelu", made.conv("x", 8, 16, name="conv"), alpha=0.1, name="leaky")
    y = made.op("Sigmoid", made.op("Elu", made.conv(x, 16, 16, name="other"), name="elu"), name="sigmoid")
    z = made.op("Div", y, made.op("Add", made.op("Sigmoid", x), y, name="sum"), name="div")
    c = made.op("Concat", z, x, axis=1, name="concat")
    ends = [made.weight(np.array(v), n) for n, v in (("starts", [2]), ("ends", [26]), ("axes", [1]))]
    s = made.op("Slice", c, *ends, name="slice")
    g = made.op("Gather", s, made.weight(np.array([3, 17, 7, 21, 5, 14]), "indices"), axis=1, name="gather")
    p = made.op("Softmax", made.op("Relu", g, name="relu"), axis=-1, name="softmax")
    flat = made.op("Reshape", p, made.weight(np.array([4, 3, 72]), "shape"), name="flat")
    m = made.op("MatMul", flat, weight(72, 72), name="matmul")
    made.op("LSTM", m, weight(1, 64, 72), weight(1, 64, 16), weight(1, 128), hidden_size=16, name="lstm")
    path = tmp_path_factory.mktemp("net") / "net.onnx"
    return made.save(path, {"x": (1, [1, 8, 12, 12])}, ["lstm"])


def node(graph: onnx.GraphProto, value: str) -> onnx.NodeProto:
    return next(n for n in graph.node if value in n.output)


def attribute(value: str, **changes: object) -> Edit:
    def edit(graph: onnx.GraphProto) -> None:
        own = node(graph, value)
        kept = [a for a in own.attribute if a.name not in changes]
        del own.attribute[:]
        own.attribute.extend([*kept, *(onnx.helper.make_attribute(k, v) for k, v in changes.items())])

    return edit


def constant(value: str, place: int, change: Callable[[np.ndarray], np.ndarray]) -> Edit:
    def edit(graph: onnx.GraphProto) -> None:
        name = node(graph, value).input[place]
        tensor = next(t for t in graph.initializer if t.name == name)
        array = numpy_helper.to_array(tensor)
        tensor.CopyFrom(numpy_helper.from_array(change(array).astype(array.dtype), name))

    return edit


def reads(value: str, *order: int) -> Edit:
    def edit(graph: onnx.GraphProto) -> None:
        own = node(graph, value)
        own.input[:] = [own.input[i] for i in order]

    return edit


def operator(value: str, op: str) -> Edit:
    def edit(graph: onnx.GraphProto) -> None:
        own = node(graph, value)
        own.op_type = op
        del own.attribute[:]

    return edit


def behind(value: str, op: str, *constants: np.ndarray, **attributes: object) -> Edit:
    """One more node behind a value, which takes over its name."""

    def edit(graph: onnx.GraphProto) -> None:
        own, names = node(graph, value), [f"{value}.{op}.{i}" for i in range(len(constants))]
        own.output[list(own.output).index(value)] = f"{value}.before"
        graph.initializer.extend(numpy_helper.from_array(c, n) for c, n in zip(constants, names, strict=True))
        added = onnx.helper.make_node(op, [f"{value}.before", *names], [value], name=f"{value}.{op}", **attributes)
        graph.node.insert(list(graph.node).index(own) + 1, added)

    return edit


def in_front(value: str, op: str, number: float) -> Edit:
    """One more node with a number in front of the node that computes a value."""

    def edit(graph: onnx.GraphProto) -> None:
        own, name = node(graph, value), f"{value}.number"
        graph.initializer.append(numpy_helper.from_array(np.float32(number), name))
        added = onnx.helper.make_node(op, [own.input[0], name], [f"{value}.in"], name=f"{value}.{op}")
        own.input[0] = added.output[0]
        graph.node.insert(list(graph.node).index(own), added)

    return edit


def both(*edits: Edit) -> Edit:
    return lambda graph: [edit(graph) for edit in edits] and None


def rows_exchanged(array: np.ndarray) -> np.ndarray:
    return array[[1, 0, *range(2, len(array))]]


def gates(array: np.ndarray) -> np.ndarray:
    i, o, f, c = np.split(array, 4, axis=1)
    return np.concatenate([i, f, o, c], axis=1)


def per_channel(array: np.ndarray) -> np.ndarray:
    step = np.abs(array).max(0, keepdims=True) / 127
    return np.round(array / step) * step


CASES: list[tuple[str, Edit, set[str]]] = [
    ("leaky", attribute("leaky", alpha=0.17), {"attribute"}),
    ("softmax", attribute("softmax", axis=1), {"attribute"}),
    ("div", reads("div", 1, 0), {"operand-order"}),
    ("concat", reads("concat", 1, 0), {"concat-order"}),
    ("concat", reads("concat", 0, 0), {"another-operand"}),
    ("conv", constant("conv", 1, lambda a: a * (np.arange(16) > 3)[:, None, None, None]), {"channels-zeroed"}),
    ("slice", lambda g: [constant("slice", p, lambda a: a + 1)(g) for p in (1, 2)] and None, {"index-shifted"}),
    ("gather", constant("gather", 1, lambda a: a + 1), {"index-shifted"}),
    ("relu", operator("relu", "Identity"), {"missing-activation"}),
    ("matmul", constant("matmul", 1, lambda a: a.astype(np.float16)), {"fp16-weights"}),
    ("matmul", constant("matmul", 1, lambda a: a.astype(ml_dtypes.bfloat16)), {"bf16-weights"}),
    ("matmul", constant("matmul", 1, per_channel), {"int8-weights"}),
    ("matmul", constant("matmul", 1, np.transpose), {"weight-layout"}),
    ("matmul", constant("matmul", 1, np.negative), {"weights-scaled", "scaled"}),
    ("conv", constant("conv", 1, lambda a: a.swapaxes(0, 1).reshape(a.shape)), {"weight-layout"}),
    ("conv", constant("conv", 1, lambda a: a[[0, 0, *range(2, 16)]]), {"weight-layout"}),
    ("lstm", constant("lstm", 1, gates), {"gate-order"}),
    ("elu", behind("elu", "Mul", np.float32(1 - 0.1 * (np.arange(12) == 4))), {"channels-scaled"}),
    ("conv", attribute("conv", pads=[0, 1, 2, 1]), {"padding"}),
    ("conv", attribute("conv", dilations=[2, 2], pads=[2, 2, 2, 2]), {"attribute"}),
    ("lstm", constant("lstm", 1, lambda a: a * 1.05), {"weights-scaled"}),
    ("lstm", attribute("lstm", activations=["Sigmoid", "Relu", "Tanh"]), {"attribute"}),
    ("leaky", behind("leaky", "Clip", np.float32(-0.1), np.float32(0.9)), {"saturated"}),
    ("elu", behind("elu", "Elu"), {"doubled-activation"}),
    ("other", behind("other", "Mul", np.float32(1.03)), {"scaled"}),
    ("other", behind("other", "Add", np.float32(0.03)), {"shifted"}),
    ("slice", behind("slice", "Gather", np.roll(np.arange(24), 1), axis=1), {"permuted"}),
]
KNOWN_ONLY: list[tuple[str, Edit, set[str]]] = [
    ("sigmoid", operator("sigmoid", "HardSigmoid"), {"other-operator"}),
    ("matmul", constant("matmul", 1, lambda a: a + 0.01 * np.sign(a)), {"other-weights"}),
    ("conv", constant("conv", 2, np.zeros_like), {"bias-dropped"}),
    ("conv", constant("conv", 2, rows_exchanged), {"weight-layout"}),
    (
        "conv",
        constant("conv", 0 + 1, lambda a: a * (1 + 6e-6 * (np.arange(16) == 5)[:, None, None, None])),
        {"channels-scaled"},
    ),
    ("lstm", attribute("lstm", direction="reverse"), {"attribute"}),
    ("sum", behind("sum", "Neg"), {"extra-operator"}),
    ("elu", behind("elu", "Mul", np.float32(np.arange(12) < 9)), {"truncated"}),
    ("elu", behind("elu", "Mul", np.float32(np.arange(12) % 3 > 0)), {"channels-zeroed"}),
    ("sum", behind("sum", "Add", np.float32(0.01)), {"shifted"}),
    ("other", both(behind("other", "Cast", to=1), behind("other.before", "Cast", to=16)), {"bf16"}),
]


def explained(net: Path, tmp_path: Path, edit: Edit, value: str) -> Finding:
    model = onnx.load(str(net))
    edit(model.graph)
    onnx.save(model, str(tmp_path / "test.onnx"))
    (test,) = bisect(str(net), "ort,ort", test_model=tmp_path / "test.onnx").tests
    assert [row.onnx for row in test.guilty] == [value]
    (finding,) = test.findings
    return finding


@pytest.mark.few(5)
@pytest.mark.parametrize(("value", "edit", "causes"), CASES + KNOWN_ONLY)
def test_the_cause_is_read_off_the_two_graphs(
    net: Path, tmp_path: Path, value: str, edit: Edit, causes: set[str]
) -> None:
    finding = explained(net, tmp_path, edit, value)
    assert finding.cause in causes
    assert finding.evidence["read_off"]
    assert finding.explained is not None
    assert finding.explained > 0.9


@pytest.mark.few(3)
@pytest.mark.parametrize(("value", "edit", "causes"), CASES)
def test_the_cause_is_found_without_the_other_graph(
    net: Path, tmp_path: Path, value: str, edit: Edit, causes: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(GraphReader, "_other", lambda self, component: None)
    assert explained(net, tmp_path, edit, value).cause in causes


@pytest.mark.parametrize(("value", "cause"), [("sigmoid", "extra-operator"), ("matmul", "scaled")])
def test_a_factor_in_front_scales_the_result_of_what_is_linear(
    net: Path, tmp_path: Path, value: str, cause: str
) -> None:
    assert explained(net, tmp_path, in_front(value, "Mul", 1.7), value).cause == cause


@pytest.mark.slow
def test_gates_in_another_order(net: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def edit(graph: onnx.GraphProto) -> None:
        for place in (1, 2):
            constant("lstm", place, gates)(graph)
        constant("lstm", 3, lambda a: np.concatenate([gates(h) for h in np.split(a, 2, axis=1)], axis=1))(graph)

    assert explained(net, tmp_path, edit, "lstm").cause == "gate-order"
    monkeypatch.setattr(GraphReader, "_other", lambda self, component: None)
    assert explained(net, tmp_path, edit, "lstm").cause == "gate-order"


def prepared(path: Path) -> Path:
    """``x`` [3, 16]: operators that read two constants of one shape, or two bounds."""
    made = NetBuilder(7)
    a, b, c, d = (made.weight((made.rng.standard_normal((n, 16)) * 0.3).astype(np.float32)) for n in (8, 8, 16, 16))
    weights = made.op("Concat", a, b, axis=0, name="joined")
    y = made.op("MatMul", "x", made.op("MatMul", weights, made.op("Sub", c, d, name="less"), name="both"), name="mul")
    low, high = (made.weight(np.float32(v)) for v in (-0.3, 0.5))
    made.op("Tanh", made.op("Clip", y, low, high, name="clip"), name="tanh")
    return made.save(path, {"x": (1, [3, 16])}, ["tanh"])


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize(
    ("value", "order", "cause"),
    [("joined", (1, 0), "concat-order"), ("less", (1, 0), "operand-order"), ("clip", (0, 2, 1), "operand-order")],
)
def test_constants_in_another_order_are_not_those_of_another_layer(
    tmp_path: Path, value: str, order: tuple[int, ...], cause: str, known: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not known:
        monkeypatch.setattr(GraphReader, "_other", lambda self, component: None)
    assert explained(prepared(tmp_path / "net.onnx"), tmp_path, reads(value, *order), value).cause == cause


def product(path: Path) -> Path:
    """``x`` [3, 4, 16]: a product with its bias as exporters of PyTorch write it, and one as a Gemm."""
    made = NetBuilder(5)

    def weight(*shape: int) -> str:
        return made.weight((made.rng.standard_normal(shape) * 0.3).astype(np.float32))

    x = made.op("Relu", made.op("Add", made.op("MatMul", "x", weight(16, 24), name="product"), weight(24), name="sum"))
    x = made.op("Reshape", x, made.weight(np.array([12, 24]), "rows"), name="rows_of_all")
    made.op("Tanh", made.op("Gemm", x, weight(24, 24), weight(24), name="gemm", beta=1.0), name="tanh")
    return made.save(path, {"x": (1, [3, 4, 16])}, ["tanh"])


@pytest.mark.parametrize("level", ["ORT_ENABLE_BASIC", "ORT_ENABLE_EXTENDED"])
@pytest.mark.parametrize(
    ("value", "edit", "guilty", "causes"),
    [
        (
            "product",
            constant("product", 1, lambda a: a * (1 + 0.1 * (np.arange(24) == 7))),
            "product",
            {"channels-scaled"},
        ),
        ("sum", constant("sum", 1, lambda a: a * 0.5), "sum", {"bias-scaled"}),
        ("gemm", constant("gemm", 1, lambda a: a.astype(np.float16)), "gemm", {"fp16-weights"}),
        ("gemm", attribute("gemm", beta=2.0), "gemm", {"attribute"}),
    ],
)
def test_the_cause_is_not_how_an_optimizer_writes_the_layer(
    tmp_path: Path, level: str, value: str, edit: Edit, guilty: str, causes: set[str]
) -> None:
    net = product(tmp_path / "net.onnx")
    model = onnx.load(str(net))
    edit(model.graph)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, level)
    options.optimized_model_filepath = str(tmp_path / "test.onnx")
    onnxruntime.InferenceSession(model.SerializeToString(), options)
    (test,) = bisect(str(net), "ort,ort", test_model=tmp_path / "test.onnx").tests
    (row,) = test.guilty
    assert row.replay is not None
    assert f"node_{guilty}" in row.replay.nodes
    assert {finding.cause for finding in test.findings} <= causes


def test_a_pair_of_quantizers_does_not_make_a_quantized_network(net: Path, tmp_path: Path) -> None:
    scale, zero = np.float32(0.01), np.int8(0)
    edits = [
        behind("other", "Cast", to=onnx.TensorProto.FLOAT),
        behind("other.before", "Cast", to=onnx.TensorProto.BFLOAT16),
        behind("gather", "DequantizeLinear", scale, zero),
        behind("gather.before", "QuantizeLinear", scale, zero),
    ]
    model = onnx.load(str(net))
    for edit in edits:
        edit(model.graph)
    onnx.save(model, str(tmp_path / "test.onnx"))
    (test,) = bisect(str(net), "ort,ort", test_model=tmp_path / "test.onnx").tests
    assert {row.onnx for row in test.guilty} == {"other", "gather"}
    assert {finding.cause for finding in test.findings} >= {"bf16"}


@pytest.fixture(scope="module")
def folded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``x`` [1, 8, 12, 12]: twice Conv, BatchNormalization and Relu, which ONNX Runtime makes one node, and a Clip."""
    made = NetBuilder(6)
    kernel = made.weight((made.rng.standard_normal((16, 8, 3, 3)) * 0.2).astype(np.float32))
    x = made.op("Conv", "x", kernel, pads=[1] * 4, name="conv")
    made.op("Relu", made.batch_norm(x, 16), name="relu")
    made.op("Clip", "x", made.weight(np.float32(0.0), "least"), made.weight(np.float32(1.2), "most"), name="clip")
    made.op("Relu", made.batch_norm(made.conv("x", 8, 16, name="side"), 16), name="second")
    outputs = ["relu", "clip", "second"]
    return made.save(tmp_path_factory.mktemp("folded") / "net.onnx", {"x": (1, [1, 8, 12, 12])}, outputs)


@pytest.mark.few(2)
@pytest.mark.parametrize(
    ("edit", "cause"),
    [
        (constant("conv", 1, lambda a: a * (1 + 0.05 * (np.arange(16) == 5)[:, None, None, None])), "channels-scaled"),
        (constant("conv", 1, lambda a: a * 1.05), "weights-scaled"),
        (constant("batchnormalization_1", 3, np.zeros_like), "batchnorm-statistics"),
        (constant("clip", 2, lambda a: a * 0.6), "attribute"),
    ],
)
@pytest.mark.parametrize("backend", ["ort-none", "ort-all"])
def test_a_fused_layer_is_told_by_the_graphs_as_they_were_written(
    folded: Path, tmp_path: Path, edit: Edit, cause: str, backend: str
) -> None:
    model = onnx.load(str(folded))
    edit(model.graph)
    onnx.save(model, str(tmp_path / "test.onnx"))
    (test,) = bisect(str(folded), f"ort,{backend}", test_model=tmp_path / "test.onnx").tests
    assert len(test.guilty) == 1
    assert [finding.cause for finding in test.findings] == [cause]


def test_another_checkpoint_is_read_off_the_files_without_costly_trials(
    folded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(segment: Segment) -> Iterator[Candidate]:
        raise ValueError("was tried")

    monkeypatch.setattr("cp_debug.bisect.causes.findings.CAUSES", [Cause(fails, costly=True), *CAUSES])
    model = onnx.load(str(folded))
    constant("conv", 1, lambda a: np.random.default_rng(7).permutation(a.ravel() * 1.1).reshape(a.shape))(model.graph)
    onnx.save(model, str(tmp_path / "test.onnx"))
    (test,) = bisect(str(folded), "ort,ort-none", test_model=tmp_path / "test.onnx").tests
    assert [finding.cause for finding in test.findings] == ["other-weights"]
    assert not any("was tried" in note for note in test.notes)


def test_costly_causes_are_not_tried_on_every_layer_of_many_that_nothing_explains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def bent(path: Path, by: float) -> Path:
        made, x = NetBuilder(8), "x"
        for i in range(6):
            y = made.op("MatMul", x, made.weight(made.rng.standard_normal((24, 24)).astype(np.float32) / 5))
            waves = made.op("Mul", made.op("Sin", y, name=f"sin{i}"), made.weight(np.float32(by)))
            x = made.op("Add", y, waves, name=f"y{i}")
        return made.save(path, {"x": (1, [1, 8, 24])}, [x])

    asked: list[str] = []

    def costly(segment: Segment) -> Iterator[Candidate]:
        asked.append(segment.target)
        return iter(())

    monkeypatch.setattr("cp_debug.bisect.causes.findings.CAUSES", [Cause(costly, costly=True, by_node=True)])
    monkeypatch.setattr("cp_debug.bisect.causes.graphs.GraphReader._other", lambda self, component: None)
    pair = bent(tmp_path / "net.onnx", 0.1), bent(tmp_path / "bent.onnx", 0.11)
    (test,) = bisect(str(pair[0]), "ort,ort-none", test_model=pair[1]).tests
    assert len(test.guilty) == 6
    assert len(asked) == 4
    assert [note for note in test.notes if note.startswith("2 guilty layers: only quick causes were tried")]


def test_a_scale_that_a_mask_has_ruined_is_too_coarse(tmp_path: Path) -> None:
    nets = {}
    for name in ("reference", "test"):
        made = NetBuilder(7)
        hidden = np.triu(np.full((6, 6), np.finfo(np.float32).min, np.float32), 1)
        scores = made.op("Add", "x", made.weight(hidden, "mask"), name="scores")
        if name == "test":
            ends = made.weight(np.float32(2.68e36), "scale"), made.weight(np.int8(0), "zero")
            scores = made.op("DequantizeLinear", made.op("QuantizeLinear", scores, *ends, name="levels"), *ends)
        made.op("Softmax", scores, axis=-1, name="softmax")
        nets[name] = made.save(tmp_path / f"{name}.onnx", {"x": (1, [1, 4, 6, 6])}, ["softmax"])
    (test,) = bisect(str(nets["reference"]), "ort,ort", test_model=nets["test"]).tests
    assert [row.onnx for row in test.guilty] == ["softmax"]
    assert test.findings[0].cause == "int8-coarse"
    assert "2.68e+36" in test.findings[0].says


def test_a_quantizer_that_makes_0_of_a_divisor_is_named(tmp_path: Path) -> None:
    """``x ÷ (y + 1e-9)`` where y holds 0: the scale rounds the summand away, as FP16 would do, and 0 ÷ 0 is NaN."""
    files = []
    for quantized in (False, True):
        made = NetBuilder()
        total = made.op("Add", "y", made.weight(np.float32([1e-9]), "tiny"), name="total")
        if quantized:
            grid = made.weight(np.float32(0.05), "scale"), made.weight(np.uint8(0), "zero")
            total = made.op("DequantizeLinear", made.op("QuantizeLinear", total, *grid), *grid, name="back")
        made.op("Div", "x", total, name="out")
        path = tmp_path / f"net{len(files)}.onnx"
        files.append(made.save(path, {"x": (1, [1, 6]), "y": (1, [1, 6])}, ["out"]))
    inputs = {"x": np.float32([[0, 1, 2, 0, 3, 4]]), "y": np.float32([[0, 1, 2, 0, 5, 7]])}
    np.savez(tmp_path / "inputs.npz", **inputs)  # type: ignore[arg-type]
    options = Options(inputs=tmp_path / "inputs.npz")
    test = bisect(str(files[0]), "ort,ort-none", test_model=files[1], options=options).tests[0]
    assert [row.onnx for row in test.guilty] == ["out"]
    (found,) = [f for f in test.findings if test.guilty[0].name in f.layers]
    assert found.evidence["read_off"] == "the difference of the two graphs"
    assert "QuantizeLinear" in found.says


def gelu(path: Path, approximately: bool, noise: float = 0.0) -> Path:
    """Gelu by Erf, which the other network approximates by Tanh of a cubic; ``noise`` is in a tensor that is added."""
    made = NetBuilder(3)
    x = made.op("Div", made.conv("x", 4, 8), made.weight(np.float32(2**0.5)), name="scaled")
    if approximately:
        cube = made.op("Mul", made.op("Mul", x, x), x)
        cubic = made.op("Mul", cube, made.weight(np.float32(0.08943)))
        inner = made.op("Mul", made.op("Add", x, cubic), made.weight(np.float32(2 / np.pi**0.5)))
        if noise:
            inner = made.op("Add", inner, made.weight(noise * made.rng.standard_normal((8, 6, 6)).astype(np.float32)))
        y = made.op("Tanh", inner, name="erf")
    else:
        y = made.op("Erf", x, name="erf")
    made.op("Mul", x, y, name="y")
    return Path(made.save(path, {"x": (1, [1, 4, 6, 6])}, ["y"]))


def test_an_operator_that_others_compute_to_another_result_is_another_operator(tmp_path: Path) -> None:
    """None of the causes has such a formula; the other graph has it. With a dense tensor in it, nothing is claimed."""
    exact, formula = gelu(tmp_path / "exact.onnx", False), gelu(tmp_path / "tanh.onnx", True)
    (test,) = bisect(str(exact), "ort,ort-none", test_model=formula).tests
    (finding,) = test.findings
    assert (finding.cause, finding.layers) == ("other-operator", ["node_erf"])
    assert "Erf is computed by 4 × Mul, Add, Tanh in the test" in finding.says
    noisy = gelu(tmp_path / "noisy.onnx", True, 0.3)
    (test,) = bisect(str(exact), "ort,ort-none", test_model=noisy).tests
    assert [f.cause for f in test.findings if "node_erf" in f.layers] == ["unknown"]


def _rotation(made: NetBuilder, a: str, b: str, wrong: bool) -> str:
    """Pairs turned by an angle, or by its negative."""
    cos, sin = (made.weight(f(np.arange(8) / 3).astype(np.float32)) for f in (np.cos, np.sin))

    def turned(kind: str, x: str, y: str) -> str:
        operands = (made.op("Mul", z, w, name=f"{z}_{w}_{wrong}") for z, w in ((x, cos), (y, sin)))
        return made.op(kind, *operands, name=f"{kind}_{wrong}")

    kinds = ("Add", "Sub") if wrong else ("Sub", "Add")
    return made.op("Concat", turned(kinds[0], a, b), turned(kinds[1], b, a), axis=1, name=f"turned_{wrong}")


def _remainder(made: NetBuilder, a: str, b: str, wrong: bool) -> str:
    """The remainder with the divisor's sign, or with the dividend's."""
    divisor, x = made.weight(np.float32(0.3)), made.op("Concat", a, b, axis=1, name="both")
    if wrong:
        return made.op("Mod", x, divisor, fmod=1)
    return made.op("Sub", x, made.op("Mul", made.op("Floor", made.op("Div", x, divisor)), divisor))


@pytest.mark.parametrize(
    ("written", "says"),
    [
        (_rotation, "Sub is Add in the test; Add is Sub in the test"),
        (_remainder, "Div, Floor, Mul, Sub are computed by Mod in the test, with another result"),
    ],
)
def test_operators_that_stand_for_several_are_another_operator(
    written: Callable[[NetBuilder, str, str, bool], str], says: str, tmp_path: Path
) -> None:
    """Nothing between the first of them and the product behind was compared."""
    for wrong in (False, True):
        made = NetBuilder(5)
        a, b = (made.conv("x", 4, 8, name=name) for name in ("a", "b"))
        made.conv(written(made, a, b, wrong), 16, 8, name="y")
        made.save(tmp_path / f"{wrong}.onnx", {"x": (1, [1, 4, 8, 8])}, ["y"])
    (test,) = bisect(str(tmp_path / "False.onnx"), "ort,ort-none", test_model=tmp_path / "True.onnx").tests
    (finding,) = test.findings
    assert (finding.cause, finding.says) == ("other-operator", says)


@pytest.mark.parametrize(
    ("op", "shapes", "alone", "says"),
    [
        ("Gemm", [(8, 6)], (6,), "Gemm has C (given) in the test alone"),
        ("Clip", [()], (), "Clip has max (given) in the test alone"),
        ("GRU", [(1, 12, 8), (1, 12, 4)], (1, 24), "GRU has B (given) in the test alone"),
    ],
)
def test_a_constant_that_the_test_alone_has_is_named(
    op: str, shapes: list[tuple[int, ...]], alone: tuple[int, ...], says: str, tmp_path: Path
) -> None:
    size = {"hidden_size": 4} if op == "GRU" else {}
    for wrong in (False, True):
        made = NetBuilder(5)
        weights = [made.weight(-0.3 * abs(made.rng.standard_normal(shape)).astype(np.float32)) for shape in shapes]
        given = [made.weight(abs(made.rng.standard_normal(alone)).astype(np.float32), "given")] * wrong
        made.op("Tanh", made.op(op, "x", *weights, *given, name="layer", **size), name="y")
        made.save(tmp_path / f"{wrong}.onnx", {"x": (1, [5, 2, 8] if op == "GRU" else [5, 8])}, ["y"])
    (test,) = bisect(str(tmp_path / "False.onnx"), "ort,ort-none", test_model=tmp_path / "True.onnx").tests
    assert [(finding.layers, finding.says) for finding in test.findings] == [(["node_layer"], says)]


def test_what_both_files_hold_alike_is_no_cause(tmp_path: Path) -> None:
    """HardSwish without its division: a product behind it looks as if its alpha were 6. The line of what is replaced
    is told, not that of the product."""
    for wrong in (False, True):
        made = NetBuilder(5)
        weights = [made.weight(made.rng.standard_normal(n).astype(np.float32)) for n in ((16, 16), 16, (16, 5), 5)]
        read = made.op("Gemm", "x", *weights[:2])
        if wrong:
            zero, three, six = (made.weight(np.float32(value)) for value in (0, 3, 6))
            clipped = made.op("Clip", made.op("Add", read, three), zero, six)
        hard = made.op("Mul", read, clipped) if wrong else made.op("HardSwish", read)
        line = 'File "net.py", line 8, in forward\n    y = hardswish(x)\n'
        made.nodes[-1].metadata_props.add(key="pkg.torch.onnx.stack_trace", value=line)
        made.op("Gemm", hard, *weights[2:], name="y")
        made.save(tmp_path / f"{wrong}.onnx", {"x": (1, [6, 16])}, ["y"])
    (test,) = bisect(str(tmp_path / "False.onnx"), "ort,ort-none", test_model=tmp_path / "True.onnx").tests
    (finding,) = test.findings
    assert finding.says == "the result is multiplied by 6"
    assert [row.source for row in test.guilty] == ["net.py:8: y = hardswish(x)"]


@pytest.mark.parametrize(
    ("value", "op", "constants", "cause", "says"),
    [
        ("elu", "Mul", [np.arange(12) < 9], "truncated", "axis 3 is truncated after 9 of 12"),
        ("elu", "Mul", [np.arange(12) % 3 > 0], "channels-zeroed", "4 of 12"),
        ("elu", "Add", [0.2 * (np.arange(12) > 9)], "channels-shifted", "2 of 12"),
        ("elu", "Add", [0.5 * (np.arange(2304) == 7).reshape(1, 16, 12, 12)], "isolated", ""),
        ("other", "Clip", [-0.1, 0.9], "saturated", "0.9"),
        ("other", "Max", [0.0], "extra-activation", "Relu"),
        ("other", "Softsign", [], "extra-activation", ""),
        ("elu", "Add", [np.random.default_rng(0).standard_normal((12, 12))], "unknown", "Add is added"),
    ],
)
def test_what_an_added_node_does_has_the_name_that_the_values_give_it(
    net: Path, tmp_path: Path, value: str, op: str, constants: list[Any], cause: str, says: str
) -> None:
    """A dense tensor that is added may be anything: it is told, and not called a cause."""
    found = explained(net, tmp_path, behind(value, op, *(np.float32(each) for each in constants)), value)
    assert found.cause == cause
    assert f"{op} is added" in found.says
    assert says in found.says


@pytest.mark.parametrize(("low", "high", "telling"), [(-1e4, 0.2, "max"), (-0.2, 1e4, "min")])
def test_of_several_differences_each_is_tried_alone_and_harmless_ones_come_last(
    low: float, high: float, telling: str, tmp_path: Path
) -> None:
    """Both limits of a Clip are halved; one of them is far from every number."""
    made = NetBuilder(4)
    limits = [made.weight(np.float32(limit)) for limit in (low, high)]
    clipped = made.op("Clip", made.conv("x", 8, 8, name="conv"), *limits, name="clip")
    path = made.save(tmp_path / "net.onnx", {"x": (1, [1, 8, 6, 6])}, [clipped])
    proto = onnx.load(path)
    for place in (1, 2):
        constant("clip", place, lambda limit: limit / 2)(proto.graph)
    onnx.save(proto, tmp_path / "test.onnx")
    (test,) = bisect(str(path), "ort,ort-none", test_model=tmp_path / "test.onnx").tests
    (finding,) = test.findings
    first, second = finding.evidence["differences"]
    assert first.startswith(f"Clip: {telling} is ")
    assert second.endswith(" (which changes nothing here)")
    assert telling not in second
    assert finding.fix.endswith(first)


@pytest.mark.parametrize("changed", [False, True])
def test_operands_of_an_addition_have_no_order(tmp_path: Path, changed: bool) -> None:
    """Exchanged, they are no difference by themselves, and what stands in either place is compared all the same."""
    paths = []
    for name in ("a", "b"):
        net = NetBuilder(0)
        product = net.op("MatMul", "x", net.weight(net.rng.standard_normal((8, 8)).astype(np.float32)))
        bias = net.rng.standard_normal(8).astype(np.float32)
        weight = net.weight(-bias if changed and name == "b" else bias)
        net.op("Add", *((product, weight) if name == "a" else (weight, product)), name="sum")
        net.op("Mul", *("sum", product)[:: 1 if name == "a" else -1], name="y")
        paths.append(net.save(tmp_path / f"{name}.onnx", {"x": (1, [4, 8])}, ["y"]))
    graphs_of_both = [Graph(path) for path in paths]
    found = Pieces(graphs_of_both[0], graphs_of_both[0].nodes, graphs_of_both[1], graphs_of_both[1].nodes, {})
    assert [d.cause for d in found.differences()] == (["bias-scaled"] if changed else [])


@pytest.mark.parametrize("changed", [False, True])
def test_constants_of_operands_without_an_order_are_compared_with_their_equals(tmp_path: Path, changed: bool) -> None:
    """Operands of a maximum that stand elsewhere are no difference; the one that is another one is the only one."""
    graphs_of_both = []
    for order, upper in ((("x", "low", "high"), 0.5), (("low", "x", "high"), 0.75 if changed else 0.5)):
        net = NetBuilder(0)
        names = {"x": "x", "low": net.weight(np.float32([-0.5] * 8)), "high": net.weight(np.float32([upper] * 8))}
        net.op("Max", *(names[each] for each in order), name="y")
        graphs_of_both.append(Graph(net.save(tmp_path / f"{len(graphs_of_both)}.onnx", {"x": (1, [4, 8])}, ["y"])))
    ours, theirs = graphs_of_both
    found = Pieces(ours, ours.nodes, theirs, theirs.nodes, {}).differences()
    assert len(found) == changed
    assert not changed or found[0].says.endswith("of Max is scaled by 1.5")


def _masked(path: Path, *, computed: bool, mask: float) -> Path:
    """Scores with a mask, the places of which are stored, or ``computed`` in the file."""
    net = NetBuilder(2)
    later = net.weight(np.triu(np.ones((6, 6), bool), 1))
    if computed:
        ones = net.weight(np.ones((6, 6), np.float32))
        later = net.op("Cast", net.op("Trilu", ones, net.weight(np.array(1))), to=onnx.TensorProto.BOOL)
    scores = net.op("Mul", "x", net.weight(np.float32(0.5)), name="scores")
    masked = net.op("Where", later, net.weight(np.float32(mask), "mask"), scores, name="masked")
    net.op("Softmax", masked, axis=-1, name="y")
    return Path(net.save(path, {"x": (1, [2, 6, 6])}, ["y"]))


def test_what_one_side_computes_of_constants_and_the_other_stores_is_no_difference(tmp_path: Path) -> None:
    files = [_masked(tmp_path / f"{mask}.onnx", computed=mask == -1, mask=mask) for mask in (-1e9, -1)]
    (result,) = bisect(str(files[0]), "ort,ort", test_model=files[1]).tests
    (finding,) = result.findings
    assert finding.says == "mask of Where is -1 instead of -1e+09"
    assert "differences" not in finding.evidence


def test_how_the_test_writes_a_layer_is_not_told_beside_what_is_wrong_in_it(tmp_path: Path) -> None:
    """The result of a GRU, its direction taken away by a Reshape or a Squeeze, its axes by one Transpose or two."""
    files = []
    for other in (False, True):
        net = NetBuilder(4)
        weights = [net.weight((net.rng.standard_normal(s) * 0.3).astype(np.float32)) for s in ((1, 24, 6), (1, 24, 8))]
        gru = net.op("GRU", "x", *weights, hidden_size=8, linear_before_reset=int(not other), name="gru")
        if other:
            rows = net.op("Squeeze", gru, net.weight(np.array([1])))
            net.op("Transpose", net.op("Identity", rows), perm=[1, 0, 2], name="y")
        else:
            rows = net.op("Transpose", gru, perm=[2, 1, 0, 3])
            net.op("Reshape", rows, net.weight(np.array([3, 5, 8])), name="y")
        files.append(net.save(tmp_path / f"{other}.onnx", {"x": (1, [5, 3, 6])}, ["y"]))
    (result,) = bisect(str(files[0]), "ort,ort", test_model=files[1]).tests
    assert [finding.says for finding in result.findings] == ["GRU: linear_before_reset is 0 instead of 1"]


def test_a_fix_names_all_that_differs(tmp_path: Path) -> None:
    files = []
    for factor in (1, 2):
        net = NetBuilder(5)
        weights, bias = (net.rng.standard_normal(shape).astype(np.float32) for shape in ((6, 4), 6))
        given = net.weight(weights * np.linspace(1, factor, 6, dtype=np.float32)[:, None], "w"), net.weight(bias, "b")
        net.op("Gemm", "x", given[0], given[1], transB=1, alpha=float(factor), name="y")
        if factor > 1:
            net.weights[-1].CopyFrom(numpy_helper.from_array(bias + 1, "b"))
        files.append(net.save(tmp_path / f"{factor}.onnx", {"x": (1, [3, 4])}, ["y"]))
    (result,) = bisect(str(files[0]), "ort,ort", test_model=files[1]).tests
    (finding,) = result.findings
    assert (
        finding.fix == "use the same w, b on both sides · undo the difference at node_y: Gemm: alpha is 2 instead of 1"
    )


def test_what_a_slice_is_told_has_its_name(net: Path, tmp_path: Path) -> None:
    finding = explained(net, tmp_path, lambda g: [constant("slice", p, lambda a: a + 1)(g) for p in (1, 2)], "slice")
    assert finding.cause == "index-shifted"
    assert finding.says == "Slice: starts is [3] instead of [2]; Slice: ends is [27] instead of [26]"


def test_layers_are_one_finding_where_one_sentence_holds_for_them(tmp_path: Path) -> None:
    """Other attributes of other operators are two findings; the fix of one names the constants of all its layers."""
    files = []
    for changed in (False, True):
        net, x = NetBuilder(0), "x"
        for i in range(3):
            weight = net.rng.standard_normal((6, 6)).astype(np.float32)
            weight = weight.T.copy() if changed and i != 1 else weight
            x = net.op("LeakyRelu", net.op("MatMul", x, net.weight(weight, f"w{i}")), alpha=0.2 if changed else 0.1)
        net.op("Softmax", x, axis=0 if changed else 1, name="y")
        files.append(net.save(tmp_path / f"{changed}.onnx", {"x": (1, [4, 6])}, ["y"]))
    (result,) = bisect(str(files[0]), "ort,ort", test_model=files[1]).tests
    by_text = {finding.says: finding for finding in result.findings}
    assert sorted(len(finding.layers) for finding in result.findings) == [1, 2, 3]
    assert by_text["Softmax: axis is 0 instead of 1"].layers == ["node_y"]
    assert len(by_text["LeakyRelu: alpha is 0.2 instead of 0.1"].layers) == 3
    assert by_text["MatMul weights: axes in the order [1, 0]"].fix == "use the same w0, w2 on both sides"


def test_layers_with_other_lists_are_two_findings_and_numbers_a_range(tmp_path: Path) -> None:
    files = []
    for perms, slopes in (((0, 2, 1), (1, 0, 2)), (0.1, 0.1, 0.1)), (((2, 0, 1), (2, 1, 0)), (0.2, 0.3, 0.4)):
        net = NetBuilder(0)
        x = net.op("Transpose", net.op("Tanh", net.op("Transpose", "x", perm=perms[0])), perm=perms[1])
        for slope in slopes:
            x = net.op("LeakyRelu", net.op("Sin", x), alpha=slope)
        net.op("Tanh", x, name="y")
        files.append(net.save(tmp_path / f"{perms[0][0]}.onnx", {"x": (1, [4, 4, 4])}, ["y"]))
    (result,) = bisect(str(files[0]), "ort,ort", test_model=files[1]).tests
    assert {finding.says for finding in result.findings} == {
        "Transpose: perm is [2, 0, 1] instead of [0, 2, 1]",
        "Transpose: perm is [2, 1, 0] instead of [1, 0, 2]",
        "LeakyRelu: alpha is 0.2 to 0.4 instead of 0.1",
    }
