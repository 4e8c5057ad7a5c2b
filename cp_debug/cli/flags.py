"""Flags that several commands share, declared once as the fields of a dataclass."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from cp_debug.errors import InputError

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
JsonFile = Annotated[str | None, typer.Option(help="Write JSON to a file, or to stdout with -.")]
MadeSeed = Annotated[int, typer.Option(min=0, max=LAST_SEED, help="Seed of generated inputs.")]

JsonAlone = Annotated[
    str | None, typer.Option("--json", metavar="[file|-]", help="Write JSON to a file; alone, or with -, to stdout.")
]
"""For the commands of ``main.JSON_ALONE``."""

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
