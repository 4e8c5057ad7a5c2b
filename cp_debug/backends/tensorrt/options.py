"""Settings of the TensorRT backends, as the command line sets them, and Polygraphy's loader script among them."""

from __future__ import annotations

import ast
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from cp_debug.backends.tensorrt.engine_cache import EngineCache
from cp_debug.errors import InputError
from cp_debug.files import hashes, key_of
from cp_debug.reading import read_text


@dataclass(frozen=True)
class TensorRTOptions:
    """Settings of the TensorRT backends; the defaults are those of the command line."""

    python: str | None = None
    """Interpreter that has TensorRT; None looks at the environment, then at this one."""
    device: int = 0
    strongly_typed: bool = False
    keep_fp32: frozenset[str] = frozenset()
    """ONNX nodes that stay FP32, of any component."""
    fp16_fallback: bool = False
    """Let what has no Q/DQ pairs in an INT8 engine run in FP16; an option of weakly typed networks."""
    probes: Literal["auto", "boundaries", "all"] = "boundaries"
    """``auto`` is ``boundaries`` where the outputs diverge, and builds no second engine where they do not;
    ``boundaries`` shows what the engine writes to memory anyway; ``all`` marks every value, which undoes fusions."""
    profiles: Mapping[str, tuple[Sequence[int], Sequence[int], Sequence[int]]] = field(default_factory=dict)
    """Dynamic input → smallest, optimal, largest shape; names that a component does not have are ignored."""
    workspace_mib: int | None = None
    timing_cache: Path | None = None
    """File of kernel timings, kept and reused; None takes one that lives as long as this process."""
    calibration_cache: Path | None = None
    """Scales that TensorRT's calibrator found, read where they exist and else written: a file, or, without a suffix, a
    folder of ``<component>.cache``. None keeps them as long as the session."""
    calibration_data: Path | None = None
    """Folder of ``<component>/*.npz``, one array an input, for the calibrator of INT8 where there is no cache."""
    calibrator: Literal["entropy", "minmax"] = "entropy"
    cache: EngineCache | None = None
    """Cache of built engines and their timings; None builds each engine anew."""
    builder_level: int | None = None
    """Optimization level of the builder, 0 to 5; None leaves it to TensorRT."""
    tactic_sources: tuple[str, ...] = ()
    """Changes to the places that the builder takes kernels from, as ``-JIT_CONVOLUTIONS`` or ``+CUBLAS``."""
    loader: LoaderScript | None = None
    """Script that makes the network, the configuration of its build, or both."""
    build_timeout: float | None = None
    """Seconds for one build; None has no limit of its own."""
    time_limit: float = 3600.0
    """Seconds for one job: the builds or runs that belong together."""
    on_event: Callable[[Mapping[str, Any]], None] | None = None
    """Told log lines and build progress; see ``client.OnEvent``."""


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

    def step(self) -> dict[str, Any]:
        """The script as a step of the runner has it."""
        return {"script": str(self.path), "functions": list(self.functions), "content": self.content}
