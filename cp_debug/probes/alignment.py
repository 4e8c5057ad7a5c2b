"""Which torch module produced each value of the deployed graph, verified by numbers, and kept beside the ONNX file."""

from __future__ import annotations

import contextlib
import hashlib
import json
import tempfile
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import Tensor, nn

from cp_debug.backends.determinism import deterministic
from cp_debug.errors import InputError
from cp_debug.probes.arrays import Sink
from cp_debug.probes.fingerprint import Fingerprint, fingerprint
from cp_debug.probes.graph import Graph
from cp_debug.probes.matching import Matching, nearest
from cp_debug.probes.scopes import scope_hints
from cp_debug.probes.trace import TorchValue, Trace, trace
from cp_debug.reading import read_json, typed

SCHEMA = "cpdebug.alignment/1"
TOLERANCE = 1e-4
"""Relative L2 distance up to which two FP32 computations of one value are the same."""

Run = Callable[[Mapping[str, Tensor], Sink], Any]
"""Runs the whole graph once on inputs by name and gives the sink every value."""


@dataclass(frozen=True)
class Link:
    """What one ONNX value is."""

    onnx: str
    kind: str
    """``module``: a leaf module's output. ``function``: an operation in a module. ``step``: an intermediate result of
    one that torch computes in other steps. ``input``: an input passed through. ``shape``, ``constant``: no data."""
    layer: str
    """What to call it: the torch value's name; ``<name>/<ONNX operator>`` for a step towards it, and for all but one
    where several equal it; the ONNX name for shapes and constants."""
    torch: str | None = None
    """Name of the torch value that it equals; None for steps, shapes and constants."""
    path: str | None = None
    """Path of the module that computes it."""
    error: float | None = None
    """Relative L2 distance to the torch value, as estimated by ``fingerprint``; for a step that of its result."""


@dataclass(frozen=True)
class Coverage:
    """How many of the deployed graph's values, and of the leaf modules' calls, are accounted for."""

    values: int
    values_total: int
    modules: int
    modules_total: int
    kinds: Mapping[str, int]
    """Values by kind of link."""

    def __str__(self) -> str:
        kinds = ", ".join(f"{count} {kind}" for kind, count in self.kinds.items())
        return (
            f"{self.values} of {self.values_total} values ({kinds}), "
            f"{self.modules} of {self.modules_total} leaf module calls"
        )


@dataclass(frozen=True)
class Alignment:
    """The table torch ↔ ONNX of one exported component."""

    graph_sha256: str
    module_sha256: str
    links: Sequence[Link]
    prefix: str
    """What completes the module's own paths to those used here."""
    modules: Sequence[str]
    """Calls of leaf modules in execution order; a repeated one is ``path@2``."""
    absorbed: Mapping[str, str]
    """Module call whose output does not exist in the graph → the layer that it became part of."""
    unused: Sequence[str] = ()
    """Module calls of which nothing reaches an output: exporters drop them."""
    unmatched_values: Sequence[str] = ()
    unmatched_modules: Sequence[str] = ()
    exporter: str | None = None
    folded: bool | None = None
    opset: int | None = None
    versions: Mapping[str, str] = field(default_factory=dict)

    def layer_name(self, onnx_value: str) -> str | None:
        """``pts_backbone.blocks.0.4``, ``pts_neck/cat``; None for a value that nothing accounts for."""
        link = self._by_onnx.get(onnx_value)
        return link.layer if link else None

    def onnx_for(self, torch_value: str) -> list[str]:
        """The ONNX values that equal a torch value."""
        return self._by_torch.get(torch_value, [])

    def coverage(self) -> Coverage:
        """Counts; complete where ``unmatched_values`` and ``unmatched_modules`` are empty."""
        kinds = dict(Counter(link.kind for link in self.links))
        total = len(self.links) + len(self.unmatched_values)
        modules = len(self.modules)
        return Coverage(len(self.links), total, modules - len(self.unmatched_modules), modules, kinds)

    @cached_property
    def _by_onnx(self) -> dict[str, Link]:
        return {link.onnx: link for link in self.links}

    @cached_property
    def _by_torch(self) -> dict[str, list[str]]:
        table: dict[str, list[str]] = {}
        for link in self.links:
            if link.torch is not None:
                table.setdefault(link.torch, []).append(link.onnx)
        return table

    def save(self, path: Path) -> None:
        """Write the manifest, whole or not at all."""
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".alignment-") as folder:
            made = Path(folder) / path.name
            made.write_text(json.dumps({"schema": SCHEMA, **asdict(self)}, indent=1, ensure_ascii=False))
            made.replace(path)

    @classmethod
    def load(cls, path: Path, graph: Graph) -> Alignment:
        """Read the manifest of ``graph``. Raises InputError when it is unreadable or belongs to another graph."""
        found = read_json(path, what="alignment manifest")
        schema = found.get("schema") if isinstance(found, dict) else None
        if schema != SCHEMA:
            raise InputError(f"{path}: schema is {schema!r}; expected {SCHEMA!r}")
        alignment: Alignment = typed(cls, found, f"{path}: not an alignment manifest")
        if alignment.graph_sha256 != graph.digest:
            raise InputError(f"{path}: this alignment belongs to another graph than {graph.path}; export it again")
        return alignment


