"""Figures of layers in INT8 that are known beforehand: grids, the worst channels, whose scales are to blame."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from nets import NetBuilder

from cp_debug.backends.arithmetic import FP64
from cp_debug.backends.executor import Executor
from cp_debug.bisect.engine import Options, bisect
from cp_debug.bisect.file_quantization import FileQuantization
from cp_debug.bisect.quantized_segment import QuantizerGrid, balanced
from cp_debug.bisect.replay import Replayer
from cp_debug.bisect.replayed import EXCESS, Replay
from cp_debug.bisect.scale_replay import SCALE_MARGINS, ScaleReplay
from cp_debug.bisect.standards import both_int8
from cp_debug.graph.graph import Graph
from cp_debug.programs.precision import BESIDE_INT8


def test_a_grid_reaches_from_its_lowest_level_to_its_highest() -> None:
    grid = QuantizerGrid(torch.tensor(0.1).double(), torch.tensor(10.0).double(), 0, 255, 1)
    assert grid.range == (pytest.approx(-1.0), pytest.approx(24.5))
    assert grid.clipped(torch.tensor([-1.2, -1.0, 24.5, 24.7]).double()) == 0.5
    assert grid.quantized(torch.tensor([-9.0, 0.26, 99.0]).double()).tolist() == pytest.approx([-1.0, 0.3, 24.5])


@pytest.mark.parametrize(("channels", "worst"), [(8, 2), (9, 3), (3, 1)])
def test_the_worst_quarter_of_the_channels_is_rounded_up(channels: int, worst: int) -> None:
    """One channel is off by 10 %, the others by nothing: of two worst it is half of the squares."""
    exact = torch.ones(2, channels, 3, 3)
    error = torch.zeros_like(exact)
    error[:, 1] = 0.1
    assert balanced(error, exact, 1) == pytest.approx(0.1 / worst**0.5)
    exact[:, 2:] = 1e-9  # dead beside the others
    error[:, 2:] = 1.0
    assert balanced(error, exact, 1) == pytest.approx(0.1)
    assert balanced(error[:1, :, :1, :3], exact[:1, :, :1, :3], 1) == 0  # 3 elements a channel tell nothing


def pair(net: NetBuilder, name: str, scale: float, kind: type = np.int8, zero: int = 0) -> str:
    parameters = net.weight(np.array(scale, np.float32)), net.weight(np.array(zero, kind))
    return net.op("DequantizeLinear", net.op("QuantizeLinear", name, *parameters), *parameters)


def quantized_sum(
    folder: Path, scales: tuple[float, float], kind: type = np.int8, zero: int = 0
) -> tuple[Graph, FileQuantization]:
    """x + z, and the same with a Q/DQ pair before each."""
    graphs = []
    for name in ("plain", "quantized"):
        net, inputs = NetBuilder(), ["x", "z"]
        if name == "quantized":
            inputs = [pair(net, value, scale, kind, zero) for value, scale in zip(inputs, scales, strict=True)]
        net.op("Add", *inputs, name="sum")
        shapes = {n: (1, [1, 64]) for n in "xz"}
        graphs.append(Graph(net.save(folder / f"{name}.onnx", shapes, ["sum"])))
    return graphs[0], FileQuantization(graphs[0], graphs[1], {"sum": "sum"}, made_here=True)


@pytest.mark.parametrize("order", [(0.002, 0.02), (0.02, 0.002)])
def test_of_several_inputs_the_one_that_is_clipped_most_is_told(tmp_path: Path, order: tuple[float, float]) -> None:
    """Both reach 1; a scale of 0.002 ends at 0.254."""
    plain, quantized = quantized_sum(tmp_path, order)
    given = {n: torch.linspace(-1, 1, 64)[None] for n in "xz"}
    made = quantized.ideal(Executor(plain, FP64), plain.nodes, given, ["sum"])
    assert made.step == pytest.approx(0.002)
    assert made.clipped == pytest.approx(float((torch.linspace(-1, 1, 64).abs() > 0.255).double().mean()), abs=0.04)


def test_both_inputs_of_an_addition_share_the_best_scale(tmp_path: Path) -> None:
    """The larger one's: 0.3 of a range to 127 rounds to nothing."""
    plain, quantized = quantized_sum(tmp_path, (1.0, 1.0))
    given = {"x": torch.full((1, 64), 127.0), "z": torch.full((1, 64), 0.3)}
    made = quantized.ideal(Executor(plain, FP64), plain.nodes, given, ["sum"])
    assert torch.as_tensor(made.results["sum"]).unique().tolist() == [127.0]


