"""Tensors that another program wrote: ``.npy``, ``.npz``, safetensors, Polygraphy's JSON, servers' JSON, ONNX's
``test_data_set`` folders, ONNX Runtime's node dumps, raw files with a sidecar, captures, ``.pt``, debug tensors."""

from __future__ import annotations

import base64
import binascii
import io
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from cp_debug.errors import InputError
from cp_debug.probes.capture import MANIFEST, Capture
from cp_debug.probes.serving_dumps import (
    is_step_of_vllm,
    served_tensors,
    step_folder,
    steps_in,
    tensors_of_pt,
    vllm_step,
)
from cp_debug.reading import array_of, check_file, read_bytes, read_json, read_npy, read_npz, readable, typed


def read_dump(path: Path) -> dict[str, np.ndarray]:
    """The tensors of a dump, name → array: of a file, or of all files in a folder.

    A ``.npy`` file is called as it is without its suffix; in ``.pb`` files (``onnx.TensorProto``) each tensor has its
    name in it. Of a Polygraphy file (``--save-inputs``, ``--save-outputs``) the first runner's first iteration counts,
    of the folders of TensorRT-LLM, vLLM and SGLang the first step (``serving_dumps``).
    Shapes and dtypes are those that the files hold.
    Raises InputError, with the file, for what is none of these, for pickled objects, and for a name that comes twice.
    """
    if not path.is_dir():
        return dict(_file(path))
    if (path / MANIFEST).is_file():
        return _capture(path)
    path = step_folder(path)
    if not path.is_dir():
        return dict(_file(path))
    if is_step_of_vllm(path):
        return vllm_step(path)
    arrays: dict[str, np.ndarray] = {}
    files = [f for f in sorted(path.iterdir()) if f.suffix in _READERS and not f.name.endswith(_SIDECARS)]
    for file in files:
        for name, array in _file(file):
            if name in arrays:
                raise InputError(f"{file}: holds {name!r}, and so does another file of {path}")
            arrays[name] = array
    if not arrays:
        raise InputError(f"{path}: holds no tensors; expected files that end in {', '.join(_READERS)}")
    return arrays


def read_dumps(path: Path) -> list[dict[str, np.ndarray]]:
    """The tensors of every sample in a capture, and of every iteration in a file of Polygraphy.

    Of any other dump what ``read_dump`` gives. Each is name → array, in the shapes and dtypes of the files. Raises
    InputError as ``read_dump`` does.
    """
    if path.is_dir() and (path / MANIFEST).is_file():
        return [_capture(path, sample) for sample in Capture.open(path).samples] or [_capture(path)]
    if path.suffix == ".json" and not path.is_dir():
        return [_checked(path, tensors) for tensors in read_iterations(path)]
    return [read_dump(path)]


def steps_left_out(path: Path) -> int:
    """Number of steps that a serving runtime wrote beside the one that ``read_dump`` takes."""
    taken = step_folder(path) if path.is_dir() and not (path / MANIFEST).is_file() else path
    return 0 if taken == path else max(len(steps_in(taken.parent)) - 1, 0)


def _file(path: Path) -> Iterator[tuple[str, np.ndarray]]:
    read = _READERS.get(path.suffix)
    if read is None:
        check_file(path, "file of tensors")
        raise InputError(f"{path}: expected a folder, or a file that ends in {', '.join(_READERS)}")
    try:
        arrays = read(path)
    except InputError as error:
        if "has the dtype 'x'" in str(error):
            why = "TensorRT-LLM writes that for types that numpy lacks, such as FP8; remove the file from the dump"
            raise InputError(f"{path}: its dtype is 'x': {why}") from None
        raise
    yield from _checked(path, arrays).items()


