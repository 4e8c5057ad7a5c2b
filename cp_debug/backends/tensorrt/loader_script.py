"""A loader script of Polygraphy's, which makes the network of a build, its configuration, or both."""

from __future__ import annotations

import ast
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cp_debug.errors import InputError
from cp_debug.files import hashes, key_of
from cp_debug.reading import read_text

FUNCTIONS = ("load_network", "load_config")


@dataclass(frozen=True)
class LoaderScript:
    """A script with ``load_network()``, ``load_config(builder, network)``, or both; TensorRT's Python runs it."""

    path: Path
    functions: tuple[str, ...]
    """Those of ``FUNCTIONS`` that it defines."""
    content: str
    """Hash of the script and of the files that it names."""

    @classmethod
    def open(cls, path: Path) -> LoaderScript:
        """Read the script; nothing of it runs. Raises InputError for a file that is no such script."""
        source = read_text(path, what="loader script")
        try:
            tree = ast.parse(source)
            names = compile(tree, str(path), "exec").co_names
        except (SyntaxError, ValueError, RecursionError) as error:
            where = f", line {error.lineno}" if isinstance(error, SyntaxError) else ""
            raise InputError(f"{path}{where}: not a Python script ({getattr(error, 'msg', error)})") from None
        functions = tuple(name for name in FUNCTIONS if name in names)
        if not functions:
            raise InputError(
                f"{path}: neither {' nor '.join(FUNCTIONS)} is defined; expected a script like those that `polygraphy "
                "template trt-network` and `trt-config` write"
            )
        words = {n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str)}
        files = hashes(Path(word) for word in words if os.path.isfile(word))  # noqa: PTH113 (no path is too long for it)
        return cls(path.resolve(), functions, key_of({"script": source, "files": files}))

    @property
    def makes_network(self) -> bool:
        """Whether the network is the script's, and not parsed from the ONNX file."""
        return "load_network" in self.functions

    def step(self) -> dict[str, Any]:
        """The script as a step of the runner has it."""
        return {"script": str(self.path), "functions": list(self.functions), "content": self.content}
