"""Healthy networks of one operator or two, where correct implementations lie far apart: tails, flat maps, cancellation,
long sums, masks, tiny constants. Nobody may be guilty in any of them, on any backend."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from nets import NetBuilder

Make = Callable[[NetBuilder, np.random.Generator], tuple[str, np.ndarray]]
"""Adds nodes that read ``x`` to a network; returns the output's name and ``x``."""
CASES: dict[str, Make] = {}


def case(make: Make) -> Make:
    """Register a case under its function's name."""
    CASES[make.__name__] = make
    return make


def write(name: str, path: Path, seed: int = 0) -> tuple[Path, np.ndarray]:
    """(model of a case, its input)."""
    net = NetBuilder(seed)
    output, x = CASES[name](net, np.random.default_rng(seed))
    opset = 20 if any(n.op_type in ("Gelu", "DFT", "Mish", "GridSample") for n in net.nodes) else 17
    return net.save(path, {"x": (1, list(x.shape))}, [output], opset=opset), x


def _unary(op: str, x: np.ndarray, **attributes: object) -> Make:
    return lambda net, rng: (net.op(op, "x", **attributes), x.astype(np.float32))


def _around(center: float, width: float, shape: tuple[int, ...] = (1, 64)) -> np.ndarray:
    return center + width * np.random.default_rng(1).standard_normal(shape)


for _op, _at in {
    "Sigmoid": (-8, -14, -40, 12),
    "Tanh": (1e-4, -5, 9),
    "Erf": (1e-4, -3, 5),
    "Exp": (-60, 20),
    "Softplus": (-30, 1e-3, 20),
    "Elu": (-1e-3, -20),
    "Selu": (-1e-3,),
    "Celu": (-1e-3,),
    "Gelu": (-4, -9),
    "Mish": (-12, -1e-3),
    "HardSwish": (-2.999, 2.999),
    "HardSigmoid": (-2.4999,),
    "Softsign": (1e-3, -1e4),
    "Sin": (1e4, 3.14159),
    "Cos": (1e4, 1.5708),
    "Atan": (1.0, 1e5),
    "Reciprocal": (1e-6, 1e6),
}.items():
    for _value in _at:
        CASES[f"{_op} at {_value}"] = _unary(_op, _around(_value, 1e-2 * abs(_value)))
        CASES[f"{_op} of a flat {_value}"] = _unary(_op, np.full((1, 64), _value))
CASES["Log near 1"] = _unary("Log", 1 + np.abs(_around(0, 1e-4)))
CASES["Log of tiny"] = _unary("Log", np.abs(_around(0, 1e-7)) + 1e-8)
CASES["Sqrt of tiny"] = _unary("Sqrt", np.abs(_around(0, 1e-7)))
CASES["Softmax of flat rows"] = _unary("Softmax", np.full((4, 30000), 3.7), axis=-1)
CASES["Softmax of large logits"] = _unary("Softmax", _around(0, 60, (16, 97)), axis=-1)
CASES["Softmax over the channels"] = _unary("Softmax", _around(0, 3, (1, 19, 24, 24)), axis=1)
CASES["LogSoftmax of a sure class"] = _unary("LogSoftmax", np.eye(8) * 30 - 15, axis=-1)
CASES["LogSoftmax of large logits"] = _unary("LogSoftmax", _around(1e4, 60, (16, 97)), axis=-1)
CASES["ReduceLogSumExp near 0"] = _unary("ReduceLogSumExp", _around(-np.log(512), 1e-3, (8, 512)), axes=[-1])
CASES["ReduceL2 of a flat row"] = _unary("ReduceL2", np.full((4, 50000), 0.1234567), axes=[-1])
CASES["ReduceL1 of many"] = _unary("ReduceL1", _around(0, 1, (4, 30000)), axes=[-1])
CASES["ReduceSumSquare, first axis"] = _unary("ReduceSumSquare", _around(0, 1, (8192, 3)), axes=[0])
CASES["ReduceLogSum"] = _unary("ReduceLogSum", np.abs(_around(1, 0.1, (4, 9000))), axes=[-1])
CASES["ReduceProd"] = _unary("ReduceProd", _around(1, 1e-2, (4, 300)), axes=[-1])
CASES["ReduceMean of a flat map"] = _unary("ReduceMean", np.full((1, 8, 96, 96), 0.7654321), axes=[2, 3])
CASES["ReduceMean that cancels"] = _unary("ReduceMean", _around(0, 1, (1, 1, 40000)), axes=[2])
CASES["GlobalAveragePool of a flat map"] = _unary("GlobalAveragePool", np.full((1, 16, 80, 80), 0.1234567))
CASES["GlobalAveragePool of one value"] = _unary("GlobalAveragePool", _around(0, 1, (1, 1, 64, 64)))
CASES["AveragePool of a flat map"] = _unary(
    "AveragePool", np.full((1, 16, 56, 56), 0.7654321), kernel_shape=[28, 28], strides=[28, 28]
)
CASES["AveragePool with padding"] = _unary(
    "AveragePool", np.full((1, 8, 30, 30), 1.2345678), kernel_shape=[9, 9], pads=[4, 4, 4, 4], count_include_pad=1
)


