"""A model in FP8, a block-scaled type or INT4: files with standard Q/DQ nodes, checked against the emulation.

Nothing is trained and no module gets fake quantizers: torch models are exported first, and graphs are quantized.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from cp_debug.backends.arithmetic import FP32
from cp_debug.backends.base import Backend, Program
from cp_debug.backends.executor import Executor
from cp_debug.backends.narrow_options import NarrowOptions
from cp_debug.backends.registry import create
from cp_debug.backends.spec import BackendSpec
from cp_debug.deploy.exporting import ExportOptions, checker, export_model, low_error, own_files, run_once
from cp_debug.deploy.quantize_output import MEASURED, RECIPE, QuantizationResult, QuantizedFolder
from cp_debug.display import OnStep
from cp_debug.errors import InputError
from cp_debug.files import complete_path
from cp_debug.graph.graph import Graph
from cp_debug.graph.narrow_qdq import insert_narrow_qdq
from cp_debug.graph.tensor_ends import as_arrays
from cp_debug.probes.arrays import as_numpy
from cp_debug.programs.layers import layer_name
from cp_debug.programs.torch_layers import matches, select
from cp_debug.programs.walk import Walk
from cp_debug.quantization.narrow_layers import (
    NarrowLayers,
    calibrated,
    check_exportable,
    narrow_layers,
    weighted_layers,
)
from cp_debug.quantization.onnx_ptq import METHODS, amax_of_programs
from cp_debug.recipes.base import Arrays, Model, Sample
from cp_debug.serialize import JsonForm

FILE_ERROR = 1e-4
"""Distance of a file from its emulation, relative L2, that is always allowed: FP32's own roundings."""


@dataclass(frozen=True)
class NarrowComponent(JsonForm):
    """One component in a narrow precision."""

    layers: Sequence[str]
    """Torch path or node of each quantized layer, in execution order."""
    left_out: Mapping[str, str]
    """Layer that stays in FP32 → the reason."""
    error: float | None
    """Relative L2 distance of the worst output, on the first sample, from the same layers emulated."""
    checked_by: str
    """Backend that ran the file for it."""


@dataclass(repr=False, kw_only=True)
class NarrowResult(QuantizationResult):
    """A model in a narrow precision, with its cost at the outputs and the files written.

    ``method``: ``max`` or ``percentile``; that and ``calibrated_on`` are empty where no scale is calibrated.
    """

    precision: str
    components: Mapping[str, NarrowComponent]
    notes: Sequence[str] = field(default_factory=list)


def check_method(options: NarrowOptions, method: str) -> None:
    """Raise InputError for a method that a precision has no use for."""
    if method not in METHODS:
        raise InputError(f"--method: {method}: {options.family} takes {' or '.join(METHODS)}; its steps grow with size")


def quantize_narrow(
    model: Model,
    output: Path,
    precision: NarrowOptions,
    *,
    inputs: Path | None = None,
    batches: int = 100,
    method: str = "max",
    skip_layers: Sequence[str] = (),
    options: ExportOptions = ExportOptions(21),  # noqa: B008, frozen
    overwrite: bool = False,
    on_step: OnStep = lambda text, done, total: None,
) -> NarrowResult:
    """Write ``model`` in ``precision`` into the folder ``output``: ONNX with Q/DQ nodes, and a recipe for ModelOpt.

    Layers with weights are quantized, with INT4 those of MatMul and Gemm. ``inputs`` are files, None the model's own
    samples; at most ``batches`` of them are calibrated on where scales of data are constant. ``skip_layers`` are globs
    over layers that stay in FP32. Each file is run on the first sample and compared with the emulation.

    Raises InputError for options that no file can say, a model that is quantized already, globs that mean nothing or
    leave nothing, NaN or Inf in weights and calibration, a file that computes something else, and an ``output`` that
    holds an earlier run's files where ``overwrite`` is false.
    """
    check_exportable(precision)
    check_method(precision, method)
    files = own_files(model)
    for program in files or ():
        if program.graph.precision == "int8":
            raise InputError(f"{program.graph}: this graph is quantized already; expected the FP32 model")
    written = QuantizedFolder(model, output, overwrite)
    scaled = calibrated(precision)
    samples = written.samples(inputs, batches if scaled else MEASURED, on_step)
    head = next(samples)
    with written.folder() as scratch:
        programs = files or [item.program for item in export_model(model, head, scratch, options, on_step=on_step)]
        layers = _quantized(model, programs, precision, [head], samples, method, skip_layers)
        components, quantized = {}, {}
        for step, program in zip(Walk(model, head), programs, strict=True):
            on_step(f"checking {step.name}", step.place, len(programs))
            own = layers[step.name]
            exact = _run(Executor(program.graph, FP32), step.inputs)
            path = scratch / f"{step.name}.onnx"
            error, by = _check(program, _write(program, own, path), own, step.inputs, exact)
            step.outputs = exact
            names = {node.name: layer_name(program, node.outputs[0]) for node in program.graph.nodes}
            left_out = {names[node]: why for node, why in own.left_out.items()}
            components[step.name] = NarrowComponent([names[n] for n in own.layers], left_out, error, by)
            quantized[step.name] = path
        fields = written.measured(quantized)
        left = [layer for component in components.values() for layer in component.left_out]
        if (recipe := modelopt_recipe(precision, left)) is not None and files is None:
            import yaml

            text = yaml.safe_dump(recipe, sort_keys=False)
            (scratch / RECIPE).write_text(text, encoding="utf-8")
    return NarrowResult(
        precision=str(precision),
        method=method if scaled else "",
        components=components,
        files=written.files,
        notes=list(_notes(precision, programs, layers)),
        **(fields if scaled else fields | {"calibrated_on": ""}),
    )


