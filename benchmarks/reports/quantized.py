"""Quantized files: scales, zero points, biases, levels."""

from __future__ import annotations

import numpy as np

from .case import Report
from .networks import TOKENS, Frame, ints

RNG = np.random.default_rng(7)
LEVELS = RNG.integers(-100, 100, (16, 16)).astype(np.int8)
UNIT = {"s": np.float32(0.02), "z": np.int8(0)}
WEIGHTS = (RNG.standard_normal((8, 8, 1, 1)) / 3).astype(np.float32)
TINY = WEIGHTS.copy()
TINY[[2, 5]] *= np.float32(1e-9)
BIAS = np.linspace(-0.6, 0.7, 8).astype(np.float32)
SX = np.float32(6 / 127)
PAIR = "{1} = QuantizeLinear({0}, {2}, {3})\n{4} = DequantizeLinear({1}, {2}, {3})"
FLOAT_CONV = "m = Conv(r1, wq1, bq1)"
INT8_CONV = (
    f"{PAIR.format('r1', 'xq', 'sx', 'zx', 'xd')}\nwd = DequantizeLinear<axis=0>(wq, sw)\n"
    "bd = DequantizeLinear<axis=0>(bq, sb)\nm = Conv(xd, wd, bd)"
)


def levels(weights: np.ndarray, bias: np.ndarray) -> dict[str, np.ndarray]:
    """The stored convolution of a quantizer: INT8 by channel, its bias in INT32 by the product of the scales."""
    sw = (np.abs(weights).max((1, 2, 3)) / 127).astype(np.float32)
    sb = (SX * sw).astype(np.float32)
    stored = np.clip(np.round(bias / sb.astype(float)), -(2**31), 2**31 - 1).astype(np.int32)
    wq = np.round(weights / sw[:, None, None, None]).astype(np.int8)
    return {"sx": SX, "zx": np.int8(0), "wq": wq, "sw": sw, "bq": stored, "sb": sb}


BOXES = Frame(
    "b1 = Sigmoid(box)\nb2 = Mul(b1, size)\ns1 = Sigmoid(score)\nc = Concat<axis=1>(b2, s1)\n{}",
    {"box": (1, 4, 50), "score": (1, 3, 50)},
    {"size": np.float32(640)},
)
WIDE = (
    "q = com.microsoft.QuantizeLinear(t1, s, z)\nd = com.microsoft.DequantizeLinear(q, s, z)\n"
    "wd = com.microsoft.DequantizeLinear(wq, sw, z)"
)
WIDE_WEIGHT = (RNG.standard_normal((16, 16)) / 4).astype(np.float32)
WIDE_STEP = np.float32(np.abs(WIDE_WEIGHT).max() / 32767)
WIDE_LEVELS = {"s": np.float32(1 / 32767), "z": np.int16(0), "wm": WIDE_WEIGHT, "sw": WIDE_STEP}
WIDE_LEVELS["wq"] = np.round(WIDE_WEIGHT / WIDE_STEP).astype(np.int16)

