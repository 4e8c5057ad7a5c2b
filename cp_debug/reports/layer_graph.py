"""The network as a graph for the page: layers, what they read of each other, and the modules by which they fold."""

from __future__ import annotations

import base64
import gzip
import json
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from markupsafe import Markup

from cp_debug.bisect.result import GUILTY, SHAPE, LayerRow, TestResult
from cp_debug.errors import CpdebugError
from cp_debug.graph.graph import Graph
from cp_debug.recipes.onnx_file import scope_of
from cp_debug.reports.numbers import shape_of
from cp_debug.reports.saved import SavedResult

VENDOR = Path(__file__).parent / "html" / "vendor"
LIBRARIES = ("cytoscape", "dagre")
"""Libraries that the page carries where it has a graph: drawing, and places of nodes."""
MOST_MEMBERS = 40
"""Members of a group; a longer list is cut into runs in execution order, which fold by themselves."""
DEEPEST = 24
"""Modules around a layer that are told apart; a file can nest them without end."""
_SIZES = ("Shape", "Size")
"""Operators behind which sizes flow, not data."""

Key = tuple[str, str]
"""Component and ONNX value: a layer, whatever the test."""


@dataclass(frozen=True)
class GraphLayer:
    """One layer: a node of the picture."""

    key: Key
    row: LayerRow
    """Row of the first test that compared the layer."""
    path: tuple[str, ...]
    """Modules that hold it, outermost first."""
    label: str


@dataclass
class FoldedLayers:
    """Layers that fold into one node: a module, or a run of layers."""

    label: str
    members: list[FoldedLayers | GraphLayer] = field(default_factory=list)


def graph_data(saved: SavedResult, anchors: Sequence[str]) -> dict[str, Any] | None:
    """Layers, folds, edges and figures for the page's script; None without the ONNX files of the result.

    ``anchors`` begin the ids of the tests' table rows. Numbers that JSON lacks are the strings NaN and Infinity.
    """
    rows = _rows(saved.result.tests)
    try:
        graphs = {name: graph for name, graph in saved.graphs.items() if any(key[0] == name for key in rows)}
    except CpdebugError:
        return None
    values = {name: {*graph.producer, *(each.name for each in graph.inputs)} for name, graph in graphs.items()}
    known = sum(key[1] in values.get(key[0], ()) for key in rows)
    if not rows or {key[0] for key in rows} - set(graphs) or 2 * known < len(rows):  # other files, of the same names
        return None
    layers = [_layer(saved, graphs, key, row) for key, row in rows.items()]
    position = {layer.key: i for i, layer in enumerate(layers)}
    edges = sorted({(position[a], position[b]) for a, b in _edges(graphs, rows) if position[a] != position[b]})
    groups: list[tuple[str, int]] = []
    parents = [-1] * len(layers)
    _number(fold(layers), -1, groups, parents, position)
    return {
        "tests": [{"spec": t.backend.spec, "anchor": a} for t, a in zip(saved.result.tests, anchors, strict=True)],
        "layers": [
            [layer.row.name, layer.label, layer.row.op, parent, shape_of(layer.row.stats)]
            for layer, parent in zip(layers, parents, strict=True)
        ],
        "groups": groups,
        "edges": edges,
        "figures": [_figures(test, position, edges) for test in saved.result.tests],
    }


def libraries() -> dict[str, str]:
    """Library → its script, compressed by gzip, as base64: a page carries it so, and unpacks it when it draws."""
    return {
        name: base64.b64encode(gzip.compress((VENDOR / f"{name}.min.js").read_bytes(), 9, mtime=0)).decode()
        for name in LIBRARIES
    }


def licences() -> dict[str, str]:
    """Library → the text of its licence, which goes along with it."""
    return {name: (VENDOR / f"{name}.LICENSE").read_text(encoding="utf-8") for name in LIBRARIES}


def fold(layers: Sequence[GraphLayer]) -> list[FoldedLayers | GraphLayer]:
    """The layers as a forest of modules; modules that hold one thing are left out, long lists are cut into runs."""
    return [_shorter(member) for member in _runs(_forest(layers, 0))]


def _forest(layers: Sequence[GraphLayer], depth: int) -> list[FoldedLayers | GraphLayer]:
    """Members in the order of their first layers."""
    found: dict[str, list[GraphLayer]] = {}
    members: list[tuple[str, GraphLayer | None]] = []
    for layer in layers:
        if len(layer.path) <= depth:
            members.append(("", layer))
            continue
        name = layer.path[depth]
        if name not in found:
            members.append((name, None))
        found.setdefault(name, []).append(layer)
    return [layer or FoldedLayers(name, _forest(found[name], depth + 1)) for name, layer in members]


def _shorter(member: FoldedLayers | GraphLayer) -> FoldedLayers | GraphLayer:
    """The member without groups that hold one thing: their names are put together."""
    if isinstance(member, GraphLayer):
        return member
    if len(member.members) == 1:
        (only,) = member.members
        if isinstance(only, FoldedLayers):
            return _shorter(FoldedLayers(f"{member.label}.{only.label}", only.members))
        return GraphLayer(only.key, only.row, only.path, member.label)
    return FoldedLayers(member.label, [_shorter(each) for each in _runs(member.members)])


