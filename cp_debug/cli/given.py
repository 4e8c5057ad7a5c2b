"""The files that a command line names: what is read is checked before anything slow, what is written replaces none."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cp_debug.errors import InputError, system_reason
from cp_debug.files import check_target as check_writable
from cp_debug.files import missing_folders, partial_name, resolved
from cp_debug.reading import RESULT, check_file, read_json, read_npz

if TYPE_CHECKING:
    from cp_debug.deploy.schema import DeployConfig
    from cp_debug.graph.graph import Graph
    from cp_debug.recipes.data.base import DataOptions
    from cp_debug.recipes.input_files import Reading


OUTPUTS = {"charts", "csv", "html", "json", "junit", "log", "onnx", "output", "plot", "predictions", "save"}
"""Parameters of commands that name what is written; every other text or path may name what is read."""
SCHEMAS = "cpdebug."
"""Beginning of the ``schema`` of every JSON document that a command writes."""
FILES = {"csv", "html", "json", "junit", "plot", "predictions"}
"""Parameters of those that are files, in folders that must be there."""
ALONE = ("csv", "json")
"""Those of which ``-`` is stdout, which then holds nothing else."""
_MADE = OUTPUTS | {"cache", "engine_cache", "shared", "timing_cache"}
"""Parameters that name what is made where it does not exist."""
DEEPEST = 400
"""Largest number of folders around an output: to make them takes a call within a call each."""
_OPENED: list[Graph] = []
"""The graphs that the command has read, held so that none is read again while it runs."""


def check_outputs(given: Mapping[str, Any], flags: Mapping[str, str]) -> None:
    """Raise InputError where an output would replace a file that the same command line reads, or another output, or
    lies too deep, or where its folder is missing.

    ``given``: parameter → value; ``flags``: parameter → its spelling.
    """
    for name, value in given.items():
        if name in _MADE and isinstance(value, (str, Path)) and Path(value).parts[:1] == ("~",):
            why = "~ is for the shell, which leaves it alone in quotes and after a ="
            raise InputError(f"{flags[name]}: {value}: {why}; expected the whole path, or $HOME")
    if all(str(given.get(name)) == "-" for name in ALONE):
        raise InputError("--csv: - is the standard output, which --json uses already; expected a file for one of them")
    outputs = [(flags[name], str(value)) for name, value in given.items() if name in OUTPUTS and _names_file(value)]
    for flag, output in outputs:
        if (folders := len(Path(output).parts)) > DEEPEST:
            raise InputError(f"{flag}: {output}: {folders} nested folders; expected at most {DEEPEST}")
    for place, (flag, output) in enumerate(outputs):
        for other, text in outputs[:place]:
            if resolved(Path(output)) == resolved(Path(text)) and not _is_special(output):
                raise InputError(f"{flag}: {output} is the file of {other} too; expected another")
        for name, value in given.items():
            if name in OUTPUTS:
                continue
            for text in value if isinstance(value, (list, tuple)) else [value]:
                if not _names_file(text):
                    continue
                if _same_file(output, str(text)):
                    raise InputError(f"{flag}: {output} is what {flags[name]} reads; expected another file")
                if _is_part(Path(output), Path(str(text))):
                    raise InputError(f"{flag}: {output} is a part of what {flags[name]} reads; expected another file")
                if given.get("overwrite") and Path(output).is_dir() and _lies_in(str(text), Path(output)):
                    raise InputError(f"{flag}: --overwrite would remove {text}, which {flags[name]} reads, with it")


def check_folders(given: Mapping[str, Any], flags: Mapping[str, str]) -> None:
    """Raise InputError for a file that could not be written at the end, unless another output makes its folder.

    ``given`` and ``flags``: as ``check_outputs`` has them.
    """
    made = [resolved(Path(str(v))) for n, v in given.items() if n in OUTPUTS - FILES and _names_file(v)]
    for name, value in given.items():
        if name not in FILES or not (_names_file(value) or (str(value) == "-" and name not in ALONE)):
            continue
        folder = resolved(Path(str(value))).parent
        if not folder.exists() and any(place in (folder, *folder.parents) for place in made):
            continue
        try:
            check_writable(Path(str(value)))
        except InputError as error:
            raise InputError(f"{flags[name]}: {error}") from None


@contextmanager
def no_empty_folders(given: Mapping[str, Any]) -> Iterator[None]:
    """Context that, where it fails, removes the empty folders that it made for the outputs among ``given``."""
    outputs = [Path(str(value)) for name, value in given.items() if name in OUTPUTS and _names_file(value)]
    new = {folder for output in outputs for folder in missing_folders(output)}
    try:
        yield
    except BaseException:
        for folder in sorted(new, key=lambda folder: -len(folder.parts)):
            with suppress(OSError):  # not made, or not empty
                folder.rmdir()
        raise


def _names_file(value: object) -> bool:
    return isinstance(value, (str, Path)) and str(value) not in ("", "-") and "\0" not in str(value)


def _is_special(path: str) -> bool:
    """Whether the path is a folder, a device or a pipe."""
    with suppress(OSError):
        return Path(path).exists() and not Path(path).is_file()
    return False


def _same_file(output: str, text: str) -> bool:
    """Whether ``text``, which may be ``file.py:callable``, names the file ``output``."""
    with suppress(OSError):
        places = (Path(text), Path(text.rpartition(":")[0]))
        return Path(output).is_file() and any(place.exists() and place.samefile(output) for place in places)
    return False


def _lies_in(text: str, folder: Path) -> bool:
    """Whether ``text``, which may be ``file.py:callable``, names a file or folder in ``folder``."""
    with suppress(OSError):
        places = [Path(part) for part in (text, text.rpartition(":")[0]) if part]
        return any(place.exists() and resolved(folder) in resolved(place).parents for place in places)
    return False


_PARTS = {"manifest.json", RESULT}
_REPORTS = {".json", ".csv", ".html", ".md", ".xml", ".svg", ".png", ".log", ".txt"}


def _is_part(output: Path, folder: Path) -> bool:
    """Whether a file lies in a folder that is read, and is no report of an earlier run."""
    with suppress(OSError):
        inside = folder.is_dir() and output.is_file() and folder.resolve() in output.resolve().parents
        return inside and (output.name in _PARTS or output.suffix not in _REPORTS)
    return False


def is_ours(folder: Path) -> bool:
    """Whether an earlier run wrote the folder: a saved result, also an incomplete one, or a capture."""
    files = (folder / RESULT, folder / "manifest.json", *folder.glob("sample-0/*/manifest.json"))
    return any(_has_schema(file) for file in files)


def _has_schema(file: Path) -> bool:
    """Whether a file is a JSON document of this project's."""
    try:
        document = read_json(file)
    except InputError:
        return False
    return isinstance(document, dict) and str(document.get("schema")).startswith(SCHEMAS)


