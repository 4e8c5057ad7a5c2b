"""Callables of the user that return ``(module, example_inputs)``, as models."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import sys
from collections.abc import Coroutine
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn
from torch.export import ExportedProgram

from cp_debug.doing import doing
from cp_debug.errors import InputError
from cp_debug.recipes.input_files import first_arrays
from cp_debug.recipes.torch_callable import TorchModel, first_line, own_code
from cp_debug.recipes.torch_programs import model_of
from cp_debug.safe_text import did_you_mean

_EXPECTED = (
    "expected (module, example_inputs), the inputs a tensor, a tuple of arguments with a dict of keywords at its end, "
    "or a dict by parameter"
)
"""Form of what a callable of the user returns."""


def module_and_inputs(built: Any, what: str) -> tuple[nn.Module | ExportedProgram, Any]:
    """The module, or exported program, and its example inputs, as the callable ``what`` of the user returned them.

    An exported program may come alone: with None, its own example inputs. Raises InputError where the callable returned
    something else, or something of a class whose own methods fail.
    """
    with own_code(f"{what}: what was returned"):
        if isinstance(built, Coroutine):
            built.close()  # else Python says at the end that nobody awaited it
        if isinstance(built, ExportedProgram):
            return built, None
        members = tuple(built) if isinstance(built, tuple) else None
        if members is not None and len(members) == 2 and isinstance(members[0], nn.Module | ExportedProgram):
            return members
    kind = type(built).__name__
    if members is not None:
        kind = f"a tuple of {', '.join(type(part).__name__ for part in members) or 'nothing'}"
    raise InputError(f"{what} returned {kind}; {_EXPECTED}")


def load_callable(text: str, checkpoint: Path | None = None, inputs: Path | None = None) -> TorchModel:
    """Import and call ``package.module:callable`` or ``file.py:callable`` for its module and example inputs.

    A module may stand there itself; its example inputs are then the first of ``inputs``. ``checkpoint`` is
    strict-loaded into the module. Raises InputError when importing, calling or loading fails.
    """
    source, _, attribute = text.rpartition(":")
    imported = _import(source)
    with own_code(f"MODEL: {text}"):  # a module may have a __getattr__
        target = getattr(imported, attribute, None)
    if not callable(target) and not isinstance(target, ExportedProgram):
        callables = (name for name, value in vars(imported).items() if callable(value))
        raise InputError(f"MODEL: {source} has no callable {attribute!r}{did_you_mean(attribute, callables)}")
    module: nn.Module | ExportedProgram
    if isinstance(target, nn.Module | ExportedProgram):
        if inputs is None and isinstance(target, nn.Module):
            raise InputError(f"MODEL: {text} is a module without example inputs; expected them with --inputs")
        module, example_inputs = target, None if inputs is None else first_arrays(inputs)
    else:
        with own_code(f"MODEL: {text}()"), doing(f"{text}() was called", in_their_folder=True):
            built = target()
        module, example_inputs = module_and_inputs(built, f"MODEL: {text}()")
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
        name = private_name(path)
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


def private_name(path: Path) -> str:
    """Name of the module that a file is loaded as: one that no installed module has, and each file its own."""
    return f"_cpdebug_{path.stem}_{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:12]}"
