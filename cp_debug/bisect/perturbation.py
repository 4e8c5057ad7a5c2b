"""Perturbation of a layer: how far correct implementations lie apart, in other orders of summation and approximations.

Emulation knows one implementation. Another one may sum one after the other where the emulation sums pairwise, or
compute ``exp(x) − 1`` where it computes ``expm1(x)``. ``spread`` says of every element by how much such choices may
move it, ``doubt`` how large that is at the end of a segment. The errors of sums are in ``summation.py``, of elementary
functions in ``operator_errors.py``; those of operators that do many things at once are here.

Softmax and normalizations subtract, sum and divide: each step's error is carried to the result by its derivative.
Resize computes its coordinates in FP32. A Fourier transform is as good as its algorithm: measured by
``benchmarks/operator_errors.py``, ONNX Runtime 1.31's is off by 0.8·log₂N roundoffs for powers of two and 2·N for other
lengths N, torch's by at most 0.2·log₂N. Everything else (recurrent layers, attention, grid sampling, operators that
nobody has measured): a good implementation gives the exact result of slightly wrong inputs, so the inputs are moved by
as much as summing them would.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from cp_debug.backends.arithmetic import FP64, Arithmetic
from cp_debug.backends.base import Tensor as AnyTensor
from cp_debug.backends.executor import Executor
from cp_debug.backends.kernels import KERNELS, Call
from cp_debug.bisect.operator_errors import errors_of
from cp_debug.bisect.summation import ROUNDING, U, in_any_order, one_sided, squares, summation
from cp_debug.bisect.whole_numbers import as_tensor
from cp_debug.graph.graph import Node
from cp_debug.graph.operators import CONTRACTIONS, QUANTIZERS

DRAWS = 4
"""Number of draws of the noise of inputs and inner nodes; more for few elements, which may move little by luck."""
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
    shown: Tensor | None = None,
) -> float:
    """L2 norm by which correct implementations of a segment may be off at ``target``, over its finite elements.

    ``by`` is the ``implementer`` of the functions, where it was measured; ``claim`` is the arithmetic
    it claims, FP32 where None. ``shown``, bool of the target's shape: only where it is True.
    Raises InputError as ``Executor.run_nodes`` does.
    """
    asked = {target}.union(*(node.inputs for node in nodes))  # not the other results of an LSTM
    exact: dict[str, AnyTensor] = dict(given)
    spreads: dict[str, Tensor] = {}
    for node in nodes:
        results = oracle.run_nodes([node], exact, node.outputs)
        for name, value in results.items():
            if name in asked and isinstance(value, Tensor) and value.is_floating_point():
                spreads[name] = spread(oracle, node, exact, value, name, by, claim)
                if node.op == "DequantizeLinear" and _rounded_here(node, nodes, given):
                    (scale,) = oracle.run_nodes([], exact, [node.proto.input[1]]).values()
                    step = float(torch.as_tensor(scale).abs().max())
                    spreads[name] = torch.hypot(spreads[name], torch.full_like(value, FLIPPED * step / U))
        exact.update(results)
    last = spreads.pop(target, None)
    right = torch.as_tensor(exact[target])
    counted = ... if shown is None else shown
    own_norm = 0.0 if last is None else _norm((U * last * torch.isfinite(right))[counted])
    to_levels = any(node.op in TO_LEVELS | SIZED and target in node.outputs for node in nodes)
    if to_levels and not right.is_floating_point():
        own_norm = FLIPPED * math.sqrt(right.numel())
    if not any(_is_some(s) for s in spreads.values()):
        return own_norm
    draws = DRAWS if right.numel() >= FEW else 4 * DRAWS
    generator = torch.Generator().manual_seed(0)
    total = 0.0
    for _ in range(draws):
        noisy = torch.as_tensor(_noisy(oracle, nodes, exact, spreads, generator)[target])
        # A difference of unsigned levels wraps around.
        off = noisy - right if right.is_floating_point() else noisy.double() - right.double()
        total += _norm(off.nan_to_num(0.0, 0.0, 0.0)[counted]) ** 2
    return math.hypot(own_norm, math.sqrt(total / draws))


def between_levels(
    oracle: Executor,
    nodes: Sequence[Node],
    given: Mapping[str, AnyTensor],
    target: str,
    captured: AnyTensor,
    exact: Tensor,
    roundoff: float,
) -> Tensor | None:
    """The oracle's result of nothing but quantizers, or of a Resize that takes the nearest element, with the captured
    one of two neighbours wherever rounding allows it.

    What lies between two levels becomes either: the inputs are moved by ``TIE`` times ``roundoff``, relatively, up and
    down, or the coordinates by ``NEAR``. All other elements have one right value, so that levels which are cut off, or
    neighbours on the wrong side, stand out among them. All tensors have the value's shape and any real dtype; the
    result is in FP64. None where other operators are among ``nodes``.
    """
    settled, ours = exact.double(), as_tensor(FP64.hold(captured, exact.device)).double().to(exact.device)
    (maker,) = (node for node in nodes if target in node.outputs)
    if all(node.op in QUANTIZERS for node in nodes) and any(node.op == "QuantizeLinear" for node in nodes):
        stored = {node.proto.input[0] for node in nodes if node.proto.input[0] in oracle.graph.initializers}
        read = {**{name: oracle.graph.initializer(name) for name in stored}, **given}
        held = {name: FP64.hold(tensor, exact.device) for name, tensor in read.items()}
        moves = (1 + TIE * roundoff, 1 - TIE * roundoff)
        floats = {n: t for n, t in held.items() if isinstance(t, Tensor) and t.is_floating_point()}
        moved = [{**held, **{n: t * m for n, t in floats.items()}} for m in moves]
        levels = [as_tensor(oracle.run_nodes(nodes, each, [target])[target]) for each in moved]
    elif maker.op in SIZED and maker.inputs[0] in given:
        levels = _nearest(oracle, maker, oracle.run_nodes([n for n in nodes if n is not maker], given, maker.inputs))
    else:
        return None
    for level in (each.double().to(exact.device) for each in levels):
        if level.shape == ours.shape:
            settled = torch.where(torch.isclose(ours, level, rtol=TIE * roundoff, atol=0.0), ours, settled)
    return settled if levels else None


def _rounded_here(node: Node, nodes: Sequence[Node], given: Mapping[str, AnyTensor]) -> bool:
    """Whether the levels that a node makes floats of were rounded within the segment."""
    levels = node.proto.input[0]
    return levels not in given and any(levels in other.outputs for other in nodes)


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
        error = _compound(oracle, node, inputs, result, name, by)
    if claim is not None and claim.value is not None:
        error = torch.hypot(error, ROUNDING * _roundoff(claim.value) / U * result.abs())
    return error.nan_to_num(0.0, 0.0, 0.0)


def _roundoff(rounding: Callable[[Tensor], Tensor]) -> float:
    """The unit roundoff of a rounding: the most by which it moves numbers between 1 and 2."""
    numbers = 1 + torch.arange(1, 4096, dtype=torch.float32) / 4096
    return float((rounding(numbers) - numbers).abs().max())


RESULT = 1.5
"""Number of unit roundoffs of its result by which an operator may be off besides the effect of its inputs."""
NEAR = 1e-5
"""Pixels by which a coordinate may be off in FP32, in images of some hundred pixels."""


def _compound(oracle: Executor, node: Node, inputs: Mapping[str, Tensor], result: Tensor, name: str, by: str) -> Tensor:
    """Possible error of a correct implementation in each element of ``name``, in FP32's unit roundoffs.

    ``by`` is the ``implementer``; ``result`` is the oracle's, and gives the shape.
    """
    if node.op in ("Softmax", "LogSoftmax"):
        return _softmax(oracle, node, inputs, result)
    if node.op in ("LayerNormalization", "InstanceNormalization", "GroupNormalization") and name == node.outputs[0]:
        return _normalized(node, inputs, result, by)
    if node.op in ("Resize", "Upsample"):
        return _resized(oracle, node, inputs, result)
    if node.op in ("DFT", "STFT"):
        return torch.full_like(result, _fourier(node, inputs, by) * float(result.square().mean().sqrt()))
    floats = [n for n, v in inputs.items() if isinstance(v, Tensor) and v.is_floating_point()]
    lengths = [inputs[n].shape[-1] for n in floats[:2] if inputs[n].dim()]
    step = max(1.0, ROUNDING * math.sqrt(max(lengths, default=1)))
    return torch.hypot(RESULT * result.abs(), _moved(oracle, node, inputs, result, name, step))


def _moved(
    oracle: Executor, node: Node, inputs: Mapping[str, Tensor], result: Tensor, name: str, step: float
) -> Tensor:
    """Move of the result, in unit roundoffs, when every input is off by ``step`` of them."""
    generator = torch.Generator().manual_seed(0)
    moved = torch.zeros_like(result)
    draws = DRAWS if result.numel() >= FEW else 4 * DRAWS
    for _ in range(draws):
        wrong = dict(inputs)
        for n, value in inputs.items():
            if isinstance(value, Tensor) and value.is_floating_point():
                noise = torch.randn(value.shape, generator=generator, dtype=value.dtype).to(value.device)
                # Coordinates are moved by a part of the image, however near its centre.
                wrong[n] = value + step * U * noise * (torch.ones_like(value) if node.op == "GridSample" else value)
        moved_result = torch.as_tensor(oracle.run_nodes([node], wrong, [name])[name])
        if moved_result.shape == result.shape:
            moved += (moved_result - result).nan_to_num(0.0, 0.0, 0.0).square()
    return (moved / draws).sqrt() / U


def _softmax(oracle: Executor, node: Node, inputs: Mapping[str, Tensor], result: Tensor) -> Tensor:
    x = inputs[node.inputs[0]]
    axis = node.attribute("axis", -1)
    summed = ROUNDING * math.sqrt(x.shape[axis] / 3) if x.dim() else 0.0
    size = result.abs() if node.op == "Softmax" else torch.ones_like(result)
    # Implementations subtract the largest number first, and round what is left: −3.4e38 of a mask is not off by 2e31.
    # (The logarithm of the sum may be added to the largest number before.)
    shifted = dict(inputs)
    if x.dim() and node.op == "Softmax":
        first = node.attribute("axis", 1) % x.dim()  # before opset 13 all from there on are normalized together
        together = [axis] if oracle.graph.opsets.get("", 13) >= 13 else list(range(first, x.dim()))
        left = x - x.amax(together, keepdim=True)
        shifted[node.inputs[0]] = torch.where(torch.isfinite(left), left, x)
    moved = _moved(oracle, node, shifted, result, node.outputs[0], 0.5)
    return torch.hypot(torch.hypot(RESULT * result.abs(), (1.0 + summed) * size), moved)


def _normalized(node: Node, inputs: Mapping[str, Tensor], result: Tensor, by: str) -> Tensor:
    """(x − mean) ÷ √(variance + ε) · scale + bias: errors of the mean, of the variance and of the subtraction."""
    operands = [inputs[n] if n else None for n in node.proto.input]
    x, scale = operands[0], operands[1]
    assert x is not None
    assert scale is not None
    bias = operands[2] if len(operands) > 2 and operands[2] is not None else torch.zeros_like(scale)
    rows, along = 1, [1, -1, *[1] * (x.dim() - 2)]
    if node.op == "LayerNormalization":
        rows = math.prod(x.shape[: node.attribute("axis", -1) % x.dim()])
    else:
        groups = node.attribute("num_groups") if node.op == "GroupNormalization" else x.shape[1]
        rows = x.shape[0] * groups
        if scale.numel() != x.shape[1]:
            scale, bias = (p.repeat_interleave(x.shape[1] // p.numel()) for p in (scale, bias))
        scale, bias = scale.reshape(along), bias.reshape(along)
    flat, scale, bias = (t.expand(x.shape).reshape(rows, -1) for t in (x, scale, bias))
    count = flat.shape[1]

    def add(terms: Tensor) -> Tensor:
        return terms.sum(1, keepdim=True)

    total, squared = add(flat), add(flat.square())
    mean = total / count
    variance = flat.var(1, unbiased=False, keepdim=True)
    epsilon = node.attribute("epsilon", 1e-5)
    of_mean = torch.hypot(in_any_order(total, squared, count), one_sided(flat, add, total, squared)) / count
    of_variance = U * of_mean.square() + ROUNDING * math.sqrt(count / 3) * variance
    if node.op == "GroupNormalization" and not by.startswith("torch"):
        of_variance = of_variance + 2 * (mean.square() + variance)  # one pass: the mean of squares − mean²
    slope = scale.abs() / (variance + epsilon).sqrt()
    shifted = slope * (of_mean + 0.6 * flat.abs())
    scaled = (result.reshape(rows, -1) - bias).abs() * of_variance / (2 * (variance + epsilon))
    return torch.hypot(torch.hypot(shifted, scaled), ROUNDING * result.reshape(rows, -1).abs()).reshape(result.shape)


def _resized(oracle: Executor, node: Node, inputs: Mapping[str, Tensor], result: Tensor) -> Tensor:
    """Interpolation at coordinates that are off by a roundoff of their size, and so, near the middle between two, the
    nearest neighbour is either of them. What the mode declares decides where sizes say that it is the middle."""
    x = inputs[node.inputs[0]]
    off = RESULT * result.abs()
    for axis, (before, after) in enumerate(zip(x.shape, result.shape, strict=True)):
        if before == after or after < 2:
            continue
        steps = result.diff(dim=axis).abs()
        first, last = steps.narrow(axis, 0, 1), steps.narrow(axis, after - 2, 1)
        slope = torch.maximum(torch.cat([first, steps], axis), torch.cat([steps, last], axis)) * max(after / before, 1)
        place = torch.arange(after, dtype=result.dtype, device=result.device) * (before / after)
        off = torch.hypot(off, slope * place.reshape([-1 if d == axis else 1 for d in range(result.dim())]))
    for moved in _nearest(oracle, node, inputs):
        if moved.shape == result.shape:
            off = torch.maximum(off, (moved - result).abs() / U)
    return off


def _nearest(oracle: Executor, node: Node, inputs: Mapping[str, Tensor]) -> list[Tensor]:
    """Results of a Resize whose coordinates are off by ``NEAR``, down and up; none where it interpolates."""
    if node.op not in SIZED or node.attribute("mode", b"nearest") != b"nearest":
        return []
    call = Call(node, oracle.graph.opsets.get("", 1), oracle.arithmetic, oracle.device)
    given = [inputs[n] if n else None for n in node.proto.input]
    there = [KERNELS[node.op].function(call, *given, shift=by) for by in (-NEAR, NEAR)]
    return [moved for moved in there if isinstance(moved, Tensor)]


def _fourier(node: Node, inputs: Mapping[str, Tensor], by: str) -> float:
    """Unit roundoffs by which a Fourier transform is off, relative to its root mean square."""
    signal = inputs[node.inputs[0]]
    arguments = [inputs[n] for n in node.proto.input[1:] if n and isinstance(inputs[n], Tensor)]
    lengths = [int(t) for t in arguments if t.numel() == 1 and not t.is_floating_point()]
    length = max([*lengths, *(t.numel() for t in arguments)]) if lengths else max(signal.shape[1:], default=1)
    if by.startswith("torch"):
        return 0.5 + 0.2 * math.log2(max(length, 2))
    return 1.5 + math.log2(max(length, 2)) if length & (length - 1) == 0 else 2.2 * length
