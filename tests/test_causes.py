"""Each cause on one small layer: the true one wins over all others, and rounding alone claims nothing."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from faults.precision import LoweredBackend
from nets import NetBuilder
from torch import Tensor, nn

from cp_debug.backends.arithmetic import (
    BF16,
    FP16,
    FP16ACC,
    FP32,
    FP64,
    TF32,
    TF32_CUT,
    TF32_DECONV,
    Arithmetic,
    round_tf32,
)
from cp_debug.backends.base import Program, Session
from cp_debug.backends.executor import Executor
from cp_debug.backends.kernels.fp16_accumulation import with_epilogue
from cp_debug.backends.registry import create
from cp_debug.backends.spec import BackendSpec
from cp_debug.backends.torch_backend import TorchBackend
from cp_debug.bisect.causes.search import Explanation, explain
from cp_debug.bisect.causes.segment import Segment, SegmentContext
from cp_debug.bisect.engine import Options, bisect
from cp_debug.detection.changes import DetectionChange, compare_detections
from cp_debug.graph.graph import Graph
from cp_debug.recipes.torch_callable import TorchModel

CHANNELS, SIZE = 16, 24


@pytest.fixture(scope="module")
def net(tmp_path_factory: pytest.TempPathFactory) -> Graph:
    """One layer of each kind, every one reading ``x`` [1, 16, 24, 24] or a value made from it."""
    net = NetBuilder(3)
    net.conv("x", CHANNELS, CHANNELS, name="conv")
    net.op("Relu", "conv", name="relu")
    net.op("Sigmoid", "conv", name="sigmoid")
    net.nodes[-1].name = "sigmoid"
    net.op("Identity", net.batch_norm("conv", CHANNELS), name="normalized")
    net.conv("x", CHANNELS, CHANNELS, stride=2, name="strided")
    sizes = net.weight(np.array([1, 1, 2, 2], np.float32))
    net.op("Resize", "x", "", sizes, name="resized", mode="linear", coordinate_transformation_mode="half_pixel")
    net.op("QuantizeLinear", "x", net.weight(np.float32(0.04)), net.weight(np.int8(0)), name="levels")
    matrix = net.rng.standard_normal((SIZE, 64)).astype(np.float32)
    net.op("MatMul", "x", net.weight(matrix), name="product")
    outputs = ["relu", "sigmoid", "normalized", "strided", "resized", "levels", "product"]
    path = net.save(tmp_path_factory.mktemp("causes") / "net.onnx", {"x": (1, [1, CHANNELS, SIZE, SIZE])}, outputs)
    return Graph(path)


def segment(graph: Graph, target: str, claim: str = "fp32", known: tuple[str, ...] = (), **inputs: Tensor) -> Segment:
    """The segment of ``target`` on inputs as FP32 makes them; the captured result is FP32's until a test spoils it."""
    torch.manual_seed(1)
    given = {"x": torch.randn(1, CHANNELS, SIZE, SIZE), **inputs}
    values: dict[str, Tensor] = dict(given)
    Executor(graph, FP32).run(given, lambda name, value: values.__setitem__(name, value))
    context = SegmentContext(Program("net", graph), Executor(graph, FP64), claim)
    kept = known or tuple(v for v in graph.values if not target.startswith("norm") or v in ("conv", target))
    return Segment.of(context, target, [k for k in kept if k != target], lambda name: values[name])


def spoilt(found: Segment, test: Tensor) -> Segment:
    """The same segment when the backend's result is ``test``, stored in FP32."""
    return Segment(found.context, found.nodes, found.target, found.given, test.float())


def named(found: Segment) -> Explanation:
    return explain(found)[0]


def in_arithmetic(arithmetic: Arithmetic) -> Callable[[Segment], Tensor]:
    return lambda s: s.run(arithmetic)


def one_channel(x: Tensor) -> Tensor:
    changed = x.clone()
    changed[:, 3] *= 1.2
    return changed


