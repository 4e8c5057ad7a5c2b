"""Generated inputs for a graph: drawn from a seed, and tried on ONNX Runtime if necessary."""

from __future__ import annotations

import os
import re
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cp_debug.doing import doing
from cp_debug.errors import InputError
from cp_debug.graph import onnx_runtime, surgery
from cp_debug.graph.check_inputs import with_shapes
from cp_debug.graph.free_axes import FreeAxes
from cp_debug.graph.graph import Graph
from cp_debug.graph.input_values import DOMAINS, Ways, ways
from cp_debug.graph.onnx_runtime import to_numpy, to_ort
from cp_debug.graph.other_inputs import TensorInputs, made_up_structure, other_inputs, with_tensor_inputs

if TYPE_CHECKING:
    import onnxruntime

TRIALS = 320
"""Largest number of inputs that are tried."""
SECONDS = 60.0
"""Longest time for trials, in seconds."""
FINITE_TRIALS = 12
"""Number of further trials when one ran and gave NaN or Inf, which may be what the network gives."""
_FAILED_NODE = re.compile(r"Name:'([^']*)'")


@dataclass(frozen=True)
class _InputChoice:
    """Sizes of the free axes, and which of its ways fills each input."""

    sizes: dict[str, int]
    ways: tuple[int, ...]


@dataclass(frozen=True, order=True)
class _Score:
    """Reach of a trial: the last node (one more than there are for a run to the end), then whether all outputs were
    finite."""

    reached: int
    finite: bool = False


class MadeUp:
    """Made-up inputs of one graph. Sizes and ways that run are searched once, for all seeds.

    Sizes: one sample; what the weights of the readers want; else 64; one size for a symbol. Values: indices below the
    size of the axis that they choose from, lengths, masks of ones, positive arguments of logarithms and roots, pixels
    where they are scaled in the graph; else N(0, 1), integers of 8 and 16 bits over their range, others 0 or 1. Where
    an axis is free, or an input is read by what does not take every number, inputs are tried on ONNX Runtime and
    changed until they run to the end. A sequence gets two elements, an optional is given, strings are those that the
    graph's operators know.
    """

    def __init__(self, graph: Graph, shapes: Mapping[str, Sequence[int]] | None = None) -> None:
        """``shapes``: input → sizes that a user asks for. Raises InputError where they do not fit."""
        self._others: TensorInputs | None = None
        self.named = graph
        shapes = shapes or {}
        if other_inputs(graph):
            with_shapes(graph.inputs, shapes)  # refuses those that do not fit
            self._others = with_tensor_inputs(graph, made_up_structure(graph))
            self._folder = tempfile.TemporaryDirectory(prefix="cpdebug-made-up-")  # which goes with this object
            path = Path(self._folder.name) / graph.path.name
            surgery.save(self._others.model, graph, path)
            graph = Graph(path, source=graph)
            codes = {name.removesuffix(".codes"): name for name in self._others.tables}
            shapes = {codes.get(name, name): sizes for name, sizes in shapes.items()}
        self.graph = graph
        self._inputs = with_shapes(graph.inputs, shapes)
        self._axes = replace(FreeAxes.of(graph), inputs=self._inputs)
        for value in graph.inputs:
            if value.dtype is None or value.dtype.kind in "OSUc":
                raise InputError(f"{self.named}: input {value}: no value can be generated for this; {self._wish()}")
        self._ways: list[Ways] = [ways(graph, value) for value in graph.inputs]

    def sample(self, seed: int | Sequence[int]) -> dict[str, np.ndarray]:
        """Input name → array in the declared dtype and the chosen shape, the same for the same seed.

        Raises InputError, with ONNX Runtime's reason, when no input was found that runs.
        """
        arrays = self.make(self._chosen, seed)
        return arrays if self._others is None else self._others.sample(arrays)

    def reasons(self) -> list[str]:
        """Contents of the inputs and their reasons, an entry for each input of which there is something to say.

        Raises InputError, with ONNX Runtime's reason, when no input was found that runs.
        """
        said = []
        codes = {} if self._others is None else self._others.tables
        for value, input_ways, way in zip(self.graph.inputs, self._ways, self._chosen.ways, strict=True):
            says = "strings that its operators know" if value.name in codes else input_ways.ways[way].says
            says = says or ("N(0, 1)" if way else "")
            tried = " (found by trying)" if way else ""
            said += [f"{value.name.removesuffix('.codes')}: {says}{tried}"] if says else []
        return said

    @cached_property
    def _chosen(self) -> _InputChoice:
        first = _InputChoice(self._axes.first(), (0,) * len(self._ways))
        certain = all(input_ways.certain for input_ways in self._ways)
        certain &= not first.sizes and not any(n.op in DOMAINS for n in self.graph.nodes)
        session = None if certain else self._session()
        if session is None:
            return first
        trial = _InputTrials(self, session)
        best = trial.search(first)
        if not trial.ran:
            raise InputError(
                f"{self.named}: none of {trial.count} generated inputs runs ({trial.reason}); {self._wish()}"
            )
        return best

    def others(self, choice: _InputChoice) -> Iterator[_InputChoice]:
        """Choices that differ from ``choice`` in one respect."""
        for place, input_ways in enumerate(self._ways):
            for way in range(len(input_ways.ways)):
                if way != choice.ways[place]:
                    yield replace(choice, ways=(*choice.ways[:place], way, *choice.ways[place + 1 :]))
        for sizes in self._axes.others(choice.sizes):
            yield replace(choice, sizes=sizes)

    def make(self, choice: _InputChoice, seed: int | Sequence[int] = 0) -> dict[str, np.ndarray]:
        """The inputs of a choice: name → array in the dtype that the graph declares and the shape of the choice."""
        rng = np.random.default_rng(seed)
        shapes = [self._axes.shape(value, choice.sizes) for value in self._inputs]
        longest = max(choice.sizes.values(), default=1)
        arrays = {}
        for value, shape, input_ways, way in zip(self.graph.inputs, shapes, self._ways, choice.ways, strict=True):
            assert value.dtype is not None
            arrays[value.name] = np.asarray(input_ways.ways[way].make(rng, shape, longest)).astype(value.dtype)
        return arrays

    def _session(self) -> onnxruntime.InferenceSession | None:
        """The graph on ONNX Runtime, every node with a name; None where it is not installed or refuses the graph."""
        try:
            import onnxruntime as ort
        except ImportError:
            return None
        model = self.graph.copied()
        for node, proto in zip(self.graph.nodes, model.graph.node, strict=True):
            proto.name = f"{node.index}"
        options = onnx_runtime.session_options()
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.enable_cpu_mem_arena = False
        folder = os.fsencode(surgery.weights_folder(self.graph))  # its name may be no text
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", folder)
        try:
            with doing(f"ONNX Runtime opened {self.named}"):
                return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        except Exception:  # each status of ONNX Runtime is a class of its own; a backend will say why
            return None

    def _wish(self) -> str:
        return f"give one with --inputs: an .npz file with {', '.join(map(str, self.named.inputs))}"


