"""Programs of a model, and one backend running all of them on one sample."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, suppress
from copy import copy
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cp_debug.backends.base import Backend, Program, RunRecord, Session, Tensor
from cp_debug.backends.capabilities import (
    BuildInfo,
    FreesMemory,
    build_info_of,
    calibrates_itself,
    kept_in_fp32,
    largest_opset,
    profiles_of,
)
from cp_debug.errors import InputError
from cp_debug.graph.check_inputs import as_declared, no_numbers
from cp_debug.graph.graph import Graph, digest_of, fits_shape
from cp_debug.graph.half_precision import declared_precisions
from cp_debug.graph.integer_values import level_values
from cp_debug.probes.alignment import TIE
from cp_debug.probes.capture import array_hash
from cp_debug.probes.module_state import copied
from cp_debug.programs.align import Alignment, align
from cp_debug.programs.batchnorm_folding import fuse_model_bn
from cp_debug.programs.export import EXPORTERS, export
from cp_debug.programs.export_cache import ExportCache
from cp_debug.programs.layers import Folded, constant_outputs, layers_of
from cp_debug.programs.walk import Walk, example_args, run_module, walk
from cp_debug.recipes.base import Arrays, Component, Model, NamesOnDemand, Sample
from cp_debug.safe_text import did_you_mean
from cp_debug.serialize import json_safe


class Key(NamedTuple):
    """A value of a model: its component, and its name in that component's deployed graph."""

    component: str
    value: str


class Export(NamedTuple):
    """Settings of an export from modules to graphs."""

    exporter: str = "dynamo"
    opset: int | None = None
    """Opset of the graph; None: the exporter's default."""
    fused: bool = False
    """Fold BatchNorm in torch, in front of linear layers too: INT8 scales belong to folded weights."""
    free: bool = False
    """Nobody asked for this exporter, so that the other one may export what it refuses."""


DEFAULT_EXPORT = Export()
_LARGEST_FILE = 1 << 28
"""Bytes of weights from which on they lie beside the graph: what is read again must not be parsed whole."""


def prepare(
    model: Model,
    sample: Sample,
    folder: Path,
    *,
    how: Export = DEFAULT_EXPORT,
    folded: bool = True,
    cache: ExportCache | None = None,
) -> list[Program]:
    """Export the components that come as modules, align them, and open those that come as ONNX.

    ``sample`` gives the example inputs; ``folder`` keeps the ONNX files and their alignment manifests. What ``cache``
    has of an equal module, with equal inputs, is taken from there. Raises InputError for what cannot be exported or
    opened, and for a file with inputs that are no tensors of numbers (``tensor_inputs.as_numbers`` changes it).
    """
    programs: list[Program] = []
    for step in Walk(model, sample):
        component = step.component
        if component.module is None:
            assert component.onnx_path is not None
            example = step.inputs if step.fed else None
            graph = Graph.shared(component.onnx_path, source=component.shown)
            if refused := next(filter(None, map(no_numbers, graph.inputs)), None):
                raise InputError(f"{graph}: {refused}")
            programs.append(Program(component.name, graph, example=example))
            continue
        ran: list[Arrays] = []

        def make(component: Component = component, inputs: Arrays = step.inputs, ran: list[Arrays] = ran) -> Program:
            ran.append(run_module(component, inputs))
            return _export(component, inputs, folder, how, folded)

        if cache is None:
            programs.append(make())
        else:
            path, settings = folder / f"{component.name}.onnx", {"how": repr(how), "folded": folded}
            programs.append(cache.program(component, step.inputs, path, settings, make))
            if not ran and isinstance(component.output_names, NamesOnDemand):
                component.output_names = [value.name for value in programs[-1].graph.outputs]
        if not step.last:
            step.outputs = ran[0] if ran else run_module(component, step.inputs)
    return programs


def with_files(model: Model, programs: Sequence[Program]) -> Model:
    """The model with its exported graphs as files in place of modules, so that nodes keep the names that they have."""
    graphs = {program.name: program.graph for program in programs}
    changed = copy(model)
    vars(changed)["components"] = [
        replace(c, module=None, onnx_path=graphs[c.name].path, shown=str(graphs[c.name])) for c in model.components
    ]
    return changed


