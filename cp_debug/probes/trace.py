"""One eager forward, with every tensor that an operation or a module makes handed out as it appears.

Forward hooks alone see neither functional operations nor what an in-place operation destroys. So a dispatch mode
watches every ATen operation, a function mode the calls of torch's functions, and the hooks only keep the stack of
modules: each value knows where it was computed.
"""

from __future__ import annotations

import dataclasses
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.weak import WeakTensorKeyDictionary

from cp_debug.doing import doing
from cp_debug.errors import ModuleFailed
from cp_debug.graph.exporter_notes import own_line
from cp_debug.probes.arrays import is_dense
from cp_debug.probes.module_state import state_kept

_SHAPE_ONLY = re.compile(r"new_\w+|\w+_like")
"""Operations that read the shape of a tensor, never its elements."""


@dataclass(eq=False)
class TorchValue:
    """One tensor of a forward: its name, where and by what it was computed, and from which other values.

    ``name`` is the module path for the output of a leaf module (``backbone.blocks.0.3``; ``.0``, ``.1`` after it for
    several outputs), else ``module path/function`` for what the module's code got from a function of torch
    (``neck/cat``, the second one ``neck/cat#2``), else that and the ATen operation inside it (``neck/linear:addmm``).
    A module that is called again gets ``@2``, ``@3`` … after its path. Names with a colon depend on device, dtype and
    version of torch; the others on the module alone.
    """

    name: str
    path: str
    """Path of the innermost module that was running."""
    call: str
    """``path`` with the count of the call: ``shared@2``."""
    op: str
    """ATen's name, ``input`` for an input, ``mutated`` for a tensor changed through another view of its memory."""
    index: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    inputs: tuple[TorchValue, ...]
    from_data: bool
    """Whether it depends on an input of the forward: false for what is computed from weights only."""
    operation: Operation | None = None
    """What computed it, where the trace was asked to keep that."""


@dataclass(frozen=True, eq=False)
class Operation:
    """One call of an ATen operator: enough to do it again."""

    function: Any
    """The overload, ``torch.ops.aten.roll.default``."""
    args: tuple[Any, ...]
    """Positional arguments; a ``TorchValue`` stands for each tensor of the forward, weights stand for themselves."""
    kwargs: Mapping[str, Any]
    source: str
    """Line of the network's own code that called it, ``net.py:8: y = torch.relu(y)``; empty without one."""

    def among(self, values: Sequence[TorchValue]) -> Operation:
        """The same with the values of another trace of the same forward."""

        def same(leaf: Any) -> Any:
            return values[leaf.index] if isinstance(leaf, TorchValue) else leaf

        return Operation(self.function, tree_map(same, self.args), tree_map(same, self.kwargs), self.source)


TorchSink = Callable[[TorchValue, Tensor], None]
"""Takes a value and its tensor, at once after the operation: copy what you keep, the next one may overwrite it.

The same value comes again whenever it gets a better name: as the output of a function, then of a leaf module.
"""


@dataclass
class Trace:
    """Record of one forward. Tensors are not kept, except for the outputs."""

    values: list[TorchValue] = field(default_factory=list)
    """In execution order, inputs included."""
    outputs: list[TorchValue | None] = field(default_factory=list)
    """Values of the flattened outputs, in order; None for one that no operation made (a parameter)."""
    leaves: dict[str, list[TorchValue]] = field(default_factory=dict)
    """Call of a module that called no other module → values that it returned (for an identity, its input)."""
    calls: list[str] = field(default_factory=list)
    """All calls of modules, in order; fake quantizers are left out."""
    tensors: list[Tensor] = field(default_factory=list)
    """The flattened outputs themselves."""

    def readers(self) -> dict[TorchValue, list[TorchValue]]:
        """Value → the values that are computed from it, for those that have such."""
        readers: dict[TorchValue, list[TorchValue]] = {}
        for value in self.values:
            for source in value.inputs:
                readers.setdefault(source, []).append(value)
        return readers


