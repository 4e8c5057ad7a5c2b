"""``torch.compile`` as a backend: the compiled module for the outputs, a second compilation for the values inside.

Dynamo hands a compiler each graph that it captured. The second compilation takes the same graphs and returns values of
theirs as further outputs; everything below dynamo works on them as on the module's own. Which node of dynamo's is which
value of the eager module, and so of the exported graph, a run of these graphs by eager kernels tells.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, fx

from cp_debug.backends.base import Program, Session
from cp_debug.backends.compiled_graph import (
    Compiler,
    Content,
    GraphPieces,
    Kernels,
    NodeRun,
    Recorded,
    content,
    names_of,
    with_outputs,
)
from cp_debug.backends.determinism import deterministic
from cp_debug.backends.spec import BackendSpec, CompileOptions
from cp_debug.backends.torch_backend import DTYPES, Emit, ModuleSession, TorchBackend
from cp_debug.doing import doing
from cp_debug.errors import (
    BackendUnavailable,
    InputError,
    ModuleFailed,
    library_reason,
    raise_if_interrupted,
    text_of,
)
from cp_debug.probes.distance import distance
from cp_debug.probes.module_state import state_kept
from cp_debug.probes.trace import TorchValue, flatten_outputs, trace
from cp_debug.safe_text import amount

Compiled = Callable[..., Any]
"""A compiled module."""
_SAME = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}
"""Relative L2 distance of outputs up to which a program with more outputs is the same one, rounded elsewhere."""
_MOST_COMPILED = 1 << 12
"""Programs of one function that dynamo may compile before it gives up: what it does then is no longer compiled."""


class TorchCompileBackend(TorchBackend):
    """``torch.compile`` of a module on the CPU or a GPU, in FP32, BF16 or FP16; options as ``CompileOptions`` has them.

    Raises BackendUnavailable without the compiler that inductor needs there: C++ for a CPU, Triton for a GPU.
    """

    def __init__(self, spec: BackendSpec) -> None:
        super().__init__(spec)
        self.compiled = CompileOptions.parse(spec.options)
        self._threads = torch.get_num_threads()
        if self.compiled.compiler == "inductor":
            _require_compiler(spec, self.device)

    def open(self, program: Program) -> Session:
        """A session on the program's module. Raises BackendUnavailable for a graph that comes without one."""
        if program.module is None:
            reason = f"{program.graph} comes without a torch module, and torch.compile compiles modules"
            raise BackendUnavailable(str(self.spec), reason, nearest="torch")
        return CompiledSession(program, self.compiled, DTYPES[self.precision], self.device, self._threads)

    def versions(self) -> dict[str, str]:
        """Versions of torch and, with CUDA, of its libraries and Triton; the device's name."""
        if self.device == "cpu" or self.compiled.compiler != "inductor":
            return super().versions()
        from importlib.metadata import version

        return super().versions() | {"triton": version("triton")}


