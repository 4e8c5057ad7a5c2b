"""Preflight checks of a model, before any backend runs it: ranges, reduction lengths, normalizations, quantizers."""

from __future__ import annotations

import math
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cp_debug.backends.arithmetic import FP64, round_fp16
from cp_debug.backends.base import Program
from cp_debug.backends.executor import Weights
from cp_debug.backends.registry import create
from cp_debug.backends.spec import BackendSpec
from cp_debug.bisect.acquittals import beside_masks
from cp_debug.bisect.causes.precision import OVERFLOWS
from cp_debug.bisect.causes.ranges import HALF, SMALLEST, half_figures, where
from cp_debug.bisect.verdict import RANGE
from cp_debug.graph.graph import Node
from cp_debug.graph.operators import PRODUCTS, QUANTIZERS
from cp_debug.graph.randomness import drawing, drawing_note
from cp_debug.probes.distance import all_finite, relative_l2
from cp_debug.programs.layers import layer_name
from cp_debug.programs.pipeline import Key, Pipeline
from cp_debug.programs.scene import decode
from cp_debug.recipes.abilities import MADE_UP, HasScores, Remarks
from cp_debug.recipes.base import Arrays, Model, Sample

LONG = 1152
"""Reduction length from which FP16 accumulation is a risk: measured on TensorRT 8.6 it introduces 4.4 times what FP32
accumulation would, more than rounding explains (3.3 times at 576, 6.1 at 2304)."""
GROWTH = 0.13
"""Excess of FP16 accumulation divided by the square root of the reduction length."""
UNEVEN = 8.0
"""Ratio of the largest to the median channel range from which one INT8 scale is too few."""

PROBLEM, RISK = "problem", "risk"


@dataclass
class Concern:
    """A finding to look at. A ``problem`` is wrong or will be in some precision; a ``risk`` may be."""

    check: str
    severity: str
    says: str
    layers: list[str]
    fix: str
    figures: dict[str, Any] = field(default_factory=dict)


