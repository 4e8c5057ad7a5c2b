"""Replay of layers in INT8: their results against those by the program's own scales, and by better ones.

MatMulNBits with ``accuracy_level`` 4, the default of ONNX Runtime GenAI on CPUs, lets a runtime compute with
activations in INT8: ``int8_activations``.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from cp_debug.backends.base import Tensor as AnyTensor
from cp_debug.backends.executor import Executor
from cp_debug.bisect.file_quantization import FileQuantization
from cp_debug.bisect.file_weights import BETTER
from cp_debug.bisect.perturbation import doubt
from cp_debug.bisect.quantized_segment import Levels, balanced
from cp_debug.bisect.replayed import ASKED, EXCESS, FLOOR, Replay
from cp_debug.bisect.whole_numbers import as_tensor
from cp_debug.graph.graph import Node
from cp_debug.graph.integer_values import is_constant
from cp_debug.graph.operators import PRODUCTS
from cp_debug.probes.distance import difference_norm, distance, ratio, relative_l2

SCALE_MARGINS = (1.02, 1.05, 1.1)
"""A layer in INT8 that raises a doubt is emulated again with scales larger by these factors: of few elements, one
emulation may come out nearly exact by luck."""
ALIKE = 0.02
"""Relative L2 within which a quantized file computes a layer, but for the rounding of its data."""


LOST = 0.5
"""Relative L2 error from which a result is lost, whichever scale it has."""


class ScaleReplay:
    """Results of one side's quantized layers by other scales. ``known`` are the values that its capture holds.

    Tensors that are handed in and out have the shape of the value; inputs of a segment go by name.
    """

    def __init__(
        self,
        quantized: FileQuantization,
        oracle: Executor,
        emulator: Executor,
        known: Collection[str],
        by: str = "",
    ) -> None:
        """``by``: the side's ``implementer``."""
        self.quantized, self._by = quantized, by
        self._oracle, self._emulator, self._known = oracle, emulator, known

    def compare(
        self,
        replay: Replay,
        nodes: Sequence[Node],
        target: str,
        given: Mapping[str, AnyTensor],
        captured: AnyTensor,
        exact: Tensor,
        ideal: AnyTensor,
        reference: Callable[[str], AnyTensor],
    ) -> None:
        """Write into ``replay`` how far a layer is from its own scales, and channel by channel from the best ones.

        ``ideal`` is the result by the best scales, ``reference`` gives the reference's values. Results of another
        shape, and those that are no floats, are left alone.
        """
        if tuple(captured.shape) != tuple(exact.shape) or not exact.is_floating_point():
            return
        declared = self.quantized.declared(target, self._known, given)
        if declared is not None and declared.shape == exact.shape:
            scale = distance(captured, exact).whole
            replay.declared = ratio(difference_norm(declared, exact), scale)
            replay.deviation_from_scales = ratio(difference_norm(captured, declared), scale)
        axis = 1 if exact.dim() == 4 else exact.dim() - 1

        def worst(result: AnyTensor) -> float:  # an engine's values come from the host, the oracle's lie on its device
            return balanced(torch.as_tensor(result).to(exact.device) - exact, exact, axis)

        ours = worst(captured)
        ideals = [ideal, *self._recalibrated(nodes, target, given)]
        best = max(map(worst, ideals))
        if ours > ASKED * best:
            best = max(best, *map(worst, self.as_calibrated(nodes, given, reference, target)))
        if ours > EXCESS * best:
            # Few values, as of a nearly uniform attention, may lie on the levels of the best scales by luck, but not on
            # those of every somewhat larger one. The least error of these counts: a larger scale is coarser, too.
            best = max(best, min(map(worst, self._widened(nodes, given, target))))
            best = max([best, *map(worst, self._of_whole_range(nodes, given, target, exact))])
            # The function itself may be coarser than the levels: ONNX Runtime's Sigmoid where all of it is 1e-8.
            off = doubt(self._oracle, nodes, given, target, self._by)
            best = max(best, ratio(off, distance(captured, exact).whole))
        replay.channel_excess = ratio(ours, max(best, FLOOR * self.quantized.beside.roundoff))
        if declared is not None and (replay.deviation_from_scales or 0.0) < (replay.declared or 0.0) / 2:
            replay.misfit = self._misfit(nodes, target, given, declared, exact)

    def _misfit(
        self, nodes: Sequence[Node], target: str, given: Mapping[str, AnyTensor], declared: Tensor, exact: Tensor
    ) -> float | None:
        """Factor by which scales that fit the codes of a stored weight lower the error; None up to ``BETTER``."""
        quantized, graph = self.quantized, self._oracle.graph
        product = next((node for node in nodes if node.op in PRODUCTS), None)
        if product is None:
            return None
        name = product.proto.input[1]
        if name in given or not is_constant(graph, name):
            return None
        weight = torch.as_tensor(self._oracle.run_nodes([], {}, [name])[name]).double()
        refitted = quantized.with_fitted_weight(target, self._known, given, product, weight)
        if refitted is None or refitted.shape != exact.shape:
            return None
        now, then = (difference_norm(each, exact) for each in (declared, refitted))
        return now / then if now > BETTER * then > 0 else None

    def for_readers(self, target: str, captured: AnyTensor, result: AnyTensor) -> Iterator[Tensor]:
        """``result`` on the best scales of quantizers behind ``target`` that the backend moved in front of it.

        ``captured`` is the value that the test shows; all are of one shape.
        """
        for levels, _ in self.quantized.for_readers(target, captured):
            for scale_margin in (1.0, *SCALE_MARGINS):
                yield levels.applied(torch.as_tensor(result), None, scale_margin)

    def as_calibrated(
        self, nodes: Sequence[Node], given: Mapping[str, AnyTensor], reference: Callable[[str], AnyTensor], target: str
    ) -> Iterator[AnyTensor]:
        """Results with the best scales for what the reference gives the layer, in place of what it is given.

        Calibration sees values like the reference's: that a number is cut off because it grew by errors in front of the
        layer was inherited. The file's own quantizers get such scales, too. ``given``: name → input of the
        segment, in any float dtype; ``reference`` gives the same of the reference. Each result has the shape of
        ``target``.
        """
        calibrated = {name: reference(name) for name in given}
        yield self.quantized.ideal(self._emulator, nodes, given, [target], 1.0, calibrated).results[target]
        yield from self._recalibrated(nodes, target, given, calibrated=calibrated)

    def larger(
        self, nodes: Sequence[Node], given: Mapping[str, AnyTensor], target: str, exact: Tensor
    ) -> Iterator[AnyTensor]:
        """Results with somewhat larger scales, those of the file's own quantizers among them, and those for all that a
        Softmax can give, unless they leave nothing of what it gives here.

        ``given``: name → input of the segment, in any float dtype. ``exact`` and each result have the shape of
        ``target``.
        """
        yield from self._widened(nodes, given, target)
        yield from self._of_whole_range(nodes, given, target, exact)
        yield from self._recalibrated(nodes, target, given, scale_margins=(1.0, *SCALE_MARGINS))

    def _of_whole_range(
        self, nodes: Sequence[Node], given: Mapping[str, AnyTensor], target: str, exact: Tensor
    ) -> list[AnyTensor]:
        whole = self.quantized.ideal(self._emulator, nodes, given, [target], whole_range=True).results[target]
        return [whole] if relative_l2(as_tensor(whole), exact) < LOST else []

    def _widened(self, nodes: Sequence[Node], given: Mapping[str, AnyTensor], target: str) -> Iterator[AnyTensor]:
        """Results with the best scales, made somewhat larger."""
        for scale_margin in SCALE_MARGINS:
            yield self.quantized.ideal(self._emulator, nodes, given, [target], scale_margin).results[target]

    def _recalibrated(
        self,
        nodes: Sequence[Node],
        target: str,
        given: Mapping[str, AnyTensor],
        calibrated: Mapping[str, AnyTensor] | None = None,
        scale_margins: Sequence[float] = (1.0,),
    ) -> list[AnyTensor]:
        """Results of a file's own nodes with better scales; empty where nobody can tell."""
        quantized, graph = self.quantized, self._oracle.graph
        names = dict.fromkeys(i for n in nodes for i in n.inputs if is_constant(graph, i) and i not in given)
        constants = [torch.as_tensor(t) for t in self._oracle.run_nodes([], {}, names).values()]
        fine = quantized.recalibrated(target, self._known, given, constants, bits=24)
        exact = None if fine is None else as_tensor(self._oracle.run_nodes(nodes, given, [target])[target])
        if fine is None or exact is None or fine.shape != exact.shape:
            return []
        off, scale, _ = distance(fine, exact)
        found: list[AnyTensor] = []
        for margin in scale_margins:
            rounded = quantized.recalibrated(target, self._known, given, constants, margin, calibrated=calibrated)
            assert rounded is not None  # as with more bits
            error = difference_norm(rounded, exact)
            lost = error >= LOST * scale and (calibrated is None or not self._recalibrated(nodes, target, calibrated))
            # Nodes that miss the result without any rounding compute something else: another value was paired with it.
            if off <= max(error / 2, ALIKE * scale) and not lost:
                found.append(rounded)
        return found


INT8 = 4
"""``accuracy_level`` that stands for INT8."""


def int8_activations(nodes: Sequence[Node], given: Mapping[str, AnyTensor]) -> dict[str, Tensor]:
    """The activations of such products among ``nodes`` that are in ``given``, rounded as by ONNX Runtime's MLAS.

    Each block of ``block_size`` numbers along the last axis has a scale of its own, its largest magnitude ÷ 127. Shapes
    and dtypes stay.
    """
    rounded = {}
    for node in (n for n in nodes if n.op.rpartition(".")[2] == "MatMulNBits"):
        name = node.proto.input[0]
        if node.attribute("accuracy_level") == INT8 and name in given:
            x, grid = as_tensor(given[name]), Levels(symmetric=True, block=node.attribute("block_size"), block_axis=-1)
            rounded[name] = grid.applied(x.double(), None).to(x.dtype)
    return rounded
