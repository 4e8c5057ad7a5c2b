"""A case: a piece of the program, the piece that it should equal, and inputs; cut out of a captured run.

It is about one layer, ``Accused``, with everything that a saved result holds about it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx

from cp_debug.backends.arithmetic import FP32
from cp_debug.backends.base import Program, RunRecord
from cp_debug.backends.executor import Executor
from cp_debug.bisect.result import LayerRow, TestResult
from cp_debug.errors import InputError
from cp_debug.files import resolved
from cp_debug.graph import surgery
from cp_debug.graph.graph import Graph, Node
from cp_debug.probes.alignment import Alignment
from cp_debug.probes.arrays import as_numpy
from cp_debug.probes.capture import Capture
from cp_debug.programs.pipeline import value_map
from cp_debug.programs.precision import coarsest, oracle_for
from cp_debug.reports.saved import SavedResult


@dataclass(frozen=True)
class Piece:
    """A part of a graph. Its big weights may still lie beside ``home``."""

    model: onnx.ModelProto
    home: Graph

    def save(self, path: Path) -> Graph:
        """Write the piece to ``path``; returns its graph."""
        surgery.save(self.model, self.home, path)
        return Graph(path)


@dataclass(frozen=True)
class Case:
    """A failing piece: ``program`` run by the accused backend against ``reference`` run by the oracle."""

    program: Piece
    reference: Piece
    inputs: Mapping[str, np.ndarray]
    outputs: Mapping[str, str]
    """Output of the program → its name in the reference. Inputs have the program's names on both sides."""
    computed: tuple[str, ...] = ()
    """Inputs that the capture lacks, computed in FP32 from those that it has."""
    changed: tuple[str, ...] = ()
    """Inputs that are not as they were: cut, set to zero or rounded."""
    notes: tuple[str, ...] = field(default=())
    """Changes besides the cut."""

    @property
    def pieces(self) -> list[Piece]:
        """The program, and the reference where it is another one."""
        return [self.program] if self.reference is self.program else [self.program, self.reference]


class Cutter:
    """Cuts cases out of the accused program.

    ``compares_layer`` says whether the accused value is an output also where nodes of the cut read it: that shows what
    the ends do not, and can hide a fault of a kernel that fuses the layer with its readers.
    """

    def __init__(self, accused: Accused) -> None:
        self._accused = accused
        self.graph = accused.program
        self.compares_layer = False
        self.value = next((v for v, name in accused.names.items() if name == accused.row.onnx), None)
        captured = set(accused.capture.names(component=accused.row.component))
        self._known = {v for v, name in accused.names.items() if name in captured}
        self._executor = Executor(self.graph, FP32)
        self._values: dict[str, np.ndarray] = {}

    def layer(self) -> list[int]:
        """Indices of the accused layer's nodes: those between its value and the captured ones before it.

        Raises InputError when the program does not compute it.
        """
        if self.value not in self.graph.producer:
            raise InputError(f"--layer: {self._accused.row.name!r} is an input of the program; no node computes it")
        nodes, _ = self.graph.segment([self.value], self._known)
        return [node.index for node in nodes]

    def grow(self, nodes: Iterable[int], hops: int) -> list[int]:
        """Indices of the nodes and of all that are at most ``hops`` edges away, upstream and downstream."""
        grown = set(nodes)
        for _ in range(hops):
            for node in [self.graph.nodes[i] for i in grown]:
                grown |= {self.graph.producer[name].index for name in node.inputs if name in self.graph.producer}
                grown |= {reader.index for name in node.outputs for reader in self.graph.consumers.get(name, ())}
        return sorted(grown)

    def case(self, indices: Iterable[int]) -> Case:
        """The nodes as a case; values that they compute and do not read themselves are compared (``compares_layer``).

        Raises InputError when nothing can be compared with the reference, or an input is neither captured nor can be
        computed.
        """
        nodes = [self.graph.nodes[i] for i in sorted(indices)]
        computed = [o for node in nodes for o in node.outputs]
        values_read = {name for node in nodes for name in node.inputs}
        names = self._accused.names
        inner = values_read - {self.value} if self.compares_layer else values_read
        outputs = {o: names[o] for o in computed if o not in inner and names.get(o) in self._accused.reference.producer}
        if not outputs:
            raise InputError("the nodes compute nothing that the reference computes, too")
        ends = values_read - set(computed) - set(self.graph.initializers)
        if strange := sorted(ends - names.keys()):
            raise InputError(f"the reference knows no {strange[0]!r} to start from")
        inputs = {name: self._value(name) for name in sorted(ends)}
        program = self._piece(self.graph, nodes, list(outputs), inputs)
        reference = program if self._accused.same_program else self._reference(inputs, outputs)
        recomputed = tuple(name for name in inputs if name not in self._known)
        return Case(program, reference, inputs, outputs, recomputed)

    def _reference(self, inputs: Mapping[str, np.ndarray], outputs: Mapping[str, str]) -> Piece:
        names, graph = self._accused.names, self._accused.reference
        nodes, starts = graph.segment(outputs.values(), {names[name] for name in inputs})
        program_name_of = {names[name]: name for name in inputs}
        if missing := [name for name in starts if name not in program_name_of]:
            raise InputError(f"the reference also needs {missing[0]!r} here")
        piece = self._piece(graph, nodes, list(outputs.values()), {n: inputs[program_name_of[n]] for n in starts})
        renamed = {name: own for name, own in program_name_of.items() if name != own}
        if renamed:
            _rename(piece.model.graph, renamed)
        return piece

    def _piece(self, graph: Graph, nodes: list[Node], outputs: list[str], inputs: Mapping[str, np.ndarray]) -> Piece:
        model = surgery.extract(graph, nodes, outputs)
        used = {(node.proto.domain, node.proto.op_type) for node in nodes}
        functions = [f for f in model.functions if (f.domain, f.name) in used]
        if not functions:  # functions may call each other: all or none
            del model.functions[:]
        return Piece(declared(model, inputs), graph)

    def _value(self, name: str) -> np.ndarray:
        if name not in self._values:
            if name in self._known:
                self._values[name] = self._load(name)
            else:
                nodes, starts = self.graph.segment([name], self._known)
                captured = {s: self._load(s) for s in starts}
                self._values[name] = as_numpy(self._executor.run_nodes(nodes, captured, [name])[name])
        return self._values[name]

    def _load(self, name: str) -> np.ndarray:
        if name not in self._known:
            raise InputError(f"{self._accused.capture.folder}: holds no value {name!r}")
        array = self._accused.capture.load(self._accused.names[name], component=self._accused.row.component)
        kind = self.graph.types.get(name)
        if kind is not None and kind.HasField("tensor_type"):
            # A backend may keep a value in another type than the graph says: FP16 values in FP32, or the other way.
            return np.array(array, onnx.helper.tensor_dtype_to_np_dtype(kind.tensor_type.elem_type))
        return np.array(array, array.dtype.type)


