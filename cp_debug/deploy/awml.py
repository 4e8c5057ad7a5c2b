"""AWML's ``deploy_config.py``, old and new forms, as this project's configuration.

The keys are those of ``deployment/configs/schema.py`` in tier4/AWML, and of the earlier files with ``model_io`` and
``backend_config``. Entries about tensors of another pipeline (``voxels``, ``num_points``) are left alone.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from cp_debug.deploy.literals import read_literals
from cp_debug.deploy.schema import VARIANTS, Mode, Policy, Section, validate
from cp_debug.errors import InputError

Framework = Literal["pytorch", "onnx", "tensorrt"]
ALL = 1 << 31
"""Number of samples where AWML says -1."""
BACKENDS = {"pytorch": "torch", "onnx": "ort"}


class _Shapes(Section):
    min_shape: list[int]
    opt_shape: list[int]
    max_shape: list[int]


class _Tensor(Section):
    name: str
    dtype: str = "float32"
    shape: list[int] | None = None


class _IO(Section):
    inputs: list[_Tensor]
    outputs: list[_Tensor]
    dynamic_axes: dict[str, dict[int, str]] | None = None


class _AwmlComponent(Section):
    name: str | None = None
    onnx_file: str
    engine_file: str
    io: _IO | None = None
    tensorrt_profile: dict[str, _Shapes] = Field(default={})


class _Devices(Section):
    cpu: str = "cpu"
    cuda: str | None = "cuda:0"


class _AwmlExport(Section):
    mode: Mode = "both"
    work_dir: str = "work_dirs"
    onnx_path: str | None = None
    verify: bool | None = None
    device: str | None = None
    sample_idx: int | None = None


class _AwmlRuntime(Section):
    info_file: str | None = None
    sample_idx: int = 0
    onnx_file: str | None = None


class _Onnx(Section):
    opset_version: int = 17
    do_constant_folding: bool = True
    export_params: Literal[True] = True
    keep_initializers_as_inputs: Literal[False] = False
    simplify: bool = False
    visualize_qdq_values: bool = False
    multi_file: bool = True
    save_file: str | None = None
    input_names: list[str] | None = None
    output_names: list[str] | None = None
    dynamic_axes: dict[str, dict[int, str]] | None = None
    components: dict[str, _AwmlComponent] = Field(default={})


class _TensorRT(Section):
    precision_policy: Policy = "auto"
    max_workspace_size: int = Field(default=1 << 30, ge=1 << 20)
    plugin_libraries: list[str] = Field(default=[], max_length=0)


class _ModelInput(Section):
    input_shapes: dict[str, _Shapes] = Field(default={})
    name: str | None = None
    shape: list[int] | None = None
    dtype: str | None = None


class _BackendConfig(Section):
    type: str = "tensorrt"
    common_config: _TensorRT = _TensorRT()
    model_inputs: list[_ModelInput] | None = None


class _EvaluatedBackend(Section):
    enabled: bool = True
    device: str | None = None
    model_dir: str | None = None
    engine_dir: str | None = None
    checkpoint: str | None = None


class _Evaluation(Section):
    enabled: bool = False
    num_samples: int = Field(default=10, ge=-1)
    num_warmup_samples: int = 0
    verbose: bool = False
    backends: dict[Framework, _EvaluatedBackend] = Field(default={})
    models: dict[Framework, str | None] = Field(default={})
    models_to_evaluate: list[Framework] = Field(default=[])
    devices: dict[str, str] = Field(default={})


class _AwmlScenario(Section):
    ref_backend: Framework
    ref_device: str
    test_backend: Framework
    test_device: str


class _Verification(Section):
    enabled: bool = True
    num_verify_samples: int = 3
    tolerance: float = 0.1
    devices: _Devices = _Devices()
    scenarios: dict[Mode, list[_AwmlScenario] | None] | None = None


class _AwmlQuantization(Section):
    """AWML's quantization settings: today's ``keep_fp16``, or parts of the model as before.

    ``mode`` tells the checkpoint's origin. CenterPoint's SECOND has no residual sums and no linear layers, so
    ``quant_add``, ``quant_linear_backbone`` and ``disable_recipes`` change nothing here.
    """

    enabled: bool = False
    mode: Literal["ptq", "qat"] = "ptq"
    fuse_bn: Literal[True] = True
    quant_voxel_encoder: bool = True
    quant_backbone: bool = True
    quant_neck: bool = True
    quant_head: bool = True
    quant_add: bool = False
    quant_linear_backbone: bool = False
    skip_backbone_first_stages: int = Field(default=0, ge=0)
    skip_backbone_stages: list[int] = Field(default=[])
    sensitive_layers: list[str] = Field(default=[])
    default_precision: Literal["int8"] = "int8"
    keep_fp16: list[str] = Field(default=[])
    disable_recipes: list[str] = Field(default=[])

    def skipped(self) -> list[str]:
        """Module paths that stay unquantized."""
        parts = {
            "pts_voxel_encoder": self.quant_voxel_encoder,
            "pts_backbone": self.quant_backbone,
            "pts_neck": self.quant_neck,
            "pts_bbox_head": self.quant_head,
        }
        stages = sorted({*range(self.skip_backbone_first_stages), *self.skip_backbone_stages})
        return [
            *(path for path, quantized in parts.items() if not quantized),
            *(f"pts_backbone.blocks.{stage}" for stage in stages),
            *self.sensitive_layers,
            *self.keep_fp16,
        ]


class AwmlConfig(Section):
    """A whole file of AWML.

    ``model_io`` describes the pipeline that AWML had before components, ``model_cfg`` the model in mmdet3d's terms;
    both are not used: the command line names the model.
    """

    task_type: Literal["detection3d"] = "detection3d"
    checkpoint_path: str | None = None
    deploy_log_path: str | None = None
    model_cfg: str | None = None
    devices: _Devices = _Devices()
    export: _AwmlExport = _AwmlExport()
    components: dict[str, _AwmlComponent] = Field(default={})
    runtime_io: _AwmlRuntime = _AwmlRuntime()
    model_io: dict[str, Any] = Field(default={})
    onnx_config: _Onnx = _Onnx()
    tensorrt_config: _TensorRT | None = None
    backend_config: _BackendConfig = _BackendConfig()
    evaluation: _Evaluation = _Evaluation()
    verification: _Verification = _Verification()
    quantization: _AwmlQuantization = _AwmlQuantization()


def read_awml(path: Path) -> dict[str, Any] | None:
    """The file as a document of ``DeployConfig``, or None for one that is not Python.

    Raises InputError that names the file and the key or line.
    """
    if path.suffix != ".py":
        return None
    return _document(validate(AwmlConfig, read_literals(path), path), path)


def _document(awml: AwmlConfig, path: Path) -> dict[str, Any]:
    engine = awml.tensorrt_config or awml.backend_config.common_config
    verification, mode = awml.verification, awml.export.mode
    scenarios = None if verification.scenarios is None else verification.scenarios.get(mode) or []
    variant = VARIANTS.get(engine.precision_policy, engine.precision_policy)
    backends = BACKENDS
    if awml.quantization.enabled:
        backends, variant = {**BACKENDS, "onnx": "ort-int8"}, "int8"

    def spec(framework: str, device: str | None) -> str:
        if framework == "tensorrt" and device == "cpu":
            device = "cuda"  # AWML's export device, which does not hold for engines
        place = {"cuda": awml.devices.cuda, "cpu": awml.devices.cpu}.get(device or "", device)
        if device == "cuda" and place is None:
            raise InputError(f"{path}: devices.cuda is None, but {framework} runs on cuda; expected a device")
        name = backends.get(framework, f"trt-{variant}")
        return f"{name}@{place}" if place else name

    every = awml.evaluation.num_samples == -1
    if every and awml.evaluation.enabled and awml.runtime_io.info_file is None:
        raise InputError(f"{path}: evaluation.num_samples is -1, all, but runtime_io.info_file names no data")
    evaluated = [spec(f, b.device) for f, b in awml.evaluation.backends.items() if b.enabled]
    evaluated += [spec(f, awml.export.device) for f in (*awml.evaluation.models, *awml.evaluation.models_to_evaluate)]
    return {
        "checkpoint": awml.checkpoint_path or awml.evaluation.models.get("pytorch"),
        "work_dir": awml.export.work_dir,
        "export": {
            "mode": mode,
            "opset": awml.onnx_config.opset_version,
            "fold": awml.onnx_config.do_constant_folding,
            "simplify": awml.onnx_config.simplify,
            "onnx_dir": awml.export.onnx_path,
        },
        "components": _components(awml),
        "tensorrt": {
            "precision": engine.precision_policy,
            "workspace_mib": engine.max_workspace_size >> 20,
        },
        "quantization": {"skip_layers": awml.quantization.skipped()} if awml.quantization.enabled else None,
        "data": {
            "path": awml.runtime_io.info_file,
            "first": awml.runtime_io.sample_idx if awml.export.sample_idx is None else awml.export.sample_idx,
        },
        "verify": {
            "enabled": verification.enabled if awml.export.verify is None else awml.export.verify,
            "samples": verification.num_verify_samples,
            "max_abs": verification.tolerance,
            "scenarios": scenarios
            and [
                {"reference": spec(s.ref_backend, s.ref_device), "test": spec(s.test_backend, s.test_device)}
                for s in scenarios
            ],
        },
        "evaluate": {
            "enabled": awml.evaluation.enabled,
            "samples": ALL if every else awml.evaluation.num_samples,
            "backends": list(dict.fromkeys(evaluated)) or None,
        },
    }


def _components(awml: AwmlConfig) -> dict[str, Any]:
    """Component's own name → its entry; profiles may stand with the component or, all together, with the backend."""
    shared_profiles = {
        name: shapes
        for model_input in awml.backend_config.model_inputs or ()
        for name, shapes in model_input.input_shapes.items()
    }
    documents = {}
    for key, component in (awml.components or awml.onnx_config.components).items():
        profiles = component.tensorrt_profile or shared_profiles
        documents[component.name or key] = {
            "onnx_file": component.onnx_file,
            "engine_file": component.engine_file,
            "inputs": component.io and [t.name for t in component.io.inputs],
            "outputs": component.io and [t.name for t in component.io.outputs],
            "dynamic_axes": component.io and component.io.dynamic_axes,
            "profile": {n: {"min": s.min_shape, "opt": s.opt_shape, "max": s.max_shape} for n, s in profiles.items()},
        }
    return documents
