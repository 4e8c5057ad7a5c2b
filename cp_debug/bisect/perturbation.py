"""Perturbation of a layer: how far correct implementations lie apart, in other orders of summation and approximations.

Emulation knows one implementation. Another one may sum one after the other where the emulation sums pairwise, or
compute ``exp(x) − 1`` where it computes ``expm1(x)``. ``spread`` says of every element by how much such choices may
move it, ``doubt`` how large that is at the end of a segment.

The errors of sums are in ``summation.py``, of elementary functions in ``operator_errors.py``, of operators that do many
things at once in ``compound_errors.py``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from cp_debug.backends.arithmetic import FP64, Arithmetic
from cp_debug.backends.base import Tensor as AnyTensor
from cp_debug.backends.executor import Executor
from cp_debug.bisect.compound_errors import compound
from cp_debug.bisect.operator_errors import errors_of
from cp_debug.bisect.summation import ROUNDING, U, squares, summation
from cp_debug.bisect.whole_numbers import as_tensor
from cp_debug.graph.graph import Node
from cp_debug.graph.operators import CONTRACTIONS, QUANTIZERS

DRAWS = 4
"""Number of draws of the noise of inner nodes; more for few elements, whose noise may be small by luck."""
FEW = 256


TO_LEVELS = frozenset({"QuantizeLinear", "QLinearConv", "QLinearMatMul"})
FLIPPED = 0.3
"""Levels, root mean square, by which integer kernels may be off: what lies between two levels becomes either."""
TIE = 8.0
"""Unit roundoffs, relative, by which the input of a quantizer may be off: x ÷ s as x · (1 ÷ s) makes two."""
SIZED = frozenset({"Resize", "Upsample"})
"""Operators whose inputs but the first say how large the result is: a factor of 1.9999999 makes another shape."""


def doubt(
    oracle: Executor,
    nodes: Sequence[Node],
    given: Mapping[str, AnyTensor],
    target: str,
    by: str = "",
    claim: Arithmetic | None = None,
) -> float:
    """L2 norm by which correct implementations of a segment may be off at ``target``, over its finite elements.

    ``by`` is the ``implementer`` of the functions, where it was measured; ``claim`` is the arithmetic
    it claims, FP32 where None. Raises InputError as ``Executor.run_nodes`` does.
    """
    exact, spreads = _spreads(oracle, nodes, given, by, claim)
    last = spreads.pop(target, None)
    exact_target = torch.as_tensor(exact[target])
    own_norm = 0.0 if last is None else _norm(U * last * torch.isfinite(exact_target))
    if (
        any(node.op in TO_LEVELS | SIZED and target in node.outputs for node in nodes)
        and not exact_target.is_floating_point()
    ):
        own_norm = FLIPPED * math.sqrt(exact_target.numel())
    if not any(_is_some(s) for s in spreads.values()):
        return own_norm
    draws = DRAWS if exact_target.numel() >= FEW else 4 * DRAWS
    moved = [_norm(d) for d in _differences(oracle, nodes, exact, spreads, target, draws)]
    return math.hypot(own_norm, math.sqrt(sum(m * m for m in moved) / draws))


def between_levels(
    oracle: Executor,
    nodes: Sequence[Node],
    given: Mapping[str, AnyTensor],
    target: str,
    captured: AnyTensor,
    exact: Tensor,
    roundoff: float,
) -> Tensor | None:
    """The oracle's result of nothing but quantizers, with the captured level wherever the input's rounding allows it.

    What lies between two levels becomes either: the inputs are moved by ``TIE`` times ``roundoff``, relatively, up and
    down. All other elements have one right level, so that levels which are cut off stand out, although their error is
    but twice that of rounding. All tensors have the value's shape and any real dtype; the result is in FP64. None where
    other operators are among ``nodes``.
    """
    if not all(node.op in QUANTIZERS for node in nodes) or not any(node.op == "QuantizeLinear" for node in nodes):
        return None
    stored = {node.proto.input[0] for node in nodes if node.proto.input[0] in oracle.graph.initializers}
    read = {**{name: oracle.graph.initializer(name) for name in stored}, **given}
    held = {name: FP64.hold(tensor, exact.device) for name, tensor in read.items()}
    settled, ours = exact.double(), as_tensor(FP64.hold(captured, exact.device)).double().to(exact.device)
    for move in (1 + TIE * roundoff, 1 - TIE * roundoff):
        moved = {n: t * move if isinstance(t, Tensor) and t.is_floating_point() else t for n, t in held.items()}
        level = as_tensor(oracle.run_nodes(nodes, moved, [target])[target]).double().to(exact.device)
        settled = torch.where(torch.isclose(ours, level, rtol=TIE * roundoff, atol=0.0), ours, settled)
    return settled


def _spreads(
    oracle: Executor, nodes: Sequence[Node], given: Mapping[str, AnyTensor], by: str, claim: Arithmetic | None
) -> tuple[dict[str, AnyTensor], dict[str, Tensor]]:
    """Every value of a segment, and how much each may be off, in FP32's unit roundoffs."""
    values: dict[str, AnyTensor] = dict(given)
    spreads: dict[str, Tensor] = {}
    for node in nodes:
        results = oracle.run_nodes([node], values, node.outputs)
        for name, value in results.items():
            if isinstance(value, Tensor) and value.is_floating_point():
                spreads[name] = spread(oracle, node, values, value, name, by, claim)
                if node.op == "DequantizeLinear" and _rounded_here(node, nodes, given):
                    (scale,) = oracle.run_nodes([], values, [node.proto.input[1]]).values()
                    step = float(torch.as_tensor(scale).abs().max())
                    spreads[name] = torch.hypot(spreads[name], torch.full_like(value, FLIPPED * step / U))
        values.update(results)
    return values, spreads


