"""Values of a run that are held in memory, where they were computed, up to a bound; what is beyond it goes to disk.

``Trimmer`` gives freed memory back to the system: glibc keeps freed blocks of up to 32 MiB, where they fragment.
"""

from __future__ import annotations

import ctypes
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import numpy as np

from cp_debug.errors import InputError
from cp_debug.probes.arrays import Tensor, as_numpy, device_of, dtype_name
from cp_debug.probes.capture import Capture, CaptureWriter, Header, TensorEntry

HOST_MEMORY = 1 << 29
"""Bytes of captured values that are held on the host, unless somebody says otherwise …"""
LARGE = 1 << 20
OF_LARGE = 1 << 26
"""… but this many of values of ``LARGE`` bytes and more: smaller ones take longer to write and to find than to hold."""
DEVICE_SHARE = 0.4
"""Share of a device's free memory that captured values may take, unless somebody says otherwise."""
MANY_WEIGHTS = 1 << 31
"""Bytes of FP32 weights from which on a GPU holds no more in all than ``TIMES_WEIGHTS`` of them: what fits one card now
should fit it where the model is a few times larger."""
TIMES_WEIGHTS = 2.4


class CapturedRun(Protocol):
    """Tensors of one run, by the names of their components and values."""

    @property
    def entries(self) -> Sequence[TensorEntry]:
        """Entries of all tensors, in execution order."""
        ...

    def names(self, sample: int = 0, component: str = "") -> list[str]:
        """The tensors of one sample and component in execution order."""
        ...

    def load(self, name: str, sample: int = 0, component: str = "") -> Tensor:
        """The tensor, read-only, in the shape and dtype of the run. Raises InputError where there is none."""
        ...


class Room:
    """Bytes that may still be taken by captured values, device by device."""

    def __init__(self, limit: int | None = None, *, weights: int = 0) -> None:
        """``limit``: bytes on each device; None: ``HOST_MEMORY``, as far as values are not ``LARGE``, and
        ``DEVICE_SHARE`` of what a GPU has free.

        ``weights``: bytes of the model's weights in FP32. Where they are many and there is no ``limit``, a GPU has room
        while torch has taken less than ``TIMES_WEIGHTS`` of them there, modules and what they compute included.
        """
        self._limit = limit
        self._most = int(weights * TIMES_WEIGHTS) if limit is None and weights >= MANY_WEIGHTS else None
        self._left: dict[str, int] = {}

    def take(self, device: str, size: int) -> bool:
        """Take ``size`` bytes on a device, if they are left."""
        left = self._left.get(device)
        if left is None:
            left = self._left[device] = self._whole(device)
        may_fill = size < LARGE or self._limit is not None or device.startswith("cuda")
        if size > (left if may_fill else left - HOST_MEMORY + OF_LARGE) or self._is_full(device, size):
            return False
        self._left[device] = left - size
        return True

    def give(self, device: str, size: int) -> None:
        """Give back what was taken."""
        self._left[device] += size

    def _is_full(self, device: str, size: int) -> bool:
        if self._most is None or not device.startswith("cuda"):
            return False
        import torch

        return torch.cuda.memory_allocated(torch.device(device)) + size > self._most

    def _whole(self, device: str) -> int:
        if self._limit is not None:
            return self._limit
        if not device.startswith("cuda"):
            return HOST_MEMORY
        import torch

        return int(torch.cuda.mem_get_info(torch.device(device))[0] * DEVICE_SHARE)


