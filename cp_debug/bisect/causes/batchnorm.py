"""BatchNormalization gone wrong, as a node or folded into the convolution before it; or paired with another one.

With o = γ·(x − μ)/√(σ² + ε) + β exact, x follows from o, so every hypothesis (epsilon, statistics, folding) is a
per-channel function of o without a free number, but for a fitted ε or unknown statistics.

Folding by order, by name or by number of channels puts a BatchNormalization into a convolution whose output it never
read. Every other BatchNormalization of the program is tried, without a free number: sums over each channel choose which
are computed. Where several do equally well, all of them are named.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice

import torch
from torch import Tensor

from cp_debug.bisect.causes import single_numbers
from cp_debug.bisect.causes.affine import off_channels
from cp_debug.bisect.causes.base import Candidate, cause
from cp_debug.bisect.causes.batchnorm_parameters import BatchNorm, of_graph_node, raw_layer
from cp_debug.bisect.causes.fits import cross_fit, sums
from cp_debug.bisect.causes.segment import Segment
from cp_debug.graph.constants import is_uniform
from cp_debug.graph.graph import Node
from cp_debug.safe_text import some

PAIRING = "batchnorm-pairing"
"""Name of the cause."""
MOST = 4
"""Hypotheses that are computed."""
MOST_WEIGHTS = 16
"""BatchNormalizations, and convolutions, for which the product is computed again with other weights."""
NEAR = 0.1
"""Share of the introduced error that a hypothesis may leave."""
ALIKE = 1.6
"""Hypotheses that leave up to this many times what the best one leaves cannot be told from it."""
FOLDING = 2.0**-21
"""Relative rounding of a scale and a shift that are folded in FP32: a few operations of 2⁻²⁴ each."""
SHOWN = 4
"""Pairs in one line."""
_FOLD = "fold γ/√(σ² + ε) into the output channels and β + (b − μ)·γ/√(σ² + ε) into the bias b of {layers}"
_FIX = "fold into {layers} the BatchNorm that reads its output: pairs are found by data flow, not by order or size"


@dataclass(frozen=True)
class Place:
    """A place where a layer has a BatchNormalization, or where one can have been folded in."""

    own: BatchNorm | None
    x: Tensor | None
    """Input of the layer's own BatchNormalization; None without one."""
    before: Tensor
    """Result of the layer's own BatchNormalization; without one the layer's, before an activation."""
    axis: int
    finish: Callable[[Tensor], Tensor]
    """Function from ``before`` to the segment's target; elementwise where ``elementwise``."""
    elementwise: bool

    def applied(self, norm: BatchNorm, x: Tensor) -> Tensor:
        """``x``, in the shape of ``before``, normalized by another one."""
        return norm.applied(x, partial(_along, axis=self.axis, dims=x.dim()))


@dataclass(frozen=True)
class _OtherNorm:
    says: str
    base: Tensor
    norm: BatchNorm
    name: str


@cause(structural=True, by_node=True)
def wrong_pairing(segment: Segment) -> Iterator[Candidate]:
    """Candidates: the BatchNormalization of another layer, whole, in part, or besides the layer's own."""
    norms = segment.context.batch_norms
    for place in places(segment) if norms else ():
        others = [(path, norm) for path, norm in norms.items() if _differs(norm, place)]
        hypotheses = [h for path, norm in others for h in _hypotheses(place, path, norm)]
        yield from _best(segment, place, hypotheses)