def swapped(x: Tensor) -> Tensor:
    return x[:, [1, 0, *range(2, CHANNELS)]]


def quantized(x: Tensor, largest: float) -> Tensor:
    return (x / largest * 127).round().clamp(-128, 127) * largest / 127


def with_weight(found: Segment, change: Callable[[Tensor], Tensor]) -> Tensor:
    node = found.nodes[-1]
    weight = found.weight(node, 1)
    assert weight is not None
    value = found.edited(node, inputs={1: change(weight)})
    assert value is not None
    return value


def noise(found: Segment, size: float) -> Tensor:
    return torch.randn(found.exact.shape, generator=torch.Generator().manual_seed(2)).double() * size


def other_weights(found: Segment) -> Tensor:
    return with_weight(found, lambda w: w + 0.01 * torch.randn(w.shape, generator=torch.Generator().manual_seed(5)))


CASES: list[tuple[str, str, Callable[[Segment], Tensor]]] = [
    ("tf32", "conv", in_arithmetic(TF32)),
    ("tf32", "product", in_arithmetic(TF32)),
    ("tf32", "conv", in_arithmetic(TF32_CUT)),
    ("tf32", "product", in_arithmetic(TF32_DECONV)),
    ("fp16", "conv", in_arithmetic(FP16)),
    ("fp16", "relu", in_arithmetic(FP16)),
    ("bf16", "conv", in_arithmetic(BF16)),
    ("bf16", "conv", lambda s: s.exact.bfloat16().double()),
    ("fp16-accumulation", "conv", in_arithmetic(replace(FP16ACC, tile=16))),
    ("fp16-overflow", "conv", lambda s: s.exact.half().double()),
    ("saturated", "conv", lambda s: s.exact.clamp(-1, 1)),
    ("scaled", "relu", lambda s: s.exact * 1.02),
    ("scaled", "product", lambda s: s.exact * 0.5),
    ("weights-scaled", "conv", lambda s: with_weight(s, lambda w: w * 1.001)),
    ("shifted", "relu", lambda s: s.exact + 0.01),
    ("bias-scaled", "conv", lambda s: s.exact + 0.1 * s.bias if s.bias is not None else s.exact),
    ("channels-scaled", "relu", lambda s: one_channel(s.exact)),
    ("channels-shifted", "conv", lambda s: s.exact + torch.linspace(-1, 1, CHANNELS).reshape(-1, 1, 1)),
    ("missing-activation", "relu", lambda s: s.input("conv")),
    ("missing-activation", "sigmoid", lambda s: s.input("conv")),
    ("doubled-activation", "sigmoid", lambda s: s.exact.sigmoid()),
    ("extra-activation", "conv", lambda s: s.exact.sigmoid()),
    ("padding", "conv", lambda s: s.edited(s.nodes[-1], pads=[2, 2, 0, 0])),
    ("padding", "strided", lambda s: s.edited(s.nodes[-1], pads=[2, 1, 0, 1])),
    ("attribute", "resized", lambda s: s.edited(s.nodes[-1], coordinate_transformation_mode="asymmetric")),
    ("spatial-shift", "relu", lambda s: s.exact.roll((1, -1), (2, 3))),
    ("transposed", "relu", lambda s: s.exact.transpose(1, 3).reshape(s.exact.shape)),
    ("transposed", "product", lambda s: s.exact.transpose(-1, -2).reshape(s.exact.shape)),
    ("flipped", "conv", lambda s: s.exact.flip(3)),
    ("permuted", "conv", lambda s: swapped(s.exact)),
    ("truncated", "conv", lambda s: torch.cat([s.exact[:, :10], 0 * s.exact[:, 10:]], 1)),
    ("never-written", "conv", lambda s: 0 * s.exact),
    ("weight-layout", "conv", lambda s: with_weight(s, lambda w: w.flip((2, 3)))),
    ("weight-layout", "conv", lambda s: with_weight(s, lambda w: w.transpose(2, 3))),
    ("int8", "conv", lambda s: quantized(s.exact, float(s.exact.abs().max()))),
    ("int8-clipped", "conv", lambda s: quantized(s.exact, float(s.exact.abs().max()) / 4)),
    ("int8-coarse", "conv", lambda s: quantized(s.exact, float(s.exact.abs().max()) * 8)),
    ("int8-weights", "conv", lambda s: with_weight(s, lambda w: _per_channel(w))),
    ("int8-per-tensor", "conv", lambda s: with_weight(s, lambda w: quantized(w, float(w.abs().max())))),
    ("int8-scale", "levels", lambda s: (s.input("x") / 0.03).round().clamp(-128, 127)),
    ("int8-zero-point", "levels", lambda s: ((s.input("x") / 0.04).round() + 5).clamp(-128, 127)),
    ("times-infinity", "relu", lambda s: s.exact * torch.inf),
    ("nonfinite", "conv", lambda s: torch.where(noise(s, 1.0) > 2, torch.nan, s.exact)),
    ("normalization-eps", "batchnormalization_3", lambda s: s.edited(s.nodes[-1], epsilon=1e-2)),
]  # fmt: skip


