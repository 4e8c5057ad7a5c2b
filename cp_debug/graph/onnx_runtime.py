"""Calls of ONNX Runtime: its tensors, what it may log, and runs that Ctrl-C, SIGTERM and a time limit can end.

A run is one call into a library, during which Python handles no signal. So a thread waits meanwhile: Python writes each
signal's number into a pipe at once, and the thread asks ONNX Runtime to end, which it does before the next node.
"""

from __future__ import annotations

import ctypes
import math
import os
import re
import select
import signal
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from onnx import numpy_helper

from cp_debug.errors import InputError
from cp_debug.graph.graph import Graph, Node

if TYPE_CHECKING:
    import onnxruntime


LOG = "CPDEBUG_ORT_LOG"
"""Environment variable: the least severity that ONNX Runtime logs on stderr."""
SEVERITIES = {"verbose": 0, "info": 1, "warning": 2, "error": 3, "fatal": 4}
SILENT = "fatal"
"""Default of ``LOG``: errors are raised besides, and the log is in colours."""

LIMIT = "CPDEBUG_LOOP_SECONDS"
"""Environment variable: seconds that a Loop may take which nothing but its own condition ends."""
LOOP_SECONDS = 10.0
MOST_PASSES = 100_000
"""Passes of a Loop, and of the Loops in it together, up to which its end is waited for, however long it takes."""
PATIENCE = 10
"""Factor on the time of a Loop whose trip count is computed: most such counts are sizes of tensors."""
MOST_NESTED = 50
"""Depth to which bodies in bodies are searched for loops."""

_ENDING = (signal.SIGINT, signal.SIGTERM)


class Endless(InputError):
    """A Loop has not come to an end within the time or the passes that it is given."""


_NODE = re.compile(r"Non-zero status code returned while running (\S+) node\. Name:'(.*?)' Status Message: ")
_PLACE = re.compile(
    r"/\S+\.(?:h|cc|cpp):\d+ |(?:static |virtual |const )*(?:\w+ )?onnxruntime::[^()]*\([^)]*\)(?: const)? ?"
)


def told(error: Exception | str) -> str:
    """ONNX Runtime's own words, in one line and without the places in its sources that stand before them."""
    text = re.sub(r"^\[ONNXRuntimeError\] : \d+ : \w+ : ?", "", " ".join(str(error).split()))
    text = _NODE.sub(lambda found: f"{found[1]} {found[2]!r}: " if found[2] else f"{found[1]}: ", text)
    return _PLACE.sub("", text).strip()


def severity() -> int:
    """ONNX Runtime's log severity, 0 (all) to 4 (nothing but what ends the process).

    Raises InputError where the environment names another.
    """
    name = os.environ.get(LOG, "").lower() or SILENT
    if name not in SEVERITIES:
        raise InputError(f"{LOG}: {name!r}; expected {', '.join(SEVERITIES)}")
    return SEVERITIES[name]


