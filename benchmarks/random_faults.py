"""Random faults for ``localise.py``: kind, place and size are drawn, and the size is then measured, not assumed.

The size of a fault is the relative L2 change of the layer's result, computed in FP64 on the inputs that the layer has
in the spoilt network, in multiples of the layer's expected rounding: what the precision under test introduces there by
emulation, at least half a unit roundoff. Faults are at least 10 such multiples.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from faults import edits
from faults.edits import Editor

from cp_debug.backends.arithmetic import ARITHMETICS, FP64
from cp_debug.backends.executor import Executor
from cp_debug.backends.spec import BackendSpec
from cp_debug.graph.graph import Graph, Node
from cp_debug.graph.made_up import MadeUp
from cp_debug.programs.precision import PRECISIONS

SMALLEST = 10.0
"""Multiples of the expected rounding below which a fault is none."""
LARGEST = {"fp32": 1e6, "tf32": 300.0, "fp16": 300.0, "bf16": 60.0}
"""Largest multiples drawn for a continuous fault, by precision."""

Apply = Callable[[Editor, str, float], None]


@dataclass
class Injected:
    """A fault that is in the graph."""

    value: str
    kind: str
    multiple: float


@dataclass
class Layer:
    """A layer as a target: its node, its exact result, its inputs, and what rounding does to it."""

    node: Node
    value: str
    exact: torch.Tensor
    given: dict[str, torch.Tensor]
    expected: float


def inject(path: Path, spoilt: Path, backend: str, seed: int) -> list[Injected]:
    """Write ``spoilt`` with one to three faults at random layers; sizes fit the precision of ``backend``."""
    rng = np.random.default_rng([seed, 1])
    precision = BackendSpec.parse(backend).variant
    precision = precision if precision in PRECISIONS else "fp32"
    graph = Graph(path)
    order = {node.outputs[0]: node for node in graph.nodes if node.outputs[0] in _results(graph)}
    count = int(rng.integers(1, 4))
    Editor(path).save(spoilt)
    found: list[Injected] = []
    values = list(order)
    for value in sorted(rng.choice(values, size=min(count, len(values)), replace=False), key=values.index):
        layer = _layer(graph, order[str(value)], spoilt, precision)
        last = len(found) == count - 1
        if layer is not None and (fault := _strike(layer, spoilt, precision, rng, fatal=last)):
            found.append(fault)
    return found or inject(path, spoilt, backend, seed + 100_000)


def _results(graph: Graph) -> set[str]:
    """Values of floats that depend on the input."""
    reached = {v.name for v in graph.inputs}
    for node in graph.nodes:
        if not reached.isdisjoint(node.inputs):
            reached.update(node.outputs)
    return reached & {n for n, t in graph.types.items() if t.tensor_type.elem_type == 1}


def _layer(graph: Graph, node: Node, spoilt: Path, precision: str) -> Layer | None:
    """The layer with the inputs that it has in the spoilt network so far; None where it is zero or not finite."""
    inputs = {n: torch.from_numpy(a) for n, a in MadeUp(graph).sample([0, 0]).items()}
    values = dict(inputs)
    Executor(Graph(spoilt), ARITHMETICS[precision]).run(inputs, lambda name, tensor: values.update({name: tensor}))
    given = {n: values[n] for n in node.inputs if n in values}
    value = node.outputs[0]
    exact = Executor(graph, FP64).run_nodes([node], given, [value])[value]
    rounded = Executor(graph, ARITHMETICS[precision]).run_nodes([node], given, [value])[value].double()
    scale = float(exact.norm())
    if not scale or not np.isfinite(scale) or not bool(torch.isfinite(rounded).all()):
        return None
    expected = max(float((rounded - exact).norm()) / scale, PRECISIONS[precision].roundoff / 2)
    return Layer(node, value, exact, given, expected)


def _strike(layer: Layer, spoilt: Path, precision: str, rng: np.random.Generator, *, fatal: bool) -> Injected | None:
    """Put a random kind of fault into ``spoilt``; None where no kind reaches the smallest size.

    ``fatal`` allows kinds that leave nothing to be seen behind them.
    """
    kinds = _kinds(layer, rng, fatal)
    allowed = {"int8 scale": _best_levels(layer.exact)}  # a pair declares INT8: what its best scale costs is no fault
    for kind in rng.permutation(list(kinds)):
        change, steps = kinds[kind], 1
        target = size = layer.expected * SMALLEST * (LARGEST[precision] / SMALLEST) ** rng.uniform(0.02, 1)
        if isinstance(change, Sized):
            change, steps = change.apply, 5
        for _ in range(steps):
            editor = Editor(spoilt)
            change(editor, layer.value, size)
            effect = _effect(layer, editor, spoilt.with_suffix(".tried.onnx"))
            if effect >= SMALLEST * max(layer.expected, allowed.get(kind, 0)) and (steps == 1 or effect < 2 * target):
                editor.save(spoilt)
                return Injected(layer.value, str(kind), effect / layer.expected)
            size *= 1.1 * target / effect if 0 < effect < np.inf else 10
    return None


def _best_levels(exact: torch.Tensor) -> float:
    """Relative L2 error of a tensor in INT8 with the scale that suits it best."""
    scales = float(exact.abs().max()) / 127 * np.linspace(0.05, 1, 96)
    errors = [(exact - scale * (exact / scale).round().clamp(-128, 127)).norm() for scale in scales]
    return float(min(errors) / exact.norm())


def _effect(layer: Layer, editor: Editor, path: Path) -> float:
    """Relative L2 change of the layer's result; infinite where it is not finite any more."""
    graph = Graph(editor.save(path))
    nodes, _ = graph.segment([layer.value], set(layer.given))
    spoilt = Executor(graph, FP64).run_nodes(nodes, layer.given, [layer.value])[layer.value]
    effect = float((spoilt - layer.exact).norm() / layer.exact.norm())
    return effect if np.isfinite(effect) else np.inf


