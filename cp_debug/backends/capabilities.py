"""Capabilities of only some backends and sessions, each as a protocol, and defaults for those without."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

if TYPE_CHECKING:
    import numpy as np

    from cp_debug.backends.base import Backend, Session
    from cp_debug.backends.build_info import BuildInfo
    from cp_debug.backends.tensorrt.calibration import Ranges
    from cp_debug.backends.tensorrt.inspector import EngineLayer


@runtime_checkable
class KeepsFp32(Protocol):
    """A backend of lower precision that computes chosen nodes in FP32."""

    keep_fp32: Collection[str]
    """Names of ONNX nodes that compute in FP32."""


@runtime_checkable
class HasProfiles(Protocol):
    """A backend whose builder is told the shapes of inputs with free axes."""

    profiles: Mapping[str, tuple[Sequence[int], Sequence[int], Sequence[int]]]
    """Input → its smallest, optimal and largest shape."""


@runtime_checkable
class CalibratesItself(Protocol):
    """A backend that may choose INT8 scales by a calibrator of its own, and then needs no Q/DQ pairs."""

    implicit_int8: bool


@runtime_checkable
class LimitsOpset(Protocol):
    """A backend that reads ONNX up to an opset."""

    largest_opset: int | None
    """Newest opset that the backend reads; None where no limit is known."""


@runtime_checkable
class ChangesThreads(Protocol):
    """A backend whose thread count can be chosen."""

    def with_threads(self, count: int | None) -> Backend:
        """A copy of the backend with this many threads; None leaves the number to the library."""
        ...


@runtime_checkable
class RunsPrebuilt(Protocol):
    """A backend over engine files that were built before."""

    builder: Backend
    """The backend that would build such engines."""


@runtime_checkable
class NamesKernels(Protocol):
    """A session that knows which kernel wrote a value."""

    tactics: Mapping[str, str]
    """ONNX value → name of the kernel."""


@runtime_checkable
class HasRemarks(Protocol):
    """A session that has something to say about the program that it made."""

    @property
    def notes(self) -> Sequence[str]:
        """Remarks, a sentence each."""
        ...


@runtime_checkable
class KnowsRanges(Protocol):
    """A session that knows which INT8 ranges its calibrator chose."""

    ranges: Ranges | None


@runtime_checkable
class BuildsEngines(Protocol):
    """A session that runs an engine which was built for it."""

    build_info: BuildInfo | None
    """None before anything was built."""


@runtime_checkable
class CountsIntegerKernels(Protocol):
    """A session that knows how many kernels compute with integers."""

    integer_kernels: int | None
    """None where the program is not asked to."""


@runtime_checkable
class TimesItself(Protocol):
    """A session that measures its own passes."""

    def timings(self, inputs: Mapping[str, np.ndarray], passes: int) -> list[float]:
        """Seconds of each of ``passes`` runs on the device.

        ``inputs``: name → array in the dtype and shape that the graph declares.
        """
        ...


@runtime_checkable
class FreesMemory(Protocol):
    """A session that holds much memory between its runs."""

    def free_memory(self) -> None:
        """Free what the next run can have again."""
        ...


class BuiltVariation(Protocol):
    """One more engine of a program, with its results on one input."""

    @property
    def outputs(self) -> Mapping[str, np.ndarray]:
        """The graph's outputs.

        Name → array in the dtype that the graph declares.
        """
        ...

    @property
    def shown(self) -> Mapping[str, np.ndarray]:
        """The marked values that it put out.

        Name → array in the dtype that the engine computes it in.
        """
        ...

    @property
    def gap(self) -> float:
        """Relative L2 distance of its outputs from the plain engine's."""
        ...


@runtime_checkable
class BuildsVariations(Protocol):
    """A session that fuses nodes, tells how, and builds engines that differ a little from the one that is judged."""

    @property
    def layers(self) -> Sequence[EngineLayer]:
        """The layers of the engine last used."""
        ...

    def trial(
        self,
        inputs: Mapping[str, np.ndarray],
        marks: Collection[str] = (),
        keep_fp32: Collection[str] = (),
    ) -> BuiltVariation:
        """Build one more engine and run it once, with values shown or nodes kept in FP32."""
        ...


@runtime_checkable
class LooksInsideOnDemand(Protocol):
    """A session that shows values inside only where its outputs ask for it, as that costs an engine."""

    diverges: Callable[[Mapping[str, np.ndarray], Mapping[str, np.ndarray]], bool] | None
    """Whether inputs and outputs of a run ask for a look inside; None always looks."""


def kept_in_fp32(backend: Backend) -> frozenset[str]:
    """Names of the nodes that a backend was told to keep in FP32."""
    return frozenset(backend.keep_fp32) if isinstance(backend, KeepsFp32) else frozenset()


def profiles_of(backend: Backend) -> Mapping[str, tuple[Sequence[int], Sequence[int], Sequence[int]]]:
    """Input → its smallest, optimal and largest shape, as a backend was told; empty for one that takes none."""
    return backend.profiles if isinstance(backend, HasProfiles) else {}


def calibrates_itself(backend: Backend) -> bool:
    """Whether INT8 comes from the backend's own calibrator, not from Q/DQ pairs."""
    return isinstance(backend, CalibratesItself) and backend.implicit_int8


def largest_opset(backend: Backend) -> int | None:
    """The last ONNX opset that a backend reads; None without a limit."""
    return backend.largest_opset if isinstance(backend, LimitsOpset) else None


def with_threads(backend: Backend, count: int | None) -> Backend:
    """The backend with another thread count; itself where it has none to choose."""
    return backend.with_threads(count) if isinstance(backend, ChangesThreads) else backend


def builder_of(backend: Backend) -> Backend:
    """The backend that builds what this one runs: itself, or another where this one runs files of engines."""
    return backend.builder if isinstance(backend, RunsPrebuilt) else backend


def kernels_of(session: Session) -> Mapping[str, str]:
    """ONNX value → name of the kernel that wrote it, where the session tells."""
    return session.tactics if isinstance(session, NamesKernels) else {}


def ranges_of_session(session: Session) -> Ranges | None:
    """The INT8 ranges that a session's own calibrator chose; None without one."""
    return session.ranges if isinstance(session, KnowsRanges) else None


def build_info_of(session: Session) -> BuildInfo | None:
    """Facts about the engine that a session built; None where it built none."""
    return session.build_info if isinstance(session, BuildsEngines) else None


def integer_kernels_of(session: Session) -> int | None:
    """Number of a session's kernels that compute with integers; None where nobody counted."""
    return session.integer_kernels if isinstance(session, CountsIntegerKernels) else None


def timer_of(session: Session) -> Callable[[Mapping[str, Any], int], list[float]] | None:
    """The session's own stopwatch; None where the caller must time it from outside."""
    return session.timings if isinstance(session, TimesItself) else None