def session_options(least: int | None = None) -> onnxruntime.SessionOptions:
    """New options of a session that logs as the environment says, or from severity ``least`` on."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    ort.set_default_logger_severity(severity())  # of what is logged outside a session
    options.log_severity_level = severity() if least is None else least
    return options


def loop_seconds() -> float:
    """Seconds for a Loop without a known end. Raises InputError where the environment gives none above 0."""
    text = os.environ.get(LIMIT, "")
    try:
        seconds = float(text) if text else LOOP_SECONDS
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < threading.TIMEOUT_MAX:
        raise InputError(f"{LIMIT}: {text!r}; expected seconds above 0")
    return seconds


def time_limit(graph: Graph, nodes: Iterable[Node] | None = None) -> float | None:
    """Seconds that a run of ``graph``, or of some of its nodes, may take; None where its Loops have an end in sight."""
    ends = _Ends(graph)
    ends.walk([n.proto for n in (graph.nodes if nodes is None else nodes)], 1, 0)
    if not (ends.computed or ends.none):
        return None
    return loop_seconds() * (1 if ends.none else PATIENCE)


class _Ends:
    """Knowledge of how Loops end: whether any has a computed trip count, or runs too often to be waited for."""

    def __init__(self, graph: Graph) -> None:
        self.computed, self.none = False, False
        self._graph = graph
        self._constants: dict[str, onnx.TensorProto] = {}
        self._functions = {(f.domain, f.name): f for f in graph.proto.functions}

    def walk(self, nodes: Iterable[onnx.NodeProto], passes: int, depth: int) -> None:
        """Look at nodes that run ``passes`` times, and into their bodies and functions."""
        for node in nodes if depth < MOST_NESTED else ():
            inside = passes
            if node.op_type == "Loop":
                count = self._trips(node)
                self.computed |= count < 0
                inside = passes * (1 if count < 0 else min(count, MOST_PASSES + 1))
                self.none |= inside > MOST_PASSES
            for attribute in node.attribute:
                if node.op_type == "Constant" and attribute.name == "value" and node.output:
                    self._constants[node.output[0]] = attribute.t
                for body in [attribute.g, *attribute.graphs]:
                    self._constants |= {tensor.name: tensor for tensor in body.initializer}
                    self.walk(body.node, inside, depth + 1)
            if called := self._functions.get((node.domain, node.op_type)):
                self.walk(called.node, inside, depth + 1)

    def _trips(self, loop: onnx.NodeProto) -> int:
        """The trip count; -1: it is computed; beyond ``MOST_PASSES``: there is none."""
        name = loop.input[0] if loop.input else ""
        if not name:
            return MOST_PASSES + 1
        if name in self._graph.initializers:
            count = self._graph.initializer(name)
        elif name in self._constants:
            count = numpy_helper.to_array(self._constants[name])
        else:
            return -1
        return max(0, int(count.flat[0])) if count.size else MOST_PASSES + 1


def run(
    session: onnxruntime.InferenceSession,
    names: Sequence[str],
    inputs: Mapping[str, onnxruntime.OrtValue],
    limit: float | None = None,
    *,
    plain: bool = False,
) -> list[Any]:
    """The outputs ``names`` of one run, as OrtValues; ``plain``: as arrays, lists of arrays, lists of dicts, or None.

    Raises KeyboardInterrupt on Ctrl-C, also while ONNX Runtime computes; Endless when ``limit`` (seconds) is over, and
    whatever ONNX Runtime raises: each of its statuses is a class of its own, directly below Exception.
    """
    import onnxruntime as ort

    options = ort.RunOptions()
    options.log_severity_level = severity()
    with _ending(options, limit) as call:
        try:
            return list((session.run if plain else session.run_with_ort_values)(names, inputs, options))
        except Exception as error:
            if call.expired:
                raise Endless(
                    f"ONNX Runtime did not finish a Loop within {limit:g} s, and no end is in sight; {LIMIT}=600 in "
                    "the environment allows more time"
                ) from error
            raise


@dataclass(eq=False)
class _RunningCall:
    """One run that can be ended."""

    options: onnxruntime.RunOptions
    deadline: float | None
    expired: bool = False


class _Watch:
    """A thread that ends runs on a signal and at their deadlines."""

    def __init__(self) -> None:
        self.process = os.getpid()
        self.calls: set[_RunningCall] = set()
        self.lock = threading.Lock()
        self.listening, self.speaking = os.pipe()
        for end in (self.listening, self.speaking):
            os.set_blocking(end, False)
        self.others = -1
        """File descriptor to which signals were told before, as asyncio wants it; -1: none."""
        threading.Thread(target=self._wait, daemon=True, name="cpdebug-watch").start()

    def _wait(self) -> None:
        while True:
            with self.lock:
                first = min((call.deadline for call in self.calls if call.deadline is not None), default=None)
            pause = None if first is None else max(0.0, first - time.monotonic())
            ready, _, _ = select.select([self.listening], [], [], pause)
            numbers = os.read(self.listening, 4096) if ready else b""
            if any(number in _ENDING for number in numbers):
                with self.lock:
                    for call in self.calls:
                        call.options.terminate = True
            if self.others >= 0 and (signals := numbers.replace(b"\0", b"")):
                with suppress(OSError):
                    os.write(self.others, signals)
            with self.lock:
                for call in self.calls:
                    if call.deadline is not None and time.monotonic() >= call.deadline:
                        call.expired, call.deadline = True, None
                        call.options.terminate = True


_watch: _Watch | None = None
_making = threading.Lock()


@contextmanager
def _ending(options: onnxruntime.RunOptions, limit: float | None) -> Iterator[_RunningCall]:
    """Have the block's run ended by Ctrl-C and SIGTERM (in the main thread), and after ``limit`` seconds."""
    global _watch
    with _making:
        if _watch is None or _watch.process != os.getpid():  # threads do not survive a fork
            _watch = _Watch()
    watch = _watch
    call = _RunningCall(options, None if limit is None else time.monotonic() + limit)
    main = threading.current_thread() is threading.main_thread()
    with watch.lock:
        watch.calls.add(call)
    if limit is not None:
        with suppress(OSError):  # a full pipe wakes the thread, too
            os.write(watch.speaking, b"\0")
    if main:
        watch.others = signal.set_wakeup_fd(watch.speaking, warn_on_full_buffer=False)
    try:
        yield call
    finally:
        if main:
            signal.set_wakeup_fd(watch.others)
            watch.others = -1
        with watch.lock:
            watch.calls.discard(call)


