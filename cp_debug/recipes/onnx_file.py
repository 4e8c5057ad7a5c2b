"""Any ONNX file: one component, fed with arrays from files or made from a seed, and its coarse cuts."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path

from cp_debug.graph.check_inputs import with_shapes
from cp_debug.graph.graph import Graph, Node, from_inputs
from cp_debug.graph.made_up import MadeUp
from cp_debug.recipes.abilities import MADE_UP
from cp_debug.recipes.base import Component, Sample, Stage, Unglued
from cp_debug.recipes.input_files import DEFAULT_READING, Reading, count_samples, file_samples
from cp_debug.safe_text import in_utf8

MOST_STAGES = 12
_SCOPES = "pkg.torch.onnx.name_scopes"
"""Metadata key of a node's module path in torch's dynamo exporter; the older one puts it into the node's name."""


def stages_of(graph: Graph) -> list[Stage]:
    """Stages in execution order, each at one value, at most ``MOST_STAGES`` unless the graph has more outputs.

    Module scopes as deep as that number allows; where nodes carry none, cut points evenly chosen, then the outputs.
    """
    scopes = {node.index: scope_of(node) for node in graph.nodes}
    chosen: dict[str, str] = {}
    for depth in range(max(map(len, scopes.values()), default=0) + 1):
        ends = _ends(graph, {index: _key(scope, depth) for index, scope in scopes.items()})
        if len(ends) > MOST_STAGES:
            break
        if len(ends) > 1:
            chosen = ends
    return [Stage(name, value) for name, value in (chosen or _cuts_and_outputs(graph)).items()]


def scope_of(node: Node) -> tuple[str, ...]:
    """Module scopes, outermost first: ``("backbone", "blocks.0")``; empty at the top level and without scopes."""
    recorded = next((p.value for p in node.proto.metadata_props if p.key == _SCOPES), None)
    if recorded is not None:
        paths = ["", *(path for path in re.findall(r"'([^']*)'", recorded)[:-1] if path)]
        return tuple(path.removeprefix(f"{parent}.") for parent, path in pairwise(paths))
    parts = node.name.split("/")
    return tuple(parts[1:-1]) if node.name.startswith("/") else ()


def _key(scope: tuple[str, ...], depth: int) -> str:
    """The scope's name at a depth; depth 0 takes the members of a module list together."""
    if not scope:
        return ""
    if depth == 0:
        return re.sub(r"(\.\d+)+$", "", scope[0])
    return "/".join(scope[:depth])


def _ends(graph: Graph, keys: dict[int, str]) -> dict[str, str]:
    """Scope → its last value, in execution order of those values."""
    last: dict[str, str] = {}
    for node in _data_nodes(graph):
        if key := keys[node.index]:
            last.pop(key, None)
            last[key] = node.outputs[0]
    return last


def _cuts_and_outputs(graph: Graph) -> dict[str, str]:
    """Cut points, thinned evenly to ``MOST_STAGES`` with the outputs, then the outputs: name → value."""
    outputs = [v.name for v in graph.outputs if v.name in graph.producer]
    cuts = [v for v in _cut_points(graph) if v not in outputs]
    room = min(len(cuts), max(0, MOST_STAGES - len(outputs)))
    thinned = [cuts[(i + 1) * len(cuts) // (room + 1)] for i in range(room)] if room < len(cuts) else cuts
    return {value: value for value in [*thinned, *outputs]}


def _cut_points(graph: Graph) -> Iterator[str]:
    """Values that are the only one still needed at their time: whatever comes later comes through them."""
    last_reader = {name: readers[-1].index for name, readers in graph.consumers.items()}
    outputs = {v.name for v in graph.outputs}
    live = {v.name for v in graph.inputs}
    for node in _data_nodes(graph):
        live = {v for v in live if last_reader.get(v, -1) > node.index or v in outputs}
        live |= {o for o in node.outputs if o in last_reader or o in outputs}
        if len(live) == 1:
            yield next(iter(live))


def _data_nodes(graph: Graph) -> Iterator[Node]:
    """The nodes that depend on the graph's inputs."""
    fed = set(from_inputs(graph))
    return (node for node in graph.nodes if not fed.isdisjoint(node.outputs))


class OnnxFileModel(Unglued):
    """An ONNX file as a model. Raises InputError when the file is missing, incomplete or not ONNX."""

    def __init__(self, path: Path, reading: Reading = DEFAULT_READING) -> None:
        """``reading`` says how inputs are read from files, and which sizes free axes have."""
        self.name = str(path)
        self._graph = graph = Graph.shared(path)
        self._reading = reading
        self._made_up: dict[str, list[str]] = {}
        with_shapes(graph.inputs, reading.shapes)  # refuses those that do not fit
        self.components: Sequence[Component] = [
            Component(
                name=in_utf8(path.stem),
                input_names=[v.name for v in graph.inputs],
                output_names=[v.name for v in graph.outputs],
                onnx_path=path,
                stages=stages_of(graph),
            )
        ]

    def samples(self, count: int, seed: int, inputs: Path | None) -> Iterator[Sample]:
        """Samples from the file or folder ``inputs`` (see ``file_samples``), checked against the graph; or random.

        Random inputs are those of ``MadeUp``, seeded with ``seed`` and the sample's number. At most ``count`` samples.
        Raises InputError for files with a wrong name, dtype or shape in them, and where no input can be made up.
        """
        if inputs is None:
            made_up = MadeUp(self._graph, self._reading.shapes)
            for index in range(count):
                source = f"random, seed {seed}, sample {index}"
                sample = Sample(made_up.sample([seed, index]), source)
                self._made_up[source] = made_up.reasons()
                yield sample
            return
        yield from file_samples(inputs, self._graph.inputs, count, self._reading)

    def sample_count(self, inputs: Path) -> int:
        """Number of samples in these files. Raises InputError for unusable files."""
        return count_samples(inputs, self._graph.inputs)

    def remarks(self, sample: Sample) -> Sequence[str]:
        """Contents of made-up inputs and their reasons, where the sample was and there is something to say."""
        reasons = self._made_up.get(sample.source)
        return [f"{MADE_UP}{'; '.join(reasons)}"] if reasons else []
