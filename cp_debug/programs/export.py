"""The graph that is deployed: a torch module as an ONNX file, by either of torch's exporters.

A TorchScript export names no lines of source: those of the torch modules behind its nodes are noted.
"""

from __future__ import annotations

import contextlib
import copy
import errno
import functools
import inspect
import io
import linecache
import logging
import os
import sys
import tempfile
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import onnx
import torch
from torch import Tensor, nn

from cp_debug.backends.determinism import fp32_precision
from cp_debug.doing import doing
from cp_debug.errors import InputError, module_of, raise_if_interrupted, system_reason
from cp_debug.files import named
from cp_debug.graph.exporter_notes import KEY, enclosing_modules, shortened
from cp_debug.graph.flatten import renamed
from cp_debug.graph.graph import refill
from cp_debug.probes.arrays import as_numpy
from cp_debug.probes.module_state import state_kept, stored_tensors
from cp_debug.probes.trace import as_written, flatten_outputs
from cp_debug.safe_text import redirected

EXPORTERS = ("dynamo", "torchscript")
DECISIONS = "cpdebug.decisions"
"""Key of a model's metadata: the lines whose decision, by numbers of the example, tracing has fixed."""
_PROTOBUF_LIMIT = 2_000_000_000


def export(
    module: nn.Module,
    args: Sequence[Tensor],
    path: Path,
    *,
    input_names: Sequence[str],
    output_names: Sequence[str],
    dynamic_axes: Mapping[str, Mapping[int, str]] | None = None,
    exporter: str = "dynamo",
    folded: bool = True,
    simplify: bool = False,
    opset: int | None = None,
    largest: int = _PROTOBUF_LIMIT,
) -> Path:
    """Export ``module``, which is in eval mode, to ``path`` and return it; the file appears when it is complete.

    ``args`` are example inputs, ``output_names`` name the flattened outputs in order. ``folded`` folds BatchNorm as
    deployment does (dynamo into Conv and ConvTranspose, TorchScript into Conv only); without it every module stays
    visible. ``simplify`` runs onnxscript's optimizer over the result. Weights of more than ``largest`` bytes go to
    ``<path>.data``; the default is what one file can hold. ``opset`` None is the exporter's default.

    Shapes and dtypes of ``args`` become the graph's.

    Raises InputError when the module cannot be exported, or not at that opset.
    """
    if exporter not in EXPORTERS:
        raise InputError(f"--exporter: {exporter!r} is unknown; expected one of {', '.join(EXPORTERS)}")
    axes = {name: dict(input_axes) for name in input_names if (input_axes := (dynamic_axes or {}).get(name))}
    args = tuple(_example(arg, axes.get(name, {})) for name, arg in zip(input_names, args, strict=True))
    options: dict[str, Any] = {"input_names": list(input_names), "output_names": list(output_names)}
    options |= {} if opset is None else {"opset_version": opset}
    size = sum(tensor.nbytes for tensor in stored_tensors(module).values())
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".export-") as folder:
        raw = Path(folder).absolute() / "raw.onnx"  # the module may go to another working folder
        try:
            with (
                as_written(),
                state_kept(module),
                _flat_outputs(module),
                _quiet(exporter) as decisions,
                _old_flag_readable(),
            ):
                if exporter == "dynamo":
                    _dynamo(module, args, raw, axes, folded, size, options)
                else:
                    options |= {"dynamic_axes": axes or None, "do_constant_folding": folded}
                    with doing("torch exported the module (--exporter torchscript)", in_their_folder=True):
                        torch.onnx.export(module, args, raw, dynamo=False, **options)
            proto = onnx.load(raw)
            if simplify:
                from onnxscript import optimizer

                proto = optimizer.optimize(proto)
        except Exception as error:  # the exporters raise nearly everything
            raise_if_interrupted(error)
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise InputError(f"{named(path)}: cannot be written ({system_reason(error)})") from error
            raise InputError(f"{type(module).__name__} cannot be exported by {exporter}: {_reason(error)}") from error
        _check(proto, output_names, exporter, opset)
        _name_transposed(proto, module)
        if exporter == "torchscript":
            note_modules(proto, module)
        props = {"cpdebug.exporter": exporter, "cpdebug.folded": str(folded).lower()}
        onnx.helper.set_model_props(proto, props | ({DECISIONS: "\n".join(decisions)} if decisions else {}))
        complete = Path(folder) / path.name
        large = size > largest
        data = f"{path.name}.data"
        onnx.save(proto, complete, save_as_external_data=large, location=data if large else None)
        if (complete.parent / data).is_file():  # onnx leaves small weights inside
            (complete.parent / data).chmod(0o644)  # onnx creates it for the owner alone
            (complete.parent / data).replace(path.with_name(data))
        complete.replace(path)
    return path


