"""Networks with a known smallest set of layers to keep, for ``search.py``: built so, and checked before they count.

``overflow``: a layer's result × 2ⁿ beyond FP16's range and the next layer's weights ÷ 2ⁿ: both must stay FP32, as the
value between them cannot be held. ``accumulation``: two equal channels in different blocks of 16, with weights +C and
−C: their products cancel in FP32, and leave the rounding of a large partial sum where sums are FP16. ``clipped``: an
INT8 layer whose input scale cuts off all but a fraction of its range.
"""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from onnx import TensorProto

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from faults.edits import Editor, rescale

from cp_debug.backends.base import Program
from cp_debug.backends.executor import Executor
from cp_debug.graph.graph import Graph
from cp_debug.graph.made_up import MadeUp
from cp_debug.graph.qdq import insert_qdq, quantizable, quantized_inputs, remove_qdq
from cp_debug.graph.scales import LayerScales
from cp_debug.mixed_precision.goal import Goal
from cp_debug.mixed_precision.layers import FusionGroup, Kept, TrialPrecision, fusion_groups_of
from cp_debug.mixed_precision.runners import EmulatedRunner
from cp_debug.mixed_precision.trials import Judge
from cp_debug.recipes.registry import load_model
from tests.nets import NetBuilder

KINDS = {"overflow": "emu-fp16", "accumulation": "emu-fp16acc", "clipped": "emu-int8"}
"""Kind → the backend under test."""
EXHAUSTIVE = 800
"""Sets up to which all smaller ones than the known set are tried."""
CLEAR = 1.5
"""Ratio of the goal to the error of the known set, and of the error without one of its layers to the goal, at least."""


@dataclass
class Case:
    """A network, its goal, and the set that is known to be the smallest."""

    seed: int
    kind: str
    path: Path
    backend: str
    goal: str
    truth: frozenset[tuple[str, ...]]
    """Layers by their nodes."""
    groups: list[FusionGroup]
    exhaustive: bool
    """Whether every smaller set was tried; always checked is that none can be left out, whatever else is kept."""
    drawn: int
    """Networks drawn until one had a clear goal."""


class Trials:
    """The predicate of a case, on the emulator."""

    def __init__(self, path: Path, backend: str) -> None:
        model = load_model(str(path))
        program = Program(path.stem, Graph(path))
        plain = program
        if quantized := quantized_inputs(program.graph):
            plain = Program(path.stem, Graph(remove_qdq(program.graph, quantized, path.with_suffix(".plain.onnx"))))
        precision = TrialPrecision(backend.removeprefix("emu-"))
        samples = list(model.samples(1, 0, None))
        self.groups = fusion_groups_of(program, precision.candidates(program.graph))
        exact = EmulatedRunner(model, [plain], samples, TrialPrecision("fp16"), "cpu")
        everything = frozenset(fusion_groups_of(plain, {node.name for node in plain.graph.nodes}))
        self._judge = Judge(model, samples, exact.run(everything), Goal.parse("rel_l2<1"))
        self._runner = EmulatedRunner(model, [program], samples, precision, "cpu")
        self._runner.prepare()

    def error(self, kept: Kept) -> float:
        """Relative L2 distance of the worst output."""
        return self._judge.measure(self._runner.run(kept)).figures["rel_l2"]


def make_case(seed: int, folder: Path) -> Case:
    """The case of a seed; kinds take turns."""
    kind = list(KINDS)[seed % len(KINDS)]
    for drawn in itertools.count(1):
        rng = np.random.default_rng([seed, drawn])
        path = folder / f"{seed}-{drawn}.onnx"
        nodes = BUILDERS[kind](path, rng)
        if case := _checked(seed, kind, path, nodes, drawn):
            return case
    raise AssertionError


def _checked(seed: int, kind: str, path: Path, nodes: set[str], drawn: int) -> Case | None:
    """The case, if its set is clearly the smallest."""
    trials = Trials(path, KINDS[kind])
    groups = trials.groups
    truth = frozenset(group for group in groups if nodes.intersection(group.nodes))
    kept = trials.error(truth)
    missing = min(trials.error(truth - {group}) for group in truth)
    least = min(missing, *(trials.error(frozenset(groups) - {group}) for group in truth))
    if not least > CLEAR**2 * kept:
        return None
    goal = math.sqrt(kept * min(least, 1e3 * kept))
    smaller = [s for size in range(len(truth)) for s in itertools.combinations(groups, size)]
    exhaustive = len(smaller) <= EXHAUSTIVE
    if exhaustive and any(trials.error(frozenset(s)) < goal for s in smaller):
        return None
    return Case(seed, kind, path, KINDS[kind], f"rel_l2<{goal:.6g}", frozenset(u.nodes for u in truth), groups,
                exhaustive, drawn)  # fmt: skip


def overflow(path: Path, rng: np.random.Generator) -> set[str]:
    """One or two layers whose result is beyond FP16."""
    width, size = int(rng.choice([8, 16])), 16
    net, chain, outputs = _network(rng, width)
    net.save(path, {"x": (TensorProto.FLOAT, [1, width, size, size])}, outputs)
    largest = _largest(Graph(path))
    editor, struck = Editor(path), set()
    for place in rng.choice(len(chain) - 1, size=int(rng.integers(1, 3)), replace=False):
        (_, norm), (reader, _) = chain[place], chain[place + 1]
        factor = 2.0 ** math.ceil(math.log2(4 * 65504 / largest[norm]))
        rescale(editor, norm, reader, factor)
        struck |= {f"node_{norm}", f"node_{reader}"}
    editor.save(path)
    return struck


