"""Samples from files: ``.npz``, ``.npy``, safetensors, Polygraphy's JSON, ONNX's ``test_data_set`` folders, images."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import numpy as np

from cp_debug.errors import InputError
from cp_debug.graph.check_inputs import check_given_inputs
from cp_debug.graph.graph import ValueInfo
from cp_debug.graph.other_inputs import of_objects
from cp_debug.probes.dumps import read_dump, read_iterations
from cp_debug.reading import read_bytes, read_npy, read_npz
from cp_debug.recipes.base import Sample
from cp_debug.recipes.images import IMAGES, ImageFormat, read_image

TENSORS = (".npz", ".json", ".safetensors", ".npy")
"""Suffixes of files that hold tensors, in the order in which a folder is searched for them."""
_NUMBERED = re.compile(r"(?:arr|input)_(\d+)")
_ORDER = re.compile(r"(\d+)")

Shapes = Mapping[str, Sequence[int]]


@dataclass(frozen=True)
class Reading:
    """Settings for reading inputs from files and making them up. The defaults are those of the command line."""

    shapes: Shapes = field(default_factory=dict)
    """Input → shape of made-up values, and of images, where the model leaves axes free."""
    images: ImageFormat = field(default_factory=ImageFormat)


DEFAULT_READING = Reading()


def file_samples(
    inputs: Path, expected: Sequence[ValueInfo], count: int, reading: Reading = DEFAULT_READING
) -> Iterator[Sample]:
    """At most ``count`` samples from one file, or from a folder of files or of ``test_data_set`` folders, by name.

    Files that name no inputs (``.npy``, images, ``arr_0`` of ``numpy.savez``) are taken in the model's order. Raises
    InputError for files that cannot be read, and for wrong names, dtypes and shapes in them.
    """
    for arrays, source in islice(_arrays(inputs, expected, reading), count):
        arrays = _typed(arrays, expected)
        check_given_inputs(expected, arrays, source.partition(" (")[0])
        yield Sample(arrays, source)


def first_arrays(inputs: Path) -> dict[str, np.ndarray] | np.ndarray:
    """The arrays of the first file, unchecked; of a ``.npy`` file the array. Raises InputError for unreadable files."""
    try:
        source = next(_sources(inputs))
        if source.suffix == ".npy":
            return read_npy(source)
        return next(iter(_read(source)))[0]
    except InputError as error:
        raise _flagged(error) from None


def _arrays(
    inputs: Path, expected: Sequence[ValueInfo], reading: Reading
) -> Iterator[tuple[dict[str, np.ndarray], str]]:
    """The arrays of each sample by input name, and what they came from."""
    try:
        for source in _sources(inputs, expected):
            if source.suffix.lower() in IMAGES:
                value = _only(expected, source)
                array, about = read_image(source, value, reading.images, reading.shapes.get(value.name))
                yield {value.name: array}, f"{source} ({about})"
            elif source.suffix == ".npy":
                yield {_only(expected, source).name: read_npy(source)}, str(source)
            else:
                for arrays, name in _read(source, expected):
                    yield _in_order(arrays, expected), name
    except InputError as error:
        raise _flagged(error) from None


def _sources(inputs: Path, expected: Sequence[ValueInfo] = ()) -> Iterator[Path]:
    """The files, or folders of one sample each, that ``inputs`` holds."""
    if not inputs.is_dir():
        if inputs.suffix not in (*TENSORS, ".pb") and inputs.suffix.lower() not in IMAGES:
            raise InputError(
                f"{inputs}: an ONNX file is fed with an .npz file of its named inputs ({_others()}), or a folder of "
                "them; point clouds are for recipes such as centerpoint:tiny"
            )
        if not inputs.exists():
            raise InputError(f"no such file {inputs}")
        yield inputs
        return
    sets = sorted((path for path in inputs.iterdir() if path.is_dir() and any(path.glob("input_*.pb"))), key=_number)
    if sets:
        yield from sets
        return
    if any(inputs.glob("input_*.pb")):
        yield inputs
        return
    for suffix in TENSORS:
        if files := sorted(inputs.glob(f"*{suffix}")):
            if suffix == ".npy" and {file.stem for file in files} == {value.name for value in expected}:
                yield inputs  # a file an input, all of one sample
                return
            yield from files
            return
    images = sorted(path for path in inputs.iterdir() if path.suffix.lower() in IMAGES)
    if not images:
        raise InputError(f"{inputs} holds no .npz file, and none of {_others()}")
    yield from images


def _others() -> str:
    return f"{', '.join(TENSORS[1:])}, a test_data_set folder of .pb, {', '.join(IMAGES)}"


def _read(source: Path, expected: Sequence[ValueInfo] = ()) -> Iterator[tuple[dict[str, np.ndarray], str]]:
    """The arrays of each sample in a file or folder that names them."""
    if source.is_dir() and any(source.glob("input_*.pb")):
        arrays: dict[str, np.ndarray] = {}
        for place, file in enumerate(sorted(source.glob("input_*.pb"), key=_number)):
            value = expected[place] if place < len(expected) else None
            held = read_dump(file) if value is None or value.container is None else _read_container(file, value)
            for name, array in held.items():
                if name in arrays:
                    raise InputError(f"{file}: holds {name!r}, as another file of {source} does")
                arrays[name] = array
        yield arrays, str(source)
    elif source.suffix == ".json":
        for index, iteration in enumerate(several := read_iterations(source)):
            yield iteration, f"{source}, iteration {index}" if len(several) > 1 else str(source)
    else:
        yield read_npz(source) if source.suffix == ".npz" else read_dump(source), str(source)


def _read_container(file: Path, value: ValueInfo) -> dict[str, np.ndarray]:
    """A sequence or optional as ONNX's test data sets hold it: the arrays under the names of ``other_inputs``."""
    import onnx
    from onnx import numpy_helper

    data, sequence = read_bytes(file, what="value"), value.container == "a sequence"
    proto = onnx.SequenceProto() if sequence else onnx.OptionalProto()
    try:
        proto.ParseFromString(data)
        held = numpy_helper.to_list(proto) if sequence else numpy_helper.to_optional(proto)
    except Exception as error:  # protobuf's own errors, and whatever onnx raises on what is none
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise InputError(f"{file}: not {value.container} of ONNX: {reason}") from None
    assert value.kind is not None
    return {name: np.asarray(array) for name, array in of_objects(value.name, value.kind, held).items()}