class Preflight:
    """The checks of one model; ``sample`` None leaves out those that need activations."""

    def __init__(self, model: Model, programs: Sequence[Program], sample: Sample | None) -> None:
        self.model, self.programs, self.sample = model, programs, sample
        self._names = {Key(p.name, v): layer_name(p, v) for p in programs for v in p.graph.producer}

    def concerns(self) -> list[Concern]:
        """All concerns, problems first. Raises InputError where the activations cannot be computed."""
        listed: list[Concern] = []
        for program in self.programs:
            weights = Weights(program.graph, FP64, torch.device("cpu"), 0)
            listed += _ranges_of_weights(program, weights)
            listed += _long_sums(program, weights)
            listed += _normalizations(program, weights)
            listed += _quantizers(program, weights)
            listed += _random(program)
        if self.sample is not None:
            remarks = Remarks(self.model)
            remarks.see(self.sample)
            listed += (
                Concern("inputs", RISK, says, [], "give another sample with --inputs")
                for says in remarks.sentences
                if not says.startswith(MADE_UP)
            )
            listed += self._activations(self.sample)
        return sorted(listed, key=lambda c: c.severity != PROBLEM)

    def _activations(self, sample: Sample) -> Iterator[Concern]:
        """One FP32 pass over the whole chain."""
        lost: dict[str, dict[str, float]] = {}
        strange: dict[str, bool] = {}  # name → whether it may be a mask
        finite: set[Key] = set()
        clipped: dict[str, tuple[float, float]] = {}
        quantizers = {
            Key(p.name, node.inputs[0]): _range_of(node, Weights(p.graph, FP64, torch.device("cpu"), 0))
            for p in self.programs
            for node in p.graph.nodes
            if node.op == "QuantizeLinear"
        }
        constants = {
            Key(p.name, o) for p in self.programs for n in p.graph.nodes if n.op == "Constant" for o in n.outputs
        }

        graphs = {p.name: p.graph for p in self.programs}

        def look(key: Key, tensor: Any) -> None:
            value = FP64.hold(tensor, "cpu")
            if not isinstance(value, Tensor) or not value.is_floating_point() or key in constants:
                return
            name = self._names.get(key, key.value)
            if all_finite(value):
                finite.add(key)
            else:
                strange[name] = _masks(value)
            if figures := leaves_half(*beside_masks(graphs[key.component], key.value, value)):
                lost[name] = figures
            if (ends := quantizers.get(key)) and value.numel():
                clipped[name] = _beyond(value, ends)

        with Pipeline(self.model, self.programs, create(BackendSpec.parse("emu-fp32"))) as pipeline:
            results = pipeline.run(sample, look)
        floats = [a for a in results[self.model.components[-1].name].values() if a.dtype.kind == "f"]
        inside = all(np.isfinite(array).all() for array in floats)  # a Softmax took it, say
        if told := [name for name, masks in strange.items() if not (masks and inside)]:
            fix = "cpdebug bisect names where they first appear"
            yield Concern("activations", PROBLEM, "NaN or Inf in FP32", told, fix)
        yield from _beyond_half("activations", lost)
        if not any(figures["overflows"] for figures in lost.values()):
            yield from self._vanishing(sample, finite)
        yield from _clipped(clipped)
        yield from self._probabilities(sample, results)

    def _vanishing(self, sample: Sample, finite: Container[Key]) -> Iterator[Concern]:
        """Constants that FP16 holds as 0, such as an ε, if a pass in FP16 makes NaN or Inf of what is ``finite``."""
        tiny: dict[str, float] = {}
        for program in self.programs:
            weights = Weights(program.graph, FP64, torch.device("cpu"), 0)
            for node in program.graph.nodes:
                for name in node.inputs if node.op not in QUANTIZERS else ():
                    shape = weights.shape(name)  # without reading large ones
                    value = weights.numbers(name) if shape is not None and math.prod(shape) == 1 else None
                    if value is not None and value.is_floating_point() and value and not round_fp16(value.float()):
                        tiny[_layer(program, node)] = float(value)
        if not tiny:
            return
        born: list[str] = []

        def look(key: Key, tensor: Any) -> None:
            value = FP64.hold(tensor, "cpu")
            if key in finite and isinstance(value, Tensor) and value.is_floating_point() and not all_finite(value):
                born.append(self._names.get(key, key.value))

        with Pipeline(self.model, self.programs, create(BackendSpec.parse("emu-fp16"))) as pipeline:
            pipeline.run(sample, look)
        if born:
            (_, constant), *more = tiny.items()
            others = f", and {len(more)} more such constants" if more else ""
            says = f"{constant:.3g} is 0 in FP16{others}: NaN or Inf first appears at {born[0]}"
            fix = "raise the constant to 1e-7 or more, or keep these layers in FP32"
            yield Concern("activations", PROBLEM, says, list(dict.fromkeys([*tiny, born[0]])), fix)

    def _probabilities(self, sample: Sample, results: Mapping[str, Arrays]) -> Iterator[Concern]:
        """Scores that were never squeezed into (0, 1), or twice."""
        decoded = decode(self.model, sample, results)
        last = self.model.components[-1]
        if not isinstance(decoded, HasScores) or not len(decoded.scores):
            return
        scores = decoded.scores
        low, high = float(np.min(scores)), float(np.max(scores))
        squeezed = [n for n, v in results[last.name].items() if v.size and v.min() >= 0 and v.max() <= 1]
        figures = {"lowest": low, "highest": high}
        if low < 0 or high > 1:
            says = f"decoded scores lie between {low:.3g} and {high:.3g}: logits are read as probabilities"
            yield Concern(
                "probabilities", PROBLEM, says, list(last.output_names), "apply a sigmoid before decoding", figures
            )
        elif low >= 0.5 and squeezed:
            says = f"all decoded scores are at least {low:.3g}: probabilities are read as logits"
            yield Concern(
                "probabilities", PROBLEM, says, squeezed, "export logits, or decode without a sigmoid", figures
            )


def leaves_half(exact: Tensor) -> dict[str, float] | None:
    """Figures of what FP16 loses of a tensor; None where that is no more than its rounding.

    ``exact`` has any shape and a float dtype; ``storage_loss`` is relative L2.
    """
    if _stays_half(exact):
        return None
    figures = half_figures(exact)
    finite = where(torch.isfinite(exact), exact)
    stored = round_fp16(finite.float()).double()
    is_stored = torch.isfinite(stored)
    figures["storage_loss"] = relative_l2(where(is_stored, stored), where(is_stored, finite))
    return figures if figures["overflows"] or figures["storage_loss"] > RANGE * HALF.roundoff else None


def _stays_half(exact: Tensor) -> bool:
    """Whether two passes show that FP16 loses no more than its rounding: nothing is too large, and what may be lost of
    all numbers below its normal ones is little beside the tensor's norm."""
    if not exact.numel():
        return True
    low, high = (float(end) for end in torch.aminmax(exact))
    if not max(-low, high) < OVERFLOWS:  # or NaN
        return False
    norm = float(torch.linalg.vector_norm(exact, dtype=torch.float64))
    return math.sqrt(exact.numel()) * SMALLEST / 2 <= (RANGE - 1) * HALF.roundoff * norm


