"""Weights of an ONNX file as it stores them: type, shape, bytes, and external data; read as arrays when asked for."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
from onnx import TensorProto, helper, numpy_helper

from cp_debug.errors import InputError
from cp_debug.reading import physical_memory

LARGEST_RANK = 32
"""Dimensions of an array in numpy."""

BITS = {
    **dict.fromkeys(("FLOAT", "INT32", "UINT32"), 32),
    **dict.fromkeys(("DOUBLE", "INT64", "UINT64", "COMPLEX64"), 64),
    **dict.fromkeys(("FLOAT16", "BFLOAT16", "INT16", "UINT16"), 16),
    **dict.fromkeys(("INT8", "UINT8", "BOOL"), 8),
    **dict.fromkeys(("FLOAT8E4M3FN", "FLOAT8E4M3FNUZ", "FLOAT8E5M2", "FLOAT8E5M2FNUZ", "FLOAT8E8M0"), 8),
    **dict.fromkeys(("INT4", "UINT4", "FLOAT4E2M1"), 4),
    **dict.fromkeys(("INT2", "UINT2"), 2),
    "COMPLEX128": 128,
}
FLOATS = frozenset((TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE))
"""Data types of floating-point numbers of 16 bits and more."""


@dataclass(frozen=True)
class External:
    """Place of a weight's bytes in an external file."""

    file: Path
    offset: int
    length: int


def external_data(tensor: TensorProto, model: Path) -> External:
    """Place of the bytes of a weight of the file ``model``. Raises InputError for places that cannot be."""
    where = f"{model}: external data of {shown(tensor.name)}"
    entries = {entry.key: entry.value for entry in tensor.external_data}
    location = entries.get("location", "")
    place = PurePosixPath(location.replace("\\", "/"))
    if not location or "\0" in location or place.is_absolute() or ".." in place.parts or not place.parts:
        raise InputError(f"{where}: location is {shown(location)}; expected a file in the model's folder")
    numbers = []
    for key in ("offset", "length"):
        text = entries.get(key) or "0"
        if not (text.isascii() and text.isdigit() and len(text) < 19):
            raise InputError(f"{where}: {key} is {shown(text)}; expected a number of bytes")
        numbers.append(int(text))
    needed = byte_count(tensor, str(model))
    if entries.get("length") and numbers[1] != needed:
        raise InputError(f"{where}: length is {numbers[1]}; {described(tensor)} takes {needed} bytes")
    return External(model.parent / place, numbers[0], needed)


def byte_count(tensor: TensorProto, source: str) -> int:
    """Bytes that the type and shape of a weight ask for; ``source`` starts the message of an error.

    Raises InputError for types and shapes that cannot be, or that the machine's memory cannot hold.
    """
    name = shown(tensor.name)
    kinds = TensorProto.DataType.keys()
    if not 0 < tensor.data_type < len(kinds) or (kind := TensorProto.DataType.Name(tensor.data_type)) == "STRING":
        kind_text = "text" if tensor.data_type == TensorProto.STRING else f"of the data type {tensor.data_type}"
        raise InputError(f"{source}: weight {name} is {kind_text}; expected numbers")
    if tensor.HasField("segment"):
        raise InputError(f"{source}: weight {name} is stored in segments, which ONNX does not read")
    if kind not in BITS:
        raise InputError(f"{source}: weight {name} is {kind}, which this version does not read")
    if len(tensor.dims) > LARGEST_RANK or any(size < 0 for size in tensor.dims):
        raise InputError(f"{source}: weight {name} has the shape {_sizes(tensor.dims)}")
    # Of an array without elements, numpy multiplies the other sizes.
    if 0 in tensor.dims and math.prod(size or 1 for size in tensor.dims) * BITS[kind] >= 1 << 63:
        raise InputError(f"{source}: weight {name} has the shape {_sizes(tensor.dims)}, which no array can have")
    count = (math.prod(tensor.dims) * BITS[kind] + 7) // 8
    if count > physical_memory():
        raise InputError(f"{source}: weight {name} is {described(tensor)}, which does not fit into memory")
    return count


def array_of(tensor: TensorProto, model: Path) -> np.ndarray:
    """A checked weight of the file ``model`` as an array, read now from there or from its external data.

    Dtype and shape are those that the file declares; types that numpy lacks come as ml_dtypes has them.
    """
    if tensor.data_location != TensorProto.EXTERNAL:
        return numpy_helper.to_array(tensor)
    place = external_data(tensor, model)
    if BITS[TensorProto.DataType.Name(tensor.data_type)] >= 8:  # without the copies that a protobuf makes
        content = np.fromfile(place.file, np.uint8, place.length, offset=place.offset)
        content.flags.writeable = False
        return content.view(helper.tensor_dtype_to_np_dtype(tensor.data_type)).reshape(tuple(tensor.dims))
    inline = TensorProto(name=tensor.name, data_type=tensor.data_type, dims=tensor.dims)
    with place.file.open("rb") as stream:
        stream.seek(place.offset)
        inline.raw_data = stream.read(place.length)
    return numpy_helper.to_array(inline)


def shown(name: str) -> str:
    """A name of a file in quotes, cut at 80 characters."""
    return repr(name if len(name) <= 80 else f"{name[:77]}...")


def described(tensor: TensorProto) -> str:
    """Type and shape: ``FLOAT[64, 3, 7, 7]``."""
    return f"{TensorProto.DataType.Name(tensor.data_type)}{_sizes(tensor.dims)}"


def _sizes(dims: Iterable[int]) -> str:
    sizes = list(dims)
    return f"[{', '.join(map(str, sizes[:8]))}{', …' if len(sizes) > 8 else ''}]"
