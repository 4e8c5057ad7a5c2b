"""Flags that several commands share, declared once: of a command, or as the fields of a dataclass.

They are about numbers and devices, the reading of inputs, and INT8 on the fly.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_type_hints

import typer

from cp_debug.cli.given import check_given
from cp_debug.cli.typed import once, refuse, refuse_export_flags, refuse_seed, typed
from cp_debug.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cp_debug.backends.spec import BackendSpec
    from cp_debug.quantization.quantized_programs import Calibration
    from cp_debug.recipes.input_files import Reading, Shapes


MOST = 100_000
"""Largest count that a flag takes (samples, passes, draws): a larger one is a slip, and would never end."""
MOST_MADE_UP = 1000
"""Largest number of samples that nobody gave: each is made up, run on every backend and replayed."""
LONGEST_BUILD = 30 * 24 * 3600.0
"""Seconds."""
LAST_SEED = (1 << 32) - 1

Rtol = Annotated[
    float | None, typer.Option(min=0.0, help="Tolerance on max |Δ|, relative to max |reference|; none for integers.")
]
Atol = Annotated[
    float | None, typer.Option(min=0.0, help="Absolute tolerance on max |Δ|; 1 or more counts for integers.")
]

ModelName = Annotated[
    str, typer.Argument(help="A recipe (`cpdebug models`), an .onnx file, or module:callable / file.py:callable.")
]
Checkpoint = Annotated[Path | None, typer.Option(help="Weights: .pt, .safetensors, or what `cpdebug quantize` wrote.")]
QuantizedTest = Annotated[Path | None, typer.Option(help="The test's Q/DQ graph (a folder, for several components).")]
RotYAxis = Annotated[
    bool, typer.Option("--rot-y-axis-reference", help="CenterPoint: yaw from the y axis, as Autoware reads it.")
]
Scenes = Annotated[Path | None, typer.Option(help="An mmdet3d info file (.pkl); else the held-out synthetic scenes.")]
Maps = Annotated[
    list[str] | None,
    typer.Option("--map", help="REFERENCE=TEST: compare these two values; OUTPUT=: leave one out; repeatable."),
]
PlainCheckpoint = Annotated[Path | None, typer.Option(help="Weights: .pt or .safetensors.")]
SkipLayers = Annotated[list[str] | None, typer.Option(help="Layers that stay in FP32: globs; repeatable.")]
DataRoot = Annotated[Path | None, typer.Option(help="Folder that paths in the info file are relative to.")]
CalibData = Annotated[Path | None, typer.Option(help="Info file, point files, .npz or a folder; default: generated.")]
ModelOrConfig = Annotated[str, typer.Argument(help="A model, or the configuration of `cpdebug deploy`.")]
OnnxFolder = Annotated[Path | None, typer.Option(help="Folder of `cpdebug export`; default: exported now.")]
Unfolded = Annotated[bool, typer.Option("--unfolded", help="Do not fold BatchNorm.")]
SceneSeed = Annotated[int, typer.Option(min=0, max=LAST_SEED, help="Seed of inputs; first synthetic scene.")]
JsonFile = Annotated[str | None, typer.Option(help="Write JSON to a file, or to stdout with -.")]
MadeSeed = Annotated[int, typer.Option(min=0, max=LAST_SEED, help="Seed of generated inputs.")]

JsonAlone = Annotated[
    str | None, typer.Option("--json", metavar="[file|-]", help="Write JSON to a file; alone, or with -, to stdout.")
]
"""For the commands of ``main.JSON_ALONE``."""


Exporter = Literal["auto", "dynamo", "torchscript"]
"""Torch's ONNX exporters, one of which makes the deployed graph."""
CommonExporter = Annotated[Exporter, typer.Option(help="For torch models; auto: what all backends read.")]
DumpLayout = Literal["nchw", "nhwc", "flat"]
"""Order of the numbers of dumped tensors: the graph's, channels last, or the graph's without its axes."""


def chosen(exporter: Exporter) -> str | None:
    """Name of the exporter; None leaves the choice to whoever exports."""
    return None if exporter == "auto" else exporter


Command = Callable[..., None]


def grouped(command: Command) -> Command:
    """The command with a flag for each field of every parameter that is a dataclass, as Typer needs it."""
    # get_type_hints of Python 3.10 puts Optional around the hint of a default that is None, where Typer reads no flag.
    hints = inspect.get_annotations(command, eval_str=True)
    groups: dict[str, Any] = {name: hint for name, hint in hints.items() if is_dataclass(hint)}

    @wraps(command)
    def ungrouped(**given: Any) -> None:
        arguments = {
            name: group(**{f.name: given.pop(f.name) for f in fields(group)}) for name, group in groups.items()
        }
        command(**given, **arguments)

    parameters = []
    for name, parameter in inspect.signature(command).parameters.items():
        if name in groups:
            field_types = get_type_hints(groups[name], include_extras=True)
            parameters += [
                parameter.replace(name=f.name, default=f.default, annotation=field_types[f.name])
                for f in fields(groups[name])
            ]
        else:
            parameters.append(parameter.replace(annotation=hints[name]))
    ungrouped.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    ungrouped.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return ungrouped