def declared(model: onnx.ModelProto, inputs: Mapping[str, np.ndarray]) -> onnx.ModelProto:
    """The model for exactly these inputs: their types and shapes stated, those of all other values left open."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    del copy.graph.value_info[:]
    for value in copy.graph.input:
        value.type.CopyFrom(surgery.tensor_type(inputs[value.name].dtype, inputs[value.name].shape))
    for value in copy.graph.output:
        if value.type.HasField("tensor_type"):
            value.type.tensor_type.ClearField("shape")
    return copy


def _rename(graph: onnx.GraphProto, names: Mapping[str, str]) -> None:
    for value in graph.input:
        value.name = names.get(value.name, value.name)
    for node in graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]


@dataclass(frozen=True)
class Accused:
    """One layer of one backend.

    ``reference`` is the graph that it should compute, ``program`` the graph that the backend ran.
    """

    row: LayerRow
    test: TestResult
    backend: RunRecord
    oracle: str
    reference: Graph
    program: Graph
    names: dict[str, str]
    """Value of ``program``, inputs included → its name in ``reference``, under which it was captured."""
    capture: Capture
    model: str

    @property
    def same_program(self) -> bool:
        """Whether both sides ran the same graph."""
        return self.reference is self.program


def find_accused(saved: SavedResult, layer: str | None = None, backend: str | None = None) -> Accused:
    """The layer called ``layer`` (torch path, node or value), or the first guilty one.

    It is taken from ``backend``, or from the first test that has it. Raises InputError when there is none, or when the
    result was saved without its captures.
    """
    test, row = _row(saved.result.tests, layer, backend)
    record = saved.result.reference if row.side == "reference" else test.backend
    capture = saved.capture(row.sample, record.spec)
    ran = saved.graphs if row.side == "reference" else saved.opened(test.programs)
    graphs = {"program": saved.graphs, "test program": ran}
    for kind, graph_of in graphs.items():
        if row.component not in graph_of:
            raise InputError(f"{saved.folder}: the {kind} of {row.component!r} is no longer where the result says")
    if capture is None:
        raise InputError(
            f"{saved.folder or 'the result'}: holds no capture of {record.spec}, sample {row.sample}; "
            "expected a folder that `cpdebug bisect --save FOLDER` wrote"
        )
    reference, program = (graph_of[row.component] for graph_of in graphs.values())
    if resolved(program.path) == resolved(reference.path):
        program = reference
    mapping = value_map(_program(row.component, reference), _program(row.component, program))
    inputs = {v.name: v.name for v in program.inputs}
    if renamed := test.pairing.get(row.component, {}).get("renamed"):
        known = {*reference.producer, *(v.name for v in reference.inputs)}
        reference_name_of = {name: renamed.get(name, name) for name in (*inputs, *program.producer)}
        inputs, mapping = (
            {},
            {name: reference_name for name, reference_name in reference_name_of.items() if reference_name in known},
        )
    precision = coarsest(saved.result.reference.precision, test.backend.precision).name
    return Accused(
        row=row,
        test=test,
        backend=record,
        oracle=test.oracle or oracle_for(precision, precision),
        reference=reference,
        program=program,
        names=inputs | mapping,
        capture=capture,
        model=Path(saved.result.model).name,
    )


def _row(tests: Iterable[TestResult], layer: str | None, backend: str | None) -> tuple[TestResult, LayerRow]:
    tests = [t for t in tests if backend in (None, t.backend.spec, t.backend.spec.partition(" (")[0])]
    if not tests:
        raise InputError(f"--backend: the result has no test backend {backend!r}")
    for test in tests:
        rows = test.guilty if layer is None else [r for r in test.rows if layer in (r.name, r.onnx, *_nodes(r))]
        if rows:
            return test, rows[0]
    specs = ", ".join(t.backend.spec for t in tests)
    if layer is None:
        raise InputError(f"no layer of {specs} is guilty; name one with --layer to bundle it all the same")
    raise InputError(f"--layer: {specs} has no layer, node or value {layer!r}")


def _nodes(row: LayerRow) -> tuple[str, ...]:
    return row.replay.nodes if row.replay else ()


def _program(component: str, graph: Graph) -> Program:
    manifest = graph.path.with_suffix(".alignment.json")
    return Program(component, graph, alignment=Alignment.load(manifest, graph) if manifest.is_file() else None)
