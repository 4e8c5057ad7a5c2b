"""Pictures of the pages about concepts, drawn from figures that are computed here: ``python docs/pictures.py``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

IMAGES = Path(__file__).parent / "images"
INK, FAINT, RED, BLUE = "#6b7280", "#9ca3af", "#dc2626", "#2563eb"
"""Colours that can be read on white and on dark grey."""
STYLE = f'font-family="system-ui, sans-serif" font-size="13" fill="{INK}"'


def sums(lengths: Sequence[int], dtype: type, draws: int = 400) -> list[float]:
    """Relative error, the root mean square over ``draws``, of sums of products of FP16 numbers kept in ``dtype``."""
    rng = np.random.default_rng(0)
    a, b = (rng.random((draws, max(lengths))).astype(np.float16) for _ in range(2))
    total, exact, errors = np.zeros(draws, dtype), np.zeros(draws), []
    for index in range(max(lengths)):
        total = (total + (a[:, index].astype(np.float32) * b[:, index]).astype(dtype)).astype(dtype)
        exact += a[:, index].astype(np.float64) * b[:, index]
        if index + 1 in lengths:
            errors.append(float(np.sqrt(np.mean(((total.astype(np.float16) - exact) / exact) ** 2))))
    return errors


def chain() -> tuple[list[float], list[float]]:
    """Divergence and introduced error (relative L2) of eight FP32 layers, of which the third is wrong by 1e-4."""
    rng = np.random.default_rng(0)
    weights = [rng.normal(size=(64, 64)) / 8 for _ in range(8)]

    def layer(index: int, x: np.ndarray, wrong: bool) -> np.ndarray:
        y = np.tanh(x @ weights[index].astype(x.dtype))
        return y * x.dtype.type(1.0001) if wrong and index == 2 else y

    def distance(a: np.ndarray, b: np.ndarray) -> float:
        return float(np.linalg.norm(a.astype(np.float64) - b) / np.linalg.norm(b.astype(np.float64)))

    start = rng.normal(size=(16, 64)).astype(np.float32)
    reference, test, divergence, introduced = start, start, [], []
    for index in range(8):
        oracle = layer(index, test.astype(np.float64), wrong=False)
        # The reference sums in another order, as another library does.
        order = rng.permutation(64)
        reference = np.tanh(reference[:, order] @ weights[index].astype(np.float32)[order])
        test = layer(index, test, wrong=True)
        divergence.append(distance(test, reference))
        introduced.append(distance(test, oracle))
    return divergence, introduced


def chart(
    path: Path,
    names: Sequence[str],
    lines: Sequence[tuple[str, str, Sequence[float]]],
    *,
    below: str,
    decades: tuple[int, int],
    title: str,
) -> None:
    """A line chart with a logarithmic axis from 10^``decades[0]`` to 10^``decades[1]``, a name for each place."""
    left, top, width, height = 70, 30, 560, 220
    low, high = decades

    def x(index: int) -> float:
        return left + width * index / (len(names) - 1)

    def y(value: float) -> float:
        return top + height * (high - np.log10(value)) / (high - low)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 820 310" role="img" aria-label="{title}">',
        f"<title>{title}</title>",
    ]
    for power in range(low, high + 1):
        at = y(10.0**power)
        parts.append(f'<path d="M{left} {at:.1f}H{left + width}" stroke="{FAINT}" stroke-opacity="0.4"/>')
        parts.append(f'<text x="{left - 8}" y="{at + 4:.1f}" text-anchor="end" {STYLE}>1e{power}</text>')
    for index, name in enumerate(names):
        parts.append(f'<text x="{x(index):.1f}" y="{top + height + 22}" text-anchor="middle" {STYLE}>{name}</text>')
    parts.append(
        f'<text x="{left + width / 2:.0f}" y="{top + height + 46}" text-anchor="middle" {STYLE}>{below}</text>'
    )
    for label, colour, values in lines:
        points = " ".join(f"{x(index):.1f},{y(value):.1f}" for index, value in enumerate(values))
        parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2.5"/>')
        for index, value in enumerate(values):
            parts.append(f'<circle cx="{x(index):.1f}" cy="{y(value):.1f}" r="4" fill="{colour}"/>')
        style = STYLE.replace(INK, colour)
        parts.append(f'<text x="{left + width + 14}" y="{y(values[-1]) + 4:.1f}" {style}>{label}</text>')
    path.write_text("\n".join([*parts, "</svg>", ""]), encoding="utf-8")


def main() -> None:
    divergence, introduced = chain()
    chart(
        IMAGES / "introduced.svg",
        [f"layer {index}" for index in range(8)],
        [("divergence", BLUE, divergence), ("introduced", RED, introduced)],
        below="layer 2 is wrong by 1e-4; all others are right",
        decades=(-8, -3),
        title="Every layer from the third on diverges; only the third introduced more than rounding",
    )
    lengths = [16, 64, 256, 1024, 4096]
    chart(
        IMAGES / "accumulation.svg",
        [str(length) for length in lengths],
        [("sum in FP16", RED, sums(lengths, np.float16)), ("sum in FP32", BLUE, sums(lengths, np.float32))],
        below="products in one sum",
        decades=(-4, -1),
        title="Error of a sum of FP16 products: constant with an FP32 sum, growing with an FP16 sum",
    )


if __name__ == "__main__":
    main()