class _InputTrials:
    """Tries choices until one runs and gives finite numbers; of those tried the best is kept."""

    def __init__(self, inputs: MadeUp, session: onnxruntime.InferenceSession) -> None:
        self._made, self._session = inputs, session
        self._finite = [v.name for v in inputs.graph.outputs if v.dtype is not None and v.dtype.kind == "f"]
        self._end = len(inputs.graph.nodes)
        self._time_limit = onnx_runtime.time_limit(inputs.graph)
        self.count, self.ran, self.reason = 0, False, ""
        self._tried: set[str] = set()
        self._limit, self._deadline = TRIALS, time.monotonic() + SECONDS

    def search(self, choice: _InputChoice) -> _InputChoice:
        """Go from ``choice`` to what comes further, one change at a time."""
        best = self._score(choice)
        while best < _Score(self._end, True):
            for candidate in self._made.others(choice):
                if str(candidate) in self._tried or (self.ran and candidate.sizes != choice.sizes):
                    continue
                if self.count >= self._limit or time.monotonic() > self._deadline:
                    return choice
                if (score := self._score(candidate)) > best:
                    choice, best = candidate, score
                    break
            else:
                return choice
        return choice

    def _score(self, choice: _InputChoice) -> _Score:
        self.count += 1
        self._tried.add(str(choice))
        try:
            arrays = self._made.make(choice)
            names = [o.name for o in self._session.get_outputs()]
            outputs = onnx_runtime.run(self._session, names, to_ort(arrays), self._time_limit)
        except onnx_runtime.Endless as error:
            raise onnx_runtime.Endless(f"{self._made.named}: with generated inputs {error}") from error
        except Exception as error:  # each status of ONNX Runtime is a class of its own, directly below Exception
            place = _FAILED_NODE.search(str(error))
            if not self.ran:
                self.reason = self._in_words(str(error), place)
            return _Score(int(place[1]) if place and place[1].isdigit() else -1)
        if not self.ran:
            self.ran, self._limit = True, self.count + FINITE_TRIALS
        return _Score(self._end, all(_is_finite(v) for n, v in zip(names, outputs, strict=True) if n in self._finite))

    def _in_words(self, message: str, place: re.Match[str] | None) -> str:
        node = self._made.graph.nodes[int(place[1])] if place and place[1].isdigit() else None
        where = f"node {node.name!r} ({node.op}): " if node else ""
        last = onnx_runtime.told(message.rpartition("Status Message:")[2])
        return f"{where}{last.rstrip('.')[:300]}"


def _is_finite(value: Any) -> bool:
    if not value.is_tensor():
        return True
    array = to_numpy(value)
    return bool(np.isfinite(array.astype(np.float32)).all()) if array.size else True