def _per_channel(weight: Tensor) -> Tensor:
    step = weight.abs().amax((1, 2, 3), keepdim=True) / 127
    return (weight / step).round() * step


@pytest.mark.few(11)
@pytest.mark.parametrize(("cause", "target", "spoil"), CASES, ids=[f"{c}-{t}-{i}" for i, (c, t, _) in enumerate(CASES)])
def test_the_true_cause_wins(net: Graph, cause: str, target: str, spoil: Callable[[Segment], Tensor]) -> None:
    scale = 1e5 if cause == "fp16-overflow" else 1.0
    found = segment(
        net, target, x=scale * torch.randn(1, CHANNELS, SIZE, SIZE, generator=torch.Generator().manual_seed(4))
    )
    explanation = named(spoilt(found, spoil(found)))
    assert explanation.cause is not None
    assert explanation.cause.cause == cause
    assert explanation.explained > 0.9
    assert explanation.explained > explanation.runner_up_explained


@pytest.mark.few(2)
@pytest.mark.parametrize("target", ["conv", "relu", "sigmoid", "strided", "product", "resized"])
def test_what_nothing_explains_is_unknown(net: Graph, target: str) -> None:
    found = segment(net, target)
    for size in (1e-3, 1.0):
        assert named(spoilt(found, found.exact + noise(found, size))).cause is None
    mixed = found.exact.clone()
    mixed[..., :3, :5] = noise(found, 2.0)[..., :3, :5]
    assert named(spoilt(found, mixed)).cause is None


def test_other_weights_are_learnt_and_tried_on_the_other_half(tmp_path: Path) -> None:
    net = NetBuilder(7)
    net.conv("x", 4, 4, name="conv")
    graph = Graph(net.save(tmp_path / "net.onnx", {"x": (1, [1, 4, 32, 32])}, ["conv"]))
    torch.manual_seed(0)
    given = {"x": torch.randn(1, 4, 32, 32)}
    context = SegmentContext(Program("net", graph), Executor(graph, FP64), "fp32")
    exact = context.oracle.run(given)["conv"]
    found = Segment(context, graph.nodes, "conv", given, exact)
    explanation = named(spoilt(found, other_weights(found)))
    assert explanation.cause is not None
    assert explanation.cause.cause == "other-weights"
    assert explanation.cause.parameters == 4 * 37