def align(
    graph: Graph,
    module: nn.Module,
    args: Sequence[Tensor],
    *,
    prefix: str = "",
    run: Run | None = None,
    tolerance: float = TOLERANCE,
) -> Alignment:
    """Run graph and module once each on ``args`` (FP32, CPU, in the graph's input order) and match their values.

    Memory holds fingerprints, never both runs. ``run`` executes the graph, by default this project's executor in FP32.
    Raises ModuleFailed when the module raises, InputError when the graph takes another number of inputs.
    """
    names = [info.name for info in graph.inputs]
    if len(names) != len(args):
        raise InputError(f"{graph.path}: the graph takes {len(names)} inputs {names}; {len(args)} were given")
    inputs = dict(zip(names, args, strict=True))
    data = set(data_values(graph))
    torch_prints: dict[TorchValue, Fingerprint] = {}
    onnx_prints: dict[str, Fingerprint] = {}

    def keep_torch(value: TorchValue, tensor: Tensor) -> None:
        if value not in torch_prints:
            torch_prints[value] = fingerprint(tensor)

    def keep_onnx(name: str, tensor: Any) -> None:
        if name in data:
            with contextlib.suppress(TypeError):  # a dtype without numbers in it, or that torch lacks
                onnx_prints[name] = fingerprint(tensor)

    with deterministic():
        record = trace(module, inputs, keep_torch, prefix=prefix)
        (run or _executor(graph))(inputs, keep_onnx)

    called = [call[len(prefix) :].removeprefix(".") for call in record.calls]
    hints = {name: ".".join(p for p in (prefix, path) if p) for name, path in scope_hints(graph, called).items()}
    matching = Matching(graph, data, onnx_prints, record, torch_prints, hints, tolerance)
    props = {entry.key: entry.value for entry in graph.proto.metadata_props}
    return Alignment(
        graph_sha256=graph.digest,
        module_sha256=module_digest(module),
        prefix=prefix,
        exporter=props.get("cpdebug.exporter"),
        folded={"true": True, "false": False}.get(props.get("cpdebug.folded", "")),
        opset=graph.opsets.get(""),
        versions={"torch": torch.__version__, "onnx": onnx.__version__},
        **_links(graph, data, matching, record, hints),
        **_modules(matching, record),
    )


def data_values(graph: Graph) -> list[str]:
    """The values that depend on an input's elements: no constants, no arithmetic on shapes."""
    return _downstream(graph, {"Shape", "Size"})


def _downstream(graph: Graph, cut: set[str]) -> list[str]:
    reached = {info.name for info in graph.inputs}
    found: list[str] = []
    for node in graph.nodes:
        if node.op not in cut and not reached.isdisjoint(node.inputs):
            reached.update(node.outputs)
            found.extend(node.outputs)
    return found


def _executor(graph: Graph) -> Run:
    from cp_debug.backends.executor import Executor

    return Executor(graph).run


def _links(
    graph: Graph, data: Collection[str], matching: Matching, record: Trace, hints: Mapping[str, str]
) -> dict[str, Any]:
    from_inputs = set(_downstream(graph, set()))
    leaf_outputs = {value for values in record.leaves.values() for value in values}
    # Where several ONNX values equal one torch value, its name goes to the one that finishes it.
    finished = {
        value: name
        for name, (value, _) in matching.pairs.items()
        if name in graph.producer and graph.producer[name].op not in ("Identity", "Cast")
    }
    links: list[Link] = []
    unmatched = []
    for name in graph.values:
        if name not in data:
            links.append(Link(name, "shape" if name in from_inputs else "constant", name))
        elif name in matching.pairs:
            value, error = matching.pairs[name]
            kind = "input" if value.op == "input" else "module" if value in leaf_outputs else "function"
            layer = value.name if finished.get(value, name) == name else f"{value.name}/{graph.producer[name].op}"
            links.append(Link(name, kind, layer, value.name, value.path, error))
        elif results := [n for n in matching.next_matched(name) if matching.consistent(n)]:
            # Where several modules lie between, the exporter's record tells which of them this step is from.
            hinted = [n for n in results if matching.pairs[n][0].path == hints.get(name)]
            value, error = matching.pairs[(hinted or results)[0]]
            op = graph.producer[name].op
            links.append(Link(name, "step", f"{value.name}/{op}", None, hints.get(name, value.path), error))
        else:
            unmatched.append(name)
    return {"links": links, "unmatched_values": unmatched}


def _modules(matching: Matching, record: Trace) -> dict[str, Any]:
    readers: dict[TorchValue, list[TorchValue]] = {}
    for value in record.values:
        for source in value.inputs:
            readers.setdefault(source, []).append(value)
    onnx_of = {value: name for name, (value, _) in reversed(matching.pairs.items())}
    outputs = {value for value in record.outputs if value is not None}
    absorbed, unused, unmatched = {}, [], []
    for call, values in record.leaves.items():
        matched = [v for v in values if v in onnx_of]
        if any(v.call == call for v in matched):
            continue
        if matched:  # an identity
            absorbed[call] = matched[0].name
            continue
        found, passed = set[TorchValue](), set[TorchValue]()
        for value in values:
            after, between = nearest(value, lambda v: readers.get(v, []), onnx_of.__contains__)
            found.update(after)
            passed.update([value, *between])
        layers = sorted((v for v in found if matching.consistent(onnx_of[v])), key=lambda v: v.index)
        if layers:
            absorbed[call] = layers[0].name
        elif found or passed & outputs:
            unmatched.append(call)
        else:
            unused.append(call)
    return {"modules": list(record.leaves), "absorbed": absorbed, "unused": unused, "unmatched_modules": unmatched}


def module_digest(module: nn.Module) -> str:
    """SHA-256 of the names and values of all weights and buffers."""
    sha = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        sha.update(name.encode())
        sha.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return sha.hexdigest()
