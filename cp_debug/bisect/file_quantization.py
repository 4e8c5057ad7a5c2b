"""Quantized files of any tool: what they must do to the layers of their float parent.

The file has Q/DQ pairs, integer operators, dynamic scales, or nothing but quantized weights. Nothing is asked of its
structure but which values are the parent's. Between two of those, its own nodes tell what is quantized and how (levels,
one scale or one a channel, with a zero point or without); a faithful layer then makes about the error that the best
scales of that kind make on the same inputs.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType

import numpy as np
import torch
from torch import Tensor

from cp_debug.backends.arithmetic import INT8
from cp_debug.backends.base import Tensor as AnyTensor
from cp_debug.backends.executor import Executor, Weights
from cp_debug.backends.kernels.paired_sums import PAIRED, with_paired_sums
from cp_debug.bisect.file_weights import same_product, stored_codes, turned, twin_of
from cp_debug.bisect.quantized_segment import (
    BITS,
    CODECS,
    SIGNED,
    EmulatedSegment,
    Levels,
    QuantizerGrid,
    Scheme,
    StoredBias,
    bias_step,
    constant_grid,
    level_type,
    rounded_bias,
    stored_bias,
)
from cp_debug.errors import InputError
from cp_debug.graph.graph import QUANTIZING, Graph, Node, readers
from cp_debug.graph.integer_values import is_constant, level_kind, level_values
from cp_debug.graph.narrow_qdq import order_behind, stated_bits
from cp_debug.graph.operators import PRODUCTS, QUANTIZERS, VIEWS
from cp_debug.graph.qdq import weight_axis
from cp_debug.graph.spelled_out import spelled_out
from cp_debug.probes.arrays import as_numpy, as_torch
from cp_debug.programs.precision import BESIDE_INT8, BESIDE_INT16

GOOD = 3.0
"""A weight that is this many times further from its original than the best scales would leave it is a bad one."""
SLIGHT = 1e-3
"""Further distance that is allowed, as a share of the size, for biases of 32 bits."""
_PASS = VIEWS | {"Cast", "Clip", "HardSwish", "LeakyRelu", "PRelu", "Pad", "Relu", "Slice", "Split", "Transpose"}
"""Operators in front of which nothing is rounded: quantizers take them together with what they follow."""
_MOVED_BEHIND = VIEWS | {"MaxPool", "Slice", "Transpose"}
"""Operators in front of which optimizers move quantizers."""
_NO_DATA = {"Constant", "ConstantOfShape", "Shape", "Size"}
"""Operators that only say how large or where something is."""
_RANGES = {"Sigmoid": (0.0, 1.0), "HardSigmoid": (0.0, 1.0), "Softmax": (0.0, 1.0), "Tanh": (-1.0, 1.0)}
"""Operators whose results quantizers put on a grid over all that they can be, whatever the data."""
_ONE_OPERAND = {"Resize", "Upsample", "Pad", "Clip", "BatchNormalization", "InstanceNormalization", "OneHot", "Dropout"}
"""Operators whose other inputs (scales, bounds, statistics) stay as they are."""


class FileQuantization:
    """A quantized file beside its float parent, ``plain``. ``names``: value of ``plain`` → its name in ``graph``.

    Arguments and results are in names of ``plain``.
    """

    def __init__(
        self,
        plain: Graph,
        graph: Graph,
        names: Mapping[str, str],
        *,
        rounds_weights: bool = False,
        made_here: bool = False,
        rounded: Mapping[str, float] = MappingProxyType({}),
        device: str = "cpu",
    ) -> None:
        """``rounds_weights``: the backend puts weights that the file left in FP32 on levels, too, where data and result
        of their layer are, as ONNX Runtime's optimizer WeightBiasQuantization does.

        ``made_here``: this project put the pairs in, one in front of every quantized input, and
        weights are due one scale for each output channel.
        ``rounded``: value → the largest magnitude that is not clipped, where the captured value lies on that grid
        itself. ``device``: where results of the file's own nodes lie; they are computed on the CPU.
        """
        self.made_here = made_here
        self._rounded = {name: QuantizerGrid.symmetric(amax) for name, amax in rounded.items()}
        parent_values = {*plain.producer, *(v.name for v in plain.inputs)}
        own = {value for name, value in names.items() if name in parent_values}
        self._held = own - {names[name] for name in level_values(plain) if name in names}
        """Values that are floats in the parent."""
        self._graph = spelled_out(graph, self._held, unpacks=False)
        self._names, self._rounds_weights = names, rounds_weights
        self.beside = BESIDE_INT16 if level_kind(graph) == "int16" else BESIDE_INT8
        """Precision of what the file does not quantize."""
        self._constants = Weights(self._graph, INT8, torch.device("cpu"), 0)
        self._executor = Executor(self._graph, INT8)
        self._device = device
        self._schemes: dict[str, Scheme] = {}
        for name, value in names.items():
            if value in self._graph.producer and (scheme := self._scheme(value, own)):
                self._schemes[name] = scheme

    def touches(self, nodes: Sequence[Node]) -> bool:
        """Whether the file quantizes anything that these nodes of ``plain`` compute."""
        shown = not self._rounded.keys().isdisjoint(name for node in nodes for name in node.outputs)
        return shown or bool(self._of(nodes))

    def for_readers(self, name: str, captured: AnyTensor) -> list[tuple[Levels, QuantizerGrid]]:
        """Levels and grids of the quantizers that read a value, or what only moves it, on which ``captured`` lies.

        ``captured``: the value by the parent's name, any shape. Empty unless the backend optimizes: ONNX Runtime's
        QDQPropagation moves quantizers in front of what moves values, which is then shown rounded
        (onnxruntime/core/optimizer/qdq_transformer/qdq_propagation.cc), and its transpose optimizer does so at level 1.
        """
        found: list[tuple[Levels, QuantizerGrid]] = []
        if not self._rounds_weights:
            return found
        moves = lambda node, value: node.op in _MOVED_BEHIND and node.proto.input[0] == value  # noqa: E731
        for node, value in readers(self._graph, self._names.get(name, name), moves):
            if node.op == "QuantizeLinear" and node.proto.input[0] == value:
                levels, grid = self._levels(node), self._grid(node)
                if levels is not None and grid is not None and grid.holds(torch.as_tensor(captured)):
                    found.append((levels, grid))
        return found

    def grid(self, node: Node, place: int, within: Sequence[Node] = ()) -> QuantizerGrid | None:
        """The grid of one input of a node of ``plain``: that of the pair in front of it, else that of the data of its
        segment, ``within``; None where it is not quantized, or its scale is computed."""
        twin, maker = self._twin(node), None
        if twin is None:  # its Relu is left to the quantizer behind it, which has the name of the Relu's result
            behind = (self._twin(reader) for reader in within if node.outputs[0] in reader.inputs)
            twin = next((each for each in behind if each is not None), None)
        if twin is not None and same_product(twin, node) and place < len(twin.proto.input):
            maker = self._graph.producer.get(twin.proto.input[place])
        if maker is not None and maker.op == "DequantizeLinear":
            return self._grid(maker)
        return self._of(within or [node]).grid if place == 0 else None

    def stored_bias(self, node: Node) -> StoredBias | None:
        """The bias of a product of ``plain`` as the file stores it, in levels; None where it stores none so."""
        twin = self._twin(node)
        return None if twin is None else stored_bias(self._graph, self._constants, twin)

    def _twin(self, node: Node) -> Node | None:
        """The file's node that makes the result of one of ``plain``, in front of quantizers and other shapes."""
        twin = self._graph.producer.get(self._names.get(node.outputs[0], node.outputs[0]))
        behind = (QUANTIZERS | VIEWS) - {node.op} if node.op not in QUANTIZERS else ()
        while twin is not None and twin.op in behind:
            twin = self._graph.producer.get(twin.proto.input[0])
        return twin

    def result_grid(self, name: str) -> QuantizerGrid | None:
        """The grid on which the file holds a value; None where it has no scale of its own, or that is computed."""
        own = self._names.get(name, name)
        while (maker := self._graph.producer.get(own)) is not None and maker.op in VIEWS:
            own = maker.proto.input[0]
        return self._made_on(own)

    def range(self, name: str) -> tuple[float, float] | None:
        """The smallest and the largest number that the file can hold for a value; None without a scale of its own."""
        grid = self.result_grid(name)
        return grid.range if grid is not None and grid.scale.numel() == grid.zero.numel() == 1 else None

    def ideal(
        self,
        executor: Executor,
        nodes: Sequence[Node],
        given: Mapping[str, AnyTensor],
        targets: Collection[str],
        scale_margin: float = 1.0,
        calibrated: Mapping[str, AnyTensor] | None = None,
        *,
        whole_range: bool = False,
    ) -> EmulatedSegment:
        """Run a segment of ``plain`` with the best scales of the file's kind, and all else as ``executor`` does it.

        ``whole_range``: those of Softmax, Sigmoid and their like cover all that these can give. ``given``: name →
        tensor of the parent, in any float dtype. ``scale_margin`` makes the scales larger by this factor, so
        that other roundings come about. ``calibrated``: inputs of the same shapes that the scales are the best for,
        where they are others than ``given``.
        """
        scheme = self._of(nodes)
        fitted: dict[str, AnyTensor] = {}
        if calibrated is not None:
            made = executor.run_nodes(nodes, calibrated, [name for node in nodes for name in node.outputs])
            fitted = {**calibrated, **made}
        values: dict[str, AnyTensor] = dict(given)
        segment = EmulatedSegment({})
        computing = any(node.op not in _PASS | _NO_DATA for node in nodes)
        for node in nodes:
            rounded_values = dict(values)
            passes = node.op in _PASS and computing
            if not passes and node.op != "Constant":
                floats = [*self._floats(executor, node, values)]
                shared = self._on_one_grid(node, {name: fitted.get(name, tensor) for _, name, tensor in floats})
                for place, name, tensor in floats:
                    constant = name not in values and is_constant(executor.graph, name)
                    levels = scheme.weights if constant else scheme.data
                    if levels is None or (constant and tensor.dim() < 2):
                        continue
                    axis = weight_axis(node, tensor.dim()) if node.op in PRODUCTS and place == 1 else 0
                    least = _range(executor.graph, name) if whole_range else (0.0, 0.0)
                    like = fitted.get(name) if shared is None or constant else shared
                    rounded_values[name] = levels.applied(tensor, axis if constant else None, scale_margin, least, like)
                    grid = None if constant else self.grid(node, place) or scheme.grid
                    if grid is not None and grid.codec is None and grid.fits(tensor.shape):
                        clipped = grid.clipped(tensor)
                        if segment.step is None or clipped > segment.clipped:
                            segment.step, segment.clipped = float(grid.scale.flatten()[0]), clipped
                if scheme.bias_step is not None:
                    rounded_values |= rounded_bias(executor, node, values, scheme.bias_step)
            values |= executor.run_nodes([node], rounded_values, node.outputs)
        results = {}
        for target in targets:
            result = torch.as_tensor(values[target])
            levels = self._schemes.get(target, Scheme()).result
            least = _range(executor.graph, target) if whole_range else (0.0, 0.0)
            rounds = levels is not None and result.is_floating_point()
            if levels and rounds and whole_range and executor.graph.producer[target].op == "Softmax":
                # ONNX Runtime's QLinearSoftmax multiplies by floor(1 ÷ scale), and 1 ÷ (1 ÷ 255) is below 255 in FP32
                # (onnxruntime/contrib_ops/cpu/quantization/qlinear_softmax.cc).
                result = result * (1 - 1 / (2**levels.bits - 1))
            like = fitted.get(target)
            result = levels.applied(result, None, scale_margin, least, like) if levels and rounds else result
            results[target] = self._as_shown(target, result)
        segment.results = results
        return segment

    def declared(
        self,
        target: str,
        known: Collection[str],
        given: Mapping[str, AnyTensor],
        *,
        paired_sums: bool = False,
        even: bool = False,
    ) -> Tensor | None:
        """Result ``target`` by the file's own nodes; None where it cannot be computed from ``given``.

        That is where its segment starts from other values, or holds an operator that cannot be executed here.
        ``given``: name → tensor of the parent, in any float dtype. ``paired_sums``: as on a processor without VNNI,
        and None where nothing of the segment could differ there; ``even``: with pairs within a tap.
        """
        if (found := self._part(target, known, given)) is None:
            return None
        own, nodes, values = found
        changed = with_paired_sums(self._graph, nodes, even=even) if paired_sums else nodes
        if changed is None:
            return None
        executor = Executor(self._graph, PAIRED) if paired_sums else self._executor
        try:
            result = torch.as_tensor(executor.run_nodes(changed, values, [own])[own]).to(self._device)
        except InputError:
            return None
        return self._as_shown(target, result)

    def _as_shown(self, name: str, tensor: Tensor) -> Tensor:
        return self._rounded[name].quantized(tensor) if name in self._rounded else tensor

    def _on_one_grid(self, node: Node, inputs: Mapping[str, AnyTensor]) -> Tensor | None:
        """All numbers that an addition reads, where the file puts both of its ``inputs`` on one grid; else None."""
        if node.op != "Add" or len(inputs) < 2:
            return None
        first, second = (self.grid(node, place) for place in (0, 1))
        if first is None or second is None or not first.equals(second):
            return None
        return torch.cat([torch.as_tensor(tensor).flatten() for tensor in inputs.values()])

    def _part(
        self, target: str, known: Collection[str], given: Mapping[str, AnyTensor]
    ) -> tuple[str, list[Node], dict[str, AnyTensor]] | None:
        """The target's name in the file, the nodes that compute it and what they start from; None where one of these
        values is not given."""
        own = self._names.get(target, target)
        if own not in self._graph.producer:
            return None
        plain_names = {self._names.get(name, name): name for name in known}
        for value, name in [*plain_names.items()]:  # the same numbers come out of other readers of the same levels
            maker = self._graph.producer.get(value)
            if name in given and maker is not None and maker.op == "DequantizeLinear":
                for reader in self._graph.consumers[maker.inputs[0]]:
                    if reader.proto.input == maker.proto.input:
                        plain_names.setdefault(reader.outputs[0], name)
        nodes, starts = self._graph.segment([own], plain_names.keys())
        values = {start: given[name] for start in starts if (name := plain_names.get(start, start)) in given}
        return None if len(values) < len(starts) else (own, nodes, values)

    def with_fitted_weight(
        self, target: str, known: Collection[str], given: Mapping[str, AnyTensor], product: Node, weight: Tensor
    ) -> Tensor | None:
        """Result ``target`` by the file's own nodes, with the codes of the twin of ``product`` read so that they come
        nearest to its ``weight`` (float64); None where that is about as near as they are, and as for ``declared``."""
        if (found := self._part(target, known, given)) is None:
            return None
        own, nodes, values = found
        twin = twin_of(product, nodes)
        stored = stored_codes(self._graph, twin) if twin is not None else None
        repair = stored.repair(turned(weight.cpu(), product, twin)) if stored is not None and twin is not None else None
        if stored is None or repair is None:
            return None
        rest = [node for node in nodes if node is not stored.dequantizer]
        fed = {**values, stored.dequantizer.outputs[0]: repair.value.float()}
        return torch.as_tensor(self._executor.run_nodes(rest, fed, [own])[own]).to(self._device)

    def recalibrated(
        self,
        target: str,
        known: Collection[str],
        given: Mapping[str, AnyTensor],
        constants: Collection[Tensor] = (),
        scale_margin: float = 1.0,
        bits: int | None = None,
        calibrated: Mapping[str, AnyTensor] | None = None,
    ) -> Tensor | None:
        """Result of the file's own nodes for ``given``, with the best scales for it in place of those of its
        QuantizeLinear nodes, ``scale_margin`` times as large.

        ``constants`` are those of the parent's segment: a weight counts as quantized well where it is about as near to
        one of them as the best scales of its kind come. ``bits``: in place of those of the levels. None for other
        weights, and as for ``declared``. ``given``, and ``calibrated`` if the scales shall be the best for other
        inputs: name → tensor of the parent, in any float dtype.
        """
        if (found := self._part(target, known, given)) is None:
            return None
        own, nodes, values = found
        other = None if calibrated is None else self._part(target, known, calibrated)
        # The file's own scales must not cut off what the others are fitted to: fine ones stand in for them.
        fitted = {} if other is None else self._on_best_scales(nodes, other[2], constants, 1.0, 24, {})
        made = None if fitted is None else self._on_best_scales(nodes, values, constants, scale_margin, bits, fitted)
        return None if made is None or own not in made else torch.as_tensor(made[own]).to(self._device)

    def _on_best_scales(
        self,
        nodes: Sequence[Node],
        given: Mapping[str, AnyTensor],
        constants: Collection[Tensor],
        scale_margin: float,
        bits: int | None,
        fitted: Mapping[str, AnyTensor],
    ) -> dict[str, AnyTensor] | None:
        """Every value of the file's nodes, as ``recalibrated`` says; scales are the best for ``fitted`` where that has
        the value, else for the value itself."""
        values = dict(given)
        rounded: dict[str, Tensor] = {}
        """Levels → the numbers behind them."""
        for node in nodes:
            first = node.proto.input[0] if node.proto.input else ""
            maker = self._graph.producer.get(first)
            if (
                node.op == "QuantizeLinear"
                and maker is not None
                and (maker.op, maker.proto.input[1:]) == ("DequantizeLinear", node.proto.input[1:])
            ):
                rounded[node.outputs[0]] = torch.as_tensor(values[first])  # it lies on these levels
            elif node.op == "QuantizeLinear" and not is_constant(self._graph, first):
                levels, grid = self._levels(node), self._grid(node)
                (tensor,) = self._executor.run_nodes([], values, [first]).values()
                if levels is None:
                    return None
                levels = levels if bits is None else replace(levels, bits=bits)
                least = _range(self._graph, first)
                if grid is not None and grid.range[0] >= 0:  # does what a Relu would that was left out
                    tensor = torch.as_tensor(tensor).clamp(min=0)
                like = fitted.get(first)
                rounded[node.outputs[0]] = levels.applied(torch.as_tensor(tensor), None, scale_margin, least, like)
            elif node.op == "DequantizeLinear" and first in rounded:
                values[node.outputs[0]] = rounded[first]
            elif node.op == "DequantizeLinear" and is_constant(self._graph, first):
                values |= self._executor.run_nodes([node], values, node.outputs)
                if not self._good(node, torch.as_tensor(values[node.outputs[0]]), constants):
                    return None
            elif node.op in QUANTIZERS or not rounded.keys().isdisjoint(node.inputs):
                return None
            else:
                try:
                    values |= self._executor.run_nodes([node], values, node.outputs)
                except InputError:
                    return None
        return values

    def _good(self, node: Node, stored: Tensor, constants: Collection[Tensor]) -> bool:
        """Whether a weight as the file stores it is a good rounding of one of the ``constants``."""
        levels, axis = self._levels(node), node.attribute("axis", 1)
        for constant in (each.cpu() for each in constants):
            if constant.shape != stored.shape or not constant.is_floating_point():
                continue
            best = constant if levels is None else levels.applied(constant, axis)
            allowed = GOOD * float((best - constant).norm()) + SLIGHT * float(constant.norm())
            if float((stored - constant).norm()) <= allowed:
                return True
        return False

    def shown(self, own: str, tensor: AnyTensor) -> AnyTensor:
        """A value of the file as one of its parent: levels become the numbers that they stand for.

        The shape stays; levels, which are integers, become float32.
        """
        grid = self._made_on(own) if own in self._held else None
        array = as_numpy(tensor)
        floats = array.itemsize > 1 and as_torch(array).is_floating_point()  # those in 8 bits are levels
        if grid is None or floats or not grid.fits(array.shape):
            return tensor
        return grid.value(torch.from_numpy(array.astype(np.float64))).float()

    def _made_on(self, own: str) -> QuantizerGrid | None:
        """The grid of levels that a value is made of; None for others, and for constant levels."""
        maker = self._graph.producer.get(own)
        if maker is None or maker.op != "DequantizeLinear" or is_constant(self._graph, maker.inputs[0]):
            return None
        return self._grid(maker)

    def _grid(self, node: Node) -> QuantizerGrid | None:
        return constant_grid(self._graph, self._constants, node)

    def _of(self, nodes: Sequence[Node]) -> Scheme:
        schemes = [self._schemes[o] for node in nodes for o in node.outputs if o in self._schemes]
        pick = lambda part: next((value for s in schemes if (value := getattr(s, part)) is not None), None)  # noqa: E731
        return Scheme(pick("data"), pick("weights"), pick("result"), pick("grid"), pick("bias_step"))

    def _floats(
        self, executor: Executor, node: Node, values: Mapping[str, AnyTensor]
    ) -> Iterator[tuple[int, str, Tensor]]:
        inputs = executor.run_nodes([], values, list(dict.fromkeys(filter(None, node.proto.input))))
        for place, name in enumerate(node.proto.input):
            tensor = inputs.get(name)
            biased = (node.op in PRODUCTS and place > 1) or (node.op in _ONE_OPERAND and place > 0)
            if isinstance(tensor, Tensor) and tensor.is_floating_point() and not biased:
                yield place, name, tensor

    def _scheme(self, value: str, own: Collection[str]) -> Scheme:
        """Quantization by the nodes that compute one of the file's values from others that are the parent's."""
        nodes, _ = self._graph.segment([value], set(own) - {value})
        data = weights = None
        grid = step = None
        computed = {output for node in nodes if node.op in PRODUCTS for output in node.outputs}
        for node in nodes:
            if step is None:
                step = bias_step(self._graph, self._constants, node, rounds_floats=self._rounds_weights)
            inputs = [*node.proto.input, *[""] * 9]
            op = node.op.removeprefix("com.microsoft.")
            if op == "QuantizeLinear":
                if is_constant(self._graph, inputs[0]):
                    weights = self._levels(node)
                else:
                    data = self._levels(node)
                    if inputs[0] not in computed:  # not what the segment's own product gives
                        grid = self._grid(node)
            elif op == "DequantizeLinear":
                if is_constant(self._graph, inputs[0]):
                    weights = self._levels(node) or weights
                elif data is None:
                    data, grid = self._levels(node), self._grid(node)
            elif op in PRODUCTS and self._rounds_weights and weights is None and self._between_levels(node):
                weights = Levels()
            elif op in ("MatMulNBits", "GatherBlockQuantized"):
                weights = Levels(node.attribute("bits", 4), block=node.attribute("block_size", 32))
            elif any(mark in op for mark in QUANTIZING):  # it is not spelled out: its scales are computed
                data = data or Levels()
                weights = weights if "QuantizeLinear" in op else Levels(channels=True)
        if (last := self._graph.producer[value]).op != "DequantizeLinear":
            result = None
        elif is_constant(self._graph, last.inputs[0]):  # of what the parent computes from constants alone
            result = weights
        else:
            result = data or weights or Levels()
        return Scheme(data, weights, result, grid, step)

    def _between_levels(self, node: Node) -> bool:
        """Whether a layer with a constant weight in floats reads dequantized data, or only quantizers read it."""
        data, weight = node.proto.input[:2]
        maker, readers = self._graph.producer.get(data), self._graph.consumers.get(node.outputs[0], [])
        dequantized = maker is not None and maker.op == "DequantizeLinear"
        return is_constant(self._graph, weight) and (
            dequantized or (bool(readers) and all(n.op == "QuantizeLinear" for n in readers))
        )

    def _levels(self, node: Node) -> Levels | None:
        """The kind of a quantizer's levels; None for those of 32 bits, and of types that are not known."""
        scale, zero = [*node.proto.input[1:], ""][:2]
        kind = level_type(self._graph, node)
        if BITS.get(kind) in (None, 32):
            return None
        offset = self._constants.numbers(zero)
        centred = offset is None or not bool(offset.any())
        several = math.prod(self._constants.shape(scale) or ()) > 1
        many = self.made_here or several  # here every weight is due one scale for each channel
        block = node.attribute("block_size", 0)
        axis = node.attribute("axis", 1) if block else None
        codec, bits, behind, symmetric = CODECS.get(kind), BITS[kind], None, kind in SIGNED and centred
        if "Dequantize" in node.op and is_constant(self._graph, node.inputs[0]):
            bits, behind = stated_bits(node) or bits, order_behind(self._graph, node)
            # All zero points in the middle of levels from 0 on: GPTQ has them so for symmetric weights.
            symmetric = symmetric or (offset is not None and bool((offset.double() == 1 << (bits - 1)).all()))
        order = None if behind is None else torch.from_numpy(behind[1])
        return Levels(bits, symmetric, many, block, axis, codec, order)


def _range(graph: Graph, name: str) -> tuple[float, float]:
    """(Least, largest) value that the operator behind a value allows; (0, 0) where it does not say."""
    while (maker := graph.producer.get(name)) is not None and maker.op in _PASS - {"Cast", "Clip", "Relu"}:
        name = maker.proto.input[0]
    return _RANGES.get(maker.op, (0.0, 0.0)) if maker is not None else (0.0, 0.0)