@pytest.mark.slow
def test_another_order_of_fp16_sums_is_named_by_its_magnitude(tmp_path: Path) -> None:
    net = NetBuilder(7)
    net.conv("x", 128, 8, name="conv")
    graph = Graph(net.save(tmp_path / "net.onnx", {"x": (1, [1, 128, 20, 20])}, ["conv"]))
    given = {"x": torch.randn(1, 128, 20, 20, generator=torch.Generator().manual_seed(0)).half().float()}
    context = SegmentContext(Program("net", graph), Executor(graph, FP32), "fp16")
    found = Segment(context, graph.nodes, "conv", given, context.oracle.run(given)["conv"])
    first, other = (found.run(replace(FP16ACC, tile=tile)) for tile in (64, 48))
    exact_order, another_order = (named(spoilt(found, test)) for test in (first, other))
    assert exact_order.cause is not None
    assert another_order.cause is not None
    assert (exact_order.cause.cause, exact_order.cause.evidence["bit_identical"]) == ("fp16-accumulation", 1.0)
    assert exact_order.explained == 1.0
    assert (another_order.cause.cause, another_order.cause.by_magnitude) == ("fp16-accumulation", True)
    assert another_order.explained < 0.5


def test_a_split_sum_is_computed_as_the_kernel_tells(tmp_path: Path) -> None:
    net = NetBuilder(7)
    net.conv("x", 256, 8, k=1, name="conv")
    graph = Graph(net.save(tmp_path / "net.onnx", {"x": (1, [1, 256, 20, 20])}, ["conv"]))
    given = {"x": torch.randn(1, 256, 20, 20, generator=torch.Generator().manual_seed(0)).half().float()}
    context = SegmentContext(Program("net", graph), Executor(graph, FP32), "fp16")
    found = Segment(context, graph.nodes, "conv", given, context.oracle.run(given)["conv"])
    silent = spoilt(found, found.run(replace(FP16ACC, tile=64, split=3)))
    told = spoilt(found, found.run(replace(FP16ACC, tile=64, split=3)))
    told.tactic = "sm80_xmma_gemm_f16f16_f16f16_f16_nn_n_tilesize32x32x64_stage6_warpsize2x2x1_tensor16x8x16"
    told.tactic += " numSplitK: 3 numBuffers: 2 numKernels: 1"
    told_cause, silent_cause = named(told).cause, named(silent).cause
    assert told_cause is not None
    assert silent_cause is not None
    assert (told_cause.evidence["bit_identical"], told_cause.evidence["split"]) == (1.0, 3)
    assert silent_cause.evidence["bit_identical"] < 0.9


def test_a_residual_added_before_the_bias_is_fp16_accumulation_bit_by_bit(tmp_path: Path) -> None:
    """The order behind the sum is that of the engines' kernels, as the benchmarks and predictions have it."""
    net = NetBuilder(7)
    net.op("Relu", net.op("Add", net.conv("x", 128, 8, name="conv"), "r"), name="y")
    graph = Graph(net.save(tmp_path / "net.onnx", {"x": (1, [1, 128, 20, 20]), "r": (1, [1, 8, 20, 20])}, ["y"]))
    made = torch.Generator().manual_seed(0)
    given = {n: torch.randn(1, c, 20, 20, generator=made).half().float() for n, c in (("x", 128), ("r", 8))}
    context = SegmentContext(Program("net", graph), Executor(graph, FP32), "fp16")
    found = Segment(context, graph.nodes, "y", given, context.oracle.run(given)["y"])
    nodes, biases = with_epilogue(graph, graph.nodes, given)
    explanation = named(spoilt(found, found.run(FP16ACC, nodes, biases)))
    assert explanation.cause is not None
    assert explanation.cause.cause == "fp16-accumulation"
    assert explanation.cause.evidence["bit_identical"] == 1.0
    assert explanation.cause.evidence["epilogue"] == "a residual before the bias"


@pytest.mark.parametrize(("size", "cause"), [(2e-6, "fp16-underflow"), (4e-5, "fp16-flush")])
def test_underflow_and_flushed_subnormals(net: Graph, size: float, cause: str) -> None:
    relu = segment(net, "relu", claim="fp16")
    small = {"conv": size * torch.randn(1, CHANNELS, SIZE, SIZE, generator=torch.Generator().manual_seed(4))}
    found = Segment(relu.context, relu.nodes, "relu", small, relu.test)
    flushed = torch.where(found.exact < 2**-14, 0.0, found.exact.half().double())
    explanation = named(spoilt(found, found.claimed if cause == "fp16-underflow" else flushed))
    assert explanation.cause is not None
    assert explanation.cause.cause == cause