def test_inputs_of_an_addition_on_grids_of_their_own_have_scales_of_their_own(tmp_path: Path) -> None:
    plain, quantized = quantized_sum(tmp_path, (1.0, 0.01))
    given = {"x": torch.full((1, 64), 127.0), "z": torch.full((1, 64), 0.3)}
    made = quantized.ideal(Executor(plain, FP64), plain.nodes, given, ["sum"])
    assert torch.as_tensor(made.results["sum"]).unique().tolist() == [pytest.approx(127.3)]


@pytest.mark.parametrize(("kind", "zero", "bounds"), [(np.uint8, 100, (-100, 155)), (np.int8, 0, (-128, 127))])
def test_the_zero_points_type_says_how_far_the_levels_reach(
    tmp_path: Path, kind: type, zero: int, bounds: tuple[float, float]
) -> None:
    plain, quantized = quantized_sum(tmp_path, (1.0, 1.0), kind, zero)
    grid = quantized.grid(plain.nodes[0], 0)
    assert grid is not None
    assert grid.range == bounds


def compared(captured: Any, exact: Any, declared: Any, ideal: Any) -> Replay:
    """What a layer's own scales, and the best ones, say of it."""

    def with_larger_scales(
        executor: Any, nodes: Any, given: Any, targets: Any, scale_margin: float = 1.0, calibrated: Any = None
    ) -> Any:
        return SimpleNamespace(results={"y": exact + scale_margin * (ideal - exact)})

    measures = {"ideal": with_larger_scales, "beside": BESIDE_INT8}
    own: Any = SimpleNamespace(
        declared=lambda target, known, given: declared, recalibrated=lambda *given, **how: None, **measures
    )
    nobody: Any = SimpleNamespace(graph=None, run_nodes=lambda nodes, given, names: {})
    replay = Replay(introduced=0.2, excess=1.0)
    ScaleReplay(own, nobody, nobody, ()).compare(replay, [], "y", {}, captured, exact, ideal, {}.__getitem__)
    return replay


def test_a_layer_is_measured_against_its_own_scales_and_against_the_oracle() -> None:
    """The oracle says 1, its scales make 1.5 of it, the backend 1.4."""
    exact = torch.ones(1, 8, 4, 4).double()
    found = compared(1.4 * exact, exact, 1.5 * exact, 1.2 * exact)
    assert found.declared == pytest.approx(0.5)
    assert found.deviation_from_scales == pytest.approx(0.1)
    assert found.channel_excess == pytest.approx(2)
    assert compared(1.4 * exact, exact, None, 1.2 * exact).declared is None


@pytest.mark.parametrize(("shape", "channel"), [((2, 8, 4, 4), 1), ((16, 8), 1), ((4, 8, 8), 2)])
def test_channels_of_images_are_behind_the_batch_and_of_others_last(shape: tuple[int, ...], channel: int) -> None:
    """One of eight channels is off by 40 %, all by 10 % as they must: 40 % and 10 % are the worst two."""
    exact = torch.ones(shape).double()
    captured = 1.1 * exact
    captured.select(channel, 3).mul_(1.4 / 1.1)
    expected = ((0.4**2 + 0.1**2) / 2) ** 0.5 / 0.1
    assert compared(captured, exact, None, 1.1 * exact).channel_excess == pytest.approx(expected)


def clipping(folder: Path) -> tuple[Graph, Graph]:
    """A product, and the same with a Q/DQ pair before it that ends at 1."""
    graphs = []
    for name in ("plain", "quantized"):
        net, value = NetBuilder(), "x"
        if name == "quantized":
            value = pair(net, "x", 1 / 127)
        net.op("MatMul", value, net.weight(net.rng.standard_normal((16, 8)).astype(np.float32), "weight"), name="y")
        graphs.append(Graph(net.save(folder / f"{name}.onnx", {"x": (1, [4, 16])}, ["y"])))
    return graphs[0], graphs[1]