def _quantized(
    model: Model,
    programs: Sequence[Program],
    precision: NarrowOptions,
    head: Sequence[Sample],
    samples: Iterator[Sample],
    method: str,
    skip_layers: Sequence[str],
) -> dict[str, NarrowLayers]:
    """Component → its layers in the narrow precision; ``samples`` are read to the end."""
    names = {
        p.name: {n.name: layer_name(p, n.outputs[0]) for n in weighted_layers(p.graph, precision)} for p in programs
    }
    if not any(names.values()):
        raise InputError(f"MODEL: {model.name} has no layer with a weight that {precision.family} takes")
    select([layer for layers in names.values() for layer in layers.values()], skip_layers)
    skipped = {
        name: {node: glob for node, layer in layers.items() for glob in skip_layers if matches(layer, glob)}
        for name, layers in names.items()
    }
    chosen = {name: set(layers) - set(skipped[name]) for name, layers in names.items()}
    if not any(chosen.values()):
        raise InputError(f"--skip-layers: {', '.join(skip_layers)}: that leaves no layer to quantize")
    amax = {}
    if calibrated(precision):
        nodes = {p.name: [n for n in p.graph.nodes if n.name in chosen[p.name]] for p in programs}
        amax = amax_of_programs(model, programs, nodes, chain(head, samples), method)
    for _ in samples:  # the others are kept to measure on
        pass
    found = {}
    for program in programs:
        layers = narrow_layers(program.graph, precision, amax.get(program.name, {}), chosen[program.name])
        why = {node: f"skipped by {glob!r}" for node, glob in skipped[program.name].items()}
        found[program.name] = replace(layers, left_out={**layers.left_out, **why})
    if not any(layers.layers for layers in found.values()):
        reasons = "; ".join(dict.fromkeys(why for layers in found.values() for why in layers.left_out.values()))
        raise InputError(f"MODEL: no layer of {model.name} can be in {precision}: {reasons}")
    return found


def _write(program: Program, layers: NarrowLayers, target: Path) -> Program:
    """The program of the file that is written as ``target``; one without such layers is written as it is."""
    with complete_path(target) as partial:
        insert_narrow_qdq(program.graph, layers.layers, partial, str(layers.options))
    written = Program(program.name, program.graph, alignment=program.alignment).rewritten(Graph(target))
    if written.alignment is not None:
        written.alignment.save(target.with_suffix(".alignment.json"))
    return written


def _check(
    program: Program, written: Program, layers: NarrowLayers, inputs: Mapping[str, np.ndarray], exact: Arrays
) -> tuple[float | None, str]:
    """Distance of the file from the same layers emulated, as ``low_error`` has it, and the backend that ran it."""
    if not layers.layers:
        return None, ""
    backend = _runner(layers.options)
    emulated = _run(Executor(program.graph, FP32, overrides=layers.emulated()), inputs)
    outputs = run_once(backend, written, inputs)
    what = f"{layers.options} as it is emulated"
    return low_error(str(written.graph), outputs, emulated, exact, what, FILE_ERROR), str(backend.spec)


