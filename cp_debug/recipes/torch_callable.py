"""Any torch module with example inputs as a model: nested containers of tensors become flat, named inputs."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from cp_debug.doing import doing
from cp_debug.errors import CpdebugError, InputError, ModuleFailed, library_reason
from cp_debug.graph.graph import ValueInfo
from cp_debug.probes.arrays import as_numpy, is_dense, layout_of
from cp_debug.probes.caveats import IN_EVAL_MODE
from cp_debug.probes.module_state import ModuleState, state_kept
from cp_debug.probes.trace import as_written, flatten_outputs, trace
from cp_debug.recipes.base import Component, NamesOnDemand, Sample, Stage, Unglued
from cp_debug.recipes.input_files import DEFAULT_READING, count_samples, file_samples
from cp_debug.safe_text import some

Build = Callable[[Iterator[Tensor]], Any]
"""Makes a value again out of its tensors, which it takes from the iterator in their order."""


@dataclasses.dataclass(frozen=True)
class FlatInputs:
    """The tensors of a call, by name, and the module that takes them by position."""

    names: list[str]
    """Names of the parameters (``image``), and below them of keys or indices (``batch.image``, ``levels.0``)."""
    tensors: list[Tensor]
    module: nn.Module
    """The module itself where it takes the tensors as they stand; else a shallow copy of it, with the same submodules,
    parameters and paths, whose ``forward`` puts the containers together again."""
    remark: str = ""
    """Reading of a mapping that might have been meant as keyword arguments: for the error of a ``forward`` that
    cannot use it."""


def flat_inputs(
    name: str,
    module: nn.Module,
    inputs: Any,
    parameters: Sequence[str] | None = None,
    keywords: Sequence[str] = (),
) -> FlatInputs:
    """Flatten the example inputs of ``module``: a tensor, a tuple or list of arguments, or a mapping by parameter.

    A mapping at the end of a tuple holds keyword arguments where ``forward`` takes them so (``with_keywords``).
    An argument is a tensor or an array, or a mapping, list, tuple or dataclass of them, nested at will. Numbers, text
    and None in it are constants of the call. ``parameters`` names the positional arguments and ``keywords`` those
    that are passed by name, where the signature of ``forward`` does not say so.
    Raises InputError, with ``name``, for arguments that ``forward`` lacks and for tensors that are not dense.
    """
    if isinstance(inputs, Tensor | np.ndarray):
        inputs = (inputs,)
    if not isinstance(inputs, list | tuple | Mapping):
        type_text = f"the example inputs are {type(inputs).__name__}"
        raise InputError(f"MODEL: {name}: {type_text}; expected tensors, in a tuple or by parameter")
    signature = _parameters(module) if parameters is None else _named(parameters, keywords)
    known = [p.name for p in signature if p.kind not in _STARS]
    by_name = {p.name for p in signature if p.kind is inspect.Parameter.KEYWORD_ONLY}
    positional = [key for key in known if key not in by_name]
    remark = ""
    args: Sequence[Any] = ()
    given_by_name: Mapping[str, Any]
    if isinstance(inputs, Mapping):
        unknown = [key for key in inputs if key not in known]
        takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in signature)
        if unknown and not takes_any:
            raise InputError(
                f"MODEL: {name}: example input {unknown[0]!r} is not a parameter of forward({', '.join(known)})"
            )
        given_by_name = inputs
    else:
        args, given_by_name = with_keywords(inputs, signature)
        if args is inputs and args and isinstance(args[-1], Mapping):
            strange = next((str(key) for key in args[-1] if key not in known), "")
            remark = f"the mapping at the end is an argument; forward({', '.join(known)}) has no parameter {strange!r}"
    names = [*positional, *(f"input_{i}" for i in range(len(positional), len(args)))]
    order = [key for key in known if key in given_by_name] + [key for key in given_by_name if key not in known]
    arguments = [*zip(names, args, strict=False), *((key, given_by_name[key]) for key in order)]
    in_place = {key for key, (given, _) in zip(names, arguments, strict=False) if key == given}
    by_name |= {key for key in order if key not in in_place}
    tensors: dict[str, Tensor] = {}
    builds = [_flatten(name, key, value, tensors) for key, value in arguments]
    if not tensors:
        raise InputError(f"MODEL: {name}: the example inputs hold no tensor")
    if not any(tensor.numel() for tensor in tensors.values()):  # kernels that divide by a size end the process
        key, tensor = next(iter(tensors.items()))
        raise InputError(f"MODEL: {name}: example input {key!r} has the shape {[*tensor.shape]}: it holds no element")
    if any(key in by_name or not isinstance(value, Tensor | np.ndarray) for key, value in arguments):
        module = _taking_flat(
            module, [((key, key in by_name), build) for (key, _), build in zip(arguments, builds, strict=True)]
        )
    return FlatInputs(list(tensors), list(tensors.values()), module, remark)


_STARS = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def _parameters(module: nn.Module) -> list[inspect.Parameter]:
    try:
        return list(inspect.signature(module.forward).parameters.values())
    except ValueError:  # of compiled code
        return []


def with_keywords(
    inputs: Sequence[Any], parameters: Sequence[inspect.Parameter]
) -> tuple[Sequence[Any], Mapping[str, Any]]:
    """The positional and the keyword arguments in a tuple of example inputs, as torch's exporters take them.

    ``(x, {"mask": mask})`` is what ``torch.onnx.export`` takes, ``((x,), {"mask": mask})`` what ``torch.export.export``
    does. Where ``parameters`` fit more than one reading, a mapping of parameters' names holds keyword arguments, and
    any other mapping is the argument in whose place it stands; where none has that place, torch's reading holds.
    """
    last = inputs[-1] if inputs else None
    if not isinstance(last, Mapping) or not all(isinstance(key, str) for key in last):
        return inputs, {}
    signature = inspect.Signature(parameters)
    nested = len(inputs) == 2 and type(inputs[0]) is tuple
    readings = [inputs[0], inputs[:-1]] if nested else [inputs[:-1]]
    named = {p.name for p in parameters if p.kind not in _STARS}
    places = sum(p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in parameters)
    if not {*last} <= named and len(inputs) <= places and _binds(signature, inputs, {}):
        return inputs, {}
    return next(((args, last) for args in readings if _binds(signature, args, last)), (inputs, {}))


def _binds(signature: inspect.Signature, args: Sequence[Any], keywords: Mapping[str, Any]) -> bool:
    try:
        signature.bind(*args, **keywords)
    except TypeError:
        return False
    return True


def _named(positional: Sequence[str], keywords: Sequence[str]) -> list[inspect.Parameter]:
    """Parameters of these names, for a module whose ``forward`` does not say them; none of them is required."""
    kind = inspect.Parameter
    return [
        *(kind(name, kind.POSITIONAL_OR_KEYWORD, default=None) for name in positional),
        *(kind(name, kind.KEYWORD_ONLY, default=None) for name in keywords),
    ]


def _flatten(name: str, path: str, value: Any, tensors: dict[str, Tensor]) -> Build:
    """Add the tensors of one argument under their paths; returns the function that builds the argument again."""
    if isinstance(value, np.ndarray | np.generic):
        value = _tensor(name, path, value)
    if isinstance(value, Tensor):
        if not is_dense(value) or value.is_complex():
            kind = f"example input {path!r} is {layout_of(value)}"
            raise InputError(f"MODEL: {name}: {kind}; expected a dense tensor of real numbers")
        tensors[path] = value
        return next
    if isinstance(value, Mapping):
        parts = {key: _flatten(name, f"{path}.{key}", part, tensors) for key, part in value.items()}
        return lambda flat: _mapping_like(value, {key: build(flat) for key, build in parts.items()})
    if isinstance(value, list | tuple):
        keys = getattr(value, "_fields", range(len(value)))
        items = [_flatten(name, f"{path}.{key}", part, tensors) for key, part in zip(keys, value, strict=True)]
        return lambda flat: _sequence_like(value, [build(flat) for build in items])
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {
            f.name: _flatten(name, f"{path}.{f.name}", getattr(value, f.name), tensors)
            for f in dataclasses.fields(value)
            if f.init
        }
        return lambda flat: dataclasses.replace(value, **{key: build(flat) for key, build in fields.items()})
    if value is None or isinstance(value, bool | int | float | str | torch.dtype | torch.device):
        return lambda flat: value
    type_text = f"example input {path!r} is {type(value).__name__}"
    raise InputError(f"MODEL: {name}: {type_text}; expected a tensor, or a container of tensors")


def _tensor(name: str, path: str, array: Any) -> Tensor:
    try:
        return torch.from_numpy(np.asarray(array, order="C"))
    except TypeError:
        raise InputError(
            f"MODEL: {name}: example input {path!r} is of dtype {array.dtype}, which torch lacks"
        ) from None


def _mapping_like(like: Mapping[Any, Any], parts: dict[Any, Any]) -> Any:
    """The parts in a mapping of the same class, where that is made from a dict (``BatchEncoding``, ``OrderedDict``)."""
    if type(like) is dict:
        return parts
    try:
        return type(like)(parts)  # type: ignore[call-arg]
    except TypeError:
        return parts


def _sequence_like(like: Any, parts: list[Any]) -> Any:
    if isinstance(like, tuple):
        return type(like)(*parts) if hasattr(like, "_fields") else tuple(parts)
    return parts


def _taking_flat(module: nn.Module, arguments: Sequence[tuple[tuple[str, bool], Build]]) -> nn.Module:
    """A shallow copy of ``module`` that takes tensors by position.

    The class changes, not the instance: a deep copy of the result, in another precision, still calls itself.
    """
    base = type(module)

    def forward(self: Any, *flat: Tensor) -> Any:
        remaining = iter(flat)
        built = [(key, by_keyword, build(remaining)) for (key, by_keyword), build in arguments]
        args = [value for _, by_keyword, value in built if not by_keyword]
        return base.forward(self, *args, **{key: value for key, by_keyword, value in built if by_keyword})

    flat_module = copy.copy(module)
    flat_module.__class__ = type(base.__name__, (base,), {"forward": forward, "__module__": base.__module__})
    return flat_module


TRAIN_MODE = f"{{}} {IN_EVAL_MODE}; `cpdebug bisect --test-train-mode` compares train mode"
_LARGE = 1 << 26
"""Parameters from which on a forward on the CPU takes longer than a copy of the module without its values."""
_OTHER_IN_TRAINING = (nn.modules.dropout._DropoutNd, nn.modules.batchnorm._NormBase, nn.RNNBase)


class TorchModel(Unglued):
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
            for kind, tensor in (*module.named_parameters(), *module.named_buffers()):
                if tensor.is_meta:
                    raise InputError(f"MODEL: {name}: {kind} is on the device meta, where it has no values")
            others = {path: m.training for path, m in module.named_modules() if isinstance(m, _OTHER_IN_TRAINING)}
            training = [path for path, is_training in others.items() if is_training]
            which = f"of the module, {some(training)}" if len(training) < len(others) else "the module"
            self.notes = [TRAIN_MODE.format(which)] if training else []
            flat = flat_inputs(name, _in_eval_mode(module), example_inputs, parameters, keywords)
            self.module = module = flat.module
            names, tensors = flat.names, flat.tensors
            self._examples = {n: as_numpy(t) for n, t in zip(names, tensors, strict=True)}
            large = _is_large(module)

        def find() -> list[str]:
            return _output_names(name, module, tensors, self.notes, flat.remark)

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
            shapes = {n: a.shape for n, a in self._examples.items()}
            yield from file_samples(inputs, self._expected, count, replace(self.reading, shapes=shapes))
            return
        if count:
            yield Sample(dict(self._examples), self._source)
        for index in range(1, count):
            rng = np.random.default_rng([seed, index])
            yield Sample({n: _like(a, rng) for n, a in self._examples.items()}, f"random like the example, seed {seed}")

    @property
    def _expected(self) -> list[ValueInfo]:
        return [ValueInfo(n, a.dtype, (None,) * a.ndim) for n, a in self._examples.items()]

    def sample_count(self, inputs: Path) -> int:
        """Number of samples in these files. Raises InputError for unusable files."""
        return count_samples(inputs, self._expected)


@contextmanager
def own_code(what: str) -> Iterator[None]:
    """Context that turns whatever the user's code raises into InputError; Ctrl-C passes."""
    try:
        yield
    except (KeyboardInterrupt, InputError):
        raise
    except BaseException as error:
        raise InputError(f"{what} raised {first_line(error)}") from error


