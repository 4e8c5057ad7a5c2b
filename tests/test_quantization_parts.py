"""Parts of quantization and of evaluation by themselves: ranges, batches, switches, errors of outputs."""

from __future__ import annotations

import importlib
import math
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from extras import needs
from nets import NetBuilder
from torch import Tensor, nn

from cp_debug.detection.centerpoint_training import score_table
from cp_debug.detection.evaluate import finite
from cp_debug.detection.evaluation import BackendScores
from cp_debug.detection.t4_metric import check_installed
from cp_debug.errors import InputError, MissingPackage
from cp_debug.graph.graph import Graph
from cp_debug.quantization.amax_checkpoint import load_amax_checkpoint
from cp_debug.quantization.data_ranges import DataRanges
from cp_debug.quantization.histogram import METHODS, Histogram, check_method, weight_amax
from cp_debug.quantization.models import output_sqnr, with_modules
from cp_debug.quantization.narrow_layers import weighted_layers
from cp_debug.quantization.nested_batches import NestedBatches, is_plain, tensors_only
from cp_debug.quantization.output_error import OutputErrors
from cp_debug.quantization.quantized_programs import Calibration, calibrate, of_modules
from cp_debug.quantization.residual_adds import add_quantizers, attach
from cp_debug.quantization.toggles import disable_quantization, enable_quantization
from cp_debug.recipes.base import Component, Sample
from cp_debug.recipes.torch_callable import TorchModel

# Batches ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("batch", "plain"),
    [
        (torch.zeros(1), True),
        ([torch.zeros(1), torch.zeros(2)], True),
        ({"a": torch.zeros(1)}, True),
        ({"a": torch.zeros(1), "b": "text"}, False),
        ([torch.zeros(1), [torch.zeros(1)]], False),
        (7, False),
    ],
)
def test_a_plain_batch_holds_tensors_and_nothing_else(batch: Any, plain: bool) -> None:
    assert is_plain(batch) == plain


