"""The program that ONNX Runtime makes of a model, as a graph that can be probed without changing it.

Marking values as outputs before optimization deletes the fusions under test. So ONNX Runtime writes the program that it
would run, and that program is executed as it stands, optimization off: the same kernels run, whoever looks. Visible are
the values that the program still computes. Values in blocked layout (NCHWc) are read through a ``ReorderOutput`` on a
side branch, FP16 values that a CPU keeps in FP32 through an ``Identity``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnx

from cp_debug.backends.ort_chunks import ChunkedGraph
from cp_debug.backends.ort_options import Runtime
from cp_debug.graph.graph import Graph, Node, refill
from cp_debug.graph.onnx_file import bodies
from cp_debug.graph.operators import QUANTIZERS
from cp_debug.probes.arrays import Tensor, as_numpy
from cp_debug.probes.distance import distance

_NCHWC = "com.microsoft.nchwc."
_CAST = "InsertedPrecisionFreeCast_"
_SUFFIX = re.compile(r"_nchwc(_token_\d+)?$")
_AXIS_SINCE = 13
"""Opset in which QuantizeLinear and DequantizeLinear got attributes."""
_SAMPLE = 4096
_TOLERANCE = 0.05
"""Relative L2 distance up to which a guessed name is right: a wrong one is off by its own size, rounding by less."""


@dataclass(frozen=True)
class Replacement:
    """Nodes that compute one visible value, in the optimized program and in the original graph."""

    value: str
    operators: tuple[str, ...]
    """Operators of the optimized program's nodes between the visible values before and this one, such as
    ``com.microsoft.nchwc.Conv``."""
    original: tuple[str, ...]
    """Names of the original nodes between the same values."""


@dataclass(frozen=True)
class OptimizedProgram:
    """The program that ONNX Runtime wrote, with its side branches, and what is known about it."""

    graph: Graph
    observed: ChunkedGraph
    """``graph``, ready to run."""
    exposed: list[str]
    """Original values that it shows."""
    folded: list[str]
    """Original values that were computed when the program was written: they are weights now."""
    renamed: dict[str, str]
    """Original value → the program's own name for it, where that differs."""
    unverified: list[str]
    """Values whose original name was guessed and whose numbers did not confirm it."""
    outputs: dict[str, np.ndarray] | None
    """Outputs of the observed program on the inputs that it was verified with."""


def build(
    runtime: Runtime, original: Graph, written: Path, inputs: Mapping[str, np.ndarray] | None
) -> OptimizedProgram:
    """Make the program that ONNX Runtime has ``written`` observable under the names of the ``original`` graph.

    Names that ONNX Runtime changed are guessed from the nodes' names and verified: on ``inputs``, both programs must
    give the same tensor. Without inputs no guess is used. ``inputs``: name → array in the dtype and shape that the
    graph declares.
    """
    bare = Graph(_readable(written), source=original)
    guessed = _guess_names(bare, original)
    # Transposes that were pushed behind a value leave it its name in another layout.
    known_nodes = {node.name for node in original.nodes}
    moved = any(node.op == "Transpose" and node.name not in known_nodes for node in bare.nodes)
    folded = [v for v in original.tensors if v in bare.initializers]
    same_names = {*folded, *set(bare.tensors).intersection(original.tensors)} if moved else set()
    samples: dict[str, _TensorSample] = {}
    verified: set[str] = set()
    turned: set[str] = set()

    def taken(name: str, tensor: Tensor) -> _TensorSample:
        return _TensorSample.of(tensor, 0 if name in same_names else _SAMPLE)

    def remember(name: str, tensor: Tensor) -> None:
        samples[name] = taken(name, tensor)

    def verify(name: str, tensor: Tensor) -> None:
        sample = taken(name, tensor)
        if samples[name].agrees(sample):
            verified.add(name)
        elif sample.is_turned(samples[name].shape):
            turned.add(name)

    if (guessed or same_names) and inputs is not None:
        ChunkedGraph(runtime, original).run(inputs, remember, {*guessed.values(), *same_names})
        turned.update(v for v in samples.keys() & folded if samples[v].is_turned(tuple(bare.weight(v).dims)))
    graph = _with_side_branches(bare, {v: name for v, name in guessed.items() if name in samples}, samples)
    observed = ChunkedGraph(runtime, graph)
    outputs = None if inputs is None else observed.run(inputs, verify, samples)
    unverified = set(guessed.values()) - verified
    known = set(original.tensors) - turned - unverified
    return OptimizedProgram(
        graph=graph,
        observed=observed,
        folded=[v for v in folded if v not in turned],
        exposed=[v for v in graph.tensors if v in known],
        renamed={name: value for value, name in guessed.items() if name in verified},
        unverified=sorted(unverified),
        outputs=outputs,
    )


def _readable(written: Path) -> Path:
    """``written``, mended where ONNX Runtime would not read it again.

    Its optimizer gives copies of QuantizeLinear and DequantizeLinear an ``axis``, which these have from opset 13 on.
    Below it, all their scales are for a whole tensor. Up to 1.30 it writes the constants of bodies twice.
    """
    model = onnx.load(written, load_external_data=False)
    if _once(model.graph):
        onnx.save(model, written)
    opset = max((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), default=_AXIS_SINCE)
    pairs = [n for n in model.graph.node if n.op_type in QUANTIZERS and n.domain in ("", "ai.onnx")]
    if opset < _AXIS_SINCE and any(node.attribute for node in pairs):
        for node in pairs:
            del node.attribute[:]
        onnx.save(model, written)
    return written