@pytest.mark.parametrize("claim", ["fp16", "bf16"])
@pytest.mark.parametrize("rounded", [True, False])
def test_a_number_that_becomes_1_is_told_where_its_rest_is_asked_for(tmp_path: Path, rounded: bool, claim: str) -> None:
    """−log(−log(x)); a 1 that stands beside an Inf of the backend's own has nothing to do with it."""
    net, value = NetBuilder(), "x"
    for op in ("Log", "Neg", "Log", "Neg"):
        value = net.op(op, value)
    graph = Graph(net.save(tmp_path / "net.onnx", {"x": (1, [4])}, [value]))
    context = SegmentContext(Program("net", graph), Executor(graph, FP64), claim)
    found = Segment(context, graph.nodes, value, {"x": torch.tensor([0.2, 0.9999, 0.3, 0.7])}, torch.zeros(4))
    own = torch.where(torch.arange(4) == 0, torch.inf, found.exact)
    cause = named(spoilt(found, found.claimed if rounded else own)).cause
    assert cause is not None
    assert cause.says.endswith(f": 0.9999 of x is 1 in {claim.upper()}") == rounded


def test_an_overflow_beside_a_number_that_becomes_1_is_an_overflow(tmp_path: Path) -> None:
    net = NetBuilder()
    net.op("Exp", "x", name="y")
    graph = Graph(net.save(tmp_path / "net.onnx", {"x": (1, [4])}, ["y"]))
    found = segment(graph, "y", "fp16", x=torch.tensor([0.9999, 12.0, 0.3, 0.7]))
    cause = named(spoilt(found, found.claimed)).cause
    assert cause is not None
    assert cause.cause == "fp16-overflow"