def check_target(flag: str, folder: Path, overwrite: bool) -> None:
    """Raise InputError where ``folder`` cannot be written as ``flag`` says, before anything long."""
    if str(folder) == "-":
        raise InputError(f"{flag}: -; expected the name of a folder")
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    if not folder.is_dir() or not is_ours(folder):
        raise InputError(f"{flag}: {folder} exists and was not written by cpdebug; expected a new or empty folder")
    if not overwrite:
        raise InputError(f"{flag}: {folder} holds an earlier run; --overwrite replaces it")
    if resolved(folder) in (here := resolved(Path()), *here.parents):
        raise InputError(f"{flag}: --overwrite would remove {folder}, in which this command runs; expected another")


def check_new(flag: str, files: Iterable[Path], overwrite: bool) -> None:
    """Raise InputError where one of the files that a command is to write exists, before anything long."""
    earlier = next((file for file in files if file.exists()), None)
    if earlier is not None and not overwrite:
        raise InputError(f"{flag}: {earlier} exists already; --overwrite replaces it")


def has_result(folder: Path) -> bool:
    """Whether a folder has the result of a run: captures alone do not open as one."""
    return _has_schema(folder / RESULT)


@contextmanager
def replacing(flag: str, folder: Path, overwrite: bool, usable: Callable[[Path], bool] = is_ours) -> Iterator[Path]:
    """A folder to write to, which takes the place of an earlier run's when the block succeeds; else that one stays.

    An empty folder is given as it is: it may be where something is mounted. A new one stays where the block is
    interrupted if what is in it is ``usable``. Raises InputError as ``check_target`` does.
    """
    check_target(flag, folder, overwrite)
    there = folder.exists()
    if there and not any(folder.iterdir()):
        try:
            yield folder.absolute()
        except BaseException as error:
            if isinstance(error, Exception) or not usable(folder):
                _empty(folder)
            raise
        return
    # Nobody takes it for whole where the process is killed; the user's code may go to another working folder.
    partial = partial_name(folder).absolute()
    try:
        try:
            yield partial
        except BaseException as error:
            if isinstance(error, OSError) and str(error.filename).startswith(str(partial)):
                raise InputError(f"{flag}: {folder}: cannot be written ({system_reason(error)})") from None
            if not isinstance(error, Exception) and not there and usable(partial):
                partial.replace(folder)
            raise
        try:
            if there:
                shutil.rmtree(folder)
            partial.replace(folder)
        except OSError as error:
            raise InputError(f"{flag}: {folder} cannot be replaced ({error.strerror or error})") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _empty(folder: Path) -> None:
    """Remove what was written into a folder that was new or empty, by a command that failed."""
    for entry in folder.iterdir() if folder.is_dir() else ():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry, ignore_errors=True)
        else:
            entry.unlink(missing_ok=True)


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

    if (kind := kind_of(model)) == "callable":
        _check_source(model.rpartition(":")[0])
    folders = [Path(model)] if kind == "transformers" else []
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

        opened += [Graph.shared(path) for path in graphs]
        _OPENED[:] = opened
    if inputs is None:
        return
    try:
        if kind == "onnx" and not truth:
            from cp_debug.recipes.input_files import DEFAULT_READING, file_samples

            for _ in file_samples(inputs, opened[0].inputs if opened else [], samples, reading or DEFAULT_READING):
                pass
        elif kind == "centerpoint":
            _check_clouds(model.partition(":")[2] or "tiny", inputs, samples, options, truth)
        else:
            _check_files(inputs, samples)
    except InputError as error:
        raise InputError(f"{flag}: {str(error).removeprefix('--inputs: ')}") from None


def check_installed(*backends: str, trt_python: str | None = None) -> None:
    """Raise BackendUnavailable or MissingPackage for a runtime that is not there, before torch is imported."""
    from cp_debug.backends.registry import check_installed
    from cp_debug.backends.spec import BackendSpec

    check_installed(map(BackendSpec.parse, backends), trt_python)


def check_saved(path: Path) -> None:
    """Raise InputError for what is no saved result at all: no such file, or one that holds no JSON."""
    from cp_debug.reading import result_file

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
    if config.model is None or (data.path is None and test_model is None and not config.model.endswith(".onnx")):
        return
    check_given(
        config.model,
        inputs=data.path,
        samples=data.first + samples,
        test_model=test_model,
        options=DataOptions(data.root, data.sweeps, data.skip_missing),
        truth=truth,
        flag=flag,
        reading=reading,
    )