def _once(graph: onnx.GraphProto) -> bool:
    """Leave one initializer of each name in a graph and its bodies; whether there were more."""
    first = {weight.name: weight for weight in reversed(graph.initializer)}
    again = len(first) < len(graph.initializer)
    if again:
        refill(graph.initializer, [*first.values()][::-1])
    inside = [_once(body) for node in graph.node for body in bodies(node)]
    return again or any(inside)


def replacements(program: OptimizedProgram, original: Graph) -> list[Replacement]:
    """For each visible value, the nodes that compute it from the visible values before it, optimized and original.

    In the original's order: ONNX Runtime writes its nodes in another one each time.
    """
    visible = {*program.exposed, *program.renamed.values()}
    place = {value: i for i, value in enumerate(original.producer)}
    result = []
    for value in sorted(program.exposed, key=lambda value: place.get(value, -1)):
        after, _ = program.graph.segment([program.renamed.get(value, value)], visible)
        before, _ = original.segment([value], program.exposed)
        result.append(Replacement(value, tuple(n.op for n in after), tuple(n.name for n in before)))
    return result


class _TensorSample(NamedTuple):
    """Enough of a tensor to recognize it: its shape, and elements evenly strided."""

    shape: tuple[int, ...]
    elements: np.ndarray

    @classmethod
    def of(cls, tensor: Tensor, most: int) -> _TensorSample:
        """The sample of a tensor, of about ``most`` elements; 0: its shape alone."""
        flat = as_numpy(tensor).reshape(-1)
        return cls(tuple(tensor.shape), flat[:: max(1, flat.size // most)].astype(np.float64) if most else np.empty(0))

    def agrees(self, other: _TensorSample) -> bool:
        """Whether two samples may be of one tensor, up to rounding."""
        return self.shape == other.shape and distance(other.elements, self.elements).relative <= _TOLERANCE

    def is_turned(self, shape: tuple[int, ...]) -> bool:
        """Whether ``shape`` has the same sizes on other axes."""
        return shape != self.shape and sorted(shape) == sorted(self.shape)


def _guess_names(optimized: Graph, original: Graph) -> dict[str, str]:
    """Value of the optimized program that has a new name → the original value that it should be."""
    present = {*optimized.values, *optimized.initializers}
    guesses: dict[str, str] = {}
    blocked = _blocked_values(optimized)
    split = _split_values(optimized, blocked)
    by_node = {node.name: node.outputs[0] for node in original.nodes if node.outputs}
    for node in optimized.nodes:
        for value in node.outputs:
            name: str | None = None
            maker = optimized.producer[node.inputs[0]] if node.op == "Reshape" and node.inputs[0] in split else node
            if value in blocked - split and not node.op.endswith("ReorderInput"):
                base = _SUFFIX.sub("", maker.name).removeprefix(_CAST)
                name = _after_fusion(base if base in original.producer else by_node.get(base), maker, original)
            elif value.startswith(_CAST):
                name = value.removeprefix(_CAST)
            if name in original.producer and name not in present:
                present.add(name)
                guesses[value] = name
    return guesses


def _blocked_values(graph: Graph) -> set[str]:
    """Values in NCHWc layout: made by an NCHWc operator, or by an elementwise one out of such values."""
    blocked: set[str] = set()
    for node in graph.nodes:
        if (node.op.startswith(_NCHWC) and not node.op.endswith("ReorderOutput")) or (
            not node.op.startswith(_NCHWC) and any(i in blocked for i in node.inputs)
        ):
            blocked.update(node.outputs)
    return blocked


def _split_values(graph: Graph, blocked: set[str]) -> set[str]:
    """Values in NCHWc layout between two Reshape nodes that give them five axes, as ONNX Runtime writes elementwise
    operators of two inputs whose sizes it does not know."""
    split: set[str] = set()
    for node in graph.nodes:
        if node.op == "Reshape" and node.inputs[0] in blocked:
            split.update(() if node.inputs[0] in split else node.outputs)
        elif not split.isdisjoint(node.inputs):
            split.update(node.outputs)
    return split


def _after_fusion(value: str | None, node: Node, original: Graph) -> str | None:
    """The original value that ``node`` computes when it is named after ``value`` but fused a sum or an activation."""
    activation = node.attribute("activation", b"").decode()
    fused = ["Add" if len(node.proto.input) > 3 and node.op == f"{_NCHWC}Conv" else None, activation]
    for op in filter(None, fused):
        if value is None or original.producer[value].op == op:
            continue
        value = next((c.outputs[0] for c in original.consumers.get(value, ()) if c.op == op), None)
    return value


def _with_side_branches(bare: Graph, names: Mapping[str, str], samples: Mapping[str, _TensorSample]) -> Graph:
    """The graph with a node behind each of ``names`` that makes the value readable under its original name."""
    blocked = _blocked_values(bare)

    def nodes() -> Iterator[onnx.NodeProto]:
        for node in bare.nodes:
            yield node.proto
            for value in node.outputs:
                if (name := names.get(value)) is None:
                    continue
                label = f"read {name}"
                if value not in blocked:
                    yield onnx.helper.make_node("Identity", [value], [name], name=label)
                elif len(samples[name].shape) > 1:
                    yield onnx.helper.make_node(
                        "ReorderOutput",
                        [value],
                        [name],
                        name=label,
                        domain=_NCHWC.rstrip("."),
                        channels=samples[name].shape[1],
                    )

    model = bare.copied()
    refill(model.graph.node, nodes())
    # ONNX Runtime leaves the types of values behind that it no longer computes, now wrong for their FP32 stand-ins.
    known = set(names.values())
    refill(model.graph.value_info, (v for v in model.graph.value_info if v.name not in known))
    path = bare.path.with_name(f"observed_{bare.path.name}")
    onnx.save(model, str(path))
    return Graph(path, source=bare)