def _beyond_half(check: str, lost: Mapping[str, Mapping[str, float]]) -> Iterator[Concern]:
    ways = (
        ("overflow FP16 (beyond 65504)", {n: f for n, f in lost.items() if f["overflows"]}),
        ("vanish or lose bits in FP16 (below 6.1e-5)", {n: f for n, f in lost.items() if not f["overflows"]}),
    )
    for loss, layers in ways:
        if layers:
            figures = {name: max(f[name] for f in layers.values()) for name in next(iter(layers.values()))}
            says = f"{check} {loss}: largest {figures['largest']:.3g}, storage loses {figures['storage_loss']:.2g}"
            fix = "rescale these layers and their readers, or keep them in FP32 or BF16"
            yield Concern(check, PROBLEM, says, list(layers), fix, figures)


def _masks(value: Tensor) -> bool:
    """Whether a tensor of any shape and float dtype holds nothing but numbers and −Inf, as masks of attention do."""
    return not bool((value.isnan() | (value == math.inf)).any())


def _ranges_of_weights(program: Program, weights: Weights) -> Iterator[Concern]:
    lost = {}
    for node in program.graph.nodes:
        for name in node.inputs[:1] if node.op in QUANTIZERS else node.inputs:  # scales stay in FP32
            value = weights.numbers(name)
            if value is not None and value.is_floating_point() and value.dim():
                if not (all_finite(value) or _masks(value)):  # the activations tell what becomes of a mask
                    says = f"NaN or Inf in the weight {name}"
                    yield Concern("weights", PROBLEM, says, [_layer(program, node)], "export from a sound checkpoint")
                if figures := leaves_half(*beside_masks(program.graph, name, value)):
                    lost[f"{_layer(program, node)} ({name})"] = figures
    yield from _beyond_half("weights", lost)


def _random(program: Program) -> Iterator[Concern]:
    for node in drawing(program.graph):
        fix = "call eval() before the export, or make its result an input: no two runs can be compared"
        yield Concern("random", RISK, drawing_note(node), [_layer(program, node)], fix)


def _long_sums(program: Program, weights: Weights) -> Iterator[Concern]:
    """Reduction lengths at which FP16 accumulation shows."""
    lengths = {}
    for node in program.graph.nodes:
        shape = weights.shape(node.inputs[1]) if node.op in PRODUCTS and len(node.inputs) > 1 else None
        if shape is not None:
            summed = {"MatMul": shape[-2:-1] or shape[:1], "ConvTranspose": shape[:1]}.get(node.op, shape[1:])
            long = math.prod(summed)
            if long >= LONG:
                lengths[_layer(program, node)] = int(long)
    if lengths:
        longest = max(lengths.values())
        says = (
            f"sums of up to {longest} products: accumulated in FP16 they introduce about "
            f"{GROWTH * math.sqrt(longest):.1f} times the rounding of FP32 accumulation"
        )
        fix = "keep these layers in FP32 or BF16 where a backend accumulates in FP16 (TensorRT: …_f16f16_f16f16_f16_…)"
        yield Concern("accumulation", RISK, says, list(lengths), fix, {"lengths": lengths})


def _normalizations(program: Program, weights: Weights) -> Iterator[Concern]:
    """BatchNorms in which ε outweighs a variance: any other ε, or any rounding of the variance, shows there."""
    small: dict[str, int] = {}
    for node in program.graph.nodes:
        batch_norm = node.op == "BatchNormalization"
        if batch_norm and (variance := weights.numbers(node.proto.input[4])) is not None:
            eps = node.attribute("epsilon", 1e-5)
            small[_layer(program, node)] = int((variance <= eps).sum())
    if not small and program.module is not None:
        prefix = program.alignment.prefix if program.alignment else ""
        for path, module in program.module.named_modules():
            variance = getattr(module, "running_var", None)
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and variance is not None:
                small[".".join(p for p in (prefix, path) if p)] = int((variance <= module.eps).sum())
    small = {name: count for name, count in small.items() if count}
    if small:
        says = f"eps outweighs the variance of {sum(small.values())} channels: they depend on the exact eps"
        fix = "give the target the same eps; such channels are dead, or were never trained"
        yield Concern("batchnorm", RISK, says, list(small), fix, {"channels": small})


def _quantizers(program: Program, weights: Weights) -> Iterator[Concern]:
    for node in program.graph.nodes:
        if node.op not in QUANTIZERS or (scale := weights.numbers(node.inputs[1])) is None:
            continue
        layer, scale = _layer(program, node), scale.double()
        if not bool(((scale > 0) & torch.isfinite(scale)).all()):
            says = f"a scale is {float(scale.min()):.3g}: it must be positive and finite"
            yield Concern("quantization", PROBLEM, says, [layer], "calibrate this tensor again")
        for reader in program.graph.consumers.get(node.outputs[0], []) if node.op == "QuantizeLinear" else []:
            if reader.op == "DequantizeLinear" and not _same(node, reader, weights):
                says = f"{node.name} and {reader.name} disagree in scale or zero point"
                yield Concern("quantization", PROBLEM, says, [layer], "give both the same parameters")
        if node.op == "DequantizeLinear" and (levels := weights.numbers(node.inputs[0])) is not None:
            yield from _quantized_weight(layer, levels, scale)


