"""Settings of the TensorRT backends, as the command line sets them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from cp_debug.backends.tensorrt.engine_cache import EngineCache
from cp_debug.backends.tensorrt.loader_script import LoaderScript


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
