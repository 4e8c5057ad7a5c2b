"""The ONNX files that are deployed: modules exported, or a model's own files rewritten; aligned, checked by numbers."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from cp_debug.backends.base import Backend, Program
from cp_debug.backends.registry import create
from cp_debug.backends.spec import BackendSpec
from cp_debug.display import OnStep
from cp_debug.doing import doing
from cp_debug.errors import InputError, MissingPackage, in_one_line
from cp_debug.files import complete_folder, resolved
from cp_debug.graph.graph import Graph
from cp_debug.graph.randomness import refuse_random
from cp_debug.graph.surgery import converted, inlined, save
from cp_debug.probes.alignment import Alignment
from cp_debug.probes.caveats import caveats, compare_any, why_nothing
from cp_debug.probes.statistics import TensorStats
from cp_debug.programs.align import TOLERANCE, align
from cp_debug.programs.export import export
from cp_debug.programs.walk import ComponentStep, Walk, example_args, run_module
from cp_debug.recipes.base import Arrays, Component, Model, Sample
from cp_debug.serialize import JsonForm

OPSET = 17
"""Newest opset that TensorRT 8's parser reads."""
DYNAMO_OPSET = 18
"""Oldest opset for which torch's dynamo exporter writes every operator itself."""
_STRIDES = 8
"""Divisor of a canvas's free sizes, for a network's strides."""

Axes = Mapping[str, Mapping[int, str]]


@dataclass(frozen=True)
class ExportOptions:
    """Options of an export. ``exporter`` None: TorchScript below opset 18, dynamo from there."""

    opset: int = OPSET
    exporter: str | None = None
    folded: bool = True
    simplify: bool = False

    @property
    def chosen_exporter(self) -> str:
        """``dynamo`` or ``torchscript``."""
        return self.exporter or ("dynamo" if self.opset >= DYNAMO_OPSET else "torchscript")


@dataclass(frozen=True)
class Exported(JsonForm):
    """A component's file and the outcome of its check. A file that was there before is not checked."""

    program: Program = field(metadata={"written": False})
    sizes: tuple[str, ...] = field(metadata={"key": "checked_on"})
    """Shapes of the inputs of each run; empty without a check."""
    error: float | None
    """Largest relative L2 distance of any output from the module's, over all runs; None without a check, or where no
    number was compared."""
    checked_by: str
    """The backend that ran the graph; empty without a check."""
    caveats: tuple[str, ...] = ()
    """Phrases about outputs of which the check says little: no element, NaN everywhere, zeros."""
    source: Graph | None = field(default=None, metadata={"written": False})
    """The ONNX file that it was made from; None for a torch module's."""

    def derived(self) -> dict[str, Any]:
        """The file: its name, digest, opset and signature."""
        graph = self.program.graph
        return {
            "component": self.program.name,
            "file": graph.path.name,
            "sha256": graph.digest,
            "opset": graph.opsets[""],
            "nodes": len(graph.nodes),
            "inputs": [str(v) for v in graph.inputs],
            "outputs": [v.name for v in graph.outputs],
        }


def export_model(
    model: Model,
    sample: Sample,
    folder: Path,
    options: ExportOptions = ExportOptions(),
    *,
    axes: Mapping[str, Axes] | None = None,
    files: Mapping[str, str] | None = None,
    on_step: OnStep = lambda text, done, total: None,
) -> list[Exported]:
    """Write ``<component>.onnx`` and its alignment manifest into ``folder``, for every component of ``model``.

    ``axes`` and ``files`` replace a component's free axes and its file's name. Files of an earlier export are replaced
    once the new one agrees with the module on two inputs of different sizes. Raises InputError for a model that is ONNX
    already, for what cannot be exported at the opset, for a graph that computes something else than its module, and
    where no output of any component holds a number.
    """
    modules = [component.name for component in model.components if component.module is not None]
    if len(modules) < len(model.components):
        raise InputError(f"MODEL: {model.name} is an ONNX file already; expected a model of torch modules to export")
    exported = []
    with complete_folder(folder) as scratch:
        backend = checker()
        for step in Walk(model, sample):
            component = step.component
            on_step(f"exporting {step.name}", step.place, len(modules))
            step.outputs = run_module(component, step.inputs)
            free = (axes or {}).get(component.name) or component.deployed_axes or component.dynamic_axes
            target = scratch / (files or {}).get(component.name, f"{component.name}.onnx")
            exported.append(_export(component, step.inputs, step.outputs, target, free, options, backend))
        check_compared(model.name, exported)
    return [_moved(item, folder) for item in exported]


def _moved(exported: Exported, folder: Path) -> Exported:
    """``exported`` with its file where it lies now, in ``folder``."""
    program = exported.program
    return replace(exported, program=replace(program, graph=Graph(folder / program.graph.path.name)))


