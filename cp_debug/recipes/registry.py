"""Finds the model that a user's text names."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal

from cp_debug import plugins
from cp_debug.errors import InputError
from cp_debug.recipes.base import Model
from cp_debug.recipes.input_files import DEFAULT_READING, Reading, first_arrays
from cp_debug.safe_text import did_you_mean

DEFAULT = "centerpoint:tiny"
PROGRAMS = (".pt2", ".pt", ".pth", ".ts", ".torchscript")
"""Suffixes of files that hold a program of torch."""
_FIELDS = ("name", "components", "samples", "feed", "decode")
"""Attributes that a ``Model`` has."""


def load_model(
    text: str,
    *,
    checkpoint: Path | None = None,
    seed: int = 0,
    inputs: Path | None = None,
    reading: Reading = DEFAULT_READING,
) -> Model:
    """Load a recipe, an ``.onnx`` file, a saved program of torch, or a callable that returns a torch module.

    ``text`` is ``centerpoint:tiny``, ``mmdet3d:CONFIG``, a plug-in's name, a file name (``.onnx``, ``.pt2`` of
    ``torch.export``, ``.pt`` of TorchScript), a folder of transformers, ``package.module:callable`` or
    ``file.py:callable``. ``checkpoint`` replaces a recipe's weights, or is strict-loaded into the callable's module.
    ``inputs`` gives a bare module, and TorchScript, which names no shapes, its example. ``reading`` says how tensors
    and images become inputs of ONNX files and of torch modules, and which sizes the free axes of ONNX files have.
    Raises InputError when the name, the file, the checkpoint or ``reading`` is unusable, MissingPackage without
    mmdet3d.
    """
    kind = kind_of(text)
    check_reading(text, kind, reading)
    if kind in ("onnx", "program", "transformers") and checkpoint is not None:
        raise InputError(f"--checkpoint: {text} already holds its weights")
    if kind == "onnx":
        from cp_debug.recipes.onnx_file import OnnxFileModel

        return OnnxFileModel(Path(text), reading)
    if kind == "centerpoint":
        from cp_debug.recipes.centerpoint.recipe import CenterPointModel

        return CenterPointModel(text.partition(":")[2] or "tiny", checkpoint=checkpoint, seed=seed)
    if kind == "mmdet3d":
        from cp_debug.recipes.mmdet3d.recipe import load_detector

        return load_detector(text, checkpoint=checkpoint, seed=seed)
    if kind == "plug-in":
        return _from_plugin(text, checkpoint, seed)
    if kind == "program":
        from cp_debug.recipes.torch_programs import load_program

        model = load_program(Path(text), None if inputs is None else first_arrays(inputs))
    elif kind == "transformers":
        from cp_debug.recipes.transformers_folder import load_folder

        model = load_folder(Path(text))
    else:
        from cp_debug.recipes.torch_programs import load_callable

        model = load_callable(text, checkpoint, inputs)
    model.reading = reading
    return model


def check_reading(text: str, kind: str, reading: Reading) -> None:
    """Raise InputError for shapes of what is no ONNX file, and for images of recipes, which read clouds."""
    if reading.shapes and kind != "onnx":
        also = ", or takes them by --inputs" if kind == "program" else ""
        raise InputError(f"--shape: {text} has its own inputs{also}; expected an .onnx file with free axes")
    if reading.images != DEFAULT_READING.images and kind not in ("onnx", "program", "transformers", "callable"):
        raise InputError(f"--image: {text} takes no images; expected an .onnx file or a torch module")


def kind_of(text: str) -> Literal["onnx", "program", "transformers", "centerpoint", "mmdet3d", "plug-in", "callable"]:
    """Kind of model that a text names, told without loading it. A plug-in goes before a module of its name.

    Raises InputError for a text that names no model, and for a name that two distributions declare.
    """
    head, _, tail = text.partition(":")
    if text.endswith(".onnx"):
        return "onnx"
    if Path(text).suffix in PROGRAMS:
        return "program"
    if is_folder(Path(text)):
        return "transformers"
    if text.endswith(".ort"):
        from cp_debug.graph.onnx_file import OTHER_FORMAT

        raise InputError(f"MODEL: {text} is {OTHER_FORMAT}")
    if text.endswith(".xml"):
        expected = "expected the .onnx file that it was made of, and this one as --test-model"
        raise InputError(f"MODEL: {text} is an IR of OpenVINO, which has no graph that others run; {expected}")
    names = [name for name, _ in known_models()]
    plugin = plugins.find(plugins.RECIPES, head)
    if plugin is not None and not plugin.own:
        return "plug-in"
    if text in names or text == "centerpoint":
        return "centerpoint"
    if head == "mmdet3d" and tail:
        return "mmdet3d"
    if head != "centerpoint" and tail and (head.endswith(".py") or re.fullmatch(r"[A-Za-z_][\w.]*", head)):
        return "callable"
    hint = did_you_mean(text, names)
    raise InputError(f"MODEL: {text!r} is not a recipe, an .onnx or .pt2 file or module:callable{hint}")


def is_folder(path: Path) -> bool:
    """Whether a path is a folder of transformers, which holds its configuration."""
    return (path / "config.json").is_file()


def known_models() -> list[tuple[str, str]]:
    """(name, one line about it) of every named model. No plug-in is imported for that."""
    from cp_debug.recipes.centerpoint.config import CONFIGS

    own = [(f"centerpoint:{name}", config.summary) for name, config in CONFIGS.items()]
    return own + [(each.name, each.about) for each in plugins.others(plugins.RECIPES)]


def _from_plugin(text: str, checkpoint: Path | None, seed: int) -> Model:
    plugin = plugins.names(plugins.RECIPES)[text.partition(":")[0]]
    load = plugin.load()
    with plugin.running():
        model = load(text, checkpoint=checkpoint, seed=seed)
    plugin.require(model, _FIELDS, "model (cp_debug.recipes.base.Model)")
    return model
