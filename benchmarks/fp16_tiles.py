"""Tiles of the kernel for FP16 accumulation, on convolutions of nus-pillar02: milliseconds of each, by CUDA graph.

    python benchmarks/fp16_tiles.py OUT.json [--tile 64,128,8,8,3,3 …]

Without the host: each launch is captured once and replayed. Bits are those of ``WIDE`` or the tile is left out.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import torch

from cp_debug.backends.kernels import fp16_accumulation, fp16_accumulation_cuda
from cp_debug.backends.kernels.fp16_accumulation_cuda import NARROW, WIDE, Taps, Tile
from cp_debug.backends.rounding import round_fp16

SHAPES = {
    "64 from 64, 256²": (64, 64, 256, 3, 1),
    "128 from 128, 128²": (128, 128, 128, 3, 1),
    "256 from 128, 64², stride 2": (128, 256, 128, 3, 2),
    "256 from 256, 64²": (256, 256, 64, 3, 1),
    "64 from 384, 128²": (384, 64, 128, 3, 1),
    "64 from 64, 128²": (64, 64, 128, 3, 1),
    "128 from 128, 128², 1 × 1": (128, 128, 128, 1, 1),
    "2 from 64, 128²": (64, 2, 128, 3, 1),
}
TILES = [
    WIDE, NARROW,
    Tile(64, 64, (8, 4), 2, 4), Tile(64, 64, (8, 4), 3, 4), Tile(64, 64, (8, 4), 4, 3), Tile(64, 64, (8, 8), 3, 4),
    Tile(64, 128, (8, 8), 2, 3), Tile(64, 128, (8, 8), 3, 2), Tile(64, 128, (8, 8), 3, 3), Tile(64, 128, (8, 8), 4, 2),
    Tile(128, 64, (8, 8), 3, 2), Tile(128, 64, (8, 8), 3, 3), Tile(128, 128, (8, 8), 2, 1),
    Tile(128, 128, (8, 8), 3, 1),
    Tile(64, 128, (8, 4), 3, 2), Tile(128, 64, (8, 4), 3, 2), Tile(32, 128, (8, 4), 3, 4), Tile(32, 128, (8, 8), 3, 4),
    Tile(32, 64, (8, 4), 3, 6), Tile(64, 32, (8, 4), 3, 6), Tile(16, 128, (8, 4), 3, 6), Tile(16, 64, (4, 4), 3, 6),
    Tile(16, 64, (4, 4), 4, 8), Tile(4, 128, (4, 4), 3, 8), Tile(4, 128, (4, 4), 4, 6), Tile(8, 128, (4, 4), 3, 8),
]  # fmt: skip


def milliseconds(call: Any, rounds: int = 7, times: int = 10) -> float:
    """Median milliseconds of a call in a CUDA graph of ``times`` calls."""
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(times):
            call()
    took = []
    for _ in range(rounds):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        took.append(start.elapsed_time(end) / times)
    return statistics.median(took)


def main() -> None:
    """Measure every tile on every shape; the file is written after each shape."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    out = parser.parse_args().out
    found: dict[str, Any] = {"device": torch.cuda.get_device_name(), "shapes": {}}
    draw = torch.Generator().manual_seed(0)
    for name, (channels, outputs, side, kernel, stride) in SHAPES.items():
        pad = kernel // 2
        x = round_fp16(torch.randn(1, channels, side + 2 * pad, side + 2 * pad, generator=draw)).cuda()
        weight = round_fp16(torch.randn(1, outputs, channels, kernel * kernel, generator=draw) / 30).cuda()
        starts = tuple((i, j) for i in range(kernel) for j in range(kernel))
        taps, size = [Taps(weight, tuple(range(len(starts))), starts)], (side // stride,) * 2
        total = fp16_accumulation.instructions(channels, len(starts), fp16_accumulation.Order(64))
        expected = fp16_accumulation_cuda._launch(x, taps, (stride, stride), size, total, None, WIDE)
        rows = []
        flops = 2 * expected.numel() * channels * kernel * kernel
        xh, wh = x.half(), weight.half().reshape(outputs, channels, kernel, kernel)
        xh, wh = (t.contiguous(memory_format=torch.channels_last) for t in (xh, wh))
        library = milliseconds(lambda xh=xh, wh=wh, stride=stride: torch.nn.functional.conv2d(xh, wh, None, stride))
        for tile in TILES:
            if fp16_accumulation_cuda._kernel(x.device.index, False, tile) is None:
                rows.append({"tile": tile, "error": "does not compile"})
                continue
            if tile.outputs > 2 * max(outputs, 8) or (tile.outputs < 16 and outputs > 16):
                continue

            def call(
                tile: Tile = tile, x: Any = x, taps: Any = taps, size: Any = size, total: Any = total, s: int = stride
            ) -> Any:
                return fp16_accumulation_cuda._launch(x, taps, (s, s), size, total, None, tile)

            equal = bool(torch.equal(call(), expected))
            ms = milliseconds(call)
            rows.append({"tile": tile, "equal": equal, "ms": round(ms, 4), "tflops": round(flops / ms / 1e9, 1)})
        rows.sort(key=lambda row: row.get("ms", 9e9))
        found["shapes"][name] = {"cudnn_ms": round(library, 4), "tiles": rows}
        print(name, "cuDNN", round(library, 4), *(f"\n   {row}" for row in rows[:6]), flush=True)
        out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
