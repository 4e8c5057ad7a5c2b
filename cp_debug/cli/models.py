"""``cpdebug models``: the models that can be named on the command line."""

from __future__ import annotations


def models() -> None:
    """List the models that cpdebug knows, and the ways to name yours."""
    from cp_debug.cli.console import console
    from cp_debug.recipes.registry import known_models
    from cp_debug.reports.sheet import Column, Sheet
    from cp_debug.reports.sheet_terminal import Terminal

    rows = [
        *known_models(),
        ("mmdet3d:CONFIG", "a detector of the real mmdet3d: a config file, or the name of one it ships"),
        ("FOLDER", "a folder of transformers: config.json and .safetensors; its code is never run"),
        ("FILE.onnx", "any ONNX file; every value is a probe"),
        ("package.module:callable", "a callable that returns (torch module, example inputs)"),
        ("file.py:callable", "the same, in a file"),
    ]
    console.print(Terminal(Sheet((Column("model", "name"), Column("what it is")), rows)))