class HeldCapture:
    """A captured run: tensors in memory, the others on disk. Made by ``CaptureHolder``."""

    def __init__(
        self,
        folder: Path,
        entries: Sequence[TensorEntry],
        held: dict[tuple[int, str, str], Tensor],
        spilled: Capture | None,
        room: Room,
    ) -> None:
        self.folder, self.entries = folder, entries
        self._held, self._spilled, self._room = held, spilled, room

    def names(self, sample: int = 0, component: str = "") -> list[str]:
        """The tensors of one sample and component in execution order."""
        return [entry.name for entry in self.entries if (entry.sample, entry.component) == (sample, component)]

    def load(self, name: str, sample: int = 0, component: str = "") -> Tensor:
        """The tensor, read-only: on its device where it is held there, else an array, mapped from its file.

        Shape and dtype are those of the run. Raises InputError for a name that was not captured.
        """
        key = (sample, component, name)
        if key in self._held:
            return self._held[key]
        if self._spilled is None:
            raise InputError(f"{self.folder}: has no tensor {name!r} of sample {sample}, component {component!r}")
        return self._spilled.load(name, sample, component)

    def release(self) -> None:
        """Forget what is held in memory, and give its room back."""
        for tensor in self._held.values():
            self._room.give(device_of(tensor), tensor.nbytes)
        self._held.clear()


class CaptureHolder:
    """Context manager that takes the tensors of one run; afterwards ``capture`` has them.

    What ``room`` has no place for is written to ``folder``; ``saved`` writes everything there. An exception in its
    block leaves nothing behind.
    """

    def __init__(self, folder: Path, header: Header | Mapping[str, Any], room: Room, *, saved: bool = False) -> None:
        self.folder = Path(folder)
        self._room, self._saved = room, saved
        self._entries: dict[tuple[int, str, str], TensorEntry] = {}
        self._count: Counter[int] = Counter()
        self._held: dict[tuple[int, str, str], Tensor] = {}
        self._writer = CaptureWriter(folder, header, checksums=saved)
        self._writes = False
        self._capture: HeldCapture | None = None

    @property
    def capture(self) -> HeldCapture:
        """The tensors that were taken, once the block is left."""
        assert self._capture is not None
        return self._capture

    def __enter__(self) -> CaptureHolder:
        if self._saved:
            self._open()
        return self

    def update(self, header: Header | Mapping[str, Any]) -> None:
        """Replace entries of the header."""
        self._writer.update(header)

    def put(self, name: str, tensor: Tensor, sample: int = 0, component: str = "") -> None:
        """Take one tensor; the caller may change it afterwards. Call in execution order.

        Shape and dtype stay; a tensor of the host is held as an array. Raises InputError as ``CaptureWriter.put`` does.
        """
        key, device = (sample, component, name), device_of(tensor)
        if key in self._entries:
            raise InputError(f"{self.folder}: tensor {name!r} of sample {sample} was written twice")
        size = tensor.nbytes
        held = self._room.take(device, size)
        if held:
            self._held[key] = _copied(tensor, device)
        if self._saved or not held:
            if not self._writes:
                self._open()
            self._writer.put(name, tensor, sample, component)
        shape = tuple(int(n) for n in tensor.shape)
        entry = TensorEntry(name, component, sample, self._count[sample], shape, dtype_name(tensor), "", "")
        self._entries[key] = entry
        self._count[sample] += 1

    def _open(self) -> None:
        self._writer.__enter__()
        self._writes = True

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._writes:
            self._writer.__exit__(kind, error, trace)
        spilled = Capture.open(self.folder) if self._writes and kind is None else None
        self._capture = HeldCapture(self.folder, tuple(self._entries.values()), self._held, spilled, self._room)
        if kind is not None:
            self._capture.release()


def _copied(tensor: Tensor, device: str) -> Tensor:
    if device != "cpu":
        return tensor.detach().clone()  # type: ignore[union-attr]
    copy = np.array(as_numpy(tensor), order="C")
    copy.flags.writeable = False
    return copy


class Trimmer:
    """Trims the heap whenever ``after`` bytes were freed: twice the memory in SECOND at 512 without it."""

    def __init__(self, after: int) -> None:
        self._after, self._freed = after, 0

    def freed(self, count: int) -> None:
        """Note that ``count`` bytes were freed."""
        self._freed += count
        if self._freed > self._after:
            self._freed = 0
            if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
                libc.malloc_trim(0)
