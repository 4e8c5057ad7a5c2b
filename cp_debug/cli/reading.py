"""Flags about how inputs are read from files and made up."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cp_debug.cli.typed import once, refuse, typed
from cp_debug.errors import InputError

if TYPE_CHECKING:
    from cp_debug.recipes.input_files import Reading, Shapes

PANEL = "Inputs from files, and their sizes"
INPUTS_HELP = ".npz, .npy, Polygraphy JSON, test_data_set folder, image, point cloud, or a folder of them."


class ImageLayoutFlag(str, Enum):
    """Place of the channels of an input that is an image."""

    auto = "auto"
    nchw = "nchw"
    nhwc = "nhwc"


@dataclass(frozen=True)
class ReadingFlags:
    """All options about the reading of inputs."""

    shape: Annotated[
        list[str] | None,
        typer.Option(
            help="INPUT=1x3x320x320: sizes of its free axes, made up or of an image; repeatable.", rich_help_panel=PANEL
        ),
    ] = None
    image_scale: Annotated[
        float | None,
        typer.Option(
            min=0.0, help="Factor on pixels of 0 to 255.  [default: 1/255; 1 for integers]", rich_help_panel=PANEL
        ),
    ] = None
    image_mean: Annotated[
        str | None,
        typer.Option(help="Taken off then: one number, or one a channel: 0.485,0.456,0.406.", rich_help_panel=PANEL),
    ] = None
    image_std: Annotated[
        str | None, typer.Option(help="Divisor then: one number, or one a channel.", rich_help_panel=PANEL)
    ] = None
    image_layout: Annotated[
        ImageLayoutFlag,
        typer.Option(help="Place of the channels; auto: where 1, 3 or 4 are.", rich_help_panel=PANEL),
    ] = ImageLayoutFlag.auto
    image_bgr: Annotated[
        bool, typer.Option("--image-bgr", help="Blue first, as OpenCV reads images.", rich_help_panel=PANEL)
    ] = False

    def chosen(self, model: str, *given: Path | None) -> Reading:
        """The settings that the flags ask for; ``given`` are the files and folders that inputs come from.

        Raises InputError for a wrong one, and where nothing takes it.
        """
        from cp_debug.recipes.images import ImageFormat
        from cp_debug.recipes.input_files import DEFAULT_READING, Reading
        from cp_debug.recipes.registry import check_reading, kind_of

        if not typed(f.name for f in fields(self)):
            return DEFAULT_READING
        images = ImageFormat(
            _numbers(self.image_mean, "mean") or (0.0,),
            _numbers(self.image_std, "std") or (1.0,),
            self.image_scale,
            self.image_layout.value,
            self.image_bgr,
        )
        if 0 in images.std or images.scale == 0:
            raise InputError(f"--image-{'std' if 0 in images.std else 'scale'}: 0; expected another number")
        reading = Reading(once(map(parse_shape, self.shape or ()), "--shape"), images)
        check_reading(model, kind_of(model), reading)
        names = [f.name for f in fields(self) if f.name.startswith("image_")]
        refuse(names, unless=any(map(_may_be_image, given)), why="no image is read; expected one as input")
        sized = None in given or any(map(_may_be_image, given))
        read_from = ", ".join(str(path) for path in given if path is not None)
        refuse(("shape",), unless=sized, why=f"the inputs have the sizes that {read_from} gives them")
        if model.endswith(".onnx"):
            fixed = _fixed(Path(model), reading.shapes)
            refuse(("shape",), unless=not fixed, why=f"{model} takes {fixed} and no other size")
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


def _numbers(text: str | None, flag: str) -> Sequence[float]:
    if text is None:
        return ()
    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or not all(map(math.isfinite, numbers)):
        raise InputError(f"--image-{flag}: {text!r}; expected numbers, such as 0.485,0.456,0.406")
    return numbers