@contextmanager
def library_call(what: str, path: Path) -> Iterator[None]:
    """Context that turns whatever a library raises over the user's file into InputError; Ctrl-C passes.

    ``what``: the library as messages name it.
    """
    try:
        yield
    except (KeyboardInterrupt, CpdebugError):
        raise
    except BaseException as error:
        why = library_reason(error)
        raise InputError(f"MODEL: {path}: {what} cannot load it{f': {why}' if why else ''}") from error


def first_line(error: BaseException) -> str:
    """Type and first line of an error that the user's code raised."""
    if isinstance(error.__cause__, SystemExit):
        error = error.__cause__
    try:
        first = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
        return f"{type(error).__name__}: {first}"
    except Exception:  # its own ``__str__`` fails
        return type(error).__name__


def _in_eval_mode(module: nn.Module) -> nn.Module:
    try:
        return module.eval()
    except NotImplementedError:  # of a program of torch.export, whose mode was settled when it was exported
        return module


def _output_names(
    name: str, module: torch.nn.Module, tensors: Sequence[torch.Tensor], notes: list[str], remark: str = ""
) -> list[str]:
    """Names of the tensors that a forward on the examples returns.

    ``notes`` is told of what a forward leaves behind in the module and the next one reads.
    Raises ModuleFailed, with ``remark`` on how the examples were read, when it raises.
    """
    if (names := _names_alone(module, tensors)) is not None:
        return names
    try:
        with torch.no_grad(), as_written(), doing(f"{type(module).__name__} ran", in_their_folder=True):
            before = _weights(module)
            with state_kept(module) as state:
                outputs = flatten_outputs(module(*(t.clone() for t in tensors)))
                changed = _changed(before, once := _weights(module))
                if changed or state.changed():  # what a first forward prepares for all others is no harm
                    kept = ModuleState(module)
                    again = flatten_outputs(module(*(t.clone() for t in tensors)))
                    changed = _changed(once, _weights(module))
                    notes += _stateful(kept.changed(), outputs, again)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # the user's forward may raise anything; a trace knows in which module
        try:
            with own_code(f"MODEL: {name}: forward"):
                trace(module, {str(i): tensor for i, tensor in enumerate(tensors)})
        except InputError as failed:
            failed.args = ("; ".join(filter(None, (str(failed), remark))),)
            raise
        raise ModuleFailed(f"MODEL: {name}: forward raised {first_line(error)}") from error
    for path, weight in (*module.named_parameters(), *module.named_buffers()):
        if is_lazy(weight):
            raise InputError(f"MODEL: {name}: {path} has no values: it is of a lazy module that forward never reaches")
    if changed:
        raise InputError(
            f"MODEL: {name}: each forward changes its weight {changed!r}, so no two runs use the same network"
        )
    if not outputs:
        raise InputError(f"MODEL: {name}: forward returned no tensor; expected a tensor, or some in a container")
    for key, tensor in outputs.items():
        if not is_dense(tensor):
            returned = f"{key!r} as {layout_of(tensor)}"
            raise InputError(f"MODEL: {name}: forward returned {returned}; expected dense tensors")
    return list(outputs)


def _stateful(changed: Sequence[str], once: Mapping[str, Any], again: Mapping[str, Any]) -> list[str]:
    """A note on what a forward changes, where the next one gave another result."""
    if not changed or all(name in again and _alike(tensor, again[name]) for name, tensor in once.items()):
        return []
    return [
        f"each forward changes {some(changed)} of the module, and thereby its results: every run starts from the "
        "given state, and an exported file keeps nothing from one run to the next"
    ]


def _alike(one: torch.Tensor, other: torch.Tensor) -> bool:
    return not (is_dense(one) and is_dense(other)) or torch.equal(one, other)


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
