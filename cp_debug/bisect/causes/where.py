"""Where an error lies: channels, region and worst elements of a layer; or an engine as a whole, in all its layers."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import torch

from cp_debug.backends.tensorrt.inspector import Tactic, decode
from cp_debug.bisect.causes.segment import Segment
from cp_debug.bisect.finding import Element, Where
from cp_debug.bisect.result import GUILTY, LayerRow
from cp_debug.graph.graph import Graph
from cp_debug.graph.operators import PRODUCTS
from cp_debug.programs.pipeline import Key

MOST = 5
"""Channels and elements that are named."""


def locate(segment: Segment, layer: str) -> Where:
    """Channels, region and worst elements of the introduced error; NaN and Inf that are born count as the worst."""
    error = torch.where(segment.new_nonfinite, torch.inf, segment.error.abs())
    if segment.error.numel() == 0:
        return Where(layer)
    strange = bool(segment.new_nonfinite.any())
    weight = segment.new_nonfinite.double() if strange else error.square()
    location = Where(layer, worst=[])
    if error.dim() > 1 and error.shape[segment.axis] > 1:
        shares = weight.sum([d for d in range(error.dim()) if d != segment.axis]) / (weight.sum() or 1.0)
        top = shares.topk(min(MOST, len(shares)))
        location.channels = {int(i): float(s) for s, i in zip(*top, strict=True) if s > 0}
    high = (segment.new_nonfinite if strange else error > error.max() / 10).nonzero()
    if len(high):
        location.region = [[int(a), int(b)] for a, b in zip(high.amin(0), high.amax(0), strict=True)]
        covered = math.prod(b - a + 1 for a, b in location.region)
        location.concentrated = covered / error.numel()
    for flat in error.flatten().topk(min(MOST, error.numel())).indices:
        index = [int(i) for i in np.unravel_index(int(flat), error.shape)]  # torch imports sympy for this
        place = tuple(index)
        if error[place] > 0:
            location.worst.append(Element(index, float(segment.test[place]), float(segment.exact[place])))
    return location


ARITHMETIC = {"fp16-accumulation": "fp16acc", "tf32": "tf32"}
"""Cause → arithmetic of the kernels that have it, as ``decode`` names it."""
ASKED = 0.01
"""Share of the final divergence from which a layer of an unknown kernel is asked by emulation."""


def counted(
    cause: str,
    rows: Mapping[Key, LayerRow],
    graphs: Mapping[str, Graph],
    holds: Callable[[Key, LayerRow], bool],
) -> dict[str, Any]:
    """Figures over every layer with a product for which ``cause`` holds, whatever its excess; empty for other causes.

    A kernel's name says so, where it is known; else ``holds`` is asked, which emulates.
    """
    arithmetic_name = ARITHMETIC.get(cause)
    if arithmetic_name is None:
        return {}
    products = [(key, row) for key, row in rows.items() if _has_product(row, graphs[key.component])]
    arithmetic_of = {key: decode(row.tactic).arithmetic for key, row in products}
    unnamed = [
        k for k, r in products if arithmetic_of[k] is None and (r.verdict == GUILTY or abs(r.share or 1) > ASKED)
    ]
    affected = [(k, r) for k, r in products if arithmetic_of[k] == arithmetic_name or (k in unnamed and holds(k, r))]
    excesses = [row.replay.excess for _, row in affected if row.replay and row.replay.excess is not None]
    if not excesses:
        return {}
    shares = [row.share for _, row in affected if row.share is not None]
    return {
        "layers_in_all": len(affected),
        "layers_asked": len(products) - sum(name is None for name in arithmetic_of.values()) + len(unnamed),
        "of_products": len(products),
        "excess_least": min(excesses),
        "excess_most": max(excesses),
        "share_in_all": sum(shares) if len(shares) == len(affected) else None,
    }


def orders(cause: str, layers: Iterable[tuple[str, Mapping[str, Any]]]) -> dict[str, int]:
    """Numbers of layers explained with the order of summation that their kernel's name tells, and with one found by
    trying; empty for other causes.

    ``layers``: tactic, and figures of the explanation (``tile``, ``slices``, ``vector``).
    """
    if cause != "fp16-accumulation":
        return {}
    counts = Counter("orders_told" if _told(decode(name), figures) else "orders_fitted" for name, figures in layers)
    return dict(sorted(counts.items(), reverse=True))


def _told(tactic: Tactic, figures: Mapping[str, Any]) -> bool:
    if tactic.arithmetic != "fp16acc" or tactic.tile is None:
        return False
    if tactic.vector or figures.get("vector"):
        return tactic.vector == figures.get("vector", 0)
    order = (figures.get("tile"), figures.get("slices"), figures.get("split", 1))
    return (tactic.tile[2], tactic.slices, tactic.split) == order


def in_words(says: str, figures: Mapping[str, Any]) -> str:
    """``says`` with the number of layers, their excess, and the effect of all of them together."""
    if not figures:
        return says
    least, most = figures["excess_least"], figures["excess_most"]
    excess = f"excess {least:.2g}" if f"{least:.2g}" == f"{most:.2g}" else f"excess {least:.2g} to {most:.2g}"
    total, asked = figures["of_products"], figures.get("layers_asked", figures["of_products"])
    among = f"{total} layers with products" if asked == total else f"{asked} examined layers, of {total} with products"
    text = f"{says}, in {figures['layers_in_all']} of {among}, {excess}"
    share = figures["share_in_all"]
    return text if share is None else f"{text}, together {share:.0%} of the final divergence"


def _has_product(row: LayerRow, graph: Graph) -> bool:
    if row.replay is None or row.replay.excess is None or row.side != "test":
        return False
    inside = set(row.replay.nodes)
    return any(node.name in inside and node.op in PRODUCTS for node in graph.nodes)