def _ended(error: BaseException) -> bool:
    """Whether the module asked Python to end, which no other exporter mends."""
    cause = error.__cause__ or error.__context__
    return not isinstance(error, Exception) or (cause is not None and _ended(cause))


def _export(component: Component, inputs: Mapping[str, np.ndarray], folder: Path, how: Export, folded: bool) -> Program:
    module = component.module
    assert module is not None
    args, other = example_args(component, inputs), next(name for name in EXPORTERS if name != how.exporter)
    path = folder / f"{component.name}.onnx"

    def made(exporter: str, path: Path) -> tuple[Graph, Alignment]:
        export(
            fuse_model_bn(module, args) if how.fused else module,
            args,
            path,
            input_names=component.input_names,
            output_names=component.output_names,
            dynamic_axes=component.dynamic_axes,
            exporter=exporter,
            opset=how.opset,
            folded=folded,
            largest=_LARGEST_FILE,
        )
        graph = Graph(path, source=f"{component.name}, as exported")
        return graph, align(graph, module, args, prefix=component.prefix)

    try:
        graph, alignment = made(how.exporter, path)
    except InputError as refused:
        if not how.free or _ended(refused):
            raise
        try:
            graph, alignment = made(other, path)
        except InputError:
            raise refused from None
        alignment = replace(alignment, notes=[f"{refused}; {other} exported it", *alignment.notes])
    if any(d.cause != TIE for d in alignment.departures) and alignment.exporter == how.exporter:
        with tempfile.TemporaryDirectory(dir=folder) as scratch, suppress(InputError):
            if not made(other, Path(scratch) / path.name)[1].departures:
                right = [replace(d, right_by=other) for d in alignment.departures]
                alignment = replace(alignment, departures=right)
    alignment.save(path.with_suffix(".alignment.json"))
    return Program(component.name, graph, module, alignment, example=inputs)


def load_test_programs(programs: Sequence[Program], path: Path) -> list[Program]:
    """The programs of the test backends when ``--test-model`` gives them another file.

    A model of several components takes a folder that holds ``<component>.onnx`` for those that differ. Raises
    InputError for a folder without any of them, and for files whose graphs do not fit.
    """
    if path.is_dir():
        files = {p.name: path / f"{p.name}.onnx" for p in programs}
        if not any(f.is_file() for f in files.values()):
            raise InputError(f"--test-model: {path} holds none of {', '.join(f.name for f in files.values())}")
    elif len(programs) == 1:
        files = {programs[0].name: path}
    else:
        names = ", ".join(p.name for p in programs)
        raise InputError(
            f"--test-model: the model has the components {names}; expected a folder with their .onnx files"
        )
    return [_replace(p, files[p.name]) if files[p.name].is_file() or len(files) == 1 else p for p in programs]


def _replace(program: Program, path: Path) -> Program:
    graph = Graph.shared(path)
    if graph is program.graph:  # of one file, and yet another program
        graph = Graph(path)
    manifest = path.with_suffix(".alignment.json")
    alignment = Alignment.load(manifest, graph) if manifest.is_file() else None
    example = None if program.example is None else as_declared(graph, program.example)
    return Program(program.name, graph, alignment=alignment, example=example)


def changed_state(program: Program, *, train: bool, out_of_place: bool) -> Program:
    """A copy of the program with its module in another state: changes that people try by hand first.

    Raises InputError for a program without a module.
    """
    if program.module is None:
        raise InputError("--test-train-mode and --test-out-of-place need a torch module; this model is an ONNX file")
    module = copied(program.module).train(train)
    if out_of_place:
        for child in module.modules():
            if getattr(child, "inplace", False):
                child.inplace = False  # type: ignore[assignment]
    return replace(program, module=module)


def value_map(reference: Program, test: Program) -> dict[str, str]:
    """Test value → reference value: as paired, else by equal names, then by the same torch value in both alignments.

    A layer with its BatchNorm folded in torch has the name of the layer, folded by the exporter that of the BatchNorm.
    """
    if test.graph is reference.graph:
        return {v: v for v in reference.graph.producer}
    if test.pairing is not None:
        return dict(test.pairing.names)
    reference_values = set(reference.graph.producer)
    mapping = {v: v for v in test.graph.producer if v in reference_values}
    if test.alignment is not None and reference.alignment is not None:
        mapping |= reference.alignment.twins(test.alignment, mapping)
    return mapping