def _name_transposed(proto: onnx.ModelProto, module: nn.Module) -> None:
    """Call a weight that the exporter transposed by the parameter that it is, ``fc.weight.T``, instead of ``val_8``."""
    stored = stored_tensors(module)
    taken = {tensor.name for tensor in proto.graph.initializer}
    matrices = {n: t for n, t in stored.items() if t.dim() == 2 and taken.isdisjoint((n, f"{n}.T"))}
    names: dict[str, str] = {}
    for tensor in proto.graph.initializer:
        own = tensor.name in stored or len(tensor.dims) != 2
        alike = [] if own else [n for n, t in matrices.items() if t.shape[::-1] == tuple(tensor.dims)]
        array = onnx.numpy_helper.to_array(tensor) if alike else np.empty(0)
        # Layers of one size are many, and gigabytes: one column tells most of them apart.
        near = (n for n in alike if np.array_equal(as_numpy(matrices[n][:, :1]).T, array[:1]))
        same = (n for n in near if np.array_equal(as_numpy(matrices[n]).T, array))
        if (name := next(same, None)) is not None:
            names[tensor.name] = f"{name}.T"
            tensor.name = names[tensor.name]
            del matrices[name]
    if names:
        refill(proto.graph.node, [renamed(node, names) for node in proto.graph.node])


def _dynamo(
    module: nn.Module,
    args: Sequence[Tensor],
    path: Path,
    axes: Mapping[str, dict[int, str]],
    folded: bool,
    size: int,
    options: Mapping[str, Any],
) -> None:
    shapes = tuple(axes.get(name) for name in options["input_names"]) if axes else None
    with doing("torch exported the module (--exporter dynamo)", in_their_folder=True), _operators_read_once():
        program = torch.onnx.export(
            module, tuple(args), None, dynamo=True, dynamic_shapes=shapes, optimize=folded, verbose=False, **options
        )
    assert program is not None
    if not folded:
        # Constants and shape arithmetic go, modules stay: the optimizer proper would fuse BatchNorm.
        from onnxscript import optimizer

        optimizer.fold_constants(program.model)
        optimizer.remove_unused_nodes(program.model)
    program.save(path, external_data=size > _PROTOBUF_LIMIT)


@contextlib.contextmanager
def _operators_read_once() -> Iterator[None]:
    """dynamo reads the source of its 500 operators with every export, which takes a second: once a process here."""
    try:
        from torch.onnx._internal.exporter._registration import ONNXRegistry

        original, before = _reader_of(ONNXRegistry), len(torch._C._dispatch_get_all_op_names())
    except (ImportError, AttributeError, KeyError):  # an exporter of another version
        yield
        return

    def kept(opset_version: int) -> Any:
        registry = copy.copy(_operators(ONNXRegistry, opset_version, before - sum(_LOADED)))
        registry.functions = {target: list(found) for target, found in registry.functions.items()}
        return registry

    ONNXRegistry.from_torchlib = staticmethod(kept)  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        ONNXRegistry.from_torchlib = original  # type: ignore[method-assign]
        _LOADED.append(len(torch._C._dispatch_get_all_op_names()) - before)


@functools.cache
def _reader_of(registry: Any) -> Any:
    return vars(registry)["from_torchlib"]


_LOADED: list[int] = []
"""How many more operators torch had behind each export: the first one loads 51 of its own."""


@functools.cache
def _operators(registry: Any, opset: int, known: int) -> Any:
    """What a registry knows at an opset; ``known``: how many operators torch and libraries have added."""
    return _reader_of(registry).__get__(None, registry)(opset_version=opset)


def _example(arg: Tensor, axes: Mapping[int, str]) -> Tensor:
    """The example with at least two entries along dynamic axes: dynamo takes 0 and 1 for constants."""
    if all(arg.shape[axis] > 1 for axis in axes):
        return arg
    return arg.new_zeros([max(n, 2) if axis in axes else n for axis, n in enumerate(arg.shape)])


