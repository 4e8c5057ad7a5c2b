"""Schema of a deployment's configuration: its sections, their keys, and how a document is checked."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path, PurePath
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    PositiveFloat,
    PrivateAttr,
    StrictBool,
    ValidationError,
    model_validator,
)
from pydantic_core import PydanticCustomError

from cp_debug.backends.spec import BackendSpec
from cp_debug.deploy import documents
from cp_debug.errors import InputError
from cp_debug.reading import misfits
from cp_debug.safe_text import did_you_mean

SUFFIXES = (*documents.SUFFIXES, ".py")
"""Suffixes of configurations; any other text names a model."""
MOST_SAMPLES = 1_000_000
Mode = Literal["onnx", "trt", "both", "none"]
Policy = Literal["auto", "fp32", "fp32_tf32", "fp16", "bf16", "int8", "strongly_typed"]

VARIANTS: Mapping[str, str] = {"auto": "tf32", "fp32_tf32": "tf32", "strongly_typed": "fp32"}
"""TensorRT's precision policy → variant of the backend ``trt-…``; the others are called alike. ``auto`` sets no flag,
and TensorRT then computes in TF32."""


class Section(BaseModel):
    """A part of the configuration; unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    idle: ClassVar[Mapping[str, Any]] = {}
    """Keys that are known and change nothing, of sections that admit others than their own, with their defaults."""

    @model_validator(mode="before")
    @classmethod
    def _known_keys(cls, value: Any) -> Any:
        for key in value if isinstance(value, Mapping) else ():
            if key not in cls.model_fields and key not in cls.idle:
                near = did_you_mean(str(key), cls.model_fields)
                raise PydanticCustomError("unknown_key", "unknown key {key}{near}", {"key": repr(key), "near": near})
        return value


def _backend(text: str) -> str:
    try:
        return str(BackendSpec.parse(text))
    except InputError as error:
        raise ValueError(str(error).removeprefix("--backends: ")) from None


def home(path: Path) -> Path:
    """The path, in which ``~`` is the user's folder."""
    try:
        return path.expanduser()
    except RuntimeError:  # no such user
        return path


def _written(path: Path) -> Path:
    """A path that is written to. Variables of a shell are not expanded: a folder of that name would be made."""
    if "$" in str(path):
        raise ValueError(f"{str(path)!r}: variables are not expanded; expected the path itself")
    return path


def _work_folder(path: Path) -> Path:
    """A folder that is written to: with a relative path one below the folder where the command runs."""
    if not path.is_absolute() and ".." in path.parts:
        raise ValueError(f"leaves the folder where the command runs: {str(path)!r}; expected an absolute path for that")
    return path


def _file_name(text: str) -> str:
    path = PurePath(text)
    if len(path.parts) != 1 or path.parts[0] in ("/", ".."):
        raise ValueError(f"{text!r} leaves the folder; expected the name of a file in it")
    return text


HomePath = Annotated[Path, AfterValidator(home)]
WrittenPath = Annotated[HomePath, AfterValidator(_written)]
Backend = Annotated[str, AfterValidator(_backend)]
FileName = Annotated[str, AfterValidator(_file_name)]
Shape = list[Annotated[int, Field(gt=0, lt=1 << 31)]]
Count = Annotated[int, Field(gt=0, le=MOST_SAMPLES)]
"""Number of samples."""


class Profile(Section):
    """Smallest, optimal and largest shape of an input."""

    min: Shape
    opt: Shape
    max: Shape

    @model_validator(mode="after")
    def _growing(self) -> Profile:
        same_rank = len(self.min) == len(self.opt) == len(self.max)
        if not same_rank or not all(a <= b <= c for a, b, c in zip(self.min, self.opt, self.max, strict=True)):
            raise ValueError("expected min ≤ opt ≤ max in every dimension")
        return self

    @property
    def shapes(self) -> tuple[Shape, Shape, Shape]:
        """(Smallest, optimal, largest) shape."""
        return self.min, self.opt, self.max


class ComponentConfig(Section):
    """One component of the model, under its name. ``inputs`` and ``outputs`` are checked against the model's."""

    onnx_file: FileName | None = None
    engine_file: FileName | None = None
    inputs: list[str] | None = None
    outputs: list[str] | None = None
    dynamic_axes: dict[str, dict[int, str]] | None = None
    profile: dict[str, Profile] = {}


class ExportConfig(Section):
    """Export of modules to ONNX files. ``onnx_dir``: folder where modes ``trt`` and ``none`` find them."""

    mode: Mode = "onnx"
    opset: Annotated[int, Field(ge=11, le=100)] = 17
    exporter: Literal["auto", "dynamo", "torchscript"] = "auto"
    fold: bool = True
    simplify: bool = False
    rot_y_axis_reference: bool = False
    onnx_dir: HomePath | None = None


class TensorRTConfig(Section):
    """Building of engines. ``engine_dir``: folder of the engines, None for one in the work folder."""

    precision: Policy = "auto"
    workspace_mib: Annotated[int, Field(gt=0, lt=1 << 32)] | None = None
    python: str | None = None
    timing_cache: WrittenPath | None = None
    keep_fp32: list[str] = []
    engine_dir: WrittenPath | None = None

    @property
    def variant(self) -> str:
        """Variant of the backend, such as ``fp16`` of ``trt-fp16``."""
        return VARIANTS.get(self.precision, self.precision)


