"""Small PNG pictures of quantized data: one color whose opacity is the value, for light and dark pages."""

from __future__ import annotations

import base64
import struct
import zlib

import numpy as np

LEVELS = 32


def opacity_png(values: np.ndarray, colour: tuple[int, int, int]) -> str:
    """A PNG as a data URI. ``values`` [H, W] in 0 … 1 (NaN is 0); 0 is transparent, 1 is opaque ``colour``."""
    height, width = values.shape
    levels = np.rint(np.clip(np.nan_to_num(values), 0, 1) * (LEVELS - 1)).astype(np.uint8)
    rows = np.pad(levels, ((0, 0), (1, 0)))  # every row starts with its filter type, 0
    opacity = np.linspace(0, 255, LEVELS).astype(np.uint8).tobytes()
    parts = (
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 3, 0, 0, 0)),
        (b"PLTE", bytes(colour) * LEVELS),
        (b"tRNS", opacity),
        (b"IDAT", zlib.compress(rows.tobytes(), 9)),
        (b"IEND", b""),
    )
    chunks = (struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in parts)
    return "data:image/png;base64," + base64.b64encode(b"\x89PNG\r\n\x1a\n" + b"".join(chunks)).decode()
