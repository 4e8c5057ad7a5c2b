"""Pools, windows, borders, resizing, places of pixels."""

from __future__ import annotations

import numpy as np

from .case import Report
from .networks import SQUARE, Frame, floats, ints

BORDER = np.ones((1, 1, 7, 7), np.float32)
BORDER[..., -1, :] *= 1.5
BORDER[..., :, -1] *= 1.5
RIGHT_HALF = np.ones((1, 1, 6, 1), np.float32)
RIGHT_HALF[..., -2, :], RIGHT_HALF[..., -1, :] = 5 / 4, 5 / 3
POOL = "AveragePool<kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1], ceil_mode=1, count_include_pad=1>"
ONE = Frame(SQUARE.text, {"x": (1, 3, 10, 10)}, SQUARE.constants)
WIDE = Frame(SQUARE.text, {"x": (1, 3, 1, 26)}, SQUARE.constants)
SIX = Frame(SQUARE.text, {"x": (1, 3, 6, 2)}, SQUARE.constants)
BOXES = floats(0, 0, 5, 5, 2, 1, 9, 8).reshape(2, 4)

CASES = (
    Report(
        "average over padding",
        "pytorch/pytorch/issues/13934",
        "the exporter loses count_include_pad, which is true in PyTorch and false in ONNX",
        "m = AveragePool<kernel_shape=[3, 3], pads=[1, 1, 1, 1], count_include_pad=1>(r1)",
        ("m",),
        "count_include_pad|padding",
        wrong="m = AveragePool<kernel_shape=[3, 3], pads=[1, 1, 1, 1]>(r1)",
        healthy="p = Pad(r1, pads)\nm = AveragePool<kernel_shape=[3, 3]>(p)",
        constants={"pads": ints(0, 0, 1, 1, 0, 0, 1, 1)},
    ),
    Report(
        "windows beyond the border",
        "pytorch/pytorch/issues/183528",
        "with ceil_mode, windows over the end are divided by another number than in PyTorch",
        f"a = {POOL}(r1)\nm = Mul(a, border)",
        ("a", "m"),
        r"divis|last row|border|window|1\.5|2/3|factor|Mul is left out",
        wrong=f"m = {POOL}(r1)",
        constants={"border": BORDER},
    ),
    Report(
        "pads folded into a pool",
        "onnx/optimizer/pull/108",
        "Pad and AveragePool become one AveragePool, which leaves the zeros out of its count",
        "p = Pad(r1, pads)\nm = AveragePool<kernel_shape=[3, 3]>(p)",
        ("p", "m"),
        "count_include_pad|pad",
        wrong="m = AveragePool<kernel_shape=[3, 3], pads=[1, 1, 1, 1]>(r1)",
        healthy="m = AveragePool<kernel_shape=[3, 3], pads=[1, 1, 1, 1], count_include_pad=1>(r1)",
        constants={"pads": ints(0, 0, 1, 1, 0, 0, 1, 1)},
    ),
    Report(
        "pads folded into a pool that pads itself",
        "microsoft/onnxruntime/pull/23190",
        "the pool's own padding, which was not counted, is counted after the fusion",
        "p = Pad(r1, pads)\nm = AveragePool<kernel_shape=[3, 3], pads=[1, 1, 1, 1]>(p)",
        ("p", "m"),
        "count_include_pad|pad",
        wrong="m = AveragePool<kernel_shape=[3, 3], pads=[2, 2, 2, 2], count_include_pad=1>(r1)",
        constants={"pads": ints(0, 0, 1, 1, 0, 0, 1, 1)},
    ),
    Report(
        "padding at the end not counted",
        "microsoft/onnxruntime/issues/24681",
        "the newer AveragePool counts the zeros in front and not those at the end",
        "m = AveragePool<kernel_shape=[5, 1], pads=[2, 0, 2, 0], count_include_pad=1>(r1)",
        ("a", "m"),
        "divis|last row|border|window|count_include_pad|factor|Mul is added",
        wrong="a = AveragePool<kernel_shape=[5, 1], pads=[2, 0, 2, 0], count_include_pad=1>(r1)\nm = Mul(a, ends)",
        wrong_constants={"ends": RIGHT_HALF},
        frame=SIX,
    ),
    Report(
        "resize to one pixel",
        "pytorch/pytorch/issues/183523",
        "bilinear interpolation to 1×1 is exported as pytorch_half_pixel, which takes the first pixel",
        'm = Resize<mode="linear", coordinate_transformation_mode="half_pixel">(r1, , , size)',
        ("m",),
        "half_pixel|coordinate",
        wrong='m = Resize<mode="linear", coordinate_transformation_mode="pytorch_half_pixel">(r1, , , size)',
        constants={"size": ints(1, 8, 1, 1)},
        frame=ONE,
    ),
    Report(
        "resize with corners aligned",
        "onnx/onnx-tensorrt/issues/457",
        "the engine's interpolation is shifted: corners are aligned on one side alone",
        'm = Resize<mode="linear", coordinate_transformation_mode="half_pixel">(r1, , , size)',
        ("m",),
        "align_corners|coordinate",
        wrong='m = Resize<mode="linear", coordinate_transformation_mode="align_corners">(r1, , , size)',
        constants={"size": ints(1, 8, 24, 24)},
    ),
    Report(
        "asymmetric resize",
        "NVIDIA/TensorRT/issues/273",
        "the engine resizes asymmetrically where PyTorch takes half pixels",
        'm = Resize<mode="linear", coordinate_transformation_mode="half_pixel">(r1, , , size)',
        ("m",),
        "asymmetric|coordinate",
        wrong='m = Resize<mode="linear", coordinate_transformation_mode="asymmetric">(r1, , , size)',
        constants={"size": ints(1, 8, 24, 24)},
    ),
    Report(
        "bicubic resize to one pixel",
        "microsoft/onnxruntime/issues/11496",
        "bicubic downsampling to 1×1 gives another value than PyTorch and the reference implementation",
        'm = Resize<mode="cubic", coordinate_transformation_mode="half_pixel", cubic_coeff_a=-0.75>(r1, , , size)',
        ("m",),
        "half_pixel|coordinate",
        wrong='m = Resize<mode="cubic", coordinate_transformation_mode="pytorch_half_pixel", cubic_coeff_a=-0.75>'
        "(r1, , , size)",
        constants={"size": ints(1, 8, 1, 1)},
        frame=SQUARE,
    ),
    Report(
        "other neighbours",
        "microsoft/onnxruntime/issues/28310",
        "nearest neighbours for 26 to 64 pixels: half pixels rounded up, where PyTorch floors asymmetric ones",
        'm = Resize<mode="nearest", coordinate_transformation_mode="asymmetric", nearest_mode="floor">(r1, , , size)',
        ("m",),
        "coordinate|nearest|half_pixel|asymmetric",
        wrong='m = Resize<mode="nearest", coordinate_transformation_mode="half_pixel", '
        'nearest_mode="round_prefer_ceil">(r1, , , size)',
        constants={"size": ints(1, 8, 1, 64)},
        frame=WIDE,
    ),
    Report(
        "regions of interest",
        "apache/tvm/issues/19501",
        "the importer ignores coordinate_transformation_mode of RoiAlign",
        'm = RoiAlign<coordinate_transformation_mode="half_pixel", output_height=4, output_width=4, sampling_ratio=2>'
        "(r1, boxes, batch)",
        ("m",),
        "half_pixel|coordinate",
        wrong='m = RoiAlign<coordinate_transformation_mode="output_half_pixel", output_height=4, output_width=4, '
        "sampling_ratio=2>(r1, boxes, batch)",
        constants={"boxes": BOXES, "batch": ints(0, 0)},
    ),
    Report(
        "padding of the output lost",
        "pytorch/pytorch/issues/104206",
        "output_padding of a transposed convolution is exported as zeros; what is missing is padded on",
        "m = ConvTranspose<strides=[2, 2], pads=[1, 1, 1, 1], output_padding=[1, 1]>(r1, wt)",
        ("t", "m"),
        "output_padding|pad",
        wrong="t = ConvTranspose<strides=[2, 2], pads=[1, 1, 1, 1]>(r1, wt)\nm = Pad(t, more)",
        constants={"wt": (8, 8, 3, 3)},
        wrong_constants={"more": ints(0, 0, 0, 0, 0, 0, 1, 1)},
    ),
    Report(
        "order of paddings",
        "pytorch/pytorch/issues/60179",
        "F.pad is exported with the dimensions of its padding in the wrong order",
        "m = Pad(r1, pads)",
        ("m",),
        "pad",
        wrong_constants={"pads": ints(0, 0, 0, 1, 0, 0, 1, 0)},
        constants={"pads": ints(0, 0, 1, 0, 0, 0, 0, 1)},
    ),
    Report(
        "padding at the other end",
        "onnx/onnx/issues/388",
        "padding of 1 on each side becomes what TensorFlow calls SAME: all of it at the end",
        "m = MaxPool<kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 0, 0]>(r1)",
        ("m",),
        "pads",
        wrong="m = MaxPool<kernel_shape=[3, 3], strides=[2, 2], pads=[0, 0, 1, 1]>(r1)",
    ),
    Report(
        "pixels shuffled by depth",
        "PINTO0309/onnx2tf/pull/92",
        "PixelShuffle, DepthToSpace in mode CRD, is converted as if it were DCR",
        'e1 = Conv(r1, we)\nm = DepthToSpace<blocksize=2, mode="CRD">(e1)',
        ("m",),
        "CRD|DCR|mode",
        wrong='e1 = Conv(r1, we)\nm = DepthToSpace<blocksize=2, mode="DCR">(e1)',
        constants={"we": (32, 8, 1, 1)},
    ),
    Report(
        "pixels unshuffled by depth",
        "microsoft/onnxscript/issues/2891",
        "PixelUnshuffle is exported as SpaceToDepth, which orders the channels otherwise",
        "e1 = Conv(r1, we)\ns1 = Reshape(e1, six)\ns2 = Transpose<perm=[0, 1, 3, 5, 2, 4]>(s1)\nm = Reshape(s2, four)",
        ("s1", "s2", "m"),
        "order|mode|transpose|perm|SpaceToDepth|channel",
        wrong="e1 = Conv(r1, we)\nm = SpaceToDepth<blocksize=2>(e1)",
        constants={"we": (2, 8, 1, 1), "six": ints(1, 2, 6, 2, 6, 2), "four": ints(1, 8, 6, 6)},
    ),
    Report(
        "sampling of a grid",
        "pytorch/pytorch/issues/40153",
        "align_corners of grid_sample means the other thing than was thought",
        "m = GridSample<align_corners=0>(r1, grid)",
        ("m",),
        "align_corners",
        wrong="m = GridSample<align_corners=1>(r1, grid)",
        constants={"grid": (np.random.default_rng(5).uniform(-0.9, 0.9, (1, 6, 6, 2))).astype(np.float32)},
    ),
    Report(
        "merged slices",
        "inisis/OnnxSlim/issues/277",
        "two Slices become one, and two of the four phases of the picture are taken twice",
        "a0 = Slice(r1, zero, big, rows, two)\nf0 = Slice(a0, zero, big, columns, two)\n"
        "a1 = Slice(r1, one, big, rows, two)\nf1 = Slice(a1, zero, big, columns, two)\n"
        "f = Concat<axis=1>(f0, f1)\nm = Conv(f, wf)",
        ("a1", "f0", "f1"),
        "start|Slice|slice",
        wrong="f0 = Slice(r1, zeros, ends, both, twos)\nf1 = Slice(r1, zero_one, ends, both, twos)\n"
        "f = Concat<axis=1>(f0, f1)\nm = Conv(f, wf)",
        healthy="f0 = Slice(r1, zeros, ends, both, twos)\nf1 = Slice(r1, one_zero, ends, both, twos)\n"
        "f = Concat<axis=1>(f0, f1)\nm = Conv(f, wf)",
        constants={
            "zero": ints(0),
            "one": ints(1),
            "two": ints(2),
            "big": ints(99),
            "rows": ints(2),
            "columns": ints(3),
            "zeros": ints(0, 0),
            "zero_one": ints(0, 1),
            "one_zero": ints(1, 0),
            "ends": ints(99, 99),
            "both": ints(2, 3),
            "twos": ints(2, 2),
            "wf": (8, 16, 1, 1),
        },
    ),
)