class QuantizationConfig(Section):
    """INT8 by Q/DQ pairs, with FP16 for the rest in engines.

    ``checkpoint``: one of `cpdebug quantize ptq` or `qat`, its folding and skips included; without one, the model is
    calibrated on ``samples`` of ``data``. ``skip_layers``: globs over module paths that stay unquantized.
    """

    checkpoint: HomePath | None = None
    method: Literal["max", "percentile", "mse", "entropy"] = "mse"
    data: HomePath | None = None
    samples: Count = 100
    skip_layers: list[str] = []


class DataConfig(Section):
    """An info file, point files or a folder of them; None: the model's own samples from ``first`` on."""

    path: HomePath | None = None
    root: HomePath | None = None
    sweeps: Annotated[int, Field(ge=0, le=1000)] = 9
    skip_missing: bool = False
    first: Annotated[int, Field(ge=0, lt=1 << 31)] = 0


class ScenarioConfig(Section):
    """A reference and a test, as on the command line: ``torch@cpu``, ``ort``, ``trt-fp16@cuda:0``."""

    reference: Backend
    test: Backend


class VerifyConfig(Section):
    """Limits and scenarios of the verification.

    ``tolerances``: relative L2 by tensor, precision or ``tensor@precision``; ``max_abs`` limits max |Δ| besides.
    ``scenarios`` None: what the export mode suggests.
    """

    enabled: bool = True
    samples: Count = 3
    tolerances: dict[str, PositiveFloat] = {}
    max_abs: NonNegativeFloat | None = None
    scenarios: list[ScenarioConfig] | None = None


class EvaluateConfig(Section):
    """Settings of the evaluation. ``backends``: the reference first; None: what the export mode suggests."""

    enabled: bool = True
    samples: Annotated[int, Field(gt=0, le=1 << 31)] = 50
    backends: Annotated[list[Backend], Field(min_length=1)] | None = None
    range: str = "model"
    max_drop: Annotated[float, Field(ge=0)] = 0.01


class DeployConfig(Section):
    """A whole configuration. Paths are relative to where the command runs, as in AWML.

    ``log_file``: file that the stages are logged to.
    """

    model: str | None = None
    checkpoint: HomePath | None = None
    work_dir: Annotated[WrittenPath, AfterValidator(_work_folder)]
    log_file: WrittenPath | None = None
    export: ExportConfig = ExportConfig()
    components: dict[str, ComponentConfig] = {}
    tensorrt: TensorRTConfig = TensorRTConfig()
    quantization: QuantizationConfig | None = None
    data: DataConfig = DataConfig()
    verify: VerifyConfig = VerifyConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    _notes: tuple[str, ...] = PrivateAttr(default=())

    @property
    def notes(self) -> tuple[str, ...]:
        """Remarks of the reader of another team's file, a line each."""
        return self._notes

    def with_notes(self, notes: Iterable[str]) -> DeployConfig:
        """A copy of the configuration with these remarks."""
        copy = self.model_copy()
        copy._notes = tuple(notes)
        return copy

    def scenarios(self) -> list[ScenarioConfig]:
        """Scenarios asked for, else torch against ONNX Runtime, and torch against the engines where there are some."""
        if self.verify.scenarios is not None:
            return self.verify.scenarios
        file, engine = "ort-int8" if self.int8 else "ort", self.engine_backend
        tests = {"onnx": [file], "trt": [engine], "both": [file, engine], "none": []}
        return [ScenarioConfig(reference="torch", test=test) for test in tests[self.export.mode]]

    def evaluated(self) -> list[str]:
        """Backends of the evaluation, the reference first."""
        if self.evaluate.backends is not None:
            return self.evaluate.backends
        return ["torch", *dict.fromkeys(s.test for s in self.scenarios() if s.test != "torch")]

    @property
    def backends(self) -> list[str]:
        """Specs of the backends that the stages need, as far as the configuration alone tells."""
        specs = [self.engine_backend] if self.export.mode in ("trt", "both") else []
        if self.verify.enabled:
            specs += [spec for scenario in self.scenarios() for spec in (scenario.reference, scenario.test)]
        return [*specs, *((self.evaluate.backends or ()) if self.evaluate.enabled else ())]

    @property
    def engine_backend(self) -> str:
        """Spec of the TensorRT backend of the configured precision; beside Q/DQ pairs, FP16 is the fallback."""
        return "trt-int8" if self.int8 else f"trt-{self.tensorrt.variant}"

    @property
    def int8(self) -> bool:
        """Whether the deployed files have Q/DQ pairs."""
        return self.quantization is not None

    @model_validator(mode="after")
    def _mixes(self) -> DeployConfig:
        if self.int8 and self.tensorrt.precision not in ("auto", "fp16", "int8", "strongly_typed"):
            raise ValueError(
                f"tensorrt.precision is {self.tensorrt.precision!r} together with quantization; expected int8, fp16 or "
                "auto, or strongly_typed, which leaves the rest in FP32"
            )
        return self


class DescribedFiles(Section):
    """Description of exported files of a CenterPoint, as `cpdebug eval` takes it; ``glue`` is over the model's own."""

    model: str
    folder: str = "."
    files: dict[Literal["pts_voxel_encoder", "pts_backbone_neck_head"], str] = {}
    glue: dict[str, Any] = {}
    engines: dict[str, str] = {}
    rot_y_axis_reference: StrictBool = False


T = TypeVar("T", bound=BaseModel)


def validate(schema: type[T], document: Any, source: Path | str) -> T:
    """Check ``document`` from ``source`` against ``schema``.

    Raises InputError with a line for everything that does not fit.
    """
    try:
        return schema.model_validate(document)
    except ValidationError as error:
        raise InputError("\n".join(f"{source}: {each}" for each in misfits(error, document))) from None
