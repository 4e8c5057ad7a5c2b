"""Flags about how inputs are read from files and made up."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cp_debug.cli.flags import check_made_up
from cp_debug.cli.given import check_given
from cp_debug.cli.typed import once, refuse, refuse_export_flags, refuse_seed, typed
from cp_debug.errors import InputError

if TYPE_CHECKING:
    from cp_debug.recipes.input_files import Reading, Shapes

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
        from cp_debug.recipes.images import ImageFormat
        from cp_debug.recipes.input_files import DEFAULT_READING, Reading
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

    fixed = [v for v in Graph(model).inputs if v.name in shapes and v.shape == tuple(shapes[v.name])]
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
