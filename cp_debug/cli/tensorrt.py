"""Options about TensorRT, the same for every command that runs backends."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from cp_debug.cli.flags import LONGEST_BUILD
from cp_debug.cli.typed import once, refuse, typed
from cp_debug.errors import InputError

if TYPE_CHECKING:
    from cp_debug.backends.base import Backend
    from cp_debug.backends.spec import BackendSpec
    from cp_debug.backends.tensorrt.engine_cache import EngineCache
    from cp_debug.backends.tensorrt.options import LoaderScript
    from cp_debug.cli.console import Steps


Python = Annotated[str | None, typer.Option("--trt-python", help="A Python >= 3.8 that has tensorrt and numpy.")]
CALIBRATION_SAMPLES = 16
"""Largest number of samples that TensorRT calibrates on."""
CALIBRATED = ("trt-int8", "trt-best")
"""Backends for which TensorRT's own calibrator may find the ranges."""
RANGES = ("calibration_cache", "trt_calibrator", "trt_calib_data")
"""Flags about that calibrator."""


@dataclass(frozen=True)
class BuildFlags:
    """Options of every command that builds engines."""

    trt_python: Python = None
    profile: Annotated[list[str] | None, typer.Option(help="INPUT:MIN:OPT:MAX, shapes as 1x3x8x8; repeatable.")] = None
    workspace: Annotated[int | None, typer.Option(min=1, max=1 << 30, help="Limit in MiB.")] = None
    timing_cache: Annotated[Path | None, typer.Option(help="Kept and reused.")] = None

    @property
    def profiles(self) -> dict[str, tuple[tuple[int, ...], ...]]:
        """Input → (smallest, optimal, largest shape). Raises InputError for a text that is none."""
        return once(map(parse_profile, self.profile or ()), "--profile")


@dataclass(frozen=True)
class RangeFlags(BuildFlags):
    """``BuildFlags``, and options about what stays in FP32 and where the ranges of INT8 come from."""

    keep_fp32: Annotated[
        list[str] | None,
        typer.Option(
            help="Layer, node or COMPONENT/NODE to keep in FP32, also emulated; repeatable. @FILE: one per line.",
        ),
    ] = None
    calibration_cache: Annotated[
        Path | None, typer.Option(help="Ranges that TensorRT's calibrator found: read, or written.")
    ] = None
    trt_calibrator: Annotated[
        Literal["entropy", "minmax"] | None, typer.Option(help="INT8 scales by TensorRT, without Q/DQ (up to 10).")
    ] = None
    trt_calib_data: Annotated[Path | None, typer.Option(help="Its samples, as --inputs; else the model's own.")] = None

    def calibration(self, model: str, checkpoint: Path | None, stack: ExitStack) -> dict[str, Any]:
        """Options that let TensorRT calibrate ``model``; empty without a calibrator.

        The samples are kept as long as ``stack``. Raises InputError for data without a calibrator, and for unusable
        data.
        """
        if self.trt_calibrator is None:
            if self.trt_calib_data is not None:
                raise InputError("--trt-calib-data: expected --trt-calibrator beside it, which reads them")
            return {}
        from tempfile import TemporaryDirectory

        from cp_debug.deploy.engines import write_calibration_data
        from cp_debug.recipes.registry import load_model

        loaded = load_model(model, checkpoint=checkpoint)
        folder = Path(stack.enter_context(TemporaryDirectory(prefix="cpdebug-")))
        samples = loaded.samples(CALIBRATION_SAMPLES, 0, self.trt_calib_data)
        written = write_calibration_data(loaded, samples, folder)
        return {"calibrator": self.trt_calibrator, "calibration_data": written}


