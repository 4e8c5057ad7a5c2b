"""Tensors of serving runtimes: debug folders of TensorRT-LLM, vLLM and SGLang; servers' requests and answers as JSON.

TensorRT-LLM (``DebugConfig``): ``tllm_debug/PP_1/TP_1/iteration_0/NAME.npy``. vLLM (pull request 21215,
``--intermediate-log-config``): ``step_0/MODULE/outputs_cuda_0.pt`` with ``inputs_0_cuda_0.pt`` beside it. SGLang
(``--debug-tensor-dump-output-folder``): ``TP0_PP0_Rank0_pid7/Pass00000.pt``, a mapping of module to tensor.

SGLang writes a pass when its top module has run, before it notes what that module returned: that, and all that follows
it (the logits), stands at the beginning of the next file.

JSON is KServe's protocol V2 (Triton, MLServer, OpenVINO) or TensorFlow Serving's.
"""

from __future__ import annotations

import math
import pickle
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from cp_debug.errors import InputError
from cp_debug.reading import check_file, load_plain, readable, typed
from cp_debug.safe_text import some

_RANKS = (re.compile(r"PP_\d+"), re.compile(r"TP_\d+"), re.compile(r"TP\d+_PP\d+_Rank\d+_pid\d+"))
_STEPS = (re.compile(r"iteration_(\d+)"), re.compile(r"step_(\d+)"))
_PASS = re.compile(r"Pass(\d+)\.pt")
_INPUT_OF_TOP = re.compile(r"(.+)\.forward_batch_info\.\w+")
_VLLM = re.compile(r"(?P<what>outputs|inputs)(?P<place>(?:_[^_]+)*?)_(?P<device>cpu|(?:cuda|xpu|hpu|npu|tpu)_\d+)\.pt")


def steps_in(folder: Path) -> list[Path]:
    """The steps that a runtime wrote into a folder, files or folders, in their order."""
    steps = [
        (int(found[1]), path)
        for path in folder.iterdir()
        for kind in ((_PASS,) if path.is_file() else _STEPS)
        if (found := kind.fullmatch(path.name))
    ]
    return [path for _, path in sorted(steps)]


def step_folder(folder: Path) -> Path:
    """The folder, or the file, of the first step in what a runtime wrote; ``folder`` itself where it is no such thing.

    Raises InputError where it holds several ranks, each of which has a part of every tensor, or several runs.
    """
    while folder.is_dir():
        inside = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
        ranks = [path for path in inside if path.is_dir() and any(kind.fullmatch(path.name) for kind in _RANKS)]
        if len(ranks) > 1:
            names = ", ".join(path.name for path in ranks)
            raise InputError(f"{folder}: holds {names}, each with a part of every tensor; give the folder of one")
        steps = steps_in(folder)
        runs = [path for path in inside if path.is_dir() and _has_steps(path)]
        if len(runs) > 1 and not ranks and not steps:
            names = some([path.name for path in runs], 4)
            raise InputError(f"{folder}: holds {len(runs)} runs, {names}; give the folder of one")
        if folder.name != "tllm_debug" and (folder / "tllm_debug").is_dir() and not ranks and not steps:
            folder /= "tllm_debug"
        elif ranks or steps:
            folder = ranks[0] if ranks else steps[0]
        elif runs:
            folder = runs[0]
        else:
            break
    return folder


def _has_steps(folder: Path) -> bool:
    """Whether a folder holds steps, as a run of vLLM does, whose folder has a random name."""
    return any(path.is_dir() and _STEPS[1].fullmatch(path.name) for path in folder.iterdir())


def is_step_of_vllm(folder: Path) -> bool:
    """Whether the folders in this one hold what vLLM writes for a module."""
    return any(_VLLM.fullmatch(path.name) for path in folder.glob("*/*.pt"))


def vllm_step(folder: Path) -> dict[str, np.ndarray]:
    """Module → its output in one step of vLLM; ``MODULE/outputs_1`` and ``MODULE/inputs_0`` for one of several.

    Shapes and dtypes are those that the files hold. Raises InputError for tensors of several devices.
    """
    arrays: dict[str, np.ndarray] = {}
    devices: set[str] = set()
    for file in sorted(folder.glob("*/*.pt")):
        if (found := _VLLM.fullmatch(file.name)) is None:
            continue
        devices.add(found["device"])
        module, place = file.parent.name, f"{found['what']}{found['place']}"
        for array in _read_pt(file).values():
            arrays[module if place == "outputs" else f"{module}/{place}"] = array
    if len(devices) > 1:
        raise InputError(f"{folder}: tensors of {', '.join(sorted(devices))}, each with a part; expected one device's")
    return arrays


def tensors_of_pt(path: Path) -> dict[str, np.ndarray]:
    """The tensors in a file of ``torch.save``, as ``_read_pt``; in a pass of SGLang, those of that pass.

    What its top module and those after it returned is taken from the next file, where there is one. Shapes and dtypes
    are those that the files hold. Raises InputError as ``_read_pt`` does.
    """
    tensors = _read_pt(path)
    found = _PASS.fullmatch(path.name)
    if found is None or not any(kind.fullmatch(path.parent.name) for kind in _RANKS):
        return tensors
    top = next((inputs[1] for name in tensors if (inputs := _INPUT_OF_TOP.fullmatch(name))), "model")
    following = path.with_name(f"Pass{int(found[1]) + 1:0{len(found[1])}d}.pt")
    after = _read_pt(following) if following.is_file() else {}
    earlier = _of_the_pass_before(tensors, top)
    own = {name: array for name, array in tensors.items() if name not in earlier}
    return own | {name: after[name] for name in _of_the_pass_before(after, top)}


