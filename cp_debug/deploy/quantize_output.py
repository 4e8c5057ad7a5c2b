"""Output of a model's post-training quantization: a checkpoint, calibration caches and Q/DQ files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from cp_debug.backends.base import Program
from cp_debug.deploy.exporting import Axes, Exported, ExportOptions, checker, export_model, low_error, run_once
from cp_debug.display import OnStep, Shown
from cp_debug.errors import InputError
from cp_debug.files import complete_folder, complete_path, resolved
from cp_debug.graph.graph import Graph
from cp_debug.graph.qdq import insert_qdq
from cp_debug.graph.scales import Scales
from cp_debug.programs.walk import Walk, run_module
from cp_debug.quantization.checkpoint import FILE, save_ptq_model
from cp_debug.quantization.models import QuantizedComponent, output_sqnr, quantize_model, reapply_scales, with_modules
from cp_debug.quantization.open_quantized import calibration_samples
from cp_debug.quantization.quantized_programs import already_quantized, scales_by_node
from cp_debug.quantization.record import QuantizerRow, quantization_of, quantizer_table
from cp_debug.recipes.base import Arrays, Component, Model, Sample
from cp_debug.serialize import JsonForm

RECIPE = "modelopt.yaml"
"""Name of the recipe for ModelOpt."""
MEASURED = 4
"""Number of samples on which the outputs are compared with FP32."""


@dataclass(repr=False)
class QuantizationResult(JsonForm, Shown):
    """A quantized model, with its cost at the outputs and the files written."""

    model: str
    method: str
    calibrated_on: str
    components: Mapping[str, Any]
    sqnr: Mapping[str, float] = field(metadata={"key": "sqnr_db"})
    """``component/output`` → signal to quantization noise against FP32 in dB, chained as deployed."""
    measured_on: str
    files: Sequence[Path] = field(default_factory=list, metadata={"written": False})

    def derived(self) -> dict[str, Any]:
        """Paths of the files."""
        return {"files": [str(file) for file in self.files]}


@dataclass(repr=False)
class PtqResult(QuantizationResult):
    """A model in INT8, with its cost at the outputs and the files written."""

    components: Mapping[str, QuantizedComponent] = field(metadata={"written": False})

    def quantizers(self, component: str) -> list[QuantizerRow]:
        """The quantizers of one component; empty for an ONNX file."""
        module = self.components[component].module
        return [] if module is None else quantizer_table(module)

    def notes(self, component: str) -> Sequence[str]:
        """Reasons why BatchNorms were not folded."""
        module = self.components[component].module
        return () if module is None else quantization_of(module).folding.notes

    def derived(self) -> dict[str, Any]:
        """Layers and quantizers by component, and the paths of the files."""
        components: dict[str, Any] = {
            name: {
                "layers": len(part.scales.layers),
                "adds": len(part.scales.residual_adds),
                "quantizers": self.quantizers(name),
                "notes": self.notes(name),
            }
            for name, part in self.components.items()
        }
        return {"components": components, **super().derived()}


def write_quantized(
    model: Model,
    quantized: Mapping[str, QuantizedComponent],
    sample: Sample,
    folder: Path,
    options: ExportOptions,
    *,
    on_step: OnStep = lambda text, done, total: None,
) -> None:
    """Write ``model.pt``, and for every component its calibration cache and its ONNX file with Q/DQ pairs.

    A torch component's file is exported from the FP32 module, BatchNorm folded, keeps its alignment manifest beside it
    and is checked against the fake-quantized module on ``sample``. Raises InputError as ``export_model`` does.
    """
    for component, part in quantized.items():
        part.scales.save(cache_file(folder, component))
    modules = {component: part.module for component, part in quantized.items() if part.module is not None}
    if modules:
        save_ptq_model(modules, folder / FILE)
        export_quantized(model, quantized, sample, folder, options, on_step=on_step)
        return
    for graph in model.components:
        assert graph.onnx_path is not None
        scales = quantized[graph.name].scales
        insert_qdq(Graph(graph.onnx_path), scales.layers, folder / f"{graph.name}.onnx", scales.residual_adds)


class QuantizedFolder:
    """The folder that a quantization of ``model`` writes, and the samples that it reads: the first few measure it.

    Raises InputError, before anything long, where ``folder`` holds files of an earlier quantization and ``overwrite``
    is false, and where the model lies in ``folder`` under a name that is written.
    """

    def __init__(self, model: Model, folder: Path, overwrite: bool) -> None:
        self._model, self._path, self._count = model, folder, 0
        self.first, self.files = list[Sample](), list[Path]()
        for component in model.components:
            target = folder / f"{component.name}.onnx"
            if component.onnx_path is not None and resolved(target) == resolved(component.onnx_path):
                raise InputError(f"{target}: that is the model itself; expected another folder")
        kinds = (".onnx", ".onnx.data", ".alignment.json", ".calibration.safetensors")
        names = [FILE, RECIPE, *(f"{component.name}{kind}" for component in model.components for kind in kinds)]
        self._earlier = [path for name in names if (path := folder / name).exists()]
        if self._earlier and not overwrite:
            name = self._earlier[0].name
            raise InputError(f"--output: {folder} holds {name} of an earlier run; --overwrite replaces it")

    def samples(self, inputs: Path | None, count: int, on_step: OnStep) -> Iterator[Sample]:
        """``calibration_samples``, counted; the first are kept. Raises InputError where there is none."""
        for sample in calibration_samples(self._model, inputs, count, on_step):
            self._count += 1
            if len(self.first) < MEASURED:
                self.first.append(sample)
            yield sample
        if not self._count:
            raise InputError("there is no calibration data: expected at least one sample")

    @contextmanager
    def folder(self) -> Iterator[Path]:
        """A new folder for the files, which are in place at the end, instead of all those of the earlier run."""
        with complete_folder(self._path) as scratch:
            yield scratch
            self.files = sorted(self._path / file.name for file in scratch.iterdir())
        for path in {*self._earlier} - {*self.files}:
            path.unlink(missing_ok=True)

    def measured(self, tests: Mapping[str, nn.Module | Path]) -> dict[str, Any]:
        """Fields of the result: what ``tests``, a module or an ONNX file for each component, cost at the outputs."""
        return {
            "model": self._model.name,
            "calibrated_on": f"{self._count} samples",
            "sqnr": output_sqnr(self._model, tests, self.first),
            "measured_on": f"{len(self.first)} of the samples",
        }


def cache_file(folder: Path, component: str) -> Path:
    """Path of a component's calibration cache."""
    return folder / f"{component}.calibration.safetensors"


