"""Any torch module: a callable that returns ``(module, example_inputs)``."""

from __future__ import annotations

import copy
import difflib
import hashlib
import importlib
import importlib.util
import math
import sys
import warnings
from collections.abc import Coroutine, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.parameter import is_lazy

from cp_debug.doing import doing
from cp_debug.errors import InputError, ModuleFailed
from cp_debug.graph.graph import ValueInfo
from cp_debug.probes.arrays import as_numpy, is_dense
from cp_debug.probes.outputs import flatten_outputs
from cp_debug.probes.trace import as_written, trace
from cp_debug.recipes.base import Arrays, Component, NamesOnDemand, Sample, Stage
from cp_debug.recipes.input_files import DEFAULT_READING, file_samples
from cp_debug.recipes.torch_inputs import flat_inputs

TRAIN_MODE = "the module came in train mode and runs in eval mode; --test-train-mode shows what the other one does"
_LARGE = 1 << 26
"""Parameters from which on a forward on the CPU takes longer than a copy of the module without its values."""
_OTHER_IN_TRAINING = (nn.modules.dropout._DropoutNd, nn.modules.batchnorm._NormBase, nn.RNNBase)


class TorchModel:
    """A torch module with example inputs: one component, fed with the examples or with arrays like them."""

    def __init__(
        self,
        name: str,
        module: torch.nn.Module,
        example_inputs: Any,
        parameters: Sequence[str] | None = None,
        keywords: Sequence[str] = (),
        *,
        source: str = "the callable's example inputs",
    ) -> None:
        """``flat_inputs`` says what the arguments are and which are refused; ``source`` where the inputs are from."""
        self.name, self._source = name, source
        self.reading = DEFAULT_READING
        with own_code(f"MODEL: {name}: what was given"):  # its classes may answer anything with an exception
            _check_values(name, module)
            training = any(m.training for m in module.modules() if isinstance(m, _OTHER_IN_TRAINING))
            self.notes = [TRAIN_MODE] if training else []
            flat = flat_inputs(name, module.eval(), example_inputs, parameters, keywords)
            self.module = module = flat.module
            names, tensors = flat.names, flat.tensors
            self._examples = {n: as_numpy(t) for n, t in zip(names, tensors, strict=True)}
            large = _is_large(module)

        def find() -> list[str]:
            return _output_names(name, module, tensors, flat.remark)

        self.components: Sequence[Component] = [
            Component(
                name=type(module).__name__,
                input_names=names,
                output_names=NamesOnDemand(find) if large else find(),
                module=module,
                stages=[Stage(child, child) for child, _ in module.named_children()],
            )
        ]

    def samples(self, count: int, seed: int, inputs: Path | None) -> Iterator[Sample]:
        """The example inputs first, then seeded arrays of their shape, dtype, mean and spread.

        With ``inputs`` the arrays of files instead; images get the size of the example. Raises InputError for unusable
        files.
        """
        if inputs is not None:
            expected = [ValueInfo(n, a.dtype, (None,) * a.ndim) for n, a in self._examples.items()]
            shapes = {n: a.shape for n, a in self._examples.items()}
            yield from file_samples(inputs, expected, count, replace(self.reading, shapes=shapes))
            return
        if count:
            yield Sample(dict(self._examples), self._source)
        for index in range(1, count):
            rng = np.random.default_rng([seed, index])
            yield Sample({n: _like(a, rng) for n, a in self._examples.items()}, f"random like the example, seed {seed}")

    def feed(self, component: Component, sample: Sample, results: Mapping[str, Arrays]) -> dict[str, np.ndarray]:
        """The sample's arrays by input name, unchanged."""
        return sample.arrays

    def decode(self, sample: Sample, results: Mapping[str, Arrays]) -> None:
        """Nothing: a bare module has no decoder."""
        return None


_EXPECTED = (
    "expected (module, example_inputs), the inputs a tensor, a tuple of arguments with a dict of keywords at its end, "
    "or a dict by parameter"
)
"""Form of what a callable of the user returns."""