@cause(costly=True, structural=True, by_node=True)
def wrong_weights(segment: Segment) -> Iterator[Candidate]:
    """Candidates: a BatchNormalization along the wrong axis of the weight, a layer's own in another one's weights."""
    node = segment.product
    raw = _raw_weights(segment, node) if node is not None and segment.context.batch_norms else None
    if node is None or raw is None or raw[0].dim() < 3:
        return
    weight, bias = raw
    for place in places(segment):
        if (own := place.own) is None:
            continue
        result = partial(_of_product, segment, node, place)
        transposed = node.op == "ConvTranspose"
        if weight.shape[wrong := int(not transposed)] == len(own.mean):
            norms = (item for item in segment.context.batch_norms.items() if _differs(item[1], place))
            for path, norm in [("", own), *islice(norms, MOST_WEIGHTS)]:
                name, says, evidence = "batchnorm-folding", "folded along the input channels of the weight", {}
                fix = _FIX if path else _FOLD
                if path:
                    says = f"BatchNorm is that of {path}, and scales the input channels of the weight"
                    name, evidence = PAIRING, {"batchnorm_of": path}
                value = result(weight * _along(norm.scale, wrong, weight.dim()), norm, bias)
                yield Candidate(name, says, value, 0, {**evidence, "axis": wrong}, fix)
        scale = own.scale_of(weight, transposed=transposed)
        for path, other, other_bias in islice(_other_layers(segment, node, tuple(weight.shape)), MOST_WEIGHTS):
            if scale is not None and not torch.equal(other, weight):
                value = result(other * scale, own, other_bias)
                says = f"its BatchNorm is folded into the weights of {path}"
                yield Candidate(PAIRING, says, value, 0, {"weights_of": path}, _FIX)


def _raw_weights(segment: Segment, node: Node) -> tuple[Tensor, Tensor] | None:
    """Weight and bias of a product as they are before folding, float64; None where they are not known."""
    declared, declared_bias = segment.weight(node, 1), segment.weight(node, 2)
    if declared is None or node.op not in ("Conv", "ConvTranspose"):
        return None
    readers = segment.graph.consumers.get(node.outputs[0], ())
    if any(n.op == "BatchNormalization" for n in readers):
        return declared, declared.new_zeros(()) if declared_bias is None else declared_bias
    raw = raw_layer(segment.context.program, node)
    weight, bias = getattr(raw, "weight", None), getattr(raw, "bias", None)
    if declared_bias is None:
        return None
    if weight is None or weight.shape != declared.shape:
        transposed, norm = node.op == "ConvTranspose", segment.batch_norm
        return None if norm is None else norm.unfolded(declared, declared_bias, transposed=transposed)
    weight = weight.detach().double().cpu()
    return weight, torch.zeros_like(declared_bias) if bias is None else bias.detach().double().cpu()


def _of_product(
    segment: Segment, node: Node, place: Place, weight: Tensor, norm: BatchNorm, bias: Tensor | None
) -> Tensor | None:
    """The target where the product has ``weight``, scaled already, and the shift that ``norm`` makes of ``bias``."""
    inputs = {1: weight}
    if segment.weight(node, 2) is not None:
        inputs[2] = torch.zeros_like(norm.bias)
    product = segment.computed(node, inputs=inputs, target=node.outputs[0])
    if product is None or product.shape != place.before.shape:
        return None
    offset = norm.mean.new_zeros(()) if bias is None else bias
    return place.finish(product + _along((offset - norm.mean) * norm.scale + norm.bias, place.axis, product.dim()))


def in_words(pairs: Mapping[str, str]) -> str:
    """The sentence for several layers that were paired wrongly.

    ``pairs``: layer → the layer whose BatchNormalization it has.
    """
    shown = some([f"{layer} has that of {other}" for layer, other in pairs.items()], SHOWN)
    return f"BatchNorms are paired with the wrong layers: {shown}"


def places(segment: Segment) -> Iterator[Place]:
    """The places of a segment; none where NaN or Inf are born."""
    if segment.strange:
        return
    nodes = [node for node in segment.nodes if node.op == "BatchNormalization"]
    for node in nodes:
        own = of_graph_node(node, segment.context.constants)
        if own is None:
            continue
        values = segment.context.oracle.run_nodes(segment.nodes, segment.given, [node.inputs[0], node.outputs[0]])
        read, before = (values[name].double() for name in (node.inputs[0], node.outputs[0]))
        later = segment.nodes[segment.nodes.index(node) + 1 :]
        relu = [n.op for n in later] == ["Relu"]
        finish = torch.relu if relu else partial(_finished, segment, later, node.outputs[0])
        yield Place(own, read, before, 1, finish, relu or not later)
    last = segment.nodes[:-1] if segment.op == "Relu" else segment.nodes
    if nodes or segment.product is None or not last or last[-1] is not segment.product:
        return
    own = segment.batch_norm
    given = _given(segment, own) if own is not None else None
    if own is None or given is not None:
        yield Place(own, given, segment.before, segment.axis, segment.activate, True)