def _export(
    component: Component,
    inputs: Mapping[str, np.ndarray],
    outputs: Arrays,
    target: Path,
    axes: Axes,
    options: ExportOptions,
    backend: Backend,
) -> Exported:
    """Export, align and check one component. Raises InputError as ``export_model`` does."""
    module = component.module
    assert module is not None
    args = example_args(component, inputs)
    path = export(
        module,
        args,
        target,
        input_names=component.input_names,
        output_names=component.output_names,
        dynamic_axes=axes,
        exporter=options.chosen_exporter,
        folded=options.folded,
        simplify=options.simplify,
        opset=options.opset,
    )
    onnx.checker.check_model(path)
    graph = Graph(path)
    alignment = align(graph, module, args, prefix=component.prefix)
    second_inputs = resized(inputs, axes)
    runs = [
        _checked(backend, graph, component, inputs, outputs),
        _checked(backend, graph, component, second_inputs, run_module(component, second_inputs)),
    ]
    sizes = shapes_of(inputs), shapes_of(second_inputs)
    error, says = outcome(runs)
    alignment.save(path.with_suffix(".alignment.json"))
    program = Program(component.name, graph, module, alignment)
    return Exported(program, sizes, error, str(backend.spec), says)


def load_exported(model: Model, folder: Path, files: Mapping[str, str] | None = None) -> list[Program]:
    """Open the programs of a folder that ``export_model`` filled, or that another tool did.

    ``files``: component → another file name. Raises InputError for a missing file, and for one whose inputs or outputs
    are not the model's.
    """
    paths = {c.name: folder / (files or {}).get(c.name, f"{c.name}.onnx") for c in model.components}
    if missing := [path.name for path in paths.values() if not path.is_file()]:
        raise InputError(f"{folder}: there is no {', no '.join(missing)}; expected the files of `cpdebug export`")
    return [_load(component, paths[component.name]) for component in model.components]


def _load(component: Component, path: Path) -> Program:
    graph = Graph(path)
    for kind, names, expected in (
        ("inputs", [v.name for v in graph.inputs], list(component.input_names)),
        ("outputs", [v.name for v in graph.outputs], list(component.output_names)),
    ):
        if names != expected:
            raise InputError(f"{path}: its {kind} are {names}; expected those of {component.name}: {expected}")
    manifest = path.with_suffix(".alignment.json")
    try:
        alignment = Alignment.load(manifest, graph)
    except InputError:  # none, or the graph was changed since: that is what verification is for
        alignment = None
    return Program(component.name, graph, component.module, alignment)


def own_files(model: Model) -> list[Program] | None:
    """The programs of a model that is ONNX files already, as they are; None where a part of it is to be exported."""
    paths = {component.name: component.onnx_path for component in model.components if component.module is None}
    if len(paths) < len(model.components):
        return None
    return [Program(name, Graph(path)) for name, path in paths.items() if path is not None]


def take_files(programs: Sequence[Program], folder: Path, files: Mapping[str, str] | None = None) -> list[Exported]:
    """Write ONNX files that exist already into ``folder``, with their weights; nobody checks them there.

    ``files``: component → another file name. Files of an earlier run are replaced.
    """
    names = {program.name: (files or {}).get(program.name, f"{program.name}.onnx") for program in programs}
    with complete_folder(folder) as scratch:
        for program in programs:
            save(program.graph.proto, program.graph, scratch / names[program.name])
    return [Exported(replace(p, graph=Graph(folder / names[p.name])), (), None, "") for p in programs]