def _runner(options: NarrowOptions) -> Backend:
    """ONNX Runtime, where it has the type; else this project's own executor."""
    return create(BackendSpec("emu-fp32")) if options.family in ("mxfp4", "nvfp4") else checker()


def _run(executor: Executor, inputs: Mapping[str, np.ndarray]) -> Arrays:
    return as_arrays(executor.graph, executor.run(inputs), as_numpy)


def _notes(precision: NarrowOptions, programs: Sequence[Program], layers: Mapping[str, NarrowLayers]) -> Iterator[str]:
    taken = [node for p in programs for node in p.graph.nodes if node.name in layers[p.name].layers]
    if precision.family in ("mxfp4", "nvfp4"):
        yield "ONNX Runtime 1.31 has no FLOAT4E2M1 on the CPU: the file was checked by this project's executor"
    elif precision.family in ("fp8", "mxfp8") and any(node.op in ("MatMul", "Gemm") for node in taken):
        yield (
            "ONNX Runtime 1.31 refuses products of FP8 at its levels extended and all (it makes MatMulIntegerToFloat "
            "of them): open the file with session.disable_quant_qdq = 1, or at the level basic"
        )
    if any(layer.data is not None and layer.data.block for own in layers.values() for layer in own.layers.values()):
        yield "scales of data are computed in the graph, with standard operators; TensorRT has special nodes for them"
    if precision.family == "int4" and not precision.symmetric:
        yield "UINT4 with zero points, like MatMulNBits; TensorRT takes int4:sym, which has none"


def modelopt_recipe(options: NarrowOptions, left_out: Iterable[str]) -> dict[str, Any] | None:
    """A quantization as a recipe of NVIDIA ModelOpt, plain data to be written as YAML; None where it has no such one.

    The form is that of ``modelopt_recipes/general/ptq`` of NVIDIA/Model-Optimizer, read by
    ``modelopt.recipe.load_recipe`` since 0.4x; older versions have ``quant_cfg`` as a mapping.
    ``left_out``: paths of modules that stay in FP32. ModelOpt has scales of INT4 groups with ``sym`` only, blocks of
    FP8 for weights only, and rounds MX scales up, by which its figures differ from those of ``options``.
    """
    formats = _formats(options)
    if formats is None:
        return None
    weight, data, algorithm = formats
    entries: list[dict[str, Any]] = [
        {"quantizer_name": "*", "enable": False},
        {"quantizer_name": "*weight_quantizer", "cfg": weight},
    ]
    if data is not None:
        entries.append({"quantizer_name": "*input_quantizer", "cfg": data})
    for layer in left_out:
        entries.append({"quantizer_name": f"{layer}.*_quantizer", "enable": False})
    return {
        "metadata": {"recipe_type": "ptq", "description": f"{options}, as cpdebug quantized it"},
        "quantize": {"algorithm": algorithm, "quant_cfg": entries},
    }


def _formats(options: NarrowOptions) -> tuple[dict[str, Any], dict[str, Any] | None, str | None] | None:
    """Weights, data (None: as they are) and algorithm."""
    if options.family == "int4":
        if not options.symmetric:
            return None
        return {"num_bits": 4, "block_sizes": {-1: options.group, "type": "static"}}, None, "max"
    if options.family == "fp8":
        fp8: dict[str, Any] = {"num_bits": options.element}
        if options.granularity == "tensor":
            return fp8 | {"axis": None}, fp8 | {"axis": None}, "max"
        if options.granularity == "channel":
            return fp8 | {"axis": 0}, fp8 | {"type": "dynamic", "block_sizes": {-1: None}}, "max"
        return None
    blocks: dict[Any, Any] = {-1: 16 if options.family == "nvfp4" else 32, "type": "dynamic"}
    blocks["scale_bits"] = "e4m3" if options.family == "nvfp4" else "e8m0"
    element = "e2m1" if options.family in ("nvfp4", "mxfp4") else options.element
    both = {"num_bits": element, "block_sizes": blocks}
    return both, both, "max" if options.family == "nvfp4" else None
