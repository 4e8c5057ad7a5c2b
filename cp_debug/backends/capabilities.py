"""Capabilities of only some backends and sessions: attributes with a default for those without, and protocols."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, runtime_checkable

if TYPE_CHECKING:
    import numpy as np

    from cp_debug.backends.base import Backend, Session
    from cp_debug.backends.build_info import BuildInfo
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


def kept_in_fp32(backend: Backend) -> frozenset[str]:
    """Names of the ONNX nodes that a backend of lower precision computes in FP32: its ``keep_fp32``."""
    return frozenset(_of(backend, "keep_fp32", ()))


def profiles_of(backend: Backend) -> Mapping[str, tuple[Sequence[int], Sequence[int], Sequence[int]]]:
    """Input with free axes → its smallest, optimal and largest shape, as a builder was told: ``profiles``."""
    return _of(backend, "profiles", {})


def calibrates_itself(backend: Backend) -> bool:
    """Whether INT8 comes from the backend's own calibrator, not from Q/DQ pairs: ``implicit_int8``."""
    return _of(backend, "implicit_int8", False)


def largest_opset(backend: Backend) -> int | None:
    """The last ONNX opset that a backend reads, its ``largest_opset``; None without a limit, or where none is known."""
    return _of(backend, "largest_opset", None)


def with_threads(backend: Backend, count: int | None) -> Backend:
    """A copy with another thread count (None leaves it to the library) by ``with_threads``; itself without one."""
    changed: Callable[[int | None], Backend] | None = _of(backend, "with_threads", None)
    return backend if changed is None else changed(count)


def builder_of(backend: Backend) -> Backend:
    """The backend that builds what this one runs: itself, or where it runs files of engines its ``builder``."""
    return _of(backend, "builder", backend)


def kernels_of(session: Session) -> Mapping[str, str]:
    """ONNX value → name of the kernel that wrote it, where the session tells: ``tactics``."""
    return _of(session, "tactics", {})


def ranges_of_session(session: Session) -> Ranges | None:
    """The INT8 ranges that a session's own calibrator chose: ``ranges``; None without one."""
    return _of(session, "ranges", None)


def build_info_of(session: Session) -> BuildInfo | None:
    """Facts about the engine that a session built: ``build_info``; None where it built none, or not yet."""
    return _of(session, "build_info", None)


def integer_kernels_of(session: Session) -> int | None:
    """Number of a session's kernels that compute with integers, ``integer_kernels``; None where nobody counted."""
    return _of(session, "integer_kernels", None)


def timer_of(session: Session) -> Callable[[Mapping[str, Any], int], list[float]] | None:
    """The session's own stopwatch, ``timings(inputs, passes)``: seconds of each of ``passes`` runs on the device.

    Its inputs are name → array in the dtype and shape that the graph declares. None where the caller must time it from
    outside.
    """
    return _of(session, "timings", None)


def _of(having: Backend | Session, name: str, default: T) -> T:
    """An attribute that only some backends and sessions have."""
    found: T = getattr(having, name, default)
    return found
