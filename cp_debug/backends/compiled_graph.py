"""Graphs that dynamo captured: names of their nodes' values, values as further outputs, and inductor's kernels.

``torch.compile`` calls a compiler once for each piece of a module that it captured without a break, and the compiled
piece once for each time that it runs.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, fx
from torch.utils._pytree import tree_leaves

from cp_debug.probes.arrays import is_dense
from cp_debug.probes.fingerprint import fingerprint
from cp_debug.probes.trace import TorchValue
from cp_debug.safe_text import one_line

Compiler = Callable[[fx.GraphModule, Sequence[Any]], Callable[..., Any]]
"""A compiler as dynamo calls it: makes a graph and its example inputs into a function."""
Content = tuple[tuple[int, ...], bytes]
"""What two equal tensors have in common: shape and fingerprint."""


class NodeRun(NamedTuple):
    """A tensor of a run: the piece, how often that had run before, and the node that made it."""

    piece: int
    call: int
    node: str
    """The node's name; ``base|node`` for what is in ``base`` once ``node`` has written to its memory in place."""


def content(tensor: Tensor) -> Content:
    """The content of a tensor of any shape and dtype, on any device."""
    print_ = fingerprint(tensor)
    return print_.shape, print_.projections.tobytes() + repr(print_.special).encode()


class GraphPieces:
    """Numbers the pieces of one compiled module, and counts the calls of each in one run."""

    def __init__(self) -> None:
        self.graphs: list[list[str]] = []
        """Names of each piece's nodes."""
        self.breaks: list[str] = []
        """Why a piece ends before the module does, and where."""
        self._calls: Counter[int] = Counter()

    def add(self, graph: fx.GraphModule) -> int:
        """Number of the next piece."""
        self.graphs.append([node.name for node in graph.graph.nodes])
        reason = getattr(graph, "compile_subgraph_reason", None)
        if reason is not None and reason.graph_break:
            place = next((f"{Path(f.filename).name}:{f.lineno}: " for f in reversed(reason.user_stack)), "")
            self.breaks.append(place + one_line(reason.reason.partition("\n")[0]))
        return len(self.graphs) - 1

    def call(self, piece: int) -> int:
        """How often a piece has run before in this run."""
        self._calls[piece] += 1
        return self._calls[piece] - 1

    def begin(self) -> None:
        """Begin another run."""
        self._calls.clear()