def levels_of_both(programs: Sequence[Program], tests: Sequence[Program]) -> set[Key]:
    """The values that ``programs``, the reference's, or ``tests``, of the same components, hold as levels."""
    levels = {Key(program.name, value) for program in programs for value in level_values(program.graph)}
    for program, test in zip(programs, tests, strict=True):
        if held := level_values(test.graph):
            names = value_map(program, test)
            levels |= {Key(test.name, names.get(value, value)) for value in held}
    return levels


class Pipeline:
    """One backend with a session for each component. Use as a context manager.

    ``unfold``: a run with a sink also gives the side values that the backend folded away, computed from the programs.
    ``lenient``: engines without a layer in the precision that their name claims run, and count as FP32. Without it, and
    in INT8, their first run raises InputError: their accuracy and speed would be told as those of another precision.
    """

    def __init__(
        self,
        model: Model,
        programs: Sequence[Program],
        backend: Backend,
        *,
        unfold: bool = False,
        lenient: bool = False,
    ) -> None:
        self.model, self.programs, self.backend = model, programs, backend
        self.sessions: dict[str, Session] = {}
        self._deployed: dict[str, Session] = {}
        self._unfold = unfold
        self._stack = ExitStack()
        self._realised = lenient and backend.precision != "int8"

    def __enter__(self) -> Pipeline:
        self._backends = with_kept(self.backend, self.programs)
        check_profiles_of(self.backend, self.programs)
        try:
            for program in self.programs:
                self.sessions[program.name] = self._backends[program.name].open(program)
                self._stack.callback(self.sessions[program.name].close)
        except BaseException:
            self._stack.close()
            raise
        return self

    def kept(self, component: str) -> frozenset[str]:
        """Nodes of a component that the backend was told to keep in FP32 beside FP16 or BF16; known once it is open."""
        narrow = self.backend.precision in ("fp16", "fp16acc", "bf16")
        return kept_in_fp32(self._backends[component]) if narrow else frozenset()

    def __exit__(self, *exc: object) -> None:
        self._stack.close()

    def run(self, sample: Sample, sink: Callable[[Key, Tensor], None] | None = None) -> dict[str, Arrays]:
        """Run the chain; each component is fed this backend's own upstream outputs.

        Returns component → output name → array. ``sink`` is given every component's inputs, then its exposed values in
        execution order; values inside Q/DQ pairs that were put in here are left out. Arrays are in the dtype that the
        graph declares.
        """
        results = walk(self.model, sample, lambda component, given: self._run(component, given, sink))
        if not self._realised:
            check_realised(self.backend, self._engines)
            self._realised = True
        return results

    @property
    def precision(self) -> str:
        """Precision that is computed in: what the backend claims; FP32 once it is known that no engine does so."""
        claim = self.backend.precision
        return "fp32" if claim != "int8" and unrealised(self._engines) else claim

    @property
    def unrealised_note(self) -> str:
        """A sentence about engines that compute in FP32 instead of what their name claims; empty for others."""
        if self.precision == self.backend.precision:
            return ""
        why = "other kernels were faster, or nothing in the model can; layers are judged as FP32"
        return f"{_no_layer(self.backend, self.backend.precision.upper(), self._engines)}: {why}"

    @property
    def _engines(self) -> list[BuildInfo | None]:
        return [build_info_of(session) for session in self.sessions.values()]

    def free_memory(self) -> None:
        """Free what sessions hold between their runs and can have again."""
        for session in (*self.sessions.values(), *self._deployed.values()):
            if isinstance(session, FreesMemory):
                session.free_memory()

    def program(self, component: str) -> Program:
        """The program of a component by its name. Raises KeyError where there is none."""
        return {program.name: program for program in self.programs}[component]

    def _run(self, component: Component, given: Arrays, sink: Callable[[Key, Tensor], None] | None) -> Arrays:
        program, session = self.program(component.name), self.sessions[component.name]
        own = program.pairing.inputs if program.pairing else {n: n for n in given}
        inputs = as_declared(program.graph, {own[n]: a for n, a in given.items() if n in own})
        shown = program.plain.producer.keys() if program.plain else None
        if sink is None:
            return by_reference(program, self._untouched(program).run(inputs, None, shown))
        told: set[str] = set()

        def forward(name: str, tensor: Tensor) -> None:
            told.add(name)
            sink(Key(component.name, name), tensor)

        folded = Folded(program.plain or program.graph, session.exposed) if self._unfold else None

        def see(name: str, tensor: Tensor) -> None:
            if folded is not None:
                folded.see(name, tensor)
            forward(name, tensor)

        for name, array in inputs.items():
            see(name, array)
        for name in given.keys() - own.keys():  # a replay of the reference's layer asks for it
            forward(name, given[name])
        given_out = session.run(inputs, see, shown)
        for name, value in folded.values() if folded is not None else ():
            forward(name, value)
        for name in constant_outputs(program.graph):  # not every session counts them among what it computes
            if name in given_out and name not in told:
                forward(name, given_out[name])
        return by_reference(program, given_out)

    def _untouched(self, program: Program) -> Session:
        """The session that runs a program as it is deployed."""
        if program.deployed is None:
            return self.sessions[program.name]
        if program.name not in self._deployed:
            session = self._backends[program.name].open(replace(program, graph=program.deployed, deployed=None))
            self._deployed[program.name] = session
            self._stack.callback(session.close)
        return self._deployed[program.name]

    def record(self) -> RunRecord:
        """Record of the backend: spec, versions, device and settings as read back."""
        backend, settings = self.backend, merge_settings({n: s.settings for n, s in self.sessions.items()})
        declared = sorted({p for program in self.programs for p in declared_precisions(program.graph)})
        return RunRecord(
            str(backend.spec),
            backend.precision,
            backend.device,
            backend.emulated,
            backend.versions(),
            settings,
            declared,
        )