@dataclass
class Sized:
    """A kind whose size can be chosen."""

    apply: Apply


def _kinds(layer: Layer, rng: np.random.Generator, fatal: bool) -> dict[str, Apply | Sized]:
    """The faults that can strike this layer."""
    exact = layer.exact.numpy()
    rms, largest = float(np.sqrt(np.mean(exact**2))), float(np.abs(exact).max())
    noise, spike = rng.standard_normal(exact.shape), np.zeros(exact.shape)
    spike.flat[rng.integers(spike.size)] = exact.size**0.5
    cut = float(rng.uniform(0.3, 0.9)) * largest
    kinds: dict[str, Apply | Sized] = {
        "scale": Sized(edits.scale),
        "offset": Sized(lambda e, v, size: edits.add(e, v, size * rms)),
        "noise": Sized(lambda e, v, size: edits.add(e, v, size * rms * noise)),
        "one element": Sized(lambda e, v, size: edits.add(e, v, size * rms * spike)),
        "clip": lambda e, v, size: edits.clip(e, v, cut),
        "int8 scale": lambda e, v, size: edits.quantize(e, v, cut / 3),
        "stored in fp16": lambda e, v, size: edits.store_as(e, v, "fp16"),
        "stored in bf16": lambda e, v, size: edits.store_as(e, v, "bf16"),
    }
    node = layer.node
    weights = [n for n in node.inputs if n not in layer.given]
    if node.op in ("Conv", "ConvTranspose", "Gemm", "MatMul") and weights:
        kinds["weight scale"] = Sized(edits.scale_weights)
    if node.op == "Conv":
        channel = int(rng.integers(exact.shape[1]))
        kinds["channel scale"] = Sized(lambda e, v, size: edits.scale_channel(e, v, size, channel))
        kinds["padding"] = lambda e, v, size: edits.shift_padding(e, v)
        if len(weights) > 1:
            kinds["bias scale"] = Sized(edits.scale_bias)
    if node.op == "BatchNormalization":
        kinds["stale statistics"] = Sized(edits.stale_statistics)
    if node.op in ("BatchNormalization", "LayerNormalization"):
        kinds["epsilon"] = Sized(lambda e, v, size: edits.epsilon(e, v, 1e-5 + size))
    if node.op in ("Relu", "Sigmoid", "Tanh", "LeakyRelu", "Elu", "Softplus", "Exp", "Erf", "Softmax"):
        kinds["left out"] = lambda e, v, size: edits.drop(e, v)
    if exact.ndim > 1 and exact.shape[1] > 1:
        order = np.roll(np.arange(exact.shape[1]), 1)
        kinds["channels swapped"] = lambda e, v, size: edits.swap_channels(e, v, order)
    if exact.ndim > 2:
        kinds["transposed"] = lambda e, v, size: edits.scramble(e, v, exact.shape)
    if fatal:
        kinds["0·Inf"] = lambda e, v, size: edits.zero_times_infinity(e, v)
    return kinds
