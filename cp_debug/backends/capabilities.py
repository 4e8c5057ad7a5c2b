"""Capabilities of only some backends and sessions: attributes with a default for those without, and protocols.

``BuildInfo`` has the facts about a built engine; ``settings`` of a run record hold the same as JSON, from which saved
results are read.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, runtime_checkable

if TYPE_CHECKING:
    import numpy as np

    from cp_debug.backends.base import Backend, Session
    from cp_debug.backends.tensorrt.calibration import Ranges
    from cp_debug.backends.tensorrt.inspector import EngineLayer


T = TypeVar("T")


@runtime_checkable
class HasRemarks(Protocol):
    """A session that has something to say about the program that it made."""

    @property
    def notes(self) -> Sequence[str]:
        """Remarks, a sentence each."""
        ...


@runtime_checkable
class FreesMemory(Protocol):
    """A session that holds much memory between its runs."""

    def free_memory(self) -> None:
        """Free what the next run can have again."""
        ...


@runtime_checkable
class BuildsVariations(Protocol):
    """A session that fuses nodes, tells how, and builds engines that differ a little from the one that is judged."""

    @property
    def layers(self) -> Sequence[EngineLayer]:
        """The layers of the engine last used."""
        ...

    def trial(
        self, inputs: Mapping[str, np.ndarray], value: str, keep_fp32: Collection[str]
    ) -> tuple[np.ndarray | None, float]:
        """Build one more engine with further nodes kept in FP32, and run it once.

        Returns ``value``, in its shape and the dtype that the engine computes it in, None where that cannot show it;
        and the relative L2 distance of its outputs from the plain engine's.
        """
        ...


@runtime_checkable
class LooksInsideOnDemand(Protocol):
    """A session that shows values inside only where its outputs ask for it, as that costs an engine."""

    diverges: Callable[[Mapping[str, np.ndarray], Mapping[str, np.ndarray]], str] | None
    """Told inputs and outputs of a run: why they ask for a look inside, or empty; None always looks."""


def _of(name: str, default: T) -> Callable[[Any], T]:
    """What reads an attribute that only some backends and sessions have."""

    def read(having: Backend | Session) -> T:
        found: T = getattr(having, name, default)
        return found

    return read


profiles_of: Callable[[Backend], Mapping[str, tuple[Sequence[int], Sequence[int], Sequence[int]]]] = _of("profiles", {})
"""Input with free axes → its smallest, optimal and largest shape, as a builder was told: ``profiles``."""
calibrates_itself: Callable[[Backend], bool] = _of("implicit_int8", False)
"""Whether INT8 comes from the backend's own calibrator, not from Q/DQ pairs: ``implicit_int8``."""
largest_opset: Callable[[Backend], int | None] = _of("largest_opset", None)
"""The last ONNX opset that a backend reads, its ``largest_opset``; None without a limit, or where none is known."""
kernels_of: Callable[[Session], Mapping[str, str]] = _of("tactics", {})
"""ONNX value → name of the kernel that wrote it, where the session tells: ``tactics``."""
ranges_of_session: Callable[[Session], Ranges | None] = _of("ranges", None)
"""The INT8 ranges that a session's own calibrator chose: ``ranges``; None without one."""
build_info_of: Callable[[Session], BuildInfo | None] = _of("build_info", None)
"""Facts about the engine that a session built: ``build_info``; None where it built none, or not yet."""
integer_kernels_of: Callable[[Session], int | None] = _of("integer_kernels", None)
"""Number of a session's kernels that compute with integers, ``integer_kernels``; None where nobody counted."""
timer_of: Callable[[Session], Callable[[Mapping[str, Any], int], list[float]] | None] = _of("timings", None)
"""The session's own stopwatch, ``timings(inputs, passes)``: seconds of each of ``passes`` runs on the device; None
where the caller must time it from outside. Its inputs are name → array in the dtype and shape that the graph has."""


def kept_in_fp32(backend: Backend) -> frozenset[str]:
    """Names of the ONNX nodes that a backend of lower precision computes in FP32: its ``keep_fp32``."""
    return frozenset(getattr(backend, "keep_fp32", ()))


def with_threads(backend: Backend, count: int | None) -> Backend:
    """A copy with another thread count (None leaves it to the library) by ``with_threads``; itself without one."""
    changed: Callable[[int | None], Backend] | None = getattr(backend, "with_threads", None)
    return backend if changed is None else changed(count)


def builder_of(backend: Backend) -> Backend:
    """The backend that builds what this one runs: itself, or where it runs files of engines its ``builder``."""
    builder: Backend = getattr(backend, "builder", backend)
    return builder


ONLY_WHERE_SET = ("rebuilt", "probed", "stopped", "cached", "unmarked")
"""Fields that JSON has only where they say something."""
INTERRUPTED = "stopped by Ctrl-C: only the outputs are judged"
"""Why nothing inside is shown where a user waited for it no longer; nothing more is built then."""


@dataclass(frozen=True)
class BuildInfo:
    """Facts about one engine, its second build and the engine with probes, as far as they were built."""

    regime: str = ""
    """``weak`` or ``strong`` typing."""
    flags: list[str] = field(default_factory=list)
    timing_cache: Any = None
    realised: bool = True
    """Whether any layer runs in the precision asked for, as far as layers tell."""
    realised_precision: dict[str, float] = field(default_factory=dict)
    """Data type → share of the layers' inputs and outputs; empty where the engine tells none."""
    build_seconds: dict[str, float] = field(default_factory=dict)
    """Build time in seconds, by ``plain``, ``rebuilt`` and ``probed``."""
    run_seconds: float | None = None
    """Median of the plain engine, copies left out; None before it ran for its time."""
    observer_gap: float | None = None
    """Relative L2 distance of the probed engine's outputs from the plain one's; None before both ran."""
    rebuild_floor: float | None = None
    """Relative L2 distance of the rebuilt engine's outputs from the plain one's."""
    layers: list[dict[str, Any]] = field(default_factory=list)
    """``EngineLayer.to_dict`` of each, of the plain engine."""
    rebuilt: dict[str, Any] = field(default_factory=dict)
    """Differences from the plain engine: fusions, tactics."""
    probed: dict[str, Any] = field(default_factory=dict)
    stopped: str = ""
    """Reason why values inside are not shown."""
    cached: bool = False
    """Whether the engine was taken from the cache."""
    unmarked: list[str] = field(default_factory=list)
    """Values that are not shown, as that would have changed the engine."""

    def to_settings(self) -> dict[str, Any]:
        """JSON-safe, as ``settings`` of a session hold it."""
        values = {each.name: getattr(self, each.name) for each in fields(self)}
        return {name: value for name, value in values.items() if value or name not in ONLY_WHERE_SET}

    @classmethod
    def of_settings(cls, settings: Mapping[str, Any]) -> BuildInfo | None:
        """The facts in a component's ``settings``; None where these are of no engine that cpdebug built."""
        if "realised_precision" not in settings:
            return None
        return cls(**{each.name: settings[each.name] for each in fields(cls) if each.name in settings})