def _of_the_pass_before(tensors: Mapping[str, np.ndarray], top: str) -> list[str]:
    """Names at the beginning of a pass that belong to the one before: the top module's result, and what follows it."""
    proxies = f"{top}.pp_proxy_tensors."
    names = [*tensors]
    if not names or not (re.fullmatch(rf"{re.escape(top)}(/\d+)?", names[0]) or names[0].startswith(proxies)):
        return []
    end = next((i for i, n in enumerate(names) if n.startswith(f"{top}.") and not n.startswith(proxies)), len(names))
    return names[:end]


def _read_pt(path: Path) -> dict[str, np.ndarray]:
    """The tensors in a file of ``torch.save``: a tensor, or mappings and lists of them, by name.

    A tensor alone is called as the file is. Shapes and dtypes are those that the file holds. Raises InputError for a
    file with anything but tensors and plain values: unpickling that could run code.
    """
    from cp_debug.probes.arrays import as_numpy, is_dense

    check_file(path, "file of tensors")
    more = f"{path}: holds more than tensors, and unpickling that runs code; save only tensors"
    with readable(path, "a readable file of torch.save"):
        try:
            content = load_plain(path)
        except pickle.UnpicklingError:
            raise InputError(more) from None
    tensors = {name or path.stem: as_numpy(tensor) for name, tensor in _tensors(content, "") if is_dense(tensor)}
    if not tensors:
        raise InputError(f"{path}: holds no tensors")
    return tensors


def _tensors(content: Any, name: str) -> Iterator[tuple[str, Any]]:
    import torch

    if isinstance(content, torch.Tensor):
        yield name, content.detach()
    elif isinstance(content, Mapping):
        for key, value in content.items():
            yield from _tensors(value, f"{name}/{key}".strip("/"))
    elif isinstance(content, list | tuple):
        for index, value in enumerate(content):
            yield from _tensors(value, f"{name}/{index}".strip("/") if len(content) > 1 else name)


_COLUMNS, _ROWS = ("outputs", "inputs"), ("predictions", "instances")
_DTYPES: dict[str, Any] = {
    "BOOL": np.bool_,
    **{f"{sign}INT{bits}": np.dtype(f"{sign}int{bits}".lower()) for sign in ("", "U") for bits in (8, 16, 32, 64)},
    "FP16": np.float16,
    "FP32": np.float32,
    "FP64": np.float64,
    "BF16": ml_dtypes.bfloat16,
}


@dataclass
class _ServedTensor:
    """A tensor of KServe's protocol V2."""

    name: str
    shape: list[int]
    datatype: str
    data: list[Any] | None = None
    """Numbers in row-major order, flat or nested; None: they are elsewhere, as ``parameters`` say."""
    parameters: dict[str, Any] = field(default_factory=dict)


def served_tensors(document: Any, source: str) -> dict[str, np.ndarray] | None:
    """The tensors of a request or an answer, name → array; None for a document that is neither.

    KServe's have the shape and dtype that it states. TensorFlow Serving's states none: numbers with a point are taken
    for float32, others for int64; rows of named values are put together along a new first axis.
    Raises InputError, with ``source``, for data that is not there, or that does not fit its shape or type.
    """
    if not isinstance(document, Mapping):
        return None
    for key in _COLUMNS:
        given = document.get(key)
        if isinstance(given, list) and given:
            tensors: list[_ServedTensor] = [
                typed(_ServedTensor, item, f"{source}: {key}[{i}]") for i, item in enumerate(given)
            ]
            return {each.name: _of_kserve(each, f"{source}: {each.name!r}") for each in tensors}
        if isinstance(given, Mapping) and given:
            return {str(name): _plain(value, f"{source}: {name!r}") for name, value in given.items()}
    for key in _ROWS:
        rows = document.get(key)
        if isinstance(rows, list) and rows:
            if not all(isinstance(row, Mapping) for row in rows):
                return {key: _plain(rows, f"{source}: {key}")}
            return {
                str(name): _plain([row.get(name) for row in rows], f"{source}: {name!r} of {key}") for name in rows[0]
            }
    return None


def _of_kserve(tensor: _ServedTensor, source: str) -> np.ndarray:
    if tensor.data is None:
        raise InputError(
            f"{source}: has no data in the JSON ({', '.join(tensor.parameters) or 'no parameters'}); expected numbers: "
            "ask the server without binary data and shared memory"
        )
    dtype = _DTYPES.get(tensor.datatype)
    if dtype is None:
        raise InputError(f"{source}: datatype is {tensor.datatype!r}; expected one of {', '.join(_DTYPES)}")
    numbers = _numbers(tensor.data, source)
    if any(size < 0 for size in tensor.shape) or numbers.size != math.prod(tensor.shape):
        raise InputError(f"{source}: has {numbers.size} numbers for the shape {tensor.shape}")
    with np.errstate(over="ignore"):  # beyond the type's range is what the server says: infinite
        held = numbers.astype(dtype)
    if held.dtype.kind in "iub" and not np.array_equal(held, numbers):
        raise InputError(f"{source}: holds numbers that are not {tensor.datatype}")
    return held.reshape(tensor.shape)


def _plain(value: Any, source: str) -> np.ndarray:
    numbers = _numbers(value if isinstance(value, list) else [value], source)
    numbers = numbers if isinstance(value, list) else numbers[0]
    return numbers.astype(np.float32) if numbers.dtype.kind == "f" else numbers


def _numbers(data: Sequence[Any], source: str) -> np.ndarray:
    """Nested lists as an array of float64, int64, uint64 or bool."""
    try:
        numbers = np.array(data)
    except (ValueError, OverflowError):
        raise InputError(f"{source}: its lists have different lengths; expected rows of one length") from None
    if numbers.dtype.kind not in "fiub":
        raise InputError(f"{source}: holds something other than numbers")
    return numbers
