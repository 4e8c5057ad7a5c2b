"""Models made from the objects of a Python program: a path, a proto, a module, a function, an exported program."""

from __future__ import annotations

import functools
import inspect
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from cp_debug.errors import InputError, in_one_line, module_of
from cp_debug.graph.check_inputs import check_given_inputs
from cp_debug.graph.graph import Graph
from cp_debug.graph.other_inputs import of_objects, other_inputs
from cp_debug.probes.arrays import as_numpy, is_torch
from cp_debug.recipes.abilities import with_samples
from cp_debug.recipes.base import Model, Sample
from cp_debug.recipes.input_files import DEFAULT_READING, Reading
from cp_debug.recipes.registry import kind_of, load_model

ModelLike: TypeAlias = Any
"""A recipe's name or ``file.py:callable``; the path of an ``.onnx``, ``.pt2`` or TorchScript file; an
``onnx.ModelProto``; a ``torch.nn.Module``, ``ScriptModule`` or ``ExportedProgram``; a function of tensors, or one
without arguments that returns ``(module, example_inputs)``; an object with the methods of a recipe."""


def to_model(
    model: ModelLike,
    inputs: Any = None,
    *,
    what: str = "model",
    checkpoint: str | Path | None = None,
    seed: int = 0,
    reading: Reading = DEFAULT_READING,
) -> tuple[Model, Path | None]:
    """A model, and the path of inputs that it still has to read.

    ``inputs`` are the example inputs of a module or function (a tensor, a tuple, a mapping by parameter), the arrays
    of an ONNX graph by input name (a mapping, or a list of them: one a sample), or the path of such a file, which is
    also what recipes take. ``what`` names the argument in errors. ``checkpoint`` holds the weights of a recipe or of a
    callable that text names; ``seed`` is that of a recipe's own weights,
    ``reading`` says how files and made-up values become inputs.
    Raises InputError for what is no model, for inputs that do not fit it, and for a checkpoint beside an object.
    """
    weights = None if checkpoint is None else Path(checkpoint)
    if weights is not None and not isinstance(model, str | Path):
        raise InputError(
            f"checkpoint: {weights} is for recipes and callables; load the weights into the module instead"
        )
    path = Path(inputs) if isinstance(inputs, str | Path) else None
    arrays = inputs is not None and path is None
    if isinstance(model, str | Path):
        text, kind = str(model), kind_of(str(model))
        if kind == "program" and arrays and weights is None:
            from cp_debug.recipes.torch_programs import load_program

            return load_program(Path(text), inputs), None
        if kind == "onnx":
            return _with_arrays(load_model(text, checkpoint=weights, reading=reading), inputs, path)
    elif module_of(type(model)).startswith("onnx.") and type(model).__name__ == "ModelProto":
        return _with_arrays(_of_proto(model), inputs, path)
    elif not isinstance(model, Model):
        return _of_torch(model, inputs, path, what)
    if arrays:
        name = model.name if isinstance(model, Model) else model
        raise InputError(f"inputs: {name} reads files; expected a path, not {type(inputs).__name__}")
    if isinstance(model, Model):
        return model, path
    return load_model(str(model), checkpoint=weights, seed=seed, inputs=path, reading=reading), path


def samples_in(inputs: Any, count: int) -> int:
    """Number of samples: a list of mappings is one for each, a mapping or tuple of arrays is one, else ``count``."""
    if inputs is None or isinstance(inputs, str | Path):
        return count
    several = isinstance(inputs, list) and inputs and all(isinstance(each, Mapping) for each in inputs)
    return len(inputs) if several else count


def _of_torch(model: Any, inputs: Any, path: Path | None, what: str) -> tuple[Model, Path | None]:
    import torch

    from cp_debug.recipes.torch_programs import exported_model, model_of

    if isinstance(model, torch.export.ExportedProgram):
        return exported_model(what, model, None if path else inputs), path
    if not isinstance(model, torch.nn.Module):
        if not callable(model):
            type_name = type(model).__name__
            raise InputError(f"{what}: {type_name} is no model; expected a path, a module, a program or an ONNX proto")
        name = getattr(model, "__name__", type(model).__name__)
        if isinstance(model, type) and issubclass(model, torch.nn.Module):
            raise InputError(f"{what}: {name} is a class; expected a module made of it: {name}(…)")
        if inputs is None:
            return _of_factory(model, name, what), None
        model = _function_module(model, what)
    else:
        name = type(model).__name__
    if path is not None:
        raise InputError(f"inputs: a module needs example tensors; expected them instead of the path {path}")
    if inputs is None:
        raise InputError(f"inputs: {name} needs example inputs; expected a tensor, a tuple or a mapping by parameter")
    return model_of(name, model, inputs, "the inputs given"), None


@contextmanager
def modes_kept(*models: Any) -> Iterator[None]:
    """Puts the modules among ``models`` back into the mode, train or eval, that each of their parts was in."""
    import torch

    parts = [part for model in models if isinstance(model, torch.nn.Module) for part in model.modules()]
    before = [(part, part.training) for part in parts]
    try:
        yield
    finally:
        for part, training in before:
            if part.training != training:
                part.training = training