class Recorded:
    """Compiler that compiles nothing: it runs each piece by eager kernels, and knows its tensors by their content."""

    def __init__(self) -> None:
        self.pieces = GraphPieces()
        self.seen: list[tuple[NodeRun, str, Content]] = []
        """In execution order, each with the name of its node's function."""
        self.overwritten: set[tuple[int, str]] = set()
        """Nodes of pieces whose tensors are changed in place after they were made."""

    def __call__(self, graph: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        """The piece, run node by node."""
        piece = self.pieces.add(graph)
        return lambda *args: _Recorder(graph, self, piece).run(*args)


class _Recorder(fx.Interpreter):
    def __init__(self, graph: fx.GraphModule, record: Recorded, piece: int) -> None:
        super().__init__(graph)
        self._record, self._piece, self._call = record, piece, record.pieces.call(piece)
        self._in_memory: dict[int, list[str]] = defaultdict(list)
        self._bases: dict[int, tuple[str, Tensor]] = {}
        """Memory → the first node that has it, and its tensor."""

    def run_node(self, n: fx.Node) -> Any:
        if n.op in ("placeholder", "get_attr", "output"):
            result = super().run_node(n)
            if n.op != "output" and isinstance(result, Tensor) and is_dense(result):
                self._bases.setdefault(result.untyped_storage()._cdata, (n.name, result))
            return result
        given = [leaf for leaf in tree_leaves(self.fetch_args_kwargs_from_env(n)) if isinstance(leaf, Tensor)]
        versions = [tensor._version for tensor in given]
        result = super().run_node(n)
        for tensor, version in zip(given, versions, strict=True):
            if tensor._version != version:
                memory = tensor.untyped_storage()._cdata
                names = self._in_memory.pop(memory, [])
                self._record.overwritten.update((self._piece, name) for name in names)
                base, whole = self._bases.get(memory, ("", tensor))
                if base and whole is not result:
                    place = NodeRun(self._piece, self._call, f"{base}|{n.name}")
                    self._record.seen.append((place, _function(n), content(whole)))
        if isinstance(result, Tensor) and is_dense(result):
            memory = result.untyped_storage()._cdata
            self._bases.setdefault(memory, (n.name, result))
            self._in_memory[memory].append(n.name)
            place = NodeRun(self._piece, self._call, n.name)
            self._record.seen.append((place, _function(n), content(result)))
        return result


def _function(node: fx.Node) -> str:
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return name.strip("_").partition(".")[0]


def names_of(
    seen: Iterable[tuple[NodeRun, str, Content]], values: Iterable[tuple[TorchValue, Content]]
) -> dict[NodeRun, str]:
    """The eager module's name of each tensor of a run: that of the value with its content.

    Among several, the one that a function of the same name made, then the next one in execution order.
    """
    known: dict[Content, list[TorchValue]] = defaultdict(list)
    for value, own in values:
        known[own].append(value)
    names: dict[NodeRun, str] = {}
    taken: set[TorchValue] = set()
    last = -1
    for place, function, own in seen:
        free = [value for value in known[own] if value not in taken]
        if not free:
            continue

        def rank(value: TorchValue, function: str = function, last: int = last) -> tuple[bool, bool, bool, int]:
            called = value.name.rpartition("/")[2].partition("#")[0]
            return function not in (called, value.op), value.index < last, ":" in value.name, value.index

        value = min(free, key=rank)
        names[place], last = value.name, max(last, value.index)
        taken.add(value)
    return names


def with_outputs(graph: fx.GraphModule, nodes: Sequence[str], overwritten: Collection[str]) -> int:
    """Let ``graph`` return the values of ``nodes`` behind its own outputs; returns how many it has of those.

    Those in ``overwritten`` are copied before anything changes them. ``nodes`` as ``NodeRun.node`` names them.
    """
    by_name = {node.name: node for node in graph.graph.nodes}
    output = by_name["output"]
    own = list(output.args[0])
    more = []
    for name in nodes:
        base, _, writer = name.partition("|")
        node = by_name[base]
        if writer or name in overwritten:
            with graph.graph.inserting_after(by_name[writer or name]):
                node = graph.graph.call_method("clone", (node,))
        more.append(node)
    output.args = ((*own, *more),)
    graph.recompile()
    return len(own)


class Kernels:
    """What inductor's scheduler says after fusion: values that each piece's kernels write, by the node of dynamo's."""

    def __init__(self) -> None:
        self.written: dict[int, dict[str, str]] = defaultdict(dict)
        """Piece → node → name of the kernel."""
        self.read_inside: set[tuple[int, str]] = set()
        """Nodes of pieces whose values the kernel that writes them also reads, before they are rounded."""
        self._piece = 0
        self._nodes: dict[str, str] = {}

    def begin(self, piece: int, graph: fx.GraphModule) -> None:
        """Say which piece is compiled next."""
        self._piece = piece
        self._nodes = {source: node.name for node in graph.graph.nodes if (source := _source(node))}

    def __call__(self, groups: list[Any]) -> list[Any]:
        """Read the kernels; a pass of the scheduler that changes nothing."""
        from torch._inductor.virtualized import V

        outputs = set(V.graph.get_output_names())
        for group in groups:
            members = {node.get_name() for node in group.get_nodes()}
            for node in group.get_nodes():
                for buffer in node.get_outputs():
                    inside = [user.get_name() in members for user in buffer.users]
                    origin = buffer.node.get_origin_node()
                    if origin is None or (all(inside) and buffer.get_name() not in outputs):
                        continue
                    source = _source(origin)
                    if source in self._nodes and all(_source(user) != source for user in origin.users):
                        node_name = self._nodes[source]
                        self.written[self._piece][node_name] = _kernel_name(group)
                        self.read_inside.update([(self._piece, node_name)] * any(inside))
        return groups


def _source(node: fx.Node) -> str:
    """Dynamo's first name of the operation that a node was made for; empty where nothing is recorded."""
    stack = node.meta.get("source_fn_stack")
    return stack[-1][0] if stack else ""


def _kernel_name(group: Any) -> str:
    from torch._inductor import config
    from torch._inductor.utils import get_fused_kernel_name

    nodes = group.get_nodes()
    if (name := getattr(nodes[0].node, "python_kernel_name", None)) is not None:
        return str(name)
    prefix = "triton" if group.get_device().type == "cuda" else "cpp"
    return f"{prefix}_{get_fused_kernel_name(nodes, config.cpp.descriptive_names)}"