def resized(inputs: Mapping[str, np.ndarray], axes: Axes) -> dict[str, np.ndarray]:
    """Inputs of about half the size along every free axis, cut from the same values; a size of one becomes two."""
    sizes: dict[str, int] = {}
    arrays = {}
    for name, array in inputs.items():
        for axis, symbol in axes.get(name, {}).items():
            size = array.shape[axis]
            new_size = sizes.setdefault(symbol, size // 2 // _STRIDES * _STRIDES or size + 1)
            array = np.take(array, np.arange(new_size) % max(size, 1), axis) if size else array
        arrays[name] = np.asarray(array, order="C")
    return arrays


def checker(runtime: str = "ort", instead: str = "emu-fp32") -> Backend:
    """A backend that checks graphs: ONNX Runtime, or where it is missing this project's own executor."""
    try:
        return create(BackendSpec(runtime))
    except MissingPackage:
        return create(BackendSpec(instead))


def run_once(backend: Backend, program: Program, inputs: Mapping[str, np.ndarray]) -> Arrays:
    """The outputs of a program on a backend, which is closed again; any shapes and dtypes that the program takes."""
    with closing(backend.open(program)) as session:
        return session.run(inputs)


def low_error(where: str, outputs: Arrays, low: Arrays, exact: Arrays, what: str, always: float = 0.0) -> float:
    """Relative L2 distance of a file's worst output from ``low``, what the module or the emulation gives in a low
    precision (``what``, in words); infinite for an element that a sequence lacks.

    Raises InputError where the outputs are further from ``low`` than that is from ``exact``, FP32, and than is
    ``always`` allowed: roundings that fall the other side at ties grow from layer to layer, but never so far.
    """
    errors, costs = (
        {name: compare_any(array, run[name]).rel_l2 if name in run else math.inf for name, array in low.items()}
        for run in (outputs, exact)
    )
    worst = max(errors, key=errors.__getitem__)
    if not sum(errors.values()) <= always + sum(costs.values()):
        raise InputError(
            f"{where}: {worst} is {errors[worst]:.2g} (relative L2) from {what}, which is itself {costs[worst]:.2g} "
            "from FP32; the graph computes something else"
        )
    return errors[worst]


Run = Mapping[str, TensorStats]
"""Output → how it compared in one run."""


def compared_outputs(expected: Arrays, outputs: Arrays) -> dict[str, TensorStats]:
    """Every output of one run against what is expected; elements that only one side's sequence has are left out, for
    its length differs."""
    return {name: compare_any(array, outputs[name]) for name, array in expected.items() if name in outputs}


def worst_output(run: Run) -> tuple[str, TensorStats]:
    """The output that is furthest from what is expected, and by how much."""
    return max(run.items(), key=lambda item: item[1].severity)


def outcome(runs: Sequence[Run]) -> tuple[float | None, tuple[str, ...]]:
    """The largest relative L2 distance of all runs, None where no number was compared; and caveats."""
    outputs: dict[str, list[TensorStats]] = {}
    for run in runs:
        for output, stats in run.items():
            outputs.setdefault(output, []).append(stats)
    if why_nothing(outputs):
        return None, tuple(caveats(outputs))
    return max(stats.finite_rel_l2 for run in runs for stats in run.values()), tuple(caveats(outputs))


def check_compared(model: str, exported: Sequence[Exported]) -> None:
    """Raise InputError where the check of no file compared any number."""
    if exported and all(each.error is None for each in exported):
        why = "; ".join(f"on {' and '.join(dict.fromkeys(e.sizes))} {', '.join(e.caveats)}" for e in exported)
        raise InputError(f"{model}: nothing was compared: {why}; give other inputs with --inputs")


def _checked(
    backend: Backend, graph: Graph, component: Component, inputs: Mapping[str, np.ndarray], expected: Arrays
) -> Run:
    """The outputs of a graph against its module's. Raises InputError beyond ``TOLERANCE``."""
    run = compared_outputs(expected, run_once(backend, Program(component.name, graph), inputs))
    worst, stats = worst_output(run)
    if not stats.shape_mismatch and not stats.mismatched and stats.finite_rel_l2 <= TOLERANCE:
        return run
    if not stats.shape_mismatch and stats.nan_ref + stats.inf_ref:
        ours, theirs = stats.nan_ref + stats.inf_ref, stats.nan_test + stats.inf_test
        raise InputError(
            f"{component.name}: on {shapes_of(inputs)} the module itself has {ours} NaN or Inf in {worst}, the "
            f"exported graph {theirs}: nothing can be checked; expected an input on which the module is finite"
        )
    if stats.shape_mismatch or not stats.rel_l2 <= TOLERANCE:
        raise InputError(
            f"{component.name}: on {shapes_of(inputs)} the exported graph computes another {worst} than its module: "
            f"{list(stats.shape_test)}, relative L2 {stats.rel_l2:.2g}, expected {list(stats.shape)} within "
            f"{TOLERANCE:g}; the trace froze something that depends on the input"
        )
    return run


def shapes_of(inputs: Mapping[str, np.ndarray]) -> str:
    """Names and shapes of inputs in one line: ``image 1×3×320×320``."""
    return ", ".join(f"{name} {'×'.join(map(str, array.shape))}" for name, array in inputs.items())


SAMPLES = 3
"""Samples on which a written file is compared with its original, where they are made up."""


def export_files(
    model: Model,
    programs: Sequence[Program],
    samples: Sequence[Sample],
    folder: Path,
    *,
    opset: int | None = None,
    simplify: bool = False,
    files: Mapping[str, str] | None = None,
    on_step: OnStep = lambda text, done, total: None,
) -> list[Exported]:
    """Write the ONNX files ``programs`` of ``model`` as ``<component>.onnx`` into ``folder``; ``files`` replaces names.

    ``opset`` None keeps the file's; ``simplify`` runs onnxscript's optimizer over it. Weights in external data go into
    the file, or beside it where they are too many. Each file is checked by ``onnx.checker`` and gives the original's
    outputs on all ``samples``, at least one, and on a second size of the free axes where the original runs on one,
    before one of them appears. Raises InputError for what does not, where no output holds a number, for a file that
    would replace its own original, and for an opset to which ONNX does not convert.
    """
    names = {program.name: (files or {}).get(program.name, f"{program.name}.onnx") for program in programs}
    for program in programs:
        target = folder / names[program.name]
        if resolved(target) == resolved(program.graph.path):
            raise InputError(f"--output: {target} would replace MODEL itself; expected another folder")
        refuse_random([program.graph], "the written file cannot be compared with it")
    written, walks = [], [Walk(model, sample) for sample in samples]
    with complete_folder(folder) as scratch:
        backend = checker()
        for place, program in enumerate(programs):
            on_step(f"writing {program.name}", place, len(programs))
            source = program.graph
            graph = _same_signature(_rewritten(source, scratch / names[program.name], opset, simplify), source)
            steps = [walk.at(program.name) for walk in walks]
            runs = _runs(backend, Program(program.name, source), Program(program.name, graph), steps)
            sizes, compared = zip(*runs, strict=True)
            error, says = outcome(compared)
            written.append(Exported(replace(program, graph=graph), sizes, error, str(backend.spec), says, source))
        check_compared(model.name, written)
    return [_moved(item, folder) for item in written]


def _rewritten(source: Graph, path: Path, opset: int | None, simplify: bool) -> Path:
    """``source`` written to ``path``, in another opset or simplified where that is asked for."""
    proto = source.proto
    if simplify or opset not in (None, source.opsets.get("", 1)):
        proto = inlined(source)
        proto = converted(proto, source, opset) if opset is not None else proto
        proto = _simplified(proto, source) if simplify else proto
    save(proto, source, path)
    return path


def _runs(
    backend: Backend, source: Program, rewritten: Program, steps: Sequence[ComponentStep]
) -> Iterator[tuple[str, Run]]:
    """(Shapes, outputs compared) of each run of both graphs; ``steps`` get their outputs.

    The last run has other sizes along the free axes, where there are some and the original runs on them.
    """
    graph = source.graph
    axes = {v.name: {i: str(d) for i, d in enumerate(v.shape or ()) if not isinstance(d, int)} for v in graph.inputs}
    fed = [step.inputs for step in steps]
    with closing(backend.open(source)) as session:
        for step in steps:
            step.outputs = session.run(step.inputs)
        expected: list[Arrays] = [step.outputs for step in steps]
        if shapes_of(other := resized(fed[0], axes)) != shapes_of(fed[0]):
            with suppress(InputError):  # of a size that the original does not take
                expected.append(session.run(other))
                fed.append(other)
    with closing(backend.open(rewritten)) as session:
        for inputs, outputs in zip(fed, expected, strict=True):
            yield shapes_of(inputs), _checked_run(graph, outputs, session.run(inputs))


def _simplified(proto: onnx.ModelProto, source: Graph) -> onnx.ModelProto:
    from onnxscript import optimizer

    try:
        return optimizer.optimize(proto)
    except Exception as error:  # the optimizer raises nearly everything
        raise InputError(f"--simplify: onnxscript's optimizer fails on {source}: {in_one_line(error)}") from error


def _same_signature(path: Path, source: Graph) -> Graph:
    """The written file, opened. Raises InputError where ``onnx.checker`` refuses it, or its signature is another."""
    try:
        with doing(f"onnx checked {source}"):
            onnx.checker.check_model(path)
    except Exception as error:  # ValidationError, and what the checker's own parser raises
        raise InputError(f"{source}: onnx.checker refuses it: {' '.join(str(error).split())}") from error
    graph = Graph(path)
    for kind, ours, theirs in (
        ("inputs", [v.name for v in source.inputs], [v.name for v in graph.inputs]),
        ("outputs", [v.name for v in source.outputs], [v.name for v in graph.outputs]),
    ):
        if ours != theirs:
            raise InputError(f"{source}: its {kind} are {ours}; rewritten, they would be {theirs}")
    return graph


def _checked_run(source: Graph, ours: Arrays, theirs: Arrays) -> Run:
    """Every output compared. Raises InputError beyond ``TOLERANCE``."""
    run = compared_outputs(ours, theirs)
    worst, stats = worst_output(run)
    if stats.shape_mismatch or stats.mismatched or not stats.finite_rel_l2 <= TOLERANCE:
        raise InputError(
            f"{source}: rewritten, it computes another {worst} than before: {list(stats.shape_test)}, relative L2 "
            f"{stats.rel_l2:.2g}; expected {list(stats.shape)} within {TOLERANCE:g}"
        )
    return run