@case
def cumulative_sum(net: NetBuilder, rng: np.random.Generator) -> tuple[str, np.ndarray]:
    return net.op("CumSum", "x", net.weight(np.array(1))), np.full((2, 5000), 0.1, np.float32)


@case
def difference_that_cancels(net: NetBuilder, rng: np.random.Generator) -> tuple[str, np.ndarray]:
    x = (1000 + rng.standard_normal((4, 64))).astype(np.float32)
    return net.op("Sub", net.op("Mul", "x", net.weight(np.float32(1.1))), net.weight(np.float32(1100.0))), x


@case
def division_by_tiny(net: NetBuilder, rng: np.random.Generator) -> tuple[str, np.ndarray]:
    return net.op("Div", net.weight(np.float32(1e-3)), "x"), (1e-3 * rng.uniform(1, 2, (4, 64))).astype(np.float32)


@case
def powers(net: NetBuilder, rng: np.random.Generator) -> tuple[str, np.ndarray]:
    x = rng.uniform(0.5, 9, (4, 64)).astype(np.float32)
    return net.op("Pow", net.op("Pow", "x", net.weight(np.float32(2.7))), net.weight(np.float32(-0.5))), x


@case
def head_of_one_output(net: NetBuilder, rng: np.random.Generator) -> tuple[str, np.ndarray]:
    w = net.weight(rng.standard_normal((512, 1)).astype(np.float32))
    return net.op("MatMul", "x", w), np.abs(rng.standard_normal((1, 512))).astype(np.float32)


@case
def head_of_one_probability(net: NetBuilder, rng: np.random.Generator) -> tuple[str, np.ndarray]:
    w, b = net.weight(rng.standard_normal((512, 1)).astype(np.float32)), net.weight(np.float32([-30.0]))
    return net.op("Sigmoid", net.op("Gemm", "x", w, b)), np.abs(rng.standard_normal((1, 512))).astype(np.float32)


@case
def convolution_of_a_flat_map(net: NetBuilder, rng: np.random.Generator) -> tuple[str, np.ndarray]:
    return net.conv("x", 64, 1), np.full((1, 64, 12, 12), 0.1234567, np.float32)


@case
def depthwise_blur(net: NetBuilder, rng: np.random.Generator) -> tuple[str, np.ndarray]:
    w = net.weight(np.full((16, 1, 7, 7), 1 / 49, np.float32))
    return net.op("Conv", "x", w, group=16, pads=[3] * 4), np.full((1, 16, 20, 20), 0.7654321, np.float32)


@case
def averaging_product(net: NetBuilder, rng: np.random.Generator) -> tuple[str, np.ndarray]:
    return net.op("MatMul", "x", net.weight(np.full((4096, 2), 1 / 4096, np.float32))), np.full(
        (2, 4096), 0.7654321, np.float32
    )


@case
def einsum(net: NetBuilder, rng: np.random.Generator) -> tuple[str, np.ndarray]:
    w = net.weight(rng.standard_normal((8, 300, 5)).astype(np.float32))
    return net.op("Einsum", "x", w, equation="bik,bkj->bij"), rng.standard_normal((8, 7, 300)).astype(np.float32)


@case
def einsum_that_sums(net: NetBuilder, rng: np.random.Generator) -> tuple[str, np.ndarray]:
    return net.op("Einsum", "x", equation="bchw->bc"), np.full((1, 8, 64, 64), 0.1234567, np.float32)


@case
def layer_norm_of_constant_rows(net: NetBuilder, rng: np.random.Generator) -> tuple[str, np.ndarray]:
    one, zero = net.weight(np.ones(256, np.float32)), net.weight(np.full(256, 0.1, np.float32))
    x = np.repeat(rng.standard_normal((16, 1)), 256, 1).astype(np.float32)
    return net.op("LayerNormalization", "x", one, zero, axis=-1), x


@case
def layer_norm_far_from_zero(net: NetBuilder, rng: np.random.Generator) -> tuple[str, np.ndarray]:
    one, zero = net.weight(np.ones(256, np.float32)), net.weight(np.zeros(256, np.float32))
    return net.op("LayerNormalization", "x", one, zero, axis=-1), (1e3 + rng.standard_normal((8, 256))).astype("f4")


@case
def instance_norm_of_flat_maps(net: NetBuilder, rng: np.random.Generator) -> tuple[str, np.ndarray]:
    one, zero = net.weight(np.ones(8, np.float32)), net.weight(np.full(8, 0.1, np.float32))
    x = np.full((1, 8, 56, 56), 0.1234567, np.float32)
    x[:, ::2, :4] = rng.standard_normal((1, 4, 4, 56))
    return net.op("InstanceNormalization", "x", one, zero), x


@case
def batch_norm_that_cancels(net: NetBuilder, rng: np.random.Generator) -> tuple[str, np.ndarray]:
    one, mean = net.weight(np.ones(4, np.float32)), net.weight(np.full(4, 500.0, np.float32))
    x = (500 + 1e-2 * rng.standard_normal((1, 4, 9, 9))).astype(np.float32)
    return net.op("BatchNormalization", "x", one, net.weight(np.zeros(4, np.float32)), mean, one), x