def _quantized_weight(layer: str, levels: Tensor, scale: Tensor) -> Iterator[Concern]:
    """Weights at the end of the range, or with one scale for channels of very different range."""
    if levels.is_floating_point() or not levels.numel():
        return
    ends = torch.iinfo(levels.dtype)
    last = (levels == ends.max) | (levels <= ends.min + (ends.min < 0))
    # A sound scale has its largest weight there, and a distribution that is cut off has a heap.
    near = ((levels >= ends.max - 8) | (levels <= ends.min + 9)) & ~last
    bias = levels.dtype == torch.int32  # no sound one comes near
    most = 0 if bias else max(2 * scale.numel(), int(near.sum()), levels.numel() // 100)
    # A norm's ones, or a mask's, are at the end by their own maximum.
    heaped = any(len(part.unique()) > 1 for part in (levels[last], levels[~last]))
    if int(last.sum()) > most and (bias or heaped):
        what = "biases" if bias else "weights"
        says = f"{float(last.double().mean()):.1%} of the quantized {what} are at the end of the range: the scale clips"
        yield Concern("quantization", RISK, says, [layer], "calibrate it by its maximum")
    if scale.numel() == 1 and levels.dim() > 1:
        ranges = levels.double().abs().flatten(1).amax(1)
        ranges = ranges[ranges > 0]
        if len(ranges) > 1 and float(ranges.max() / ranges.median()) > UNEVEN:
            ratio = float(ranges.max() / ranges.median())
            says = f"one scale for channels whose ranges differ {ratio:.0f} times"
            yield Concern("quantization", RISK, says, [layer], "quantize the weight per channel")


def _beyond(value: Tensor, ends: tuple[float, float, float]) -> tuple[float, float]:
    """(how far an activation reaches, of what its quantizer holds; loss by clipping ÷ loss by rounding)."""
    low, high, scale = ends
    # Where a range ends at 0, the quantizer is the Relu, too.
    held = value.clamp(low if low else None, high if high else None) if low or high else value
    lost = float(torch.linalg.vector_norm(value - held, dtype=torch.float64))
    reached = max(float(end) / limit for end, limit in ((value.min(), low), (value.max(), high)) if limit)
    return reached, lost / (scale * math.sqrt(value.numel() / 12))


def _clipped(clipped: Mapping[str, tuple[float, float]]) -> Iterator[Concern]:
    """Activations against the range of their quantizers: clipping costs more than rounding, or the range is empty."""
    over = {n: reach for n, (reach, loss) in clipped.items() if loss > 1}
    coarse = {n: reach for n, (reach, _) in clipped.items() if 0 < reach < 0.25}
    if over:
        says = (
            f"activations reach {max(over.values()):.2f} times what their INT8 scale holds; clipping them costs "
            f"{max(clipped[n][1] for n in over):.2g} times as much as rounding"
        )
        yield Concern("quantization", RISK, says, list(over), "calibrate again: a higher percentile", {"reach": over})
    if coarse:
        says = f"INT8 scales up to {1 / min(coarse.values()):.0f} times too coarse for their activations"
        yield Concern(
            "quantization", RISK, says, list(coarse), "calibrate again: a lower percentile", {"reach": coarse}
        )


def _same(quantize: Node, dequantize: Node, weights: Weights) -> bool:
    for ours, theirs in zip(quantize.inputs[1:], dequantize.inputs[1:], strict=False):
        one, other = weights.numbers(ours), weights.numbers(theirs)
        if one is not None and other is not None and not torch.equal(one, other):
            return False
    return True


def _range_of(node: Node, weights: Weights) -> tuple[float, float, float] | None:
    """(smallest, largest value that a quantizer of one scale holds, the scale); None for one that is not known."""
    scale = weights.numbers(node.inputs[1])
    zero = weights.numbers(node.inputs[2]) if len(node.inputs) > 2 else torch.zeros((), dtype=torch.uint8)
    if scale is None or scale.numel() != 1 or not float(scale) > 0 or zero is None or zero.is_floating_point():
        return None
    ends, step = torch.iinfo(zero.dtype), float(scale)
    return (ends.min - int(zero)) * step, (ends.max - int(zero)) * step, step


def _layer(program: Program, node: Node) -> str:
    return layer_name(program, node.outputs[0])
