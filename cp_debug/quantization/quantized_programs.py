"""INT8 on the fly: calibrates a model on its own samples, where a backend asks for INT8 and it is not quantized yet."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from cp_debug.backends.base import Program
from cp_debug.backends.executor import Executor
from cp_debug.backends.tensorrt.calibration import Ranges
from cp_debug.errors import InputError
from cp_debug.graph.graph import Graph, Node, data_values
from cp_debug.graph.narrow_qdq import without_int8
from cp_debug.graph.operators import PRODUCTS
from cp_debug.graph.qdq import insert_qdq, quantizable, weight_axis
from cp_debug.graph.scales import LayerScales, Scales
from cp_debug.probes.alignment import Alignment
from cp_debug.programs.align import align
from cp_debug.programs.pipeline import with_files
from cp_debug.programs.walk import Walk, example_args, run_module
from cp_debug.quantization.checkpoint import FILE, file_of, is_ptq_checkpoint
from cp_debug.quantization.histogram import weight_amax
from cp_debug.quantization.models import QuantizedComponent, quantize_model, with_modules
from cp_debug.quantization.onnx_ptq import weight_of
from cp_debug.quantization.open_quantized import calibration_samples, open_quantized
from cp_debug.recipes.base import Model, Sample
from cp_debug.recipes.input_files import DEFAULT_READING, Reading
from cp_debug.recipes.registry import load_model
from cp_debug.safe_text import amount


def scales_by_node(scales: Scales, alignment: Alignment, graph: Graph) -> Scales:
    """The scales of modules under the names of the nodes of ``graph`` that compute them.

    A module that is called twice gives its scales to two nodes. Modules of which nothing reaches an output are left
    out, as exporters do. Raises InputError naming the layers that have no node.
    """
    nodes = nodes_by_layer(scales, alignment, graph)
    if lost := [path for path in nodes if not nodes[path] and path not in alignment.unused]:
        raise InputError(f"{graph}: no {', '.join(PRODUCTS)} or Add computes {', '.join(lost)}; export it again")
    layers = {node: layer for path, layer in scales.layers.items() for node in nodes[path]}
    residual_adds = {node: amax for path, amax in scales.residual_adds.items() for node in nodes[path]}
    return dataclasses.replace(scales, layers=layers, residual_adds=residual_adds)


def nodes_by_layer(scales: Scales, alignment: Alignment | None, graph: Graph) -> dict[str, list[str]]:
    """Layer and residual addition of ``scales`` → the nodes that compute it, one for each call; without an alignment
    the scales are those of nodes."""
    if alignment is None:
        return {name: [name] for name in (*scales.layers, *scales.residual_adds)}
    data, calls = set(data_values(graph)), defaultdict[str, list[str]](list)
    for call in alignment.modules:
        calls[call.partition("@")[0]].append(call)

    def before(value: str, operators: Collection[str]) -> Node | None:
        """The last node of ``operators`` before a value, with nothing but a chain of operators between."""
        while (node := graph.producer.get(value)) is not None and node.op not in operators:
            sources = [name for name in node.inputs if name in data]
            if len(sources) != 1:
                return None
            (value,) = sources
        return node

    def nodes(path: str, operators: Collection[str]) -> list[str]:
        """The nodes behind the calls of a module, or behind a function in one."""
        # A Conv has the name of the BatchNorm folded into it.
        layers = [alignment.absorbed.get(call, call) for call in calls.get(path, [path])]
        found = ([before(value, operators) for value in alignment.onnx_for(layer)] for layer in layers)
        return [node.name for of_layer in found for node in [*filter(None, of_layer)][:1]]

    found = {path: nodes(path, PRODUCTS) for path in scales.layers}
    return found | {path: nodes(path, ("Add",)) for path in scales.residual_adds}


@dataclass(frozen=True)
class Calibration:
    """Settings for quantizing a model that comes in FP32."""

    data: Path | None = None
    """Data to calibrate on; None: what ``Options.inputs`` names, else other samples of the kind that is bisected."""
    samples: int = 8
    method: str = "mse"
    """``max``, ``percentile``, ``mse`` or ``entropy``."""
    skip_layers: Sequence[str] = ()
    """Globs over module paths; over node names where a program comes without a module."""


DEFAULT_CALIBRATION = Calibration()


def load_quantized(
    name: str,
    checkpoint: Path | None,
    seed: int,
    inputs: Path | None = None,
    reading: Reading = DEFAULT_READING,
) -> tuple[Model, Mapping[str, QuantizedComponent]]:
    """A model in FP32, and its components in INT8 if ``checkpoint`` is one that ``cpdebug quantize`` wrote.

    The checkpoint is the file or its folder; the model is then the FP32 one behind it, BatchNorm folded. ``inputs``
    and ``reading`` are those of ``load_model``. Raises InputError as both loaders do.
    """
    file = None if checkpoint is None else file_of(checkpoint)
    if file is None or not is_ptq_checkpoint(file):
        return load_model(name, checkpoint=file, seed=seed, inputs=inputs, reading=reading), {}
    model = load_model(name, seed=seed, reading=reading)
    parts = open_quantized(model, file)
    return with_modules(
        model, {component: quantized.folded for component, quantized in parts.items() if quantized.folded}
    ), parts


def calibrate(
    model: Model, programs: Sequence[Program], samples: Iterable[Sample], calibration: Calibration
) -> dict[str, QuantizedComponent]:
    """The components in INT8: the model's modules, or the graphs of programs that were not exported from them.

    Raises InputError as ``quantize_model`` does.
    """
    calibrated = model if of_modules(model, programs) else with_files(model, programs)
    return quantize_model(calibrated, samples, method=calibration.method, skip_layers=calibration.skip_layers)


def of_modules(model: Model, programs: Sequence[Program]) -> bool:
    """Whether the programs were exported from the modules of ``model``."""
    return all(p.module is not None and p.module is c.module for p, c in zip(programs, model.components, strict=True))


def quantize_programs(
    model: Model,
    programs: Sequence[Program],
    folder: Path,
    samples: Iterable[Sample] | None = None,
    *,
    parts: Mapping[str, QuantizedComponent] | None = None,
    calibration: Calibration = DEFAULT_CALIBRATION,
) -> tuple[list[Program], str]:
    """Programs with Q/DQ pairs, and how they were made, in words, if they were calibrated now.

    ``parts`` are used where programs were exported from their model; else ``samples`` are calibrated on, without them
    those of ``calibration``. ``folder`` is made where it is missing. Raises InputError as ``quantize_model`` does.
    """
    if samples is None:
        samples = calibration_samples(model, calibration.data, calibration.samples)
    samples, how = list(samples), ""
    if not parts or not of_modules(model, programs):
        parts = calibrate(model, programs, samples, calibration)
        how = f"quantized on the fly: {calibration.method} on {amount(len(samples), 'sample')}"
    folder.mkdir(exist_ok=True)
    return quantized_programs(model, programs, parts, samples[0], folder), how


def quantized_programs(
    model: Model,
    programs: Sequence[Program],
    parts: Mapping[str, QuantizedComponent],
    sample: Sample,
    folder: Path,
) -> list[Program]:
    """The programs in INT8: each has a Q/DQ graph in ``folder``, with its calibration cache beside it.

    A program gets a module with fake quantizers where ``parts`` has one. ``sample`` is run once, to find the quantized
    layers in the graph. Raises InputError when one is not found.
    """
    in_int8 = []
    for step, program in zip(Walk(model, sample), programs, strict=True):
        component, part = step.component, parts[step.name]
        if part.folded is None:
            in_int8.append(_with_pairs(replace(program, module=None), part.scales, folder))
            continue
        step.outputs = run_module(component, step.inputs)
        alignment = align(program.graph, part.folded, example_args(component, step.inputs), prefix=component.prefix)
        scales = scales_by_node(part.scales, alignment, program.graph)
        in_int8.append(_with_pairs(replace(program, module=part.module, alignment=alignment), scales, folder))
    return in_int8


def with_ranges(graph: Graph, ranges: Ranges, target: Path) -> Graph:
    """``graph`` with the scales that TensorRT's own calibrator chose, written with Q/DQ pairs as ``target``.

    Weights have one scale for each output channel.
    """
    executor, layers = Executor(graph, weight_cache=0), {}
    for node in quantizable(graph):
        if node.name in ranges.layers and (weight := weight_of(node, executor)).dim() > 1:
            amax = weight_amax(weight, weight_axis(node, weight.dim()), "max")
            layers[node.name] = LayerScales(ranges.layers[node.name], amax.numpy())
    return Graph(insert_qdq(graph, layers, target, stored=ranges.stored), source=graph)


def already_quantized(programs: Sequence[Program]) -> list[Program] | None:
    """The programs, if any of them has Q/DQ pairs; else None.

    Those without pairs then count as left in FP32 on purpose. Raises InputError where none of them holds INT8, but FP8
    or levels of fewer bits: INT8 would be no measure of them.
    """
    if all(program.graph.precision != "int8" for program in programs):
        return None
    quantized = [program.graph for program in programs if program.graph.precision == "int8"]
    others = [without_int8(graph) for graph in quantized]
    if all(others):
        raise InputError(
            f"--backends: {quantized[0]} is quantized to {others[0]}, which INT8 cannot be compared with; expected "
            "emu-fp32, which computes the file's own levels, or ort"
        )
    return [p if p.graph.precision == "int8" else replace(p, plain=p.graph) for p in programs]


def with_modules_beside(programs: list[Program], model: Model, folder: Path) -> list[Program]:
    """The programs of Q/DQ files with the fake-quantized modules of the checkpoint that lies in their folder."""
    if not is_ptq_checkpoint(folder / FILE):
        return programs
    parts = open_quantized(model, folder / FILE)
    return [replace(p, module=parts[p.name].module) if p.alignment else p for p in programs]


def _with_pairs(program: Program, scales: Scales, folder: Path) -> Program:
    file = insert_qdq(program.graph, scales.layers, folder / f"{program.name}.int8.onnx", scales.residual_adds)
    scales.save(folder / f"{program.name}.scales.safetensors")
    return program.rewritten(Graph(file, source=program.graph), scales=scales, plain=program.graph)
