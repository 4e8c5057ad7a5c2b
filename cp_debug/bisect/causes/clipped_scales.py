"""Scales of INT8 files that cut numbers off, channel by channel: of weights by what their float parent holds, of data
by what the layer is given."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cp_debug.backends.executor import Executor
from cp_debug.bisect.causes.segment import as_double
from cp_debug.bisect.causes.wrong_scales import WrongScale, worst_scale
from cp_debug.bisect.file_weights import product_of
from cp_debug.bisect.quantized_segment import QuantizerGrid
from cp_debug.graph.constants import Constants
from cp_debug.graph.graph import Graph, Node
from cp_debug.graph.integer_values import constant_type
from cp_debug.safe_text import amount

_ENDS = {2: (0, 255), 3: (-128, 127)}
"""ONNX data type of levels → the lowest and the highest; a type beside these has causes of its own."""
SHOWN = 6
"""Channels that a sentence names."""
_FIX = {
    "weights": "quantize the weights of {layers} again, by the largest of each channel",
    "data": "calibrate {layers} on data like this, or keep it in FP32",
}


@dataclass(frozen=True)
class _Read:
    """Numbers behind one DequantizeLinear node of a layer, before they were put on its grid."""

    of: str
    """``weights`` or ``data``."""
    dequantizer: Node
    grid: QuantizerGrid
    numbers: Tensor
    """float64, in the shape of the node's result, as is ``stored``."""
    stored: Tensor
    """The node's result."""

    @cached_property
    def beyond(self) -> Tensor:
        """Mask of the numbers beyond the range, which the file holds at its ends."""
        levels, held = self.grid.levels(self.numbers), self.grid.levels(self.stored)
        return ((levels > self.grid.high) & (held == self.grid.high)) | (
            (levels < self.grid.low) & (held <= self.grid.low + 1)
        )

    def without(self) -> Tensor:
        """The node's result if its range had no ends."""
        return torch.where(self.beyond, self.grid.value(self.grid.levels(self.numbers)), self.stored)

    def told(self) -> WrongScale:
        """The scales that clip, with their channels where they have any."""
        beyond, many = self.beyond, self.grid.scale.numel() > 1
        axis = self.grid.axis % beyond.dim() if many else 0
        by_scale = beyond.movedim(axis, 0).flatten(1) if many else beyond.reshape(1, -1)
        numbers = self.numbers.movedim(axis, 0).reshape(by_scale.shape)
        reach, scales = numbers.abs().amax(1), self.grid.scale.flatten()
        ends = torch.maximum((self.grid.high - self.grid.zero).abs(), (self.grid.low - self.grid.zero).abs()).flatten()
        held = (ends * scales).expand(len(reach))
        channels = by_scale.any(1).nonzero().flatten()
        worst = int((reach / held)[channels].argmax())
        channel = int(channels[worst])
        share = float(by_scale[channels].double().mean())
        name, limit = self.dequantizer.proto.input[1], f"±{float(held[channel]):.4g}"
        figures = f"{float(scales[channel if many else 0]):.3g} ends at {limit}, {{}} reach {float(reach[channel]):.4g}"
        subject = f"its {self.of}" if not many else f"the {self.of} of its channel {channel}"
        listed = ", ".join(str(int(c)) for c in channels[:SHOWN]) + (", …" if len(channels) > SHOWN else "")
        which = f"; {amount(len(channels), 'channel')} of {len(reach)} clipped: {listed}" if many else ""
        says = f"INT8 scale {name} clips {self.of}: {figures.format(subject)}; {share:.2%} clipped{which}"
        evidence = {
            "of": self.of,
            "scale_of": name,
            "scale": float(scales[channel if many else 0]),
            "reach": float(reach[channel]),
            "range": float(held[channel]),
            "clipped": share,
            **({"channels": channels.tolist(), "axis": axis} if many else {}),
        }
        return WrongScale("int8-clipped", says, _FIX[self.of], evidence)


def clipped_scale(
    graph: Graph,
    executor: Executor,
    nodes: Sequence[Node],
    starts: Mapping[str, Any],
    target: str,
    product: Node,
    weight: Tensor | None,
    exact: Tensor,
) -> WrongScale | None:
    """The scale without whose ends ``target`` would be much nearer to ``exact``; None where there is none.

    ``nodes`` of the file compute ``target`` from ``starts``; ``product`` and its float ``weight`` (float64) are the
    parent's. Raises InputError where nobody can compute the nodes.
    """
    held = executor.arithmetic.held(torch.float32)
    repairs = (
        (read.dequantizer.outputs[0], read.without().to(held), read.told())
        for read in _reads(graph, executor, nodes, starts, product, weight)
        if bool(read.beyond.any())
    )
    return worst_scale(executor, nodes, starts, target, exact, repairs)


def _reads(
    graph: Graph,
    executor: Executor,
    nodes: Sequence[Node],
    starts: Mapping[str, Any],
    product: Node,
    weight: Tensor | None,
) -> Iterator[_Read]:
    constants, twin = Constants(graph), product_of(nodes, product.op)
    for node in nodes:
        grid = _grid(graph, constants, node) if node.op == "DequantizeLinear" else None
        if grid is None:
            continue
        quantizer = graph.producer.get(node.proto.input[0])
        if node.proto.input[0] in constants:
            is_weight = twin is not None and node.outputs[0] == twin.proto.input[1]
            of, numbers = "weights", weight if is_weight else None
        elif quantizer in nodes and quantizer is not None and quantizer.op == "QuantizeLinear":
            name = quantizer.proto.input[0]
            of, numbers = "data", as_double(executor.run_nodes(nodes, dict(starts), [name])[name])
        else:
            continue
        if numbers is None or not numbers.dim() or not bool(torch.isfinite(numbers).all()):
            continue
        stored = as_double(executor.run_nodes(nodes, dict(starts), node.outputs)[node.outputs[0]])
        fits = grid.scale.numel() in (1, numbers.shape[grid.axis % numbers.dim()])
        if fits and stored.shape == numbers.shape:
            yield _Read(of, node, grid, numbers, stored)


def _grid(graph: Graph, constants: Constants, node: Node) -> QuantizerGrid | None:
    """The grid of a DequantizeLinear node with constant scales in INT8, one or one for each channel."""
    _, scale, *zero = node.proto.input
    kind = constant_type(graph, zero[0]) if zero and zero[0] else constant_type(graph, node.proto.input[0]) or 2
    if kind not in _ENDS or node.attribute("block_size") or any(n and n not in constants for n in (scale, *zero)):
        return None
    scales, offset = (
        torch.from_numpy(np.asarray(array).astype(np.float64))
        for array in (constants[scale], constants[zero[0]] if zero and zero[0] else 0.0)
    )
    return QuantizerGrid(scales, offset, *_ENDS[kind], node.attribute("axis", 1)) if bool((scales > 0).all()) else None
