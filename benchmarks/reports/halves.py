"""Files whose values are to be FP16: what is beyond its range, below it, or too coarse in it."""

from __future__ import annotations

import numpy as np

from .case import Report
from .networks import Frame, ints

ROWS = {"x": (4, 8)}
HEAD = {"wo": (8, 2)}
NORM = Frame("{}\ny = MatMul(m, wo)", ROWS, HEAD)
LAYER_NORM = (
    "mean = ReduceMean<axes=[-1]>(x)\nd = Sub(x, mean)\nsq = Pow(d, two)\nvar = ReduceMean<axes=[-1]>(sq)\n"
    "ve = Add(var, eps)\nsd = Sqrt(ve)\nm = Div(d, sd)"
)
TWO = {"two": np.float32(2), "eps": np.float32(1e-5)}
MAPS = Frame("{}\ny = Conv(m, wo)", {"x": (1, 2, 8, 8)}, {"wo": (4, 2, 1, 1)})
POSITIONS = Frame("p = Cast<to=1>(pos)\n{}\ny = MatMul(m, wo)", {"pos": (8, 1)}, {"wo": (4, 2)}, {"pos": "int64"})
MASKED = Frame("t1 = MatMul(x, wk)\n{}\np1 = Softmax<axis=-1>(m)\ny = MatMul(p1, wo)", {"x": (6, 8)},
               {"wk": (8, 6), "wo": (6, 2)})  # fmt: skip
FEED = Frame("h1 = MatMul(x, wi)\nh2 = Relu(h1)\n{}\ny = LayerNormalization<axis=-1>(m, one, none)", ROWS,
             {"wi": (8, 16), "one": np.ones(8, np.float32), "none": np.zeros(8, np.float32)})  # fmt: skip


def rows(scale: float, spike: float = 0.0):
    """Inputs of ``ROWS``: normal numbers times ``scale``, in each row one of ``spike``."""

    def made(rng: np.random.Generator) -> dict[str, np.ndarray]:
        x = (rng.standard_normal((4, 8)) * scale).astype(np.float32)
        if spike:
            x[:, 3] = spike
        return {"x": x}

    return made


def checkerboard(size: float):
    """Inputs of ``MAPS``: plus and minus ``size`` in turn, the second channel half of it."""

    def made(rng: np.random.Generator) -> dict[str, np.ndarray]:
        del rng
        board = np.where(np.indices((8, 8)).sum(0) % 2, -size, size).astype(np.float32)
        return {"x": np.stack([board, board / 2])[None]}

    return made


def positions(first: int):
    """Inputs of ``POSITIONS``: eight in a row from ``first``."""
    return lambda rng: {"pos": first + np.arange(8, dtype=np.int64)[:, None]}


def _other_tie(indices: np.ndarray) -> np.ndarray:
    """Places of the largest, with the last of equals instead of the first."""
    u = np.round(Report.normal((4, 8)))
    order = np.argsort(-u[:, ::-1], axis=1, kind="stable")
    return u.shape[1] - 1 - order[:, : indices.shape[1]]


RANGE = "FP16|65504|overflow|range"
KEEP = "FP32|BF16|keep"

