"""The steps of a deployment, each by itself: load, export, build, verify, evaluate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property, partial
from itertools import islice
from pathlib import Path

from cp_debug.backends.base import Backend, Program
from cp_debug.backends.registry import create
from cp_debug.backends.spec import BackendSpec
from cp_debug.deploy.bench import BackendBench, bench
from cp_debug.deploy.config import named_config
from cp_debug.deploy.engines import MANIFEST, BuiltEngine, build_engines, check_engines
from cp_debug.deploy.exporting import (
    SAMPLES,
    Exported,
    ExportOptions,
    export_files,
    export_model,
    load_exported,
    own_files,
    take_files,
)
from cp_debug.deploy.interface_checks import checked
from cp_debug.deploy.quantize_output import export_quantized, in_int8
from cp_debug.deploy.schema import SUFFIXES, ComponentConfig, DeployConfig
from cp_debug.deploy.verify import VerifyOptions, VerifyResult, verify
from cp_debug.detection.evaluate import as_detector, evaluate
from cp_debug.detection.evaluation import EvaluationOptions, EvaluationResult, parse_ranges
from cp_debug.display import OnStep
from cp_debug.errors import InputError
from cp_debug.graph.graph import ValueInfo, fits_shape
from cp_debug.graph.randomness import refuse_random
from cp_debug.programs.paired import end_notes, pair_programs
from cp_debug.programs.pipeline import load_test_programs
from cp_debug.programs.walk import Walk, run_module
from cp_debug.quantization.checkpoint import file_of, save_ptq_model
from cp_debug.quantization.models import QuantizedComponent, with_modules
from cp_debug.quantization.open_quantized import is_quantized_checkpoint, modules_of, open_quantized
from cp_debug.recipes.abilities import Batches, HasClasses, HasData, Remarks, TurnsYaw, samples_left_out
from cp_debug.recipes.base import Component, Model, Sample
from cp_debug.recipes.data.base import DataOptions, iterate
from cp_debug.recipes.input_files import DEFAULT_READING, Reading
from cp_debug.recipes.registry import load_model
from cp_debug.safe_text import did_you_mean


def configured(text: str, recipe: str | None, scratch: Path) -> tuple[DeployConfig, str]:
    """``named_config`` of a file, or the configuration of a model alone; and its source for messages.

    A configuration made for a model has ``scratch`` as its work folder. Raises InputError for an unusable file.
    """
    if not text.endswith(SUFFIXES):
        return DeployConfig(model=text, work_dir=scratch), "command line"
    return named_config(Path(text), recipe), text


class Deployment:
    """A configuration with the steps that it leads to. ``source`` is the file's name in messages, ``reading`` that of
    ``load_model``."""

    def __init__(
        self,
        config: DeployConfig,
        source: str,
        on_step: OnStep = lambda text, done, total: None,
        reading: Reading = DEFAULT_READING,
        **engine_options: object,
    ) -> None:
        if config.checkpoint is not None:
            config = config.model_copy(update={"checkpoint": file_of(config.checkpoint)})
        self.config, self.source, self.on_step = config, source, on_step
        self._reading, self._engine_options = reading, engine_options
        self._backends: dict[str, Backend] = {}
        self._written = False
        self.remarks = Remarks()
        """Remarks on the samples that were timed."""

    @cached_property
    def model(self) -> Model:
        """The model, loaded with its checkpoint and checked against the configuration.

        Raises InputError where it does not fit.
        """
        config = self.config
        if config.checkpoint is not None and not config.checkpoint.is_file():
            raise InputError(
                f"{self.source}: checkpoint is {config.checkpoint}: no such file; expected .pt or .safetensors"
            )
        model = self._loaded
        if config.quantization is not None and own_files(model) is not None:
            raise InputError(
                f"{self.source}: quantization: {model.name} is an ONNX file; expected no such section, and as the "
                f"model the file that `cpdebug quantize ptq {model.name} -o FOLDER` writes"
            )
        check_components(self.config, model.components, self.source)
        if isinstance(model, HasClasses):
            self._ranges(model.class_names)  # now, not after hours of building
        if self._trained == config.checkpoint:
            return model
        # Only quantized weights are there: FP32 is what they are without INT8.
        return with_modules(model, {name: part.folded for name, part in self.quantized.items() if part.folded})

    @cached_property
    def _loaded(self) -> Model:
        config = self.config
        assert config.model is not None
        model = load_model(config.model, checkpoint=self._trained, reading=self._reading)
        if config.export.rot_y_axis_reference:
            turn_outputs(model)
        return model

    @cached_property
    def quantized(self) -> dict[str, QuantizedComponent]:
        """Every component in INT8: as ``quantize`` left it, from the configured checkpoint, or calibrated."""
        config = self.config.quantization
        assert config is not None
        if self._written:
            return open_quantized(self._loaded, self._quantized_file)
        return open_quantized(
            self._loaded,
            self._quantized_checkpoint,
            config.data or self.config.data.path,
            config.samples,
            method=config.method,
            skip_layers=config.skip_layers,
            on_step=self.on_step,
        )

    def quantize(self) -> Path:
        """Write ``quantized.pt`` into a folder of its own; return its path."""
        target = self._quantized_file
        target.parent.mkdir(parents=True, exist_ok=True)
        save_ptq_model(modules_of(self.quantized), target)
        return target

    def use_quantized(self) -> None:
        """Use the file that ``quantize`` wrote, in this run or an earlier one, instead of calibrating again."""
        self._written = True

    @property
    def _quantized_file(self) -> Path:
        return self.config.work_dir / "quantized" / "quantized.pt"

    @property
    def _trained(self) -> Path | None:
        """The weights in FP32; None: the model's own."""
        return None if self._quantized_checkpoint == self.config.checkpoint else self.config.checkpoint

    @property
    def _quantized_checkpoint(self) -> Path | None:
        """The quantized checkpoint, which ``checkpoint`` itself may be, as in AWML's files."""
        config = self.config.quantization
        if config is None:
            return None
        if config.checkpoint is not None:
            return config.checkpoint
        own_checkpoint = self.config.checkpoint
        return own_checkpoint if own_checkpoint is not None and is_quantized_checkpoint(own_checkpoint) else None

    def samples(self, count: int) -> list[Sample]:
        """At most ``count`` samples of the configured data. Raises InputError for unusable files."""
        data = self.config.data
        if data.path is None or not isinstance(self.model, HasData):
            return list(self.model.samples(count, data.first, data.path))
        opened = self.model.data(data.path, data.first + count, 0, self._data_options())
        return list(islice(iterate(opened), data.first, None))

    @property
    def onnx_dir(self) -> Path:
        """Folder of the ONNX files."""
        return self.config.export.onnx_dir or self.config.work_dir / "onnx"

    @property
    def engine_dir(self) -> Path:
        """Folder of the engines."""
        return self.config.tensorrt.engine_dir or self.config.work_dir / "tensorrt"

    def export(self) -> list[Exported]:
        """Write the ONNX files. Raises InputError as ``export_model`` does, and for profiles that do not fit."""
        config = self.config.export
        options = ExportOptions(
            config.opset, None if config.exporter == "auto" else config.exporter, config.fold, config.simplify
        )
        axes = {name: c.dynamic_axes for name, c in self.config.components.items() if c.dynamic_axes}
        export = partial(export_model, self.model)
        if self.config.int8:
            export = partial(export_quantized, self.model, self.quantized)
        exported = export(
            self.samples(1)[0], self.onnx_dir, options, axes=axes, files=self._files(), on_step=self.on_step
        )
        check_profiles(self.config, [item.program for item in exported], self.source)
        return exported

    @property
    def takes_files(self) -> bool:
        """Whether the model is ONNX files already, which are deployed as they are."""
        return own_files(self.model) is not None

    def take(self) -> list[Exported]:
        """Put a model's own ONNX files into the configured folder; rewritten where the configuration names an opset
        that a file lacks, or ``simplify``.

        Raises InputError for profiles that do not fit, and as ``export_files`` does.
        """
        programs = own_files(self.model)
        assert programs is not None
        check_profiles(self.config, programs, self.source)
        export, files = self.config.export, self._files()
        opset = export.opset if "opset" in export.model_fields_set else None
        if export.simplify or any(opset not in (None, p.graph.opsets.get("")) for p in programs):
            return export_files(
                self.model,
                programs,
                self.samples(SAMPLES),
                self.onnx_dir,
                opset=opset,
                simplify=export.simplify,
                files=files,
            )
        return take_files(programs, self.onnx_dir, files)

    def ensure_files(self) -> None:
        """Export where neither the configured folder nor the model itself has ONNX files."""
        if not self.onnx_dir.is_dir() and not self.takes_files:
            self.export()

    def programs(self, folder: Path | None = None) -> list[Program]:
        """The ONNX files of a folder, by default the configured one; a model's own where that is not there."""
        own = own_files(self.model) if folder is None and not self.onnx_dir.is_dir() else None
        if own is not None:
            check_profiles(self.config, own, self.source)
            return own
        programs = load_exported(self.model, folder or self.onnx_dir, self._files())
        check_profiles(self.config, programs, self.source)
        return in_int8(folder or self.onnx_dir, programs) if self.config.int8 else programs

    def build(self) -> list[BuiltEngine]:
        """Build an engine a component and write their manifest."""
        backend = self.backend(self.config.engine_backend)
        return build_engines(self.programs(), backend, self.engine_dir, self.engine_files, self.on_step, self.kept_by)

    def verify(
        self,
        folder: Path | None = None,
        *,
        test_model: Path | None = None,
        maps: Sequence[str] = (),
        voxels: Path | None = None,
        explain: bool = True,
    ) -> VerifyResult:
        """Run the scenarios on the ONNX files, which are exported first where there are none.

        ``folder`` replaces the configured one, ``test_model`` is another ``.onnx`` file for the tests (a folder, for
        several components) and ``maps`` pairs names of the two (``REFERENCE=TEST``), ``voxels`` is a file for
        ``read_voxels``, ``explain`` bisects what fails. Raises InputError where there is no scenario, and as ``verify``
        does.
        """
        config = self.config.verify
        samples = self.samples(config.samples)
        if folder is None and self.config.export.mode == "onnx":
            self.ensure_files()
        name = test_model.name if test_model else ""
        pairs = [
            (self.backend(s.reference), self.backend(s.test, test=name if s.reference == s.test else ""))
            for s in self.config.scenarios()
        ]
        if not pairs:
            raise InputError(f"{self.source}: verify.scenarios is empty for export.mode {self.config.export.mode!r}")
        options = VerifyOptions(config.tolerances, config.max_abs, voxels, explain)
        programs = self.programs(folder)
        refuse_random((program.graph for program in programs), "no outputs can be compared")
        pairs = [(self._prebuilt(a, programs), self._prebuilt(b, programs)) for a, b in pairs]
        tests = None
        if test_model is not None:
            tests = pair_programs(self.model, samples[0], programs, load_test_programs(programs, test_model), maps)
        result = verify(self.model, programs, pairs, samples, options, test_programs=tests, on_step=self.on_step)
        data = self.config.data
        result.notes += samples_left_out(self.model, data.path, config.samples, len(samples))
        result.notes += end_notes(programs, tests, maps) if tests is not None else ()
        return result

    @property
    def evaluates(self) -> bool:
        """Whether there is a stage ``evaluate``: of models that detect nothing only where the file asks for it."""
        config = self.config
        return config.evaluate.enabled and ("evaluate" in config.model_fields_set or isinstance(self.model, HasClasses))

    def evaluate(self) -> EvaluationResult:
        """Score the backends on the configured data."""
        config, data = self.config.evaluate, self.config.data
        detector = as_detector(self.model)
        opened = detector.data(data.path, config.samples, data.first, self._data_options())
        programs = self.programs()
        backends = [self._prebuilt(self.backend(spec), programs) for spec in self.config.evaluated()]
        options = EvaluationOptions(ranges=self._ranges(detector.class_names), max_drop=config.max_drop)
        return evaluate(detector, backends, opened, options, programs=programs, on_step=self.on_step)

    def _ranges(self, class_names: Sequence[str]) -> Mapping[str, float]:
        return parse_ranges(self.config.evaluate.range, class_names, f"{self.source}: evaluate.range")

    def bench(
        self, specs: Sequence[str], folder: Path | None = None, *, batch: int = 1, warmup: int = 3, repeats: int = 20
    ) -> list[BackendBench]:
        """Time backends on the ONNX files of a folder, or on files exported for this.

        Raises InputError for a batch of a model that has none.
        """
        samples = self.samples(batch)
        self.remarks = Remarks(self.model)
        for each in samples:
            self.remarks.see(each)
        sample = samples[0]
        if batch > 1:
            if not isinstance(self.model, Batches):
                raise InputError(f"--batch: {self.model.name} takes one sample at a time; expected a CenterPoint")
            sample = self.model.batch([samples[i % len(samples)] for i in range(batch)])
        backends = [self.backend(spec) for spec in specs]
        if folder is None:
            self.ensure_files()
        programs = self.programs(folder)
        return bench(
            checked(self.model), programs, backends, sample, warmup=warmup, repeats=repeats, on_step=self.on_step
        )

    def backend(self, spec: str, *, test: str = "") -> Backend:
        """A backend for a spec, made once; those on TensorRT are made as configured.

        ``test``: the name of the model that it runs instead of the reference's on the same backend. Raises
        InputError for ``torch-int8`` and for a spec that is none.
        """
        name = f"{spec} ({test})" if test else spec
        if name not in self._backends:
            parsed, config = BackendSpec.parse(spec), self.config.tensorrt
            parsed = parsed.running(test) if test else parsed
            if parsed.name == "torch-int8":
                raise InputError(f"{self.source}: torch-int8 runs modules, and files are deployed; expected ort-int8")
            options: dict[str, object] = {}
            if parsed.family == "trt":
                profiles = {n: p.shapes for c in self.config.components.values() for n, p in c.profile.items()}
                options = {
                    "python": config.python,
                    "workspace_mib": config.workspace_mib,
                    "timing_cache": config.timing_cache,
                    "keep_fp32": frozenset(config.keep_fp32),
                    "strongly_typed": config.precision == "strongly_typed",
                    "fp16_fallback": self.config.int8 and config.precision != "strongly_typed",
                    "profiles": profiles,
                    **self._engine_options,
                }
            self._backends[name] = create(parsed, **options)
        return self._backends[name]

    def _prebuilt(self, backend: Backend, programs: Sequence[Program]) -> Backend:
        """The engines of the work folder in place of the backend that builds such ones, once they are found fit."""
        engines = self.config.export.mode in ("trt", "both") or (self.engine_dir / MANIFEST).is_file()
        if not engines or backend.spec.name != self.config.engine_backend:
            return backend
        from cp_debug.backends.tensorrt.backend import PrebuiltBackend

        files = check_engines(self.engine_dir, programs, backend.versions())
        return PrebuiltBackend(backend, files)  # type: ignore[arg-type]

    def _data_options(self) -> DataOptions:
        data = self.config.data
        return DataOptions(data.root, data.sweeps, data.skip_missing)

    @property
    def kept_by(self) -> str:
        """The file and field that names what to keep in FP32."""
        return f"{self.source}: tensorrt.keep_fp32"

    @property
    def engine_files(self) -> dict[str, str]:
        """Component → name of its engine, where the configuration has one."""
        return {name: c.engine_file for name, c in self.config.components.items() if c.engine_file}

    def _files(self) -> dict[str, str]:
        return {name: c.onnx_file for name, c in self.config.components.items() if c.onnx_file}

    def check_fit(self) -> None:
        """Check backends and profiles before anything is exported or built.

        Raises BackendUnavailable, MissingPackage or InputError for a backend that cannot run here, and InputError where
        a profile has other sizes than the input of its component, which is run on one sample for that.
        """
        config = self.config
        for spec in (*config.backends, *(config.evaluated() if self.evaluates else ())):
            self.backend(spec)
        if any(component.profile for component in config.components.values()) and not self.takes_files:
            check_profiles_of_modules(self.config, self.model, self.samples(1)[0], self.source)