def _number(path: Path) -> tuple[int, str]:
    numbers = _ORDER.findall(path.stem)
    return int(numbers[-1]) if numbers else 0, path.name


def _only(expected: Sequence[ValueInfo], source: Path) -> ValueInfo:
    if len(expected) != 1:
        names = ", ".join(str(value) for value in expected)
        raise InputError(f"{source}: is one array, and the model takes {names}; expected an .npz file with all of them")
    return expected[0]


def _in_order(arrays: dict[str, np.ndarray], expected: Sequence[ValueInfo]) -> dict[str, np.ndarray]:
    """The arrays by input name, where they are only numbered: as ``numpy.savez`` and ONNX's own tests do it."""
    names = [value.name for value in expected]
    numbers = [_NUMBERED.fullmatch(name) for name in arrays]
    if len(arrays) != len(names) or set(arrays) & set(names) or not all(numbers):
        return arrays
    in_order = sorted(arrays, key=_number_of)
    return {name: arrays[given] for name, given in zip(names, in_order, strict=True)}


def _number_of(name: str) -> int:
    match = _NUMBERED.fullmatch(name)
    assert match is not None
    return int(match[1])


def _typed(arrays: dict[str, np.ndarray], expected: Sequence[ValueInfo]) -> dict[str, np.ndarray]:
    """The arrays in the types of the graph, where numpy, and so an ``.npz`` file, lacks them (bfloat16, FP8, 4 bits).

    Bits without a type are taken for them; float32 is rounded to them.
    """
    extension_types = {v.name: v.dtype for v in expected if v.dtype is not None and v.dtype.isbuiltin != 1}

    def typed(name: str, array: np.ndarray) -> np.ndarray:
        dtype = extension_types.get(name)
        if dtype is None or array.dtype == dtype:
            return array
        if array.dtype.kind == "V" and array.dtype.itemsize == dtype.itemsize:
            return array.view(dtype)
        return array.astype(dtype) if array.dtype == np.float32 else array

    return {name: typed(name, array) for name, array in arrays.items()}


def _flagged(error: InputError) -> InputError:
    return InputError(f"--inputs: {str(error).removeprefix('--inputs: ')}")