class CompiledSession(ModuleSession):
    """A module, compiled twice: as it is, and with values inside as outputs."""

    def __init__(
        self, program: Program, options: CompileOptions, dtype: torch.dtype, device: str, threads: int
    ) -> None:
        """``threads`` is the number that inductor writes into kernels for a CPU, whatever torch has when they run."""
        self._options, self._threads = options, threads
        super().__init__(program, dtype, device, tf32=False)
        torch._dynamo.reset()
        self._plain: Callable[..., Any] | None = None
        self._looks: dict[tuple[tuple[int, ...], ...], _Look] = {}
        self._kernels = Kernels()
        self._breaks: Sequence[str] = ()
        self._closed = False
        self.settings = {**self.settings, "compiler": options.compiler, "mode": options.mode}

    @property
    def notes(self) -> list[str]:
        """What a reader must know of the compiled program."""
        notes = []
        if self._breaks:
            many = amount(len(self._breaks) + 1, "graph")
            notes.append(f"torch.compile breaks the module into {many}: {'; '.join(self._breaks)}")
        if self._closed:
            notes.append("the outputs change when any value inside is written for a look, so none is shown")
        return notes

    @property
    def tactics(self) -> Mapping[str, str]:
        """ONNX value → name of inductor's kernel that writes it."""
        places = {p: value for look in self._looks.values() for p, value in look.places.items()}
        kernels = {value: self._kernels.written[p.piece].get(p.node, "") for p, value in places.items()}
        return {name: kernel for value, kernel in kernels.items() if kernel for name in self._values[value]}

    def close(self) -> None:
        """Free the copy of the module and all that was compiled of it."""
        super().close()
        self._plain = None
        self._looks.clear()
        torch._dynamo.reset()

    def _settled(self) -> AbstractContextManager[Mapping[str, Any]]:
        return deterministic(as_deployed=True)

    def _forward(self, inputs: Mapping[str, Tensor], emit: Emit | None) -> Sequence[Tensor]:
        if emit is None:
            return self._run(self._plain_program(), inputs)
        shapes = tuple(tuple(tensor.shape) for tensor in inputs.values())
        if shapes not in self._looks:
            self._looks[shapes] = self._look(inputs)
        return self._run(self._looks[shapes].giving(emit), inputs)

    def _plain_program(self) -> Compiled:
        if self._plain is None:
            self._plain = self._compiled(_Plain(self._inner, self._kernels))
        return self._plain

    def _look(self, inputs: Mapping[str, Tensor]) -> _Look:
        """What a run with these inputs shows: all values, or those that kernels write, if the outputs stay the same.

        In FP32 a kernel that writes a value computes with the same number. Narrower types are rounded where they are
        written and nowhere else: between, and in the kernel that writes it, others read the number before that.
        """
        record = Recorded()
        self._run(self._compiled(record), inputs)
        if not record.pieces.graphs:
            says = "torch.compile captured no graph of the module and left it eager; TORCH_LOGS=graph_breaks tells why"
            raise InputError(f"{self._program.name}: {says}")
        self._breaks = record.pieces.breaks
        places = {p: name for p, name in names_of(record.seen, self._eager(inputs)).items() if name in self._values}
        everything = _Look(record, places, self._inner, self._compiled)
        if self._options.compiler != "inductor":
            return everything
        plain, wide = self._run(self._plain_program(), inputs), self._dtype == torch.float32
        if wide and self._apart(plain, everything, inputs) <= _SAME[self._dtype]:
            return everything
        kernels = self._kernels
        rounded = set() if wide else kernels.read_inside
        written = {
            place: name
            for place, name in places.items()
            if place.node in kernels.written[place.piece] and (place.piece, place.node) not in rounded
        }
        borders = _Look(record, written, self._inner, self._compiled)
        if self._apart(plain, borders, inputs) <= _SAME[self._dtype]:
            return borders
        self._closed = True
        return _Look(record, {}, self._inner, self._compiled)

    def _eager(self, inputs: Mapping[str, Tensor]) -> Iterable[tuple[TorchValue, Content]]:
        """The values of the eager module with their contents."""
        values: dict[TorchValue, Content] = {}
        prefix = self._alignment.prefix if self._alignment else ""

        def keep(value: TorchValue, tensor: Tensor) -> None:
            if value not in values:
                values[value] = content(tensor)

        assert self._module is not None
        with self._same_draws():
            trace(self._module, inputs, keep, prefix=prefix)
        return values.items()

    def _apart(self, plain: Sequence[Tensor], look: _Look, inputs: Mapping[str, Tensor]) -> float:
        """Relative L2 distance of the outputs when values are looked at, the largest of any output."""
        looked = self._run(look.giving(), inputs)
        return max((distance(a, b).relative for a, b in zip(plain, looked, strict=True)), default=0.0)

    def _inner(self, graph: fx.GraphModule, inputs: Sequence[Any]) -> Compiled:
        """One piece, compiled as the spec says."""
        options = self._options
        if options.compiler != "inductor":
            return torch._dynamo.lookup_backend(options.compiler)(graph, list(inputs))
        from torch import _TorchCompileInductorWrapper

        settings = {"emulate_precision_casts": True} if options.casts else {}
        return _TorchCompileInductorWrapper(options.mode, settings, options.dynamic)(graph, list(inputs))

    def _compiled(self, compiler: Compiler) -> Compiled:
        """The module as a program that ``compiler`` compiles when it first runs."""
        dynamic = True if self._options.dynamic else None
        return torch.compile(self._module, backend=compiler, dynamic=dynamic)

    def _same_draws(self) -> AbstractContextManager[None]:
        """Context of one forward among several: each draws the same random numbers."""
        return torch.random.fork_rng([] if self._device.type == "cpu" else [self._device])

    def _run(self, program: Compiled, inputs: Mapping[str, Tensor]) -> list[Tensor]:
        """Run a program; returns its flattened outputs. Raises ModuleFailed in the compiler's or the module's words."""
        assert self._module is not None
        name = self._program.name
        context = doing(f"torch.compile ran {name}", in_their_folder=True)
        with context, state_kept(self._module), self._same_draws(), _own_caches(self._threads):
            try:
                result = program(*(tensor.clone() for tensor in inputs.values()))
            except _SinkFailed as failed:
                raise failed.error from None
            except Exception as error:
                raise_if_interrupted(error)
                raise ModuleFailed(f"{name}: torch.compile failed: {_reason(error)}") from error
        tensors = list(flatten_outputs(result).values())
        # A CUDA graph writes its outputs to the same memory each time.
        return tensors if self._options.mode == "default" else [tensor.clone() for tensor in tensors]


