"""A reference on the scales of its test, where tools that quantize multiplied channels and divided their readers.

Such networks compute the same with other values in between, and every layer that was rescaled would be accused. The
reference is rewritten by the same factors, which changes nothing that it computes beyond rounding: what differs after
that is a fault. ``channel_factors`` finds them.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from types import MappingProxyType
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper
from torch import Tensor

from cp_debug.backends.base import Program
from cp_debug.backends.executor import Executor, constants_of
from cp_debug.errors import InputError
from cp_debug.graph.constants import Constants
from cp_debug.graph.fold_batchnorm import fold_batchnorm
from cp_debug.graph.graph import Graph, Node
from cp_debug.graph.operators import PRODUCTS
from cp_debug.graph.pairing import believable
from cp_debug.graph.surgery import save, unused_names
from cp_debug.probes.distance import relative_l2
from cp_debug.programs.channel_factors import NORMS, FactorWalk, channel_rows
from cp_debug.programs.row_factors import Fit, fit
from cp_debug.programs.walk import tensors_as_arrays, walk
from cp_debug.recipes.base import Arrays, Component, Model, Sample

ROUNDING = 5e-7
"""Relative difference up to which a rescaled weight is the test's, which was rounded in FP32."""
CHANGED = 1e-4
"""Relative L2 distance of an output up to which rescaling changed nothing but its rounding; else it is not done."""
LARGEST = 1 << 27
"""Weights of a component, in FP64 1 GiB, up to which it is rescaled."""
_TOO_LARGE = (
    "some of its channels have other scales in the test, and it is too large to see whether what reads them takes that "
    "back, as equalisation and SmoothQuant do"
)
SHOWN = 3
WIDEST = 8192
"""Inputs of a product whose weights are stored in another form: they are read by multiplying an identity."""


def rescale(
    model: Model,
    sample: Sample,
    programs: Sequence[Program],
    tests: Sequence[Program],
    folder: Path,
    *,
    modules: bool,
) -> tuple[list[Program], list[str]]:
    """``programs`` with the channels of ``tests``' scales, and a sentence for each that was rewritten, to ``folder``.

    Where ``modules`` run, programs of torch modules stay as they are: their layers run as they were written. A test
    that rescales nothing, or does not take back what it scaled, leaves its reference alone.
    """
    with TemporaryDirectory(prefix="cpdebug-") as scratch:
        return _rescale(model, sample, programs, tests, folder, Path(scratch), modules)


def _rescale(
    model: Model,
    sample: Sample,
    programs: Sequence[Program],
    tests: Sequence[Program],
    folder: Path,
    scratch: Path,
    modules: bool,
) -> tuple[list[Program], list[str]]:
    asked = {
        p.name: _TestWeights(p.graph, t.graph, scratch / f"{p.name}.onnx")
        for p, t in zip(programs, tests, strict=True)
        if t.graph is not p.graph and (p.module is None or not modules)
    }
    asked = {name: weights for name, weights in asked.items() if weights.start()}
    notes = [f"{name}: {_TOO_LARGE}" for name, weights in asked.items() if weights.size() > LARGEST]
    asked = {name: weights for name, weights in asked.items() if weights.size() <= LARGEST}
    if not asked:
        return list(programs), notes
    runs = _seen(model, sample, programs, asked)
    made = []
    for program in programs:
        graph, note = program.graph, ""
        if (run := runs.get(program.name)) is not None:
            graph, note = _rescaled(asked[program.name], run, folder, program)
        if graph is not program.graph:
            alignment = program.alignment and replace(program.alignment, graph_sha256=graph.digest)
            program = replace(program, graph=graph, module=None, alignment=alignment)
        made.append(program)
        notes += [note] if note else []
    return made, notes


