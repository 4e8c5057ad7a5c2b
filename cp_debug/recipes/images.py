"""Images as inputs of a network: read, resized, scaled and normalized as the flags say, in the layout that it wants."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from cp_debug.errors import DAMAGED, InputError, library_reason
from cp_debug.graph.graph import ValueInfo
from cp_debug.optional import require
from cp_debug.reading import check_file

IMAGES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
"""Suffixes of image files."""
CHANNELS = {1: "L", 3: "RGB", 4: "RGBA"}
"""Channels of an input that looks like an image → what Pillow calls them."""
MOST_PIXELS = 1 << 28

ImageLayout = Literal["auto", "nchw", "nhwc"]


@dataclass(frozen=True)
class ImageFormat:
    """Format in which a network takes images: value = (pixel × ``scale`` − ``mean``) ÷ ``std``, channel by channel.

    ``scale`` None is 1/255 for inputs in floating point, and 1 for integers, which take pixels as they are. ``mean``
    and ``std`` have one number, or one a channel. ``layout`` auto looks where the input has 1, 3 or 4 channels.
    """

    mean: Sequence[float] = (0.0,)
    std: Sequence[float] = (1.0,)
    scale: float | None = None
    layout: ImageLayout = "auto"
    bgr: bool = False


def read_image(
    path: Path, value: ValueInfo, wanted: ImageFormat, shape: Sequence[int] | None = None
) -> tuple[np.ndarray, str]:
    """The array for ``value``, in its dtype, with a batch of 1 where it has one; and what was done, in words.

    ``shape`` gives the sizes that the model leaves free; without it the image keeps its own size there. Raises
    InputError for an input that does not look like an image, a file that is none, and a mean or std that does not fit;
    MissingPackage without Pillow.
    """
    declared = tuple(shape) if shape is not None else value.shape
    layout, channels = _place(path, value, declared, wanted.layout)
    assert declared is not None
    nchw = layout == "nchw"
    height, width = declared[-2:] if nchw else declared[-3:-1]
    pixels, about = _pixels(path, CHANNELS[channels], _size(height), _size(width))
    if wanted.bgr and channels == 3:
        pixels, about = pixels[:, :, ::-1], [*about, "BGR"]
    assert value.dtype is not None
    floating = value.dtype.kind not in "iu"
    scale = wanted.scale if wanted.scale is not None else 1 / 255 if floating else 1.0
    mean, std = (_each(numbers, channels, flag) for numbers, flag in ((wanted.mean, "mean"), (wanted.std, "std")))
    array = (pixels.astype(np.float64) * scale - mean) / std
    array = array.transpose(2, 0, 1) if nchw else array
    array = array.reshape((1,) * (len(declared) - 3) + array.shape)
    if not floating:
        limits = np.iinfo(value.dtype)
        array = np.clip(np.rint(array), limits.min, limits.max)
    steps = [
        *about,
        f"× {scale:.4g}" if scale != 1 else "",
        *_arithmetic_of("−", wanted.mean, 0.0),
        *_arithmetic_of("÷", wanted.std, 1.0),
    ]
    return np.ascontiguousarray(array).astype(value.dtype), ", ".join(part for part in (*steps, layout) if part)


def _place(
    path: Path, value: ValueInfo, declared: Sequence[int | str | None] | None, layout: ImageLayout
) -> tuple[ImageLayout, int]:
    """Layout and channels of an input. Raises InputError for one that does not look like an image."""
    if declared is not None and len(declared) in (3, 4):
        by_layout: dict[ImageLayout, int | str | None] = {"nchw": declared[-3], "nhwc": declared[-1]}
        for name in ("nchw", "nhwc"):
            channels = by_layout[name]
            if layout in (name, "auto") and isinstance(channels, int) and channels in CHANNELS:
                return name, channels
        if layout != "auto" and not isinstance(by_layout[layout], int):
            return layout, 3
    raise InputError(
        f"{path}: is an image, and the input {value} does not look like one; expected 1, 3 or 4 channels"
        f"{'' if layout == 'auto' else f' as {layout}'}, or give the sizes with --shape {value.name}=1x3x224x224"
    )


def _size(size: int | str | None) -> int | None:
    return size if isinstance(size, int) else None


def _pixels(path: Path, mode: str, height: int | None, width: int | None) -> tuple[np.ndarray, list[str]]:
    """Pixels [H, W, C], 0 to 255, resized to the sizes that are given, and what was done."""
    image_module = require("PIL.Image", "images")
    check_file(path, "image")
    try:
        with image_module.open(path) as opened:
            if opened.width * opened.height > MOST_PIXELS:
                raise InputError(f"{path}: {opened.width} × {opened.height} pixels; expected at most {MOST_PIXELS}")
            image = opened.convert(mode)
    except InputError:
        raise
    except Exception as error:  # Pillow raises many kinds on what is no image
        reason = library_reason(error) or DAMAGED
        raise InputError(f"{path}: not a readable image: {reason[:200]}") from None
    size = (width or image.width, height or image.height)
    about = []
    if size != image.size:
        about.append(f"{image.width}×{image.height} resized to {size[0]}×{size[1]}")
        image = image.resize(size, image_module.Resampling.BILINEAR)
    pixels = np.asarray(image, np.uint8)
    return pixels.reshape(*pixels.shape[:2], -1), about


def _each(numbers: Sequence[float], channels: int, flag: str) -> np.ndarray:
    if len(numbers) not in (1, channels):
        raise InputError(f"--image {flag}=: {len(numbers)} numbers; expected 1, or {channels}, one a channel")
    return np.asarray(numbers, np.float64)


def _arithmetic_of(sign: str, numbers: Sequence[float], neutral: float) -> list[str]:
    return [] if all(number == neutral for number in numbers) else [f"{sign} {'/'.join(f'{n:g}' for n in numbers)}"]