def turn_outputs(model: Model) -> None:
    """Let a CenterPoint count yaw from the y axis. Raises InputError for another model."""
    if not isinstance(model, TurnsYaw):
        raise InputError(f"--rot-y-axis-reference: {model.name} has no yaw; expected a CenterPoint")
    model.use_rot_y_axis_reference()


def check_components(config: DeployConfig, components: Sequence[Component], source: str) -> None:
    """Raise InputError where the configuration names components, inputs or outputs that the model lacks.

    ``source`` names the configuration in messages.
    """
    by_name = {component.name: component for component in components}
    for name, configured in config.components.items():
        if name not in by_name:
            hint = did_you_mean(name, by_name)
            raise InputError(f"{source}: components.{name}: {config.model} has no such component{hint}")
        for kind, names, expected in (
            ("inputs", configured.inputs, by_name[name].input_names),
            ("outputs", configured.outputs, by_name[name].output_names),
        ):
            if names is not None and names != list(expected):
                raise InputError(f"{source}: components.{name}.{kind} is {names}; {config.model} has {list(expected)}")


def check_profiles_of_modules(config: DeployConfig, model: Model, sample: Sample, source: str) -> None:
    """Raise InputError where a profile has another fixed size than what a component is fed with ``sample``."""
    for step in Walk(model, sample):
        component = step.component
        configured = config.components.get(component.name, ComponentConfig())
        free = configured.dynamic_axes or component.deployed_axes or component.dynamic_axes or {}
        inputs = [
            ValueInfo(name, array.dtype, tuple(free.get(name, {}).get(axis, n) for axis, n in enumerate(array.shape)))
            for name, array in step.inputs.items()
        ]
        _check(config, component.name, inputs, source, ": this configuration was made for another model")
        if not step.last:
            step.outputs = run_module(component, step.inputs)


def check_profiles(config: DeployConfig, programs: Sequence[Program], source: str) -> None:
    """Raise InputError where a profile has another shape than the graph's input."""
    for program in programs:
        _check(config, program.name, program.graph.inputs, source)


def _check(config: DeployConfig, component: str, inputs: Sequence[ValueInfo], source: str, why: str = "") -> None:
    by_name = {value.name: value for value in inputs}
    for tensor, profile in config.components.get(component, ComponentConfig()).profile.items():
        key = f"{source}: components.{component}.profile.{tensor}"
        if tensor not in by_name:
            raise InputError(f"{key}: there is no such input; expected one of {', '.join(by_name)}")
        for side, sizes in zip(("min", "opt", "max"), profile.shapes, strict=True):
            if not fits_shape(sizes, by_name[tensor].shape):
                raise InputError(f"{key}.{side} is {sizes}; {config.model} takes {by_name[tensor]}{why}")
