"""What exporters note on the nodes of an ONNX graph: the source lines and the torch modules behind them.

Lines are file, line and code of the torch module, where the export says. Modules are a proposal, which numbers verify.

torch's dynamo exporter writes the stack and the scopes of each operation into the node's metadata. Its TorchScript
exporter writes the stack into the node's ``doc_string``, if asked to be verbose, and the modules into its name. Our own
exports by TorchScript name the module's ``forward`` (``KEY``). Paths are shortened: none of the machine's folders is
part of what is told.
"""

from __future__ import annotations

import ast
import linecache
import re
import sys
from collections.abc import Iterable
from pathlib import Path, PurePath

import onnx

from cp_debug.graph.graph import Graph, Node
from cp_debug.safe_text import one_line

KEY = "cpdebug.source"
"""Key of a node's metadata that holds the line as it is shown."""
_DYNAMO = "pkg.torch.onnx.stack_trace"
_DYNAMO_FRAME = re.compile(r'File "(?P<file>[^"\n]+)", line (?P<line>\d+), in [^\n]+\n(?P<code>[^\n]*)')
_TORCHSCRIPT_FRAME = re.compile(r"^(?P<file>[^\n:]+)\((?P<line>\d+)\): ", re.MULTILINE)
_LIBRARIES = ("torch", "cp_debug")
"""Packages whose frames are those of the tracing and of torch's own modules, not of the network."""
_INSTALLED = re.compile(r"^.*[/\\](?:site|dist)-packages[/\\]")
_LONGEST = 160


def source_lines(graph: Graph) -> dict[str, str]:
    """Value → ``net.py:8: y = torch.relu(y)``, for the values of nodes whose export tells."""
    lines = {}
    for node in graph.nodes:
        if line := source_line(node.proto):
            lines.update(dict.fromkeys(node.outputs, line))
    return lines


def source_line(node: onnx.NodeProto) -> str:
    """The innermost line of the network's own code behind a node, with its file; empty where nothing tells."""
    properties = {entry.key: entry.value for entry in node.metadata_props}
    if KEY in properties:
        return one_line(properties[KEY])[:_LONGEST]
    dynamo = reversed(list(_DYNAMO_FRAME.finditer(properties.get(_DYNAMO, ""))))  # the innermost first, as the other's
    frames = [(frame["file"], frame["line"], frame["code"].strip()) for frame in dynamo]
    frames += [(frame["file"], frame["line"], "") for frame in _TORCHSCRIPT_FRAME.finditer(node.doc_string)]
    return next((_shown(*frame) for frame in frames if not _of_library(frame[0])), "")


def _shown(file: str, line: str | int, code: str) -> str:
    return one_line(f"{shortened(file)}:{line}" + (f": {code}" if code else ""))[:_LONGEST]


def own_line() -> str:
    """The innermost line of the network's own code that is running, with its file; empty where there is none."""
    frame = sys._getframe(1)
    while frame is not None:
        file = frame.f_code.co_filename
        if not _of_library(file) and not file.startswith("<"):
            return _shown(file, frame.f_lineno, linecache.getline(file, frame.f_lineno).strip())
        frame = frame.f_back  # type: ignore[assignment]
    return ""


def quotes_source(node: onnx.NodeProto) -> bool:
    """Whether a node holds source lines, or paths of source files, that its exporter wrote."""
    keys = {entry.key for entry in node.metadata_props}
    return bool(keys & {KEY, _DYNAMO}) or _TORCHSCRIPT_FRAME.search(node.doc_string) is not None


def shortened(file: str) -> str:
    """A path without the folders of a machine: below the working folder, else an installed package's, else its end."""
    if (installed := _INSTALLED.sub("", file)) != file:
        return installed
    path = PurePath(file.replace("\\", "/"))
    if path.is_relative_to(Path.cwd().as_posix()):
        return str(path.relative_to(Path.cwd().as_posix()))
    return "/".join(path.parts[-2:]) if len(path.parts) > 2 else path.name


def _of_library(file: str) -> bool:
    parts = PurePath(_INSTALLED.sub("", file).replace("\\", "/")).parts
    if parts and parts[0] in _LIBRARIES and _INSTALLED.match(file):
        return True
    return str(Path(__file__).parents[1]) in file


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
        scope, scopes = node.name.rpartition("/")[0], _dynamo_scopes(node) or []
        named = by_scope.get(scope, by_scope.get(_REPEAT.sub("", scope)))
        if (path := scopes[-2] if len(scopes) > 1 else named) is not None:
            hints.update(dict.fromkeys(node.outputs, path))
    return hints


def module_values(graph: Graph) -> dict[str, str]:
    """Module path → the one value that leaves the module, for modules that the exporter recorded."""
    inside: dict[str, list[Node]] = {}
    for node in graph.nodes:
        scopes = _dynamo_scopes(node)
        by_name = enclosing_modules(node.name) if node.name.startswith("/") else []
        for path in by_name if scopes is None else scopes[1:-1]:
            inside.setdefault(path, []).append(node)
    outputs = {value.name for value in graph.outputs}
    found = {}
    for path, nodes in inside.items():
        own, made = set(nodes), [name for node in nodes if node.op != "Constant" for name in node.outputs]
        leaving = [name for name in made if name in outputs or not own.issuperset(graph.consumers.get(name, ()))]
        if len(leaving) == 1:
            found[path] = leaving[0]
    return found


def enclosing_modules(name: str) -> list[str]:
    """The paths of the modules around a node that TorchScript's exporter called ``name``, the outermost first."""
    paths: list[str] = []
    parts = name.strip("/").split("/")[:-1]
    for index, part in enumerate(parts):
        # A container is not called, so its name stands in front of its part's: ``blocks.0/blocks.0.3``.
        own = part.removeprefix(f"{parts[index - 1]}.") if index else part
        paths.append(f"{paths[-1]}.{own}" if paths else own)
    return paths


def _dynamo_scopes(node: Node) -> list[str] | None:
    """The list of paths that dynamo wrote; empty where somebody else wrote something else, None where nobody wrote."""
    text = next((entry.value for entry in node.proto.metadata_props if entry.key == _DYNAMO_SCOPES), None)
    if text is None:
        return None
    try:
        names = ast.literal_eval(text)
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return []
    return [_CALL.sub("", str(name)) for name in names] if isinstance(names, list) else []


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