def _given(segment: Segment, norm: BatchNorm) -> Tensor | None:
    """The input of a folded BatchNormalization: the product with its own weights, else read backwards."""
    node = segment.product
    raw = _raw_weights(segment, node) if node is not None else None
    if node is not None and raw is not None:
        return segment.computed(node, inputs=dict(enumerate(raw, 1)), target=node.outputs[0])
    if not bool((norm.weight != 0).all()):
        return None
    return (segment.before - segment.along(norm.bias)) / segment.along(norm.scale) + segment.along(norm.mean)


def _differs(norm: BatchNorm, place: Place) -> bool:
    """Whether a BatchNormalization of as many channels is another than the place's own, and can be told from others."""
    told = len(norm.mean) == place.before.shape[place.axis] and (place.own is None or not _equal(norm, place.own))
    return told and not _plain(norm.mean, norm.variance, norm.weight, norm.bias)


def _plain(*parameters: Tensor) -> bool:
    """Whether parameters are as every BatchNormalization begins, zeros and ones: they are those of no certain layer."""
    return all(is_uniform(parameter.numpy()) for parameter in parameters)


def _equal(one: BatchNorm, other: BatchNorm) -> bool:
    """Whether both compute the same but for rounding."""
    shift, other_shift = (norm.bias - norm.mean * norm.scale for norm in (one, other))
    return torch.allclose(one.scale, other.scale, rtol=1e-6) and torch.allclose(
        shift, other_shift, rtol=1e-6, atol=1e-9
    )


def _hypotheses(place: Place, path: str, other: BatchNorm) -> Iterator[_OtherNorm]:
    if place.own is None or place.x is None:
        yield _OtherNorm("the BatchNorm of {} is folded in, but none belongs here", place.before, other, path)
        return
    own = place.own
    yield _OtherNorm("BatchNorm is that of {}: paired with the wrong layer", place.x, other, path)
    yield _OtherNorm("the BatchNorm of {} is folded in, in addition to its own", place.before, other, path)
    if not _plain(other.mean, other.variance):
        statistics = replace(own, mean=other.mean, variance=other.variance)
        yield _OtherNorm("BatchNorm has the running statistics of {}", place.x, statistics, path)
    if not _plain(other.weight, other.bias):
        parameters = replace(own, weight=other.weight, bias=other.bias)
        yield _OtherNorm("BatchNorm has the weight and bias of {}", place.x, parameters, path)


def _best(segment: Segment, place: Place, hypotheses: Sequence[_OtherNorm]) -> Iterator[Candidate]:
    near = list(hypotheses)
    if place.elementwise:
        left = {id(h): distance for h, distance in zip(near, _distances(segment, place, near), strict=True)}
        near = sorted((h for h in near if left[id(h)] <= NEAR * segment.introduced), key=lambda h: left[id(h)])
    left_of: list[tuple[float, _OtherNorm, Tensor]] = []
    for hypothesis in near[: MOST if place.elementwise else MOST_WEIGHTS]:
        value = _as_folded(segment, place, hypothesis)
        if value.shape == segment.test.shape:
            left_of.append((max(segment.explained(value)[1], segment.expected), hypothesis, value))
    if not left_of:
        return
    least, best, value = min(left_of, key=lambda item: item[0])
    names = dict.fromkeys(h.name for left, h, _ in left_of if left <= ALIKE * least)
    if len(names) == MOST and len(near) > MOST:
        names["another"] = None
    name = " or ".join(names)
    yield Candidate(PAIRING, best.says.format(name), value, 0, {"batchnorm_of": name}, _FIX)


