"""Samples at fractional places, and boxes: Resize, GridSample, RoiAlign, DeformConv, NonMaxSuppression and others."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from cp_debug.backends.kernels.registry import Call, kernel
from cp_debug.backends.kernels.windows import Window
from cp_debug.backends.scaling import KERNEL, Axes

HALF = ("half_pixel", "pytorch_half_pixel")
"""Transforms whose places ONNX Runtime 1.31 computes exactly enough for ties, where sizes are given."""
_FEW_BITS = 4096
"""Places that are multiples of 1 ÷ this, and less than this, are exact in FP32 with bits to spare."""


@kernel("Resize", exact=True)
def resize(
    call: Call,
    x: Tensor,
    roi: Tensor | None = None,
    scales: Tensor | None = None,
    sizes: Tensor | None = None,
    shift: float = 0.0,
) -> Tensor:
    """``shift`` moves every place on a source axis that is not exact, nor exactly in the middle of two, by so many
    pixels: to see what its rounding may change."""
    if call.opset < 11:  # Resize-10: (x, scales)
        factors = dict(enumerate(_floats(roi)))
        return _resample(x, factors, None, call["mode"], "asymmetric", "floor", -0.75, False, shift=shift)
    transform, policy = call["coordinate_transformation_mode"], call["keep_aspect_ratio_policy"] or "stretch"
    if call["antialias"] or transform == "tf_crop_and_resize" or policy != "stretch":
        return NotImplemented
    axes = [a % x.dim() for a in call["axes"] or range(x.dim())]
    target = None
    if sizes is not None and sizes.numel():
        target = dict(zip(axes, (int(n) for n in sizes.tolist()), strict=True))
        factors = {a: n / x.shape[a] for a, n in target.items()}
    else:
        factors = dict(zip(axes, _floats(scales), strict=True))
    exclude = bool(call["exclude_outside"])
    how = transform, call["nearest_mode"], call["cubic_coeff_a"], exclude
    return _resample(x, factors, target, call["mode"], *how, literal=call.literal, shift=shift)


@kernel("Upsample", exact=True)
def upsample(call: Call, x: Tensor, scales: Tensor | None = None, shift: float = 0.0) -> Tensor:
    """``shift``: as of ``resize``."""
    factors = _floats(scales) if scales is not None else call["scales"]
    return _resample(x, dict(enumerate(factors)), None, call["mode"], "asymmetric", "floor", -0.75, False, shift=shift)


@kernel("GridSample")
def grid_sample(call: Call, x: Tensor, grid: Tensor) -> Tensor:
    mode = {"linear": "bilinear", "cubic": "bicubic"}.get(call["mode"], call["mode"])
    if x.dim() > 4 and mode == "bicubic":
        return NotImplemented
    return functional.grid_sample(x, grid, mode, call["padding_mode"], bool(call["align_corners"]))


def _floats(scales: Tensor | None) -> list[float]:
    return [] if scales is None else scales.tolist()


def _resample(
    x: Tensor,
    factors: dict[int, float],
    target: dict[int, int] | None,
    mode: str,
    transform: str,
    nearest: str,
    cubic: float,
    exclude: bool,
    *,
    literal: bool = False,
    shift: float = 0.0,
) -> Tensor:
    """Resample axis by axis: every result element is a weighted sum of one, two or four source elements."""
    for axis, factor in factors.items():
        size = x.shape[axis]
        # In FP32, as runtimes multiply: 300 × 1.1 is 330.
        length = target[axis] if target is not None else int(np.floor(np.float32(size) * np.float32(factor)))
        if factor == 1 and length == size:
            continue
        at = _coordinates(length, size, factor, transform, nearest=mode == "nearest", literal=literal)
        ties, rounds = np.zeros(length, bool), mode == "nearest" and nearest.startswith("round")
        if rounds and transform in HALF and target is not None and not literal:
            # From sizes alone a place in the middle of two is known exactly, and the declared mode decides.
            twice = ((2 * np.arange(length) + 1) * size - length) / length
            at, ties = twice / 2, twice % 2 == 1
        if shift and not _is_exact(length, size, factor, transform):
            at = np.where(ties, at, at + shift)
        taps: list[tuple[np.ndarray, np.ndarray | None]]
        if mode == "nearest":
            taps = [(_nearest(at, nearest), None)]
        else:
            base = np.floor(at)
            share = at - base
            weights = [1 - share, share] if mode in ("linear", "bilinear") else _cubic(share, cubic)
            first = 0 if len(weights) == 2 else -1
            index = [base + first + i for i in range(len(weights))]
            if exclude:
                inside = [np.where((i >= 0) & (i < size), w, 0) for i, w in zip(index, weights, strict=True)]
                weights = [w / sum(inside) for w in inside]
            taps = list(zip(index, weights, strict=True))
        x = _gather(x, axis, taps)
    return x


def _gather(x: Tensor, axis: int, taps: list[tuple[np.ndarray, np.ndarray | None]]) -> Tensor:
    total: Tensor | None = None
    levels = not x.is_floating_point() and taps[0][1] is not None
    dtype, x = x.dtype, x.double() if levels else x
    for index, weight in taps:
        places = torch.from_numpy(np.clip(index, 0, x.shape[axis] - 1).astype(np.int64)).to(x.device)
        part = x.index_select(axis, places)
        if weight is not None:
            part = part * torch.from_numpy(weight).to(part).reshape(-1, *(1,) * (x.dim() - 1 - axis))
        total = part if total is None else total + part
    assert total is not None
    return total.to(dtype) if levels else total  # cut off, as ONNX Runtime converts


def _coordinates(length: int, size: int, factor: float, transform: str, *, nearest: bool, literal: bool) -> np.ndarray:
    """Places of ``length`` results on the source axis (ONNX Resize, coordinate_transformation_mode).

    Aligned corners refer to the length of the result in ONNX Runtime and torch, to scale × size, which need not be
    whole, in ONNX's reference implementation (``literal``).
    """
    # Where the nearest neighbour is chosen, the rounding of the place decides: in FP32, as ONNX Runtime computes it.
    real: type[np.floating] = np.float32 if nearest and not literal else np.float64
    i, factor_, half = np.arange(length, dtype=real), real(factor), real(0.5)
    if transform == "align_corners":
        whole = factor * size if literal else length
        return i * real(size - 1) / real(whole - 1) if length > 1 else i
    if transform == "asymmetric":
        return i / factor_
    if transform == "pytorch_half_pixel" and length == 1:
        return np.zeros(1)
    if transform == "half_pixel_symmetric":
        middle = real(size / 2)
        return middle * (1 - real(length) / (factor_ * real(size))) + (i + half) / factor_ - half
    return (i + half) / factor_ - half


def _is_exact(length: int, size: int, factor: float, transform: str) -> bool:
    """Whether the places of the results need so few bits that FP32 holds them, whatever formula is used."""
    step = (size - 1) / max(length - 1, 1) if transform == "align_corners" else 1 / factor
    return (step * _FEW_BITS).is_integer() and max(length, size) < _FEW_BITS


def _nearest(at: np.ndarray, mode: str) -> np.ndarray:
    if mode == "round_prefer_floor":
        return np.ceil(at - 0.5)
    return {"floor": np.floor(at), "ceil": np.ceil(at), "round_prefer_ceil": np.floor(at + 0.5)}[mode]


def _cubic(t: np.ndarray, a: float) -> list[np.ndarray]:
    """Weights of the four neighbours in Keys' cubic convolution, ``t`` behind the second of them."""

    def near(d: np.ndarray) -> np.ndarray:
        return ((a + 2) * d - (a + 3)) * d * d + 1

    def far(d: np.ndarray) -> np.ndarray:
        return ((a * d - 5 * a) * d + 8 * a) * d - 4 * a

    return [far(t + 1), near(t), near(1 - t), far(2 - t)]


