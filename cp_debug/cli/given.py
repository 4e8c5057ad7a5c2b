"""The files that a command line names, read and checked before anything slow is imported or done."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from cp_debug.errors import InputError
from cp_debug.reading import check_file, read_npz

if TYPE_CHECKING:
    from cp_debug.deploy.schema import DeployConfig
    from cp_debug.graph.graph import Graph, ValueInfo
    from cp_debug.recipes.data.base import DataOptions
    from cp_debug.recipes.input_files import Reading


def check_given(
    model: str,
    *,
    inputs: Path | None = None,
    samples: int = 1,
    checkpoint: Path | None = None,
    test_model: Path | None = None,
    options: DataOptions | None = None,
    truth: bool = False,
    flag: str = "--inputs",
    reading: Reading | None = None,
) -> None:
    """Read a model's files as far as that needs no torch: the graph, the weights' file, the first ``samples`` inputs.

    ``truth``: whether every sample must have ground truth. Raises InputError for the first file that cannot be used;
    where it is one of the inputs, starting with ``flag``, which named them; and for a text that names no model.
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
    opened: list[Graph] = []
    graphs = [Path(model)] if model.endswith(".onnx") else []
    if test_model is not None and test_model not in folders:
        graphs += sorted(test_model.glob("*.onnx")) if test_model.is_dir() else [test_model]
    graphs = [path for path in graphs if path.suffix != ".xml"]  # an IR, which OpenVINO reads
    if graphs:
        from cp_debug.graph.graph import Graph

        opened += [Graph(path) for path in graphs]
    if inputs is None:
        return
    try:
        _check_inputs(model, opened[0].inputs if opened else [], inputs, samples, options, truth, reading)
    except InputError as error:
        raise InputError(f"{flag}: {str(error).removeprefix('--inputs: ')}") from None


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


def _check_inputs(
    model: str,
    expected: list[ValueInfo],
    inputs: Path,
    samples: int,
    options: DataOptions | None,
    truth: bool,
    reading: Reading | None,
) -> None:
    from cp_debug.recipes.registry import kind_of

    kind = kind_of(model)
    if kind == "onnx" and not truth:
        from cp_debug.recipes.input_files import DEFAULT_READING, file_samples

        for _ in file_samples(inputs, expected, samples, reading or DEFAULT_READING):
            pass
    elif kind == "centerpoint":
        _check_clouds(model.partition(":")[2] or "tiny", inputs, samples, options, truth)
    else:
        _check_files(inputs, samples)


def _check_clouds(name: str, path: Path, count: int, options: DataOptions | None, truth: bool) -> None:
    from cp_debug.recipes.centerpoint.config import CONFIGS
    from cp_debug.recipes.data.base import iterate
    from cp_debug.recipes.data.open_data import DEFAULT_OPTIONS, open_data

    config = CONFIGS[name]
    opened = open_data(
        path,
        features=config.point_features,
        class_names=config.class_names,
        count=count,
        options=options or DEFAULT_OPTIONS,
    )
    for sample in iterate(opened):
        if truth and sample.truth is None:
            raise InputError(f"{sample.source}: has no ground truth; expected an info file (.pkl)")


def _check_files(path: Path, count: int) -> None:
    """Files for a model whose inputs are known once it is loaded: they are there, and what they seem to be."""
    if not path.exists():
        raise InputError(f"{path}: no such file or folder")
    for file in sorted(path.glob("*.npz"))[:count] if path.is_dir() else [path]:
        check_file(file, "input file")
        if file.suffix == ".npz":
            read_npz(file)


def check_configured(
    config: DeployConfig,
    samples: int,
    *,
    test_model: Path | None = None,
    truth: bool = False,
    flag: str = "--inputs",
    reading: Reading | None = None,
) -> None:
    """``check_given`` for what a deployment's configuration names. The checkpoint has its own check."""
    from cp_debug.recipes.data.base import DataOptions

    data = config.data
    if config.model is not None and data.path is None and (test_model is not None or config.model.endswith(".onnx")):
        check_given(config.model, test_model=test_model)
    if config.model is not None and data.path is not None:
        options = DataOptions(data.root, data.sweeps, data.skip_missing)
        count = data.first + samples
        check_given(
            config.model,
            inputs=data.path,
            samples=count,
            test_model=test_model,
            options=options,
            truth=truth,
            flag=flag,
            reading=reading,
        )