def check_profiles_of(backend: Backend, programs: Sequence[Program]) -> None:
    """Raise InputError for a profile of an input that no program has, or that differs from a fixed shape."""
    inputs = {value.name: value for program in programs for value in program.graph.inputs}
    for name, profile in profiles_of(backend).items():
        if name not in inputs:
            hint = did_you_mean(name, inputs) or f"; the inputs are {', '.join(inputs)}"
            raise InputError(f"--profile: no input is called {name!r}{hint}")
        for sizes in profile:
            if not fits_shape(sizes, inputs[name].shape):
                raise InputError(f"--profile: {name} as {'x'.join(map(str, sizes))}; the graph takes {inputs[name]}")


def with_kept(backend: Backend, programs: Sequence[Program], field: str = "--keep-fp32") -> dict[str, Backend]:
    """Component → the backend that opens it, which keeps in FP32 what the backend was told of that component.

    Told are layers, ``component/node``, or nodes, which are kept in each component that has one of that name.
    Raises InputError, which names the ``field``, for a name that no program has.
    """
    requested = kept_in_fp32(backend)
    if not requested:
        return {program.name: backend for program in programs}
    graphs = {program.name: program.graph for program in programs}
    nodes: dict[str, set[tuple[str, str]]] = {}
    for layer in layers_of(programs):
        if layer.op != "input":
            node = graphs[layer.component].producer[layer.onnx].name
            nodes.setdefault(layer.name, set()).add((layer.component, node))
    for component, graph in graphs.items():
        for name in (node.name for node in graph.nodes):
            nodes.setdefault(name, set()).add((component, name))
            nodes.setdefault(f"{component}/{name}", set()).add((component, name))
    if unknown := sorted(requested - nodes.keys()):
        hint = did_you_mean(unknown[0], nodes) or f"; some are {', '.join(list(nodes)[:3])}"
        raise InputError(f"{field}: no layer and no ONNX node is called {unknown[0]!r}{hint}")
    chosen = set().union(*(nodes[name] for name in requested))
    return {
        component: backend.keeping(frozenset(node for of, node in chosen if of == component))  # type: ignore[attr-defined]
        for component in graphs
    }