@kernel("AffineGrid", exact=True)
def affine_grid(call: Call, theta: Tensor, size: Tensor) -> Tensor:
    return functional.affine_grid(theta, [int(n) for n in size.tolist()], bool(call["align_corners"]))


@kernel("RoiAlign")
def roi_align(call: Call, x: Tensor, rois: Tensor, batch: Tensor) -> Tensor:
    """x [N, C, H, W], rois [R, 4] as x1, y1, x2, y2, batch [R] → [R, C, output height, output width]."""
    half = call.opset >= 16 and {"half_pixel": True, "output_half_pixel": False}[call["coordinate_transformation_mode"]]
    largest = {"max": True, "avg": False}[call["mode"]]
    rows, columns, ratio = call["output_height"], call["output_width"], call["sampling_ratio"]
    results = []
    for roi, image in zip((rois * call["spatial_scale"] - 0.5 * half), batch.tolist(), strict=True):
        left, top, right, bottom = roi.unbind()
        width, height = right - left, bottom - top
        if not half:
            width, height = width.clamp(min=1.0), height.clamp(min=1.0)
        counts = [int(ratio) or math.ceil(float(span) / n) for span, n in ((height, rows), (width, columns))]
        if min(counts) < 1:
            results.append(x.new_zeros(x.shape[1], rows, columns))
            continue
        y, ix = (
            start + (torch.arange(n * count, dtype=x.dtype, device=x.device) + 0.5) * (span / (n * count))
            for start, span, n, count in ((top, height, rows, counts[0]), (left, width, columns, counts[1]))
        )
        # [C, 4 neighbours, output rows × samples, output columns × samples]
        parts = torch.stack(_neighbours(x[image], y[:, None], ix[None]), 1)
        parts = parts.unflatten(-1, (columns, counts[1])).unflatten(-3, (rows, counts[0]))
        if largest:
            results.append(parts.amax((1, 3, 5)))  # of the weighted neighbours, as ONNX Runtime takes it
        else:
            results.append(parts.sum(1).mean((2, 4)))
    return torch.stack(results) if results else x.new_zeros(0, x.shape[1], rows, columns)


