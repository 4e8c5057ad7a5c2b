"""Types in which a dump was written, rather than computed: FP64, INT32 for indices, another order of bytes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from nets import NetBuilder
from onnx import helper

import cp_debug
from cp_debug.backends.dumped import in_types_of_graph
from cp_debug.bisect.result import TestResult
from cp_debug.graph.graph import Graph


def network(path: Path, factor: float = 1.0) -> Path:
    """``x`` [1, 3, 8, 8] through two convolutions, a mask and the channel of the largest value."""
    net = NetBuilder()
    first = net.op("Relu", net.conv("x", 3, 8, name="c1"), name="r1")
    second = net.conv(first, 8, 8, name="c2")
    masked = net.op("Where", net.op("Greater", second, net.weight(np.zeros(1, np.float32)), name="mask"), second, first)
    place = net.op("ArgMax", masked, axis=1, keepdims=1, name="place")
    last = net.op("GatherElements", masked, place, axis=1, name="last")
    saved = net.save(path, {"x": (1, [1, 3, 8, 8])}, [last, place])
    if factor != 1:
        model = onnx.load(saved)
        weight = next(w for w in model.graph.initializer if w.name == "w_2")
        weight.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(weight) * np.float32(factor), "w_2"))
        onnx.save(model, saved)
    return saved


def values(path: Path) -> dict[str, np.ndarray]:
    """All values of the file on an input of its own, and this."""
    import onnxruntime

    model = onnx.load(path)
    names = [name for node in model.graph.node for name in node.output]
    del model.graph.output[:]
    model.graph.output.extend(helper.make_empty_tensor_value_info(name) for name in names)
    x = np.random.default_rng(0).standard_normal((1, 3, 8, 8)).astype(np.float32)
    results = onnxruntime.InferenceSession(model.SerializeToString()).run(names, {"x": x})
    return dict(zip(names, results, strict=True)) | {"x": x}


def widened(array: np.ndarray) -> np.ndarray:
    return array.astype(np.float64) if array.dtype.kind == "f" else array


WRITTEN = {
    "FP64": widened,
    "FP64, and all else in it": lambda array: array.astype(np.float64),
    "extended precision": lambda array: array.astype(np.longdouble) if array.dtype.kind == "f" else array,
    "big endian": lambda array: array.astype(array.dtype.newbyteorder(">")),
    "INT32 and bytes": lambda a: a if a.dtype.kind == "f" else a.astype(np.uint8 if a.dtype.kind == "b" else np.int32),
}


def judged(net: Path, dump: dict[str, np.ndarray], **options: str) -> TestResult:
    return cp_debug.diagnose(net, "ort", test_tensors=dump, **options).tests[0]


@pytest.mark.few(2)
@pytest.mark.parametrize("how", WRITTEN)
def test_a_dump_is_replayed_in_the_types_of_the_graph(tmp_path: Path, how: str) -> None:
    net, wrong = network(tmp_path / "net.onnx"), network(tmp_path / "wrong.onnx", 1.02)
    healthy = judged(net, {name: WRITTEN[how](array) for name, array in values(net).items()})
    assert healthy.agrees
    assert not any("not replayed" in note for note in healthy.notes)
    assert any("read as FP32" in note for note in healthy.notes) == (how[:2] in ("FP", "ex"))
    found = judged(net, {name: WRITTEN[how](array) for name, array in values(wrong).items()})
    assert [row.onnx for row in found.guilty] == ["c2"]
    assert found.findings[0].cause != "unknown"


def test_what_was_computed_in_fp64_keeps_its_bits(tmp_path: Path) -> None:
    net = network(tmp_path / "net.onnx")
    test = judged(net, {name: widened(array) for name, array in values(net).items()}, tensors_precision="fp64")
    assert test.rows[1].stats.dtype_test == "float64"
    assert not any("read as FP32" in note for note in test.notes)


def test_types_are_changed_where_no_number_is_lost(tmp_path: Path) -> None:
    graph = Graph(network(tmp_path / "net.onnx"))
    given = {
        "place": np.array([1.5]),  # no index
        "mask": np.array([0, 2], np.uint8),  # no boolean
        "c1": np.array([1, 2], np.float16),  # a lower precision tells how it was computed
        "r1": np.array(["a"]),
        "c2": np.array([1, 2]),
    }
    assert in_types_of_graph(graph, given) == given
    changed = in_types_of_graph(graph, {"place": np.array([3.0], np.float32), "mask": np.array([0, 1], np.int64)})
    assert {name: array.dtype for name, array in changed.items()} == {"place": np.int64, "mask": np.bool_}
