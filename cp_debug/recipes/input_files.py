"""Samples from files: ``.npz``, ``.npy``, safetensors, Polygraphy's JSON, ONNX's ``test_data_set`` folders, images."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Literal

import numpy as np

from cp_debug.errors import InputError
from cp_debug.graph.check_inputs import check_given_inputs
from cp_debug.graph.graph import ValueInfo
from cp_debug.graph.other_inputs import of_objects
from cp_debug.optional import require
from cp_debug.probes.dumps import read_dump, read_iterations
from cp_debug.reading import check_file, read_bytes, read_npy, read_npz, readable
from cp_debug.recipes.base import Sample

IMAGES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
"""Suffixes of image files."""
CHANNELS = {1: "L", 3: "RGB", 4: "RGBA"}
"""Channels of an input that looks like an image → what Pillow calls them."""
MOST_PIXELS = 1 << 28

ImageLayout = Literal["auto", "nchw", "nhwc"]


@dataclass(frozen=True)
class ImageFormat:
    """Format in which a network takes images: value = (pixel × ``scale`` − ``mean``) ÷ ``std``, channel by channel.

    ``scale`` None is 1/255 for inputs in floating point, and 1 for integers, which take pixels as they are. ``mean``
    and ``std`` have one number, or one a channel. ``layout`` auto looks where the input has 1, 3 or 4 channels.
    """

    mean: Sequence[float] = (0.0,)
    std: Sequence[float] = (1.0,)
    scale: float | None = None
    layout: ImageLayout = "auto"
    bgr: bool = False


def read_image(
    path: Path, value: ValueInfo, wanted: ImageFormat, shape: Sequence[int] | None = None
) -> tuple[np.ndarray, str]:
    """The array for ``value``, in its dtype, with a batch of 1 where it has one; and what was done, in words.

    ``shape`` gives the sizes that the model leaves free; without it the image keeps its own size there. Raises
    InputError for an input that does not look like an image, a file that is none, and a mean or std that does not fit;
    MissingPackage without Pillow.
    """
    declared = tuple(shape) if shape is not None else value.shape
    layout, channels = _place(path, value, declared, wanted.layout)
    assert declared is not None
    nchw = layout == "nchw"
    height, width = declared[-2:] if nchw else declared[-3:-1]
    pixels, about = _pixels(path, CHANNELS[channels], _size(height), _size(width))
    if wanted.bgr and channels == 3:
        pixels, about = pixels[:, :, ::-1], [*about, "BGR"]
    assert value.dtype is not None
    floating = value.dtype.kind not in "iu"
    scale = wanted.scale if wanted.scale is not None else 1 / 255 if floating else 1.0
    mean, std = (_each(numbers, channels, flag) for numbers, flag in ((wanted.mean, "mean"), (wanted.std, "std")))
    array = (pixels.astype(np.float64) * scale - mean) / std
    array = array.transpose(2, 0, 1) if nchw else array
    array = array.reshape((1,) * (len(declared) - 3) + array.shape)
    if not floating:
        limits = np.iinfo(value.dtype)
        array = np.clip(np.rint(array), limits.min, limits.max)
    steps = [
        *about,
        f"× {scale:.4g}" if scale != 1 else "",
        *_arithmetic_of("−", wanted.mean, 0.0),
        *_arithmetic_of("÷", wanted.std, 1.0),
    ]
    return np.ascontiguousarray(array).astype(value.dtype), ", ".join(part for part in (*steps, layout) if part)


def _place(
    path: Path, value: ValueInfo, declared: Sequence[int | str | None] | None, layout: ImageLayout
) -> tuple[ImageLayout, int]:
    """Layout and channels of an input. Raises InputError for one that does not look like an image."""
    if declared is not None and len(declared) in (3, 4):
        by_layout: dict[ImageLayout, int | str | None] = {"nchw": declared[-3], "nhwc": declared[-1]}
        for name in ("nchw", "nhwc"):
            channels = by_layout[name]
            if layout in (name, "auto") and isinstance(channels, int) and channels in CHANNELS:
                return name, channels
        if layout != "auto" and not isinstance(by_layout[layout], int):
            return layout, 3
    raise InputError(
        f"{path}: is an image, and the input {value} does not look like one; expected 1, 3 or 4 channels"
        f"{'' if layout == 'auto' else f' as {layout}'}, or give the sizes with --shape {value.name}=1x3x224x224"
    )


def _size(size: int | str | None) -> int | None:
    return size if isinstance(size, int) else None


def _pixels(path: Path, mode: str, height: int | None, width: int | None) -> tuple[np.ndarray, list[str]]:
    """Pixels [H, W, C], 0 to 255, resized to the sizes that are given, and what was done."""
    image_module = require("PIL.Image", "images")
    check_file(path, "image")
    with readable(path, "a readable image"), image_module.open(path) as opened:
        if opened.width * opened.height > MOST_PIXELS:
            raise InputError(f"{path}: {opened.width} × {opened.height} pixels; expected at most {MOST_PIXELS}")
        image = opened.convert(mode)
    size = (width or image.width, height or image.height)
    about = []
    if size != image.size:
        about.append(f"{image.width}×{image.height} resized to {size[0]}×{size[1]}")
        image = image.resize(size, image_module.Resampling.BILINEAR)
    pixels = np.asarray(image, np.uint8)
    return pixels.reshape(*pixels.shape[:2], -1), about


def _each(numbers: Sequence[float], channels: int, flag: str) -> np.ndarray:
    if len(numbers) not in (1, channels):
        raise InputError(f"--image {flag}=: {len(numbers)} numbers; expected 1, or {channels}, one a channel")
    return np.asarray(numbers, np.float64)


def _arithmetic_of(sign: str, numbers: Sequence[float], neutral: float) -> list[str]:
    return [] if all(number == neutral for number in numbers) else [f"{sign} {'/'.join(f'{n:g}' for n in numbers)}"]


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
    try:
        chosen = _chosen(inputs, expected)
    except InputError as error:
        raise _flagged(error) from None
    for arrays, source in islice(_arrays(chosen, expected, reading), count):
        arrays = _typed(arrays, expected)
        check_given_inputs(expected, arrays, source.partition(" (")[0])
        yield Sample(arrays, source, remarks=chosen.remarks)


def count_samples(inputs: Path, expected: Sequence[ValueInfo]) -> int:
    """Number of samples that ``file_samples`` can give. Raises InputError for files that cannot be read."""
    try:
        chosen = _chosen(inputs, expected)
        files = (len(read_iterations(source)) if source.suffix == ".json" else 1 for source in chosen.sources)
        return sum(files) + bool(chosen.named)
    except InputError as error:
        raise _flagged(error) from None


def first_arrays(inputs: Path) -> dict[str, np.ndarray] | np.ndarray:
    """The arrays of the first file, unchecked; of a ``.npy`` file the array. Raises InputError for unreadable files."""
    try:
        source = _chosen(inputs).sources[0]
        if source.suffix == ".npy":
            return read_npy(source)
        return next(iter(_read(source)))[0]
    except InputError as error:
        raise _flagged(error) from None


@dataclass(frozen=True)
class _Chosen:
    """The files that a path stands for."""

    inputs: Path
    """The file, or the folder."""
    sources: Sequence[Path] = ()
    """Files, or folders of protos, of a sample each (some hold several)."""
    named: Mapping[str, Path] = field(default_factory=dict)
    """Instead: input → file of one sample that is called like it."""

    @property
    def remarks(self) -> tuple[str, ...]:
        """A sentence about files of the folder that could be inputs too, and are left out."""
        if not self.inputs.is_dir():
            return ()
        read = {*self.sources, *self.named.values()}
        left = [path for path in _readable(self.inputs) if path not in read and self.inputs not in read]
        if not left:
            return ()
        more = [f"{len(left) - 3} more"] if len(left) > 3 else []
        files = ", ".join([*(path.name for path in left[:3]), *more])
        if self.named:
            taken = ", ".join(path.name for path in self.named.values())
            return (f"{self.inputs} is one sample, by the names of the inputs: {taken}; left out: {files}",)
        kinds = ", ".join(dict.fromkeys(path.suffix or "folder" for path in self.sources))
        return (f"{self.inputs}: a sample is a {kinds}; left out: {files}",)


def _readable(folder: Path) -> list[Path]:
    """The files of a folder that may hold inputs, by name."""
    suffixes = (*TENSORS, *IMAGES)
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in suffixes and path.is_file())


def _arrays(
    chosen: _Chosen, expected: Sequence[ValueInfo], reading: Reading
) -> Iterator[tuple[dict[str, np.ndarray], str]]:
    """The arrays of each sample by input name, and what they came from."""
    try:
        if chosen.named:
            yield _named_arrays(chosen, expected, reading)
        for source in chosen.sources:
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


def _named_arrays(
    chosen: _Chosen, expected: Sequence[ValueInfo], reading: Reading
) -> tuple[dict[str, np.ndarray], str]:
    """The one sample of a folder whose files are called like the inputs, and what it came from."""
    arrays, about = dict[str, np.ndarray](), dict[str, None]()
    for value in expected:
        file = chosen.named[value.name]
        if file.suffix.lower() in IMAGES:
            arrays[value.name], how = read_image(file, value, reading.images, reading.shapes.get(value.name))
            about[how] = None
        elif file.suffix == ".npy":
            arrays[value.name] = read_npy(file)
        else:
            [(array_of_file, _)] = _read(file)
            [arrays[value.name]] = array_of_file.values()
    return arrays, f"{chosen.inputs} ({'; '.join(about)})" if about else str(chosen.inputs)


def _by_names(inputs: Path, expected: Sequence[ValueInfo]) -> dict[str, Path]:
    """Input → the file of a folder that is called like it and holds one array; empty unless each input has one.

    Raises InputError where an input has several, and where only some of several have one in a folder of ``.npy`` files.
    """
    names = {value.name for value in expected}
    found: dict[str, list[Path]] = {}
    for file in _readable(inputs):
        if file.stem in names and _holds_one(file):
            found.setdefault(file.stem, []).append(file)
    for name, files in found.items():
        if len(files) > 1:
            both = " and ".join(file.name for file in files)
            raise InputError(f"{inputs}: {both} are called like the input {name!r}; expected one of them")
    missing = [name for name in names if name not in found]
    if found and missing and all(file.suffix == ".npy" for file in _readable(inputs)):
        has = ", ".join(files[0].name for files in found.values())
        raise InputError(f"{inputs}: holds {has}, and no file for the input {missing[0]!r}; expected {missing[0]}.npy")
    return {} if missing else {value.name: found[value.name][0] for value in expected}


def _holds_one(file: Path) -> bool:
    """Whether a file is one array: by its kind, or as it names none, or by the file's name."""
    if file.suffix == ".json":
        return False
    if file.suffix == ".npy" or file.suffix.lower() in IMAGES:
        return True
    try:
        [(arrays, _)] = _read(file)
    except InputError:  # told by who reads it, if anybody does
        return False
    return len(arrays) == 1 and all(name == file.stem or _NUMBERED.fullmatch(name) for name in arrays)