@pytest.mark.parametrize("made_here", [False, True])
@pytest.mark.parametrize(("reference_reaches", "innocent"), [(1.0, True), (3.0, False)])
def test_scales_that_fit_what_the_reference_gives_are_not_to_blame(
    tmp_path: Path, reference_reaches: float, innocent: bool, made_here: bool
) -> None:
    """The test's input reaches 3, where the scale clips it: inherited where the reference's reaches 1."""
    plain, quantized = clipping(tmp_path)
    x = np.random.default_rng(0).uniform(-1, 1, (4, 16)).astype(np.float32)
    weight = plain.weight("weight")
    matrix = onnx.numpy_helper.to_array(weight).astype(np.float64)
    clipped = np.clip(np.round(3 * x.astype(np.float64) * 127), -128, 127) / 127
    reference = {"x": reference_reaches * x, "y": (reference_reaches * x) @ matrix}
    test = {"x": 3 * x, "y": clipped @ matrix}
    own = FileQuantization(plain, quantized, {"y": "y"}, made_here=made_here)
    replayer = Replayer(plain, ("fp32", "int8"), "fp64", {"y"}, quantized=(None, own))
    figures = dict(replayer.layers(reference.__getitem__, test.__getitem__))["y"]
    assert figures.introduced is not None
    assert figures.introduced > 0.3
    assert figures.deviation_from_scales == pytest.approx(0, abs=1e-6)
    assert figures.step == pytest.approx(1 / 127)
    assert figures.clipped == pytest.approx(float((np.abs(3 * x) > 1).mean()), abs=0.03)
    assert figures.excess is not None
    assert figures.channel_excess is not None
    if innocent:  # the best scales for what calibration saw cut off just as much
        assert figures.excess == pytest.approx(1, rel=0.05)
        assert figures.channel_excess == pytest.approx(1, rel=0.05)
    else:
        assert figures.excess > EXCESS


def test_a_layer_is_judged_by_the_worst_of_what_good_scales_make(monkeypatch: pytest.MonkeyPatch) -> None:
    exact = torch.ones(1, 8, 4, 4).double()
    monkeypatch.setattr(ScaleReplay, "_recalibrated", lambda self, nodes, target, given, **_: [1.1 * exact])
    assert compared(1.4 * exact, exact, None, 1.2 * exact).channel_excess == pytest.approx(2)
    assert compared(1.4 * exact, exact, None, 1.05 * exact).channel_excess == pytest.approx(4)


@pytest.mark.parametrize(("refitted", "misfit"), [(1.1, 4.0), (1.2, 2.0), (1.26, None), (1.4, None)])
def test_a_stored_weight_misfits_by_the_factor_that_fitting_scales_gain(
    tmp_path: Path, refitted: float, misfit: float | None
) -> None:
    net = NetBuilder()
    net.op("MatMul", "x", net.weight(np.ones((4, 4), np.float32)), name="y")
    graph = Graph(net.save(tmp_path / "n.onnx", {"x": (1, [1, 4])}, ["y"]))
    exact = torch.ones(1, 4).double()

    class Fitting(FileQuantization):
        def __init__(self) -> None:
            pass

        def with_fitted_weight(self, *given: Any) -> Any:
            return refitted * exact

    replaying = ScaleReplay(Fitting(), Executor(graph, FP64), Executor(graph, FP64), ())
    found = replaying._misfit(graph.nodes, "y", {"x": exact}, 1.4 * exact, exact)
    assert found == (misfit if misfit is None else pytest.approx(misfit))


def test_a_symmetric_grid_holds_its_largest_magnitude() -> None:
    grid = QuantizerGrid.symmetric(1.27)
    assert float(grid.scale) == pytest.approx(0.01)
    assert grid.range == (pytest.approx(-1.28), pytest.approx(1.27))


def test_both_sides_are_int8_only_where_both_are() -> None:
    def backend(precision: str) -> Any:
        return SimpleNamespace(precision=precision, spec="ort", emulated=False)

    pairs = [(a, b) for a in ("int8", "fp32") for b in ("int8", "fp32")]
    assert [both_int8(backend(a), backend(b)) for a, b in pairs] == [True, False, False, False]