def by_reference(program: Program, outputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """A run's outputs under the reference's names.

    Name → array, dtypes and shapes unchanged.
    """
    return program.pairing.reference_outputs(outputs) if program.pairing else dict(outputs)


def check_realised(backend: Backend, engines: Sequence[BuildInfo | None]) -> None:
    """Raise InputError for engines none of which runs any layer in the precision that their name claims."""
    if unrealised(engines):
        why = "other kernels were faster, or the model has nothing to run in it"
        raise InputError(f"{_no_layer(backend, backend.precision, engines)}; {why}")


def unrealised(engines: Sequence[BuildInfo | None]) -> bool:
    """Whether all are engines none of which runs any layer in the precision that their name claims."""
    return bool(engines) and all(info is not None and not info.realised for info in engines)


def _no_layer(backend: Backend, claim: str, engines: Iterable[BuildInfo | None]) -> str:
    """What engines compute in instead of ``claim``: types in TensorRT's words, with the shares of the layers' ends."""
    types = ", ".join(sorted({f"{k} {v:.0%}" for e in engines if e for k, v in e.realised_precision.items()}))
    return f"{backend.spec}: no layer of the built engine runs in {claim} (layer inputs and outputs: {types})"


def merge_settings(settings: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Settings that all components' sessions have in common and, under ``components``, those that differ."""
    first, *other_settings = settings.values()
    common = {
        k: v for k, v in first.items() if all(k in candidate and candidate[k] == v for candidate in other_settings)
    }
    differing = {
        name: {k: v for k, v in component_settings.items() if k not in common}
        for name, component_settings in settings.items()
    }
    return common | ({"components": differing} if any(differing.values()) else {})


def settings_by_component(settings: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Component → settings, the inverse of ``merge_settings``.

    Settings that all components share stand under the empty name where nothing differs.
    """
    common = {k: v for k, v in settings.items() if k != "components"}
    return {name: common | differing for name, differing in settings.get("components", {"": {}}).items()}


def wants_int8(backend: Backend) -> bool:
    """Whether a backend runs graphs with Q/DQ pairs."""
    return backend.precision == "int8" and not calibrates_itself(backend)


def choose_export(backends: Sequence[Backend], exporter: str | None) -> tuple[Export, str | None]:
    """Export that every backend can read, and a note where it is not the default.

    ``exporter`` None leaves the choice.
    """
    fused = any(map(wants_int8, backends))
    limits = {str(b.spec): limit for b in backends if (limit := largest_opset(b)) is not None}
    if not limits:
        return Export(exporter or "dynamo", fused=fused, free=exporter is None), None
    spec = min(limits, key=limits.__getitem__)
    # dynamo cannot write every operator at an old opset
    chosen = Export(exporter or "torchscript", limits[spec], fused, exporter is None)
    return chosen, f"exported with {chosen.exporter} at opset {chosen.opset}, the newest that {spec} reads"


def is_exported(model: Model) -> bool:
    """Whether any part of a model comes as a module, which becomes a graph here."""
    return any(component.module is not None for component in model.components)


def preparing(*models: Model) -> str:
    """Words for the first step with models; files of graphs are not exported."""
    return "exporting and aligning" if any(map(is_exported, models)) else "reading the graphs"


def digest_before_int8(programs: Sequence[Program]) -> str:
    """SHA-256 of a model's graphs with weights, before cpdebug quantized them: the same for any scales."""
    return digest_of([program.plain or program.deployed or program.graph for program in programs])


def header(pipeline: Pipeline, samples: Sequence[Sample]) -> dict[str, Any]:
    """Manifest of a capture of this run: what ran, on what, in which settings, and the names of its layers."""
    record: dict[str, Any] = json_safe(vars(pipeline.record()))
    last = pipeline.model.components[-1]
    program = pipeline.program(last.name)
    names = [v.name for v in program.graph.outputs] if program.pairing is None else last.output_names
    return {
        "backend": record.pop("spec"),
        **record,
        "model": {"name": pipeline.model.name, "sha256": digest_before_int8(pipeline.programs)},
        "inputs": [{name: array_hash(array) for name, array in sample.arrays.items()} for sample in samples],
        "samples": [sample.source for sample in samples],
        "layers": {p.name: {layer.onnx: layer.name for layer in layers_of([p])} for p in pipeline.programs},
        "outputs": [[last.name, name] for name in names],
        "levels": {p.name: sorted(level_values(p.graph)) for p in pipeline.programs},
        "control_flow": {p.name: [asdict(branch) for branch in p.branches] for p in pipeline.programs if p.branches},
    }