def _neighbours(image: Tensor, y: Tensor, x: Tensor) -> list[Tensor]:
    """The four neighbours of every place of an image [C, H, W], times their weights: [C, places] each.

    Places are clamped to the image; beyond a pixel around it there is nothing.
    """
    y, x = torch.broadcast_tensors(y, x)
    height, width = image.shape[-2:]
    inside = (y >= -1) & (y <= height) & (x >= -1) & (x <= width)
    y, x = y.clamp(0, height - 1), x.clamp(0, width - 1)
    low_y, low_x = y.floor(), x.floor()
    parts = []
    for down in (0, 1):
        for right in (0, 1):
            weight = ((y - low_y) if down else 1 - (y - low_y)) * ((x - low_x) if right else 1 - (x - low_x))
            row, column = (
                (low + step).clamp(max=n - 1) for low, step, n in ((low_y, down, height), (low_x, right, width))
            )
            parts.append(image[:, row.long(), column.long()] * (weight * inside))
    return parts


@kernel("MaxRoiPool", rounds=False)
def max_roi_pool(call: Call, x: Tensor, rois: Tensor) -> Tensor:
    """rois [R, 5]: image, x1, y1, x2, y2, rounded to whole pixels, both ends within."""
    rows, columns = call["pooled_shape"]
    result = x.new_zeros(rois.shape[0], x.shape[1], rows, columns)
    for r, roi in enumerate(rois.tolist()):
        scaled = [math.floor(abs(v) * call["spatial_scale"] + 0.5) * (1 if v >= 0 else -1) for v in roi[1:]]
        left, top, right, bottom = scaled
        bins = (
            (top, max(bottom - top + 1, 1) / rows, x.shape[2]),
            (left, max(right - left + 1, 1) / columns, x.shape[3]),
        )
        for i in range(rows):
            for j in range(columns):
                ends = [
                    (min(max(math.floor(k * step) + start, 0), n), min(max(math.ceil((k + 1) * step) + start, 0), n))
                    for k, (start, step, n) in zip((i, j), bins, strict=True)
                ]
                part = x[int(roi[0]), :, slice(*ends[0]), slice(*ends[1])]
                if part.numel():
                    result[r, :, i, j] = part.amax((1, 2))
    return result