def check_device(name: str) -> None:
    """Raise InputError for a value of --oracle-device that names no device."""
    if not re.fullmatch(r"auto|cpu|cuda(:\d{1,3})?", name):
        raise InputError(f"--oracle-device: {name!r}; expected auto, cpu, cuda or cuda:N")


def size_in_bytes(text: str, flag: str) -> int:
    """A size such as ``512M`` or ``2G`` in bytes; the letters stand for powers of 1024.

    Raises InputError for anything else.
    """
    match = re.fullmatch(r"(\d{1,6}(?:\.\d{1,3})?)\s*([KMGT]?)(?:i?B)?", text.strip(), re.IGNORECASE)
    if match is None:
        raise InputError(f"{flag}: {text!r}; expected a size such as 512M or 2G")
    return int(float(match[1]) * 1024 ** " KMGT".index(match[2].upper() or " "))


def check_made_up(samples: int, data: object, *, flag: str = "--samples", given_by: str = "--inputs") -> None:
    """Raise InputError for more samples than are made up, where no ``data`` gives them."""
    if data is None and samples > MOST_MADE_UP:
        raise InputError(f"{flag}: {samples} generated samples; expected at most {MOST_MADE_UP} without {given_by}")


INPUTS_HELP = ".npz, .npy, Polygraphy JSON, test_data_set folder, image, point cloud, or a folder of them."


@dataclass(frozen=True)
class ReadingFlags:
    """All options about the reading of inputs."""

    shape: Annotated[
        list[str] | None,
        typer.Option(help="INPUT=1x3x320x320: sizes of free axes, generated or of an image; repeatable."),
    ] = None
    image: Annotated[
        list[str] | None,
        typer.Option(
            help="How images become inputs: mean=0.485,0.456,0.406, std=, scale= (else 1/255), layout=nhwc,"
            " order=bgr; repeatable."
        ),
    ] = None

    def chosen(self, model: str, *given: Path | None) -> Reading:
        """The settings that the flags ask for; ``given`` are the files and folders that inputs come from.

        Raises InputError for a wrong one, and where nothing takes it.
        """
        from cp_debug.recipes.input_files import DEFAULT_READING, ImageFormat, Reading
        from cp_debug.recipes.registry import check_reading, kind_of

        if not typed(f.name for f in fields(self)):
            return DEFAULT_READING
        images = ImageFormat(**once(map(_image_setting, self.image or ()), "--image"))
        reading = Reading(once(map(parse_shape, self.shape or ()), "--shape"), images)
        check_reading(model, kind_of(model), reading)
        refuse(("image",), unless=any(map(_may_be_image, given)), why="no image is read; expected one as input")
        sized = None in given or any(map(_may_be_image, given))
        read_from = ", ".join(str(path) for path in given if path is not None)
        refuse(("shape",), unless=sized, why=f"the inputs have the sizes that {read_from} gives them")
        if model.endswith(".onnx"):
            fixed = _fixed(Path(model), reading.shapes)
            refuse(("shape",), unless=not fixed, why=f"{model} takes {fixed} and no other size")
        return reading

    def checked(
        self, model: str, inputs: Path | None, samples: int | None = None, *calibrated: Path | None, **given: Any
    ) -> Reading:
        """``chosen``, once ``model`` and the first ``samples`` of ``inputs`` were read (None: the one that is taken).

        ``calibrated``: data to calibrate on; ``given``: as ``check_given`` has it. Raises InputError as that does, and
        for flags about inputs and exports that would do nothing.
        """
        refuse_export_flags([model])
        check_made_up(samples or 1, inputs)
        refuse_seed([model], inputs, samples)
        reading = self.chosen(model, inputs, *calibrated)
        check_given(model, inputs=inputs, samples=samples or 1, reading=reading, **given)
        return reading


def _fixed(model: Path, shapes: Shapes) -> str:
    """The inputs of ``shapes``, in words, where each has this very shape in the file; else empty."""
    from cp_debug.graph.graph import Graph

    fixed = [v for v in Graph.shared(model).inputs if v.name in shapes and v.shape == tuple(shapes[v.name])]
    return ", ".join(map(str, fixed)) if len(fixed) == len(shapes) else ""


def _may_be_image(given: Path | None) -> bool:
    """Whether a path is an image, or a folder that holds one; what is not there is told by its reader."""
    from cp_debug.recipes.input_files import IMAGES

    if given is None:
        return False
    if given.is_dir():
        return any(path.suffix.lower() in IMAGES for path in given.iterdir())
    return given.suffix.lower() in IMAGES or not given.exists()