def accumulation(path: Path, rng: np.random.Generator) -> set[str]:
    """One to three layers that cancel large partial sums."""
    width, size = 32, 8
    net, chain, outputs = _network(rng, width)
    net.save(path, {"x": (TensorProto.FLOAT, [1, width, size, size])}, outputs)
    editor, struck = Editor(path), set()
    for place in rng.choice(len(chain) - 1, size=int(rng.integers(1, 4)), replace=False):
        (conv, norm), (reader, _) = chain[place], chain[place + 1]
        channel = int(rng.integers(16))
        for value, slots in ((conv, (1, 2)), (norm, (1, 2, 3, 4))):
            for slot in slots:
                weight = editor.weight(value, slot)
                weight[channel + 16] = weight[channel]
                editor.set_weight(value, weight, slot)
        weight = editor.weight(reader)
        weight[:, [channel, channel + 16]] = 0
        weight[:, channel, 1, 1], weight[:, channel + 16, 1, 1] = 512, -512
        editor.set_weight(reader, weight)
        struck.add(f"node_{reader}")
    editor.save(path)
    return struck


def clipped(path: Path, rng: np.random.Generator) -> set[str]:
    """One to four INT8 layers whose input is cut off."""
    width, size = int(rng.choice([8, 16])), 16
    net, chain, outputs = _network(rng, width)
    plain = path.with_suffix(".fp32.onnx")
    net.save(plain, {"x": (TensorProto.FLOAT, [1, width, size, size])}, outputs)
    graph = Graph(plain)
    largest, layers = _largest(graph), {}
    nodes = quantizable(graph)
    inner = [f"node_{conv}" for conv, _ in chain]
    struck = set(rng.choice(inner, size=int(rng.integers(1, 5)), replace=False).tolist())
    for node in nodes:
        weight = graph.initializer(node.proto.input[1])
        axes = (0, 2, 3) if node.op == "ConvTranspose" else (1, 2, 3)
        share = rng.uniform(0.03, 0.1) if node.name in struck else 1.0
        layers[node.name] = LayerScales(share * largest[node.proto.input[0]], np.abs(weight).max(axes))
    insert_qdq(graph, layers, path)
    return struck


BUILDERS: dict[str, Callable[[Path, np.random.Generator], set[str]]] = {
    "overflow": overflow,
    "accumulation": accumulation,
    "clipped": clipped,
}


def _network(rng: np.random.Generator, width: int) -> tuple[NetBuilder, list[tuple[str, str]], list[str]]:
    """A trunk of 12 to 30 layers (convolution, BatchNormalization, ReLU), a neck of two scales, one to five heads.

    Returns the (convolution, normalization) values of the trunk, each read by the next alone, and the outputs.
    """
    net = NetBuilder(int(rng.integers(1 << 31)))
    chain: list[tuple[str, str]] = []

    def layer(x: str) -> str:
        conv = net.conv(x, width, width)
        chain.append((conv, net.batch_norm(conv, width)))
        return net.op("Relu", chain[-1][1])

    x = "x"
    for _ in range(int(rng.integers(12, 31))):
        x = layer(x)
    trunk = list(chain)
    down = layer(net.op("MaxPool", x, kernel_shape=[2, 2], strides=[2, 2]))
    up = net.weight((net.rng.standard_normal((width, width, 2, 2)) * (1 / width) ** 0.5).astype(np.float32))
    turned = net.op("ConvTranspose", down, up, kernel_shape=[2, 2], strides=[2, 2])
    both = net.op("Concat", x, net.op("Relu", turned), axis=1)
    shared = net.op("Relu", net.conv(both, 2 * width, width))
    heads = [net.conv(layer(shared), width, int(rng.integers(1, 4))) for _ in range(int(rng.integers(1, 6)))]
    return net, trunk, heads


def _largest(graph: Graph) -> dict[str, float]:
    """Largest magnitude of every value and input, in FP32, on the sample."""
    inputs = MadeUp(graph).sample([0, 0])
    found = {name: float(np.abs(array).max()) for name, array in inputs.items()}
    Executor(graph).run(inputs, lambda name, tensor: found.update({name: float(np.abs(np.asarray(tensor)).max())}))
    return found


def ddmin(holds: Callable[[frozenset[FusionGroup]], bool], groups: Sequence[FusionGroup]) -> list[FusionGroup]:
    """Zeller and Hildebrandt's minimizing delta debugging: subsets, then complements, then finer parts."""
    current, parts = list(groups), 2
    while len(current) >= 2:
        size = math.ceil(len(current) / parts)
        chunks = [current[i : i + size] for i in range(0, len(current), size)]
        for chunk in chunks:
            if holds(frozenset(chunk)):
                current, parts = chunk, 2
                break
        else:
            for chunk in chunks:
                rest = [group for group in current if group not in chunk]
                if holds(frozenset(rest)):
                    current, parts = rest, max(parts - 1, 2)
                    break
            else:
                if parts >= len(current):
                    break
                parts = min(2 * parts, len(current))
    return current