def _distances(segment: Segment, place: Place, hypotheses: Sequence[_OtherNorm]) -> Iterator[float]:
    """The L2 norm of what each hypothesis leaves on the elements that tell the value before an activation.

    A BatchNormalization is a factor and a summand for each channel, so that the sums of a regression on its input,
    taken once, give the norm for all of them.
    """
    mask, dims, unit = segment.revealing, [d for d in range(place.before.dim()) if d != place.axis], torch.ones(())
    squares = torch.where(mask, segment.test, 0.0).square().sum(dims)
    of_base: dict[int, tuple[Tensor, Tensor]] = {}
    for hypothesis in hypotheses:
        base, norm = hypothesis.base, hypothesis.norm
        if id(base) not in of_base:
            of_base[id(base)] = sums(segment.test, [base, unit.double().expand_as(base)], mask, dims)[1:]
        gram, right = of_base[id(base)]
        theta = torch.stack([norm.scale, norm.bias - norm.mean * norm.scale], -1)
        left = squares - 2 * (theta * right).sum(-1) + torch.einsum("ci,cij,cj->c", theta, gram, theta)
        yield float(left.sum().clamp(min=0).sqrt())


def _as_folded(segment: Segment, place: Place, hypothesis: _OtherNorm) -> Tensor:
    """The result of a hypothesis, with as much rounding of each channel's folded scale and shift as FP32 allows.

    Folding rounds both once more than the layer does, the same way for all elements of a channel.
    """
    value = place.applied(hypothesis.norm, hypothesis.base)
    if not place.elementwise or value.shape != segment.test.shape:
        return place.finish(value)
    fit = cross_fit(segment.test - value, [value, torch.ones((), dtype=value.dtype)], segment.folds, place.axis)
    if fit is None:
        return place.finish(value)
    norm = hypothesis.norm
    terms = norm.bias.abs() + (norm.mean * norm.scale).abs()
    largest = FOLDING * (value.abs() + _along(terms, place.axis, value.dim()))
    return place.finish(value + torch.minimum(torch.maximum(fit[0], -largest), largest))


def _other_layers(segment: Segment, node: Node, shape: tuple[int, ...]) -> Iterator[tuple[str, Tensor, Tensor | None]]:
    """(Path, weight, bias) of the module's other layers with weights of this shape and of the same kind, float64."""
    module, alignment = segment.context.program.module, segment.context.program.alignment
    own = raw_layer(segment.context.program, node)
    for path, layer in module.named_modules() if module is not None and alignment is not None else ():
        weight, bias = getattr(layer, "weight", None), getattr(layer, "bias", None)
        if layer is not own and type(layer) is type(own) and weight is not None and tuple(weight.shape) == shape:
            yield path, weight.detach().double().cpu(), None if bias is None else bias.detach().double().cpu()


def _finished(segment: Segment, later: Sequence[Node], name: str, value: Tensor) -> Tensor:
    arithmetic = segment.context.oracle.arithmetic
    return segment.run(arithmetic, later, {name: value.to(arithmetic.dtype)}) if later else value


def _along(parameter: Tensor, axis: int, dims: int) -> Tensor:
    return parameter.reshape([-1 if d == axis % dims else 1 for d in range(dims)])


_CHECKPOINT = "load running_mean and running_var into {layers}, call eval() before the export, and export again"


