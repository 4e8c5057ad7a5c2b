"""One layer under suspicion: its captured inputs and result, and the oracle's result for the same inputs."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import onnx
import torch
from torch import Tensor

from cp_debug.backends.arithmetic import ARITHMETICS, FP64, Arithmetic
from cp_debug.backends.base import Program
from cp_debug.backends.executor import Executor, Weights
from cp_debug.bisect.causes.batchnorm_parameters import BatchNorm, batch_norms, folded_batch_norm, of_graph_node
from cp_debug.bisect.causes.fits import halves
from cp_debug.bisect.file_quantization import FileQuantization
from cp_debug.bisect.replay import Load
from cp_debug.bisect.replayed import FLOOR
from cp_debug.errors import InputError
from cp_debug.graph.graph import Node, refill
from cp_debug.graph.operators import PRODUCTS
from cp_debug.probes.distance import born_nonfinite
from cp_debug.probes.held import Trimmer
from cp_debug.programs.precision import PRECISIONS, Precision

SAME_NUMBER = 0.01
"""Relative difference up to which numbers beside NaN and Inf are the same: more than FP16 and BF16 round."""
FEW = 256
"""Elements of a result of which those that are equal count once."""
_fresh = itertools.count(-1, -1)
"""Places of edited nodes: no node of a graph has a negative one."""


def l2(x: Tensor) -> float:
    """L2 norm of a tensor, of any shape and float dtype."""
    return float(torch.linalg.vector_norm(x))


def as_double(value: Any) -> Tensor:
    """Any array or tensor in float64 on the CPU, integers too."""
    tensor: Tensor = FP64.hold(value, "cpu")
    return tensor.double()


class SegmentContext:
    """Executes parts of one program in any arithmetic."""

    def __init__(
        self, program: Program, oracle: Executor, claim: str, quantized: FileQuantization | None = None
    ) -> None:
        """``claim``: the precision that the backend under suspicion claims to have; ``quantized`` what it does in INT8,
        where that is known."""
        self.program, self.graph, self.oracle, self.quantized = program, program.graph, oracle, quantized
        self.claim: Precision = PRECISIONS[claim] if quantized is None else quantized.beside
        self.constants = Weights(self.graph, FP64, torch.device("cpu"), 0)
        self.trimmer = Trimmer(1 << 27)

    @cached_property
    def batch_norms(self) -> dict[str, BatchNorm]:
        """Every BatchNormalization of the program by the name of its layer; what was folded is read off the module."""
        return batch_norms(self.program, self.constants)


class Segment:
    """The nodes that compute ``target`` from ``given``, all tensors on the CPU; results are float64."""

    def __init__(
        self, context: SegmentContext, nodes: Sequence[Node], target: str, given: Mapping[str, Any], test: Any
    ) -> None:
        self.context, self.graph, self.target, self.given = context, context.graph, target, given
        self.nodes = tuple(nodes)
        self.test = as_double(test)
        self.exact = self.run(context.oracle.arithmetic) if self.nodes else self.input(target)
        self.others: Iterable[tuple[str, Callable[[], Any]]] = ()
        """Names of other values of the same run, and how to load them."""
        self.kept: dict[str, Any] = {}
        """What several families ask for, computed once."""
        self.decomposed: Tensor | None = None
        """What the graph's nodes give where the module's own operator gives ``exact``; None where they agree."""
        self.tactic = ""
        """Name of the kernel that computed the target, where the backend tells."""
        self.op = nodes[-1].op if nodes else "input"

    @classmethod
    def of(cls, context: SegmentContext, target: str, known: Collection[str], load: Load) -> Segment:
        """The segment that computes ``target`` from values that are ``known``.

        Raises InputError where the oracle cannot compute it.
        """
        nodes, starts = context.graph.segment([target], known)
        return cls(context, nodes, target, {s: load(s) for s in starts}, load(target))

    @classmethod
    def of_input(cls, context: SegmentContext, name: str, exact: Any, test: Any) -> Segment:
        """An input of the component: glue made it, and ``exact`` is what it should have been."""
        return cls(context, (), name, {name: exact}, test)

    def decided(self, exact: Tensor, nodes: Sequence[Node], given: Mapping[str, Any]) -> None:
        """Let the module's own operator decide: ``exact``, float64 in the result's shape, where ``nodes`` of the graph
        make something else of ``given``."""
        arithmetic = ARITHMETICS.get(self.context.claim.name, self.context.oracle.arithmetic)
        made = self.context.oracle.beside(arithmetic).run_nodes(nodes, given, [self.target])
        self.nodes, self.given, self.decomposed = tuple(nodes), given, as_double(made[self.target])
        self.exact = as_double(exact)
        self.claimed = as_double(arithmetic.round(exact.to(arithmetic.dtype)))

    def run(
        self,
        arithmetic: Arithmetic,
        nodes: Sequence[Node] | None = None,
        values: Mapping[str, Any] | None = None,
        target: str | None = None,
    ) -> Tensor:
        """The target, or another value, in one arithmetic; ``nodes`` and further ``values`` replace the segment's own.

        A float64 tensor of the result's shape. Raises InputError where the nodes cannot be computed, or give no tensor.
        """
        executor = self.context.oracle.beside(arithmetic)
        target_name = self.target if target is None else target
        known = {**self.given, **(values or {})}
        result = executor.run_nodes(self.nodes if nodes is None else nodes, known, [target_name])[target_name]
        if not hasattr(result, "dtype"):  # a sequence, an empty optional
            raise InputError(f"{self.graph}: {target_name!r} is no tensor but {type(result).__name__}")
        return as_double(result)

    def edited(self, node: Node, **change: Any) -> Tensor | None:
        """The oracle's target when ``node`` is another one, as ``computed`` takes it.

        None where the change gives no tensor of the captured shape, which is float64 else.
        """
        result = self.computed(node, **change)
        return result if result is not None and result.shape == self.test.shape else None

    def computed(
        self,
        node: Node,
        *,
        op: str | None = None,
        inputs: Mapping[int, Tensor] | None = None,
        reads: Sequence[str] | None = None,
        target: str | None = None,
        **attributes: Any,
    ) -> Tensor | None:
        """The target, or another value, when ``node`` is another: operator, attributes (None removes one), inputs by
        place; ``reads`` names all its inputs anew. float64 of whatever shape; None where it cannot be computed."""
        proto = node.changed().proto
        if op is not None:
            proto.op_type, proto.domain = op, ""
            del proto.attribute[:]
        if reads is not None:
            proto.input[:] = reads
        refill(proto.attribute, (a for a in proto.attribute if a.name not in attributes))
        proto.attribute.extend(onnx.helper.make_attribute(k, v) for k, v in attributes.items() if v is not None)
        index, values = next(_fresh), {}
        for place, value in (inputs or {}).items():
            proto.input.extend([""] * (place + 1 - len(proto.input)))
            proto.input[place] = f"{proto.input[place] or place}\x1f{index}"
            tensor = value.to(self.context.oracle.arithmetic.dtype) if value.is_floating_point() else value
            values[proto.input[place]] = tensor
        nodes = [replace(Node.of(index, proto), name=n.name) if n is node else n for n in self.nodes]
        try:
            return self.run(self.context.oracle.arithmetic, nodes, values, target)
        except InputError:
            return None

    def apart(self, arithmetic: Arithmetic) -> Tensor | None:
        """The target in the order of eager frameworks, for a product, bias and BatchNorm that are one node here.

        One after the other is computed and rounded: operands before the scale comes in, parameters each by itself.
        float64, in the result's shape; None for other layers.
        """
        norm, node = self.batch_norm, self.product
        if node is None or any(n.op == "BatchNormalization" for n in self.nodes):
            return None
        earlier, later = self.nodes[: self.nodes.index(node)], self.nodes[self.nodes.index(node) + 1 :]
        if [n.op for n in later] not in ([], ["Relu"]):
            return None
        weight, bias = self.weight(node, 1), self.weight(node, 2)
        if bias is not None and bias.numel() != self.test.shape[self.axis]:
            return None  # a matrix, which a Gemm may add
        if weight is None or bias is None:
            return None
        if norm is not None:
            if (raw := norm.unfolded(weight, bias, transposed=node.op == "ConvTranspose")) is None:
                return None
            weight, bias = raw
            bias = torch.where(bias.abs() < 1e-5 * norm.mean.abs().max(), 0.0, bias)  # folded in FP32 where it is none
        name = f"{node.proto.input[1]}\x1fapart"
        alone = node.changed([node.proto.input[0], name], index=next(_fresh))
        values = {**self.given, name: weight.to(arithmetic.dtype)}
        executor = self.context.oracle.beside(arithmetic)
        plain = executor.run_nodes([*earlier, alone], values, node.outputs)[node.outputs[0]]

        def stored(value: Tensor) -> Tensor:
            return as_double(arithmetic.round(value.to(arithmetic.dtype)))

        result = stored(as_double(plain) + self.along(stored(bias.flatten())))
        if norm is not None:
            result = stored(norm.rounded(stored).applied(result, self.along))
        return self.activate(result)

    def input(self, name: str) -> Tensor:
        """A captured value that the segment reads.

        float64, in the shape in which it was captured.
        """
        return as_double(self.given[name])

    def weight(self, node: Node, place: int) -> Tensor | None:
        """A constant input of a node in float64; None where it has none."""
        name = node.proto.input[place] if place < len(node.proto.input) else ""
        constants = self.context.constants
        return as_double(constants[name]) if constants.holds(name) else None

    @cached_property
    def claimed(self) -> Tensor:
        """The target in the claimed precision, from the same inputs.

        float64, in the result's shape.
        """
        if self.context.quantized is not None:
            emulated = self.context.quantized.ideal(self.context.oracle, self.nodes, self.given, [self.target])
            return as_double(emulated.results[self.target])
        arithmetic = ARITHMETICS.get(self.context.claim.name, self.context.oracle.arithmetic)
        return self.run(arithmetic) if self.nodes else self.exact

    @cached_property
    def finite(self) -> Tensor:
        """Mask of the elements whose captured and exact values are both finite.

        bool, in the result's shape.
        """
        return torch.isfinite(self.test) & torch.isfinite(self.exact)

    @cached_property
    def new_nonfinite(self) -> Tensor:
        """Mask of the elements that are NaN or Inf in the captured result and something else in the exact one, or
        the reverse.

        bool, in the result's shape.
        """
        number, lost = torch.isfinite(self.test), torch.isnan(self.exact) & ~torch.isnan(self.test)
        return born_nonfinite(self.test, self.exact) | (number & torch.isinf(self.exact)) | lost

    @cached_property
    def error(self) -> Tensor:
        """The error that the layer introduced, captured − exact; 0 where either value is not finite.

        float64, in the result's shape.
        """
        return torch.where(self.finite, self.test - self.exact, 0.0)

    @cached_property
    def introduced(self) -> float:
        """L2 norm of the introduced error."""
        return l2(self.error)

    def towards(self, value: Tensor | None) -> float:
        """Cosine between the introduced error and the change from the exact result to ``value``, float64 of the
        result's shape; 0 where either is nothing, or no number, and for None."""
        if value is None:
            return 0.0
        change = torch.where(self.finite, value - self.exact, 0.0)
        norm = l2(change) * self.introduced
        return float((change * self.error).sum()) / norm if 0 < norm < math.inf else 0.0

    @cached_property
    def wrong(self) -> float:
        """Number of elements among which the introduced error is spread: (Σe²)² ÷ Σe⁴, 0 where there is none.

        Of few elements those that are equal on both sides count once.
        """
        squares = (self.error / (self.error.abs().max() or 1.0)).square() if self.error.numel() else self.error
        fourth = float(squares.square().sum())
        spread = float(squares.sum()) ** 2 / fourth if fourth else 0.0
        if self.error.numel() <= FEW:
            pairs = torch.stack([self.test[self.error != 0], self.exact[self.error != 0].float().double()], 1)
            spread = min(spread, float(len(pairs.unique(dim=0))))
        return spread

    @cached_property
    def expected(self) -> float:
        """L2 norm of the error that the claimed precision must introduce."""
        rounding = torch.where(self.finite & torch.isfinite(self.claimed), self.claimed - self.exact, 0.0)
        scale = max(l2(torch.where(self.finite, v, 0.0)) for v in (self.exact, self.test))
        return max(l2(rounding), FLOOR * self.context.claim.roundoff * scale)

    @cached_property
    def contrast(self) -> float:
        """L2 norm of the captured result less its mean."""
        captured = self.test[self.finite]
        return l2(captured - captured.mean()) if captured.numel() else 0.0

    @cached_property
    def axis(self) -> int:
        """Index of the channel axis: the second of images, the last of matrix products."""
        images = any(n.op in ("Conv", "ConvTranspose", "BatchNormalization") for n in self.nodes)
        return 1 if images or self.test.dim() == 4 else max(self.test.dim() - 1, 0)

    def along(self, parameter: Tensor) -> Tensor:
        """A parameter [C], reshaped to broadcast against the target."""
        return parameter.reshape(-1, *(1,) * (self.test.dim() - self.axis - 1))

    @cached_property
    def before(self) -> Tensor:
        """The exact value before a ReLU that ends the segment; the exact value itself where none does.

        float64, in the result's shape.
        """
        if len(self.nodes) < 2 or self.op != "Relu":
            return self.exact
        name = self.nodes[-1].inputs[0]
        return as_double(self.context.oracle.run_nodes(self.nodes[:-1], self.given, [name])[name])

    @cached_property
    def activate(self) -> Callable[[Tensor], Tensor]:
        """The function that leads from ``before`` to the result: ReLU, or nothing.

        Shape and dtype stay.
        """
        return torch.relu if self.before is not self.exact else lambda x: x

    @cached_property
    def revealing(self) -> Tensor:
        """Mask of the elements whose captured result tells the value before the activation.

        bool, in the result's shape.
        """
        return self.finite & (self.test > 0) if self.before is not self.exact else self.finite

    @cached_property
    def folds(self) -> tuple[Tensor, Tensor]:
        """The elements that are ``revealing``, dealt out to two halves, for fits.

        Two bool masks in the result's shape.
        """
        return halves(self.revealing)

    @cached_property
    def product(self) -> Node | None:
        """The segment's convolution or matrix product, where there is exactly one."""
        products = [n for n in self.nodes if n.op in PRODUCTS]
        return products[0] if len(products) == 1 else None

    @cached_property
    def bias(self) -> Tensor | None:
        """The bias that the convolution, product or BatchNormalization adds, shaped to broadcast against the target."""
        if self.batch_norm is not None and self.product is None:
            return self.along(self.batch_norm.bias)
        node = self.product
        if node is None or len(self.nodes) - (self.op == "Relu") > 1:
            return None
        bias = self.weight(node, 2)
        if bias is None or not bool(bias.any()) or bias.numel() not in (1, self.test.shape[self.axis]):
            return None  # none, or a matrix, which a Gemm may add
        return self.along(bias.flatten())

    @cached_property
    def batch_norm(self) -> BatchNorm | None:
        """The BatchNormalization that ends the segment (an activation aside), a node or folded into a convolution."""
        nodes = self.nodes[:-1] if self.op == "Relu" else self.nodes
        if not nodes:
            return None
        if nodes[-1].op != "BatchNormalization":
            folded = folded_batch_norm(self.context.program, nodes[-1])
            return folded if folded is not None and len(folded.mean) == self.test.shape[self.axis] else None
        return of_graph_node(nodes[-1], self.context.constants)

    @cached_property
    def strange(self) -> bool:
        """Whether NaN or Inf are born here."""
        return bool(self.new_nonfinite.any())

    @cached_property
    def _range(self) -> tuple[float, float] | None:
        quantized = self.context.quantized
        found = quantized.range(self.target) if quantized is not None else None
        if found is None or self.exact.shape != self.test.shape:
            return None
        beyond = torch.where(self.finite, self.exact - self.exact.clamp(*found), 0.0)
        return found if l2(beyond) <= self.expected else None

    def held(self, value: Tensor) -> Tensor:
        """``value`` as a quantized file can hold it: within the range of the result's scale, where that range is wide
        enough for the exact result (else clipping is a cause of its own). Shape and dtype stay."""
        return value if self._range is None else value.clamp(*self._range)

    def explained(self, value: Tensor | None) -> tuple[float, float]:
        """(Share of the introduced error that ``value`` explains, L2 norm of the error that it leaves).

        The share is 1 − ‖test − value‖ ÷ ‖test − exact‖ over the finite elements; −∞ where ``value`` is not finite, or
        None. Where NaN or Inf arise, the share is that of the places where ``value`` has the same ones, among the
        places where either has one; 0 where right numbers would become others, by more than the claimed rounding.
        ``value`` is float64 in the result's shape.
        """
        if value is None:
            return -math.inf, math.inf
        if self.strange:
            either = self.new_nonfinite | (~torch.isfinite(value) & torch.isfinite(self.exact))
            right = torch.isclose(self.test, self.exact, rtol=SAME_NUMBER, atol=0)
            kept = self.finite & right
            left, error = (torch.linalg.vector_norm(torch.where(kept, self.test - v, 0.0)) for v in (value, self.exact))
            if not float(left) <= 2 * max(float(error), self.expected):
                return 0.0, 1.0
            same = torch.where(torch.isnan(self.test), torch.isnan(value), self.test == value)
            share = float((same & either).sum() / either.sum())
            return share, 1 - share
        remaining = self.test - value
        if not self._all_finite:
            remaining = torch.where(self.finite, remaining, 0.0)
        distance = l2(remaining)
        if not math.isfinite(distance):
            return -math.inf, math.inf
        return (1 - distance / self.introduced if self.introduced else 0.0), distance

    @cached_property
    def _all_finite(self) -> bool:
        return bool(self.finite.all())
