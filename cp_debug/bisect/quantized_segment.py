"""INT8 as a layer must do it: its inputs on a grid with the best scales for what they hold, its weights likewise.

A faithful INT8 layer introduces about this much, whatever calibration chose for the data that it saw. A scale that
clips, that is too coarse, or one scale for channels of different range introduces more, and so does a backend that does
something else than its scales say; ``declared`` tells the two apart.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import torch
from torch import Tensor

from cp_debug.backends.arithmetic import INT8
from cp_debug.backends.base import Tensor as AnyTensor
from cp_debug.backends.codecs import E2M1, E4M3, E5M2, Codec
from cp_debug.backends.executor import Executor
from cp_debug.backends.weights import Weights
from cp_debug.bisect.paired_nodes import PAIRED, with_paired_sums
from cp_debug.graph.graph import Graph, Node
from cp_debug.graph.integer_values import constant_type
from cp_debug.graph.operators import PRODUCTS
from cp_debug.graph.qdq import LEVELS, weight_axis
from cp_debug.programs.precision import BESIDE_INT8

BITS = {2: 8, 3: 8, 4: 16, 5: 16, 21: 4, 22: 4, 25: 2, 26: 2, 6: 32, 17: 8, 18: 8, 19: 8, 20: 8, 23: 4}
"""ONNX data type of levels → bits."""
CODECS = {17: E4M3, 18: E4M3, 19: E5M2, 20: E5M2, 23: E2M1}
"""ONNX data type of levels in floating point → the type; the UZ ones differ by a factor of the scale."""
SIGNED = {3, 5, 6, 22, 26, 17, 18, 19, 20, 23}
FEW = 4
"""Number of elements that a channel must have on average before its error is held against it."""
DEAD = 1e-3
"""Size relative to the largest channel below which a channel is left out."""


@dataclass(frozen=True)
class QuantizerGrid:
    """Numbers that a quantized input can be: ``scale`` × (level − ``zero``), levels from ``low`` to ``high``."""

    scale: Tensor
    """float64, one number, or [C] along ``axis``."""
    zero: Tensor
    low: int
    high: int
    axis: int
    codec: Codec | None = None
    """Floating-point type of the levels, which are then quotients by the scale; None: whole numbers."""

    @classmethod
    def symmetric(cls, amax: float) -> QuantizerGrid:
        """A grid with one scale for a whole tensor; ``amax`` is the largest magnitude that is not clipped."""
        return cls(torch.tensor(amax / LEVELS, dtype=torch.float64), torch.zeros(()), -LEVELS - 1, LEVELS, 0)

    @property
    def range(self) -> tuple[float, float]:
        """The smallest and the largest number of the grid; with several scales, those of the first."""
        scale = float(self.scale.flatten()[0])
        if self.codec is not None:
            return -self.codec.largest * scale, self.codec.largest * scale
        zero = float(self.zero.flatten()[0])
        return (self.low - zero) * scale, (self.high - zero) * scale

    @property
    def most(self) -> int:
        """Levels on one side of the middle; of FP8 and 4-bit floats the number that INT8 has."""
        return (self.high - self.low) // 2 if self.codec is None and self.high - self.low > LEVELS else LEVELS

    def fits(self, shape: Sequence[int]) -> bool:
        """Whether a tensor of this shape has one scale and one zero point, or one for each channel."""
        counts = {self.scale.numel(), self.zero.numel()} - {1}
        return not counts or (-len(shape) <= self.axis < len(shape) and counts == {shape[self.axis]})

    def levels(self, tensor: Tensor) -> Tensor:
        """Levels that the elements are rounded to before the range cuts them off.

        Shape and float dtype of ``tensor`` stay; levels are whole numbers.
        """
        quotients = tensor / self._along(self.scale, tensor)
        if self.codec is not None:
            return quotients
        return torch.round(quotients) + self._along(self.zero, tensor)

    def value(self, levels: Tensor) -> Tensor:
        """The number behind each level.

        Shape and float dtype of ``levels`` stay.
        """
        if self.codec is not None:
            return levels * self._along(self.scale, levels)
        return (levels - self._along(self.zero, levels)) * self._along(self.scale, levels)

    def kept(self, levels: Tensor) -> Tensor:
        """Levels that the type holds: cut off at its ends, and rounded where it is a floating-point one.

        Shape and float dtype of ``levels`` stay.
        """
        return levels.clamp(self.low, self.high) if self.codec is None else self.codec(levels)

    def quantized(self, tensor: Tensor) -> Tensor:
        """``tensor`` after Quantize and Dequantize.

        Shape and float dtype stay.
        """
        return self.value(self.kept(self.levels(tensor)))

    def holds(self, tensor: Tensor) -> bool:
        """Whether every element is a number of the grid, up to the rounding of FP32."""
        exact = tensor.double()
        return bool(torch.isclose(self.quantized(exact), exact, rtol=1e-6, atol=0).all())

    def clipped(self, tensor: Tensor) -> float:
        """The share of elements beyond the range.

        ``tensor`` has the channels along ``axis``, and a float dtype; the share is from 0 to 1.
        """
        levels = self.levels(tensor)
        if self.codec is not None:
            return float((levels.abs() > self.codec.largest).double().mean())
        return float(((levels < self.low) | (levels > self.high)).double().mean())

    def _along(self, parameter: Tensor, tensor: Tensor) -> Tensor:
        parameter = parameter.to(tensor.device)
        if parameter.numel() == 1:
            return parameter.reshape(())
        return parameter.reshape([-1 if d == self.axis % tensor.dim() else 1 for d in range(tensor.dim())])


@dataclass
class EmulatedSegment:
    """A segment in INT8 with the best scales, and what its real scales do to the same inputs."""

    results: Mapping[str, AnyTensor]
    clipped: float = 0.0
    """Share of the elements of a quantized input that lie beyond its scale; of several inputs the largest."""
    step: float | None = None
    """The scale of that input: the distance of two levels."""


class Quantized:
    """A graph with Q/DQ pairs beside the one that it was made from, ``plain``.

    ``names``: value of ``plain`` → its name in the quantized graph, where they differ. Which inputs of a node are
    quantized is read off the quantized graph; arguments and results are in names of ``plain``. ``rounded``: value → the
    largest magnitude that is not clipped, where the captured value lies on that grid itself.
    """

    def __init__(
        self, plain: Graph, graph: Graph, names: Mapping[str, str], rounded: Mapping[str, float] = MappingProxyType({})
    ) -> None:
        self._graph, self._names, self.beside = graph, names, BESIDE_INT8
        self._rounded = {name: QuantizerGrid.symmetric(amax) for name, amax in rounded.items()}
        self._plain_names = {quantized_name: name for name, quantized_name in names.items()}
        self._executor = Executor(graph, INT8)
        self._constants = Weights(graph, INT8, torch.device("cpu"), 0)
        self._quantizers: dict[str, dict[int, Node]] = {}
        """Node of ``plain`` → place of a quantized input → the node that dequantizes it."""
        for node in plain.nodes:
            twin = graph.producer.get(names.get(node.outputs[0], node.outputs[0])) if node.outputs else None
            if twin is not None and twin.op == node.op:
                reads = [graph.producer.get(name) for name in twin.proto.input[: 2 if node.op in PRODUCTS else None]]
                dequantizers = {i: n for i, n in enumerate(reads) if n is not None and n.op == "DequantizeLinear"}
                if dequantizers:
                    self._quantizers[node.name] = dequantizers

    def touches(self, nodes: Sequence[Node]) -> bool:
        """Whether any of these nodes of ``plain`` computes in INT8, or has a result that is shown rounded to it."""
        return any(n.name in self._quantizers or not self._rounded.keys().isdisjoint(n.outputs) for n in nodes)

    def grid(self, node: Node, place: int) -> QuantizerGrid | None:
        """The grid of one input of a node of ``plain``; None where it is not quantized, or its scale is computed."""
        dequantizer = self._quantizers.get(node.name, {}).get(place)
        if dequantizer is None:
            return None
        scale, zero = [*dequantizer.proto.input[1:3], ""][:2]
        grid = constant_grid(self._graph, self._constants, scale, zero, dequantizer.attribute("axis", 1))
        return grid if grid is not None and grid.codec is None else None

    def ideal(
        self,
        executor: Executor,
        nodes: Sequence[Node],
        given: Mapping[str, AnyTensor],
        targets: Collection[str],
        scale_margin: float = 1.0,
        calibrated: Mapping[str, AnyTensor] | None = None,
    ) -> EmulatedSegment:
        """Run a segment of ``plain`` in INT8 with the best symmetric scales, and all else as ``executor`` does it.

        ``scale_margin`` makes the scales larger by this factor, so that other roundings come about. ``given``: name →
        tensor, in any float dtype. ``calibrated``: inputs of the same shapes that the scales are the best for, where
        they are others than ``given``.
        """
        values: dict[str, AnyTensor] = dict(given)
        fitted = {} if calibrated is None else all_values(executor, nodes, calibrated)
        segment = EmulatedSegment({})
        for node in nodes:
            rounded_values = dict(values)
            places = self._quantizers.get(node.name, {})
            inputs = executor.run_nodes([], values, [node.proto.input[place] for place in places])
            like = {name: fitted.get(name, tensor) for name, tensor in inputs.items()}
            together = max(map(_finite_amax, like.values()), default=0.0) if node.op == "Add" else None
            for place in places:
                name = node.proto.input[place]
                tensor = inputs[name]
                if node.op in PRODUCTS and place == 1:
                    reduced = [d for d in range(tensor.dim()) if d != weight_axis(node, tensor.dim())]
                    rounded_values[name] = on_grid(tensor, scale_margin * tensor.abs().amax(reduced, keepdim=True))
                    continue
                rounded_values[name] = on_grid(
                    tensor, torch.as_tensor(scale_margin * (together or _finite_amax(like[name])))
                )
                if (grid := self.grid(node, place)) is not None and grid.scale.numel() == 1:
                    clipped = grid.clipped(tensor)
                    if segment.step is None or clipped > segment.clipped:
                        segment.step, segment.clipped = float(grid.scale), clipped
            values |= executor.run_nodes([node], rounded_values, node.outputs)
        segment.results = {target: self._as_shown(target, torch.as_tensor(values[target])) for target in targets}
        return segment

    def declared(
        self, target: str, known: Collection[str], given: Mapping[str, AnyTensor], *, paired_sums: bool = False
    ) -> Tensor | None:
        """Result ``target`` of ``given`` by the graph's own scales; None where its segment starts from other values.

        ``given``: name → tensor, in any float dtype. ``paired_sums``: as on a processor without VNNI, and None where
        nothing of the segment could differ there.
        """
        quantized_name = self._names.get(target, target)
        if quantized_name not in self._graph.producer:
            return None
        nodes, starts = self._graph.segment([quantized_name], {self._names.get(name, name) for name in known})
        values = {start: self._plain_names.get(start, start) for start in starts}
        if not given.keys() >= set(values.values()):
            return None
        changed = with_paired_sums(self._graph, nodes) if paired_sums else nodes
        if changed is None:
            return None
        executor = Executor(self._graph, PAIRED) if paired_sums else self._executor
        results = executor.run_nodes(changed, {s: given[name] for s, name in values.items()}, [quantized_name])
        return self._as_shown(target, torch.as_tensor(results[quantized_name]))

    def _as_shown(self, name: str, tensor: Tensor) -> Tensor:
        return self._rounded[name].quantized(tensor) if name in self._rounded else tensor


def constant_grid(graph: Graph, constants: Weights, scale: str, zero: str, axis: int) -> QuantizerGrid | None:
    """The grid of a quantizer by the names of its scale and zero point (empty: none); None where one is computed."""
    if not constants.holds(scale) or (zero and not constants.holds(zero)):
        return None
    kind = constant_type(graph, zero) or 2 if zero else 2  # without a zero point levels are uint8, as ONNX has it
    bits = BITS.get(kind, 8)
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if kind in SIGNED else (0, 2**bits - 1)
    offset = _plain(constants[zero]) if zero else torch.zeros((), dtype=torch.uint8)
    return QuantizerGrid(constants[scale].double(), offset.double(), low, high, axis, CODECS.get(kind))


def _plain(values: AnyTensor) -> Tensor:
    """Zero points as torch can hold them: those of FP8 and 4 bits as float32."""
    array = np.asarray(values)
    return torch.as_tensor(
        array.astype(np.float32) if array.dtype.name.startswith(("float8", "float4", "int4", "uint4")) else array
    )


def all_values(executor: Executor, nodes: Sequence[Node], given: Mapping[str, AnyTensor]) -> dict[str, AnyTensor]:
    """``given``, name → tensor in any float dtype, and all that the nodes of a segment make of it."""
    return {**given, **executor.run_nodes(nodes, given, [name for node in nodes for name in node.outputs])}


def _finite_amax(tensor: AnyTensor) -> float:
    """The largest magnitude that a scale could be made for: Inf is cut off, NaN has no place on a grid."""
    magnitudes = torch.as_tensor(tensor).abs()
    return float(torch.where(magnitudes.isfinite(), magnitudes, 0).max()) if magnitudes.numel() else 0.0


def balanced(error: Tensor, exact: Tensor, axis: int) -> float:
    """The relative error of the worst quarter of the channels: root mean square over these of ‖error‖ ÷ ‖exact‖.

    Unlike the norm over all channels it sees small ones whose weights share the scale of large ones. 0 where channels
    have too few elements to tell (``FEW``), or none has any size. ``error`` and ``exact`` have one shape and any float
    dtype; norms are taken in float64.
    """
    if not exact.dim() or exact.numel() < FEW * exact.shape[axis]:
        return 0.0
    reduced = [d for d in range(exact.dim()) if d != axis]
    wrong, size = (torch.linalg.vector_norm(t.double(), dim=reduced) for t in (error, exact))
    alive = size > DEAD * size.max()
    relative = (wrong[alive] / size[alive]).sort(descending=True).values
    return float(relative[: -(-len(relative) // 4)].square().mean().sqrt()) if len(relative) else 0.0


def on_grid(tensor: Tensor, amax: Tensor) -> Tensor:
    """The nearest of 255 levels between ±``amax`` for each element; ``amax`` broadcasts to ``tensor``.

    Shape and float dtype of ``tensor`` stay.
    """
    step = torch.where(amax > 0, amax, 1.0).to(tensor) / LEVELS
    return (tensor / step).round().clamp(-LEVELS, LEVELS) * step
