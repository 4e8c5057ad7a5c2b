"""Schema of AWML's ``deploy_config.py``: every key of its generations, and which of them say nothing to this project.

The keys are those of ``deployment/configs/schema.py`` in tier4/AWML, of the earlier files with ``model_io`` and
``backend_config``, and of the branches on which quantization was developed.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field

from cp_debug.deploy.schema import Mode, Policy, Section


def _word(value: Any) -> Any:
    """A word of a list, which AWML takes in capitals, too."""
    return value.strip().lower() if isinstance(value, str) else value


Framework = Annotated[Literal["pytorch", "onnx", "tensorrt"], BeforeValidator(_word)]
ExportMode = Annotated[Mode, BeforeValidator(_word)]
Device = Annotated[str, BeforeValidator(_word)]


class AwmlSection(Section):
    """A part of AWML's file, which may hold idle keys."""

    model_config = ConfigDict(extra="allow")


def _idle(names: str, **defaults: Any) -> dict[str, Any]:
    """Idle keys by their defaults; those of ``names`` have none."""
    return dict.fromkeys(names.split()) | defaults


def _policy(value: Any) -> Any:
    """INT8 by Q/DQ nodes had a name of its own in older files."""
    return "int8" if value == "explicit_int8" else value


def _no_plugins(libraries: list[str]) -> list[str]:
    """No library: what plug-ins compute is known neither to ONNX Runtime nor to the oracle."""
    if libraries:
        raise ValueError(
            f"engines with plug-in libraries ({', '.join(libraries)}) are not built; expected an empty list"
        )
    return libraries


class Shapes(AwmlSection):
    """Shapes of a profile."""

    min_shape: list[int]
    opt_shape: list[int]
    max_shape: list[int]


class Tensor(AwmlSection):
    """One input or output of a file; types are the exported module's."""

    idle = _idle("shape", dtype="float32")
    name: str


class IO(AwmlSection):
    """Inputs and outputs of a file."""

    inputs: list[Tensor]
    outputs: list[Tensor]
    dynamic_axes: dict[str, dict[int, str]] | None = None


class AwmlComponent(AwmlSection):
    """One file that is exported, and its engine."""

    name: str | None = None
    onnx_file: str
    engine_file: str | None = None
    io: IO | None = None
    tensorrt_profile: dict[str, Shapes] = Field(default={})


class EngineFile(AwmlSection):
    """An engine's name, where it stands with TensorRT's settings."""

    onnx_file: str | None = None
    engine_file: str


class Devices(AwmlSection):
    """Devices that the words ``cpu`` and ``cuda`` mean."""

    cpu: Device = "cpu"
    cuda: Device | None = "cuda:0"


class AwmlExport(AwmlSection):
    """Export: its mode, its folders and its sample."""

    mode: ExportMode = "both"
    work_dir: str = "work_dirs"
    onnx_path: str | None = None
    checkpoint_path: str | None = None
    verify: bool | None = None
    device: Device | None = None
    sample_idx: int | None = None


class AwmlRuntime(AwmlSection):
    """Data."""

    idle = _idle("onnx_file")
    info_file: str | None = None
    sample_idx: int = 0


class Onnx(AwmlSection):
    """The export to ONNX."""

    idle = _idle("save_file input_names output_names dynamic_axes", visualize_qdq_values=False, multi_file=True)
    opset_version: int = 17
    do_constant_folding: bool = True
    export_params: Literal[True] = True
    keep_initializers_as_inputs: Literal[False] = False
    simplify: bool = False
    components: dict[str, AwmlComponent] = Field(default={})


class CommonTensorRT(AwmlSection):
    """Settings of every engine."""

    idle = _idle("", disable_optimizations=False)
    precision_policy: Annotated[Policy, BeforeValidator(_policy)] = "auto"
    max_workspace_size: int = Field(default=1 << 30, ge=1 << 20)
    plugin_libraries: Annotated[list[str], AfterValidator(_no_plugins)] = Field(default=[])