CASES = (
    Report("square of a LayerNorm", "microsoft/onnxruntime/pull/13639",
           "Pow in a LayerNorm that is taken apart overflows in FP16", LAYER_NORM, ("sq", "var", "d"), RANGE, KEEP,
           kind="fp16", frame=NORM, constants=TWO, inputs=rows(1, 900), healthy_inputs=rows(1, 30)),
    Report("LayerNorm of a BERT", "NVIDIA/TensorRT/issues/2564", "a LayerNorm overflows in an FP16 engine",
           LAYER_NORM.replace("Pow(d, two)", "Mul(d, d)"), ("sq", "var", "d"), RANGE, KEEP,
           kind="fp16", frame=NORM, constants=TWO, inputs=rows(300), healthy_inputs=rows(1)),
    Report("length of a vector", "NVIDIA/TensorRT/issues/1954",
           "l2_normalize explodes in FP16: its squares are beyond the range",
           "sq = Mul(x, x)\nsum = ReduceSum<keepdims=1>(sq, last)\nn = Sqrt(sum)\nm = Div(x, n)", ("sq", "sum"),
           RANGE, KEEP, kind="fp16", frame=NORM, constants={"last": ints(-1)}, inputs=rows(250),
           healthy_inputs=rows(2)),
    Report("a constant of minus 10 to the 12", "NVIDIA/TensorRT/issues/2466",
           "a mask is multiplied by −999999995904, which is −Inf in FP16, and 0 · Inf is NaN",
           "o = Sub(one, keep)\nk = Mul(o, much)\nm = Add(t1, k)", ("k", "m", "o"), "Inf|65504|FP16|range",
           "FP32|smaller|range|Inf|stored in FP16", frame=MASKED,
           wrong="o = Sub(one, keep)\noh = Cast<to=10>(o)\nkh = Mul(oh, half)\nk = Cast<to=1>(kh)\nm = Add(t1, k)",
           constants={"keep": np.array([1, 1, 1, 1, 0, 0], np.float32), "one": np.float32(1),
                      "much": np.float32(-999999995904)},
           wrong_constants={"half": np.float16(-np.inf)}),
    Report("lowest float as a mask", "apple/coremltools/pull/2669",
           "−3.4e38 stands for −Inf; in FP16 it is −Inf, and a row of it gives NaN",
           "m = Add(t1, mask)", ("m", "p1"), "Inf|65504|FP16|range|mask", "FP32|smaller|range|Inf|stored in FP16",
           frame=MASKED, wrong="th = Cast<to=10>(t1)\nmh = Add(th, half)\nm = Cast<to=1>(mh)",
           constants={"mask": np.where(np.arange(6)[:, None] < 4, 0, -3.4e38).astype(np.float32)
                      + np.zeros((6, 6), np.float32)},
           wrong_constants={"half": np.where(np.arange(6)[:, None] < 4, 0, -np.inf).astype(np.float16)
                            + np.zeros((6, 6), np.float16)}),
    Report("feed-forward of T5", "huggingface/transformers/issues/5651",
           "the second product of a feed-forward layer gives 66246, more than FP16 holds",
           "m = MatMul(h2, wf)", ("m",), RANGE, KEEP, kind="fp16", frame=FEED,
           constants={"wf": np.abs(np.random.default_rng(2).standard_normal((16, 8))).astype(np.float32) * 600},
           inputs=rows(30), healthy_inputs=rows(1)),
    Report("stream of residuals", "ROCm/hip-ep/pull/168",
           "each summand is in the range; their sum, 92580, is not",
           "f = MatMul(h2, wf)\nm = Add(f, r)", ("m",), RANGE, KEEP, kind="fp16", frame=FEED,
           constants={"wf": np.abs(np.random.default_rng(2).standard_normal((16, 8))).astype(np.float32),
                      "r": np.linspace(20000, 65000, 8).astype(np.float32)},
           inputs=rows(1500), healthy_inputs=rows(1)),
    Report("variance of an InstanceNorm", "ml-explore/mlx/issues/4228",
           "values of 512 are finite, their variance is not, and the picture collapses to 0",
           "mean = ReduceMean<axes=[2, 3]>(x)\nd = Sub(x, mean)\nsq = Mul(d, d)\nvar = ReduceMean<axes=[2, 3]>(sq)\n"
           "ve = Add(var, eps)\nsd = Sqrt(ve)\nm = Div(d, sd)", ("sq", "var"), RANGE, KEEP, kind="fp16", frame=MAPS,
           constants=TWO, inputs=checkerboard(512), healthy_inputs=checkerboard(20)),
    Report("square before a GroupNorm", "neuroneural/brainchop-cli/pull/56",
           "convolutions reach 940; GroupNorm squares them in FP16",
           "g = Reshape(x, grouped)\nsq = Mul(g, g)\nms = ReduceMean<axes=[2]>(sq)\nve = Add(ms, eps)\nsd = Sqrt(ve)\n"
           "n = Div(g, sd)\nm = Reshape(n, whole)", ("sq", "ms"), RANGE, KEEP, kind="fp16", frame=MAPS,
           constants={**TWO, "grouped": ints(1, 1, -1), "whole": ints(1, 2, 8, 8)}, inputs=checkerboard(940),
           healthy_inputs=checkerboard(9)),
    Report("positions beyond 4096", "openvinotoolkit/openvino/pull/33214",
           "position ids in FP16 are multiples of 4, and so are the angles of a rotary embedding",
           "a = Mul(p, frequencies)\nm = Sin(a)", ("p", "a", "m"), "FP16|round|position|coarse|whole|integer", KEEP,
           kind="fp16", frame=POSITIONS, constants={"frequencies": np.array([1, 0.3, 0.1, 0.03], np.float32)},
           inputs=positions(5001), healthy_inputs=positions(0)),
    Report("rotary embedding at 1857", "EleutherAI/gpt-neox/issues/1003",
           "the angles are large, so that FP16 rounds them by a good part of a period",
           "a = Mul(p, frequencies)\nm = Cos(a)", ("a", "m"), "FP16|round|position|coarse|angle", KEEP,
           kind="fp16", frame=POSITIONS, constants={"frequencies": np.array([0.5623, 0.316, 0.178, 0.1], np.float32)},
           inputs=positions(1853), healthy_inputs=positions(0)),
    Report("epsilon of 1e-12", "microsoft/onnxruntime/issues/12726",
           "LayerNorm with ε = 1e-12 in FP16: rows of equal numbers divide by 0",
           LAYER_NORM.replace("Pow(d, two)", "Mul(d, d)"), ("ve", "var", "m", "sd", "sq"),
           "ε|epsilon|1e-12|underflow|vanish|0/0|zero",
           KEEP + "|ε|larger", kind="fp16", frame=NORM, constants={"eps": np.float32(1e-12)},
           inputs=lambda rng: {"x": np.concatenate([rng.standard_normal((3, 8)), np.ones((1, 8))]).astype(np.float32)},
           healthy_inputs=rows(1)),
)  # fmt: skip
DUMPS = (
    Report("logarithm of a sum of nothing", "microsoft/onnxruntime/issues/28461",
           "ReduceLogSumExp of −Inf alone is −Inf; the runtime gives NaN",
           "a = Add(x, mask)\nz = ReduceLogSumExp<axes=[1]>(a)\nm = Exp(z)", ("z",), "NaN|Inf", "Inf|NaN|mask",
           kind="dump",
           frame=Frame("{}\ny = Add(m, one)", ROWS, {"one": np.float32(1)}),
           constants={"mask": np.where(np.arange(4)[:, None] == 1, -np.inf, 0).astype(np.float32)
                      + np.zeros((4, 8), np.float32)},
           broken=("z", lambda z: np.where(np.isinf(z), np.nan, z))),
    Report("softplus of −12", "microsoft/onnxruntime/issues/10491",
           "log(1 + exp(x)) in float32 loses what is small: 4.41e-6 for 4.376e-6",
           "m = Softplus(x)", ("m",), "small|cancel|precis|log|round|unknown|relative", ".", kind="dump",
           frame=Frame("{}\ny = Mul(m, much)", ROWS, {"much": np.float32(1e5)}),
           inputs=lambda rng: {"x": rng.uniform(-14, -11, (4, 8)).astype(np.float32)},
           broken=("m", lambda m: (np.log(np.float32(1) + np.expm1(m.astype(float)).astype(np.float32))))),
    Report("neighbours that are equally near", "microsoft/onnxruntime/issues/19759",
           "TopK takes others of equal values than ONNX says, which wants the lower index",
           "u = Round(x)\nt, i = TopK<axis=1>(u, k)\nm = Cast<to=1>(i)", ("i", "t"), "tie|equal",
           kind="dump",
           frame=Frame("{}\ny = Mul(m, one)", ROWS, {"one": np.float32(1)}), constants={"k": ints(3)},
           broken=("i", _other_tie)),
)  # fmt: skip