def _of_factory(model: Any, name: str, what: str) -> Model:
    from cp_debug.recipes.torch_callable import own_code
    from cp_debug.recipes.torch_programs import model_of, module_and_inputs

    try:
        parameters = inspect.signature(model).parameters
    except (ValueError, TypeError):  # a function of C++, or one that hides what it takes
        raise InputError(f"inputs: {name}() does not say what it takes; expected example inputs for it") from None
    needed = [p for p in parameters.values() if p.default is p.empty and p.kind < 2]
    if needed:
        raise InputError(f"inputs: {name}() takes {needed[0].name!r}; expected example inputs for it")
    with own_code(f"{what}: {name}()"):
        built = model()
    return model_of(name, *module_and_inputs(built, f"{what}: {name}()"))


def _with_arrays(model: Model, inputs: Any, path: Path | None) -> tuple[Model, Path | None]:
    """An ONNX model that is fed with arrays, where ``inputs`` are arrays."""
    if inputs is None or path is not None:
        return model, path
    [component] = model.components
    names = list(component.input_names)
    if not isinstance(inputs, Mapping) and hasattr(inputs, "__array__") and hasattr(inputs, "shape"):
        inputs = (inputs,)
    several = isinstance(inputs, list) and all(isinstance(each, Mapping) for each in inputs) and inputs
    graph = Graph.shared(component.onnx_path) if component.onnx_path else None
    samples = []
    for index, each in enumerate(inputs if several else [inputs]):
        if not isinstance(each, Mapping):
            if not isinstance(each, Sequence) or isinstance(each, str | bytes):
                where = f"inputs[{index}]" if several else "inputs"
                raise InputError(f"{where}: {type(each).__name__} holds no arrays; expected a mapping by input name")
            if len(each) != len(names):
                raise InputError(f"inputs: {len(each)} arrays; expected {len(names)}: {', '.join(names)}")
            each = dict(zip(names, each, strict=True))
        kinds = {} if graph is None else other_inputs(graph)
        arrays: dict[str, np.ndarray] = {}
        for name, value in each.items():
            if (kind := kinds.get(str(name))) is not None:
                arrays |= {n: given_array(a, f"inputs: {n!r}") for n, a in of_objects(str(name), kind, value).items()}
            else:
                arrays[str(name)] = given_array(value, f"inputs: {str(name)!r}")
        if graph is not None:
            check_given_inputs(graph.inputs, arrays, f"inputs[{index}]" if several else "inputs")
        samples.append(Sample(arrays, f"inputs[{index}]" if several else "inputs"))
    return with_samples(model, samples), None


def _of_proto(proto: Any) -> Model:
    """The proto as a file in a temporary folder that lives as long as the model."""
    import onnx

    from cp_debug.recipes.onnx_file import OnnxFileModel

    folder = tempfile.TemporaryDirectory(prefix="cpdebug-")
    path = Path(folder.name) / "model.onnx"
    large = proto.ByteSize() > _PROTOBUF_LIMIT
    onnx.save(proto, path, save_as_external_data=large, location="model.onnx.data" if large else None)
    model = OnnxFileModel(path)
    model.name = proto.graph.name or "model"
    model.folder = folder  # type: ignore[attr-defined]  # removed with the last copy of the model
    return model


_PROTOBUF_LIMIT = 2_000_000_000


def given_array(value: Any, where: str) -> np.ndarray:
    """A given tensor as an array. Raises InputError, starting with ``where``, for what has neither numbers nor text."""
    try:
        array = as_numpy(value) if is_torch(value) else np.asarray(value)
    except Exception as error:  # sparse and fake tensors, lists of unequal lengths, objects that convert themselves
        raise InputError(f"{where} is not an array: {in_one_line(error)}") from error
    if array.dtype.hasobject and not all(isinstance(element, str | bytes) for element in array.flat):
        raise InputError(f"{where} is {type(value).__name__}; expected an array or a tensor")
    return array


def _function_module(function: Any, what: str) -> Any:
    """A module whose ``forward`` is the function. Raises InputError for one that calls modules of its surroundings.

    Such modules would stay behind when the function is copied into another precision or to another device.
    """
    import torch

    around = inspect.getclosurevars(function) if inspect.isfunction(function) else None
    for name, value in ({**around.globals, **around.nonlocals} if around else {}).items():
        if isinstance(value, torch.nn.Module):
            raise InputError(f"{what}: the function calls the module {name!r}; expected a module that holds it")
    name = getattr(function, "__name__", type(function).__name__)
    forward = functools.wraps(function)(lambda self, *args, **kwargs: function(*args, **kwargs))
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        raise InputError(f"{what}: {name}'s parameters are unknown; expected a function or a module") from None
    self_parameter = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
    forward.__signature__ = signature.replace(parameters=[self_parameter, *signature.parameters.values()])  # type: ignore[attr-defined]
    return type(name if name.isidentifier() else "Function", (torch.nn.Module,), {"forward": forward})()