def trace(
    module: nn.Module,
    inputs: Mapping[str, Tensor],
    sink: TorchSink | None = None,
    *,
    prefix: str = "",
    operations: bool = False,
) -> Trace:
    """Run ``module`` once on ``inputs``, in this order as positional arguments, without gradients.

    ``prefix`` completes the module paths. The inputs are copied, so an in-place operation leaves the caller's alone.
    Without a sink no operation is watched: the record then holds the calls and the output tensors only. Inputs may have
    any shape and dtype that the module takes. State that the module keeps between forwards is afterwards what it was.
    ``operations``: values keep what computed them.
    Raises ModuleFailed, with the path, when a module raises in forward; what the sink raises comes through as it is.
    """
    tracer = _Tracer(module, sink, prefix, operations=operations)
    with torch.no_grad(), as_written(), state_kept(module), tracer.hooks():
        args = [tensor.clone() for tensor in inputs.values()]
        for name, tensor in zip(inputs, args, strict=True):
            tracer.add(tensor, name, "input", (), from_data=True, version=tensor._version)
        try:
            with (
                doing(f"{type(module).__name__} ran", in_their_folder=True),
                _Functions(tracer) if sink else nullcontext(),
                tracer if sink else nullcontext(),
            ):
                result = module(*args)
        except Exception as error:
            if tracer.sink_error is not None:
                raise tracer.sink_error from None
            cause = error.__cause__  # of what ``doing`` raises
            raised = error if cause is None or isinstance(cause, Exception) else cause
            where = tracer.failed.get(raised, prefix)
            raise ModuleFailed(
                f"module {where or type(module).__name__!r} raised in forward: {type(raised).__name__}: {raised}"
            ) from error
        tensors = list(flatten_outputs(result).values())
        record = tracer.record
        record.tensors = tensors
        record.outputs = [tracer.value_of(t) for t in tensors]
    return record


@contextmanager
def as_written() -> Iterator[None]:
    """Context in which what ``torch.compile`` compiled runs as it is written: a compiler would take the probes, too."""
    if "torch._dynamo" not in sys.modules:  # nothing is compiled; importing the compiler takes 1.7 s
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


@dataclass
class _Frame:
    """A module that is running."""

    path: str
    call: str
    start: int
    scope: str
    """Scope that was running when it was called."""
    is_quantizer: bool
    """A fake quantizer is part of the layer that calls it: not shown, and no reason for that layer to be no leaf."""
    is_leaf: bool = True


class _Functions(TorchFunctionMode):
    """Tells the tracer which of torch's functions the module's code calls; calls inside these stay hidden."""

    def __init__(self, tracer: _Tracer) -> None:
        super().__init__()
        self.tracer = tracer

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.__name__.strip("_").partition(".")[0]  # in an exported program an overload: relu.default
        if name == "get":  # an attribute
            return func(*args, **kwargs)
        with self.tracer.function(name) as start:
            result = func(*args, **kwargs)
            changed = _tensors(args[:1]) if result is None else _tensors(result)  # x[…] = y returns nothing
            self.tracer.rename(list(changed), start, self.tracer.scope)
        return result


