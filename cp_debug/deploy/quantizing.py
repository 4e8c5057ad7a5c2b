"""INT8 for deployment: exported FP32 files get Q/DQ pairs, and are checked against the fake-quantized modules."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from torch import nn

from cp_debug.backends.base import Program
from cp_debug.deploy.exporting import Axes, Exported, ExportOptions, OnStep, checker, export_model, low_error, run_once
from cp_debug.errors import InputError
from cp_debug.files import complete_path
from cp_debug.graph.graph import Graph
from cp_debug.graph.qdq import insert_qdq
from cp_debug.programs.walk import Walk, run_module
from cp_debug.quantization.models import QuantizedComponent, with_modules
from cp_debug.quantization.quantized_programs import already_quantized, scales_by_node
from cp_debug.recipes.base import Arrays, Component, Model, Sample


def export_quantized(
    model: Model,
    quantized: Mapping[str, QuantizedComponent],
    sample: Sample,
    folder: Path,
    options: ExportOptions = ExportOptions(),  # noqa: B008, frozen
    *,
    axes: Mapping[str, Axes] | None = None,
    files: Mapping[str, str] | None = None,
    on_step: OnStep = lambda text, done, total: None,
) -> list[Exported]:
    """``export_model`` with the Q/DQ pairs of ``quantized`` in the files.

    ``error`` is then the relative L2 distance of the worst output from the fake-quantized module's. Two right ones
    differ, as ties are rounded either way and the difference grows from layer to layer; a file that is further from its
    module than INT8 takes that module from FP32 computes something else: InputError, as for what ``export_model``
    refuses.
    """
    folded = with_modules(model, {name: part.folded for name, part in quantized.items() if part.folded})
    exported = export_model(folded, sample, folder, options, axes=axes, files=files, on_step=on_step)
    backend = checker("ort-int8", "emu-int8")
    updated = []
    for step, item in zip(Walk(folded, sample), exported, strict=True):
        component, part, inputs = step.component, quantized[step.name], step.inputs
        assert part.module is not None
        assert part.folded is not None
        step.outputs = plain = _run(component, part.folded, inputs)
        if not part.scales.layers and not part.scales.residual_adds:
            updated.append(item)
            continue
        expected = _run(component, part.module, inputs)
        program = item.program
        assert program.alignment is not None
        target = program.graph.path
        scales = scales_by_node(part.scales, program.alignment, program.graph)
        with complete_path(target) as partial:
            insert_qdq(program.graph, scales.layers, partial, scales.residual_adds)
        program = program.rewritten(Graph(target))
        assert program.alignment is not None
        program.alignment.save(target.with_suffix(".alignment.json"))
        outputs, what = run_once(backend, program, inputs), f"the quantized module of {component.name}"
        error = low_error(str(program.graph), outputs, expected, plain, what)
        updated.append(replace(item, program=program, error=error, checked_by=str(backend.spec)))
    return updated


def _run(component: Component, module: nn.Module, inputs: Mapping[str, np.ndarray]) -> Arrays:
    return run_module(replace(component, module=module), inputs)


def in_int8(folder: Path, programs: Sequence[Program]) -> list[Program]:
    """The programs of a folder, some of which have Q/DQ pairs. Raises InputError where none has."""
    quantized = already_quantized(programs)
    if quantized is None:
        raise InputError(f"{folder}: no file has Q/DQ pairs; export them with export.mode onnx or both")
    return quantized