class _TestWeights:
    """The weights of a test by the nodes of its reference."""

    def __init__(self, reference: Graph, test: Graph, folded: Path) -> None:
        self.original = self.graph = reference
        counts = [sum(n.op == "BatchNormalization" for n in g.nodes) for g in (reference, test)]
        if counts[0] and not counts[1]:
            self.graph = fold_batchnorm(reference, folded)
        self._test, self._constants = test, Constants(self.graph)
        self._static, self._exact, self._executor = constants_of(test), Constants(test), Executor(test)
        self._twins = self._paired()
        self._read: dict[Node, np.ndarray | None] = {}
        self._fits: dict[Node, Fit | None] = {}

    def __call__(self, node: Node) -> np.ndarray | None:
        """The weights [as the reference has them] of a node of the reference in the test, FP64; None: unknown."""
        if node not in self._read:
            self._read[node] = self._of(node)
        return self._read[node]

    def start(self) -> bool:
        """Whether any layer's weights are the reference's times a factor a channel, and another's differ, too: all else
        starts behind one, and what takes it back has other weights."""
        differing = [n for n in self._twins if (p := self.place(n)) is not None and not self._equal(n, p)]
        if len(differing) < 2:
            return False
        return any((fitted := self.fit(node)) is not None and fitted.scaled for node in differing)

    def fit(self, node: Node) -> Fit | None:
        """Factors of a layer's channels that lead from its weights to the test's; None where they are equal bit for
        bit, unknown, of another shape, or a single one."""
        if node not in self._fits:
            self._fits[node] = self._fitted(node)
        return self._fits[node]

    def _fitted(self, node: Node) -> Fit | None:
        place = self.place(node)
        if place is None or node not in self._twins or self._equal(node, place):
            return None
        theirs, ours = self(node), self._constants[node.proto.input[place]]
        if theirs is None or ours.shape != theirs.shape or ours.size < 2:
            return None
        rows = [channel_rows(node, weight) for weight in (ours, theirs)]
        return None if rows[0] is None or rows[1] is None else fit(rows[0], rows[1])

    def _equal(self, node: Node, place: int) -> bool:
        """Whether a layer's weights are stored alike on both sides, bit for bit."""
        ours, inputs = node.proto.input[place], self._twins[node].proto.input
        theirs = inputs[place] if place < len(inputs) else ""
        if theirs not in self._exact or self._exact.size(theirs) != self._constants.size(ours):
            return False
        return bool(np.array_equal(self._constants[ours], self._exact[theirs]))

    def size(self) -> int:
        """The number of weights that would be rescaled at most."""
        return sum(self._constants.size(n.proto.input[p]) for n in self._twins if (p := self.place(n)) is not None)

    def _paired(self) -> dict[Node, Node]:
        """The reference's layers with weights and the test's: by the names of their results, else in order."""
        ours = [n for n in self.graph.nodes if self.place(n) is not None]
        by_name = {n: self._test.producer.get(n.outputs[0]) for n in ours}
        named = {n: twin for n, twin in by_name.items() if twin is not None and _same_kind(n, twin)}
        if not believable(self.graph, self._test):
            named = {}
        taken = set(named.values())
        left = [n for n in ours if n not in named]
        free = [n for n in self._test.nodes if n not in taken and self._has_weights(n)]
        if len(left) == len(free) and all(map(_same_kind, left, free)):
            named |= dict(zip(left, free, strict=True))
        return named

    def _has_weights(self, node: Node) -> bool:
        """Whether a node of the test holds weights as ``place`` means it."""
        inputs = node.proto.input
        if node.op == "Mul":
            static = [name for name in inputs if name in self._static]
            return len(static) == 1 and static[0] in self._exact and self._exact.size(static[0]) > 1
        return _stored(node) or (node.op in (*PRODUCTS, *NORMS) and len(inputs) > 1 and inputs[1] in self._static)

    def place(self, node: Node) -> int | None:
        """The input at which a layer's weights stand."""
        inputs = node.proto.input
        if node.op in PRODUCTS or node.op in NORMS:
            return 1 if len(inputs) > 1 and inputs[1] in self._constants else None
        if node.op == "Mul":
            places = [i for i, name in enumerate(inputs) if name in self._constants]
            return places[0] if len(places) == 1 and self._constants.size(inputs[places[0]]) > 1 else None
        return None

    def biases(self, node: Node) -> tuple[np.ndarray, np.ndarray] | None:
        """Constants that are added to the results of a layer of the reference, there and in the test, FP64."""
        twin = self._twins.get(node)
        ours = _bias(self.graph, node, self._constants)
        theirs = None if twin is None else _bias(self._test, twin, self._static)
        if ours is None or theirs is None or theirs not in self._exact:  # levels of INT32 may be too coarse
            return None
        array = self._computed(theirs)
        return None if array is None else (np.asarray(self._constants[ours], np.float64), array)

    def _of(self, node: Node) -> np.ndarray | None:
        twin, place = self._twins.get(node), self.place(node)
        if twin is None or place is None:
            return None
        if _stored(twin):
            width = next((a.i for a in twin.proto.attribute if a.name == "K"), 0)
            eye = {twin.proto.input[0]: np.eye(width, dtype=np.float32)}
            return self._computed(twin.outputs[0], eye) if 0 < width <= WIDEST else None
        names = [n for n in twin.proto.input if n in self._static]
        name = names[0] if node.op == "Mul" and len(names) == 1 else twin.proto.input[place]
        return self._computed(name) if name in self._static else None

    def _computed(self, name: str, given: Mapping[str, np.ndarray] = MappingProxyType({})) -> np.ndarray | None:
        """A value of the test that hangs on constants and ``given`` alone, FP64; None where nothing computes it."""
        try:
            if name not in self._test.producer:
                return np.asarray(self._test.initializer(name)).astype(np.float64)
            nodes, _ = self._test.segment([name], given)
            value = self._executor.run_nodes(nodes, given, [name])[name]
        except InputError:
            return None
        return value.double().numpy() if isinstance(value, Tensor) else None


@dataclass
class _Run:
    """One run of a reference on a sample."""

    inputs: Arrays
    outputs: Arrays
    shapes: dict[str, tuple[int, ...]]
    """Shape of each value."""
    numbers: dict[str, np.ndarray]
    """Values that are no floats."""


