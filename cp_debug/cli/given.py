"""Files that a command line names: are they there, before anything slow is imported or done?"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from cp_debug.errors import InputError
from cp_debug.reading import check_file

if TYPE_CHECKING:
    from cp_debug.deploy.schema import DeployConfig


def check_given(
    model: str,
    *,
    inputs: Path | None = None,
    checkpoint: Path | None = None,
    test_model: Path | None = None,
    flag: str = "--inputs",
) -> None:
    """Check a model's files as far as that needs no torch; what is in the inputs is told by who reads them.

    Raises InputError for the first file that cannot be used; where it is the inputs, starting with ``flag``, which
    named them; and for a text that names no model.
    """
    from cp_debug.recipes.registry import is_folder, kind_of

    if kind_of(model) == "callable":
        _check_source(model.rpartition(":")[0])
    folders = [Path(model)] if kind_of(model) == "transformers" else []
    if test_model is not None and is_folder(test_model):
        folders.append(test_model)
    for folder in folders:
        from cp_debug.recipes.transformers_folder import check_folder

        check_folder(folder)
    if checkpoint is not None and not checkpoint.is_dir():
        check_file(checkpoint, "checkpoint")
    graphs = [Path(model)] if model.endswith(".onnx") else []
    if test_model is not None and test_model not in folders:
        graphs += sorted(test_model.glob("*.onnx")) if test_model.is_dir() else [test_model]
    if graphs:
        from cp_debug.graph.graph import Graph

        for path in graphs:
            if path.suffix != ".xml":  # an IR, which OpenVINO reads
                Graph(path)
    if inputs is not None and not inputs.exists():
        raise InputError(f"{flag}: {inputs}: no such file or folder")


def check_installed(*backends: str, trt_python: str | None = None) -> None:
    """Raise BackendUnavailable or MissingPackage for a runtime that is not there, before torch is imported."""
    from cp_debug.backends.registry import check_installed
    from cp_debug.backends.spec import BackendSpec

    check_installed(map(BackendSpec.parse, backends), trt_python)


def check_saved(path: Path) -> None:
    """Raise InputError for what is no saved result at all: no such file, or one that holds no JSON."""
    from cp_debug.reading import read_json, result_file

    read_json(result_file(path), what="saved result")


def _check_source(source: str) -> None:
    """Raise InputError where the file or module of ``source:callable`` is not there. Nothing of it is run."""
    if source.endswith(".py"):
        if not Path(source).is_file():
            raise InputError(f"MODEL: no such file {source}")
        return
    top = source.partition(".")[0]
    if not (Path(top).is_dir() or Path(f"{top}.py").is_file() or find_spec(top)):
        raise InputError(f"MODEL: cannot import {source}: there is no module {top!r} here")


def check_configured(config: DeployConfig, *, test_model: Path | None = None, flag: str = "--inputs") -> None:
    """``check_given`` for what a deployment's configuration names. The checkpoint has its own check."""
    if config.model is not None:
        check_given(config.model, inputs=config.data.path, test_model=test_model, flag=flag)