def read_caches(model: Model, path: Path) -> dict[str, Scales]:
    """The scales of an earlier run from its folder, or from one file for a model of one component.

    Raises InputError for a file that is missing or no calibration cache.
    """
    names = [component.name for component in model.components]
    if not path.is_dir() and len(names) > 1:
        raise InputError(f"--cache: {path}: expected the folder of an earlier run, with {', '.join(names)}")
    return {name: Scales.load(cache_file(path, name) if path.is_dir() else path) for name in names}


def quantize_ptq(
    model: Model,
    output: Path,
    *,
    inputs: Path | None = None,
    batches: int = 100,
    method: str = "mse",
    skip_layers: Sequence[str] = (),
    cache: Path | None = None,
    options: ExportOptions = ExportOptions(),  # noqa: B008, frozen
    overwrite: bool = False,
    on_step: OnStep = lambda text, done, total: None,
) -> PtqResult:
    """Calibrate ``model`` on at most ``batches`` samples and write it in INT8 into the folder ``output``.

    ``inputs`` are files to calibrate on, None the model's own samples; ``cache`` gives the scales of an earlier run
    instead. Raises InputError as ``quantize_model``, ``read_caches`` and ``write_quantized`` do, and where
    ``skip_layers`` leave nothing to quantize, a file would replace the model's own, or ``output`` holds an earlier
    run's and ``overwrite`` is false.
    """
    written = QuantizedFolder(model, output, overwrite)
    samples = written.samples(inputs, MEASURED if cache else batches, on_step)
    if cache:
        scales = read_caches(model, cache)
        first, *_ = samples
        quantized = reapply_scales(model, first, scales, skip_layers)
    else:
        quantized = quantize_model(model, samples, method=method, skip_layers=skip_layers)
    if skip_layers and not any(part.scales.layers for part in quantized.values()):
        raise InputError(f"--skip-layers: {', '.join(skip_layers)}: that leaves no layer to quantize")
    with written.folder() as scratch:
        write_quantized(model, quantized, written.first[0], scratch, options, on_step=on_step)
        tests = {n: scratch / f"{n}.onnx" if part.module is None else part.module for n, part in quantized.items()}
        fields = written.measured(tests)
    if cache:
        fields["calibrated_on"] = str(cache)
    scheme = next(iter(quantized.values())).scales.method
    return PtqResult(method=scheme, components=quantized, files=written.files, **fields)


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