@kernel("DeformConv", multiplies=True)
def deform_conv(
    call: Call, x: Tensor, weight: Tensor, offset: Tensor, bias: Tensor | None = None, mask: Tensor | None = None
) -> Tensor:
    """x [N, C, H, W], weight [M, C/group, kh, kw], offset [N, G·kh·kw·2, oh, ow], mask [N, G·kh·kw, oh, ow]."""
    if x.dim() != 4 or min(x.shape[2:]) < 2:
        return NotImplemented
    window = Window.of(call, weight.shape[2:], x.shape[2:])
    groups, parts = call["offset_group"], call["group"]
    (kh, kw), (oh, ow) = weight.shape[2:], offset.shape[2:]
    count = kh * kw
    offset = offset.reshape(x.shape[0], groups, count, 2, oh, ow)
    steps = [torch.arange(n, dtype=x.dtype, device=x.device) for n in (oh, ow, kh, kw)]
    base_y = steps[0] * window.stride[0] - window.begin[0]
    base_x = steps[1] * window.stride[1] - window.begin[1]
    tap_y = (steps[2] * window.dilation[0])[:, None].expand(kh, kw).reshape(count, 1, 1)
    tap_x = (steps[3] * window.dilation[1])[None].expand(kh, kw).reshape(count, 1, 1)
    y = base_y[:, None] + tap_y + offset[:, :, :, 0]  # [N, G, taps, oh, ow]
    ix = base_x + tap_x + offset[:, :, :, 1]
    scale = torch.tensor([max(x.shape[3] - 1, 1), max(x.shape[2] - 1, 1)], dtype=x.dtype, device=x.device) / 2
    grid = torch.stack([ix, y], -1) / scale - 1
    channels = x.shape[1] // groups
    images = x.reshape(x.shape[0] * groups, channels, *x.shape[2:])
    grid = grid.reshape(x.shape[0] * groups, count * oh, ow, 2)
    columns = functional.grid_sample(images, grid, "bilinear", "zeros", align_corners=True)
    columns = columns.reshape(x.shape[0], groups, channels, count, oh, ow)
    if mask is not None:
        columns = columns * mask.reshape(x.shape[0], groups, 1, count, oh, ow)
    columns, weight = call.operands(columns, weight, axes=(Axes(2, None), KERNEL))
    columns = columns.reshape(x.shape[0], parts, x.shape[1] // parts * count, oh * ow)
    result = weight.reshape(parts, weight.shape[0] // parts, -1) @ columns
    result = result.reshape(x.shape[0], weight.shape[0], oh, ow)
    return result if bias is None else result + bias.reshape(-1, 1, 1)


@kernel("Col2Im")
def col2im(call: Call, x: Tensor, image: Tensor, block: Tensor) -> Tensor:
    size, kernel_size = (tuple(int(n) for n in t.tolist()) for t in (image, block))
    pads = tuple(call["pads"] or (0,) * 2 * len(size))
    if len(size) != 2:
        return NotImplemented
    begin, end = pads[:2], pads[2:]
    padded = tuple(n + b + e for n, b, e in zip(size, begin, end, strict=True))
    dilation, stride = call["dilations"] or (1, 1), call["strides"] or (1, 1)
    whole = functional.fold(x, padded, kernel_size, tuple(dilation), 0, tuple(stride))
    return whole[..., begin[0] : begin[0] + size[0], begin[1] : begin[1] + size[1]]


@kernel("NonMaxSuppression", rounds=False, exact=True)
def non_max_suppression(
    call: Call,
    boxes: Tensor,
    scores: Tensor,
    most: Tensor | None = None,
    overlap: Tensor | None = None,
    least: Tensor | None = None,
) -> Tensor:
    """boxes [N, B, 4], scores [N, C, B] → [selected, 3]: image, class, box; by falling score within a class."""
    count = 0 if most is None else int(most)
    threshold = 0.0 if overlap is None else float(overlap)
    corners = _corners(boxes) if call["center_point_box"] else boxes
    low, high = (choose(corners[..., :2], corners[..., 2:]) for choose in (torch.minimum, torch.maximum))
    selected = []
    for n in range(boxes.shape[0] if count > 0 else 0):
        for c in range(scores.shape[1]):
            order = torch.sort(scores[n, c], descending=True, stable=True).indices
            if least is not None:
                order = order[scores[n, c][order] > least.reshape(())]
            survivors = _suppressed(low[n][order], high[n][order], threshold, count)
            selected += [(n, c, int(order[k])) for k in survivors]
    return torch.tensor(selected, dtype=torch.int64, device=call.device).reshape(-1, 3)


def _corners(boxes: Tensor) -> Tensor:
    """Opposite corners of boxes given by centre x, centre y, width and height."""
    centre, half = boxes[..., :2], boxes[..., 2:] / 2
    return torch.cat([centre - half, centre + half], -1)


def _suppressed(low: Tensor, high: Tensor, threshold: float, most: int) -> list[int]:
    """The boxes, best first, that overlap no better one that is kept by more than ``threshold``."""
    area = (high - low).prod(-1)
    candidates = torch.ones(len(low), dtype=torch.bool, device=low.device)
    survivors: list[int] = []
    while len(survivors) < most and bool(candidates.any()):
        best = int(candidates.to(torch.uint8).argmax())
        survivors.append(best)
        common = (torch.minimum(high, high[best]) - torch.maximum(low, low[best])).clamp(min=0).prod(-1)
        union = area + area[best] - common
        candidates &= ~((common > 0) & (union > 0) & (area > 0) & (area[best] > 0) & (common / union > threshold))
        candidates[best] = False
    return survivors
