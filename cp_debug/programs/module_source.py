"""Source of the torch modules behind a TorchScript export, which itself names no lines."""

from __future__ import annotations

import onnx
from torch import nn

from cp_debug.errors import module_of
from cp_debug.graph.source_lines import KEY, shortened
from cp_debug.programs.scope_names import enclosing_modules


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
