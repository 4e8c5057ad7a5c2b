"""Source lines behind the nodes of an exported graph: file, line and code of the torch module, where the export says.

torch's dynamo exporter writes the stack of each operation into the node's metadata, its TorchScript exporter, asked to
be verbose, into the node's ``doc_string``. Our own exports by TorchScript name the module's ``forward`` (``KEY``).
Paths are shortened: none of the machine's folders is part of what is told.
"""

from __future__ import annotations

import linecache
import re
import sys
from collections.abc import Iterator
from pathlib import Path, PurePath

import onnx

from cp_debug.graph.graph import Graph
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
    frames = [*_dynamo(properties.get(_DYNAMO, "")), *_torchscript(node.doc_string)]
    own = next(((file, line, code) for file, line, code in frames if not _of_library(file)), None)
    if own is None:
        return ""
    file, line, code = own
    return one_line(f"{shortened(file)}:{line}" + (f": {code}" if code else ""))[:_LONGEST]


def own_line() -> str:
    """The innermost line of the network's own code that is running, with its file; empty where there is none."""
    frame = sys._getframe(1)
    while frame is not None:
        file = frame.f_code.co_filename
        if not _of_library(file) and not file.startswith("<"):
            code = linecache.getline(file, frame.f_lineno).strip()
            return one_line(f"{shortened(file)}:{frame.f_lineno}" + (f": {code}" if code else ""))[:_LONGEST]
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


def _dynamo(trace: str) -> Iterator[tuple[str, str, str]]:
    """File, line and code of each frame, the innermost first."""
    for frame in reversed(list(_DYNAMO_FRAME.finditer(trace))):
        yield frame["file"], frame["line"], frame["code"].strip()


def _torchscript(text: str) -> Iterator[tuple[str, str, str]]:
    """File and line of each frame, the innermost first, as TorchScript writes them; it writes no code."""
    for frame in _TORCHSCRIPT_FRAME.finditer(text):
        yield frame["file"], frame["line"], ""


def _of_library(file: str) -> bool:
    parts = PurePath(_INSTALLED.sub("", file).replace("\\", "/")).parts
    if parts and parts[0] in _LIBRARIES and _INSTALLED.match(file):
        return True
    return str(Path(__file__).parents[1]) in file