def _rounded_here(node: Node, nodes: Sequence[Node], given: Mapping[str, AnyTensor]) -> bool:
    """Whether the levels that a node makes floats of were rounded within the segment."""
    levels = node.proto.input[0]
    return levels not in given and any(levels in other.outputs for other in nodes)


def _differences(
    oracle: Executor,
    nodes: Sequence[Node],
    exact: Mapping[str, AnyTensor],
    spreads: Mapping[str, Tensor],
    target: str,
    draws: int,
) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(0)
    for _ in range(draws):
        noisy = torch.as_tensor(_noisy(oracle, nodes, exact, spreads, generator)[target])
        exact_target = torch.as_tensor(exact[target])
        if not exact_target.is_floating_point():  # a difference of unsigned levels wraps around
            noisy, exact_target = noisy.double(), exact_target.double()
        yield (noisy - exact_target).nan_to_num(0.0, 0.0, 0.0)


def _noisy(
    oracle: Executor,
    nodes: Sequence[Node],
    exact: Mapping[str, AnyTensor],
    spreads: Mapping[str, Tensor],
    generator: torch.Generator,
) -> dict[str, AnyTensor]:
    """The values of a segment when each is off at random by its spread; only what noise reaches is computed again."""
    values, moved = dict(exact), set[str]()
    for node in nodes:
        results = {n: exact[n] for n in node.outputs}
        if not moved.isdisjoint(node.inputs):
            sizes = node.inputs[1:] if node.op in SIZED else ()
            feed = values | {n: exact[n] for n in sizes if n in exact}
            results = oracle.run_nodes([node], feed, node.outputs)  # type: ignore[assignment]
            moved.update(node.outputs)
        for name, value in results.items():
            if _is_some(spreads.get(name)):
                result = torch.as_tensor(value)
                noise = torch.randn(result.shape, generator=generator, dtype=result.dtype).to(result.device)
                value = (result + U * spreads[name] * noise).to(result.dtype)
                moved.add(name)
            values[name] = value
    return values


def _is_some(spread: Tensor | None) -> bool:
    return spread is not None and bool(spread.any())


def _norm(error: Tensor) -> float:
    return float(torch.linalg.vector_norm(error.double()))


def spread(
    oracle: Executor,
    node: Node,
    values: Mapping[str, AnyTensor],
    result: Tensor,
    name: str = "",
    by: str = "",
    claim: Arithmetic | None = None,
) -> Tensor:
    """Error of each element of a node's result that correct implementations may make.

    Root mean square, in FP32's unit roundoffs, in the shape of ``result``. ``claim`` is the arithmetic that the backend
    claims, FP32 where None.
    """
    inputs = oracle.run_nodes([], values, node.inputs)
    error = summation(oracle, node, inputs, result)
    if (
        error is not None
        and node.op in CONTRACTIONS
        and claim is not None
        and (operand := claim.operand or claim.value)
    ):
        squared = oracle.run_nodes([node], squares(node, inputs), node.outputs)[node.outputs[0]]
        error = torch.hypot(error, ROUNDING * _roundoff(operand) / U * (2 * squared).sqrt())
    if error is None and (errors := errors_of(node, by)) is not None:
        error = errors.spread(node, [inputs[n] for n in node.proto.input if n], result)
    if error is None:
        error = compound(oracle, node, inputs, result, name, by)
    if claim is not None and claim.value is not None:
        error = torch.hypot(error, ROUNDING * _roundoff(claim.value) / U * result.abs())
    return error.nan_to_num(0.0, 0.0, 0.0)


def _roundoff(rounding: Callable[[Tensor], Tensor]) -> float:
    """The unit roundoff of a rounding: the most by which it moves numbers between 1 and 2."""
    numbers = 1 + torch.arange(1, 4096, dtype=torch.float32) / 4096
    return float((rounding(numbers) - numbers).abs().max())