def test_levels_finer_than_the_function_accuse_nobody(tmp_path: Path) -> None:
    """ONNX Runtime's Sigmoid is off by up to 5e-8, wherever it is; here all of it is 1e-8, and a level 1e-10."""
    text = "g (float[1,1,64,96] x) => (float[1,1,64,96] y) { s = Neg (x) \n y = Sigmoid (s) }"
    plain = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["" : 17]> {text}')
    quantized = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["" : 17]> g (float[1,1,64,96] x) => (float[1,1,64,96] y)'
        "<float a = {0.2}, float b = {7e-10}, int8 z = {0}> {"
        "s = Neg (x) \n i = QuantizeLinear (s, a, z) \n d = DequantizeLinear (i, a, z) \n r = Sigmoid (d) \n"
        "q = QuantizeLinear (r, b, z) \n y = DequantizeLinear (q, b, z) }"
    )
    for name, model in (("net", plain), ("int8", quantized)):
        onnx.save(model, tmp_path / f"{name}.onnx")
    x = np.random.default_rng(0).uniform(17, 22, (1, 1, 64, 96)).astype(np.float32)
    np.savez(tmp_path / "x.npz", x=x)
    options = Options(inputs=tmp_path / "x.npz", explain=False)
    (test,) = bisect(str(tmp_path / "net.onnx"), "ort,ort", test_model=tmp_path / "int8.onnx", options=options).tests
    assert not test.guilty


@pytest.mark.parametrize(("keys", "guilty"), [(8, []), (1024, ["o"])])
def test_a_scale_for_all_that_a_softmax_can_give_may_leave_nothing_of_it(
    tmp_path: Path, keys: int, guilty: list[str]
) -> None:
    """A step of 1/127 holds eight probabilities; of 1024 about equal ones all become 0."""
    begin = f'<ir_version: 8, opset_import: ["" : 17]> g (float[4,{keys}] x, float[{keys},4] v) => (float[4,4] o)'
    plain = onnx.parser.parse_model(begin + "{ p = Softmax (x) \n o = MatMul (p, v) }")
    quantized = onnx.parser.parse_model(
        begin + "<float a = {0.007874}, float b = {0.03}, int8 z = {0}> { p = Softmax (x) \n"
        "i = QuantizeLinear (p, a, z) \n d = DequantizeLinear (i, a, z) \n"
        "j = QuantizeLinear (v, b, z) \n e = DequantizeLinear (j, b, z) \n o = MatMul (d, e) }"
    )
    for name, model in (("net", plain), ("int8", quantized)):
        onnx.save(model, tmp_path / f"{name}.onnx")
    rng = np.random.default_rng(0)
    x, v = rng.uniform(-1, 1, (4, keys)), rng.uniform(1, 3, (keys, 4))
    np.savez(tmp_path / "x.npz", x=x.astype(np.float32), v=v.astype(np.float32))
    options = Options(inputs=tmp_path / "x.npz")
    (test,) = bisect(str(tmp_path / "net.onnx"), "ort,ort", test_model=tmp_path / "int8.onnx", options=options).tests
    assert [row.name for row in test.guilty] == guilty
    assert all("times too coarse" in finding.says for finding in test.findings if guilty)


@pytest.mark.parametrize(
    ("wider", "excess"), [((0.1, 0.1, 0.1), 1.0), ((0.1, 0.02, 0.1), 5.0), ((0.0, 0.0, 0.0), 100.0)]
)
def test_best_scales_that_are_exact_by_luck_accuse_nobody(wider: tuple[float, ...], excess: float) -> None:
    """The backend is off by 10 %, the best scales by 0.1 %; somewhat larger ones say whether that was luck."""
    exact = torch.ones(1, 8, 4, 4).double()
    of_margin = dict(zip((1.0, *SCALE_MARGINS), (0.001, *wider), strict=True))

    def ideal(
        executor: Any, nodes: Any, given: Any, targets: Any, scale_margin: float = 1.0, *_: Any, **way: Any
    ) -> Any:
        return SimpleNamespace(results={"y": (1 + of_margin[scale_margin]) * exact})

    own: Any = SimpleNamespace(
        ideal=ideal, beside=BESIDE_INT8, declared=lambda *given: None, recalibrated=lambda *given, **how: None
    )
    nobody: Any = SimpleNamespace(graph=None, run_nodes=lambda nodes, given, names: dict.fromkeys(names, exact))
    replay, given = Replay(introduced=0.1, excess=1.0), {"y": exact}
    ScaleReplay(own, nobody, nobody, ()).compare(
        replay, [], "y", given, 1.1 * exact, exact, 1.001 * exact, given.__getitem__
    )
    assert replay.channel_excess == pytest.approx(excess, rel=0.01)
