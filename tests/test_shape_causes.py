"""A layer whose shape is another one on each side: with both graphs at hand, their difference there is the cause."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from draws import RNG
from onnx import numpy_helper, parser

from cp_debug.bisect.engine import Options, bisect
from cp_debug.bisect.result import GUILTY, INHERITED
from cp_debug.bisect.verdict import _OWN_INPUTS, counts_told

WEIGHTS = {
    "w": np.random.default_rng(0).standard_normal((6, 4, 5)).astype(np.float32),
    "shape": np.array([20, 6]),
    "axis": np.array([1]),
    "other_axis": np.array([2]),
    "split": np.array([3, 4, 5, 4]),
    "at_once": np.array([3, 5, 4, 4]),
    "flat": np.array([60, 4]),
    "cos": np.random.default_rng(1).standard_normal((4, 4)).astype(np.float32),
}


def save(path: Path, body: str) -> Path:
    model = parser.parse_model(
        f'<ir_version: 9, opset_import: ["" : 17]>\nnet (float[3,4,20] x) => (float y) {{ {body} }}'
    )
    model.graph.output[0].type.tensor_type.ClearField("shape")
    model.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in WEIGHTS.items())
    onnx.save(model, path)
    return path


@pytest.mark.parametrize(
    ("good", "bad", "layer", "says"),
    [
        # a node that is computed from constants alone, another shape of which a Reshape takes as well
        (
            "t = Transpose <perm=[1,0,2]> (w) \n r = Reshape (t, shape) \n y = MatMul (x, r)",
            "t = Transpose <perm=[1,2,0]> (w) \n r = Reshape (t, shape) \n y = MatMul (x, r)",
            "t",
            "perm is [1, 2, 0] instead of [1, 0, 2]",
        ),
        (
            "s = ReduceSum <keepdims=1> (x, axis) \n y = Tanh (s)",
            "s = ReduceSum <keepdims=0> (x, axis) \n y = Tanh (s)",
            "s",
            "keepdims is 0 instead of 1",
        ),
        (
            "r = Relu (x) \n s = ReduceMax <axes=[1]> (r) \n y = Tanh (s)",
            "r = Relu (x) \n s = ReduceMax <axes=[2]> (r) \n y = Tanh (s)",
            "s",
            "axes is [2] instead of [1]",
        ),
        (
            "r = Relu (x) \n s = ReduceMax <axes=[1]> (r) \n y = Tanh (s)",
            "r = Relu (x) \n s = ReduceMax (r) \n y = Tanh (s)",
            "s",
            "axes is all instead of [1]",
        ),
    ],
)
def test_the_difference_of_the_graphs_is_the_cause(tmp_path: Path, good: str, bad: str, layer: str, says: str) -> None:
    np.savez(tmp_path / "x.npz", x=RNG.standard_normal((3, 4, 20)).astype(np.float32))
    for backends in ("ort,ort", "ort,ort-all"):
        test = bisect(
            str(save(tmp_path / "good.onnx", good)),
            backends,
            test_model=save(tmp_path / "bad.onnx", bad),
            options=Options(inputs=tmp_path / "x.npz"),
        ).tests[0]
        [finding] = [finding for finding in test.findings if layer in finding.layers]
        assert finding.cause == "attribute"
        assert says in finding.says


def test_counts_that_hang_on_values_are_told_of_layers_that_inherit_theirs() -> None:
    def row(index: int, name: str, verdict: str, why: str) -> Any:
        stats = SimpleNamespace(shape=(3,), shape_test=(5,))
        return SimpleNamespace(index=index, name=name, op="NonZero", verdict=verdict, why=why, stats=stats)

    own = "another shape" + _OWN_INPUTS
    rows: Any = dict(
        enumerate([row(2, "b", INHERITED, own), row(1, "a", INHERITED, own), row(0, "c", GUILTY, own),
                   row(3, "d", INHERITED, "another shape")])
    )  # fmt: skip
    told = counts_told(rows)
    assert [line.split(" has shape ")[0] for line in told] == ["a (NonZero)", "b (NonZero)"]
    assert told[0].startswith(
        "a (NonZero) has shape [5], the reference [3]: the number of results depends on its input values"
    )


def test_what_follows_from_another_shape_is_told_once(tmp_path: Path) -> None:
    """Heads without their Transpose: the reference's nodes compute nothing from them, up to where they are merged."""
    tail = "a = Mul (t, cos) \n b = Add (a, cos) \n c = Mul (b, cos) \n f = Reshape (c, flat) \n y = Add (f, all)"
    tail = f"all = ReduceSum <keepdims=0> (h) \n {tail}"
    good = save(tmp_path / "good.onnx", f"h = Reshape (x, split) \n t = Transpose <perm=[0,2,1,3]> (h) \n {tail}")
    bad = save(tmp_path / "bad.onnx", f"h = Reshape (x, at_once) \n {tail.replace('(t,', '(h,')}")
    np.savez(tmp_path / "x.npz", x=RNG.standard_normal((3, 4, 20)).astype(np.float32))
    (test,) = bisect(str(good), "ort,ort", test_model=bad, options=Options(inputs=tmp_path / "x.npz")).tests
    assert [f.says for f in test.findings] == ["Reshape: shape is [3, 5, 4, 4] instead of [3, 4, 5, 4]"]
    assert "1 layer not replayed: the shape of what is read is another one in the test" in test.notes
    assert not any("add up" in note for note in test.notes)