CASES = (
    Report(
        "bias beyond INT32",
        "microsoft/onnxruntime/pull/22020",
        "tiny weights make the bias's scale so small that its INT32 saturates",
        FLOAT_CONV,
        ("m", "bd"),
        "saturat|INT32",
        "larger scale|FP32",
        wrong=INT8_CONV,
        constants={"wq1": TINY, "bq1": BIAS, **levels(TINY, BIAS)},
        healthy="m = Conv(r1, wq1, bq1)",
    ),
    Report(
        "bias beyond INT32, by channel",
        "microsoft/onnxruntime/issues/11415",
        "per-channel quantization of MobileNetV3: channels with nearly no weight lose their bias",
        FLOAT_CONV,
        ("m", "bd"),
        "saturat|INT32",
        "larger scale|FP32",
        wrong=INT8_CONV,
        constants={"wq1": TINY[::-1].copy(), "bq1": BIAS, **levels(TINY[::-1], BIAS)},
    ),
    Report(
        "a convolution that is quantized well",
        "microsoft/onnxruntime/issues/6545",
        "per-channel weights are suspected; the file holds what INT8 must introduce and nothing else",
        FLOAT_CONV,
        (),
        "",
        wrong=INT8_CONV,
        constants={"wq1": WEIGHTS, "bq1": BIAS, **levels(WEIGHTS, BIAS)},
    ),
    Report(
        "levels made unsigned",
        "microsoft/onnxruntime/issues/27845",
        "a Q/DQ pair in UINT8 is put around a Reshape: negative INT8 weights become 0",
        "w8 = DequantizeLinear(levels, s, z)\nw9 = Reshape(w8, shape)\nm = MatMul(t1, w9)",
        ("w8", "w9", "u8", "wu", "m"),
        "clip|cut off|negative|UINT8",
        "calibrate|FP32|INT8",
        wrong="w8 = DequantizeLinear(levels, s, z)\nw9 = Reshape(w8, shape)\nu8 = QuantizeLinear(w9, s, zu)\n"
        "wu = DequantizeLinear(u8, s, zu)\nm = MatMul(t1, wu)",
        constants={**UNIT, "levels": LEVELS, "shape": ints(16, 16)},
        wrong_constants={"zu": np.uint8(0)},
        frame=TOKENS,
    ),
    Report(
        "levels interpolated",
        "microsoft/onnxruntime/issues/28448",
        "Resize between Q and DQ is computed on the levels, which are cut off instead of rounded",
        "q = QuantizeLinear(r1, s, z)\nd = DequantizeLinear(q, s, z)\n"
        'e = Resize<mode="linear", coordinate_transformation_mode="half_pixel">(d, , , size)\n'
        "f = QuantizeLinear(e, s, z)\nm = DequantizeLinear(f, s, z)",
        ("e", "f", "m", "g", "h"),
        "cut|[Ff]loor|round|level|trunc|one-sided",
        wrong="q = QuantizeLinear(r1, s, z)\nd = DequantizeLinear(q, s, z)\n"
        'e = Resize<mode="linear", coordinate_transformation_mode="half_pixel">(d, , , size)\n'
        "g = Div(e, s)\nh = Floor(g)\nm = Mul(h, s)",
        constants={"s": np.float32(0.05), "z": np.int8(0), "size": ints(1, 8, 24, 24)},
    ),
    Report(
        "maximum of levels with a negative scale",
        "microsoft/onnxruntime/issues/21176",
        "MaxPool is computed on the levels; with a negative scale that is the minimum",
        "m = MaxPool<kernel_shape=[2, 2], strides=[2, 2]>(r1)",
        ("n", "p", "m"),
        "Neg|sign|minimum|MaxPool",
        wrong="n = Neg(r1)\np = MaxPool<kernel_shape=[2, 2], strides=[2, 2]>(n)\nm = Neg(p)",
    ),
    Report(
        "zero point at the end",
        "microsoft/onnxruntime/issues/10846",
        "asymmetric calibration gives zero points of 255: all that is positive is clipped",
        "q = QuantizeLinear(t1, s, z)\nm = DequantizeLinear(q, s, z)",
        ("q", "m"),
        "clip|zero.point|range|saturat|z of",
        "z on both sides",
        wrong="q = QuantizeLinear(t1, s, end)\nm = DequantizeLinear(q, s, end)",
        constants={"s": np.float32(2 / 255), "z": np.uint8(128)},
        wrong_constants={"end": np.uint8(255)},
        frame=TOKENS,
    ),
    Report(
        "one scale for boxes and scores",
        "microsoft/onnxruntime/issues/14233",
        "boxes up to 640 and scores up to 1 share a scale: every confidence is 0",
        "y = Transpose<perm=[0, 2, 1]>(c)",
        ("c", "y", "q"),
        "0 in|lost|vanish|become 0|are 0",
        "scale|split|apart|own",
        wrong="q = QuantizeLinear(c, s, z)\nd = DequantizeLinear(q, s, z)\ny = Transpose<perm=[0, 2, 1]>(d)",
        constants={"s": np.float32(640 / 127), "z": np.int8(0)},
        frame=BOXES,
    ),
    Report(
        "zero points ignored",
        "iree-org/iree/issues/24583",
        "MatMulInteger does not subtract its zero points",
        "q = QuantizeLinear(t1, s, z)\ni = MatMulInteger(q, levels, z, zw)\nf = Cast<to=1>(i)\nm = Mul(f, s)",
        ("i",),
        "zero",
        wrong="q = QuantizeLinear(t1, s, z)\ni = MatMulInteger(q, levels)\nf = Cast<to=1>(i)\nm = Mul(f, s)",
        constants={"s": np.float32(2 / 255), "z": np.uint8(128), "levels": LEVELS, "zw": np.int8(3)},
        frame=TOKENS,
    ),
    Report(
        "pairs of 16 bits under com.microsoft",
        "microsoft/onnxruntime/issues/20881",
        "activations of 16 bits below opset 21 are written in ONNX Runtime's own domain; nothing is wrong with them",
        "m = MatMul(t1, wm)",
        (),
        "",
        wrong=f"{WIDE}\nm = MatMul(d, wd)",
        constants=WIDE_LEVELS,
        frame=TOKENS,
    ),
    Report(
        "scale of 16 bits, 16 times too coarse",
        "microsoft/onnxruntime/issues/20881",
        "the same with a scale that wastes four of the sixteen bits",
        "m = MatMul(t1, wm)",
        ("m", "q"),
        "scale|coarse|fine|range",
        wrong=f"{WIDE}\nm = MatMul(d, wd)",
        constants={**WIDE_LEVELS, "s": np.float32(16 / 32767)},
        frame=TOKENS,
    ),
)