def module_and_inputs(built: Any, what: str) -> tuple[nn.Module, Any]:
    """The module and its example inputs, as the callable ``what`` of the user returned them.

    Raises InputError where it returned something else.
    """
    if isinstance(built, Coroutine):
        built.close()  # else Python says at the end that nobody awaited it
    if isinstance(built, tuple) and len(built) == 2 and isinstance(built[0], nn.Module):
        return built
    parts = ", ".join(type(part).__name__ for part in built) or "nothing" if isinstance(built, tuple) else ""
    raise InputError(f"{what} returned {f'a tuple of {parts}' if parts else type(built).__name__}; {_EXPECTED}")


def load_callable(text: str, checkpoint: Path | None = None) -> TorchModel:
    """Import and call ``package.module:callable`` or ``file.py:callable`` for its module and example inputs.

    ``checkpoint`` is strict-loaded into the module. Raises InputError when importing, calling or loading fails.
    """
    source, _, attribute = text.rpartition(":")
    imported = _import(source)
    with own_code(f"MODEL: {text}"):  # a module may have a __getattr__
        target = getattr(imported, attribute, None)
    if not callable(target):
        raise InputError(f"MODEL: {source} has no callable {attribute!r}")
    with own_code(f"MODEL: {text}()"), doing(f"{text}() was called"):
        built = target()
    module, example_inputs = module_and_inputs(built, f"MODEL: {text}()")
    if checkpoint is not None:
        from cp_debug.recipes.checkpoint import load_checkpoint

        load_checkpoint(module, checkpoint)
    return TorchModel(text, module, example_inputs)


def _import(source: str) -> ModuleType:
    with doing(f"{source} was imported"):
        return _imported(source)


def _imported(source: str) -> ModuleType:
    try:
        if not source.endswith(".py"):
            if (working_folder := str(Path.cwd())) not in sys.path:
                sys.path.insert(0, working_folder)
            return importlib.import_module(source)
        path = Path(source)
        if not path.is_file():
            raise InputError(f"MODEL: no such file {source}")
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
        near = difflib.get_close_matches(source, ["centerpoint", "mmdet3d"], n=1)
        hint = f"; did you mean {near[0]}:…?" if near and isinstance(error, ModuleNotFoundError) else ""
        raise InputError(f"MODEL: cannot import {source}: {_first_line(error)}{hint}") from error


def private_name(path: Path) -> str:
    """Name of the module that a file is loaded as: one that no installed module has, and each file its own."""
    return f"_cpdebug_{path.stem}_{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:12]}"


@contextmanager
def own_code(what: str) -> Iterator[None]:
    """Context that turns whatever the user's code raises into InputError; Ctrl-C passes.

    A limit of recursion that the code lowered is raised again: it would end what comes after.
    """
    limit = sys.getrecursionlimit()
    try:
        yield
    except (KeyboardInterrupt, InputError):
        raise
    except BaseException as error:
        raise InputError(f"{what} raised {_first_line(error)}") from error
    finally:
        sys.setrecursionlimit(max(limit, sys.getrecursionlimit()))


def _first_line(error: BaseException) -> str:
    try:
        first = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
        return f"{type(error).__name__}: {first}"
    except Exception:  # its own ``__str__`` fails
        return type(error).__name__


def _check_values(name: str, module: torch.nn.Module) -> None:
    for kind, tensor in (*module.named_parameters(), *module.named_buffers()):
        if tensor.is_meta:
            raise InputError(f"MODEL: {name}: {kind} is on the device meta, where it has no values")