def _runs(members: list[FoldedLayers | GraphLayer]) -> list[FoldedLayers | GraphLayer]:
    """At most ``MOST_MEMBERS`` members: neighbours of a longer list taken together."""
    while len(members) > MOST_MEMBERS:
        size = max(2, math.ceil(len(members) / MOST_MEMBERS) if len(members) > MOST_MEMBERS**2 else MOST_MEMBERS // 2)
        members = [_run(members[i : i + size]) for i in range(0, len(members), size)]
    return members


def _run(members: list[FoldedLayers | GraphLayer]) -> FoldedLayers | GraphLayer:
    if len(members) == 1:
        return members[0]
    return FoldedLayers(f"{_label(members[0])} … {_label(members[-1], last=True)}", members)


def _label(member: FoldedLayers | GraphLayer, *, last: bool = False) -> str:
    if isinstance(member, GraphLayer):
        return member.label
    return member.label.split(" … ")[-1 if last else 0]


def _rows(tests: Iterable[TestResult]) -> dict[Key, LayerRow]:
    """Every layer that some test has a row for, in execution order."""
    found: dict[Key, LayerRow] = {}
    for test in tests:
        for row in test.rows:
            found.setdefault((row.component, row.onnx), row)
    components = list(dict.fromkeys(key[0] for key in found))
    return dict(sorted(found.items(), key=lambda item: (components.index(item[0][0]), item[1].index)))


def _layer(saved: SavedResult, graphs: dict[str, Graph], key: Key, row: LayerRow) -> GraphLayer:
    producer = graphs[key[0]].producer.get(key[1])
    if key[0] in saved.result.coverage and row.name != row.onnx:  # torch's path, verified by numbers
        path, label = _torch_path(row.name)
    else:
        path, label = scope_of(producer) if producer else (), row.name.rpartition("/")[2] or row.name
        if not path:
            path, label = _named_path(row.name)
    return GraphLayer(key, row, (((key[0],) if len(graphs) > 1 else ()) + path)[:DEEPEST], label)


def _torch_path(name: str) -> tuple[tuple[str, ...], str]:
    """Modules and label of ``backbone.blocks.0.conv/Add``: ``("backbone", "blocks.0", "conv")`` and ``Add``."""
    module, _, step = name.partition("/")
    parts = re.findall(r"[^.]+(?:\.\d+(?=\.))*", module)
    return (tuple(parts), step) if step else (tuple(parts[:-1]), parts[-1] if parts else name)


def _named_path(name: str) -> tuple[tuple[str, ...], str]:
    """Modules and label that a name without recorded modules suggests: ``stage1.block.2/Conv`` is a ``Conv``."""
    parts = re.findall(r"[^./]+(?:\.\d+(?=[./]))*", name)
    return tuple(parts[:-1]), parts[-1] if parts else name


def _edges(graphs: dict[str, Graph], rows: dict[Key, LayerRow]) -> Iterator[tuple[Key, Key]]:
    """(Layer, layer that reads it), through values that have no row; sizes are no data."""
    for component, graph in graphs.items():
        sources: dict[str, frozenset[str]] = {
            v.name: frozenset({v.name} if (component, v.name) in rows else ()) for v in graph.inputs
        }
        for node in graph.nodes:
            read = frozenset[str]().union(*(sources.get(name, frozenset()) for name in node.inputs))
            for output in node.outputs:
                if (component, output) in rows:
                    yield from (((component, source), (component, output)) for source in read)
                    sources[output] = frozenset((output,))
                else:
                    sources[output] = frozenset() if node.op in _SIZES else read


def _number(
    members: Sequence[FoldedLayers | GraphLayer],
    parent: int,
    groups: list[tuple[str, int]],
    parents: list[int],
    position: dict[Key, int],
) -> None:
    """Give each group a number, parents before children, and each layer the number of its group."""
    for member in members:
        if isinstance(member, GraphLayer):
            parents[position[member.key]] = parent
        else:
            groups.append((member.label, parent))
            _number(member.members, len(groups) - 1, groups, parents, position)


def _figures(
    test: TestResult, position: dict[Key, int], edges: Sequence[tuple[int, int]]
) -> dict[int, list[str | float | None]]:
    """Layer → verdict, excess, introduced, rel. L2, share, table row, and whether the error of a guilty layer gets
    there."""
    lit = {position[row.component, row.onnx] for row in test.rows if row.verdict in (GUILTY, SHAPE)}
    for source, reader in edges:  # sorted by source, and layers stand in execution order
        if source in lit:
            lit.add(reader)
    figures: dict[int, list[str | float | None]] = {}
    for row in test.rows:
        place, replay = position[row.component, row.onnx], row.replay
        introduced, excess = (replay.introduced, replay.excess) if replay else (None, None)
        numbers = [_plain(v) for v in (excess, introduced, row.stats.rel_l2, row.share)]
        figures[place] = [row.verdict, *numbers, row.index, int(place in lit)]
    return figures


def _plain(value: float | None) -> str | float | None:
    if value is None:
        return None
    return float(f"{value:.4g}") if math.isfinite(value) else "NaN" if math.isnan(value) else "Infinity"


def json_script(data: object) -> Markup:
    """A document as text inside a ``script`` element: nothing in it ends that element."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    quoted = re.sub(r'\\(["\\])', lambda m: f"\\u{ord(m[1]):04x}", text)  # in a text: no quote ends anything anywhere
    return Markup(quoted.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e"))
