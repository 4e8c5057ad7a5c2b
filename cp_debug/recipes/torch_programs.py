"""Modules of the user's: what a callable returns, ``torch.export``'s ``.pt2`` files and TorchScript, as models."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import io
import json
import logging
import sys
import warnings
import zipfile
from collections.abc import Coroutine, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram
from torch.utils._pytree import tree_unflatten

from cp_debug.doing import doing
from cp_debug.errors import InputError
from cp_debug.reading import readable
from cp_debug.recipes.input_files import first_arrays
from cp_debug.recipes.torch_callable import TorchModel, first_line, library_call, own_code
from cp_debug.safe_text import did_you_mean, one_line


def model_of(
    name: str,
    module: torch.nn.Module | torch.export.ExportedProgram,
    inputs: Any,
    source: str = "the callable's example inputs",
) -> TorchModel:
    """A module of any kind as a model, fed with example ``inputs`` that are from ``source``.

    Raises InputError as ``exported_model``, ``scripted_model`` and ``TorchModel`` do.
    """
    if isinstance(module, torch.export.ExportedProgram):
        return exported_model(name, module, inputs)
    if isinstance(module, torch.jit.ScriptModule):
        return scripted_model(name, module, inputs)
    return TorchModel(name, module, inputs, source=source)


def exported_model(
    name: str, program: torch.export.ExportedProgram, inputs: Any = None, parameters: Sequence[str] | None = None
) -> TorchModel:
    """An exported program as a model; ``inputs`` None takes the example inputs that the program was saved with.

    ``parameters`` names the positional arguments, where the program has other names for them.

    Raises InputError where it has none, or cannot be made a module.
    """
    args, kwargs = program.example_inputs or ((), {})
    if inputs is None and not args and not kwargs:
        raise InputError(f"MODEL: {name} has no example inputs; expected them with --inputs")
    positional, keywords = _arguments(program)
    positional = positional if parameters is None else list(parameters)
    given = inputs
    if given is None:
        given = {**dict(zip(positional, args, strict=True)), **kwargs}
    with own_code(f"MODEL: {name}: torch.export.unflatten"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = torch.export.unflatten(program)
    source = "the program's example inputs" if inputs is None else "the inputs given"
    return TorchModel(name, module, given, parameters=positional, keywords=keywords, source=source)


def scripted_model(name: str, module: torch.jit.ScriptModule, inputs: Any) -> TorchModel:
    """A TorchScript module as a model: converted to an exported program, since no exporter reads TorchScript's own.

    ``inputs`` are its example arguments. Raises InputError where torch cannot convert it: custom operators, control
    flow on the data, modules that refuse example inputs of these shapes.
    """
    from torch._export.converter import TS2EPConverter

    from cp_debug.recipes.torch_callable import flat_inputs

    arguments = [argument.name for argument in module.forward.schema.arguments[1:]]  # type: ignore[attr-defined]
    flat = flat_inputs(name, module, inputs, arguments)
    if flat.module is not module:
        raise InputError(f"MODEL: {name}: TorchScript takes tensors by position; expected a tuple of tensors")
    with own_code(f"MODEL: {name}: converting TorchScript"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = TS2EPConverter(module.eval(), tuple(flat.tensors), {}).convert()
    return exported_model(name, program, tuple(flat.tensors), flat.names)


def load_program(path: Path, inputs: Any = None) -> TorchModel:
    """A ``.pt2`` file, or a TorchScript archive; ``inputs`` are example inputs, as tensors or arrays.

    Raises InputError when the file is missing or neither, and for TorchScript without inputs.
    """
    if not path.is_file():
        raise InputError(f"MODEL: no such file {path}")
    with readable(f"MODEL: {path}", "an archive of torch.export or torch.jit"), zipfile.ZipFile(path) as archive:
        names = archive.namelist()
    content = path.read_bytes()
    if path.suffix == ".pt2":
        try:
            with library_call("torch.export.load", path), _without_log():
                program = torch.export.load(io.BytesIO(content))
        except InputError as error:
            raise InputError(f"{error}{_other_torch(content)}") from None
        with library_call("torch.export.load", path):
            return exported_model(str(path), program, inputs)
    if not any("/code/" in f"/{name}" for name in names):
        raise InputError(
            f"MODEL: {path} holds weights or a pickled module, not TorchScript: it cannot be run without its class; "
            "expected file.py:callable with --checkpoint"
        )
    try:
        with library_call("torch.jit.load", path), doing(f"torch read {path}"):
            module = torch.jit.load(io.BytesIO(content), map_location="cpu")
    except InputError as error:
        if "Unknown builtin op" not in str(error):
            raise
        advice = "expected file.py:callable that imports the library which registers it, and loads the file"
        raise InputError(f"{error} It calls a custom operator; {advice}") from None
    if inputs is None:
        raise InputError(f"MODEL: {path} is TorchScript, which has no shapes; expected one .npz file with --inputs")
    with doing(f"torch read {path}"):
        return scripted_model(str(path), module, inputs)


def _other_torch(content: bytes) -> str:
    """Remark that another torch saved a ``.pt2`` file, where the file says so; empty where it does not."""
    with suppress(Exception), zipfile.ZipFile(io.BytesIO(content)) as archive:
        for name in archive.namelist():
            if name.endswith(".json") and archive.getinfo(name).file_size < _LARGEST_JSON:
                saved_by = json.loads(archive.read(name)).get("torch_version")
                if isinstance(saved_by, str) and saved_by != torch.__version__:
                    saved_by = one_line(saved_by)[:40]
                    return f"; torch {saved_by} saved it, this is torch {torch.__version__}: export it again"
    return ""


_LARGEST_JSON = 64 * 2**20
"""Bytes of a file inside an archive up to which it is read for the version in it."""


@contextmanager
def _without_log() -> Iterator[None]:
    """Keep torch from logging the traceback of what it then raises."""
    log = logging.getLogger("torch.export")
    was, log.disabled = log.disabled, True
    try:
        yield
    finally:
        log.disabled = was


def _arguments(program: torch.export.ExportedProgram) -> tuple[list[str], list[str]]:
    """The names of the positional and of the keyword arguments of the module that was exported.

    A positional argument is called as its placeholder where it is a tensor, else ``input_0``, ``input_1`` …
    """
    flat = [str(name) for name in program.graph_signature.user_inputs]
    spec = program.call_spec.in_spec
    if spec is None:
        return flat, []
    args, kwargs = tree_unflatten(flat, spec)
    return [arg if isinstance(arg, str) else f"input_{i}" for i, arg in enumerate(args)], list(kwargs)


_EXPECTED = (
    "(module, example_inputs), the inputs a tensor, a tuple of arguments with a dict of keywords at its end, "
    "or a dict by parameter"
)
"""Form of what a callable of the user returns."""


def module_and_inputs(
    built: Any, what: str, inputs: Path | None = None, *, or_else: str = ""
) -> tuple[nn.Module | ExportedProgram, Any]:
    """The module, or exported program, and its example inputs, as the callable ``what`` of the user returned them.

    Either may come alone: its example inputs are then the first of ``inputs``, or those of an exported program, None.
    ``or_else`` is what an error about missing ones expects, too: where ``inputs`` would have come from, and "or".
    Raises InputError where the callable returned something else, or something of a class whose own methods fail.
    """
    with own_code(f"{what}: what was returned"):
        if isinstance(built, Coroutine):
            built.close()  # else Python says at the end that nobody awaited it
        alone = isinstance(built, nn.Module | ExportedProgram)
        members = tuple(built) if isinstance(built, tuple) else None
        if members is not None and len(members) == 2 and isinstance(members[0], nn.Module | ExportedProgram):
            return members
    if alone:
        if inputs is None and isinstance(built, nn.Module):
            raise InputError(f"{what} is a module without example inputs; expected {or_else}{_EXPECTED}")
        return built, None if inputs is None else first_arrays(inputs)
    kind = type(built).__name__
    if members is not None:
        kind = f"a tuple of {', '.join(type(part).__name__ for part in members) or 'nothing'}"
    raise InputError(f"{what} returned {kind}; expected {_EXPECTED}")


def load_callable(text: str, checkpoint: Path | None = None, inputs: Path | None = None) -> TorchModel:
    """Import and call ``package.module:callable`` or ``file.py:callable`` for its module and example inputs.

    A module may stand there itself, or be returned alone; its example inputs are then the first of ``inputs``.
    ``checkpoint`` is strict-loaded into the module. Raises InputError when importing, calling or loading fails.
    """
    source, _, attribute = text.rpartition(":")
    imported = _import(source)
    with own_code(f"MODEL: {text}"):  # a module may have a __getattr__
        target = getattr(imported, attribute, None)
    if not callable(target) and not isinstance(target, ExportedProgram):
        callables = (name for name, value in vars(imported).items() if callable(value))
        raise InputError(f"MODEL: {source} has no callable {attribute!r}{did_you_mean(attribute, callables)}")
    built, what = target, f"MODEL: {text}"
    if not isinstance(target, nn.Module | ExportedProgram):
        what += "()"
        with own_code(what), doing(f"{text}() was called", in_their_folder=True):
            built = target()
    module, example_inputs = module_and_inputs(built, what, inputs, or_else="them with --inputs, or ")
    if checkpoint is not None:
        from cp_debug.recipes.checkpoint import load_checkpoint

        if isinstance(module, ExportedProgram):
            raise InputError(f"--checkpoint: {text}() returned an exported program, which has its weights")
        load_checkpoint(module, checkpoint)
    return model_of(text, module, example_inputs)


def _import(source: str) -> ModuleType:
    file, here = Path(source).absolute(), str(Path.cwd())
    if source.endswith(".py") and not file.is_file():
        raise InputError(f"MODEL: no such file {source}")
    writes, sys.dont_write_bytecode = sys.dont_write_bytecode, True  # no __pycache__ beside the user's files
    try:
        with doing(f"{source} was imported", in_their_folder=True):
            return _imported(source, file, here)
    finally:
        sys.dont_write_bytecode = writes


def _imported(source: str, path: Path, working_folder: str) -> ModuleType:
    try:
        if not source.endswith(".py"):
            if working_folder not in sys.path:
                sys.path.insert(0, working_folder)
            return importlib.import_module(source)
        if str(path.parent) not in sys.path:  # last, so that its siblings hide nothing that is installed
            sys.path.append(str(path.parent))
        # One that no installed module has, and each file its own.
        name = f"_cpdebug_{path.stem}_{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:12]}"
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module  # where dataclasses and pickle look a class's module up
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[name]
            raise
        return module
    except (InputError, KeyboardInterrupt):
        raise
    except BaseException as error:  # whatever the user's file raises while it is imported
        meant = ["centerpoint:…", "mmdet3d:…"] if isinstance(error, ModuleNotFoundError) else []
        hint = did_you_mean(f"{source}:…", meant)
        raise InputError(f"MODEL: cannot import {source}: {first_line(error)}{hint}") from error