@case
def rms_norm(net: NetBuilder, rng: np.random.Generator) -> tuple[str, np.ndarray]:
    mean = net.op("ReduceMean", net.op("Mul", "x", "x"), axes=[-1])
    return net.op("Div", "x", net.op("Sqrt", net.op("Add", mean, net.weight(np.float32(1e-6))))), rng.standard_normal(
        (1, 8, 64)
    ).astype(np.float32)


def _mask(value: float) -> Make:
    def make(net: NetBuilder, rng: np.random.Generator) -> tuple[str, np.ndarray]:
        mask = np.where(np.tri(9, dtype=bool), 0, value).astype(np.float32)[None, None]
        added = net.op("Add", net.op("Mul", "x", net.weight(np.float32(0.25))), net.weight(mask))
        return net.op("Softmax", added, axis=-1), rng.standard_normal((1, 4, 9, 9)).astype(np.float32)

    return make


for _value in (-1e4, -1e9, float(np.finfo(np.float32).min), -np.inf):
    CASES[f"mask of {_value:.3g}"] = _mask(_value)


@case
def mask_made_by_where(net: NetBuilder, rng: np.random.Generator) -> tuple[str, np.ndarray]:
    seen = net.weight(np.tri(9, dtype=bool)[None, None])
    low = net.op("Where", seen, "x", net.weight(np.float32(np.finfo(np.float32).min)))
    return net.op("Softmax", net.op("Reshape", low, net.weight(np.array([4, 9, 9]))), axis=-1), rng.standard_normal(
        (1, 4, 9, 9)
    ).astype(np.float32)


@case
def bias_of_rounding(net: NetBuilder, rng: np.random.Generator) -> tuple[str, np.ndarray]:
    w = net.weight((0.3 * rng.standard_normal((8, 8, 1, 1))).astype(np.float32))
    bias = net.weight((1e-9 * rng.standard_normal(8)).astype(np.float32))
    return net.op("Conv", "x", w, bias), rng.standard_normal((1, 8, 8, 8)).astype(np.float32)


@case
def gate_that_is_shut(net: NetBuilder, rng: np.random.Generator) -> tuple[str, np.ndarray]:
    gate = net.op("Sigmoid", net.op("Add", "x", net.weight(np.float32(-20))))
    return net.op("Add", net.op("Mul", gate, "x"), "x"), rng.standard_normal((1, 8, 8, 8)).astype(np.float32)


@case
def clipped_norm(net: NetBuilder, rng: np.random.Generator) -> tuple[str, np.ndarray]:
    """x ÷ max(‖x‖, 1e-12): the bound underflows, and is never reached."""
    norm = net.op("ReduceL2", "x", axes=[-1])
    bounded = net.op("Clip", norm, net.weight(np.float32(1e-12)), net.weight(np.float32(np.finfo(np.float32).max)))
    return net.op("Div", "x", bounded), rng.standard_normal((4, 32)).astype(np.float32)


def _recurrent(op: str, gates: int) -> Make:
    def make(net: NetBuilder, rng: np.random.Generator) -> tuple[str, np.ndarray]:
        shapes = (1, gates * 32, 24), (1, gates * 32, 32), (1, 2 * gates * 32)
        w, r, b = (net.weight((0.2 * rng.standard_normal(s)).astype(np.float32)) for s in shapes)
        return net.op(op, "x", w, r, b, hidden_size=32), rng.standard_normal((16, 2, 24)).astype(np.float32)

    return make


for _op, _gates in (("LSTM", 4), ("GRU", 3), ("RNN", 1)):
    CASES[_op] = _recurrent(_op, _gates)


def _fourier(length: int) -> Make:
    def make(net: NetBuilder, rng: np.random.Generator) -> tuple[str, np.ndarray]:
        output = net.op("DFT", "x", net.weight(np.array(length)), net.weight(np.array(2)), onesided=1)
        return output, rng.standard_normal((2, 4, length, 1)).astype(np.float32)

    return make


for _length in (32, 100, 512):
    CASES[f"DFT of {_length}"] = _fourier(_length)


def _resize(scale: float, mode: str) -> Make:
    def make(net: NetBuilder, rng: np.random.Generator) -> tuple[str, np.ndarray]:
        output = net.op("Resize", "x", "", net.weight(np.array([1, 1, scale, scale], np.float32)), mode=mode)
        return output, rng.standard_normal((1, 2, 64, 100)).astype(np.float32)

    return make


for _scale in (1.7, 2.0, 0.37):
    for _mode in ("linear", "cubic"):
        CASES[f"Resize by {_scale}, {_mode}"] = _resize(_scale, _mode)


@case
def grid_sample(net: NetBuilder, rng: np.random.Generator) -> tuple[str, np.ndarray]:
    grid = net.weight(rng.uniform(-1, 1, (1, 40, 40, 2)).astype(np.float32))
    return net.op("GridSample", "x", grid, mode="linear"), rng.standard_normal((1, 4, 48, 48)).astype(np.float32)