class _Tracer(TorchDispatchMode):
    """Watches every ATen operation of a forward and records its results as values."""

    def __init__(self, module: nn.Module, sink: TorchSink | None, prefix: str, *, operations: bool = False) -> None:
        super().__init__()
        self.module, self.sink, self.prefix, self._operations = module, sink, prefix, operations
        self.record = Trace()
        self.stack: list[_Frame] = []
        self.scope = prefix
        """The function that is running, else the module."""
        self.sink_error: Exception | None = None
        self.failed: dict[BaseException, str] = {}
        self._known = WeakTensorKeyDictionary()
        self._writer: dict[int, TorchValue] = {}
        self._count: Counter[str] = Counter()

    @contextmanager
    def hooks(self) -> Iterator[None]:
        """Keep the stack of running modules while this is open."""
        handles = []
        for path, module in self.module.named_modules():
            full = ".".join(p for p in (self.prefix, path) if p)
            # A class may have methods of these names itself.
            handles.append(
                nn.Module.register_forward_pre_hook(module, lambda part, __, path=full: self._enter(path, part))
            )
            handles.append(
                nn.Module.register_forward_hook(module, lambda _, __, output: self._leave(output), always_call=True)
            )
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """False: torch imports its compiler to keep it off a mode, seconds where nothing else needs it."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        watch = self._watch_uncompiled if "torch._dynamo" in sys.modules else self._watch
        return watch(func, types, args, kwargs)

    def _watch(self, func: Any, types: Any, args: Any, kwargs: Any) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.partition("::")[2]
        inputs = () if _SHAPE_ONLY.fullmatch(name) else tuple(self._values([args, kwargs]))
        arguments_by_name = dict(zip((spec.name for spec in func._schema.arguments), args, strict=False)) | kwargs
        written = [
            t for spec in func._schema.arguments if spec.is_write for t in _tensors(arguments_by_name.get(spec.name))
        ]
        operation = self._operation(func, args, kwargs) if self._operations else None
        result = func(*args, **kwargs)
        produced = {id(t): t for t in [*_tensors(result), *written]}
        from_data = any(value.from_data for value in inputs)
        key = self._unique(f"{self.scope}:{name.strip('_')}", "#")
        # Autograd's bookkeeping comes after this returns: a view then takes its base's version, a write counts it up.
        base = args[0]._version if any(r.alias_info and not r.alias_info.is_write for r in func._schema.returns) else 0
        for position, tensor in enumerate(produced.values()):
            part = key if len(produced) == 1 else f"{key}.{position}"
            version = tensor._version + 1 if any(tensor is w for w in written) else base
            self.add(tensor, part, name, inputs, from_data, version).operation = operation
        for tensor in written:
            self._writer[tensor.untyped_storage()._cdata] = self._known[tensor][0]
        return result

    _watch_uncompiled = torch._disable_dynamo(_watch, recursive=True)

    def add(
        self, tensor: Tensor, name: str, op: str, inputs: tuple[TorchValue, ...], from_data: bool, version: int
    ) -> TorchValue:
        """Record a new value and hand its tensor to the sink now."""
        path = self.stack[-1].path if self.stack else self.prefix
        index, shape = len(self.record.values), tuple(tensor.shape)
        value = TorchValue(name, path, self._call, op, index, shape, tensor.dtype, inputs, from_data)
        self._known[tensor] = (value, version)
        self.record.values.append(value)
        self._emit(value, tensor)
        return value

    def _operation(self, func: Any, args: Any, kwargs: Mapping[str, Any]) -> Operation:
        def known(leaf: Any) -> Any:
            return (self.value_of(leaf) if isinstance(leaf, Tensor) else None) or leaf

        return Operation(func, tree_map(known, args), tree_map(known, kwargs), own_line())

    def value_of(self, tensor: Tensor) -> TorchValue | None:
        """The value that a tensor holds now, or None for a weight."""
        if tensor not in self._known:
            return None
        value, version = self._known[tensor]
        if version == tensor._version:
            return value
        writer = self._writer.get(tensor.untyped_storage()._cdata, value)
        name = self._unique(f"{self.scope}:mutated", "#")
        return self.add(tensor, name, "mutated", (value, writer), value.from_data or writer.from_data, tensor._version)

    @property
    def _call(self) -> str:
        return self.stack[-1].call if self.stack else self.prefix

    def _unique(self, name: str, mark: str) -> str:
        self._count[name] += 1
        return name if self._count[name] == 1 else f"{name}{mark}{self._count[name]}"

    def _values(self, structure: Any) -> Iterator[TorchValue]:
        for tensor in _tensors(structure):
            if (value := self.value_of(tensor)) is not None:
                yield value

    def _emit(self, value: TorchValue, tensor: Tensor) -> None:
        """Hand a value's tensor to the sink, unless it is a weight, made inside a fake quantizer, or not dense."""
        if self.sink is None or not value.from_data or (self.stack and self.stack[-1].is_quantizer):
            return
        if not is_dense(tensor):
            return
        try:
            with unwatched():
                self.sink(value, tensor)
        except Exception as error:
            self.sink_error = error
            raise

    @contextmanager
    def function(self, name: str) -> Iterator[int]:
        """Scope of a call of one of torch's functions; yields the index of the first value that is made in it."""
        outer, self.scope = self.scope, self._unique(f"{self._call}/{name}", "#")
        try:
            yield len(self.record.values)
        finally:
            self.scope = outer

    def rename(self, tensors: Sequence[Tensor], start: int, name: str) -> list[TorchValue]:
        """Values of ``tensors``; those made since ``start`` get ``name``, and are handed out under it.

        The others are passed through by an identity and keep the name of their maker.
        """
        named = [(value, tensor) for tensor in tensors if (value := self.value_of(tensor)) is not None]
        for position, (value, tensor) in enumerate(named):
            if value.index >= start:
                value.name = name if len(named) == 1 else f"{name}.{position}"
                self._emit(value, tensor)
        return [value for value, _ in named]

    def _enter(self, path: str, module: nn.Module) -> None:
        call = self._unique(path, "@")
        is_quantizer = type(module).__name__ == "TensorQuantizer"
        if not is_quantizer:
            self.record.calls.append(call)
        self.stack.append(_Frame(path, call, len(self.record.values), self.scope, is_quantizer))
        self.scope = call

    def _leave(self, output: Any) -> None:
        frame = self.stack.pop()
        self.scope = frame.scope
        if output is None and (error := sys.exc_info()[1]) is not None:
            self.failed.setdefault(error, frame.call)
        with unwatched():
            tensors = list(flatten_outputs(output).values())
            if frame.is_quantizer:
                return
            if frame.is_leaf:
                values = self.rename(tensors, frame.start, frame.call or type(self.module).__name__)
                self.record.leaves[frame.call] = values
            else:
                values = [v for t in tensors if (v := self.value_of(t)) is not None]
        if self.stack and any(value.from_data for value in values):
            self.stack[-1].is_leaf = False