def _output_names(name: str, module: torch.nn.Module, tensors: Sequence[torch.Tensor], remark: str = "") -> list[str]:
    """Names of the tensors that a forward on the examples returns.

    Raises ModuleFailed, with ``remark`` on how the examples were read, when it raises.
    """
    if (names := _names_alone(module, tensors)) is not None:
        return names
    try:
        with torch.no_grad(), as_written(), doing(f"{type(module).__name__} ran"):
            before = _weights(module)
            outputs = flatten_outputs(module(*tensors))
            if changed := _changed(before, once := _weights(module)):
                module(*tensors)  # what a first forward prepares for all others is no harm
                changed = _changed(once, _weights(module))
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # the user's forward may raise anything; a trace knows in which module
        try:
            with own_code(f"MODEL: {name}: forward"):
                trace(module, {str(i): tensor for i, tensor in enumerate(tensors)})
        except InputError as failed:
            failed.args = ("; ".join(filter(None, (str(failed), remark))),)
            raise
        raise ModuleFailed(f"MODEL: {name}: forward raised {_first_line(error)}") from error
    for path, weight in (*module.named_parameters(), *module.named_buffers()):
        if is_lazy(weight):
            raise InputError(f"MODEL: {name}: {path} has no values: it is of a lazy module that forward never reaches")
    if changed:
        raise InputError(
            f"MODEL: {name}: each forward changes its weight {changed!r}, so no two runs are of one network"
        )
    if not outputs:
        raise InputError(f"MODEL: {name}: forward returned no tensor; expected a tensor, or some in a container")
    for key, tensor in outputs.items():
        if not is_dense(tensor):
            kind = "nested" if tensor.is_nested else tensor.layout
            text = f"{kind} {tensor.dtype} on {tensor.device}"
            raise InputError(f"MODEL: {name}: forward returned {key!r} as {text}; expected dense tensors")
    return list(outputs)


def _weights(module: nn.Module) -> dict[str, tuple[float, float]]:
    """Sum and norm of each parameter that has numbers, by which a change of its values is told."""
    told = {}
    for name, weight in module.named_parameters():
        plain = type(weight) is nn.Parameter and is_dense(weight) and weight.numel()
        if plain and weight.dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
            numbers = weight.detach()
            norm = torch.linalg.vector_norm(numbers, dtype=torch.float64)
            told[name] = (float(numbers.sum(dtype=torch.float64)), float(norm))
    return told


def _changed(before: Mapping[str, tuple[float, float]], after: Mapping[str, tuple[float, float]]) -> str | None:
    """The first parameter of other values. NaN is no change."""
    plain = {name: told for name, told in after.items() if not any(map(math.isnan, told))}
    return next((name for name, told in plain.items() if told != before.get(name, told)), None)


def _is_large(module: nn.Module) -> bool:
    """Whether a forward on the CPU takes long, and one that has no values may do."""
    hooked = any(m._forward_hooks or m._forward_pre_hooks for m in module.modules())  # they may keep what they see
    stored = chain(module.parameters(), module.buffers())
    return not hooked and not isinstance(module, torch.jit.ScriptModule) and sum(map(torch.numel, stored)) >= _LARGE


def _names_alone(module: nn.Module, tensors: Sequence[torch.Tensor]) -> list[str] | None:
    """Names of the outputs of a large module, from a forward of a copy that has shapes and no values.

    None where that is not worth it, or where only values tell: then a forward on the CPU has to.
    """
    if not _is_large(module):
        return None
    stored = [*module.parameters(), *module.buffers()]
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            twins = {id(t): torch.empty_like(t, device="meta") for t in stored}
            twins |= {
                id(p): nn.Parameter(twins[id(p)], requires_grad=p.requires_grad) for p in module.parameters()
            }  # fmt: skip
            copied = copy.deepcopy(module, twins)
            with torch.device("meta"):
                outputs = flatten_outputs(copied(*(t.to("meta") for t in tensors)))
    except Exception:  # an operator that needs values, or whatever the user's code raises
        return None
    plain = all(type(t) is torch.Tensor and t.is_meta and t.layout is torch.strided for t in outputs.values())
    return list(outputs) if outputs and plain else None


def _like(array: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    if array.dtype.kind == "f":
        return rng.normal(array.mean(), array.std(), array.shape).astype(array.dtype)
    return rng.permutation(array.reshape(-1)).reshape(array.shape)
