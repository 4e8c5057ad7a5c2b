"""Debug tensors of serving runtimes, in the folders that they write: TensorRT-LLM's, vLLM's, SGLang's.

TensorRT-LLM (``DebugConfig``): ``tllm_debug/PP_1/TP_1/iteration_0/NAME.npy``. vLLM (pull request 21215,
``--intermediate-log-config``): ``step_0/MODULE/outputs_cuda_0.pt`` with ``inputs_0_cuda_0.pt`` beside it. SGLang
(``--debug-tensor-dump-output-folder``): ``TP0_PP0_Rank0_pid7/Pass00000.pt``, a mapping of module to tensor.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from cp_debug.errors import InputError
from cp_debug.reading import check_file

_RANKS = (re.compile(r"PP_\d+"), re.compile(r"TP_\d+"), re.compile(r"TP\d+_PP\d+_Rank\d+_pid\d+"))
_STEPS = (re.compile(r"iteration_(\d+)"), re.compile(r"step_(\d+)"))
_PASS = re.compile(r"Pass(\d+)\.pt")
_VLLM = re.compile(r"(?P<what>outputs|inputs)(?P<place>(?:_[^_]+)*?)_(?P<device>cpu|(?:cuda|xpu|hpu|npu|tpu)_\d+)\.pt")


def step_folder(folder: Path) -> Path:
    """The folder, or the file, of the first step in what a runtime wrote; ``folder`` itself where it is no such thing.

    Raises InputError where it holds several ranks: each of them has a part of every tensor.
    """
    while folder.is_dir():
        inside = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
        ranks = [path for path in inside if path.is_dir() and any(kind.fullmatch(path.name) for kind in _RANKS)]
        if len(ranks) > 1:
            names = ", ".join(path.name for path in ranks)
            raise InputError(f"{folder}: holds {names}, each with a part of every tensor; give the folder of one")
        steps = sorted(
            (int(found[1]), path)
            for path in inside
            for kind in ((_PASS,) if path.is_file() else _STEPS)
            if (found := kind.fullmatch(path.name))
        )
        if folder.name != "tllm_debug" and (folder / "tllm_debug").is_dir() and not ranks and not steps:
            folder /= "tllm_debug"
        elif ranks or steps:
            folder = ranks[0] if ranks else steps[0][1]
        else:
            break
    return folder


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
        for array in read_pt(file).values():
            arrays[module if place == "outputs" else f"{module}/{place}"] = array
    if len(devices) > 1:
        raise InputError(f"{folder}: tensors of {', '.join(sorted(devices))}, each with a part; expected one device's")
    return arrays


def read_pt(path: Path) -> dict[str, np.ndarray]:
    """The tensors in a file of ``torch.save``: a tensor, or mappings and lists of them, by name.

    A tensor alone is called as the file is. Shapes and dtypes are those that the file holds. Raises InputError for a
    file with anything but tensors and plain values: unpickling that could run code.
    """
    import torch

    from cp_debug.probes.arrays import as_numpy, is_dense

    check_file(path, "file of tensors")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise InputError(
            f"{path}: holds more than tensors, and unpickling that runs code; save tensors alone"
        ) from None
    except Exception as error:  # torch raises nearly everything on a damaged file
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise InputError(f"{path}: not a readable file of torch.save: {reason}") from None
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