class ModelInput(AwmlSection):
    """Profiles, all together."""

    idle = _idle("name shape dtype")
    input_shapes: dict[str, Shapes] = Field(default={})


class TensorRT(CommonTensorRT):
    """Settings of engines, with or without ``common_config`` around the common ones."""

    common_config: CommonTensorRT | None = None
    model_inputs: list[ModelInput] | None = None
    components: dict[str, EngineFile] = Field(default={})


class BackendConfig(AwmlSection):
    """TensorRT's settings, as earlier files have them."""

    type: Literal["tensorrt"] = "tensorrt"
    common_config: CommonTensorRT = CommonTensorRT()
    model_inputs: list[ModelInput] | None = None


class EvaluatedBackend(AwmlSection):
    """One backend that may be scored."""

    enabled: bool = False
    device: Device | None = None
    model_dir: str | None = None
    engine_dir: str | None = None
    checkpoint: str | None = None


class Evaluation(AwmlSection):
    """Evaluation: its backends and the number of samples."""

    idle = _idle("devices", num_warmup=0, num_warmup_samples=0, verbose=False)
    enabled: bool = False
    num_samples: int = Field(default=10, ge=-1)
    backends: dict[Framework, EvaluatedBackend] = Field(default={})
    models: dict[Framework, str | None] = Field(default={})
    models_to_evaluate: list[Framework] = Field(default=[])
    pytorch_device: Device | None = None
    onnx_device: Device | None = None
    tensorrt_device: Device | None = None


class AwmlScenario(AwmlSection):
    """A reference and a test."""

    ref_backend: Framework
    ref_device: Device
    test_backend: Framework
    test_device: Device


class Verification(AwmlSection):
    """Verification: its scenarios, their devices, and the limit of max |Δ|."""

    enabled: bool = True
    num_verify_samples: int = 3
    tolerance: float = 0.1
    devices: Devices | None = None
    scenarios: dict[ExportMode, list[AwmlScenario] | None] | None = None


class AwmlCalibration(AwmlSection):
    """Calibration as the first INT8 files have it; the least squared error is that of the outputs here."""

    idle = _idle("cache_path")
    num_batches: int | None = Field(default=None, ge=1)
    method: Literal["histogram", "max"] = "histogram"
    amax_method: Literal["max", "percentile", "mse", "entropy"] | None = None


class Fusion(AwmlSection):
    """Folding of BatchNorm."""

    fuse_bn: Literal[True] = True


class AwmlPrecision(AwmlSection):
    """Precisions of parts; what is INT8 here begins at the first layer, and outputs are never quantized."""

    idle = _idle("first_layer_input")
    default_input: Literal["int8"] = "int8"
    default_weight: Literal["int8"] = "int8"
    last_layer_output: Literal["fp16", "fp32"] = "fp16"


class Ptq(AwmlSection):
    """Calibration of a checkpoint that is quantized; it is made here where it is missing."""

    idle = _idle("batch_size calib_seed")
    checkpoint: str | None = None
    calibrate_samples: int | None = Field(default=None, ge=1)
    amax_method: Literal["max", "percentile", "mse", "entropy"] | None = None