def parse_shape(text: str) -> tuple[str, tuple[int, ...]]:
    """``image=1x3x320x320`` → (name, sizes). Raises InputError for a text that is none."""
    name, sign, sizes = text.rpartition("=")
    parts = sizes.replace("×", "x").replace(",", "x").split("x") if sizes else []
    if not name or not sign or not all(part.isascii() and part.isdigit() and len(part) < 10 for part in parts):
        raise InputError(f"--shape: {text!r}; expected INPUT=SIZES, such as image=1x3x320x320")
    return name, tuple(map(int, parts))


def _image_setting(text: str) -> tuple[str, Any]:
    """``mean=0.5`` as a field of ``ImageFormat``. Raises InputError for a text that is none."""
    key, _, value = text.partition("=")
    words = {"layout": ("auto", "nchw", "nhwc"), "order": ("rgb", "bgr")}
    if key in words:
        if value not in words[key]:
            raise InputError(f"--image: {text!r}; expected {key}={' or '.join(words[key])}")
        return (key, value) if key == "layout" else ("bgr", value == "bgr")
    if key not in ("mean", "std", "scale"):
        raise InputError(f"--image: {text!r}; expected mean=, std=, scale=, layout= or order=")
    try:
        numbers = [float(part) for part in value.split(",")]
    except ValueError:
        numbers = []
    if not numbers or not all(map(math.isfinite, numbers)) or (key == "scale" and len(numbers) > 1):
        raise InputError(f"--image: {text!r}; expected numbers, such as mean=0.485,0.456,0.406 or scale=0.0039")
    if key != "mean" and not all(number > 0 for number in numbers):
        raise InputError(f"--image: {text!r}; expected positive numbers")
    return key, numbers[0] if key == "scale" else tuple(numbers)


Method = Literal["max", "percentile", "mse", "entropy"]
"""Method of choosing scales."""


def own_scales(specs: Sequence[BackendSpec], model: str, checkpoint: Path | None, test_model: Path | None) -> str:
    """Phrase that names what brings scales, where every backend in INT8 among ``specs`` has such; else empty.

    ``specs``: the reference first. Raises InputError for an ONNX file that cannot be read.
    """
    if not typed(f.name for f in fields(CalibrationFlags)):
        return ""
    reference = _scaled(model, checkpoint)
    sources = [reference, *[reference if test_model is None else _scaled(str(test_model), None)] * (len(specs) - 1)]
    int8_sources = [source for spec, source in zip(specs, sources, strict=True) if spec.variant.startswith("int8")]
    return f"the scales are those of {int8_sources[0]}" if int8_sources and all(int8_sources) else ""


def _scaled(model: str, checkpoint: Path | None) -> str:
    """The file with scales that a model has: a checkpoint of ``cpdebug quantize``, or a graph with Q/DQ pairs."""
    from cp_debug.graph.graph import Graph

    if checkpoint is not None:
        from cp_debug.quantization.checkpoint import file_of, is_ptq_checkpoint

        return str(checkpoint) if is_ptq_checkpoint(file_of(checkpoint)) else ""
    path = Path(model)
    files = sorted(path.glob("*.onnx")) if path.is_dir() else [path] if path.suffix == ".onnx" else []
    return next((str(file) for file in files if Graph.shared(file).precision == "int8"), "")


def check_calibration(
    model: str, data: Path | None, samples: int, flag: str = "--calib-samples", reading: Reading | None = None
) -> None:
    """Read what is calibrated on, before anything slow. Raises InputError for a file that cannot be used."""
    check_made_up(samples, data, flag=flag, given_by="--calib-data")
    if data is not None:
        check_given(model, inputs=data, samples=samples, flag="--calib-data", reading=reading)


CalibSamples = Annotated[int, typer.Option("--calib-samples", min=1, max=MOST, help="At most this many samples.")]
CalibMethod = Annotated[Method, typer.Option("--calib-method", help="How scales are chosen.")]


@dataclass(frozen=True)
class CalibrationFlags:
    """All options about calibration."""

    calib_data: Annotated[Path | None, typer.Option(help="Data to calibrate on, as --inputs.")] = None
    calib_samples: CalibSamples = 8
    calib_method: CalibMethod = "mse"
    skip_layers: SkipLayers = None

    def check(self, specs: Sequence[BackendSpec], quantized: str = "") -> None:
        """Raise InputError for a flag that was typed where no backend is calibrated here. ``quantized``: what brings
        scales of its own, in words, where something does."""
        names = ", ".join(map(str, specs))
        why = quantized or f"none of {names} runs in INT8"
        quantizes = any(spec.variant.startswith("int8") for spec in specs) and not quantized
        refuse((f.name for f in fields(self)), unless=quantizes, why=why)

    @property
    def chosen(self) -> Calibration:
        """The settings that the flags ask for."""
        from cp_debug.quantization.quantized_programs import Calibration

        skipped = tuple(self.skip_layers or ())
        return Calibration(self.calib_data, self.calib_samples, self.calib_method, skipped)
