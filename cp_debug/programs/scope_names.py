"""Torch modules that the exporter names for ONNX nodes: a proposal, which numbers then verify."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable

from cp_debug.graph.graph import Graph, Node

_DYNAMO_SCOPES = "pkg.torch.onnx.name_scopes"
_CALL = re.compile(r"@\d+")
_REPEAT = re.compile(r"_\d+(?=/|$)")


def scope_hints(graph: Graph, called: Iterable[str]) -> dict[str, str]:
    """Value → module path, where the exporter recorded one.

    ``called`` are the paths of the modules whose forward ran, in any order. dynamo writes the path into the node's
    metadata. TorchScript writes it into the node's name: one part for every called ancestor, each part the end of its
    path from the last name that is not a number on (``backbone.blocks.0.3`` → ``/backbone/blocks.0/blocks.0.3/``).
    """
    paths = {_CALL.sub("", path) for path in called}
    by_scope = {_torchscript_scope(path, paths): path for path in paths}
    hints = {}
    for node in graph.nodes:
        path = _dynamo_path(node)
        if path is None:
            scope = node.name.rpartition("/")[0]
            path = by_scope.get(scope, by_scope.get(_REPEAT.sub("", scope)))
        if path is not None:
            hints.update(dict.fromkeys(node.outputs, path))
    return hints


def module_values(graph: Graph) -> dict[str, str]:
    """Module path → the one value that leaves the module, for modules that the exporter recorded."""
    inside: dict[str, list[Node]] = {}
    for node in graph.nodes:
        for path in _paths(node):
            inside.setdefault(path, []).append(node)
    outputs = {value.name for value in graph.outputs}
    found = {}
    for path, nodes in inside.items():
        own = {node.index for node in nodes}

        def leaves(name: str, own: set[int] = own) -> bool:
            return name in outputs or any(reader.index not in own for reader in graph.consumers.get(name, ()))

        leaving = [name for node in nodes if node.op != "Constant" for name in node.outputs if leaves(name)]
        if len(leaving) == 1:
            found[path] = leaving[0]
    return found


def _paths(node: Node) -> list[str]:
    """The paths of the modules around a node, the outermost first."""
    for entry in node.proto.metadata_props:
        if entry.key == _DYNAMO_SCOPES:
            return [_CALL.sub("", path) for path in _listed(entry.value)[1:-1]]
    return enclosing_modules(node.name) if node.name.startswith("/") else []


def enclosing_modules(name: str) -> list[str]:
    """The paths of the modules around a node that TorchScript's exporter called ``name``, the outermost first."""
    paths: list[str] = []
    parts = name.strip("/").split("/")[:-1]
    for index, part in enumerate(parts):
        # A container is not called, so its name stands in front of its part's: ``blocks.0/blocks.0.3``.
        own = part.removeprefix(f"{parts[index - 1]}.") if index else part
        paths.append(f"{paths[-1]}.{own}" if paths else own)
    return paths


def _listed(text: str) -> list[str]:
    """The list of names that dynamo wrote; empty where somebody else wrote something else."""
    try:
        names = ast.literal_eval(text)
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return []
    return [str(name) for name in names] if isinstance(names, list) else []


def _dynamo_path(node: Node) -> str | None:
    for entry in node.proto.metadata_props:
        if entry.key == _DYNAMO_SCOPES:
            scopes = _listed(entry.value)
            return _CALL.sub("", scopes[-2]) if len(scopes) > 1 else None
    return None


def _torchscript_scope(path: str, called: set[str]) -> str:
    parts = path.split(".")
    scope = ""
    for end in range(1, len(parts) + 1):
        if ".".join(parts[:end]) not in called:
            continue
        start = end - 1
        while start > 0 and parts[start].isdigit():
            start -= 1
        scope += "/" + ".".join(parts[start:end])
    return scope
