"""The layer that a bundle is about, with everything that a saved result holds about it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from cp_debug.backends.base import Program, RunRecord
from cp_debug.bisect.result import LayerRow, TestResult
from cp_debug.errors import InputError
from cp_debug.files import resolved
from cp_debug.graph.graph import Graph
from cp_debug.probes.alignment import Alignment
from cp_debug.probes.capture import Capture
from cp_debug.programs.pipeline import value_map
from cp_debug.programs.precision import coarsest, oracle_for
from cp_debug.reports.saved import SavedResult


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
    ran = saved.graphs if row.side == "reference" else saved.test_graphs(test)
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