@contextlib.contextmanager
def _flat_outputs(module: nn.Module) -> Iterator[None]:
    """Let forward return a plain tuple: the exporters order dataclasses and nested mappings differently, or refuse."""
    forward, is_instance_attribute = module.forward, "forward" in vars(module)

    @functools.wraps(forward)
    def flat(*args: Any) -> tuple[Tensor, ...]:
        return tuple(flatten_outputs(forward(*args)).values())

    with contextlib.suppress(ValueError):  # of a bound function ``wraps`` copies what holds for the unbound one
        flat.__signature__ = inspect.signature(forward)  # type: ignore[attr-defined]
    module.forward = flat
    try:
        yield
    finally:
        if is_instance_attribute:
            module.forward = forward
        else:
            del module.forward


class _OtherThreads(io.TextIOBase):
    """A stream that takes what other threads write, such as a progress bar; what this thread writes is dropped."""

    def __init__(self, stream: TextIO) -> None:
        self._stream, self._own = stream, threading.get_ident()

    def write(self, text: str) -> int:
        return len(text) if threading.get_ident() == self._own else self._stream.write(text)

    def flush(self) -> None:
        self._stream.flush()

    def isatty(self) -> bool:
        return self._stream.isatty()

    def fileno(self) -> int:
        return self._stream.fileno()


@contextlib.contextmanager
def _quiet(exporter: str) -> Iterator[list[str]]:
    """Silence the exporters, save the warning that a trace froze a decision of the user's own code.

    Yields the lines of these decisions, which are added as they are met.
    """
    decisions: list[str] = []
    level = logging.root.manager.disable
    logging.disable(logging.ERROR)
    stream, show = sys.stderr, warnings.showwarning

    def shown(message: Any, category: Any, filename: str, lineno: int, *more: Any, **others: Any) -> None:
        decisions.append(f"{shortened(filename)}:{lineno}: {linecache.getline(filename, lineno).strip()}")
        with contextlib.redirect_stderr(stream):
            show(message, category, filename, lineno, *more, **others)

    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            Path(os.devnull).open("w") as nowhere,
            # TorchScript prints its graph from C++; else what other threads print is not to be lost.
            redirected(1, nowhere) if exporter == "torchscript" else contextlib.nullcontext(),
            contextlib.redirect_stderr(_OtherThreads(stream)),  # torch prints graphs that it cannot export
        ):
            warnings.showwarning = shown
            warnings.simplefilter("ignore")
            warnings.simplefilter("default", torch.jit.TracerWarning)
            warnings.filterwarnings("ignore", category=torch.jit.TracerWarning, module=r"torch\.")
            yield decisions
    finally:
        logging.disable(level)


def _old_flag_readable() -> contextlib.AbstractContextManager[Any]:
    """A context for dynamo, which reads ``allow_tf32``: torch raises while the newer setting has TF32 off."""
    try:
        _ = torch.backends.cudnn.allow_tf32
    except RuntimeError:
        return fp32_precision(tf32=True)
    return contextlib.nullcontext()


def _reason(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    if "__obj_flatten__" in str(error):
        return "it holds quantized weights in torch's packed form, which this exporter does not write"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _check(proto: onnx.ModelProto, output_names: Sequence[str], exporter: str, opset: int | None) -> None:
    names = [output.name for output in proto.graph.output]
    if names != list(output_names):
        raise InputError(f"the module's outputs are {names}; expected {list(output_names)}")
    version = next(o.version for o in proto.opset_import if o.domain in ("", "ai.onnx"))
    if opset is not None and version != opset:
        raise InputError(
            f"--opset: {exporter} wrote opset {version} where {opset} was asked for; "
            f"ask for {version}, or use --exporter torchscript"
        )


def note_modules(model: onnx.ModelProto, module: nn.Module) -> None:
    """Write ``net.py:6: Block.forward`` into the metadata of each node: the innermost module that is not torch's own.

    TorchScript's exporter calls a node by the modules around it: ``/encoder/blocks.0/blocks.0.3/Conv``.
    """
    for node in model.graph.node:
        if line := _forward(_innermost(module, node.name)):
            node.metadata_props.add(key=KEY, value=line)


def _innermost(module: nn.Module, name: str) -> nn.Module:
    own = module
    for path in enclosing_modules(name):
        try:
            inner = module.get_submodule(path)
        except AttributeError:
            break
        if not module_of(type(inner)).startswith("torch."):
            own = inner
    return own


def _forward(module: nn.Module) -> str:
    """The place where the class's ``forward`` is written; empty for those of torch, and for what is not Python."""
    code = getattr(type(module).forward, "__code__", None)
    if code is None or module_of(type(module)).startswith("torch."):
        return ""
    return f"{shortened(code.co_filename)}:{code.co_firstlineno}: {type(module).__name__}.forward"