def _checked(path: Path, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    for name, array in arrays.items():
        if array.dtype.kind not in "biufV":
            raise InputError(f"{path}: {name!r} has dtype {array.dtype}; expected numbers")
    return arrays


def _capture(folder: Path, sample: int | None = None) -> dict[str, np.ndarray]:
    """The tensors of a capture's sample, None its first, by name. Raises InputError for a name of two components."""
    capture = Capture.open(folder)
    sample = capture.samples[0] if sample is None and capture.samples else sample
    arrays: dict[str, np.ndarray] = {}
    for entry in capture.entries:
        if entry.sample != sample:
            continue
        if entry.name in arrays:
            raise InputError(f"{folder}: holds {entry.name!r} of several components; expected those of one ONNX file")
        arrays[entry.name] = capture.load_checked(entry.name, entry.sample, entry.component)
    if not arrays:
        raise InputError(f"{folder}: holds no tensors")
    return arrays


@dataclass
class _Sidecar:
    """Description of a raw file, in ``NAME.bin.json`` beside ``NAME.bin``."""

    dtype: str
    shape: list[int]
    name: str = ""
    """Name of the value; empty: that of the file."""


def _raw(path: Path) -> dict[str, np.ndarray]:
    """A file of plain little-endian numbers in row-major order, which a sidecar describes."""
    side = path.with_name(f"{path.name}.json")
    if not side.is_file():
        wanted = '{"dtype": "float32", "shape": [1, 3, 4, 4], "name": "image"}'
        raise InputError(f"{path}: raw numbers; expected {side.name} beside it, such as {wanted}")
    about: _Sidecar = typed(_Sidecar, read_json(side, what="sidecar"), str(side))
    try:
        dtype = np.dtype(getattr(ml_dtypes, about.dtype, about.dtype)).newbyteorder("<")
    except (TypeError, ValueError):
        raise InputError(f"{side}: dtype is {about.dtype!r}; expected one such as float16, bfloat16 or int8") from None
    if any(size < 0 for size in about.shape) or dtype.kind in "OSUmM":
        raise InputError(f"{side}: {about.dtype}{about.shape}; expected numbers, in sizes from 0 on")
    data = read_bytes(path, what="raw file", most=LARGEST_TENSOR)
    needed = math.prod(about.shape) * dtype.itemsize
    if len(data) != needed:
        expected_size = f"{about.dtype}{about.shape} takes {needed} bytes"
        raise InputError(f"{path}: has {len(data)} bytes; by {side.name}, {expected_size}")
    return {about.name or path.stem: np.frombuffer(bytearray(data), dtype).reshape(about.shape)}


def _safetensors(path: Path) -> dict[str, np.ndarray]:
    from safetensors import safe_open

    from cp_debug.probes.arrays import as_numpy

    check_file(path, "safetensors file")
    with readable(path, "a readable safetensors file"), safe_open(path, "pt") as tensors:  # as torch: numpy lacks BF16
        return {name: as_numpy(tensors.get_tensor(name)) for name in tensors.keys()}  # noqa: SIM118


def _proto(path: Path) -> dict[str, np.ndarray]:
    import onnx
    from onnx import numpy_helper

    data = read_bytes(path, what="tensor", most=LARGEST_TENSOR)
    tensor = onnx.TensorProto()
    with readable(path, "an onnx.TensorProto with its data inside"):
        tensor.ParseFromString(data)
        return {tensor.name or path.stem: numpy_helper.to_array(tensor)}


def read_iterations(path: Path) -> list[dict[str, np.ndarray]]:
    """The tensors of each iteration in a file of Polygraphy (``--save-inputs``, or the first runner's outputs), or the
    one of a server's request or answer (``served_json``).

    Name → array in the shape and dtype that the file says. Raises InputError, with the file, for what is none.
    """
    document = read_json(path, what="file of tensors", most=LARGEST_TENSOR)
    if (served := served_tensors(document, str(path))) is not None:
        return [served]
    try:
        # RunResults hold [runner, [iteration, …]] …; --save-inputs writes one mapping an iteration.
        runs = document["lst"][0][1] if isinstance(document, Mapping) else document
        each = [run["outputs"] if isinstance(document, Mapping) else run for run in runs]
        each[0]  # of no iteration: an error
        return [{str(name): _encoded(value, f"{path}: {name!r}") for name, value in v.items()} for v in each]
    except (KeyError, IndexError, TypeError, AttributeError):
        raise InputError(
            f"{path}: expected what Polygraphy's --save-inputs or --save-outputs writes, or a request or an answer of "
            "an inference server (KServe's protocol V2, TensorFlow Serving)"
        ) from None


def _encoded(value: Any, source: str) -> np.ndarray:
    array = value.get("values", value)["array"]  # a LazyArray holds the array proper
    if not isinstance(array, str):
        raise InputError(f"{source}: array: expected its bytes in base64, not {type(array).__name__}")
    try:
        data = base64.b64decode(array, validate=True)
        return array_of(io.BytesIO(data), len(data), "the array")
    except (binascii.Error, ValueError, TypeError) as error:
        raise InputError(f"{source}: {error}") from None


LARGEST_TENSOR = 1 << 31
"""Bytes of a file that holds tensors as text, in a message or as they are."""
_SIDECARS = (".bin.json", ".raw.json")
_READERS: dict[str, Callable[[Path], dict[str, np.ndarray]]] = {
    ".npy": lambda path: {path.stem: read_npy(path)},
    ".npz": read_npz,
    ".safetensors": _safetensors,
    ".pt": tensors_of_pt,
    ".pb": _proto,
    ".tensorproto": _proto,  # what ONNX Runtime's node dumps are
    ".bin": _raw,
    ".raw": _raw,
    ".json": lambda path: read_iterations(path)[0],
}