class Doubler(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


def test_nested_batches_reach_the_call_as_they_were() -> None:
    model, seen = Doubler(), []

    def call(module: nn.Module, batch: Any) -> Any:
        seen.append(batch)
        return module(batch["data"][0]), "no tensor"

    nested = NestedBatches(model, tensors_only(call))
    batches = [{"data": [torch.tensor([float(i)]), "name"], "count": i, "more": torch.tensor(9)} for i in (1, 2)]
    given = []
    for tensors in nested.tensors(batches):
        given.append(tensors)
        (result,) = model(*(t + 10 for t in tensors))
        assert result.tolist() == [2 * (tensors[0].item() + 10)]
    nested.restore(model)
    assert [[t.tolist() for t in each] for each in given] == [[[1.0], 9], [[2.0], 9]]
    assert [(b["data"][0].item(), b["data"][1], b["count"], b["more"].item()) for b in seen] == [
        (11.0, "name", 1, 19), (12.0, "name", 2, 19),
    ]  # fmt: skip
    assert type(model) is Doubler
    assert model(torch.ones(1)).tolist() == [2]


def test_a_call_that_gives_no_tensor_gives_one_nobody_looks_at() -> None:
    assert tensors_only(lambda model, batch: ["boxes", 3])(nn.Identity(), None).shape == ()
    found = tensors_only(lambda model, batch: {"a": torch.ones(2), "b": "text"})(nn.Identity(), None)
    assert [t.tolist() for t in found] == [[1, 1]]


# Ranges -------------------------------------------------------------------------------------------------------------


def test_a_layers_range_is_that_of_what_it_reads_first(tmp_path: Path) -> None:
    net = NetBuilder()
    net.op("MatMul", net.op("MatMul", "x", net.weight(np.eye(2, dtype=np.float32)), name="mid"), "w_0", name="y")
    graph = Graph(net.save(tmp_path / "n.onnx", {"x": (1, [1, 2])}, ["y"]))
    ranges = DataRanges(graph, graph.nodes)
    assert ranges.watched == {"x", "mid"}
    with pytest.raises(InputError, match="there is no calibration data"):
        ranges.amax("max")
    for x, mid in (([1.0, -3.0], [0.5, 0.25]), ([2.0, 2.5], [-0.75, 0.0])):
        ranges.see("x", np.float32([x]))
        ranges.see("mid", torch.tensor([mid]))
        ranges.see("y", np.float32([[np.nan, 1]]))  # nobody reads it
    assert ranges.amax("max") == {"node_mid": 3.0, "node_y": 0.75}
    with pytest.raises(InputError, match="'x' holds NaN during calibration"):
        ranges.see("x", np.float32([[np.nan, 1]]))
    assert DataRanges(graph, []).amax("max") == {}


def test_every_method_gives_a_limit_within_the_range() -> None:
    histogram = Histogram()
    assert [histogram.amax(method) for method in METHODS] == [1.0] * len(METHODS)  # zeros, or nothing at all
    histogram.add(torch.cat((torch.linspace(-1, 1, 20001), torch.tensor([8.0]))))
    limits = {method: histogram.amax(method) for method in METHODS}
    assert limits["max"] == 8.0
    assert 0.99 <= limits["percentile"] <= 1.01
    assert 0.5 < limits["mse"] < 8.0
    assert all(0 < limit <= 8.0 for limit in limits.values())
    check_method("mse")
    with pytest.raises(InputError, match="recipe: 'best' is unknown; expected one of max, percentile, mse, entropy"):
        check_method("best", "recipe")


@pytest.mark.parametrize("axis", [0, 1])
def test_a_channel_of_zeros_has_the_largest_scale(axis: int) -> None:
    weight = torch.tensor([[1.0, -4.0, 2.0], [0.0, 0.0, 0.0]])
    found = weight_amax(weight if axis == 0 else weight.T, axis, "max")
    assert found.tolist() == [4.0, 4.0]
    assert weight_amax(torch.zeros(2, 3), 0, "mse").tolist() == [1.0, 1.0]


def test_a_weights_limit_has_no_larger_squared_error_than_clipping_nothing() -> None:
    rows = torch.randn(3, 999, generator=torch.Generator().manual_seed(0))

    def error(limit: Tensor) -> Tensor:
        scale = limit[:, None] / 127
        return ((rows / scale).round().clamp(-128, 127) * scale - rows).square().sum(1)

    assert bool((error(weight_amax(rows, 0, "mse")) < error(rows.abs().amax(1))).all())


def test_the_limit_is_chosen_by_what_reaches_the_outputs() -> None:
    # The large element is multiplied by 0 further on: clipping it costs nothing, so that the others get finer steps.
    x, weight = torch.tensor([0.9, -0.37, 0.61, 100.0]), torch.tensor([1.0, 1.0, 1.0, 0.0])
    for weights, low, high in ((weight, 0.0, 10.0), (torch.ones(4), 90.0, 100.0)):
        errors = OutputErrors()
        output = (errors.watch("layer", x) * weights).square()
        assert errors.differentiate([output])
        found = errors.amax("layer", 100.0)
        assert found is not None
        assert low < found <= high
    assert errors.amax("another", 1.0) is None
    assert not OutputErrors().differentiate([torch.ones(2)])


# Switches -----------------------------------------------------------------------------------------------------------


class TensorQuantizer(nn.Module):
    """As the library's: on or off, with a scale or without one."""

    def __init__(self, amax: float | None = 1.0, on: bool = True) -> None:
        super().__init__()
        self.amax, self.is_enabled = amax, on

    def enable(self) -> None:
        self.is_enabled = True

    def disable(self) -> None:
        self.is_enabled = False


def test_switches_last_or_end_with_their_block() -> None:
    part = nn.Sequential(TensorQuantizer(), TensorQuantizer(on=False), TensorQuantizer(amax=None, on=False))

    def on() -> list[bool]:
        return [q.is_enabled for q in part]  # type: ignore[misc]

    with disable_quantization(part):
        assert on() == [False, False, False]
    assert on() == [True, False, False]
    with enable_quantization(part):
        assert on() == [True, True, False]  # one without a scale stays off
    assert on() == [True, False, False]
    switched = disable_quantization(part)
    assert on() == [False, False, False]
    switched.apply()
    assert on() == [False, False, False]
    switched.apply(False)
    assert on() == [True, False, False]
    enable_quantization(part).apply()
    assert on() == [True, True, False]


class Doubled(nn.Module):
    """Stands in for a quantizer: twice what it reads."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


class Sums(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        first = x + y
        second = first * 10 + y
        third = second.clone()
        third += x
        return first, second, third


def test_operands_of_named_additions_go_through_a_module_until_it_is_taken_away() -> None:
    net = nn.Sequential()
    net.add_module("sums", Sums())
    x, y = torch.ones(2), torch.full((2,), 3.0)

    def run() -> list[float]:
        return [float(part[0]) for part in net.sums(x, y)]

    plain = [4.0, 43.0, 44.0]
    assert run() == plain
    undo = attach(net, {"sums/add": Doubled(), "sums/add#3": Doubled()})
    assert list(add_quantizers(net)) == ["sums/add", "sums/add#3"]
    assert run() == [8.0, 83.0, 168.0]
    undo()
    assert run() == plain
    assert add_quantizers(net) == {}
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in net.modules())


# Models -------------------------------------------------------------------------------------------------------------


class Scaled(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor


class Chain:
    """Two components, the second of which reads what the first gives."""

    name = "chain"

    def __init__(self) -> None:
        self.components = tuple(Component(n, ["x"], ["y"], module=Scaled(1.0)) for n in ("first", "second"))

    def feed(self, component: Component, sample: Sample, results: Mapping[str, Any]) -> Any:
        return {"x": results["first"]["y"] if component.name == "second" else sample.arrays["x"]}


def samples() -> Iterator[Sample]:
    yield Sample({"x": np.float32([[1, 1]])}, "a")
    yield Sample({"x": np.float32([[2, 0]])}, "b")


def test_the_noise_of_outputs_adds_up_over_samples_and_components() -> None:
    model: Any = Chain()
    found = output_sqnr(model, {"first": Scaled(1.1), "second": Scaled(1.0)}, samples())
    assert found == {"first/y": pytest.approx(20, abs=1e-4), "second/y": pytest.approx(20, abs=1e-4)}  # 10 % of it
    found = output_sqnr(model, {"first": Scaled(1.0), "second": Scaled(1.01)}, samples())
    assert found == {"first/y": math.inf, "second/y": pytest.approx(40, abs=1e-3)}


def test_a_copy_of_a_model_has_the_other_modules_where_there_are_some() -> None:
    model: Any = Chain()
    other = Scaled(3.0)
    changed = with_modules(model, {"second": other})
    assert changed.components[1].module is other
    assert changed.components[0] is model.components[0]
    assert model.components[1].module is not other


@pytest.mark.parametrize(("family", "taken"), [("int4", ["MatMul"]), ("fp8", ["Conv", "MatMul"])])
def test_int4_takes_matrices_and_other_types_convolutions_too(tmp_path: Path, family: str, taken: list[str]) -> None:
    net = NetBuilder()
    net.op("MatMul", net.conv("x", 2, 2), net.weight(np.ones((4, 3), np.float32)), name="y")
    graph = Graph(net.save(tmp_path / "n.onnx", {"x": (1, [1, 2, 4, 4])}, ["y"]))
    options: Any = SimpleNamespace(family=family)
    assert [node.op for node in weighted_layers(graph, options)] == taken


# Evaluation ---------------------------------------------------------------------------------------------------------


def test_outputs_are_finite_where_every_float_is() -> None:
    whole, good = np.array([2**40]), np.float32([1, 2])
    assert finite({"a": good, "b": whole, "c": np.array([True])})
    assert finite({})
    for strange in (np.nan, np.inf, -np.inf):
        assert not finite({"a": good, "b": np.float32([1, strange])})


def test_figures_of_a_result_come_back_as_intervals() -> None:
    document = {"backend": "ort", "summary": {"mAP": {"value": 0.5, "low": 0.4, "high": 0.6}}, "not_finite": 2}
    found = BackendScores.fields_from(document)
    assert found["not_finite"] == 2
    assert found["backend"] == "ort"
    assert (found["summary"]["mAP"].value, found["summary"]["mAP"].low, found["summary"]["mAP"].high) == (0.5, 0.4, 0.6)
    assert "difference" not in found


def test_a_metric_that_cannot_be_imported_says_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [n for n in sys.modules if n.partition(".")[0] == "perception_eval"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    importlib.invalidate_caches()
    with pytest.raises(MissingPackage, match=r"needs the package perception_eval: pip install"):
        check_installed()
    (tmp_path / "perception_eval").mkdir()
    (tmp_path / "perception_eval" / "__init__.py").write_text("")
    (tmp_path / "perception_eval" / "manager.py").write_text("import nowhere")
    importlib.invalidate_caches()
    with pytest.raises(
        MissingPackage, match=r"perception_eval, which cannot be imported here \(No module named 'nowhere'"
    ):
        check_installed()
    monkeypatch.delitem(sys.modules, "perception_eval")


def test_the_table_of_scores_has_a_row_for_each_class() -> None:
    config: Any = SimpleNamespace(class_names=("car", "bus"))
    table = score_table(np.array([[0.1, 0.2, 0.3, 0.4], [1.0, 1.0, 0.5, 0.5]]), config, 7)
    columns = [list(column.cells) for column in table.columns]
    assert columns[0] == ["car", "bus"]
    assert columns[-1] == ["0.250", "0.750"]
    assert columns[2] == ["0.200", "1.000"]
    assert table.title == "7 held-out scenes: mAP 0.500"


@pytest.mark.parametrize("own", [True, False])
def test_programs_of_other_modules_are_calibrated_as_graphs(monkeypatch: pytest.MonkeyPatch, own: bool) -> None:
    model: Any = Chain()
    programs: Any = [SimpleNamespace(module=c.module if own else Scaled(1.0)) for c in model.components]
    monkeypatch.setattr("cp_debug.quantization.quantized_programs._of_graphs", lambda model, programs: "graphs")
    monkeypatch.setattr(
        "cp_debug.quantization.quantized_programs.quantize_model", lambda model, samples, **options: (model, options)
    )
    calibrated, options = calibrate(model, programs, [], Calibration(method="max", skip_layers=("a",)))  # type: ignore[misc]
    assert calibrated is (model if own else "graphs")
    assert options == {"method": "max", "skip_layers": ("a",)}
    assert of_modules(model, programs) == own
    assert not of_modules(model, [programs[0], SimpleNamespace(module=None)])  # type: ignore[list-item]


def state_of(layer: nn.Linear, **more: Tensor) -> dict[str, Tensor]:
    own = {f"layer.{name}": tensor for name, tensor in layer.state_dict().items()}
    ranges = {"_input": torch.tensor([1.0, 3.0]), "_weight": torch.tensor(2.0)}
    return own | {f"layer.{kind}_quantizer._amax": amax for kind, amax in ranges.items()} | more


@needs("modelopt")
def test_scales_of_another_tools_checkpoint_are_the_largest_and_belong_to_layers(tmp_path: Path) -> None:
    module = nn.Sequential()
    module.add_module("layer", nn.Linear(4, 3))
    model = TorchModel("net", module.eval(), torch.ones(1, 4))
    (sample,) = model.samples(1, 0, None)
    torch.save(state_of(module.layer), tmp_path / "a.pt")  # type: ignore[arg-type]
    (found,) = load_amax_checkpoint(model, tmp_path / "a.pt", sample).values()
    (scales,) = found.scales.layers.values()
    assert scales.input == 3.0
    assert scales.weight.tolist() == [2.0] * 3
    torch.save(state_of(module.layer, **{"other._input_quantizer._amax": torch.tensor(1.0)}), tmp_path / "b.pt")  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"b\.pt: other\._input_quantizer\._amax is the scale of no layer of net"):
        load_amax_checkpoint(model, tmp_path / "b.pt", sample)