def _seen(
    model: Model, sample: Sample, programs: Sequence[Program], asked: Mapping[str, _TestWeights]
) -> dict[str, _Run]:
    """Component → its run on the sample, for those asked; none where something cannot be executed here."""
    graphs = {p.name: asked[p.name].graph if p.name in asked else p.graph for p in programs}
    runs: dict[str, _Run] = {}

    def run(component: Component, given: Arrays) -> Arrays:
        seen = _Run(given, {}, {n: a.shape for n, a in given.items()}, {})

        def see(value: str, tensor: Any) -> None:
            seen.shapes[value] = tuple(tensor.shape)
            if not tensor.is_floating_point():
                seen.numbers[value] = tensor.numpy()

        seen.outputs = tensors_as_arrays(Executor(graphs[component.name]).run(given, see))
        if component.name in asked:
            runs[component.name] = seen
        return seen.outputs

    try:
        walk(model, sample, run)
    except InputError:  # it is compared as it stands
        return {}
    return runs


def _rescaled(weights: _TestWeights, run: _Run, folder: Path, program: Program) -> tuple[Graph, str]:
    """The reference on the test's scales, and what was rescaled; the reference itself and no words if nothing was."""
    walks = [_settled(weights, run, by_bias=by_bias) for by_bias in (False, True)]
    found = min(walks, key=lambda one: _unlike(one, weights))
    if not found.readers:
        return weights.original, ""
    constants = Constants(weights.graph)
    model = onnx.ModelProto()
    model.CopyFrom(weights.graph.proto)
    stored = {t.name: t for t in model.graph.initializer}
    fresh = unused_names(weights.graph)
    for (node, place), array in found.scaled.items():
        name = node.proto.input[place]
        own = array.astype(constants[name].dtype)
        theirs = weights(node) if place == weights.place(node) else None
        if theirs is not None and theirs.shape == array.shape:  # rounded as the test's: equal weights are equal bits
            own = np.where(np.isclose(array, theirs, rtol=ROUNDING, atol=0), theirs, array).astype(own.dtype)
        shared = len(weights.graph.consumers[name]) > 1 or name not in stored
        target = fresh(name) if shared else name
        tensor = numpy_helper.from_array(own, target)
        if shared:
            model.graph.initializer.append(tensor)
            model.graph.node[node.index].input[place] = target
        else:
            stored[name].CopyFrom(tensor)
    path = folder / f"{program.name}.rescaled.onnx"
    save(model, weights.graph, path)
    graph = Graph(path, source=program.graph)
    rescaled = tensors_as_arrays(Executor(graph).run(run.inputs, probes=()))
    if any(relative_l2(rescaled[name], output) > CHANGED for name, output in run.outputs.items()):
        path.unlink()
        return weights.original, ""
    return graph, _note(program.name, found)


def _settled(weights: _TestWeights, run: _Run, *, by_bias: bool) -> FactorWalk:
    """The walk in which all factors that a layer starts are taken back."""
    refused: frozenset[Node] = frozenset()
    while True:
        found = FactorWalk(
            weights.graph, weights, weights.fit, run.shapes, run.numbers, refused, weights.biases, by_bias=by_bias
        )
        if not (broken := found.run()):
            return found
        refused |= broken


def _unlike(found: FactorWalk, weights: _TestWeights) -> int:
    """The number of rescaled constants that are not the test's, up to rounding: where one weight was changed besides,
    the right factors leave that one."""
    count = 0
    for (node, place), array in found.scaled.items():
        biases = weights.biases(node)
        theirs = weights(node) if place == weights.place(node) else None if biases is None else biases[1]
        if theirs is not None:
            same = theirs.size == array.size
            count += not (same and np.allclose(array.ravel(), theirs.ravel(), rtol=ROUNDING, atol=0))
    return count


def _note(component: str, found: FactorWalk) -> str:
    places = []
    for origin, readers in found.readers.items():
        where = readers[0].name + (f" and {len(readers) - 1} more" if len(readers) > 1 else "")
        places.append(f"{origin.name} → {where}")
    more = f" and {len(places) - SHOWN} more" if len(places) > SHOWN else ""
    return (
        f"{component}: the test's channels have other scales between layers, and what reads them takes that back, as "
        f"equalisation, SmoothQuant and AWQ do ({', '.join(places[:SHOWN])}{more}): the reference is compared on the "
        "same scales"
    )


def _bias(graph: Graph, node: Node, constants: Constants | Collection[str]) -> str | None:
    """Name of the constant that is added to a layer's results: by the layer, or by the only node that reads them."""
    inputs = node.proto.input
    place = 5 if _stored(node) else 2
    if (node.op in (*PRODUCTS, *NORMS) or _stored(node)) and len(inputs) > place and inputs[place]:
        return inputs[place] if inputs[place] in constants else None
    readers = graph.consumers.get(node.outputs[0], [])
    if len(readers) != 1 or readers[0].op != "Add":
        return None
    return next((name for name in readers[0].proto.input if name in constants), None)


def _same_kind(ours: Node, theirs: Node) -> bool:
    return ours.op == theirs.op or (ours.op in ("MatMul", "Gemm") and _stored(theirs))


def _stored(node: Node) -> bool:
    """Whether a product keeps its weights in codes."""
    return node.op == "com.microsoft.MatMulNBits"