@dataclass(frozen=True)
class TensorRTFlags(BuildFlags):
    """``BuildFlags``, and options of every command that runs the engines that it builds."""

    strongly_typed: Annotated[
        bool, typer.Option("--strongly-typed", help="Types come from the graph (TensorRT 10; 11 always).")
    ] = False
    cache: Annotated[
        Path | None,
        typer.Option(help="Folder of built engines; default: the user's cache folder.", rich_help_panel="TensorRT"),
    ] = None
    no_cache: Annotated[bool, typer.Option("--no-cache", help="Build and export everything again.")] = False
    builder_level: Annotated[int | None, typer.Option(min=0, max=5, help="Builder optimization level.")] = None
    tactic_sources: Annotated[
        str | None,
        typer.Option(help="Kernel sources to remove or add, as in trtexec: -JIT_CONVOLUTIONS,+CUBLAS."),
    ] = None
    trt_loader: Annotated[
        Path | None, typer.Option(help="Script with Polygraphy's load_network, load_config or both.")
    ] = None
    build_timeout: Annotated[
        float | None, typer.Option(min=1.0, max=LONGEST_BUILD, help="Stop a build after so many seconds.")
    ] = None

    def check(self, specs: Sequence[BackendSpec], *, exports: bool = False) -> None:
        """Raise InputError for a flag that was typed where no backend reads it, and for a loader script that is none.

        ``exports``: --no-cache is about modules that are exported, too.
        """
        names = ", ".join(map(str, specs))
        engines = any(spec.family == "trt" for spec in specs)
        engine_flags = [
            f.name for f in fields(self) if f.name != "keep_fp32" and not (exports and f.name == "no_cache")
        ]
        alone = typed(("trt_calib_data",)) and not typed(("trt_calibrator",))
        why = f"none of {names} is TensorRT" + ("; expected --trt-calibrator, too" if alone else "")
        refuse(engine_flags, unless=engines, why=why)
        self._loader()
        calibrated = any(spec.name in CALIBRATED for spec in specs)
        why = f"none of {names} is {' or '.join(CALIBRATED)}"
        refuse(RANGES, unless=calibrated, why=why)
        why = f"none of {names} computes in less than FP32 and can keep a node in it (trt-*, emu-*, ort-fp16)"
        if any(spec.name == "emu-int8" for spec in specs):
            why += "; --skip-layers leaves layers out of INT8"
        refuse(("keep_fp32",), unless=any(map(keeps_fp32, specs)), why=why)

    def check_installed(self, specs: Sequence[BackendSpec]) -> None:
        """Raise BackendUnavailable or MissingPackage for a runtime that is not there, before torch is imported."""
        from cp_debug.backends.registry import check_installed

        check_installed(specs, self.trt_python)

    @property
    def options(self) -> dict[str, Any]:
        """The options as fields of ``cp_debug.backends.tensorrt.options.Options``."""
        return {
            "python": self.trt_python,
            "strongly_typed": self.strongly_typed,
            "profiles": self.profiles,
            "workspace_mib": self.workspace,
            "timing_cache": self.timing_cache,
            "cache": self._open_cache,
            "builder_level": self.builder_level,
            "tactic_sources": parse_sources(self.tactic_sources),
            "loader": self._loader(),
            "build_timeout": self.build_timeout,
        }

    def _loader(self) -> LoaderScript | None:
        """The script that was named, read. Raises InputError for one without a function that is known."""
        from cp_debug.backends.tensorrt.options import LoaderScript

        return LoaderScript.open(self.trt_loader) if self.trt_loader is not None else None

    def _open_cache(self) -> EngineCache | None:
        """The cache of engines, or None. Raises InputError for a folder that was named and cannot be written."""
        from cp_debug.backends.tensorrt.engine_cache import EngineCache
        from cp_debug.cli.console import errors
        from cp_debug.store import cache_folder

        if self.no_cache:
            if self.cache is not None:
                raise InputError("--no-cache: expected it without --cache, which names a folder")
            return None
        return EngineCache.open(
            self.cache or cache_folder("engines"), asked=self.cache is not None, on_say=errors.print
        )