class AwmlQuantization(AwmlSection):
    """AWML's quantization settings: today's ``keep_fp16``, parts of the model as before, and the first form's blocks.

    CenterPoint's SECOND has no residual sums and no linear layers, so ``quant_add``, ``quant_linear_backbone`` and
    ``disable_recipes`` change nothing there; what is residual elsewhere is quantized.
    """

    idle = _idle(
        "mode quant_add quant_linear_backbone quant_ese_mul_identity quant_ese_pool_input quant_maxpool_input "
        "disable_recipes ptq_checkpoint calib_cache_path qat",
    )
    enabled: bool = False
    mode: Literal["ptq", "qat"] | None = None
    fuse_bn: Literal[True] = True
    quant_voxel_encoder: bool = True
    quant_backbone: bool = True
    quant_neck: bool = True
    quant_head: bool = True
    skip_backbone_first_stages: int = Field(default=0, ge=0)
    skip_backbone_stages: list[int] = Field(default=[])
    skip_backbone_downsample_all: bool = False
    skip_backbone_downsample_layers: list[int] = Field(default=[])
    skip_vovnet_stages: list[Annotated[int, Field(ge=0, lt=8)]] | None = None
    sensitive_layers: list[str] = Field(default=[])
    default_precision: Literal["int8"] = "int8"
    keep_fp16: list[str] = Field(default=[])
    calibration: AwmlCalibration = AwmlCalibration()
    fusion: Fusion = Fusion()
    precision: AwmlPrecision = AwmlPrecision()
    ptq: Ptq | None = None

    def skipped(self) -> list[str]:
        """Module paths that stay unquantized."""
        parts = {
            "pts_voxel_encoder": self.quant_voxel_encoder,
            "pts_backbone": self.quant_backbone,
            "pts_neck": self.quant_neck,
            "pts_bbox_head": self.quant_head,
        }
        stages = sorted({*range(self.skip_backbone_first_stages), *self.skip_backbone_stages})
        downsampling = [f".{index}" for index in self.skip_backbone_downsample_layers]
        if self.skip_backbone_downsample_all:
            downsampling = [""]
        return [
            *(path for path, quantized in parts.items() if not quantized),
            *(f"pts_backbone.blocks.{stage}" for stage in stages),
            *(f"pts_backbone.downsample_layers{which}" for which in downsampling),
            *(f"pts_backbone.{f'stage{stage + 1}' if stage else 'stem'}" for stage in self.skip_vovnet_stages or ()),
            *self.sensitive_layers,
            *self.keep_fp16,
        ]


class AwmlConfig(AwmlSection):
    """A whole file of AWML.

    ``model_io`` describes the pipeline that AWML had before components, and the settings behind ``class_names`` its own
    metric.
    """

    idle = _idle(
        "class_names perception_evaluator_configs critical_object_filter_config frame_pass_fail_config frame_id",
        model_io={},
    )
    task_type: Literal["detection3d"] = "detection3d"
    checkpoint_path: str | None = None
    deploy_log_path: str | None = None
    output_path: str | None = None
    model_cfg: str | None = None
    devices: Devices = Devices()
    export: AwmlExport = AwmlExport()
    components: dict[str, AwmlComponent] = Field(default={})
    runtime_io: AwmlRuntime = AwmlRuntime()
    data_root: str | None = None
    onnx_config: Onnx = Onnx()
    tensorrt_config: TensorRT | None = None
    backend_config: BackendConfig = BackendConfig()
    evaluation: Evaluation = Evaluation()
    verification: Verification = Verification()
    quantization: AwmlQuantization = AwmlQuantization()

    @property
    def engine(self) -> CommonTensorRT:
        """TensorRT's common settings, wherever they stand."""
        if self.tensorrt_config is None:
            return self.backend_config.common_config
        return self.tensorrt_config.common_config or self.tensorrt_config

    @property
    def model_inputs(self) -> list[ModelInput]:
        """Profiles that do not stand with a component."""
        of = self.backend_config if self.tensorrt_config is None else self.tensorrt_config
        return of.model_inputs or []


def idle_keys(section: Section, path: str = "") -> Iterator[str]:
    """Idle keys that a file sets to other than their default, as dotted paths."""
    for name, value in section:
        if name in section.idle:
            if value != section.idle[name] and value is not None:
                yield f"{path}{name}"
        elif name in section.model_fields_set:
            yield from _idle_within(value, f"{path}{name}")


def _idle_within(value: Any, where: str) -> Iterator[str]:
    if isinstance(value, Section):
        yield from idle_keys(value, f"{where}.")
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _idle_within(item, f"{where}.{key}")
    elif isinstance(value, list):
        for item in value:
            yield from _idle_within(item, where)
