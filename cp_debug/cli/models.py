"""``cpdebug models``: the models that can be named on the command line."""

from __future__ import annotations


def models() -> None:
    """List the built-in recipes, those of plug-ins, and the other ways to name a model."""
    from rich.table import Table

    from cp_debug.cli.console import console
    from cp_debug.recipes.registry import known_models

    table = Table("model", "what it is", box=None, header_style="bold", pad_edge=False)
    for name, summary in known_models():
        table.add_row(name, summary)
    table.add_row("mmdet3d:CONFIG", "a detector of the real mmdet3d: a config file, or one it ships by its name")
    table.add_row("FILE.onnx", "any ONNX file; every value becomes a probe")
    table.add_row("package.module:callable", "a callable that returns (torch module, example inputs)")
    table.add_row("file.py:callable", "the same, in a file")
    console.print(table)