class Layer(nn.Module):
    """Convolution and BatchNorm, folded by the export."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(4, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8, eps=1e-3)
        for name in ("weight", "running_var"):
            getattr(self.norm, name).data.uniform_(0.01, 0.5)
        self.norm.bias.data.normal_()
        self.norm.running_mean.normal_()

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.norm(self.conv(x)))


def _eps(layer: Layer) -> None:
    layer.norm.eps = 1e-5


def _odd_eps(layer: Layer) -> None:
    layer.norm.eps = 0.0273


def _fresh(layer: Layer) -> None:
    layer.norm.reset_running_stats()


def _stale(layer: Layer) -> None:
    layer.norm.running_mean += torch.linspace(-0.2, 0.2, 8)
    layer.norm.running_var *= torch.linspace(0.5, 2, 8)


def _stale_channel(layer: Layer) -> None:
    layer.norm.running_mean[5] += 0.3
    layer.norm.running_var[5] *= 3


def _scaled_channels(layer: Layer) -> None:
    layer.conv.weight.data[5] *= 0.5


def _two_scaled_channels(layer: Layer) -> None:
    layer.conv.weight.data[2] *= 1.3
    layer.conv.weight.data[5] *= 0.5


@pytest.mark.few(4)
@pytest.mark.parametrize(
    ("change", "cause", "parameters"),
    [
        (_stale_channel, "batchnorm-statistics", 2),
        (_scaled_channels, "channels-scaled", 1),
        (_two_scaled_channels, "channels-scaled", 2),
        (_eps, "normalization-eps", 0),
        (_odd_eps, "normalization-eps", 1),
        (_fresh, "batchnorm-statistics", 0),
        (_stale, "batchnorm-statistics", 15),
    ],
)
@pytest.mark.parametrize("folded", [True, False])
def test_batch_norm_of_another_model(
    change: Callable[[Layer], None], cause: str, parameters: int, folded: bool
) -> None:
    other = Layer().eval()
    change(other)
    example = torch.randn(2, 4, 24, 24, generator=torch.Generator().manual_seed(0))
    models = [TorchModel("layer", layer, example) for layer in (Layer().eval(), other)]
    options = Options(folded=folded, exporter="torchscript")  # the faster one; either folds
    test = bisect(models[0], "torch,ort", test_model=models[1], options=options).tests[0]
    (finding,) = test.findings
    assert finding.cause == cause
    assert finding.layers == [row.name for row in test.guilty]
    assert finding.explained is not None
    assert finding.explained > 0.95
    assert finding.effect.share == pytest.approx(1, abs=0.1)
    if "eps" in finding.evidence:
        assert finding.evidence["eps"] == pytest.approx(other.norm.eps, rel=0.02)


def test_layers_with_one_cause_are_one_finding_and_sound_runs_have_none() -> None:
    model = TorchModel("layer", nn.Sequential(Layer(), nn.Conv2d(8, 8, 3)).eval(), torch.randn(1, 4, 24, 24))
    assert not any(t.findings for t in bisect(model, "torch,ort,emu-tf32,emu-fp16").tests)
    lowered = LoweredBackend(lambda p: {n.name: "tf32" for n in p.graph.nodes if n.op == "Conv"})
    test = bisect(model, [create(BackendSpec.parse("torch")), lowered]).tests[0]
    (finding,) = test.findings
    assert (finding.cause, len(finding.layers)) == ("tf32", 2)
    assert finding.explained is not None
    assert finding.explained > 0.95
    assert (
        bisect(model, [create(BackendSpec.parse("torch")), lowered], options=Options(explain=False)).tests[0].findings
        == []
    )


class Tf32Backend(TorchBackend):
    """Claims FP32, and rounds the operands of every convolution as TF32 does, before BatchNorm scales the result."""

    def open(self, program: Program) -> Session:
        module = copy.deepcopy(program.module)
        assert module is not None
        for layer in module.modules():
            if isinstance(layer, nn.Conv2d):
                layer.weight.data = round_tf32(layer.weight.data)
                layer.register_forward_pre_hook(lambda layer, inputs: (round_tf32(inputs[0]),))
        return super().open(replace(program, module=module))


@pytest.mark.slow
def test_tf32_is_recognized_where_the_graph_is_folded_and_the_module_is_not() -> None:
    model = TorchModel("layer", Layer().eval(), torch.randn(1, 4, 24, 24, generator=torch.Generator().manual_seed(0)))
    backends = [create(BackendSpec.parse("ort")), Tf32Backend(BackendSpec.parse("torch"))]
    (finding,) = bisect(model, backends).tests[0].findings
    assert finding.cause == "tf32"
    assert finding.explained is not None
    assert finding.explained > 0.99


class RestlessBackend(TorchBackend):
    """Adds what happens to lie in memory to the first convolution."""

    def open(self, program: Program) -> Session:
        module = copy.deepcopy(program.module)
        assert module is not None
        convolution = next(m for m in module.modules() if isinstance(m, nn.Conv2d))
        memory = np.random.default_rng()

        def spoil(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            return output + torch.from_numpy(memory.normal(0, 0.01, output.shape).astype(np.float32))

        convolution.register_forward_hook(spoil)
        return super().open(replace(program, module=module))


@pytest.mark.slow
def test_a_layer_that_differs_from_run_to_run_reads_stale_memory() -> None:
    model = TorchModel("layer", Layer().eval(), torch.randn(1, 4, 24, 24))
    backends = [create(BackendSpec.parse("ort")), RestlessBackend(BackendSpec.parse("torch"))]
    test = bisect(model, backends).tests[0]
    assert [(f.cause, f.layers) for f in test.findings] == [("unsteady-memory", ["norm"])]


class Boxes:
    def __init__(self, centers: list[tuple[float, float]], labels: list[int], scores: list[float]) -> None:
        self.boxes = np.zeros((len(centers), 9), np.float32)
        self.boxes[:, :2] = np.reshape(centers, (-1, 2))
        self.scores, self.labels = np.array(scores, np.float32), np.array(labels, np.int32)


def test_detections_lost_gained_and_moved() -> None:
    reference = Boxes([(0, 0), (10, 0), (20, 0)], [0, 0, 1], [0.9, 0.8, 0.7])
    test = Boxes([(0.5, 0), (20, 0), (40, 0)], [0, 0, 0], [0.8, 0.7, 0.3])
    change = compare_detections(reference, test)
    assert (change.reference, change.lost, change.gained, change.moved) == (3, 2, 2, 1)
    assert change.max_center == pytest.approx(0.5)
    assert change.mean_score == pytest.approx(-0.1)
    assert (change + DetectionChange()).mean_score == pytest.approx(-0.1)
    assert compare_detections(reference, Boxes([], [], [])).lost == 3


def in_int32(op: str, x: np.ndarray, k: int) -> np.ndarray:
    small, constant = x.astype(np.int32), np.int32(np.clip(k, -(2**31), 2**31 - 1))
    with np.errstate(over="ignore"):
        return {"Mul": small * constant, "Add": small + constant, "Less": small < constant}[op].astype(x.dtype)


@pytest.mark.parametrize(
    ("op", "k", "captured", "says"),
    [
        ("Mul", 100_000, in_int32, "the result of Mul wraps"),
        ("Add", 5_000_000_000, in_int32, "the constant k saturates, the result of Add wraps"),
        ("Less", 3_000_000_000, in_int32, "the constant k saturates"),
        ("Div", 1, lambda op, x, k: x.astype(np.float32).astype(np.int64), "x loses digits"),
        ("Div", 7, lambda op, x, k: (x // k).astype(np.float32).astype(x.dtype), "the result of Div loses digits"),
        ("Mul", 70_000, lambda op, x, k: (x * k).clip(-(2**31), 2**31 - 1), "the result of Mul saturates"),
        (
            "Mul",
            60_000,
            lambda op, x, k: np.where(x * k < 2**31, x * k, -(2**31)),
            "of Mul becomes -2147483648",
        ),
    ],
)
def test_integers_that_are_computed_in_another_type_say_what_became_of_large_ones(
    op: str, k: int, captured: Callable[[str, np.ndarray, int], np.ndarray], says: str, tmp_path: Path
) -> None:
    net = NetBuilder()
    net.op(op, "x", net.weight(np.array(k), "k"), name="y")
    graph = Graph(net.save(tmp_path / "net.onnx", {"x": (onnx.TensorProto.INT64, [6])}, ["y"]))
    x = np.array([1, 2, 50_000, 70_001, 3_000_000_001 if op == "Less" else 3, 9]) * (1_000_003 if op == "Div" else 1)
    context = SegmentContext(Program("net", graph), Executor(graph, FP64), "fp32")
    explanation = named(Segment(context, graph.nodes, "y", {"x": x}, captured(op, x, k)))
    assert explanation.cause is not None
    assert explanation.cause.cause == ("fp32-integers" if op == "Div" else "int32-overflow")
    assert says in explanation.cause.says


@pytest.mark.parametrize(("value", "guilty"), [(16.0, ["sum"]), (1e3, ["square"])])
def test_a_number_beyond_fp16_is_an_overflow_and_no_other_operator(
    tmp_path: Path, value: float, guilty: list[str]
) -> None:
    """One Inf looks like any other: as that of an Exp, or of a factor. FP16, which is declared, is reason enough."""
    net = NetBuilder()
    axes = net.weight(np.array([1]), "axes")
    net.op("Sqrt", net.op("ReduceSum", net.op("Mul", "x", "x", name="square"), axes, name="sum"), name="y")
    path = net.save(tmp_path / "net.onnx", {"x": (1, [1, 512])}, ["y"])
    np.savez(tmp_path / "x.npz", x=np.full((1, 512), value, np.float32))
    test = bisect(str(path), "ort,emu-fp16", options=Options(inputs=tmp_path / "x.npz")).tests[0]
    assert [row.onnx for row in test.guilty] == guilty
    assert test.findings[0].cause == "fp16-overflow"
    assert "one_of" not in test.findings[0].evidence
