"""Optimizer bisection: which optimizers make the difference, and which nodes they rewrite."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from nets import NetBuilder, residual, second_like
from runtimes import since

from cp_debug.backends.base import Program
from cp_debug.backends.ort_backend import OrtBackend
from cp_debug.backends.ort_options import RULE_BASED, active_optimizers
from cp_debug.backends.spec import BackendSpec
from cp_debug.bisect.engine import Options, bisect
from cp_debug.bisect.optimizer_blame import REST, Culprit, OptimizerBlame, Rewrite, _OptimizerSearch, blame_optimizers
from cp_debug.errors import InputError
from cp_debug.graph.graph import Graph
from cp_debug.recipes.onnx_file import OnnxFileModel


def knobs_of(path: Path, spec: str, *, floor: float = 0.0) -> OptimizerBlame:
    model = OnnxFileModel(path)
    program = Program(model.components[0].name, Graph(path))
    backend = OrtBackend(BackendSpec.parse(spec), threads=1)
    return blame_optimizers(model, [program], backend, next(model.samples(1, 0, None)), floor)


def names(knobs: OptimizerBlame) -> set[str]:
    return {culprit.optimizer for culprit in knobs.responsible}


def quantized(
    path: Path,
    *,
    largest: int = 127,
    weight: float = 0.003,
    data: float = 3 / 127,
    bias: float = 0.1,
    y: float = 8 / 127,
) -> Path:
    """Two convolutions with INT8 activations and weights and a float bias, as PTQ tools leave it: ``x`` to ``y``.

    ``largest`` is the largest level of a weight; ``weight``, ``data``, ``y`` are scales; ``bias`` is the biases' size.
    """
    net = NetBuilder(0)
    zero = net.weight(np.array(0, np.int8))

    def pair(x: str, scale: float) -> str:
        s = net.weight(np.array(scale, np.float32))
        return net.op("DequantizeLinear", net.op("QuantizeLinear", x, s, zero), s, zero)

    def conv(x: str, name: str) -> str:
        w = net.weight(net.rng.integers(-largest, largest + 1, (8, 8, 3, 3), dtype=np.int8))
        weights = net.op("DequantizeLinear", w, net.weight(np.array(weight, np.float32)), zero)
        biases = net.weight((net.rng.standard_normal(8) * bias).astype(np.float32))
        return net.op("Conv", pair(x, data), weights, biases, kernel_shape=[3, 3], pads=[1] * 4, name=name)

    net.op("Identity", pair(conv(net.op("Relu", conv("x", "first")), "second"), y), name="y")
    return net.save(path, {"x": (1, [1, 8, 16, 16])}, ["y"])


@since((1, 31), "folds no BatchNormalization into a ConvTranspose")
def test_folding_batch_norm_into_convolutions(tmp_path):
    knobs = knobs_of(second_like(tmp_path / "net.onnx"), "ort-basic")
    assert names(knobs) == {"ConvBNFusion"}
    assert knobs.level == "basic"
    assert knobs.difference_with > 0 == knobs.difference_without
    graph = Graph(tmp_path / "net.onnx")
    folded = {n.name for n in graph.nodes if n.op == "BatchNormalization"}
    assert folded < set(knobs.nodes)
    assert not {n.name for n in graph.nodes if n.op == "Concat"} & set(knobs.nodes)
    assert {r.operators for r in knobs.responsible[0].rewrites} == {("Conv",), ("ConvTranspose",)}


def test_blocked_layout_and_folding_together(tmp_path):
    knobs = knobs_of(second_like(tmp_path / "net.onnx"), "ort-all")
    if "NchwcTransformer" not in knobs.active:
        pytest.skip("this processor has no blocked layout")
    assert names(knobs) == {"ConvBNFusion", "NchwcTransformer"}
    assert knobs.difference_without == 0
    assert all(culprit.difference > 0 for culprit in knobs.responsible)
    blocked = next(c for c in knobs.responsible if c.optimizer == "NchwcTransformer")
    assert all(any("nchwc" in op for op in rewrite.operators) for rewrite in blocked.rewrites)


def test_disabling_the_responsible_ones_helps_and_disabling_fewer_does_not(tmp_path):
    """Checked from outside, with sessions of their own."""
    path = residual(tmp_path / "net.onnx")
    knobs, x = knobs_of(path, "ort-all"), next(OnnxFileModel(path).samples(1, 0, None)).arrays

    def outputs(spec: str, disabled: set[str]) -> bytes:
        backend = OrtBackend(BackendSpec.parse(spec), disabled_optimizers=sorted(disabled), threads=1)
        results = backend.open(Program("net", Graph(path))).run(x)
        return b"".join(array.tobytes() for array in results.values())

    exact = outputs("ort-none", set())
    assert outputs("ort-all", names(knobs)) == exact
    assert knobs.responsible
    for name in names(knobs):
        assert outputs("ort-all", names(knobs) - {name}) != exact


def test_quantized_bias(tmp_path):
    knobs = knobs_of(quantized(tmp_path / "net.onnx"), "ort-basic")
    assert names(knobs) == {"WeightBiasQuantization"}
    assert knobs.level == "basic"
    assert {"node_first", "node_second"} <= set(knobs.nodes)
    assert knobs.difference_without <= REST * knobs.difference_with


def test_no_difference(tmp_path):
    knobs = knobs_of(residual(tmp_path / "net.onnx"), "ort-basic")
    assert (knobs.level, knobs.responsible, knobs.difference_with) == (None, [], 0)
    assert knobs.runs == 2


def test_a_difference_below_the_noise_floor_is_none(tmp_path):
    knobs = knobs_of(second_like(tmp_path / "net.onnx"), "ort-basic", floor=1e-3)
    assert 0 < knobs.difference_with < 1e-3
    assert knobs.level is None
    assert not knobs.responsible


def test_the_log_names_the_optimizers_that_changed_something(tmp_path, capfd):
    graph = Graph(second_like(tmp_path / "net.onnx"))
    runtime = OrtBackend(BackendSpec.parse("ort-all"), threads=1).runtime
    assert active_optimizers(runtime, graph, "basic") == [RULE_BASED]
    assert active_optimizers(runtime, graph, "basic", ["ConvBNFusion"]) == []
    assert "ConvActivationFusion" in active_optimizers(runtime, graph, "extended")
    assert capfd.readouterr() == ("", "")


def test_bisect_reports_knobs(tmp_path):
    path = second_like(tmp_path / "net.onnx", depth=1, size=16)
    result = bisect(str(path), "ort-none,ort-basic", options=Options(optimizer_blame=True))
    found = result.to_dict()["knobs"]
    assert found["responsible"] == ["ConvBNFusion"]
    assert found["difference"]["with"] > found["difference"]["without"] == 0
    assert found["nodes"]
    assert found["runs"] > 0
    json.dumps(found, allow_nan=False)


def test_knobs_need_an_optimized_backend(tmp_path):
    path = residual(tmp_path / "net.onnx")
    with pytest.raises(InputError, match="--knobs: expected ort-basic, ort-all, torch-compile or openvino"):
        bisect(str(path), "ort-all,ort-none", options=Options(optimizer_blame=True))


class Known(_OptimizerSearch):
    """Optimizers that make known differences, which add up; the first of a pair in ``hidden`` lets the second work."""

    def __init__(self, makes: Mapping[str, float], floor: float = 0.0, hidden: Mapping[str, str] = {}) -> None:
        self._makes, self._floor, self._hidden = makes, floor, hidden
        self._seen = {}
        self._backend: Any = SimpleNamespace(level="all", spec="ort-all")
        self._programs: Any = [SimpleNamespace(name="net")]

    def _difference(self, disabled: frozenset[str], level: str | None = None) -> float:
        known = {"basic": 0.0, "extended": 0.25}.get(level or "all")
        found = sum(d for name, d in self._makes.items() if name not in disabled) if known is None else known
        return self._seen.setdefault((level or "all", disabled), found)

    def _active(self, disabled: Collection[str]) -> list[str]:
        shown = [name for name in self._makes if name not in self._hidden or self._hidden[name] in disabled]
        return [name for name in shown if name not in disabled]

    def _replacements(self, program: Any, disabled: Collection[str]) -> list[Any]:
        return [((f"{name}-node",), (name,)) for name in self._makes if name not in disabled]


def test_those_that_make_the_difference_are_named_with_it_the_largest_first() -> None:
    found = Known({"tiny": 0.001, "large": 0.6, "larger": 0.7}).run()
    assert [(c.optimizer, c.difference) for c in found.responsible] == [
        ("larger", pytest.approx(0.701)), ("large", pytest.approx(0.601)),
    ]  # fmt: skip
    assert found.difference_with == pytest.approx(1.301)
    assert found.difference_without == pytest.approx(0.001)
    assert found.level == "extended"
    assert found.active == ["tiny", "large", "larger"]
    assert found.responsible[0].rewrites == (Rewrite("net", ("larger-node",), ("larger",)),)
    assert found.nodes == ["larger-node", "large-node"]
    assert found.runs > 4


def test_nothing_is_searched_up_to_the_noise_floor() -> None:
    found = Known({"a": 0.5}, floor=0.5).run()
    assert (found.responsible, found.level) == ([], None)
    assert found.difference_with == found.difference_without == 0.5
    found = Known({"a": 0.5}, floor=0.2).run()
    assert [c.optimizer for c in found.responsible] == ["a"]
    assert found.level == "extended"


def test_what_remains_may_be_a_hundredth_of_the_whole_or_the_noise_floor() -> None:
    assert [c.optimizer for c in Known({"a": 1.0, "b": 0.009}).run().responsible] == ["a"]
    assert len(Known({"a": 1.0, "b": 0.02}).run().responsible) == 2
    assert [c.optimizer for c in Known({"a": 1.0, "b": 0.02}, floor=0.1).run().responsible] == ["a"]


def test_optimizers_that_had_nothing_left_to_do_are_tried_once_others_are_disabled() -> None:
    found = Known({"first": 0.5, "second": 0.5}, hidden={"second": "first"}).run()
    assert sorted(c.optimizer for c in found.responsible) == ["first", "second"]
    assert found.active == ["first"]


def test_nobody_is_responsible_where_the_difference_stays() -> None:
    class Stays(Known):
        def _difference(self, disabled: frozenset[str], level: str | None = None) -> float:
            return 0.3

    found = Stays({"a": 0.3}).run()
    assert found.responsible == []
    assert found.difference_without == 0.3


def test_nodes_are_told_once() -> None:
    culprits = [Culprit(name, 1.0, (Rewrite("net", ("n", name), ("op",)),)) for name in "ab"]
    found = OptimizerBlame("all", 1.0, 0.0, culprits)
    assert found.nodes == ["n", "a", "b"]
    assert found.derived() == {"responsible": ["a", "b"], "nodes": ["n", "a", "b"]}


def test_where_nothing_explains_a_layer_the_optimizer_is_asked_for(tmp_path: Path) -> None:
    """ONNX Runtime takes means that lie along the wrong axis for those of a LayerNormalization (its issue 31144)."""
    net = NetBuilder(2)
    weight = lambda *values: net.weight(np.array(values, np.float32))  # noqa: E731
    x = net.op("MatMul", "x", net.weight(net.rng.standard_normal((8, 6)).astype(np.float32)))
    centred = net.op("Sub", x, net.op("ReduceMean", x, axes=[-1], keepdims=0))
    square = net.op("Pow", centred, net.weight(np.float32(2)))
    variance = net.op("Add", net.op("ReduceMean", square, axes=[-1], keepdims=0), net.weight(np.float32(1e-5)))
    normed = net.op("Mul", net.op("Div", centred, net.op("Sqrt", variance)), weight(0.5, 0.8, 1.1, 1.4, 1.7, 2))
    net.op("Relu", net.op("Add", normed, weight(-1, -0.6, -0.2, 0.2, 0.6, 1)), name="y")
    (test,) = bisect(str(net.save(tmp_path / "net.onnx", {"x": (1, [6, 8])}, ["y"])), "ort-none,ort-all").tests
    if not test.guilty:
        pytest.skip("this ONNX Runtime leaves such means alone")
    (finding,) = test.findings
    assert finding.fix.startswith("ask with --knobs which graph optimizer does it; ")
    assert finding.fix.endswith(f"cpdebug bundle RESULT --layer {finding.layers[0]}")