@dataclass(frozen=True)
class ProbeFlags(TensorRTFlags, RangeFlags):
    """All options about TensorRT, also about what an engine shows."""

    probes: Annotated[
        Literal["auto", "boundaries", "all"],
        typer.Option(
            help="auto: boundaries, if outputs diverge; boundaries: what the engine writes anyway; all: every value.",
        ),
    ] = "auto"

    @property
    def options(self) -> dict[str, Any]:
        """The options as fields of ``cp_debug.backends.tensorrt.options.Options``."""
        return {
            **super().options,
            "probes": self.probes,
            "keep_fp32": frozenset(named(self.keep_fp32 or ())),
            "calibration_cache": self.calibration_cache,
        }

    def calibrated(self, model: str, checkpoint: Path | None, stack: ExitStack) -> dict[str, Any]:
        """``options`` with which TensorRT calibrates ``model`` where that is asked for: see ``calibration``."""
        return self.options | self.calibration(model, checkpoint, stack)


def named(values: Iterable[str]) -> Iterator[str]:
    """The names that ``--keep-fp32`` gives: as they are, or the lines of a file behind an @.

    Raises InputError for a file that cannot be read.
    """
    from cp_debug.reading import read_text

    for value in values:
        if value.startswith("@"):
            lines = read_text(Path(value[1:]), what="list of names").splitlines()
            yield from filter(None, map(str.strip, lines))
        else:
            yield value


def keeps_fp32(spec: BackendSpec) -> bool:
    """Whether a backend can compute some nodes in FP32 and the others in less."""
    if spec.family == "trt":
        return spec.variant not in ("fp32", "tf32")
    return spec.name == "ort-fp16" or (spec.family == "emu" and spec.variant not in ("fp32", "int8"))


def make(specs: Sequence[BackendSpec], options: Mapping[str, Any], steps: Steps) -> list[Backend]:
    """Backends for ``specs``.

    Those on TensorRT get ``options`` and tell ``steps`` how far a build is; those that can keep nodes in FP32 get the
    nodes.
    """
    from cp_debug.backends.registry import create

    engine_options, fp32_nodes = {**options, "on_event": steps.on_event}, options.get("keep_fp32", ())
    open_cache = engine_options.pop("cache", None)
    if open_cache is not None and any(spec.family == "trt" for spec in specs):
        engine_options["cache"] = open_cache()
    opened_backends = []
    for spec in specs:
        backend: Any = create(spec, **engine_options) if spec.family == "trt" else create(spec)
        opened_backends.append(
            backend.keeping(fp32_nodes) if fp32_nodes and spec.family != "trt" and keeps_fp32(spec) else backend
        )
    return opened_backends


def parse_sources(text: str | None) -> tuple[str, ...]:
    """``-CUDNN,+CUBLAS`` → its changes. Raises InputError for one without a sign, or with another name than letters."""
    if text is None:
        return ()
    changes = tuple(text.split(","))
    for change in changes:
        if not re.fullmatch(r"[+-][A-Z][A-Z_]*", change):
            raise InputError(f"--tactic-sources: expected +NAME or -NAME, as -JIT_CONVOLUTIONS,+CUBLAS; got {change!r}")
    return tuple(once(((change[1:], change) for change in changes), "--tactic-sources").values())


def parse_profile(text: str) -> tuple[str, tuple[tuple[int, ...], ...]]:
    """``x:1x3x8x8:2x3x8x8:4x3x8x8`` → input, (smallest, optimal, largest shape). Raises InputError."""
    try:
        name, *parts = text.rsplit(":", 3)
        shapes = tuple(tuple(int(size) for size in part.split("x")) for part in parts)
    except ValueError:
        name, shapes = "", ()
    ordered = len(shapes) == 3 and len(set(map(len, shapes))) == 1
    if not name or not ordered or not all(0 <= a <= b <= c for a, b, c in zip(*shapes, strict=True)):
        raise InputError(f"--profile: {text!r}; expected INPUT:MIN:OPT:MAX with shapes like 1x3x8x8, growing")
    return name, shapes