class _SinkFailed(Exception):
    """What takes a value raised ``error``, which is no fault of the program that runs."""

    def __init__(self, error: Exception) -> None:
        self.error = error


class _Plain:
    """Compiler of the module as it is; inductor's kernels are read on the way."""

    def __init__(self, inner: Compiler, kernels: Kernels) -> None:
        self._inner, self._kernels, self._pieces = inner, kernels, GraphPieces()

    def __call__(self, graph: fx.GraphModule, inputs: Sequence[Any]) -> Compiled:
        from torch._inductor import config

        self._kernels.begin(self._pieces.add(graph), graph)
        with config.patch(_post_fusion_custom_pass=self._kernels):
            return self._inner(graph, inputs)


class _Look:
    """Compiler that adds the values of ``places`` to each piece's outputs, and gives them away when it runs."""

    def __init__(
        self,
        record: Recorded,
        places: Mapping[NodeRun, str],
        inner: Compiler,
        compiled: Callable[[Compiler], Compiled],
    ) -> None:
        self._record, self.places, self._inner, self._pieces = record, places, inner, GraphPieces()
        self._emit: Emit | None = None
        self._program = compiled(self)

    def giving(self, emit: Emit | None = None) -> Compiled:
        """The program, ready for one run that gives its values to ``emit``."""
        self._emit = emit
        self._pieces.begin()
        return self._program

    def __call__(self, graph: fx.GraphModule, inputs: Sequence[Any]) -> Compiled:
        piece = self._pieces.add(graph)
        same = self._record.pieces.graphs[piece : piece + 1] == self._pieces.graphs[piece:]
        wanted = {place.node for place in self.places if same and place.piece == piece}
        nodes = [name for name in self._pieces.graphs[piece] if name in wanted]
        nodes += sorted(name for name in wanted if "|" in name)
        overwritten = {name for number, name in self._record.overwritten if number == piece}
        own = with_outputs(graph, nodes, overwritten)
        compiled = self._inner(graph, inputs)

        def run(*args: Any) -> Any:
            results = compiled(*args)
            call = self._pieces.call(piece)
            for node, tensor in zip(nodes, results[own:], strict=True):
                name = self.places.get(NodeRun(piece, call, node))
                if self._emit is not None and name is not None:
                    try:
                        self._emit(name, tensor)
                    except Exception as error:
                        raise _SinkFailed(error) from error
            return results[:own]

        return run


@contextmanager
def _own_caches(threads: int) -> Iterator[None]:
    """Context in which nothing is taken from what was compiled under other settings, or by changed parts of torch.

    Inductor's cache of graphs does not know of patched lowerings and passes. Dynamo would leave a module eager that it
    compiled too often; random numbers are drawn as eager draws them. Dynamo's warnings are told as notes, not logged.
    """
    from torch._dynamo import config as dynamo
    from torch._functorch import config as autograd
    from torch._inductor import config as inductor

    limits: dict[str, Any] = {"recompile_limit": _MOST_COMPILED, "accumulated_recompile_limit": _MOST_COMPILED}
    graphs: dict[str, Any] = {"fx_graph_cache": False, "fx_graph_remote_cache": False, "fallback_random": True}
    graphs["cpp.threads"] = threads
    log = logging.getLogger("torch._dynamo")
    level = log.level
    if "TORCH_LOGS" not in os.environ:  # what it says of graph breaks is a note of the result
        log.setLevel(logging.ERROR)
    try:
        with dynamo.patch(limits), inductor.patch(graphs), autograd.patch(enable_autograd_cache=False):
            yield
    finally:
        log.setLevel(level)


def _reason(error: BaseException) -> str:
    """What the compiler says, in one line."""
    inner = getattr(error, "inner_exception", None) or error.__cause__ or error
    # What dynamo says stands between a title and advice, and there an operator's own error behind its arguments.
    pattern = r"Explanation: (?:.*got \w+\((['\"])(?P<error>.+)\1\)|(?P<says>.{1,300}))"
    if explained := re.search(pattern, text_of(inner)):
        return explained["error"] or explained["says"]
    return library_reason(inner) or f"{type(inner).__name__}: {text_of(inner).partition(chr(10))[0][:300]}"


def _require_compiler(spec: BackendSpec, device: str) -> None:
    if device != "cpu":
        from torch.utils._triton import has_triton

        if not has_triton():
            reason = "inductor compiles kernels for a GPU with Triton, which is not here or does not know this GPU"
            raise BackendUnavailable(str(spec), reason, install="pip install triton", nearest="torch-compile:aot_eager")
        return
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        reason = "inductor compiles kernels for a CPU with a C++ compiler, and none is here"
        install, nearest = "apt-get install g++, or set CXX", "torch-compile:aot_eager"
        raise BackendUnavailable(str(spec), reason, install=install, nearest=nearest) from None