@cause(by_node=True)
def wrong_parameters(segment: Segment) -> Iterator[Candidate]:
    """Candidates without a fitted number: defaults that were never replaced, the batch's statistics, folding."""
    raw = _raw_weights(segment, segment.product) if segment.product is not None else None
    for place in places(segment):
        own, x = place.own, place.x
        if own is None or x is None:
            continue
        zeros, ones = torch.zeros_like(own.mean), torch.ones_like(own.mean)
        variance, mean = torch.var_mean(x, [d for d in range(x.dim()) if d != place.axis], correction=0)
        plain = BatchNorm(ones, zeros, zeros, ones, 0.0)
        shift = replace(plain, bias=own.bias - own.mean * own.scale)
        never = "never loaded"
        for name, says, base, norm in (
            ("statistics", f"the running statistics were {never} (mean 0, variance 1)", x,
             replace(own, mean=zeros, variance=ones)),
            ("statistics", f"the running mean was {never} (0)", x, replace(own, mean=zeros)),
            ("statistics", f"the running variance was {never} (1)", x, replace(own, variance=ones)),
            ("statistics", "the statistics of the batch are used: train mode", x,
             replace(own, mean=mean, variance=variance)),
            ("parameters", f"weight was {never} (1)", x, replace(own, weight=ones)),
            ("parameters", f"bias was {never} (0)", x, replace(own, bias=zeros)),
            ("folding", "it is left out", x, plain),
            ("folding", "it is applied twice: folded, and as a node", place.before, own),
            ("folding", "folded without its shift", x, replace(own, mean=zeros, bias=zeros)),
            ("folding", "folded without its scale", x, shift),
            ("folding", "folded by its variance instead of the root of it", x,
             replace(own, variance=(own.variance + own.eps) ** 2 - own.eps)),
            *(("folding", "folded without the bias in front of it", x - _along(b, place.axis, x.dim()), own)
              for b in (raw or ())[1:] if bool(b.any())),
        ):  # fmt: skip
            value = place.finish(place.applied(norm, base))
            fix = _FOLD if name == "folding" else _CHECKPOINT
            yield Candidate(f"batchnorm-{name}", f"BatchNorm: {says}", value, fix=fix)


@cause(by_node=True)
def epsilon(segment: Segment) -> Iterator[Candidate]:
    """Candidates: the ε of another framework, or any other, fitted as one number."""
    for place in places(segment):
        if place.own is not None and place.x is not None:
            number = single_numbers.epsilon(place.own.eps, partial(_with_epsilon, place, place.own, place.x))
            yield from single_numbers.with_usual([number])
            yield from single_numbers.by_search(segment, [number])


def _with_epsilon(place: Place, own: BatchNorm, x: Tensor, eps: float) -> Candidate:
    says, evidence = f"BatchNorm: eps is {eps:.3g} instead of {own.eps:.3g}", {"eps": eps, "instead_of": own.eps}
    value = place.finish(place.applied(replace(own, eps=eps), x))
    fix = f"BatchNorm2d(…, eps={own.eps:g}) in {{layers}}, and export again"
    return Candidate("normalization-eps", says, value, 0, evidence, fix)


@cause(by_node=True)
def unknown_statistics(segment: Segment) -> Iterator[Candidate]:
    """Candidates with fitted statistics: a scale and an offset for each channel that is off.

    The mean and variance that they imply are evidence. A simpler candidate has all means off by the same share of their
    deviations and all variances by one factor.
    """
    norm = segment.batch_norm
    if norm is None or segment.test.dim() < 2:
        return
    error, unit = segment.test - segment.before, torch.ones((), dtype=torch.float64)
    slope = segment.before - segment.along(norm.bias)
    off = off_channels(segment)
    for basis, axis in (([slope, unit], segment.axis), ([slope, segment.along(norm.weight)], None)):
        fit = cross_fit(error, basis, segment.folds, axis)
        if fit is None or not bool((fit[1][:, 0] > -1).all()):
            continue
        change, theta = fit
        if axis is not None:
            change = torch.where(segment.along(off), change, 0.0)
        ratio = 1 + theta[:, 0]
        offset = theta[:, 1] if axis is not None else theta[:, 1] * norm.weight
        variance = (norm.variance + norm.eps) / ratio**2 - norm.eps
        mean = norm.mean - offset / (norm.scale * ratio)
        evidence = {"implied_mean": mean[:8].tolist(), "mean": norm.mean[:8].tolist()}
        evidence |= {"implied_variance": variance[:8].tolist(), "variance": norm.variance[:8].tolist()}
        says = "BatchNorm: other statistics (channels are off in scale and offset)"
        # One less than any affine fit of the same channels: it says more about the same numbers. Not as few as a factor
        # for each: where that alone explains them, mean and variance would have to be off in step.
        count = int(off.sum())
        parameters = max(2 * count - 1, count + 1) if axis is not None else 2
        value = segment.activate(segment.before + change)
        yield Candidate("batchnorm-statistics", says, value, parameters, evidence, _CHECKPOINT)