@contextmanager
def unwatched() -> Iterator[None]:
    """Context in which operations on tensors are no part of the forward that is traced."""
    with _disable_current_modes(), torch._C.DisableTorchFunction():
        yield


def _tensors(structure: Any) -> Iterator[Tensor]:
    return (leaf for leaf in tree_leaves(structure) if isinstance(leaf, Tensor))


def flatten_outputs(result: Any) -> dict[str, Tensor]:
    """The tensors in ``result``: a tensor, or tuples, lists, mappings and dataclasses of them, nested at will.

    In the order in which they are held; None and plain numbers are left out. A lone tensor is ``output``, those of a
    sequence are ``output_0``, ``output_1`` …, those of a mapping or dataclass carry its keys; dots join nested names.
    Shapes and dtypes are as they come.
    """
    return {".".join(path) or "output": tensor for path, tensor in _leaves(result, ())}


def _leaves(result: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Tensor]]:
    if isinstance(result, Tensor):
        yield path, result
        return
    if isinstance(result, Mapping):
        parts = {str(key): value for key, value in result.items()}
    elif dataclasses.is_dataclass(result):
        parts = {f.name: getattr(result, f.name) for f in dataclasses.fields(result)}
    elif isinstance(result, (tuple, list)):
        parts = {str(i) if path else f"output_{i}": value for i, value in enumerate(result)}
    else:
        return
    for name, value in parts.items():
        yield from _leaves(value, (*path, name))