def _chosen(inputs: Path, expected: Sequence[ValueInfo] = ()) -> _Chosen:
    """The files, or folders of one sample each, that ``inputs`` holds."""
    if not inputs.is_dir():
        if inputs.suffix not in (*TENSORS, ".pb") and inputs.suffix.lower() not in IMAGES:
            raise InputError(
                f"{inputs}: an ONNX file takes an .npz file of its named inputs ({_others()}), or a folder of "
                "them; point clouds are for recipes such as centerpoint:tiny"
            )
        if not inputs.exists():
            raise InputError(f"no such file {inputs}")
        return _Chosen(inputs, [inputs])
    sets = sorted((path for path in inputs.iterdir() if path.is_dir() and any(path.glob("input_*.pb"))), key=_number)
    if sets or any(inputs.glob("input_*.pb")):
        return _Chosen(inputs, sets or [inputs])
    if named := _by_names(inputs, expected):
        return _Chosen(inputs, named=named)
    for suffix in TENSORS:
        if files := sorted(inputs.glob(f"*{suffix}")):
            return _Chosen(inputs, files)
    images = sorted(path for path in inputs.iterdir() if path.suffix.lower() in IMAGES)
    if not images:
        raise InputError(f"{inputs} holds no .npz file, and none of {_others()}")
    return _Chosen(inputs, images)


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
                    raise InputError(f"{file}: holds {name!r}, and so does another file of {source}")
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
    with readable(file, f"{value.container} of ONNX"):
        proto.ParseFromString(data)
        held = numpy_helper.to_list(proto) if sequence else numpy_helper.to_optional(proto)
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