def to_ort(arrays: Mapping[str, np.ndarray]) -> dict[str, onnxruntime.OrtValue]:
    """The arrays as ONNX Runtime takes them, ``ml_dtypes`` included, in memory of its own."""
    from onnxruntime import OrtValue

    values = {}
    for name, array in arrays.items():
        if array.dtype.isbuiltin == 1:
            values[name] = OrtValue.ortvalue_from_numpy(np.asarray(array, order="C"))
        else:
            bits = np.asarray(array, order="C").view(f"u{array.dtype.itemsize}")
            element = onnx.helper.np_dtype_to_tensor_dtype(array.dtype)
            values[name] = OrtValue.ortvalue_from_numpy_with_onnx_type(bits, element)
    return values


def to_numpy(value: onnxruntime.OrtValue) -> np.ndarray:
    """The tensor as numpy, bfloat16, FP8, 4 and 2 bits as ``ml_dtypes``; a view on the CPU where there is one."""
    dtype = onnx.helper.tensor_dtype_to_np_dtype(value.element_type())
    if dtype.isbuiltin != 1:  # its own conversion refuses most of these, others in each of its versions
        count = math.prod(value.shape())
        each = next((n for kinds, n in _PACKED.items() if value.data_type().startswith(kinds)), 1)
        size = -(-count // each) if each > 1 else count * dtype.itemsize
        buffer = (ctypes.c_char * size).from_address(value.data_ptr())
        if each == 1:
            return np.frombuffer(buffer, dtype).reshape(value.shape()).copy()
        width = 8 // each
        shifts = np.arange(0, 8, width, dtype=np.uint8)
        codes = np.frombuffer(buffer, np.uint8)[:, None] >> shifts & (2**width - 1)
        codes = codes.reshape(-1)[:count].reshape(value.shape())
        return codes.view(dtype) if dtype.kind == "V" and "float" in dtype.name else _integers(codes, dtype, width)
    return value.numpy()


_PACKED = {("tensor(int4", "tensor(uint4", "tensor(float4"): 2, ("tensor(int2", "tensor(uint2"): 4}
"""Types of ONNX Runtime with several elements a byte, the first in its lowest bits."""


def _integers(codes: np.ndarray, dtype: np.dtype, width: int) -> np.ndarray:
    """Codes of ``width`` bits, uint8 of any shape, as the integers that they are in ``dtype``."""
    negative = (codes >= 2 ** (width - 1)) & dtype.name.startswith("int")
    return np.where(negative, codes.astype(np.int8) - 2**width, codes).astype(dtype)
