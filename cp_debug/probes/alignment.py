"""The table torch value ↔ ONNX value of one exported component, kept beside the ONNX file."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path

from cp_debug.errors import InputError
from cp_debug.files import complete_file
from cp_debug.graph.graph import Graph
from cp_debug.reading import read_json, typed

SCHEMA = "cpdebug.alignment/1"
TIE = "tie"
"""Cause of a departure that is none: equal numbers, of which either may be chosen."""


@dataclass(frozen=True)
class Link:
    """One ONNX value, and the torch module and value that it corresponds to."""

    onnx: str
    kind: str
    """``module``: a leaf module's output. ``function``: an operation in a module. ``step``: an intermediate result of
    one that torch computes in other steps. ``input``: an input passed through. ``shape``, ``constant``: no data."""
    layer: str
    """Name to show: the torch value's; ``<name>/<ONNX operator>`` for a step towards it, and for all but one where
    several equal it; the ONNX name for shapes and constants."""
    torch: str | None = None
    """Name of the torch value that it equals; None for steps, shapes and constants."""
    path: str | None = None
    """Path of the module that computes it."""
    error: float | None = None
    """Relative L2 distance to the torch value, as estimated by ``fingerprint``; for a step that of its result."""


@dataclass(frozen=True)
class Departure:
    """A place where the exported graph does not compute what the module does, from the module's own numbers."""

    onnx: str
    """Value of the graph behind it, in whose place torch's tensor stands."""
    torch: str
    """Name of that torch value."""
    path: str
    """Path of the module that computes it; empty for the outermost."""
    at: str
    """ATen's name of the operator, ``scatter_reduce``."""
    calls: Sequence[str]
    """All operators of torch between what is right and ``onnx``, with their arguments."""
    source: str
    """Line of the module, ``deep.py:27: x = x + …``, where it is known."""
    error: float
    """Relative L2 distance of what the graph makes from torch's; infinite for another shape."""
    cause: str = ""
    """``lost-argument`` or ``lost-operator``, where the module without it gives what the graph gives; ``TIE``; else
    empty."""
    says: str = ""
    """That in words."""
    right_by: str = ""
    """The other exporter, where its graph was tried and has no such place."""

    @property
    def place(self) -> str:
        """``at `scatter_reduce` (module blocks.2, deep.py:27)``."""
        where = [f"module {self.path}"] if self.path else []
        where += [self.source.partition(": ")[0]] if self.source else []
        return f"at `{self.at}`" + (f" ({', '.join(where)})" if where else "")


@dataclass(frozen=True)
class Coverage:
    """Numbers of values in the deployed graph, and of leaf modules' calls, that are accounted for."""

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
    """Prefix that completes the module's own paths to those used here."""
    modules: Sequence[str]
    """Calls of leaf modules in execution order; a repeated one is ``path@2``."""
    absorbed: Mapping[str, str]
    """Module call whose output does not exist in the graph → the layer that it became part of."""
    unused: Sequence[str] = ()
    """Module calls whose results reach no output: exporters drop them."""
    unmatched_values: Sequence[str] = ()
    unmatched_modules: Sequence[str] = ()
    departures: Sequence[Departure] = ()
    """Where the graph computes something else, in execution order. The values there are linked with what they should
    be."""
    decisions: Sequence[str] = ()
    """Lines of the module that decide by numbers, ``net.py:7: if x.sum() > 0:``, where tracing has fixed the way."""
    notes: Sequence[str] = field(default_factory=list)
    """Remarks on the export, one sentence each."""
    exporter: str | None = None
    folded: bool | None = None
    opset: int | None = None
    versions: Mapping[str, str] = field(default_factory=dict)

    def layer_name(self, onnx_value: str) -> str | None:
        """Layer of an ONNX value: ``pts_backbone.blocks.0.4``, ``pts_neck/cat``; None if unaccounted for."""
        link = self._by_onnx.get(onnx_value)
        return link.layer if link else None

    def onnx_for(self, torch_value: str) -> list[str]:
        """The ONNX values that equal a torch value."""
        return self._by_torch.get(torch_value, [])

    def twins(self, test: Alignment, paired: Mapping[str, str]) -> dict[str, str]:
        """Further values of a test's graph → the value of this graph that equals the same torch value.

        ``paired`` are pairs that stand already; no value is paired twice. A layer whose BatchNorm was folded in torch
        has the name of the layer, folded by the exporter that of the BatchNorm.
        """
        folded = {layer: norm for norm, layer in test.absorbed.items() if self.absorbed.get(norm) == layer}
        taken, pairs = set(paired.values()), dict[str, str]()
        for link in test.links:
            names = (link.torch or "", folded.get(link.torch or "", ""))
            free = [value for name in names for value in self.onnx_for(name) if value not in taken]
            if link.onnx not in paired and link.onnx not in pairs and free:
                pairs[link.onnx] = free[0]
                taken.add(free[0])
        return pairs

    def coverage(self) -> Coverage:
        """Counts of what is accounted for; complete where both ``unmatched`` lists are empty."""
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
        """Write the manifest (JSON), whole or not at all. Raises InputError when it cannot be written."""
        with complete_file(path) as stream:
            stream.write(json.dumps({"schema": SCHEMA, **asdict(self)}, indent=1, ensure_ascii=False))

    @classmethod
    def load(cls, path: Path, graph: Graph) -> Alignment:
        """Read the manifest of ``graph``. Raises InputError when it is unreadable or belongs to another graph."""
        try:
            document = read_json(path, what="alignment manifest")
        except InputError as error:
            raise InputError(f"{path}: not an alignment manifest ({error})") from None
        schema = document.get("schema") if isinstance(document, dict) else None
        if schema != SCHEMA:
            raise InputError(f"{path}: schema is {schema!r}; expected {SCHEMA!r}")
        alignment: Alignment = typed(cls, document, f"{path}: not an alignment manifest")
        if alignment.graph_sha256 != graph.digest:
            raise InputError(f"{path}: this alignment belongs to another graph than {graph}; export it again")
        return alignment
